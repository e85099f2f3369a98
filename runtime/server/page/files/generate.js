// One answer as it streams: from the chat endpoint, or from plain completion where the model has no chat template.

import { getJson, request, ServerError } from "./api.js";

export class Server {
  constructor(base) {
    this.base = base;
    this.hasTemplate = true;
    this.model = null;
  }

  path(name) {
    return `${this.base}v1/${name}`;
  }

  async loadModel(signal) {
    this.hasTemplate = true;
    this.model = (await getJson(this.path("models"), signal)).data[0].id;
    return this.model;
  }

  // The response of the endpoint that serves, and when it was asked.
  async open(messages, settings, signal) {
    if (!this.model) await this.loadModel(signal);
    const common = { model: this.model, stream: true, stream_options: { include_usage: true }, ...settings };
    if (this.hasTemplate) {
      const sentAt = performance.now();
      try {
        return { sentAt, response: await request(this.path("chat/completions"), { body: { messages, ...common }, signal }) };
      } catch (error) {
        if (!(error instanceof ServerError) || error.code !== "no_chat_template") throw error;
        this.hasTemplate = false;
      }
    }
    const sentAt = performance.now();
    const prompt = messages[messages.length - 1].content;
    return { sentAt, response: await request(this.path("completions"), { body: { prompt, ...common }, signal }) };
  }
}

// The data of server-sent events, as strings.
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // nobody reads on; a stream that failed refuses this too
  }
}

// Streams one answer. `onText` gets each piece; the result says how it ended and how long it took. It never throws.
export async function run(server, messages, settings, signal, onText) {
  const result = { text: "", tokens: null, firstMs: null, lastMs: null, totalMs: null, end: null, error: null };
  let sentAt = performance.now();
  try {
    const opened = await server.open(messages, settings, signal);
    sentAt = opened.sentAt;
    for await (const data of events(opened.response.body)) {
      if (data === "[DONE]") {
        result.end = result.end || "done";
        break;
      }
      take(JSON.parse(data), result, performance.now() - sentAt, onText);
    }
    if (!result.end) throw new Error("The connection ended before the answer did.");
  } catch (error) {
    if (signal.aborted) result.end = "stopped";
    else result.error = error;
    if (error.code === "model_not_found") server.model = null; // started anew with another one: ask again for its name
  }
  result.totalMs = performance.now() - sentAt;
  return result;
}

function take(chunk, result, elapsedMs, onText) {
  if (chunk.error) throw new Error(`The server broke off: ${chunk.error.message}`);
  if (chunk.usage) result.tokens = chunk.usage.completion_tokens;
  const choice = chunk.choices[0];
  if (!choice) return;
  if (choice.finish_reason) result.finish = choice.finish_reason;
  const text = (choice.delta ? choice.delta.content : choice.text) || "";
  if (!text) return;
  if (result.firstMs === null) result.firstMs = elapsedMs;
  result.lastMs = elapsedMs;
  result.text += text;
  onText(text);
}
