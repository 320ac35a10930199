const told = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

/* An array of `packed`: a map is a slice of its last axes, and keeps its own range. */
function unpacked({ shape, data, low, high }) {
  const values = bytes(data);
  const edges = [low, high].map((text) => text && new Float32Array(bytes(text).buffer));
  const row = shape[shape.length - 1];
  const at = (index) => {
    if (!low) return values[index];
    const place = Math.floor(index / row);
    return edges[0][place] + (values[index] / 255) * (edges[1][place] - edges[0][place]);
  };
  const slice = (start, count) => Float32Array.from({ length: count }, (_, i) => at(start + i));
  return { shape, slice };
}

const arrays = Object.fromEntries(Object.entries(told.arrays).map(([name, array]) => [name, unpacked(array)]));
const [rows, columns] = told.grid || [0, 0];
const patches = rows * columns;
const block = told.block || 1; /* of a large image, blocks of patches stand for them between patches */
const blocks = ([down, across]) => [Math.ceil(down / block), Math.ceil(across / block)];
const cells = block === 1 ? patches : blocks([rows, columns]).reduce((a, b) => a * b);
const cellOf = (patch) => Math.floor(Math.floor(patch / columns) / block) * Math.ceil(columns / block) + Math.floor((patch % columns) / block);
const has = (name) => name in arrays;
const state = { view: "", layer: 0, head: 0, output: -1, patch: null, pinned: false };
const outputs = told.outputs || [];
const layers = told.attention_layers || [];

function mean(maps) {
  const sum = new Float32Array(maps[0].length);
  for (const map of maps) map.forEach((value, i) => (sum[i] += value / maps.length));
  return sum;
}

/* The place of the layer that is nearest to the chosen one, of those whose attention between patches was kept. */
function kept() {
  const far = layers.map((layer) => Math.abs(layer - state.layer - 1));
  return far.indexOf(Math.min(...far));
}

/* Attention of the chosen layer and head: from a patch, or where the pooling reads. Head 0 is the mean. */
function attention() {
  const from = has("attention") ? state.patch : null;
  const name = from === null ? "heads" : "attention";
  const shape = arrays[name].shape;
  const layer = from === null ? state.layer : kept();
  const heads = shape[1];
  const one = (head) => {
    const start = from === null ? (layer * heads + head) * patches : ((layer * heads + head) * cells + cellOf(from)) * cells;
    return arrays[name].slice(start, from === null ? patches : cells);
  };
  return state.head === 0 || heads === 1 ? mean(Array.from({ length: heads }, (_, i) => one(i))) : one(state.head - 1);
}

const start = () => state.patch ?? strongest();
function strongest() {
  const map = arrays[has("relevance") ? "relevance" : "pca"].slice(0, patches);
  return map.indexOf(Math.max(...map));
}

const VIEWS = {
  relevance: { name: "Relevance", needs: "relevance", outputs: true,
    says: "How much each patch speaks for the answer: attention weighted by its gradient, through all layers.",
    map: () => (state.output < 0 ? arrays.relevance.slice(0, patches) : arrays.relevance_outputs.slice(state.output * patches, patches)) },
  words: { name: "Words", needs: "words", outputs: true,
    says: "The decoder's attention while it writes a word. Choose a word.",
    map: () => (state.output < 0 ? mean((told.pieces || []).map((_, i) => arrays.words.slice(i * patches, patches))) : arrays.words.slice(state.output * patches, patches)) },
  attention: { name: "Attention", needs: "heads", layer: true, head: true, patch: true,
    says: "Where a patch looks. Point at a patch, or at none for what the answer is read from.",
    map: attention },
  rollout: { name: "Rollout", needs: "rollout", patch: true,
    says: "The attention of all layers multiplied together. Point at a patch for what reaches it.",
    map: () => (state.patch !== null && has("rollout_patches") ? arrays.rollout_patches.slice(state.patch * patches, patches) : arrays.rollout.slice(0, patches)) },
  similarity: { name: "Similarity", needs: "similarity", patch: true,
    says: "Which patches have tokens like the one you point at.",
    map: () => arrays.similarity.slice(cellOf(start()) * cells, cells) },
  pca: { name: "Colours", needs: "pca", says: "Patches with similar tokens have similar colours: three principal components.",
    colours: (name) => arrays[name].slice(0, arrays[name].shape.reduce((a, b) => a * b)) },
  norms: { name: "Norms", needs: "norms", layer: true,
    says: "Length of each token. A few much longer ones are registers in disguise.",
    map: () => arrays.norms.slice(Math.floor((state.layer * arrays.norms.shape[0]) / arrays.heads.shape[0]) * patches, patches) },
  positions: { name: "Positions", needs: "positions", patch: true,
    says: "Which positions have embeddings like that of the patch you point at.",
    map: () => arrays.positions.slice(start() * patches, patches) },
};
for (const [key, view] of Object.entries(VIEWS)) {
  if (!has(view.needs) || !patches) delete VIEWS[key];
}
if (VIEWS.positions && arrays.positions.shape[0] !== patches) delete VIEWS.positions;

