"use strict";
// The page's figures are sums over the rows of the ledger that are chosen: by phase, by module. A
// row stands for identical operations; `lines` are those that asked for it, innermost first.

const ledger = JSON.parse(document.getElementById("ledger").textContent);
const rows = ledger.rows.map(row => {
  const [first, count, phase, stack, ...rest] = row;
  const [module, kind, owner, name, inputs, inputTypes, outputs, outputTypes] =
    rest.slice(0, 8).map(number => ledger.texts[number]);
  const [flops, bytes, kept, seconds, relative, largest] = rest.slice(8);
  return {
    first, count, phase, module, kind, owner, name, inputs, inputTypes, outputs, outputTypes,
    flops: flops * count, bytes: bytes * count, kept: kept * count, seconds, relative, largest,
    lines: ledger.stacks[stack],
  };
});
const METRICS = ["flops", "bytes", "kept"];
const SHOWN = 60; // operations of a line, before "show all"
const KINDS_SHOWN = 12;
const step = sum(rows);
const TOLD = METRICS.filter(metric => step[metric] > 0); // a forward pass keeps nothing
const state = {phase: null, module: null, kind: null, alone: false, query: "", allKinds: false};

// Sums and numbers.

function sum(some) {
  const total = {calls: 0, flops: 0, bytes: 0, kept: 0, seconds: 0};
  for (const row of some) add(total, row);
  return total;
}

function add(total, row) {
  total.calls += row.count;
  for (const metric of [...METRICS, "seconds"]) total[metric] += row[metric] ?? 0;
}

function sumsBy(some, keysOf) {
  const sums = new Map();
  for (const row of some) {
    for (const key of keysOf(row)) {
      if (!sums.has(key)) sums.set(key, {...sum([]), rows: []});
      add(sums.get(key), row);
      sums.get(key).rows.push(row);
    }
  }
  return sums;
}

const grouped = text => text.replace(/\B(?=(\d{3})+(?!\d))/g, ",");

function fixed(value, digits) {
  const [whole, fraction] = value.toFixed(digits).split(".");
  return grouped(whole) + (fraction ? "." + fraction : "");
}

function inColumn(value, [divisor]) { // one unit for the whole column
  if (!value) return "";
  return value / divisor < 0.0005 ? "<0.001" : fixed(value / divisor, 3);
}

function percent(value, whole) {
  if (!value) return "";
  const share = 100 * value / whole;
  return share < 0.05 ? "<0.1" : share.toFixed(1);
}

function short(value, name) { // in the unit that suits it
  if (!value) return "";
  const prefixes = ["", "k", "M", "G", "T", "P"];
  const power = Math.min(Math.floor(Math.log10(value) / 3), prefixes.length - 1);
  const scaled = value / 1000 ** power;
  return `${power ? scaled.toPrecision(scaled < 999.5 ? 3 : 4) : scaled}\u00a0${prefixes[power]}${name}`;
}

const scientific = value => typeof value === "number" ? value.toExponential(1) : value ?? "";

// Elements.

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "share") made.style.setProperty("--share", value);
    else if (value !== undefined && value !== null) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const byId = id => document.getElementById(id);

const heading = metric => (metric === "kept" ? "kept " : "") + ledger.units[metric][1];

function breakable(text) { // a path may go on in the next line after a point
  return text.split(/(?<=[._])/).flatMap(part => [part, element("wbr")]);
}

// What is chosen.

const inModule = (row, module) =>
  row.module === module || (module !== "" && row.module.startsWith(module + "."));
const inPhase = row => state.phase === null || row.phase === state.phase;
const inPlace = row => (state.module === null || inModule(row, state.module))
  && (state.kind === null || row.kind === state.kind);
const chosenLines = row => state.alone ? row.lines.slice(0, 1) : new Set(row.lines);

// Where it goes.

