"""The detector: a YOLOS that starts from the blocks of an embedded CLIP, on pictures with several shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import YolosConfig, YolosForObjectDetection
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from optimum_regcache.data import reference, scenes
from reference_training.recipes import TrainingRecipe

DEVELOPMENT_IMAGES = 256
START = "clip-scenes-induced"
START_SIZE = 0.3  # side of the boxes that it starts with
_PARTS = {
    "self_attn.q_proj": "attention.attention.query",
    "self_attn.k_proj": "attention.attention.key",
    "self_attn.v_proj": "attention.attention.value",
    "self_attn.out_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "layer_norm1": "layernorm_before",
    "layer_norm2": "layernorm_after",
}


def build_processor() -> Any:
    """The image processor: 64 px, nothing padded, the mean and standard deviation of CLIP."""
    clip = reference.load(START).processor.image_processor
    size = {"height": scenes.SIZE, "width": scenes.SIZE}
    return YolosImageProcessorPil(size=size, do_pad=False, image_mean=clip.image_mean, image_std=clip.image_std)


def build_detector(recipe: TrainingRecipe, seed: int, pixels: torch.Tensor) -> Any:
    """A YOLOS of the recipe, 64 px / patch 8, whose embeddings and blocks are those of the CLIP encoder :data:`START`.

    CLIP has a norm between its embeddings and its blocks, and YOLOS has none: the embeddings take its place, with the mean
    scale that it applies to ``pixels`` [B, 3, H, W].
    """
    torch.manual_seed(seed)
    clip: Any = reference.load(START).model
    vision = clip.config.vision_config
    config = YolosConfig(
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        hidden_act=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
        image_size=[scenes.SIZE, scenes.SIZE],
        patch_size=vision.patch_size,
        num_detection_tokens=recipe.detection_tokens,
        use_mid_position_embeddings=False,
        id2label=dict(enumerate(scenes.SHAPES)),
        label2id={name: i for i, name in enumerate(scenes.SHAPES)},
    )
    model = YolosForObjectDetection(config)
    tower: Any = getattr(clip.vision_model, "vision_model", clip.vision_model)
    state = {}
    for i in range(recipe.blocks):
        for there, here in _PARTS.items():
            for kind in ("weight", "bias"):
                name = f"encoder.layer.{i}.{here}.{kind}"
                state[name] = tower.get_parameter(f"encoder.layers.{i}.{there}.{kind}")
    model.vit.load_state_dict(state, strict=False)
    _embeddings(model.vit.embeddings, tower, pixels)
    _boxes(model, pixels)
    return model


@torch.no_grad()
def _embeddings(mine: Any, tower: Any, pixels: torch.Tensor) -> None:
    norm, theirs = tower.pre_layrnorm, tower.embeddings
    scale = norm.weight / theirs(pixels).std(-1, unbiased=False).mean()

    def normed(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) * scale

    kernel = theirs.patch_embedding.weight.movedim(0, -1)
    mine.patch_embeddings.projection.weight.copy_(normed(kernel).movedim(-1, 0))
    mine.patch_embeddings.projection.bias.zero_()
    places = theirs.position_embedding.weight
    known = normed(places) + norm.bias
    mine.position_embeddings[0, : len(places)] = known
    mine.cls_token.copy_(normed(theirs.class_embedding))
    # detection tokens begin as average patches, spread over the picture, and with a mark of their own that reaches the last
    # block: each looks around its own place, and knows it
    side, count = scenes.SIZE // theirs.patch_size, mine.detection_tokens.shape[1]
    spread = F.interpolate(known[1:].T.reshape(1, -1, side, side), _grid(count), mode="bilinear")
    mine.position_embeddings[0, len(places) :] = spread.flatten(2)[0].T[:count]
    average = normed(theirs.patch_embedding(pixels).flatten(2).mean((0, 2)))
    mine.detection_tokens.copy_(average + torch.randn(mine.detection_tokens.shape))


def _grid(count: int) -> tuple[int, int]:
    """Rows and columns of the places of ``count`` detection tokens."""
    rows = int(count**0.5)
    return rows, -(-count // rows)


@torch.no_grad()
def _boxes(model: Any, pixels: torch.Tensor) -> None:
    """The box head begins with a box at the place of each detection token: its last layer is fitted by least squares."""
    count = model.config.num_detection_tokens
    rows, columns = _grid(count)
    number = torch.arange(count)
    centres = torch.stack(((number % columns + 0.5) / columns, (number // columns + 0.5) / rows), 1)
    wanted = torch.cat((centres, torch.full((count, 2), START_SIZE)), 1).logit()
    hidden = model.vit(pixels).last_hidden_state[:, -count:]
    for layer in (*model.bbox_predictor.layers[:-1], *model.class_labels_classifier.layers[:-1]):
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    *first, last = model.bbox_predictor.layers
    for layer in first:
        hidden = layer(hidden).relu()
    inputs = F.pad(hidden.flatten(0, 1), (0, 1), value=1.0).double()
    gram = inputs.T @ inputs + 1e-4 * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(gram, inputs.T @ wanted.repeat(len(pixels), 1).double()).float()
    last.weight.copy_(solution[:-1].T)
    last.bias.copy_(solution[-1])


class DetectionTask:
    """Pictures with several shapes, and the loss of DETR and YOLOS.

    Attributes:
        processor: of the model.
        pixels: uint8 [images, 3, H, W]; targets: of each image, class and box (centre, size; fractions of the image).
    """

    score_name = "loss"

    def __init__(self, recipe: TrainingRecipe, images: int, seed: int) -> None:
        self.seed, self.processor = seed, build_processor()
        self.pixels, self.targets = self._render("train", images)
        unseen, self.development_targets = self._render("search", DEVELOPMENT_IMAGES)
        self.development = self.normalise(unseen)

    def _render(self, split: str, count: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        pixels, targets = [], []
        for i in tqdm(range(count), desc=f"rendering {split}", mininterval=10):
            found = scenes.render_shapes(split, i, seed=self.seed)
            boxes = torch.tensor(found.boxes) / scenes.SIZE
            boxes[:, :2] += boxes[:, 2:] / 2
            pixels.append(np.asarray(found.image).transpose(2, 0, 1))
            targets.append({"class_labels": torch.tensor(found.categories), "boxes": boxes})
        return torch.from_numpy(np.stack(pixels)), targets

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 to model input."""
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.processor.image_mean, self.processor.image_std))
        return (pixels.float() / 255 - mean) / std

    def batch(self, step: int, batch_size: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        """Model input and targets of one step: a new order each epoch, half of the images mirrored."""
        epoch, position = divmod(step, len(self.pixels) // batch_size)
        generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        rows = torch.randperm(len(self.pixels), generator=generator)[
            position * batch_size : (position + 1) * batch_size
        ]
        mirrored = torch.rand(len(self.pixels), generator=generator)[rows] < 0.5
        pixels, targets = self.pixels[rows], []
        pixels[mirrored] = pixels[mirrored].flip(-1)
        for row, flip in zip(rows.tolist(), mirrored.tolist(), strict=True):
            boxes = self.targets[row]["boxes"].clone()
            if flip:
                boxes[:, 0] = 1 - boxes[:, 0]
            targets.append({"class_labels": self.targets[row]["class_labels"], "boxes": boxes})
        return self.normalise(pixels), targets

    @torch.no_grad()
    def score(self, model: Any) -> float:
        """Loss on the development images."""
        return float(model(self.development, labels=self.development_targets).loss)
