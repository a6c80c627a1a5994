// The chat view: conversations with a model. Answers are streamed, and can be stopped, generated again and edited.

import { Answers } from "./answers.js";
import { countTokens, fit, reserve } from "./context.js";
import {
  addMessage,
  answerState,
  apiMessages,
  branch,
  exportFile,
  newConversation,
  showBranch,
  titleOf,
  versions,
} from "./conversation.js";
import { ConversationStore } from "./conversations.js";
import { announce, debounce, download, h, icon, iconButton, showDialog, toast } from "./dom.js";
import * as models from "./models.js";
import { PictureInput } from "./pictures.js";
import { SamplingControls } from "./sampling.js";
import { drawTurn, editTurn } from "./turn.js";

const SUGGESTIONS = [
  "Explain what a transformer is to a curious ten-year-old.",
  "Write a short poem about the sea in winter.",
  "Give me three ideas for a quiet weekend.",
];
const MAX_INPUT_HEIGHT = 240; // pixels
const REDRAW_INTERVAL = 5000; // milliseconds, while another tab writes an answer
const COUNT_DELAY = 300; // milliseconds from a change to the count of tokens
const MAX_PICTURES = 8; // of a message
const ANNOUNCED = 400; // characters of an answer that a screen reader is given

export function mount(root, { goTo }) {
  let current = null; // joins the store with its first message
  let growing = null; // {message, turn} of the answer that is shown while this tab generates it
  let usable = true; // the selected model can chat
  const store = new ConversationStore({ onChange: onOtherTabChange, onDelete: onOtherTabDelete });
  const answers = new Answers({ save: (conversation) => store.save(conversation), onText });
  const sampling = new SamplingControls("chat");

  const list = h("ul.conversations", {});
  const systemPrompt = h("textarea", {
    id: "system",
    rows: 3,
    placeholder: "You are a helpful assistant.",
    oninput: () => {
      current.system = systemPrompt.value;
      saveCurrent();
      countContext();
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
    if (answers.in(current)) answers.stop(current);
    else sendMessage(input.value);
  };
  const chatMain = h("div.chat-main");
  const pictures = new PictureInput({
    limit: MAX_PICTURES,
    target: chatMain,
    refusal: () => `${models.selected()} reads text only: it takes no pictures.`,
  });
  const composer = h(
    "form.composer",
    { onsubmit: onSubmit },
    pictures.list,
    h("label.visually-hidden", { htmlFor: "message" }, "Message"),
    pictures.button,
    pictures.file,
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
  const meter = h("meter", { min: 0, id: "context" });
  const meterText = h("label", { htmlFor: "context" });
  const meterLine = h("div.context", { hidden: true }, meter, meterText);
  const scroller = h("div.scroller", {}, log);
  const title = h("h1.visually-hidden", {}, "Chat");
  chatMain.append(tools, scroller, notice, meterLine, composer);
  root.append(title, history, chatMain, settings);
  root.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (root.querySelector(".side.open")) ["history", "settings"].forEach((id) => showPanel(id, false));
    else answers.stop(current);
  });

  models.onSelect(async (name) => {
    try {
      const model = await models.describe(name);
      if (name !== models.selected()) return;
      notice.hidden = model.chat;
      composer.hidden = !model.chat;
      usable = model.chat;
      pictures.enabled = model.chat && model.image_tokens !== null;
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
      draw();
    } catch (error) {
      toast(error.message, "error");
    }
  });

  // -- conversations ---------------------------------------------------------------------------------------------------

  function startConversation() {
    openConversation(newConversation());
  }

  function openConversation(conversation) {
    current = conversation;
    systemPrompt.value = conversation.system ?? "";
    draw();
    scrollToEnd();
    drawList();
  }

  function saveCurrent() {
    const [first] = branch(current);
    if (!first) return;
    current.updated = Date.now();
    current.title ||= titleOf(first);
    keep(current);
  }

  function keep(conversation) {
    if (!store.save(conversation)) {
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
    store.delete(conversation);
    leave(conversation);
  }

  // A conversation is no longer stored.
  function leave(conversation) {
    answers.stop(conversation);
    if (conversation === current) startConversation();
    drawList();
  }

  function onOtherTabChange(conversation) {
    drawList();
    if (conversation !== current || log.querySelector(".edit")) return;
    if (document.activeElement !== systemPrompt) systemPrompt.value = conversation.system ?? "";
    keepScrolled(draw);
  }

  function onOtherTabDelete(conversation) {
    if (conversation === current) toast("This conversation was deleted in another tab.");
    leave(conversation);
  }

  function drawList() {
    const rows = store.list().map((conversation) => {
      const onclick = () => {
        openConversation(conversation);
        showPanel("history", false);
      };
      const active = conversation === current ? "true" : undefined;
      const open = { type: "button", "aria-current": active, onclick };
      const busy = answers.in(conversation) && h("span.visually-hidden", {}, " (being answered)");
      return h(
        `li${busy ? ".busy" : ""}`,
        {},
        h("button.conversation", open, conversation.title || "…", busy),
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
    const images = pictures.urls;
    if (!(text.trim() || images.length) || !canAnswer()) return;
    const fields = { role: "user", content: text.trim(), ...(images.length && { images }) };
    const question = addMessage(current, current.leaf, fields);
    input.value = "";
    pictures.set([]);
    resizeInput();
    generateAnswer(question);
  }

  function canAnswer() {
    if (answers.in(current)) return false;
    if (answers.canStart) return true;
    toast("Two other answers are being written. Wait for one, or stop it.", "error");
    return false;
  }

  // Add an answer to the message `question`, next to those that it may have.
  async function generateAnswer(question) {
    const conversation = current;
    const fields = { role: "assistant", content: "", model: models.selected() || undefined };
    const message = addMessage(conversation, question.id, fields);
    const done = answers.generate(conversation, message, (signal) => prepare(conversation, message, signal));
    saveCurrent(); // the question is kept even if the answer fails
    draw();
    scrollToEnd();
    await done;
    keep(conversation);
    if (conversation === current) keepScrolled(draw);
    announce(message.error ? `Error: ${message.error}` : `Answer: ${message.content.slice(0, ANNOUNCED)}`);
  }

  // Resolve to the request for an answer, without the oldest turns if the context is full.
  async function prepare(conversation, message, signal) {
    const model = (message.model = await models.waitForSelection());
    const fields = sampling.requestFields();
    const count = (messages) => countTokens(model, messages, signal);
    const { messages, dropped, room } = await fit(apiMessages(conversation, message.parent), fields.max_tokens, count);
    if (dropped) message.dropped = dropped;
    const max_tokens = Math.min(fields.max_tokens, room);
    return { body: { model, messages, ...fields, max_tokens }, full: max_tokens < fields.max_tokens };
  }

  function onText(conversation, message) {
    if (message !== growing?.message) return; // another conversation is shown
    const { element, markdown, reasoning } = growing.turn;
    reasoning.show(message.reasoning, !message.content);
    if (!message.content) return;
    element.classList.remove("waiting");
    markdown.show(message.content);
  }

  function drawSendButton() {
    const running = answers.in(current);
    sendButton.replaceChildren(icon(running ? "stop" : "send"));
    sendButton.setAttribute("aria-label", running ? "Stop" : "Send");
    sendButton.title = running ? "Stop (Esc)" : "Send (Enter)";
  }

  function regenerate(message) {
    if (canAnswer()) generateAnswer(current.messages[message.parent]);
  }

  // An edited message is a new version of it. The messages after it stay with the old one.
  function edit(message, element) {
    if (answers.in(current)) return;
    editTurn(element, message, {
      hasMore: message.id !== current.leaf,
      onCancel: draw,
      onApply: (content) => {
        if (message.role === "user") {
          const { images } = message;
          if (canAnswer()) generateAnswer(addMessage(current, message.parent, { role: "user", content, images }));
          return;
        }
        addMessage(current, message.parent, { role: message.role, content, model: message.model, finish: "edited" });
        saveCurrent();
        draw();
      },
    });
  }

  function showVersion(message) {
    showBranch(current, message);
    store.save(current);
    draw();
  }

  // -- drawing ---------------------------------------------------------------------------------------------------------

  function draw() {
    if (!current) return;
    const running = answers.in(current);
    growing = null;
    const shown = branch(current);
    const elements = shown.map((message) => {
      const turn = drawTurn(message, {
        running: message === running,
        versions: versions(current, message),
        wrap: keepScrolled,
        onEdit: (element) => edit(message, element),
        onRegenerate: () => regenerate(message),
        onShow: showVersion,
        onInspect: () => {
          const detail = { image: message.images[0], text: message.content };
          document.dispatchEvent(new CustomEvent("look-inside", { detail }));
          goTo("inside");
        },
      });
      if (message === running) growing = { message, turn };
      return turn.element;
    });
    log.replaceChildren(...elements);
    if (!shown.length) log.append(h("div.welcome", {}, notice.hidden ? drawSuggestions() : notice));
    else meterLine.before(notice);
    drawSendButton();
    countContext();
    if (shown.some((message) => message !== running && isGrowing(message))) redrawLater();
  }

  const isGrowing = (message) => message.role === "assistant" && answerState(message) === "growing";

  // Another tab writes an answer. If it was closed, the answer is marked as interrupted.
  const redrawLater = debounce(() => {
    if (!log.querySelector(".edit")) keepScrolled(draw);
  }, REDRAW_INTERVAL);

  function drawSuggestions() {
    const buttons = SUGGESTIONS.map((text) =>
      h("button.suggestion", { type: "button", onclick: () => sendMessage(text) }, text),
    );
    return [h("p.hello", {}, "Start a conversation"), h("div.suggestions", {}, buttons)];
  }

  // Show how much of the context the conversation fills.
  const countContext = debounce(async () => {
    const messages = apiMessages(current);
    const shown = current;
    if (shown.leaf && isGrowing(shown.messages[shown.leaf])) return; // counted when the answer has ended
    try {
      if (!current.leaf || !models.selected() || !usable) throw new Error("there is nothing to count");
      const { count, max_model_len: context } = await countTokens(models.selected(), messages);
      if (shown !== current) return;
      const limit = context - reserve(sampling.values.max_tokens, context);
      Object.assign(meter, { max: context, high: limit, optimum: 0, value: count });
      const full = count > limit ? "; the next answer leaves out the oldest turns" : "";
      meterText.textContent = `${count.toLocaleString("en")} of ${context.toLocaleString("en")} tokens${full}`;
      keepScrolled(() => (meterLine.hidden = false));
    } catch {
      meterLine.hidden = true; // the meter is a help; the answer itself reports what is wrong
    }
  }, COUNT_DELAY);

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
      sendMessage(input.value);
    }
    if (event.key === "ArrowUp" && !input.value) {
      const shown = branch(current);
      const last = shown.findLastIndex((message) => message.role === "user");
      if (last >= 0) {
        event.preventDefault();
        edit(shown[last], log.children[last]);
      }
    }
  }

  function exportConversation(format) {
    if (!current.leaf) {
      toast("There is nothing to export yet.");
      return;
    }
    const file = exportFile(current, format);
    download(file.name, file.text, file.type);
  }

  openConversation(store.list()[0] ?? newConversation());
  return {
    onShow: () => {
      if (matchMedia("(pointer: fine)").matches) input.focus({ preventScroll: true });
    },
    focus: () => input.focus(),
  };
}