function picture(box, title, sums, nameOf) {
  const largest = Object.fromEntries(TOLD.map(metric =>
    [metric, Math.max(1, ...[...sums.values()].map(total => total[metric]))]));
  const heads = TOLD.map(metric =>
    element("th", {scope: "col"}, heading(metric)));
  const body = element("tbody");
  for (const [key, total] of sums) {
    const cells = TOLD.map(metric => element("td", {},
      inColumn(total[metric], ledger.units[metric]) || "–",
      element("small", {}, total[metric] ? ` ${percent(total[metric], step[metric])}%` : ""),
      element("span", {class: `bar ${metric}`, share: total[metric] / largest[metric]})));
    body.append(element("tr", {}, element("th", {scope: "row"}, nameOf(key)), ...cells));
  }
  const head = element("thead", {}, element("tr", {}, element("th", {scope: "col"}, title), ...heads));
  box.replaceChildren(element("table", {}, head, body));
}

function chooser(text, pressed, choose) {
  const button = element("button", {type: "button", "aria-pressed": pressed}, ...breakable(text));
  button.addEventListener("click", () => {
    const box = button.closest(".picture");
    choose();
    const again = [...box.querySelectorAll("button")].find(other => other.textContent === text);
    if (again) again.focus();
  });
  return button;
}

function showPictures() {
  const phases = sumsBy(rows.filter(inPlace), row => [row.phase]);
  const ordered = new Map([...phases].sort(([a], [b]) => a - b));
  picture(byId("by-phase"), "phase", ordered, phase => chooser(
    ledger.phases[phase], state.phase === phase,
    () => choose({phase: state.phase === phase ? null : phase})));
  const kinds = [...sumsBy(rows.filter(inPhase), row => [row.kind])];
  const weight = ([, total]) => Math.max(...TOLD.map(metric => total[metric] / (step[metric] || 1)));
  kinds.sort((a, b) => weight(b) - weight(a));
  const shown = kinds.slice(0, state.allKinds ? kinds.length : KINDS_SHOWN);
  picture(byId("by-kind"), "kind of module", new Map(shown), kind => chooser(
    kind, state.kind === kind,
    () => choose({kind: state.kind === kind ? null : kind, module: null})));
  if (kinds.length > KINDS_SHOWN) {
    const text = state.allKinds ? "fewer" : `all ${kinds.length} kinds`;
    const more = chooser(text, undefined, () => choose({allKinds: !state.allKinds}));
    more.removeAttribute("aria-pressed");
    byId("by-kind").append(element("div", {class: "more"}, more));
  }
}

