// The map: a row per layer, a cell per GPU, coloured by load. One cell is chosen, by keyboard, mouse or touch.

import { loadColours } from "./colours.js";
import { showDetail } from "./detail.js";
import { byId, make, show } from "./elements.js";
import { percent, times } from "./format.js";
import { balancedness, holders, summarize } from "./loads.js";

const grid = byId("grid");
const measure = byId("measure");
const legend = byId("legend");
// The ratio at which each colour scale ends: slots differ more than GPUs do.
const REACH = { pairs: 1.5, active: 1.5, slots: 4 };

let placement = null;
let copies = null;
let loads = null;
let cells = []; // [L][G]
let chosen = [0, 0];
let pointed = null;
let busy = false;

export function setPlacement(next) {
  placement = next;
  copies = holders(placement);
  loads = null;
  pointed = null;
  busy = false;
  const fitsIn = chosen[0] < placement.slots.length && chosen[1] < placement.slots[0].length;
  if (!fitsIn) chosen = [0, 0];
  build();
  show(byId("map"), true);
  redrawMap();
}

export function setLoad(load) {
  const next = { ...summarize(load), balancedness: load.balancedness };
  // Without work the last picture stays: it says more than an empty one.
  busy = next.busy;
  if (busy) loads = next;
  redrawMap();
}

function describe() {
  const known = placement.layer_ids.map((id, layer) => [id, balanceOf(layer)]).filter(([, share]) => share !== null);
  if (!known.length) return "No load yet: send a prompt, or several at once.";
  const [worst, least] = known.reduce((low, next) => (next[1] < low[1] ? next : low));
  const mean = known.reduce((total, [, share]) => total + share, 0) / known.length;
  const state = busy ? "" : "Idle; this is the last load. ";
  return `${state}Balance ${mean.toFixed(2)} over the layers, ${least.toFixed(2)} in the worst, layer ${worst}.`;
}

function build() {
  const numGpus = placement.slots[0].length;
  grid.style.setProperty("--layers", placement.slots.length);
  grid.style.setProperty("--gpus", numGpus);
  byId("map").classList.toggle("tall", placement.slots.length > 16);
  grid.classList.toggle("dense", numGpus > 4);
  grid.classList.toggle("many", numGpus > 8);
  const corner = make("th", { scope: "col", textContent: "Layer" });
  const last = make("th", { scope: "col", textContent: "Balance", title: "Mean over busiest: 1 is perfect" });
  const heads = Array.from({ length: numGpus }, (_, gpu) => make("th", { scope: "col" }, make("span", { className: "unit", textContent: "GPU " }), String(gpu)));
  const head = make("thead", {}, make("tr", {}, corner, ...heads, last));
  cells = placement.slots.map((layer, row) => layer.map((_, gpu) => makeCell(row, gpu)));
  const rows = placement.layer_ids.map((id, row) =>
    make("tr", {}, make("th", { scope: "row", textContent: id }), ...cells[row], make("td", { className: "balance" })));
  grid.replaceChildren(head, make("tbody", {}, ...rows));
}

function makeCell(row, gpu) {
  const cell = make("td", { className: "cell", tabIndex: -1 });
  cell.dataset.row = row;
  cell.dataset.gpu = gpu;
  return cell;
}

export function redrawMap() {
  if (!placement) return;
  const colours = loadColours(REACH[measure.value]);
  drawLegend(colours);
  cells.forEach((row, layer) => {
    row.forEach((cell, gpu) => drawCell(cell, layer, gpu, colours));
    const share = balanceOf(layer);
    grid.tBodies[0].rows[layer].lastElementChild.textContent = share === null ? "–" : share.toFixed(2);
  });
  byId("map-says").textContent = describe();
  mark();
}

function balanceOf(layer) {
  if (!loads) return null;
  if (measure.value === "active") return balancedness(loads.active[layer]);
  return loads.totals[layer] > 0 ? loads.balancedness[layer] : null;
}

