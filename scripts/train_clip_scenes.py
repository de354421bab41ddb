"""Train the embedded reference encoder ``clip-scenes``: a small CLIP on procedural scenes.

    python scripts/train_clip_scenes.py --output optimum_regcache/reference/clip-scenes

About 25 minutes on two CPU cores. Interrupted runs resume from ``--checkpoint``. One seed gives one result on one machine
and thread count; elsewhere the result is statistically the same.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from optimum_regcache import scenes

MAX_TEXT_TOKENS = 32


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE) whose merges cover the captions; any other text still tokenizes byte by byte."""
    words = [*scenes.COLOURS, *scenes.SHAPES, *scenes.BACKGROUNDS, *scenes.TEXTURES]
    words += [
        "a",
        "an",
        "small",
        "large",
        "at",
        "the",
        "top",
        "bottom",
        "left",
        "right",
        "on",
        "background",
        "photo",
        "of",
        "picture",
    ]
    # merges by hand, left to right through each word: a BPE trainer breaks ties at random, and one seed must give one result
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in sorted(set(words)):
        head, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for symbol in rest:
            merges.append((head, symbol))
            head += symbol
    merges = list(dict.fromkeys(merges))
    symbols = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(m) for m in merges)]
    vocab = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    for symbol in ("<|startoftext|>", "<|endoftext|>"):
        vocab[symbol] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TEXT_TOKENS)


def build_model(tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """Vision tower 8 x 128 on 64 px / patch 8, text tower 2 x 64."""
    torch.manual_seed(seed)
    config = CLIPConfig(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "image_size": scenes.SIZE,
            "patch_size": 8,
            "projection_dim": 64,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": MAX_TEXT_TOKENS,
            "projection_dim": 64,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=64,
    )
    return CLIPModel(config)


def render_pixels(
    split: str, count: int, seed: int, processor: CLIPImageProcessorPil
) -> tuple[torch.Tensor, list[str], list[int]]:
    """Render ``count`` scenes; pixels stay uint8 [count, 3, H, W] until a batch is normalised."""
    rendered = [scenes.render(split, i, seed=seed) for i in tqdm(range(count), desc=f"rendering {split}")]
    pixels = np.stack([np.asarray(s.image) for s in rendered]).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(pixels)), [s.caption for s in rendered], [s.label for s in rendered]


def normalise(pixels: torch.Tensor, processor: CLIPImageProcessorPil) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    return (pixels.float() / 255 - mean) / std


@torch.no_grad()
def zero_shot_accuracy(model, tokenizer, pixels: torch.Tensor, labels: list[int]) -> float:
    model.eval()
    text = tokenizer([scenes.prompt(n) for n in scenes.CLASS_NAMES], padding=True, return_tensors="pt")
    text_embeds = F.normalize(model.get_text_features(**text).pooler_output, dim=-1)
    hits = 0
    for start in range(0, len(labels), 128):
        image_embeds = model.get_image_features(pixels[start : start + 128]).pooler_output
        hits += int((image_embeds @ text_embeds.T).argmax(-1).eq(torch.tensor(labels[start : start + 128])).sum())
    model.train()
    return hits / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the finished model")
    parser.add_argument("--checkpoint", type=Path, default=Path("clip-scenes.ckpt"))
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--images", type=int, default=32768, help="training scenes, visited again in a new order each epoch"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_flush_denormal(True)
    tokenizer = build_tokenizer()
    image_processor = CLIPImageProcessorPil(
        size={"height": scenes.SIZE, "width": scenes.SIZE}, crop_size={"height": scenes.SIZE, "width": scenes.SIZE}
    )
    model = build_model(tokenizer, args.seed)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98)
    )
    warmup = min(100, args.steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(
            (s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, s - warmup) / max(1, args.steps - warmup))) + 0.01
        ),
    )
    start = 0
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
        print(f"resumed at step {start} from {args.checkpoint}")

    pixels, captions, _ = render_pixels("train", args.images, args.seed, image_processor)
    dev_pixels, _, dev_labels = render_pixels("search", 512, args.seed, image_processor)
    dev_pixels = normalise(dev_pixels, image_processor)
    _, caption_ids = np.unique(np.asarray(captions), return_inverse=True)
    caption_ids = torch.from_numpy(caption_ids)
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_TEXT_TOKENS, truncation=True, return_tensors="pt")
    longest = int(tokens.attention_mask.sum(1).max())
    input_ids, attention_mask = tokens.input_ids[:, :longest], tokens.attention_mask[:, :longest]

    model.train()
    per_epoch = args.images // args.batch_size
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="training")
    begun = time.time()
    for step in progress:
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(args.images, generator=torch.Generator().manual_seed(args.seed * 1000 + epoch))
        rows = order[position * args.batch_size : (position + 1) * args.batch_size]
        output = model(
            input_ids=input_ids[rows],
            attention_mask=attention_mask[rows],
            pixel_values=normalise(pixels[rows], image_processor),
        )
        # identical captions in a batch are all positives
        same = caption_ids[rows][:, None].eq(caption_ids[rows][None, :]).float()
        target = same / same.sum(1, keepdim=True)
        loss = 0.5 * (
            F.cross_entropy(output.logits_per_image, target) + F.cross_entropy(output.logits_per_text, target)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if (step + 1) % 25 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            accuracy = zero_shot_accuracy(model, tokenizer, dev_pixels, dev_labels)
            print(
                f"step {step + 1}: loss {loss.item():.3f}, search-split zero-shot {accuracy:.4f}, {time.time() - begun:.0f} s",
                flush=True,
            )
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step + 1,
            }
            temporary = args.checkpoint.with_suffix(".tmp")
            torch.save(state, temporary)
            os.replace(temporary, args.checkpoint)

    model.eval().half()
    model.save_pretrained(args.output)
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(args.output)
    print(f"saved to {args.output}")


if __name__ == "__main__":
    main()