function showSummary() {
  const facts = [
    ["operations", grouped(String(step.calls))],
    ["of matrix products", short(step.flops, "FLOP") || "0 FLOP"],
    ["read and written", short(step.bytes, "B") || "0 B"],
    ["kept for backward", short(step.kept, "B") || "0 B"],
  ];
  if (ledger.timed) facts.push(["in operations", `${fixed(1000 * step.seconds, 0)} ms`]);
  byId("summary").replaceChildren(...facts.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

function showWorst() {
  if (!ledger.worst.length) return;
  byId("worst").hidden = false;
  byId("worst").querySelector("tbody").replaceChildren(...ledger.worst.map(each => element("tr", {},
    element("td", {}, element("a", {href: "#" + each.line}, each.line)),
    element("td", {}, `${each.name}, ${each.phase}`),
    element("td", {}, each.shapes),
    element("td", {class: "figure"}, scientific(each.relative)),
    element("td", {class: "figure"}, scientific(each.largest)))));
}

// The source: each line that ran has cells for its figures.

const COLUMNS = [
  {label: "calls", width: "3.5rem", class: "calls", unit: "calls", text: total => grouped(String(total.calls))},
  ...TOLD.flatMap(metric => [
    {label: heading(metric), width: "3.75rem", class: metric,
      unit: ledger.units[metric][1] + (metric === "kept" ? " kept" : ""),
      text: total => inColumn(total[metric], ledger.units[metric])},
    ...(metric === "kept" ? [] : [{label: "%", width: "3.1rem", class: `share ${metric}`, unit: "%",
      text: total => percent(total[metric], step[metric]),
      share: total => total[metric] / (step[metric] || 1)}]),
  ]),
  ...(ledger.timed ? [{label: "ms", width: "4.2rem", class: "time", unit: "ms",
    text: total => total.seconds ? fixed(1000 * total.seconds, 2) : ""}] : []),
];
const places = new Map(); // "train.py:145" -> its row, button, cells, hint
const sourceRows = [];

function prepareFile(section) {
  const table = section.querySelector("table");
  const heads = COLUMNS.map(column => element("th", {scope: "col", role: "columnheader"}, column.label));
  const title = section.querySelector("h3");
  const name = element("th", {scope: "col", role: "columnheader"}, title);
  const number = element("th", {scope: "col", role: "columnheader"}, "line");
  table.prepend(element("thead", {role: "rowgroup"}, element("tr", {role: "row"}, number, ...heads, name)));
  const widths = element("colgroup", {}, ...["2.4rem", ...COLUMNS.map(column => column.width), ""].map(width => {
    const column = element("col");
    column.style.width = width;
    return column;
  }));
  table.prepend(widths);
  for (const row of table.tBodies[0].rows) prepareLine(row);
}

function prepareLine(row) {
  const source = row.querySelector(".source");
  const code = source.firstElementChild;
  const text = code.textContent;
  code.style.setProperty("--hang", `${text.length - text.trimStart().length + 2}ch`);
  sourceRows.push({row, code, text: text.toLowerCase()});
  if (!row.id) {
    source.before(element("td", {role: "cell", class: "gap", colspan: COLUMNS.length}));
    return;
  }
  const cells = COLUMNS.map(column =>
    element("td", {role: "cell", class: column.class, "data-unit": column.unit}));
  source.before(...cells);
  const hint = element("span", {class: "hint"});
  source.append(element("div", {class: "with"}, code, hint));
  const button = row.querySelector("button");
  places.set(row.id, {row, button, cells, hint, total: null, details: null});
  row.addEventListener("click", event => {
    if (event.target.closest("a") || String(getSelection())) return;
    current(row.id);
    toggle(row.id);
  });
}

function showLines() {
  const sums = sumsBy(rows.filter(row => inPhase(row) && inPlace(row)), chosenLines);
  for (const [place, line] of places) {
    const total = line.total = sums.get(place) ?? null;
    line.row.classList.toggle("quiet", total === null);
    line.button.disabled = total === null;
    COLUMNS.forEach((column, i) => {
      line.cells[i].textContent = total ? column.text(total) : "";
      if (column.share) line.cells[i].style.setProperty("--share", total ? column.share(total) : 0);
    });
    line.hint.textContent = total ? heaviest(total.rows) : "";
    line.hint.title = line.hint.textContent;
    line.button.setAttribute("aria-label", `line ${place.split(":")[1]}: ` + (total
      ? `${total.calls} calls, ${short(total.flops, "FLOP") || "no FLOPs"}, ${short(total.bytes, "B") || "0 B"}`
      : "nothing in this choice"));
    if (line.details) total ? fillDetails(place) : close(place);
  }
  if (!places.get(currentPlace)?.total) current([...places.keys()].find(place => places.get(place).total));
}

function heaviest(some) {
  const weight = row => Math.max(row.flops / (step.flops || 1), row.bytes / (step.bytes || 1));
  const row = some.reduce((a, b) => weight(b) > weight(a) ? b : a);
  return `${row.name.split(".")[0]} ${row.inputs} → ${row.outputs}`;
}

function showFiles() {
  const sums = sumsBy(rows.filter(row => inPhase(row) && inPlace(row)),
    row => row.lines.slice(0, 1).map(line => line.split(":")[0]));
  byId("files").replaceChildren(...[...document.querySelectorAll(".file")].map(section => {
    const name = section.dataset.file, total = sums.get(name) ?? sum([]);
    return element("li", {},
      element("a", {href: "#file:" + name}, name.replace("minibert/", "")),
      element("span", {}, percent(total.flops, step.flops)),
      element("span", {}, percent(total.bytes, step.bytes)));
  }));
}

// A line's operations.

function toggle(place) {
  const line = places.get(place);
  if (line.details) close(place);
  else if (line.total) {
    line.button.setAttribute("aria-expanded", "true");
    line.details = element("tr", {class: "details", role: "row"},
      element("td", {class: "inside", role: "cell", colspan: COLUMNS.length + 2}));
    line.row.after(line.details);
    fillDetails(place);
  }
}

function close(place) {
  const line = places.get(place);
  line.details?.remove();
  line.details = null;
  line.button.setAttribute("aria-expanded", "false");
}

function fillDetails(place, all = false) {
  const line = places.get(place);
  const merged = merge(line.total.rows, place);
  const shown = all ? merged : merged.slice(0, SHOWN);
  const timed = ledger.timed, precise = ledger.precision;
  const heads = ["calls", "operation", "tensors in → out", "where", "FLOPs", "bytes", "kept",
    ...(timed ? ["ms"] : []), ...(precise ? ["relative error"] : [])];
  const body = element("tbody");
  let phase = null;
  for (const row of shown) {
    if (row.phase !== phase) {
      phase = row.phase;
      body.append(element("tr", {class: "phase"}, element("th", {colspan: heads.length, scope: "rowgroup"}, ledger.phases[phase])));
    }
    body.append(operationRow(row, place, timed, precise));
  }
  const head = element("thead", {}, element("tr", {}, ...heads.map((text, i) =>
    element("th", {scope: "col", class: i === 0 || i > 3 ? "figure" : undefined}, text))));
  const inside = line.details.firstElementChild;
  inside.replaceChildren(element("table", {"aria-label": `Operations of ${place}`}, head, body));
  if (shown.length < merged.length) {
    const more = element("button", {type: "button"}, `show all ${merged.length} rows`);
    more.addEventListener("click", () => fillDetails(place, true));
    inside.append(more);
  }
}

function operationRow(row, place, timed, precise) {
  const types = row.inputTypes === row.outputTypes || !row.outputTypes
    ? row.inputTypes : `${row.inputTypes || "–"} → ${row.outputTypes}`;
  const owner = row.owner ? element("span", {class: "soft"}, ` in ${row.owner}`) : "";
  const where = element("td", {class: "broad"}, collapse(row.modules));
  if (row.line !== place && row.line) {
    where.append(where.textContent ? ", " : "", element("a", {href: "#" + row.line}, row.line.replace("minibert/", "")));
  }
  const cells = [short(row.flops, "FLOP"), short(row.bytes, "B"), short(row.kept, "B")];
  if (timed) cells.push(row.seconds ? fixed(1000 * row.seconds, 3) : "");
  if (precise) cells.push(scientific(row.relative));
  return element("tr", {class: row.bytes || row.flops ? undefined : "free"},
    element("td", {class: "figure"}, `×${grouped(String(row.count))}`),
    element("td", {}, row.name, owner),
    element("td", {class: "broad"}, `${row.inputs || "–"} → ${row.outputs || "–"} `, element("span", {class: "soft"}, types)),
    where,
    ...cells.map(text => element("td", {class: "figure"}, text)));
}

function merge(some, place) { // what differs in module or caller alone becomes one row
  const merged = new Map();
  for (const row of some) {
    const line = row.lines[0];
    const each = METRICS.map(metric => row[metric] / row.count);
    const key = JSON.stringify([row.phase, row.owner, row.name, row.inputs, row.inputTypes, row.outputs,
      row.outputTypes, line, each]);
    const known = merged.get(key);
    if (!known) {
      merged.set(key, {...row, line, modules: new Set([row.module])});
      continue;
    }
    add(Object.assign(known, {calls: 0}), row);
    known.count += row.count;
    known.modules.add(row.module);
    known.relative = worse(known.relative, row.relative);
  }
  return [...merged.values()].sort((a, b) => a.phase - b.phase || a.first - b.first);
}

function worse(a, b) {
  if (a === "infinite" || b === "infinite") return "infinite";
  return a === null ? b : b === null ? a : Math.max(a, b);
}

function collapse(modules) { // student.layers.0.query, .1.query, .2.query -> student.layers.0–2.query
  const patterns = new Map();
  for (const module of modules) {
    const number = /\.(\d+)(?=\.|$)/.exec(module);
    const pattern = number ? module.replace(number[0], ".*") : module;
    if (!patterns.has(pattern)) patterns.set(pattern, []);
    if (number) patterns.get(pattern).push(Number(number[1]));
  }
  return [...patterns].map(([pattern, numbers]) => pattern.replace("*", ranges(numbers))).filter(Boolean).join(", ");
}

function ranges(numbers) {
  const parts = [];
  for (const number of [...numbers].sort((a, b) => a - b)) {
    const last = parts.at(-1);
    if (last && number === last[1] + 1) last[1] = number;
    else parts.push([number, number]);
  }
  return parts.map(([a, b]) => a === b ? a : `${a}–${b}`).join(",");
}

// Modules, as a tree.

const treeItems = new Map(); // path, null for everything -> its element

function buildTree() {
  const tree = byId("tree");
  tree.append(treeItem(null, "everything", 0));
  const modules = [...new Set(rows.map(row => row.module))].filter(Boolean);
  const paths = new Set(modules.flatMap(module => module.split(".").map((_, i, all) => all.slice(0, i + 1).join("."))));
  const naturally = new Intl.Collator("en", {numeric: true}).compare;
  for (const path of [...paths].sort(naturally)) {
    const parts = path.split(".");
    const parent = treeItems.get(parts.slice(0, -1).join(".")) ?? null;
    const item = treeItem(path, parts.at(-1), parts.length - 1);
    if (!parent) {
      tree.append(item);
      continue;
    }
    if (!parent.querySelector("ul")) {
      parent.append(element("ul", {role: "group"}));
      parent.setAttribute("aria-expanded", parts.length === 2);
    }
    parent.querySelector("ul").append(item);
  }
  if (rows.some(row => row.module === "")) tree.append(treeItem("", "no module", 0));
  treeItems.get(null).tabIndex = 0;
}

function treeItem(path, label, depth) {
  const leaf = element("div", {class: "leaf"}, element("span", {}, element("span", {class: "twist"}), label),
    element("span"), element("span"));
  leaf.style.setProperty("--depth", depth);
  const item = element("li", {role: "treeitem", tabindex: -1, "aria-selected": false, "aria-label": label}, leaf);
  leaf.addEventListener("click", event => {
    focusItem(item);
    if (event.target.classList.contains("twist") && item.hasAttribute("aria-expanded")) {
      expand(item, item.getAttribute("aria-expanded") === "false");
    } else chooseModule(path);
  });
  item.path = path;
  treeItems.set(path, item);
  return item;
}

const expand = (item, open) => item.setAttribute("aria-expanded", open);
const chooseModule = path => choose({module: state.module === path ? null : path, kind: null});

function focusItem(item) {
  for (const other of treeItems.values()) other.tabIndex = -1;
  item.tabIndex = 0;
  item.focus();
}

function showTree() {
  const sums = sumsBy(rows.filter(inPhase), row => row.module === "" ? [null, ""]
    : [null, ...row.module.split(".").map((_, i, all) => all.slice(0, i + 1).join("."))]);
  for (const [path, item] of treeItems) {
    const total = sums.get(path) ?? sum([]);
    const [, flops, bytes] = item.querySelector(".leaf").children;
    flops.textContent = percent(total.flops, step.flops);
    bytes.textContent = percent(total.bytes, step.bytes);
    item.setAttribute("aria-selected", path === state.module && state.kind === null);
  }
}

function onTreeKey(event) {
  const item = event.target.closest('[role="treeitem"]');
  if (!item) return;
  const visible = [...treeItems.values()].filter(other => other.offsetParent);
  visible.sort((a, b) => a.compareDocumentPosition(b) & Node.DOCUMENT_POSITION_FOLLOWING ? -1 : 1);
  const at = visible.indexOf(item), open = item.getAttribute("aria-expanded");
  const parent = item.parentElement.closest('[role="treeitem"]');
  const actions = {
    ArrowDown: () => focusItem(visible[Math.min(at + 1, visible.length - 1)]),
    ArrowUp: () => focusItem(visible[Math.max(at - 1, 0)]),
    Home: () => focusItem(visible[0]),
    End: () => focusItem(visible.at(-1)),
    ArrowRight: () => open === "false" ? expand(item, true) : open && focusItem(visible[at + 1]),
    ArrowLeft: () => open === "true" ? expand(item, false) : parent && focusItem(parent),
    Enter: () => chooseModule(item.path),
    " ": () => chooseModule(item.path),
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  event.stopPropagation();
  actions[event.key]();
}

// Search: in the text of all lines, and in the operations and modules of those that ran.

let matches = [], matchAt = -1;
const spoken = new Map(); // place -> names of its own operations and modules
for (const row of rows) {
  const [line] = row.lines;
  if (!spoken.has(line)) spoken.set(line, new Set());
  spoken.get(line).add(row.name.toLowerCase()).add(row.module.toLowerCase()).add(row.owner.toLowerCase());
}

function search() {
  const query = state.query.trim().toLowerCase();
  const found = [];
  matches = [];
  matchAt = -1;
  for (const line of sourceRows) {
    const inText = query !== "" && line.text.includes(query);
    const inNames = query !== "" && [...(spoken.get(line.row.id) ?? [])].some(name => name.includes(query));
    line.row.classList.toggle("match", inText || inNames);
    if (inText || inNames) matches.push(line);
    if (inText) found.push(...textRanges(line.code, query));
  }
  if (globalThis.Highlight && CSS.highlights) CSS.highlights.set("found", new Highlight(...found));
}

function textRanges(code, query) {
  const nodes = [], walker = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) nodes.push(walker.currentNode);
  const point = offset => {
    for (const node of nodes) {
      if (offset <= node.length) return [node, offset];
      offset -= node.length;
    }
  };
  const made = [], text = code.textContent.toLowerCase();
  for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + query.length)) {
    const range = new Range();
    range.setStart(...point(at));
    range.setEnd(...point(at + query.length));
    made.push(range);
  }
  return made;
}

