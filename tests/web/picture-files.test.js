import assert from "node:assert/strict";
import { test } from "node:test";

import { fittingSize, isPicture, mayKeep, TYPES } from "../../src/gptsmith/server/web/picture-files.js";

test("the formats are those that the server decodes", () => {
  for (const type of TYPES) assert.ok(isPicture({ type }));
  for (const type of ["image/svg+xml", "image/avif", "text/html", "application/pdf", ""])
    assert.ok(!isPicture({ type }));
});

test("small pictures are sent as they are", () => {
  assert.ok(mayKeep({ size: 5000 }, { width: 72, height: 72 }));
  assert.ok(!mayKeep({ size: 5000 }, { width: 5000, height: 1 }));
  assert.ok(!mayKeep({ size: 5_000_000 }, { width: 72, height: 72 }));
});

test("large pictures are made smaller and keep their proportions", () => {
  assert.deepEqual(fittingSize({ width: 4000, height: 3000 }), { width: 768, height: 576 });
  assert.deepEqual(fittingSize({ width: 300, height: 1536 }), { width: 150, height: 768 });
  assert.deepEqual(fittingSize({ width: 20_000, height: 1 }), { width: 768, height: 1 });
  assert.deepEqual(fittingSize({ width: 64, height: 48 }), { width: 64, height: 48 });
});
