// What all pages share: ages beside times, what is known of etcd, and the stream of changes.

const UNITS = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];

// How long ago a time was, in its two largest units; null when it is no time.
export function age(at, now = Date.now()) {
  const began = Date.parse(at);
  if (Number.isNaN(began)) return null;
  let left = Math.max(0, Math.floor((now - began) / 1000));
  const first = UNITS.findIndex(([, size]) => left >= size);
  if (first === -1) return "0 s";
  const said = [];
  for (const [unit, size] of UNITS.slice(first, first + 2)) {
    said.push(`${Math.floor(left / size)} ${unit}`);
    left %= size;
  }
  return said.join(" ");
}

// Write ages into the times of a part of the page; the time itself goes into the title.
export function showAges(part = document) {
  for (const time of part.querySelectorAll("time")) {
    const said = age(time.dateTime);
    if (said !== null && time.textContent !== said) {
      if (!time.title) time.title = time.textContent;
      time.textContent = said;
    }
  }
}

const line = document.getElementById("state");
let known = { in_step: !line.classList.contains("bad"), problem: "", as_of: null };
let lost = null;
let refused = false;

function showState() {
  const revision = mark === null ? "" : mark.split("-")[0];
  let said = `In step with etcd, revision ${revision}, live.`;
  const as_of = lost ?? known.as_of;
  const old = as_of ? ` What you see is as of ${age(as_of)} ago.` : "";
  if (refused) said = `This page's server asks who you are: load the page again.${old}`;
  else if (lost !== null) said = `This page's server does not answer; trying again.${old}`;
  else if (!known.in_step && known.as_of === null) said = `Nothing has been read from etcd yet: ${known.problem}`;
  else if (!known.in_step) said = `etcd does not answer: ${known.problem}.${old}`;
  const bad = lost !== null || !known.in_step;
  line.classList.toggle("bad", bad);
  line.classList.toggle("good", !bad);
  if (line.textContent !== said) line.textContent = said;
}

// The stream. A browser has six connections to a server, for all its tabs: a hidden tab gives its own back, and comes
// again from where it was.
let mark = document.documentElement.dataset.mark ?? null;
let source = null;
let again = null;

export function follow(onNews) {
  function open() {
    clearTimeout(again);
    source?.close();
    source = new EventSource("/api/v1/stream" + (mark === null ? "" : `?since=${encodeURIComponent(mark)}`));
    source.addEventListener("state", (event) => {
      lost = null;
      refused = false;
      known = JSON.parse(event.data);
      document.documentElement.classList.add("live");
      showState();
    });
    for (const kind of ["reset", "change"]) {
      source.addEventListener(kind, (event) => {
        mark = event.lastEventId;
        lost = null;
        onNews(JSON.parse(event.data), kind === "reset");
        showState();
      });
    }
    source.addEventListener("error", () => {
      lost ??= new Date().toISOString();
      showState();
      // A refusal ends it for good; a lost connection is tried again by the browser.
      if (source.readyState !== EventSource.CLOSED) return;
      again = setTimeout(open, 5000);
      fetch("/api/v1/me").then((reply) => {
        refused = reply.status === 401;
        showState();
      }, () => {});
    });
  }
  function look() {
    if (document.hidden) {
      clearTimeout(again);
      source?.close();
      source = null;
    } else if (source === null) {
      open();
    }
  }
  document.addEventListener("visibilitychange", look);
  addEventListener("pagehide", () => source?.close());
  addEventListener("pageshow", (event) => event.persisted && open());
  look();
}

showAges();
setInterval(() => {
  if (document.hidden) return;
  showAges();
  if (lost !== null || !known.in_step) showState();
}, 5000);
