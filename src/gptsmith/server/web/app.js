// The frame of the page: switching between views, the theme, keyboard shortcuts.

import { needsKeyButton, promptForKey } from "./api.js";
import { h, icon, showDialog } from "./dom.js";
import * as models from "./models.js";
import { load, save } from "./store.js";
import { mount as mountChat } from "./chat.js";
import { mount as mountCompare } from "./compare.js";
import { mount as mountInside } from "./inside.js";
import { mount as mountPlayground } from "./playground.js";
import { mount as mountRuns } from "./runs.js";

const VIEWS = {
  chat: { title: "Chat", icon: "chat", mount: mountChat },
  compare: { title: "Compare", icon: "columns", mount: mountCompare },
  playground: { title: "Playground", icon: "play", mount: mountPlayground },
  inside: { title: "Inside", icon: "eye", mount: mountInside },
  runs: { title: "Runs", icon: "chart", mount: mountRuns },
};
const viewNames = document.documentElement.dataset.views.split(" ").filter((view) => view in VIEWS);
const main = document.getElementById("main");
const tabs = document.getElementById("tabs");
const views = {}; // name -> {root, control}
let current = null;

for (const view of viewNames) {
  const { title, icon: iconName } = VIEWS[view];
  tabs.append(h("a.tab", { href: `#${view}`, id: `tab-${view}` }, icon(iconName), h("span", {}, title)));
  const root = h(`div.view.view-${view}`, { hidden: true });
  main.append(root);
  views[view] = { root };
}
tabs.hidden = viewNames.length < 2;

function goTo(view) {
  location.hash = view;
}

function showView() {
  const fromAddress = location.hash.slice(1);
  if (fromAddress === "main") return; // the skip link
  const view = [fromAddress, load("view", "")].find((candidate) => viewNames.includes(candidate)) ?? viewNames[0];
  if (view === current) return;
  for (const [other, { root }] of Object.entries(views)) {
    root.hidden = other !== view;
    const tab = document.getElementById(`tab-${other}`);
    if (other === view) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  views[current]?.control.onHide?.();
  current = view;
  save("view", view);
  document.title = `${VIEWS[view].title} · gptsmith`;
  views[view].control.onShow?.();
}

for (const view of viewNames) views[view].control = VIEWS[view].mount(views[view].root, { goTo });
addEventListener("hashchange", showView);
showView();
if (viewNames.includes("chat")) models.start();

// -- theme -------------------------------------------------------------------------------------------------------------

const THEMES = {
  auto: { label: "system", icon: "auto" },
  light: { label: "light", icon: "sun" },
  dark: { label: "dark", icon: "moon" },
};
const themeButton = document.getElementById("theme");
const currentTheme = () => document.documentElement.dataset.theme ?? "auto";

function drawTheme() {
  const theme = THEMES[currentTheme()];
  themeButton.replaceChildren(icon(theme.icon));
  themeButton.setAttribute("aria-label", `Theme: ${theme.label}`);
  themeButton.title = `Theme: ${theme.label}`;
}

themeButton.addEventListener("click", () => {
  const order = Object.keys(THEMES);
  const next = order[(order.indexOf(currentTheme()) + 1) % order.length];
  try {
    if (next === "auto") {
      delete document.documentElement.dataset.theme;
      localStorage.removeItem("gptsmith.theme");
    } else {
      document.documentElement.dataset.theme = next;
      localStorage.setItem("gptsmith.theme", next); // not JSON: theme.js reads it
    }
  } catch {
    // no storage: the theme lasts until a reload
  }
  drawTheme();
  document.dispatchEvent(new CustomEvent("theme-changed"));
});
drawTheme();

// -- API key and keyboard ----------------------------------------------------------------------------------------------

const keyButton = document.getElementById("key");
const updateKeyButton = () => {
  keyButton.hidden = !needsKeyButton();
};
keyButton.append(icon("key"));
keyButton.addEventListener("click", () => promptForKey());
document.addEventListener("key-changed", updateKeyButton);
updateKeyButton();

const helpButton = document.getElementById("help");
helpButton.append(icon("help"));
helpButton.addEventListener("click", showHelp);

const SHORTCUTS = [
  ["/", "focus the text field"],
  ["Enter", "send a message (Shift+Enter: new line)"],
  ["↑", "edit your last message (in an empty message field)"],
  ["Ctrl+Enter", "continue the prompt in the Playground"],
  ["Esc", "stop generating"],
  ["← →", "move between tokens; Enter shows alternatives"],
  ["1 2 T B E", "in Compare: choose an answer (or ← →), a tie, both bad, edit"],
  ["Alt+1 … 5", "switch view"],
  ["?", "show this list"],
];

function showHelp() {
  const rows = SHORTCUTS.map(([keys, action]) =>
    h("tr", {}, h("th", { scope: "row" }, h("kbd", {}, keys)), h("td", {}, action)),
  );
  const table = h("table.keys", {}, h("tbody", {}, rows));
  showDialog("Keyboard shortcuts", table, [{ label: "Close", value: null, primary: true }]);
}

addEventListener("keydown", (event) => {
  if (event.altKey && /^[1-9]$/.test(event.key) && viewNames[event.key - 1]) {
    event.preventDefault();
    goTo(viewNames[event.key - 1]);
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, textarea, select") || document.querySelector("dialog[open]")) return;
  if (event.key === "/") {
    event.preventDefault();
    views[current].control.focus?.();
  } else if (event.key === "?") showHelp();
});
