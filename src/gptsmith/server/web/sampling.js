// The controls for sampling parameters. Their values are kept in the browser.

import { h } from "./dom.js";
import { load, save } from "./store.js";

// min, max, step: of the input. value: the default. off: the value that switches the parameter off; it is not sent.
// number: a number field in place of a slider. optional: the field may be empty.
export const CONTROLS = [
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    step: 0.05,
    value: 0.7,
    help: "0 always picks the most likely token; values above 1 make the text more random",
  },
  {
    name: "top_p",
    label: "Top p",
    min: 0.05,
    max: 1,
    step: 0.05,
    value: 0.95,
    off: 1,
    help: "keep the most likely tokens whose probabilities add up to this value; 1\u00a0=\u00a0off",
  },
  {
    name: "top_k",
    label: "Top k",
    min: 0,
    max: 200,
    step: 1,
    value: 0,
    off: 0,
    help: "keep only the k most likely tokens; 0\u00a0=\u00a0off",
  },
  {
    name: "min_p",
    label: "Min p",
    min: 0,
    max: 0.5,
    step: 0.01,
    value: 0,
    off: 0,
    help: "drop tokens less likely than this fraction of the most likely one; 0\u00a0=\u00a0off",
  },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    min: 1,
    max: 1.5,
    step: 0.01,
    value: 1,
    off: 1,
    help: "values above 1 make tokens that have already occurred less likely; 1\u00a0=\u00a0off",
  },
  {
    name: "max_tokens",
    label: "Maximum answer length",
    min: 1,
    max: 4096,
    step: 1,
    value: 512,
    number: true,
    help: "in tokens",
  },
  {
    name: "seed",
    label: "Seed",
    min: 0,
    max: 2147483647,
    step: 1,
    value: null,
    number: true,
    optional: true,
    help: "the same seed gives the same answer; leave empty for random",
  },
];

// {name: default value} of the controls.
export const defaultValues = (controls) => Object.fromEntries(controls.map(({ name, value }) => [name, value]));

// The fields of a request. Parameters that are off or empty are left out.
export function requestFields(controls, values) {
  return Object.fromEntries(
    controls
      .map(({ name, off }) => ({ name, off, value: values[name] }))
      .filter(({ value, off }) => value !== null && value !== undefined && value !== off)
      .map(({ name, value }) => [name, value]),
  );
}

// The value that a person typed, null if the field is empty. Return undefined if it is out of range.
export function parseValue({ min, max, optional }, text) {
  if (text === "") return optional ? null : undefined;
  const value = Number(text);
  return value >= min && value <= max ? value : undefined;
}

export function formatValue({ off, step }, value) {
  if (off !== undefined && value === off) return "off";
  return Number(value).toFixed(step < 1 ? 2 : 0);
}

export class SamplingControls {
  // name: under which the values are stored. without: names of controls to leave out. defaults: override CONTROLS.
  constructor(name, { without = [], defaults = {} } = {}) {
    this.name = name;
    this.controls = CONTROLS.filter((control) => !without.includes(control.name)).map((control) => ({
      ...control,
      value: defaults[control.name] ?? control.value,
    }));
    this.values = { ...defaultValues(this.controls), ...load(`sampling.${name}`, {}) };
    this.element = h("div.controls", {});
    this.draw();
  }

  requestFields() {
    return requestFields(this.controls, this.values);
  }

  draw() {
    const reset = () => {
      this.values = defaultValues(this.controls);
      this.save();
      this.draw();
    };
    this.element.replaceChildren(
      ...this.controls.map((control) => this.drawControl(control)),
      h("button.button.quiet", { type: "button", onclick: reset }, "Reset to defaults"),
    );
  }

  drawControl(control) {
    const { name, label, min, max, step, help, number, optional } = control;
    const id = `${this.name}-${name}`;
    const output = number ? null : h("output", { htmlFor: id }, formatValue(control, this.values[name]));
    const input = h("input", {
      type: number ? "number" : "range",
      id,
      min,
      max,
      step,
      "aria-describedby": `${id}-help`,
      placeholder: optional ? "random" : undefined,
      oninput: () => {
        const value = parseValue(control, input.value);
        if (value === undefined) {
          input.setAttribute("aria-invalid", "true");
          return;
        }
        input.removeAttribute("aria-invalid");
        this.values[name] = value;
        if (output) output.textContent = formatValue(control, value);
        this.save();
      },
      onblur: () => {
        input.value = this.values[name] ?? ""; // replaces a text that is out of range by the value in use
        input.removeAttribute("aria-invalid");
      },
    });
    input.value = this.values[name] ?? "";
    const head = h("div.control-head", {}, h("label", { htmlFor: id }, label), output);
    return h("div.control", {}, head, input, h("p.help", { id: `${id}-help` }, help));
  }

  save() {
    save(`sampling.${this.name}`, this.values);
  }
}
