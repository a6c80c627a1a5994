// The reasoning of a model, which it writes before an answer: a block that is closed until the person opens it.

import { h } from "./dom.js";

const opened = new WeakSet(); // answers whose reasoning is open, also when the page is drawn again

export class ReasoningView {
  // answer: an object that is the same each time the answer is drawn. wrap: as of MarkdownView.
  constructor(answer, wrap = (change) => change()) {
    this.wrap = wrap;
    this.summary = h("summary");
    this.text = document.createTextNode("");
    const ontoggle = () => (this.element.open ? opened.add(answer) : opened.delete(answer));
    const properties = { hidden: true, open: opened.has(answer), ontoggle };
    this.element = h("details.reasoning", properties, this.summary, h("div", {}, this.text));
  }

  // Show a text that begins with what has been shown. growing: the answer itself has not begun.
  show(reasoning = "", growing = false) {
    if (!reasoning) return;
    this.wrap(() => {
      this.element.hidden = false;
      this.summary.textContent = growing ? "Thinking …" : "Reasoning";
      this.text.appendData(reasoning.slice(this.text.length)); // a selection in it remains
    });
  }
}
