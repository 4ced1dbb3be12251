// A classifier from one ONNX file, with the preprocessing that its metadata asks for.
import * as ort from "onnxruntime-web/wasm";

ort.env.wasm.numThreads = 1; // more need a page that is cross-origin isolated

export class Classifier {
  constructor(session, preprocessing) {
    this.session = session;
    this.preprocessing = preprocessing;
  }

  static async load(url) {
    const response = await fetch(url);
    if (!response.ok) throw new Error(`no ${url}: copy the model.onnx of an output folder here`);
    const file = new Uint8Array(await response.arrayBuffer());
    const { preprocessing } = metadata(file);
    if (!preprocessing) throw new Error(`${url} does not say how to preprocess images`);
    return new Classifier(await ort.InferenceSession.create(file), JSON.parse(preprocessing));
  }

  // The probability of each class. The canvas shows what the model sees.
  async classify(image, canvas = document.createElement("canvas")) {
    const input = this.prepare(image, canvas);
    const outputs = await this.session.run({ [this.session.inputNames[0]]: input });
    const logits = [...outputs[this.session.outputNames[0]].data];
    const largest = Math.max(...logits);
    const odds = logits.map((logit) => Math.exp(logit - largest));
    const total = odds.reduce((sum, value) => sum + value);
    return odds.map((value) => value / total);
  }

  prepare(image, canvas) {
    const { mean, std, resize, crop, interpolation, size: [height, width] } = this.preprocessing;
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingEnabled = interpolation !== "nearest";
    context.imageSmoothingQuality = "high";
    if (crop === "none") {
      context.drawImage(image, 0, 0, width, height);
    } else {
      // The shorter side gets the length, the middle is cut out.
      const shorter = Math.min(image.width, image.height);
      const scale = Math.max(resize ?? shorter, height, width) / shorter;
      const [w, h] = [Math.trunc(image.width * scale), Math.trunc(image.height * scale)];
      context.drawImage(image, Math.round((width - w) / 2), Math.round((height - h) / 2), w, h);
    }
    const pixels = context.getImageData(0, 0, width, height).data; // red, green, blue, opacity
    const values = new Float32Array(mean.length * height * width);
    for (let channel = 0; channel < mean.length; channel++) {
      for (let i = 0; i < height * width; i++) {
        const value = pixels[4 * i + channel] / 255;
        values[channel * height * width + i] = (value - mean[channel]) / std[channel];
      }
    }
    return new ort.Tensor("float32", values, [1, mean.length, height, width]);
  }
}

// The metadata of an ONNX file: field 14 of its ModelProto, entries of a key (1) and a value (2).
// onnxruntime-web does not hand it out.
export function metadata(file) {
  const found = {};
  for (const [field, bytes] of fields(file)) {
    if (field !== 14) continue;
    const entry = Object.fromEntries(fields(bytes));
    const [key, value] = [entry[1], entry[2]].map((text) => new TextDecoder().decode(text));
    found[key] = value;
  }
  return found;
}

// The fields of a protobuf message that hold bytes, with their numbers; the others are passed over.
function* fields(bytes) {
  let at = 0;
  const number = () => {
    let value = 0, factor = 1, byte;
    do {
      byte = bytes[at++];
      value += (byte & 127) * factor;
      factor *= 128;
    } while (byte > 127);
    return value;
  };
  while (at < bytes.length) {
    const tag = number();
    const kind = tag & 7;
    if (kind === 0) number();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind === 2) {
      const length = number();
      yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
      at += length;
    } else throw new Error("this is no ONNX file");
  }
}
