// What the browser keeps: JSON in its local storage, under names that begin with "gptsmith.". None of it is sent anywhere.

const PREFIX = "gptsmith.";

export function load(name, fallback) {
  try {
    return parse(localStorage.getItem(PREFIX + name), fallback);
  } catch {
    return fallback;
  }
}

// Return whether the value was stored: the storage may be full or disabled.
export function save(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export function remove(name) {
  try {
    localStorage.removeItem(PREFIX + name);
  } catch {
    // no storage: there is nothing to remove
  }
}

// The stored names that begin with `start`.
export function names(start) {
  try {
    const keys = Array.from({ length: localStorage.length }, (_, i) => localStorage.key(i));
    return keys.filter((key) => key.startsWith(PREFIX + start)).map((key) => key.slice(PREFIX.length));
  } catch {
    return [];
  }
}

// Call listener(name, value) when another tab has stored a value, or removed it: then it is null.
export function onOtherTab(listener) {
  addEventListener("storage", ({ key, newValue }) => {
    if (key?.startsWith(PREFIX)) listener(key.slice(PREFIX.length), parse(newValue, null));
  });
}

function parse(text, fallback) {
  try {
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}
