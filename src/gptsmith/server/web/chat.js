// The chat view: conversations with a model. Answers are streamed, and can be stopped, regenerated and edited.

import { streamCompletion } from "./api.js";
import {
  apiMessages,
  applyChunk,
  decodingSpeed,
  exportFile,
  newConversation,
  summarize,
  titleOf,
} from "./conversation.js";
import { announce, copyText, download, h, icon, iconButton, showDialog, toast } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import * as models from "./models.js";
import { SamplingControls } from "./sampling.js";
import { load, save } from "./store.js";

const SUGGESTIONS = [
  "Explain what a transformer is to a curious ten-year-old.",
  "Write a short poem about the sea in winter.",
  "Give me three ideas for a quiet weekend.",
];
const MAX_INPUT_HEIGHT = 240; // pixels
const MAX_EDIT_ROWS = 12;
const ANNOUNCED = 400; // characters of an answer that a screen reader is given

export function mount(root, { goTo }) {
  let conversations = load("conversations", []);
  if (!Array.isArray(conversations)) conversations = [];
  let current = null; // joins `conversations` with its first message
  let running = null; // {controller, message} while an answer is generated
  const sampling = new SamplingControls("chat");

  const list = h("ul.conversations", {});
  const systemPrompt = h("textarea", {
    id: "system",
    rows: 3,
    placeholder: "You are a helpful assistant.",
    oninput: () => {
      current.system = systemPrompt.value;
      saveCurrent();
    },
  });
  const log = h("div.log", { role: "log", "aria-label": "Conversation", "aria-live": "off" });
  const input = h("textarea", {
    id: "message",
    rows: 1,
    placeholder: "Write a message",
    enterkeyhint: "send",
    oninput: resizeInput,
    onkeydown: onInputKeyDown,
  });
  const sendButton = h(
    "button.round.primary",
    { type: "submit", "aria-label": "Send", title: "Send (Enter)" },
    icon("send"),
  );
  const onSubmit = (event) => {
    event.preventDefault();
    if (running) stop();
    else sendMessage(input.value);
  };
  const composer = h(
    "form.composer",
    { onsubmit: onSubmit },
    h("label.visually-hidden", { htmlFor: "message" }, "Message"),
    input,
    sendButton,
  );
  const panelHead = (title, id) =>
    h(
      "div.side-head",
      {},
      h("h2", {}, title),
      iconButton("close", `Close ${title.toLowerCase()}`, () => showPanel(id, false), {
        className: "icon-button only-narrow",
      }),
    );
  const onNew = () => {
    startConversation();
    showPanel("history", false);
    input.focus();
  };
  const history = h(
    "aside.side.left",
    { id: "history", "aria-label": "Conversations" },
    panelHead("Conversations", "history"),
    h("button.button.wide", { type: "button", onclick: onNew }, icon("plus"), "New conversation"),
    list,
  );
  const exportButton = (label, format) =>
    h(
      "button.button.quiet",
      { type: "button", title: `Export as ${label}`, onclick: () => exportConversation(format) },
      icon("download"),
      label,
    );
  const settings = h(
    "aside.side.right",
    { id: "settings", "aria-label": "Settings" },
    panelHead("Settings", "settings"),
    h(
      "div.control",
      {},
      h("div.control-head", {}, h("label", { htmlFor: "system" }, "System prompt")),
      systemPrompt,
      h("p.help", {}, "instructions that the model reads before the conversation"),
    ),
    sampling.element,
    h("div.buttons", {}, exportButton("Markdown", "markdown"), exportButton("JSON", "json")),
  );
  const tools = h(
    "div.view-tools.only-narrow",
    {},
    iconButton("list", "Conversations", () => showPanel("history", true)),
    iconButton("sliders", "Settings", () => showPanel("settings", true)),
  );
  const notice = h("div.notice", { hidden: true });
  const scroller = h("div.scroller", {}, log);
  const title = h("h1.visually-hidden", {}, "Chat");
  root.append(title, history, h("div.chat-main", {}, tools, scroller, notice, composer), settings);
  root.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (root.querySelector(".side.open")) ["history", "settings"].forEach((id) => showPanel(id, false));
    else if (running) stop();
  });

  models.onSelect(async (name) => {
    try {
      const model = await models.describe(name);
      if (name !== models.selected()) return;
      notice.hidden = model.chat;
      composer.hidden = !model.chat;
      if (!model.chat) {
        notice.replaceChildren(
          h(
            "p",
            {},
            h("strong", {}, `${name} is a base model`),
            ": it continues text but does not follow instructions. Try it in the Playground.",
          ),
          h("button.button.primary", { type: "button", onclick: () => goTo("playground") }, "Open the Playground"),
        );
      }
      if (!running) draw();
    } catch (error) {
      toast(error.message, "error");
    }
  });

  // -- conversations ---------------------------------------------------------------------------------------------------

  function startConversation() {
    openConversation(newConversation());
  }

  function openConversation(conversation) {
    stop();
    current = conversation;
    systemPrompt.value = conversation.system ?? "";
    draw();
    drawList();
  }

  function saveCurrent() {
    if (!current.messages.length) return;
    if (!conversations.includes(current)) conversations.unshift(current);
    current.updated = Date.now();
    current.title ||= titleOf(current.messages[0].content);
    conversations.sort((a, b) => b.updated - a.updated);
    if (!save("conversations", conversations)) {
      toast(
        "This conversation could not be saved: the browser's storage is full or disabled. " +
          "Export the conversation, or delete older ones.",
        "error",
      );
    }
    drawList();
  }

  async function deleteConversation(conversation) {
    const confirmed = await showDialog(
      "Delete this conversation?",
      h("p", {}, `“${conversation.title}” is stored only in this browser. It cannot be restored.`),
      [
        { label: "Cancel", value: false },
        { label: "Delete", value: true, danger: true },
      ],
    );
    if (!confirmed) return;
    conversations = conversations.filter((other) => other !== conversation);
    save("conversations", conversations);
    if (conversation === current) startConversation();
    drawList();
  }

  function drawList() {
    const rows = conversations.map((conversation) => {
      const onclick = () => {
        openConversation(conversation);
        showPanel("history", false);
      };
      const active = conversation === current ? "true" : undefined;
      const open = { type: "button", "aria-current": active, onclick };
      return h(
        "li",
        {},
        h("button.conversation", open, conversation.title || "…"),
        iconButton("trash", `Delete “${conversation.title}”`, () => deleteConversation(conversation)),
      );
    });
    const empty = h("li.empty", {}, "No conversations yet. They are stored only in this browser.");
    list.replaceChildren(...(rows.length ? rows : [empty]));
  }

  // The side panels cover the conversation on a narrow screen.
  function showPanel(id, shown) {
    const panel = document.getElementById(id);
    const wasShown = panel.classList.contains("open");
    panel.classList.toggle("open", shown);
    if (shown) panel.querySelector("button").focus();
    else if (wasShown) input.focus({ preventScroll: true });
  }

  // -- messages --------------------------------------------------------------------------------------------------------

  function sendMessage(text) {
    if (!text.trim() || running) return;
    current.messages.push({ role: "user", content: text.trim() });
    input.value = "";
    resizeInput();
    generateAnswer();
  }

  async function generateAnswer() {
    const conversation = current;
    saveCurrent(); // the question is kept even if the answer fails
    const messages = apiMessages(conversation);
    const message = { role: "assistant", content: "", model: models.selected() || undefined };
    conversation.messages.push(message);
    const controller = new AbortController();
    running = { controller, message };
    drawSendButton();
    draw();
    const element = log.lastElementChild;
    const markdown = new MarkdownView(element.querySelector(".body"), keepScrolled);
    const startTime = performance.now();
    let firstTokenTime = null;
    try {
      message.model = await models.waitForSelection();
      const body = { model: message.model, messages, ...sampling.requestFields() };
      for await (const chunk of streamCompletion("v1/chat/completions", body, controller.signal)) {
        if (!applyChunk(message, chunk)) continue;
        firstTokenTime ??= performance.now();
        element.classList.remove("waiting");
        markdown.show(message.content);
      }
    } catch (error) {
      if (error.name === "AbortError") message.finish = "stopped";
      else message.error = error.message;
    }
    const endTime = performance.now();
    message.seconds = (endTime - startTime) / 1000;
    if (firstTokenTime !== null) message.speed = decodingSpeed(message.usage, (endTime - firstTokenTime) / 1000);
    if (running?.message === message) {
      running = null;
      drawSendButton();
    }
    if (conversation !== current) {
      save("conversations", conversations); // another one was opened in the meantime
      return;
    }
    saveCurrent();
    keepScrolled(() => element.replaceWith(drawMessage(message, conversation.messages.length - 1)));
    announce(message.error ? `Error: ${message.error}` : `Answer: ${message.content.slice(0, ANNOUNCED)}`);
  }

  function stop() {
    running?.controller.abort();
  }

  function drawSendButton() {
    sendButton.replaceChildren(icon(running ? "stop" : "send"));
    sendButton.setAttribute("aria-label", running ? "Stop" : "Send");
    sendButton.title = running ? "Stop (Esc)" : "Send (Enter)";
  }

  // Replace the answer at `index`. Later messages are removed.
  function regenerate(index) {
    if (running) return;
    current.messages.length = index;
    generateAnswer();
  }

  function edit(index) {
    if (running) return;
    const message = current.messages[index];
    const isUser = message.role === "user";
    const area = h("textarea.edit", {
      value: message.content,
      rows: Math.min(MAX_EDIT_ROWS, message.content.split("\n").length + 1),
      "aria-label": isUser ? "Your message" : "Answer",
    });
    const apply = () => {
      if (!area.value.trim()) return;
      message.content = area.value.trim();
      if (isUser) {
        current.messages.length = index + 1;
        generateAnswer();
      } else {
        message.finish = "edited";
        saveCurrent();
        draw();
      }
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        draw();
      }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) apply();
    });
    const buttons = h(
      "div.buttons",
      {},
      h("button.button.primary", { type: "button", onclick: apply }, isUser ? "Send" : "Save"),
      h("button.button", { type: "button", onclick: draw }, "Cancel"),
      isUser && index < current.messages.length - 1 && h("span.help", {}, "Later messages will be replaced."),
    );
    log.children[index].querySelector(".body").replaceChildren(area, buttons);
    area.focus();
  }

  // -- drawing ---------------------------------------------------------------------------------------------------------

  function draw() {
    if (!current) return;
    log.replaceChildren(...current.messages.map(drawMessage));
    if (!current.messages.length) log.append(h("div.welcome", {}, notice.hidden ? drawSuggestions() : notice));
    else composer.before(notice);
    scrollToEnd();
  }

  function drawSuggestions() {
    const buttons = SUGGESTIONS.map((text) =>
      h("button.suggestion", { type: "button", onclick: () => sendMessage(text) }, text),
    );
    return [h("p.hello", {}, "Start a conversation"), h("div.suggestions", {}, buttons)];
  }

  function drawMessage(message, index) {
    const isUser = message.role === "user";
    const isRunning = running?.message === message;
    const waiting = isRunning && !message.content;
    const body = h("div.body");
    if (isUser) body.textContent = message.content;
    else if (message.content) new MarkdownView(body, keepScrolled).finish(message.content);
    if (waiting) {
      const dots = { role: "img", "aria-label": "Waiting for the first token" };
      body.append(h("span.dots", dots, h("i"), h("i"), h("i")));
    }
    const speaker = isUser ? "You" : (message.model ?? "Assistant");
    const name = `article.turn.${message.role}${waiting ? ".waiting" : ""}`;
    const element = h(name, { "aria-label": speaker }, h("header", {}, speaker), body);
    if (isRunning) return element;
    if (message.error) element.append(h("p.failed", { role: "alert" }, message.error));
    const actions = h(
      "div.actions",
      {},
      iconButton("copy", "Copy", () => copyText(message.content)),
      iconButton("edit", "Edit", () => edit(index)),
      !isUser && iconButton("regenerate", "Regenerate", () => regenerate(index)),
    );
    element.append(h("footer", {}, actions, !isUser && h("span.stats", {}, summarize(message))));
    return element;
  }

  function scrollToEnd() {
    scroller.scrollTop = scroller.scrollHeight;
  }

  // Make a change of the page. If the end of the conversation was in view before, it is in view afterwards.
  function keepScrolled(change) {
    const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
    change();
    if (atEnd) scrollToEnd();
  }

  function resizeInput() {
    input.style.height = "auto";
    input.style.height = `${Math.min(input.scrollHeight, MAX_INPUT_HEIGHT)}px`;
  }

  function onInputKeyDown(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!running) sendMessage(input.value);
    }
    if (event.key === "ArrowUp" && !input.value && !running) {
      const last = current.messages.findLastIndex((message) => message.role === "user");
      if (last >= 0) {
        event.preventDefault();
        edit(last);
      }
    }
  }

  function exportConversation(format) {
    if (!current.messages.length) {
      toast("There is nothing to export yet.");
      return;
    }
    const file = exportFile(current, format);
    download(file.name, file.text, file.type);
  }

  if (conversations.length) openConversation(conversations[0]);
  else startConversation();
  return {
    onShow: () => {
      if (matchMedia("(pointer: fine)").matches) input.focus({ preventScroll: true });
    },
    focus: () => input.focus(),
  };
}
