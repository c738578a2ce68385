// The page: each panel has a form; whatever moves in it asks the API anew, and the answer is shown.

import { chart, short } from "./charts.js";

const find = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const panels = {}; // name -> { fit(): the controls to the run, refresh(): ask anew }
let overview = null; // the last answer of api/runs

// --- asking ----------------------------------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(text, status, seconds) {
    super(text);
    Object.assign(this, { status, seconds });
  }
}

function address(path, parameters = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) if (value !== undefined && value !== "") query.append(name, value);
  return `api/${path}?${query}`;
}

async function ask(path, parameters, options = {}) {
  let response;
  try {
    response = await fetch(address(path, parameters), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server does not answer; is `onefold serve` still running?", 0);
  }
  const answer = await response.json().catch(() => ({ detail: `The server failed (${response.status}).` }));
  if (!response.ok) throw new Refusal(answer.detail, response.status, Number(response.headers.get("retry-after")));
  return answer;
}

const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

/**
 * Sends the newest of what is wanted. There is one request at a time; whatever is wanted meanwhile replaces what waits,
 * and a request that takes long makes way. So answers come in order, and the last one is of what was wanted last.
 * What `show` returns is said as a problem.
 */
function asker(root, send, show) {
  const problem = find(".problem", root);
  let waiting = null, running = null, since = 0, timer = null;

  async function work() {
    while (waiting) {
      const wanted = waiting;
      waiting = null;
      running = new AbortController();
      since = performance.now();
      root.classList.add("waits");
      try {
        complain(show(await send(wanted, running.signal), wanted) ?? "");
      } catch (error) {
        if (error.status === 429) {
          complain("Many are waiting; trying again …");
          await pause(error.seconds || 1);
          waiting ??= wanted;
        } else if (error.name !== "AbortError") complain(error.message);
      }
    }
    running = null;
    root.classList.remove("waits");
  }

  function complain(text) {
    problem.textContent = text;
    problem.hidden = !text;
  }

  return {
    complain,
    want(wanted) {
      waiting = wanted;
      timer ??= setTimeout(() => {
        timer = null;
        if (!running) work();
        else if (performance.now() - since > 300) running.abort();
      }, 30);
    },
  };
}

// --- controls --------------------------------------------------------------------------------------------------------

function fillPlaces() {
  for (const place of all("[data-control]")) {
    place.append(find(`#control-${place.dataset.control}`).content.cloneNode(true));
    if (place.dataset.control !== "seed") continue;
    const input = find("input", place);
    input.name = place.dataset.name ?? "seed";
    if (place.dataset.title) input.previousSibling.textContent = `${place.dataset.title} `;
    if (input.name === "other") input.value = 1;
    find(".random", place).setAttribute("aria-label", `Random: ${input.previousSibling.textContent.trim().toLowerCase()}`);
    find(".random", place).addEventListener("click", () => {
      input.value = Math.floor(Math.random() * 1e6);
      input.dispatchEvent(new Event("input", { bubbles: true }));
    });
  }
}

function options(select, pairs, chosen) {
  const before = chosen ?? select.value;
  select.replaceChildren(...pairs.map(([value, text]) => new Option(text, value)));
  select.value = pairs.some(([value]) => value === before) ? before : pairs[0]?.[0];
}

function runOf(form) {
  return overview.runs[Number(form.elements.run?.value || 0)];
}

function fitRun(form) {
  const select = form.elements.run;
  options(select, overview.runs.map((run, k) => [String(k), run.name]), select.value || "0");
  select.closest("label").hidden = overview.runs.length < 2;
}

/** Classes of the run; `first` is what stands above them. */
function fitLabels(form, run, first) {
  const names = run.class_names.length ? run.class_names : Array.from({ length: run.classes }, (_, k) => String(k));
  options(form.elements.label, [...first, ...names.map((name) => [name, name])]);
  form.elements.label.closest("label").hidden = !run.classes;
}

const EACH = [["", "each in turn"]], NONE = [["none", "no class"]];

/** Steps, guidance and solver as the run has them, once for each run; guidance and steps only where they can act. */
function fitSampler(form, run) {
  const { steps, guidance, solver } = form.elements;
  if (form.dataset.of !== run.name) {
    form.dataset.of = run.name;
    steps.value = run.steps;
    guidance.value = run.guidance;
    options(solver, run.solvers.map((name) => [name, name]), run.solver);
  }
  const jumps = run.jumps.includes(solver.value);
  guidance.disabled = jumps || !run.classes;
  steps.disabled = solver.value === "one_pass";
  find("small", guidance.parentNode).textContent = !run.classes
    ? "Needs classes."
    : jumps ? `Not with ${solver.value}.` : "1 is none.";
  showValues(form);
}

function showValues(form) {
  for (const value of all(".value", form)) {
    const input = find("input", value.parentNode);
    value.textContent = input.disabled ? "–" : input.value;
  }
}

/** What the form says, or null where a field is wrong, which is then said. */
function values(form, complain) {
  for (const input of form.elements)
    if (!input.checkValidity()) {
      complain(`${input.labels[0].firstChild.textContent.trim()}: ${input.validationMessage}`);
      return null;
    }
  const found = {};
  for (const { name, value, type, disabled } of form.elements)
    if (name && !disabled && !["file", "checkbox"].includes(type)) found[name] = value;
  return found;
}

function renamed({ label, ...others }) {
  return { ...others, labels: label };
}

// --- images ----------------------------------------------------------------------------------------------------------

const source = (png) => `data:image/png;base64,${png}`;
const described = (image) => [`seed ${image.seed}`, image.name && `class ${image.name}`].filter(Boolean).join(", ");
const isTiny = (run) => Math.max(...run.image_size) <= 64;

function fillGrid(grid, pictures, columns, onClick) {
  grid.pictures = pictures;
  grid.style.setProperty("--columns", columns);
  grid.classList.toggle("single", pictures.length === 1);
  grid.classList.toggle("many", pictures.length > 36);
  while (grid.children.length > pictures.length) grid.lastChild.remove();
  while (grid.children.length < pictures.length) {
    const button = document.createElement("button"), k = grid.children.length;
    button.type = "button";
    button.append(document.createElement("img"), document.createElement("span"));
    button.addEventListener("click", () => onClick(k));
    grid.append(button);
  }
  pictures.forEach((picture, k) => {
    const [img, span] = grid.children[k].children;
    img.src = source(picture.png);
    img.alt = described(picture);
    span.textContent = picture.name;
  });
}

function facts(answer) {
  const count = `${answer.images.length} ${answer.images.length === 1 ? "image" : "images"}`;
  const steps = `${answer.steps} ${answer.steps === 1 ? "step" : "steps"}`;
  const guided = answer.guidance === 1 ? "" : `, guidance ${answer.guidance}`;
  return `${count}, ${steps} (${answer.solver}${guided}), ${(1000 * answer.seconds).toFixed(0)} ms`;
}

const enlarged = { dialog: find("#enlarged"), grid: null, k: 0 };

function enlarge(grid, k) {
  const count = grid.pictures.length;
  Object.assign(enlarged, { grid, k: (k + count) % count });
  const picture = grid.pictures[enlarged.k], dialog = enlarged.dialog;
  find("img", dialog).src = find(".download", dialog).href = source(picture.png);
  find("img", dialog).alt = described(picture);
  find("figcaption", dialog).textContent = described(picture);
  find(".download", dialog).download = `seed${picture.seed}.png`;
  for (const name of [".previous", ".next"]) find(name, dialog).disabled = count < 2;
  dialog.classList.toggle("tiny", Boolean(grid.closest(".tiny")));
  if (!dialog.open) dialog.showModal();
}

function prepareDialog() {
  const { dialog } = enlarged, turn = (by) => enlarge(enlarged.grid, enlarged.k + by);
  find(".previous", dialog).addEventListener("click", () => turn(-1));
  find(".next", dialog).addEventListener("click", () => turn(1));
  find(".close", dialog).addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  });
}

