// Charts of lines: skew, mutual information, active experts, convergence, hit rates.

function line(colours, name, x, y, series, extra) {
  return {
    type: "scatter",
    mode: "lines+markers",
    name,
    x,
    y,
    line: { color: colours.series[series % colours.series.length], width: 2, ...(extra && extra.line) },
    marker: { size: 5, color: colours.series[series % colours.series.length] },
    hovertemplate: `${name}: %{y:.3f}<extra></extra>`,
    ...(extra && extra.trace),
  };
}

const DOTTED = { line: { dash: "dot", width: 1.5 }, trace: { mode: "lines" } };

function lineChart(element, colours, traces, xaxis, yaxis, extra) {
  const figure = layout(colours, { height: 320, hovermode: "x unified", xaxis, yaxis, ...extra });
  return Plotly.react(element, traces, figure, SETTINGS);
}

// The values that were measured, fewer of them on a phone.
function logAxis(colours, title, values) {
  const every = NARROW.matches && values.length > 7 ? 2 : 1;
  const shown = values.filter((_, index) => index % every === 0);
  return axis(colours, title, { type: "log", tickmode: "array", tickvals: shown, ticktext: shown.map(abbreviate), tickangle: 0, showgrid: false });
}

function abbreviate(count) {
  if (count < 10000) return count.toLocaleString("en");
  return count < 1e6 ? `${Number((count / 1e3).toPrecision(3))}k` : `${Number((count / 1e6).toPrecision(3))}M`;
}

function layerAxis(colours, title) {
  return axis(colours, title, { type: "category", tickangle: 0, nticks: NARROW.matches ? 8 : 24, showgrid: false });
}

async function drawSkew(element, colours) {
  const layers = DATA.layers.map(String);
  const skew = DATA.skew.max_over_mean;
  const traces = [
    line(colours, "busiest / mean", layers, skew, 0),
    line(colours, "Gini coefficient (right axis)", layers, DATA.skew.gini, 1, { trace: { yaxis: "y2" } }),
  ];
  await lineChart(element, colours, traces, layerAxis(colours, "layer"), axis(colours, "busiest / mean", { rangemode: "tozero" }), {
    margin: { l: 48, r: 48, t: 12, b: 44 },
    yaxis2: axis(colours, "Gini coefficient", { overlaying: "y", side: "right", showgrid: false, range: [0, 1], tickmode: "linear", dtick: 0.25 }),
  });
  const known = skew.filter((value) => value !== null);
  if (!known.length) return "No layer has any choice.";
  return `Busiest / mean runs from ${times(Math.min(...known))} to ${times(Math.max(...known))} over the layers.`;
}

async function drawInformation(element, colours) {
  const info = DATA.information;
  const from = DATA.layers.slice(0, -1).map(String);
  const traces = [
    line(colours, "all pairs of choices", from, info.pairs, 0),
    line(colours, "shuffled", from, info.pairs_shuffled, 0, DOTTED),
    line(colours, "first choices", from, info.top1, 1),
    line(colours, "first choices, shuffled", from, info.top1_shuffled, 1, DOTTED),
  ];
  await lineChart(element, colours, traces, layerAxis(colours, "from layer, to the next"), axis(colours, "bits", { rangemode: "tozero" }));
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  return `Mean over layers: ${mean(info.pairs).toFixed(3)} bits, ${mean(info.pairs_shuffled).toFixed(3)} with tokens shuffled.`;
}

async function drawActive(element, colours) {
  const active = DATA.active;
  const edge = { mode: "lines", line: { width: 0 }, hoverinfo: "skip", hovertemplate: null, showlegend: false };
  const traces = [
    { type: "scatter", x: active.batches, y: active.lowest, ...edge },
    { type: "scatter", x: active.batches, y: active.highest, ...edge, showlegend: true, name: "least to most layer", fill: "tonexty", fillcolor: colours.band },
    line(colours, "uniform routing", active.batches, active.uniform, 2, DOTTED),
    line(colours, "mixed traffic", active.batches, active.mixed, 0),
  ];
  if (active.same_domain) traces.push(line(colours, "one domain per batch", active.batches, active.same_domain, 1));
  const xaxis = logAxis(colours, `tokens in the batch (${active.phase})`, active.batches);
  await lineChart(element, colours, traces, xaxis, axis(colours, "distinct experts per layer", { rangemode: "tozero" }), { height: 360 });
  const last = active.batches.length - 1;
  return `From ${active.mixed[0].toFixed(1)} experts at ${active.batches[0]} to ${active.mixed[last].toFixed(1)} of ${DATA.experts} at ${active.batches[last]} tokens, mean over layers.`;
}

async function drawConvergence(element, colours) {
  const convergence = DATA.convergence;
  const at = convergence.tokens.indexOf(convergence.stable_at);
  const traces = [
    line(colours, "distance", convergence.tokens, convergence.distance, 0),
    {
      type: "scatter", mode: "markers", name: "stable", hoverinfo: "skip",
      x: [convergence.stable_at], y: [convergence.distance[at]],
      marker: { size: 12, symbol: "circle-open", color: colours.series[1], line: { width: 2.5 } },
    },
  ];
  const claim = { type: "rect", xref: "x", yref: "paper", x0: 1000, x1: 3000, y0: 0, y1: 1, fillcolor: colours.band, line: { width: 0 }, layer: "below" };
  const floor = { type: "line", xref: "paper", x0: 0, x1: 1, y0: convergence.floor, y1: convergence.floor, line: { color: colours.muted, width: 1, dash: "dot" } };
  const note = {
    text: "ExFlow’s claim", xref: "x", yref: "paper", x: Math.log10(Math.sqrt(1000 * 3000)), y: 1, yanchor: "top",
    showarrow: false, font: { size: 11, color: colours.muted },
  };
  const xaxis = logAxis(colours, "tokens counted", convergence.tokens);
  await lineChart(element, colours, traces, xaxis, axis(colours, "total variation", { rangemode: "tozero" }), {
    shapes: [claim, floor], annotations: [note],
  });
  return `Stable at ${convergence.stable_at.toLocaleString("en")} tokens; ${convergence.floor.toFixed(3)} remains at the most that were counted.`;
}

async function drawPredictors(element, colours) {
  const dashes = ["solid", "dash", "dot"];
  const traces = DATA.predictors.map((score, index) =>
    line(colours, plainText(score.name), score.layers.map(String), score.hit_rate, index, {
      line: { dash: dashes[Math.floor(index / colours.series.length) % dashes.length] },
      trace: { hovertemplate: `${plainText(score.name)}: %{y:.1%}<extra></extra>` },
    }),
  );
  const xaxis = { ...layerAxis(colours, "layer"), categoryorder: "array", categoryarray: DATA.layers.map(String) };
  await lineChart(element, colours, traces, xaxis, axis(colours, "hit rate", { tickformat: ".0%", range: [0, 1.02] }), { height: 380 });
  return `Hit rate of ${DATA.predictors.length} predictors, layer by layer.`;
}
