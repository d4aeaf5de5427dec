// The list: rows as they change, filter and order at once, both in the address.
import { isOperator, perform, seen } from "./acts.js";
import { element } from "./dom.js";
import { follow, showAges } from "./live.js";

const form = document.getElementById("filter");
const table = document.getElementById("instances");
const body = table.tBodies[0];
const counts = document.getElementById("counts");
const shown = document.getElementById("shown");
const PHASES = [...form.elements.phase.options].map((option) => option.value).filter((value) => value);
const TEXT = new Map();
const natural = new Intl.Collator("en", { numeric: true });
const idOf = (row) => row.id.slice(2);

const cell = (label, kind, ...children) => element("td", { class: kind, "data-label": label }, ...children);
const note = (kind, text) => element("li", { class: kind }, element("bdi", {}, text));

function time(at) {
  if (at === null) return null;
  const people = at.endsWith("Z") ? `${at.slice(0, -1).replace("T", " ")} UTC` : at;
  return element("time", { datetime: at }, people);
}

function memory(mib) {
  if (mib === null) return "";
  return mib % 512 === 0 ? `${mib / 1024} GiB` : `${mib} MiB`;
}

// The same cells as list_page.row_html makes.
function rowElement(row) {
  const notes = [
    ...row.problems.map((text) => note("problem", text)),
    ...row.pending.map((key) => note("pending", `${key} takes effect at the next restart`)),
    ...(row.notice === null ? [] : [note("notice", row.notice)]),
    ...(row.last_exit === null ? [] : [note("last", `last end: ${row.last_exit}`)]),
  ];
  const phase = row.halted ? `${row.phase} (${row.halted})` : row.phase;
  const host = row.host === null ? [element("span", { class: "dim" }, "nowhere")] : [element("bdi", {}, row.host)];
  if (row.host !== null && row.placed_for !== null) host.push(element("bdi", {}, ` (for ${row.placed_for})`));
  return element(
    "tr",
    {
      id: `i-${row.id}`,
      "data-rank": row.rank,
      "data-host": row.host ?? "",
      "data-phase": row.phase,
      "data-since": row.since ?? "",
      "data-ram": row.ram_mib ?? 0,
      "data-restarts": row.restarts,
    },
    element(
      "th",
      { scope: "row" },
      isOperator ? chooser(row.id) : null,
      element("a", { href: `/instances/${row.id}` }, row.id),
      row.description ? element("bdi", { class: "description" }, row.description) : null,
    ),
    cell("Phase", null, element("span", { class: `phase ${row.halted ? "halted" : row.phase}` }, phase)),
    cell("Since", null, time(row.since)),
    cell("Why", "why", element("bdi", {}, row.reason), notes.length ? element("ul", {}, ...notes) : null),
    cell("Host", null, ...host),
    cell("Addresses", "addresses", row.addresses.join(", ")),
    cell("Memory", "number", memory(row.ram_mib)),
    cell("Restarts", "number", String(row.restarts)),
  );
}

// --- many at once, for operators ---

const chosen = new Set();
const bar = document.getElementById("bulk");

function chooser(id) {
  const box = element("input", { type: "checkbox", class: "chooser", "aria-label": `choose ${id}` });
  box.checked = chosen.has(id);
  return box;
}

function showChosen() {
  const boxes = [...body.querySelectorAll(".chooser")];
  for (const box of boxes) box.checked = chosen.has(idOf(box.closest("tr")));
  const hidden = boxes.filter((box) => box.checked && box.closest("tr").hidden).length;
  bar.classList.toggle("some", chosen.size > 0);
  bar.querySelector("output").textContent = `${chosen.size} chosen${hidden ? `, ${hidden} of them not shown` : ""}`;
  const shownRows = [...body.rows].filter((row) => !row.hidden);
  const all = bar.querySelector("input");
  all.checked = shownRows.length > 0 && shownRows.every((row) => chosen.has(idOf(row)));
}

