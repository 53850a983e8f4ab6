// The parts of the page: each shows something of what the daemon says. None of them asks it anything but by `act`.

import { html, useEffect, useLayoutEffect, useRef, useState } from "/vendor/htm-preact.js";
import { ago, count, duration, rate, share, size } from "/numbers.js";

const CAUSES = {
  origin: "the origin", ssd: "the SSD", decode: "decoding", slot: "room in RAM", share: "their share of RAM",
};

export function Head({ status, isLive, act }) {
  return html`<header>
    <div>
      <h1><span class="mark" aria-hidden="true">mfs</span> <span class="place">${status.mountpoint}</span></h1>
      <p class="quiet">
        up ${duration(status.uptime_s)}, pid ${status.pid}, mfs ${status.version}
        <span class=${`pulse ${isLive ? "" : "stopped"}`}>${isLive ? "live" : "no answer"}</span>
      </p>
    </div>
    <button type="button" onClick=${() => act("refresh", {}, "Sources looked at again")}>
      Look for changes
    </button>
  </header>`;
}

export function Remarks({ status }) {
  const failing = status.sources.filter((s) => s.last_error).map((s) => `${s.name || s.url}: ${s.last_error}`);
  const all = [...failing, ...status.warnings, status.ram.note, ...status.kernel.notes, status.ssd.note];
  const remarks = [...new Set(all.filter(Boolean))];
  if (!remarks.length) return null;
  return html`<section aria-labelledby="remarks">
    <h2 id="remarks" class="unseen">Warnings</h2>
    <ul class="remarks">${remarks.map((remark) => html`<li key=${remark}>${remark}</li>`)}</ul>
  </section>`;
}

export function Tiers({ status, rates }) {
  const { ssd, ram, origin, reads } = status;
  const isOff = status.cache_dir === null;
  const served = [["RAM", "ram", ram.hits_bytes], ["SSD", "ssd", ssd.hits_bytes], ["origin", "origin", origin.fetched_bytes]];
  const total = served.reduce((sum, [, , bytes]) => sum + bytes, 0);
  return html`<section class="cards" aria-label="Tiers">
    <${Tier} name="SSD" kind="ssd" tier=${ssd} isOff=${isOff}
      facts=${isOff ? "no --cache-dir: cold reads go to the origin"
        : `${count(ssd.objects_count, "file")}${ssd.sealed_bytes ? ` (${size(ssd.sealed_bytes)} in whole ones)` : ""}${
          ssd.pinned_count ? `, ${ssd.pinned_count.toLocaleString("en")} pinned (${size(ssd.pinned_bytes)})` : ""}, ${
          size(ssd.free_disk_bytes)} free on its disk`}
      state=${ssd.state === "ok" || isOff ? "" : ssd.state} />
    <${Tier} name="RAM" kind="ram" tier=${ram} facts=${`${count(ram.slots_leased, "slot")} in use${
      ram.warm_bytes ? `, ${size(ram.warm_bytes)} kept ready` : ""}`} state="" />
    <div class="card">
      <h2>Origin</h2>
      <p class="big">${rates ? rate(rates.origin) : "…"}</p>
      <p class="quiet">${size(origin.fetched_bytes)} in ${count(origin.requests_count, "request")}${
        origin.shared_bytes ? `, ${size(origin.shared_bytes)} copied from other models` : ""}</p>
      <${Ways} status=${status} />
      ${origin.errors_count ? html`<p class="bad">${count(origin.errors_count, "error")}</p>` : null}
    </div>
    <div class="card">
      <h2>Readers</h2>
      <p class="big">${reads.waiting.toLocaleString("en")} <small>waiting</small></p>
      <div class="split" aria-hidden="true">
        ${served.map(([, kind, bytes]) => html`<i class=${kind} style=${{ flexGrow: bytes }} />`)}
      </div>
      <p class="quiet">${total
        ? served.filter(([, , bytes]) => bytes).map(([name, , bytes]) => `${share(bytes, total)} from ${name}`).join(", ")
        : "nothing read yet"}; ${count(status.open_files, "open file")}${status.passthrough.open_files
          ? `, ${status.passthrough.open_files.toLocaleString("en")} read by the kernel itself` : ""}</p>
      ${reads.errors_count ? html`<p class="bad">${count(reads.errors_count, "failed read")}</p>` : null}
    </div>
  </section>`;
}

