// What a comparison of two answers is, without the page. No DOM.

const MAX_SEED = 2 ** 31 - 1;

// Two different seeds, in random order.
export function drawSeeds(random = Math.random) {
  const first = Math.floor(random() * MAX_SEED);
  const second = (first + 1 + Math.floor(random() * (MAX_SEED - 1))) % MAX_SEED;
  return random() < 0.5 ? [first, second] : [second, first];
}

// Which model writes the left answer and which the right one.
export function drawModels(first, second, random = Math.random) {
  return random() < 0.5 ? [first, second] : [second, first];
}

const ACTIONS = {
  ArrowLeft: "left",
  1: "left",
  ArrowRight: "right",
  2: "right",
  t: "tie",
  b: "both_bad",
  e: "edit",
};

// What a key does while two answers are shown; undefined if nothing. A key that is held down acts once.
export function actionOf({ key, ctrlKey, metaKey, altKey, repeat }) {
  if (ctrlKey || metaKey || altKey || repeat) return undefined;
  const name = key.length === 1 ? key.toLowerCase() : key;
  return Object.hasOwn(ACTIONS, name) ? ACTIONS[name] : undefined;
}

// Why these two texts cannot be told apart for training; "" if they can.
export function problemOf([left, right]) {
  if (!left.trim() || !right.trim()) return "An answer is empty, so that neither can be chosen over the other.";
  if (left.trim() === right.trim()) return "The two answers are the same. A higher temperature makes them differ.";
  return "";
}

// The index of the answer to write again because of problemOf; either one if they are the same.
export function toReplace([left, right], random = Math.random) {
  if (!left.trim()) return 0;
  if (!right.trim()) return 1;
  return random() < 0.5 ? 0 : 1;
}

// The body of the request that stores a choice. round: {models: [left, right], prompt, options, answers: [{text, seed,
// finish}]}.
// edited: what the person made of the chosen answer.
export function requestOf(round, choice, edited) {
  const { models, prompt, options, answers } = round;
  const body = {
    model: models[0],
    ...(models[0] === models[1] ? {} : { models }),
    prompt,
    completions: answers.map(({ text }) => text),
    choice,
    options,
    seeds: answers.map(({ seed }) => seed),
    finish_reasons: answers.map(({ finish }) => finish),
  };
  return edited === undefined ? body : { ...body, edited };
}

// What the conversation goes on with after a choice; undefined after two bad answers: the question is open again.
export function answerOf(round, choice, edited) {
  if (choice === "both_bad") return undefined;
  return edited ?? round.answers[choice === "right" ? 1 : 0].text;
}

const counted = (n, one, more = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : more}`;

// What has been collected, in words. status: as from the server.
export function describeStatus(status) {
  const parts = [counted(status.comparisons, "comparison")];
  if (status.tie) parts.push(counted(status.tie, "tie"));
  if (status.both_bad) parts.push(`${status.both_bad.toLocaleString("en")} both bad`);
  if (status.edited) parts.push(`${status.edited.toLocaleString("en")} edited`);
  if (status.unreadable) parts.push(counted(status.unreadable, "unreadable line"));
  return parts.join(" · ");
}

// How well the reward model predicts the choices, in words; "" if there is none.
export function describeRewardModel(judge) {
  if (!judge) return "";
  const skipped = judge.skipped ? ` ${judge.skipped.toLocaleString("en")} it cannot read.` : "";
  if (!judge.scored) return `The reward model ${judge.name} has nothing to predict yet.${skipped}`;
  const share = `${((100 * judge.correct) / judge.scored).toFixed(0)}%`;
  const rest = judge.pending ? `; ${judge.pending.toLocaleString("en")} to go` : "";
  return (
    `The reward model ${judge.name} agrees with ${judge.correct.toLocaleString("en")} of ` +
    `${counted(judge.scored, "choice")} (${share})${rest}.${skipped}`
  );
}
