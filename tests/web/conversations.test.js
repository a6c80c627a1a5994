import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { addMessage, branch, newConversation } from "../../src/gptsmith/server/web/conversation.js";
import { ConversationStore } from "../../src/gptsmith/server/web/conversations.js";
import { FakeTabs } from "./browser.js";

let tabs;
beforeEach(() => {
  tabs = new FakeTabs();
});

const open = (tab, listeners) => tabs.run(tab, () => new ConversationStore(listeners));
const titles = (store) => store.list().map(({ title }) => title);
const texts = (conversation) => branch(conversation).map(({ content }) => content);

function begin(tab, store, title) {
  const conversation = Object.assign(newConversation(), { title });
  addMessage(conversation, null, { role: "user", content: title });
  assert.equal(
    tabs.run(tab, () => store.save(conversation)),
    true,
  );
  return conversation;
}

test("two tabs keep each other's conversations", () => {
  const [a, b] = [open("a"), open("b")];
  begin("a", a, "from a");
  begin("b", b, "from b");
  begin("a", a, "again from a");
  for (const store of [a, b, open("c")]) {
    assert.deepEqual(titles(store).toSorted(), ["again from a", "from a", "from b"]);
  }
});

test("two tabs that continue one conversation keep both continuations", () => {
  const [a, b] = [open("a"), open("b")];
  const ours = begin("a", a, "question");
  const [theirs] = b.list();
  addMessage(ours, ours.leaf, { role: "assistant", content: "answer a" });
  addMessage(theirs, theirs.leaf, { role: "assistant", content: "answer b" });
  tabs.run("a", () => a.save(ours));
  tabs.run("b", () => b.save(theirs));
  for (const store of [a, b, open("c")]) assert.equal(Object.keys(store.list()[0].messages).length, 3);
  assert.deepEqual(texts(ours), ["question", "answer a"]);
  assert.deepEqual(texts(theirs), ["question", "answer b"]);
});

test("records that were written at the same time are joined afterwards", () => {
  const [a, b] = [open("a"), open("b")];
  const ours = begin("a", a, "question");
  const [theirs] = b.list();
  addMessage(ours, ours.leaf, { role: "assistant", content: "answer a" });
  addMessage(theirs, theirs.leaf, { role: "assistant", content: "answer b" });
  const key = `gptsmith.conversation.${ours.id}`;
  tabs.run("a", () => a.save(ours));
  tabs.run("b", () => tabs.storage.setItem(key, JSON.stringify({ ...theirs, messages: { ...theirs.messages } })));
  assert.equal(Object.keys(open("c").list()[0].messages).length, 3);
});

test("a deletion reaches the other tabs, and a late write does not undo it", () => {
  const deleted = [];
  const a = open("a");
  const b = open("b", { onDelete: (conversation) => deleted.push(conversation.title) });
  const conversation = begin("a", a, "bad idea");
  const key = `gptsmith.conversation.${conversation.id}`;
  const record = tabs.storage.getItem(key);
  tabs.run("a", () => a.delete(conversation));
  assert.deepEqual(deleted, ["bad idea"]);
  tabs.run("late", () => tabs.storage.setItem(key, record));
  assert.equal(tabs.storage.getItem(key), null);
  tabs.run("a", () => a.save(conversation));
  assert.deepEqual([titles(a), titles(b), titles(open("c"))], [[], [], []]);
});

const OLD = ["first", "second"].map((title, i) => ({
  id: title,
  title,
  updated: 2 - i,
  messages: [{ role: "user", content: title }],
}));

test("the list of older pages is converted once", () => {
  tabs.storage.setItem("gptsmith.conversations", JSON.stringify([...OLD, null, { id: "broken" }]));
  const [a, b] = [open("a"), open("b")];
  assert.deepEqual(titles(a), ["first", "second"]);
  assert.deepEqual(titles(b), ["first", "second"]);
  assert.deepEqual([...tabs.storage.items.keys()].toSorted(), [
    "gptsmith.conversation.first",
    "gptsmith.conversation.second",
  ]);
  tabs.storage.setItem("gptsmith.conversations", JSON.stringify(OLD)); // an old page was still open
  const record = tabs.storage.getItem("gptsmith.conversation.first");
  assert.deepEqual(titles(open("c")), ["first", "second"]);
  assert.equal(tabs.storage.getItem("gptsmith.conversation.first"), record);
});

test("a full storage loses nothing of the old list", () => {
  const list = JSON.stringify(OLD);
  tabs.storage.setItem("gptsmith.conversations", list);
  tabs.storage.room = list.length + 50;
  assert.deepEqual(titles(open("a")), ["first", "second"]);
  assert.equal(tabs.storage.getItem("gptsmith.conversations"), list);
  tabs.storage.room = Infinity;
  assert.deepEqual(titles(open("b")), ["first", "second"]);
  assert.equal(tabs.storage.getItem("gptsmith.conversations"), null);
});

test("records that cannot be read are left alone", () => {
  tabs.storage.setItem("gptsmith.conversation.x", "{broken");
  tabs.storage.setItem("gptsmith.conversation.y", '{"id":"y","messages":{"1":{"id":"2","content":"?"}}}');
  assert.deepEqual(titles(open("a")), []);
  assert.equal(tabs.storage.length, 2);
});

test("a full storage is reported", () => {
  const a = open("a");
  tabs.storage.room = 10;
  assert.equal(a.save(newConversation()), false);
});
