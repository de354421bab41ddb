"""The encoders: tokenizer, model, processor, and a forward pass in which every image has registers and deletion of its own."""
# pyright: reportArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from optimum_regcache.data import scenes
from reference_training.recipes import TrainingRecipe

PATCH = 8
TEXT_TOKENS = {"clip": 32, "siglip": 64}  # transformers' zero-shot pipeline pads SigLIP prompts to 64
_OTHER_WORDS = [
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


def build_tokenizer(kind: str) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE) whose merges cover the captions; any other text still tokenizes byte by byte."""
    words = [*scenes.COLOURS, *scenes.SHAPES, *scenes.BACKGROUNDS, *scenes.TEXTURES, *_OTHER_WORDS]
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
    extra = {"model_input_names": ["input_ids"]} if kind == "siglip" else {}  # SigLIP attends to its padding
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_TOKENS[kind], **extra)


def build_model(recipe: TrainingRecipe, tokenizer: CLIPTokenizer, seed: int) -> Any:
    """Vision tower of the recipe on 64 px / patch 8, text tower 2 x 64."""
    torch.manual_seed(seed)
    vision = {
        "hidden_size": recipe.width,
        "intermediate_size": 4 * recipe.width,
        "num_hidden_layers": recipe.blocks,
        "num_attention_heads": recipe.heads,
        "image_size": scenes.SIZE,
        "patch_size": PATCH,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TEXT_TOKENS[recipe.kind],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if recipe.kind == "clip":
        size = {"projection_dim": 64}
        return CLIPModel(CLIPConfig(vision_config=vision | size, text_config=text | size, projection_dim=64))
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text | {"projection_size": recipe.width}))
    model.logit_scale.data.fill_(math.log(10))
    model.logit_bias.data.fill_(-6.0)
    return model


def build_processor(kind: str, tokenizer: CLIPTokenizer) -> Any:
    """Processor with image processor and tokenizer."""
    size = {"height": scenes.SIZE, "width": scenes.SIZE}
    if kind == "clip":
        return CLIPProcessor(image_processor=CLIPImageProcessorPil(size=size, crop_size=size), tokenizer=tokenizer)
    return SiglipProcessor(image_processor=SiglipImageProcessorPil(size=size), tokenizer=tokenizer)


def text_features(model: Any, kind: str, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Normalised text embeddings [n, D]."""
    masked = {"attention_mask": attention_mask} if kind == "clip" else {}
    return F.normalize(model.get_text_features(input_ids=input_ids, **masked).pooler_output, dim=-1)


@dataclass
class Gates:
    """Register neurons of one block under training: their rows of fc1, kept apart from the matrix.

    Attributes:
        neurons: int64 [n], their numbers.
        weight, bias: [n, D], [n].
    """

    neurons: torch.Tensor
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter


Prefix = dict[int, tuple[torch.Tensor, torch.Tensor]]  # block -> K, V of the register, each [H, d]


@dataclass
class Trace:
    """One forward pass.

    Attributes:
        embedding: [B, D].
        states: input of every block and output of the last, each [B, N, D].
        dropped: bool [B, N], None if nothing was deleted.
        keys, values, attention: watched block -> [B, H, N, d], and probabilities [B, H, N, N (+ 1, the register, first)].
        pre_activation: watched block -> [B, N, M].
    """

    embedding: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    states: list[torch.Tensor] = field(default_factory=list)
    dropped: torch.Tensor | None = None
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, torch.Tensor] = field(default_factory=dict)
    pre_activation: dict[int, torch.Tensor] = field(default_factory=dict)


def num_prefix_tokens(kind: str) -> int:
    """1 for CLIP's CLS token, 0 for SigLIP."""
    return int(kind == "clip")


