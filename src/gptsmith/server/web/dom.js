// Building blocks of the page: elements, icons, dialogs, notices.

const SVG = "http://www.w3.org/2000/svg";

// Create an HTML element: h("button.primary", {type: "button", onclick: f, "aria-label": "Stop"}, "Stop", icon("stop"))
export function h(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || (value === false && key !== "spellcheck")) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "dataset") Object.assign(element.dataset, value);
    else if (key in element && key !== "list" && key !== "form") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  append(element, children);
  return element;
}

// Create an SVG element.
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) element.setAttribute(key, value);
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child !== undefined && child !== null && child !== false) element.append(child);
  }
}

// Replace the children of an element. Children that are undefined, null or false are left out.
export function setChildren(element, ...children) {
  element.replaceChildren();
  append(element, children);
  return element;
}

const ICONS = {
  send: "M4 12 20 4l-5 16-3.5-6.5L4 12Zm7.5 1.5L20 4",
  stop: "M7 7h10v10H7z",
  previous: "M14 6l-6 6 6 6",
  next: "M10 6l6 6-6 6",
  regenerate: "M5 12a7 7 0 1 0 2.2-5.1M5 4v4h4",
  edit: "M4 20h4L19 9l-4-4L4 16v4Zm9-13 4 4",
  copy: "M9 9h10v11H9zM5 15V4h10",
  trash: "M5 7h14M10 7V4h4v3m-7 0 1 13h8l1-13m-7 4v5m4-5v5",
  plus: "M12 5v14M5 12h14",
  download: "M12 4v11m-5-5 5 5 5-5M5 20h14",
  sliders:
    "M5 7h8m4 0h2M5 12h2m4 0h8M5 17h10m4 0h0M13 7a2 2 0 1 0 4 0 2 2 0 1 0-4 0M7 12a2 2 0 1 0 4 0 2 2 0 1 0-4 0M15 17a2 2 0 1 0 4 0 2 2 0 1 0-4 0",
  list: "M5 6h14M5 12h14M5 18h9",
  close: "M6 6l12 12M18 6 6 18",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8ZM12 3v2m0 14v2M3 12h2m14 0h2M5.6 5.6 7 7m10 10 1.4 1.4M5.6 18.4 7 17M17 7l1.4-1.4",
  moon: "M19 14.5A7.5 7.5 0 0 1 9.5 5a7.5 7.5 0 1 0 9.5 9.5Z",
  auto: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16Zm0 0v16M12 8h5.6M12 12h8M12 16h5.6",
  key: "M14 10a4 4 0 1 0-3.5 4L12 15.500h2V18h2v2h3v-3l-5.300-5.300A4 4 0 0 0 14 10Zm-5-.5h.01",
  help: "M9.500 9a2.500 2.500 0 1 1 3.600 2.300c-.8.4-1.100.9-1.100 1.700v.5m0 3h.01M12 3.500a8.500 8.500 0 1 0 0 17 8.500 8.500 0 0 0 0-17Z",
  chat: "M5 5h14v11h-8l-4 4v-4H5V5Z",
  play: "M8 5v14l11-7L8 5Z",
  eye: "M3 12s3.500-6 9-6 9 6 9 6-3.500 6-9 6-9-6-9-6Zm9-2.500a2.500 2.500 0 1 0 0 5 2.500 2.500 0 0 0 0-5Z",
  chart: "M4 4v16h16M7 15l4-5 3 3 5-7",
  columns: "M4 5h7v14H4zM13 5h7v14h-7z",
  picture: "M4 5h16v14H4zM4 16l4.500-5 4 4.500 2.500-2.500 5 5M15.500 9.500h.01",
  undo: "M9 7 5 11l4 4M5 11h9a5 5 0 0 1 0 10h-2",
};

export function icon(name) {
  return svg(
    "svg",
    { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", focusable: "false" },
    svg("path", { d: ICONS[name] }),
  );
}

export function iconButton(name, label, onclick, properties = {}) {
  return h(
    "button.icon-button",
    { type: "button", "aria-label": label, title: label, onclick, ...properties },
    icon(name),
  );
}

export const sleep = (milliseconds) =>
  new Promise((resolve) => {
    setTimeout(resolve, milliseconds);
  });

export function debounce(action, milliseconds) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), milliseconds);
  };
}

// Tell users of screen readers. Nothing is shown.
export function announce(text) {
  document.getElementById("live").textContent = text;
}

export function toast(text, kind = "note") {
  const element = h("div.toast", { dataset: { kind } }, text);
  document.getElementById("toasts").append(element);
  setTimeout(() => element.remove(), kind === "error" ? 8000 : 3500);
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea.sr", { value: text, "aria-hidden": "true" }); // there is no clipboard API over plain HTTP
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast("Copied");
}

export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000); // after the download has started
}

// Show a modal dialog with buttons. Resolve to the value of the chosen button, or to null if it is dismissed. A value that
// is a function is called when the button is pressed.
export function showDialog(title, body, buttons) {
  return new Promise((resolve) => {
    let answer = null;
    const titleId = `dialog-${Math.random().toString(36).slice(2)}`;
    const dialog = h(
      "dialog.dialog",
      { "aria-labelledby": titleId },
      h("h2", { id: titleId }, title),
      body,
      h(
        "div.buttons",
        {},
        buttons.map(({ label, value, primary, danger }) =>
          h(
            `button.button${primary ? ".primary" : ""}${danger ? ".danger" : ""}`,
            {
              type: "button",
              onclick: () => {
                answer = typeof value === "function" ? value() : value;
                dialog.close();
              },
            },
            label,
          ),
        ),
      ),
    );
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(answer);
    });
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target.tagName === "INPUT") {
        event.preventDefault();
        dialog.querySelector(".primary")?.click();
      }
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