/** A form's answer as a grid. */
function gridShower(root, run) {
  return (answer, wanted) => {
    const grid = find(".grid", root);
    root.classList.toggle("tiny", isTiny(run()));
    fillGrid(grid, answer.images, Math.ceil(Math.sqrt(answer.images.length)), (k) => enlarge(grid, k));
    if (enlarged.dialog.open && enlarged.grid === grid) enlarge(grid, Math.min(enlarged.k, answer.images.length - 1));
    find(".facts", root).textContent = facts(answer);
    const download = find(".download", root);
    if (download) download.href = address("images.png", wanted);
  };
}

// --- panels ----------------------------------------------------------------------------------------------------------

function generatePanel(root) {
  const form = find("form", root), run = () => runOf(form);
  const asks = asker(root, (wanted, signal) => ask("images", wanted, { signal }), gridShower(root, run));
  let begun = false;
  return {
    fit() {
      fitRun(form);
      fitLabels(form, run(), [...EACH, ...NONE]);
      if (!begun) form.elements.n.value = isTiny(run()) ? 16 : 4;
      begun = true;
      fitSampler(form, run());
    },
    refresh() {
      const found = values(form, asks.complain);
      if (found) asks.want(renamed(found));
    },
  };
}

const FRAMES = 17;

function interpolatePanel(root) {
  const form = find("form", root), run = () => runOf(form);
  const position = find("[name=position]", root), strip = find(".strip", root), play = find(".play", root);
  let frames = [], timer = null, way = 1;

  function showFrame() {
    const k = Number(position.value), frame = frames[k];
    find(".value", position.parentNode).textContent = (k / (FRAMES - 1)).toFixed(2);
    if (!frame) return;
    const ends = k === 0 || k === FRAMES - 1 ? `the image of seed ${frame.seed}` : `between seeds ${frames[0].seed} and ${frames[FRAMES - 1].seed}`;
    find(".frame img", root).src = find(".download", root).href = source(frame.png);
    find(".frame img", root).alt = find(".frame figcaption", root).textContent = frame.name ? `${ends}, class ${frame.name}` : ends;
    find(".download", root).download = `seed${frames[0].seed}-${frames[FRAMES - 1].seed}-${k}.png`;
    [...strip.children].forEach((button, j) => button.setAttribute("aria-current", String(2 * j === k)));
  }

  function step() {
    const k = Number(position.value);
    if (k + way < 0 || k + way >= FRAMES) way = -way;
    position.value = k + way;
    showFrame();
  }

  const asks = asker(root, (wanted, signal) => ask("interpolation", { ...wanted, n: FRAMES }, { signal }), (answer) => {
    frames = answer.images;
    root.classList.toggle("tiny", isTiny(run()));
    const shown = frames.filter((_, k) => k % 2 === 0);
    fillGrid(strip, shown, shown.length, (j) => { position.value = 2 * j; showFrame(); });
    find(".facts", root).textContent = facts(answer);
    showFrame();
  });
  position.addEventListener("input", showFrame);
  play.addEventListener("click", () => {
    clearInterval(timer);
    timer = timer ? null : setInterval(step, 120);
    play.setAttribute("aria-pressed", String(Boolean(timer)));
    play.textContent = timer ? "Stop" : "Play";
  });
  return {
    fit() {
      fitRun(form);
      fitLabels(form, run(), [["", "that of the first seed"], ...NONE]);
      fitSampler(form, run());
    },
    refresh() {
      const found = values(form, asks.complain);
      if (found) asks.want(found);
    },
    leave() {
      if (timer) play.click();
    },
  };
}

