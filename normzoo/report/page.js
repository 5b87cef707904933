// The page's figures come alive: hover, zoom, hide and highlight runs, sort and search the table. Without this script the
// page shows the same figures as pictures. Data and specifications are in the element "data", compressed.
"use strict";

const state = { hidden: new Set(), filtered: new Set(), lit: "", at: null, zoom: null, facet: "" };
const figures = [];
const dark = window.matchMedia("(prefers-color-scheme: dark)");
let payload = null;

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function config() {
  const [ink, muted, grid] = [color("--ink"), color("--muted"), color("--grid")];
  const axis = { domainColor: muted, tickColor: muted, gridColor: grid, labelColor: ink, titleColor: ink };
  const fonts = { labelFont: "system-ui, sans-serif", titleFont: "system-ui, sans-serif" };
  return {
    axis: { ...axis, ...fonts, labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal" },
    text: { fill: ink, font: "system-ui, sans-serif", fontSize: 11 },
  };
}

// Black lines are white on a dark page
function inked(value) {
  return dark.matches && value === "#000000" ? "#ffffff" : value;
}

function rows(columns) {
  const names = Object.keys(columns);
  return columns[names[0]].map((_, i) => Object.fromEntries(names.map((name) => [name, columns[name][i]])));
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en");
  return Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(3) : String(+value.toPrecision(4));
}

// ---- one picture that reacts: a chart, or the part of it that a facet selects

class View {
  constructor(figure, container, base) {
    this.figure = figure;
    this.base = base; // runs that this facet does not show
    this.container = container;
    const spec = structuredClone(figure.chart.spec);
    this.points = {};
    for (const data of spec.data) {
      if (data.columns) {
        this.points[data.name] = data.columns;
        data.values = rows(data.columns);
        delete data.columns;
      }
      for (const row of data.values) if (row.color) row.color = inked(row.color);
    }
    this.styles = spec.signals.find((signal) => signal.name === "S").value;
    for (const style of this.styles) style.color = inked(style.color);
    const runtime = vega.parse(spec, config(), { ast: true });
    this.view = new vega.View(runtime, { expr: vega.expressionInterpreter, renderer: "canvas", logLevel: 0 });
    this.view.signal("W", this.width());
    this.signals();
    this.view.initialize(container).run();
    const name = `${figure.chart.title}: move the pointer over it for values, drag to zoom, double click to see all`;
    container.setAttribute("aria-label", name);
    container.setAttribute("role", "img");
    this.listen();
  }

  width() {
    return Math.max(220, this.container.clientWidth - 8);
  }

  signals() {
    this.view.signal("hidden", [...new Set([...state.hidden, ...state.filtered, ...this.base])]);
    this.view.signal("lit", state.lit);
    if (this.figure.chart.steps) {
      this.view.signal("at", state.at);
      for (let k = 0; k < this.figure.chart.panels.length; k++) this.view.signal(`zx${k}`, state.zoom);
    }
  }

  update() {
    this.signals();
    this.view.runAsync();
  }

  resize() {
    this.view.signal("W", this.width()).runAsync();
  }

  // The panel at a place of the page, and the place in it
  locate(event) {
    const box = this.container.querySelector("canvas").getBoundingClientRect();
    const [left, top] = this.view.origin();
    const [x, y] = [event.clientX - box.left - left, event.clientY - box.top - top];
    const { head, above, row, bar, height } = this.figure.chart.layout;
    const [L, pw, gap, C] = ["L", "pw", "gap", "C"].map((name) => this.view.signal(name));
    for (let k = 0; k < this.figure.chart.panels.length; k++) {
      const [px, py] = [x - L - (k % C) * (pw + gap + bar), y - head - above - Math.floor(k / C) * row];
      if (px >= 0 && px <= pw && py >= 0 && py <= height) return { k, x: px, y: py };
    }
    return null;
  }

  shown(style) {
    const hidden = this.view.signal("hidden");
    return !hidden.includes(style.run) && !(style.label && hidden.includes(style.label));
  }

  nearest({ k, x, y }) {
    const points = this.points[`p${k}`];
    if (!points) return null;
    const [sx, sy] = [this.view.scale(`x${k}`), this.view.scale(`y${k}`)];
    const visible = this.styles.map((style) => this.shown(style));
    let [best, distance] = [null, 45 ** 2];
    for (let i = 0; i < points.s.length; i++) {
      if (points.y[i] === null || !visible[points.s[i]]) continue;
      const dx = sx(points.x[i]) - x;
      if (dx * dx >= distance) continue;
      const dy = sy(points.y[i]) - y;
      if (dx * dx + dy * dy < distance) [best, distance] = [i, dx * dx + dy * dy];
    }
    return best;
  }

  cell({ k, x, y }) {
    const { cells } = this.figure.chart.panels[k];
    if (!cells) return null;
    const [at, up] = [this.view.scale(`x${k}`).invert(x), this.view.scale(`y${k}`).invert(y)];
    const [column, row] = [place(cells.x, at), place(cells.y, up)];
    if (column < 0 || row < 0 || cells.z[row][column] === undefined) return null;
    return { column, row, value: cells.z[row][column] };
  }

  describe(found) {
    const panel = this.figure.chart.panels[found.k];
    const i = this.nearest(found);
    if (i !== null) {
      const points = this.points[`p${found.k}`];
      const style = this.styles[points.s[i]];
      const lines = [`${panel.x}: ${number(points.x[i])}`, `${panel.y}: ${number(points.y[i])}`];
      if (points.l && points.l[i] !== null && !style.fill) lines.push(`from ${number(points.l[i])} to ${number(points.h[i])}`);
      if (points.n && points.n[i] !== null) lines.push(`n = ${points.n[i]}`);
      if (points.t && points.t[i] !== null) lines.push(points.t[i]);
      return { title: style.label || style.run, lines, run: style.run, label: style.label, at: points.x[i], color: style.color };
    }
    const cell = this.cell(found);
    if (cell) {
      const { cells } = panel;
      const middle = (edges, names, at) => (names ? names[at] : number((edges[at] + edges[at + 1]) / 2));
      const told = cell.value === null ? "no value" : number(cell.value);
      const at = cells.places ? cells.places[cell.column] : null;
      const x = at === null ? middle(cells.x, cells.columns, cell.column) : number(at);
      const lines = [`${panel.x}: ${x}`, `${panel.y}: ${middle(cells.y, cells.rows, cell.row)}`];
      return { title: `${cells.label}: ${told}`, lines, run: "", label: "", at, color: "" };
    }
    return null;
  }

  listen() {
    const c = this.container;
    let start = null;
    const box = make("div", { class: "zoom-box", hidden: true });
    c.append(box);
    c.addEventListener("pointermove", (event) => {
      if (start) {
        const [a, b] = [start.event, event];
        const origin = c.getBoundingClientRect();
        const [x0, x1] = [Math.min(a.clientX, b.clientX), Math.max(a.clientX, b.clientX)];
        const [y0, y1] = [Math.min(a.clientY, b.clientY), Math.max(a.clientY, b.clientY)];
        const tall = y1 - y0 > 20;
        box.hidden = x1 - x0 < 6;
        box.style.left = `${x0 - origin.left}px`;
        box.style.width = `${x1 - x0}px`;
        box.style.top = `${(tall ? y0 : start.event.clientY - start.y) - origin.top}px`;
        box.style.height = `${tall ? y1 - y0 : this.figure.chart.layout.height}px`;
        return;
      }
      const found = this.locate(event);
      const what = found && this.describe(found);
      tooltip(what, event);
      light(what ? (this.figure.ownLabels ? what.label || what.run : what.run) : "");
      if (this.figure.chart.steps) mark(what ? what.at : null);
    });
    c.addEventListener("pointerleave", () => {
      tooltip(null);
      light("");
      mark(null);
    });
    c.addEventListener("pointerdown", (event) => {
      const found = event.button === 0 && event.pointerType === "mouse" ? this.locate(event) : null;
      if (found) {
        start = { ...found, event };
        c.setPointerCapture(event.pointerId);
        tooltip(null);
      }
    });
    c.addEventListener("pointerup", (event) => {
      const from = start;
      start = null;
      box.hidden = true;
      if (!from || Math.abs(event.clientX - from.event.clientX) < 6) return;
      this.zoom(from, event);
    });
    c.addEventListener("dblclick", () => this.reset());
  }

  zoom(from, event) {
    const pw = this.view.signal("pw");
    const clamp = (value, most) => Math.min(Math.max(value, 0), most);
    const [dx, dy] = [event.clientX - from.event.clientX, event.clientY - from.event.clientY];
    const sx = this.view.scale(`x${from.k}`);
    const ends = [from.x, clamp(from.x + dx, pw)].map((x) => sx.invert(x)).sort((a, b) => a - b);
    if (this.figure.chart.steps) {
      state.zoom = ends;
      refresh();
    } else this.view.signal(`zx${from.k}`, ends);
    if (Math.abs(dy) > 20) {
      const { height } = this.figure.chart.layout;
      const sy = this.view.scale(`y${from.k}`);
      const span = [from.y, clamp(from.y + dy, height)].map((y) => sy.invert(y)).sort((a, b) => a - b);
      const panels = this.figure.chart.shared ? this.figure.chart.panels.map((_, k) => k) : [from.k];
      for (const k of panels) this.view.signal(`zy${k}`, span);
    }
    this.view.runAsync();
  }

  reset() {
    for (let k = 0; k < this.figure.chart.panels.length; k++) this.view.signal(`zx${k}`, null).signal(`zy${k}`, null);
    if (this.figure.chart.steps && state.zoom) {
      state.zoom = null;
      refresh();
    }
    this.view.runAsync();
  }
}

function place(edges, value) {
  let [low, high] = [0, edges.length - 1];
  if (!(value >= edges[0] && value <= edges[high])) return -1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (edges[middle] <= value) low = middle;
    else high = middle;
  }
  return low;
}

