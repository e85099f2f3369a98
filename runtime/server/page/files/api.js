// Requests to a server: this one, or the second one behind it. Paths are relative, so a prefix before the page is kept.

let key = "";

export function setKey(value) {
  key = value;
}

// An answer that is an error; `code` is the server's word for it, `retryAfter` in seconds.
export class ServerError extends Error {
  constructor(status, message, code, retryAfter) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

export async function request(path, { body, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: body ? "POST" : "GET",
    headers,
    body: body && JSON.stringify(body),
    signal,
    cache: "no-store",
    redirect: "error",
  });
  if (!response.ok) throw await readError(response);
  return response;
}

export async function getJson(path, signal) {
  return (await request(path, { signal })).json();
}

async function readError(response) {
  const text = await response.text();
  let told = {};
  try {
    told = JSON.parse(text).error || {};
  } catch {
    // Something before the server answered, with a page of its own.
  }
  const message = typeof told.message === "string" ? told.message : `HTTP ${response.status} ${response.statusText}`.trim();
  return new ServerError(response.status, message, told.code, Number(response.headers.get("Retry-After")) || null);
}

// What a reader is told, and what to do about it.
export function explain(error) {
  if (!(error instanceof ServerError)) {
    const unreached = error instanceof TypeError;
    return unreached ? "The server does not answer. See whether it still runs, then send again." : error.message;
  }
  if (error.status === 401) return "The server wants an API key: enter it and send again.";
  if (error.status === 429) {
    const when = error.retryAfter ? `in ${error.retryAfter} s` : "later";
    return `The server has too much to do (${error.message}). Send again ${when}.`;
  }
  return `The server refuses: ${error.message}`;
}
