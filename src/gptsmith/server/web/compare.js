// The compare view: two answers to one message, side by side, and a person's choice between them.

import { request, streamCompletion } from "./api.js";
import {
  actionOf,
  answerOf,
  describeRewardModel,
  describeStatus,
  drawModels,
  drawSeeds,
  problemOf,
  requestOf,
  toReplace,
} from "./comparison.js";
import { fit, countTokens } from "./context.js";
import { announce, h, icon, setChildren, toast } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import * as models from "./models.js";
import { ReasoningView } from "./reasoning.js";
import { SamplingControls } from "./sampling.js";
import { load, save } from "./store.js";

const SIDES = ["left", "right"];
const NAMES = ["Answer 1", "Answer 2"];
const MAX_TRIES = 3; // of an answer that equals the other one, or is empty
const MAX_EDIT_ROWS = 14;
const POLL = 2000; // milliseconds, while the reward model has choices to predict
const ENDS = { length: "cut off at the maximum length", stopped: "stopped" };

export function mount(root) {
  let turns = []; // the conversation so far: messages
  let round = null; // {models, chat, question, prompt, options, answers: [{text, reasoning, seed, finish, error}]}
  let state = "asking"; // then "answering", "choosing", "saving"
  let shown = false; // whether the view is
  let poll = null;
  const sampling = new SamplingControls("compare", {
    without: ["seed"],
    defaults: { temperature: 1, max_tokens: 256 },
  });

  const counter = h("p.counter", { role: "status" });
  const judge = h("p.help", { id: "judge" });
  const log = h("div.compared", { role: "log", "aria-label": "Conversation", "aria-live": "off" });
  const pair = h("div.pair", { role: "group", "aria-label": "Two answers", tabIndex: -1 });
  const note = h("p.help", { hidden: true });
  const bigButton = (label, key, choice) =>
    h(
      "button.button",
      { type: "button", onclick: () => choose(choice), dataset: { choice }, "aria-keyshortcuts": key },
      label,
      h("kbd", { "aria-hidden": "true" }, key),
    );
  const stopButton = h("button.button", { type: "button", onclick: stop }, icon("stop"), "Stop");
  const againButton = h("button.button", { type: "button", onclick: again }, icon("regenerate"), "Try again");
  const choices = h("div.row.choices", {}, bigButton("Tie", "T", "tie"), bigButton("Both bad", "B", "both_bad"));
  const verdict = h("div.stack", { hidden: true }, pair, note, h("div.row", {}, choices, stopButton, againButton));
  const input = h("textarea", {
    id: "compare-prompt",
    rows: 3,
    enterkeyhint: "send",
    onkeydown: (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      ask();
    },
  });
  const inputLabel = h("label.title", { htmlFor: "compare-prompt" }, "Your prompt");
  const system = h("textarea", {
    id: "compare-system",
    rows: 2,
    value: load("compare.system", ""),
    oninput: () => save("compare.system", system.value),
  });
  const second = h("select", { id: "compare-second", onchange: () => save("compare.second", second.value) });
  const newButton = h(
    "button.button",
    { type: "button", hidden: true, onclick: startOver },
    icon("plus"),
    "New conversation",
  );
  const onSubmit = (event) => {
    event.preventDefault();
    ask();
  };
  const form = h(
    "form.card.stack",
    { onsubmit: onSubmit },
    inputLabel,
    input,
    h(
      "div.row",
      {},
      newButton,
      h("div.grow", {}),
      h("button.button.primary", { type: "submit" }, icon("send"), "Two answers"),
    ),
    h(
      "details",
      {},
      h("summary", {}, "Settings"),
      h(
        "div.controls",
        {},
        h("div.control", {}, h("label", { htmlFor: "compare-system" }, "System prompt"), system),
        h("div.control", { hidden: true }, h("label", { htmlFor: "compare-second" }, "Second model"), second),
        sampling.element,
      ),
    ),
  );
  const keys = h(
    "p.help.only-keyboard",
    {},
    ...[
      [["←", "1"], " or "],
      [["→", "2"], " choose an answer, "],
      [["T"], " a tie, "],
      [["B"], " both are bad, "],
      [["E"], " edit the answer that has the focus, or the first one."],
    ].flatMap(([names, after]) => [...names.flatMap((name) => [h("kbd", {}, name), " "]), after]),
  );
  const lead =
    "Write a prompt, and say which of two answers is better. The answers come from the same model with different " +
    "random seeds, or from two models in random order. Your choices are stored in a file on the server, and nowhere else.";
  root.append(
    h("div.view-head", {}, h("h1", {}, "Compare"), h("p.lead", {}, lead), counter, judge),
    log,
    verdict,
    form,
    keys,
  );

  models.onSelect((name) => {
    const others = models.names().filter((other) => other !== name);
    const previous = second.value || load("compare.second", "");
    const options = others.map((other) => h("option", { value: other }, other));
    second.replaceChildren(h("option", { value: "" }, "the same model"), ...options);
    second.value = others.includes(previous) ? previous : "";
    second.closest(".control").hidden = !others.length;
  });

  models.onSelect(async (name) => {
    try {
      const { chat } = await models.describe(name);
      if (name !== models.selected()) return;
      inputLabel.textContent = chat ? "Your prompt" : "Text to continue";
      system.closest(".control").hidden = !chat;
    } catch (error) {
      toast(error.message, "error");
    }
  });

  // -- the counter -----------------------------------------------------------------------------------------------------

  function showStatus(status) {
    counter.textContent = describeStatus(status);
    judge.textContent = describeRewardModel(status.reward_model);
    clearTimeout(poll);
    if (status.reward_model?.pending && shown) poll = setTimeout(refresh, POLL);
  }

  async function refresh() {
    try {
      showStatus(await request("api/comparisons"));
    } catch (error) {
      counter.textContent = error.message;
    }
  }

  document.addEventListener("visibilitychange", () => {
    if (shown && !document.hidden) refresh();
  });
  document.addEventListener("key-changed", (event) => {
    if (shown && event.detail) refresh();
  });

  // -- a round ---------------------------------------------------------------------------------------------------------

  async function ask() {
    const text = input.value;
    if (state !== "asking" || !text.trim()) return;
    setState("answering");
    const answers = drawSeeds().map((seed) => ({ seed, text: "", finish: "stop" }));
    round = { question: text, answers, controller: new AbortController() };
    const { signal } = round.controller;
    try {
      await prepare(text);
      signal.throwIfAborted();
    } catch (error) {
      if (!signal.aborted) toast(error.message, "error");
      round = null;
      setState("asking");
      input.focus();
      return;
    }
    input.value = "";
    draw();
    pair.focus({ preventScroll: true });
    pair.scrollIntoView({ block: "nearest" });
    await answer();
  }

  // Fill in what the model is asked: a conversation, or a text for a base model.
  async function prepare(text) {
    const model = await models.waitForSelection();
    const { chat } = await models.describe(model);
    const both = drawModels(model, second.value || model);
    for (const other of new Set(both)) {
      if ((await models.describe(other)).chat !== chat) {
        throw new Error("A chat model and a base model are asked in different ways: choose two of one kind.");
      }
    }
    const fields = sampling.requestFields();
    if (turns.length && chat !== turns[0].chat) turns = [];
    let prompt = text;
    if (chat) {
      const instructions = system.value.trim() ? [{ role: "system", content: system.value.trim() }] : [];
      const said = turns.map(({ role, content }) => ({ role, content }));
      const messages = [...instructions, ...said, { role: "user", content: text.trim() }];
      const count = async (some) => {
        const counts = await Promise.all([...new Set(both)].map((each) => countTokens(each, some)));
        return {
          count: Math.max(...counts.map((each) => each.count)),
          max_model_len: Math.min(...counts.map((each) => each.max_model_len)),
        };
      };
      const fitting = await fit(messages, fields.max_tokens, count);
      prompt = fitting.messages;
      fields.max_tokens = Math.min(fields.max_tokens, fitting.room);
    } else {
      for (const each of new Set(both)) {
        const { count, max_model_len: context } = await request("tokenize", { body: { model: each, prompt: text } });
        if (count >= context) throw new Error(`The text is too long: ${count} tokens for a context of ${context}.`);
        fields.max_tokens = Math.min(fields.max_tokens, context - count);
      }
    }
    Object.assign(round, { models: both, chat, prompt, options: fields });
  }

  async function answer() {
    const { answers } = round;
    const asked = round;
    const { signal } = round.controller;
    await Promise.all(answers.map((_, index) => generate(index, signal)));
    const texts = () => answers.map(({ text }) => text);
    const fine = () => answers.every(({ error, finish }) => !error && finish !== "stopped");
    for (let tries = 0; tries < MAX_TRIES && fine() && problemOf(texts()) && sampling.values.temperature > 0; tries++) {
      const index = toReplace(texts());
      answers[index] = { seed: drawSeeds()[0], text: "", finish: "stop" };
      drawAnswer(index);
      await generate(index, signal);
    }
    if (round !== asked) return;
    setState("choosing");
    announce(problemOf(texts()) || "Both answers are complete.");
  }

  async function generate(index, signal) {
    const { chat, prompt, options, answers } = round;
    const model = round.models[index];
    const target = answers[index];
    const view = views[index];
    const path = chat ? "v1/chat/completions" : "v1/completions";
    const body = { model, [chat ? "messages" : "prompt"]: prompt, ...options, seed: target.seed };
    try {
      for await (const chunk of streamCompletion(path, body, signal)) {
        const choice = chunk.choices?.[0];
        if (!choice) continue;
        target.text += (chat ? choice.delta.content : choice.text) ?? "";
        target.reasoning = (target.reasoning ?? "") + (choice.delta?.reasoning_content ?? "");
        target.finish = choice.finish_reason ?? target.finish;
        view.reasoning.show(target.reasoning, !target.text);
        if (target.text) view.show(target.text);
      }
    } catch (error) {
      if (error.name === "AbortError") target.finish = "stopped";
      else target.error = error.message;
    }
    await view.finish(target);
  }

  function stop() {
    if (state === "answering") round?.controller?.abort();
  }

  // Answer the same question again, with other seeds.
  async function again() {
    if (state !== "choosing") return;
    round.answers = drawSeeds().map((seed) => ({ seed, text: "", finish: "stop" }));
    round.controller = new AbortController();
    setState("answering");
    draw();
    pair.focus({ preventScroll: true });
    await answer();
  }

  async function choose(choice, edited) {
    if (state !== "choosing" || !allowed(choice, edited)) return;
    setState("saving");
    try {
      showStatus(await request("api/comparisons", { body: requestOf(round, choice, edited) }));
    } catch (error) {
      toast(error.message, "error");
      setState("choosing");
      return;
    }
    announce(`Saved. ${counter.textContent}`);
    const { chat, question } = round;
    const said = answerOf(round, choice, edited);
    if (said === undefined) input.value = question;
    else if (chat) {
      turns.push({ role: "user", content: question.trim(), chat }, { role: "assistant", content: said, chat });
    } else input.value = question + said;
    round = null;
    setState("asking");
    draw();
    input.focus();
  }

  // Whether a choice can be stored: training needs two answers that differ.
  function allowed(choice, edited) {
    if (round.answers.some(({ error }) => error)) return false;
    if (!SIDES.includes(choice)) return true;
    const texts = round.answers.map(({ text }) => text);
    if (edited !== undefined) texts[SIDES.indexOf(choice)] = edited;
    return problemOf(texts) === "";
  }

  function startOver() {
    turns = [];
    draw();
    input.value = "";
    input.focus();
  }

  // -- drawing ---------------------------------------------------------------------------------------------------------

  let views = [];

  function setState(next) {
    state = next;
    form.hidden = state !== "asking";
    verdict.hidden = state === "asking";
    stopButton.hidden = state !== "answering";
    const problem = state === "choosing" ? problemOf(round.answers.map(({ text }) => text)) : "";
    const failed = state === "choosing" && round.answers.some(({ error }) => error);
    note.hidden = !problem || failed;
    note.textContent = problem;
    againButton.hidden = state !== "choosing" || !(problem || failed);
    choices.hidden = state === "answering";
    for (const button of verdict.querySelectorAll("[data-choice]")) {
      button.disabled = state !== "choosing" || !allowed(button.dataset.choice);
    }
    for (const button of verdict.querySelectorAll("[data-edit]")) button.disabled = state !== "choosing" || failed;
  }

  function draw() {
    const question = round?.chat === true && { role: "user", content: round.question.trim() };
    const text = round?.chat === false && { role: "user", content: round.question };
    setChildren(log, [...turns, question, text].filter(Boolean).map(drawTurn));
    log.hidden = !log.children.length;
    newButton.hidden = !turns.length;
    views = [];
    pair.replaceChildren(h("div"), h("div")); // also without a round: old answers must not show while new ones are prepared
    if (!round) return;
    round.answers.forEach((_, index) => drawAnswer(index));
    setState(state);
  }

  function drawTurn({ role, content }) {
    const speaker = role === "user" ? "You" : "Assistant";
    const body = h("div.body");
    const element = h(`article.turn.${role}`, { "aria-label": speaker }, h("header", {}, speaker), body);
    if (role === "user") body.textContent = content;
    else new MarkdownView(body).finish(content);
    return element;
  }

  function drawAnswer(index) {
    const side = SIDES[index];
    const { chat } = round;
    const body = h("div.body", {}, h("span.dots", { role: "img", "aria-label": "Waiting" }, h("i"), h("i"), h("i")));
    const markdown = new MarkdownView(body);
    const reasoning = new ReasoningView(round.answers[index]);
    const end = h("span.stats", {});
    const better = h(
      "button.button.primary",
      {
        type: "button",
        disabled: true,
        onclick: () => choose(side),
        dataset: { choice: side },
        "aria-keyshortcuts": `${index + 1}`,
      },
      "This one is better",
      h("kbd", { "aria-hidden": "true" }, index ? "→" : "←"),
    );
    const edit = h(
      "button.button",
      {
        type: "button",
        disabled: true,
        onclick: () => editAnswer(index),
        dataset: { edit: side },
        "aria-keyshortcuts": "E",
      },
      "Edit",
      h("span.visually-hidden", {}, ` ${NAMES[index].toLowerCase()}`),
    );
    const buttons = h("div.buttons", {}, better, edit, end);
    const name = { "aria-label": NAMES[index] };
    const element = h("section.card.answer", name, h("h2", {}, NAMES[index]), reasoning.element, body, buttons);
    const showPlain = (text) => {
      body.classList.add("plain");
      body.textContent = text;
    };
    views[index] = {
      element,
      body,
      buttons,
      reasoning,
      show: (text) => (chat ? markdown.show(text) : showPlain(text)),
      finish: async ({ text, finish, error }) => {
        if (error) setChildren(body, h("p.failed", { role: "alert" }, error));
        else if (!text.trim()) setChildren(body, h("p.empty", {}, "(an empty answer)"));
        else if (chat) await markdown.finish(text);
        else showPlain(text);
        end.textContent = ENDS[finish] ?? "";
      },
    };
    pair.children[index].replaceWith(element);
  }

  // Let the person change an answer; the changed text is then chosen.
  function editAnswer(index) {
    if (state !== "choosing" || pair.querySelector(".edit") || round.answers.some(({ error }) => error)) return;
    const { body, buttons } = views[index];
    const target = round.answers[index];
    const area = h("textarea.edit", {
      value: target.text,
      rows: Math.min(MAX_EDIT_ROWS, target.text.split("\n").length + 4),
      "aria-label": `Edit ${NAMES[index].toLowerCase()}`,
    });
    const apply = () => {
      if (!allowed(SIDES[index], area.value)) {
        toast("The edited answer must not be empty, and must differ from the other one.", "error");
        area.focus();
        return;
      }
      choose(SIDES[index], area.value);
    };
    const cancel = () => {
      editor.remove();
      body.hidden = buttons.hidden = false;
      pair.focus({ preventScroll: true });
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) apply();
    });
    const editor = h(
      "div.stack",
      {},
      area,
      h(
        "div.row",
        {},
        h("button.button.primary", { type: "button", onclick: apply, title: "Ctrl+Enter" }, "Choose this text"),
        h("button.button", { type: "button", onclick: cancel }, "Cancel"),
      ),
    );
    body.hidden = buttons.hidden = true;
    body.after(editor);
    area.focus();
  }

  function onKeyDown(event) {
    if (!shown || document.querySelector("dialog[open]") || event.target.matches("input, textarea, select")) return;
    if (event.key === "Escape") stop();
    const action = state === "choosing" ? actionOf(event) : undefined;
    if (!action) return;
    event.preventDefault();
    if (action === "edit") editAnswer(views[1].element.contains(document.activeElement) ? 1 : 0);
    else choose(action);
  }

  document.addEventListener("keydown", onKeyDown);
  draw();
  setState("asking");
  return {
    onShow: () => {
      shown = true;
      refresh();
      if (matchMedia("(pointer: fine)").matches) input.focus({ preventScroll: true });
    },
    onHide: () => {
      shown = false;
      clearTimeout(poll);
    },
    focus: () => input.focus(),
  };
}