// ---- a figure: its views, one for each value of the facet, and its legend

class Figure {
  constructor(element, chart) {
    this.element = element;
    this.chart = chart;
    this.views = [];
    this.visible = false;
    const runs = chart.legend.map((entry) => entry.run);
    this.ownLabels = new Set(runs).size < runs.length; // lines of a run have their own entries
    this.live = make("div", { class: "live" });
    this.legend = make("div", { class: "legend" });
    element.querySelector(".static").before(this.live);
    this.live.after(this.legend);
    this.drawLegend();
  }

  drawLegend() {
    this.legend.replaceChildren();
    const many = this.chart.legend.length > 12;
    this.legend.classList.toggle("many", many);
    for (const entry of this.chart.legend) {
      const key = this.ownLabels ? entry.label : entry.run || entry.label;
      const button = make(
        "button",
        {
          type: "button",
          title: "hide or show",
          onclick: () => toggle(key),
          onpointerenter: () => light(key),
          onpointerleave: () => light(""),
        },
        swatch(entry),
        entry.label,
      );
      button.dataset.key = key;
      this.legend.append(button);
    }
  }

  build() {
    const facets = this.chart.legend.some((entry) => entry.run) ? facetValues() : [null];
    this.live.replaceChildren();
    this.live.classList.toggle("facets", facets.length > 1);
    for (const view of this.views) view.view.finalize();
    this.views = facets.map((value) => {
      const container = make("div", { class: "view", tabindex: "0" });
      const cell = make("div", {}, ...(value === null ? [] : [make("h4", {}, `${state.facet} = ${value}`)]), container);
      this.live.append(cell);
      return { container, base: value === null ? [] : outsideFacet(value) };
    });
    this.views = this.views.map(({ container, base }) => new View(this, container, base));
    this.element.classList.add("alive"); // until now there was the picture
    this.stale = false;
  }

