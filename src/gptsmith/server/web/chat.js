// Conversations: streamed, stopped, regenerated, edited, kept in this browser.

import { completion } from "./api.js";
import { announce, ask, copyText, download, h, icon, iconButton, toast } from "./dom.js";
import { Rendering } from "./markdown.js";
import * as models from "./models.js";
import { Sampling } from "./sampling.js";
import { load, save } from "./store.js";

const SUGGESTIONS = [
  "Explain what a transformer is to a curious ten-year-old.",
  "Write a short poem about the sea in winter.",
  "Give me three ideas for a quiet weekend.",
];

export function mount(root, { go }) {
  let conversations = load("conversations", []);
  if (!Array.isArray(conversations)) conversations = [];
  let current = null; // one that is not in the list until something is said in it
  let running = null; // {controller, message}
  const sampling = new Sampling("chat");

  const list = h("ul.conversations", {});
  const system = h("textarea", { id: "system", rows: 3, placeholder: "You are a helpful assistant.", oninput: () => {
    current.system = system.value;
    keep();
  } });
  const log = h("div.log", { role: "log", "aria-label": "Conversation", "aria-live": "off" });
  const input = h("textarea", {
    id: "message", rows: 1, placeholder: "Say something", enterkeyhint: "send", oninput: fit, onkeydown: keys,
  });
  const send = h("button.round.primary", { type: "submit", "aria-label": "Send", title: "Send (Enter)" }, icon("send"));
  const composer = h("form.composer", { onsubmit: (event) => {
    event.preventDefault();
    if (running) stop();
    else say(input.value);
  } }, h("label.sr", { htmlFor: "message" }, "Message"), input, send);
  const title = h("h1.sr", {}, "Chat");
  const aside = h("aside.side.left", { id: "history", "aria-label": "Conversations" },
    h("div.side-head", {}, h("h2", {}, "Conversations"),
      iconButton("close", "Close the conversations", () => panel("history", false), { className: "icon-button only-narrow" })),
    h("button.button.wide", { type: "button", onclick: () => { begin(); panel("history", false); input.focus(); } }, icon("plus"), "New conversation"),
    list);
  const settings = h("aside.side.right", { id: "settings", "aria-label": "Settings" },
    h("div.side-head", {}, h("h2", {}, "Settings"),
      iconButton("close", "Close the settings", () => panel("settings", false), { className: "icon-button only-narrow" })),
    h("div.control", {}, h("div.control-head", {}, h("label", { htmlFor: "system" }, "System prompt")), system,
      h("p.help", {}, "what the model is told before the conversation")),
    sampling.element,
    h("div.buttons", {},
      h("button.button.quiet", { type: "button", onclick: () => exportAs("markdown") }, icon("download"), "Markdown"),
      h("button.button.quiet", { type: "button", onclick: () => exportAs("json") }, icon("download"), "JSON")));
  const tools = h("div.view-tools.only-narrow", {},
    iconButton("list", "Conversations", () => panel("history", true)),
    iconButton("sliders", "Settings", () => panel("settings", true)));
  const notice = h("div.notice", { hidden: true });
  const scroller = h("div.scroller", {}, log);
  root.append(title, aside, h("div.chat-main", {}, tools, scroller, notice, composer), settings);
  root.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (root.querySelector(".side.open")) ["history", "settings"].forEach((id) => panel(id, false));
    else if (running) stop();
  });

  models.onChoice(async (name) => {
    try {
      const about = await models.describe(name);
      if (name !== models.chosen()) return;
      notice.hidden = about.chat;
      composer.hidden = !about.chat;
      if (!about.chat) {
        notice.replaceChildren(
          h("p", {}, h("strong", {}, `${name} has not been taught to talk.`),
            " It is a base model: it goes on with a text, and does not know what a question is. In the Playground it is in its element."),
          h("button.button.primary", { type: "button", onclick: () => go("playground") }, "Open the Playground"));
      }
      if (!running) draw();
    } catch (error) {
      toast(error.message, "error");
    }
  });

  // -- conversations ---------------------------------------------------------------------------------------------------

  function begin() {
    stop();
    current = { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", updated: Date.now(), system: "", messages: [] };
    system.value = "";
    draw();
    drawList();
  }

  function open(conversation) {
    stop();
    current = conversation;
    system.value = conversation.system ?? "";
    draw();
    drawList();
  }

  function keep() {
    if (!current.messages.length) return;
    if (!conversations.includes(current)) conversations.unshift(current);
    current.updated = Date.now();
    current.title ||= current.messages[0].content.trim().replaceAll(/\s+/g, " ").slice(0, 60);
    conversations.sort((a, b) => b.updated - a.updated);
    if (!save("conversations", conversations)) {
      toast("The browser's storage is full or switched off: this conversation is not kept. Export it, or delete others.", "error");
    }
    drawList();
  }

  async function remove(conversation) {
    const yes = await ask("Delete this conversation?", h("p", {}, `“${conversation.title}” is kept in this browser alone.`),
      [{ label: "Keep it", value: false }, { label: "Delete", value: true, danger: true }]);
    if (!yes) return;
    conversations = conversations.filter((each) => each !== conversation);
    save("conversations", conversations);
    if (conversation === current) begin();
    drawList();
  }

  function drawList() {
    list.replaceChildren(...conversations.map((conversation) =>
      h("li", {}, h("button.conversation", {
        type: "button", "aria-current": conversation === current ? "true" : undefined,
        onclick: () => { open(conversation); panel("history", false); },
      }, conversation.title || "…"), iconButton("trash", `Delete “${conversation.title}”`, () => remove(conversation)))));
    if (!conversations.length) list.append(h("li.empty", {}, "Nothing yet. What you talk about stays in this browser."));
  }

  function panel(id, shown) {
    const element = document.getElementById(id);
    const was = element.classList.contains("open");
    element.classList.toggle("open", shown);
    if (shown) element.querySelector("button").focus();
    else if (was) input.focus({ preventScroll: true });
  }

  // -- talking ---------------------------------------------------------------------------------------------------------

  function say(text) {
    if (!text.trim() || running) return;
    current.messages.push({ role: "user", content: text.trim() });
    input.value = "";
    fit();
    answer();
  }

  async function answer() {
    const message = { role: "assistant", content: "", model: models.chosen() || undefined };
    keep(); // what was said is not lost, whatever becomes of the answer
    const asked = current.messages.map(({ role, content }) => ({ role, content }));
    if (current.system?.trim()) asked.unshift({ role: "system", content: current.system });
    current.messages.push(message);
    const conversation = current;
    const controller = new AbortController();
    running = { controller, message };
    busy(true);
    draw();
    const element = log.lastElementChild;
    const rendering = new Rendering(element.querySelector(".body"), following);
    const began = performance.now();
    let first = null;
    try {
      const model = (message.model = await models.choice());
      for await (const chunk of completion("v1/chat/completions", { model, messages: asked, ...sampling.fields() }, controller.signal)) {
        if (chunk.usage) message.usage = chunk.usage;
        const choice = chunk.choices?.[0];
        if (choice?.delta?.content) {
          first ??= performance.now();
          message.content += choice.delta.content;
          element.classList.remove("waiting");
          rendering.show(message.content);
        }
        if (choice?.finish_reason) message.finish = choice.finish_reason;
      }
    } catch (error) {
      if (error.name === "AbortError") message.finish = "stopped";
      else message.error = error.message;
    }
    const ended = performance.now();
    message.seconds = (ended - began) / 1000;
    if (message.usage && first !== null && message.usage.completion_tokens > 1) {
      message.speed = (message.usage.completion_tokens - 1) / ((ended - first) / 1000);
    }
    if (running?.message === message) {
      running = null;
      busy(false);
    }
    if (conversation !== current) { // another was opened meanwhile: what had come of this one is kept
      save("conversations", conversations);
      return;
    }
    keep();
    following(() => element.replaceWith(turn(message, conversation.messages.length - 1)));
    announce(message.error ? `Error: ${message.error}` : `Answer: ${message.content.slice(0, 400)}`);
  }

  function stop() {
    running?.controller.abort();
  }

  function busy(yes) {
    send.replaceChildren(icon(yes ? "stop" : "send"));
    send.setAttribute("aria-label", yes ? "Stop" : "Send");
    send.title = yes ? "Stop (Esc)" : "Send (Enter)";
  }

  function again(index) {
    if (running) return;
    current.messages.length = index; // the answer at `index`, and all that came after it
    answer();
  }

  function edit(index) {
    if (running) return;
    const message = current.messages[index];
    const user = message.role === "user";
    const area = h("textarea.edit", { value: message.content, rows: Math.min(12, message.content.split("\n").length + 1),
      "aria-label": user ? "Your message" : "The answer" });
    const done = (send) => {
      if (send) {
        if (!area.value.trim()) return;
        message.content = area.value.trim();
        if (user) {
          current.messages.length = index + 1;
          answer();
          return;
        }
        message.finish = "edited";
        keep();
      }
      draw();
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); done(false); }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) done(true);
    });
    log.children[index].querySelector(".body").replaceChildren(area, h("div.buttons", {},
      h("button.button.primary", { type: "button", onclick: () => done(true) }, user ? "Send" : "Save"),
      h("button.button", { type: "button", onclick: () => done(false) }, "Cancel"),
      user && index < current.messages.length - 1 && h("span.help", {}, "what comes after it will be answered anew")));
    area.focus();
  }

  // -- drawing ---------------------------------------------------------------------------------------------------------

  function draw() {
    if (!current) return;
    log.replaceChildren(...current.messages.map(turn));
    if (!current.messages.length) {
      log.append(h("div.welcome", {}, notice.hidden
        ? [h("p.hello", {}, "What shall we talk about?"), h("div.suggestions", {}, SUGGESTIONS.map((text) =>
          h("button.suggestion", { type: "button", onclick: () => say(text) }, text)))]
        : notice));
    } else composer.before(notice);
    toEnd();
  }

  function turn(message, index) {
    const user = message.role === "user";
    const waiting = running?.message === message && !message.content;
    const body = h("div.body");
    if (user) body.textContent = message.content;
    else if (message.content) new Rendering(body, following).finish(message.content);
    const element = h(`article.turn.${message.role}${waiting ? ".waiting" : ""}`, { "aria-label": user ? "You" : message.model ?? "Answer" },
      h("header", {}, user ? "You" : message.model ?? "Assistant"), body);
    if (waiting) body.append(h("span.dots", { role: "img", "aria-label": "Waiting for the first token" }, h("i"), h("i"), h("i")));
    if (running?.message === message) return element;
    if (message.error) element.append(h("p.failed", { role: "alert" }, message.error));
    element.append(h("footer", {},
      h("div.actions", {},
        iconButton("copy", "Copy", () => copyText(message.content)),
        iconButton("edit", "Edit", () => edit(index)),
        !user && iconButton("again", "Answer again", () => again(index))),
      !user && h("span.stats", {}, statistics(message))));
    return element;
  }

  function statistics(message) {
    const parts = [];
    if (message.finish === "stopped") parts.push("stopped");
    if (message.finish === "length") parts.push("ended at the most tokens");
    if (message.finish === "edited") parts.push("edited");
    if (message.usage) parts.push(`${message.usage.completion_tokens} tokens`);
    if (message.speed) parts.push(`${message.speed.toFixed(1)} tokens/s`);
    return parts.join(" · ");
  }

  const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
  const toEnd = () => { scroller.scrollTop = scroller.scrollHeight; };

  // Who reads the end goes on reading the end; who has scrolled up is left there.
  function following(change) {
    const follow = atEnd();
    change();
    if (follow) toEnd();
  }

  function fit() {
    input.style.height = "auto";
    input.style.height = `${Math.min(input.scrollHeight, 240)}px`;
  }

  function keys(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!running) say(input.value);
    }
    if (event.key === "ArrowUp" && !input.value && !running) {
      const last = current.messages.findLastIndex((message) => message.role === "user");
      if (last >= 0) {
        event.preventDefault();
        edit(last);
      }
    }
  }

  function exportAs(kind) {
    if (!current.messages.length) {
      toast("There is nothing to export yet.");
      return;
    }
    const name = (current.title || "conversation").replaceAll(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40).toLowerCase();
    const messages = current.messages.map(({ role, content }) => ({ role, content }));
    if (current.system?.trim()) messages.unshift({ role: "system", content: current.system });
    if (kind === "json") download(`${name}.json`, `${JSON.stringify({ messages }, null, 1)}\n`, "application/json");
    else {
      const names = { system: "System", user: "You", assistant: "Assistant" };
      const text = messages.map(({ role, content }) => `**${names[role]}**\n\n${content}\n`).join("\n");
      download(`${name}.md`, `# ${current.title}\n\n${text}`, "text/markdown");
    }
  }

  if (conversations.length) open(conversations[0]);
  else begin();
  return { shown: () => { if (matchMedia("(pointer: fine)").matches) input.focus({ preventScroll: true }); }, focus: () => input.focus() };
}
