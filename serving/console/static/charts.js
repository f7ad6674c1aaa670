// Lines over the last minutes. Each differs from the others by its dashes as well as by its colour.

import { h, setAttributes, setText, svg } from "./dom.js";
import { NONE, time } from "./format.js";

const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];
const HEIGHT = 132;
const FONT = "11px ui-sans-serif, system-ui, sans-serif";

const dark = matchMedia("(prefers-color-scheme: dark)");
const charts = new Set();
dark.addEventListener("change", () => charts.forEach((chart) => chart.build()));

const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export class Chart {
  // `series`: {label, format}; `range`: of the y axis, else from 0 up; `axis`: how its numbers are written.
  constructor(parent, { title, unit, series, range, axis }) {
    Object.assign(this, { title, series, range, axis });
    this.window_s = 120;
    this.data = [[], ...series.map(() => [])];
    this.values = series.map(() => h("b", {}, NONE));
    this.plot = h("div", { class: "plot", role: "img" });
    this.figure = h(
      "figure", { class: "chart" },
      h("figcaption", {}, h("span", { class: "title" }, title), unit ? h("span", { class: "unit" }, unit) : null),
      this.plot,
      h("ul", { class: "legend" }, series.map((each, k) => h("li", {}, swatch(k), h("span", {}, each.label), this.values[k]))),
    );
    parent.append(this.figure);
    charts.add(this);
    this.build();
    new ResizeObserver(() => this.resize()).observe(this.plot);
  }

  build() {
    this.uplot?.destroy();
    const muted = variable("--muted"), line = variable("--line");
    const axis = { stroke: muted, font: FONT, grid: { stroke: line, width: 1 }, ticks: { show: false } };
    this.uplot = new uPlot(
      {
        width: Math.max(160, this.plot.clientWidth), height: HEIGHT, legend: { show: false }, padding: [8, 22, 0, 0],
        cursor: { drag: { x: false, y: false }, sync: { key: "time" }, points: { size: 6 }, y: false },
        scales: {
          x: { range: () => this.shown() },
          y: { range: this.range ? () => this.range : (_, __, high) => [0, Math.max(high * 1.12, this.least ?? 1)] },
        },
        axes: [
          { ...axis, size: 22, space: 72, values: (_, splits) => splits.map((at_s) => time(at_s).slice(0, 5 + (this.window_s < 300 ? 3 : 0))) },
          { ...axis, size: 44, space: 28, values: (_, splits) => splits.map((y) => (this.axis ? this.axis(y) : String(y))) },
        ],
        series: [
          {},
          ...this.series.map((each, k) => ({
            label: each.label, stroke: variable(`--series-${k + 1}`), width: 1.75, dash: DASHES[k], points: { show: false },
            fill: k === 0 ? variable("--series-fill") : undefined,
          })),
        ],
        hooks: { setCursor: [() => this.tell()] },
      },
      this.data, this.plot,
    );
  }

  shown() {
    const last_s = this.data[0].at(-1) ?? Date.now() / 1000;
    return [last_s - this.window_s, last_s];
  }

  show(window_s) {
    this.window_s = window_s;
    this.uplot.setData(this.data);
  }

  update(data) {
    this.data = data;
    this.uplot.setData(data);
    this.tell();
  }

  // What the legend says: the numbers under the cursor, else the last ones.
  tell() {
    const at = this.uplot?.cursor?.idx ?? this.data[0].length - 1;
    const said = this.series.map((each, k) => each.format(this.data[k + 1][at] ?? null));
    said.forEach((text, k) => setText(this.values[k], text));
    const all = this.series.map((each, k) => `${each.label} ${said[k]}`).join(", ");
    setAttributes(this.plot, { "aria-label": `${this.title}: ${all}` });
  }

  resize() {
    const width = Math.max(160, this.plot.clientWidth);
    if (width !== this.uplot.width) this.uplot.setSize({ width, height: HEIGHT });
  }
}

function swatch(k) {
  return svg(
    "svg", { class: `swatch series-${k + 1}`, width: 22, height: 8, "aria-hidden": "true" },
    svg("line", { x1: 0, y1: 4, x2: 22, y2: 4, "stroke-dasharray": DASHES[k].join(" ") }),
  );
}

// Columns of numbers by name, as the server keeps them, and what follows from totals in them.
export class Series {
  constructor(columns, most = 600) {
    this.names = Object.keys(columns);
    this.columns = Object.fromEntries(this.names.map((name) => [name, [...columns[name]]]));
    this.most = most;
  }

  push(row) {
    this.names.forEach((name, k) => {
      const column = this.columns[name];
      column.push(row[k]);
      if (column.length > this.most) column.shift();
    });
  }

  last(name) {
    return this.columns[name].at(-1) ?? null;
  }

  // At each time, how much a total grew in the `window_s` before, and in how many seconds.
  grew(name, window_s) {
    const times = this.columns.at_s, totals = this.columns[name];
    let first = 0;
    return times.map((at_s, k) => {
      while (times[first] < at_s - window_s) first++;
      const from = first === k && k > 0 ? k - 1 : first;
      return [totals[k] - totals[from], at_s - times[from]];
    });
  }

  rate(name, window_s) {
    return this.grew(name, window_s).map(([by, in_s]) => (in_s > 0 && by >= 0 ? by / in_s : null));
  }

  // How much one total grew over how much others did; null where these did not grow.
  share(part, wholes, window_s) {
    const parts = this.grew(part, window_s);
    const sums = wholes.map((name) => this.grew(name, window_s));
    return parts.map(([by], k) => {
      const all = sums.reduce((sum, each) => sum + each[k][0], 0);
      return all > 0 ? by / all : null;
    });
  }
}
