// Ask: an answer's words on the left, the rows that push it up and down on the right, and what it would be without them.
// The list comes first; its colours follow once the model has passed over the rows.

import { get, post } from "./api.js";
import { copy, csv, download, el, number, openDialog, percent, problem, roving, say, shorten, table } from "./dom.js";
import { showPrediction } from "./whatif.js";
import { legend, press, tinted } from "./words.js";

export async function askPage(main, state) {
  const [index, run, queries] = await Promise.all([get("/api/index"), get("/api/run"), get("/api/queries")]);
  const form = questionForm(state, index, run, queries);
  const results = el("div", { id: "results" });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    history.pushState(null, "", `#/ask?${toAddress(readForm(form))}`);
    ask(results, form, run);
  });
  main.append(el("h1", {}, "Where does this answer come from?"), form, results);
  if (state.get("answer")) await ask(results, form, run);
  else form.querySelector("#answer").focus();
}

// ---------------------------------------------------------------- the question

function questionForm(state, index, run, queries) {
  const text = (id, label, rows, more = {}) => el("div", { cls: "field" }, el("label", { for: id }, label),
    el("textarea", { id, rows, value: state.get(id) ?? "", ...more }));
  const offered = queries.filter((query) => query.answer);
  const pick = el("select", { id: "pick", onchange: () => {
    const query = offered[Number(pick.value)];
    if (!query) return;
    form.querySelector("#prompt").value = query.prompt ?? "";
    form.querySelector("#answer").value = query.answer;
  } }, el("option", { value: "" }, "choose one"), offered.map((query, n) => el("option", { value: n }, shorten(query.name, 60))));
  const fields = ["unit", ...index.fields];
  const chooser = (id, none, chosen) => el("select", { id }, el("option", { value: "" }, none),
    fields.map((name) => option(name, chosen)));
  const usual = state.get("field") ?? (index.fields.includes("source") ? "source" : "");
  const field = chooser("field", "choose a field", usual);
  const ticks = el("div", { cls: "ticks", id: "sources" });
  const sources = async () => {
    ticks.replaceChildren();
    if (!field.value) return;
    const only = state.has("only") && state.get("field") === field.value ? new Set(state.getAll("only")) : null;
    const { rows } = await get("/api/sources", { field: field.value });
    const names = Object.entries(rows);
    ticks.append(...names.slice(0, 200).map(([name, count]) => el("label", { cls: "tick" },
      el("input", { type: "checkbox", value: name, checked: !only || only.has(name) }), " ",
      el("bdi", {}, shorten(name || "without one", 50)), el("span", { cls: "soft" }, ` ${number(count)}`))));
    if (names.length > 200) ticks.append(el("p", { cls: "soft" }, `${names.length - 200} more: filter them by SQL.`));
  };
  field.addEventListener("change", sources);
  const filters = el("details", { open: ["where", "only", "group_by"].some((name) => state.has(name)) },
    el("summary", {}, "Filter and group"),
    el("div", { cls: "columns" },
      el("fieldset", {}, el("legend", {}, "Sources"), el("label", { for: "field" }, "Field"), field, ticks),
      el("div", {},
        el("label", { for: "where" }, "SQL over id, unit, text and fields"),
        el("input", { id: "where", value: state.get("where") ?? "", placeholder: "source = 'web' AND year > 2020", autocomplete: "off" }),
        el("label", { for: "group_by" }, "Of each value only the best row"), chooser("group_by", "all rows", state.get("group_by")),
        el("label", { for: "k" }, "Rows of each kind"),
        el("input", { id: "k", type: "number", min: "1", max: "100", value: state.get("k") ?? "10" }))));
  const form = el("form", { id: "question" },
    offered.length ? el("div", { cls: "field" }, el("label", { for: "pick" }, "One of the queries"), pick) : null,
    text("prompt", "Prompt (context only)", "2"),
    text("answer", "Answer that is asked about", "2", { required: "", "aria-describedby": "joined" }),
    el("p", { cls: "soft small", id: "joined" }, "Both are joined as they are: begin the answer with a space where one belongs."),
    el("details", { open: state.has("against") }, el("summary", {}, "Contrast: why this answer and not another?"),
      text("against", "The other answer", "2")),
    filters, el("button", { cls: "primary" }, "Ask"));
  form.ready = sources();
  return form;
}