/** Which way bytes came, where sources have a cache that nodes share. */
function Ways({ status }) {
  const caches = new Set(status.sources.filter((s) => s.via).map((s) => `${s.is_dragonfly ? "dragonfly" : "the cache"} ${s.via}`));
  if (!caches.size) return null;
  const { cache_bytes: cached, direct_bytes: direct, cache_faults: faults } = status.origin;
  return html`<p class="quiet">${share(cached, cached + direct)} through ${[...caches].join(", ")}${
      direct ? `, ${size(direct)} past it` : ""}</p>
    ${faults ? html`<p class="bad">${count(faults, "failure", "failures")} of the cache</p>` : null}`;
}

function Tier({ name, kind, tier, facts, state, isOff }) {
  if (isOff) return html`<div class="card"><h2>${name}</h2><p class="big">off</p><p class="quiet">${facts}</p></div>`;
  return html`<div class="card">
    <h2>${name}</h2>
    <p class="big">${size(tier.used_bytes)} <small>of ${size(tier.budget_bytes)}</small></p>
    <${Bar} kind=${kind} part=${tier.used_bytes} whole=${tier.budget_bytes} label=${`${name} in use`} />
    <p class="quiet">${facts}</p>
    ${state ? html`<p class="bad">${state}</p>` : null}
  </div>`;
}

function Bar({ kind, part, whole, label }) {
  const width = part && whole ? Math.min(100, Math.max(0.7, (100 * part) / whole)) : 0;
  return html`<div class="bar" role="img" aria-label=${`${label}: ${share(part, whole)}`}>
    <i class=${kind} style=${{ width: `${width}%` }} />
  </div>`;
}

// -- throughput

const SERIES = [["origin", "from the origin"], ["ssd", "from SSD"], ["ram", "from RAM"]];
const STEPS = Array.from({ length: 30 }, (_, power) => 2 ** (power + 16)); // round in binary units, as all sizes here

export function Throughput({ history, rates, waits }) {
  const place = useRef(null);
  const chart = useRef(null);
  const scheme = useScheme();
  useLayoutEffect(() => {
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
    const options = {
      width: place.current.clientWidth, height: 180, legend: { show: false },
      cursor: { y: false, points: { size: 6 } },
      scales: { x: { time: false, range: [-119, 0] }, y: { range: (_, __, most) => [0, Math.max(most, 1 << 20) * 1.1] } },
      axes: [
        { ...axis, values: (_, ticks) => ticks.map((tick) => (tick ? `${-tick} s ago` : "now")), space: 90, size: 28 },
        { ...axis, values: (_, ticks) => ticks.map((tick) => (tick ? rate(tick) : "0")), size: 76, space: 28, incrs: STEPS },
      ],
      series: [{}, ...SERIES.map(([name]) => ({
        stroke: colour(`--${name}`), fill: `${colour(`--${name}`)}22`, width: 2, points: { show: false },
      }))],
    };
    chart.current = new window.uPlot(options, data(history), place.current);
    const watcher = new ResizeObserver(() => chart.current.setSize({ width: place.current.clientWidth, height: 180 }));
    watcher.observe(place.current);
    return () => {
      watcher.disconnect();
      chart.current.destroy();
    };
  }, [scheme]);
  useLayoutEffect(() => chart.current.setData(data(history)));
  const now = SERIES.map(([name, words]) => [name, words, rates ? rates[name] : 0]);
  return html`<section aria-labelledby="throughput">
    <h2 id="throughput">Throughput</h2>
    <ul class="legend">
      ${now.map(([name, words, value]) => html`<li key=${name}><i class=${name} />${words} <b>${rate(value)}</b></li>`)}
    </ul>
    <div ref=${place} class="chart" role="img"
      aria-label=${`The last two minutes. Now ${now.map(([, words, value]) => `${rate(value)} ${words}`).join(", ")}.`} />
    <${Waits} waits=${waits} />
  </section>`;
}

function data(history) {
  const now = history.length ? history[history.length - 1].at : 0;
  return [history.map((point) => point.at - now), ...SERIES.map(([name]) => history.map((point) => point[name]))];
}

function useScheme() {
  const query = useRef(matchMedia("(prefers-color-scheme: dark)")).current;
  const [isDark, setDark] = useState(query.matches);
  useEffect(() => {
    const note = () => setDark(query.matches);
    query.addEventListener("change", note);
    return () => query.removeEventListener("change", note);
  }, []);
  return isDark;
}

