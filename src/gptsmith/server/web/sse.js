// A parser of server-sent events (the "event stream format" of the HTML standard). No DOM.

export class EventStreamParser {
  #buffer = "";
  #event = "message";
  #data = [];

  // Yield every event, as {event, data}, that this piece of the stream completes.
  *push(text) {
    this.#buffer += text;
    const lines = this.#buffer.split(/\r\n|\n|\r(?!$)/); // a final \r may be the first half of \r\n
    this.#buffer = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) yield { event: this.#event, data: this.#data.join("\n") };
        this.#event = "message";
        this.#data = [];
      } else if (line.startsWith("data:")) this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      else if (line.startsWith("event:")) this.#event = line.slice(6).trim();
    }
  }
}
