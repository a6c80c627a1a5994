// Text whose tokens are coloured by their probability. One stop for the Tab key; arrows go from token to token, Enter
// (or the pointer) opens the alternatives.

import { h, percent, visible } from "./dom.js";

const STEPS = [0.9, 0.6, 0.3, 0.1, 0.02];

export function shade(p) {
  if (p === null || p === undefined) return "none";
  const step = STEPS.findIndex((least) => p >= least);
  return String(step < 0 ? STEPS.length : step);
}

export function legend() {
  const names = ["90% and more", "60%", "30%", "10%", "2%", "less"];
  return h("div.legend", { role: "img", "aria-label": "Colours: from blue, very probable tokens, to orange, improbable ones" },
    h("span", {}, "sure"), names.map((name, i) => h("i", { dataset: { p: String(i) }, title: name })), h("span", {}, "surprised"));
}

export class TokenText {
  // onpick(index, alternative) when an alternative of token `index` is chosen.
  constructor({ label, onpick }) {
    this.tokens = [];
    this.onpick = onpick;
    this.element = h("div.tokens", {
      role: "group", "aria-label": label,
      onkeydown: (event) => this.keys(event),
      onclick: (event) => this.toggle(this.indexOf(event.target)),
      onpointerover: (event) => { if (event.pointerType === "mouse" && !this.pinned) this.hover(this.indexOf(event.target)); },
      onpointerleave: () => { if (!this.pinned) this.close(300); },
    });
    this.popover = null;
    this.at = 0;
  }

  // token: {text, probability | null, alternatives: [{text, probability}], given}
  push(token) {
    const index = this.tokens.push(token) - 1;
    const span = h("span.token", {
      role: "button", tabIndex: index === this.at ? 0 : -1, dataset: { p: shade(token.probability), ...(token.picked ? { picked: "" } : {}), ...(token.given ? { given: "" } : {}) },
      "aria-label": `${visible(token.text)}${token.probability === null ? "" : `, ${percent(token.probability)}`}`,
    }, token.text);
    if (token.alternatives?.length) span.setAttribute("aria-haspopup", "dialog");
    this.element.append(span);
  }

  cut(length) {
    this.close();
    this.tokens.length = length;
    this.spans().slice(length).forEach((span) => span.remove());
    this.at = 0;
    if (this.spans()[0]) this.spans()[0].tabIndex = 0;
  }

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  spans() {
    return [...this.element.querySelectorAll(":scope > .token")];
  }

  indexOf(target) {
    return this.spans().indexOf(target.closest?.(".token"));
  }

  keys(event) {
    const spans = this.spans();
    const index = this.indexOf(event.target);
    if (index < 0) return;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
    if (event.key in steps) {
      event.preventDefault();
      this.close();
      this.move(Math.max(0, Math.min(spans.length - 1, index + steps[event.key])));
      this.hover(this.at);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.open(index, true);
    } else if (event.key === "Escape") this.close();
  }

  move(index) {
    const spans = this.spans();
    if (spans[this.at]) spans[this.at].tabIndex = -1;
    this.at = index;
    spans[index].tabIndex = 0;
    spans[index].focus();
  }

  hover(index) {
    if (index >= 0) this.open(index, false);
  }

  toggle(index) {
    if (index < 0) return;
    if (this.pinned && this.openAt === index) this.close();
    else this.open(index, true, false);
  }

  open(index, pinned, focus = pinned) {
    if (this.openAt === index && this.pinned === pinned) return;
    this.close();
    const token = this.tokens[index];
    if (token.probability === null && !token.alternatives?.length) return;
    const span = this.spans()[index];
    this.openAt = index;
    this.pinned = pinned;
    const alternatives = token.alternatives ?? [];
    this.popover = h("div.popover", {
      role: "dialog", "aria-label": `Instead of ${visible(token.text)}`,
      onpointerover: () => clearTimeout(this.closing),
      onpointerleave: () => { if (!this.pinned) this.close(200); },
      onkeydown: (event) => {
        const buttons = [...this.popover.querySelectorAll("button")];
        const place = buttons.indexOf(document.activeElement);
        if (event.key === "ArrowDown" || event.key === "ArrowUp") {
          event.preventDefault();
          buttons[(place + (event.key === "ArrowDown" ? 1 : buttons.length - 1)) % buttons.length].focus();
        } else if (event.key === "Escape") {
          event.stopPropagation();
          this.close();
          this.move(index);
        }
      },
      onfocusout: (event) => { if (this.popover && !this.popover.contains(event.relatedTarget)) this.close(150); },
    },
    h("p.popover-head", {}, h("code", {}, visible(token.text)), token.probability === null ? "" : ` ${percent(token.probability)}`,
      h("span.surprise", {}, token.probability ? `${(-Math.log2(token.probability)).toFixed(1)} bits` : "")),
    h("ul", {}, alternatives.map((alternative) => h("li", {},
      h("button.alternative", {
        type: "button", "aria-current": alternative.text === token.text ? "true" : undefined,
        disabled: !this.onpick || alternative.partial, "aria-label": `Go on with ${visible(alternative.text)}, ${percent(alternative.probability)}`,
        onclick: () => { this.close(); this.onpick(index, alternative); },
      }, h("code", {}, visible(alternative.text)), bar(alternative.probability), h("span.number", {}, percent(alternative.probability)))))));
    document.body.append(this.popover);
    place(this.popover, span);
    span.dataset.open = "";
    if (focus) this.popover.querySelector("button")?.focus();
    if (pinned) {
      this.outside = (event) => { if (!this.popover?.contains(event.target) && this.indexOf(event.target) < 0) this.close(); };
      document.addEventListener("pointerdown", this.outside);
    }
  }

  close(after = 0) {
    clearTimeout(this.closing);
    if (after) {
      this.closing = setTimeout(() => this.close(), after);
      return;
    }
    document.removeEventListener("pointerdown", this.outside);
    const popover = this.popover;
    this.popover = null; // before it is removed: removing what has the focus says so once more
    popover?.remove();
    for (const span of this.element.querySelectorAll("[data-open]")) delete span.dataset.open;
    this.openAt = undefined;
    this.pinned = false;
  }
}

export function bar(p) {
  const inner = h("i");
  inner.style.width = `${Math.max(1, 100 * p)}%`;
  return h("span.bar-track", { "aria-hidden": "true" }, inner);
}

// Below what it is about, or above where there is more room; never beyond the window's edge.
function place(popover, anchor) {
  const box = anchor.getClientRects()[0] ?? anchor.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = popover;
  const left = Math.max(8, Math.min(box.left, innerWidth - width - 8));
  const below = box.bottom + height + 8 < innerHeight || box.top < height + 8;
  popover.style.left = `${left}px`;
  popover.style.top = `${below ? box.bottom + 4 : box.top - height - 4}px`;
}