if (isOperator) {
  for (const row of body.rows) row.cells[0].prepend(chooser(idOf(row)));
  body.addEventListener("change", (event) => {
    if (!event.target.matches(".chooser")) return;
    const id = idOf(event.target.closest("tr"));
    if (event.target.checked) chosen.add(id);
    else chosen.delete(id);
    showChosen();
  });
  bar.addEventListener("change", (event) => {
    for (const row of body.rows) {
      if (row.hidden) continue;
      if (event.target.checked) chosen.add(idOf(row));
      else chosen.delete(idOf(row));
    }
    showChosen();
  });
  bar.addEventListener("click", (event) => {
    const act = event.target.closest("button")?.dataset.many;
    // What was ordered is chosen no more: the next act is not to meet what has scrolled out of sight.
    const forget = () => {
      chosen.clear();
      showChosen();
    };
    if (act === "none") forget();
    else if (act) perform(act, [...chosen].sort(natural.compare), forget);
  });
}

function textOf(row) {
  if (!TEXT.has(row)) {
    const [id, phase, , why, host, addresses] = row.cells;
    const reason = why.querySelector("bdi").textContent;
    const parts = [id, phase, host, addresses].map((one) => one.textContent);
    TEXT.set(row, [...parts, reason].join(" ").toLowerCase());
  }
  return TEXT.get(row);
}

// What is asked for, as the form has it.
function choice() {
  const { q, host, phase, show, sort } = form.elements;
  const order = sort.value || "rank";
  return {
    words: q.value.toLowerCase().split(/\s+/).filter((word) => word),
    host: host.value,
    phase: phase.value,
    problems: show.checked,
    by: order.replace(/^-/, ""),
    down: order.startsWith("-"),
  };
}

const NUMBERS = new Set(["rank", "ram", "restarts"]);

function order({ by, down }) {
  const value = by === "id" ? idOf : (row) => (NUMBERS.has(by) ? Number(row.dataset[by]) : row.dataset[by]);
  const compare = NUMBERS.has(by) ? (a, b) => a - b : by === "since" ? (a, b) => (a < b ? -1 : a > b ? 1 : 0)
    : natural.compare;
  const rows = [...body.rows].map((row) => [value(row), idOf(row), row]);
  const sign = down ? -1 : 1;
  rows.sort((a, b) => sign * compare(a[0], b[0]) || natural.compare(a[1], b[1]));
  return rows.map(([, , row]) => row);
}

function arrange() {
  const rows = order(choice());
  if (rows.some((row, index) => body.rows[index] !== row)) {
    const focused = document.activeElement;
    body.replaceChildren(...rows);
    if (body.contains(focused)) focused.focus({ preventScroll: true });
  }
}

// Rows that come back are laid out, which takes a browser a second for thousands: the first at once, the others in
// steps, between which a person can type.
const STEP = 100;
let later = null;

function reveal(rows) {
  for (const row of rows.slice(0, STEP)) row.hidden = false;
  later = rows.length > STEP ? setTimeout(reveal, 0, rows.slice(STEP)) : null;
}

function filter() {
  const { words, host, phase, problems } = choice();
  clearTimeout(later);
  const back = [];
  let found = 0;
  for (const row of body.rows) {
    const fits = (!host || row.dataset.host === host) && (!phase || row.dataset.phase === phase)
      && (!problems || row.dataset.rank === "0") && words.every((word) => textOf(row).includes(word));
    if (!fits) row.hidden = true;
    else if (row.hidden) back.push(row);
    found += fits;
  }
  reveal(back);
  const total = body.rows.length;
  const said = !total ? "There are no instances; make one with `kvmsupervisor create`."
    : found === total ? `${total} instances` : `${found} of ${total} instances`;
  if (shown.textContent !== said) shown.textContent = said;
}