const option = (name, chosen) => {
  const node = el("option", { value: name }, name);
  node.selected = name === chosen;
  return node;
};

function readForm(form) {
  const value = (id) => form.querySelector(`#${id}`).value;
  const asked = { answer: value("answer"), k: Number(value("k")) };
  for (const name of ["prompt", "against", "where", "group_by"]) if (value(name)) asked[name] = value(name);
  const boxes = [...form.querySelectorAll("#sources input")];
  const only = boxes.filter((box) => box.checked).map((box) => box.value);
  if (value("field") && only.length < boxes.length) Object.assign(asked, { field: value("field"), only });
  return asked;
}

function toAddress(asked) {
  const address = new URLSearchParams();
  for (const [name, value] of Object.entries(asked)) for (const one of [value].flat()) address.append(name, one);
  return address;
}

const questionOf = ({ prompt = null, answer, against = null }) => ({ prompt, answer, against });

// ---------------------------------------------------------------- the answer

let newest = new AbortController(); // of the newest question: an older one is given up, so that the model need not answer it

async function ask(results, form, run) {
  newest.abort();
  const { signal } = newest = new AbortController();
  results.replaceChildren(el("p", { cls: "soft" }, "Searching …"));
  say("Searching.");
  try {
    await form.ready; // the ticks of a deep link are there only once the sources are
    const asked = readForm(form);
    const found = await post("/api/ask", asked, signal);
    const view = new Results(results, asked, found, run);
    say(found.verdict);
    const ids = [...found.up, ...found.down].map((hit) => hit.id);
    for (let start = 0; start < ids.length; start += 100) {
      view.colour(await post("/api/explain", { ...questionOf(asked), ids: ids.slice(start, start + 100) }, signal));
    }
  } catch (error) {
    if (!signal.aborted) results.replaceChildren(problem(error));
  }
}

class Results {
  constructor(into, asked, found, run) {
    Object.assign(this, { asked, found, run, cards: new Map(), why: new Map(), left: new Map(), word: null });
    this.answer = el("p", { cls: "passage answer" }, el("bdi", {}, found.asked));
    this.hint = el("p", { cls: "soft" }, "Colours follow …");
    this.shares = el("div");
    this.controls = el("div");
    this.sums = el("div");
    this.prediction = el("section", { "aria-label": "Prediction" });
    this.basket = el("div", { cls: "basket" });
    const { against } = asked;
    const by = asked.group_by ?? document.getElementById("field").value;
    into.replaceChildren(
      el("p", { cls: "verdict" }, found.verdict), this.controls, this.sums,
      el("p", { cls: "soft" }, `${found.considered === 1 ? "One row was" : `${number(found.considered)} rows were`} considered in ${number(found.seconds)} s. `,
        "Shares are of the strongest row's score", found.usual ? `, which is ${number(Math.max(0, found.up[0]?.score ?? 0) / found.usual)} times what the best other row scores for rows of this index that are asked themselves.` : "; a score compares rows of one question only."),
      el("div", { cls: "tools" },
        el("button", { type: "button", onclick: () => this.control() }, "Would anything else give this list?"),
        by ? el("button", { type: "button", onclick: () => this.sum(by) }, `Sum up by ${shorten(by, 30)}`) : null,
        el("button", { type: "button", onclick: () => copy(this.json(), "JSON") }, "Copy as JSON"),
        el("button", { type: "button", onclick: () => this.save() }, "Download CSV")),
      el("div", { cls: "split" },
        el("section", { cls: "left", "aria-label": "The answer" }, el("h2", {}, "The answer"),
          this.answer, against ? legend("for this answer", "for the other") : legend("pushes the answer up", "pushes it down"), this.hint, this.shares, this.basket, this.prediction),
        el("section", { cls: "right", "aria-label": "The rows" },
          this.list(against ? "Rows for this answer" : "Rows that push it up", found.up, "No row pushes it up."),
          this.list(against ? "Rows for the other answer" : "Rows that push it down", found.down, "No row pushes it down."),
          el("details", {}, el("summary", {}, "As a table"), this.table()))));
    this.showBasket();
  }

