import assert from "node:assert/strict";
import { test } from "node:test";

import {
  CONTROLS,
  defaultValues,
  formatValue,
  parseValue,
  requestFields,
} from "../../src/gptsmith/server/web/sampling.js";

const control = (name) => CONTROLS.find((each) => each.name === name);

test("parameters that are off are not sent", () => {
  const values = defaultValues(CONTROLS);
  assert.deepEqual(requestFields(CONTROLS, values), { temperature: 0.7, top_p: 0.95, max_tokens: 512 });
  Object.assign(values, { temperature: 0, top_p: 1, top_k: 40, min_p: 0.05, repetition_penalty: 1.1, seed: 0 });
  assert.deepEqual(requestFields(CONTROLS, values), {
    temperature: 0,
    top_k: 40,
    min_p: 0.05,
    repetition_penalty: 1.1,
    max_tokens: 512,
    seed: 0,
  });
});

test("values of controls that the view does not have are not sent", () => {
  assert.deepEqual(requestFields([control("top_k")], { temperature: 1, top_k: 5 }), { top_k: 5 });
});

test("every default is in its range", () => {
  for (const { name, value, min, max, off } of CONTROLS) {
    assert.ok(value === null || (value >= min && value <= max), name);
    assert.ok(off === undefined || (off >= min && off <= max), name);
  }
});

test("a typed value must be in range; an optional one may be empty", () => {
  assert.equal(parseValue(control("max_tokens"), "100"), 100);
  for (const text of ["0", "4097", "-1", "", "many"]) {
    assert.equal(parseValue(control("max_tokens"), text), undefined, text);
  }
  assert.equal(parseValue(control("seed"), ""), null);
  assert.equal(parseValue(control("seed"), "-1"), undefined);
});

test("values are shown with the digits of their step, or as off", () => {
  assert.equal(formatValue(control("temperature"), 0), "0.00");
  assert.equal(formatValue(control("temperature"), 0.7), "0.70");
  assert.equal(formatValue(control("top_p"), 1), "off");
  assert.equal(formatValue(control("top_k"), 0), "off");
  assert.equal(formatValue(control("top_k"), 40), "40");
  assert.equal(formatValue(control("repetition_penalty"), 1.1), "1.10");
});
