// The console of one node.

import { Chart, Series } from "./charts.js";
import { Decisions } from "./decisions.js";
import { byId, h, keyed, setText } from "./dom.js";
import { NONE, amount, count, credits, lateness, number, perSecond, percent, seconds, shortKey, tokens } from "./format.js";
import { Graph, Rates } from "./graph.js";
import { Changes, start } from "./shell.js";
import { Table } from "./tables.js";

const MINUTE_S = 60, SMOOTH_S = 15;
const IN_GRAPH = 12, DUELS_SHOWN = 8;

let series = null, decisions = null, graph = null;
const rates = new Rates(), changes = new Changes();
const nameOf = (peer) => peer.label ?? shortKey(peer.key);
const names = new Map();

// Charts.

const charts = [
  {
    title: "Answered in time", unit: "% of those that ended, last minute", range: [0, 1.02], axis: (y) => `${Math.round(100 * y)} %`,
    series: [{ label: "in time", format: percent }], of: (s) => [s.share("on_time", ["answered", "failed"], MINUTE_S)],
  },
  {
    title: "Engine and queue", unit: "requests",
    series: [{ label: "running", format: count }, { label: "waiting", format: count }, { label: "held", format: count }],
    of: (s) => [s.columns.running, s.columns.waiting, s.columns.held],
  },
  {
    title: "Throughput", unit: "requests/s",
    series: [{ label: "answered", format: perSecond }, { label: "by peers", format: perSecond }, { label: "for peers", format: perSecond }],
    of: (s) => [s.rate("answered", SMOOTH_S), s.rate("handed_over", SMOOTH_S), s.rate("served", SMOOTH_S)], least: 0.5,
  },
  {
    title: "Latency", unit: "mean of answers, last 15 s", axis: seconds, series: [{ label: "arrival to end", format: seconds }],
    of: (s) => [s.share("latency_s", ["answered"], SMOOTH_S)],
  },
  {
    title: "KV cache", unit: "% of it, and of prompt tokens", range: [0, 1.02], axis: (y) => `${Math.round(100 * y)} %`,
    series: [{ label: "in use", format: percent }, { label: "prompt tokens found cached", format: percent }],
    of: (s) => [s.columns.kv_use, s.share("cached_tokens", ["prompt_tokens"], MINUTE_S)],
  },
  {
    title: "Tariff", unit: "credits per 1,000 output tokens", least: 0.01,
    series: [{ label: "price to peers", format: number }, { label: "own cost", format: number }],
    of: (s) => [s.columns.price, s.columns.cost],
  },
].map((made) => {
  const chart = new Chart(byId("charts"), made);
  return Object.assign(chart, { of: made.of, least: made.least });
});

for (const button of document.querySelectorAll("[name=window]")) {
  button.addEventListener("change", () => charts.forEach((chart) => chart.show(Number(button.value))));
}

// Numbers at the top.

function tiles(seen) {
  const s = series, engine = seen.engine, most = engine.profile.max_num_seqs;
  const [ended] = s.grew("answered", MINUTE_S).at(-1) ?? [0];
  const [failed] = s.grew("failed", MINUTE_S).at(-1) ?? [0];
  const last = (column) => column.at(-1) ?? null;
  const handed = last(s.share("handed_over", ["answered"], MINUTE_S));
  const ledger = seen.ledger?.totals;
  const told = seen.prefix.local.reports + seen.prefix.peer.reports;
  const shown = [
    ["Answered in time", percent(last(s.share("on_time", ["answered", "failed"], MINUTE_S))), ended + failed ? `of ${count(ended + failed)} in the last minute${failed ? `, ${count(failed)} failed` : ""}` : "nothing ended in the last minute"],
    ["Answers", perSecond(last(s.rate("answered", SMOOTH_S))), handed === null ? `${count(seen.requests.answered)} since the start` : `${percent(handed)} of them by peers`],
    ["Mean latency", seconds(last(s.share("latency_s", ["answered"], MINUTE_S))), "last minute"],
    ["Running", engine.up ? `${count(engine.running)} / ${count(most)}` : NONE, engine.up ? `${count(engine.waiting)} waiting in the engine` : "the engine is down", engine.up ? engine.running / most : 0],
    ["Held", count(seen.held), "not decided yet"],
    ["For peers", count(seen.remote), `${perSecond(last(s.rate("served", SMOOTH_S)))} taken`],
    ["Found cached", told ? percent(last(s.share("cached_tokens", ["prompt_tokens"], MINUTE_S))) : NONE, told ? "of prompt tokens, last minute" : "the engine does not report it"],
    ["Price", `${number(seen.tariff.output)} cr`, `per 1,000 output tokens, cost + ${number(seen.markup)}`],
    ["Credit", ledger ? credits(ledger.free) : NONE, ledger ? `${credits(ledger.escrow)} in escrow` : "no ledger"],
  ];
  keyed(byId("tiles"), shown, (each) => each[0], ([label]) => h("div", { class: "tile" }, h("dt", {}, label), h("dd", { class: "big" }), h("dd", { class: "note" }), h("span", { class: "bar", "aria-hidden": "true" }, h("span", {}))), (tile, [, value, note, bar]) => {
    setText(tile.children[1], value);
    setText(tile.children[2], note);
    tile.children[3].hidden = bar === undefined;
    tile.children[3].firstElementChild.style.width = `${Math.round(100 * Math.min(1, bar ?? 0))}%`;
  });
}