  refresh() {
    for (const button of this.legend.children) {
      button.setAttribute("aria-pressed", !(state.hidden.has(button.dataset.key) || state.filtered.has(button.dataset.key)));
    }
    if (!this.visible) {
      this.late = true;
      return;
    }
    for (const view of this.views) view.update();
  }

  enter(visible) {
    this.visible = visible;
    if (!visible) return;
    if (!this.views.length || this.stale) this.build();
    else if (this.late) this.refresh();
    this.late = false;
  }
}

function swatch(entry) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("width", "26");
  svg.setAttribute("height", "10");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(space, entry.width ? "line" : "circle");
  const look = entry.width
    ? { x1: 0, x2: 26, y1: 5, y2: 5, stroke: inked(entry.color), "stroke-width": 2, "stroke-dasharray": entry.dash.join(" ") }
    : { cx: 13, cy: 5, r: 4, fill: inked(entry.color) };
  for (const [name, value] of Object.entries(look)) line.setAttribute(name, value);
  svg.append(line);
  if (entry.width && entry.marker) {
    const dot = document.createElementNS(space, "circle");
    for (const [name, value] of Object.entries({ cx: 13, cy: 5, r: 3, fill: inked(entry.color) })) dot.setAttribute(name, value);
    svg.append(dot);
  }
  return svg;
}

