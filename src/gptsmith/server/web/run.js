// The data of one training run: its record (run.json), metrics and samples. No DOM.

import { compactNumber, exactNumber } from "./format.js";

const MAX_ROWS = 20_000;
const RECENT_ROWS = 6; // rows from which the remaining time is estimated
const SAMPLE_TEMPERATURE = 0.8;

const VALIDATION_LOSS = { metric: "val_loss", mode: "min" };

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

  // {steps, batch_size, context, ...}. In run.json of schema 1 all settings were on one level.
  get loop() {
    return this.record.config?.loop ?? this.record.config ?? {};
  }

  get budget() {
    return (this.record.config?.auto ?? this.record.config)?.budget;
  }

  // Why the plan of the run is as it is: sentences.
  get reasons() {
    return (this.record.plan ?? this.record.choice)?.reasons ?? [];
  }

  // {metric, mode: "min" or "max"}: what the best checkpoint is chosen by.
  get selection() {
    return this.record.selection ?? VALIDATION_LOSS;
  }

  // Whether the run learns from rewards: then its loss says nothing.
  get isAlignment() {
    return this.metrics.some((row) => "reward" in row || "val_reward" in row);
  }

  // Warnings of evaluations: [{step, message}].
  get alarms() {
    return this.record.alarms ?? [];
  }

  get totalSteps() {
    return this.loop.steps;
  }

  // The share of the steps that are done, from 0 to 1.
  get progress() {
    return this.totalSteps ? Math.min(1, (this.step ?? 0) / this.totalSteps) : 0;
  }

  // The latest number under a key of the metrics.
  last(key) {
    return this.metrics.findLast((row) => isNumber(row[key]))?.[key];
  }

  // The latest scores on tasks: [{task, shots, score, low, high, chance, examples}].
  tasks() {
    return this.metrics.findLast((row) => Array.isArray(row.tasks))?.tasks ?? [];
  }

  // The best evaluation's row of the metrics, or null. Rows of training have a learning rate.
  best() {
    const { metric, mode } = this.selection;
    const isBetter = (a, b) => (mode === "max" ? a[metric] > b[metric] : a[metric] < b[metric]);
    return this.metrics
      .filter((row) => isNumber(row[metric]) && !("lr" in row))
      .reduce((best, row) => (!best || isBetter(row, best) ? row : best), null);
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

const isEvaluation = (row) => Object.keys(row).some((key) => key.startsWith("val_") || key === "tasks");

// Keep every second row, and all evaluations.
export const thin = (rows) => rows.filter((row, i) => i % 2 || isEvaluation(row));

// What runs that learn from rewards measure: {key, title, unit, min}. The metrics of evaluations are `val_` and the key.
export const ALIGNMENT_METRICS = [
  { key: "reward", title: "Reward" },
  { key: "gold", title: "Gold", unit: "a reward that is not trained on" },
  { key: "kl", title: "Divergence from the start", unit: "KL, nats per answer", min: 0 },
  { key: "entropy", title: "Entropy", unit: "nats per token", min: 0 },
  { key: "length", title: "Length", unit: "tokens per answer", min: 0 },
  { key: "ended", title: "Answers that ended", unit: "share", min: 0 },
  { key: "dead_groups", title: "Dead groups", unit: "share", min: 0 },
  { key: "reward_std", title: "Spread of rewards", unit: "standard deviation", min: 0 },
  { key: "clipped", title: "Clipped tokens", unit: "share", min: 0 },
  { key: "gap", title: "Sampler against trainer", unit: "largest |Δ log p|, nats", min: 0 },
  { key: "value_loss", title: "Value loss", unit: "squared reward", min: 0 },
];

// Those of them, and the parts of the reward, that a run has logged.
export function alignmentMetrics({ metrics }) {
  const keys = new Set(metrics.flatMap((row) => Object.keys(row)));
  const parts = [...keys]
    .filter((key) => key.startsWith("reward/"))
    .map((key) => ({ key, title: `Reward ${key.slice("reward/".length)}` }));
  return [...ALIGNMENT_METRICS, ...parts].filter(({ key }) => keys.has(key) || keys.has(`val_${key}`));
}

// One line: the budget, the steps, and how often the text is read.
export function describePlan({ record, loop, budget }) {
  const batch = loop.batch_size * loop.context;
  const tokens = loop.steps * batch;
  const batchText = `${loop.batch_size} × ${loop.context} = ${compactNumber(batch)} tokens`;
  const available = record.data?.train_tokens;
  const parts = [
    budget && `budget ${budget}`,
    `${exactNumber(loop.steps)} steps of ${batchText}, ${compactNumber(tokens)} in total`,
    available && `${(tokens / available).toFixed(1)} epochs of ${compactNumber(available)} tokens`,
  ];
  return parts.filter(Boolean).join(" · ");
}

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