  hits() {
    return [...this.found.up, ...this.found.down];
  }

  list(title, hits, none) {
    const list = el("ol", { cls: "rows" }, hits.map((hit) => this.card(hit)));
    return el("div", {}, el("h2", {}, title), hits.length ? list : el("p", { cls: "soft" }, none));
  }

  card(hit) {
    const passage = el("p", { cls: "passage" }, el("bdi", {}, shorten(hit.text, 300)));
    const facts = Object.entries(hit.fields).map(([name, value]) => el("span", { cls: "fact" }, `${name}: `, el("bdi", {}, shorten(String(value), 40))));
    const card = el("li", { cls: hit.run && !hit.run.unit ? "row grey" : "row", tabindex: "-1" },
      el("div", { cls: "row-head" },
        el("button", { type: "button", cls: "link", onclick: () => this.open(hit), "aria-label": `Open row ${hit.id} in full` }, el("bdi", {}, shorten(hit.id, 40))),
        el("span", { cls: "share", title: this.found.usual ? `${number(hit.score / this.found.usual)} × usual` : `score ${number(hit.score)}` },
          el("span", { cls: hit.share < 0 ? "bar down" : "bar", "aria-hidden": "true" }, el("span", { style: { "--share": Math.abs(hit.share) } })),
          ` ${hit.share < 0 ? "−" : "+"}${percent(Math.abs(hit.share))}`)),
      passage, el("div", { cls: "facts" }, facts), this.run ? this.leaveOut(hit) : null);
    card.addEventListener("focusin", () => card.classList.add("current"));
    card.addEventListener("focusout", () => card.classList.remove("current"));
    this.cards.set(hit.id, { hit, card, passage });
    return card;
  }

  // ---- colours

  colour(why) {
    Object.assign(this, { words: why.answer, first: why.first });
    this.total ??= why.answer.map(() => 0);
    for (const row of why.rows) {
      this.why.set(row.id, row);
      row.answer_weights.forEach((weight, at) => { this.total[at] += weight; });
    }
    this.hint.textContent = "Click a word of the answer for the rows behind it, or a word of a row for what it answers.";
    this.paint();
    roving(this.answer, ".word");
    for (const { passage } of this.cards.values()) roving(passage, ".word");
    const size = this.total.reduce((sum, weight) => sum + Math.abs(weight), 0) || 1;
    const rows = this.words.map((word, at) => [word.trim(), percent(this.total[at] / size), this.total[at]]).filter(([word, , weight]) => word && weight);
    this.shares.replaceChildren(el("details", {}, el("summary", {}, "Words as a table"),
      table("Each word's share in the shown rows' scores", ["word", "share", "score"], rows)));
  }

  // Tints the answer and all rows: for everything, for one word of the answer, or for one word of a row.
  paint() {
    const { word } = this;
    const weights = word?.row ? this.words.map((_, q) => pair(this.why.get(word.row), q, word.at)) : this.total;
    const learned = (at) => this.total[at] !== 0;
    const side = (start, end) => el("bdi", {}, tinted(this.words.slice(start, end), weights.slice(start, end),
      { learned: (at) => learned(start + at), label: "answers", click: (at) => this.choose(null, start + at), from: start, whole: weights }));
    const other = this.first < this.words.length ? [el("br"), el("span", { cls: "soft" }, "rather than"), el("br"), side(this.first)] : [];
    this.answer.replaceChildren(side(0, this.first), ...other);
    if (word && !word.row) press(this.answer, word.at);
    const order = [];
    for (const [id, { passage, card }] of this.cards) {
      const row = this.why.get(id);
      if (!row) continue;
      const own = word && !word.row ? row.words.map((_, r) => pair(row, word.at, r)) : row.weights;
      const [start, end] = word && !word.row ? around(own, row.passage[1] - row.passage[0]) : row.passage;
      const cut = row.words.slice(start, end);
      const shown = tinted(cut, own.slice(start, end),
        { click: (at) => this.choose(id, start + at), learned: (at) => row.weights[start + at] !== 0, from: start });
      passage.replaceChildren(start ? "… " : "", el("bdi", {}, shown), end < row.words.length ? " …" : "");
      if (word?.row === id) press(passage, word.at);
      order.push({ card, strength: word && !word.row ? Math.abs(row.answer_weights[word.at]) : 0 });
    }
    if (word && !word.row) order.sort((a, b) => b.strength - a.strength);
    for (const { card } of order) card.parentElement.append(card);
  }

