"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (query) => [...document.querySelectorAll(query)];
  const costs = {
    P_I: "P<sub>I</sub>, forward passes",
    P_D: "P<sub>D</sub>, forward passes",
    P_I_full: "P<sub>I</sub> of everything executed, forward passes",
    P_D_full: "P<sub>D</sub> of everything executed, forward passes",
    step: "steps",
    seconds: "seconds",
  };

  // What the reader chooses outlasts a reload in this tab, where the browser keeps anything for a file.
  const choice = {
    loss: { against: "P_I", x: "log", y: "linear" }, told: { against: "step", x: "linear" },
    train: true, valid: true, hidden: [], zoom: {},
  };
  const place = "hfmpi report " + location.pathname;
  try { Object.assign(choice, JSON.parse(sessionStorage.getItem(place))); } catch { /* nothing is kept */ }
  const keep = () => { try { sessionStorage.setItem(place, JSON.stringify(choice)); } catch { /* nor now */ } };

  const touch = matchMedia("(pointer: coarse)").matches;  // a finger that drags scrolls the page
  const config = {
    responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };
  const looks = { gridcolor: "#ddd", linecolor: "#666", showline: true, ticks: "outside", automargin: true, zeroline: false };
  const layout = (xaxis, yaxis, more) => ({
    xaxis: { ...looks, ...xaxis }, yaxis: { ...looks, ...yaxis },
    margin: { l: 46, r: 10, t: 10, b: 40 }, showlegend: false, hovermode: "closest", dragmode: touch ? false : "zoom",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: "#111" }, ...more,
  });

  // A zoom is that of an axis of a figure: of what it shows, and how.
  function draw(div, traces, xaxis, yaxis, more) {
    const keys = { xaxis: [div.id, "x", xaxis.type, xaxis.title.text].join(), yaxis: [div.id, "y", yaxis.type].join() };
    for (const [name, axis] of [["xaxis", xaxis], ["yaxis", yaxis]]) {
      axis.range = choice.zoom[keys[name]] ?? axis.range;
      axis.autorange = axis.range ? false : axis.autorange ?? true;
    }
    const first = !div.keys;
    div.keys = keys;
    Plotly.react(div, traces, layout(xaxis, yaxis, more), config);
    if (!first) { return; }
    div.on("plotly_relayout", (change) => {
      for (const [name, key] of Object.entries(div.keys)) {
        const low = change[name + ".range[0]"], high = change[name + ".range[1]"];
        if (low !== undefined) { choice.zoom[key] = [low, high]; }
        if (change[name + ".autorange"]) { delete choice.zoom[key]; }
      }
      keep();
    });
  }

  const shown = () => data.runs.filter((run) => !choice.hidden.includes(run.name));
  const line = (run, width) => ({ color: run.style.colour, width, dash: run.style.dash ? run.style.dash.replace(/\d+/g, "$&px") : "solid" });
  const pairs = (xs, ys, steps) => {  // those that are known: a lone point between gaps would not be seen
    const known = [...ys.keys()].filter((i) => ys[i] !== null && xs[i] !== null);
    const of = (values) => known.map((i) => values[i]);
    return { x: of(xs), y: of(ys), customdata: of(steps), mode: known.length === 1 ? "lines+markers" : "lines" };
  };

  const point = (view) => `%{fullData.name}<br>step %{customdata:,}<br>${costs[view.against].split(",")[0]} %{x:,}<br>`;
  const abscissa = (view) => ({ type: view.x, title: { text: costs[view.against] }, exponentformat: "power", minexponent: 5 });

  function drawLoss(div) {
    const view = choice.loss, unit = div.dataset.unit, traces = [];
    for (const run of shown().filter((one) => one.unit === unit)) {
      const of = (what) => ({
        name: run.name, meta: what,
        hovertemplate: `${point(view)}${what} %{y:.5g}<extra></extra>`,
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

  function drawTold(div) {
    const view = choice.told, panel = data.panels[div.dataset.panel];
    const traces = shown().map((run) => ({
      ...pairs(run.x[view.against], run.told[div.dataset.panel], run.x.step), name: run.name, line: line(run, 1.4),
      hovertemplate: `${point(view)}%{y:.4g}<extra></extra>`,
    }));
    const shapes = panel.levels.map((level) => (
      { type: "line", xref: "paper", x0: 0, x1: 1, y0: level, y1: level, line: { color: "#777", width: 1, dash: "dot" } }));
    const range = panel.range ?? undefined;
    draw(div, traces, abscissa(view), { type: panel.log ? "log" : "linear", range, exponentformat: "power", nticks: panel.log ? 4 : 5 }, { shapes });
  }

  // Spans are told apart by hatches too, so that bars read without colours.
  const hatches = ["", "/", "x", "\\", ".", "-", "", "|", "+", "", "/", "x"];
  const colours = ["#56b4e9", "#e69f00", "#f0e442", "#009e73", "#cc79a7", "#0072b2", "#888888", "#d55e00", "#ffffff", "#dddddd", "#ffffff"];
  function drawTimes(div) {
    const times = data.times[div.dataset.run];
    const traces = times.names.map((name, i) => ({
      type: "bar", orientation: "h", name, y: times.ranks, x: times.seconds[i],
      marker: {
        color: colours[times.looks[i] % colours.length], line: { color: "#111", width: 0.7 },
        pattern: {
          shape: hatches[times.looks[i] % hatches.length], size: 7, solidity: 0.2,
          fgcolor: "#111", bgcolor: colours[times.looks[i] % colours.length],
        },
      },
      hovertemplate: "%{y}, %{fullData.name}: %{x:.4g} s<extra></extra>",
    }));
    const columns = Math.max(1, Math.floor((div.clientWidth - 60) / 125));  // of the legend
    div.style.height = 90 + 22 * Math.ceil(times.names.length / columns) + 26 * times.ranks.length + "px";
    const legend = { orientation: "h", y: 1, yanchor: "bottom", x: 0, traceorder: "normal", font: { size: 12 } };
    draw(div, traces, { type: "linear", title: { text: `seconds of a ${times.unit}`, standoff: 8 } }, { type: "category", autorange: "reversed" },
      { barmode: "stack", bargap: 0.25, showlegend: true, legend, margin: { l: 46, r: 10, t: 6, b: 48 } });
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
    all(".told").forEach(drawTold);
  }
  function choose(change) {
    Object.assign(choice, change);
    keep();
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

  // A page that follows a run loads itself anew, but not while the reader drags or marks something.
  if (data.every) {
    let held = false;
    addEventListener("pointerdown", () => { held = true; });
    for (const end of ["pointerup", "pointercancel"]) { addEventListener(end, () => { held = false; }); }
    const again = () => {
      if (held || document.hidden || String(getSelection())) { setTimeout(again, 500); } else { location.reload(); }
    };
    setTimeout(again, 1000 * data.every);
  }
})();
