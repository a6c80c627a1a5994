// Line charts in SVG, with a crosshair that follows the pointer or the arrow keys.

import { h, svg } from "./dom.js";
import { linePath, logTicks, makeScale, nearestIndex, ticks } from "./scale.js";

const HEIGHT = 240;
const MARGIN = { left: 54, right: 14, top: 10, bottom: 30 };
const MAX_DOTS = 80; // a series with more points is drawn without dots
const EMPTY = "No data yet";

const COLORS = 12; // in app.css
const DASHES = [null, "7 4", "2 3", "9 3 2 3"]; // for those who do not tell all colors apart

// The look of a line: a class with its color, and its pattern of dashes. number: 0, 1, …; those below 48 all differ.
export function lineStyle(number) {
  const dash = DASHES[(Math.floor(number / 3) + Math.floor(number / COLORS)) % DASHES.length];
  return { class: `s${number % COLORS}`, dash };
}

// A short piece of a line, for legends.
export function swatch(number) {
  const { class: color, dash } = lineStyle(number);
  return svg(
    "svg",
    { class: `swatch ${color}`, viewBox: "0 0 24 12", "aria-hidden": "true" },
    svg("line", { x1: 0, x2: 24, y1: 6, y2: 6, "stroke-dasharray": dash }),
  );
}

const isDrawn = ([, y]) => y !== null;

export class Chart {
  // format(y): a value as text. min: a value that a linear y axis always includes.
  constructor({ title, unit = "", format = (y) => y.toPrecision(4), height = HEIGHT, min }) {
    Object.assign(this, { title, format, height, min });
    this.series = [];
    this.x = { label: "step", format: String };
    this.logarithmic = false;
    this.cursor = undefined; // the x that the crosshair shows
    this.plot = h("div.plot", {
      tabIndex: 0,
      role: "img",
      onpointermove: (event) => this.onPointerMove(event),
      onpointerleave: () => this.hideCursor(),
      onkeydown: (event) => this.onKeyDown(event),
      onblur: () => this.hideCursor(),
    });
    this.readout = h("div.tip.in-plot", { hidden: true, role: "status" });
    this.subtitle = h("small", {}, unit);
    this.element = h("figure.chart", {}, h("figcaption", {}, title, " ", this.subtitle), this.plot);
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  setSubtitle(text) {
    this.subtitle.textContent = text;
  }

  // series: [{name, color, points, dots, faint}]. color: the number of a line style. points: [[x, y], ...] in ascending order of x; a y of
  // null interrupts the line. x: {label, format} of the horizontal axis. logarithmic: the vertical axis.
  show(series, x, logarithmic = false) {
    Object.assign(this, { series, x, logarithmic });
    this.draw();
  }

  canShow([, y]) {
    return y !== null && (!this.logarithmic || y > 0);
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width) return;
    const all = this.series.flatMap(({ points }) => points).filter((point) => this.canShow(point));
    if (!all.length) {
      this.scale = null;
      this.plot.replaceChildren(h("p.empty", {}, EMPTY));
      this.plot.setAttribute("aria-label", `${this.title}: ${EMPTY}`);
      return;
    }
    this.box = {
      left: MARGIN.left,
      top: MARGIN.top,
      width: width - MARGIN.left - MARGIN.right,
      height: this.height - MARGIN.top - MARGIN.bottom,
    };
    this.scale = makeScale(all, { logarithmic: this.logarithmic, min: this.min, box: this.box });
    this.crosshair = svg("g", { class: "cross", visibility: "hidden" });
    this.plot.replaceChildren(
      svg(
        "svg",
        { width, height: this.height, viewBox: `0 0 ${width} ${this.height}`, "aria-hidden": "true" },
        this.drawAxes(width),
        this.series.map((series) => this.drawSeries(series)),
        this.crosshair,
      ),
      this.readout,
    );
    this.plot.setAttribute("aria-label", this.describe());
    if (this.cursor !== undefined) this.showCursor(this.cursor);
  }

  drawAxes(width) {
    const { low, high, x0, x1, toX, toY } = this.scale;
    const [left, right, bottom] = [MARGIN.left, width - MARGIN.right, this.height - MARGIN.bottom];
    const yTicks = this.logarithmic ? logTicks(low, high) : ticks(low, high, 5);
    const xTicks = ticks(x0, x1, Math.max(3, Math.floor(this.box.width / 90)));
    return [
      yTicks.map((y) => [
        svg("line", { class: "grid", x1: left, x2: right, y1: toY(y), y2: toY(y) }),
        svg("text", { class: "tick", x: left - 8, y: toY(y) + 4, "text-anchor": "end" }, this.format(y)),
      ]),
      xTicks.map((x) => {
        const anchor = toX(x) > width - 26 ? "end" : "middle"; // stays inside the chart
        return svg("text", { class: "tick", x: toX(x), y: bottom + 17, "text-anchor": anchor }, this.x.format(x));
      }),
      svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      svg("text", { class: "tick label", x: right, y: this.height - 1, "text-anchor": "end" }, this.x.label),
    ];
  }

