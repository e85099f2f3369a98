// Maps of experts: popularity over layers, affinity between two layers, co-activation within one.

function colourBar(colours, title, ticks) {
  const place = NARROW.matches
    ? { orientation: "h", x: 0.5, xanchor: "center", y: 1, yanchor: "bottom", ypad: 2, len: 1, thickness: 10 }
    : { x: 1.01, xpad: 4, thickness: 12, len: 1 };
  return {
    ...place,
    outlinewidth: 0,
    title: { text: title, side: NARROW.matches ? "top" : "right", font: { size: 12, color: colours.muted } },
    tickfont: { size: 11, color: colours.muted },
    ...ticks,
  };
}

// Ratios on a logarithmic scale: as far below 1× as above it looks as strong.
function ratioScale(colours, largest) {
  const reach = Math.min(4, Math.max(1, Math.ceil(Math.log2(Math.max(largest, 1)))));
  const steps = Array.from({ length: 2 * reach + 1 }, (_, index) => index - reach);
  return {
    z: (ratio) => (ratio === null ? null : Math.max(-reach, Math.min(reach, Math.log2(Math.max(ratio, 1e-9))))),
    zmin: -reach,
    zmax: reach,
    colorscale: colours.diverging,
    ticks: {
      tickmode: "array",
      tickvals: steps,
      ticktext: steps.map((step) => (step < 0 ? `1/${2 ** -step}×` : `${2 ** step}×`)),
    },
  };
}

// Shares on a square-root scale, as they are stored.
function shareScale(colours, largest) {
  const marks = [0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1].filter((mark) => mark <= largest);
  return {
    z: (share) => (share === null ? null : Math.sqrt(share)),
    zmin: 0,
    zmax: Math.sqrt(largest) || 1,
    colorscale: colours.sequential,
    ticks: { tickmode: "array", tickvals: marks.map(Math.sqrt), ticktext: marks.map((mark) => `${Math.round(100 * mark)}%`) },
  };
}

function heatMap(colours, scale, values, details, hover, title, extra) {
  return {
    type: "heatmap",
    z: values.map((row) => row.map(scale.z)),
    customdata: details,
    hovertemplate: hover + "<extra></extra>",
    hoverongaps: false,
    zmin: scale.zmin,
    zmax: scale.zmax,
    colorscale: scale.colorscale,
    colorbar: colourBar(colours, title, scale.ticks),
    ...extra,
  };
}

function cellGap(cells) {
  return cells <= 64 && !NARROW.matches ? 1 : 0;
}

function popularityOf(view) {
  return view.counts.map((row) => {
    const total = row.reduce((sum, count) => sum + count, 0);
    return row.map((count) => (total ? (count * DATA.experts) / total : null));
  });
}

function highest(rows) {
  return rows.reduce((most, row) => row.reduce((best, value) => Math.max(best, value || 0), most), 0);
}

async function drawPopularity(element, colours) {
  const view = DATA.popularity[Number(chosen("popularity-view"))];
  const ratios = popularityOf(view);
  const details = ratios.map((row, layer) => row.map((ratio, expert) => [ratio, view.counts[layer][expert]]));
  const scale = ratioScale(colours, highest(DATA.popularity.map(popularityOf).flat()));
  const trace = heatMap(
    colours, scale, ratios, details,
    "Layer %{y}, expert %{x}<br><b>%{customdata[0]:.2f}×</b> its uniform share<br>%{customdata[1]:,} choices",
    "share / uniform share",
    { y: DATA.layers.map(String), xgap: cellGap(DATA.experts), ygap: cellGap(DATA.layers.length) },
  );
  const rows = DATA.layers.length;
  const figure = layout(colours, {
    height: Math.min(720, Math.max(220, rows * (NARROW.matches ? 10 : 17) + (NARROW.matches ? 150 : 100))),
    // plotly moves a title away only from labels that it overlaps: a shorter one fits between two of them
    xaxis: axis(colours, "number of the expert", { showgrid: false }),
    yaxis: axis(colours, "layer", { type: "category", autorange: "reversed", showgrid: false }),
  });
  await Plotly.react(element, [trace], figure, SETTINGS);
  const most = highest(ratios);
  if (!most) return `${view.label}: nothing was chosen.`;
  const layer = ratios.findIndex((row) => row.includes(most));
  return `${view.label}: expert ${ratios[layer].indexOf(most)} of layer ${DATA.layers[layer]} gets ${times(most)} its uniform share, the most of all.`;
}

// The pair that the most tokens choose beyond what popularity alone gives.
function strongestPair(shares, rowChance, columnChance) {
  let best = { excess: 0 };
  shares.forEach((row, from) =>
    row.forEach((share, to) => {
      const excess = share === null ? 0 : rowChance[from] * (share - columnChance[to]);
      if (excess > best.excess) best = { excess, from, to, share, chance: columnChance[to] };
    }),
  );
  return best;
}

async function drawPairs(element, colours, shares, rowLayer, columnLayer, measure) {
  const rowChance = DATA.chance[rowLayer];
  const columnChance = DATA.chance[columnLayer];
  const ids = [DATA.layers[rowLayer], DATA.layers[columnLayer]];
  const known = shares.map((row, from) =>
    row.map((share, to) => (!rowChance[from] || (rowLayer === columnLayer && from === to) ? null : share)),
  );
  const ratios = known.map((row) =>
    row.map((share, to) => (share === null || !columnChance[to] ? null : share / columnChance[to])),
  );
  const details = known.map((row, from) => row.map((share, to) => [share, ratios[from][to]]));
  const relative = measure === "ratio";
  const scale = relative ? ratioScale(colours, highest(ratios)) : shareScale(colours, highest(known));
  const also = rowLayer === columnLayer ? "" : ` in layer ${ids[1]}`;
  const trace = heatMap(
    colours, scale, relative ? ratios : known, details,
    `Of tokens with expert %{y} in layer ${ids[0]},<br><b>%{customdata[0]:.1%}</b> choose expert %{x}${also}<br>%{customdata[1]:.2f}× chance`,
    relative ? "times chance" : "share of tokens",
    { xgap: cellGap(DATA.experts), ygap: cellGap(DATA.experts) },
  );
  const side = Math.min(element.clientWidth, 620);
  const figure = layout(colours, {
    height: side + (NARROW.matches ? 60 : 0),
    xaxis: axis(colours, rowLayer === columnLayer ? "other expert" : `expert in layer ${ids[1]}`, { showgrid: false }),
    yaxis: axis(colours, `expert in layer ${ids[0]}`, { autorange: "reversed", showgrid: false }),
  });
  await Plotly.react(element, [trace], figure, SETTINGS);
  const best = strongestPair(known, rowChance, columnChance);
  if (!best.excess) return `Layer ${ids[0]}: no pair is chosen more often than popularity alone gives.`;
  return (
    `Strongest link: of tokens with expert ${best.from} in layer ${ids[0]}, ${percent(best.share)} choose expert ` +
    `${best.to}${also || " as well"}; popularity alone gives ${percent(best.chance)}.`
  );
}

async function drawAffinity(element, colours) {
  const layer = Number(chosen("affinity-pair"));
  const shares = await decodeMatrix(DATA.affinity[layer]);
  return drawPairs(element, colours, shares, layer, layer + 1, chosen("affinity-measure"));
}

async function drawCoactivation(element, colours) {
  const layer = Number(chosen("coactivation-layer"));
  const shares = await decodeMatrix(DATA.coactivation[layer]);
  return drawPairs(element, colours, shares, layer, layer, chosen("coactivation-measure"));
}
