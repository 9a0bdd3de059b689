"use strict";
/* Draws the figures of the page from the values that stand in it. Text enters the page as text only, never as markup. */
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const runs = data.runs;
  const view = { axis: "step", log: false, hidden: new Set(), zoom: null };
  const CAUSES = ["finished", "running", "preempted", "time_limit", "requeued", "node_failure", "cancelled", "pruned", "open"];
  const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
  const NS = "http://www.w3.org/2000/svg";

  const inkOfRun = (index) => `var(--run-${index % 8})`;
  const dashOfRun = (index) => DASHES[Math.floor(index / 8) % DASHES.length];
  const inkOfCause = (cause) => `var(--${CAUSES.includes(cause) ? cause : cause === "unknown" ? "open" : "failure"})`;
  const words = (text) => text.replace(/_/g, " ");
  const visible = () => runs.map((run, index) => index).filter((index) => !view.hidden.has(index));

  function make(tag, attributes, text) {
    const node = document.createElementNS(NS, tag);
    for (const name in attributes) node.setAttribute(name, attributes[name]);
    if (text !== undefined) node.textContent = text;
    return node;
  }
  function html(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function number(value, span) {
    if (value === null || value === undefined) return "not finite";
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e9 || size < 1e-4) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    if (size >= 1000) return Math.round(value).toLocaleString("en-US");
    const digits = span ? Math.max(0, Math.min(6, 1 - Math.floor(Math.log10(span)))) : Math.max(0, 4 - Math.floor(Math.log10(size)) - 1);
    return value.toFixed(Math.min(digits, 6)).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  }
  function tickText(value, step) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6) return +(value / 1e6).toPrecision(4) + "M";
    if (size >= 1e4) return +(value / 1e3).toPrecision(4) + "k";
    if (size < 1e-3) return (+value.toPrecision(3)).toExponential().replace("e+", "e");
    return value.toFixed(Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9))));
  }
  function duration(seconds) {
    const s = Math.abs(seconds), sign = seconds < 0 ? "-" : "";
    if (s < 120) return sign + +s.toFixed(1) + " s";
    if (s < 7200) return sign + +(s / 60).toFixed(1) + " min";
    if (s < 172800) return sign + +(s / 3600).toFixed(1) + " h";
    return sign + +(s / 86400).toFixed(1) + " d";
  }

  // All labels of one axis in one unit.
  function clockText(seconds, span) {
    const [unit, name] = span <= 150 ? [1, "s"] : span <= 9000 ? [60, "min"] : span <= 259200 ? [3600, "h"] : [86400, "d"];
    return +(seconds / unit).toFixed(2) + " " + name;
  }

  function ticks(low, high, count) {
    const span = high - low || 1, raw = span / count, power = Math.pow(10, Math.floor(Math.log10(raw)));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw * 0.999);
    const found = [];
    for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
    return { step, values: found };
  }
  function timeTicks(low, high, count) {
    const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800, 1209600];
    const step = steps.find((n) => n >= (high - low) / count);
    if (!step || high - low < count) return ticks(low, high, count);
    const found = [];
    for (let value = Math.ceil(low / step) * step; value <= high; value += step) found.push(value);
    return { step, values: found };
  }
  function logTicks(low, high) {
    const found = [];
    for (let power = Math.floor(low); power <= Math.ceil(high); power++) for (const n of high - low > 3 ? [1] : high - low > 1 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 7]) {
      const value = Math.log10(n) + power;
      if (value >= low - 1e-9 && value <= high + 1e-9) found.push(value);
    }
    return found;
  }

  const xOf = (curve) => (view.axis === "step" ? curve.s : curve.t);
  function bandOf(attempt) {
    return view.axis === "step" ? [attempt.from_step, attempt.until_step === null ? Infinity : attempt.until_step] : [attempt.from, attempt.until];
  }

  function domainX() {
    if (view.zoom) return view.zoom;
    let low = Infinity, high = -Infinity;
    for (const index of visible()) {
      for (const key in runs[index].curves) for (const x of xOf(runs[index].curves[key])) if (x !== null) { if (x < low) low = x; if (x > high) high = x; }
      for (const attempt of runs[index].attempts) for (const x of bandOf(attempt)) if (isFinite(x)) { if (x < low) low = x; if (x > high) high = x; }
    }
    if (low === Infinity) return [0, 1];
    if (view.axis === "step" && low <= 1) low = 0;
    return high > low ? [low, high] : [low, low + 1];
  }

  function draw(chart) {
    const box = document.getElementById("figure-" + chart.name);
    if (!box) return;
    const plot = box.querySelector(".plot");
    const wide = box.classList.contains("wide");
    const W = Math.max(plot.clientWidth, 240), lanes = visible().length, single = lanes === 1;
    const laneHeight = single ? 16 : Math.max(3, Math.min(6, 60 / Math.max(lanes, 1)));
    const top = lanes ? laneHeight * lanes + 8 : 8;
    const H = (wide ? Math.min(330, Math.max(240, W * 0.36)) : 190) + top, left = 52, right = 8, bottom = 36;
    const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, height: H, role: "img", "aria-label": `${chart.title} over ${view.axis === "step" ? "optimizer steps" : "wall time"}` });
    const [x0, x1] = domainX();
    const log = view.log && (chart.name === "loss" || chart.name === "norm" || chart.name === "scale");
    const X = (x) => left + ((x - x0) / (x1 - x0)) * (W - left - right);
    const scaleY = (y) => (log ? (y > 0 ? Math.log10(y) : null) : y);

    const drawn = [];
    for (const index of visible()) for (const kind of ["line", "dots"]) {
      const curve = chart[kind] && runs[index].curves[chart[kind]];
      if (!curve) continue;
      const points = [];
      const xs = xOf(curve);
      for (let i = 0; i < xs.length; i++) if (xs[i] !== null) points.push([xs[i], curve.v[i]]);
      drawn.push({ index, kind, points, key: chart[kind] });
    }
    const marks = [];
    if (chart.name === "scale") for (const index of visible()) for (const o of runs[index].overflows.points) marks.push([view.axis === "step" ? o[0] : o[1], o[2] === null ? 0 : o[2], index, o]);

    let y0 = Infinity, y1 = -Infinity;
    const seen = (x, v) => { const y = v === null ? null : scaleY(v); if (y !== null && x >= x0 && x <= x1) { if (y < y0) y0 = y; if (y > y1) y1 = y; } };
    for (const one of drawn) for (const [x, v] of one.points) seen(x, v);
    for (const [x, v] of marks) seen(x, v);
    if (y0 === Infinity) { y0 = 0; y1 = 1; }
    if (!log && (chart.name === "lr" || chart.name === "throughput" || chart.name === "memory" || chart.name === "peak" || chart.name === "data" || chart.name === "saves")) y0 = Math.min(y0, 0);
    if (y1 === y0) { const half = Math.abs(y1) * 0.5 || 1; y0 = y0 === 0 ? 0 : y0 - half; y1 += half; }
    const pad = (y1 - y0) * 0.06;
    y1 += pad; if (y0 !== 0) y0 -= pad;
    const Y = (y) => H - bottom - ((y - y0) / (y1 - y0)) * (H - bottom - top);

    // Grid and axes.
    const many = Math.max(3, Math.floor((W - left) / 90));
    const horizontal = view.axis === "step" ? ticks(x0, x1, many) : timeTicks(x0, x1, many);
    const clipId = "clip-" + chart.name;
    const clip = make("clipPath", { id: clipId });
    clip.append(make("rect", { x: left, y: 0, width: W - left - right, height: H - bottom }));
    svg.append(clip);
    const inside = make("g", { "clip-path": `url(#${clipId})` });
    const vertical = log ? { values: logTicks(y0, y1), step: 0 } : ticks(y0, y1, 5);
    for (const y of vertical.values) {
      svg.append(make("line", { class: "grid", x1: left, x2: W - right, y1: Y(y), y2: Y(y) }));
      svg.append(make("text", { x: left - 6, y: Y(y) + 4, "text-anchor": "end" }, log ? tickText(Math.pow(10, y), Math.pow(10, Math.floor(y)) / 10) : tickText(y, vertical.step)));
    }
    for (const x of horizontal.values) {
      svg.append(make("line", { class: "axis", x1: X(x), x2: X(x), y1: H - bottom, y2: H - bottom + 4 }));
      const edge = X(x) > W - right - 20 ? "end" : "middle";
      svg.append(make("text", { x: X(x), y: H - bottom + 16, "text-anchor": edge }, view.axis === "step" ? tickText(x, horizontal.step) : clockText(x, x1 - x0)));
    }
    svg.append(make("line", { class: "axis", x1: left, x2: W - right, y1: H - bottom, y2: H - bottom }));
    svg.append(make("text", { x: (left + W - right) / 2, y: H - 4, "text-anchor": "middle" }, view.axis === "step" ? "optimizer step" : "wall time since the run began"));

    // Attempts: a lane of labelled blocks for each run; for one run alone also the ground behind the curves.
    visible().forEach((index, lane) => {
      if (!single && runs[index].attempts.length) svg.append(make("rect", { x: left - 9, y: lane * laneHeight + 1, width: 5, height: laneHeight - 1, fill: inkOfRun(index) }));
      for (const attempt of runs[index].attempts) {
        let [from, until] = bandOf(attempt);
        if (!isFinite(until)) until = x1;
        const a = Math.max(X(Math.max(from, x0)), left), b = Math.min(X(Math.min(until, x1)), W - right);
        if (b <= a) continue;
        const ink = inkOfCause(attempt.cause), y = lane * laneHeight + 1;
        if (single) inside.append(make("rect", { class: "band", x: a, y: top, width: Math.max(b - a, 0.5), height: H - bottom - top, fill: ink }));
        const block = make("rect", { class: "lane", x: a, y, width: Math.max(b - a - 1, 0.8), height: laneHeight - 1, fill: ink, rx: single ? 2 : 0 });
        block.append(make("title", {}, `${single ? "" : runs[index].id + ", "}attempt ${attempt.number}: ${words(attempt.cause)}`));
        svg.append(block);
        if (single) {
          const full = `${attempt.number} ${words(attempt.cause)}`, text = b - a > full.length * 6.2 + 8 ? full : b - a > 16 ? String(attempt.number) : "";
          if (text) svg.append(make("text", { class: "lane-label", x: a + 4, y: y + 11 }, text));
        }
      }
    });
    svg.append(inside);

    // Curves.
    for (const one of drawn) {
      let path = "", pen = false, before = null;
      // Over wall time a line ends with its attempt: in between nothing was trained.
      const begins = view.axis === "time" ? runs[one.index].attempts.map((attempt) => attempt.from).slice(1) : [];
      for (const [x, v] of one.points) {
        if (pen && begins.some((begin) => before < begin && begin <= x)) pen = false;
        before = x;
        const y = v === null ? null : scaleY(v);
        if (y === null) { pen = false; continue; }
        path += (pen ? "L" : "M") + X(x).toFixed(1) + " " + Y(y).toFixed(1);
        pen = true;
      }
      const alone = one.points.length === 1;
      if (one.kind === "line" && !alone) inside.append(make("path", { class: "curve", d: path, stroke: inkOfRun(one.index), "stroke-dasharray": dashOfRun(one.index) }));
      if (one.kind === "dots" && !alone) inside.append(make("path", { class: "between", d: path, stroke: one.kind === "dots" && single ? "var(--run-1)" : inkOfRun(one.index) }));
      if (one.kind === "dots" || alone) for (const [x, v] of one.points) {
        const y = v === null ? null : scaleY(v);
        if (y !== null) inside.append(make("circle", { cx: X(x).toFixed(1), cy: Y(y).toFixed(1), r: one.points.length > 150 ? 1.8 : 3, fill: one.kind === "dots" && single ? "var(--run-1)" : inkOfRun(one.index) }));
      }
    }
    let crosses = "";
    for (const [x, v] of marks) { const y = scaleY(v); if (y !== null) { const cx = X(x), cy = Y(y); crosses += `M${cx - 3} ${cy - 3}l6 6M${cx + 3} ${cy - 3}l-6 6`; } }
    if (crosses) inside.append(make("path", { class: "cross", d: crosses }));
    plot.replaceChildren(svg);
    listen(box, svg, chart, drawn, { x0, x1, left, right, W, H, top, bottom, X, Y, scaleY, single });
  }

  // What is under the pointer, and a range chosen by dragging with a mouse.
  function listen(box, svg, chart, drawn, g) {
    let tip = null, cursor = null, begun = null, range = null;
    const at = (event) => { const r = svg.getBoundingClientRect(); return g.x0 + (((event.clientX - r.left) * g.W) / r.width - g.left) / (g.W - g.left - g.right) * (g.x1 - g.x0); };
    const clear = () => { if (tip) tip.remove(); if (cursor) cursor.remove(); tip = cursor = null; };
    const nearest = (points, x) => {
      let low = 0, high = points.length - 1;
      if (high < 0) return null;
      while (low < high) { const middle = (low + high) >> 1; if (points[middle][0] < x) low = middle + 1; else high = middle; }
      return low > 0 && x - points[low - 1][0] < points[low][0] - x ? points[low - 1] : points[low];
    };
    svg.addEventListener("pointermove", (event) => {
      const x = at(event);
      clear();
      if (begun !== null && event.buttons) {
        const a = Math.max(Math.min(begun, x), g.x0), b = Math.min(Math.max(begun, x), g.x1);
        if (!range) { range = make("rect", { class: "select", y: g.top, height: g.H - g.bottom - g.top }); svg.append(range); }
        range.setAttribute("x", g.X(a)); range.setAttribute("width", Math.max(g.X(b) - g.X(a), 0));
        return;
      }
      if (x < g.x0 || x > g.x1) return;
      tip = html("div", "tip");
      const main = drawn.filter((one) => one.points.length).map((one) => [one, nearest(one.points, x)]);
      const where = main.length ? main.reduce((best, pair) => (Math.abs(pair[1][0] - x) < Math.abs(best - x) ? pair[1][0] : best), main[0][1][0]) : x;
      tip.append(html("div", "", view.axis === "step" ? `step ${Math.round(where).toLocaleString("en-US")}` : duration(where)));
      for (const index of visible()) for (const attempt of g.single ? runs[index].attempts : []) {
        const [from, until] = bandOf(attempt);
        if (where >= from && where <= until) { const row = html("div"); row.append(html("i", "", `attempt ${attempt.number}, ${words(attempt.cause)}`)); tip.append(row); break; }
      }
      for (const [one, point] of main.slice(0, 12)) {
        if (one.kind === "dots" && Math.abs(point[0] - where) > (g.x1 - g.x0) * 0.02) continue;
        const row = html("div"), swatch = html("span", "swatch");
        swatch.style.background = one.kind === "dots" && g.single ? "var(--run-1)" : inkOfRun(one.index);
        row.append(swatch, html("i", "", (g.single ? words(one.key) : runs[one.index].id + (one.kind === "dots" ? " validation" : "")) + " "), html("b", "", number(point[1])));
        tip.append(row);
      }
      cursor = make("line", { class: "cursor", x1: g.X(where), x2: g.X(where), y1: g.top, y2: g.H - g.bottom });
      svg.append(cursor);
      box.append(tip);
      const room = box.clientWidth, put = (g.X(where) / g.W) * svg.clientWidth + 24;
      tip.style.left = Math.max(4, put + tip.offsetWidth > room ? put - tip.offsetWidth - 36 : put) + "px";
      tip.style.top = "52px";
    });
    svg.addEventListener("pointerleave", clear);
    svg.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse" && event.button === 0) { begun = at(event); svg.setPointerCapture(event.pointerId); event.preventDefault(); } });
    svg.addEventListener("pointerup", (event) => {
      if (begun === null) return;
      const x = at(event), a = Math.max(Math.min(begun, x), g.x0), b = Math.min(Math.max(begun, x), g.x1);
      begun = null;
      if (range) range.remove();
      range = null;
      if (b - a > (g.x1 - g.x0) * 0.01) { view.zoom = [a, b]; refresh(); }
    });
    svg.addEventListener("dblclick", () => { view.zoom = null; refresh(); });
  }

  // The attempts of every run, over wall time.
  function drawTimeline() {
    const plot = document.getElementById("timeline");
    if (!plot) return;
    const shown = runs.map((run, index) => index).filter((index) => runs[index].attempts.length);
    const W = Math.max(plot.clientWidth, 240), row = 34, named = runs.length > 1, H = shown.length * (row + (named ? 18 : 0)) + 26;
    const until = Math.max(1, ...shown.flatMap((index) => runs[index].attempts.map((attempt) => attempt.until)));
    const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, height: H, role: "img", "aria-label": "attempts over wall time" });
    const X = (t) => 2 + (t / until) * (W - 4);
    shown.forEach((index, position) => {
      const y = position * (row + (named ? 18 : 0)) + (named ? 18 : 0);
      if (named) svg.append(make("text", { x: 2, y: y - 5 }, runs[index].id));
      for (const attempt of runs[index].attempts) {
        const a = X(attempt.from), b = Math.max(X(attempt.until), a + 1.5);
        const block = make("rect", { class: "lane", x: a, y, width: Math.max(b - a - 1, 1), height: row - 6, rx: 3, fill: inkOfCause(attempt.cause) });
        block.append(make("title", {}, `attempt ${attempt.number}: ${words(attempt.cause)}, ${duration(attempt.until - attempt.from)}`));
        svg.append(block);
        const full = `${attempt.number} ${words(attempt.cause)}`, text = b - a > full.length * 6.2 + 8 ? full : b - a > 14 ? String(attempt.number) : "";
        if (text) svg.append(make("text", { class: "lane-label", x: a + 5, y: y + 18 }, text));
      }
    });
    const scale = timeTicks(0, until, Math.max(3, Math.floor(W / 110)));
    for (const t of scale.values) svg.append(make("text", { x: X(t), y: H - 4, "text-anchor": t === 0 ? "start" : X(t) > W - 24 ? "end" : "middle" }, clockText(t, until)));
    plot.replaceChildren(svg);
  }

  function legendOfCauses() {
    for (const place of document.querySelectorAll(".causes")) {
      const found = [...new Set(runs.flatMap((run) => run.attempts.map((attempt) => attempt.cause)))];
      place.replaceChildren(...found.map((cause) => {
        const key = html("span", "key"), swatch = html("span", "swatch");
        swatch.style.background = inkOfCause(cause);
        key.append(swatch, document.createTextNode(cause === "open" ? "end not written" : words(cause)));
        return key;
      }));
    }
  }

  const reset = document.getElementById("reset");
  function refresh() {
    for (const chart of data.figures) if (chart.missing === null) draw(chart);
    drawTimeline();
    if (reset) reset.hidden = view.zoom === null;
  }
  function press(button, yes) { button.setAttribute("aria-pressed", yes ? "true" : "false"); }

  for (const button of document.querySelectorAll("[data-axis]")) button.addEventListener("click", () => {
    view.axis = button.dataset.axis;
    view.zoom = null;
    for (const other of document.querySelectorAll("[data-axis]")) press(other, other === button);
    refresh();
  });
  const logButton = document.getElementById("log");
  if (logButton) logButton.addEventListener("click", () => { view.log = !view.log; press(logButton, view.log); refresh(); });
  if (reset) reset.addEventListener("click", () => { view.zoom = null; refresh(); });
  const legend = document.getElementById("legend");
  if (legend && runs.length > 1) runs.forEach((run, index) => {
    const button = html("button"), line = make("svg", { width: 22, height: 8, viewBox: "0 0 22 8", style: "width:22px;flex:none" });
    line.append(make("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: inkOfRun(index), "stroke-width": 3, "stroke-dasharray": dashOfRun(index) }));
    button.append(line, document.createTextNode(run.id));
    button.title = "show or hide this run";
    press(button, true);
    button.addEventListener("click", () => { if (view.hidden.has(index)) view.hidden.delete(index); else view.hidden.add(index); press(button, !view.hidden.has(index)); refresh(); });
    legend.append(button);
  });
  for (const place of document.querySelectorAll("[data-run]")) place.style.background = inkOfRun(+place.dataset.run);
  if (location.hash === "#wall-time") document.querySelector('[data-axis="time"]').click();
  legendOfCauses();
  refresh();
  let waiting = 0;
  addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(refresh); });
  document.documentElement.dataset.drawn = "yes";
})();
