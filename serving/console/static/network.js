// The console of all nodes of a network on one machine.

import { Chart, Series } from "./charts.js";
import { byId, h, keyed, setText } from "./dom.js";
import { NONE, amount, count, number, perSecond, percent, seconds, shortKey } from "./format.js";
import { Graph, Rates } from "./graph.js";
import { Changes, start } from "./shell.js";
import { Table } from "./tables.js";

const MINUTE_S = 60, SMOOTH_S = 15, IN_GRAPH = 16;
const SUMS = ["accepted", "answered", "failed", "on_time", "handed_over"];
const BECAME = { up: "is up", down: "has no engine", gone: "does not answer" };
const NOW = ["running", "waiting", "held"];

let series = null, graph = null;
const rates = new Rates(), changes = new Changes();
const kept = new Map(); // totals of each node, also of those that do not answer

const charts = [
  {
    title: "Answered in time", unit: "% of those that ended, last minute", range: [0, 1.02], axis: (y) => `${Math.round(100 * y)} %`,
    series: [{ label: "in time", format: percent }], of: (s) => [s.share("on_time", ["answered", "failed"], MINUTE_S)],
  },
  {
    title: "Engines and queues", unit: "requests, all nodes",
    series: [{ label: "running", format: count }, { label: "waiting", format: count }, { label: "held", format: count }],
    of: (s) => NOW.map((name) => s.columns[name]),
  },
  {
    title: "Throughput", unit: "requests/s", least: 0.5,
    series: [{ label: "answered", format: perSecond }, { label: "by another node", format: perSecond }],
    of: (s) => [s.rate("answered", SMOOTH_S), s.rate("handed_over", SMOOTH_S)],
  },
  {
    title: "Latency", unit: "mean of answers, last 15 s", axis: seconds, series: [{ label: "arrival to end", format: seconds }],
    of: (s) => [s.share("latency_s", ["answered"], SMOOTH_S)],
  },
].map((made) => {
  const chart = new Chart(byId("charts"), made);
  return Object.assign(chart, { of: made.of, least: made.least });
});

for (const button of document.querySelectorAll("[name=window]")) {
  button.addEventListener("change", () => charts.forEach((chart) => chart.show(Number(button.value))));
}

const stateOf = (node) => (!node.answers ? ["gone", "✕ does not answer", "bad"] : node.engine.up ? ["up", "● up", "good"] : ["down", "▲ engine down", "warn"]);
const nameOf = (node) => node.name ?? node.url.replace("http://", "");

const table = new Table(byId("nodes"), {
  label: "Nodes of the network", empty: "",
  columns: [
    { label: "Node", head: true, of: (n) => ({ text: nameOf(n), note: n.url.replace("http://", "") }) },
    { label: "State", of: (n) => ({ text: stateOf(n)[1], class: stateOf(n)[2], note: n.engine?.reason ?? "", wide: true }) },
    { label: "Running", number: true, of: (n) => (n.engine ? { text: `${count(n.engine.running)} / ${count(n.engine.max_num_seqs)}`, note: `KV ${percent(n.engine.kv_use)}`, bar: n.engine.kv_use } : NONE) },
    { label: "Waiting, held", number: true, of: (n) => (n.engine ? `${count(n.engine.waiting)}, ${count(n.held)}` : NONE) },
    { label: "Answered", number: true, of: (n) => (n.requests ? { text: count(n.requests.answered), note: `of ${count(n.requests.accepted)}` } : NONE) },
    { label: "In time", number: true, of: (n) => (n.requests?.answered ? percent(n.requests.on_time / n.requests.answered) : NONE) },
    { label: "Mean latency", number: true, of: (n) => (n.requests?.answered ? seconds(n.requests.mean_latency_s) : NONE) },
    { label: "Handed over", number: true, of: (n) => (n.requests ? count(n.requests.handed_over) : NONE) },
    { label: "For peers", number: true, of: (n) => (n.peers ? { text: `${count(n.remote)} now`, note: `${count(n.peers.reduce((sum, peer) => sum + peer.served, 0))} taken` } : NONE) },
    { label: "Tariff", number: true, title: "credits per 1,000 output tokens", of: (n) => (n.tariff ? { text: number(n.tariff.output), note: `cost + ${number(n.markup)}` } : NONE) },
    { label: "Money", number: true, of: (n) => (n.has_ledger ? { text: `${amount(n.paid)} paid`, note: `${amount(n.earned)} earned` } : NONE) },
  ],
});

const otherName = (other) => other.label || shortKey(other.key);

const othersTable = new Table(byId("others"), {
  label: "Peers of other versions", empty: "",
  columns: [
    { label: "Peer", head: true, of: (o) => ({ text: otherName(o), note: shortKey(o.key), title: o.url }) },
    { label: "Seen by", of: (o) => nameOf(o.node) },
    { label: "State", of: (o) => ({ text: "▲ other version", class: "warn", note: o.reason, wide: true }) },
  ],
});
// Peers with which a node has no version of the protocol in common, of nodes that answer.
function others(nodes) {
  const found = nodes.filter((node) => node.answers).flatMap((node) => node.other_versions.map((other) => ({ ...other, node, id: `${node.url} ${other.key}` })));
  byId("others-panel").hidden = !found.length;
  othersTable.update(found, (other) => other.id);
  return found.map((other) => [other.id, ["other", `${otherName(other)}, a peer of ${nameOf(other.node)}, ${other.reason}`, "note"]]);
}

