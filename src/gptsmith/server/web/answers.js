// The answers that are being generated. They go on while another conversation is shown, and are stored as they grow, so
// that a reload keeps what there is. No DOM.

import { streamCompletion } from "./api.js";
import { applyChunk, decodingSpeed } from "./conversation.js";

const SAVE_INTERVAL = 1000; // milliseconds; other tabs take an answer as abandoned if nobody stores it for much longer
const MAX_ANSWERS = 2; // at once: a browser opens six connections to a server, and the runs need three

export class Answers {
  #running = new Map(); // conversation -> {message, controller}
  #leaving = false; // the page is being closed, and the streams break

  // save(conversation). onText(conversation, message): the text or the reasoning has grown.
  constructor({ save, onText }) {
    Object.assign(this, { save, onText });
    addEventListener("pagehide", () => {
      this.#leaving = true;
      for (const [conversation, { message }] of this.#running) {
        this.#keep(conversation, message, { finish: message.finish ?? "interrupted" });
      }
    });
    addEventListener("pageshow", () => {
      this.#leaving = false;
    });
  }

  // The message that is being generated in a conversation.
  in(conversation) {
    return this.#running.get(conversation)?.message;
  }

  get canStart() {
    return this.#running.size < MAX_ANSWERS;
  }

  stop(conversation) {
    this.#running.get(conversation)?.controller.abort();
  }

  // Generate the answer `message`. prepare(signal): resolves to {body, full}: the body of the request, and whether its
  // max_tokens is where the context ends. Resolve when the answer has ended.
  async generate(conversation, message, prepare) {
    const controller = new AbortController();
    this.#running.set(conversation, { message, controller });
    const timer = setInterval(() => this.#keep(conversation, message), SAVE_INTERVAL);
    let firstTokenTime = null;
    const result = {};
    try {
      const { body, full } = await prepare(controller.signal);
      for await (const chunk of streamCompletion("v1/chat/completions", body, controller.signal)) {
        if (!applyChunk(message, chunk)) continue;
        firstTokenTime ??= performance.now();
        this.onText(conversation, message);
      }
      if (!message.finish) result.finish = "interrupted";
      else if (message.finish === "length" && full) result.finish = "context";
    } catch (error) {
      if (error.name === "AbortError") result.finish = "stopped";
      else result.error = error.message;
    }
    clearInterval(timer);
    this.#running.delete(conversation);
    if (this.#leaving) return; // already stored
    if (firstTokenTime !== null) {
      result.speed = decodingSpeed(message.usage, (performance.now() - firstTokenTime) / 1000);
    }
    this.#keep(conversation, message, result);
  }

  #keep(conversation, message, fields = {}) {
    Object.assign(message, fields, { updated: Date.now() });
    this.save(conversation);
  }
}
