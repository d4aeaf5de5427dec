// A page that its server writes: it is fetched again when something has changed, at most once a second.
import { seen } from "./acts.js";
import { follow, showAges } from "./live.js";

const path = location.pathname;
const instance = path.startsWith("/instances/") ? path.slice("/instances/".length) : null;
let due = null;
let running = false;
let first = true;

// How a link or a button is found again in the new document.
function where(one) {
  if (one?.getAttribute("href")) return `[href="${CSS.escape(one.getAttribute("href"))}"]`;
  if (!one?.dataset?.act) return null;
  const host = one.dataset.host ? `[data-host="${CSS.escape(one.dataset.host)}"]` : "";
  return `[data-act="${CSS.escape(one.dataset.act)}"]${host}`;
}

function refresh() {
  due = null;
  running = true;
  // As a document: nothing is written as HTML by a script, and nothing in it runs.
  const request = new XMLHttpRequest();
  request.open("GET", location.href);
  request.responseType = "document";
  request.timeout = 10000;
  request.onload = () => {
    const main = request.response?.getElementById("main");
    if (!main) return;
    const focused = where(document.activeElement);
    const [left, top] = [scrollX, scrollY];
    document.getElementById("main").replaceWith(document.adoptNode(main));
    document.title = request.response.title;
    showAges();
    scrollTo(left, top);
    if (focused) main.querySelector(focused)?.focus({ preventScroll: true });
  };
  request.onloadend = () => {
    running = false;
    if (due === "again") due = setTimeout(refresh, 1000);
  };
  request.send();
}

follow((news, whole) => {
  seen(news);
  // The first whole list is what this page was written of, as a rule; it costs one request to be sure.
  const concerns = instance === null || whole || news.rows.some((row) => row.id === instance)
    || news.gone.includes(instance);
  if (!concerns) return;
  if (running) due = "again";
  else due ??= setTimeout(refresh, first ? 0 : 200);
  first = false;
});