/** waits: by cause, seconds waited per second: so many readers stood waiting for it. */
function Waits({ waits }) {
  const some = Object.entries(CAUSES).filter(([cause]) => waits && waits[cause] >= 0.005);
  return html`<p class="quiet waits">
    ${some.length ? "Readers wait for " : "No reader had to wait in the last seconds."}
    ${some.map(([cause, words], place) => html`<span key=${cause}>${place ? ", " : ""}${words}: <b>${
      waits[cause] >= 0.1 ? waits[cause].toFixed(1) : waits[cause].toFixed(2)}</b></span>`)}
    ${some.length ? " of them on average." : ""}
  </p>`;
}

// -- models

const SORTS = {
  recent: "what is going on", name: "name", size: "size", ssd: "most on SSD", ram: "most in RAM", origin: "most fetched",
};

export function Models({ models, rates, choice, choose, more, opened, open, heat, act, confirm }) {
  const left = models.matched_count - models.rows.length;
  return html`<section aria-labelledby="models">
    <div class="bench">
      <h2 id="models">Models <span class="quiet">${
        choice.match ? `${models.matched_count.toLocaleString("en")} of ` : ""}${models.count.toLocaleString("en")}</span></h2>
      <label>Find <input type="search" value=${choice.match} maxlength="200" spellcheck=${false}
        onInput=${(event) => choose({ match: event.target.value })} /></label>
      <label>Order <select value=${choice.sort} onChange=${(event) => choose({ sort: event.target.value })}>
        ${Object.entries(SORTS).map(([value, words]) => html`<option value=${value}>${words}</option>`)}
      </select></label>
    </div>
    ${models.rows.length === 0
      ? html`<p class="quiet">${models.count ? "No model has that in its name." : "No source has listed a model yet."}</p>`
      : html`<div class="scroll" role="region" aria-label="Table of models" tabindex="0"><table>
          <thead><tr>
            <th scope="col">Model</th><th scope="col" class="number">Size</th>
            <th scope="col">SSD <span class="quiet">and</span> RAM</th><th scope="col" class="number">SSD</th>
            <th scope="col" class="number">RAM</th><th scope="col" class="number">From origin</th>
            <th scope="col">Now</th><th scope="col"><span class="unseen">What to do</span></th>
          </tr></thead>
          <tbody>${models.rows.map((row) => html`<${Model} key=${row.path} row=${row} rate=${rates[row.path] || {}}
            isOpen=${opened === row.path} open=${open} heat=${opened === row.path ? heat : null} act=${act}
            confirm=${confirm} isOnly=${models.count === 1} />`)}</tbody>
        </table></div>`}
    ${left > 0 ? html`<p class="more">${models.rows.length < 100
      ? html`<button type="button" onClick=${more}>Show ${Math.min(left, 180).toLocaleString("en")} more</button> `
      : null}<span class="quiet">${left.toLocaleString("en")} are not shown: find them by name.</span></p>` : null}
  </section>`;
}

function Model({ row, rate: now, isOpen, open, heat, act, confirm, isOnly }) {
  const name = row.path || "all files";
  const id = `files-${row.path.replace(/[^a-zA-Z0-9]/g, "_")}`;
  const mayAct = row.is_model || isOnly;
  const whole = row.size ?? 0;
  const isPinned = row.pinned_count > 0;
  return html`<tr class=${isOpen ? "open" : ""}>
      <th scope="row">
        ${mayAct
          ? html`<button type="button" class="name" aria-expanded=${isOpen} aria-controls=${id}
              onClick=${() => open(isOpen ? null : row.path)}>${name}</button>`
          : html`<span class="name">files beside the models${row.path ? ` in ${row.path}` : ""}</span>`}
        ${isPinned ? html`<span class="tag" title=${count(row.pinned_count, "pinned file")}>pinned</span>` : null}
      </th>
      <td class="number">${row.size === null ? html`<span class="quiet" title="nobody has looked into it yet">?</span>` : size(whole)}</td>
      <td><${Resident} row=${row} whole=${whole} /></td>
      <td class="number">${row.ssd_bytes && whole ? share(row.ssd_bytes, whole) : html`<span class="quiet">–</span>`}</td>
      <td class="number">${row.ram_bytes ? size(row.ram_bytes) : html`<span class="quiet">–</span>`}</td>
      <td class="number">${row.origin_bytes ? size(row.origin_bytes) : html`<span class="quiet">–</span>`}</td>
      <td class="now">${going(row, now)}</td>
      <td class="actions">${mayAct ? html`<${Actions} row=${row} name=${name} isPinned=${isPinned} act=${act} confirm=${confirm} />` : null}</td>
    </tr>
    ${isOpen ? html`<tr class="files" id=${id}><td colspan="8"><${Files} heat=${heat} /></td></tr>` : null}`;
}