function blobOf(png) {
  return new Blob([Uint8Array.from(atob(png), (letter) => letter.charCodeAt(0))], { type: "image/png" });
}

function imagePanel(root) {
  const form = find("form", root), run = () => runOf(form), drop = find(".drop", root);
  let file = null, fitted = null; // what was given, and the same in the network's size, which is sent from then on

  function send({ wanted, given }, signal) {
    return ask("reconstruction", wanted, { method: "POST", body: given, signal });
  }

  const asks = asker(root, send, (answer, { of }) => {
    if (of === file) fitted = blobOf(answer.original);
    root.classList.toggle("tiny", isTiny(run()));
    find(".hint", root).hidden = true;
    find(".figures", root).hidden = false;
    for (const img of all("[data-part]", root)) img.src = source(answer[img.dataset.part]);
    find(".psnr", root).textContent = `PSNR ${answer.psnr.toFixed(1)} dB`;
    find(".facts", root).textContent = `${(1000 * answer.seconds).toFixed(0)} ms`;
  });

  function refresh() {
    const wanted = values(form, asks.complain);
    if (wanted && file) asks.want({ wanted, given: fitted ?? file, of: file });
  }

  function take(given) {
    const most = overview.limits.upload_bytes;
    if (!given) return;
    if (given.size > most) return asks.complain(`${given.name}: more than ${most / 2 ** 20} MiB; choose a smaller file`);
    [file, fitted] = [given, null];
    refresh();
  }

  form.elements.file.addEventListener("change", (event) => take(event.target.files[0]));
  for (const kind of ["dragover", "dragleave", "drop"])
    root.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop") take(event.dataTransfer.files[0]);
    });
  document.addEventListener("paste", (event) => {
    if (!root.hidden) take([...event.clipboardData.files].find((each) => each.type.startsWith("image/")));
  });
  find(".generated", root).addEventListener("click", async () => {
    try {
      const answer = await ask("images", { run: form.elements.run.value, seed: Math.floor(Math.random() * 1e6) });
      take(blobOf(answer.images[0].png));
    } catch (error) {
      asks.complain(error.message);
    }
  });
  return {
    refresh,
    fit() {
      fitRun(form);
      if (form.dataset.of !== run().name) fitted = null; // another size, perhaps
      form.dataset.of = run().name;
      fitLabels(form, run(), [["", "not told"]]);
      showValues(form);
    },
  };
}

