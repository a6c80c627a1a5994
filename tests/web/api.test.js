import assert from "node:assert/strict";
import { test } from "node:test";

import { request, ServerError, streamCompletion, streamEvents } from "../../src/gptsmith/server/web/api.js";
import { collect, jsonResponse, mockFetch, streamResponse } from "./browser.js";

const sse = (...chunks) =>
  chunks.map((chunk) => `data: ${typeof chunk === "string" ? chunk : JSON.stringify(chunk)}\n\n`);

test("a request without a body is a GET, with a body a POST of JSON", async (t) => {
  const calls = mockFetch(t, () => jsonResponse({ answer: 42 }));
  assert.deepEqual(await request("api/runs"), { answer: 42 });
  assert.deepEqual(await request("api/markdown", { body: { text: "ä" } }), { answer: 42 });
  assert.deepEqual(
    calls.map(({ path, method, body }) => ({ path, method, body })),
    [
      { path: "api/runs", method: "GET", body: undefined },
      { path: "api/markdown", method: "POST", body: '{"text":"ä"}' },
    ],
  );
  assert.equal(calls[1].headers["content-type"], "application/json");
  assert.equal("authorization" in calls[0].headers, false);
});

test("an error of the server has its message, status and code", async (t) => {
  mockFetch(t, () => jsonResponse({ error: { message: "no such model", code: "model_not_found" } }, 404));
  await assert.rejects(request("v1/models"), { message: "no such model", status: 404, code: "model_not_found" });
});

test("an error that is not JSON is reported by its status", async (t) => {
  mockFetch(t, () => new Response("<h1>Bad gateway</h1>", { status: 502 }));
  await assert.rejects(request("v1/models"), { message: "The server responded with HTTP status 502.", status: 502 });
});

test("a lost connection has one message, before the response and during it", async (t) => {
  const lost = (error) =>
    error instanceof ServerError && error.message.startsWith("The connection to the server was lost.");
  mockFetch(t, () => {
    throw new TypeError("Failed to fetch");
  });
  await assert.rejects(request("v1/models"), lost);
  mockFetch(t, () => streamResponse(["data: 1\n\n", new TypeError("network error")]));
  const events = streamEvents("api/runs/a/events");
  assert.deepEqual((await events.next()).value, { event: "message", data: "1" });
  await assert.rejects(events.next(), lost);
});

test("an abort is an AbortError, before the response and during it", async (t) => {
  const abort = new DOMException("aborted", "AbortError");
  mockFetch(t, () => {
    throw abort;
  });
  await assert.rejects(request("v1/models"), { name: "AbortError" });
  mockFetch(t, () => streamResponse(["data: 1\n\n", abort]));
  await assert.rejects(collect(streamEvents("api/runs/a/events")), { name: "AbortError" });
});

test("characters that are split between two chunks are joined", async (t) => {
  const bytes = new TextEncoder().encode("data: 𝛼ß\n\n");
  mockFetch(t, () => streamResponse([...bytes].map((byte) => new Uint8Array([byte]))));
  assert.deepEqual(await collect(streamEvents("events")), [{ event: "message", data: "𝛼ß" }]);
});

test("a stream that is not read to its end is closed", async (t) => {
  const response = streamResponse(sse("1", "2", "3"));
  mockFetch(t, () => response);
  for await (const { data } of streamEvents("events")) if (data === "1") break;
  await new Promise((resolve) => {
    setTimeout(resolve, 20);
  });
  assert.equal(response.closed(), true);
});

test("a completion is requested as a stream with usage, and ends with [DONE]", async (t) => {
  const calls = mockFetch(t, () => streamResponse([...sse({ n: 1 }, { n: 2 }, "[DONE]", { n: 3 })]));
  assert.deepEqual(await collect(streamCompletion("v1/completions", { prompt: "a" })), [{ n: 1 }, { n: 2 }]);
  assert.deepEqual(JSON.parse(calls[0].body), {
    prompt: "a",
    stream: true,
    stream_options: { include_usage: true },
  });
  assert.equal(calls[0].headers.accept, "text/event-stream");
});

test("an error within a stream is raised", async (t) => {
  const error = { message: "timed out", code: "timeout", status: 504 };
  mockFetch(t, () => streamResponse(sse({ n: 1 }, { error })));
  const chunks = streamCompletion("v1/completions", {});
  assert.deepEqual((await chunks.next()).value, { n: 1 });
  await assert.rejects(chunks.next(), { message: "timed out", status: 504, code: "timeout" });
});
