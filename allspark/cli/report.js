"use strict";
// Draws the page from its JSON. Names and texts are untrusted: only textContent and attributes receive them.
const report = JSON.parse(document.getElementById("data").textContent);
const runColor = (index) => `var(--run${index % 8})`;
const runDash = (index) => (index < 8 ? "none" : "6 3");
const percent = (value, digits = 1) => (value === null || Number.isNaN(value) ? "\u2013" : value.toFixed(digits));
const byId = (id) => document.getElementById(id);

function make(tag, options = {}, ...children) {
  return fill(document.createElement(tag), options, children);
}

function draw(tag, options = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), options, children);
}

function fill(element, options, children) {
  for (const [key, value] of Object.entries(options)) {
    if (key === "style") Object.assign(element.style, value);
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

const swatch = (color) => make("span", { class: "swatch", "aria-hidden": "true", style: { background: color } });
const runKey = (index) => make("span", {
  class: "key", "aria-hidden": "true",
  style: { borderTopColor: runColor(index), borderTopStyle: index < 8 ? "solid" : "dashed" },
});
const scrolling = (label, child) => make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, child);

function choice(label, selected, changed, extra = []) {
  const options = report.runs.map((run, index) => make("option", { value: index }, run.name)).concat(extra);
  const select = make("select", { onchange: changed }, ...options);
  select.value = selected;
  return [make("label", {}, `${label} `, select), select];
}

// Runs: a table of their settings and results, and the differences between their recipes

function drawRuns() {
  const names = report.runs.map((run) => run.name);
  document.title = `Report: ${names.join(", ")}`;
  byId("title").textContent = `${report.dataset}: ${names.length > 3 ? `${names.length} runs` : names.join(" \u00b7 ")}`;
  byId("made").textContent = `created ${report.made} by allspark report; scores in percent, on val`;
  if (report.notes.length) byId("notes").append(...report.notes.map((note) => make("li", {}, note)));
  else byId("notes").remove();
  const heads = report.runs.map((run, index) => make("th", { scope: "col" }, runKey(index), run.name));
  const rows = Object.keys(report.runs[0].facts).map((fact) => [fact, report.runs.map((run) => run.facts[fact])]);
  byId("runs").append(scrolling("runs", factTable(heads, rows)));
  if (report.runs.length < 2) return;
  byId("runs").append(make("h3", {}, "Differences between the recipes"));
  const differing = report.differences;
  byId("runs").append(differing.length ? scrolling("differences", factTable(heads.map((head) => head.cloneNode(true)), differing))
    : make("p", {}, "None that may change a result."));
}

function factTable(heads, rows) {
  const body = rows.map(([head, cells]) =>
    make("tr", {}, make("th", { scope: "row" }, head), ...cells.map((cell) => make("td", {}, cell))));
  return make("table", { class: "facts" },
    make("thead", {}, make("tr", {}, make("td"), ...heads)), make("tbody", {}, ...body));
}

// Curves: a panel per logged number, a line per run

const TITLES = {
  miou: "val mIoU (%)", lr: "learning rate", loss: "loss", images_per_s: "training images per second",
  pseudo_accuracy: "pseudo-labels: accuracy (%)", pseudo_coverage: "pseudo-labels: coverage (%)",
  pseudo_miou: "pseudo-labels: mIoU (%)", mask_ratio: "share of pixels in the unlabeled loss (mask_ratio)",
};
const BOX = { width: 420, height: 220, left: 52, right: 10, top: 10, bottom: 26 };

function drawCurves() {
  const rank = (key) => ["miou", "loss"].indexOf(key) + 1 || (key.startsWith("loss") ? 3 : key === "lr" ? 4 : key.startsWith("pseudo") ? 5 : 6);
  const keys = [...new Set(report.runs.flatMap((run) => Object.keys(run.curves)))].sort((a, b) => rank(a) - rank(b));
  const legend = report.runs.map((run, index) => make("li", {}, runKey(index), run.name));
  const thinned = Math.max(...report.runs.flatMap((run) => Object.values(run.curves).map((curve) => curve.each)));
  byId("curves").append(make("ul", { class: "legend" }, ...legend),
    make("p", { class: "faint" }, "By training step. Point at a panel, or focus it and use the arrow keys, to read values."
      + (thinned > 1 ? ` In long logs a point is the mean of up to ${thinned} lines.` : "")),
    make("div", { class: "panels" }, ...keys.map(panel)));
}

function panel(key) {
  const lines = report.runs.map((run, index) => ({ run, index, curve: run.curves[key] })).filter((line) => line.curve);
  const steps = [...new Set(lines.flatMap((line) => line.curve.steps))].sort((a, b) => a - b);
  const values = lines.flatMap((line) => line.curve.values);
  const x = scale(0, steps[steps.length - 1] || 1, BOX.left, BOX.width - BOX.right);
  const ticks = niceTicks(Math.min(...values), Math.max(...values));
  const y = scale(ticks[0], ticks[ticks.length - 1], BOX.height - BOX.bottom, BOX.top);
  const title = TITLES[key] || key;
  const cursor = draw("line", { class: "cursor", y1: BOX.top, y2: BOX.height - BOX.bottom, visibility: "hidden" });
  const last = lines.map(({ run, curve }) => `${run.name}: last ${short(curve.values[curve.values.length - 1])}`).join("; ");
  const picture = draw("svg", {
    viewBox: `0 0 ${BOX.width} ${BOX.height}`, tabindex: "0", role: "img", "aria-label": `${title} by step. ${last}`,
  }, ...axes(ticks, steps, x, y), ...lines.flatMap((line) => curveMarks(line, x, y)), cursor);
  const readout = make("div", { class: "readout", "aria-live": "polite" });
  let place = steps.length - 1;
  function show(next) {
    place = Math.min(Math.max(next, 0), steps.length - 1);
    cursor.setAttribute("x1", x(steps[place]));
    cursor.setAttribute("x2", x(steps[place]));
    cursor.setAttribute("visibility", "visible");
    readout.replaceChildren(make("span", {}, `step ${steps[place]}`), ...lines.map(({ index, curve }) =>
      make("span", {}, runKey(index), steps[place] > curve.steps.at(-1) ? "\u2013" : short(curve.values[nearest(curve.steps, steps[place])]))));
  }
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * BOX.width;
    show(nearest(steps, x.back(at)));
  });
  picture.addEventListener("focus", () => show(place));
  picture.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: steps.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
  return make("figure", { class: "panel", "data-key": key }, make("figcaption", {}, title), picture, readout);
}

