// Conversations as data. No DOM.
//
// The messages form a tree: a second answer, or an edited question, is a new branch next to the old one. A conversation is
// {id, title, updated, system, leaf, messages: {id: message}}, and leaf the id of the last message of the branch that is
// shown. A message is {id, parent, role, content, created, updated, ...}, and parent the id of the message before it, or
// null. images: the data: URLs of the pictures in a question, if it has any. reasoning: what the model thought before an
// answer, if it says so; it is shown, and no part of the conversation. Times are in milliseconds. An answer has a `finish`
// or an `error` once it has ended.

const TITLE_LENGTH = 60;
const FILE_NAME_LENGTH = 40;
const ABANDONED = 15_000; // milliseconds after which nobody can be writing an answer any more; see answers.js

// There is no randomUUID over plain HTTP.
const newId = () => crypto.randomUUID?.() ?? `${Date.now()}-${Math.random().toString(36).slice(2)}`;

export function newConversation() {
  return { id: newId(), title: "", updated: Date.now(), system: "", leaf: null, messages: {} };
}

export const titleOf = ({ content, images }) =>
  content.trim().replaceAll(/\s+/g, " ").slice(0, TITLE_LENGTH) || (images?.length ? "Picture" : "");

// -- the tree ----------------------------------------------------------------------------------------------------------

// Add a message after the one with the id `parent`, and show it. Return it.
export function addMessage(conversation, parent, fields) {
  const now = Date.now();
  const message = { id: newId(), parent, created: now, updated: now, ...fields };
  conversation.messages[message.id] = message;
  conversation.leaf = message.id;
  return message;
}

// The messages from the first one to the one with the id `leaf`.
export function branch({ messages, leaf }) {
  const found = new Set();
  for (let message = messages[leaf]; message && !found.has(message); message = messages[message.parent])
    found.add(message);
  return [...found].reverse();
}

const byAge = (a, b) => a.created - b.created || (a.id < b.id ? -1 : 1);

const childrenOf = ({ messages }, parent) =>
  Object.values(messages)
    .filter((message) => message.parent === parent)
    .sort(byAge);

// The messages at the same place of the conversation, itself included, from the oldest to the newest.
export const versions = (conversation, message) => childrenOf(conversation, message.parent);

// Show the branch of a message: up to its newest continuation.
export function showBranch(conversation, message) {
  let last = message;
  for (let next = message; next; next = childrenOf(conversation, last.id).at(-1)) last = next;
  conversation.leaf = last.id;
}

// -- records of other tabs, and of older pages -------------------------------------------------------------------------

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

const isMessage = (value) => isObject(value) && typeof value.content === "string";

// Whether a stored value is a conversation.
export const isConversation = (value) =>
  isObject(value) &&
  typeof value.id === "string" &&
  isObject(value.messages) &&
  Object.entries(value.messages).every(([id, message]) => isMessage(message) && message.id === id);

// Add to a conversation what another record of it has more, or newer. The branch that is shown remains, or grows. Return
// whether the other record lacks anything.
export function merge(conversation, other) {
  for (const theirs of Object.values(other.messages)) {
    const ours = conversation.messages[theirs.id];
    if (!ours) conversation.messages[theirs.id] = theirs;
    else if (theirs.updated > ours.updated) {
      for (const key of Object.keys(ours)) delete ours[key];
      Object.assign(ours, theirs);
    }
  }
  if (other.updated > conversation.updated) {
    const { title, system, updated } = other;
    Object.assign(conversation, { title, system, updated });
  }
  const theirBranch = branch({ messages: conversation.messages, leaf: other.leaf });
  if (conversation.leaf === null || theirBranch.some(({ id }) => id === conversation.leaf)) {
    conversation.leaf = other.leaf;
  }
  const lacks = ({ id, updated }) => !other.messages[id] || other.messages[id].updated < updated;
  return Object.values(conversation.messages).some(lacks);
}