function nextMatch(by) {
  if (!matches.length) return;
  matchAt = (matchAt + by + matches.length) % matches.length;
  const {row} = matches[matchAt];
  row.scrollIntoView({block: "center"});
  if (places.get(row.id)?.total) current(row.id);
  showStatus();
}

// What there is to do.

let currentPlace = null; // the one line that Tab reaches

function current(place, focus = false) {
  const before = places.get(currentPlace);
  if (before) before.button.tabIndex = -1;
  currentPlace = place;
  const line = places.get(place);
  if (!line) return;
  line.button.tabIndex = 0;
  if (focus) line.button.focus();
}

function onLineKey(event) {
  const place = event.target.closest(".ran")?.id;
  if (!place || !event.target.matches(".ran button")) return;
  const awake = [...places.keys()].filter(other => places.get(other).total);
  const at = awake.indexOf(place);
  const goal = {ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: awake.length - 1}[event.key];
  if (goal === undefined) return;
  event.preventDefault();
  if (awake[goal]) current(awake[goal], true);
}

function choose(change) {
  Object.assign(state, change);
  showAll();
}

function showStatus() {
  const parts = [];
  const query = state.query.trim();
  if (query) {
    const count = matches.length === 1 ? "1 line" : `${grouped(String(matches.length))} lines`;
    const at = matchAt >= 0 ? `${matchAt + 1} of ` : "";
    byId("status").textContent = matches.length ? `${at}${count} with “${query}”` : `no line with “${query}”`;
    return;
  }
  if (state.phase !== null || state.module !== null || state.kind !== null) {
    const chosen = sum(rows.filter(row => inPhase(row) && inPlace(row)));
    parts.push(`${grouped(String(chosen.calls))} of ${grouped(String(step.calls))} operations, `
      + `${percent(chosen.flops, step.flops) || "0"}% of the FLOPs, ${percent(chosen.bytes, step.bytes) || "0"}% of the bytes`);
  }
  const lines = [...places.values()].filter(line => line.total).length;
  parts.push(parts.length ? `on ${lines} lines` : `${grouped(String(step.calls))} operations on ${lines} lines`);
  byId("status").textContent = parts.join(", ");
}

