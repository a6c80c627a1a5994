// Log-probabilities of the completions API as tokens of a text. No DOM.

export const MAX_ALTERNATIVES = 8;

const PARTIAL = /\\x[89a-f][0-9a-f]/; // bytes of a character that takes several tokens, as the API escapes them
const SPECIAL = /^(<\|.*\|>|<\/?s>|<eos>)$/;

// Return [{text, start, probability or null, alternatives: [{text, probability, special, partial}]}].
// logprobs: of a choice of the API. codePoints: all code points that were generated so far, in which the API counts.
// start: the index in codePoints at which the request began.
export function tokensFromLogprobs(logprobs, codePoints, start) {
  const starts = logprobs.text_offset.map((offset) => start + offset);
  return logprobs.tokens.map((name, i) => ({
    text: PARTIAL.test(name) ? codePoints.slice(starts[i], starts[i + 1]).join("") || "·" : name,
    start: starts[i],
    probability: toProbability(logprobs.token_logprobs[i]),
    alternatives: alternatives(logprobs.top_logprobs?.[i] ?? {}),
  }));
}

const toProbability = (logprob) => (logprob === null ? null : Math.exp(logprob));

function alternatives(topLogprobs) {
  return Object.entries(topLogprobs)
    .map(([name, logprob]) => ({
      text: name,
      probability: toProbability(logprob),
      special: SPECIAL.test(name),
      partial: PARTIAL.test(name),
    }))
    .sort((a, b) => b.probability - a.probability)
    .slice(0, MAX_ALTERNATIVES);
}

// Return {count, bits}: the number of generated tokens, and their mean surprise in bits per token.
export function meanSurprise(tokens) {
  const generated = tokens.filter((token) => !token.fromPrompt && token.probability !== null);
  const bits = generated.map((token) => -Math.log2(Math.max(token.probability, 1e-12)));
  return { count: generated.length, bits: bits.reduce((sum, each) => sum + each, 0) / Math.max(1, generated.length) };
}

// Return the numbers in a text like "0, 0.8, 1.2"; null unless there are 1 to `max` of them, all from 0 to 2.
export function parseTemperatures(text, max) {
  const values = text
    .split(/[,;\s]+/)
    .filter(Boolean)
    .map(Number);
  const valid = values.length >= 1 && values.length <= max && values.every((value) => value >= 0 && value <= 2);
  return valid ? values : null;
}