function drawCell(cell, layer, gpu, colours) {
  const ratio = ratioOf(layer, gpu);
  const slots = loads && loads.totals[layer] && measure.value === "slots" ? slotRatios(layer, gpu) : null;
  const { fill, ink } = colours(ratio === null ? 1 : ratio);
  const text = ratio === null || slots ? "" : times(ratio);
  if (cell.textContent !== text) cell.textContent = text;
  cell.style.color = ink;
  cell.style.background = slots && slots.length ? stripes(slots, colours) : fill;
  const label = `Layer ${placement.layer_ids[layer]}, GPU ${gpu}: ${wordsOf(layer, gpu, ratio)}`;
  if (cell.getAttribute("aria-label") !== label) cell.setAttribute("aria-label", label);
}

function ratioOf(layer, gpu) {
  if (!loads) return null;
  return (measure.value === "active" ? loads.activeRatios : loads.pairRatios)[layer][gpu];
}

// Each slot's tokens relative to the mean of the layer's slots.
function slotRatios(layer, gpu) {
  const numSlots = placement.slots[layer].reduce((total, experts) => total + experts.length, 0);
  return loads.shares[layer][gpu].map((share) => share * numSlots);
}

function stripes(values, colours) {
  const width = 100 / values.length;
  const stops = values.map((value, index) => `${colours(value).fill} ${index * width}% ${(index + 1) * width}%`);
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

function wordsOf(layer, gpu, ratio) {
  const held = `${placement.slots[layer][gpu].length} experts`;
  if (ratio === null) return `${held}, no load yet`;
  const of = measure.value === "active" ? "active experts" : "tokens";
  const share = loads.totals[layer] ? `, ${percent(loads.pairs[layer][gpu] / loads.totals[layer])} of the layer's tokens` : "";
  return `${times(ratio)} the mean of the GPUs' ${of}${share}, ${held}`;
}

function drawLegend(colours) {
  const reach = REACH[measure.value];
  const ends = reach === 4 ? ["¼× or less", "4× or more"] : ["⅔× or less", "1.5× or more"];
  const [low, ramp, high] = legend.children;
  low.textContent = ends[0];
  high.textContent = ends[1];
  const levels = Array.from({ length: 13 }, (_, index) => colours(reach ** (index / 6 - 1)).fill);
  ramp.style.background = `linear-gradient(to right, ${levels.join(", ")})`;
  legend.setAttribute("aria-label", `Colours run from ${ends[0]} to ${ends[1]} of the layer's mean`);
}

// The tab stop, the mark and the detail are those of the cell pointed at, or else of the chosen one.
function mark() {
  const shown = pointed || chosen;
  cells.forEach((row, layer) => row.forEach((cell, gpu) => {
    const isChosen = layer === chosen[0] && gpu === chosen[1];
    cell.tabIndex = isChosen ? 0 : -1;
    cell.setAttribute("aria-selected", String(isChosen));
    cell.classList.toggle("shown", layer === shown[0] && gpu === shown[1]);
  }));
  showDetail(placement, copies, loads, shown, cells[shown[0]][shown[1]].getAttribute("aria-label"));
}

function placeOf(event) {
  const cell = event.target.closest(".cell");
  return cell && [Number(cell.dataset.row), Number(cell.dataset.gpu)];
}

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function moved(event) {
  const [layer, gpu] = chosen;
  const [lastLayer, lastGpu] = [cells.length - 1, cells[0].length - 1];
  if (event.key === "Home") return [event.ctrlKey ? 0 : layer, 0];
  if (event.key === "End") return [event.ctrlKey ? lastLayer : layer, lastGpu];
  const [down, right] = MOVES[event.key];
  return [Math.max(0, Math.min(lastLayer, layer + down)), Math.max(0, Math.min(lastGpu, gpu + right))];
}

grid.addEventListener("keydown", (event) => {
  if (!(event.key in MOVES) && event.key !== "Home" && event.key !== "End") return;
  event.preventDefault();
  chosen = moved(event);
  pointed = null;
  mark();
  cells[chosen[0]][chosen[1]].focus();
});
grid.addEventListener("focusin", (event) => {
  const place = placeOf(event);
  if (!place) return;
  chosen = place;
  mark();
});
grid.addEventListener("pointerover", (event) => {
  if (event.pointerType !== "mouse") return;
  pointed = placeOf(event);
  mark();
});
grid.addEventListener("pointerleave", () => {
  pointed = null;
  mark();
});
measure.addEventListener("change", redrawMap);
