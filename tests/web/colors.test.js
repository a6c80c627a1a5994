import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { lineStyle } from "../../src/gptsmith/server/web/chart.js";

const CSS = readFileSync(new URL("../../src/gptsmith/server/web/app.css", import.meta.url), "utf8");
const COUNT = 12;
const MIN_CONTRAST = 3; // WCAG 2.2, 1.4.11: of graphics with the surface below them
const MIN_DISTANCE = 0.12; // in Oklab, where white and black are 1 apart

// The color of a custom property in a theme, as linear RGB from 0 to 1.
function color(name, theme) {
  const [, light, dark] = CSS.match(new RegExp(`--${name}: light-dark\\((#\\w{6}), (#\\w{6})\\)`));
  const hex = theme === "light" ? light : dark;
  const channels = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255);
  return channels.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
}

function contrast(a, b) {
  const [low, high] = [a, b]
    .map(([r, g, blue]) => 0.2126 * r + 0.7152 * g + 0.0722 * blue + 0.05)
    .toSorted((x, y) => x - y);
  return high / low;
}

// https://bottosson.github.io/posts/oklab/
function oklab([r, g, b]) {
  const l = Math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
  const m = Math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
  const s = Math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
  return [
    0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s,
    1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s,
    0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s,
  ];
}

for (const theme of ["light", "dark"]) {
  test(`twelve runs have distinct colors that stand out from the page (${theme})`, () => {
    const colors = Array.from({ length: COUNT }, (_, i) => color(`s${i}`, theme));
    const surface = color("surface", theme);
    for (const [i, each] of colors.entries()) {
      assert.ok(contrast(each, surface) >= MIN_CONTRAST, `s${i}: ${contrast(each, surface)}`);
      for (const [j, other] of colors.slice(0, i).entries()) {
        const [p, q] = [oklab(each), oklab(other)];
        const distance = Math.hypot(...p.map((x, axis) => x - q[axis]));
        assert.ok(distance >= MIN_DISTANCE, `s${i} and s${j}: ${distance}`);
      }
    }
  });
}

test("every number has a class of the style sheet, and lines of the same color have other dashes", () => {
  const styles = Array.from({ length: 4 * COUNT }, (_, i) => lineStyle(i));
  for (const { class: name } of styles) assert.match(CSS, new RegExp(`\\.${name} \\{ color: var\\(--${name}\\); \\}`));
  assert.equal(new Set(styles.slice(0, COUNT).map(({ class: name }) => name)).size, COUNT);
  assert.equal(new Set(styles.map((style) => JSON.stringify(style))).size, styles.length);
  const dashes = styles.slice(0, COUNT).map(({ dash }) => dash);
  for (const dash of dashes) assert.equal(dashes.filter((other) => other === dash).length, 3);
});
