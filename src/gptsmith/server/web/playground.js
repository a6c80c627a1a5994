// A prompt, and what the model makes of it at several temperatures, each token coloured by its probability.

import { completion, request } from "./api.js";
import { announce, copyText, h, icon, iconButton, toast } from "./dom.js";
import * as models from "./models.js";
import { Sampling } from "./sampling.js";
import { load, save } from "./store.js";
import { legend, TokenText } from "./tokens.js";

const ALTERNATIVES = 8;
const MOST_COLUMNS = 4;

export function mount(root) {
  const sampling = new Sampling("playground", { without: ["temperature"], defaults: { max_tokens: 80, top_p: 1 } });
  let columns = [];

  const prompt = h("textarea.prompt", {
    id: "prompt", rows: 4, spellcheck: false, value: load("prompt", "Once upon a time"),
    oninput: () => save("prompt", prompt.value),
    onkeydown: (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        run();
      }
    },
  });
  const temperatures = h("input", {
    id: "temperatures", type: "text", inputMode: "decimal", value: load("temperatures", "0, 0.8, 1.2"), spellcheck: false, autocomplete: "off",
    "aria-describedby": "temperatures-help", oninput: () => save("temperatures", temperatures.value),
  });
  const echo = h("input", { id: "echo", type: "checkbox", checked: load("echo", false), onchange: () => save("echo", echo.checked) });
  const start = h("button.button.primary", { type: "submit" }, icon("play"), "Continue");
  const halt = h("button.button", { type: "button", hidden: true, onclick: () => columns.forEach((column) => column.stop()) }, icon("stop"), "Stop");
  const output = h("div.columns", {});
  const form = h("form.card.stack", { onsubmit: (event) => { event.preventDefault(); run(); } },
    h("label.title", { htmlFor: "prompt" }, "Prompt"), prompt,
    h("div.row", {},
      h("div.field", {}, h("label", { htmlFor: "temperatures" }, "Temperatures"), temperatures),
      h("label.check", {}, echo, " colour the prompt, too"),
      h("div.grow", {}),
      halt, start),
    h("p.help", { id: "temperatures-help" }, `One to ${MOST_COLUMNS} temperatures, with commas: the same prompt side by side. Ctrl+Enter continues.`),
    h("details", {}, h("summary", {}, "More settings"), sampling.element));
  root.append(
    h("div.view-head", {}, h("h1", {}, "Playground"),
      h("p.lead", {}, "The model goes on with your text. Each token is coloured by how probable the model found it; point at one to see what else it considered, and choose another to go on from there.")),
    form, h("div.row.legend-row", {}, legend()), output);
  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape") columns.forEach((column) => column.stop());
  });
  models.onChoice(async (name) => {
    try {
      const about = await models.describe(name);
      const field = sampling.element.querySelector("#playground-max_tokens");
      if (field) field.max = about.context;
    } catch (error) {
      toast(error.message, "error");
    }
  });

  function chosenTemperatures() {
    const values = temperatures.value.split(/[,;\s]+/).filter(Boolean).map(Number);
    const good = values.length >= 1 && values.length <= MOST_COLUMNS && values.every((value) => value >= 0 && value <= 2);
    temperatures.toggleAttribute("aria-invalid", !good);
    if (!good) {
      temperatures.setAttribute("aria-invalid", "true");
      toast(`One to ${MOST_COLUMNS} temperatures from 0 to 2, please, with commas between them.`, "error");
      temperatures.focus();
      return null;
    }
    return values;
  }

  async function run() {
    const values = chosenTemperatures();
    if (!values) return;
    columns.forEach((column) => column.stop());
    columns = values.map((temperature) => new Column(temperature, prompt.value));
    output.replaceChildren(...columns.map((column) => column.element));
    output.dataset.count = String(columns.length);
    if (echo.checked && prompt.value) await colourPrompt(columns);
    await Promise.all(columns.map((column) => column.generate()));
    announce("All continuations are there.");
  }

  // The prompt's own tokens, with what the model thought of each: asked for once, shown in every column.
  async function colourPrompt(columns) {
    try {
      const answer = await request("v1/completions", {
        body: { model: await models.choice(), prompt: prompt.value, max_tokens: 1, temperature: 0, echo: true, logprobs: ALTERNATIVES },
      });
      const { logprobs } = answer.choices[0];
      for (const column of columns) column.echo(logprobs, prompt.value, answer.usage.prompt_tokens);
    } catch (error) {
      toast(error.message, "error");
    }
  }

  // Its text is `base`, then `made`, which the tokens stand for. Places are counted in code points, as the server does.
  class Column {
    constructor(temperature, prompt) {
      this.temperature = temperature;
      this.base = prompt;
      this.made = [];
      this.past = [];
      this.text = new TokenText({
        label: `Continuation at temperature ${temperature}`, onpick: (index, alternative) => this.pick(index, alternative),
      });
      this.status = h("span.stats", {});
      this.back = iconButton("undo", "Take the choice back", () => this.takeBack(), { hidden: true });
      this.element = h("section.card.column", { "aria-label": `Temperature ${temperature}` },
        h("header.column-head", {}, h("h2", {}, temperature === 0 ? "Temperature 0, greedy" : `Temperature ${temperature}`),
          h("div.actions", {}, this.back,
            iconButton("copy", "Copy", () => copyText(this.whole())),
            iconButton("plus", "Take this text for the prompt", () => usePrompt(this.whole())))),
        this.text.element, h("footer", {}, this.status));
    }

    whole() {
      return this.base + this.made.join("");
    }

    echo(logprobs, prompt, count) {
      this.base = "";
      this.made = [...prompt];
      tokensOf(logprobs, this.made, 0).slice(0, count).forEach((token) => this.text.push({ ...token, given: true }));
    }

    async generate() {
      this.stop();
      const controller = (this.controller = new AbortController());
      this.element.classList.remove("failed");
      this.element.classList.add("working");
      working(1);
      this.status.textContent = "…";
      const start = this.made.length;
      let ended = "";
      try {
        const body = {
          model: await models.choice(), prompt: this.whole(), logprobs: ALTERNATIVES, overflow: "shift", ...sampling.fields(),
          temperature: this.temperature,
        };
        for await (const chunk of completion("v1/completions", body, controller.signal)) {
          const choice = chunk.choices?.[0];
          if (!choice) continue;
          if (controller.signal.aborted) break;
          this.made.push(...choice.text);
          if (choice.logprobs) tokensOf(choice.logprobs, this.made, start).forEach((token) => this.text.push(token));
          if (choice.finish_reason) ended = choice.finish_reason;
        }
      } catch (error) {
        ended = error.name === "AbortError" ? "stopped" : "";
        if (!ended) {
          this.status.textContent = error.message;
          this.element.classList.add("failed");
        }
      }
      working(-1);
      if (this.controller !== controller) return;
      this.controller = null;
      this.element.classList.remove("working");
      if (ended) this.status.textContent = this.summary(ended);
    }

    summary(ended) {
      const made = this.text.tokens.filter((token) => !token.given && token.probability !== null);
      const bits = made.reduce((sum, token) => sum - Math.log2(Math.max(token.probability, 1e-12)), 0) / Math.max(1, made.length);
      const why = { stop: " · the text ended", stopped: " · stopped" }[ended] ?? "";
      return `${made.length} tokens · ${bits.toFixed(2)} bits of surprise a token${why}`;
    }

    stop() {
      this.controller?.abort();
    }

    async pick(index, alternative) {
      this.stop();
      this.past.push({ base: this.base, made: [...this.made], tokens: this.text.tokens.map((token) => ({ ...token })) });
      this.back.hidden = false;
      const token = this.text.tokens[index];
      this.made.length = token.start;
      this.text.cut(index);
      if (alternative.special) { // it stands for no text: here the text ends
        this.status.textContent = this.summary("stop");
        return;
      }
      this.made.push(...alternative.text);
      this.text.push({ ...token, text: alternative.text, probability: alternative.probability, picked: true, given: false });
      await this.generate();
    }

    takeBack() {
      this.stop();
      const { base, made, tokens } = this.past.pop();
      this.back.hidden = this.past.length === 0;
      this.base = base;
      this.made = made;
      this.text.cut(0);
      tokens.forEach((token) => this.text.push(token));
      this.status.textContent = this.summary("");
    }
  }

  let atWork = 0;
  function working(change) {
    atWork += change;
    halt.hidden = atWork === 0;
  }

  function usePrompt(text) {
    prompt.value = text;
    save("prompt", text);
    prompt.focus();
    prompt.scrollIntoView({ block: "center" });
  }

  return { shown: () => {}, focus: () => prompt.focus() };
}

const BYTES = /\\x[89a-f][0-9a-f]/; // of a character that takes several tokens
const SPECIAL = /^(<\|.*\|>|<\/?s>|<eos>)$/;

// Logprobs of the completions API as tokens. made: the text so far; the offsets count from its place `start`.
function tokensOf(logprobs, made, start) {
  const starts = logprobs.text_offset.map((offset) => start + offset);
  return logprobs.tokens.map((name, i) => ({
    text: BYTES.test(name) ? made.slice(starts[i], starts[i + 1]).join("") || "·" : shown(name),
    start: starts[i],
    probability: logprobs.token_logprobs[i] === null ? null : Math.exp(logprobs.token_logprobs[i]),
    alternatives: Object.entries(logprobs.top_logprobs?.[i] ?? {})
      .map(([name, logprob]) => ({
        text: shown(name), probability: Math.exp(logprob), special: SPECIAL.test(name), partial: BYTES.test(name),
      }))
      .sort((a, b) => b.probability - a.probability)
      .slice(0, ALTERNATIVES),
  }));
}

const shown = (name) => name.replaceAll("▁", " "); // how some tokenizers write a space
