// Which models there are, which is chosen, and what is known of it.

import { request } from "./api.js";
import { h, toast } from "./dom.js";
import { load, save } from "./store.js";

let names = [];
let fetching = null;
const descriptions = new Map();
const listeners = new Set();
const select = document.getElementById("model");

export const chosen = () => select.value;
export const onChoice = (listener) => listeners.add(listener);

// A promise of the chosen model's name: whoever writes before the server has said which there are waits for that.
export async function choice() {
  if (!select.value) await (fetching ?? fetchNames());
  if (!select.value) throw new Error("The server has not said which models it has. Reload the page to ask again.");
  return select.value;
}

// A promise of {name, parameters, layers, heads, context, vocabulary, tokens, chat, adapter}; the model is loaded for it.
export function describe(name) {
  if (!descriptions.has(name)) {
    const promise = request(`api/models/${name.split("/").map(encodeURIComponent).join("/")}`);
    promise.catch(() => descriptions.delete(name));
    descriptions.set(name, promise);
  }
  return descriptions.get(name);
}

export async function start() {
  document.getElementById("model-choice").hidden = false;
  select.addEventListener("change", () => {
    save("model", select.value);
    tell();
  });
  document.addEventListener("key-changed", (event) => { if (event.detail) fetchNames(); });
  await fetchNames();
}

function fetchNames() {
  fetching = takeNames().finally(() => { fetching = null; });
  return fetching;
}

async function takeNames() {
  try {
    names = (await request("v1/models")).data.map((card) => card.id);
  } catch (error) {
    toast(error.message, "error");
    return;
  }
  const before = select.value || load("model", "");
  select.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
  if (names.includes(before)) select.value = before;
  tell();
}

function tell() {
  if (select.value) for (const listener of listeners) listener(select.value);
}
