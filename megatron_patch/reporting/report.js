"use strict";
// Draws the report from the JSON in #data. A run has columns (steps, evaluations), a chart has series, a series holds one run's values.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const last = (list) => list[list.length - 1];
  const finite = (value) => typeof value === "number" && Number.isFinite(value);

  // ---- Elements. Labels and options come from users, so they are set through textContent, never as markup.
  function node(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "style") element.style.cssText = value; else element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }
  function shape(parent, tag, attributes = {}, text = null) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== null) element.textContent = text;
    parent.append(element);
    return element;
  }

  // ---- Formatting of numbers.
  function count(value) {
    for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
      if (Math.abs(value) >= size * 0.9995) return `${Number((value / size).toPrecision(3))}${unit}`;
    }
    return `${Number(value.toPrecision(3))}`;
  }
  function duration(seconds) {
    const s = Math.round(seconds), pad = (n) => String(n).padStart(2, "0");
    if (s < 60) return `${s} s`;
    if (s < 3600) return `${Math.floor(s / 60)} min${s % 60 ? ` ${pad(s % 60)} s` : ""}`;
    if (s < 86400) return `${Math.floor(s / 3600)} h${s % 3600 >= 60 ? ` ${pad(Math.floor((s % 3600) / 60))} min` : ""}`;
    return `${Math.floor(s / 86400)} d${s % 86400 >= 3600 ? ` ${pad(Math.floor((s % 86400) / 3600))} h` : ""}`;
  }
  const loss = (value) => value.toFixed(3);
  const percent = (value) => `${Number((100 * value).toPrecision(3))}%`;
  const short = (value) => (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? value.toExponential(2).replace(/\.?0+e/, "e") : `${Number(value.toPrecision(3))}`);
  const gib = (value) => `${Number(value.toPrecision(3))} GiB`;

  // ---- Runs and the three horizontal axes.
  const referenceFlops = Math.max(...data.runs.map((run) => run.total_tokens * run.token_flops));
  const reference = data.runs.find((run) => run.total_tokens * run.token_flops === referenceFlops);
  const axes = {
    tokens: { name: "tokens", caption: "tokens read", format: count, of: (run, point) => point.tokens },
    cost: {
      name: "cost", caption: `cost relative to token-level training on ${count(reference.total_tokens)} tokens`, format: (v) => `${Number(v.toPrecision(3))}`,
      of: (run, point) => (point.cost_tokens * run.token_flops) / referenceFlops,
    },
    time: { name: "time", caption: "time without the pauses before restarts", format: duration, of: (run, point) => point.seconds_so_far ?? point.seconds },
  };
  const runs = data.runs.map((run, index) => {
    const made = { ...run, index, color: `var(--c${index % 8})`, shown: true };
    for (const columns of [made.steps, made.evaluations]) {
      columns.x = {};
      for (const [name, axis] of Object.entries(axes)) {
        columns.x[name] = columns.step.map((_, i) => axis.of(made, { tokens: columns.tokens[i], cost_tokens: columns.cost_tokens[i], seconds: columns.seconds[i] }));
      }
    }
    return made;
  });
  const several = runs.length > 1;
  const state = { axis: "tokens", log: false, smoothing: 40, zoom: null, printing: false };
  const visible = () => runs.filter((run) => run.shown);
  const endOf = (run) => Math.max(last(run.steps.x[state.axis]), last(run.evaluations.x[state.axis]) ?? 0);
  const stageEnd = (run, index) => (index + 1 < run.stages.length ? axes[state.axis].of(run, run.stages[index + 1]) : endOf(run));
  const sizes = (run) => run.stages.map((stage) => stage.patch_size).join(" → ");

  // ---- Scales.
  function niceStep(span, wanted, factors = [1, 2, 2.5, 5, 10]) {
    const rough = span / Math.max(1, wanted), power = 10 ** Math.floor(Math.log10(rough));
    return power * factors.find((factor) => factor * power >= rough * 0.999);
  }
  function linearTicks(low, high, wanted) {
    if (!(high > low)) return [low];
    const step = niceStep(high - low, wanted), ticks = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) ticks.push(Number((n * step).toPrecision(12)));
    return ticks;
  }
  function timeTicks(low, high, wanted) {
    const units = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 432000, 864000];
    const step = units.find((unit) => (high - low) / unit <= wanted + 0.5) ?? niceStep((high - low) / 864000, wanted) * 864000;
    const ticks = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high; n += 1) ticks.push(n * step);
    return ticks;
  }
  function logTicks(low, high, wanted) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
    }
    const inside = found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
    if (inside.length < 3) return linearTicks(low, high, wanted).filter((tick) => tick > 0);
    const decades = inside.filter((tick) => Math.abs(Math.log10(tick) - Math.round(Math.log10(tick))) < 1e-9);
    return inside.length > wanted * 1.6 && decades.length > 2 ? decades : inside;
  }

  // ---- Smoothing: an exponential average with bias correction that restarts at each stage.
  const windowOf = (points) => (state.smoothing === 0 ? 1 : 1 + (state.smoothing / 100) ** 2 * (points / 8));
  function smooth(values, stages) {
    const keep = 1 - 1 / windowOf(values.length);
    let sum = 0, weight = 0;
    return values.map((value, i) => {
      if (i > 0 && stages && stages[i] !== stages[i - 1]) sum = weight = 0;
      if (!finite(value)) return null;
      sum = keep * sum + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
      return sum / weight;
    });
  }

  // ---- Series. A part is an interval that is drawn without a gap.
  const stepSeries = (name, wanted = () => true) => () => visible().map((run) => {
    const values = run.steps[name].map((value, i) => (wanted(run.steps.patch_size[i]) ? value : null));
    return { run, columns: run.steps, values, drawn: smooth(values, run.steps.stage_index), faint: state.smoothing > 0, cut: true };
  }).filter((series) => series.values.some(finite));
  const heldOut = (name, wanted, more = {}) => () => visible().map((run) => {
    const values = run.evaluations[name].map((value, i) => (wanted(run.evaluations.patch_size[i]) ? value : null));
    return { run, columns: run.evaluations, values, drawn: values, faint: false, cut: false, ...more };
  }).filter((series) => series.values.some(finite));

  function partsOf(series, values) {
    const parts = [], { patch_size: k, stage_index: stage } = series.columns;
    let part = null;
    values.forEach((value, i) => {
      if (!finite(value)) { part = null; return; }
      if (part && (series.cut ? stage[i] !== stage[i - 1] : k[i] > 1 !== k[i - 1] > 1)) {
        // The held-out loss belongs to one model on both sides of a switch, so its curve continues. The training loss changes its meaning there.
        const before = last(part.points);
        part = { patches: k[i] > 1, points: series.cut ? [] : [before] };
        parts.push(part);
      }
      if (!part) { part = { patches: k[i] > 1, points: [] }; parts.push(part); }
      part.points.push(i);
    });
    return parts;
  }

  // ---- Charts.
  const charts = [];
  const tip = byId("tip");

  class Chart {
    constructor(parent, spec) {
      this.spec = { height: 190, right: 12, ...spec };
      this.card = node("article", { class: `card${spec.wide ? " wide" : ""}` }, node("h2", {}, spec.title), node("p", { class: "about" }, spec.about));
      parent.append(this.card);
      this.svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      this.svg.setAttribute("role", "img");
      this.svg.setAttribute("aria-label", `${spec.title}. ${spec.about}`);
      this.card.append(this.svg);
      this.svg.addEventListener("pointermove", (event) => this.point(event));
      this.svg.addEventListener("pointerleave", () => leave());
      this.svg.addEventListener("pointerdown", (event) => { if (event.button === 0 && event.pointerType === "mouse") this.from = this.value(event); });
      this.svg.addEventListener("pointerup", (event) => this.release(event));
      this.svg.addEventListener("dblclick", () => zoomTo(null));
      charts.push(this);
    }

    width(paper) {
      // For printing, each chart is drawn at a fixed width and scaled to its column.
      return state.printing ? paper : Math.max(240, this.svg.clientWidth || this.card.clientWidth - 36);
    }

    clear(width, height) {
      this.svg.replaceChildren();
      this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.svg.style.height = `${height}px`;
    }

    draw() {
      const { spec, svg } = this;
      const parent = this.card.parentElement.classList;
      const width = this.width(spec.wide || !parent.contains("grid") ? 880 : parent.contains("two") ? 430 : 285);
      this.series = spec.series();
      const lanes = spec.lanes ? visible() : [];
      const laneHeight = 25;
      const bottom = 38 + lanes.length * laneHeight;
      const height = spec.height + (lanes.length ? lanes.length * laneHeight + 4 : 0);
      this.clear(width, height);
      const empty = this.series.length === 0;
      this.card.style.display = empty && spec.optional ? "none" : "";
      if (empty) { shape(svg, "text", { x: 0, y: 24, class: "caption" }, spec.empty ?? "no measurements yet"); this.box = null; return; }
      const domain = state.zoom ?? [0, Math.max(...visible().map(endOf), 1e-9)];
      const [low, high] = this.range(domain);
      const useLog = state.log && low > 0;
      const box = { left: 50, right: width - (spec.right ?? 12), top: several ? 10 : 24, bottom: height - bottom };
      const x = (value) => box.left + ((value - domain[0]) / (domain[1] - domain[0])) * (box.right - box.left);
      const map = useLog ? Math.log : (value) => value;
      const y = (value) => box.bottom - ((map(value) - map(low)) / (map(high) - map(low) || 1)) * (box.bottom - box.top);
      Object.assign(this, { box, x, y, domain });

      const clip = `clip-${charts.indexOf(this)}`;
      const rectangle = shape(shape(svg, "defs"), "clipPath", { id: clip });
      shape(rectangle, "rect", { x: box.left, y: box.top - 4, width: box.right - box.left, height: box.bottom - box.top + 5 });

      this.bands(svg);
      const wantedY = Math.max(3, Math.round((box.bottom - box.top) / 46));
      for (const tick of useLog ? logTicks(low, high, wantedY) : linearTicks(low, high, wantedY)) {
        shape(svg, "line", { class: "gridline", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) });
        shape(svg, "text", { x: box.left - 8, y: y(tick) + 4, "text-anchor": "end" }, (spec.tick ?? spec.format)(tick));
      }
      this.horizontal(svg, width, spec.lanes);
      const plot = shape(svg, "g", { "clip-path": `url(#${clip})` });
      if (several) this.switchLines(plot);
      for (const series of this.series) this.curve(plot, series);
      if (spec.rings) this.rings(svg);
      if (spec.ends) this.endLabels(svg, width);
      lanes.forEach((run, row) => this.lane(svg, run, box.bottom + 44 + row * laneHeight, clip));
      this.cross = shape(svg, "g", { class: "hover" });
    }

    horizontal(svg, width, always = false) {
      const { box, x, domain } = this;
      const wanted = Math.max(3, Math.floor((box.right - box.left) / 82));
      const ticks = state.axis === "time" ? timeTicks(...domain, wanted) : linearTicks(...domain, wanted);
      shape(svg, "line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
      for (const tick of ticks) {
        const at = x(tick);
        shape(svg, "line", { class: "axis", x1: at, x2: at, y1: box.bottom, y2: box.bottom + 4 });
        shape(svg, "text", { x: at, y: box.bottom + 17, "text-anchor": at > width - 24 ? "end" : "middle" }, axes[state.axis].format(tick));
      }
      const caption = axes[state.axis].caption;
      if (always || box.right - box.left > caption.length * 5.6) {
        shape(svg, "text", { class: "caption", x: box.right, y: box.bottom + 33, "text-anchor": "end" }, caption);
      }
    }

    range(domain) {
      // The initial fall of a loss would compress the rest, so without zoom it may extend beyond the top of the chart.
      let low = Infinity, high = -Infinity;
      for (const { columns, drawn, values, faint } of this.series) {
        const xs = columns.x[state.axis], inside = drawn.map((value, i) => (finite(value) && xs[i] >= domain[0] && xs[i] <= domain[1] ? value : null)).filter(finite);
        if (!inside.length) continue;
        low = Math.min(low, ...inside);
        const skipped = this.spec.falls && !state.zoom ? inside.slice(Math.min(inside.length - 1, Math.ceil(inside.length / 9))) : inside;
        high = Math.max(high, ...skipped);
        if (faint && !this.spec.falls) {
          const sorted = values.filter(finite).sort((a, b) => a - b);
          high = Math.max(high, sorted[Math.floor((sorted.length - 1) * 0.985)]);
        }
      }
      if (!Number.isFinite(low)) return [0, 1];
      if (this.spec.fromZero && !state.log) low = Math.min(0, low);
      const pad = (high - low || Math.abs(high) || 1) * 0.06;
      return [this.spec.fromZero && low === 0 ? 0 : state.log && low > 0 ? low * (low / high) ** 0.05 : low - pad, high + pad];
    }

    bands(svg) {
      if (several || !runs[0].shown) return;
      const { box, x } = this, run = runs[0];
      run.stages.forEach((stage, index) => {
        const from = Math.max(box.left, x(axes[state.axis].of(run, stage))), to = Math.min(box.right, x(stageEnd(run, index)));
        if (to <= from) return;
        if (stage.patch_size > 1) shape(svg, "rect", { x: from, y: box.top - 4, width: to - from, height: box.bottom - box.top + 4, fill: run.color, opacity: 0.07 });
        if (index > 0 && from > box.left) shape(svg, "line", { class: "switch", x1: from, x2: from, y1: box.top - 4, y2: box.bottom, stroke: run.color });
        if (to - from > 44) shape(svg, "text", { class: "caption", x: from, y: box.top - 9 }, `K = ${stage.patch_size}`);
      });
    }

    switchLines(plot) {
      for (const run of visible()) {
        for (const stage of run.stages.slice(1)) {
          const at = this.x(axes[state.axis].of(run, stage));
          shape(plot, "line", { class: "switch", x1: at, x2: at, y1: this.box.top, y2: this.box.bottom, stroke: run.color });
        }
      }
    }

    path(series, values, points) {
      const xs = series.columns.x[state.axis];
      return points.map((i, n) => `${n ? "L" : "M"}${this.x(xs[i]).toFixed(1)} ${this.y(values[i]).toFixed(1)}`).join("");
    }

    curve(plot, series) {
      const color = series.run.color;
      if (series.faint) for (const part of partsOf(series, series.values)) shape(plot, "path", { class: "raw", d: this.path(series, series.values, part.points), stroke: color });
      for (const part of partsOf(series, series.drawn)) {
        const dashed = part.patches && this.spec.dashes;
        if (series.dots || part.points.length === 1) {
          for (const i of part.points) shape(plot, "circle", { cx: this.x(series.columns.x[state.axis][i]), cy: this.y(series.drawn[i]), r: 2.6, fill: color });
        }
        if (!series.dots) shape(plot, "path", { class: `curve${dashed ? " patches" : ""}`, d: this.path(series, series.drawn, part.points), stroke: color });
      }
    }

    rings(svg) {
      for (const { run, columns, values } of this.series) {
        for (const stage of run.stages.slice(1)) {
          const i = columns.step.indexOf(stage.step);
          if (i < 0 || !finite(values[i])) continue;
          const at = this.x(columns.x[state.axis][i]), level = this.y(values[i]);
          if (at < this.box.left || at > this.box.right || level < this.box.top - 4 || level > this.box.bottom) continue;
          shape(svg, "circle", { class: "ring", cx: at, cy: level, r: 4.2, stroke: run.color });
        }
      }
    }

    endLabels(svg, width) {
      const labels = [];
      for (const { run, columns, values } of this.series) {
        let i = values.length - 1;
        while (i >= 0 && !finite(values[i])) i -= 1;
        const at = this.x(columns.x[state.axis][i]), level = this.y(values[i]);
        if (at > this.box.right + 1 || at < this.box.left || level < this.box.top - 6 || level > this.box.bottom + 6) continue;
        shape(svg, "circle", { cx: at, cy: level, r: 3.4, fill: run.color });
        labels.push({ at, level, text: loss(values[i]), color: run.color });
      }
      labels.sort((a, b) => a.level - b.level);
      for (let i = 1; i < labels.length; i += 1) {
        const above = labels.slice(0, i).filter((other) => Math.abs(other.at - labels[i].at) < 52);
        for (const other of above) labels[i].level = Math.max(labels[i].level, other.level + 14);
      }
      const over = labels.length ? Math.max(0, last(labels).level - this.box.bottom + 2) : 0;
      for (const label of labels) shape(svg, "text", { class: "end", x: Math.min(label.at + 8, width - 36), y: label.level - over + 4, style: `fill:${label.color}` }, label.text);
    }

    lane(svg, run, top, clip) {
      const { box, x } = this, xOf = (point) => x(axes[state.axis].of(run, point));
      const inside = (at) => at >= box.left - 1 && at <= box.right + 1;
      run.stages.forEach((stage, index) => {
        const from = Math.max(box.left, xOf(stage)), to = Math.min(box.right, x(stageEnd(run, index)));
        if (to <= from) return;
        const patches = stage.patch_size > 1;
        const band = shape(svg, "rect", { x: from, y: top, width: Math.max(1, to - from - 1.5), height: 15, rx: 4, fill: run.color, opacity: patches ? 0.92 : 0.3 });
        addTooltip(band, run, `${stage.name}, K = ${stage.patch_size}`, `starts at ${count(stage.tokens)} tokens, step ${stage.step.toLocaleString("en")}`);
        const text = to - from > 120 ? `${stage.name} · K = ${stage.patch_size}` : `K = ${stage.patch_size}`;
        if (to - from > text.length * 6.4 + 10) shape(svg, "text", { class: "inband", x: from + 7, y: top + 11.3, ...(patches ? {} : { style: `fill:${run.color}` }) }, text);
      });
      for (const save of run.checkpoints) {
        const at = xOf(save);
        if (!inside(at)) continue;
        const mark = shape(svg, "path", { class: "lane", d: `M${at} ${top + 16.5}l3 3.5l-3 3.5l-3 -3.5z`, fill: "currentColor", opacity: 0.55 });
        addTooltip(mark, run, `checkpoint ${save.folder}`, `${(save.bytes / 2 ** 20).toFixed(0)} MiB in ${save.seconds.toFixed(1)} s`);
      }
      for (const start of run.starts.slice(1)) {
        const at = xOf(start);
        if (inside(at)) addTooltip(shape(svg, "path", { d: `M${at} ${top - 1}v17`, stroke: "var(--ink)", "stroke-width": 2 }), run, "resumed", `at step ${start.step.toLocaleString("en")}`);
      }
      for (const event of run.events) {
        const at = xOf(event);
        if (inside(at)) addTooltip(shape(svg, "circle", { cx: at, cy: top + 7.5, r: 4.5, fill: "var(--alarm)", stroke: "var(--card)", "stroke-width": 1.5 }), run, event.name, event.text);
      }
    }

    value(event) {
      if (!this.box) return null;
      const frame = this.svg.getBoundingClientRect(), at = event.clientX - frame.left;
      return this.domain[0] + ((at - this.box.left) / (this.box.right - this.box.left)) * (this.domain[1] - this.domain[0]);
    }

    point(event) {
      const value = this.value(event);
      if (value === null || (tip.dataset.pinned && event.target.dataset && event.target.dataset.tooltip)) return;
      if (value < this.domain[0] || value > this.domain[1] * 1.01) { leave(); return; }
      for (const chart of charts) chart.showCross(value);
      if (this.from != null) this.showBrush(this.from, value);
      this.readOut(value, event);
    }

    showCross(value) {
      if (!this.box) return;
      this.cross.replaceChildren();
      const at = this.x(value);
      if (at < this.box.left || at > this.box.right) return;
      shape(this.cross, "line", { class: "cross", x1: at, x2: at, y1: this.box.top - 4, y2: this.box.bottom });
      for (const series of this.series) {
        const i = nearest(series, value);
        if (i < 0) continue;
        const level = this.y(series.drawn[i]);
        if (level >= this.box.top - 4 && level <= this.box.bottom + 1) {
          shape(this.cross, "circle", { cx: this.x(series.columns.x[state.axis][i]), cy: level, r: 3.4, fill: series.run.color, stroke: "var(--card)", "stroke-width": 1.5 });
        }
      }
    }

    showBrush(from, to) {
      const [a, b] = [this.x(from), this.x(to)].sort((p, q) => p - q);
      shape(this.cross, "rect", { class: "brush", x: a, y: this.box.top, width: b - a, height: this.box.bottom - this.box.top });
    }

    readOut(value, event) {
      const rows = this.series.map((series) => ({ series, i: nearest(series, value) })).filter(({ i }) => i >= 0);
      if (!rows.length) { leave(); return; }
      rows.sort((a, b) => b.series.drawn[b.i] - a.series.drawn[a.i]);
      tip.replaceChildren(node("div", { class: "where" }, `${this.spec.title.toLowerCase()} at ${axes[state.axis].format(value)}${state.axis === "tokens" ? " tokens" : state.axis === "cost" ? " of token level" : ""}`));
      for (const { series, i } of rows) {
        const { run, columns } = series;
        const kind = series.name ? ` ${series.name}` : "";
        const where = [`K = ${columns.patch_size[i]}`, `step ${columns.step[i].toLocaleString("en")}`, `${count(columns.tokens[i])} tokens`, `cost ${columns.x.cost[i].toFixed(3)}`, duration(columns.seconds[i])];
        tip.append(node("div", { class: "row" }, node("span", { class: "swatch", style: `background:${run.color}` }), node("span", {}, run.label + kind), node("b", {}, this.spec.format(series.drawn[i])), node("small", {}, where.join(" · "))));
      }
      placeTip(event);
    }

    release(event) {
      if (this.from == null) return;
      const to = this.value(event), from = this.from;
      this.from = null;
      if (Math.abs(this.x(to) - this.x(from)) > 8) zoomTo([from, to].sort((a, b) => a - b).map((v) => Math.max(0, v)));
    }
  }

  // ---- The load of experts of one run: a row for each block, a color for each cell.
  const LEVELS = 7;
  class HeatMap extends Chart {
    constructor(parent, run) {
      super(parent, { title: several ? `Load of experts: ${run.label}` : "Load of experts", about: "for each block, choices of its most used expert over the mean of its experts; 1 is perfect balance; of steps that share a cell, the worst" });
      this.run = run;
      this.series = [];
      const { load, most } = run.experts;
      const largest = load.reduce((a, row) => row.reduce((b, value) => (finite(value) && value > b ? value : b), a), 1);
      this.top = Math.max(most ?? largest, 1.05);
      const number = (value) => `${Number(value.toPrecision(value < 2 ? 3 : 2))}`;
      // Levels of equal ratios, from balance to the largest load that is possible.
      const bounds = Array.from({ length: LEVELS + 1 }, (_, n) => number(this.top ** (n / LEVELS)));
      const end = most === null ? " (largest so far)" : " (possible)";
      this.card.append(node("ul", { class: "levels" }, ...bounds.slice(1).map((bound, n) => node("li", {}, node("span", { class: "swatch", style: `background:var(--h${n})` }), `${bounds[n]} to ${bound}${n === LEVELS - 1 ? end : ""}`))));
    }

    level(load) { return Math.min(LEVELS - 1, Math.floor((LEVELS * Math.log(Math.max(load, 1))) / Math.log(this.top))); }

    draw() {
      const { run, svg } = this, { blocks, begin, end } = run.experts;
      this.card.style.display = run.shown ? "" : "none";
      if (!run.shown) { this.box = null; return; }
      const width = this.width(880);
      const row = Math.max(3, Math.min(20, Math.floor(340 / blocks.length))), height = 24 + row * blocks.length + 38;
      this.clear(width, height);
      const domain = state.zoom ?? [0, Math.max(...visible().map(endOf), 1e-9)];
      const box = { left: 50, right: width - 12, top: 24, bottom: height - 38 };
      const x = (value) => box.left + ((value - domain[0]) / (domain[1] - domain[0])) * (box.right - box.left);
      Object.assign(this, { box, x, domain, row });
      const placed = (places) => places.step.map((_, i) => x(axes[state.axis].of(run, { tokens: places.tokens[i], cost_tokens: places.cost_tokens[i], seconds: places.seconds[i] })));
      this.starts = placed(begin);
      this.ends = placed(end);
      this.cells(svg);
      this.labels(svg);
      this.turns(svg);
      this.horizontal(svg, width);
      this.cross = shape(svg, "g", { class: "hover" });
    }

    /** Returns the first pixel of a column and the one after its last, counted from the left of the map, which may be outside of it. */
    pixels(i) {
      const from = Math.round(this.starts[i] - this.box.left);
      return [from, Math.max(from + 1, Math.round(this.ends[i] - this.box.left))];
    }

    cells(svg) {
      const { box, row } = this, { load } = this.run.experts, width = Math.ceil(box.right - box.left);
      const paths = Array.from({ length: LEVELS }, () => []);
      load.forEach((values, n) => {
        // Columns that share a pixel show the worst of them.
        const worst = new Float64Array(width).fill(-1);
        values.forEach((value, i) => {
          if (!finite(value)) return;
          const [from, to] = this.pixels(i);
          for (let at = Math.max(0, from); at < Math.min(width, to); at += 1) worst[at] = Math.max(worst[at], this.level(value));
        });
        const y = box.bottom - (n + 1) * row, high = row < 8 ? row : row - 1;
        for (let at = 0, from = 0; at < width; from = at) {
          while (at < width && worst[at] === worst[from]) at += 1;
          if (worst[from] >= 0) paths[worst[from]].push(`M${box.left + from} ${y}h${at - from}v${high}h${from - at}z`);
        }
      });
      paths.forEach((parts, n) => { if (parts.length) shape(svg, "path", { class: "cell", d: parts.join(""), fill: `var(--h${n})` }); });
    }

    labels(svg) {
      const { box, row } = this, every = Math.ceil(15 / row);
      this.run.experts.blocks.forEach((block, n) => {
        if (n % every === 0) shape(svg, "text", { x: box.left - 8, y: box.bottom - (n + 0.5) * row + 4, "text-anchor": "end" }, String(block));
      });
      shape(svg, "text", { class: "caption", x: box.left - 8, y: box.top - 9, "text-anchor": "end" }, "block");
    }

    turns(svg) {
      const { run, box, x } = this;
      run.stages.forEach((stage, index) => {
        const at = x(axes[state.axis].of(run, stage)), from = Math.max(box.left, at), to = Math.min(box.right, x(stageEnd(run, index)));
        if (to <= from) return;
        if (index > 0 && at > box.left) for (const name of ["edge", "turn"]) shape(svg, "line", { class: name, x1: at, x2: at, y1: box.top - 4, y2: box.bottom });
        if (to - from > 44) shape(svg, "text", { class: "caption", x: from, y: box.top - 9 }, `K = ${stage.patch_size}`);
      });
    }

    readOut(value, event) {
      const { run, box, row } = this, { blocks, experts, begin, end, load, dead, entropy, patch_size: k } = run.experts;
      const n = Math.floor((box.bottom - (event.clientY - this.svg.getBoundingClientRect().top)) / row), at = Math.floor(this.x(value) - box.left);
      const here = n < 0 || n >= blocks.length ? [] : load[n].map((_, i) => i).filter((i) => finite(load[n][i]) && this.pixels(i)[0] <= at && at < this.pixels(i)[1]);
      if (!here.length) { tip.hidden = true; return; }
      const i = here.reduce((a, b) => (load[n][b] > load[n][a] ? b : a)), number = (step) => step.toLocaleString("en");
      const [from, to] = [Math.max(box.left, this.starts[i]), Math.min(box.right, this.ends[i])];
      shape(this.cross, "rect", { class: "chosen", x: from, y: box.bottom - (n + 1) * row, width: Math.max(2, to - from), height: row });
      const one = end.step[i] - begin.step[i] === 1, first = begin.step[i] + 1;
      const numbers = [
        dead[n][i] === 0 ? "no dead experts" : finite(dead[n][i]) ? `${one ? "" : "at most "}${dead[n][i]} dead expert${dead[n][i] === 1 ? "" : "s"}${experts === null ? "" : ` of ${experts}`}` : null,
        finite(entropy[n][i]) ? `entropy of the router ${one ? "" : "at least "}${entropy[n][i].toFixed(2)} nats` : null,
      ];
      const where = [`K = ${k[i]}`, one ? `step ${number(first)}` : `steps ${number(first)} to ${number(end.step[i])}`, `${count(end.tokens[i])} tokens`, duration(end.seconds[i])];
      tip.replaceChildren(node("div", { class: "where" }, `${several ? `${run.label}, ` : ""}block ${blocks[n]}`),
        node("div", { class: "row" }, node("span", { class: "swatch", style: `background:var(--h${this.level(load[n][i])})` }), node("span", {}, "largest load"), node("b", {}, `${load[n][i].toFixed(2)} × mean`),
          ...[numbers, where].map((parts) => node("small", {}, parts.filter((part) => part !== null).join(" · ")))));
      placeTip(event);
    }
  }

  /** Returns the index of the point of a series that is nearest to a value on the axis, or -1 without a point within a twelfth of the width. */
  function nearest(series, value) {
    const xs = series.columns.x[state.axis];
    let low = 0, high = xs.length - 1;
    while (low < high) { const middle = (low + high) >> 1; if (xs[middle] < value) low = middle + 1; else high = middle; }
    const reach = (state.zoom ? state.zoom[1] - state.zoom[0] : Math.max(...visible().map(endOf))) / 12;
    let best = -1;
    for (let i = Math.max(0, low - 40); i <= Math.min(xs.length - 1, low + 40); i += 1) {
      if (finite(series.drawn[i]) && Math.abs(xs[i] - value) < reach && (best < 0 || Math.abs(xs[i] - value) < Math.abs(xs[best] - value))) best = i;
    }
    return best;
  }
  function placeTip(event) {
    tip.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = tip;
    const right = event.clientX + 18 + width < window.innerWidth;
    tip.style.left = `${Math.max(6, right ? event.clientX + 18 : event.clientX - width - 18)}px`;
    tip.style.top = `${Math.max(6, Math.min(event.clientY + 14, window.innerHeight - height - 8))}px`;
  }
  function leave() {
    tip.hidden = true;
    for (const chart of charts) if (chart.cross) chart.cross.replaceChildren();
  }
  function addTooltip(element, run, title, text) {
    element.dataset.tooltip = "1";
    element.addEventListener("pointermove", (event) => {
      event.stopPropagation();
      tip.replaceChildren(node("div", { class: "where" }, run.label), node("b", {}, title), node("div", {}, text));
      placeTip(event);
    });
  }

  // ---- Tables.
  function lastHeldOut(run) {
    const values = run.evaluations.token_loss.filter(finite);
    return values.length ? last(values) : null;
  }
  function meanOf(run, name, stage = null) {
    let sum = 0, time = 0;
    run.steps[name].forEach((value, i) => { if (finite(value) && (stage === null || run.steps.stage_index[i] === stage)) { sum += value * run.steps.step_seconds[i]; time += run.steps.step_seconds[i]; } });
    return time ? sum / time : null;
  }
  function rateOf(run, stage) {
    // Tokens per second of the steps; evaluations and checkpoints are excluded.
    const mean = meanOf(run, "tokens_per_second", stage);
    return mean === null ? "" : count(mean);
  }
  function summary() {
    const best = Math.min(...runs.map((run) => lastHeldOut(run) ?? Infinity));
    const anyMfu = runs.some((run) => run.steps.mfu.some(finite));
    const head = ["run", "", "patch sizes", "held-out token loss", "tokens", "cost", "time", "tokens/s", anyMfu ? "MFU" : null, "memory", "checkpoints"].filter((name) => name !== null);
    const rows = runs.map((run) => {
      const held = lastHeldOut(run), mfu = meanOf(run, "mfu"), columns = run.steps;
      const cells = [
        node("td", {}, node("span", { class: "run" }, node("span", { class: "swatch", style: `background:${run.color}` }), run.label)),
        node("td", { class: "left" }, node("span", { class: `state ${run.state}` }, run.state)),
        node("td", {}, sizes(run)),
        node("td", { class: held !== null && held === best && several ? "best" : "" }, held === null ? "none" : held.toFixed(4)),
        node("td", {}, count(last(columns.tokens)), run.state === "done" ? "" : node("small", {}, ` of ${count(run.total_tokens)}`)),
        node("td", {}, last(columns.x.cost).toFixed(3)),
        node("td", {}, duration(last(columns.seconds))),
        node("td", {}, run.stages.map((stage) => rateOf(run, stage.index)).join(" → ")),
        anyMfu ? node("td", {}, mfu === null ? "" : percent(mfu)) : null,
        node("td", {}, gib(Math.max(...columns.memory_gib))),
        node("td", {}, String(run.checkpoints.length)),
      ];
      return node("tr", {}, ...cells);
    });
    byId("summary").append(node("article", { class: "card" }, node("div", { class: "scroll", style: "margin-top:-4px" }, node("table", {}, node("thead", {}, node("tr", {}, ...head.map((name, i) => node("th", i === 1 || i === 0 ? { class: "left" } : {}, name)))), node("tbody", {}, ...rows))),
      node("p", { class: "about" }, `cost: FLOPs so far, relative to token-level training on ${count(reference.total_tokens)} tokens; tokens/s: per stage, without evaluations and checkpoints`)));
    const notes = runs.flatMap((run) => [...run.notes, ...(run.thinned > 1 ? [`of every ${run.thinned} steps, shows the last one and those with the lowest and highest loss and the highest gradient norm`] : [])].map((note) => `${run.label}: ${note}`));
    byId("notes").hidden = notes.length === 0;
    byId("notes").append(...notes.map((note) => node("div", {}, note)));
  }
  function mixes() {
    const named = runs.filter((run) => run.blend.length);
    const card = node("article", { class: "card mixes" }, node("h2", {}, "Data mix"), node("p", { class: "about" }, "share of tokens per corpus; a stage is listed if it has its own blend"));
    const names = [...new Set(named.flatMap((run) => [...run.blend, ...run.stages.flatMap((stage) => stage.blend ?? [])].map(([name]) => name)))];
    const bar = (blend) => [
      node("div", { class: "mix" }, ...blend.map(([name, share]) => node("i", { style: `width:${100 * share}%;background:var(--c${names.indexOf(name) % 8});opacity:.8`, title: `${name}: ${percent(share)}` }))),
      node("ul", {}, ...blend.map(([name, share]) => node("li", {}, node("span", { class: "swatch", style: `background:var(--c${names.indexOf(name) % 8});opacity:.8` }), `${name} ${percent(share)}`))),
    ];
    const rows = [];
    for (const run of named) {
      rows.push({ key: JSON.stringify(run.blend), title: run.label, blend: run.blend });
      for (const stage of run.stages) if (stage.blend) rows.push({ key: `${run.label} ${stage.name}`, title: `${run.label}, ${stage.name}`, blend: stage.blend });
    }
    const byBlend = new Map();
    for (const row of rows) byBlend.set(row.key, byBlend.has(row.key) ? { ...row, title: `${byBlend.get(row.key).title}, ${row.title}` } : row);
    for (const row of byBlend.values()) card.append(node("h3", {}, byBlend.size === 1 && several ? "all runs" : row.title), ...bar(row.blend));
    if (!named.length) card.append(node("p", { class: "empty" }, "unknown: no checkpoint could be read"));
    return card;
  }
  function timeline() {
    const rows = runs.flatMap((run) => [
      ...run.starts.map((start, i) => ({ run, at: start, what: i ? "resumed" : "started", more: i ? "" : `${run.ranks} rank${run.ranks > 1 ? "s" : ""}${run.device ? ` on ${run.device}` : ""}` })),
      ...run.stages.slice(1).map((stage, i) => ({ run, at: { ...stage, seconds_so_far: stage.seconds }, what: "switch", more: `${run.stages[i].name} (K = ${run.stages[i].patch_size}) → ${stage.name} (K = ${stage.patch_size})` })),
      ...run.checkpoints.map((save) => ({ run, at: save, what: "checkpoint", more: `${save.folder}, ${(save.bytes / 2 ** 20).toFixed(0)} MiB in ${save.seconds.toFixed(1)} s` })),
      ...run.events.map((event) => ({ run, at: event, what: event.name, more: event.text, alarm: true })),
    ]);
    rows.sort((a, b) => a.run.index - b.run.index || a.at.step - b.at.step || a.at.seconds_so_far - b.at.seconds_so_far);
    const body = rows.map(({ run, at, what, more, alarm }) => node("tr", {},
      node("td", {}, node("span", { class: "run" }, node("span", { class: "swatch", style: `background:${run.color}` }), at.step.toLocaleString("en"))),
      node("td", { class: "left", ...(alarm ? { style: "color:var(--alarm)" } : {}) }, what), node("td", { class: "left wrap" }, more), node("td", { class: "faint" }, count(at.tokens)), node("td", { class: "faint" }, duration(at.seconds_so_far))));
    const head = ["step", "event", "", "tokens", "time"].map((name, i) => node("th", i < 3 ? { class: "left" } : {}, name));
    return node("article", { class: "card" }, node("h2", {}, "Timeline"), node("p", { class: "about" }, "starts, switches, checkpoints and other events"),
      node("div", { class: "scroll course" }, node("table", {}, node("thead", {}, node("tr", {}, ...head)), node("tbody", {}, ...body))));
  }
  function differences() {
    const text = (value) => (value === null || value === undefined ? "default" : Array.isArray(value) ? value.join(" ") : String(value));
    const rows = data.options.map(([name, values]) => node("tr", {}, node("td", {}, node("code", {}, name.replaceAll("_", "-"))),
      ...values.map((value, i) => node("td", { class: `left wrap${i && runs[i].options && JSON.stringify(value) !== JSON.stringify(values[0]) ? " other" : ""}` }, node("code", {}, Object.keys(runs[i].options).length ? text(value) : "unknown")))));
    const head = [node("th", { class: "left" }, "option"), ...runs.map((run) => node("th", { class: "left" }, node("span", { class: "swatch", style: `background:${run.color};margin-right:7px` }), several ? run.label : "value"))];
    const title = several ? "Differences between the runs" : "Given options";
    const about = several ? "options that differ between the runs; values that differ from the first run are marked" : "options set by the command line or a configuration file";
    byId("differences").append(node("article", { class: "card" }, node("h2", {}, title), node("p", { class: "about" }, about),
      rows.length ? node("div", { class: "scroll" }, node("table", {}, node("thead", {}, node("tr", {}, ...head)), node("tbody", {}, ...rows))) : node("p", { class: "empty" }, several ? "no differences found" : "unknown")));
  }

  // ---- Controls.
  function segmented(id, choices, chosen, choose) {
    const buttons = choices.map(([value, text]) => {
      const button = node("button", { type: "button", "aria-pressed": String(value === chosen) }, text);
      button.addEventListener("click", () => {
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        choose(value);
      });
      return button;
    });
    byId(id).append(...buttons);
  }
  function zoomTo(zoom) { state.zoom = zoom; byId("reset").hidden = zoom === null; leave(); drawAll(); }
  function drawAll() { for (const chart of charts) chart.draw(); }

  segmented("axis", [["tokens", "tokens"], ["cost", "cost"], ["time", "time"]], state.axis, (value) => { state.axis = value; zoomTo(null); });
  segmented("scale", [[false, "linear"], [true, "log"]], state.log, (value) => { state.log = value; drawAll(); });
  const slider = byId("smoothing");
  const showSmoothing = () => {
    state.smoothing = Number(slider.value);
    byId("smoothing-value").textContent = state.smoothing === 0 ? "off" : `${Math.round(windowOf(Math.max(...runs.map((run) => run.steps.step.length))))} steps`;
  };
  slider.addEventListener("input", () => { showSmoothing(); drawAll(); });
  byId("reset").addEventListener("click", () => zoomTo(null));
  byId("legend").append(...runs.map((run) => {
    const button = node("button", { type: "button", "aria-pressed": "true", title: `${run.folder}: show or hide` }, node("span", { class: "swatch", style: `background:${run.color}` }), node("span", { class: "name" }, run.label));
    button.addEventListener("click", () => {
      if (run.shown && visible().length === 1) return;
      run.shown = !run.shown;
      button.setAttribute("aria-pressed", String(run.shown));
      drawAll();
    });
    return button;
  }));
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  root.dataset.theme = dark.matches ? "dark" : "light";
  dark.addEventListener("change", () => { root.dataset.theme = dark.matches ? "dark" : "light"; });
  byId("theme").addEventListener("click", () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; });

  // ---- The page. Token losses and patch losses never share a chart.
  const patches = runs.some((run) => run.stages.some((stage) => stage.patch_size > 1));
  summary();
  new Chart(byId("hero"), {
    title: "Held-out token loss", about: `nats per token, always at K = 1${patches ? "; dashed in patch stages, a ring marks the switch" : ""}`, format: (v) => v.toFixed(4), tick: short,
    height: 400, right: 58, series: heldOut("token_loss", () => true), falls: true, dashes: true, rings: true, ends: true, lanes: true, empty: "no evaluation yet",
  });
  // ---- One chart for each corpus of a blend. A run on one of them alone is drawn with the blends, but its loss needs no chart of its own.
  const ofCorpus = (run, name) => run.corpora.find((corpus) => corpus.name === name);
  const corpusNames = [...new Set(runs.filter((run) => run.corpora.length > 1).flatMap((run) => run.corpora.map((corpus) => corpus.name)))];
  byId("corpora").className = `grid ${corpusNames.length === 2 ? "two" : "three"}`;
  byId("corpora").style.display = corpusNames.length ? "" : "none";
  for (const name of corpusNames) {
    const weights = [...new Set(runs.map((run) => ofCorpus(run, name)?.weight).filter(finite))].map(percent);
    new Chart(byId("corpora"), {
      title: `Held-out: ${name}`, about: `nats per token, at K = 1; ${weights.join(" or ")} of the held-out token loss`, format: (v) => v.toFixed(4), tick: short, right: 58, falls: true, dashes: true, ends: true, optional: true,
      series: () => visible().filter((run) => ofCorpus(run, name)).map((run) => {
        const values = ofCorpus(run, name).token_loss;
        return { run, columns: run.evaluations, values, drawn: values, faint: false, cut: false };
      }).filter((series) => series.values.some(finite)),
    });
  }
  const losses = byId("losses");
  new Chart(losses, { title: "Training token loss", about: "nats per token, in stages with K = 1", format: (v) => v.toFixed(4), tick: short, height: 230, series: stepSeries("loss", (k) => k === 1), falls: true, empty: "no stage with K = 1 has begun", wide: !patches });
  if (patches) {
    const trained = stepSeries("loss", (k) => k > 1), held = heldOut("patch_loss", (k) => k > 1, { dots: true, name: "held out" });
    new Chart(losses, { title: "Patch loss", about: "nats per label at the stage's K, not comparable with a token loss; dots: held-out data", format: (v) => v.toFixed(4), tick: short, height: 230, series: () => [...trained(), ...held()], falls: true });
  }
  const rates = byId("rates");
  new Chart(rates, { title: "Learning rate", about: "at each step", format: short, series: () => stepSeries("lr")().map((series) => ({ ...series, drawn: series.values, faint: false })), fromZero: true });
  new Chart(rates, { title: "Gradient norm", about: "before clipping", format: short, series: stepSeries("grad_norm"), fromZero: true });
  new Chart(rates, { title: "Throughput", about: "tokens per second, all ranks", format: count, series: stepSeries("tokens_per_second"), fromZero: true });
  if (runs.some((run) => run.steps.mfu.some(finite))) new Chart(rates, { title: "MFU", about: "model FLOPs relative to the peak of the device", format: percent, series: stepSeries("mfu"), fromZero: true });
  else new Chart(rates, { title: "Model FLOPs", about: "TFLOP/s per device; MFU is unknown because the peak of the device is", format: short, series: stepSeries("tflops"), fromZero: true });
  new Chart(rates, { title: "Memory", about: "peak so far on the first rank", format: gib, tick: short, series: () => stepSeries("memory_gib")().map((series) => ({ ...series, drawn: series.values, faint: false })), fromZero: true });
  new Chart(rates, { title: "Waiting for data", about: "share of the step time", format: percent, series: () => {
    for (const run of runs) run.steps.waited = run.steps.waited ?? run.steps.data_seconds.map((value, i) => value / Math.max(run.steps.step_seconds[i], 1e-9));
    return stepSeries("waited")();
  }, fromZero: true });
  for (const run of runs.filter((one) => one.experts !== null)) {
    byId("experts").hidden = false;
    new HeatMap(byId("experts"), run);
  }
  byId("details").append(timeline(), mixes());
  differences();
  byId("footer").textContent = `megatron_patch ${data.version} · created ${data.made} · drag across a chart to zoom, double-click to reset the zoom`;
  showSmoothing();
  drawAll();
  let drawnAt = document.body.clientWidth;
  new ResizeObserver(() => {
    if (state.printing || document.body.clientWidth === drawnAt) return;
    drawnAt = document.body.clientWidth;
    drawAll();
  }).observe(document.body);
  window.addEventListener("beforeprint", () => { state.printing = true; leave(); drawAll(); });
  window.addEventListener("afterprint", () => { state.printing = false; drawAll(); });
})();