function showAll() {
  const place = state.kind ?? (state.module === "" ? "no module" : state.module);
  byId("unfilter").hidden = place === null;
  byId("unfilter").textContent = `${place} ×`;
  byId("unfilter").setAttribute("aria-label", `no longer only ${place}`);
  for (const input of document.querySelectorAll("#phases input")) {
    input.checked = input.value === String(state.phase ?? "all");
    if (input.checked) byId("phases").scrollLeft = input.parentElement.offsetLeft - 60; // on a phone
  }
  showPictures();
  showTree();
  showFiles();
  showLines();
  showStatus();
  document.documentElement.style.setProperty("--bar-height", `${byId("controls").offsetHeight}px`);
}

function buildPhases() {
  const all = [["all", "all"], ...ledger.phases.map((name, i) => [String(i), name])];
  byId("phases").append(...all.map(([value, name]) => element("label", {},
    element("input", {type: "radio", name: "phase", value}), element("span", {}, name))));
  byId("phases").hidden = ledger.phases.length < 2;
}

function goToHash() {
  const place = decodeURIComponent(location.hash.slice(1));
  const line = places.get(place);
  if (!line) return;
  if (!line.total) choose({phase: null, module: null, kind: null});
  if (!line.details) toggle(place);
  current(place, true);
  line.row.scrollIntoView({block: "center"});
}

