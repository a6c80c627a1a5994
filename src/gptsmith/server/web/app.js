// The shell: which view is shown, the theme, the keyboard.

import { askForKey, keyMatters } from "./api.js";
import { ask, h, icon } from "./dom.js";
import * as models from "./models.js";
import { load, save } from "./store.js";
import { mount as chat } from "./chat.js";
import { mount as inside } from "./inside.js";
import { mount as playground } from "./playground.js";
import { mount as runs } from "./runs.js";

const ALL = {
  chat: { title: "Chat", icon: "chat", mount: chat },
  playground: { title: "Playground", icon: "play", mount: playground },
  inside: { title: "Inside", icon: "eye", mount: inside },
  runs: { title: "Runs", icon: "chart", mount: runs },
};
const names = document.documentElement.dataset.views.split(" ").filter((name) => name in ALL);
const main = document.getElementById("main");
const tabs = document.getElementById("tabs");
const views = {};
let current = null;

for (const name of names) {
  const { title, icon: sign } = ALL[name];
  tabs.append(h("a.tab", { href: `#${name}`, id: `tab-${name}` }, icon(sign), h("span", {}, title)));
  const root = h(`div.view.view-${name}`, { hidden: true });
  main.append(root);
  views[name] = { root };
}
tabs.hidden = names.length < 2;

const go = (name) => { location.hash = name; };

function show() {
  const wanted = location.hash.slice(1);
  if (wanted === "main") return; // the skip link
  const name = names.includes(wanted) ? wanted : names.includes(load("view", "")) ? load("view", "") : names[0];
  if (name === current) return;
  for (const [other, view] of Object.entries(views)) {
    view.root.hidden = other !== name;
    const tab = document.getElementById(`tab-${other}`);
    if (other === name) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  views[current]?.control.hidden?.();
  current = name;
  save("view", name);
  document.title = `${ALL[name].title} · gptsmith`;
  views[name].control.shown?.();
}

for (const name of names) views[name].control = ALL[name].mount(views[name].root, { go });
addEventListener("hashchange", show);
show();
if (names.includes("chat")) models.start();

// -- theme -------------------------------------------------------------------------------------------------------------

const themeButton = document.getElementById("theme");
const THEMES = { auto: "as the system has it", light: "light", dark: "dark" };

function drawTheme() {
  const theme = document.documentElement.dataset.theme ?? "auto";
  themeButton.replaceChildren(icon({ auto: "auto", light: "sun", dark: "moon" }[theme]));
  themeButton.setAttribute("aria-label", `Theme: ${THEMES[theme]}`);
  themeButton.title = `Theme: ${THEMES[theme]}`;
}

themeButton.addEventListener("click", () => {
  const order = Object.keys(THEMES);
  const next = order[(order.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % order.length];
  try {
    if (next === "auto") {
      delete document.documentElement.dataset.theme;
      localStorage.removeItem("gptsmith.theme");
    } else {
      document.documentElement.dataset.theme = next;
      localStorage.setItem("gptsmith.theme", next); // plain, as theme.js reads it
    }
  } catch {
    // not kept, but shown
  }
  drawTheme();
  document.dispatchEvent(new CustomEvent("theme-changed"));
});
drawTheme();

// -- key and keyboard --------------------------------------------------------------------------------------------------

const keyButton = document.getElementById("key");
keyButton.append(icon("key"));
keyButton.addEventListener("click", () => askForKey());
keyButton.hidden = !keyMatters();
document.addEventListener("key-changed", () => { keyButton.hidden = !keyMatters(); });

const help = document.getElementById("help");
help.append(icon("help"));
help.addEventListener("click", showHelp);

function showHelp() {
  const rows = [
    ["/", "to the text field of the view"],
    ["Enter", "send a message (Shift+Enter: a new line)"],
    ["↑", "in an empty message: edit the last one"],
    ["Ctrl+Enter", "continue the prompt in the Playground"],
    ["Esc", "stop what is being written"],
    ["← →", "from token to token; Enter opens what else was possible"],
    ["Alt+1 … 4", "to the views"],
    ["?", "this"],
  ];
  ask("Keyboard", h("table.keys", {}, h("tbody", {}, rows.map(([keys, what]) =>
    h("tr", {}, h("th", { scope: "row" }, h("kbd", {}, keys)), h("td", {}, what))))), [{ label: "Close", value: null, primary: true }]);
}

addEventListener("keydown", (event) => {
  if (event.altKey && /^[1-9]$/.test(event.key) && names[event.key - 1]) {
    event.preventDefault();
    go(names[event.key - 1]);
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea, select") || document.querySelector("dialog[open]")) return;
  if (event.key === "/") {
    event.preventDefault();
    views[current].control.focus?.();
  } else if (event.key === "?") showHelp();
});
