// Ties the parts of the page together.

import { explain, getJson, ServerError, setKey } from "./api.js";
import { ask, clearChat } from "./chat.js";
import { DARK } from "./colours.js";
import { askBoth, clearComparison, nameSides } from "./compare.js";
import { askForKey, halt, inTurns, listen, setComparing } from "./composer.js";
import { byId, show } from "./elements.js";
import { Server } from "./generate.js";
import { wake, watch, whenRefused } from "./live.js";
import { redrawMap } from "./map.js";

const PREFIXES = { here: "", there: "compare/" };
const here = new Server(PREFIXES.here);
const there = new Server(PREFIXES.there);
const main = document.querySelector("main");
let hasSecond = false;

function isComparing() {
  return main.dataset.mode === "compare";
}

async function send(prompt, settings, signal) {
  const comparing = isComparing();
  const results = comparing
    ? await askBoth([here, there], prompt, settings, signal, inTurns())
    : [await ask(here, prompt, settings, signal)];
  showModel();
  const errors = results.map((result) => result.error).filter(Boolean);
  if (errors.some((error) => error instanceof ServerError && error.status === 401)) askForKey();
  // Side by side, each answer's place tells its own error.
  return comparing || !errors.length ? "" : explain(errors[0]);
}

function showModel() {
  if (!here.model) return;
  byId("model").textContent = here.model;
  document.title = `${here.model} · expertplan`;
}

async function loadModel() {
  try {
    await here.loadModel();
    showModel();
  } catch {
    // The state line tells it, and the model's name is asked for again with the first prompt.
  }
}

async function knowsSecond() {
  try {
    return (await getJson("page/settings")).compare;
  } catch {
    return false; // no server, and the state line tells it
  }
}

async function nameBoth() {
  const strategies = await Promise.all([here, there].map(async (server) => {
    try {
      return (await getJson(server.path("placement"))).strategy;
    } catch {
      return ""; // it may serve all the same
    }
  }));
  nameSides(strategies);
}

async function setMode(mode) {
  halt();
  main.dataset.mode = mode;
  show(byId("chat"), !isComparing());
  show(byId("compare"), isComparing());
  setComparing(isComparing());
  show(byId("composer"), hasSecond || !isComparing());
  if (isComparing() && hasSecond) await nameBoth();
}

for (const radio of document.querySelectorAll("[name=mode]")) {
  radio.addEventListener("change", () => setMode(radio.value));
}
byId("key").addEventListener("input", () => setKey(byId("key").value.trim()));
byId("key").addEventListener("change", () => {
  loadModel();
  wake();
});
byId("whose").addEventListener("change", () => watch(PREFIXES[byId("whose").value]));
document.addEventListener("visibilitychange", wake);
DARK.addEventListener("change", redrawMap);
listen(send, () => (isComparing() ? clearComparison() : clearChat()));
whenRefused(askForKey);

clearComparison();
watch(PREFIXES.here);
loadModel();
hasSecond = await knowsSecond();
show(byId("no-second"), !hasSecond);
show(byId("panes"), hasSecond);
show(byId("whose-field"), hasSecond);
