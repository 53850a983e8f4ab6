// The page: asks the daemon once a second while somebody can see it, and shows what it says.

import { html, render, useCallback, useEffect, useRef, useState } from "/vendor/htm-preact.js";
import { ask, drawing, Refused, takeToken } from "/ask.js";
import { ColdStart, Fetches, Gpus, Head, Models, Question, Remarks, Throughput, Tiers } from "/parts.js";

const EVERY_MS = 1000;
const SLOWER_MS = 5000; // strips, GPUs and loads change slowly
const PATIENCE_MS = 10_000;
const SAID_MS = 10_000;
const HISTORY_S = 120;
const ROWS_FIRST = 20;
const ROWS_MORE = 200;
const ROW_COUNTERS = ["origin_bytes", "waited_s"];

/** What is asked of the daemon over and over, and what was made of its answers. */
class Watch {
  constructor(show) {
    this.show = show;
    this.choice = { sort: "recent", match: "", count: ROWS_FIRST };
    this.opened = null;
    this.load = 0;
    this.history = [];
    this.timer = null;
    this.slowAt = -Infinity;
    this.failures = 0;
    this.round = 0;
  }

  /** Ask now, and then again and again; nothing is asked while nobody can see the page. */
  async run() {
    clearTimeout(this.timer);
    if (document.hidden) return;
    const round = (this.round += 1);
    const began = performance.now();
    try {
      await this.look(round);
      this.failures = 0;
    } catch (error) {
      if (round !== this.round) return;
      this.failures += 1;
      this.show({ isLive: false, fault: error });
    }
    if (round !== this.round || document.hidden) return;
    const pause = Math.min(PATIENCE_MS, EVERY_MS * 2 ** Math.min(this.failures, 4));
    this.timer = setTimeout(() => this.run(), Math.max(100, pause - (performance.now() - began)));
  }

  async look(round) {
    const query = new URLSearchParams(this.choice);
    const seen = await ask(`/v1/overview?${query}`);
    if (round !== this.round) return; // somebody has asked for something else meanwhile
    this.show({ isLive: true, fault: null, seen, ...this.compared(seen) });
    if (performance.now() - this.slowAt > SLOWER_MS) {
      this.slowAt = performance.now();
      await Promise.all([this.lookAtGpus(), this.lookAtLoad(), this.lookAtFiles()]);
    }
  }

  /** Rates, from the difference to what was seen before; by the daemon's clock, so that slow answers distort nothing. */
  compared(seen) {
    const { status } = seen;
    const point = {
      at: status.uptime_s, pid: status.pid, origin_bytes: status.origin.fetched_bytes, ssd_bytes: status.ssd.hits_bytes,
      ram_bytes: status.ram.hits_bytes, waits: seen.waits,
      rows: new Map(seen.models.rows.map((row) => [row.path, row])),
    };
    const before = this.before;
    this.before = point;
    if (!before || before.pid !== point.pid || point.at <= before.at) {
      this.history = [];
      return { rates: null, rowRates: {}, waitRates: null, history: [] };
    }
    const seconds = point.at - before.at;
    const per = (name) => Math.max(0, (point[name] - before[name]) / seconds);
    const rates = { origin: per("origin_bytes"), ssd: per("ssd_bytes"), ram: per("ram_bytes") };
    this.history = [...this.history, { at: point.at, ...rates }].filter((old) => point.at - old.at < HISTORY_S);
    const rowRates = {};
    for (const [path, row] of point.rows) {
      const old = before.rows.get(path);
      if (old) rowRates[path] = Object.fromEntries(ROW_COUNTERS.map((name) => [name, (row[name] - old[name]) / seconds]));
    }
    const waitRates = Object.fromEntries(Object.entries(point.waits).map(([cause, now]) =>
      [cause, Math.max(0, (now.seconds - (before.waits[cause]?.seconds ?? now.seconds)) / seconds)]));
    return { rates, rowRates, waitRates, history: this.history };
  }

  async lookAtGpus() {
    this.show({ gpus: await ask("/gpus").catch(() => null) });
  }

  async lookAtLoad() {
    const number = this.load;
    const query = new URLSearchParams({ number });
    const found = await ask(`/timeline?${query}`).catch(() => null);
    if (found && number === this.load) {
      this.show({ svg: found.svg && drawing(found.svg), load: number, loadsCount: found.count });
    }
  }

  async lookAtFiles() {
    const path = this.opened;
    if (path === null) return;
    const query = new URLSearchParams({ path });
    const heat = await ask(`/v1/heat?${query}`).catch((error) => ({ error: error.message }));
    if (path === this.opened) this.show({ heat });
  }

