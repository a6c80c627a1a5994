import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { load, names, remove, save } from "../../src/gptsmith/server/web/store.js";
import { FakeStorage } from "./browser.js";

let storage;
beforeEach(() => {
  storage = globalThis.localStorage = new FakeStorage();
});

test("a value is stored as JSON and read back", () => {
  assert.equal(save("view", { name: "chat", sizes: [1, null] }), true);
  assert.deepEqual([...storage.items.keys()], ["gptsmith.view"]);
  assert.deepEqual(load("view", null), { name: "chat", sizes: [1, null] });
});

test("a missing or broken value is replaced by the fallback; a stored null is a value", () => {
  assert.equal(load("view", "chat"), "chat");
  storage.items.set("gptsmith.view", "{broken");
  assert.equal(load("view", "chat"), "chat");
  save("view", null);
  assert.equal(load("view", "chat"), null);
});

test("full storage is reported", () => {
  storage.room = 5;
  assert.equal(save("view", "chat"), false);
});

test("names are listed by how they begin, and values are removed", () => {
  storage.setItem("another.conversation.1", "{}");
  save("conversation.1", {});
  save("conversation.2", {});
  save("view", "chat");
  assert.deepEqual(names("conversation."), ["conversation.1", "conversation.2"]);
  remove("conversation.1");
  assert.deepEqual(names("conversation."), ["conversation.2"]);
});

test("disabled storage is not an error", () => {
  delete globalThis.localStorage;
  assert.equal(load("view", "chat"), "chat");
  assert.equal(save("view", "chat"), false);
  assert.deepEqual(names(""), []);
  remove("view");
});
