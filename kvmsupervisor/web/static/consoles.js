// What both consoles share: the way to a WebSocket, again when it is lost, and what is said about it.

const HEADERS = { "Content-Type": "application/json", "X-KVMsupervisor": "console" };
const AGAIN_MS = [1000, 2000, 5000, 10000];

const line = document.getElementById("said");
// It is not kept up here; the console itself says how it is.
document.querySelector("#state.good")?.remove();
export const instance = document.getElementById("screen").dataset.instance;

// Say how things are, in the line above the console.
export function say(text, bad = false) {
  line.classList.toggle("problem", bad);
  if (line.textContent !== text) line.textContent = text;
}

async function ticket(kind) {
  const reply = await fetch("/api/v1/console-tickets", {
    method: "POST",
    headers: HEADERS,
    body: JSON.stringify({ console: kind, instance }),
    credentials: "same-origin",
  });
  const found = await reply.json();
  if (!reply.ok) throw new Refused(found.error ?? `refused with status ${reply.status}`);
  return found.path;
}

class Refused extends Error {}

// Keep a console open. `open(socket)` is called with each new WebSocket, before anything comes of it, and returns a
// function that is called when that one has ended.
export function keep(kind, open) {
  let tries = 0;
  let timer = null;

  async function connect() {
    clearTimeout(timer);
    say("Connecting …");
    let path;
    try {
      path = await ticket(kind);
    } catch (error) {
      later(error instanceof Refused ? error.message : "this page's server does not answer");
      return;
    }
    const socket = new WebSocket(location.origin.replace(/^http/, "ws") + path);
    socket.binaryType = "arraybuffer";
    const close = open(socket);
    socket.addEventListener("open", () => { tries = 0; });
    socket.addEventListener("close", (event) => {
      close();
      later(event.reason || (event.code === 1000 ? "it has ended" : "the connection was lost"));
    });
  }

  function later(why) {
    const wait = AGAIN_MS[Math.min(tries, AGAIN_MS.length - 1)];
    tries += 1;
    say(`No console: ${why}. It is tried again.`, true);
    timer = setTimeout(() => (document.hidden ? later(why) : connect()), wait);
  }

  document.addEventListener("visibilitychange", () => {
    // A hidden tab that has lost its console waits until somebody looks.
    if (!document.hidden && timer !== null && line.classList.contains("problem")) connect();
  });
  connect();
}

// A console takes every key, Tab too. This one leaves it, for the first control of the page.
export function leaves(event) {
  if (!(event.key === "F12" && event.shiftKey) || event.type !== "keydown") return false;
  event.preventDefault();
  event.stopPropagation();
  document.querySelector("#controls :is(button, select, input):not(:disabled)")?.focus();
  return true;
}
