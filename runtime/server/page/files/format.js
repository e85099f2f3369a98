// Numbers as people read them.

export function milliseconds(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 0.9995) return `${Math.round(ms * 1000)} µs`;
  if (ms < 999.5) return `${Number(ms.toPrecision(3))} ms`;
  return `${(ms / 1000).toFixed(ms < 9995 ? 2 : 1)} s`;
}

export function rate(perSecond) {
  const digits = perSecond < 99.5 ? 1 : 0;
  return perSecond.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function times(ratio) {
  return `${ratio.toFixed(ratio < 9.95 ? 2 : 1)}×`;
}

export function percent(share) {
  return `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;
}

export function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

// Decoding speed, without the wait for the first token.
export function tokensPerSecond(result) {
  const ms = result.lastMs - result.firstMs;
  return result.tokens > 1 && ms > 0 ? ((result.tokens - 1) * 1000) / ms : null;
}
