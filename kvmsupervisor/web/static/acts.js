// Acts: orders are sent, a person is asked before what stops a guest, and each result stays until its host has acted.
import { element } from "./dom.js";

const may = document.documentElement.dataset.may.split(" ");
export const isOperator = may.includes("operator");

// What each act does to a guest, in the words of its question; those without one are not asked about.
const QUESTIONS = {
  start: null,
  stop: "The guest is asked to shut down, and stays off.",
  "stop now": "The guest is ended at once, like by a power cut, and stays off.",
  restart: "The guest is asked to shut down, and starts again with all pending changes.",
  "restart now": "The guest is ended at once, like by a power cut, and starts again.",
  reset: "The reset button is pressed: the guest boots again without being asked.",
  delete: "The guest is shut down, and all its keys are deleted. Disks are not touched.",
};
const TITLES = {
  start: "Start", stop: "Shut down", "stop now": "Power off now", restart: "Restart", "restart now": "Restart now",
  reset: "Reset", delete: "Delete", move: "Move", set: "Change keys", create: "Create", drain: "Drain",
  undrain: "Return to service", "confirm-removal": "Confirm",
};
const SHOWN = 20;
// The phase in which an act is done; the others are done once the host has acted on them.
const DONE = { start: "running", stop: "stopped" };

// --- orders -------------------------------------------------------------------------------------------------------

async function send(order) {
  let reply;
  try {
    reply = await fetch("/api/v1/acts", {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Kvmsupervisor": "1" },
      body: JSON.stringify(order),
    });
  } catch {
    return { error: "This page's server did not answer: what was ordered may or may not have been done." };
  }
  let found = null;
  try {
    found = await reply.json();
  } catch {
    // Not ours: of a proxy, as a rule.
  }
  if (found?.results) return found;
  if (reply.status === 401) return { error: "Nobody is known here any more under this name: load the page again." };
  return { error: found?.error ?? `Status ${reply.status}, and not from this page's server.` };
}

// Send an order; show what becomes of it. Returns what was refused, as one text; empty when all was done.
async function order(found, quiet = false) {
  const title = TITLES[found.act + (found.now ? " now" : "")];
  const { results, error } = await send(found);
  if (error) {
    if (!quiet) say(title, null, error, "problem");
    return error;
  }
  const refused = results.filter((one) => one.result !== "done");
  if (quiet && refused.length === results.length) return refused.map((one) => one.message).join("\n");
  for (const one of results) {
    const name = one.instance ?? one.host;
    const notes = [one.message, ...one.notes].filter((text) => text);
    const kind = one.instance ? "wait" : "done";
    if (one.result === "done") {
      say(title, name, `written at revision ${one.revision}`, kind, { ...one, phase: DONE[found.act] ?? null }, notes);
    }
    else say(title, name, one.message, "problem", null, one.notes);
  }
  return refused.map((one) => `${one.instance ?? one.host}: ${one.message}`).join("\n");
}

// --- results ------------------------------------------------------------------------------------------------------

const panel = element("section", { id: "results", role: "status", "aria-label": "What was done", hidden: true });
const list = element("ul");
const close = element("button", { type: "button", class: "plain" }, "Dismiss all");
close.addEventListener("click", () => {
  list.replaceChildren();
  panel.hidden = true;
});
panel.append(list, close);
document.getElementById("main").before(panel);

function say(title, name, text, kind, waits = null, notes = []) {
  const line = element(
    "li",
    { class: kind, "data-id": waits?.instance ?? null, "data-revision": waits?.instance ? waits.revision : null,
      "data-phase": waits?.phase ?? null },
    element("strong", {}, name === null ? title : `${title} ${name}`), ": ",
    element("span", { class: "said" }, text),
    notes.length ? element("ul", {}, ...notes.slice(0, SHOWN).map((one) => element("li", {}, one))) : null,
  );
  if (waits?.instance) line.querySelector(".said").append("; its host has not acted on it yet");
  list.prepend(line);
  panel.hidden = false;
}

// What the stream tells: a wish that was written becomes a fact.
export function seen(news) {
  for (const line of list.querySelectorAll("li[data-id]")) {
    const row = news.rows.find((one) => one.id === line.dataset.id);
    const said = line.querySelector(".said");
    if (news.gone?.includes(line.dataset.id)) {
      said.textContent = "gone";
      line.className = "done";
    } else if (row && row.phase !== "unknown" && row.acted_on >= Number(line.dataset.revision)) {
      said.textContent = `${row.host ?? "its host"} has acted on it: ${row.phase}${row.halted ? ` (${row.halted})` : ""}; ${
        row.reason}`;
      const done = !line.dataset.phase || line.dataset.phase === row.phase;
      line.className = row.rank === 0 ? "problem" : done ? "done" : "wait";
    }
  }
}

