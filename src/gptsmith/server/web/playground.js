// The playground: a prompt and its continuations at several temperatures, with tokens colored by their probability.

import { request, streamCompletion } from "./api.js";
import { announce, copyText, h, icon, iconButton, toast } from "./dom.js";
import { MAX_ALTERNATIVES, meanSurprise, parseTemperatures, tokensFromLogprobs } from "./logprobs.js";
import * as models from "./models.js";
import { SamplingControls } from "./sampling.js";
import { load, save } from "./store.js";
import { legend, TokenText } from "./tokens.js";

const MAX_COLUMNS = 4;
const FINISH = { stop: " · end of text", stopped: " · stopped" };

export function mount(root) {
  const sampling = new SamplingControls("playground", {
    without: ["temperature"],
    defaults: { max_tokens: 80, top_p: 1 },
  });
  let columns = [];
  let activeColumns = 0; // columns whose continuation is being generated

  const promptInput = h("textarea.prompt", {
    id: "prompt",
    rows: 4,
    spellcheck: false,
    value: load("prompt", "Once upon a time"),
    oninput: () => save("prompt", promptInput.value),
    onkeydown: (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        run();
      }
    },
  });
  const temperatures = h("input", {
    id: "temperatures",
    type: "text",
    inputMode: "decimal",
    value: load("temperatures", "0, 0.8, 1.2"),
    spellcheck: false,
    autocomplete: "off",
    "aria-describedby": "temperatures-help",
    oninput: () => save("temperatures", temperatures.value),
  });
  const echo = h("input", {
    id: "echo",
    type: "checkbox",
    checked: load("echo", false),
    onchange: () => save("echo", echo.checked),
  });
  const continueButton = h("button.button.primary", { type: "submit" }, icon("play"), "Continue");
  const stopButton = h("button.button", { type: "button", hidden: true, onclick: stopAll }, icon("stop"), "Stop");
  const output = h("div.columns", {});
  const onSubmit = (event) => {
    event.preventDefault();
    run();
  };
  const form = h(
    "form.card.stack",
    { onsubmit: onSubmit },
    h("label.title", { htmlFor: "prompt" }, "Prompt"),
    promptInput,
    h(
      "div.row",
      {},
      h("div.field", {}, h("label", { htmlFor: "temperatures" }, "Temperatures"), temperatures),
      h("label.check", {}, echo, " color the prompt too"),
      h("div.grow", {}),
      stopButton,
      continueButton,
    ),
    h(
      "p.help",
      { id: "temperatures-help" },
      `Up to ${MAX_COLUMNS} temperatures, separated by commas, are shown side by side. Press Ctrl+Enter to continue.`,
    ),
    h("details", {}, h("summary", {}, "More settings"), sampling.element),
  );
  const lead =
    "The model continues your text. Each token is colored by how likely the model thought it was. " +
    "Point at a token to see the alternatives, and choose one to continue from there.";
  root.append(
    h("div.view-head", {}, h("h1", {}, "Playground"), h("p.lead", {}, lead)),
    form,
    h("div.row.legend-row", {}, legend()),
    output,
  );
  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stopAll();
  });
  models.onSelect(async (name) => {
    try {
      const model = await models.describe(name);
      const field = sampling.element.querySelector("#playground-max_tokens");
      if (field) field.max = model.context;
    } catch (error) {
      toast(error.message, "error");
    }
  });

  function stopAll() {
    columns.forEach((column) => column.stop());
  }

  function readTemperatures() {
    const values = parseTemperatures(temperatures.value, MAX_COLUMNS);
    if (values) {
      temperatures.removeAttribute("aria-invalid");
      return values;
    }
    temperatures.setAttribute("aria-invalid", "true");
    toast(`Enter one to ${MAX_COLUMNS} temperatures between 0 and 2, separated by commas.`, "error");
    temperatures.focus();
    return null;
  }

  async function run() {
    const values = readTemperatures();
    if (!values) return;
    stopAll();
    columns = values.map((temperature) => new Column(temperature, promptInput.value));
    output.replaceChildren(...columns.map((column) => column.element));
    output.dataset.count = String(columns.length);
    if (echo.checked && promptInput.value) await showPromptTokens(promptInput.value, columns);
    await Promise.all(columns.map((column) => column.generate()));
    announce("All continuations are complete.");
  }

  // Show the probabilities of the prompt's own tokens. One request serves all columns.
  async function showPromptTokens(prompt, targets) {
    try {
      const answer = await request("v1/completions", {
        body: {
          model: await models.waitForSelection(),
          prompt,
          max_tokens: 1,
          temperature: 0,
          echo: true,
          logprobs: MAX_ALTERNATIVES,
        },
      });
      const { logprobs } = answer.choices[0];
      for (const column of targets) column.showPrompt(logprobs, prompt, answer.usage.prompt_tokens);
    } catch (error) {
      toast(error.message, "error");
    }
  }

  // One continuation. Its text is `prefix` followed by `codePoints`; the tokens cover codePoints. The API counts offsets
  // in code points, not in the UTF-16 units of JavaScript's strings.
  class Column {
    constructor(temperature, prompt) {
      this.temperature = temperature;
      this.prefix = prompt;
      this.codePoints = [];
      this.history = []; // states before each choice
      this.controller = null; // while generating
      this.text = new TokenText({
        label: `Continuation at temperature ${temperature}`,
        onChoose: (index, alternative) => this.choose(index, alternative),
      });
      this.status = h("span.stats", {});
      this.undoButton = iconButton("undo", "Undo choice", () => this.undo(), { hidden: true });
      this.element = h(
        "section.card.column",
        { "aria-label": `Temperature ${temperature}` },
        h(
          "header.column-head",
          {},
          h("h2", {}, temperature === 0 ? "Temperature 0 (greedy)" : `Temperature ${temperature}`),
          h(
            "div.actions",
            {},
            this.undoButton,
            iconButton("copy", "Copy", () => copyText(this.fullText())),
            iconButton("plus", "Use as prompt", () => setPrompt(this.fullText())),
          ),
        ),
        this.text.element,
        h("footer", {}, this.status),
      );
    }

    fullText() {
      return this.prefix + this.codePoints.join("");
    }

    showPrompt(logprobs, prompt, count) {
      this.prefix = "";
      this.codePoints = [...prompt];
      for (const token of tokensFromLogprobs(logprobs, this.codePoints, 0).slice(0, count)) {
        this.text.push({ ...token, fromPrompt: true });
      }
    }

    async generate() {
      this.stop();
      const controller = (this.controller = new AbortController());
      this.element.classList.remove("failed");
      this.element.classList.add("working");
      countActive(1);
      this.status.textContent = "…";
      const start = this.codePoints.length;
      let finish = "";
      try {
        const body = {
          model: await models.waitForSelection(),
          prompt: this.fullText(),
          logprobs: MAX_ALTERNATIVES,
          overflow: "shift",
          ...sampling.requestFields(),
          temperature: this.temperature,
        };
        for await (const chunk of streamCompletion("v1/completions", body, controller.signal)) {
          const choice = chunk.choices?.[0];
          if (!choice) continue;
          if (controller.signal.aborted) break;
          this.codePoints.push(...choice.text);
          const tokens = choice.logprobs ? tokensFromLogprobs(choice.logprobs, this.codePoints, start) : [];
          tokens.forEach((token) => this.text.push(token));
          if (choice.finish_reason) finish = choice.finish_reason;
        }
      } catch (error) {
        finish = error.name === "AbortError" ? "stopped" : "";
        if (!finish) {
          this.status.textContent = error.message;
          this.element.classList.add("failed");
        }
      }
      countActive(-1);
      if (this.controller !== controller) return; // generate() was called again
      this.controller = null;
      this.element.classList.remove("working");
      if (finish) this.status.textContent = this.summary(finish);
    }

    summary(finish) {
      const { count, bits } = meanSurprise(this.text.tokens);
      return `${count} tokens · ${bits.toFixed(2)} bits of surprise per token${FINISH[finish] ?? ""}`;
    }

    stop() {
      this.controller?.abort();
    }

    // Replace the token at `index` and all that follows it by `alternative` and what the model writes after it.
    async choose(index, alternative) {
      this.stop();
      this.history.push({
        prefix: this.prefix,
        codePoints: [...this.codePoints],
        tokens: this.text.tokens.map((token) => ({ ...token })),
      });
      this.undoButton.hidden = false;
      const token = this.text.tokens[index];
      this.codePoints.length = token.start;
      this.text.truncate(index);
      if (alternative.special) {
        // it has no text: the text ends here
        this.status.textContent = this.summary("stop");
        return;
      }
      this.codePoints.push(...alternative.text);
      const { text, probability } = alternative;
      this.text.push({ ...token, text, probability, picked: true, fromPrompt: false });
      await this.generate();
    }

    undo() {
      this.stop();
      const { prefix, codePoints, tokens } = this.history.pop();
      this.undoButton.hidden = this.history.length === 0;
      this.prefix = prefix;
      this.codePoints = codePoints;
      this.text.truncate(0);
      tokens.forEach((token) => this.text.push(token));
      this.status.textContent = this.summary("");
    }
  }

  function countActive(change) {
    activeColumns += change;
    stopButton.hidden = activeColumns === 0;
  }

  function setPrompt(text) {
    promptInput.value = text;
    save("prompt", text);
    promptInput.focus();
    promptInput.scrollIntoView({ block: "center" });
  }

  return { focus: () => promptInput.focus() };
}
