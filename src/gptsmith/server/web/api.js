// The server: JSON in and out, server-sent events, and the key, which lives as long as the tab.

import { ask, h } from "./dom.js";

const KEY = "gptsmith.key";
let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // no storage: the key is asked for again after a reload
}
let asking = null;
let declined = false; // who has closed the question is not asked again and again

export class ServerError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const keyMatters = () => key !== "" || declined;

export function askForKey(why = "Requests to this server need a key. It is kept until this tab is closed.") {
  asking ??= (async () => {
    const field = h("input", { type: "password", id: "api-key", autocomplete: "off", value: key, spellcheck: false });
    const answer = await ask("API key", h("div.stack", {}, h("p", {}, why), h("label", { htmlFor: "api-key" }, "Key"), field), [
      { label: "Cancel", value: null },
      { label: "Use this key", value: () => field.value.trim(), primary: true },
    ]);
    if (answer !== null) {
      key = answer;
      try {
        sessionStorage.setItem(KEY, key);
      } catch {
        // as above
      }
    }
    declined = answer === null && key === "";
    document.dispatchEvent(new CustomEvent("key-changed", { detail: answer !== null }));
    asking = null;
    return answer !== null;
  })();
  return asking;
}

async function send(path, { body, signal, accept = "application/json" } = {}) {
  const headers = { accept };
  if (body !== undefined) headers["content-type"] = "application/json";
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST", headers, signal, cache: "no-store",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?", 0);
  }
  if (response.ok) return response;
  let details = {};
  try {
    details = (await response.json()).error ?? {};
  } catch {
    // no JSON: the status says what there is to say
  }
  throw new ServerError(details.message ?? `The server answered with ${response.status}.`, response.status, details.code);
}

async function sendWithKey(path, options) {
  try {
    return await send(path, options);
  } catch (error) {
    if (error.status === 401 && !declined && (await askForKey(key ? "The server does not accept this key." : undefined))) {
      return send(path, options);
    }
    throw error;
  }
}

// JSON of a GET, or of a POST where there is a body.
export async function request(path, options) {
  return (await sendWithKey(path, options)).json();
}

// Server-sent events, as {event, data}; ends with the stream. Aborting the signal ends it with an AbortError.
export async function* events(path, options) {
  const response = await sendWithKey(path, { ...options, accept: "text/event-stream" });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let event = "message";
  let data = [];
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      const lines = text.split(/\r\n|\n|\r(?!$)/);
      text = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { event, data: data.join("\n") };
          event = "message";
          data = [];
        } else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line.startsWith("event:")) event = line.slice(6).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the server is to know that nobody listens any more
  }
}

// The chunks of a streamed completion.
export async function* completion(path, body, signal) {
  for await (const { data } of events(path, { body: { ...body, stream: true, stream_options: { include_usage: true } }, signal })) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, chunk.error.status ?? 500, chunk.error.code);
    yield chunk;
  }
}
