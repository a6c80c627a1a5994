import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { Answers } from "../../src/gptsmith/server/web/answers.js";
import { FakeTabs, mockFetch, streamResponse } from "./browser.js";

let tabs;
let saved;
let answers;
beforeEach(() => {
  tabs = new FakeTabs();
  saved = [];
  const save = (conversation) => saved.push(structuredClone(conversation.message));
  answers = tabs.run("tab", () => new Answers({ save, onText: () => {} }));
});

const begin = () => ({ message: { role: "assistant", content: "" } });
const generate = (conversation, full = false) =>
  answers.generate(conversation, conversation.message, async () => ({ body: {}, full }));
const piece = (delta, finish_reason) => `data: ${JSON.stringify({ choices: [{ delta, finish_reason }] })}\n\n`;
const tick = () =>
  new Promise((resolve) => {
    setTimeout(resolve, 5);
  });

// A stream of these pieces that then stays open until it is aborted.
function openStream(pieces) {
  return (path, { signal }) => {
    const encoder = new TextEncoder();
    const body = new ReadableStream({
      start(controller) {
        for (const each of pieces) controller.enqueue(encoder.encode(each));
        signal.addEventListener("abort", () => controller.error(signal.reason));
      },
    });
    return new Response(body);
  };
}

test("an answer is stored with its end", async (t) => {
  mockFetch(t, () => streamResponse([piece({ content: "Hel" }), piece({ content: "lo" }, "stop")]));
  const conversation = begin();
  const done = generate(conversation);
  assert.equal(answers.in(conversation), conversation.message);
  await done;
  assert.equal(answers.in(conversation), undefined);
  assert.equal(saved.at(-1).content, "Hello");
  assert.equal(saved.at(-1).finish, "stop");
});

test("an answer that ends where the context does says so", async (t) => {
  mockFetch(t, () => streamResponse([piece({ content: "a" }, "length")]));
  const conversation = begin();
  await generate(conversation, true);
  assert.equal(conversation.message.finish, "context");
});

test("two conversations are answered at once, and stopped one by one", async (t) => {
  mockFetch(t, openStream([piece({ content: "a" })]));
  const [one, two] = [begin(), begin()];
  const [first, second] = [generate(one), generate(two)];
  await tick();
  assert.equal(answers.canStart, false);
  answers.stop(one);
  await first;
  assert.equal(one.message.finish, "stopped");
  assert.equal(two.message.finish, undefined);
  assert.equal(answers.canStart, true);
  answers.stop(two);
  await second;
});

test("a growing answer is stored every second", async (t) => {
  t.mock.timers.enable({ apis: ["setInterval"] });
  mockFetch(t, openStream([piece({ content: "half" })]));
  const conversation = begin();
  const done = generate(conversation);
  await tick();
  t.mock.timers.tick(1000);
  assert.deepEqual([saved.at(-1).content, saved.at(-1).finish], ["half", undefined]);
  answers.stop(conversation);
  await done;
  const { length } = saved;
  t.mock.timers.tick(5000);
  assert.equal(saved.length, length);
});

test("a reload stores what there is, as interrupted", async (t) => {
  mockFetch(t, openStream([piece({ content: "half" })]));
  const conversation = begin();
  const done = generate(conversation);
  await tick();
  tabs.fire("tab", "pagehide");
  answers.stop(conversation); // the browser breaks the stream
  await done;
  assert.deepEqual([saved.at(-1).content, saved.at(-1).finish], ["half", "interrupted"]);
});

test("a stream without an end is interrupted, and an error is kept", async (t) => {
  mockFetch(t, () => streamResponse([piece({ content: "half" })]));
  const conversation = begin();
  await generate(conversation);
  assert.equal(conversation.message.finish, "interrupted");
  mockFetch(t, () => streamResponse([new TypeError("network")]));
  const other = begin();
  await generate(other);
  assert.match(other.message.error, /connection to the server was lost/);
});
