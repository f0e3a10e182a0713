// What if: predictions with their bands, curves from 0 to 100 %, and retraining to check.

import { get, post } from "./api.js";
import { el, number, problem, say, shorten, svg, table } from "./dom.js";

const POLL = 1000; // milliseconds between looks at a job

// Shows what the model would say without some sets of units. `question`: prompt, answer, against, queries (names).
export async function showPrediction(into, question, sets) {
  into.replaceChildren(el("p", { cls: "soft" }, "Predicting …"));
  const body = { ...question, sets, curve: true };
  try {
    const found = await post("/api/what-if", body);
    into.replaceChildren(
      el("ul", { cls: "sentences" }, found.lines.slice(0, 12).map((line) => el("li", {}, sentence(line, found.lines)))),
      el("p", { cls: "soft" }, found.means),
      ...charts(found.curves),
      el("details", {}, el("summary", {}, "As a table"), predictionTable(found.lines)),
      checkButton(body));
    into.scrollIntoView({ block: "nearest" });
    say("Predicted.");
  } catch (error) {
    into.replaceChildren(problem(error));
  }
}

function sentence(line, all) {
  const several = new Set(all.map((other) => other.query)).size > 1;
  return several ? [el("bdi", { cls: "quoted" }, shorten(line.query, 60)), ": ", line.sentence] : [line.sentence];
}

// The effects first, as in the terminal and in the pages of --html.
export function predictionTable(lines) {
  const checked = lines.some((line) => line.actual !== undefined);
  const units = new Set(lines.map((line) => line.unit));
  const one = units.size === 1 ? [...units][0] : "";
  const unit = (line) => one || !line.unit ? "" : ` ${line.unit}`;
  const signed = (value) => `${value > 0 ? "+" : ""}${number(value)}`;
  const band = (line) => line.low === null ? " (error unknown)" : ` [${signed(line.low - line.base)}, ${signed(line.high - line.base)}]`;
  const rows = lines.map((line) => [
    shorten(line.query, 60), line.without, `${signed(line.effect)}${band(line)}${unit(line)}`,
    ...(checked ? [`${signed(line.actual - line.base)}${unit(line)}`, inside(line)] : []), line.base, line.predicted]);
  return table("Effects of leaving out, with their 95 % intervals", ["query", "left out", one ? `effect (${one})` : "effect",
    ...(checked ? ["retrained", "inside?"] : []), "all data", "without it"], rows);
}

const inside = (line) => line.already_measured ? "measured before" : line.inside === null ? "unknown" : line.inside ? "yes" : "no";

// ---------------------------------------------------------------- retraining

function checkButton(body) {
  const box = el("div", { cls: "check" });
  const start = async () => {
    try {
      const { curve, ...asked } = body;
      await follow(box, await post("/api/verify", asked));
    } catch (error) {
      box.replaceChildren(problem(error));
    }
  };
  box.append(el("button", { type: "button", onclick: start }, "Retrain to check"),
    el("span", { cls: "soft" }, " trains again without these, in the background"));
  return box;
}

// Shows a job until it ends, or until its place has left the page.
export async function follow(box, job) {
  for (;;) {
    box.replaceChildren(...jobBlock(job));
    if (!["waiting", "running"].includes(job.state)) {
      box.scrollIntoView({ block: "nearest" });
      say(`Retraining ${job.id}: ${job.state}.`);
      return;
    }
    await new Promise((done) => setTimeout(done, POLL));
    if (!box.isConnected) return;
    job = await get("/api/job", { id: job.id });
  }
}

export function jobBlock(job) {
  const active = ["waiting", "running"].includes(job.state);
  const seconds = job.seconds === null ? "" : `, ${job.seconds} s`;
  const told = [el("p", {}, el("strong", {}, `Retraining ${job.id}: ${job.state}`), ` (${job.done} of ${job.total} sets${seconds})`)];
  if (active) {
    told.push(el("progress", { max: job.total, value: job.done, "aria-label": "Sets retrained" }), " ",
      el("button", { type: "button", onclick: () => post(`/api/stop?id=${job.id}`) }, "Stop"));
  }
  if (job.problem) told.push(problem(new Error(job.problem)));
  if (job.lines.length) told.push(el("p", { cls: "verdict" }, job.outcome), predictionTable(job.lines), el("p", { cls: "soft" }, job.means));
  return told;
}

// ---------------------------------------------------------------- curves

const W = 480, H = 270, LEFT = 74, RIGHT = 12, TOP = 14, BOTTOM = 44;

function charts(curves) {
  const queries = [...new Set(curves.map((curve) => curve.query))];
  return queries.map((query) => chart(query, curves.filter((curve) => curve.query === query)));
}