// Peers.

const enginesTable = new Table(byId("engines"), {
  label: "Engines of this node",
  empty: "",
  columns: [
    { label: "Engine", head: true, of: (e) => ({ text: e.engine, note: e.reason, wide: true }) },
    { label: "State", of: (e) => (e.takes ? { text: "● takes requests", class: "good" } : e.up ? { text: "▲ full", class: "warn" } : { text: "✕ down", class: "bad" }) },
    { label: "Running", number: true, of: (e) => (e.takes ? { text: count(e.running), note: `KV ${percent(e.kv_use)}`, bar: e.kv_use } : NONE) },
    { label: "Waiting", number: true, of: (e) => (e.takes ? count(e.waiting) : NONE) },
    { label: "Of this node", number: true, title: "requests that it has of this node", of: (e) => count(e.out) },
  ],
});

function engines({ each }) {
  byId("engines").hidden = each.length < 2;
  if (each.length > 1) enginesTable.update(each, (engine) => engine.engine);
}

function state(peer) {
  if (peer.other) return { text: "▲ other version", class: "warn", note: peer.other.reason, wide: true };
  if (!peer.there) return { text: "✕ gone", class: "bad" };
  return { text: "● there", class: "good", note: `heard ${seconds(Math.max(0, peer.age_s))} ago` };
}

const peersTable = new Table(byId("peers"), {
  label: "Peers as this node sees them",
  empty: "No peers yet. List them under peers in node.yaml, or join a Zenoh network.",
  columns: [
    { label: "Peer", head: true, of: (p) => ({ text: nameOf(p), note: shortKey(p.key), title: p.url ?? "" }) },
    { label: "State", of: state },
    { label: "Load", number: true, title: "requests running and waiting, by its advert", of: (p) => ({ text: `${count(p.running)} + ${count(p.waiting)}`, note: p.kv_use === null ? "" : `KV ${percent(p.kv_use)}`, bar: p.kv_use }) },
    { label: "Tariff", number: true, title: "credits per 1,000 tokens of input, cached input and output", of: (p) => ({ text: number(p.tariff.output), note: `in ${number(p.tariff.input)}, cached ${number(p.tariff.cached_input)}` }) },
    { label: "It does for us", number: true, title: "requests that it has now, and that it has answered of those it took", of: (p) => ({ text: `${count(p.out)} now`, note: `${perSecond(p.out_s)}, ${count(p.answered)} of ${count(p.handed)} answered` }) },
    { label: "We do for it", number: true, title: "its requests that this node has now, and all that it took", of: (p) => ({ text: `${count(p.here)} now`, note: `${perSecond(p.in_s)}, ${count(p.served)} taken` }) },
    { label: "Delivery", title: "how its answers come, against what it promised: of finished ones, and of those on their way", of: (p) => ({ text: p.handed ? lateness(p.record) : NONE, note: p.overdue_s > 0 ? `first tokens ${seconds(p.overdue_s)} overdue` : p.out ? `under way ${lateness(p.pace)}` : "" }) },
    { label: "Stake", number: true, of: (p) => credits(p.stake) },
    { label: "Money", number: true, title: "what this node has paid to the peer, and earned from it", of: (p) => (p.channel ? { text: `${amount(p.channel.paid)} paid`, note: `${amount(p.channel.earned)} earned` } : NONE) },
    { label: "Duels", number: true, of: (p) => (p.duels_won + p.duels_lost ? `${count(p.duels_won)} won, ${count(p.duels_lost)} lost` : NONE) },
  ].map((column, k) => (k < 2 ? column : { ...column, of: (p) => (p.known ? column.of(p) : NONE) })), // of others there is a name alone
});

