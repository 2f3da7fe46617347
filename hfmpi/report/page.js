"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (query) => [...document.querySelectorAll(query)];

  // The reader's choices persist over a reload in this tab, if the browser stores data for local files.
  const choice = {
    loss: { against: "P_I", x: "log", y: "linear" }, internal: { against: "step", x: "linear" },
    train: true, valid: true, hidden: [], zoom: {},
  };
  const storageKey = "hfmpi report " + location.pathname;
  try { Object.assign(choice, JSON.parse(sessionStorage.getItem(storageKey))); } catch { /* no storage */ }
  const save = () => { try { sessionStorage.setItem(storageKey, JSON.stringify(choice)); } catch { /* no storage */ } };

  const touch = matchMedia("(pointer: coarse)").matches;  // on a touch screen, dragging scrolls the page
  const config = {
    responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };
  const axisStyle = { gridcolor: "#ddd", linecolor: "#666", showline: true, ticks: "outside", automargin: true, zeroline: false };
  const layout = (xaxis, yaxis, more) => ({
    xaxis: { ...axisStyle, ...xaxis }, yaxis: { ...axisStyle, ...yaxis },
    margin: { l: 46, r: 10, t: 34, b: 40 }, showlegend: false, hovermode: "closest", dragmode: touch ? false : "zoom",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: "#111" }, ...more,
  });

  // A zoom belongs to an axis of a figure, to the quantity that the axis shows and to its scale.
  function draw(div, traces, xaxis, yaxis, more, tools = config) {
    const keys = { xaxis: [div.id, "x", xaxis.type, xaxis.title.text].join(), yaxis: [div.id, "y", yaxis.type].join() };
    for (const [name, axis] of [["xaxis", xaxis], ["yaxis", yaxis]]) {
      axis.range = choice.zoom[keys[name]] ?? axis.range;
      axis.autorange = axis.range ? false : axis.autorange ?? true;
    }
    const first = !div.keys;
    div.keys = keys;
    Plotly.react(div, traces, layout(xaxis, yaxis, more), tools);
    if (!first) { return; }
    div.on("plotly_relayout", (change) => {
      for (const [name, key] of Object.entries(div.keys)) {
        const low = change[name + ".range[0]"], high = change[name + ".range[1]"];
        if (low !== undefined) { choice.zoom[key] = [low, high]; }
        if (change[name + ".autorange"]) { delete choice.zoom[key]; }
      }
      save();
    });
  }

  const shown = () => data.runs.filter((run) => !choice.hidden.includes(run.name));
  const line = (run, width) => ({ color: run.style.colour, width, dash: run.style.dash ? run.style.dash.replace(/\d+/g, "$&px") : "solid" });
  const pairs = (xs, ys, steps) => {  // omits unknown values: a single point between gaps would be invisible
    const known = [...ys.keys()].filter((i) => ys[i] !== null && xs[i] !== null);
    const of = (values) => known.map((i) => values[i]);
    return { x: of(xs), y: of(ys), customdata: of(steps), mode: known.length === 1 ? "lines+markers" : "lines" };
  };

  const point = (view) => `%{fullData.name}<br>step %{customdata:,}<br>${data.costs[view.against][0]} %{x:,}<br>`;
  const abscissa = (view) => ({  // on logarithmic axes too every tick has its whole number: 20, 50, 100, 2k
    type: view.x, title: { text: data.costs[view.against].filter(Boolean).join(", ") },
    tickformat: view.against === "seconds" ? ",~g" : "~s",
  });

  function drawLoss(div) {
    const view = choice.loss, unit = div.dataset.unit, traces = [];
    for (const run of shown().filter((one) => one.unit === unit)) {
      const of = (loss) => ({
        name: run.name, meta: loss,
        hovertemplate: `${point(view)}${loss} %{y:.5g}<extra></extra>`,
      });
      if (choice.train) {
        traces.push({ ...pairs(run.x[view.against], run.train, run.x.step), ...of("training"), line: line(run, 1.6) });
      }
      if (choice.valid) {
        const marker = { symbol: run.style.mark + "-open", size: 7, color: run.style.colour, line: { width: 1.3 } };
        traces.push({ ...pairs(run.x[view.against], run.valid, run.x.step), ...of("validation"), mode: "markers", marker });
      }
    }
    draw(div, traces, abscissa(view), { type: view.y, title: { text: unit }, nticks: 8 });
  }

  function drawInternal(div) {
    const view = choice.internal, panel = data.panels[div.dataset.panel];
    const traces = shown().map((run) => ({
      ...pairs(run.x[view.against], run.internals[div.dataset.panel], run.x.step), name: run.name, line: line(run, 1.4),
      hovertemplate: `${point(view)}%{y:.4g}<extra></extra>`,
    }));
    const shapes = panel.levels.map((level) => (
      { type: "line", xref: "paper", x0: 0, x1: 1, y0: level, y1: level, line: { color: "#777", width: 1, dash: "dot" } }));
    const range = panel.range ?? undefined;
    draw(div, traces, abscissa(view), { type: panel.log ? "log" : "linear", range, tickformat: panel.log ? "~g" : "", nticks: panel.log ? 4 : 5 }, { shapes });
  }

  // Spans differ by hatches too, so that bars can be read in black and white.
  const hatches = ["", "/", "x", "\\", ".", "x", "-", "", "|", "+", "", "/", "x"];
  const colours = ["#56b4e9", "#e69f00", "#f0e442", "#009e73", "#cc79a7", "#8c510a", "#0072b2", "#888888", "#d55e00", "#ffffff", "#dddddd", "#ffffff"];
  function drawTimes(div) {
    const times = data.times[div.dataset.run];
    const traces = times.names.map((name, i) => ({
      type: "bar", orientation: "h", name, y: times.ranks, x: times.seconds[i],
      marker: {
        color: colours[times.styles[i] % colours.length], line: { color: "#111", width: 0.7 },
        pattern: {
          shape: hatches[times.styles[i] % hatches.length], size: 7, solidity: 0.2,
          fgcolor: "#111", bgcolor: colours[times.styles[i] % colours.length],
        },
      },
      hovertemplate: "%{y}, %{fullData.name}: %{x:.4g} s<extra></extra>",
    }));
    const columns = Math.max(1, Math.floor((div.clientWidth - 60) / 125));  // columns of the legend
    div.style.height = 90 + 22 * Math.ceil(times.names.length / columns) + 26 * times.ranks.length + "px";
    const legend = { orientation: "h", y: 1, yanchor: "bottom", x: 0, traceorder: "normal", font: { size: 12 } };
    draw(div, traces, { type: "linear", title: { text: `seconds of a ${times.unit}`, standoff: 8 } }, { type: "category", autorange: "reversed" },
      { barmode: "stack", bargap: 0.25, showlegend: true, legend, margin: { l: 46, r: 10, t: 6, b: 48 } },
      { ...config, displayModeBar: false });  // it would cover the legend
  }

  function drawAll() {
    for (const button of all("button[data-against]")) {
      button.setAttribute("aria-pressed", choice[button.dataset.view].against === button.dataset.against);
    }
    for (const button of all("button[data-log]")) {
      button.setAttribute("aria-pressed", choice[button.dataset.view][button.dataset.log] === "log");
    }
    for (const box of all("input[data-shows]")) { box.checked = choice[box.dataset.shows]; }
    for (const box of all("input[data-run]")) { box.checked = !choice.hidden.includes(data.runs[box.dataset.run].name); }
    all(".loss").forEach(drawLoss);
    all(".internal").forEach(drawInternal);
  }
  function choose(change) {
    Object.assign(choice, change);
    save();
    drawAll();
  }
  for (const button of all("button[data-view]")) {
    const { view, against, log } = button.dataset;
    button.addEventListener("click", () => {
      choose({ [view]: { ...choice[view], ...(against ? { against } : { [log]: choice[view][log] === "log" ? "linear" : "log" }) } });
    });
  }
  for (const box of all("input[data-shows]")) {
    box.addEventListener("change", () => choose({ [box.dataset.shows]: box.checked }));
  }
  for (const box of all("input[data-run]")) {
    const { name } = data.runs[box.dataset.run];
    box.addEventListener("change", () => choose({ hidden: choice.hidden.filter((one) => one !== name).concat(box.checked ? [] : name) }));
  }
  drawAll();
  all(".times").forEach(drawTimes);

  // A page that follows a run reloads itself, but not while the reader drags or selects something.
  if (data.every) {
    let pressed = false;
    addEventListener("pointerdown", () => { pressed = true; });
    for (const end of ["pointerup", "pointercancel"]) { addEventListener(end, () => { pressed = false; }); }
    const reload = () => {
      if (pressed || document.hidden || String(getSelection())) { setTimeout(reload, 500); } else { location.reload(); }
    };
    setTimeout(reload, 1000 * data.every);
  }
})();
