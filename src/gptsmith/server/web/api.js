// Requests to the server: JSON, server-sent events, and the API key, which is kept as long as the tab is open.

import { h, showDialog } from "./dom.js";
import { EventStreamParser } from "./sse.js";

const KEY = "gptsmith.key";
const CONNECTION_LOST = "The connection to the server was lost. Check that the server is running, then try again.";

let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // no storage: the key is asked for again after a reload
}
let openPrompt = null; // a promise while the dialog is open
let declined = false; // the dialog was closed without a key: do not open it again by itself

export class ServerError extends Error {
  // status: the HTTP status; 0 if there was no response.
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const needsKeyButton = () => key !== "" || declined;

// Ask for the API key. Resolve to whether one was given.
export function promptForKey(reason = "This server requires an API key. The key is kept until you close this tab.") {
  openPrompt ??= showKeyDialog(reason).finally(() => {
    openPrompt = null;
  });
  return openPrompt;
}

async function showKeyDialog(reason) {
  const field = h("input", { type: "password", id: "api-key", autocomplete: "off", value: key, spellcheck: false });
  const body = h("div.stack", {}, h("p", {}, reason), h("label", { htmlFor: "api-key" }, "Key"), field);
  const answer = await showDialog("API key", body, [
    { label: "Cancel", value: null },
    { label: "Use key", value: () => field.value.trim(), primary: true },
  ]);
  if (answer !== null) {
    key = answer;
    try {
      sessionStorage.setItem(KEY, key);
    } catch {
      // no storage: the key lasts until a reload
    }
  }
  declined = answer === null && key === "";
  document.dispatchEvent(new CustomEvent("key-changed", { detail: answer !== null }));
  return answer !== null;
}

async function send(path, { body, signal, accept = "application/json" } = {}) {
  const headers = { accept };
  if (body !== undefined) headers["content-type"] = "application/json";
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      signal,
      cache: "no-store",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(CONNECTION_LOST, 0);
  }
  if (response.ok) return response;
  let details = {};
  try {
    details = (await response.json()).error ?? {};
  } catch {
    // not JSON: the status has to do
  }
  const message = details.message ?? `The server responded with HTTP status ${response.status}.`;
  throw new ServerError(message, response.status, details.code);
}

async function sendWithKey(path, options) {
  try {
    return await send(path, options);
  } catch (error) {
    const canAsk = error.status === 401 && !declined;
    if (canAsk && (await promptForKey(key ? "The server rejected this key." : undefined))) return send(path, options);
    throw error;
  }
}

// Return the JSON of a GET request, or of a POST request if options has a body.
export async function request(path, options) {
  return (await sendWithKey(path, options)).json();
}

// Yield the server-sent events of a response, as {event, data}. An abort of the signal raises an AbortError.
export async function* streamEvents(path, options) {
  const response = await sendWithKey(path, { ...options, accept: "text/event-stream" });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new EventStreamParser();
  try {
    while (true) {
      const { value, done } = await read(reader);
      if (done) return;
      yield* parser.push(value);
    }
  } finally {
    reader.cancel().catch(() => {}); // closes the connection, so that the server stops generating
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(CONNECTION_LOST, 0);
  }
}

// Yield the chunks of a streamed completion.
export async function* streamCompletion(path, body, signal) {
  const options = { body: { ...body, stream: true, stream_options: { include_usage: true } }, signal };
  for await (const { data } of streamEvents(path, options)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, chunk.error.status ?? 500, chunk.error.code);
    yield chunk;
  }
}
