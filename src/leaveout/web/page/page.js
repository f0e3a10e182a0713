// Which view is shown, and the keys. The address after # holds the whole question, so that a link says everything.

import { askPage } from "./ask.js";
import { el, openDialog, problem, say, table } from "./dom.js";
import { indexPage, jobsPage, runPage } from "./facts.js";
import { whatIfPage } from "./whatif.js";

const VIEWS = { "/ask": askPage, "/what-if": whatIfPage, "/index": indexPage, "/run": runPage, "/jobs": jobsPage };
const KEYS = [
  ["/", "go to the answer that is asked about"], ["j, k", "next row, row before"], ["o", "open the row in full"],
  ["x", "leave the row out, or put it back"], ["arrows", "from word to word"], ["Enter", "what stands behind the word"], ["Esc", "close"], ["?", "these keys"],
];

async function show() {
  const [path, query] = (location.hash.slice(1) || "/ask").split("?");
  const view = el("div"); // of its own: what an older view still waits for goes nowhere
  document.getElementById("main").replaceChildren(view);
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === `#${path}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  try {
    await (VIEWS[path] ?? askPage)(view, new URLSearchParams(query ?? ""));
  } catch (error) {
    view.append(problem(error));
  }
}

function showKeys() {
  openDialog("Keys", table("Keys", ["key", "does"], KEYS));
}

function onKey(event) {
  const typing = event.target.closest("input:not([type=checkbox]), textarea, select");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || document.getElementById("dialog").open) return;
  const rows = [...document.querySelectorAll("li.row")];
  const here = rows.indexOf(document.activeElement.closest("li.row"));
  const go = (at) => rows[Math.max(0, Math.min(rows.length - 1, at))]?.focus();
  const actions = {
    "/": () => document.getElementById("answer")?.focus(), "?": showKeys,
    j: () => go(here + 1), k: () => go(here - 1),
    o: () => rows[here]?.querySelector("button.link").click(), x: () => rows[here]?.querySelector("input[type=checkbox]")?.click(),
  };
  if (actions[event.key]) {
    event.preventDefault();
    actions[event.key]();
  }
}

const given = new URLSearchParams(location.search);
if (given.has("token")) history.replaceState(null, "", `/${location.hash}`); // the cookie has it now
document.getElementById("keys").addEventListener("click", showKeys);
document.addEventListener("keydown", onKey);
window.addEventListener("hashchange", show);
window.addEventListener("popstate", () => say(""));
show();
