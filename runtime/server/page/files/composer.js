// The form under the answers: what is asked, how, and the buttons; one question runs at a time.

import { byId, say, show } from "./elements.js";

const form = byId("composer");
const prompt = byId("prompt");
const temperature = byId("temperature");
const send = byId("send");
const stop = byId("stop");
const clear = byId("clear");
const keyField = byId("key-field");

let running = null;
let comparing = false;

// `onSend(prompt, settings, signal)` resolves to a text about what went wrong, or ""; a prompt that failed comes back.
export function listen(onSend, onClear) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running && prompt.value.trim()) start(onSend);
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) form.requestSubmit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") halt();
  });
  stop.addEventListener("click", halt);
  clear.addEventListener("click", () => {
    say(byId("error"), "");
    onClear();
    prompt.focus();
  });
}

async function start(onSend) {
  const asked = prompt.value;
  running = new AbortController();
  say(byId("error"), "");
  send.disabled = true;
  clear.disabled = true;
  stop.disabled = false;
  if (!comparing) prompt.value = "";
  prompt.focus();
  const problem = await onSend(asked, settings(), running.signal);
  running = null;
  if (document.activeElement === stop) prompt.focus();
  send.disabled = false;
  clear.disabled = false;
  stop.disabled = true;
  say(byId("error"), problem);
  if (problem && !prompt.value) prompt.value = asked;
}

export function halt() {
  if (running) running.abort();
}

function settings() {
  return { temperature: Number(temperature.value), max_tokens: Number(byId("max-tokens").value) };
}

export function askForKey() {
  const first = keyField.hidden;
  show(keyField, true);
  if (first) byId("key").focus();
}

// Side by side is greedy, so that the texts can be compared, and keeps the prompt, to be asked again.
export function setComparing(on) {
  comparing = on;
  temperature.disabled = comparing;
  show(byId("order-field"), comparing);
}

export function inTurns() {
  return byId("order").value === "turns";
}
