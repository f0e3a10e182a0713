// What views are made of. Text only ever becomes text nodes, so that no row can bring markup of its own.

export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
    else if (typeof value === "boolean" && name in node) node[name] = value;
    else if (name === "value") node.value = value;
    else node.setAttribute(name === "cls" ? "class" : name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export function svg(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function table(caption, headers, rows) {
  const cell = (value) => el("td", { cls: typeof value === "number" ? "number" : null },
    value instanceof Node ? value : typeof value === "number" ? number(value) : String(value ?? ""));
  return el("div", { cls: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", {},
      el("caption", {}, caption),
      el("thead", {}, el("tr", {}, headers.map((header) => el("th", { scope: "col" }, header)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell))))));
}

export const number = (value, digits = 3) => Number.isInteger(value) ? value.toLocaleString("en")
  : Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
export const percent = (share) => share > 0 && share < 0.005 ? "<1 %" : `${Math.round(100 * share)} %`;
export const shorten = (text, width = 80) => text.length > width ? `${text.slice(0, width - 1)}…` : text;
export const problem = (error) => el("p", { cls: "problem", role: "alert" }, error.message);

export function say(sentence) {
  document.getElementById("status").textContent = sentence;
}

// One tab stop for many things: the arrow keys move between them.
export function roving(container, selector) {
  const all = () => [...container.querySelectorAll(selector)];
  const first = all()[0];
  if (first) first.tabIndex = 0;
  container.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const here = event.target.closest(selector);
    if (!here) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      here.click();
    } else if (step) {
      event.preventDefault();
      const list = all();
      const next = list[(list.indexOf(here) + step + list.length) % list.length];
      here.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }
  });
}

export function openDialog(title, ...content) {
  const dialog = document.getElementById("dialog");
  const close = el("button", { type: "button", onclick: () => dialog.close() }, "Close");
  dialog.replaceChildren(el("div", { cls: "dialog-head" }, el("h2", { id: "dialog-title" }, title), close), ...content);
  dialog.showModal();
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    say(`${what} copied.`);
  } catch {
    openDialog(`Copy ${what}`, el("textarea", { rows: "12", readonly: "", "aria-label": what, value: text }));
  }
}

export function download(name, text, type) {
  const link = el("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
  say(`${name} saved.`);
}

// A cell that begins like a formula gets an apostrophe, so that no spreadsheet runs it.
export function csv(rows) {
  const cell = (value) => {
    const text = String(value ?? "");
    const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return `"${safe.replaceAll('"', '""')}"`;
  };
  return rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}
