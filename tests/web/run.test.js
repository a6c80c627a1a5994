import assert from "node:assert/strict";
import { test } from "node:test";

import {
  alignmentMetrics,
  describePlan,
  flatten,
  preferredSample,
  Run,
  thin,
} from "../../src/gptsmith/server/web/run.js";

function makeRun(metrics, record = { status: "running", config: { steps: 100 } }) {
  const run = new Run("bard");
  run.apply("snapshot", { record, metrics, samples: [] });
  return run;
}

test("a run starts empty and grows with the events of the server", () => {
  const run = new Run("bard");
  assert.deepEqual([run.status, run.step, run.totalSteps, run.progress], [undefined, undefined, undefined, 0]);
  run.apply("snapshot", { record: { status: "running", config: { steps: 40 } }, metrics: [{ step: 10 }], samples: [] });
  run.apply("metrics", [{ step: 20, loss: 2 }]);
  run.apply("samples", [{ step: 20, text: "to be" }]);
  assert.deepEqual([run.status, run.step, run.totalSteps, run.progress], ["running", 20, 40, 0.5]);
  assert.equal(run.samples.length, 1);
  run.apply("run", { status: "finished", config: { steps: 40 } });
  assert.equal(run.status, "finished");
  assert.equal(run.error, undefined);
  run.apply("gone");
  assert.equal(run.error, "This run no longer exists.");
});

test("the latest scores on tasks, which thinning keeps", () => {
  const scores = [{ task: "piqa", shots: 0, score: 0.6 }];
  const rows = [
    { step: 1, tasks: [] },
    { step: 2, loss: 2 },
    { step: 3, tasks: scores },
    { step: 4, loss: 2 },
  ];
  assert.deepEqual(makeRun(rows).tasks(), scores);
  assert.deepEqual(makeRun(thin(rows)).tasks(), scores);
  assert.deepEqual(makeRun([{ step: 1, loss: 2 }]).tasks(), []);
});

test("a snapshot replaces the metrics: a resumed run repeats its last steps", () => {
  const run = makeRun([{ step: 10 }, { step: 20 }]);
  run.apply("snapshot", { record: run.record, metrics: [{ step: 10 }], samples: [] });
  assert.equal(run.step, 10);
});

test("long metrics are thinned, and keep every validation loss", () => {
  const run = makeRun([]);
  const rows = Array.from({ length: 20_001 }, (_, step) => (step % 1000 ? { step, loss: 1 } : { step, val_loss: 2 }));
  run.apply("metrics", rows);
  assert.ok(run.metrics.length < 10_100);
  assert.equal(run.metrics.filter((row) => "val_loss" in row).length, 21);
  const steps = run.metrics.map((row) => row.step);
  assert.deepEqual(
    steps,
    steps.toSorted((a, b) => a - b),
  );
  assert.deepEqual(thin([{ step: 0 }, { step: 1 }, { step: 2, val_loss: 1 }]), [{ step: 1 }, { step: 2, val_loss: 1 }]);
});

test("last() skips values that are not numbers", () => {
  const run = makeRun([
    { step: 1, loss: 3 },
    { step: 2, loss: null },
    { step: 3, val_loss: 2 },
  ]);
  assert.equal(run.last("loss"), 3);
  assert.equal(run.last("lr"), undefined);
});

test("the best row has the lowest validation loss; of equal ones the first", () => {
  const run = makeRun([
    { step: 1, val_loss: 3 },
    { step: 2, val_loss: null },
    { step: 3, val_loss: 2 },
    { step: 4, val_loss: 2 },
    { step: 5, loss: 1 },
  ]);
  assert.equal(run.best().step, 3);
  assert.equal(makeRun([{ step: 1, loss: 1 }]).best(), null);
});

test("the best row follows the metric that the run selects by, and ignores training rows", () => {
  const record = { selection: { metric: "accuracy", mode: "max" } };
  const rows = [
    { step: 1, accuracy: 0.5, val_loss: 1 },
    { step: 2, accuracy: 0.75, val_loss: 2 },
    { step: 3, accuracy: 0.9, lr: 0.1 },
  ];
  assert.equal(makeRun(rows, record).best().step, 2);
  assert.equal(makeRun(rows, {}).best().step, 1);
});

