// How groups of sequences differ: from each other (a matrix), and from the whole beside a random control (bars).

const LONGEST_NAME = 18;

function groupLabels(drift) {
  const short = drift.names.map((name) => shorten(name, NARROW.matches ? 10 : LONGEST_NAME));
  // Two names that look alike when cut must not fall on one place of the axis.
  return { text: short.map(plainText), full: drift.names.map(plainText), at: drift.names.map((_, index) => index) };
}

function groupAxis(colours, labels, extra) {
  return axis(colours, "", { tickmode: "array", tickvals: labels.at, ticktext: labels.text, showgrid: false, ...extra });
}

async function drawDistances(element, colours, drift, noun) {
  const labels = groupLabels(drift);
  const size = drift.names.length;
  const details = labels.full.map((row) => labels.full.map((column) => [row, column]));
  const largest = highest(drift.distance) || 1;
  const trace = {
    type: "heatmap", z: drift.distance, x: labels.at, y: labels.at, customdata: details, zmin: 0, zmax: largest,
    colorscale: colours.sequential,
    colorbar: colourBar(colours, "total variation", { tickformat: ".0%", nticks: 6 }),
    xgap: cellGap(size), ygap: cellGap(size),
    texttemplate: size <= (NARROW.matches ? 6 : 12) ? "%{z:.0%}" : "",
    hovertemplate: "%{customdata[0]}<br>%{customdata[1]}<br><b>%{z:.1%}</b> of choices differ<extra></extra>",
  };
  const figure = layout(colours, {
    height: Math.min(620, Math.max(260, size * 34 + 130)),
    xaxis: groupAxis(colours, labels, { tickangle: size > 5 || NARROW.matches ? -45 : 0 }),
    yaxis: groupAxis(colours, labels, { autorange: "reversed" }),
  });
  await Plotly.react(element, [trace], figure, SETTINGS);
  let pair = [0, 0];
  drift.distance.forEach((row, a) => row.forEach((value, b) => {
    if (value > drift.distance[pair[0]][pair[1]]) pair = [a, b];
  }));
  const [a, b] = pair;
  return `Farthest apart: ${noun}${drift.names[a]} and ${noun}${drift.names[b]}, ${percent(drift.distance[a][b])} of choices.`;
}

async function drawBars(element, colours, drift) {
  const labels = groupLabels(drift);
  const hover = (what) => `%{customdata}<br>${what}: <b>%{x:.1%}</b><extra></extra>`;
  const traces = [
    {
      type: "bar", orientation: "h", name: "distance to the whole", x: drift.to_all, y: labels.at, customdata: labels.full,
      marker: { color: colours.series[0] }, width: 0.6, hovertemplate: hover("distance to the whole"),
    },
    {
      type: "scatter", mode: "markers", name: "random control", x: drift.to_all_control, y: labels.at, customdata: labels.full,
      marker: { symbol: "line-ns-open", size: 16, color: colours.ink, line: { width: 2.5 } }, hovertemplate: hover("random control"),
    },
  ];
  const figure = layout(colours, {
    height: Math.max(200, drift.names.length * 26 + 110),
    xaxis: axis(colours, "total variation from the whole trace", { tickformat: ".0%", rangemode: "tozero" }),
    yaxis: groupAxis(colours, labels, { autorange: "reversed" }),
  });
  await Plotly.react(element, traces, figure, SETTINGS);
  const beyond = drift.to_all.filter((value, index) => value > drift.to_all_control[index]).length;
  return `${beyond} of ${drift.names.length} lie farther from the whole than random groups do.`;
}
