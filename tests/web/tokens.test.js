import assert from "node:assert/strict";
import { test } from "node:test";

import {
  MAX_ALTERNATIVES,
  meanSurprise,
  parseTemperatures,
  tokensFromLogprobs,
} from "../../src/gptsmith/server/web/logprobs.js";
import { probabilityLevel } from "../../src/gptsmith/server/web/tokens.js";

test("the color of a token follows its probability", () => {
  const levels = [1, 0.9, 0.89, 0.6, 0.3, 0.1, 0.02, 0.019, 0].map(probabilityLevel);
  assert.deepEqual(levels, ["0", "0", "1", "1", "2", "3", "4", "5", "5"]);
  assert.equal(probabilityLevel(null), "none");
  assert.equal(probabilityLevel(undefined), "none");
});

test("tokens have their text, start, probability and alternatives", () => {
  const logprobs = {
    tokens: [" cat", "s"],
    text_offset: [0, 4],
    token_logprobs: [null, Math.log(0.25)],
    top_logprobs: [null, { s: Math.log(0.25), "▁": Math.log(0.5), "<|endoftext|>": Math.log(0.125) }],
  };
  const [first, second] = tokensFromLogprobs(logprobs, [..."abc cats"], 3);
  assert.deepEqual(first, { text: " cat", start: 3, probability: null, alternatives: [] });
  assert.equal(second.start, 7);
  assert.equal(second.text, "s");
  assert.ok(Math.abs(second.probability - 0.25) < 1e-12);
  assert.deepEqual(
    second.alternatives.map(({ text, special, partial }) => ({ text, special, partial })),
    [
      { text: "▁", special: false, partial: false },
      { text: "s", special: false, partial: false },
      { text: "<|endoftext|>", special: true, partial: false },
    ],
  );
});

test("a token of bytes shows the character that it completes", () => {
  const logprobs = {
    tokens: ["a", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80"],
    text_offset: [0, 1, 1],
    token_logprobs: [-1, -1, -1],
    top_logprobs: [{}, {}, { "bytes:\\x98\\x80": -1 }],
  };
  const tokens = tokensFromLogprobs(logprobs, [..."a😀"], 0); // offsets count code points: the emoji is one
  assert.deepEqual(
    tokens.map(({ text }) => text),
    ["a", "·", "😀"],
  );
  assert.equal(tokens[2].alternatives[0].partial, true);
});

test("only the most likely alternatives are kept", () => {
  const top = Object.fromEntries(Array.from({ length: 12 }, (_, i) => [String.fromCharCode(97 + i), -i]));
  const logprobs = { tokens: ["a"], text_offset: [0], token_logprobs: [0], top_logprobs: [top] };
  const [token] = tokensFromLogprobs(logprobs, ["a"], 0);
  assert.equal(token.alternatives.map(({ text }) => text).join(""), "abcdefgh");
  assert.equal(token.alternatives.length, MAX_ALTERNATIVES);
});

test("surprise is the mean of generated tokens in bits", () => {
  const tokens = [
    { probability: 0.001, fromPrompt: true },
    { probability: 0.5 },
    { probability: 0.125 },
    { probability: null },
  ];
  assert.deepEqual(meanSurprise(tokens), { count: 2, bits: 2 });
  assert.deepEqual(meanSurprise([]), { count: 0, bits: 0 });
  assert.ok(Number.isFinite(meanSurprise([{ probability: 0 }]).bits));
});

test("temperatures are numbers from 0 to 2, at most as many as there are columns", () => {
  assert.deepEqual(parseTemperatures("0, 0.8,1.2", 4), [0, 0.8, 1.2]);
  assert.deepEqual(parseTemperatures("1; 2", 4), [1, 2]);
  for (const text of ["", " , ", "2.1", "-1", "hot", "1 1 1 1 1"]) assert.equal(parseTemperatures(text, 4), null, text);
});
