import assert from "node:assert/strict";
import { test } from "node:test";

import {
  compactNumber,
  duration,
  exactNumber,
  glyphs,
  percent,
  printable,
  shortDuration,
  significant,
} from "../../src/gptsmith/server/web/format.js";

function cases(f, table) {
  for (const [input, expected] of table) assert.equal(f(input), expected, `for ${input}`);
}

test("percentages have two digits that count", () => {
  cases(percent, [
    [1, "100%"],
    [0.5, "50%"],
    [0.0996, "10%"],
    [0.0994, "9.9%"],
    [0.001, "0.1%"],
    [0.0001, "<0.1%"],
    [0, "<0.1%"],
  ]);
});

test("large numbers have a unit", () => {
  cases(compactNumber, [
    [0, "0"],
    [999, "999"],
    [1234, "1.2k"],
    [12_345, "12k"],
    [1_234_567, "1.2M"],
    [-1234, "-1.2k"],
    [124e6, "124M"],
    [7e9, "7.0B"],
    [15e12, "15T"],
    [null, "–"],
    [undefined, "–"],
  ]);
  cases(exactNumber, [
    [12_345, "12,345"],
    [999_999, "999,999"],
    [2_500_000, "2.5M"],
  ]);
});

test("learning rates have three significant digits", () => {
  cases(significant, [
    [0, "0"],
    [0.02, "0.02"],
    [0.012345, "0.0123"],
    [0.0003, "3.0e-4"],
    [1e-5, "1.0e-5"],
  ]);
});

test("durations in two units, and in one", () => {
  cases(duration, [
    [0, "0 s"],
    [59.4, "59 s"],
    [59.6, "1 min 00 s"],
    [125, "2 min 05 s"],
    [3599.7, "1 h 00 min"],
    [3725, "1 h 02 min"],
    [90_000, "25 h 00 min"],
    [-3, "0 s"],
    [Infinity, "–"],
    [undefined, "–"],
  ]);
  cases(shortDuration, [
    [89, "89 s"],
    [90, "1.5 min"],
    [3725, "62.1 min"],
    [7200, "2.0 h"],
    [undefined, "–"],
  ]);
});

test("white space in tokens is visible", () => {
  cases(printable, [
    ["", "∅"],
    [" a\n", "␣a⏎"],
    ["\t", "⇥"],
  ]);
});

test("parts of a token that have no width get a glyph, and the text stays the same", () => {
  assert.deepEqual(glyphs("a cat"), [{ text: "a cat", glyph: undefined }]);
  assert.deepEqual(glyphs("\n"), [{ text: "\n", glyph: "⏎" }]);
  assert.deepEqual(
    glyphs("a\r\n\nb").map(({ glyph }) => glyph),
    [undefined, "␍", "⏎", "⏎", undefined],
  );
  assert.deepEqual(
    ["", "\u200b", "\0", "👩‍🔬", "\t"].map((text) => glyphs(text)[0].glyph),
    ["∅", "·", "·", undefined, undefined],
  );
  for (const text of ["", "x\ny", "\r\n", "\u2028"]) {
    const joined = glyphs(text).map((part) => part.text);
    assert.equal(joined.join(""), text);
  }
});
