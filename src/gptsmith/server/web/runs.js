// Training runs: which there are, their curves as they are written, several over one another, samples, configuration.

import { events, request } from "./api.js";
import { Chart } from "./chart.js";
import { announce, compact, duration, fill, h, wait } from "./dom.js";
import { load, save } from "./store.js";

const LIST_SECONDS = 4;
const MOST_STREAMS = 3; // a browser opens six connections to a server; the others are left to the page
const MOST_ROWS = 20_000;
const STATUS = { running: "running", finished: "finished", interrupted: "interrupted", diverged: "diverged", failed: "failed", unreadable: "unreadable" };
const short = (s) => (s === undefined ? "–" : s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 6) / 10} min` : `${(s / 3600).toFixed(1)} h`);
const exact = (n) => (n < 1e6 ? Math.round(n).toLocaleString("en") : compact(n));
const AXES = {
  step: { label: "step", format: exact },
  time: { label: "time", format: short },
  tokens: { label: "tokens", format: (x) => compact(x) },
};

export function mount(root) {
  let list = [];
  const runs = new Map(); // name -> Run, of those that are shown
  let first = null; // the run whose details are shown
  let axis = load("runs.axis", "step");
  if (!(axis in AXES)) axis = "step";
  let logarithmic = load("runs.logarithmic", false);
  let visible = false;
  let chosenByHand = false;

  const names = h("ul.runs", { "aria-label": "Runs" });
  const listStatus = h("p.empty", { hidden: true });
  const headline = h("div.headline", {});
  const charts = {
    loss: new Chart({ title: "Loss", unit: "nats per token", format: (y) => (y >= 10 ? y.toFixed(1) : y.toFixed(2)), height: 320 }),
    lr: new Chart({ title: "Learning rate", format: (y) => (y === 0 ? "0" : Math.abs(y) >= 0.001 ? String(Number(y.toPrecision(3))) : y.toExponential(1)), height: 190, min: 0 }),
    tokens_per_second: new Chart({ title: "Throughput", unit: "tokens per second", format: (y) => compact(y), height: 190, min: 0 }),
    grad_norm: new Chart({ title: "Gradient norm", format: (y) => String(Number(y.toPrecision(3))), height: 190, min: 0 }),
  };
  const legend = h("ul.series-legend", {});
  const axes = h("div.segments", { role: "radiogroup", "aria-label": "The horizontal axis" });
  const log = h("input", { type: "checkbox", id: "log", checked: logarithmic, onchange: () => {
    logarithmic = log.checked;
    save("runs.logarithmic", logarithmic);
    drawCharts();
  } });
  const sampleInput = h("input", { type: "range", id: "sample", min: 0, max: 0, value: 0, oninput: () => drawSample() });
  const sampleText = h("pre.sample", { tabIndex: 0 });
  const sampleHead = h("output", { htmlFor: "sample" });
  const sampleBox = h("section.card", { "aria-labelledby": "samples-title", hidden: true }, h("h2", { id: "samples-title" }, "What it writes"),
    h("div.control", {}, h("div.control-head", {}, h("label", { htmlFor: "sample" }, "Sample"), sampleHead), sampleInput), sampleText);
  const plan = h("section.card", { "aria-labelledby": "plan-title", hidden: true });
  const details = h("div.run-details", { hidden: true }, headline,
    h("section.card", { "aria-label": "Curves" },
      h("div.row.chart-tools", {}, legend, h("div.grow"), axes, h("label.check", { htmlFor: "log" }, log, " logarithmic")),
      charts.loss.element,
      h("div.chart-row", {}, charts.lr.element, charts.tokens_per_second.element, charts.grad_norm.element)),
    sampleBox, plan);
  root.append(
    h("div.view-head", {}, h("h1", {}, "Runs"), h("p.lead", {}, "Training runs, live while they are trained. Tick several to lay their curves over one another.")),
    h("div.runs-layout", {}, h("nav.card.run-list", { "aria-label": "Runs" }, names, listStatus), details));
  drawAxes();
  poll();

  // -- what there is ---------------------------------------------------------------------------------------------------

  async function poll() {
    while (true) {
      if (visible && !document.hidden) await refresh();
      await wait(1000 * LIST_SECONDS);
    }
  }

  async function refresh() {
    try {
      list = (await request("api/runs")).runs;
      listStatus.hidden = list.length > 0;
      listStatus.textContent = "No runs here yet. `gptsmith train` makes one; it will turn up by itself.";
    } catch (error) {
      listStatus.hidden = false;
      listStatus.textContent = error.message;
      return;
    }
    if (!first && list.length && !chosenByHand) {
      const kept = load("runs.shown", []).filter((name) => list.some((run) => run.name === name));
      const wanted = list.find((run) => run.status === "running" && run.quiet < 60)?.name ?? kept[0] ?? list[0].name;
      show(wanted);
    }
    for (const [name, run] of runs) { // runs without a stream of their own
      const row = list.find((each) => each.name === name);
      if (row && !run.live && run.step !== undefined && (row.step !== run.step || row.status !== run.status)) run.load();
    }
    drawList();
    drawHeadline();
  }

  class Run {
    constructor(name, colour) {
      Object.assign(this, { name, colour, record: {}, metrics: [], samples: [], live: false });
      this.controller = new AbortController();
      this.follow();
    }

    async load() {
      try {
        this.take("snapshot", await request(path(this.name), { signal: this.controller.signal }));
      } catch (error) {
        this.error = error.name === "AbortError" ? undefined : error.message;
      }
      draw();
    }

    async follow() {
      await this.load();
      let pause = 1;
      while (!this.controller.signal.aborted) {
        const streams = [...runs.values()].filter((run) => run.live).length;
        if (this.status !== "running" || streams >= MOST_STREAMS) {
          await wait(1000 * LIST_SECONDS); // one that was interrupted may be resumed
          continue;
        }
        this.live = true;
        try {
          for await (const { event, data } of events(`${path(this.name)}/events`, { signal: this.controller.signal })) {
            pause = 1;
            this.error = undefined;
            this.take(event, JSON.parse(data));
            draw();
            if (event === "gone" || (event === "run" && this.status !== "running")) break;
          }
        } catch (error) {
          if (error.name === "AbortError") return;
          this.error = error.message;
          draw();
        }
        this.live = false;
        await wait(1000 * pause);
        pause = Math.min(30, 2 * pause); // the server may be away for longer
      }
    }

    take(event, data) {
      if (event === "snapshot") {
        Object.assign(this, { record: data.record, metrics: data.metrics, samples: data.samples, unreadable: data.unreadable_lines });
      } else if (event === "metrics") {
        this.metrics.push(...data);
        if (this.metrics.length > MOST_ROWS) this.metrics = this.metrics.filter((row, i) => i % 2 || "val_loss" in row);
      } else if (event === "samples") {
        this.samples.push(...data);
      } else if (event === "run") {
        this.record = data;
        announce(`${this.name}: ${this.status}`);
      } else if (event === "gone") this.error = "This run is not there any more.";
    }

    get status() {
      return this.record.status;
    }

    get step() {
      return this.metrics.at(-1)?.step;
    }

    get steps() {
      return this.record.config?.steps;
    }

    last(key) {
      return this.metrics.findLast((row) => typeof row[key] === "number")?.[key];
    }

    best() {
      return this.metrics.reduce((best, row) => (typeof row.val_loss === "number" && row.val_loss < (best?.val_loss ?? Infinity) ? row : best), null);
    }

    points(key) {
      return this.metrics.filter((row) => key in row && row[axis] !== undefined && row[axis] !== null).map((row) => [row[axis], row[key]]);
    }
  }

  function show(name) { // this one alone
    for (const other of runs.keys()) if (other !== name) drop(other);
    add(name);
    first = name;
    changed();
  }

  function add(name) {
    if (runs.has(name)) return;
    const used = new Set([...runs.values()].map((run) => run.colour));
    let colour = 0;
    while (used.has(colour)) colour += 2; // pairs: training and validation
    runs.set(name, new Run(name, colour));
  }

  function drop(name) {
    runs.get(name)?.controller.abort();
    runs.delete(name);
  }

  function toggle(name, shown) {
    if (shown) add(name);
    else drop(name);
    if (!runs.has(first)) first = runs.keys().next().value ?? null;
    changed();
  }

  function changed() {
    save("runs.shown", [...runs.keys()]);
    drawn = undefined;
    drawList();
    draw();
  }

  // -- drawing ---------------------------------------------------------------------------------------------------------

  function drawList() {
    const focused = document.activeElement?.id;
    names.replaceChildren(...list.map((row, i) => {
      const run = runs.get(row.name);
      const id = `run-${i}`;
      const live = row.status === "running";
      const quiet = live && row.quiet > 120;
      const box = h("input", { type: "checkbox", id: `${id}-box`, checked: Boolean(run), "aria-label": `Show ${row.name}`, disabled: row.status === "unreadable",
        onchange: () => { chosenByHand = true; toggle(row.name, box.checked); } });
      const progress = row.steps ? `${exact(row.step)} of ${exact(row.steps)} steps` : "";
      const loss = row.val_loss ?? row.loss;
      return h("li", { className: row.name === first ? "first" : "" }, box,
        h("button.run", { type: "button", id, "aria-current": row.name === first ? "true" : undefined, disabled: row.status === "unreadable",
          onclick: () => { chosenByHand = true; if (runs.has(row.name) && runs.size > 1) { first = row.name; changed(); } else show(row.name); } },
        h("span.run-name", {}, run && h(`i.s${run.colour % 8}`), row.name),
        h("span.run-about", {},
          h("span.badge", { dataset: { status: quiet ? "quiet" : row.status } }, quiet ? "no news" : STATUS[row.status] ?? row.status ?? "?"),
          live ? progress : "", typeof loss === "number" ? ` ${row.val_loss === null ? "loss" : "val"} ${loss.toFixed(3)}` : "",
          row.error ? h("span.help", {}, row.error) : "")));
    }));
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  }

  let drawn;

  function draw() {
    if (!visible) return;
    details.hidden = runs.size === 0;
    drawHeadline();
    drawCharts();
    drawSamples();
    const run = runs.get(first);
    if (drawn !== run?.record) {
      drawn = run?.record;
      drawPlan();
    }
  }

  function drawHeadline() {
    const run = runs.get(first);
    if (!run) return;
    const row = list.find((each) => each.name === first);
    const best = run.best();
    const rows = run.metrics.filter((each) => "loss" in each);
    const late = rows.slice(-6);
    const pace = late.length > 1 ? (late.at(-1).time - late[0].time) / (late.at(-1).step - late[0].step) : undefined;
    const left = run.status === "running" && run.steps && pace ? (run.steps - run.step) * pace : undefined;
    const share = run.steps ? Math.min(1, (run.step ?? 0) / run.steps) : 0;
    const progress = h("progress", { max: 1, value: share, "aria-label": "Steps done" });
    const tile = (label, value, note) => h("div.tile", {}, h("dt", {}, label), h("dd", {}, value, note && h("small", {}, note)));
    const quiet = run.status === "running" && row && row.quiet > 120;
    const { data, model, config } = run.record;
    const started = run.record.started && new Date(run.record.started).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
    fill(headline,
      h("div.row.headline-title", {}, h("h2", {}, first), h("span.badge", { dataset: { status: quiet ? "quiet" : run.status } }, quiet ? "no news" : STATUS[run.status] ?? run.status ?? "…"),
        run.live && h("span.live", {}, h("i"), "live")),
      h("p.help", {}, [data?.spec && String(data.spec).split("/").at(-1), model && `${model.num_hidden_layers} layers, ${model.hidden_size} wide`,
        config && `context ${config.context}`, started && `started ${started}`].filter(Boolean).join(" · ")),
      run.error && h("p.failed", { role: "alert" }, run.error),
      quiet && h("p.help", {}, `It says that it is running, and has written nothing for ${duration(row.quiet)}. It may have been killed: \`gptsmith train --resume\` goes on with it.`),
      h("dl.tiles", {},
        tile("Step", exact(run.step ?? 0), run.steps ? `of ${exact(run.steps)}${left === undefined ? "" : `, ${duration(left)} left`}` : ""),
        tile("Loss", run.last("loss")?.toFixed(3) ?? "–", "of training"),
        tile("Best validation", best?.val_loss.toFixed(3) ?? "–", best ? `at step ${exact(best.step)}` : "none yet"),
        tile("Speed", compact(run.last("tokens_per_second")), "tokens per second"),
        tile("Parameters", compact(run.record.parameters), "trained"),
        tile("Time", short(run.last("time")), run.last("tokens") ? `${compact(run.last("tokens"))} tokens` : "")),
      progress);
  }

  function drawAxes() {
    axes.replaceChildren(...Object.keys(AXES).map((name) => h("label.segment", {},
      h("input.sr", { type: "radio", name: "axis", value: name, checked: name === axis, onchange: () => {
        axis = name;
        save("runs.axis", name);
        drawCharts();
      } }), h("span", {}, AXES[name].label))));
  }

  function drawCharts() {
    const shown = [...runs.values()];
    const several = shown.length > 1;
    const name = (run, what) => (several ? `${run.name} ${what}` : what);
    charts.loss.show(shown.flatMap((run) => [
      { name: name(run, "training"), colour: run.colour, points: run.points("loss"), faint: several },
      { name: name(run, "validation"), colour: several ? run.colour : run.colour + 1, points: run.points("val_loss"), dots: true },
    ]).filter(({ points }) => points.length), AXES[axis], logarithmic);
    for (const key of ["lr", "tokens_per_second", "grad_norm"]) {
      charts[key].show(shown.map((run) => ({ name: several ? run.name : charts[key].title.toLowerCase(), colour: run.colour, points: run.points(key) }))
        .filter(({ points }) => points.length), AXES[axis], false);
    }
    fill(legend, (several
      ? shown.map((run) => h("li", {}, h(`i.s${run.colour % 8}`), run.name))
      : shown.flatMap((run) => [h("li", {}, h(`i.s${run.colour % 8}`), "training"), h("li", {}, h(`i.s${(run.colour + 1) % 8}`), "validation")])));
    charts.loss.note(several ? "nats per token; faint: training, with dots: validation" : "nats per token");
  }

  function drawSamples() {
    const run = runs.get(first);
    const samples = run?.samples ?? [];
    sampleBox.hidden = samples.length === 0;
    const atEnd = Number(sampleInput.value) === Number(sampleInput.max) || sampleInput.dataset.run !== first;
    sampleInput.dataset.run = first ?? "";
    sampleInput.max = Math.max(0, samples.length - 1);
    sampleInput.disabled = samples.length < 2;
    if (atEnd) sampleInput.value = preferred(samples);
    drawSample();
  }

  // The last one; of those at the end of a run, which differ in temperature, the one nearest to 0.8.
  function preferred(samples) {
    const last = samples.at(-1)?.step;
    let best = samples.length - 1;
    samples.forEach((sample, i) => {
      if (sample.step === last && Math.abs(sample.temperature - 0.8) < Math.abs(samples[best].temperature - 0.8)) best = i;
    });
    return Math.max(0, best);
  }

  function drawSample() {
    const sample = runs.get(first)?.samples[Number(sampleInput.value)];
    if (!sample) return;
    sampleHead.textContent = `step ${exact(sample.step)}, temperature ${sample.temperature}`;
    sampleInput.setAttribute("aria-valuetext", sampleHead.textContent);
    fill(sampleText, sample.prompt && h("b", {}, sample.prompt), sample.text);
  }

  function drawPlan() {
    const run = runs.get(first);
    plan.hidden = !run?.record.config;
    if (plan.hidden) return;
    const { config, model, data, machine, choice, ...rest } = run.record;
    const batch = config.batch_size * config.context;
    const words = [
      config.budget && `a budget of ${config.budget}`,
      `${exact(config.steps)} steps of ${config.batch_size} × ${config.context} = ${compact(batch)} tokens: ${compact(config.steps * batch)} in all`,
      data?.train_tokens && `${(config.steps * batch / data.train_tokens).toFixed(1)} times the text of ${compact(data.train_tokens)} tokens`,
    ].filter(Boolean);
    const several = Object.entries({ training: config, model, data, machine, run: rest }).filter(([, part]) => part && Object.keys(part).length);
    const open = plan.querySelector("details")?.open;
    fill(plan, h("h2", { id: "plan-title" }, "The plan and the configuration"),
      h("p", {}, words.join(" · ")),
      choice?.reasons?.length > 0 && h("ul.reasons", {}, choice.reasons.map((reason) => h("li", {}, reason))),
      h("details", { open }, h("summary", {}, "All settings"), h("div.groups", {}, several.map(([name, part]) => table(name, part)))));
  }

  function table(name, part) {
    return h("table.settings", {}, h("caption", {}, name),
      h("tbody", {}, flat(part).map(([key, value]) => h("tr", {}, h("th", { scope: "row" }, key), h("td", {}, String(value ?? "–"))))));
  }

  function flat(values, prefix = "") {
    return Object.entries(values).flatMap(([key, value]) => (value && typeof value === "object" && !Array.isArray(value)
      ? flat(value, `${prefix}${key}.`) : [[prefix + key, Array.isArray(value) ? value.join(", ") : value]]));
  }

  return {
    shown: () => {
      visible = true;
      refresh();
      draw();
    },
    hidden: () => { visible = false; },
    focus: () => names.querySelector("button")?.focus(),
  };
}

const path = (name) => `api/runs/${name.split("/").map(encodeURIComponent).join("/")}`;