  drawSeries(series) {
    const { toX, toY } = this.scale;
    const dots = series.dots && series.points.length <= MAX_DOTS ? series.points.filter(isDrawn) : [];
    const { class: color, dash } = lineStyle(series.color);
    return svg(
      "g",
      { class: `series ${color}${series.faint ? " faint" : ""}` },
      svg("path", { d: linePath(series.points, this.scale, this.logarithmic), "stroke-dasharray": dash }),
      dots.map(([x, y]) => svg("circle", { cx: toX(x), cy: toY(y), r: 3 })),
    );
  }

  // The last value of each series, for users of screen readers.
  describe() {
    const values = this.series.flatMap(({ name, points }) => {
      const last = points.findLast(isDrawn);
      return last ? [`${name}: ${this.format(last[1])} at ${this.x.label} ${this.x.format(last[0])}`] : [];
    });
    return `${this.title}. ${values.join("; ")}. Use the arrow keys to read values.`;
  }

  onPointerMove(event) {
    if (!this.scale) return;
    const { x0, x1 } = this.scale;
    const fraction = (event.clientX - this.plot.getBoundingClientRect().left - this.box.left) / this.box.width;
    if (fraction < -0.02 || fraction > 1.02) this.hideCursor();
    else this.showCursor(x0 + fraction * (x1 - x0));
  }

  onKeyDown(event) {
    if (event.key === "Escape") this.hideCursor();
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || !this.scale) return;
    event.preventDefault();
    const xs = this.series.flatMap(({ points }) => points.map(([x]) => x)).sort((a, b) => a - b);
    const outside = step > 0 ? -1 : xs.length;
    const current = this.cursor === undefined ? outside : nearestIndex(xs, this.cursor);
    let next = Math.max(0, Math.min(xs.length - 1, current + step));
    // several series can have a point at the same x
    while (Math.abs(step) === 1 && xs[next] === this.cursor && next + step >= 0 && next + step < xs.length)
      next += step;
    this.showCursor(xs[next]);
  }

  // Show the values of all series at the point that is nearest to x.
  showCursor(x) {
    this.cursor = x;
    const { x0, x1, toX, toY } = this.scale;
    const tolerance = 0.02 * (x1 - x0);
    const readings = this.series.flatMap((series) => {
      const points = series.points.filter(isDrawn);
      if (!points.length || x < points[0][0] - tolerance || x > points.at(-1)[0] + tolerance) return [];
      const xs = points.map((point) => point[0]);
      return [{ series, point: points[nearestIndex(xs, x)] }];
    });
    if (!readings.length) {
      this.hideCursor();
      return;
    }
    const closest = readings
      .map(({ point }) => point[0])
      .reduce((a, b) => (Math.abs(a - x) <= Math.abs(b - x) ? a : b));
    const center = toX(closest);
    this.crosshair.replaceChildren(
      svg("line", { x1: center, x2: center, y1: this.box.top, y2: this.box.top + this.box.height }),
      ...readings
        .filter(({ point }) => this.canShow(point))
        .map(({ series, point }) =>
          svg("circle", { class: lineStyle(series.color).class, cx: toX(point[0]), cy: toY(point[1]), r: 4 }),
        ),
    );
    this.crosshair.setAttribute("visibility", "visible");
    this.readout.hidden = false;
    this.readout.replaceChildren(
      h("strong", {}, `${this.x.label} ${this.x.format(closest)}`),
      ...readings.map(({ series, point }) =>
        h("span.reading", {}, swatch(series.color), `${series.name} `, h("b", {}, this.format(point[1]))),
      ),
    );
    const { clientWidth } = this.plot;
    const onRight = center > clientWidth / 2;
    this.readout.style.left = onRight ? "auto" : `${center + 12}px`;
    this.readout.style.right = onRight ? `${clientWidth - center + 12}px` : "auto";
  }

  hideCursor() {
    this.cursor = undefined;
    this.readout.hidden = true;
    this.crosshair?.setAttribute("visibility", "hidden");
  }
}
