import assert from "node:assert/strict";
import { test } from "node:test";

import { MarkdownView } from "../../src/gptsmith/server/web/markdown.js";
import { FakeElement, jsonResponse, mockFetch } from "./browser.js";

const render = (path, { body }) => jsonResponse({ html: `<p>${JSON.parse(body).text}</p>` });

test("plain text is shown until the server has rendered it", async (t) => {
  mockFetch(t, render);
  const element = new FakeElement();
  const view = new MarkdownView(element);
  view.show("plain first");
  assert.equal(element.textContent, "plain first");
  assert.equal(element.classes.has("plain"), true);
  await view.finish("plain first");
  assert.equal(element.innerHTML, "<p>plain first</p>");
  assert.equal(element.classes.has("plain"), false);
});

test("a growing text is rendered by one request at a time, and its last version is shown", async (t) => {
  const calls = mockFetch(t, render);
  const element = new FakeElement();
  const view = new MarkdownView(element);
  for (const text of ["grow", "growi", "growin"]) view.show(text);
  await view.finish("growing");
  assert.equal(element.innerHTML, "<p>growing</p>");
  assert.deepEqual(
    calls.map(({ body }) => JSON.parse(body).text),
    ["grow", "growing"],
  );
});

test("a text that was rendered before is not rendered again", async (t) => {
  const calls = mockFetch(t, render);
  await new MarkdownView(new FakeElement()).finish("once");
  const element = new FakeElement();
  await new MarkdownView(element).finish("once");
  assert.equal(element.innerHTML, "<p>once</p>");
  assert.equal(calls.length, 1);
});

test("the text stays plain if the server cannot render it", async (t) => {
  mockFetch(t, () => new Response("", { status: 500 }));
  const element = new FakeElement();
  await new MarkdownView(element).finish("<b>not HTML</b>");
  assert.equal(element.textContent, "<b>not HTML</b>");
  assert.equal(element.innerHTML, "");
});

test("every change goes through the wrapper", async (t) => {
  mockFetch(t, render);
  let changes = 0;
  const wrap = (change) => {
    changes++;
    change();
  };
  await new MarkdownView(new FakeElement(), wrap).finish("wrapped");
  assert.equal(changes, 2); // plain, rendered
});