function axes(ticks, steps, x, y) {
  const marks = ticks.flatMap((tick) => [
    draw("line", { class: "grid", x1: BOX.left, x2: BOX.width - BOX.right, y1: y(tick), y2: y(tick) }),
    draw("text", { x: BOX.left - 6, y: y(tick) + 4, "text-anchor": "end" }, short(tick)),
  ]);
  const end = steps[steps.length - 1];
  for (const [step, anchor] of [[0, "start"], [Math.round(end / 2), "middle"], [end, "end"]]) {
    marks.push(draw("text", { x: x(step), y: BOX.height - 8, "text-anchor": anchor }, String(step)));
  }
  return marks;
}

function curveMarks({ index, curve }, x, y) {
  const points = curve.steps.map((step, place) => [x(step), y(curve.values[place])]);
  const look = { stroke: runColor(index), "stroke-dasharray": runDash(index), "stroke-width": 2, fill: "none", "stroke-linejoin": "round" };
  const dots = points.length > 30 ? [] : points.map(([cx, cy]) => draw("circle", { cx, cy, r: 2.5, style: { fill: runColor(index) } }));
  return [draw("polyline", { points: points.map((point) => point.join(",")).join(" "), ...look }), ...dots];
}

function scale(from, to, start, end) {
  const slope = (end - start) / (to - from || 1);
  const map = (value) => start + (value - from) * slope;
  map.back = (place) => from + (place - start) / slope;
  return map;
}

