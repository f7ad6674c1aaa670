// The last decisions, and of one of them why: what was seen of each place that the request could have gone to.

import { byId, h, keyed, setAttributes, setText } from "./dom.js";
import { NONE, credits, lateness, number, percent, seconds, signed, time, tokens } from "./format.js";
import { Table } from "./tables.js";

const MOST = 60;

export class Decisions {
  constructor(legend) {
    this.all = [];
    this.legend = legend;
    this.node = Object.fromEntries(legend.node.map((feature, k) => [feature.name, k]));
    this.request = Object.fromEntries(legend.request.map((feature, k) => [feature.name, k]));
    this.names = new Map();
    this.chosen = null;
    const list = byId("decisions");
    list.replaceChildren();
    list.keyed = new Map();
    list.onkeydown = (event) => {
      const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
      const next = step && event.target.closest("li")?.[step]?.firstElementChild;
      if (!next) return;
      event.preventDefault();
      next.focus();
      next.click();
    };
    byId("places").replaceChildren();
    this.places = new Table(byId("places"), { label: "What was seen of each place", columns: this.columns(), empty: "" });
    byId("follow").onclick = () => this.choose(null);
  }

  seen(place, name) {
    return place.seen ? place.seen[this.node[name]] : null;
  }

  about(decision, name) {
    return decision.request[this.request[name]];
  }

  name(place) {
    if (place === "local") return "own engine";
    if (place === "hold") return "hold";
    return this.names.get(place) ?? place.slice(0, 8);
  }

  add(decisions) {
    const newest = this.all[0]?.number ?? 0;
    const now_s = Date.now() / 1000;
    for (const each of decisions) {
      if (each.number > newest) this.all.unshift({ ...each, at_s: now_s - each.ago_s });
    }
    this.all.length = Math.min(MOST, this.all.length);
    if (this.chosen && !this.all.includes(this.chosen)) this.all.push(this.chosen);
    this.draw();
  }

  choose(decision) {
    this.chosen = decision;
    this.draw();
  }

  draw() {
    const shown = this.chosen ?? this.all[0];
    byId("decisions-none").hidden = this.all.length > 0;
    byId("why").hidden = !shown;
    byId("follow").hidden = !this.chosen;
    keyed(byId("decisions"), this.all, (each) => each.number, (each) => this.line(each), (element, each) => {
      setAttributes(element.firstElementChild, { "aria-pressed": each === shown });
      setText(element.querySelector(".to"), this.name(each.to));
    });
    if (shown) this.explain(shown);
  }

  line(decision) {
    const probable = this.taken(decision)?.probability;
    return h(
      "li", {},
      h(
        "button", { type: "button", onclick: () => this.choose(decision) },
        h("time", {}, time(decision.at_s)),
        h("span", { class: `to ${kind(decision.to)}` }),
        h("span", { class: "muted" }, `${decision.class} · ${tokens(this.about(decision, "prompt"))}`),
        h("span", { class: "number" }, probable === null || probable === undefined ? "" : percent(probable)),
      ),
    );
  }

  taken(decision) {
    return decision.to === "hold" ? decision.hold : decision.places.find((each) => each.place === decision.to);
  }

  explain(decision) {
    const value = this.about(decision, "value");
    const rows = decision.places.map((each) => ({ ...each, value, taken: each.place === decision.to }));
    rows.push({ place: "hold", legal: decision.hold.legal, probability: decision.hold.probability, taken: decision.to === "hold", value });
    setText(byId("why-title"), decision.to === "hold" ? "Why it is held" : decision.to === "local" ? "Why the own engine" : `Why ${this.name(decision.to)}`);
    setText(byId("why-text"), this.sentence(decision, rows));
    const about = [
      ["Arrived", time(decision.at_s - this.about(decision, "waited_s"))],
      ["Class", decision.class], ["Prompt", tokens(this.about(decision, "prompt"))],
      ["Expected answer", tokens(this.about(decision, "output"))],
      ["Turn of its session", number(this.about(decision, "turn"))],
      ["Worth in time", credits(value)],
      ["Left to its last deadline", seconds(Math.max(0, this.about(decision, "last_slack_s")))],
    ];
    keyed(byId("why-request"), about, (each) => each[0], ([name]) => h("div", {}, h("dt", {}, name), h("dd", {})), (element, [, said]) => setText(element.lastElementChild, said));
    this.places.update(rows, (each) => each.place, (each) => [each.taken ? "taken" : "", each.legal ? "" : "barred"].join(" ").trim());
    if (byId("all").open) this.everything(rows.filter((each) => each.seen));
    else byId("all").ontoggle = () => byId("all").open && this.everything(rows.filter((each) => each.seen));
  }

