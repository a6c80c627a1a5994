// What fits into the model's context. No DOM.

import { request } from "./api.js";

const MAX_PICTURES = 16; // of a request; the server refuses more

// Resolve to {count, max_model_len}: the tokens of a conversation with the beginning of an answer, and the context length.
export const countTokens = (model, messages, signal) => {
  const body = { model, messages: messages.map(withoutPixels), add_generation_prompt: true };
  return request("tokenize", { body, signal });
};

// A message whose pictures are left empty: all have the same number of tokens.
export function withoutPixels({ role, content }) {
  if (!Array.isArray(content)) return { role, content };
  const emptied = (part) => (part.type === "image_url" ? { ...part, image_url: { url: "data:," } } : part);
  return { role, content: content.map(emptied) };
}

const numPictures = (messages) =>
  messages.flatMap(({ content }) => (Array.isArray(content) ? content : [])).filter(({ type }) => type === "image_url")
    .length;

// The tokens that an answer should have at least: `gptsmith chat` leaves out the oldest turns by the same rule.
export const reserve = (maxTokens, context) => Math.min(maxTokens, Math.floor(context / 4));

// Leave out the oldest turns, a question and its answer each, until the rest and an answer fit. The system prompt and the
// last message always stay. A request takes MAX_PICTURES. count(messages): as countTokens. Resolve to {messages, dropped, room}: the number of turns that
// were left out, and the tokens that are left for the answer.
export async function fit(messages, maxTokens, count) {
  const start = messages[0]?.role === "system" ? 1 : 0;
  const without = (turns) => [...messages.slice(0, start), ...messages.slice(start + 2 * turns)];
  const most = Math.floor((messages.length - start - 1) / 2);
  let least = 0; // turns that have to go because of their pictures
  while (least < most && numPictures(without(least)) > MAX_PICTURES) least++;
  let { count: tokens, max_model_len: context } = await count(without(least));
  const limit = context - reserve(maxTokens, context);
  if (tokens <= limit) return { messages: without(least), dropped: least, room: context - tokens };
  let [low, high, fitting] = [least + 1, most + 1, null]; // the least number of turns is in [low, high]
  while (low < high) {
    const middle = (low + high) >> 1;
    ({ count: tokens } = await count(without(middle)));
    if (tokens <= limit) [high, fitting] = [middle, tokens];
    else low = middle + 1;
  }
  if (fitting === null) {
    const [long, all] = [tokens, context].map((n) => n.toLocaleString("en"));
    throw new Error(`The message is too long: ${long} tokens for a context of ${all}.`);
  }
  return { messages: without(low), dropped: low, room: context - fitting };
}
