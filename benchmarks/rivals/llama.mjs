// Decode greedily with llama.cpp, and print token ids and the time of each as JSON.
// node llama.mjs MODULES MODEL.gguf THREADS PROMPT_IDS(JSON) TOKENS
import { pathToFileURL } from "node:url";

const [modules, modelPath, threads, prompt, tokens] = process.argv.slice(2);
const { getLlama } = await import(pathToFileURL(`${modules}/node-llama-cpp/dist/index.js`));
const llama = await getLlama({ gpu: false, build: "never", maxThreads: +threads, logLevel: "error" });
const model = await llama.loadModel({ modelPath, gpuLayers: 0, useMmap: true });
const context = await model.createContext({ contextSize: 512, threads: +threads });
const ids = [], seconds = [];
let before = performance.now();
const given = { temperature: 0, yieldEogToken: true };
for await (const token of context.getSequence().evaluate(JSON.parse(prompt), given)) {
    const now = performance.now();
    seconds.push((now - before) / 1e3);
    before = now;
    ids.push(token);
    if (ids.length === +tokens) break;
}
console.log(JSON.stringify({ ids, seconds }));
process.exit(0);
