"""Larger models around a tower: pictures that their processors cut into crops, what is measured, and the command line."""
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from optimum.commands.optimum_cli import main
from PIL import Image
from torch.testing._internal.two_tensor import TwoTensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from optimum_regcache import DeletionConfig, set_deletion
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.picture import model_inputs
from optimum_regcache.encoders.outputs import run_once
from optimum_regcache.encoders.passes import image_features, patch_tokens
from optimum_regcache.evaluation.norms import measure_token_norms
from optimum_regcache.layers.linear import quant_linears
from support_table import fit, run
from whole_models import WHOLES

BY_NAME = {whole.family: whole for whole in WHOLES}
SQUARE = {"height": 32, "width": 32}
ONE_CROP: dict[str, tuple[Any, dict[str, Any]]] = {  # a processor, and what makes it give the picture as a whole
    "idefics3": (Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}), {
        "do_image_splitting": False,
    }),
    "internvl": (GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4), {"crop_to_patches": False}),
    "llava-next": (
        LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=[[64, 64]]), {},
    ),
}  # fmt: skip


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((80, 60))


@pytest.mark.parametrize("name", ONE_CROP)
def test_a_picture_that_would_be_cut_is_taken_as_a_whole(name: str) -> None:
    processor, whole = ONE_CROP[name]
    cut = processor(images=picture(0), return_tensors="pt")["pixel_values"]
    assert cut.shape[-5:-3].numel() > 1  # pictures x crops
    inputs = model_inputs(picture(0), processor, "a picture")
    assert list(inputs) == ["pixel_values"]
    expected = processor(images=picture(0), return_tensors="pt", **whole)["pixel_values"]
    assert torch.equal(inputs["pixel_values"], expected.reshape(-1, 3, 32, 32)[0])


def test_pixels_that_are_padding_are_refused() -> None:
    mask = torch.ones(2, 32, 32, dtype=torch.int64)
    batch = {"pixel_values": torch.rand(2, 3, 32, 32), "pixel_attention_mask": mask}
    assert list(ImageInputs(batch)[1]) == ["pixel_values"]
    mask[1, 24:] = 0
    with pytest.raises(ValueError, match=r"Item 0 of the data is padded: 256 of its 1024 pixels are masked\. Resize"):
        ImageInputs(batch)[1]


def test_what_a_deletion_saves_is_measured_as_the_model_calls_its_tower() -> None:
    """LLaVA reads states between the blocks, where deleted tokens are masked: it saves nothing. PaliGemma reads the last."""
    for family, tokens in (("LLaVA (CLIP)", 17), ("PaliGemma", 14)):
        model = BY_NAME[family].build()
        set_deletion(model, DeletionConfig(block=1, count=2))
        norms = measure_token_norms(model, [{"pixel_values": torch.rand(2, 3, 32, 32)}])
        assert norms.tokens[-1] == tokens


def test_tensors_of_another_quantizer_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    whole = BY_NAME["LLaVA (CLIP)"]
    model = fit(whole.build(), [whole.picture(seed) for seed in range(4)], registers={"mode": "none"})
    packed = model.model.language_model.layers[0].mlp.up_proj
    packed.weight = torch.nn.Parameter(TwoTensor(packed.weight.detach(), packed.weight.detach()), requires_grad=False)
    with pytest.raises(ValueError, match=r"1 tensors, \S+up_proj\.weight the first, were quantized by something else"):
        model.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_folder_with_a_vlm_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder, pictures = BY_NAME["LLaVA (CLIP)"], tmp_path / "llava", tmp_path / "pictures"
    whole.build().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE).save_pretrained(folder)
    pictures.mkdir()
    for seed in range(12):
        picture(seed).save(pictures / f"{seed}.png")
    command = ["optimum-cli", "regcache", "quantize", "--model", str(folder), "--dataset", str(pictures), "--quick"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path / "out")])
    main()
    assert "llava W8A8 on 4 unseen images of pictures" in capsys.readouterr().out
    model = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert {name.split("encoder")[0] for name, _ in quant_linears(model)} == {"model.vision_tower."}
    model.generation_config.eos_token_id = None
    assert run(whole, model)[-1].shape == (1, 22)
    results = tmp_path / "results.json"
    command = ["optimum-cli", "regcache", "evaluate", "--model", str(tmp_path / "out"), "--dataset", str(pictures)]
    monkeypatch.setattr(sys, "argv", [*command, "--float-model", str(folder), "--output", str(results)])
    main()
    found = json.loads(results.read_text())["tasks"]
    assert list(found) == ["cosine", "patch_cosine", "projector"]
    assert 0.9 < found["projector"]["projected tokens"]["value"] < 1
    for seed in range(24):
        (tmp_path / "labelled" / str(seed % 2)).mkdir(parents=True, exist_ok=True)
        picture(seed).save(tmp_path / "labelled" / str(seed % 2) / f"{seed}.png")
    labelled = ["--dataset", str(tmp_path / "labelled"), "--overwrite", "--task", "knn", "linear_probe"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, *labelled])
    main()
    found = json.loads(results.read_text())["tasks"]
    assert found["knn"]["plain votes"]["count"] == 8
    assert found["linear_probe"]["own probe"]["float_value"] is not None


def test_where_patches_are_read_the_pooled_feature_is_their_mean() -> None:
    whole = next(w for w in WHOLES if w.family == "LLaVA (CLIP)")
    model, pictures = whole.build(), [whole.picture(seed) for seed in range(2)]
    (batch,) = ImageInputs(pictures).batches(2)
    found = run_once(model, batch, tokens=True)
    tokens, lengths = patch_tokens(model, batch)
    torch.testing.assert_close(found.tokens, tokens)
    torch.testing.assert_close(found.pooled, torch.stack([part.mean(0) for part in tokens.split(lengths)]))
    torch.testing.assert_close(found.features, image_features(model, batch))
    assert found.features.shape[1] == found.pooled.shape[1] * lengths[0]
