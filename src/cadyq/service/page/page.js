// What happens on the page: a picture is chosen, handed in, watched, and fetched.

import { View, rampGradient } from "./view.js";

const $ = (id) => document.getElementById(id);
const view = new View($("view"), $("divider"), $("tip"), (text) => ($("zoom-level").textContent = text), showRange);

// Larger pictures are shown reduced: a browser holds four bytes for every pixel.
const MOST_PIXELS = 40e6;

let offer = null; // what the service offers
let file = null; // the picture that was chosen
let run = null; // what is under way: {id, source, stopped}
let address = null; // object URL of the result

// --- what is shown

function setState(state, status) {
  document.body.dataset.state = state;
  if (status !== undefined) say(status);
  $("cancel").hidden = state !== "busy";
  $("download").hidden = state !== "done";
  $("another").hidden = state === "busy" || state === "empty";
  $("run").hidden = !(state === "failed" || state === "done") || (state === "done" && !changed());
  $("run").textContent = state === "failed" ? "Try again" : "Upscale again";
}

function say(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

function complain(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function setBar(done, total) {
  if (total) Object.assign($("bar"), { max: total, value: done });
  else $("bar").removeAttribute("value");
}

const megabytes = (bytes) => (bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
const duration = (s) => (s < 90 ? `${s < 10 ? s.toFixed(1) : Math.round(s)} s` : `${Math.round(s / 60)} min`);

// --- options

let used = ""; // the options of the result that is shown
const options = () => ({
  ...($("model").value && { model: $("model").value }), budget: $("budget").value, format: $("format").value,
});
const changed = () => JSON.stringify(options()) !== used;

function showOptions() {
  const model = offer?.models.find((one) => ($("model").value ? one.name === $("model").value : one.is_default));
  const budget = Number($("budget").value);
  const bits = model?.candidate_bits ?? [];
  const fixed = bits.length < 2;
  $("budget").disabled = fixed;
  const amount = Math.abs(budget) > 3 ? "many" : "some";
  const text = fixed ? `always ${bits[0]} bits` : budget === 0 ? "as trained"
    : `${amount} ${budget < 0 ? "fewer" : "more"} (${budget > 0 ? "+" : "−"}${Math.abs(budget)})`;
  $("budget-value").textContent = text;
  $("budget").setAttribute("aria-valuetext", text);
  if (!view.range && bits.length) showRange([bits[0], bits.at(-1)]);
  if (document.body.dataset.state === "done") $("run").hidden = !changed();
}

/** Label the ends and the middle of the ramp; where all tiles have the same bits there is one label. */
function showRange([low, high]) {
  const ticks = low === high ? [high] : [low, (low + high) / 2, high];
  $("ramp-ticks").replaceChildren(...ticks.map((bits) => element("span", `${bits} bits`)));
}

function element(name, text, more = {}) {
  return Object.assign(document.createElement(name), { textContent: text, ...more });
}

async function loadOffer() {
  try {
    offer = await (await fetch("v1/models")).json();
  } catch {
    complain("The service does not answer. Is cadyq serve still running?");
    return;
  }
  const labels = offer.models.map(({ scale, candidate_bits: bits }) =>
    `×${scale}, ${bits.length > 1 ? `${bits[0]} to ${bits.at(-1)} bits by content` : `${bits[0]} bits everywhere`}`);
  const automatic = offer.models.length > 1 ? [element("option", "Automatic, by the kind of file", { value: "" })] : [];
  $("model").replaceChildren(...automatic, ...offer.models.map(({ name }, i) => {
    const isOnly = labels.indexOf(labels[i]) === labels.lastIndexOf(labels[i]);
    return element("option", isOnly ? labels[i] : `${labels[i]} (${name})`, { value: name, title: name });
  }));
  const { max_pixels, max_upload } = offer.limits;
  const local = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
  $("limits").textContent = `PNG, JPEG, WebP, TIFF or AVIF, up to ${(max_pixels / 1e6).toFixed(1)} megapixels and ${Math.round(max_upload / 2 ** 20)} MiB.`
    + (local ? " It does not leave this machine." : "");
  showOptions();
}

// --- one run, from the file to the result

async function start(chosen) {
  setState("busy", "Reading the picture…"); // at once: what is shown as done is so no longer
  await stop();
  const mine = (run = { stopped: false });
  complain("");
  $("figures").hidden = true;
  if (chosen !== file) {
    file = chosen;
    view.clear();
  }
  view.setSplit(0);
  setState("busy", "Reading the picture…");
  setBar();
  $("view").setAttribute("aria-label", `${file.name || "Picture"}, being upscaled`);
  // The browser may not know the format (TIFF); then the service's own preview comes instead.
  createImageBitmap(file).then((bitmap) => mine === run && !view.layout && view.setBefore(bitmap), () => {});
  used = JSON.stringify(options());
  try {
    const job = await handIn(mine);
    if (!job) return;
    mine.id = job.id;
    watch(mine);
  } catch (error) {
    fail(mine, error.message);
  }
}

/** Send the picture; while the queue is full, try again as the service asks. */
async function handIn(mine) {
  const query = new URLSearchParams({ ...options(), keep: "false" });
  if (file.size > offer.limits.max_upload) {
    throw new Error(`The file has ${megabytes(file.size)}, and the service takes ${megabytes(offer.limits.max_upload)}.`);
  }
  while (!mine.stopped) {
    let answer;
    try {
      answer = await fetch(`v1/jobs?${query}`, { method: "POST", body: file });
    } catch {
      throw new Error("The service does not answer. Is cadyq serve still running?");
    }
    if (answer.ok) return answer.json();
    const wait = Number(answer.headers.get("Retry-After"));
    if (answer.status !== 503 || !wait) throw new Error((await answer.json()).error.message);
    for (let left = wait; left > 0 && !mine.stopped; left--) {
      say(`Many pictures wait; trying again in ${left} s`);
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
  return null;
}

function watch(mine) {
  const source = (mine.source = new EventSource(`v1/jobs/${mine.id}/events`));
  const began = performance.now();
  const on = (name, act) => source.addEventListener(name, (event) => mine === run && act(JSON.parse(event.data)));
  on("queued", ({ ahead }) => say(ahead ? `Waiting, ${ahead} ahead` : "Waiting"));
  on("started", (data) => begin(data));
  on("tiles", async ({ box, bits, preview }) => {
    const image = await picture(preview);
    if (mine === run) view.addPart(box, bits, image);
  });
  on("progress", ({ done, total }) => {
    setBar(done, total);
    const left = ((performance.now() - began) / 1000 / done) * (total - done);
    say(done === total ? "Writing the file…" : `Part ${done} of ${total} is done, about ${duration(left)} left`);
  });
  on("done", ({ figures }) => finish(mine, figures));
  on("failed", ({ message }) => fail(mine, message));
  on("cancelled", () => fail(mine, "The service cancelled it."));
  source.onerror = () => {
    if (source.readyState === EventSource.CLOSED) fail(mine, "The connection to the service was lost.");
  };
}

async function begin(data) {
  view.setLayout(data);
  run.model = data.model;
  say("Upscaling…");
  $("notes").replaceChildren(...data.notes.map((text) => element("li", text)));
  const mine = run;
  if (!view.before) {
    const image = await picture(data.preview);
    if (mine === run && !view.before) view.setBefore(image);
  }
}

async function finish(mine, figures) {
  mine.source.close();
  say("Fetching the result…");
  let blob;
  try {
    const answer = await fetch(`v1/jobs/${mine.id}/result`);
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    blob = await answer.blob();
  } catch (error) {
    return fail(mine, error.message);
  }
  if (mine !== run) return;
  if (address) URL.revokeObjectURL(address);
  address = URL.createObjectURL(blob);
  const link = $("download"), format = JSON.parse(used).format;
  link.href = address;
  link.download = `${(file.name || "picture").replace(/\.[^.]*$/, "")}_x${view.layout.scale}.${format}`;
  link.textContent = `Download ${format.toUpperCase()}, ${megabytes(blob.size)}`;
  showFigures(figures);
  const { width, height } = figures;
  const reduce = Math.sqrt(MOST_PIXELS / (width * height));
  const size = reduce < 1 ? { resizeWidth: Math.round(width * reduce), resizeQuality: "high" } : {};
  const bitmap = await createImageBitmap(blob, size).catch(() => null);
  if (mine !== run) return;
  if (bitmap) view.setAfter(bitmap);
  setState("done", `Done in ${duration(figures.seconds)}: ${width} × ${height}, ${figures.fqr.toFixed(2)} bits on average`);
  view.setSplit(0.5, true);
  $("view").setAttribute("aria-label", `${file.name || "Picture"}, upscaled to ${width} by ${height} pixels; before on the left, after on the right. Plus and minus zoom, arrows move.`);
}

function showFigures(figures) {
  const bits = figures.mean_bits.flat();
  const rows = [
    ["Model", run.model],
    ["Tiles", `${bits.length} of ${figures.tile} × ${figures.tile}`],
    ["Least, most bits of a tile", `${Math.min(...bits).toFixed(1)}, ${Math.max(...bits).toFixed(1)}`],
    ...(figures.exited ? [["Left the network", `${(figures.exited * 100).toFixed(0)} %`]] : []),
    ["Work", `${figures.bitops_g < 10 ? figures.bitops_g.toFixed(1) : Math.round(figures.bitops_g)} G bit operations`],
  ];
  $("figures").querySelector("dl").replaceChildren(...rows.flatMap(([name, value]) => [
    element("dt", name), element("dd", value),
  ]));
  $("figures").hidden = false;
}

function fail(mine, message) {
  if (mine !== run) return;
  mine.source?.close();
  complain(message);
  setState(view.before ? "failed" : "empty", "Not done");
  if (!view.before) file = null;
}

/** End what is under way, and let the service forget it. */
async function stop() {
  const old = run;
  run = null;
  if (!old) return;
  old.stopped = true;
  old.source?.close();
  if (old.id) await fetch(`v1/jobs/${old.id}`, { method: "DELETE" }).catch(() => {});
}

function picture(url) {
  const image = new Image();
  image.src = url;
  return image.decode().then(() => image);
}

// --- what people do

function take(files) {
  const chosen = [...(files ?? [])][0];
  if (!chosen) return;
  if (offer) start(chosen);
  else loadOffer().then(() => offer && start(chosen));
}

$("choose").onclick = $("another").onclick = () => $("file").click();
$("file").onchange = () => {
  take($("file").files);
  $("file").value = "";
};
$("run").onclick = () => file && start(file);
$("cancel").onclick = async () => {
  await stop();
  setState("failed", "Cancelled");
};
$("heat").onchange = () => view.setHeat($("heat").checked);
$("options").oninput = showOptions;
$("options").onsubmit = (event) => event.preventDefault();
for (const button of document.querySelectorAll("[data-zoom]")) {
  const acts = { in: () => view.zoomBy(1.5), out: () => view.zoomBy(1 / 1.5), fit: () => view.fit() };
  button.onclick = acts[button.dataset.zoom];
}
addEventListener("paste", (event) => take(event.clipboardData?.files));
let inside = 0; // enter and leave come for every element on the way
addEventListener("dragenter", (event) => {
  event.preventDefault();
  if (++inside) document.body.classList.add("dragging");
});
addEventListener("dragleave", () => {
  if (--inside <= 0) document.body.classList.remove("dragging");
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  inside = 0;
  document.body.classList.remove("dragging");
  take(event.dataTransfer?.files);
});

$("ramp").style.background = rampGradient();
setState("empty");
loadOffer();
