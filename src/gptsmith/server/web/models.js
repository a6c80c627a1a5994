// The models that the server offers, which of them is selected, and what is known about each.

import { request } from "./api.js";
import { h, toast } from "./dom.js";
import { load, save } from "./store.js";

let loading = null; // a promise while the list of models is being fetched
const descriptions = new Map();
const listeners = new Set();
const menu = () => document.getElementById("model");

export const selected = () => menu().value;
export const names = () => [...menu().options].map((option) => option.value);
export const onSelect = (listener) => listeners.add(listener);

// Resolve to the name of the selected model, as soon as the list of models is known.
export async function waitForSelection() {
  if (!selected()) await (loading ?? fetchNames());
  if (!selected()) throw new Error("The list of models could not be loaded. Reload the page to try again.");
  return selected();
}

// Resolve to {name, parameters, layers, heads, context, vocabulary, tokens, chat, image_tokens, adapter}. The server loads the model.
export function describe(name) {
  if (!descriptions.has(name)) {
    const promise = request(`api/models/${name.split("/").map(encodeURIComponent).join("/")}`);
    promise.catch(() => descriptions.delete(name)); // the next call tries again
    descriptions.set(name, promise);
  }
  return descriptions.get(name);
}

export async function start() {
  document.getElementById("model-choice").hidden = false;
  menu().addEventListener("change", () => {
    save("model", selected());
    notify();
  });
  document.addEventListener("key-changed", (event) => {
    if (event.detail) fetchNames();
  });
  await fetchNames();
}

function fetchNames() {
  loading = loadNames().finally(() => {
    loading = null;
  });
  return loading;
}

async function loadNames() {
  let found;
  try {
    found = (await request("v1/models")).data.map((card) => card.id);
  } catch (error) {
    toast(error.message, "error");
    return;
  }
  const previous = selected() || load("model", "");
  menu().replaceChildren(...found.map((name) => h("option", { value: name }, name)));
  if (found.includes(previous)) menu().value = previous;
  notify();
}

function notify() {
  if (selected()) for (const listener of listeners) listener(selected());
}
