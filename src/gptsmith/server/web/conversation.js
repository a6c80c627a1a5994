// Conversations as data: {id, title, updated, system, messages: [{role, content, ...}]}. No DOM.

const TITLE_LENGTH = 60;
const FILE_NAME_LENGTH = 40;

export function newConversation() {
  const id = crypto.randomUUID?.() ?? String(Math.random()); // there is no randomUUID over plain HTTP
  return { id, title: "", updated: Date.now(), system: "", messages: [] };
}

export const titleOf = (text) => text.trim().replaceAll(/\s+/g, " ").slice(0, TITLE_LENGTH);

// The messages as the API takes them, with the system prompt first.
export function apiMessages(conversation) {
  const messages = conversation.messages.map(({ role, content }) => ({ role, content }));
  if (conversation.system?.trim()) messages.unshift({ role: "system", content: conversation.system });
  return messages;
}

// Update a message with a chunk of the stream. Return whether the text has grown.
export function applyChunk(message, chunk) {
  if (chunk.usage) message.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (choice?.finish_reason) message.finish = choice.finish_reason;
  if (!choice?.delta?.content) return false;
  message.content += choice.delta.content;
  return true;
}

// Tokens per second after the first one; undefined if that cannot be known. seconds: from the first token to the last.
export function decodingSpeed(usage, seconds) {
  return usage?.completion_tokens > 1 && seconds > 0 ? (usage.completion_tokens - 1) / seconds : undefined;
}

const FINISH = { stopped: "stopped", length: "stopped at the length limit", edited: "edited" };

// One line about an answer: how it ended, its length, its speed.
export function summarize(message) {
  const parts = [];
  if (FINISH[message.finish]) parts.push(FINISH[message.finish]);
  if (message.usage) parts.push(`${message.usage.completion_tokens} tokens`);
  if (message.speed) parts.push(`${message.speed.toFixed(1)} tokens/s`);
  return parts.join(" · ");
}

// Return {name, type, text} of a file. format: "json", which is what fine-tuning reads, or "markdown".
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
  const text = messages.map(({ role, content }) => `**${speakers[role]}**\n\n${content}\n`).join("\n");
  return { name: `${name}.md`, type: "text/markdown", text: `# ${conversation.title}\n\n${text}` };
}