// About four ticks, at multiples of 1, 2 or 5 times a power of ten, that cover the range
function niceTicks(low, high) {
  if (low === high) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  const range = high - low || 1;
  const power = 10 ** Math.floor(Math.log10(range / 4));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= range / 4);
  const first = Math.floor(low / step);
  const count = Math.max(1, Math.ceil(high / step - 1e-9) - first);
  return Array.from({ length: count + 1 }, (_, place) => (first + place) * step);
}

function nearest(sorted, wanted) {
  let best = 0;
  sorted.forEach((value, place) => {
    if (Math.abs(value - wanted) < Math.abs(sorted[best] - wanted)) best = place;
  });
  return best;
}

function short(value) {
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(1);
  return String(Number(value.toPrecision(4)));
}

// Classes: a table sortable by its columns

function drawClasses() {
  const place = make("div");
  let sorting = { column: 0, down: false };
  const redraw = () => {
    const other = against.value === "" ? null : Number(against.value);
    const columns = classColumns(Number(mine.value), other);
    if (sorting.column >= columns.length) sorting = { column: 0, down: false };
    const focused = place.contains(document.activeElement);
    place.replaceChildren(scrolling("classes", classTable(columns, sorting, Number(mine.value), other, (column) => {
      sorting = { column, down: column === sorting.column ? !sorting.down : column !== 0 };
      redraw();
    })));
    if (focused) place.querySelectorAll("thead button")[sorting.column].focus();
  };
  const [mineLabel, mine] = choice("Run", 0, redraw);
  const [againstLabel, against] = choice("against", report.runs.length > 1 ? 1 : "", redraw, [make("option", { value: "" }, "none")]);
  byId("classes").append(make("div", { class: "controls" }, mineLabel, ...(report.runs.length > 1 ? [againstLabel] : [])), place,
    make("p", { class: "faint" }, "Click a column header to sort by it, again to reverse. \u2013 : neither in the truth nor predicted."));
  redraw();
}

// [header, value of a class, its text]
function classColumns(mine, other) {
  const [run, against] = [report.runs[mine], other === null ? null : report.runs[other]];
  const columns = [["class", (index) => index], [against ? `IoU ${run.name}` : "IoU", (index) => run.iou[index], percent]];
  if (against) {
    const difference = (index) => (run.iou[index] === null || against.iou[index] === null ? null : run.iou[index] - against.iou[index]);
    columns.push([`IoU ${against.name}`, (index) => against.iou[index], percent],
      ["difference", difference, (value) => (value > 0 ? "+" : "") + percent(value)]);
  }
  if (run.confusion) {
    const truth = run.confusion.map((row) => row.reduce((sum, count) => sum + count, 0));
    const predicted = run.confusion.map((_, index) => run.confusion.reduce((sum, row) => sum + row[index], 0));
    const all = truth.reduce((sum, count) => sum + count, 0);
    const share = (part, whole) => (whole ? 100 * part / whole : null);
    columns.push(["precision", (index) => share(run.confusion[index][index], predicted[index]), percent],
      ["recall", (index) => share(run.confusion[index][index], truth[index]), percent],
      ["pixels", (index) => share(truth[index], all), percent]);
  }
  return columns;
}