test("settings are read from parts, and from one level as runs of schema 1 have them", () => {
  const loop = { steps: 1000, batch_size: 16, context: 64 };
  const data = { train_tokens: 512_000 };
  const flat = makeRun([], { config: { ...loop, budget: "5m" }, choice: { reasons: ["small"] }, data });
  const nested = makeRun([], {
    schema: 2,
    config: { loop, auto: { budget: "5m" } },
    plan: { reasons: ["small"] },
    data,
  });
  for (const run of [flat, nested]) {
    assert.equal(run.totalSteps, 1000);
    assert.deepEqual(run.reasons, ["small"]);
    assert.equal(
      describePlan(run),
      "budget 5m · 1,000 steps of 16 × 64 = 1.0k tokens, 1.0M in total · 2.0 epochs of 512k tokens",
    );
  }
  const bare = makeRun([], { config: { loop, auto: {} } });
  assert.deepEqual(bare.reasons, []);
  assert.equal(describePlan(bare), "1,000 steps of 16 × 64 = 1.0k tokens, 1.0M in total");
});

test("points are pairs of axis and value; null interrupts a line", () => {
  const run = makeRun([
    { step: 1, time: 0.5, loss: 3 },
    { step: 2, loss: 2 },
    { step: 3, time: 1.5, loss: null },
    { step: 4, time: 2, val_loss: 1 },
  ]);
  assert.deepEqual(run.points("loss", "step"), [
    [1, 3],
    [2, 2],
    [3, null],
  ]);
  assert.deepEqual(run.points("loss", "time"), [
    [0.5, 3],
    [1.5, null],
  ]);
});

test("the remaining time follows the latest rows", () => {
  const rows = Array.from({ length: 10 }, (_, i) => ({
    step: i + 1,
    time: i < 5 ? 100 * i : 400 + 2 * (i - 4),
    loss: 1,
  }));
  const run = makeRun(rows);
  assert.equal(run.secondsLeft, (100 - 10) * 2);
  run.apply("run", { ...run.record, status: "finished" });
  assert.equal(run.secondsLeft, undefined);
  assert.equal(makeRun(rows.slice(0, 1)).secondsLeft, undefined);
});

test("the sample to show is the last one, at the temperature nearest to 0.8", () => {
  assert.equal(preferredSample([]), 0);
  const sample = (step, temperature) => ({ step, temperature });
  assert.equal(preferredSample([sample(1, 0.8), sample(2, 0.3)]), 1);
  assert.equal(preferredSample([sample(1, 0.8), sample(9, 0.2), sample(9, 0.7), sample(9, 1.2)]), 2);
});

test("nested settings become rows", () => {
  assert.deepEqual(flatten({ steps: 10, optim: { lr: 0.1, betas: [0.9, 0.95] }, data: null }), [
    ["steps", 10],
    ["optim.lr", 0.1],
    ["optim.betas", "0.9, 0.95"],
    ["data", null],
  ]);
});

test("a run that learns from rewards says what it measures", () => {
  const rows = [
    { step: 1, loss: 0.1, lr: 1, reward: 0.5, kl: 0.1, "reward/brevity": 1 },
    { step: 1, val_reward: 0.4, val_gold: 0.3 },
  ];
  const run = makeRun(rows, { selection: { metric: "val_gold", mode: "max" }, alarms: [{ step: 1, message: "fell" }] });
  assert.ok(run.isAlignment);
  assert.deepEqual(
    alignmentMetrics(run).map(({ key }) => key),
    ["reward", "gold", "kl", "reward/brevity"],
  );
  assert.equal(run.best().val_gold, 0.3);
  assert.deepEqual(run.alarms, [{ step: 1, message: "fell" }]);
  const other = makeRun([{ step: 1, loss: 2, kl: 1 }]);
  assert.equal(other.isAlignment, false);
  assert.deepEqual(other.alarms, []);
  assert.equal(thin([{ step: 0, reward: 1 }, { step: 1 }, { step: 2, val_reward: 1 }]).length, 2);
});