function peers(seen) {
  const channels = new Map((seen.ledger?.channels ?? []).map((channel) => [channel.peer, channel]));
  const others = new Map(seen.other_versions.map((each) => [each.key, each]));
  const known = seen.peers.map((peer) => ({ ...peer, known: true, other: others.get(peer.key), channel: channels.get(peer.key), out_s: rates.of(`${peer.key} out`, peer.handed), in_s: rates.of(`${peer.key} in`, peer.served) }));
  const met = new Set(known.map((peer) => peer.key));
  const all = [...known, ...seen.other_versions.filter((each) => !met.has(each.key)).map((each) => ({ ...each, known: false, there: false, other: each }))];
  for (const peer of all) names.set(peer.key, nameOf(peer));
  all.sort((a, b) => b.there - a.there || nameOf(a).localeCompare(nameOf(b), "en", { numeric: true }));
  peersTable.update(all, (peer) => peer.key, (peer) => (peer.there || peer.other ? "" : "gone"));
  const more = seen.peers_known - seen.peers.length;
  byId("peers-more").hidden = !more;
  setText(byId("peers-more"), `${count(more)} more peers are known, with which there is less to do.`);

  const busy = [...known].sort((a, b) => b.there - a.there || b.handed + b.served - a.handed - a.served).slice(0, IN_GRAPH);
  const near = known.filter((peer) => busy.includes(peer)).sort((a, b) => all.indexOf(a) - all.indexOf(b));
  byId("graph").hidden = !near.length;
  graph ??= new Graph(byId("graph"), { label: "This node and its peers", centre: seen.key, pick: (key) => peersTable.point(key) });
  const own = { key: seen.key, label: seen.name, inside: "own", lines: [`${number(seen.tariff.output)} cr/ktok`], use: seen.engine.kv_use, state: seen.engine.up ? "up" : "down", about: `${seen.name}, this node: ${count(seen.engine.running)} running` };
  const nodes = near.map((peer) => ({
    key: peer.key, label: nameOf(peer), inside: peer.there ? count(peer.running) : "", lines: [peer.there ? `${number(peer.tariff.output)} cr/ktok` : "gone"], use: peer.there ? peer.kv_use : 0, state: peer.there ? "up" : "gone",
    about: `${nameOf(peer)}: ${peer.there ? `${count(peer.running)} running, ${number(peer.tariff.output)} credits per 1,000 output tokens, ${perSecond(peer.out_s)} to it, ${perSecond(peer.in_s)} from it` : "gone"}`,
  }));
  const edges = near.filter((peer) => peer.there).flatMap((peer) => [
    { from: seen.key, to: peer.key, kind: "out", width: flow(peer.out_s, peer.out), text: peer.out_s > 0.05 ? perSecond(peer.out_s) : "" },
    { from: peer.key, to: seen.key, kind: "in", width: flow(peer.in_s, peer.here), text: peer.in_s > 0.05 ? perSecond(peer.in_s) : "" },
  ]);
  graph.update([own, ...nodes], edges);
}

const flow = (per_s, now) => (per_s > 0.01 || now ? Math.log2(1 + 2 * per_s + now / 4) + 0.3 : 0);

// Money, duels, sessions.