// How many there are of each phase, and the hosts to choose from.
function count() {
  const found = new Map();
  const hosts = new Set();
  let problems = 0;
  for (const row of body.rows) {
    found.set(row.dataset.phase, (found.get(row.dataset.phase) ?? 0) + 1);
    if (row.dataset.host) hosts.add(row.dataset.host);
    problems += row.dataset.rank === "0";
  }
  const focused = document.activeElement?.closest("#counts") ? document.activeElement.dataset.chooses : null;
  const asked = choice();
  const link = (text, kind, chooses, chosen) => element("li", {}, element("a", {
    class: `phase ${kind}`, href: addressOf({ ...asked, ...JSON.parse(chooses) }), "data-chooses": chooses,
    "aria-current": chosen ? "true" : null,
  }, text));
  counts.replaceChildren(
    link(`${problems} need a look`, problems ? "looks" : "stopped", '{"problems":true,"phase":""}', asked.problems),
    ...PHASES.filter((phase) => found.has(phase)).map((phase) => link(
      `${found.get(phase)} ${phase}`, phase, JSON.stringify({ problems: false, phase }), asked.phase === phase)),
  );
  if (focused) [...counts.querySelectorAll("a")].find((one) => one.dataset.chooses === focused)?.focus();
  const select = form.elements.host;
  const names = ["", ...[...hosts].sort(natural.compare)];
  if (select.value && !names.includes(select.value)) names.push(select.value);
  if (names.join("\n") !== [...select.options].map((option) => option.value).join("\n")) {
    const chosen = select.value;
    select.replaceChildren(...names.map((name) => element("option", { value: name }, name || "any")));
    select.value = chosen;
  }
  document.title = `${problems ? `(${problems}) ` : ""}Instances – kvmsupervisor`;
}

function addressOf({ host, phase, problems, by, down }) {
  const query = new URLSearchParams();
  if (form.elements.q.value.trim()) query.set("q", form.elements.q.value.trim());
  if (host) query.set("host", host);
  if (phase) query.set("phase", phase);
  if (problems) query.set("show", "problems");
  if (by !== "rank" || down) query.set("sort", (down ? "-" : "") + by);
  const said = query.toString();
  return said ? `/?${said}` : "/";
}

let before = JSON.stringify(choice());

// The form has changed: what only filters moves no row.
function ask() {
  const asked = choice();
  const { by, down } = JSON.parse(before);
  before = JSON.stringify(asked);
  history.replaceState(null, "", addressOf(asked));
  for (const head of table.tHead.rows[0].cells) {
    if (head.dataset.sort === asked.by) head.setAttribute("aria-sort", asked.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
  filter();
  if (isOperator) showChosen();
  if (by !== asked.by || down !== asked.down) arrange();
  for (const link of counts.querySelectorAll("a[data-chooses]")) {
    const chooses = JSON.parse(link.dataset.chooses);
    link.href = addressOf({ ...asked, ...chooses });
    const chosen = chooses.problems ? asked.problems : !asked.problems && asked.phase === chooses.phase;
    if (chosen) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

function take(news, whole) {
  if (whole) {
    TEXT.clear();
    body.replaceChildren(...news.rows.map(rowElement));
  } else {
    for (const id of news.gone) {
      document.getElementById(`i-${id}`)?.remove();
      chosen.delete(id);
    }
    for (const row of news.rows) {
      const made = rowElement(row);
      const old = document.getElementById(made.id);
      if (old === null) {
        body.append(made);
      } else {
        const focused = old.contains(document.activeElement) ? document.activeElement.localName : null;
        TEXT.delete(old);
        old.replaceWith(made);
        if (focused) made.querySelector(focused)?.focus({ preventScroll: true });
      }
    }
  }
  showAges(body);
  filter();
  arrange();
  count();
  seen(news);
  if (isOperator) showChosen();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
form.addEventListener("input", ask);
form.querySelector(".all").addEventListener("click", (event) => {
  event.preventDefault();
  form.elements.q.value = form.elements.host.value = form.elements.phase.value = "";
  form.elements.show.checked = false;
  form.elements.sort.value = "rank";
  ask();
});
table.tHead.addEventListener("click", (event) => {
  const by = event.target.closest("th")?.dataset.sort;
  if (!by || !event.target.closest("a")) return;
  event.preventDefault();
  const { by: now, down } = choice();
  form.elements.sort.value = (by === now && !down ? "-" : "") + by;
  ask();
});
counts.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link?.dataset.chooses) return;
  event.preventDefault();
  const { problems, phase } = JSON.parse(link.dataset.chooses);
  const same = form.elements.show.checked === problems && form.elements.phase.value === phase;
  form.elements.show.checked = same ? false : problems;
  form.elements.phase.value = same ? "" : phase;
  ask();
});
addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.closest("input, select") && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    form.elements.q.focus();
    form.elements.q.select();
  } else if (event.key === "Escape" && event.target === form.elements.q && form.elements.q.value) {
    form.elements.q.value = "";
    ask();
  }
});

if (document.documentElement.dataset.mark) count();
follow(take);