/** In a few words, what happens to a model. */
function going(row, now) {
  const parts = [];
  if (now.origin_bytes > 0) parts.push(html`<b class="origin-text">${rate(now.origin_bytes)}</b>`);
  else if (row.fetching_count) parts.push(count(row.fetching_count, "fetch", "fetches"));
  if (now.waited_s >= 0.05) parts.push(`${now.waited_s.toFixed(1)} waiting`);
  if (row.open_count) parts.push(`${row.open_count.toLocaleString("en")} open`);
  if (parts.length) return parts.map((part, place) => html`<span class="part">${part}${place < parts.length - 1 ? ", " : ""}</span>`);
  return html`<span class="quiet">${row.last_used_at ? `used ${ago(row.last_used_at)}` : ""}</span>`;
}

function Resident({ row, whole }) {
  const part = (bytes) => (whole ? Math.min(100, (100 * bytes) / whole) : 0);
  return html`<div class="resident" role="img"
    aria-label=${`${share(row.ssd_bytes, whole)} on SSD, ${share(row.ram_bytes, whole)} in RAM`}>
    <i class="ssd" style=${{ width: `${part(row.ssd_bytes)}%` }} /><i class="ram" style=${{ width: `${part(row.ram_bytes)}%` }} />
  </div>`;
}

function Actions({ row, name, isPinned, act, confirm }) {
  const paths = [row.path];
  const evict = () => confirm({
    title: `Evict ${name}?`,
    words: `${size(row.ssd_bytes)} on SSD and ${size(row.ram_bytes)} in RAM are dropped; what is pinned or open stays. ` +
      "The bytes come from the origin again when somebody reads them.",
    verb: "Evict",
    go: () => act("evict", { paths, tier: "all" }, `Evicted ${name}`),
  });
  return html`
    <button type="button" aria-label=${`Prefetch ${name}`}
      onClick=${() => act("prefetch", { paths, tier: "ssd", wait: false }, `Prefetching ${name}`)}>Prefetch</button>
    <button type="button" aria-label=${`${isPinned ? "Unpin" : "Pin"} ${name}`}
      onClick=${() => act(isPinned ? "unpin" : "pin", { paths }, `${isPinned ? "Unpinned" : "Pinned"} ${name}`)}>${
        isPinned ? "Unpin" : "Pin"}</button>
    <button type="button" aria-label=${`Evict ${name}`} onClick=${evict}>Evict</button>`;
}

function Files({ heat }) {
  if (!heat) return html`<p class="quiet">Looking …</p>`;
  if (heat.error) return html`<p class="bad">${heat.error}</p>`;
  if (!heat.files.length) return html`<p class="quiet">There are no files in it.</p>`;
  return html`<ul class="strips">
      ${heat.files.map((file) => html`<li key=${file.path}>
        <span class="file">${file.path.slice(file.path.lastIndexOf("/") + 1)}</span>
        <${Strip} file=${file} />
        <span class="number quiet">${size(file.size)}</span>
        <span class="quiet words">${share(file.ssd_bytes, file.size)} SSD, ${share(file.ram_bytes, file.size)} RAM${
          file.pinned ? ", pinned" : ""}${file.open_handles ? `, ${file.open_handles} open` : ""}</span>
      </li>`)}
    </ul>
    ${heat.left_out ? html`<p class="quiet">${count(heat.left_out, "more file")}.</p>` : null}
    <p class="quiet key">Each strip is a file from its first byte to its last: <i class="ssd" /> on SSD above,
      <i class="ram" /> in RAM below; paler where only a part is there.</p>`;
}

function Strip({ file }) {
  const label = `${file.path}: ${share(file.ssd_bytes, file.size)} on SSD, ${share(file.ram_bytes, file.size)} in RAM`;
  return html`<div class="strip" role="img" aria-label=${label}>
    <i style=${{ backgroundImage: gradient(file.ssd, "--ssd") }} /><i style=${{ backgroundImage: gradient(file.ram, "--ram") }} />
  </div>`;
}

