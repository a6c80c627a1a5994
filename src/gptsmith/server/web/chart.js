// Line charts in SVG: axes with round numbers, a crosshair that follows the pointer or the arrow keys.

import { h, s } from "./dom.js";

const HEIGHT = 240;
const MARGIN = { left: 54, right: 14, top: 10, bottom: 30 };

export class Chart {
  // title; format(y); logarithmic: the y axis. x: {label, format}
  constructor({ title, unit = "", format = (y) => y.toPrecision(4), height = HEIGHT, min }) {
    Object.assign(this, { title, unit, format, height, min });
    this.series = [];
    this.x = { label: "step", format: String };
    this.logarithmic = false;
    this.plot = h("div.plot", { tabIndex: 0, role: "img", onpointermove: (event) => this.point(event), onpointerleave: () => this.hide(),
      onkeydown: (event) => this.keys(event), onblur: () => this.hide() });
    this.readout = h("div.tip.in-plot", { hidden: true, role: "status" });
    this.element = h("figure.chart", {}, h("figcaption", {}, title, " ", this.about = h("small", {}, unit)), this.plot);
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  note(text) {
    this.about.textContent = text;
  }

  // series: [{name, colour: 0-7, points: [[x, y], ...] in order of x, dots, faint}]; y of null breaks the line
  show(series, x, logarithmic = false) {
    Object.assign(this, { series, x, logarithmic });
    this.draw();
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width) return;
    const points = this.series.flatMap(({ points }) => points).filter(([, y]) => y !== null && (!this.logarithmic || y > 0));
    if (!points.length) {
      this.scale = null;
      this.plot.replaceChildren(h("p.empty", {}, "nothing yet"));
      this.plot.setAttribute("aria-label", `${this.title}: nothing yet`);
      return;
    }
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const [x, y] of points) {
      if (x < x0) x0 = x;
      if (x > x1) x1 = x;
      if (y < y0) y0 = y;
      if (y > y1) y1 = y;
    }
    if (this.min !== undefined && !this.logarithmic) y0 = Math.min(y0, this.min);
    if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
    const f = this.logarithmic ? Math.log : (y) => y;
    const pad = 0.05 * (f(y1) - f(y0)) || Math.abs(f(y1)) * 0.1 || 1;
    const [low, high] = [f(y0) - (this.min === y0 ? 0 : pad), f(y1) + pad];
    const inner = { width: width - MARGIN.left - MARGIN.right, height: this.height - MARGIN.top - MARGIN.bottom };
    const px = (x) => MARGIN.left + ((x - x0) / (x1 - x0)) * inner.width;
    const py = (y) => MARGIN.top + (1 - (f(y) - low) / (high - low)) * inner.height;
    this.scale = { px, py, x0, x1, inner };
    const invert = this.logarithmic ? Math.exp : (y) => y;
    const yTicks = this.logarithmic ? logTicks(invert(low), invert(high)) : ticks(low, high, 5);
    const xTicks = ticks(x0, x1, Math.max(3, Math.floor(inner.width / 90)));
    this.cross = s("g", { class: "cross", visibility: "hidden" });
    const svg = s("svg", { width, height: this.height, viewBox: `0 0 ${width} ${this.height}`, "aria-hidden": "true" },
      yTicks.map((y) => [
        s("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: py(y), y2: py(y) }),
        s("text", { class: "tick", x: MARGIN.left - 8, y: py(y) + 4, "text-anchor": "end" }, this.format(y)),
      ]),
      xTicks.map((x) => s("text", { class: "tick", x: px(x), y: this.height - MARGIN.bottom + 17, "text-anchor": px(x) > width - 26 ? "end" : "middle" }, this.x.format(x))),
      s("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: this.height - MARGIN.bottom, y2: this.height - MARGIN.bottom }),
      s("text", { class: "tick label", x: width - MARGIN.right, y: this.height - 1, "text-anchor": "end" }, this.x.label),
      this.series.map((series) => s("g", { class: `series s${series.colour % 8}${series.faint ? " faint" : ""}` },
        s("path", { d: line(series.points, px, py, this.logarithmic) }),
        series.dots && series.points.length <= 80 && series.points.filter(([, y]) => y !== null).map(([x, y]) => s("circle", { cx: px(x), cy: py(y), r: 3 })))),
      this.cross);
    this.plot.replaceChildren(svg, this.readout);
    this.plot.setAttribute("aria-label", `${this.title}. ${this.series.map(({ name, points }) => {
      const last = points.findLast(([, y]) => y !== null);
      return last ? `${name}: ${this.format(last[1])} at ${this.x.label} ${this.x.format(last[0])}` : "";
    }).filter(Boolean).join("; ")}. Arrow keys read values.`);
    if (this.at !== undefined) this.mark(this.at);
  }

  point(event) {
    if (!this.scale) return;
    const { x0, x1, inner } = this.scale;
    const place = (event.clientX - this.plot.getBoundingClientRect().left - MARGIN.left) / inner.width;
    if (place < -0.02 || place > 1.02) this.hide();
    else this.mark(x0 + place * (x1 - x0));
  }

  keys(event) {
    if (event.key === "Escape") this.hide();
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || !this.scale) return;
    event.preventDefault();
    const xs = this.series.flatMap(({ points }) => points.map(([x]) => x)).sort((a, b) => a - b);
    const now = this.at === undefined ? (step > 0 ? -1 : xs.length) : nearest(xs, this.at);
    let next = Math.max(0, Math.min(xs.length - 1, now + step));
    while (Math.abs(step) === 1 && xs[next] === this.at && next + step >= 0 && next + step < xs.length) next += step;
    this.mark(xs[next]);
  }

