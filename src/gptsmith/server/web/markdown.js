// Text of a model as Markdown. The server parses and sanitises; this only puts the result into the page.

import { request } from "./api.js";
import { copyText, h, icon, wait } from "./dom.js";

const policy = globalThis.trustedTypes?.createPolicy("sanitised-markdown", { createHTML: (html) => html })
  ?? { createHTML: (html) => html };
const PAUSE = 150; // ms between two renderings of a text that grows
const known = new Map(); // text -> HTML

// Shows a text that grows in `element`. around(change): makes the change, and what has to be done before and after it.
export class Rendering {
  constructor(element, around = (change) => change()) {
    this.element = element;
    this.around = around;
    this.wanted = this.shown = null;
    this.working = null;
  }

  show(text) {
    this.wanted = text;
    if (known.has(text)) this.render(text, known.get(text));
    else if (this.shown === null) this.plain(text); // until the first rendering has come
    this.start();
  }

  async finish(text) {
    this.show(text);
    while (this.working) await this.working;
    for (const block of this.element.querySelectorAll("pre")) {
      block.tabIndex = 0; // it may be wider than the page: the keyboard can scroll it
      block.append(h("button.copy-code", { type: "button", "aria-label": "Copy the code", title: "Copy the code",
        onclick: () => copyText(block.querySelector("code")?.textContent ?? "") }, icon("copy")));
    }
  }

  start() {
    if (this.working || this.wanted === this.shown) return;
    this.working = this.work().finally(() => {
      this.working = null;
      this.start(); // for what has come in between
    });
  }

  async work() {
    while (this.wanted !== this.shown) {
      const text = this.wanted;
      try {
        const { html } = await request("api/markdown", { body: { text } });
        known.set(text, html);
        if (known.size > 200) known.delete(known.keys().next().value);
        this.render(text, html);
      } catch {
        this.plain(text); // plain text is better than none
        this.shown = text;
      }
      if (this.wanted !== text) await wait(PAUSE);
    }
  }

  render(text, html) {
    this.around(() => {
      this.element.classList.remove("plain");
      this.element.innerHTML = policy.createHTML(html);
    });
    this.shown = text;
  }

  plain(text) {
    this.around(() => {
      this.element.classList.add("plain");
      this.element.textContent = text;
    });
  }
}