function comparePanel(root) {
  const form = find(".controls", root);
  const sides = all(".side", root).map((side, k) => {
    const run = () => overview.runs[k];
    return { side, run, form: find("form", side), asks: asker(side, (wanted, signal) => ask("images", wanted, { signal }), gridShower(side, run)) };
  });
  let begun = false;
  return {
    fit() {
      fitLabels(form, overview.runs[0], [...EACH, ...NONE]);
      if (!begun) form.elements.n.value = isTiny(overview.runs[0]) ? 16 : 4;
      begun = true;
      showValues(form);
      for (const { side, run, form: own } of sides) {
        find("h2", side).textContent = run().name;
        fitSampler(own, run());
      }
    },
    refresh() {
      sides.forEach(({ form: own, asks }, k) => {
        const both = values(form, asks.complain);
        if (both) asks.want(renamed({ run: k, ...both, ...values(own, asks.complain) }));
      });
    },
  };
}

function stand(run) {
  if (!run.trains) return "A saved network";
  const share = run.length ? Math.floor((100 * run.images) / run.length) : 0;
  if (run.length && run.images >= run.length) return `Finished, ${short(run.images)} images`;
  if (run.written === null) return "Begins";
  const since = run.written < 90 ? "" : `, nothing new for ${Math.round(run.written / 60)} minutes`;
  return `${share} % of ${short(run.length)} images${since}`;
}

function trainingPanel(root) {
  const form = find("form", root), { picture, follow } = form.elements;
  let answer = null, shownOf = "";

  function showPictures() {
    if (!answer?.samples.length) return;
    if (follow.checked) picture.value = picture.max;
    const { name, images } = answer.samples[Number(picture.value)];
    const same = answer.reconstructions.find((each) => each.images === images);
    find(".value", picture.parentNode).textContent = short(images);
    set(find(".samples", root), name, `Samples at ${short(images)} images`);
    set(find(".reconstructions", root), same?.name, `Test images above their reconstructions at ${short(images)} images`);
  }

  function set(img, name, alt) {
    img.closest("figure").hidden = !name;
    if (!name) return;
    const src = address(`samples/${name}`, { run: form.elements.run.value });
    if (img.getAttribute("src") !== src) img.src = src;
    img.alt = alt;
  }

  const asks = asker(root, ({ run }, signal) => ask("training", { run }, { signal }), (found, { mark }) => {
    [answer, shownOf] = [found, mark];
    picture.max = Math.max(0, found.samples.length - 1);
    picture.parentNode.hidden = found.samples.length < 2;
    find(".pictures", root).hidden = !found.samples.length;
    showPictures();
    const told = Object.entries(found.series).filter(([, numbers]) => numbers.some((each) => each !== null));
    find(".charts", root).replaceChildren(...told.map(([name, numbers]) => chart(name, found.images, numbers)));
    return found.alarm ? `Alarm: ${found.alarm}` : "";
  });
  for (const name of ["input", "change"])
    picture.addEventListener(name, (event) => {
      event.stopPropagation();
      follow.checked = picture.value === picture.max;
      showPictures();
    });
  follow.addEventListener("change", showPictures);
  return {
    fit() {
      fitRun(form);
      const run = runOf(form);
      find(".stands", root).textContent = `${stand(run)}.`;
      find("progress", root).hidden = !run.length;
      find("progress", root).value = run.length ? run.images / run.length : 0;
    },
    refresh() {
      const run = runOf(form), mark = `${run.name} ${run.images} ${run.pictures}`;
      if (mark !== shownOf) asks.want({ run: form.elements.run.value, mark });
    },
  };
}