function classTable(columns, sorting, mine, other, sort) {
  const value = columns[sorting.column][1];
  const order = report.classes.map((_, index) => index).sort((a, b) => {
    const [one, two] = [value(a), value(b)];
    if (one === null || two === null) return (one === null) - (two === null); // classes without a value come last
    return sorting.down ? two - one : one - two;
  });
  const heads = columns.map(([head], column) => make("th", {
    scope: "col", class: column ? "number" : null,
    "aria-sort": column === sorting.column ? (sorting.down ? "descending" : "ascending") : "none",
  }, make("button", { type: "button", onclick: () => sort(column) }, head)));
  const bar = (run, index) => make("div", {
    class: "bar", style: { width: `${report.runs[run].iou[index] || 0}%`, background: runColor(run) },
  });
  const rows = order.map((index) => make("tr", {},
    make("th", { scope: "row" }, swatch(report.palette[index]), report.classes[index]),
    make("td", { class: "bars", "aria-hidden": "true" }, bar(mine, index), ...(other === null ? [] : [bar(other, index)])),
    ...columns.slice(1).map(([, of, text]) => make("td", { class: "number" }, text(of(index))))));
  const named = [mine, other].filter((run) => run !== null).map((run) => make("span", {}, runKey(run), report.runs[run].name));
  heads.splice(1, 0, make("td", { class: "bars" }, ...named));
  return make("table", { class: "classes" }, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
}

// Confusion matrix: rows are the truth, in percent of the row

function drawConfusion() {
  const section = byId("confusion");
  if (!report.runs[0].confusion) {
    section.append(make("p", {}, "Not available with --no-images: it needs the predictions."));
    return;
  }
  const place = make("div");
  const readout = make("p", { class: "readout", "aria-live": "polite" }, "Point at a cell, or focus the table and use the arrow keys.");
  const redraw = () => place.replaceChildren(scrolling("confusion matrix", matrix(report.runs[Number(run.value)].confusion, readout)));
  const [label, run] = choice("Run", 0, redraw);
  section.append(make("p", { class: "faint" }, "Rows: truth; columns: prediction; each row in percent of the pixels of its class."),
    make("div", { class: "controls" }, label), readout, place);
  redraw();
}

function matrix(counts, readout) {
  const names = report.classes, many = names.length > 24;
  const cells = counts.map((row, truth) => {
    const sum = row.reduce((total, count) => total + count, 0);
    return row.map((count, predicted) => {
      const share = sum ? count / sum : 0;
      const text = sum ? `${percent(100 * share, 2)} % of ${names[truth]} is predicted as ${names[predicted]} (${count.toLocaleString("en")} pixels)`
        : `there are no pixels of ${names[truth]}`;
      return make("td", {
        title: text, tabindex: truth + predicted ? "-1" : "0", class: share > 0.7 ? "full" : share > 0.55 ? "half" : null,
        style: { background: share ? `rgba(var(--heat), ${(0.06 + 0.94 * share).toFixed(3)})` : "" },
        onpointerenter: () => { readout.textContent = text; },
        onfocus: () => { readout.textContent = text; },
        onkeydown: (event) => move(event, truth, predicted),
      }, many || !sum ? "" : percent(100 * share));
    });
  });
  function move(event, row, column) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const next = step && cells[row + step[0]] && cells[row + step[0]][column + step[1]];
    if (!next) return;
    event.preventDefault();
    cells[row][column].setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  }
  const heads = names.map((name) => make("th", { scope: "col" }, name));
  const rows = cells.map((row, index) => make("tr", {}, make("th", { scope: "row" }, swatch(report.palette[index]), names[index]), ...row));
  return make("table", { class: many ? "matrix many" : "matrix" },
    make("thead", {}, make("tr", {}, make("td"), ...heads)), make("tbody", {}, ...rows));
}

// Images: image, truth and prediction are stacked, and a slider moves from one to the next

const STOPS = ["image", "truth", "prediction"];