  mark(x) {
    this.at = x;
    const { px, py, inner } = this.scale;
    const beyond = 0.02 * (this.scale.x1 - this.scale.x0);
    const found = this.series.map((series) => {
      const points = series.points.filter(([, y]) => y !== null);
      if (!points.length || x < points[0][0] - beyond || x > points.at(-1)[0] + beyond) return null; // it is not there
      return { series, point: points[nearest(points.map(([x]) => x), x)] };
    }).filter(Boolean);
    if (!found.length) {
      this.hide();
      return;
    }
    const place = found.map(({ point }) => point[0]).reduce((a, b) => (Math.abs(a - x) <= Math.abs(b - x) ? a : b));
    this.cross.replaceChildren(
      s("line", { x1: px(place), x2: px(place), y1: MARGIN.top, y2: MARGIN.top + inner.height }),
      ...found.filter(({ point }) => !this.logarithmic || point[1] > 0)
        .map(({ series, point }) => s("circle", { class: `s${series.colour % 8}`, cx: px(point[0]), cy: py(point[1]), r: 4 })));
    this.cross.setAttribute("visibility", "visible");
    this.readout.hidden = false;
    this.readout.replaceChildren(h("strong", {}, `${this.x.label} ${this.x.format(place)}`),
      ...found.map(({ series, point }) => h("span.reading", {}, h(`i.s${series.colour % 8}`), `${series.name} `, h("b", {}, this.format(point[1])))));
    const right = px(place) > this.plot.clientWidth / 2;
    this.readout.style.left = right ? "auto" : `${px(place) + 12}px`;
    this.readout.style.right = right ? `${this.plot.clientWidth - px(place) + 12}px` : "auto";
  }

  hide() {
    this.at = undefined;
    this.readout.hidden = true;
    this.cross?.setAttribute("visibility", "hidden");
  }
}

function line(points, px, py, logarithmic) {
  let path = "";
  let pen = "M";
  for (const [x, y] of points) {
    if (y === null || (logarithmic && y <= 0)) pen = "M";
    else {
      path += `${pen}${px(x).toFixed(1)} ${py(y).toFixed(1)}`;
      pen = "L";
    }
  }
  return path;
}

function nearest(sorted, x) {
  let [low, high] = [0, sorted.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - sorted[low - 1] <= sorted[low] - x ? low - 1 : low;
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found;
}

function logTicks(low, high) {
  if (high / low < 8) return ticks(low, high, 5).filter((y) => y > 0);
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const m of high / low > 1000 ? [1] : [1, 2, 5]) {
      const y = m * 10 ** power;
      if (y >= low && y <= high) found.push(y);
    }
  }
  return found;
}
