"""The task: contrastive learning on captioned scenes, and zero-shot accuracy on scenes that are not trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from optimum_regcache.data import scenes
from reference_training.encoders import TEXT_TOKENS, Gates, build_processor, build_tokenizer, encode, text_features
from reference_training.recipes import TrainingRecipe

DEVELOPMENT_IMAGES = 512


class SceneTask:
    """Scenes, captions and the loss of one recipe.

    Attributes:
        tokenizer, processor: of the encoder.
        pixels: uint8 [images, 3, H, W]; labels: int64 [images]; boxes: float [images, 4].
        development: normalised pixels of the search split, its labels: ``development_labels``.
    """

    def __init__(self, recipe: TrainingRecipe, images: int, seed: int) -> None:
        self.kind, self.seed = recipe.kind, seed
        self.tokenizer = build_tokenizer(self.kind)
        self.processor = build_processor(self.kind, self.tokenizer)
        rendered = self._render("train", images)
        self.pixels = _pixels(rendered)
        self.labels = torch.tensor([s.label for s in rendered])
        self.boxes = torch.tensor([s.box for s in rendered])
        unseen = self._render("search", DEVELOPMENT_IMAGES)
        self.development = self.normalise(_pixels(unseen))
        self.development_labels = torch.tensor([s.label for s in unseen])
        captions, inverse = np.unique(np.asarray([s.caption for s in rendered]), return_inverse=True)
        self._caption = torch.from_numpy(inverse)
        self._captions = self._tokens([str(c) for c in captions])
        self._prompts = self._tokens([scenes.prompt(name) for name in scenes.CLASS_NAMES])

    def _render(self, split: str, count: int) -> list[scenes.Scene]:
        return [scenes.render(split, i, seed=self.seed) for i in tqdm(range(count), desc=f"rendering {split}")]

    def _tokens(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"padding": "max_length", "max_length": TEXT_TOKENS[self.kind], "truncation": True}
        tokens = self.tokenizer(texts, return_attention_mask=True, return_tensors="pt", **options)
        length = int(tokens.attention_mask.sum(1).max()) if self.kind == "clip" else TEXT_TOKENS[self.kind]
        return tokens.input_ids[:, :length], tokens.attention_mask[:, :length]

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 to model input."""
        images = self.processor.image_processor
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (images.image_mean, images.image_std))
        return (pixels.float() / 255 - mean) / std

    def rows(self, step: int, batch_size: int) -> torch.Tensor:
        """Images of one step: a new order each epoch."""
        epoch, position = divmod(step, len(self.pixels) // batch_size)
        generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        order = torch.randperm(len(self.pixels), generator=generator)
        return order[position * batch_size : (position + 1) * batch_size]

    def loss(self, model: Any, embedding: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Half the loss against the captions of the batch, half against the 64 class prompts.

        CLIP: cross-entropy in both directions, equal captions are all positives. SigLIP: log-sigmoid over all pairs.
        """
        image, label, scale = F.normalize(embedding, dim=-1), self.labels[rows], model.logit_scale.exp()
        used, inverse = torch.unique(self._caption[rows], return_inverse=True)
        text = text_features(model, self.kind, *(t[used] for t in self._captions))
        prompts = text_features(model, self.kind, *self._prompts)
        if self.kind == "clip":
            logits = scale * image @ text[inverse].T
            same = inverse[:, None].eq(inverse[None]).float()
            target = same / same.sum(1, keepdim=True)
            pairs = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
            return pairs * 0.5 + F.cross_entropy(scale * image @ prompts.T, label) * 0.5
        total = torch.zeros(())
        for features, positive in ((text, inverse), (prompts, label)):
            logits = scale * image @ features.T + model.logit_bias
            sign = 2 * F.one_hot(positive, len(features)).float() - 1
            total = total - 0.5 * F.logsigmoid(logits * sign).sum(1).mean()
        return total

    @torch.no_grad()
    def accuracy(self, model: Any, gates: dict[int, Gates] | None = None) -> float:
        """Zero-shot top-1 on the development images."""
        prompts = text_features(model, self.kind, *self._prompts)
        image = F.normalize(encode(model, self.development, gates=gates).embedding, dim=-1)
        return (image @ prompts.T).argmax(-1).eq(self.development_labels).float().mean().item()


def _pixels(rendered: list[scenes.Scene]) -> torch.Tensor:
    pixels = np.stack([np.asarray(s.image) for s in rendered]).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(pixels))


def make_optimizers(model: Any, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest; norms and biases do not decay."""
    matrices, decay, plain = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "encoder.layers" in name:
            matrices.append(parameter)
        else:
            (decay if parameter.ndim >= 2 else plain).append(parameter)
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return [
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98)),
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    ]
