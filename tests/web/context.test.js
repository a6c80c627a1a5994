import assert from "node:assert/strict";
import { test } from "node:test";

import { fit, reserve, withoutPixels } from "../../src/gptsmith/server/web/context.js";

// Every message has 10 tokens, unless its text says another number.
const counter = (context, calls = []) => {
  const tokensOf = ({ content }) => Number(content) || 10;
  return async (messages) => {
    calls.push(messages.length);
    return { count: messages.reduce((sum, message) => sum + tokensOf(message), 0), max_model_len: context };
  };
};

const conversation = (length, system = false) => [
  ...(system ? [{ role: "system", content: "s" }] : []),
  ...Array.from({ length }, (_, i) => ({ role: i % 2 ? "assistant" : "user", content: "x" })),
];

test("a conversation that fits is sent as it is, after one count", async () => {
  const calls = [];
  const messages = conversation(5);
  assert.deepEqual(await fit(messages, 20, counter(100, calls)), { messages, dropped: 0, room: 50 });
  assert.deepEqual(calls, [5]);
});

// What `gptsmith chat` does: leave out one turn after the other.
async function oneByOne(messages, maxTokens, count) {
  const start = messages[0].role === "system" ? 1 : 0;
  let turns = messages.slice(start);
  for (let dropped = 0; ; dropped++, turns = turns.slice(2)) {
    const left = [...messages.slice(0, start), ...turns];
    const { count: tokens, max_model_len: context } = await count(left);
    if (tokens + reserve(maxTokens, context) <= context) return { messages: left, dropped, room: context - tokens };
    if (turns.length <= 1) return null;
  }
}

test("the oldest turns are left out as the terminal does it", async () => {
  for (const system of [false, true]) {
    for (let length = 1; length < 40; length += 2) {
      for (const context of [25, 40, 64, 130, 1000]) {
        for (const maxTokens of [1, 16, 512]) {
          const messages = conversation(length, system);
          const expected = await oneByOne(messages, maxTokens, counter(context));
          const found = await fit(messages, maxTokens, counter(context)).catch(() => null);
          assert.deepEqual(found, expected);
        }
      }
    }
  }
});

test("few counts are needed for a long conversation", async () => {
  const calls = [];
  await fit(conversation(999), 10, counter(100, calls));
  assert.ok(calls.length < 12, String(calls.length));
});

test("a message that is too long by itself is refused", async () => {
  const messages = [...conversation(4), { role: "user", content: "1200" }];
  const message = "The message is too long: 1,200 tokens for a context of 512.";
  await assert.rejects(fit(messages, 10, counter(512)), { message });
});

test("pictures are counted without their pixels", () => {
  const text = { type: "text", text: "What?" };
  const picture = { type: "image_url", image_url: { url: "data:image/png;base64,AAAA" } };
  assert.deepEqual(withoutPixels({ role: "user", content: [picture, text] }), {
    role: "user",
    content: [{ type: "image_url", image_url: { url: "data:," } }, text],
  });
  assert.deepEqual(withoutPixels({ role: "user", content: "What?" }), { role: "user", content: "What?" });
  assert.equal(picture.image_url.url, "data:image/png;base64,AAAA");
});

test("the oldest turns are left out if there are too many pictures", async () => {
  const picture = { type: "image_url", image_url: { url: "data:," } };
  const turns = [8, 7, 1, 2].flatMap((count) => [
    { role: "user", content: [...Array(count).fill(picture), { type: "text", text: "x" }] },
    { role: "assistant", content: "x" },
  ]);
  const messages = [{ role: "system", content: "s" }, ...turns.slice(0, -1)];
  const calls = [];
  const found = await fit(messages, 20, counter(1000, calls));
  assert.equal(found.dropped, 1);
  assert.deepEqual(found.messages, [messages[0], ...messages.slice(3)]);
  assert.deepEqual(calls, [6]); // the first count is of a request that the server takes
});
