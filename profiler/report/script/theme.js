// Colours come from the style sheet, so that charts follow light and dark mode with the page.
"use strict";

const NARROW = window.matchMedia("(max-width: 40rem)");
const DARK = window.matchMedia("(prefers-color-scheme: dark)");
const TOUCH = window.matchMedia("(pointer: coarse)");

function readColours() {
  const style = getComputedStyle(document.documentElement);
  const get = (name) => style.getPropertyValue(name).trim();
  const ramp = (prefix) => {
    const stops = get(prefix).split(/\s+/);
    return stops.map((colour, index) => [index / (stops.length - 1), colour]);
  };
  return {
    ink: get("--ink"),
    muted: get("--muted"),
    grid: get("--grid"),
    surface: get("--surface"),
    band: get("--band"),
    series: get("--series").split(/\s+/),
    sequential: ramp("--sequential"),
    diverging: ramp("--diverging"),
  };
}

// Names from the trace are text: plotly would read tags and links in them.
function plainText(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function shorten(text, length) {
  const letters = Array.from(String(text));
  return letters.length <= length ? String(text) : letters.slice(0, length - 1).join("") + "…";
}

function axis(colours, title, extra) {
  return {
    title: { text: title, standoff: 8, font: { size: 12, color: colours.muted } },
    gridcolor: colours.grid,
    linecolor: colours.grid,
    zeroline: false,
    tickfont: { size: 11, color: colours.muted },
    automargin: true,
    fixedrange: TOUCH.matches,
    ...extra,
  };
}

function layout(colours, extra) {
  return {
    autosize: true,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colours.ink },
    margin: { l: 48, r: 12, t: 12, b: 44 },
    dragmode: TOUCH.matches ? false : "zoom",
    hoverlabel: {
      bgcolor: colours.surface,
      bordercolor: colours.muted,
      font: { color: colours.ink, size: 12 },
      align: "left",
    },
    legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", font: { color: colours.ink } },
    ...extra,
  };
}

const SETTINGS = { responsive: true, displayModeBar: false };

function percent(share) {
  return (100 * share).toFixed(share < 0.0995 ? 1 : 0) + "%";
}

function times(ratio) {
  return ratio.toFixed(ratio < 1.95 ? 2 : 1) + "×";
}