// ---- what all figures share

function refresh() {
  for (const figure of figures) figure.refresh();
  for (const row of document.querySelectorAll("#runs tbody tr")) {
    row.classList.toggle("off", state.hidden.has(row.dataset.group));
    row.classList.toggle("lit", state.lit !== "" && row.dataset.group === state.lit);
    row.querySelector("button.swatch")?.setAttribute("aria-pressed", !state.hidden.has(row.dataset.group));
  }
}

let asked = false;
function soon() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    refresh();
  });
}

function toggle(key) {
  if (state.hidden.has(key)) state.hidden.delete(key);
  else state.hidden.add(key);
  soon();
}

function light(key) {
  if (state.lit === key) return;
  state.lit = key;
  soon();
}

function mark(step) {
  if (state.at === step) return;
  state.at = step;
  soon();
}

const tip = make("div", { class: "tip", hidden: true, role: "status" });
function tooltip(what, event) {
  tip.hidden = !what;
  if (!what) return;
  tip.replaceChildren(make("strong", {}, what.title || " "), ...what.lines.map((line) => make("div", {}, line)));
  tip.style.borderLeftColor = what.color || "transparent";
  const [x, y] = [event.clientX + 14, event.clientY + 14];
  tip.style.left = `${Math.max(4, Math.min(x, window.innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${y + tip.offsetHeight > window.innerHeight ? event.clientY - tip.offsetHeight - 10 : y}px`;
}

function facetValues() {
  if (!state.facet) return [null];
  const of = payload.axes.find((axis) => axis.name === state.facet).values;
  return [...new Set(Object.values(of))];
}

function outsideFacet(value) {
  const of = payload.axes.find((axis) => axis.name === state.facet).values;
  return payload.groups.filter((group) => group in of && of[group] !== value);
}

// ---- tables: sort, search, filter

function sortable(table) {
  const body = table.tBodies[0];
  const all = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    if (!cell.textContent.trim()) return;
    const sort = make("button", { type: "button", class: "sort" }, ...cell.childNodes);
    cell.append(sort);
    sort.addEventListener("click", () => {
      const down = cell.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].textContent.trim();
      const value = (text) => {
        const found = /^[<>]?\s*(-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)(?=$|[\s%×/–])/i.exec(text); // "95.7% ± 0.5%" too
        return found ? Number(found[1]) : null;
      };
      all.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        const [m, n] = [value(x), value(y)];
        const [none, other] = [x, y].map((text) => text === "" || text === "–");
        if (none || other) return none - other; // no value: last in both directions
        const order = m !== null && n !== null ? m - n : m !== null ? -1 : n !== null ? 1 : x.localeCompare(y, "en", { numeric: true });
        return down ? -order : order;
      });
      body.append(...all);
    });
  });
}

