// What the plan's file predicts for the MoE layers of a step, beside other placements, by tokens per step.

import { byId, make, show } from "./elements.js";
import { milliseconds, times } from "./format.js";

export function showPredictions(predicted) {
  const rows = Object.entries((predicted || {}).step_us || {}).map(([name, byTokens]) => [name, sizesOf(byTokens)]);
  const own = rows.find(([name]) => name === "plan");
  const known = Boolean(own && own[1].size);
  show(byId("predicted"), known);
  if (!known) return;
  const sizes = [...own[1].keys()];
  const heads = sizes.map((size) => make("th", { scope: "col", textContent: size === "1" ? "1 token" : `${size} tokens` }));
  byId("predictions").replaceChildren(
    make("thead", {}, make("tr", {}, make("th", { scope: "col", textContent: "Placement" }), ...heads)),
    make("tbody", {}, ...rows.map(([name, byTokens]) => row(name, byTokens, own[1], sizes))),
  );
}

// The numbers alone: in a plan's file they are informative, and anything may stand there.
function sizesOf(byTokens) {
  const entries = typeof byTokens === "object" && byTokens ? Object.entries(byTokens) : [];
  return new Map(entries.filter(([size, us]) => /^\d+$/.test(size) && Number.isFinite(us) && us > 0));
}

function row(name, byTokens, own, sizes) {
  const cells = sizes.map((size) => {
    const us = byTokens.get(size);
    if (us === undefined) return make("td", { textContent: "–" });
    const beside = byTokens === own ? "" : ` (${times(us / own.get(size))})`;
    return make("td", {}, milliseconds(us / 1000), make("span", { textContent: beside }));
  });
  const title = byTokens === own ? "this plan" : name;
  return make("tr", {}, make("th", { scope: "row", textContent: title }), ...cells);
}