/* --- drawing */

const ramp = Array.from({ length: 256 }, (_, i) => [0, 2, 4].map((j) => parseInt(told.colours.slice(6 * i + j, 6 * i + j + 2), 16)));
const strength = (value) => 0.85 * Math.min(value / 0.6, 1) ** 1.3; /* as in overlay.py */
const shades = Array.from({ length: 17 }, (_, i) => `rgb(${ramp[Math.round((255 * i) / 16)].join(" ")} / ${strength(i / 16)})`);
byId("ramp").style.background = `linear-gradient(90deg, ${shades.join(",")}), #fff`;

function photo(source, canvas) {
  const image = new Image();
  const ready = new Promise((done) => (image.onload = done));
  image.src = source;
  return ready.then(() => {
    canvas.width = image.width;
    canvas.height = image.height;
    const scale = Math.max(1, Math.ceil(900 / Math.max(image.width, image.height)));
    canvas.width *= scale;
    canvas.height *= scale;
    return image;
  });
}

/* The faded photo under cells of `joined` x `joined` patches of a grid; those at the edge may reach beyond it. */
function paint(canvas, image, frame, grid, colours, joined, mark) {
  const pen = canvas.getContext("2d");
  const { width, height } = canvas;
  const [left, top, right, bottom] = [frame[0] * width, frame[1] * height, frame[2] * width, frame[3] * height];
  pen.globalAlpha = 1;
  pen.imageSmoothingEnabled = image.width >= 200;
  pen.filter = "grayscale(.65)";
  pen.drawImage(image, 0, 0, width, height);
  pen.filter = "none";
  pen.fillStyle = "rgb(255 255 255 / .5)";
  pen.fillRect(0, 0, width, height);
  const [down, across] = grid.map((side) => Math.ceil(side / joined));
  const small = new OffscreenCanvas(across, down);
  small.getContext("2d").putImageData(new ImageData(colours, across, down), 0, 0);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, left, top, ((right - left) * across * joined) / grid[1], ((bottom - top) * down * joined) / grid[0]);
  pen.strokeStyle = "rgb(20 12 30 / .38)"; /* the lead between the panes */
  pen.lineWidth = Math.max(1, width / 900);
  pen.beginPath();
  for (let i = 0; i <= grid[1]; i++) {
    const x = left + ((right - left) * i) / grid[1];
    pen.moveTo(x, top);
    pen.lineTo(x, bottom);
  }
  for (let i = 0; i <= grid[0]; i++) {
    const y = top + ((bottom - top) * i) / grid[0];
    pen.moveTo(left, y);
    pen.lineTo(right, y);
  }
  pen.stroke();
  if (mark === null) return;
  const [w, h] = [(right - left) / grid[1], (bottom - top) / grid[0]];
  const box = [left + (mark % grid[1]) * w, top + Math.floor(mark / grid[1]) * h, w, h];
  for (const [colour, line] of [["#fff", 7], ["#14101c", 3]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = (line * width) / 900;
    pen.strokeRect(...box);
  }
}

/* Of many patches, the highest 1 of 200 share the last colour. As in overlay.py. */
const MANY = 400;
function heat(map) {
  const cells = new Uint8ClampedArray(4 * map.length);
  const low = Math.min(...map);
  const sorted = Float32Array.from(map).sort();
  const high = map.length < MANY ? sorted[map.length - 1] : sorted[Math.floor(0.995 * (map.length - 1))];
  const span = high - low || 1;
  map.forEach((value, i) => {
    const t = Math.min((value - low) / span, 1);
    cells.set([...ramp[Math.round(255 * t)], 255 * strength(t)], 4 * i);
  });
  return cells;
}

function glass(colours) {
  const cells = new Uint8ClampedArray((4 * colours.length) / 3);
  for (let i = 0; i < colours.length / 3; i++) cells.set([0, 1, 2].map((j) => 255 * colours[3 * i + j]).concat(190), 4 * i);
  return cells;
}

const windowed = byId("window");
const second = byId("beside");
let image, other;