// --- the page --------------------------------------------------------------------------------------------------------

const shown = () => find("[role=tab][aria-selected=true]").getAttribute("aria-controls");

function select(name, focus) {
  panels[shown()].leave?.();
  for (const tab of all("[role=tab]")) {
    const chosen = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    find(`#${tab.getAttribute("aria-controls")}`).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
  history.replaceState(null, "", `#${name}`);
  if (!overview) return; // the runs are not known yet: what the address names is shown when they are
  panels[name].fit();
  panels[name].refresh();
}

/** The panel that the address names, as "#training". */
function selectAddressed() {
  const name = location.hash.slice(1), tab = panels[name] && find(`#tab-${name}`);
  select(tab && !tab.hidden ? name : "generate");
}

function prepareTabs() {
  const tabs = () => all("[role=tab]").filter((tab) => !tab.hidden);
  for (const tab of all("[role=tab]")) tab.addEventListener("click", () => select(tab.getAttribute("aria-controls")));
  find("[role=tablist]").addEventListener("keydown", (event) => {
    const list = tabs(), k = list.indexOf(document.activeElement);
    const to = { ArrowRight: k + 1, ArrowLeft: k - 1, Home: 0, End: list.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    select(list[(to + list.length) % list.length].getAttribute("aria-controls"), true);
  });
}

function prepareTheme() {
  const root = document.documentElement, button = find("#theme");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const name = () => (button.textContent = dark() ? "Light" : "Dark");
  try {
    root.dataset.theme = localStorage.getItem("theme") ?? "";
  } catch {} // a browser may keep nothing
  name();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try {
      localStorage.setItem("theme", root.dataset.theme);
    } catch {}
    name();
  });
}

function say() {
  const names = overview.runs.map((run) => `${run.name} (${run.image_size[1]}×${run.image_size[0]}${run.one_step ? ", one step" : ""})`);
  find("#runs").textContent = names.join(" and ");
  const trains = overview.runs.filter((run) => run.trains && run.length && run.images < run.length && run.written !== null);
  find("#status").textContent = trains.map((run) => `${run.name}: ${stand(run)}`).join("; ");
  find("#tab-compare").hidden = overview.runs.length < 2;
}

/** Asks how the runs stand, and draws anew when a network is published or the log grows. */
async function watch() {
  for (;;) {
    await pause(2);
    if (document.hidden) continue;
    try {
      const before = overview;
      overview = await ask("runs");
      say();
      const panel = panels[shown()], published = overview.runs.some((run, k) => run.model !== before.runs[k].model);
      if (!published && shown() !== "training") continue;
      panel.fit();
      panel.refresh();
    } catch (error) {
      find("#status").textContent = error.message;
    }
  }
}

async function begin() {
  fillPlaces();
  prepareTabs();
  prepareTheme();
  prepareDialog();
  const makers = { generate: generatePanel, interpolate: interpolatePanel, image: imagePanel, compare: comparePanel, training: trainingPanel };
  for (const [name, make] of Object.entries(makers)) {
    const root = find(`#${name}`);
    panels[name] = make(root);
    root.addEventListener("submit", (event) => event.preventDefault());
    root.addEventListener("input", (event) => {
      const { target } = event;
      if (!overview || ["file", "position", "picture", "follow"].includes(target.name)) return;
      showValues(target.form);
      if (["run", "solver"].includes(target.name)) panels[name].fit();
      panels[name].refresh();
    });
  }
  while (!overview)
    try {
      overview = await ask("runs");
    } catch (error) {
      find("#status").textContent = error.message;
      await pause(2);
    }
  say();
  selectAddressed();
  addEventListener("hashchange", selectAddressed);
  watch();
}

begin();
