// Words tinted by what they add: blue pushes the answer up, orange down; how much is also in the title, and in tables.

import { el, number } from "./dom.js";

const LEAST = 0.06; // of the largest: what is less is not tinted

// `from`: the place of the first word in its text; `whole`: the weights that the tints are relative to.
export function tinted(words, weights, { click, learned = () => true, label = "adds", from = 0, whole = weights } = {}) {
  const largest = Math.max(...whole.map(Math.abs), 1e-30);
  return words.map((word, at) => {
    const space = word.match(/^\s*/)[0];
    const share = weights[at] / largest;
    const props = { "data-at": from + at, cls: tint(share) };
    if (Math.abs(share) >= LEAST) {
      props.style = { "--share": Math.abs(share).toFixed(3) };
      props.title = `${label} ${number(weights[at])}`;
    }
    if (click && learned(at) && word.trim()) {
      props.cls += " word";
      Object.assign(props, { role: "button", tabindex: "-1", "aria-pressed": "false", onclick: () => click(at) });
    }
    return [space, el("span", props, word.slice(space.length))];
  }).flat();
}

const tint = (share) => Math.abs(share) < LEAST ? "" : share > 0 ? "tint up" : "tint down";

export function press(container, at) {
  for (const word of container.querySelectorAll(".word")) {
    word.setAttribute("aria-pressed", String(Number(word.dataset.at) === at));
  }
}

export const legend = (up, down) => el("p", { cls: "legend" },
  el("span", { cls: "tint up", style: { "--share": "0.9" } }, up), " ",
  el("span", { cls: "tint down", style: { "--share": "0.9" } }, down), " The darkest word is the strongest of its text.");
