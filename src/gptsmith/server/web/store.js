// What the browser keeps: JSON in its local storage, under names that begin with "gptsmith.". None of it is sent anywhere.

export function load(name, fallback) {
  try {
    const text = localStorage.getItem(`gptsmith.${name}`);
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}

// Return whether the value was stored: the storage may be full or disabled.
export function save(name, value) {
  try {
    localStorage.setItem(`gptsmith.${name}`, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
