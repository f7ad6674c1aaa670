// Server-sent events over fetch, which can carry the operator's key, and comes back by itself when it is lost.

const PATH = "/console/events";
const QUIET_MS = 3500; // without news, after which what is shown may be old
const FIRST_WAIT_S = 1;
const MOST_WAIT_S = 8;
const KEY = "wwwserve-admin-key"; // in this tab's storage alone

// `on` has a function for each event by its name, and `state(name, detail)`: connecting, live, quiet, lost, locked, refused.
export function listen(on) {
  let waits_s = FIRST_WAIT_S;
  let quiet = 0;

  function heard() {
    clearTimeout(quiet);
    quiet = setTimeout(() => on.state("quiet", ""), QUIET_MS);
  }

  function event(text) {
    let name = "message";
    const data = [];
    for (const line of text.split("\n")) {
      if (line.startsWith("event: ")) name = line.slice(7);
      else if (line.startsWith("data: ")) data.push(line.slice(6));
    }
    heard();
    on.state("live", "");
    on[name]?.(JSON.parse(data.join("\n")));
  }

  async function once() {
    const key = sessionStorage.getItem(KEY);
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    const response = await fetch(PATH, { headers, cache: "no-store" });
    if (response.status === 401) return key ? "that key is not the right one" : "";
    if (!response.ok) throw new Error((await response.json())?.error?.message ?? `it answers ${response.status}`);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the connection has ended");
      text += value;
      for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
        event(text.slice(0, end));
        text = text.slice(end + 2);
        waits_s = FIRST_WAIT_S;
      }
    }
  }

  async function run() {
    on.state("connecting", "");
    let why;
    try {
      const wrong = await once();
      clearTimeout(quiet);
      on.state("locked", wrong);
      return;
    } catch (error) {
      why = error instanceof TypeError ? "it does not answer" : error.message;
    }
    clearTimeout(quiet);
    for (let left_s = waits_s; left_s > 0; left_s--) {
      on.state("lost", `${why}; trying again in ${left_s} s`);
      await new Promise((done) => setTimeout(done, 1000));
    }
    waits_s = Math.min(MOST_WAIT_S, 2 * waits_s);
    run();
  }

  run();
  return {
    unlock(key) {
      sessionStorage.setItem(KEY, key);
      run();
    },
  };
}
