// Requests to the daemon: only to where the page came from, always with the token.

const KEY = "mfs-token";

/** Take the token out of the address, so that it stays in no history, and keep it as long as this tab. */
export function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem(KEY, given);
    history.replaceState(null, "", location.pathname);
  }
}

/** The daemon's own words for what it will not or cannot do; `status` 403 is a token that does not let in. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** An answer, as JSON; of a stream the last line. values: sent as JSON, which makes it a POST. */
export async function ask(path, values) {
  const text = await (await request(path, values)).text();
  const lines = text.trim().split("\n");
  const answer = JSON.parse(lines[lines.length - 1]);
  if (answer.error) throw new Refused(answer.error.message, 200);
  return answer;
}

/** An SVG drawing, as an element of this document. */
export function drawing(text) {
  return document.adoptNode(new DOMParser().parseFromString(text, "image/svg+xml").documentElement);
}

async function request(path, values) {
  const headers = { Authorization: `Bearer ${sessionStorage.getItem(KEY) || "none"}` };
  const options = values === undefined ? {} : { method: "POST", body: JSON.stringify(values) };
  const response = await fetch(path, { ...options, headers, signal: AbortSignal.timeout(20_000) });
  if (response.ok) return response;
  let message = `the daemon answered with HTTP status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not an error of the daemon's own: the status is all there is
  }
  throw new Refused(message, response.status);
}
