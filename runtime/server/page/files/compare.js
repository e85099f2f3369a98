// One prompt to this server and to the second one, with their times.

import { explain } from "./api.js";
import { appendText, byId, fillFacts, say } from "./elements.js";
import { milliseconds, rate, times, tokensPerSecond } from "./format.js";
import { run } from "./generate.js";

const panes = [...document.querySelectorAll(".pane")];
const verdict = byId("verdict");

const SERVERS = ["this server", "the second server"];
let names = SERVERS;

// Strategies are the sides' names, where both are known and differ.
export function nameSides(strategies) {
  names = strategies[0] && strategies[1] && strategies[0] !== strategies[1] ? strategies : SERVERS;
  panes.forEach((pane, side) => {
    const heading = ["This server", "Second server"][side] + (strategies[side] ? `: ${strategies[side]}` : "");
    pane.querySelector("h3").textContent = heading;
    pane.querySelector(".text").setAttribute("aria-label", `Answer of ${SERVERS[side]}`);
  });
}

export function clearComparison() {
  for (const pane of panes) {
    pane.querySelector(".text").replaceChildren();
    pane.classList.remove("same", "failed");
    fillFacts(pane.querySelector(".times"), timesOf(null));
  }
  say(verdict, "");
}

// Asks both, at once or one after the other; a side that fails does not end the other.
export async function askBoth(servers, prompt, settings, signal, inTurns) {
  clearComparison();
  const asked = { ...settings, temperature: 0 };
  const results = [];
  if (inTurns) {
    for (const [side, server] of servers.entries()) results.push(await askSide(side, server, prompt, asked, signal));
  } else {
    results.push(...(await Promise.all(servers.map((server, side) => askSide(side, server, prompt, asked, signal)))));
  }
  say(verdict, judge(results));
  const same = isSame(results);
  for (const pane of panes) pane.classList.toggle("same", same);
  return results;
}

async function askSide(side, server, prompt, settings, signal) {
  const pane = panes[side];
  const box = pane.querySelector(".text");
  const text = document.createTextNode("");
  box.replaceChildren(text);
  box.setAttribute("aria-busy", "true");
  pane.classList.add("writing");
  const messages = [{ role: "user", content: prompt }];
  const result = await run(server, messages, settings, signal, (piece) => appendText(box, text, piece));
  fillFacts(pane.querySelector(".times"), timesOf(result));
  if (result.error) {
    pane.classList.add("failed");
    if (!result.text) text.data = explain(result.error);
  }
  pane.classList.remove("writing");
  box.setAttribute("aria-busy", "false");
  return result;
}

function timesOf(result) {
  const speed = result && tokensPerSecond(result);
  return [
    ["First token", result ? milliseconds(result.firstMs) : "–"],
    ["Tokens/s", speed ? rate(speed) : "–"],
    ["Total", result ? milliseconds(result.totalMs) : "–"],
  ];
}

function isSame(results) {
  return results.every((result) => result.end === "done") && results[0].text === results[1].text;
}

function judge(results) {
  if (results.some((result) => result.error)) return results.map((result, side) => failure(result, side)).filter(Boolean).join(" ");
  if (results.some((result) => result.end === "stopped")) return "Stopped.";
  const speeds = results.map(tokensPerSecond);
  const ratio = speeds[0] && speeds[1] ? ` Tokens/s: ${names[0]} has ${times(speeds[0] / speeds[1])} those of ${names[1]}.` : "";
  if (isSame(results)) return `Identical text.${ratio}`;
  const [first, second] = results.map((result) => [...result.text]);
  const at = first.findIndex((letter, index) => letter !== second[index]);
  const where = (at < 0 ? first.length : at) + 1;
  return `The texts differ from character ${where} on.${ratio}`;
}

function failure(result, side) {
  return result.error ? `${panes[side].querySelector("h3").textContent}: ${explain(result.error)}` : "";
}