// --- questions ----------------------------------------------------------------------------------------------------

// Ask, and act when the person agrees. `act` gets the form and returns what was refused; then the dialog stays.
function ask({ title, text = [], names = [], fields = [], word = null, button, danger = false, force = false, act, ready }) {
  const before = document.activeElement;
  const dialog = element("dialog", { "aria-labelledby": "asked" });
  const refusal = element("p", { class: "problem refusal", role: "alert" });
  const forced = element("label", { class: "forced", hidden: true },
    element("input", { type: "checkbox", name: "force" }), " write it all the same (--force)");
  const agree = element("button", { class: danger ? "danger" : "go", disabled: word !== null }, button ?? title);
  const cancel = element("button", { type: "button" }, "Cancel");
  const typed = word === null ? null : element("label", {}, `Type ${word} to go on `,
    element("input", { name: "word", autocomplete: "off" }));
  const form = element(
    "form", { method: "dialog" },
    element("h2", { id: "asked" }, title),
    ...text.map((one) => element("p", {}, one)),
    names.length
      // All of them: who agrees to what is not shown has not agreed.
      ? element("div", { class: "names", tabindex: "0", role: "group", "aria-label": "Names" },
        element("ul", {}, ...names.map((one) => element("li", {}, one))))
      : null,
    ...fields, typed, refusal, forced,
    element("p", { class: "buttons" }, cancel, agree),
  );
  dialog.append(form);
  cancel.addEventListener("click", () => dialog.close());
  typed?.addEventListener("input", () => { agree.disabled = form.elements.word.value.trim() !== word; });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    agree.disabled = true;
    const refused = await act(form);
    if (!refused) dialog.close();
    refusal.textContent = refused;
    forced.hidden = !force;
    agree.disabled = false;
  });
  dialog.addEventListener("close", () => {
    dialog.remove();
    if (before?.isConnected) before.focus();
  });
  document.body.append(dialog);
  dialog.showModal();
  ready?.(form);
}

// What an act will do, as the server foresees it. Scrolled by keys, too.
const foresight = () => element("div", { class: "names foreseen", role: "status", tabindex: "0" });

function show(foreseen, lines) {
  foreseen.replaceChildren(element("ul", {}, ...lines.map((line) => element("li", {}, line))));
}

const plural = (names) => (names.length === 1 ? names[0] : `${names.length} instances`);

async function hostNames() {
  const reply = await fetch("/api/v1/hosts");
  return (await reply.json()).filter((one) => !["no session", "unreadable"].includes(one.state));
}

async function move(names, done) {
  const hosts = await hostNames();
  const choice = element("select", { name: "host", required: true }, element("option", { value: "" }, "choose a host"),
    ...hosts.map((one) => element("option", { value: one.host }, `${one.host} (${one.state})`)));
  const foreseen = foresight();
  choice.addEventListener("change", async () => {
    const asked = choice.value;
    foreseen.replaceChildren();
    if (!asked) return;
    const { results, error } = await send({ act: "move", instances: names, host: asked, dry_run: true });
    if (choice.value !== asked) return;
    const lines = error ? [error] : results.map((one) => `${one.instance}: ${one.message}`);
    show(foreseen, lines);
  });
  ask({
    title: `Move ${plural(names)}`, names: names.length > 1 ? names : [], button: "Move", force: true,
    text: ["A guest goes on running where both hosts can do that; otherwise it is stopped and started there. The former "
      + "host back calls it off."],
    fields: [element("label", {}, "To ", choice), foreseen],
    act: async (form) => {
      const refused = await order({
        act: "move", instances: names, host: choice.value, force: form.elements.force.checked,
      }, names.length === 1);
      if (names.length > 1) done();
      return names.length === 1 ? refused : "";
    },
  });
}

