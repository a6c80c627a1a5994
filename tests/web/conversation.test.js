import assert from "node:assert/strict";
import { test } from "node:test";

import {
  addMessage,
  answerState,
  apiMessages,
  applyChunk,
  branch,
  decodingSpeed,
  exportFile,
  fromList,
  isConversation,
  merge,
  newConversation,
  showBranch,
  summarize,
  titleOf,
  versions,
} from "../../src/gptsmith/server/web/conversation.js";

const CONVERSATION = fromList({
  id: "1",
  title: "Où est/la gare?",
  system: "Be brief.",
  updated: 1000,
  messages: [
    { role: "user", content: "Où est la gare?" },
    { role: "assistant", content: "Là.", model: "tiny", finish: "stop", usage: { completion_tokens: 2 } },
  ],
});

const texts = (conversation) => branch(conversation).map(({ content }) => content);

// A conversation of these texts, in turns.
function talk(...said) {
  const conversation = newConversation();
  said.forEach((content, i) => {
    const role = i % 2 ? "assistant" : "user";
    addMessage(conversation, conversation.leaf, { role, content, created: i, updated: i, finish: "stop" });
  });
  return conversation;
}

test("new conversations are empty and distinct", () => {
  const [a, b] = [newConversation(), newConversation()];
  assert.notEqual(a.id, b.id);
  assert.deepEqual(branch(a), []);
});

test("a second answer to an early question is a branch, and nothing is deleted", () => {
  const conversation = talk("1", "2", "3", "4");
  const [question, answer] = branch(conversation);
  const other = addMessage(conversation, question.id, { role: "assistant", content: "2b", created: 10 });
  assert.deepEqual(texts(conversation), ["1", "2b"]);
  assert.deepEqual(versions(conversation, other), [answer, other]);
  assert.deepEqual(versions(conversation, question), [question]);
  showBranch(conversation, answer);
  assert.deepEqual(texts(conversation), ["1", "2", "3", "4"]);
  showBranch(conversation, other);
  assert.deepEqual(texts(conversation), ["1", "2b"]);
});

test("an edited first question is a branch too; each branch keeps its continuation", () => {
  const conversation = talk("1", "2", "3");
  const edited = addMessage(conversation, null, { role: "user", content: "1b", created: 10 });
  addMessage(conversation, edited.id, { role: "assistant", content: "2b", created: 11 });
  const [first, second] = versions(conversation, edited);
  showBranch(conversation, first);
  assert.deepEqual(texts(conversation), ["1", "2", "3"]);
  showBranch(conversation, second);
  assert.deepEqual(texts(conversation), ["1b", "2b"]);
  assert.deepEqual(
    apiMessages(conversation, edited.id).map(({ content }) => content),
    ["1b"],
  );
});

test("a broken record does not hang", () => {
  const conversation = talk("1", "2");
  const [first, second] = branch(conversation);
  first.parent = second.id;
  assert.equal(branch(conversation).length, 2);
});

test("records that two tabs have changed are joined", () => {
  const ours = talk("1", "2");
  const theirs = structuredClone(ours);
  addMessage(ours, ours.leaf, { role: "user", content: "ours", created: 5 });
  addMessage(theirs, theirs.leaf, { role: "user", content: "theirs", created: 6 });
  theirs.messages[branch(ours)[1].id].content = "2, grown";
  theirs.messages[branch(ours)[1].id].updated = 9;
  Object.assign(theirs, { system: "newer", updated: ours.updated + 1 });
  const kept = branch(ours)[1];
  assert.equal(merge(ours, theirs), true);
  assert.deepEqual(texts(ours), ["1", "2, grown", "ours"]);
  assert.equal(branch(ours)[1], kept); // the same object: an answer may be growing in it
  assert.equal(ours.system, "newer");
  assert.deepEqual(
    versions(ours, ours.messages[ours.leaf]).map(({ content }) => content),
    ["ours", "theirs"],
  );
  assert.equal(merge(theirs, structuredClone(ours)), false);
  assert.deepEqual(theirs.messages, ours.messages);
});

test("a branch that another tab has continued is shown to its end", () => {
  const ours = talk("1", "2");
  const theirs = structuredClone(ours);
  addMessage(theirs, theirs.leaf, { role: "user", content: "3" });
  merge(ours, theirs);
  assert.deepEqual(texts(ours), ["1", "2", "3"]);
});

