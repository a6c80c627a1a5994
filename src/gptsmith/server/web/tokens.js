// Text whose tokens are colored by their probability. The whole text is one stop of the Tab key; the arrow keys move
// between tokens, and Enter or the pointer opens the alternatives to a token.

import { h } from "./dom.js";
import { glyphs, percent, printable } from "./format.js";

const LEVELS = [0.9, 0.6, 0.3, 0.1, 0.02]; // the least probability of each color; the last color is for the rest

// The color of a probability: "0" (likely) to "5" (unlikely), or "none" if there is no probability.
export function probabilityLevel(p) {
  if (p === null || p === undefined) return "none";
  const level = LEVELS.findIndex((least) => p >= least);
  return String(level < 0 ? LEVELS.length : level);
}

export function legend() {
  const ranges = ["90% or more", "60–90%", "30–60%", "10–30%", "2–10%", "less than 2%"];
  return h(
    "div.legend",
    { role: "img", "aria-label": "Colors from blue (likely tokens) to orange (unlikely tokens)" },
    h("span", {}, "likely"),
    ranges.map((range, level) => h("i", { dataset: { p: String(level) }, title: range })),
    h("span", {}, "unlikely"),
  );
}

export function probabilityBar(p) {
  const fill = h("i");
  fill.style.width = `${Math.max(1, 100 * p)}%`;
  return h("span.bar-track", { "aria-hidden": "true" }, fill);
}

export class TokenText {
  // onChoose(index, alternative): called when an alternative to the token at `index` is chosen.
  constructor({ label, onChoose }) {
    this.tokens = [];
    this.onChoose = onChoose;
    this.element = h("div.tokens", {
      role: "group",
      "aria-label": label,
      onkeydown: (event) => this.onKeyDown(event),
      onclick: (event) => this.toggle(this.indexOf(event.target)),
      onpointerover: (event) => {
        if (event.pointerType === "mouse" && !this.pinned) this.preview(this.indexOf(event.target));
      },
      onpointerleave: () => {
        if (!this.pinned) this.close(300);
      },
    });
    this.popover = null;
    this.openIndex = undefined; // of the token whose alternatives are shown
    this.pinned = false; // the popover stays open when the pointer leaves
    this.current = 0; // index of the token that the Tab key reaches
  }

  // token: {text, probability or null, alternatives: [{text, probability, partial}], fromPrompt, picked}
  push(token) {
    const index = this.tokens.push(token) - 1;
    const dataset = { p: probabilityLevel(token.probability) };
    if (token.picked) dataset.picked = "";
    if (token.fromPrompt) dataset.fromPrompt = "";
    const probability = token.probability === null ? "" : `, ${percent(token.probability)}`;
    const span = h(
      "span.token",
      {
        role: "button",
        tabIndex: index === this.current ? 0 : -1,
        dataset,
        "aria-label": `${printable(token.text)}${probability}`,
      },
      glyphs(token.text).map(({ text, glyph }) => (glyph ? h("span.glyph", { dataset: { glyph } }, text) : text)),
    );
    if (token.alternatives?.length) span.setAttribute("aria-haspopup", "dialog");
    this.element.append(span);
  }

  truncate(length) {
    this.close();
    this.tokens.length = length;
    this.spans()
      .slice(length)
      .forEach((span) => span.remove());
    this.current = 0;
    const [first] = this.spans();
    if (first) first.tabIndex = 0;
  }

  spans() {
    return [...this.element.querySelectorAll(":scope > .token")];
  }

  indexOf(target) {
    return this.spans().indexOf(target.closest?.(".token"));
  }

  onKeyDown(event) {
    const index = this.indexOf(event.target);
    if (index < 0) return;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
    if (event.key in steps) {
      event.preventDefault();
      this.close();
      this.focus(Math.max(0, Math.min(this.tokens.length - 1, index + steps[event.key])));
      this.preview(this.current);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.open(index, { pinned: true, focus: true });
    } else if (event.key === "Escape") this.close();
  }

