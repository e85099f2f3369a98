// Asks a server once per second what it does, while somebody looks.

import { explain, getJson, ServerError } from "./api.js";
import { byId, say } from "./elements.js";
import { showFigures, showPlacement } from "./figures.js";
import { fits } from "./loads.js";
import { setLoad, setPlacement } from "./map.js";

const INTERVAL_MS = 1000;
const PATIENCE_MS = 5000;

let base = "";
let placement = null;
let timer = null;
let round = 0; // answers to a question of an earlier round come too late
let onRefused = () => {};

// Calls `listener` where the server wants a key.
export function whenRefused(listener) {
  onRefused = listener;
}

// Shows this server's placement (`prefix` ""), or the second one's ("compare/").
export function watch(prefix) {
  base = prefix;
  placement = null;
  wake();
}

export function wake() {
  clearTimeout(timer);
  round += 1;
  if (document.visibilityState === "visible") ask(round);
}

async function ask(mine) {
  let again = true;
  let problem = "";
  try {
    await refresh(mine);
  } catch (error) {
    if (mine !== round) return;
    placement = null; // a server that comes back may serve another plan
    [problem, again] = judge(error);
  }
  if (mine !== round) return;
  say(byId("state"), problem);
  byId("work").classList.toggle("stale", problem !== "");
  if (again) timer = setTimeout(() => ask(mine), INTERVAL_MS);
}

async function refresh(mine) {
  const signal = AbortSignal.timeout(PATIENCE_MS);
  const plan = placement || (await getJson(`${base}v1/placement`, signal));
  const load = await getJson(`${base}v1/placement/load`, signal);
  if (mine !== round) return;
  if (plan !== placement) {
    placement = plan;
    setPlacement(plan);
    showPlacement(plan);
  }
  if (fits(load, plan)) setLoad(load);
  else placement = null; // started anew between two questions
  showFigures(load);
}

// What the reader is told, and whether asking again by itself may help.
function judge(error) {
  if (!(error instanceof ServerError)) return ["The server does not answer. Asking again every second.", true];
  if (error.status === 401) {
    onRefused();
    return ["The server wants an API key before it tells anything.", false];
  }
  if (error.status === 404) return ["This server does not tell its placement.", false];
  return [`${explain(error)} Asking again every second.`, true];
}