function link(nodes) {
  for (const row of table.body.children) {
    const node = nodes.find((each) => each.url === row.dataset.key);
    const value = row.firstElementChild.firstElementChild;
    if (value.firstElementChild || !node?.name) continue;
    value.replaceChildren(h("a", { href: node.url, target: "_blank", rel: "noopener", "aria-label": `Console of ${node.name}` }, node.name));
  }
}

function sums(nodes) {
  for (const node of nodes.filter((each) => each.requests)) kept.set(node.url, node.requests);
  const totals = [...kept.values()];
  const there = nodes.filter((node) => node.answers);
  const now = (name) => there.reduce((sum, node) => sum + (name === "held" ? node.held : node.engine.up ? node.engine[name] : 0), 0);
  return [
    Date.now() / 1000, ...NOW.map(now), ...SUMS.map((name) => totals.reduce((sum, each) => sum + each[name], 0)),
    totals.reduce((sum, each) => sum + each.answered * each.mean_latency_s, 0),
  ];
}

function tiles(nodes) {
  const s = series, last = (column) => column.at(-1) ?? null;
  const there = nodes.filter((node) => node.answers);
  const [ended] = s.grew("answered", MINUTE_S).at(-1);
  const since = s.columns.at_s.at(-1) - s.columns.at_s[0] < MINUTE_S ? "since this page is open" : "in the last minute";
  const handed = last(s.share("handed_over", ["answered"], MINUTE_S));
  const shown = [
    ["Nodes", `${there.length} / ${nodes.length}`, there.length === nodes.length ? "all answer" : `${nodes.length - there.length} without an answer`],
    ["Answered in time", percent(last(s.share("on_time", ["answered", "failed"], MINUTE_S))), ended ? `of ${count(ended)} ${since}` : `nothing ended ${since}`],
    ["Answers", perSecond(last(s.rate("answered", SMOOTH_S))), handed === null ? "over all nodes" : `${percent(handed)} of them by another node`],
    ["Mean latency", seconds(last(s.share("latency_s", ["answered"], MINUTE_S))), since],
    ["Running", count(s.last("running")), `${count(s.last("waiting"))} waiting in engines`],
    ["Held", count(s.last("held")), "not decided yet"],
  ];
  keyed(byId("tiles"), shown, (each) => each[0], ([label]) => h("div", { class: "tile" }, h("dt", {}, label), h("dd", { class: "big" }), h("dd", { class: "note" })), (tile, [, value, note]) => {
    setText(tile.children[1], value);
    setText(tile.children[2], note);
  });
}

function draw(nodes) {
  const near = nodes.filter((node) => node.key ?? !node.name).slice(0, IN_GRAPH);
  graph ??= new Graph(byId("graph"), { label: "All nodes", centre: null, pick: (key) => table.point(near.find((node) => (node.key ?? node.url) === key)?.url ?? key) });
  const shown = near.map((node) => ({
    key: node.key ?? node.url, label: nameOf(node), inside: node.engine ? count(node.engine.running) : "", state: stateOf(node)[0], use: node.answers ? node.engine.kv_use : 0,
    lines: [node.answers ? `${number(node.tariff.output)} cr/ktok` : "does not answer"],
    about: `${nameOf(node)}: ${node.answers ? `${count(node.engine.running)} running, ${number(node.tariff.output)} credits per 1,000 output tokens` : "does not answer"}`,
  }));
  const edges = near.filter((node) => node.answers).flatMap((node) => node.peers.map((peer) => {
    const per_s = rates.of(`${node.key} ${peer.key}`, peer.handed);
    return { from: node.key, to: peer.key, kind: "out", width: per_s > 0.01 || peer.out ? Math.log2(1 + 2 * per_s + peer.out / 4) + 0.3 : 0, text: per_s > 0.05 ? perSecond(per_s) : "" };
  })).filter((edge) => edge.width);
  graph.update(shown, edges);
}

start({
  hello() {
    series = new Series(Object.fromEntries(["at_s", ...NOW, ...SUMS, "latency_s"].map((name) => [name, []])));
  },
  snapshot({ nodes }) {
    series.push(sums(nodes));
    for (const chart of charts) chart.update([series.columns.at_s, ...chart.of(series)]);
    const down = nodes.filter((node) => stateOf(node)[0] !== "up").length;
    setText(byId("network-state"), down ? `▲ ${down} of ${nodes.length} down` : `● ${nodes.length} up`);
    byId("network-state").className = `pill ${down ? "warn" : "good"}`;
    const first = nodes.find((node) => node.serves);
    setText(byId("facts"), first ? [first.serves.join(", "), `policy ${first.policy}`, first.speed === 1 ? "" : `${number(first.speed)} market seconds a second`].filter(Boolean).join(" · ") : "");
    document.title = `${nodes.length} nodes · wwwserve`;
    tiles(nodes);
    draw(nodes);
    table.update(nodes, (node) => node.url, (node) => (node.answers ? "" : "gone"));
    link(nodes);
    changes.look(new Map([...nodes.map((node) => [node.url, [stateOf(node)[0], `${nameOf(node)} ${BECAME[stateOf(node)[0]]}`, stateOf(node)[2]]]), ...others(nodes)]));
  },
});