/** A strip of digits as colours with sharp edges, equal neighbours in one. */
function gradient(digits, colour) {
  const stops = [];
  for (let first = 0, end = 0; first < digits.length; first = end) {
    while (end < digits.length && digits[end] === digits[first]) end += 1;
    const strength = digits[first] === "0" ? 0 : 25 + Number(digits[first]) * (75 / 9);
    const tint = `color-mix(in srgb, var(${colour}) ${strength.toFixed(0)}%, var(--empty))`;
    stops.push(`${tint} ${((100 * first) / digits.length).toFixed(3)}% ${((100 * end) / digits.length).toFixed(3)}%`);
  }
  return stops.length ? `linear-gradient(90deg, ${stops.join(", ")})` : "none";
}

// -- what goes on

export function Fetches({ fetches }) {
  const shown = fetches.rows.slice(0, 12);
  return html`<section aria-labelledby="fetches">
    <h2 id="fetches">Fetching now <span class="quiet">${fetches.count.toLocaleString("en")}${
      fetches.queued_count ? `, ${fetches.queued_count.toLocaleString("en")} queued` : ""}</span></h2>
    ${shown.length === 0 ? html`<p class="quiet">Nothing is being brought.</p>` : html`<ul class="fetches">
      ${shown.map((row) => html`<li key=${`${row.path} ${row.start}`}>
        <span class="quiet"><i class=${row.from} />${row.from === "ssd" ? "SSD" : "origin"}</span>
        <span class="file">${row.path}</span>
        <span class="quiet">${size(row.stop - row.start)} at ${size(row.start)}</span>
        <span class=${row.since_s > 5 ? "bad" : "quiet"}>${row.since_s.toFixed(1)} s</span>
        <span class="quiet">${row.ahead ? "ahead of need" : "a reader waits"}</span>
      </li>`)}
    </ul>`}
    ${fetches.count > shown.length ? html`<p class="quiet">${count(fetches.count - shown.length, "more", "more")}.</p>` : null}
  </section>`;
}

export function Gpus({ gpus }) {
  if (!gpus || gpus.state === "none") return null;
  return html`<section aria-labelledby="gpus">
    <h2 id="gpus">GPUs <span class="quiet">gpuload on this node</span></h2>
    ${gpus.note ? html`<p class="bad">${gpus.note}</p>` : null}
    <ul class="gpus">${gpus.devices.map((device) => html`<li key=${device.device}>
      <h3>${device.device}${device.swaps ? html` <b class="origin-text">${count(device.swaps, "swap")} under way</b>` : null}</h3>
      <p>${size(device.arena_bytes - device.free_bytes)} <span class="quiet">of ${size(device.arena_bytes)}</span></p>
      <${Bar} kind="gpu" part=${device.arena_bytes - device.free_bytes} whole=${device.arena_bytes} label=${`${device.device} in use`} />
      <p class="quiet">${device.models.length
        ? device.models.map((m) => `${m.name} (${size(m.bytes)}${m.leases ? `, ${count(m.leases, "lease")}` : ""}${m.pinned ? ", pinned" : ""})`).join("; ")
        : "no model is resident"}</p>
    </li>`)}</ul>
  </section>`;
}

/** The timeline of a load: an SVG that the daemon draws. */
export function ColdStart({ svg, number, count: loads, choose }) {
  const place = useRef(null);
  useLayoutEffect(() => {
    if (place.current) place.current.replaceChildren(...(svg ? [svg] : []));
  });
  if (!svg) return null;
  return html`<section aria-labelledby="load">
    <div class="bench"><h2 id="load">${number ? "An earlier load" : "Last load"}</h2>
      <button type="button" disabled=${number + 1 >= loads} onClick=${() => choose(number + 1)}>Earlier</button>
      <button type="button" disabled=${number === 0} onClick=${() => choose(Math.max(0, number - 1))}>Later</button>
    </div>
    <div class="timeline" ref=${place} />
  </section>`;
}

// -- asking back

/** question: {title, words, verb, go} or null. */
export function Question({ question, answer }) {
  const dialog = useRef(null);
  useEffect(() => {
    if (question) dialog.current.showModal();
  }, [question]);
  if (!question) return null;
  const end = (isYes) => {
    dialog.current.close(); // which gives the focus back, and then tells `answer`
    if (isYes) question.go();
  };
  return html`<dialog ref=${dialog} aria-labelledby="question" onClose=${() => answer()}>
    <h2 id="question">${question.title}</h2>
    <p>${question.words}</p>
    <p class="actions"><button type="button" onClick=${() => end(false)}>Keep</button>
      <button type="button" class="strong" onClick=${() => end(true)}>${question.verb}</button></p>
  </dialog>`;
}