const channelsTable = new Table(byId("channels"), {
  label: "Channels of the ledger",
  empty: "No channel is open yet.",
  columns: [
    { label: "With", head: true, of: (c) => ({ text: names.get(c.peer) ?? shortKey(c.peer), note: shortKey(c.peer) }) },
    { label: "Ours, free", number: true, of: (c) => ({ text: amount(c.free), bar: c.free / (c.free + c.escrow + c.peer_free + c.peer_escrow || 1) }) },
    { label: "in escrow", number: true, minor: true, of: (c) => amount(c.escrow) },
    { label: "Theirs, free", number: true, of: (c) => amount(c.peer_free) },
    { label: "in escrow", number: true, minor: true, of: (c) => amount(c.peer_escrow) },
    { label: "Paid", number: true, of: (c) => amount(c.paid) },
    { label: "Earned", number: true, of: (c) => amount(c.earned) },
    { label: "Unsigned", number: true, minor: true, title: "vouchers that the peer has not acknowledged", of: (c) => count(c.unacknowledged) },
    { label: "Dispute", title: "short: what receipts paid less than was delivered; over: what was paid for what nobody saw", of: (c) => dispute(c) },
  ],
});

function dispute(c) {
  const parts = [c.short > 0 ? `short ${credits(c.short)}` : "", c.over > 0 ? `over ${credits(c.over)}` : ""].filter(Boolean);
  if (c.closed) return { text: c.closed === "to be" ? "to be closed" : `closed ${c.closed}`, class: "muted", note: c.disagreement, wide: true };
  if (!c.reconciled) return { text: "◐ not reconciled", class: "warn", note: c.disagreement, wide: true };
  if (c.disagreement) return { text: `▲ ${parts.join(", ") || "it disagreed"}`, class: "warn", note: c.disagreement, wide: true };
  return parts.length ? { text: `▲ ${parts.join(", ")}`, class: "warn" } : { text: "none", class: "muted" };
}

const LOST_BY = { verdict: "a verdict in a duel", conflict: "two vouchers of one number", twice: "two stakes of one number" };

function money(seen) {
  const ledger = seen.ledger;
  byId("money-none").hidden = ledger !== null;
  byId("money").hidden = ledger === null;
  if (!ledger) return;
  channelsTable.update(ledger.channels, (channel) => channel.peer, (channel) => (channel.disagreement ? "disputed" : ""));
  setText(byId("money-sum"), `${credits(ledger.totals.free)} free and ${credits(ledger.totals.escrow)} in escrow in ${count(ledger.channels_known)} channels; ${credits(ledger.totals.paid)} paid, ${credits(ledger.totals.earned)} earned; stake ${credits(seen.stake)}; payment: ${seen.payment.replace("_", " ")}${ledger.full ? "; the ledger cannot be written" : ""}`);
  const lost = ledger.stake_lost.map((each) => `${names.get(each.peer) ?? shortKey(each.peer)} lost stake by ${LOST_BY[each.by]}`);
  setText(byId("stake-lost"), lost.length ? `${lost.join("; ")}.` : "Nobody has lost stake.");
}

const duelsTable = new Table(byId("duels"), {
  label: "The last duels",
  empty: "No duel has ended yet.",
  columns: [
    { label: "Between", head: true, of: (d) => d.executors.map(nameOfKey).join(" and ") },
    { label: "Outcome", of: (d) => ({ text: d.winner ? `✓ ${nameOfKey(d.winner)} won` : d.outcome === "tie" ? "= tie" : "○ void", note: `${seconds(d.ago_s)} ago` }) },
    { label: "Votes", of: (d) => Object.entries(d.votes).map(([judge, vote]) => `${nameOfKey(judge)}: ${vote === "a" ? nameOfKey(d.executors[0]) : vote === "b" ? nameOfKey(d.executors[1]) : vote}`).join(", ") || NONE },
  ],
});

const nameOfKey = (key) => names.get(key) ?? shortKey(key);

function duels(seen) {
  const { probability, open, won, tie, void: nothing, recent } = seen.duels;
  setText(byId("duels-sum"), probability ? `${percent(probability)} of what is handed over goes to two peers. ${count(won)} were won by one, ${count(tie)} tied, ${count(nothing)} came to nothing, ${count(open)} are open.` : "Duels are off: market.duel_probability is 0.");
  duelsTable.update([...recent].reverse().slice(0, DUELS_SHOWN).map((each, k) => ({ ...each, number: won + tie + nothing - k })), (each) => each.number);
}