function drawImages() {
  const section = byId("images"), { best, worst } = report.examples;
  if (!best.length && !worst.length) {
    section.append(make("p", {}, report.runs[0].confusion ? "No image has a pixel with a class, or all were left out to keep the page small." : "Not available with --no-images."));
    return;
  }
  const cards = [];
  const row = (title, images) => images.length ? [make("h3", {}, title), make("div", { class: "cards" }, ...images.map((image) => {
    const made = card(image);
    cards.push(made);
    return made.figure;
  }))] : [];
  const opacity = make("input", {
    type: "range", min: 10, max: 100, value: 75, step: 5,
    oninput: () => section.style.setProperty("--opacity", opacity.value / 100),
  });
  const all = STOPS.map((name, stop) => make("button", { type: "button", onclick: () => cards.forEach((one) => one.show(100 * stop)) }, name));
  section.append(make("p", { class: "faint" }, `Of ${report.runs[0].name}, ranked by mIoU over the classes in the truth or prediction of the image. `
    + "The slider goes from the image over the truth to the prediction; dragging over a picture moves the edge between two of them. White: ignored pixels; a class whose color is black is not drawn. Beside each class: its IoU in the image."),
    make("div", { class: "controls", role: "group", "aria-label": "all images" }, "all at once:", ...all, make("label", {}, "opacity of the masks ", opacity)),
    ...row("Worst", worst), ...row("Best", best));
}

function card(image) {
  const layer = (kind, text) => make("img", { class: kind === "image" ? "photo" : "mask", "data-layer": kind, src: image[kind], alt: text, draggable: "false" });
  const layers = {
    image: layer("image", `image ${image.name}`),
    truth: layer("truth", `truth of ${image.name}: ${present(image)}`),
    prediction: layer("prediction", `prediction for ${image.name}`),
  };
  for (const kind of ["truth", "prediction"]) layers[kind].style.opacity = "var(--opacity, 0.75)";
  const edge = make("div", { class: "edge" });
  const stage = make("div", { class: "stage", style: { aspectRatio: `${image.size[0]} / ${image.size[1]}` } }, ...Object.values(layers), edge);
  const slider = make("input", { type: "range", min: 0, max: 200, step: 2, "aria-label": `${image.name}: image, truth, prediction`, oninput: () => show(Number(slider.value)) });
  function show(value) {
    const truth = Math.min(value, 100), prediction = Math.max(value - 100, 0);
    slider.value = value;
    layers.truth.style.clipPath = `inset(0 ${100 - truth}% 0 ${prediction}%)`;
    layers.prediction.style.clipPath = `inset(0 ${100 - prediction}% 0 0)`;
    edge.style.left = `${value < 100 ? truth : prediction}%`;
    edge.style.visibility = value % 100 ? "visible" : "hidden";
    const [left, right] = value < 100 ? ["truth", "image"] : ["prediction", "truth"];
    const words = value % 100 ? `${left} on the left ${value % 100} %, ${right} on the right` : STOPS[value / 100];
    slider.setAttribute("aria-valuetext", words);
  }
  const drag = (event) => {
    if (!event.buttons) return;
    const box = stage.getBoundingClientRect();
    const share = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    const base = Number(slider.value) < 100 ? 0 : 100;
    show(base + Math.min(Math.round(share * 50) * 2, base ? 100 : 98)); // stays in its half
  };
  stage.addEventListener("pointerdown", (event) => { stage.setPointerCapture(event.pointerId); drag(event); });
  stage.addEventListener("pointermove", drag);
  const stops = STOPS.map((name, stop) => make("button", { type: "button", onclick: () => show(100 * stop) }, name));
  const legend = image.iou.map(([index, value]) => make("li", {}, swatch(report.palette[index]), `${report.classes[index]} ${percent(value)}`));
  show(150);
  const figure = make("figure", { class: "card" },
    make("figcaption", {}, make("span", {}, image.name), make("span", {}, `mIoU ${percent(image.miou)}`)),
    stage, slider, make("div", { class: "stops" }, ...stops), make("ul", { class: "legend", "aria-label": "IoU of each class in this image" }, ...legend));
  return { figure, show };
}

const present = (image) => image.iou.map(([index]) => report.classes[index]).join(", ");

function drawRecipes() {
  byId("recipes").append(...report.runs.map((run) => make("details", {}, make("summary", {}, run.name), make("pre", {}, run.recipe))));
}

drawRuns();
drawCurves();
drawClasses();
drawConfusion();
drawImages();
drawRecipes();