function chart(query, curves) {
  const ends = curves.flatMap((curve) => [...curve.predicted, ...curve.low, ...curve.high]).filter((value) => value !== null);
  const ticks = roundTicks(Math.min(...ends), Math.max(...ends));
  const low = ticks[0], span = (ticks.at(-1) - low) || 1;
  const x = (share) => LEFT + share * (W - LEFT - RIGHT);
  const y = (value) => H - BOTTOM - (value - low) / span * (H - TOP - BOTTOM);
  const path = (shares, values) => shares.map((share, i) => `${x(share).toFixed(1)},${y(values[i]).toFixed(1)}`);
  const parts = ticks.map((tick) => [
    svg("path", { class: "grid", d: `M${LEFT} ${y(tick)}H${W - RIGHT}` }),
    svg("text", { class: "end", x: LEFT - 8, y: y(tick) + 5 }, number(Number(tick.toPrecision(6)), 6))]).flat();
  for (const share of [0, 0.5, 1]) parts.push(svg("text", { class: "middle", x: x(share) - (share === 1 ? 14 : 0), y: H - 24 }, `${100 * share} %`));
  parts.push(svg("text", { class: "middle", x: x(0.5), y: H - 5 }, "left out"));
  curves.forEach((curve, n) => {
    if (!curve.low.includes(null)) {
      const band = [...path(curve.shares, curve.high), ...path([...curve.shares].reverse(), [...curve.low].reverse())];
      parts.push(svg("polygon", { class: `band line${n}`, points: band.join(" ") }));
    }
    parts.push(svg("polyline", { class: `curve line${n}`, points: path(curve.shares, curve.predicted).join(" ") }));
  });
  const names = curves.map((curve, n) => el("li", { cls: `line${n}` }, `without ${curve.without}`));
  return el("figure", {},
    el("figcaption", {}, el("bdi", {}, shorten(query, 70)), ", predicted, with its 95 % band"),
    svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `Predicted value of ${shorten(query, 70)} as more is left out; the table has the numbers` }, ...parts),
    el("ul", { cls: "lines" }, names));
}

// Round numbers around a range: 1, 2 or 5 times a power of ten apart.
export function roundTicks(low, high, wanted = 4) {
  const rough = (high - low || Math.abs(high) || 1) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const first = Math.floor(low / step), last = Math.max(Math.ceil(high / step), first + 1);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

// ---------------------------------------------------------------- the page

export async function whatIfPage(main, state) {
  const run = await get("/api/run");
  if (!run || run.problem) {
    main.append(el("h1", {}, "What if"), el("p", { cls: "verdict" }, run ? run.problem : "There is no run here: start the page with one, leaveout serve IDX RUN."));
    return;
  }
  const queries = await get("/api/queries");
  const answer = el("input", { id: "own-answer", value: state.get("answer") ?? "", autocomplete: "off" });
  const prompt = el("input", { id: "own-prompt", value: state.get("prompt") ?? "", autocomplete: "off" });
  const chosen = new Set(state.getAll("q"));
  const left = new Set(state.getAll("without"));
  const picked = queries.map((query) => tick(query.name, chosen, false, query.measure === "loss" ? "" : ` (${query.measure})`));
  const units = el("div", { cls: "ticks" });
  const find = el("input", { id: "find-unit", type: "search", onchange: () => list(), autocomplete: "off" });
  const list = async () => {
    const { units: shown, of } = await get("/api/units", { find: find.value });
    units.replaceChildren(...shown.map((unit) => tick(unit.name, left, true, ` ${unit.examples} ${unit.examples === 1 ? "example" : "examples"}`,
      unit.trained ? null : "no step of the training saw it")),
      ...(of > shown.length ? [el("p", { cls: "soft" }, `${number(of - shown.length)} more: find them by a part of their names.`)] : []));
  };
  const result = el("section", { "aria-label": "Prediction" });
  const predict = (event) => {
    event?.preventDefault();
    const question = { queries: [...chosen] };
    if (answer.value) Object.assign(question, { answer: answer.value, prompt: prompt.value || null });
    const each = form.querySelector("#each").checked;
    const address = new URLSearchParams();
    for (const name of chosen) address.append("q", name);
    for (const name of left) address.append("without", name);
    if (answer.value) address.set("answer", answer.value);
    if (prompt.value) address.set("prompt", prompt.value);
    history.replaceState(null, "", `#/what-if?${address}`);
    if (!left.size) result.replaceChildren(problem(new Error("Untick at least one unit: that is what is left out.")));
    else showPrediction(result, question, each ? [...left].map((name) => [name]) : [[...left]]);
  };
  const form = el("form", { onsubmit: predict },
    el("fieldset", {}, el("legend", {}, "Answers"),
      queries.length ? el("div", { cls: "ticks" }, picked) : el("p", { cls: "soft" }, "Offer queries by name with --queries FILE."),
      el("label", { for: "own-prompt" }, "Prompt"), prompt, el("label", { for: "own-answer" }, "An answer of your own"), answer),
    el("fieldset", {}, el("legend", {}, "Training data: untick what is left out"),
      el("label", { for: "find-unit" }, "Find"), find, units,
      el("label", { cls: "tick" }, el("input", { type: "checkbox", id: "each" }), " each of them for itself")),
    el("button", { cls: "primary" }, "Predict"));
  await list();
  main.append(el("h1", {}, "What would the model say without it?"), form, result);
  if (left.size && (chosen.size || answer.value)) predict();
}

// A ticked name. `inverted`: unticking puts it into the set, as for what is left out.
function tick(name, set, inverted, note = "", disabled = null) {
  const box = el("input", { type: "checkbox", checked: set.has(name) !== inverted, disabled: disabled !== null,
    onchange: () => (box.checked !== inverted ? set.add(name) : set.delete(name)) });
  return el("label", { cls: disabled ? "tick grey" : "tick" }, box, " ", el("bdi", {}, shorten(name, 60)),
    el("span", { cls: "soft" }, disabled ? `${note}; ${disabled}` : note));
}