  sentence(decision, rows) {
    const taken = rows.find((each) => each.taken);
    const other = rows.filter((each) => !each.taken && each.legal).sort((a, b) => (b.probability ?? -1) - (a.probability ?? -1))[0];
    const expects = (each) =>
      each.seen ? `${seconds(this.seen(each, "finish_s"))} to the end, ${percent(this.seen(each, "chance"))} likely in time, ${each.place === "local" ? "costs" : "for"} ${credits(this.seen(each, "cost") * each.value)}` : "decided again at the next answer or tick";
    const place = this.name(taken.place);
    const first = `${taken.seen && taken.place !== "local" ? place : place[0].toUpperCase() + place.slice(1)}: ${expects(taken)}.`;
    if (!other) return `${first} Nothing else was possible.`;
    const best = rows.every((each) => each.taken || (each.probability ?? 0) <= (taken.probability ?? 1));
    const next = `${best ? "Next best" : "More probable"} was ${this.name(other.place)}${other.probability === null ? "" : ` at ${percent(other.probability)}`}: ${expects(other)}.`;
    return `${first} ${next}${best ? "" : " The own engine had failed this request, so it went elsewhere."}`;
  }

  columns() {
    const seen = (label, name, format, title) => ({ label, number: true, minor: !["finish_s", "chance", "utility"].includes(name), title: title ?? this.legend.node[this.node[name]].meaning, of: (each) => (each.seen ? format(this.seen(each, name)) : NONE) });
    return [
      { label: "Place", head: true, of: (each) => ({ text: `${each.taken ? "✓ " : ""}${this.name(each.place)}`, note: each.legal ? "" : this.barred(each) }) },
      { label: "Probability", number: true, title: "as the policy has it; the most probable place is taken", of: (each) => (each.probability === null ? NONE : { text: percent(each.probability), bar: each.probability }) },
      seen("Utility", "utility", signed), seen("In time", "chance", percent),
      { label: "Price or cost", number: true, title: "of a peer its price, of the own engine the marginal cost", of: (each) => (each.seen ? credits(this.seen(each, "cost") * each.value) : NONE) },
      seen("Finished in", "finish_s", seconds), seen("First token", "first_token_s", seconds), seen("Cached", "cached", percent),
      { label: "Load", number: true, minor: true, title: "requests running and waiting there", of: (each) => (each.seen ? `${number(this.seen(each, "running"))} + ${number(this.seen(each, "waiting"))}` : NONE) },
      seen("KV", "kv_use", percent),
      { label: "Delivery", minor: true, title: "how its answers came, against what it promised", of: (each) => (each.seen && each.place !== "local" ? lateness(Math.max(this.seen(each, "pace"), this.seen(each, "record"))) : NONE) },
    ];
  }

  barred(place) {
    if (place.place === "hold") return "its last deadline is over";
    return this.seen(place, "refused") ? "it has refused" : "it has refused, or cannot be paid";
  }

  everything(rows) {
    const table = byId("everything");
    table.replaceChildren(
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Feature"), rows.map((each) => h("th", { scope: "col", class: "number" }, this.name(each.place))), h("th", { scope: "col" }, "Meaning"))),
      h("tbody", {}, this.legend.node.map((feature, k) => h("tr", {}, h("th", { scope: "row" }, feature.name, h("span", { class: "note" }, feature.unit)), rows.map((each) => h("td", { class: "number" }, number(each.seen[k]))), h("td", { class: "muted" }, feature.meaning)))),
    );
  }
}

const kind = (place) => (place === "local" || place === "hold" ? place : "peer");
