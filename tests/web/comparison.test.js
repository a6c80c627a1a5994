import assert from "node:assert/strict";
import { test } from "node:test";

import {
  actionOf,
  answerOf,
  describeRewardModel,
  describeStatus,
  drawModels,
  drawSeeds,
  problemOf,
  requestOf,
  toReplace,
} from "../../src/gptsmith/server/web/comparison.js";

const ROUND = {
  models: ["m", "m"],
  prompt: [{ role: "user", content: "hi" }],
  options: { temperature: 1 },
  answers: [
    { text: "one", seed: 5, finish: "stop" },
    { text: "two", seed: 9, finish: "length" },
  ],
};

test("seeds differ, are valid, and come in both orders", () => {
  const draws = Array.from({ length: 500 }, () => drawSeeds());
  for (const seeds of draws) {
    assert.notEqual(seeds[0], seeds[1]);
    for (const seed of seeds) assert.ok(Number.isInteger(seed) && seed >= 0 && seed <= 2147483647);
  }
  const rising = draws.filter(([left, right]) => left < right).length;
  assert.ok(rising > 150 && rising < 350);
  for (const extreme of [() => 0, () => 1 - Number.EPSILON]) {
    const [left, right] = drawSeeds(extreme);
    assert.notEqual(left, right);
  }
  const order = (last) => {
    const draw = [0.1, 0.2, last];
    return drawSeeds(() => draw.shift());
  };
  assert.deepEqual(order(0.4), order(0.6).toReversed());
});

test("keys are choices, unless they are part of something else", () => {
  const keys = {
    ArrowLeft: "left",
    1: "left",
    ArrowRight: "right",
    2: "right",
    t: "tie",
    T: "tie",
    B: "both_bad",
    e: "edit",
  };
  for (const [key, action] of Object.entries(keys)) assert.equal(actionOf({ key }), action, key);
  for (const key of ["3", "Enter", "ArrowUp", "toString", "x"]) assert.equal(actionOf({ key }), undefined, key);
  for (const held of ["ctrlKey", "metaKey", "altKey", "repeat"]) {
    assert.equal(actionOf({ key: "t", [held]: true }), undefined, held);
  }
});

test("answers that training cannot tell apart are named, and one is written again", () => {
  assert.equal(problemOf(["a", "b"]), "");
  assert.match(problemOf(["a", "a \n"]), /the same/);
  assert.match(problemOf([" ", "a"]), /empty/);
  assert.equal(toReplace(["", "a"]), 0);
  assert.equal(toReplace(["a", " "]), 1);
  assert.equal(
    toReplace(["a", "a"], () => 0.9),
    1,
  );
});

test("a request holds what was shown", () => {
  assert.deepEqual(requestOf(ROUND, "right"), {
    model: "m",
    prompt: ROUND.prompt,
    completions: ["one", "two"],
    choice: "right",
    options: { temperature: 1 },
    seeds: [5, 9],
    finish_reasons: ["stop", "length"],
  });
  assert.equal(requestOf(ROUND, "left", "better").edited, "better");
});

test("the conversation goes on with the chosen answer", () => {
  assert.equal(answerOf(ROUND, "left"), "one");
  assert.equal(answerOf(ROUND, "right"), "two");
  assert.equal(answerOf(ROUND, "right", "mine"), "mine");
  assert.equal(answerOf(ROUND, "tie"), "one");
  assert.equal(answerOf(ROUND, "both_bad"), undefined);
});

test("the counter says what there is", () => {
  const status = { comparisons: 1, tie: 0, both_bad: 0, edited: 0, unreadable: 0 };
  assert.equal(describeStatus(status), "1 comparison");
  const more = { comparisons: 1234, tie: 2, both_bad: 1, edited: 3, unreadable: 1 };
  assert.equal(describeStatus(more), "1,234 comparisons · 2 ties · 1 both bad · 3 edited · 1 unreadable line");
});

test("the reward model's agreement is a share with its count", () => {
  assert.equal(describeRewardModel(null), "");
  assert.equal(describeRewardModel(undefined), "");
  const judge = { name: "rm", scored: 8, correct: 6, pending: 0, skipped: 0 };
  assert.equal(describeRewardModel(judge), "The reward model rm agrees with 6 of 8 choices (75%).");
  assert.match(describeRewardModel({ ...judge, pending: 12 }), /\(75%\); 12 to go\.$/);
  assert.match(describeRewardModel({ ...judge, scored: 0 }), /nothing to predict yet/);
  assert.match(describeRewardModel({ ...judge, skipped: 2 }), /\(75%\)\. 2 it cannot read\.$/);
});

test("two models write the answers in both orders, and the request says which", () => {
  assert.deepEqual(
    drawModels("a", "b", () => 0.4),
    ["a", "b"],
  );
  assert.deepEqual(
    drawModels("a", "b", () => 0.6),
    ["b", "a"],
  );
  const body = requestOf({ ...ROUND, models: ["b", "a"] }, "left");
  assert.equal(body.model, "b");
  assert.deepEqual(body.models, ["b", "a"]);
  assert.equal("models" in requestOf(ROUND, "left"), false);
});