function draw() {
  const view = VIEWS[state.view];
  const between = { attention: "attention", rollout: "rollout_patches" }[state.view];
  const pointed = between && !has(between) ? null : state.patch;
  const marked = view.patch ? (between ? pointed : start()) : null;
  const map = view.map && view.map();
  const joined = block > 1 && map && map.length === cells;
  paint(windowed, image, told.frame, [rows, columns], map ? heat(map) : glass(view.colours("pca")), joined ? block : 1, marked);
  byId("key").hidden = !map;
  const shares = map && ["attention", "rollout", "words"].includes(state.view);
  const figure = (value) => (shares ? `${(100 * value).toFixed(1)} %` : value.toPrecision(3));
  if (map) {
    byId("low").textContent = figure(Math.min(...map));
    byId("high").textContent = figure(Math.max(...map));
  }
  const across = joined ? Math.ceil(columns / block) : columns;
  const place = (i, width = columns) => `row ${Math.floor(i / width) * (columns === width ? 1 : block) + 1}, column ${(i % width) * (columns === width ? 1 : block) + 1}`;
  byId("told").textContent = !map ? "" : (marked === null ? "" : `Patch at ${place(marked)}. `) + `Highest: ${figure(Math.max(...map))} at ${place(map.indexOf(Math.max(...map)), across)}.`;
  if (state.view === "attention" && marked !== null) {
    const nearest = layers[kept()];
    if (nearest !== state.layer + 1) byId("told").textContent += ` This is layer ${nearest}, the nearest that was kept.`;
    if (state.head && arrays.attention.shape[1] === 1) byId("told").textContent += " It is the mean over heads.";
  }
  if (other) {
    second.hidden = state.view !== "similarity" && state.view !== "pca";
    const grid = told.grid_beside;
    const count = arrays.similarity_beside.shape[1];
    if (state.view === "pca") paint(second, other, told.frame_beside, grid, glass(view.colours("pca_beside")), 1, null);
    if (state.view === "similarity") paint(second, other, told.frame_beside, grid, heat(arrays.similarity_beside.slice(cellOf(start()) * count, count)), block, null);
  }
}

/* --- controls */

function choose(key) {
  state.view = key;
  const view = VIEWS[key];
  for (const button of byId("views").children) button.setAttribute("aria-pressed", button.dataset.view === key);
  byId("meaning").textContent = view.says;
  byId("view-name").textContent = view.name;
  byId("layer-row").hidden = !view.layer || arrays.heads.shape[0] < 2;
  byId("head-row").hidden = !view.head;
  byId("outputs").hidden = !view.outputs;
  for (const button of byId("outputs").children) button.hidden = key === "words" && Number(button.dataset.output) >= (told.pieces || []).length;
  draw();
}

function button(parent, text, data, pressed, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.dir = "auto";
  Object.assign(made.dataset, data);
  made.setAttribute("aria-pressed", pressed);
  made.addEventListener("click", act);
  parent.append(made);
}

function select(output) {
  state.output = output;
  for (const made of byId("outputs").children) made.setAttribute("aria-pressed", Number(made.dataset.output) === output);
  draw();
}

for (const [key, view] of Object.entries(VIEWS)) button(byId("views"), view.name, { view: key }, false, () => choose(key));
if (outputs.length) {
  button(byId("outputs"), "the whole answer", { output: -1 }, true, () => select(-1));
  outputs.forEach((name, i) => button(byId("outputs"), name.trim() || "␣", { output: i }, false, () => select(i)));
}
for (const [name, count] of [["layer", has("heads") ? arrays.heads.shape[0] : 1], ["head", has("heads") ? arrays.heads.shape[1] + 1 : 1]]) {
  const slider = byId(name);
  const label = () => (byId(`${name}-is`).textContent = name === "head" ? (state.head ? String(state.head) : "mean") : `${state.layer + 1} / ${count}`);
  slider.max = count - 1;
  state[name] = name === "layer" ? count - 1 : 0;
  slider.value = state[name];
  label();
  slider.addEventListener("input", () => {
    state[name] = Number(slider.value);
    label();
    draw();
  });
}

function patchAt(event) {
  const box = windowed.getBoundingClientRect();
  const [left, top, right, bottom] = told.frame;
  const x = ((event.clientX - box.left) / box.width - left) / (right - left);
  const y = ((event.clientY - box.top) / box.height - top) / (bottom - top);
  return x < 0 || x >= 1 || y < 0 || y >= 1 ? null : Math.floor(y * rows) * columns + Math.floor(x * columns);
}
windowed.addEventListener("pointermove", (event) => {
  if (state.pinned) return;
  const patch = patchAt(event);
  if (patch !== state.patch) {
    state.patch = patch;
    draw();
  }
});
windowed.addEventListener("pointerleave", () => {
  if (state.pinned) return;
  state.patch = null;
  draw();
});
windowed.addEventListener("click", (event) => {
  const patch = patchAt(event);
  state.pinned = patch !== null && !(state.pinned && patch === state.patch);
  state.patch = patch;
  draw();
});
windowed.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (event.key === "Escape") [state.patch, state.pinned] = [null, false];
  else if (!step) return;
  else {
    const from = start();
    const side = Math.abs(step) === 1 && Math.floor((from + step) / columns) !== Math.floor(from / columns);
    const next = from + step;
    state.patch = side || next < 0 || next >= patches ? from : next;
    state.pinned = true;
  }
  event.preventDefault();
  draw();
});

Promise.all([photo(told.image, windowed), told.image_beside ? photo(told.image_beside, second) : null]).then(([first, next]) => {
  [image, other] = [first, next];
  const views = Object.keys(VIEWS);
  if (views.length) choose(told.view in VIEWS ? told.view : views[0]);
  else windowed.getContext("2d").drawImage(image, 0, 0, windowed.width, windowed.height);
  document.documentElement.dataset.ready = "yes";
});