// Convert a conversation of an older page, whose messages are a list. The same list always gives the same ids. Return null
// if it is not a conversation.
export function fromList(old) {
  if (!isObject(old) || !Array.isArray(old.messages) || !old.messages.every(isMessage)) return null;
  const { id = newId(), title = "", system = "", updated = Date.now() } = old;
  const conversation = { id: String(id), title, updated, system, leaf: null, messages: {} };
  old.messages.forEach((message, i) => {
    const { finish, error, role } = message;
    const ended = role !== "assistant" || finish || error;
    const fields = { ...message, id: `${id}-${i}`, created: updated + i, updated };
    addMessage(conversation, conversation.leaf, ended ? fields : { ...fields, finish: "interrupted" });
  });
  return conversation;
}

// -- answers -----------------------------------------------------------------------------------------------------------

const withPictures = (text, images) => {
  if (!images?.length) return text;
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  return text ? [...parts, { type: "text", text }] : parts;
};

// The messages as the API takes them, with the system prompt first. until: the id of the last one.
export function apiMessages(conversation, until = conversation.leaf) {
  const shown = branch({ messages: conversation.messages, leaf: until });
  const messages = shown.map(({ role, content, images }) => ({ role, content: withPictures(content, images) }));
  if (conversation.system?.trim()) messages.unshift({ role: "system", content: conversation.system });
  return messages;
}

// Update a message with a chunk of the stream. Return whether the text or the reasoning has grown.
export function applyChunk(message, chunk) {
  if (chunk.usage) message.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (choice?.finish_reason) message.finish = choice.finish_reason;
  const { content, reasoning_content: reasoning } = choice?.delta ?? {};
  if (content) message.content += content;
  if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
  return Boolean(content || reasoning);
}

// "ended", "interrupted" (by a reload or a crash), or "growing" (in this tab or another one).
export function answerState({ finish, error, updated }, now = Date.now()) {
  if (finish === "interrupted") return "interrupted";
  if (finish || error) return "ended";
  return now - updated > ABANDONED ? "interrupted" : "growing";
}

// Tokens per second after the first one; undefined if that cannot be known. seconds: from the first token to the last.
export function decodingSpeed(usage, seconds) {
  return usage?.completion_tokens > 1 && seconds > 0 ? (usage.completion_tokens - 1) / seconds : undefined;
}

const FINISH = {
  stopped: "stopped",
  length: "stopped at the length limit",
  context: "stopped: the context is full",
  edited: "edited",
};

// One line about an answer: how it ended, its length, its speed, and how many of the oldest turns the model did not see.
export function summarize(message) {
  const parts = [];
  if (answerState(message) === "interrupted") parts.push("interrupted");
  if (FINISH[message.finish]) parts.push(FINISH[message.finish]);
  if (message.usage) parts.push(`${message.usage.completion_tokens} tokens`);
  if (message.speed) parts.push(`${message.speed.toFixed(1)} tokens/s`);
  if (message.dropped)
    parts.push(message.dropped > 1 ? `without the ${message.dropped} oldest turns` : "without the oldest turn");
  return parts.join(" · ");
}

// Return {name, type, text} of a file with the branch that is shown. format: "json", which is what fine-tuning reads, or
// "markdown".
export function exportFile(conversation, format) {
  const title = conversation.title || "conversation";
  const name = title
    .replaceAll(/[^\p{L}\p{N}]+/gu, "-")
    .slice(0, FILE_NAME_LENGTH)
    .toLowerCase();
  const messages = apiMessages(conversation);
  if (format === "json") {
    return { name: `${name}.json`, type: "application/json", text: `${JSON.stringify({ messages }, null, 1)}\n` };
  }
  const speakers = { system: "System", user: "You", assistant: "Assistant" };
  const markdown = (part) => (part.type === "image_url" ? `![picture](${part.image_url.url})` : part.text);
  const written = (content) => (Array.isArray(content) ? content.map(markdown).join("\n\n") : content);
  const text = messages.map(({ role, content }) => `**${speakers[role]}**\n\n${written(content)}\n`).join("\n");
  return { name: `${name}.md`, type: "text/markdown", text: `# ${conversation.title}\n\n${text}` };
}
