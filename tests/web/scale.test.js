import assert from "node:assert/strict";
import { test } from "node:test";

import { linePath, logTicks, makeScale, nearestIndex, ticks } from "../../src/gptsmith/server/web/scale.js";

const BOX = { left: 50, top: 10, width: 400, height: 200 };

function assertClose(actual, expected) {
  assert.equal(actual.length, expected.length, `${actual} is not ${expected}`);
  actual.forEach((value, i) => assert.ok(Math.abs(value - expected[i]) < 1e-9, `${actual} is not ${expected}`));
}

test("ticks are round numbers inside the range", () => {
  assertClose(ticks(0, 100, 5), [0, 20, 40, 60, 80, 100]);
  assertClose(ticks(1.37, 3.81, 5), [1.5, 2, 2.5, 3, 3.5]);
  assertClose(ticks(-0.02, 0.021, 4), [-0.02, 0, 0.02]);
  assertClose(ticks(0, 0.3, 3), [0, 0.1, 0.2, 0.3]); // the end is there despite rounding
});

test("logarithmic ticks are powers of ten, with steps between them in a short range", () => {
  assertClose(logTicks(0.5, 20), [0.5, 1, 2, 5, 10, 20]);
  assertClose(logTicks(1e-4, 2), [1e-4, 1e-3, 1e-2, 1e-1, 1]);
  assertClose(logTicks(1.4, 3.7), [1.5, 2, 2.5, 3, 3.5]); // as on a linear axis
});

test("the nearest of sorted numbers", () => {
  const sorted = [0, 10, 20, 20, 50];
  for (const [x, index] of [
    [-5, 0],
    [4, 0],
    [5, 0],
    [6, 1],
    [20, 2],
    [34, 3],
    [36, 4],
    [99, 4],
  ]) {
    assert.equal(nearestIndex(sorted, x), index, `for ${x}`);
  }
  assert.equal(nearestIndex([7], 100), 0);
});

test("a scale maps the data into the box, with a margin above and below", () => {
  const points = [
    [0, 1],
    [10, 3],
  ];
  const { x0, x1, low, high, toX, toY } = makeScale(points, { box: BOX });
  assert.deepEqual([x0, x1], [0, 10]);
  assertClose([low, high], [0.9, 3.1]);
  assertClose([toX(0), toX(10), toX(5)], [50, 450, 250]);
  assertClose([toY(low), toY(high), toY(2)], [210, 10, 110]);
});

test("a minimum is the lower end of a linear axis, without a margin", () => {
  const { low } = makeScale([[0, 5]], { min: 0, box: BOX });
  assert.equal(low, 0);
});

test("a single point and a constant line have a scale", () => {
  for (const logarithmic of [false, true]) {
    const { toX, toY } = makeScale([[3, 2]], { logarithmic, box: BOX });
    assertClose([toX(3), toY(2)], [250, 110]);
  }
  const zero = makeScale([[0, 0]], { box: BOX });
  assertClose([zero.toY(0)], [110]);
});

test("equal ratios are equal distances on a logarithmic axis", () => {
  const points = [
    [0, 1],
    [1, 100],
  ];
  const { toY } = makeScale(points, { logarithmic: true, box: BOX });
  assertClose([toY(1) - toY(10)], [toY(10) - toY(100)]);
});

test("a line is interrupted where there is no value", () => {
  const identity = { toX: (x) => x, toY: (y) => y };
  const points = [
    [0, 1],
    [1, null],
    [2, 3],
    [3, 4.25],
  ];
  assert.equal(linePath(points, identity), "M0.0 1.0M2.0 3.0L3.0 4.3");
  const withZero = [
    [0, 1],
    [1, 0],
    [2, 3],
  ];
  assert.equal(linePath(withZero, identity, true), "M0.0 1.0M2.0 3.0");
  assert.equal(linePath(withZero, identity), "M0.0 1.0L1.0 0.0L2.0 3.0");
});