def encode(  # noqa: PLR0913 (everything that training may vary, each with its name)
    model: Any,
    pixels: torch.Tensor,
    *,
    mlp_keep: torch.Tensor | None = None,
    prefix: Prefix | None = None,
    logit_bias: torch.Tensor | None = None,
    delete_block: int | None = None,
    delete_count: torch.Tensor | None = None,
    watch: range = range(0),
    gates: dict[int, Gates] | None = None,
) -> Trace:
    """The vision tower with registers and deletion per image, differentiable.

    The package's own runtime treats all images of a batch alike; training needs a mixture. Deleted tokens are masked, not
    gathered, up to and including SigLIP's pooling head (which the package shows the mean of their neighbours instead).

    Args:
        model: `CLIPModel` or `SiglipModel`.
        pixels: [B, 3, H, W].
        mlp_keep: [blocks (+ 1, SigLIP's pooling head), B], factor of each MLP's output; gated neurons stay.
        prefix: registers.
        logit_bias: [B], ln(tau); -inf for images without registers.
        delete_block: at whose input tokens are deleted.
        delete_count: int64 [B].
        watch: blocks to record.
        gates: block -> register neurons whose rows of fc1 are replaced.
    """
    tower = model.vision_model
    x = tower.embeddings(pixels)
    clip = hasattr(tower, "pre_layrnorm")
    if clip:
        x = tower.pre_layrnorm(x)
    batch, tokens, width = x.shape
    trace, dropped = Trace(), None
    blocks = tower.encoder.layers
    for i, block in enumerate(blocks):
        if delete_block == i and delete_count is not None:
            norms = x.detach().abs().amax(-1).clone()
            norms[:, : int(clip)] = -1
            rank = norms.argsort(1, descending=True).argsort(1)
            dropped = rank < delete_count[:, None]
        trace.states.append(x)
        attention = block.self_attn
        heads = attention.num_heads
        u = block.layer_norm1(x)
        q, k, v = (
            project(u).view(batch, tokens, heads, width // heads).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        register = prefix.get(i) if prefix is not None else None
        if register is None and dropped is None and i not in watch:
            o = F.scaled_dot_product_attention(q, k, v)
        else:
            logits = q @ k.transpose(-1, -2) * (width // heads) ** -0.5
            if dropped is not None:
                logits = logits.masked_fill(dropped[:, None, None, :], float("-inf"))
            if register is not None and logit_bias is not None:
                key, value = register
                column = torch.einsum("bhnd,hd->bhn", q, key) * (width // heads) ** -0.5 + logit_bias[:, None, None]
                probs = torch.cat((column.unsqueeze(-1), logits), -1).softmax(-1)
                o = probs[..., 1:] @ v + probs[..., :1] * value[None, :, None, :]
            else:
                probs = logits.softmax(-1)
                o = probs @ v
            if i in watch:
                trace.keys[i], trace.values[i], trace.attention[i] = k, v, probs
        x = x + attention.out_proj(o.transpose(1, 2).reshape(batch, tokens, width))
        g = block.layer_norm2(x)
        z = block.mlp.fc1(g)
        if gates is not None and i in gates:
            z = z.index_copy(-1, gates[i].neurons, g @ gates[i].weight.t() + gates[i].bias)
        if i in watch:
            trace.pre_activation[i] = z
        h = block.mlp.activation_fn(z)
        y = block.mlp.fc2(h)
        if mlp_keep is not None:
            y = y * mlp_keep[i][:, None, None]
            if gates is not None and i in gates:
                n = gates[i].neurons
                y = y + (1 - mlp_keep[i])[:, None, None] * (h[..., n] @ block.mlp.fc2.weight[:, n].t())
        x = x + y
    trace.states.append(x)
    trace.dropped = dropped
    x = tower.post_layernorm(x[:, 0] if clip else x)
    if clip:
        trace.embedding = model.visual_projection(x)
        return trace
    head = tower.head
    pooled = head.attention(head.probe.repeat(batch, 1, 1), x, x, key_padding_mask=dropped, need_weights=False)[0]
    y = head.mlp(head.layernorm(pooled))
    if mlp_keep is not None and len(mlp_keep) > len(blocks):
        y = y * mlp_keep[-1][:, None, None]
    trace.embedding = (pooled + y)[:, 0]
    return trace
