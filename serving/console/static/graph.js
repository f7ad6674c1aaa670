// Nodes and what flows between them. Everything it shows is in a table beside it as well.

import { keyed, setAttributes, setText, svg } from "./dom.js";

const RADIUS = 24;
const ROW = 112; // between nodes that are one above the other
const NEAR = 170; // nodes between which there is no place for words
const RING = 2 * Math.PI * (RADIUS + 4);
const SIGNS = { up: "", down: "!", gone: "✕" };

export class Graph {
  // `centre`: key of the node in the middle, if there is one; `pick(key)`: called when a node is chosen.
  constructor(parent, { label, centre, pick }) {
    Object.assign(this, { centre, pick });
    this.edges = svg("g", {});
    this.nodes = svg("g", {});
    this.picture = svg("svg", { class: "graph", role: "group", "aria-label": label }, arrows(), this.edges, this.nodes);
    parent.append(this.picture);
    new ResizeObserver(() => this.draw()).observe(parent);
    this.parent = parent;
  }

  // `nodes`: {key, label, lines, use, state, about}; `edges`: {from, to, width, text, kind}.
  update(nodes, edges) {
    this.shown = [nodes, edges];
    this.draw();
  }

  draw() {
    if (!this.shown || !this.parent.clientWidth) return;
    const [nodes, edges] = this.shown;
    const width = this.parent.clientWidth;
    const around = nodes.filter((node) => node.key !== this.centre);
    const height = this.centre ? 24 + ROW * Math.max(2, Math.ceil(around.length / 2)) : Math.min(520, 230 + 34 * around.length);
    setAttributes(this.picture, { viewBox: `0 0 ${width} ${height}`, width, height });
    const places = this.places(nodes, around, width, height);
    keyed(this.nodes, nodes, (node) => node.key, (node) => this.make(node), (element, node) => {
      const { x, y } = places.get(node.key);
      setAttributes(element, { transform: `translate(${x} ${y})`, class: `node ${node.state}${node.key === this.centre ? " own" : ""}`, "aria-label": node.about });
      const [, , ring, sign, label, ...lines] = element.children;
      setAttributes(ring, { "stroke-dasharray": `${RING * Math.min(1, node.use ?? 0)} ${RING}` });
      setText(sign, SIGNS[node.state] || node.inside);
      setText(label, node.label.length > 16 ? `${node.label.slice(0, 15)}…` : node.label);
      lines.forEach((line, k) => setText(line, node.lines[k] ?? ""));
    });
    keyed(this.edges, edges.filter((edge) => places.has(edge.from) && places.has(edge.to)), (edge) => `${edge.from} ${edge.to} ${edge.kind}`, makeEdge, (element, edge) => {
      const { path, at, far } = curve(places.get(edge.from), places.get(edge.to));
      const [line, text] = element.children;
      setAttributes(element, { class: `edge ${edge.kind}${edge.width ? "" : " idle"}` });
      setAttributes(line, { d: path, "stroke-width": edge.width ? 1 + Math.min(6, edge.width) : 1, "marker-end": `url(#${edge.kind})` });
      setAttributes(text, { x: at.x, y: at.y });
      setText(text, far > NEAR ? edge.text : "");
    });
  }

  // Beside the node in the middle, half to the right and half to the left; or all of them in a ring.
  places(nodes, around, width, height) {
    const middle = { x: width / 2, y: height / 2 - 16 };
    const wide = Math.min(width / 2 - 58, 330);
    if (!this.centre) {
      const high = height / 2 - 60;
      return new Map(around.map((node, k) => {
        const angle = -Math.PI / 2 + (2 * Math.PI * (k + 0.5)) / around.length;
        return [node.key, around.length === 1 ? middle : { x: middle.x + wide * Math.cos(angle), y: middle.y + high * Math.sin(angle) }];
      }));
    }
    const places = new Map([[this.centre, around.length === 1 ? { ...middle, x: middle.x - wide / 2 } : middle]]);
    const right = Math.ceil(around.length / 2);
    around.forEach((node, k) => {
      const side = k < right ? 1 : -1;
      const [row, rows] = k < right ? [k, right] : [k - right, around.length - right];
      const off = row - (rows - 1) / 2;
      const inward = rows > 1 ? 0.16 * wide * (2 * off / rows) ** 2 : 0;
      places.set(node.key, { x: middle.x + side * (around.length === 1 ? wide / 2 : wide - inward), y: middle.y + off * ROW });
    });
    return places;
  }

  make(node) {
    const chosen = () => this.pick(node.key);
    return svg(
      "g",
      {
        tabindex: 0, role: "button", onclick: chosen,
        onkeydown(event) {
          if (event.key !== "Enter" && event.key !== " ") return;
          event.preventDefault();
          chosen();
        },
      },
      svg("circle", { class: "disc", r: RADIUS }),
      svg("circle", { class: "track", r: RADIUS + 4 }),
      svg("circle", { class: "ring", r: RADIUS + 4, transform: "rotate(-90)" }),
      svg("text", { class: "inside", dy: "0.35em" }),
      svg("text", { class: "label", y: RADIUS + 22 }),
      svg("text", { class: "line", y: RADIUS + 37 }),
    );
  }
}

function makeEdge() {
  return svg("g", {}, svg("path", { fill: "none" }), svg("text", {}));
}

// From the rim of one node to that of the other, bent to the right, so that the way back is beside it.
function curve(from, to) {
  const dx = to.x - from.x, dy = to.y - from.y;
  const far = Math.hypot(dx, dy) || 1;
  const ux = dx / far, uy = dy / far;
  const bend = Math.min(26, far / 8);
  const gap = RADIUS + 9;
  const control = { x: from.x + dx / 2 - uy * bend * 2, y: from.y + dy / 2 + ux * bend * 2 };
  const rim = (node, sign) => ({ x: node.x + sign * ux * gap - uy * bend * 0.55, y: node.y + sign * uy * gap + ux * bend * 0.55 });
  const a = rim(from, 1), b = rim(to, -1);
  const at = { x: (a.x + 2 * control.x + b.x) / 4 - uy * 13, y: (a.y + 2 * control.y + b.y) / 4 + ux * 13 + 4 };
  return { far, path: `M${a.x} ${a.y}Q${control.x} ${control.y} ${b.x} ${b.y}`, at };
}

function arrows() {
  const arrow = (id) =>
    svg("marker", { id, class: `arrow ${id}`, viewBox: "0 0 8 8", refX: 5, refY: 4, markerWidth: 13, markerHeight: 13, markerUnits: "userSpaceOnUse", orient: "auto" }, svg("path", { d: "M0 0.5 7 4 0 7.5z" }));
  return svg("defs", {}, arrow("out"), arrow("in"));
}

// Per second, from totals that are looked at again and again.
export class Rates {
  constructor(window_s = 10) {
    this.window_s = window_s;
    this.totals = new Map();
  }

  of(key, total) {
    const now_s = performance.now() / 1000;
    const seen = this.totals.get(key) ?? [];
    if (seen.length && total < seen.at(-1)[1]) seen.length = 0; // it began anew
    seen.push([now_s, total]);
    while (seen.length > 2 && seen[1][0] < now_s - this.window_s) seen.shift();
    this.totals.set(key, seen);
    const [first_s, first] = seen[0];
    return now_s > first_s ? (total - first) / (now_s - first_s) : 0;
  }
}
