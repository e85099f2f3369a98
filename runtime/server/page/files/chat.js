// A conversation with one server.

import { appendText, byId, make, show } from "./elements.js";
import { run } from "./generate.js";
import { count, milliseconds, rate, tokensPerSecond } from "./format.js";

const log = byId("log");
const opening = log.querySelector(".empty");
let messages = [];

export function clearChat() {
  messages = [];
  log.replaceChildren(opening);
}

// Asks, and shows the answer as it comes. A question without any answer leaves no trace.
export async function ask(server, prompt, settings, signal) {
  opening.remove();
  const question = addTurn("user", "You", prompt);
  const answer = addTurn("assistant", server.model || "Model", "");
  const text = document.createTextNode("");
  answer.querySelector(".text").append(text);
  answer.classList.add("writing");
  log.setAttribute("aria-busy", "true"); // read out when complete, not word by word
  log.scrollTop = log.scrollHeight;

  messages.push({ role: "user", content: prompt });
  const result = await run(server, messages, settings, signal, (piece) => appendText(log, text, piece));

  show(byId("continues"), !server.hasTemplate);
  answer.querySelector(".who").textContent = server.model || "Model";
  answer.classList.remove("writing");
  if (result.error && !result.text) {
    messages.pop();
    question.remove();
    answer.remove();
  } else {
    messages.push({ role: "assistant", content: result.text });
    answer.append(make("p", { className: "measured", textContent: describe(result) }));
    log.scrollTop = log.scrollHeight;
  }
  log.setAttribute("aria-busy", "false");
  return result;
}

function addTurn(kind, who, text) {
  const turn = make(
    "div",
    { className: `turn ${kind}` },
    make("p", { className: "who", textContent: who }),
    make("div", { className: "text", dir: "auto", textContent: text }),
  );
  log.append(turn);
  return turn;
}

// How an answer ended, and its times, in one line.
export function describe(result) {
  const speed = tokensPerSecond(result);
  const ends = {
    stopped: "stopped",
    done: result.finish === "length" ? "cut at max tokens" : "complete",
  };
  return [
    result.error ? "broken off" : ends[result.end],
    result.tokens === null ? "" : count(result.tokens, "token"),
    result.firstMs === null ? "" : `first after ${milliseconds(result.firstMs)}`,
    speed === null ? "" : `${rate(speed)} tokens/s`,
    `${milliseconds(result.totalMs)} in all`,
  ]
    .filter(Boolean)
    .join(" · ");
}
