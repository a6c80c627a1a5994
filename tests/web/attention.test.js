import assert from "node:assert/strict";
import { test } from "node:test";

import {
  lensLevel,
  maskReason,
  maskRectangles,
  patchAttention,
  strongestKeys,
  weightColor,
} from "../../src/gptsmith/server/web/attention.js";

test("the strongest keys of a query do not include the future", () => {
  const weights = [
    [1, 0, 0],
    [0.25, 0.75, 0.9],
    [0.2, 0.5, 0.3],
  ];
  assert.deepEqual(strongestKeys(weights, 1, 8), [
    { weight: 0.75, index: 1 },
    { weight: 0.25, index: 0 },
  ]);
  assert.deepEqual(strongestKeys(weights, 2, 1), [{ weight: 0.5, index: 1 }]);
});

test("the causal mask, and a sliding window of two positions", () => {
  const table = (window) => [0, 1, 2].map((query) => [0, 1, 2].map((key) => maskReason(query, key, window)));
  assert.deepEqual(table(null), [
    [null, "future", "future"],
    [null, null, "future"],
    [null, null, null],
  ]);
  assert.deepEqual(table(2)[2], ["window", null, null]);
});

test("the rectangles of the mask cover exactly the cells that are masked", () => {
  for (const window of [null, undefined, 1, 2, 5, 9]) {
    const size = 6;
    const covered = Array.from({ length: size }, () => Array(size).fill(0));
    for (const { x, y, width } of maskRectangles(size, window)) {
      for (let key = x; key < x + width; key++) covered[y][key]++;
    }
    const expected = covered.map((row, query) => row.map((_, key) => Number(maskReason(query, key, window) !== null)));
    assert.deepEqual(covered, expected, `window ${window}`);
  }
});

test("colors go from low to high with the square root of the weight", () => {
  const [low, high] = [
    [0, 100, 200],
    [100, 0, 200],
  ];
  assert.equal(weightColor(0, low, high), "rgb(0 100 200)");
  assert.equal(weightColor(1, low, high), "rgb(100 0 200)");
  assert.equal(weightColor(0.25, low, high), "rgb(50 50 200)");
});

test("the logit lens has six colors", () => {
  assert.deepEqual([0, 0.16, 0.17, 0.5, 0.99, 1].map(lensLevel), ["0", "0", "1", "3", "5", "5"]);
});

test("the patches of a picture, the strongest first", () => {
  const { total, patches } = patchAttention([0.1, 0, 0.2, 0.05, 0, 0, 0, 0.4, 0], 3);
  assert.ok(Math.abs(total - 0.75) < 1e-12);
  assert.deepEqual(patches[0], { row: 2, column: 1, weight: 0.4, share: 1 });
  assert.deepEqual(patches[1], { row: 0, column: 2, weight: 0.2, share: 0.5 });
  assert.equal(patches.length, 9);
});

test("a token that does not see the picture", () => {
  const { total, patches } = patchAttention([0, 0, 0, 0], 2);
  assert.equal(total, 0);
  assert.ok(patches.every(({ share }) => share === 0));
});
