// The form of a new instance: every field is a key, and what would be written is shown as it is typed.
import { order, parseLines, seen } from "./acts.js";
import { follow } from "./live.js";

const form = document.getElementById("create");
const preview = document.getElementById("keys");
const command = document.getElementById("command");
const refusal = document.getElementById("refusal");
const prefix = form.dataset.prefix;

// The keys that the form stands for; a text that says what is wrong otherwise.
function keys() {
  const found = {};
  for (const field of form.querySelectorAll("[data-key]")) {
    const value = field.type === "checkbox" ? (field.checked ? field.value : "") : field.value;
    if (value.trim()) found[field.dataset.key] = field.tagName === "TEXTAREA" ? value : value.trim();
  }
  const place = form.elements.place.value.trim();
  if (place) {
    const words = [place];
    if (form.elements.size.value.trim()) words.push(`size=${form.elements.size.value.trim()}`);
    if (form.elements.from.value) words.push(`from=${form.elements.from.value}`);
    found["disk/0"] = words.join(" ");
  } else if (form.elements.from.value) {
    return "A first content needs a disk: say where it lies.";
  }
  const more = parseLines(form.elements.more.value);
  return typeof more === "string" ? more : { ...found, ...more };
}

// A word as a shell takes it.
const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

function show() {
  const id = form.elements.id.value.trim() || "<id>";
  const found = keys();
  if (typeof found === "string") {
    preview.textContent = found;
    command.textContent = "";
    return;
  }
  const lines = Object.entries(found).map(([key, value]) => `${prefix}/${id}/${key} = ${value}`);
  preview.textContent = lines.join("\n") || "nothing yet";
  const words = Object.entries(found).map(([key, value]) => quoted(`${key}=${value}`));
  command.textContent = ["kvmsupervisor create", id === "<id>" ? "ID" : id, ...words].join(" ");
}

form.addEventListener("input", show);
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const found = keys();
  if (typeof found === "string") {
    refusal.textContent = found;
    return;
  }
  const id = form.elements.id.value.trim();
  const button = form.querySelector("button");
  button.disabled = true;
  const refused = await order(
    { act: "create", instances: [id], keys: found, force: form.elements.force.checked }, true);
  button.disabled = false;
  refusal.textContent = refused;
  document.getElementById("forced").hidden = !refused;
  if (!refused) {
    form.elements.force.checked = false;
    document.getElementById("results").querySelector("strong").append(" – ", link(id));
  }
});

function link(id) {
  const made = document.createElement("a");
  made.href = `/instances/${encodeURIComponent(id)}`;
  made.textContent = "open it";
  return made;
}

show();
follow(seen);
