// The data of one training run: its record (run.json), metrics and samples. No DOM.

const MAX_ROWS = 20_000;
const RECENT_ROWS = 6; // rows from which the remaining time is estimated
const SAMPLE_TEMPERATURE = 0.8;

const isNumber = (value) => typeof value === "number";

export class Run {
  record = {};
  metrics = []; // [{step, time, loss, ...}] in order of step
  samples = []; // [{step, temperature, prompt, text}]
  error = undefined;

  constructor(name) {
    this.name = name;
  }

  // Apply an event of the server's stream.
  apply(event, data) {
    if (event === "snapshot") {
      this.record = data.record;
      this.metrics = data.metrics;
      this.samples = data.samples;
    } else if (event === "metrics") {
      this.metrics.push(...data);
      if (this.metrics.length > MAX_ROWS) this.metrics = thin(this.metrics);
    } else if (event === "samples") this.samples.push(...data);
    else if (event === "run") this.record = data;
    else if (event === "gone") this.error = "This run no longer exists.";
  }

  get status() {
    return this.record.status;
  }

  get step() {
    return this.metrics.at(-1)?.step;
  }

  get totalSteps() {
    return this.record.config?.steps;
  }

  // The share of the steps that are done, from 0 to 1.
  get progress() {
    return this.totalSteps ? Math.min(1, (this.step ?? 0) / this.totalSteps) : 0;
  }

  // The latest number under a key of the metrics.
  last(key) {
    return this.metrics.findLast((row) => isNumber(row[key]))?.[key];
  }

  // The row with the lowest validation loss, or null.
  best() {
    const evaluated = this.metrics.filter((row) => isNumber(row.val_loss));
    return evaluated.reduce((best, row) => (best && best.val_loss <= row.val_loss ? best : row), null);
  }

  // [[x, y], ...] for a chart. axis: "step", "time" or "tokens".
  points(key, axis) {
    return this.metrics
      .filter((row) => key in row && row[axis] !== undefined && row[axis] !== null)
      .map((row) => [row[axis], row[key]]);
  }

  // The estimated seconds until the last step; undefined unless the run is in progress.
  get secondsLeft() {
    const recent = this.metrics.filter((row) => "loss" in row).slice(-RECENT_ROWS);
    if (this.status !== "running" || !this.totalSteps || recent.length < 2) return undefined;
    const secondsPerStep = (recent.at(-1).time - recent[0].time) / (recent.at(-1).step - recent[0].step);
    return secondsPerStep ? (this.totalSteps - this.step) * secondsPerStep : undefined;
  }
}

// Keep every second row, and all validation losses.
export const thin = (rows) => rows.filter((row, i) => i % 2 || "val_loss" in row);

// The index of the sample to show: the last one. Of several from the same step, the one nearest to temperature 0.8.
export function preferredSample(samples) {
  const step = samples.at(-1)?.step;
  const distance = (i) => Math.abs(samples[i].temperature - SAMPLE_TEMPERATURE);
  let best = samples.length - 1;
  samples.forEach((sample, i) => {
    if (sample.step === step && distance(i) < distance(best)) best = i;
  });
  return Math.max(0, best);
}

// Nested settings as rows: {optim: {lr: 1}} -> [["optim.lr", 1]]
export function flatten(values, prefix = "") {
  return Object.entries(values).flatMap(([key, value]) => {
    if (Array.isArray(value)) return [[prefix + key, value.join(", ")]];
    if (value && typeof value === "object") return flatten(value, `${prefix}${key}.`);
    return [[prefix + key, value]];
  });
}