  choose(row, at) {
    const same = this.word && this.word.row === row && this.word.at === at;
    this.word = same ? null : { row, at };
    this.paint();
    const chosen = same ? null : row ? this.why.get(row).words[at].trim() : this.words[at].trim();
    this.hint.replaceChildren(...(chosen ? [row ? "Tinted: what " : "Rows by what they add to ", el("strong", {}, chosen), row ? " answers. " : ". ",
      el("button", { type: "button", cls: "link", onclick: () => this.choose(row, at) }, "Show everything")] : ["Everything is shown."]));
    const holder = row ? this.cards.get(row).passage : this.answer;
    const again = holder.querySelector(`.word[aria-pressed="true"]`) ?? holder.querySelector(".word");
    for (const place of [this.answer, ...[...this.cards.values()].map((card) => card.passage)]) {
      const first = place.querySelector(".word");
      if (first) first.tabIndex = 0;
    }
    again?.focus();
    say(chosen ? `Rows for ${chosen}.` : "Everything is shown.");
  }

  // Rankings that know nothing of what is asked, beside the list: where one explains it, the list may say nothing.
  async control() {
    this.controls.replaceChildren(el("p", { cls: "soft" }, "Ranking by length and by words alone …"));
    try {
      const { sentence, note, of } = await post("/api/controls", this.asked);
      const lines = of.map((one) => [one.what, one.shared, one.correlation ?? "", one.explains ? "yes" : "no"]);
      this.controls.replaceChildren(el("p", {}, sentence), note ? el("p", { cls: "soft" }, note) : "",
        el("details", {}, el("summary", {}, "Controls as a table"),
          table("Rankings that know nothing of the question", ["control", "of the ten best rows", "rank correlation", "explains them"], lines)));
      say(sentence);
    } catch (error) {
      this.controls.replaceChildren(problem(error));
    }
  }

  // What all rows of a source add up to, beyond the best ones that are shown.
  async sum(by) {
    this.sums.replaceChildren(el("p", { cls: "soft" }, "Adding up all rows …"));
    try {
      const { groups } = await post("/api/groups", { ...this.asked, group_by: by });
      const band = (group) => group.low === null ? "" : `${number(group.low)} to ${number(group.high)}`;
      this.sums.replaceChildren(table(`Sums of the scores of all rows, by ${by}, with 95 % intervals`, [by, "rows", "sum", "95 % interval", "best row"],
        groups.map((group) => [String(group.name ?? "without one"), group.rows, group.total, band(group), group.best])));
      say("Summed up.");
    } catch (error) {
      this.sums.replaceChildren(problem(error));
    }
  }

  // ---- leaving out

  leaveOut(hit) {
    const { unit, note, examples } = hit.run;
    if (!unit || note) return el("p", { cls: "soft" }, `Cannot be left out: ${note}.`);
    const box = el("input", { type: "checkbox", checked: true, "data-unit": unit, onchange: () => {
      if (box.checked) this.left.delete(unit);
      else this.left.set(unit, examples);
      this.showBasket();
    } });
    const named = unit === hit.id ? "in the training data" : ["in the training data with its unit ", el("bdi", {}, shorten(unit, 40)), ` (${examples} ${examples === 1 ? "example" : "examples"})`];
    return el("label", { cls: "tick" }, box, " ", named);
  }

