// The display: noVNC on a WebSocket of ours, which leads to QEMU itself.
import RFB from "/static/vendor/novnc-1.7.0/core/rfb.js";
import { keep, leaves, say } from "./consoles.js";
import { keysOf, strokes } from "./keys.js";

const screen = document.getElementById("screen");
const controls = [...document.querySelectorAll("#controls button, #controls select, #controls textarea")];
const scale = document.getElementById("scale");
const text = document.getElementById("text");
let viewer = null;

function enable(on) {
  for (const control of controls) control.disabled = !on;
}

function fitIn() {
  if (viewer === null) return;
  viewer.scaleViewport = scale.checked;
  // A guest with a driver for it takes the size of the window; the others are scaled.
  viewer.resizeSession = scale.checked;
}

enable(false);
keep("display", (socket) => {
  const opened = new RFB(screen, socket, { shared: true });
  viewer = opened;
  opened.focusOnClick = true;
  opened.background = "transparent";
  fitIn();
  opened.addEventListener("connect", () => {
    enable(true);
    say("You see the display. Click into it to type.");
    opened.focus();
  });
  opened.addEventListener("securityfailure", (event) => say(`QEMU refuses: ${event.detail.reason ?? "no reason"}`, true));
  return () => {
    if (viewer === opened) viewer = null;
    enable(false);
  };
});

// Before noVNC sees it.
addEventListener("keydown", (event) => viewer !== null && screen.contains(event.target) && leaves(event), true);

scale.addEventListener("change", fitIn);
document.getElementById("keys").addEventListener("change", (event) => {
  const wanted = event.target.value;
  event.target.value = "";
  if (!wanted || viewer === null) return;
  const keys = keysOf(wanted);
  for (const [sym, code] of keys) viewer.sendKey(sym, code, true);
  for (const [sym, code] of keys.reverse()) viewer.sendKey(sym, code, false);
  viewer.focus();
});
document.getElementById("full").addEventListener("click", async () => {
  await screen.requestFullscreen?.();
  // With it Escape, Alt+Tab and such reach the guest; holding Escape leaves.
  await navigator.keyboard?.lock?.().catch(() => {});
  viewer?.focus();
});

// Text is typed key by key, as on a US keyboard: a guest with that layout gets what is written.
document.getElementById("type").addEventListener("submit", async (event) => {
  event.preventDefault();
  const to = viewer;
  const [keys, left] = strokes(text.value);
  const button = event.target.querySelector("button");
  // Two texts at once would be one, with keys of both.
  button.disabled = true;
  try {
    await typeAll(to, keys);
  } finally {
    button.disabled = false;
  }
  if (viewer !== to || to === null) return;
  say(left ? `Typed, but for what a US keyboard has no key for: ${left}` : "Typed.", left !== "");
  text.value = "";
  to.focus();
});

async function typeAll(to, keys) {
  for (const [sym, code, down] of keys) {
    if (viewer !== to || to === null) return;
    to.sendKey(sym, code, down);
    // A guest that polls its keyboard loses what comes faster.
    if (!down) await new Promise((resolve) => setTimeout(resolve, 8));
  }
}
