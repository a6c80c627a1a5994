// The view of training runs: a list, live curves, samples, settings. Several runs can be compared.

import { request, streamEvents } from "./api.js";
import { Chart, swatch } from "./chart.js";
import { announce, h, setChildren, sleep } from "./dom.js";
import { compactNumber, duration, exactNumber, shortDuration, significant } from "./format.js";
import { alignmentMetrics, describePlan, flatten, preferredSample, Run } from "./run.js";
import { load, save } from "./store.js";

const POLL_SECONDS = 4;
const MAX_STREAMS = 3; // a browser opens six connections to a server; the others are left for requests
const MAX_RETRY_SECONDS = 30;
const STALLED_SECONDS = 120; // a run that has written nothing for this long may have been killed
const ACTIVE_SECONDS = 60; // the view opens with a run that has written something since
const AXES = {
  step: { label: "step", format: exactNumber },
  time: { label: "time", format: shortDuration },
  tokens: { label: "tokens", format: compactNumber },
};
const LOSS_UNIT = "nats per token";

const runPath = (name) => `api/runs/${name.split("/").map(encodeURIComponent).join("/")}`;

export function mount(root) {
  let list = []; // the server's summary of every run
  const shown = new Map(); // name -> LiveRun
  let primary = null; // the name of the run whose details are shown
  let axis = load("runs.axis", "step");
  if (!(axis in AXES)) axis = "step";
  let logarithmic = load("runs.logarithmic", false);
  let visible = false; // the view is open
  let chosenByUser = false;
  let drawnRecord; // the record that the plan shows

  const runList = h("ul.runs", { "aria-label": "Runs" });
  const listStatus = h("p.empty", { hidden: true });
  const headline = h("div.headline", {});
  const charts = {
    loss: new Chart({
      title: "Loss",
      unit: LOSS_UNIT,
      format: (y) => (y >= 10 ? y.toFixed(1) : y.toFixed(2)),
      height: 320,
    }),
    lr: new Chart({ title: "Learning rate", format: significant, height: 190, min: 0 }),
    tokens_per_second: new Chart({
      title: "Throughput",
      unit: "tokens per second",
      format: compactNumber,
      height: 190,
      min: 0,
    }),
    grad_norm: new Chart({
      title: "Gradient norm",
      format: (y) => String(Number(y.toPrecision(3))),
      height: 190,
      min: 0,
    }),
  };
  const alignmentCharts = new Map(); // key -> Chart, made when a run has the metric
  const alignmentRow = h("div.chart-row", { hidden: true });
  const legend = h("ul.series-legend", {});
  const axisButtons = h("div.segments", { role: "radiogroup", "aria-label": "Horizontal axis" });
  const logInput = h("input", {
    type: "checkbox",
    id: "log",
    checked: logarithmic,
    onchange: () => {
      logarithmic = logInput.checked;
      save("runs.logarithmic", logarithmic);
      drawCharts();
    },
  });
  const sampleInput = h("input", { type: "range", id: "sample", min: 0, max: 0, value: 0, oninput: drawSample });
  const sampleText = h("pre.sample", { tabIndex: 0 });
  const sampleLabel = h("output", { htmlFor: "sample" });
  const sampleCard = h(
    "section.card",
    { "aria-labelledby": "samples-title", hidden: true },
    h("h2", { id: "samples-title" }, "Samples"),
    h(
      "div.control",
      {},
      h("div.control-head", {}, h("label", { htmlFor: "sample" }, "Sample"), sampleLabel),
      sampleInput,
    ),
    sampleText,
  );
  const planCard = h("section.card", { "aria-labelledby": "plan-title", hidden: true });
  const details = h(
    "div.run-details",
    { hidden: true },
    headline,
    h(
      "section.card",
      { "aria-label": "Curves" },
      h(
        "div.row.chart-tools",
        {},
        legend,
        h("div.grow"),
        axisButtons,
        h("label.check", { htmlFor: "log" }, logInput, " logarithmic"),
      ),
      charts.loss.element,
      alignmentRow,
      h("div.chart-row", {}, charts.lr.element, charts.tokens_per_second.element, charts.grad_norm.element),
    ),
    sampleCard,
    planCard,
  );
  root.append(
    h(
      "div.view-head",
      {},
      h("h1", {}, "Runs"),
      h("p.lead", {}, "Live training curves. Select several runs to compare them."),
    ),
    h("div.runs-layout", {}, h("nav.card.run-list", { "aria-label": "Runs" }, runList, listStatus), details),
  );
  drawAxisButtons();
  poll();

  // -- data ------------------------------------------------------------------------------------------------------------

  async function poll() {
    while (true) {
      if (visible && !document.hidden) await refresh();
      await sleep(1000 * POLL_SECONDS);
    }
  }

  async function refresh() {
    try {
      list = (await request("api/runs")).runs;
    } catch (error) {
      listStatus.hidden = false;
      listStatus.textContent = error.message;
      return;
    }
    listStatus.hidden = list.length > 0;
    listStatus.textContent = "No runs yet. Start one with `gptsmith train`; it will appear here automatically.";
    if (!primary && list.length && !chosenByUser) showOnly(initialRun());
    for (const [name, run] of shown) {
      if (run.live || run.step === undefined) continue;
      const row = list.find((other) => other.name === name);
      if (row && (row.step !== run.step || row.status !== run.status)) run.load();
    }
    drawList();
    drawHeadline();
  }

  // A run in progress, else the one that was shown last, else the newest.
  function initialRun() {
    const active = list.find((row) => row.status === "running" && row.quiet < ACTIVE_SECONDS);
    const stored = load("runs.shown", []).find((name) => list.some((row) => row.name === name));
    return active?.name ?? stored ?? list[0].name;
  }

  // A run that follows its events on the server while it is in progress.
  class LiveRun extends Run {
    constructor(name, color) {
      super(name);
      this.color = color;
      this.live = false; // a stream of events is open
      this.controller = new AbortController();
      this.follow();
    }

    async load() {
      try {
        this.apply("snapshot", await request(runPath(this.name), { signal: this.controller.signal }));
      } catch (error) {
        this.error = error.name === "AbortError" ? undefined : error.message;
      }
      draw();
    }

    async follow() {
      await this.load();
      let retrySeconds = 1;
      while (!this.controller.signal.aborted) {
        const streams = [...shown.values()].filter((run) => run.live).length;
        if (this.status !== "running" || streams >= MAX_STREAMS) {
          await sleep(1000 * POLL_SECONDS); // an interrupted run may be resumed
          continue;
        }
        this.live = true;
        try {
          const signal = this.controller.signal;
          for await (const { event, data } of streamEvents(`${runPath(this.name)}/events`, { signal })) {
            retrySeconds = 1;
            this.error = undefined;
            this.apply(event, JSON.parse(data));
            if (event === "run") announce(`${this.name}: ${this.status}`);
            draw();
            if (event === "gone" || (event === "run" && this.status !== "running")) break;
          }
        } catch (error) {
          if (error.name === "AbortError") return;
          this.error = error.message;
          draw();
        }
        this.live = false;
        await sleep(1000 * retrySeconds);
        retrySeconds = Math.min(MAX_RETRY_SECONDS, 2 * retrySeconds);
      }
    }
  }

  // -- selection -------------------------------------------------------------------------------------------------------

  function showOnly(name) {
    for (const other of shown.keys()) if (other !== name) removeRun(other);
    addRun(name);
    primary = name;
    onSelectionChange();
  }

  function addRun(name) {
    if (shown.has(name)) return;
    const used = new Set([...shown.values()].map((run) => run.color));
    let color = 0;
    while (used.has(color)) color++;
    shown.set(name, new LiveRun(name, color));
  }

  function removeRun(name) {
    shown.get(name)?.controller.abort();
    shown.delete(name);
  }

  function toggleRun(name, checked) {
    if (checked) addRun(name);
    else removeRun(name);
    if (!shown.has(primary)) primary = shown.keys().next().value ?? null;
    onSelectionChange();
  }

  function onSelectionChange() {
    save("runs.shown", [...shown.keys()]);
    drawnRecord = undefined;
    drawList();
    draw();
  }

  // -- drawing ---------------------------------------------------------------------------------------------------------

  const isStalled = (row) => row?.status === "running" && row.quiet > STALLED_SECONDS;

  function statusBadge(status, stalled) {
    const shownStatus = stalled ? "stalled" : status;
    return h("span.badge", { dataset: { status: shownStatus } }, stalled ? "stalled?" : (status ?? "…"));
  }

  function drawList() {
    const focused = document.activeElement?.id;
    runList.replaceChildren(...list.map((row, i) => drawListRow(row, `run-${i}`)));
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  }

  function drawListRow(row, id) {
    const run = shown.get(row.name);
    const isPrimary = row.name === primary;
    const disabled = row.status === "unreadable";
    const box = h("input", {
      type: "checkbox",
      id: `${id}-box`,
      checked: Boolean(run),
      "aria-label": `Show ${row.name}`,
      disabled,
      onchange: () => {
        chosenByUser = true;
        toggleRun(row.name, box.checked);
      },
    });
    const onclick = () => {
      chosenByUser = true;
      if (shown.has(row.name) && shown.size > 1) {
        primary = row.name;
        onSelectionChange();
      } else showOnly(row.name);
    };
    const inProgress = row.status === "running" && row.steps;
    const selects = typeof row.best === "number" && row.metric !== "val_loss";
    const loss = selects ? row.best : (row.val_loss ?? row.loss);
    const lossName = selects ? row.metric : row.val_loss === null ? "loss" : "val";
    return h(
      "li",
      { className: isPrimary ? "primary" : "" },
      box,
      h(
        "button.run",
        { type: "button", id, "aria-current": isPrimary ? "true" : undefined, disabled, onclick },
        h("span.run-name", {}, run && swatch(run.color), row.name),
        h(
          "span.run-about",
          {},
          statusBadge(row.status, isStalled(row)),
          inProgress ? `${exactNumber(row.step)} of ${exactNumber(row.steps)} steps` : "",
          typeof loss === "number" ? ` ${lossName} ${loss.toFixed(3)}` : "",
          row.error ? h("span.help", {}, row.error) : "",
        ),
      ),
    );
  }

  function draw() {
    if (!visible) return;
    details.hidden = shown.size === 0;
    drawHeadline();
    drawCharts();
    drawSamples();
    const record = shown.get(primary)?.record;
    if (drawnRecord !== record) {
      drawnRecord = record;
      drawPlan();
    }
  }

  function drawHeadline() {
    const run = shown.get(primary);
    if (!run) return;
    const row = list.find((other) => other.name === primary);
    const stalled = run.status === "running" && isStalled(row);
    setChildren(
      headline,
      h(
        "div.row.headline-title",
        {},
        h("h2", {}, primary),
        statusBadge(run.status, stalled),
        run.live && h("span.live", {}, h("i"), "live"),
      ),
      h("p.help", {}, describeRun(run)),
      run.error && h("p.failed", { role: "alert" }, run.error),
      stalled &&
        h(
          "p.help",
          {},
          `The run is marked as running but has written nothing for ${duration(row.quiet)}. ` +
            "If its process was killed, continue it with `gptsmith train --resume`.",
        ),
      run.alarms.map(({ step, message }) => h("p.failed", {}, `Alarm at step ${exactNumber(step)}: ${message}`)),
      drawTiles(run),
      h("progress", { max: 1, value: run.progress, "aria-label": "Progress" }),
    );
  }

  function describeRun(run) {
    const { data, model, started } = run.record;
    const startTime = started && new Date(started).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
    const parts = [
      data?.spec && String([data.spec].flat()[0]).split("/").at(-1),
      model && `${model.num_hidden_layers} layers, hidden size ${model.hidden_size}`,
      run.loop.context && `context ${run.loop.context}`,
      startTime && `started ${startTime}`,
    ];
    return parts.filter(Boolean).join(" · ");
  }

  function drawTiles(run) {
    const tile = (label, value, note) =>
      h("div.tile", {}, h("dt", {}, label), h("dd", {}, value, note && h("small", {}, note)));
    const best = run.best();
    const { metric } = run.selection;
    const metricName = metric === "val_loss" ? "Validation loss" : metric;
    const left = run.secondsLeft === undefined ? "" : `, ${duration(run.secondsLeft)} left`;
    return h(
      "dl.tiles",
      {},
      tile("Step", exactNumber(run.step ?? 0), run.totalSteps ? `of ${exactNumber(run.totalSteps)}${left}` : ""),
      run.isAlignment
        ? tile("Reward", run.last("reward")?.toFixed(3) ?? "–", "of the last answers in training")
        : tile("Training loss", run.last("loss")?.toFixed(3) ?? "–", LOSS_UNIT),
      tile(metricName, best?.[metric].toFixed(3) ?? "–", best ? `best, at step ${exactNumber(best.step)}` : ""),
      tile("Throughput", compactNumber(run.last("tokens_per_second")), "tokens per second"),
      tile("Parameters", compactNumber(run.record.parameters), "trainable"),
      tile(
        "Time",
        shortDuration(run.last("time")),
        run.last("tokens") ? `${compactNumber(run.last("tokens"))} tokens` : "",
      ),
      ...run.tasks().map(({ task, shots, score, low, high, chance }) => {
        const guessing = typeof chance === "number" ? `, chance ${chance.toFixed(2)}` : "";
        const interval = `${low.toFixed(3)} to ${high.toFixed(3)}${guessing}`;
        return tile(shots ? `${task}, ${shots} shots` : task, score.toFixed(3), interval);
      }),
    );
  }

  function drawAxisButtons() {
    const buttons = Object.entries(AXES).map(([key, { label }]) => {
      const onchange = () => {
        axis = key;
        save("runs.axis", axis);
        drawCharts();
      };
      const checked = key === axis;
      const input = h("input.visually-hidden", { type: "radio", name: "axis", value: key, checked, onchange });
      return h("label.segment", {}, input, h("span", {}, label));
    });
    axisButtons.replaceChildren(...buttons);
  }

  function drawCharts() {
    const runs = [...shown.values()];
    const several = runs.length > 1;
    const validationColor = (run) => (several ? run.color : run.color + 1);
    const seriesName = (run, kind) => (several ? `${run.name} ${kind}` : kind);
    const notEmpty = ({ points }) => points.length > 0;
    const lossSeries = runs.flatMap((run) => [
      {
        name: seriesName(run, "training"),
        color: run.color,
        points: run.points("loss", axis),
        faint: several && run.last("val_loss") !== undefined,
      },
      {
        name: seriesName(run, "validation"),
        color: validationColor(run),
        points: run.points("val_loss", axis),
        dots: true,
      },
    ]);
    charts.loss.show(lossSeries.filter(notEmpty), AXES[axis], logarithmic);
    charts.loss.setSubtitle(several ? `${LOSS_UNIT}; faint: training, dots: validation` : LOSS_UNIT);
    for (const key of ["lr", "tokens_per_second", "grad_norm"]) {
      const series = runs.map((run) => ({
        name: several ? run.name : charts[key].title.toLowerCase(),
        color: run.color,
        points: run.points(key, axis),
      }));
      charts[key].show(series.filter(notEmpty), AXES[axis], false);
    }
    charts.loss.element.hidden = runs.length > 0 && runs.every((run) => run.isAlignment);
    drawAlignment(runs, { several, validationColor, seriesName });
    const legendRow = (color, label) => h("li", {}, swatch(color), label);
    const legendRows = runs.flatMap((run) =>
      several
        ? [legendRow(run.color, run.name)]
        : [legendRow(run.color, "training"), legendRow(validationColor(run), "validation")],
    );
    setChildren(legend, legendRows);
  }

  // What runs that learn from rewards measure, in training and on held-out prompts.
  function drawAlignment(runs, { several, validationColor, seriesName }) {
    const aligned = runs.filter((run) => run.isAlignment);
    const metrics = new Map(aligned.flatMap(alignmentMetrics).map((metric) => [metric.key, metric]));
    alignmentRow.hidden = metrics.size === 0;
    for (const [key, { title, unit, min }] of metrics) {
      if (!alignmentCharts.has(key)) {
        const chart = new Chart({ title, unit, format: significant, height: 190, min });
        alignmentCharts.set(key, chart);
        alignmentRow.append(chart.element);
      }
      const series = aligned.flatMap((run) => [
        { name: seriesName(run, "training"), color: run.color, points: run.points(key, axis), faint: several },
        {
          name: seriesName(run, "held-out"),
          color: validationColor(run),
          points: run.points(`val_${key}`, axis),
          dots: true,
        },
      ]);
      alignmentCharts.get(key).show(
        series.filter(({ points }) => points.length > 0),
        AXES[axis],
        false,
      );
    }
    for (const [key, chart] of alignmentCharts) chart.element.hidden = !metrics.has(key);
  }

  function drawSamples() {
    const samples = shown.get(primary)?.samples ?? [];
    sampleCard.hidden = samples.length === 0;
    const otherRun = sampleInput.dataset.run !== primary;
    const atEnd = Number(sampleInput.value) === Number(sampleInput.max);
    sampleInput.dataset.run = primary ?? "";
    sampleInput.max = Math.max(0, samples.length - 1);
    sampleInput.disabled = samples.length < 2;
    if (atEnd || otherRun) sampleInput.value = preferredSample(samples);
    drawSample();
  }

  function drawSample() {
    const sample = shown.get(primary)?.samples[Number(sampleInput.value)];
    if (!sample) return;
    sampleLabel.textContent = `step ${exactNumber(sample.step)}, temperature ${sample.temperature}`;
    sampleInput.setAttribute("aria-valuetext", sampleLabel.textContent);
    setChildren(sampleText, sample.prompt && h("b", {}, sample.prompt), sample.text);
  }

  function drawPlan() {
    const run = shown.get(primary);
    planCard.hidden = !run?.record.config;
    if (planCard.hidden) return;
    const { config, model, data, machine, ...rest } = run.record;
    delete rest.plan; // shown above the tables
    delete rest.choice;
    const tables = Object.entries({ training: config, model, data, machine, run: rest }).filter(
      ([, settings]) => settings && Object.keys(settings).length,
    );
    const open = planCard.querySelector("details")?.open;
    setChildren(
      planCard,
      h("h2", { id: "plan-title" }, "Plan and settings"),
      h("p", {}, describePlan(run)),
      run.reasons.length > 0 &&
        h(
          "ul.reasons",
          {},
          run.reasons.map((reason) => h("li", {}, reason)),
        ),
      h(
        "details",
        { open },
        h("summary", {}, "All settings"),
        h(
          "div.groups",
          {},
          tables.map(([title, settings]) => settingsTable(title, settings)),
        ),
      ),
    );
  }

  function settingsTable(title, settings) {
    const rows = flatten(settings).map(([key, value]) =>
      h("tr", {}, h("th", { scope: "row" }, key), h("td", {}, String(value ?? "–"))),
    );
    return h("table.settings", {}, h("caption", {}, title), h("tbody", {}, rows));
  }

  return {
    onShow: () => {
      visible = true;
      refresh();
      draw();
    },
    onHide: () => {
      visible = false;
    },
    focus: () => runList.querySelector("button")?.focus(),
  };
}