  showBasket() {
    if (!this.run) return;
    if (this.run.problem) {
      this.basket.replaceChildren(el("h2", {}, "Without them?"), el("p", {}, this.run.problem));
      return;
    }
    const able = new Map(this.found.up.filter((hit) => hit.run.unit && !hit.run.note).map((hit) => [hit.run.unit, hit.run.examples]));
    for (const box of document.querySelectorAll("[data-unit]")) box.checked = !this.left.has(box.dataset.unit);
    const names = [...this.left.keys()];
    const examples = [...this.left.values()].reduce((sum, n) => sum + n, 0);
    const predict = () => showPrediction(this.prediction, questionOf(this.asked), [names]);
    this.basket.replaceChildren(el("h2", {}, "Without them?"),
      names.length
        ? el("p", {}, "Left out: ", el("strong", {}, el("bdi", {}, names.slice(0, 6).map((name) => shorten(name, 40)).join(", "))),
          names.length > 6 ? ` and ${names.length - 6} more` : "", ` (${examples} ${examples === 1 ? "example" : "examples"}).`)
        : el("p", { cls: "soft" }, able.size ? "Untick rows to leave them out of the training." : "The run was trained on none of the rows that push it up: see What if for its own units."),
      el("div", { cls: "tools" },
        names.length ? el("button", { type: "button", cls: "primary", onclick: predict }, "Predict") : null,
        able.size ? el("button", { type: "button", onclick: () => { this.left = new Map(able); this.showBasket(); } }, `Without these ${this.found.up.length}`) : null,
        names.length ? el("button", { type: "button", onclick: () => { this.left.clear(); this.showBasket(); this.prediction.replaceChildren(); } }, "Put back") : null));
  }

  // ---- a row in full, and taking results along

  async open(hit) {
    const row = await get("/api/row", { id: hit.id }).catch((error) => ({ problem: error }));
    if (row.problem) return openDialog(hit.id, problem(row.problem));
    const why = this.why.get(hit.id);
    const whole = why && why.words.join("") === row.text ? tinted(why.words, why.weights) : [row.text];
    const facts = [["unit", row.unit], ...Object.entries(row.fields)];
    if (row.run) facts.push(["in the run", row.run.unit ? `unit ${row.run.unit}` : row.run.note]);
    openDialog(hit.id, el("p", { cls: "passage full" }, el("bdi", {}, whole)), table("Fields", ["field", "value"], facts),
      why ? el("details", {}, el("summary", {}, "Strongest pairs of words"), table("Pairs of words", ["answer", "row", "adds"],
        why.pairs.slice(0, 15).map(([q, r, value]) => [this.words[q].trim(), why.words[r].trim(), value]))) : "",
      el("details", {}, el("summary", {}, "As it came"), el("pre", {}, JSON.stringify(row.row, null, 2))));
  }

  table() {
    const line = (hit) => [hit.id, hit.share < 0 ? "down" : "up", percent(Math.abs(hit.share)), hit.score, shorten(hit.text, 60), hit.run ? hit.run.unit ?? hit.run.note : ""];
    return table("Rows", ["row", "pushes", "share", "score", "text", "in the run"], this.hits().map(line));
  }

  json() {
    return JSON.stringify({ question: questionOf(this.asked), ...this.found, words: this.words, explained: [...this.why.values()] }, null, 1);
  }

  save() {
    const names = [...new Set(this.hits().flatMap((hit) => Object.keys(hit.fields)))];
    const head = ["direction", "rank", "id", "score", "share", "unit of the run", "text", ...names];
    const lines = this.hits().map((hit) => [hit.score < 0 ? "down" : "up", hit.rank, hit.id, hit.score, hit.share, hit.run?.unit, hit.text, ...names.map((name) => hit.fields[name])]);
    download("leaveout.csv", csv([head, ...lines]), "text/csv");
  }
}

function pair(row, q, r) {
  row.map ??= new Map(row.pairs.map(([a, b, value]) => [`${a} ${b}`, value]));
  return row.map.get(`${q} ${r}`) ?? 0;
}

// The stretch of so many words around the strongest.
function around(weights, width) {
  const best = weights.reduce((top, weight, at) => Math.abs(weight) > Math.abs(weights[top]) ? at : top, 0);
  const start = Math.max(0, Math.min(weights.length - width, best - Math.floor(width / 2)));
  return [start, start + width];
}