function sessions(seen) {
  const { local, peer, entries } = seen.prefix, requests = seen.requests;
  const cache = (where) => (where.reports ? `${percent(where.prompt ? where.reported / where.prompt : null)} of ${tokens(where.prompt)} of prompts` : "not reported");
  const right = (where) => (where.reports ? `${where.alarm ? "▲ off by" : "within"} ${percent(where.drift)} of the prompt` : NONE);
  const shown = [
    ["Requests that continue a session", requests.accepted ? `${percent(requests.continued / requests.accepted)} of ${count(requests.accepted)}` : NONE],
    ["Found cached, own engine", cache(local)], ["Found cached, peers", cache(peer)],
    ["Prediction, own engine", right(local)], ["Prediction, peers", right(peer)],
    ["Prefixes known", count(entries)],
  ];
  keyed(byId("sessions"), shown, (each) => each[0], ([label]) => h("div", {}, h("dt", {}, label), h("dd", {})), (element, [, said]) => setText(element.lastElementChild, said));
}

// The head.

function head(seen) {
  const each = seen.engine.each, taking = each.filter((engine) => engine.takes).length, fewer = each.length > 1 && taking < each.length;
  const sign = seen.ends ? "◐ shutting down" : !seen.engine.up ? "✕ engine down" : each.length < 2 ? "● engine up" : `${fewer ? "▲" : "●"} ${taking} of ${each.length} engines up`;
  document.title = `${seen.name} · wwwserve`;
  setText(byId("name"), seen.name);
  setText(byId("engine-state"), sign);
  byId("engine-state").className = `pill ${!seen.engine.up && !seen.ends ? "bad" : seen.ends || fewer ? "warn" : "good"}`;
  setText(byId("engine-reason"), seen.engine.reason);
  byId("engine-reason").hidden = !seen.engine.reason;
  setText(byId("facts"), [seen.serves.join(", ") || "no model yet", `policy ${seen.policy}`, `key ${shortKey(seen.key)}`, seen.speed === 1 ? "" : `${number(seen.speed)} market seconds a second`].filter(Boolean).join(" · "));
}

function watch(seen) {
  const now = new Map(seen.peers.map((peer) => [peer.key, [peer.there, `${nameOf(peer)} is ${peer.there ? "there" : "gone"}`, peer.there ? "good" : "bad"]]));
  for (const other of seen.other_versions) now.set(other.key, ["other", `${nameOf(other)} ${other.reason}`, "note"]);
  if (seen.engine.each.length > 1) for (const one of seen.engine.each) now.set(`engine ${one.engine}`, [one.up, `the engine ${one.engine} is ${one.up ? "up" : "down"}`, one.up ? "good" : "bad"]);
  now.set("engine", [seen.engine.up, seen.engine.up ? "the engine is up" : `the engine is down: ${seen.engine.reason}`, seen.engine.up ? "good" : "bad"]);
  if (seen.ledger) now.set("full", [seen.ledger.full, seen.ledger.full ? "the ledger cannot be written" : "the ledger can be written", seen.ledger.full ? "bad" : "good"]);
  for (const where of ["local", "peer"]) now.set(where, [seen.prefix[where].alarm, seen.prefix[where].alarm ? "prefixes are cached otherwise than predicted" : "prefixes are cached as predicted", seen.prefix[where].alarm ? "bad" : "good"]);
  changes.look(now);
}

start({
  hello(told) {
    series = new Series(told.history);
    decisions = new Decisions(told.legend);
    decisions.add(told.reasons);
    setText(byId("classes"), told.classes.map((each) => `${each.name} within ${seconds(each.deadline_s)}`).join(", "));
  },
  snapshot(seen) {
    series.push(seen.now);
    for (const chart of charts) chart.update([series.columns.at_s, ...chart.of(series)]);
    head(seen);
    tiles(seen);
    engines(seen.engine);
    peers(seen);
    money(seen);
    duels(seen);
    sessions(seen);
    watch(seen);
    decisions.names = names;
    decisions.add(seen.reasons);
  },
});
