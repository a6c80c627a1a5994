import assert from "node:assert/strict";
import { test } from "node:test";

import { EventStreamParser } from "../../src/gptsmith/server/web/sse.js";

function parse(pieces) {
  const parser = new EventStreamParser();
  return pieces.flatMap((piece) => [...parser.push(piece)]);
}

const STREAM = 'event: snapshot\ndata: {"a": 1}\n\n: a comment\nid: 7\ndata:two\ndata:  lines\n\ndata: [DONE]\n\n';
const EVENTS = [
  { event: "snapshot", data: '{"a": 1}' },
  { event: "message", data: "two\n lines" },
  { event: "message", data: "[DONE]" },
];

test("events have a name and data", () => {
  assert.deepEqual(parse([STREAM]), EVENTS);
});

test("every line ending of the standard is understood", () => {
  assert.deepEqual(parse([STREAM.replaceAll("\n", "\r\n")]), EVENTS);
  assert.deepEqual(parse([`${STREAM.replaceAll("\n", "\r")}:\r`]), EVENTS);
});

test("the pieces of a stream may end anywhere", () => {
  for (const stream of [STREAM, STREAM.replaceAll("\n", "\r\n")]) {
    for (let cut = 0; cut <= stream.length; cut++) {
      assert.deepEqual(parse([stream.slice(0, cut), stream.slice(cut)]), EVENTS, `cut at ${cut}`);
    }
    assert.deepEqual(parse([...stream]), EVENTS);
  }
});

test("an event without data, and one that is not complete, are not reported", () => {
  assert.deepEqual(parse(["event: ping\n\ndata: kept\n\ndata: never ended\n"]), [{ event: "message", data: "kept" }]);
});
