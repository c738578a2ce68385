// Images of a one-step generator, by onnxruntime-web: image k has the seed `seed + k`. The address keeps seed and class
// (#seed=25&class=3), so that it can be shared.

import { noise } from "./noise.js";
import * as ort from "./ort.wasm.min.mjs";

const COUNT = 50;
const element = (id) => document.getElementById(id);
const say = (line) => { element("status").textContent = line; };

async function start() {
  ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;
  ort.env.wasm.numThreads = 1;
  const { network, sampler } = await (await fetch("config.json")).json();
  const generator = await ort.InferenceSession.create("generator.onnx", { executionProviders: ["wasm"] });
  for (let k = 0; k < network.classes; k++) {
    element("class").add(new Option(network.class_names[k] ?? k, k));
  }
  element("of").hidden = !network.classes;
  read();
  const draw = () => show(generator, network).catch((error) => say(`It failed: ${error.message}`));
  document.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    element("seed").value = seedOf() + COUNT;
    draw();
  });
  for (const id of ["class", "seed"]) element(id).addEventListener("change", draw);
  await draw();
}

function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  element("seed").value = given.get("seed") ?? Math.floor(Math.random() * 1e6);
  element("class").value = given.get("class") ?? "";
}

function seedOf() {
  const given = Math.floor(Number(element("seed").value));
  return Number.isFinite(given) ? Math.min(Math.max(given, 0), 2 ** 32 - 1 - 2 * COUNT) : 0;
}

async function show(generator, network) {
  const seed = seedOf();
  const chosen = element("class").value;
  const [height, width] = network.image_size;
  const tokens = (height / network.patch) * (width / network.patch);
  const numbers = tokens * network.latent_channels;
  const all = new Float32Array(COUNT * numbers);
  const labels = new BigInt64Array(COUNT);
  for (let k = 0; k < COUNT; k++) {
    all.set(noise(seed + k, numbers), k * numbers);
    labels[k] = BigInt(chosen === "" ? (network.classes ? (seed + k) % network.classes : 0) : chosen);
  }
  const inputs = { noise: new ort.Tensor("float32", all, [COUNT, tokens, network.latent_channels]) };
  if (network.classes) inputs.labels = new ort.Tensor("int64", labels, [COUNT]);
  const began = performance.now();
  const { images } = await generator.run(inputs);
  const took = performance.now() - began;
  element("images").replaceChildren(...Array.from({ length: COUNT }, (_, k) => picture(images, k, seed + k)));
  history.replaceState(null, "", `#seed=${seed}${chosen === "" ? "" : `&class=${chosen}`}`);
  say(`${COUNT} images in ${took.toFixed(0)} ms`);
}

function picture(images, k, seed) {
  const [, channels, height, width] = images.dims;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const area = height * width;
  const data = new ImageData(width, height);
  for (let pixel = 0; pixel < area; pixel++) {
    for (let c = 0; c < 4; c++) {
      const from = channels < 3 ? 0 : c;
      const value = images.data[(k * channels + from) * area + pixel];
      data.data[4 * pixel + c] = c === 3 && channels !== 4 ? 255 : Math.round((value + 1) * 127.5);
    }
  }
  canvas.getContext("2d").putImageData(data, 0, 0);
  const image = new Image();
  image.alt = `the image of seed ${seed}`;
  image.src = canvas.toDataURL();
  return image;
}

start().catch((error) => say(`It failed: ${error.message}`));
