import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { describe, waitForSelection } from "../../src/gptsmith/server/web/models.js";
import { jsonResponse, mockFetch } from "./browser.js";

let menu;
beforeEach(() => {
  menu = {
    value: "",
    replaceChildren(...options) {
      this.value = options[0].value;
    },
  };
  globalThis.document = {
    getElementById: () => menu,
    createElement: () => ({ value: "", append() {} }),
  };
});

test("a model is described once, under its whole name", async (t) => {
  const calls = mockFetch(t, () => jsonResponse({ layers: 2 }));
  const answers = await Promise.all([describe("runs/my bard"), describe("runs/my bard")]);
  assert.deepEqual(answers, [{ layers: 2 }, { layers: 2 }]);
  assert.deepEqual(
    calls.map(({ path }) => path),
    ["api/models/runs/my%20bard"],
  );
});

test("a description that failed is asked for again", async (t) => {
  const responses = [jsonResponse({ error: { message: "busy" } }, 503), jsonResponse({ layers: 2 })];
  mockFetch(t, () => responses.shift());
  await assert.rejects(describe("flaky"), { message: "busy" });
  assert.deepEqual(await describe("flaky"), { layers: 2 });
});

test("a request that needs a model waits until the models are known", async (t) => {
  const calls = mockFetch(t, () => jsonResponse({ data: [{ id: "tiny" }, { id: "plain" }] }));
  assert.equal(await waitForSelection(), "tiny");
  assert.equal(await waitForSelection(), "tiny");
  assert.deepEqual(
    calls.map(({ path }) => path),
    ["v1/models"],
  );
});

test("a server without models is an error that says what to do", async (t) => {
  mockFetch(t, () => jsonResponse({ data: [] }));
  menu.replaceChildren = () => {};
  await assert.rejects(waitForSelection(), /could not be loaded\. Reload the page/);
});
