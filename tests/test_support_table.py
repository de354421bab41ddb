"""docs/reference/supported-models.md says what a fresh run finds."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import pytest
import torch
import transformers as hf
from packaging.version import Version
from torch import nn

import support_table
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.encoders.passes import image_features, patch_tokens
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.encoders.versions import TESTED_TRANSFORMERS
from optimum_regcache.search.mining import mine_tokens
from whole_models import WHOLES, Whole

FAST = ("LLaVA (CLIP)", "LLaVA-NeXT", "SmolVLM", "InternVL", "MetaCLIP 2", "DPT (DINOv2)", "SegFormer")
BY_NAME = {whole.family: whole for whole in WHOLES}
every_family = pytest.mark.parametrize(
    "whole",
    [pytest.param(w, id=w.family, marks=[] if w.family in FAST else pytest.mark.slow) for w in WHOLES],
)


@every_family
def test_the_page_has_what_a_run_finds(whole: Whole) -> None:
    reason = whole.missing()
    if reason is not None:
        pytest.skip(reason)
    found = support_table.table([support_table.examine(whole)]).splitlines()[-1]
    line = next(line for line in support_table.committed() if line.startswith(f"| {whole.family} |"))
    if Version(hf.__version__).release[:2] == Version(TESTED_TRANSFORMERS[1]).release[:2]:
        assert found == line
    else:  # towers have other names in other releases, and not all ask for states between the blocks
        ours, theirs = (text.replace(" masked grid ", " yes ").split("|")[4:] for text in (found, line))
        assert ours == theirs


def test_the_page_has_every_family_once() -> None:
    assert [line.split(" | ")[0].removeprefix("| ") for line in support_table.committed()] == [w.family for w in WHOLES]


def test_a_wrong_model_makes_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, fit = BY_NAME["LLaVA (CLIP)"], support_table.fit

    def careless(model: nn.Module, images: list, **parts: dict) -> nn.Module:
        quantized = fit(model, images, **parts)
        quantized.lm_head.weight = nn.Parameter(quantized.lm_head.weight * 1.01)
        return quantized

    monkeypatch.setattr(support_table, "fit", careless)
    with pytest.raises(AssertionError, match=r"lm_head\.weight changed"):
        support_table.examine(whole)


def test_features_of_a_dense_model_are_the_patch_tokens_of_all_its_stages() -> None:
    """DPT reads sequences that begin with CLS, not grids: their mean over channels, which a LayerNorm makes constant, says
    nothing."""
    whole = BY_NAME["DPT (DINOv2)"]
    model = whole.build()
    batch = next(ImageInputs([whole.picture(seed) for seed in range(2)]).batches(2))
    with torch.no_grad():
        features, (tokens, rows) = image_features(model, batch), patch_tokens(model, batch)
        maps = find_tower(model).module(**batch).feature_maps
    assert rows == [4 * 16] * 2
    assert torch.equal(tokens.reshape(2, 4, 16, -1), torch.stack([m[:, 1:] for m in maps], 1))
    expected = nn.functional.normalize(tokens, dim=-1).reshape(2, -1) / 8  # 64 tokens of length 1
    torch.testing.assert_close(features, expected)


def test_mined_keys_are_those_that_attention_sees() -> None:
    """InternViT-6B normalizes keys after their projection."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = hf.InternVLVisionConfig(**size, image_size=32, patch_size=8, use_qk_norm=True, norm_type="rms_norm")
    model = hf.InternVLVisionModel(config).eval()
    pixels = torch.rand(2, 3, 32, 32)
    mined = mine_tokens(model, [{"pixel_values": pixels}], [1], top=3, progress=False)[1]
    attention, norm = find_tower(model).attention(1), find_tower(model).norm(1, 0)
    with torch.no_grad():
        keys = attention.k_norm(attention.k_proj(norm(mined.states)))
    torch.testing.assert_close(mined.keys[1].flatten(1), keys)
    assert find_tower(model).family.normalizes_keys(attention)
