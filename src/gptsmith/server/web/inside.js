// The view of a model's inside for a short text: attention weights, the logit lens, the next-token distribution.

import { request } from "./api.js";
import { lensLevel, maskReason, maskRectangles, patchAttention, strongestKeys, weightColor } from "./attention.js";
import { debounce, h } from "./dom.js";
import { percent, printable } from "./format.js";
import * as models from "./models.js";
import { PictureInput } from "./pictures.js";
import { load, save } from "./store.js";
import { probabilityBar, probabilityLevel } from "./tokens.js";

const NEXT_TOKENS = 12; // candidates for the next token that are shown
const STRONGEST = 8; // attended tokens that are listed
const STRONGEST_PATCHES = 5;
const PATCH_VIEW = 320; // pixels of a side of the picture
const DARKEST = 0.8; // the shade over a patch that a token does not attend to
const LABEL_LENGTH = 9; // characters of a token beside the attention map
const LENS_LENGTH = 10; // characters of a token in the logit lens
const MIN_LABELED_CELL = 7; // pixels; smaller cells of the attention map have no labels
const MASKED = { future: "masked (future token)", window: "masked (outside the sliding window)" };

export function mount(root) {
  let result = null; // the server's last answer
  let model = null; // the description of the selected model
  let layer = 0;
  let head = 0;
  let row = 0; // index of the selected token
  let requests = 0;
  let controller = null;

  const inspectSoon = debounce(inspect, 400);
  const inspectLayerSoon = debounce(inspectLayer, 60);
  const layerLabel = () => `${layer + 1} of ${model?.layers ?? "…"}`;

  const textInput = h("input", {
    id: "inside-text",
    type: "text",
    maxLength: 400,
    spellcheck: false,
    autocomplete: "off",
    value: load("inside.text", "The cat sat on the mat and the dog sat on the"),
    oninput: () => {
      save("inside.text", textInput.value);
      inspectSoon();
    },
  });
  const status = h("p.help", { role: "status" });
  const strip = h("div.strip", {
    role: "listbox",
    "aria-label": "Tokens: select one to inspect",
    onkeydown: onStripKeyDown,
  });
  const layerInput = h("input", {
    id: "layer",
    type: "range",
    min: 0,
    max: 0,
    step: 1,
    value: 0,
    oninput: () => {
      layer = Number(layerInput.value);
      layerOutput.textContent = layerLabel();
      inspectLayerSoon();
    },
  });
  const layerOutput = h("output", { htmlFor: "layer" });
  const heads = h("div.heads", { role: "radiogroup", "aria-label": "Head", onkeydown: onHeadKeyDown });
  const map = h("canvas.map", {
    tabIndex: 0,
    role: "img",
    onpointermove: (event) => onMapPointer(event, false),
    onpointerdown: (event) => onMapPointer(event, true),
    onpointerleave: () => {
      tip.hidden = true;
    },
    onkeydown: onMapKeyDown,
  });
  const mapBox = h("div.map-box", {}, map);
  const colorProbe = h("span", { hidden: true });
  const tip = h("div.tip", { hidden: true, "aria-hidden": "true" });
  const attended = h("ol.bars", {});
  const attendedTitle = h("h3", { id: "attended-title" });
  const next = h("ol.bars", {});
  const nextTitle = h("h3", { id: "next-title" });
  const lens = h("div.lens", { tabIndex: 0, role: "region", "aria-label": "The logit lens" });
  const onSubmit = (event) => {
    event.preventDefault();
    inspect();
  };
  const form = h("form.card.stack", { onsubmit: onSubmit });
  const picture = new PictureInput({
    limit: 1,
    target: form,
    refusal: () => `${models.selected()} reads text only: it takes no pictures.`,
    onChange: () => {
      textLabel.textContent = picture.urls.length ? "Question about the picture" : "Short text";
      if (!root.hidden) inspect();
      else result = null;
    },
  });
  const textLabel = h("label.title", { htmlFor: "inside-text" }, "Short text");
  form.append(
    textLabel,
    picture.list,
    h(
      "div.row",
      {},
      picture.button,
      picture.file,
      textInput,
      h("button.button.primary", { type: "submit" }, "Look inside"),
    ),
    strip,
    status,
  );
  const attentionHelp =
    "Each row is a token, and each column a token that it can attend to: itself and earlier ones. " +
    "The hatched area is hidden by the causal mask.";
  const attentionCard = h(
    "section.card.attention",
    { "aria-labelledby": "attention-title" },
    h("h2", { id: "attention-title" }, "Attention"),
    h("p.help", {}, attentionHelp),
    h(
      "div.control.layer-control",
      {},
      h("div.control-head", {}, h("label", { htmlFor: "layer" }, "Layer"), layerOutput),
      layerInput,
    ),
    heads,
    mapBox,
    h(
      "div.map-legend",
      { "aria-hidden": "true" },
      h("span.ramp", {}),
      h("span", {}, "0% to 100%"),
      h("span.hatch", {}),
      h("span", {}, "masked"),
    ),
  );
  const patchImage = h("img", { alt: "", onload: () => drawPatches() });
  const patchCanvas = h("canvas.patches", { role: "img" });
  const patchTitle = h("h3", { id: "patches-title" });
  const patchList = h("ol.bars", {});
  const patchHelp =
    "The picture as the model sees it. Bright patches are those that the token attends to, in the chosen layer and head.";
  const patchCard = h(
    "section.card.patch-card",
    { "aria-labelledby": "patches-title", hidden: true },
    patchTitle,
    h("p.help", {}, patchHelp),
    patchCanvas,
    patchList,
  );
  const lensHelp =
    "What each layer would predict if it were the last. " +
    "Read a column from the bottom up to see the prediction take shape. Framed: correct.";
  const results = h(
    "div.inside-grid",
    { hidden: true },
    attentionCard,
    h(
      "div.stack",
      {},
      patchCard,
      h("section.card", { "aria-labelledby": "attended-title" }, attendedTitle, attended),
      h("section.card", { "aria-labelledby": "next-title" }, nextTitle, next),
    ),
    h(
      "section.card.lens-card",
      { "aria-labelledby": "lens-title" },
      h("h2", { id: "lens-title" }, "The logit lens"),
      h("p.help", {}, lensHelp),
      lens,
    ),
  );
  const lead =
    "A GPT reads from left to right. See which tokens each token attends to, " +
    "and how the prediction of the next token forms from layer to layer.";
  root.append(h("div.view-head", {}, h("h1", {}, "Inside"), h("p.lead", {}, lead)), form, results, tip, colorProbe);
  new ResizeObserver(() => {
    if (result) drawMap();
  }).observe(mapBox);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawColors);
  document.addEventListener("theme-changed", redrawColors);

  models.onSelect(async (name) => {
    status.textContent = `Loading ${name}…`;
    try {
      model = await models.describe(name);
      layerInput.max = model.layers - 1;
      layer = Math.min(layer, model.layers - 1);
      layerInput.value = layer;
      head = Math.min(head, model.heads - 1);
      layerOutput.textContent = layerLabel();
      picture.enabled = model.image_tokens !== null;
      if (!root.hidden) inspect();
      else result = null;
    } catch (error) {
      showError(error);
    }
  });

  document.addEventListener("look-inside", ({ detail: { image, text } }) => {
    textInput.value = text.slice(0, textInput.maxLength);
    picture.set([image]);
  });

  // -- requests --------------------------------------------------------------------------------------------------------

  // Resolve to the server's answer, or to null if a later request has replaced this one.
  async function fetchParts(parts) {
    const number = ++requests;
    controller?.abort();
    controller = new AbortController();
    const [image = null] = picture.urls;
    const body = { model: models.selected(), text: textInput.value, image, layer, top: NEXT_TOKENS, parts };
    const answer = await request("api/inside", { body, signal: controller.signal });
    return number === requests ? answer : null;
  }

  async function inspect() {
    if (!model) return;
    if (!textInput.value && !picture.urls.length) {
      status.textContent = "Enter a few words.";
      return;
    }
    results.classList.add("working");
    try {
      const answer = await fetchParts(["attention", "lens", "next"]);
      if (!answer) return;
      result = answer;
      row = result.tokens.length - 1;
      head = Math.min(head, result.heads - 1);
      results.hidden = false;
      status.textContent = `${result.tokens.length} tokens · ${result.layers} layers · ${result.heads} heads per layer`;
      drawStrip();
      drawAttention();
      drawLens();
      drawNext();
      patchCard.hidden = !result.image;
      if (result.image) patchImage.src = result.image.url;
    } catch (error) {
      showError(error);
    } finally {
      results.classList.remove("working");
    }
  }

  async function inspectLayer() {
    if (!result) return;
    try {
      const answer = await fetchParts(["attention"]);
      if (!answer) return;
      result.attention = answer.attention;
      result.image = answer.image;
      drawAttention();
    } catch (error) {
      showError(error);
    }
  }

  function showError(error) {
    if (error.name !== "AbortError") status.textContent = error.message;
  }

  // -- the tokens ------------------------------------------------------------------------------------------------------

  function redrawColors() {
    if (result) requestAnimationFrame(drawAttention);
  }

  function select(index, focus = false) {
    row = Math.max(0, Math.min(result.tokens.length - 1, index));
    [...strip.children].forEach((child, i) => {
      child.setAttribute("aria-selected", String(i === row));
      child.tabIndex = i === row ? 0 : -1;
    });
    if (focus) strip.children[row].focus();
    strip.children[row].scrollIntoView({ block: "nearest", inline: "nearest" });
    drawMap();
    drawAttended();
    drawPatches();
    drawNext();
    for (const cell of lens.querySelectorAll("[data-column]")) {
      cell.classList.toggle("chosen", Number(cell.dataset.column) === row);
    }
  }

  function drawStrip() {
    strip.replaceChildren(
      ...result.tokens.map((token, i) => {
        const p = result.probabilities[i];
        return h(
          "span.token",
          {
            role: "option",
            tabIndex: i === row ? 0 : -1,
            "aria-selected": String(i === row),
            dataset: { p: probabilityLevel(p) },
            "aria-label": `${printable(token)}${p === null ? "" : `, probability ${percent(p)}`}`,
            title:
              p === null
                ? "the first token has no prediction"
                : `probability ${percent(p)}, given the tokens before it`,
            onclick: () => select(i),
          },
          printable(token),
        );
      }),
    );
  }

  function onStripKeyDown(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || !result) return;
    event.preventDefault();
    select(row + step, true);
  }

  // -- attention -------------------------------------------------------------------------------------------------------

  function drawAttention() {
    drawHeads();
    drawMap();
    drawAttended();
    drawPatches();
  }

  // Draw the picture, shaded where the selected token does not look.
  function drawPatches() {
    if (!result?.image) return;
    const { grid, weights } = result.image;
    const { total, patches } = patchAttention(weights[head][row], grid);
    const ratio = devicePixelRatio || 1;
    const cell = (PATCH_VIEW / grid) * ratio;
    patchCanvas.width = patchCanvas.height = PATCH_VIEW * ratio;
    const context = patchCanvas.getContext("2d");
    context.imageSmoothingEnabled = patchImage.naturalWidth > PATCH_VIEW;
    if (patchImage.complete) context.drawImage(patchImage, 0, 0, PATCH_VIEW * ratio, PATCH_VIEW * ratio);
    for (const { row: y, column: x, share } of patches) {
      context.fillStyle = `rgb(0 0 0 / ${DARKEST * (1 - Math.sqrt(share))})`;
      context.fillRect(Math.floor(x * cell), Math.floor(y * cell), Math.ceil(cell), Math.ceil(cell));
    }
    const token = printable(result.tokens[row]);
    const sees = row >= result.image.index;
    const place = (patch) => `row ${patch.row + 1}, column ${patch.column + 1}`;
    patchTitle.replaceChildren("Where ", h("code", {}, token), " looks in the picture");
    patchCanvas.setAttribute(
      "aria-label",
      sees
        ? `The picture in ${grid} × ${grid} patches. ${token} gives them ${percent(total)} of its attention, most to ` +
            `the patch in ${place(patches[0])}: ${percent(patches[0].weight)}.`
        : `The picture in ${grid} × ${grid} patches. ${token} comes before the picture and does not see it.`,
    );
    patchList.replaceChildren(
      ...(sees ? patches.slice(0, STRONGEST_PATCHES) : []).map((patch) =>
        h(
          "li",
          {},
          h("span", {}, place(patch)),
          probabilityBar(patch.weight),
          h("span.number", {}, percent(patch.weight)),
        ),
      ),
    );
  }

  function drawHeads() {
    const hadFocus = heads.contains(document.activeElement);
    heads.replaceChildren(
      ...result.attention.weights.map((weights, i) => {
        const thumbnail = h("canvas", { width: weights.length, height: weights.length, "aria-hidden": "true" });
        paintWeights(thumbnail.getContext("2d"), weights);
        return h(
          "button.head",
          {
            type: "button",
            role: "radio",
            "aria-checked": String(i === head),
            tabIndex: i === head ? 0 : -1,
            "aria-label": `Head ${i + 1}`,
            onclick: () => {
              head = i;
              drawAttention();
            },
          },
          thumbnail,
          h("span", {}, String(i + 1)),
        );
      }),
    );
    if (hadFocus) heads.children[head].focus();
  }

  function onHeadKeyDown(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    head = (head + step + result.heads) % result.heads;
    drawAttention();
    heads.children[head].focus();
  }

  // The value of a color variable in the current theme. A canvas cannot use variables of the style sheet.
  function themeColor(variable) {
    colorProbe.style.color = `var(${variable})`;
    return getComputedStyle(colorProbe).color;
  }

  const themeChannels = (variable) =>
    themeColor(variable)
      .match(/[\d.]+/g)
      .slice(0, 3)
      .map(Number);

  // Paint one pixel per weight.
  function paintWeights(context, weights) {
    const [low, high] = [themeChannels("--map-low"), themeChannels("--map-high")];
    for (let query = 0; query < weights.length; query++) {
      for (let key = 0; key <= query; key++) {
        context.fillStyle = weightColor(weights[query][key], low, high);
        context.fillRect(key, query, 1, 1);
      }
    }
  }

  let layout = { cell: 0, offset: 0 }; // of the attention map, in CSS pixels

  function drawMap() {
    const weights = result.attention.weights[head];
    const size = weights.length;
    const boxWidth = mapBox.clientWidth;
    const context = map.getContext("2d");
    const font = `${size > 48 || boxWidth < 400 ? 9 : 12}px ui-monospace, "DejaVu Sans Mono", monospace`;
    context.font = font;
    const labels = result.tokens.map((token) => printable(token).slice(0, LABEL_LENGTH));
    const labelWidth = Math.min(90, 12 + Math.max(...labels.map((label) => context.measureText(label).width)));
    const cell = Math.max(4, Math.min(36, (boxWidth - labelWidth - 2) / size));
    const labeled = cell >= MIN_LABELED_CELL;
    const offset = labeled ? labelWidth : 2;
    layout = { cell, offset };
    resizeCanvas(offset + cell * size + 1);
    context.font = font;
    context.translate(offset, offset);

    const pixels = document.createElement("canvas"); // scaled without smoothing: no seams between the cells
    pixels.width = pixels.height = size;
    paintWeights(pixels.getContext("2d"), weights);
    context.imageSmoothingEnabled = false;
    context.drawImage(pixels, 0, 0, cell * size, cell * size);

    drawMask(context, size, cell);
    context.strokeStyle = themeColor("--accent");
    context.lineWidth = 2;
    context.strokeRect(1, row * cell + 1, (row + 1) * cell - 2, cell - 2);
    if (labeled) drawLabels(context, labels, cell);
    map.setAttribute("aria-label", describeMap());
  }

  // A canvas has device pixels; all drawing is in CSS pixels.
  function resizeCanvas(side) {
    const ratio = devicePixelRatio || 1;
    map.width = map.height = Math.round(side * ratio);
    map.style.width = map.style.height = `${side}px`;
    map.getContext("2d").scale(ratio, ratio);
  }

  function drawMask(context, size, cell) {
    const mask = new Path2D();
    for (const { x, y, width } of maskRectangles(size, result.attention.window)) {
      mask.rect(x * cell, y * cell, width * cell, cell);
    }
    const side = cell * size;
    context.save();
    context.clip(mask);
    context.fillStyle = themeColor("--mask-paper");
    context.fillRect(0, 0, side, side);
    context.strokeStyle = themeColor("--mask-line");
    context.lineWidth = 1;
    context.beginPath();
    for (let x = -side; x < side; x += 7) {
      context.moveTo(x, side);
      context.lineTo(x + side, 0);
    }
    context.stroke();
    context.restore();
  }

  function drawLabels(context, labels, cell) {
    const [ink, muted] = [themeColor("--ink"), themeColor("--muted")];
    context.textBaseline = "middle";
    labels.forEach((label, i) => {
      const center = (i + 0.5) * cell;
      context.fillStyle = i === row ? ink : muted;
      context.textAlign = "right";
      context.fillText(label, -5, center);
      context.save();
      context.translate(center, -5);
      context.rotate(-Math.PI / 2);
      context.textAlign = "left";
      context.fillText(label, 0, 0);
      context.restore();
    });
  }

  function describeMap() {
    const weights = result.attention.weights[head];
    const [first] = strongestKeys(weights, row, 1);
    return (
      `Attention of layer ${result.attention.layer + 1}, head ${head + 1} over ${weights.length} tokens. ` +
      `Token ${row + 1}, ${printable(result.tokens[row])}, attends most to ` +
      `${printable(result.tokens[first.index])}: ${percent(first.weight)}. Use the arrow keys to select another token.`
    );
  }

  // The cell of the map under the pointer; a negative key is a label. null outside of the map.
  function cellAt(event) {
    const box = map.getBoundingClientRect();
    const query = Math.floor((event.clientY - box.top - layout.offset) / layout.cell);
    const key = Math.floor((event.clientX - box.left - layout.offset) / layout.cell);
    const size = result.tokens.length;
    return query >= 0 && query < size && key < size ? { query, key } : null;
  }

  function onMapPointer(event, pressed) {
    if (!result) return;
    const cell = cellAt(event);
    if (pressed && cell) select(cell.query);
    tip.hidden = !cell || cell.key < 0;
    if (tip.hidden) return;
    const { query, key } = cell;
    const masked = maskReason(query, key, result.attention.window);
    const value = masked ? MASKED[masked] : percent(result.attention.weights[head][query][key]);
    const [from, to] = [result.tokens[query], result.tokens[key]];
    tip.replaceChildren(h("code", {}, printable(from)), " → ", h("code", {}, printable(to)), ` ${value}`);
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    tip.style.left = `${left}px`;
    tip.style.top = `${event.clientY + 14}px`;
  }

  function onMapKeyDown(event) {
    const steps = { ArrowDown: 1, ArrowUp: -1, ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    const step = steps[event.key];
    if (step === undefined || !result) return;
    event.preventDefault();
    select(row + step);
  }

  function drawAttended() {
    attendedTitle.replaceChildren("What ", h("code", {}, printable(result.tokens[row])), " attends to");
    attended.replaceChildren(
      ...strongestKeys(result.attention.weights[head], row, STRONGEST).map(({ weight, index }) =>
        h(
          "li",
          {},
          h("code", {}, printable(result.tokens[index])),
          h("span.visually-hidden", {}, ` (token ${index + 1}) `),
          probabilityBar(weight),
          h("span.number", {}, percent(weight)),
        ),
      ),
    );
  }

  // -- predictions -----------------------------------------------------------------------------------------------------

  function drawNext() {
    const actual = result.tokens[row + 1];
    nextTitle.replaceChildren("Predictions after ", h("code", {}, printable(result.tokens[row])));
    next.replaceChildren(
      ...result.next[row].map(({ text, probability }) => {
        const correct = text === actual;
        return h(
          "li",
          { className: correct ? "correct" : "" },
          h("code", {}, printable(text)),
          probabilityBar(probability),
          h(
            "span.number",
            {},
            percent(probability),
            correct && h("span.visually-hidden", {}, ", the actual next token"),
          ),
        );
      }),
    );
  }

  function drawLens() {
    const levels = result.lens.tokens.map((_, level) => level).reverse(); // the last layer on top
    const columns = result.tokens.map((token, i) =>
      h(
        "th",
        { scope: "col", dataset: { column: i }, className: i === row ? "chosen" : "" },
        printable(token).slice(0, LENS_LENGTH),
      ),
    );
    const rows = levels.map((level) =>
      h(
        "tr",
        {},
        h("th", { scope: "row" }, level === 0 ? "embedding" : `layer ${level}`),
        result.lens.tokens[level].map((token, i) => drawLensCell(token, result.lens.probabilities[level][i], i)),
      ),
    );
    const caption = "The most likely next token after each token, by layer. The last layer is at the top.";
    lens.replaceChildren(
      h(
        "table",
        {},
        h("caption.visually-hidden", {}, caption),
        h("thead", {}, h("tr", {}, h("td", {}), columns)),
        h("tbody", {}, rows),
      ),
    );
  }

  function drawLensCell(token, probability, i) {
    const correct = token === result.tokens[i + 1];
    return h(
      "td",
      {
        dataset: { column: i, p: lensLevel(probability) },
        className: `${correct ? "correct" : ""}${i === row ? " chosen" : ""}`,
        title: `${printable(token)} ${percent(probability)}`,
        onclick: () => select(i),
      },
      printable(token).slice(0, LENS_LENGTH),
    );
  }

  return {
    onShow: () => {
      if (model && !result) inspect();
      else if (result) drawMap();
    },
    focus: () => textInput.focus(),
  };
}