  focus(index) {
    const spans = this.spans();
    if (spans[this.current]) spans[this.current].tabIndex = -1;
    this.current = index;
    spans[index].tabIndex = 0;
    spans[index].focus();
  }

  preview(index) {
    if (index >= 0) this.open(index);
  }

  toggle(index) {
    if (index < 0) return;
    if (this.pinned && this.openIndex === index) this.close();
    else this.open(index, { pinned: true });
  }

  open(index, { pinned = false, focus = false } = {}) {
    if (this.openIndex === index && this.pinned === pinned) return;
    this.close();
    const token = this.tokens[index];
    if (token.probability === null && !token.alternatives?.length) return;
    const span = this.spans()[index];
    this.openIndex = index;
    this.pinned = pinned;
    this.popover = this.makePopover(index);
    document.body.append(this.popover);
    placePopover(this.popover, span);
    span.dataset.open = "";
    if (focus) this.popover.querySelector("button")?.focus();
    if (pinned) {
      this.onOutsideClick = (event) => {
        if (!this.popover?.contains(event.target) && this.indexOf(event.target) < 0) this.close();
      };
      document.addEventListener("pointerdown", this.onOutsideClick);
    }
  }

  makePopover(index) {
    const token = this.tokens[index];
    const events = {
      onpointerover: () => clearTimeout(this.closing),
      onpointerleave: () => {
        if (!this.pinned) this.close(200);
      },
      onkeydown: (event) => this.onPopoverKeyDown(event, index),
      onfocusout: (event) => {
        if (this.popover && !this.popover.contains(event.relatedTarget)) this.close(150);
      },
    };
    const bits = token.probability ? `${(-Math.log2(token.probability)).toFixed(1)} bits` : "";
    return h(
      "div.popover",
      { role: "dialog", "aria-label": `Alternatives to ${printable(token.text)}`, ...events },
      h(
        "p.popover-head",
        {},
        h("code", {}, printable(token.text)),
        token.probability === null ? "" : ` ${percent(token.probability)}`,
        h("span.surprise", {}, bits),
      ),
      h(
        "ul",
        {},
        (token.alternatives ?? []).map((alternative) => h("li", {}, this.makeAlternative(index, alternative))),
      ),
    );
  }

  makeAlternative(index, alternative) {
    const probability = percent(alternative.probability);
    return h(
      "button.alternative",
      {
        type: "button",
        "aria-current": alternative.text === this.tokens[index].text ? "true" : undefined,
        disabled: !this.onChoose || alternative.partial,
        "aria-label": `Continue with ${printable(alternative.text)}, ${probability}`,
        onclick: () => {
          this.close();
          this.onChoose(index, alternative);
        },
      },
      h("code", {}, printable(alternative.text)),
      probabilityBar(alternative.probability),
      h("span.number", {}, probability),
    );
  }

  onPopoverKeyDown(event, index) {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      const buttons = [...this.popover.querySelectorAll("button")];
      const step = event.key === "ArrowDown" ? 1 : buttons.length - 1;
      buttons[(buttons.indexOf(document.activeElement) + step) % buttons.length].focus();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      this.close();
      this.focus(index);
    }
  }

  // delay: in milliseconds.
  close(delay = 0) {
    clearTimeout(this.closing);
    if (delay) {
      this.closing = setTimeout(() => this.close(), delay);
      return;
    }
    document.removeEventListener("pointerdown", this.onOutsideClick);
    const { popover } = this;
    this.popover = null; // before the removal, which fires another focusout
    popover?.remove();
    for (const span of this.element.querySelectorAll("[data-open]")) delete span.dataset.open;
    this.openIndex = undefined;
    this.pinned = false;
  }
}

// Place the popover below its anchor, or above it if there is more room, and always inside the window.
function placePopover(popover, anchor) {
  const box = anchor.getClientRects()[0] ?? anchor.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = popover;
  const left = Math.max(8, Math.min(box.left, innerWidth - width - 8));
  const below = box.bottom + height + 8 < innerHeight || box.top < height + 8;
  popover.style.left = `${left}px`;
  popover.style.top = `${below ? box.bottom + 4 : box.top - height - 4}px`;
}
