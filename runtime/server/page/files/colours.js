// Loads as colours: cool below the mean, warm above it, on a logarithmic scale that follows light and dark mode.

export const DARK = window.matchMedia("(prefers-color-scheme: dark)");

const style = getComputedStyle(document.documentElement);

function rampStops() {
  return style.getPropertyValue("--diverging").trim().split(/\s+/).map(channelsOf);
}

function channelsOf(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

// Maps a ratio to a colour and to the ink that can be read on it; `reach` is the ratio where the colour ends.
export function loadColours(reach) {
  const stops = rampStops();
  const span = stops.length - 1;
  return (ratio) => {
    const level = Math.max(-1, Math.min(1, Math.log(Math.max(ratio, 1e-9)) / Math.log(reach)));
    const place = ((level + 1) / 2) * span;
    const from = Math.min(span - 1, Math.floor(place));
    const channels = stops[from].map((low, index) => Math.round(low + (place - from) * (stops[from + 1][index] - low)));
    return { fill: `rgb(${channels.join(" ")})`, ink: luminance(channels) > 0.18 ? "#000000" : "#ffffff" };
  };
}

// Relative luminance as WCAG 2.2 defines it; at 0.18 black and white stand out alike.
function luminance(channels) {
  const linear = channels.map((channel) => {
    const share = channel / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}
