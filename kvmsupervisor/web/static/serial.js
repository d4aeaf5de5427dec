// The serial console: xterm.js shows the log and what follows, and sends what is typed while the keyboard is ours.
import { Terminal } from "/static/vendor/xterm-6.0.0/lib/xterm.mjs";
import { FitAddon } from "/static/vendor/addon-fit-0.11.0/lib/addon-fit.mjs";
import { keep, leaves, say } from "./consoles.js";

const take = document.getElementById("take");
const release = document.getElementById("release");
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
const terminal = new Terminal({
  cursorBlink: false,
  scrollback: 5000,
  fontFamily: "ui-monospace, monospace",
  screenReaderMode: true,
  // A guest may name any address as a link; nobody should open it by a slip.
  linkHandler: { activate() {} },
  theme: dark ? { background: "#14171a" } : { background: "#1c2024" },
});
const fit = new FitAddon();
terminal.loadAddon(fit);
terminal.open(document.getElementById("screen"));
fit.fit();
addEventListener("resize", () => fit.fit());
terminal.attachCustomKeyEventHandler((event) => !leaves(event));
// What a guest asks its terminal, such as its colours, is answered by xterm.js like typing: only its holder may answer.
terminal.onData((text) => type(text));

let socket = null;
let ours = false;
let runs = true;
let holder = "";
let told = "";

function type(text) {
  if (ours && socket?.readyState === WebSocket.OPEN) socket.send(new TextEncoder().encode(text));
  else if (text.length === 1) show("Nothing is sent: you do not have the keyboard.");
}

function show(more = "") {
  let said;
  if (!runs) said = "QEMU has ended; its next start is shown here.";
  else if (ours) said = "You have the keyboard.";
  else if (holder) said = `${holder} has the keyboard; you read.`;
  else said = "The keyboard is free; you read.";
  take.disabled = ours;
  release.disabled = !ours;
  say([more, told, said].filter(Boolean).join(" "));
}

function hear(message) {
  told = "";
  switch (message.is) {
    case "qemu":
      runs = message.pid !== null;
      if (!runs) ours = false;
      break;
    case "keyboard":
      ours = message.yours === true;
      if ("holder" in message) holder = message.holder;
      if ("lost" in message) {
        holder = message.lost;
        told = holder ? `${holder} has taken the keyboard.` : "The keyboard was taken away: its output was not read.";
      }
      if ("stuck" in message) {
        holder = message.stuck;
        told = `${holder} does not let go of the keyboard; end that process.`;
      }
      if (ours) terminal.focus();
      break;
    case "supervisor":
      ours = false;
      told = "The supervisor is away; reading goes on, typing when it is back.";
      break;
    default:
  }
  show();
}

keep("serial", (opened) => {
  socket = opened;
  ours = false;
  let shown = 0;
  let told = 0;
  // Nothing more is sent than what the terminal keeps up with: a hidden tab shows little.
  const seen = (bytes) => {
    shown += bytes;
    if (shown - told < 65536 || opened.readyState !== WebSocket.OPEN) return;
    told = shown;
    opened.send(JSON.stringify({ shown }));
  };
  opened.addEventListener("open", () => {
    // What was shown comes again with the log.
    terminal.reset();
    fit.fit();
    show();
    opened.send('{"shown": 0}');
  });
  opened.addEventListener("message", (event) => {
    if (typeof event.data === "string") hear(JSON.parse(event.data));
    else terminal.write(new Uint8Array(event.data), () => seen(event.data.byteLength));
  });
  return () => {
    if (socket === opened) socket = null;
    ours = false;
    take.disabled = release.disabled = true;
  };
});

take.addEventListener("click", () => socket?.send('{"take": true}'));
release.addEventListener("click", () => socket?.send('{"release": true}'));
document.getElementById("keys").addEventListener("change", (event) => {
  if (event.target.value) type(String.fromCharCode(Number(event.target.value)));
  event.target.value = "";
  terminal.focus();
});