async function change(names) {
  const [name] = names;
  const reply = await fetch(`/api/v1/instances/${name}`);
  const { keys = {}, error } = await reply.json();
  if (error) {
    say("Change keys", name, error, "problem");
    return;
  }
  const rows = element("div", { class: "keys" });
  // What is not shown whole cannot be changed in part: it is written anew, or left as it is.
  const shownOf = (key) => (keys[key].whole ? keys[key].value : "");
  const line = (key) => {
    const value = shownOf(key);
    const named = { "aria-label": key, placeholder: keys[key].whole ? null : "not shown; a new value replaces it" };
    const box = value.includes("\n") ? element("textarea", { rows: 6, ...named }) : element("input", named);
    box.value = value;
    const gone = element("input", { type: "checkbox", "aria-label": `delete ${key}` });
    rows.append(element("div", { class: "key", "data-key": key }, element("code", {}, key), box,
      element("label", {}, gone, " delete")));
  };
  for (const key of Object.keys(keys).sort()) line(key);
  const added = element("textarea", { name: "added", rows: 2, placeholder: "cpus=4" });
  ask({
    title: `Change keys of ${name}`, button: "Write", force: true,
    text: ["What differs is written in one transaction. What needs a restart is shown as pending until then."],
    fields: [rows, element("label", {}, "New keys, one key=value a line ", added)],
    act: (form) => {
      const changed = {};
      const unset = [];
      for (const row of rows.children) {
        const [box, gone] = row.querySelectorAll("input, textarea");
        if (gone.checked) unset.push(row.dataset.key);
        else if (box.value !== shownOf(row.dataset.key)) changed[row.dataset.key] = box.value;
      }
      const fresh = parseLines(added.value);
      if (typeof fresh === "string") return fresh;
      return order({
        act: "set", instances: [name], keys: { ...changed, ...fresh }, unset, force: form.elements.force.checked,
      }, true);
    },
  });
}

// `key=value` lines as an object; a text that says what is wrong with them otherwise.
export function parseLines(text) {
  const found = {};
  for (const line of text.split("\n").map((one) => one.trim()).filter((one) => one)) {
    const at = line.indexOf("=");
    if (at < 1) return `${line}: this is no key=value`;
    found[line.slice(0, at).trim()] = line.slice(at + 1);
  }
  return found;
}

function drain(host) {
  const modes = [["live", "No guest is stopped: what cannot move while it runs stays, and says why."],
    ["cold", "Guests that cannot move while they run are stopped, and started elsewhere."],
    ["stop", "The same, and what has no other place is shut down."]];
  const foreseen = foresight();
  const look = async (mode) => {
    const { results, error } = await send({ act: "drain", host, mode, dry_run: true });
    const lines = error ? [error] : [results[0].message, ...results[0].notes].filter((one) => one);
    show(foreseen, lines);
  };
  const choices = modes.map(([mode, text], index) => element("label", { class: "choice" },
    element("input", { type: "radio", name: "mode", value: mode, checked: index === 0 }), element("strong", {}, ` ${mode}: `), text));
  for (const one of choices) one.addEventListener("change", (event) => look(event.target.value));
  ask({
    title: `Drain ${host}`, button: "Drain", force: true,
    text: ["Its machines move to other hosts, and nothing starts there, until it returns to service."],
    fields: [...choices, foreseen],
    act: (form) => order({ act: "drain", host, mode: form.elements.mode.value, force: form.elements.force.checked }, true),
    ready: () => look("live"),
  });
}

function undrain(host) {
  const back = element("select", { name: "back" }, element("option", { value: "" }, "stays there"),
    element("option", { value: "live" }, "comes back while it runs"),
    element("option", { value: "cold" }, "comes back, stopped if need be"));
  ask({
    title: `Return ${host} to service`, button: "Return to service",
    text: ["Guests start there again."],
    fields: [element("label", {}, "What stands elsewhere for it ", back)],
    act: () => order({ act: "undrain", host, ...(back.value ? { return: back.value } : {}) }, true),
  });
}

function confirmHeld(host, names) {
  ask({
    title: `Confirm what ${host} holds`, names, danger: true, button: "Shut them down", word: String(names.length),
    text: [`Their keys say that these guests are to stop there. ${host} has kept them running until somebody confirms it.`],
    act: () => order({ act: "confirm-removal", host, instances: names }, true),
  });
}

// One act, for one or many; asks first where a guest stops. `done` is called once it was ordered.
export function perform(name, names, done = () => {}) {
  const [act, at] = name.split(" ");
  if (act === "move") return void move(names, done);
  if (act === "set") return void change(names);
  const found = { act, instances: names, ...(at ? { now: true } : {}) };
  const question = QUESTIONS[name];
  if (question === null) {
    done();
    return void order(found);
  }
  ask({
    title: `${TITLES[name]}: ${plural(names)}`, names: names.length > 1 ? names : [], button: TITLES[name],
    text: [question], danger: Boolean(at) || act === "delete" || act === "reset",
    word: act !== "delete" ? null : names.length === 1 ? names[0] : String(names.length),
    // What was refused for some stays in the list of results.
    act: async () => {
      const refused = await order(found, names.length === 1);
      done();
      return names.length === 1 ? refused : "";
    },
  });
}

export { order };

document.documentElement.classList.add("scripted");
document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-act]");
  if (!button) return;
  const { act, id, host, held } = button.dataset;
  if (act === "drain") drain(host);
  else if (act === "undrain") undrain(host);
  else if (act === "confirm-removal") confirmHeld(host, held.split(" "));
  else if (id) perform(act, [id]);
});