function controls() {
  const table = document.getElementById("runs");
  const all = [...table.tBodies[0].rows];
  const search = make("input", { type: "search", placeholder: "search runs", "aria-label": "search runs" });
  const filters = payload.axes.map((axis) => {
    const values = [...new Set(Object.values(axis.values))];
    const options = ["", ...values].map((value) => make("option", { value }, value === "" ? `any ${axis.name}` : value));
    return { axis, select: make("select", { "aria-label": `filter by ${axis.name}` }, ...options) };
  });
  const facet = make("select", { "aria-label": "facet by" });
  facet.append(...["", ...payload.axes.map((axis) => axis.name)].map((name) => make("option", { value: name }, name ? `a panel for each ${name}` : "all in one panel")));
  const count = make("span", { class: "note", role: "status" });
  const everything = make("button", { type: "button", onclick: () => {
    search.value = "";
    for (const { select } of filters) select.value = "";
    state.hidden.clear();
    state.zoom = null;
    filter();
  } }, "show all");

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = new Set();
    let shown = 0;
    for (const row of all) {
      const group = row.dataset.group;
      const ok =
        words.every((word) => row.textContent.toLowerCase().includes(word)) &&
        filters.every(({ axis, select }) => select.value === "" || axis.values[group] === select.value);
      row.hidden = !ok;
      if (ok) {
        kept.add(group);
        shown += 1;
      }
    }
    state.filtered = new Set(payload.groups.filter((group) => !kept.has(group)));
    count.textContent = shown === all.length ? `${all.length} rows` : `${shown} of ${all.length} rows`;
    soon();
  }

  search.addEventListener("input", filter);
  for (const { select } of filters) select.addEventListener("change", filter);
  facet.addEventListener("change", () => {
    state.facet = facet.value;
    for (const figure of figures) {
      figure.stale = true;
      if (figure.visible) figure.build();
    }
  });
  const several = all.length > 1;
  const parts = several ? [search, ...filters.map(({ select }) => select), ...(payload.axes.length ? [facet] : []), everything, count] : [];
  if (several) table.closest(".scroll").before(make("div", { class: "controls" }, ...parts));

  for (const row of all) {
    row.addEventListener("pointerenter", () => light(row.dataset.group));
    row.addEventListener("pointerleave", () => light(""));
    const first = row.querySelector(".swatch");
    if (first && payload.looks[row.dataset.group]) {
      const button = make("button", { type: "button", class: "swatch", title: "hide or show in figures", onclick: () => toggle(row.dataset.group) }, swatch(payload.looks[row.dataset.group]));
      first.replaceWith(button);
    }
  }
  filter();
}

// ---- every layer over steps, of a run and a quantity that the reader picks

function paint(map, palette, ends) {
  const [wide, tall] = [Math.max(256, map.z[0].length * 2), Math.max(128, map.z.length * 4)];
  const canvas = make("canvas", { width: wide, height: tall });
  const context = canvas.getContext("2d");
  const image = context.createImageData(wide, tall);
  const rgb = palette.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const scaled = scaler(map.scale, map.linear);
  const [low, high] = ends.map(scaled);
  for (let y = 0; y < tall; y++) {
    const row = map.z[Math.floor((y / tall) * map.z.length)];
    for (let x = 0; x < wide; x++) {
      const at = map.x[0] + ((x + 0.5) / wide) * (map.x[map.x.length - 1] - map.x[0]);
      const value = row[place(map.x, at)];
      let of = [0, 0, 0, 0];
      if (typeof value === "number") {
        const part = (scaled(Math.min(Math.max(value, ends[0]), ends[1])) - low) / (high - low);
        of = [...rgb[Math.min(rgb.length - 1, Math.max(0, Math.floor(part * rgb.length)))], 255];
      }
      image.data.set(of, 4 * (y * wide + x));
    }
  }
  const span = map.x[map.x.length - 1] - map.x[0];
  map.z.forEach((row, r) => {
    row.forEach((value, c) => {
      if (typeof value !== "string") return; // not finite: wide enough to be seen
      const [left, right] = widened(((map.x[c] - map.x[0]) / span) * wide, ((map.x[c + 1] - map.x[0]) / span) * wide, wide);
      const [top, bottom] = widened((r / map.z.length) * tall, ((r + 1) / map.z.length) * tall, tall);
      for (let y = top; y < bottom; y++) {
        for (let x = left; x < right; x++) image.data.set((x + y) % 8 < 3 ? [0, 0, 0, 255] : [213, 94, 0, 255], 4 * (y * wide + x));
      }
    });
  });
  context.putImageData(image, 0, 0);
  return canvas.toDataURL();
}

// Pixels from one to another place, at least a 250th of all
function widened(from, to, all) {
  const half = Math.max((to - from) / 2, all / 500);
  const middle = (from + to) / 2;
  return [Math.max(0, Math.floor(middle - half)), Math.min(all, Math.ceil(middle + half))];
}

