// Run by check_transformers_js.py beside its node_modules: node check_transformers_js.mjs FOLDER TEXTS IMAGE...
// Prints the embeddings of images and texts and the zero-shot logits of a folder with two towers as one line of JSON.
import { readFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import * as hf from '@huggingface/transformers';

const [folder, texts, ...files] = process.argv.slice(2);
hf.env.allowRemoteModels = false;
hf.env.localModelPath = dirname(folder);
const name = basename(folder);
const siglip = JSON.parse(readFileSync(join(folder, 'config.json'), 'utf8')).model_type === 'siglip';
const [Vision, Text] = siglip
  ? [hf.SiglipVisionModel, hf.SiglipTextModel]
  : [hf.CLIPVisionModelWithProjection, hf.CLIPTextModelWithProjection];
const embeds = (output, side) => (siglip ? output.pooler_output : output[`${side}_embeds`]).tolist();

const processor = await hf.AutoProcessor.from_pretrained(name);
const images = await processor(await Promise.all(files.map((file) => hf.RawImage.read(file))));
const image = embeds(await (await Vision.from_pretrained(name))(images), 'image');

const tokenizer = await hf.AutoTokenizer.from_pretrained(name);
const tokens = tokenizer(JSON.parse(texts), { padding: siglip ? 'max_length' : true, truncation: true });
const text = embeds(await (await Text.from_pretrained(name))(tokens), 'text');

const both = await (await hf.AutoModel.from_pretrained(name))({ ...tokens, ...images });
console.log(JSON.stringify({ version: hf.env.version, image, text, logits: both.logits_per_image.tolist() }));
