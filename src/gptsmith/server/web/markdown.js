// Markdown in a model's answers. The server parses and sanitizes it; this module only puts the result into the page.

import { request } from "./api.js";
import { copyText, h, icon, sleep } from "./dom.js";

const policy = globalThis.trustedTypes?.createPolicy("sanitized-markdown", { createHTML: (html) => html }) ?? {
  createHTML: (html) => html,
};
const PAUSE = 150; // milliseconds between two renderings of a growing text
const CACHE_SIZE = 200;
const cache = new Map(); // Markdown -> HTML

// Renders a growing text into `element`. Every change of the page goes through wrap(change), which may do something
// before and after it.
export class MarkdownView {
  constructor(element, wrap = (change) => change()) {
    this.element = element;
    this.wrap = wrap;
    this.wanted = this.shown = null;
    this.running = null; // a promise while the server renders
  }

  show(text) {
    this.wanted = text;
    if (cache.has(text)) this.showHtml(text, cache.get(text));
    else if (this.shown === null) this.showPlain(text); // until the first rendering arrives
    this.start();
  }

  async finish(text) {
    this.show(text);
    while (this.running) await this.running;
    for (const block of this.element.querySelectorAll("pre")) {
      block.tabIndex = 0; // a wide block can be scrolled with the keyboard
      const copy = () => copyText(block.querySelector("code")?.textContent ?? "");
      const attributes = { type: "button", "aria-label": "Copy code", title: "Copy code", onclick: copy };
      block.append(h("button.copy-code", attributes, icon("copy")));
    }
  }

  start() {
    if (this.running || this.wanted === this.shown) return;
    this.running = this.render().finally(() => {
      this.running = null;
      this.start(); // the text may have grown in the meantime
    });
  }

  async render() {
    while (this.wanted !== this.shown) {
      const text = this.wanted;
      try {
        const { html } = await request("api/markdown", { body: { text } });
        cache.set(text, html);
        if (cache.size > CACHE_SIZE) cache.delete(cache.keys().next().value);
        this.showHtml(text, html);
      } catch {
        this.showPlain(text); // better than nothing
        this.shown = text;
      }
      if (this.wanted !== text) await sleep(PAUSE);
    }
  }

  showHtml(text, html) {
    this.wrap(() => {
      this.element.classList.remove("plain");
      this.element.innerHTML = policy.createHTML(html);
    });
    this.shown = text;
  }

  showPlain(text) {
    this.wrap(() => {
      this.element.classList.add("plain");
      this.element.textContent = text;
    });
  }
}