  choose(change) {
    this.choice = { ...this.choice, ...change };
    this.show({ choice: this.choice });
    this.run();
  }

  open(path) {
    this.opened = path;
    this.show({ opened: path, heat: null });
    this.lookAtFiles();
  }

  chooseLoad(number) {
    this.load = number;
    this.lookAtLoad();
  }
}

function Page() {
  const [state, setState] = useState({
    isLive: false, fault: null, seen: null, rates: null, rowRates: {}, waitRates: null, history: [], gpus: null, svg: null,
    load: 0, loadsCount: 0, opened: null, heat: null, choice: { sort: "recent", match: "", count: ROWS_FIRST }, said: null, question: null,
  });
  const show = useCallback((change) => setState((before) => ({ ...before, ...change })), []);
  const watch = useRef(null);
  watch.current ??= new Watch(show);
  useEffect(() => {
    const look = () => watch.current.run();
    const enter = () => {
      takeToken();
      look();
    };
    document.addEventListener("visibilitychange", look);
    window.addEventListener("hashchange", enter);
    look();
    return () => {
      document.removeEventListener("visibilitychange", look);
      window.removeEventListener("hashchange", enter);
    };
  }, []);
  const act = useCallback(async (operation, values, done) => {
    show({ said: null });
    try {
      const answer = await ask(`/v1/${operation}`, values);
      const failed = answer.failed?.length || answer.errors?.length;
      show({ said: { isBad: Boolean(failed), words: failed ? `${done}, but ${failed} failed` : `${done}.${outcome(answer)}` } });
    } catch (error) {
      show({ said: { isBad: true, words: error.message } });
    }
    clearTimeout(watch.current.saidTimer);
    watch.current.saidTimer = setTimeout(() => show({ said: null }), SAID_MS);
    watch.current.slowAt = -Infinity;
    watch.current.run();
  }, []);
  const confirm = useCallback((question) => show({ question }), []);

  if (!state.seen) return html`<${Door} fault=${state.fault} />`;
  const { status, models, fetches } = state.seen;
  return html`<div class=${state.isLive ? "" : "stale"}>
    <${Head} status=${status} isLive=${state.isLive} act=${act} />
    <div role="status" class="said">${state.said ? html`<p class=${state.said.isBad ? "bad" : "good"}>${state.said.words}</p>` : null}</div>
    ${state.fault ? html`<p role="alert" class="bad fault">${faultWords(state.fault)}</p>` : null}
    <main>
      <${Remarks} status=${status} />
      <${Tiers} status=${status} rates=${state.rates} />
      <${Throughput} history=${state.history} rates=${state.rates} waits=${state.waitRates} />
      <${Models} models=${models} rates=${state.rowRates} choice=${state.choice} choose=${(c) => watch.current.choose(c)}
        more=${() => watch.current.choose({ count: ROWS_MORE })} opened=${state.opened} open=${(path) => watch.current.open(path)} heat=${state.heat} act=${act} confirm=${confirm} />
      <${Fetches} fetches=${fetches} />
      <${Gpus} gpus=${state.gpus} />
      <${ColdStart} svg=${state.svg} number=${state.load} count=${state.loadsCount} choose=${(number) => watch.current.chooseLoad(number)} />
    </main>
    <${Question} question=${state.question} answer=${() => show({ question: null })} />
  </div>`;
}

/** What an operation has done, in numbers, where it says any. */
function outcome(answer) {
  if ("changed_count" in answer) {
    return ` ${answer.changed_count} changed, ${answer.added_count} new, ${answer.removed_count} gone.`;
  }
  return "files_count" in answer ? ` ${answer.files_count.toLocaleString("en")} files.` : "";
}

function faultWords(fault) {
  if (fault instanceof Refused) return fault.message;
  return "The daemon does not answer. What you see is what it said last; asking again.";
}

/** Before anything is known: no token, or no daemon. */
function Door({ fault }) {
  if (!fault) return html`<main class="door"><p>Asking the daemon …</p></main>`;
  const isShut = fault instanceof Refused && fault.status === 403;
  return html`<main class="door">
    <h1>${isShut ? "This page needs its token" : "No answer"}</h1>
    <p role="alert">${faultWords(fault)}</p>
    ${isShut ? html`<p>In a shell of the user who mounted:</p><pre>mfs page /path/of/the/mount</pre>` : null}
  </main>`;
}

takeToken();
render(html`<${Page} />`, Object.assign(document.getElementById("page"), { textContent: "" }));
