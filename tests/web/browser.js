// Stand-ins for the parts of a browser that the tests need: storage, responses of the server, an element.

// Local storage that can be full: it has room for `room` characters.
export class FakeStorage {
  items = new Map();
  room = Infinity;

  get length() {
    return this.items.size;
  }

  key(i) {
    return [...this.items.keys()][i] ?? null;
  }

  getItem(name) {
    return this.items.get(name) ?? null;
  }

  setItem(name, value) {
    const others = [...this.items].filter(([other]) => other !== name).map(([other, text]) => other + text);
    if (others.join("").length + name.length + value.length > this.room) {
      throw new DOMException("the quota is exceeded", "QuotaExceededError");
    }
    this.items.set(name, value);
  }

  removeItem(name) {
    this.items.delete(name);
  }
}

// Tabs of a browser, which share `storage`: run(tab, action) lets the tab act, and the others get the storage events.
export class FakeTabs {
  storage = new FakeStorage();
  #current = null;
  #listeners = []; // {tab, type, listener}

  constructor() {
    globalThis.localStorage = this.storage;
    globalThis.addEventListener = (type, listener) => this.#listeners.push({ tab: this.#current, type, listener });
  }

  run(tab, action) {
    const outer = this.#current;
    this.#current = tab;
    const before = new Map(this.storage.items);
    try {
      return action();
    } finally {
      const names = new Set([...before.keys(), ...this.storage.items.keys()]);
      const changes = [...names].filter((key) => before.get(key) !== this.storage.items.get(key));
      for (const key of changes) this.#tell(tab, "storage", { key, newValue: this.storage.getItem(key) });
      this.#current = outer;
    }
  }

  fire(tab, type) {
    for (const each of this.#listeners) if (each.tab === tab && each.type === type) each.listener({});
  }

  #tell(source, type, event) {
    for (const { tab, type: other, listener } of this.#listeners) {
      if (other === type && tab !== source) this.run(tab, () => listener(event));
    }
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
