// What the browser keeps: plain JSON under names that begin with "gptsmith.". Nothing of it is sent anywhere.

export function load(name, fallback) {
  try {
    const text = localStorage.getItem(`gptsmith.${name}`);
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}

// Whether it was kept: storage may be full, or switched off.
export function save(name, value) {
  try {
    localStorage.setItem(`gptsmith.${name}`, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
