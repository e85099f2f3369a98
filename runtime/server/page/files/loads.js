// The numbers behind the map, from `/v1/placement` and `/v1/placement/load`. L layers, G GPUs, S slots of a GPU.

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

function ratios(values) {
  const mean = sum(values) / values.length;
  return values.map((value) => (mean > 0 ? value / mean : null));
}

// How many GPUs hold each expert, by layer: Map expert → list of GPUs.
export function holders(placement) {
  return placement.slots.map((layer) => {
    const found = new Map();
    layer.forEach((experts, gpu) => experts.forEach((expert) => found.set(expert, [...(found.get(expert) || []), gpu])));
    return found;
  });
}

// The load in the window, as the map needs it:
// `gpus` [L][G] pairs, `active` [L][G], each with its ratio to the layer's mean; `shares` [L][G][S] of the layer's pairs.
export function summarize(load) {
  const pairs = load.tokens.map((layer) => layer.map(sum));
  const totals = pairs.map(sum);
  return {
    pairs,
    totals,
    active: load.active,
    pairRatios: pairs.map(ratios),
    activeRatios: load.active.map(ratios),
    shares: load.tokens.map((layer, index) => layer.map((slots) => slots.map((tokens) => (totals[index] ? tokens / totals[index] : 0)))),
    busy: sum(totals) > 0,
  };
}

// Mean over busiest: 1 is perfect; null where nothing happened.
export function balancedness(values) {
  const busiest = Math.max(...values);
  return busiest > 0 ? sum(values) / values.length / busiest : null;
}

// Whether a load is of this placement: a server that was started anew may have another.
export function fits(load, placement) {
  return (
    load.tokens.length === placement.slots.length &&
    load.tokens.every((layer, index) =>
      layer.length === placement.slots[index].length &&
      layer.every((slots, gpu) => slots.length === placement.slots[index][gpu].length))
  );
}
