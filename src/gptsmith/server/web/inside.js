// What happens inside, for a short text: attention, the logit lens, what comes next.

import { request } from "./api.js";
import { debounce, h, percent, visible } from "./dom.js";
import * as models from "./models.js";
import { load, save } from "./store.js";
import { bar, shade } from "./tokens.js";

const TOP = 12;

export function mount(root) {
  let found = null; // the answer to the last question
  let about = null; // the model
  let layer = 0;
  let head = 0;
  let row = 0; // the token whose view is shown
  let asked = 0;
  let controller = null;

  const text = h("input", { id: "inside-text", type: "text", maxLength: 400, spellcheck: false, autocomplete: "off",
    value: load("inside.text", "The cat sat on the mat and the dog sat on the"), oninput: () => { save("inside.text", text.value); lookSoon(); } });
  const status = h("p.help", { role: "status" });
  const strip = h("div.strip", { role: "listbox", "aria-label": "Tokens; choose the one whose view is shown", onkeydown: stripKeys });
  const layerInput = h("input", { id: "layer", type: "range", min: 0, max: 0, step: 1, value: 0, oninput: () => {
    layer = Number(layerInput.value);
    layerOut.textContent = layerName();
    layerSoon();
  } });
  const layerOut = h("output", { htmlFor: "layer" });
  const heads = h("div.heads", { role: "radiogroup", "aria-label": "Head", onkeydown: headKeys });
  const map = h("canvas.map", { tabIndex: 0, role: "img", onpointermove: (event) => point(event, false), onpointerdown: (event) => point(event, true),
    onpointerleave: () => tip.hidden = true, onkeydown: mapKeys });
  const mapBox = h("div.map-box", {}, map);
  const probe = h("span", { hidden: true });
  const tip = h("div.tip", { hidden: true, "aria-hidden": "true" });
  const attended = h("ol.bars", {});
  const attendedTitle = h("h3", {});
  const next = h("ol.bars", {});
  const nextTitle = h("h3", {});
  const lens = h("div.lens", { tabIndex: 0, role: "region", "aria-label": "The logit lens" });
  const form = h("form.card.stack", { onsubmit: (event) => { event.preventDefault(); look(); } },
    h("label.title", { htmlFor: "inside-text" }, "A short text"),
    h("div.row", {}, text, h("button.button.primary", { type: "submit" }, "Look inside")),
    strip, status);
  const results = h("div.inside-grid", { hidden: true },
    h("section.card.attention", { "aria-labelledby": "attention-title" },
      h("h2", { id: "attention-title" }, "Attention"),
      h("p.help", {}, "Each row is a token that looks, each column one it may look at: itself and the past. What is hatched lies in the future, and the causal mask hides it."),
      h("div.control.layer-control", {}, h("div.control-head", {}, h("label", { htmlFor: "layer" }, "Layer"), layerOut), layerInput),
      heads, mapBox, h("div.map-legend", { "aria-hidden": "true" }, h("span.ramp", {}), h("span", {}, "0% to 100%"), h("span.hatch", {}), h("span", {}, "masked"))),
    h("div.stack", {},
      h("section.card", { "aria-labelledby": "looks-title" }, Object.assign(attendedTitle, { id: "looks-title" }), attended),
      h("section.card", { "aria-labelledby": "next-title" }, Object.assign(nextTitle, { id: "next-title" }), next)),
    h("section.card.lens-card", { "aria-labelledby": "lens-title" },
      h("h2", { id: "lens-title" }, "The logit lens"),
      h("p.help", {}, "What each layer would say comes next, were it the last one. Read a column from below: the guess forms on its way up. A frame marks a right guess."),
      lens));
  root.append(
    h("div.view-head", {}, h("h1", {}, "Inside"),
      h("p.lead", {}, "A GPT reads from left to right. See whom each token looks at, and how a guess at the next one takes shape from layer to layer.")),
    form, results, tip, probe);
  new ResizeObserver(() => { if (found) drawMap(); }).observe(mapBox);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  document.addEventListener("theme-changed", redraw);

  models.onChoice(async (name) => {
    status.textContent = `Loading ${name} …`;
    try {
      about = await models.describe(name);
      layerInput.max = about.layers - 1;
      layer = Math.min(layer, about.layers - 1);
      layerInput.value = layer;
      head = Math.min(head, about.heads - 1);
      layerOut.textContent = layerName();
      if (!root.hidden) look();
      else found = null;
    } catch (error) {
      fail(error);
    }
  });

  const lookSoon = debounce(look, 400);
  const layerSoon = debounce(lookAtLayer, 60);
  const layerName = () => `${layer + 1} of ${about?.layers ?? "…"}`;

  async function ask(parts) {
    const number = ++asked;
    controller?.abort();
    controller = new AbortController();
    const answer = await request("api/inside", {
      body: { model: models.chosen(), text: text.value, layer, top: TOP, parts }, signal: controller.signal,
    });
    return number === asked ? answer : null;
  }

  async function look() {
    if (!about) return;
    if (!text.value) {
      status.textContent = "Write a few words.";
      return;
    }
    results.classList.add("working");
    try {
      const answer = await ask(["attention", "lens", "next"]);
      if (!answer) return;
      found = answer;
      row = found.tokens.length - 1;
      head = Math.min(head, found.heads - 1);
      results.hidden = false;
      status.textContent = `${found.tokens.length} tokens · ${found.layers} layers with ${found.heads} heads each`;
      draw();
    } catch (error) {
      fail(error);
    } finally {
      results.classList.remove("working");
    }
  }

  async function lookAtLayer() {
    if (!found) return;
    try {
      const answer = await ask(["attention"]);
      if (!answer) return;
      found.attention = answer.attention;
      drawAttention();
    } catch (error) {
      fail(error);
    }
  }

  function fail(error) {
    if (error.name !== "AbortError") status.textContent = error.message;
  }

  // -- drawing ---------------------------------------------------------------------------------------------------------

  function draw() {
    drawStrip();
    drawAttention();
    drawLens();
    drawNext();
  }

  function redraw() {
    if (found) requestAnimationFrame(drawAttention);
  }

  function choose(index, focus = false) {
    row = Math.max(0, Math.min(found.tokens.length - 1, index));
    [...strip.children].forEach((child, i) => {
      child.setAttribute("aria-selected", String(i === row));
      child.tabIndex = i === row ? 0 : -1;
    });
    if (focus) strip.children[row].focus();
    strip.children[row].scrollIntoView({ block: "nearest", inline: "nearest" });
    drawMap();
    drawAttended();
    drawNext();
    for (const cell of lens.querySelectorAll("[data-column]")) cell.classList.toggle("chosen", Number(cell.dataset.column) === row);
  }

  function drawStrip() {
    strip.replaceChildren(...found.tokens.map((token, i) => {
      const p = found.probabilities[i];
      return h("span.token", {
        role: "option", tabIndex: i === row ? 0 : -1, "aria-selected": String(i === row), dataset: { p: shade(p) },
        "aria-label": `${visible(token)}${p === null ? "" : `, probability ${percent(p)}`}`,
        title: p === null ? "the first token: nothing comes before it" : `${percent(p)} probable, after what comes before it`,
        onclick: () => choose(i),
      }, visible(token));
    }));
  }

  function stripKeys(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || !found) return;
    event.preventDefault();
    choose(row + step, true);
  }

  function drawAttention() {
    drawHeads();
    drawMap();
    drawAttended();
  }

  function drawHeads() {
    const had = heads.contains(document.activeElement);
    heads.replaceChildren(...found.attention.weights.map((weights, i) => {
      const picture = h("canvas", { width: weights.length, height: weights.length, "aria-hidden": "true" });
      paint(picture.getContext("2d"), weights, 1);
      return h("button.head", {
        type: "button", role: "radio", "aria-checked": String(i === head), tabIndex: i === head ? 0 : -1, "aria-label": `Head ${i + 1}`,
        onclick: () => { head = i; drawAttention(); },
      }, picture, h("span", {}, String(i + 1)));
    }));
    if (had) heads.children[head].focus();
  }

  function headKeys(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    head = (head + step + found.heads) % found.heads;
    drawAttention();
    heads.children[head].focus();
  }

  // A colour of the style sheet as the theme has it now; a canvas knows nothing of variables.
  function colour(name) {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  }

  const channels = (name) => colour(name).match(/[\d.]+/g).slice(0, 3).map(Number);

  // One cell a weight. The square root lets small weights be seen.
  function paint(context, weights, size) {
    const [low, high] = [channels("--map-low"), channels("--map-high")];
    for (let i = 0; i < weights.length; i++) {
      for (let j = 0; j <= i; j++) {
        const t = Math.sqrt(weights[i][j]);
        context.fillStyle = `rgb(${low.map((from, c) => Math.round(from + (high[c] - from) * t)).join(" ")})`;
        context.fillRect(j * size, i * size, size, size);
      }
    }
  }

  let scale = { cell: 0, left: 0, top: 0 }; // of the picture, in CSS pixels

  function drawMap() {
    const weights = found.attention.weights[head];
    const T = weights.length;
    const width = mapBox.clientWidth;
    const ratio = devicePixelRatio || 1;
    const font = `${T > 48 || width < 400 ? 9 : 12}px ui-monospace, "DejaVu Sans Mono", monospace`;
    const context = map.getContext("2d");
    context.font = font;
    const names = found.tokens.map((token) => visible(token).slice(0, 9));
    const labels = Math.min(90, 12 + Math.max(...names.map((name) => context.measureText(name).width)));
    const cell = Math.max(4, Math.min(36, (width - labels - 2) / T));
    const labelled = cell >= 7;
    const left = labelled ? labels : 2;
    const side = left + cell * T + 1;
    map.width = Math.round(side * ratio);
    map.height = Math.round(side * ratio);
    map.style.width = `${side}px`;
    map.style.height = `${side}px`;
    context.scale(ratio, ratio);
    context.font = font;
    scale = { cell, left, top: left };
    context.translate(left, left);
    const grid = document.createElement("canvas"); // whole pixels, then scaled without smoothing: no seams
    grid.width = grid.height = T;
    paint(grid.getContext("2d"), weights, 1);
    context.imageSmoothingEnabled = false;
    context.drawImage(grid, 0, 0, cell * T, cell * T);

    // the future, and what a band does not reach
    const mask = new Path2D();
    const window = found.attention.window ?? Infinity;
    for (let i = 0; i < T; i++) {
      mask.rect((i + 1) * cell, i * cell, (T - i - 1) * cell, cell);
      if (i - window >= 0) mask.rect(0, i * cell, (i - window + 1) * cell, cell);
    }
    context.save();
    context.clip(mask);
    context.fillStyle = colour("--mask-paper");
    context.fillRect(0, 0, cell * T, cell * T);
    context.strokeStyle = colour("--mask-line");
    context.lineWidth = 1;
    context.beginPath();
    for (let x = -cell * T; x < cell * T; x += 7) {
      context.moveTo(x, cell * T);
      context.lineTo(x + cell * T, 0);
    }
    context.stroke();
    context.restore();

    // the chosen row
    context.strokeStyle = colour("--accent");
    context.lineWidth = 2;
    context.strokeRect(1, row * cell + 1, (row + 1) * cell - 2, cell - 2);
    if (labelled) {
      const [ink, muted] = [colour("--ink"), colour("--muted")];
      context.textBaseline = "middle";
      for (let i = 0; i < T; i++) {
        context.fillStyle = i === row ? ink : muted;
        context.textAlign = "right";
        context.fillText(names[i], -5, (i + 0.5) * cell);
        context.save();
        context.translate((i + 0.5) * cell, -5);
        context.rotate(-Math.PI / 2);
        context.textAlign = "left";
        context.fillText(names[i], 0, 0);
        context.restore();
      }
    }
    map.setAttribute("aria-label", `Attention of layer ${found.attention.layer + 1}, head ${head + 1} over ${T} tokens. ${describeRow()} Arrow keys choose another token.`);
  }

  function strongest() {
    return found.attention.weights[head][row].slice(0, row + 1).map((weight, j) => ({ weight, j }))
      .sort((a, b) => b.weight - a.weight).slice(0, 8);
  }

  function describeRow() {
    const [first] = strongest();
    return `Token ${row + 1}, ${visible(found.tokens[row])}, looks most at ${visible(found.tokens[first.j])}: ${percent(first.weight)}.`;
  }

  function cellAt(event) {
    const box = map.getBoundingClientRect();
    const i = Math.floor((event.clientY - box.top - scale.top) / scale.cell);
    const j = Math.floor((event.clientX - box.left - scale.left) / scale.cell);
    const T = found.tokens.length;
    return i >= 0 && i < T && j < T ? { i, j } : null;
  }

  function point(event, press) {
    if (!found) return;
    const cell = cellAt(event);
    if (press && cell) choose(cell.i);
    tip.hidden = !cell || cell.j < 0;
    if (tip.hidden) return;
    const { i, j } = cell;
    const window = found.attention.window ?? Infinity;
    const hidden = j > i ? "in the future: masked" : i - j >= window ? "beyond the band: masked" : percent(found.attention.weights[head][i][j]);
    tip.replaceChildren(h("code", {}, visible(found.tokens[i])), " → ", h("code", {}, visible(found.tokens[j])), ` ${hidden}`);
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    tip.style.left = `${left}px`;
    tip.style.top = `${event.clientY + 14}px`;
  }

  function mapKeys(event) {
    const step = { ArrowDown: 1, ArrowUp: -1, ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || !found) return;
    event.preventDefault();
    choose(row + step);
  }

  function drawAttended() {
    attendedTitle.replaceChildren("What ", h("code", {}, visible(found.tokens[row])), " looks at");
    attended.replaceChildren(...strongest().map(({ weight, j }) =>
      h("li", {}, h("code", {}, visible(found.tokens[j])), h("span.sr", {}, ` (token ${j + 1}) `), bar(weight), h("span.number", {}, percent(weight)))));
  }

  function drawNext() {
    const follows = found.tokens[row + 1];
    nextTitle.replaceChildren("What comes after ", h("code", {}, visible(found.tokens[row])));
    next.replaceChildren(...found.next[row].map(({ text, probability }) =>
      h("li", { className: text === follows ? "right" : "" }, h("code", {}, visible(text)), bar(probability),
        h("span.number", {}, percent(probability), text === follows && h("span.sr", {}, ", which does come next")))));
  }

  function drawLens() {
    const { tokens, probabilities } = found.lens;
    const levels = tokens.length;
    const body = [];
    for (let level = levels - 1; level >= 0; level--) {
      body.push(h("tr", {}, h("th", { scope: "row" }, level === 0 ? "embedding" : `layer ${level}`),
        tokens[level].map((token, i) => {
          const right = token === found.tokens[i + 1];
          const cell = h("td", { dataset: { column: i, p: lensShade(probabilities[level][i]) }, className: `${right ? "right" : ""}${i === row ? " chosen" : ""}`,
            title: `${visible(token)} ${percent(probabilities[level][i])}`, onclick: () => choose(i) }, visible(token).slice(0, 10));
          return cell;
        })));
    }
    lens.replaceChildren(h("table", {}, h("caption.sr", {}, "The most probable next token after each token, by layer, the last layer on top"),
      h("thead", {}, h("tr", {}, h("td", {}), found.tokens.map((token, i) =>
        h("th", { scope: "col", dataset: { column: i }, className: i === row ? "chosen" : "" }, visible(token).slice(0, 10))))),
      h("tbody", {}, body)));
  }

  const lensShade = (p) => String(Math.min(5, Math.floor(p * 6)));

  return { shown: () => { if (about && !found) look(); else if (found) drawMap(); }, focus: () => text.focus() };
}