test("a list of messages is converted, always to the same record", () => {
  const old = {
    id: "x",
    title: "hi",
    updated: 7,
    messages: [
      { role: "user", content: "hi" },
      { role: "assistant", content: "half an ans" },
    ],
  };
  const conversation = fromList(old);
  assert.deepEqual(conversation, fromList(structuredClone(old)));
  assert.equal(isConversation(conversation), true);
  assert.deepEqual(texts(conversation), ["hi", "half an ans"]);
  assert.equal(answerState(branch(conversation)[1]), "interrupted");
  for (const broken of [null, "x", [], {}, { messages: [null] }, { messages: [{ role: "user" }] }]) {
    assert.equal(fromList(broken), null);
    assert.equal(isConversation(broken), false);
  }
});

test("an answer that nobody has stored for a while is interrupted", () => {
  assert.equal(answerState({ updated: 1000 }, 5000), "growing");
  assert.equal(answerState({ updated: 1000 }, 60_000), "interrupted");
  assert.equal(answerState({ updated: 1000, finish: "stop" }, 60_000), "ended");
  assert.equal(answerState({ updated: 1000, error: "refused" }, 5000), "ended");
  assert.equal(answerState({ updated: 1000, finish: "interrupted" }, 1000), "interrupted");
  assert.equal(summarize({ updated: 0 }), "interrupted");
});

test("the title is one line of the first message", () => {
  assert.equal(titleOf({ content: "  What\n is\t this?  " }), "What is this?");
  assert.equal(titleOf({ content: "a".repeat(100) }).length, 60);
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

test("reasoning grows beside the text, and is not sent back", () => {
  const conversation = newConversation();
  const question = addMessage(conversation, null, { role: "user", content: "2 + 2?" });
  const message = addMessage(conversation, question.id, { role: "assistant", content: "" });
  assert.equal(applyChunk(message, { choices: [{ delta: { reasoning_content: "Two and " } }] }), true);
  assert.equal(applyChunk(message, { choices: [{ delta: { reasoning_content: "two." } }] }), true);
  assert.deepEqual([message.content, message.reasoning], ["", "Two and two."]);
  assert.equal(applyChunk(message, { choices: [{ delta: { content: "4", reasoning_content: null } }] }), true);
  assert.deepEqual([message.content, message.reasoning], ["4", "Two and two."]);
  assert.deepEqual(apiMessages(conversation), [
    { role: "user", content: "2 + 2?" },
    { role: "assistant", content: "4" },
  ]);
  assert.ok(!exportFile(conversation, "json").text.includes("Two and two"));
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
  assert.equal(summarize({ finish: "context", dropped: 1 }), "stopped: the context is full · without the oldest turn");
  assert.equal(summarize({ finish: "stop", dropped: 3 }), "without the 3 oldest turns");
  assert.equal(summarize({ finish: "stop" }), "");
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

test("pictures are parts of a question", () => {
  const conversation = newConversation();
  const images = ["data:image/png;base64,AA==", "data:image/png;base64,BB=="];
  const question = addMessage(conversation, null, { role: "user", content: "What?", images });
  addMessage(conversation, question.id, { role: "assistant", content: "A cat.", finish: "stop" });
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  assert.deepEqual(apiMessages(conversation), [
    { role: "user", content: [...parts, { type: "text", text: "What?" }] },
    { role: "assistant", content: "A cat." },
  ]);
  const { text } = exportFile(conversation, "markdown");
  assert.ok(text.includes(`![picture](${images[0]})\n\n![picture](${images[1]})\n\nWhat?`));
  assert.deepEqual(JSON.parse(exportFile(conversation, "json").text).messages, apiMessages(conversation));
});

test("a question can be a picture alone", () => {
  const conversation = newConversation();
  addMessage(conversation, null, { role: "user", content: "", images: ["data:image/png;base64,AA=="] });
  assert.deepEqual(apiMessages(conversation)[0].content, [
    { type: "image_url", image_url: { url: "data:image/png;base64,AA==" } },
  ]);
  assert.equal(titleOf(branch(conversation)[0]), "Picture");
  assert.ok(isConversation(conversation));
});
