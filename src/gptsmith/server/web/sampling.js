// The controls of sampling, each with the range in which it makes sense, kept in the browser.

import { h } from "./dom.js";
import { load, save } from "./store.js";

const CONTROLS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.7,
    help: "0 always takes the most probable token; above 1 gets wild" },
  { name: "top_p", label: "Top p", min: 0.05, max: 1, step: 0.05, value: 0.95, off: 1,
    help: "the fewest tokens whose probabilities add up to this" },
  { name: "top_k", label: "Top k", min: 0, max: 200, step: 1, value: 0, off: 0, help: "only so many of the most probable; 0: off" },
  { name: "min_p", label: "Min p", min: 0, max: 0.5, step: 0.01, value: 0, off: 0,
    help: "no token below this share of the most probable one; 0: off" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 1, max: 1.5, step: 0.01, value: 1, off: 1,
    help: "above 1, tokens seen before are less likely" },
  { name: "max_tokens", label: "Most tokens", min: 1, max: 4096, step: 1, value: 512, number: true, help: "of one answer" },
  { name: "seed", label: "Seed", min: 0, max: 2147483647, step: 1, value: null, number: true, optional: true,
    help: "the same seed gives the same answer; empty: another each time" },
];

export class Sampling {
  // name: under which the values are kept. without: controls that the view has no use for. defaults: over those above.
  constructor(name, { without = [], defaults = {} } = {}) {
    this.name = name;
    this.controls = CONTROLS.filter((control) => !without.includes(control.name))
      .map((control) => ({ ...control, value: defaults[control.name] ?? control.value }));
    this.values = { ...this.standard(), ...load(`sampling.${name}`, {}) };
    this.element = h("div.controls", {});
    this.draw();
  }

  standard() {
    return Object.fromEntries(this.controls.map((control) => [control.name, control.value]));
  }

  // The fields of a request: what is off is left out.
  fields() {
    return Object.fromEntries(this.controls
      .map((control) => [control.name, this.values[control.name], control.off])
      .filter(([, value, off]) => value !== null && value !== undefined && value !== off)
      .map(([name, value]) => [name, value]));
  }

  draw() {
    this.element.replaceChildren(
      ...this.controls.map((control) => this.control(control)),
      h("button.button.quiet", { type: "button", onclick: () => {
        this.values = this.standard();
        this.keep();
        this.draw();
      } }, "Reset to defaults"));
  }

  control({ name, label, min, max, step, help, number, optional, off }) {
    const id = `${this.name}-${name}`;
    const value = this.values[name];
    const shown = (v) => (v === off && off !== undefined ? "off" : Number(v).toFixed(step < 0.05 ? 2 : step < 1 ? 2 : 0));
    const output = number ? null : h("output", { htmlFor: id }, shown(value));
    const input = h("input", {
      type: number ? "number" : "range", id, min, max, step, "aria-describedby": `${id}-help`,
      placeholder: optional ? "random" : undefined,
      oninput: () => {
        const given = input.value === "" ? null : Number(input.value);
        if (given === null ? !optional : !(given >= min && given <= max)) {
          input.setAttribute("aria-invalid", "true");
          return;
        }
        input.removeAttribute("aria-invalid");
        this.values[name] = given;
        if (output) output.textContent = shown(given);
        this.keep();
      },
      onblur: () => {
        input.value = this.values[name] ?? ""; // what was out of range is not what is used
        input.removeAttribute("aria-invalid");
      },
    });
    input.value = value ?? "";
    return h("div.control", {}, h("div.control-head", {}, h("label", { htmlFor: id }, label), output), input,
      h("p.help", { id: `${id}-help` }, help));
  }

  keep() {
    save(`sampling.${this.name}`, this.values);
  }
}
