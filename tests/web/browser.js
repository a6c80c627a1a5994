// Stand-ins for the parts of a browser that the tests need: storage, responses of the server, an element.

// Local storage that can be full.
export class FakeStorage {
  items = new Map();
  full = false;

  getItem(name) {
    return this.items.get(name) ?? null;
  }

  setItem(name, value) {
    if (this.full) throw new DOMException("the quota is exceeded", "QuotaExceededError");
    this.items.set(name, value);
  }
}

// Replace fetch() by answer(path, options), for one test. Return the calls.
export function mockFetch(t, answer) {
  const calls = [];
  t.mock.method(globalThis, "fetch", async (path, options) => {
    calls.push({ path, ...options });
    return answer(path, options);
  });
  return calls;
}

export function jsonResponse(value, status = 200) {
  return new Response(JSON.stringify(value), { status, headers: { "content-type": "application/json" } });
}

// A response whose body arrives in these pieces; an Error among them breaks the connection. closed(): whether the
// client has closed it.
export function streamResponse(pieces) {
  const encoder = new TextEncoder();
  const remaining = [...pieces];
  let canceled = false;
  const body = new ReadableStream(
    {
      pull(controller) {
        const piece = remaining.shift();
        if (piece === undefined) controller.close();
        else if (piece instanceof Error) controller.error(piece);
        else controller.enqueue(typeof piece === "string" ? encoder.encode(piece) : piece);
      },
      cancel() {
        canceled = true;
      },
    },
    { highWaterMark: 0 },
  );
  return Object.assign(new Response(body, { status: 200 }), { closed: () => canceled });
}

// The part of an element that MarkdownView uses.
export class FakeElement {
  classes = new Set();
  classList = {
    add: (name) => this.classes.add(name),
    remove: (name) => this.classes.delete(name),
  };
  innerHTML = "";
  textContent = "";

  querySelectorAll() {
    return [];
  }
}

export async function collect(iterable) {
  const found = [];
  for await (const item of iterable) found.push(item);
  return found;
}
