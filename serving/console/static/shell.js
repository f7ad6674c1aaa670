// What both pages have around their content: the state of the connection, the key, what happened lately.

import { byId, h, setAttributes, setText } from "./dom.js";
import { time } from "./format.js";
import { listen } from "./stream.js";

const SAID = { connecting: "Connecting", live: "Live", quiet: "No news for some seconds", lost: "Disconnected", locked: "Locked" };
const SIGNS = { connecting: "○", live: "●", quiet: "◐", lost: "✕", locked: "▣" };
const MOST_EVENTS = 30;

export function start(handlers) {
  let state = "";
  let last_s = 0;
  const stream = listen({
    ...handlers,
    snapshot(seen) {
      last_s = Date.now() / 1000;
      document.body.classList.remove("empty");
      handlers.snapshot(seen);
    },
    state(name, detail) {
      const old = name === "live" || !last_s ? "" : `shown is ${time(last_s)}`;
      setText(byId("state-sign"), SIGNS[name]);
      setText(byId("state-text"), SAID[name]);
      setText(byId("state-detail"), name === "live" ? "" : [detail, old].filter(Boolean).join(", "));
      if (name === state) return;
      state = name;
      setAttributes(document.body, { "data-state": name });
      byId("unlock").hidden = name !== "locked";
      if (name === "locked") {
        setText(byId("unlock-error"), detail);
        byId("key").focus();
      }
    },
  });
  byId("unlock").addEventListener("submit", (event) => {
    event.preventDefault();
    stream.unlock(byId("key").value);
    byId("key").value = "";
  });
}

// A list of what happened; `sign` says of what kind it is without colour.
export function happened(text, kind) {
  const list = byId("events");
  const sign = { good: "●", bad: "✕", note: "◆" }[kind];
  list.prepend(
    h("li", { class: kind }, h("time", {}, time(Date.now() / 1000)), h("span", { class: "sign", "aria-hidden": "true" }, sign), h("span", {}, text)),
  );
  while (list.children.length > MOST_EVENTS) list.lastElementChild.remove();
  byId("events-none").hidden = true;
}

// Says what changed in a table of states, from the second look on.
export class Changes {
  constructor() {
    this.before = null;
  }

  look(now) {
    if (this.before) {
      for (const [what, [state, text, kind]] of now) {
        if (this.before.has(what) ? this.before.get(what)[0] !== state : kind !== "good") happened(text, kind);
      }
    }
    this.before = now;
  }
}