function scaler(scale, linear) {
  if (scale === "log") return Math.log;
  if (scale === "signed log") return (value) => Math.sign(value) * Math.log1p(Math.abs(value) / linear);
  return (value) => value;
}

class Explorer extends Figure {
  constructor(element, chart) {
    super(element, chart);
    const { maps } = payload;
    const runs = [...new Set(maps.map((map) => map.run))];
    const select = (label, values) => make("select", { "aria-label": label, onchange: () => this.choose() }, ...values.map((value) => make("option", { value }, value)));
    this.run = select("run", runs);
    this.quantity = select("quantity", [...new Set(maps.map((map) => map.quantity))]);
    this.absent = make("span", { class: "note", role: "status" });
    this.live.before(make("div", { class: "controls" }, this.run, this.quantity, this.absent));
    this.template = chart.spec;
    this.choose();
  }

  choose() {
    const map = payload.maps.find((one) => one.run === this.run.value && one.quantity === this.quantity.value);
    this.absent.textContent = map ? "" : "this run has no such record";
    if (!map) return;
    const spec = structuredClone(this.template);
    const names = payload.rowNames[map.names];
    const signal = (name) => spec.signals.find((one) => one.name === name);
    signal("dx0").value = [map.x[0], map.x[map.x.length - 1]];
    signal("dy0").value = [-0.5, names.length - 0.5];
    signal("url0").value = paint(map, payload.palette, map.ends);
    signal("dz0").value = map.ends;
    signal("left").value = Math.max(58, Math.max(...names.map((name) => name.length)) * 6 + 34);
    const scale = spec.scales.find((one) => one.name === "z0");
    scale.type = { log: "log", "signed log": "symlog", linear: "linear" }[map.scale];
    if (map.scale === "signed log") scale.constant = map.linear;
    const panel = spec.marks.find((mark) => mark.name === "panel0");
    panel.signals.find((one) => one.name === "Ny0").value = names;
    const bar = panel.marks.find((mark) => mark.name === "bar0");
    bar.axes[0].title = map.label;
    if (map.ticks.length) bar.axes[0].values = map.ticks;
    else delete bar.axes[0].values;
    const [rows, every] = [names.length, Math.ceil(names.length / 24)];
    panel.axes[1].values = [...Array(rows).keys()].filter((i) => i % every === 0);
    const rules = spec.data.find((data) => data.name === "r0");
    const rule = { along: "x", run: "", color: "#ffffff", dash: [6, 4], width: 1.2, outlined: true };
    if (rules) rules.values = map.alarm === null ? [] : [{ ...rule, at: map.alarm }];
    const title = panel.marks.find((mark) => mark.name === "title0");
    if (title) title.encode.update.text.value = [`${map.run}${map.alarm === null ? "" : `, alarm at step ${map.alarm}`}`];
    const cells = { x: map.x, y: Array.from({ length: rows + 1 }, (_, i) => i - 0.5), z: map.z, rows: names, places: map.places, label: map.label };
    this.chart = { ...this.chart, spec, panels: [{ x: "step", y: map.axis, cells }] };
    this.stale = true;
    if (this.visible) this.build();
  }
}

async function start() {
  payload = await unpack(document.getElementById("data").textContent);
  document.body.append(tip);
  const seen = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) figures.find((figure) => figure.element === entry.target)?.enter(entry.isIntersecting);
    },
    { rootMargin: "300px" },
  );
  for (const chart of payload.charts) {
    const element = document.getElementById(chart.id);
    const figure = chart.explorer ? new Explorer(element, chart) : new Figure(element, chart);
    figures.push(figure);
    seen.observe(element);
  }
  controls();
  for (const table of document.querySelectorAll("table.sortable")) sortable(table);
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    for (const figure of figures) for (const view of figure.views) view.resize();
  });
  dark.addEventListener("change", () => {
    for (const figure of figures) {
      figure.drawLegend();
      figure.stale = true;
      if (figure.visible) figure.build();
    }
  });
  document.documentElement.classList.add("ready");
}

start();