function onKey(event) {
  const typing = event.target.matches("input[type=search]");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    byId("search").focus();
    byId("search").select();
  } else if (event.key === "Enter" && typing) {
    event.preventDefault();
    nextMatch(event.shiftKey ? -1 : 1);
  } else if (event.key === "Escape") onEscape(event, typing);
}

function onEscape(event, typing) { // the nearest thing that is open
  const place = event.target.closest(".ran")?.id ?? event.target.closest(".details")?.previousElementSibling.id;
  if (typing) {
    event.preventDefault();
    byId("search").value = "";
    setQuery("");
    current(currentPlace, true);
  } else if (place && places.get(place).details) {
    close(place);
    current(place, true);
  } else if (state.module !== null || state.kind !== null) choose({module: null, kind: null});
  else if (state.phase !== null) choose({phase: null});
}

function setQuery(query) {
  state.query = query;
  search();
  showStatus();
}

buildPhases();
buildTree();
document.querySelectorAll(".file").forEach(prepareFile);
showSummary();
showWorst();
showAll();
byId("phases").addEventListener("change", event =>
  choose({phase: event.target.value === "all" ? null : Number(event.target.value)}));
byId("counts").addEventListener("change", event => choose({alone: event.target.value === "own"}));
byId("search").addEventListener("input", event => setQuery(event.target.value));
byId("unfilter").addEventListener("click", () => {
  choose({module: null, kind: null});
  byId("search").focus();
});
byId("controls").addEventListener("submit", event => event.preventDefault());
byId("tree").addEventListener("keydown", onTreeKey);
byId("source").addEventListener("keydown", onLineKey);
document.addEventListener("keydown", onKey);
addEventListener("hashchange", goToHash);
addEventListener("load", () => setTimeout(goToHash)); // after the browser's own move to the place
if (matchMedia("(max-width: 1180px)").matches) byId("modules").open = false;
