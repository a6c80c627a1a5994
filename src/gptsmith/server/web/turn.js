// One message of a conversation on the page.

import { answerState, summarize } from "./conversation.js";
import { copyText, h, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { ReasoningView } from "./reasoning.js";

const MAX_EDIT_ROWS = 12;

// running: this tab is generating the message. versions: the messages at its place. wrap: as of MarkdownView.
// onEdit(element), onRegenerate(), onShow(version), onInspect(): what the buttons do. Return {element, markdown, reasoning};
// markdown and reasoning render the text of an answer, and what the model thought before it.
export function drawTurn(message, { running, versions, wrap, onEdit, onRegenerate, onShow, onInspect }) {
  const isUser = message.role === "user";
  const state = isUser ? "ended" : answerState(message);
  const waiting = running && !message.content;
  const body = h("div.body");
  const markdown = new MarkdownView(body, wrap);
  if (isUser) body.append(...drawPictures(message), message.content);
  else if (running && message.content) markdown.show(message.content);
  else if (message.content) markdown.finish(message.content);
  if (waiting) {
    const dots = { role: "img", "aria-label": "Waiting for the answer" };
    body.append(h("span.dots", dots, h("i"), h("i"), h("i")));
  }
  const reasoning = new ReasoningView(message, wrap);
  reasoning.show(message.reasoning, waiting);
  const speaker = isUser ? "You" : (message.model ?? "Assistant");
  const name = `article.turn.${message.role}${waiting ? ".waiting" : ""}`;
  const element = h(name, { "aria-label": speaker }, h("header", {}, speaker), reasoning.element, body);
  const turn = { element, markdown, reasoning };
  if (running) return turn;
  if (state === "growing") {
    element.append(h("footer", {}, h("span.stats", {}, "being written in another tab …")));
    return turn;
  }
  if (message.error) element.append(h("p.failed", { role: "alert" }, message.error));
  const unfinished = state === "interrupted" || message.error;
  const actions = h(
    "div.actions",
    {},
    iconButton("copy", "Copy", () => copyText(message.content)),
    iconButton("edit", "Edit", () => onEdit(element)),
    message.images?.length && iconButton("eye", "Look inside: where the model looks in the picture", onInspect),
    !isUser && !unfinished && iconButton("regenerate", "Answer again", onRegenerate),
  );
  const again = { type: "button", onclick: onRegenerate };
  element.append(
    h(
      "footer",
      {},
      versions.length > 1 && drawVersions(message, versions, onShow),
      actions,
      !isUser && h("span.stats", {}, summarize(message)),
      unfinished && h("button.button.quiet", again, "Answer again"),
    ),
  );
  return turn;
}

function drawPictures({ images = [] }) {
  if (!images.length) return [];
  const alt = (i) => (images.length > 1 ? `Picture ${i + 1} of ${images.length}` : "Picture");
  return [
    h(
      "div.pictures",
      {},
      images.map((url, i) => h("img", { src: url, alt: alt(i) })),
    ),
  ];
}

// The buttons that step through the versions of a message.
function drawVersions(message, versions, onShow) {
  const index = versions.indexOf(message);
  const step = (name, label, other) =>
    iconButton(name, label, () => onShow(other), { disabled: !other, className: "icon-button step" });
  return h(
    "div.versions",
    { role: "group", "aria-label": `Version ${index + 1} of ${versions.length}` },
    step("previous", "Previous version", versions[index - 1]),
    h("span", { "aria-hidden": "true" }, `${index + 1} / ${versions.length}`),
    step("next", "Next version", versions[index + 1]),
  );
}

// Let the person edit a message in its place. onApply(text); onCancel(). hasMore: other messages follow.
export function editTurn(element, message, { hasMore, onApply, onCancel }) {
  const isUser = message.role === "user";
  const area = h("textarea.edit", {
    value: message.content,
    rows: Math.min(MAX_EDIT_ROWS, message.content.split("\n").length + 1),
    "aria-label": isUser ? "Your message" : "Answer",
  });
  const apply = () => {
    if (area.value.trim() || message.images?.length) onApply(area.value.trim());
  };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      onCancel();
    }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) apply();
  });
  const buttons = h(
    "div.buttons",
    {},
    h("button.button.primary", { type: "button", onclick: apply }, isUser ? "Send" : "Save"),
    h("button.button", { type: "button", onclick: onCancel }, "Cancel"),
    hasMore && h("span.help", {}, "Later messages stay with the earlier version."),
  );
  element.querySelector(".body").replaceChildren(area, buttons);
  area.focus();
}
