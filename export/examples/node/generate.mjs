// Answers a chat message with a bundle from disk, through transformers.js:
//   node generate.mjs BUNDLE "What is a lighthouse?" [TOKENS]
import path from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, TextStreamer, env } from "@huggingface/transformers";

const [folder, message, tokens = "64"] = process.argv.slice(2);
if (!folder || !message) {
  console.error('usage: node generate.mjs BUNDLE "MESSAGE" [TOKENS]');
  process.exit(2);
}
const bundle = path.resolve(folder);
env.allowRemoteModels = false; // what the folder lacks is an error, not a download
env.localModelPath = path.dirname(bundle);

const tokenizer = await AutoTokenizer.from_pretrained(path.basename(bundle));
const model = await AutoModelForCausalLM.from_pretrained(path.basename(bundle), { device: "cpu" });
const inputs = tokenizer.apply_chat_template([{ role: "user", content: message }], {
  add_generation_prompt: true,
  return_dict: true,
});
const streamer = new TextStreamer(tokenizer, { skip_prompt: true, skip_special_tokens: true });
await model.generate({ ...inputs, max_new_tokens: Number(tokens), do_sample: false, streamer });
await model.dispose();
