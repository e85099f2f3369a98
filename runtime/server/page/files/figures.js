// The figures above the map: what the server does now, and what was predicted for it.

import { byId, fillFacts } from "./elements.js";
import { count, milliseconds, rate, times } from "./format.js";
import { showPredictions } from "./predictions.js";

export function showPlacement(placement) {
  const [numLayers, numGpus] = [placement.slots.length, placement.slots[0].length];
  const numSlots = placement.slots.flat(2).length;
  const perExpert = numSlots / (numLayers * placement.num_experts);
  byId("about").textContent = [
    `${count(numLayers, "MoE layer")} of ${count(placement.num_experts, "expert")}, top-${placement.top_k}`,
    `on ${count(numGpus, "GPU")}`,
    perExpert > 1 ? `${perExpert.toFixed(2)} copies of each on average` : "one copy of each",
    `strategy ${placement.strategy}`,
  ].join(", ");
  showPredictions(placement.predicted);
}

export function showFigures(load) {
  const measured = load.step_ms.median;
  const predicted = load.predicted_step_us === null ? null : load.predicted_step_us / 1000;
  const compared = predicted && measured ? `measured is ${times(measured / predicted)}` : predicted ? "nothing measured yet" : "not in the plan";
  fillFacts(byId("figures"), [
    ["Step, measured", milliseconds(measured), measured ? `p95 ${milliseconds(load.step_ms.p95)}` : "no step yet"],
    ["Step, predicted", milliseconds(predicted), compared],
    ["Tokens/s", rate(load.tokens_per_s), `${count(load.steps, "step")} so far`],
    ["Requests", `${load.running} running`, `${load.waiting} waiting`],
  ]);
}
