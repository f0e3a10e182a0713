// The pages of facts: the index and its health, the run, and the retrainings under way.

import { get } from "./api.js";
import { el, number, problem, say, table } from "./dom.js";
import { follow } from "./whatif.js";

export async function indexPage(main) {
  const facts = await get("/api/index");
  const health = el("div");
  const check = async () => {
    health.replaceChildren(el("p", { cls: "soft" }, "Reading every file …"));
    const { problems } = await get("/api/check").catch((error) => ({ problems: [error.message] }));
    health.replaceChildren(problems.length ? el("ul", { cls: "problem" }, problems.map((one) => el("li", {}, one))) : el("p", {}, "All files are as they were written."));
    say(problems.length ? "Something is wrong." : "All is well.");
  };
  const { signature } = facts;
  main.append(el("h1", {}, "The index"),
    el("div", { cls: "verdict" }, facts.sentences.map((sentence) => el("p", {}, sentence))),
    notes(facts.notes),
    table("What was indexed", ["", ""], [
      ["directory", facts.path], ["rows", number(facts.rows)], ["forms of the rows", words(facts.forms)],
      ["fields", facts.fields.join(", ") || "none"], ["units", facts.units ?? "each row for itself"],
      ["tokens that count", signature.targets], ["bytes kept of a row", signature.bytes_per_row ? number(signature.bytes_per_row) : "all"],
      ["channels", signature.channels.map((channel) => channel.kind).join(", ")]]),
    el("h2", {}, "Health"), el("button", { type: "button", onclick: check }, "Check all files"), health,
    el("details", {}, el("summary", {}, "Everything, as JSON"), el("pre", {}, JSON.stringify(facts, null, 2))));
}

export async function runPage(main) {
  const run = await get("/api/run");
  main.append(el("h1", {}, "The run"));
  if (!run) {
    main.append(el("p", { cls: "verdict" }, "There is no run here: start the page with one, leaveout serve IDX RUN."));
    return;
  }
  main.append(el("div", { cls: "verdict" }, (run.problem ? [run.problem] : run.sentences).map((sentence) => el("p", {}, sentence))));
  if (!run.problem) {
    main.append(notes(run.notes), table("How it was trained", ["", ""], [
      ["directory", run.path], ["kind", run.kind], ["steps", number(run.steps)], ["optimizer", run.optimizer], ["CPU seconds of measuring", number(run.cpu_seconds)]]),
      table("Measurements", ["what", "how many"], Object.entries(run.measurements)));
  }
  const { units } = await get("/api/units", { find: "" });
  main.append(table(units.length < run.units ? `The first ${units.length} units` : "Units: what can be left out", ["unit", "examples", "trained on"], units.map((unit) => [unit.name, unit.examples, unit.trained ? "yes" : "in no step"])));
}

export async function jobsPage(main) {
  const jobs = await get("/api/jobs");
  main.append(el("h1", {}, "Retrainings"));
  if (!jobs.length) main.append(el("p", { cls: "soft" }, "None yet: predict something, then retrain to check."));
  for (const job of jobs) {
    const box = el("div", { cls: "check" });
    main.append(el("h2", {}, `Without ${job.sets.map((set) => set.slice(0, 4).join(", ")).slice(0, 3).join("; without ")}`), box);
    follow(box, job).catch((error) => box.replaceChildren(problem(error)));
  }
}

const notes = (list) => el("ul", { cls: "notes" }, list.map((note) => el("li", {}, note)));
const words = (counts) => Object.entries(counts).map(([name, count]) => `${name} ${number(count)}`).join(", ");
