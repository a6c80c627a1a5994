import assert from "node:assert/strict";
import { test } from "node:test";

import {
  apiMessages,
  applyChunk,
  decodingSpeed,
  exportFile,
  newConversation,
  summarize,
  titleOf,
} from "../../src/gptsmith/server/web/conversation.js";

const CONVERSATION = {
  title: "Où est/la gare?",
  system: "Be brief.",
  messages: [
    { role: "user", content: "Où est la gare?" },
    { role: "assistant", content: "Là.", model: "tiny", finish: "stop", usage: { completion_tokens: 2 } },
  ],
};

test("new conversations are empty and distinct", () => {
  const [a, b] = [newConversation(), newConversation()];
  assert.notEqual(a.id, b.id);
  assert.deepEqual(a.messages, []);
});

test("the title is one line of the first message", () => {
  assert.equal(titleOf("  What\n is\t this?  "), "What is this?");
  assert.equal(titleOf("a".repeat(100)).length, 60);
});

test("the API is sent roles and texts, the system prompt first", () => {
  assert.deepEqual(apiMessages(CONVERSATION), [
    { role: "system", content: "Be brief." },
    { role: "user", content: "Où est la gare?" },
    { role: "assistant", content: "Là." },
  ]);
  assert.equal(apiMessages({ ...CONVERSATION, system: "  " }).length, 2);
  assert.equal(apiMessages({ ...CONVERSATION, system: undefined }).length, 2);
});

test("chunks of a stream add up to a message", () => {
  const message = { role: "assistant", content: "" };
  assert.equal(applyChunk(message, { choices: [{ delta: { role: "assistant" } }] }), false);
  assert.equal(applyChunk(message, { choices: [{ delta: { content: "Hel" } }] }), true);
  assert.equal(applyChunk(message, { choices: [{ delta: { content: "lo" }, finish_reason: "length" }] }), true);
  assert.equal(applyChunk(message, { choices: [], usage: { completion_tokens: 2 } }), false);
  assert.deepEqual(message, {
    role: "assistant",
    content: "Hello",
    finish: "length",
    usage: { completion_tokens: 2 },
  });
});

test("the speed is that of the tokens after the first", () => {
  assert.equal(decodingSpeed({ completion_tokens: 11 }, 2), 5);
  assert.equal(decodingSpeed({ completion_tokens: 1 }, 2), undefined);
  assert.equal(decodingSpeed({ completion_tokens: 3 }, 0), undefined);
  assert.equal(decodingSpeed(undefined, 2), undefined);
});

test("a summary says how an answer ended", () => {
  assert.equal(summarize({ finish: "stop", usage: { completion_tokens: 7 } }), "7 tokens");
  assert.equal(
    summarize({ finish: "length", usage: { completion_tokens: 12 }, speed: 34.56 }),
    "stopped at the length limit · 12 tokens · 34.6 tokens/s",
  );
  assert.equal(summarize({ finish: "stopped" }), "stopped");
  assert.equal(summarize({ finish: "edited" }), "edited");
  assert.equal(summarize({}), "");
});

test("an exported file is JSON that fine-tuning reads, or Markdown", () => {
  const json = exportFile(CONVERSATION, "json");
  assert.equal(json.name, "où-est-la-gare-.json");
  assert.deepEqual(JSON.parse(json.text), { messages: apiMessages(CONVERSATION) });
  const markdown = exportFile(CONVERSATION, "markdown");
  assert.equal(markdown.name, "où-est-la-gare-.md");
  assert.equal(
    markdown.text,
    "# Où est/la gare?\n\n**System**\n\nBe brief.\n\n**You**\n\nOù est la gare?\n\n**Assistant**\n\nLà.\n",
  );
});
