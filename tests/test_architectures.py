"""The table of encoder families: towers, blocks, quantization sites."""
# pyright: reportArgumentType=false

from __future__ import annotations

import re

import pytest
import transformers as hf
from detectors import DETECTOR, EOMT
from models import (
    BLOCKS,
    CLIP_CLASSIFIER,
    COMPOSITES,
    DINOV2_BACKBONE,
    HEAD_DIM,
    HEADS,
    INNER,
    MODELS,
    TOWER_PREFIX,
    TOWERS,
    TinyModel,
)
from torch import nn

from optimum_regcache.encoders.families import FAMILIES, supported_encoders
from optimum_regcache.encoders.sites import quantization_sites
from optimum_regcache.encoders.tower import find_tower

every_model = pytest.mark.parametrize(
    "tiny", [*MODELS.values(), *INNER.values(), CLIP_CLASSIFIER, DETECTOR, EOMT, DINOV2_BACKBONE], ids=lambda t: t.name
)
every_tower = pytest.mark.parametrize("tiny", [*TOWERS.values(), *INNER.values()], ids=lambda t: t.name)

FAMILY_NAMES = {
    "clip": "CLIP",
    "siglip": "SigLIP",
    "siglip2": "SigLIP2",
    "dinov2": "DINOv2",
    "dinov2_swiglu": "DINOv2",
    "dinov2_registers": "DINOv2 with registers",
    "dinov3": "DINOv3",
    "metaclip2": "MetaCLIP 2",
    "smolvlm": "SmolVLM",
    "internvl": "InternVL",
    "vit": "ViT",
    "deit": "DeiT",
    "yolos": "YOLOS",
}


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    """The blocks, found without the table: the only module list as long as the encoder is deep."""
    (blocks,) = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == BLOCKS]
    return blocks


def linear_names(tower: nn.Module) -> list[str]:
    """Names of all linear layers inside the blocks."""
    inside = {id(m) for block in blocks_of(tower) for m in block.modules()}
    return [name for name, m in tower.named_modules() if isinstance(m, nn.Linear) and id(m) in inside]


@every_model
def test_tower_is_found(tiny: TinyModel) -> None:
    model = tiny.build()
    tower = find_tower(model)
    assert tower.name == tiny.tower
    assert tower.module is tiny.tower_of(model)
    assert tower.config is tower.module.config
    assert (tower.patches.lead, tower.patches.trail) == (tiny.lead, tiny.trail)
    assert tower.is_backbone == (tiny is DINOV2_BACKBONE)
    assert tower.blocks == list(blocks_of(tower.module))
    assert [tower.module.get_submodule(tower.block_name(i)) for i in range(BLOCKS)] == tower.blocks


@every_tower
def test_family_row_points_at_the_right_modules(tiny: TinyModel) -> None:
    tower = find_tower(tiny.build())
    family = tower.family
    assert family.name == FAMILY_NAMES[tiny.name]
    assert type(tower.module).__name__ in family.towers
    for index in range(BLOCKS):
        attention = tower.attention(index)
        for name in (*family.projections, family.out):
            assert isinstance(attention.get_submodule(name), nn.Linear)
        assert (tower.num_heads, tower.head_dim) == (HEADS, HEAD_DIM)
        # fc2 is the layer whose output has the width of the stream and whose input has not
        out = tower.mlp_out(index)
        assert out.out_features == tower.config.hidden_size != out.in_features
        assert out is tower.blocks[index].get_submodule(tower.mlp_out_name(index))
    assert isinstance(tower.module.get_submodule(family.patch_embedding), (nn.Linear, nn.Conv2d))
    assert "Embeddings" in type(tower.module.get_submodule(family.embeddings)).__name__


@every_tower
def test_block_linears_are_complete(tiny: TinyModel) -> None:
    model = tiny.build()
    tower = find_tower(model)
    found = [f"{tower.block_name(i)}.{name}" for i in range(BLOCKS) for name in tower.block_linears(i)]
    assert sorted(found) == sorted(linear_names(tower.module))
    assert len(found) == BLOCKS * (7 if hasattr(getattr(tower.blocks[0], "mlp", None), "gate_proj") else 6)


@every_model
def test_default_sites_are_the_linears_of_the_blocks(tiny: TinyModel) -> None:
    model = tiny.build()
    prefix = f"{tiny.tower}." if tiny.tower else ""
    sites = quantization_sites(model)
    assert sorted(s.name for s in sites) == sorted(prefix + name for name in linear_names(tiny.tower_of(model)))
    assert {s.kind for s in sites} == {"linear"}
    for site in sites:
        module = model.get_submodule(site.name)
        assert module is getattr(model.get_submodule(site.parent), site.attribute)
        assert isinstance(module, nn.Linear)
        assert site.block == int(re.findall(r"\.(\d)\.", f".{site.name}")[0])
    assert [s.block for s in sites] == sorted(s.block for s in sites)


@every_model
def test_patch_embedding_site(tiny: TinyModel) -> None:
    model = tiny.build()
    sites = quantization_sites(model, patch_embedding=True)
    first, rest = sites[0], sites[1:]
    assert rest == quantization_sites(model)
    assert (first.kind, first.block) == ("patch_embedding", None)
    module = model.get_submodule(first.name)
    assert isinstance(module, nn.Linear if tiny.name == "siglip2" else nn.Conv2d)
    assert first.name.startswith(tiny.tower)


HEADS_OF = {
    "clip": [],
    "siglip": ["head.mlp.fc1", "head.mlp.fc2"],
    "siglip2": ["head.mlp.fc1", "head.mlp.fc2"],
    "dinov2": [],
    "dinov2_swiglu": [],
    "dinov2_registers": [],
    "dinov3": [],
    "metaclip2": [],
    "smolvlm": [],
    "internvl": [],
    "yolos": [],
    "yolos_detector": [],
    "eomt": [],
    "vit": ["pooler.dense"],
    "deit": ["pooler.dense"],
    "clip_dual": ["visual_projection"],
    "siglip_dual": ["vision_model.head.mlp.fc1", "vision_model.head.mlp.fc2"],
    "dinov2_classifier": ["classifier"],
    "vit_classifier": ["classifier"],
    "clip_classifier": ["classifier"],
    "dinov2_backbone": [],
}


@every_model
def test_head_sites(tiny: TinyModel) -> None:
    model = tiny.build()
    extra = quantization_sites(model, head=True)[len(quantization_sites(model)) :]
    inside = TOWER_PREFIX if tiny.name in ("siglip", "siglip2") else ""
    assert [s.name for s in extra] == [inside + name for name in HEADS_OF[tiny.name]]
    assert all((s.kind, s.block) == ("linear", None) for s in extra)
    assert all(isinstance(model.get_submodule(site.name), nn.Linear) for site in extra)


def test_both_heads_of_a_distilled_classifier() -> None:
    config = TOWERS["deit"].config(num_labels=3)
    model = hf.DeiTForImageClassificationWithTeacher(config)
    names = [s.name for s in quantization_sites(model, head=True) if s.block is None]
    assert names == ["cls_classifier", "distillation_classifier"]


CLIP_LINEARS = ("mlp.fc1", "mlp.fc2", *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")))


@pytest.mark.parametrize(
    ("pattern", "left_out"),
    [
        ("encoder.layers.3.mlp.fc2", ["encoder.layers.3.mlp.fc2"]),
        ("mlp.fc2", [f"encoder.layers.{i}.mlp.fc2" for i in range(BLOCKS)]),
        ("encoder.layers.0.*", [f"encoder.layers.0.{name}" for name in CLIP_LINEARS]),
        ("layers.[12].self_attn.q_proj", [f"encoder.layers.{i}.self_attn.q_proj" for i in (1, 2)]),
    ],
)
@pytest.mark.parametrize("name", ["clip", "clip_dual"])
def test_ignore_patterns(name: str, pattern: str, left_out: list[str]) -> None:
    tiny = MODELS[name]
    model = tiny.build()
    before = {s.name for s in quantization_sites(model)}
    after = {s.name for s in quantization_sites(model, ignore=(pattern,))}
    prefix = f"{tiny.tower}." if tiny.tower else ""
    assert before - after == {prefix + n for n in left_out}
    assert after < before


def test_ignore_reaches_heads_and_patch_embedding() -> None:
    model = COMPOSITES["clip_dual"].build()
    patterns = ("visual_projection", "patch_embedding")
    sites = quantization_sites(model, patch_embedding=True, head=True, ignore=patterns)
    assert [s.name for s in sites] == [s.name for s in quantization_sites(model)]


def test_unused_ignore_patterns_are_errors() -> None:
    model = TOWERS["clip"].build()
    message = (
        r"modules\.ignore pattern typo match no module that would be quantized\. Examples of names: "
        r".*encoder\.layers\.3\.mlp\.fc2"
    )
    with pytest.raises(ValueError, match=message):
        quantization_sites(model, ignore=("mlp.fc1", "typo"))
    with pytest.raises(ValueError, match=r"modules\.ignore patterns one, two match no module"):
        quantization_sites(model, ignore=("one", "two"))
    # a module that exists but would stay float anyway is a mistake too
    with pytest.raises(ValueError, match=r"pattern embeddings\.patch_embedding match no module"):
        quantization_sites(model, ignore=("embeddings.patch_embedding",))
    with pytest.raises(ValueError, match="pattern visual_projection match no module"):
        quantization_sites(COMPOSITES["clip_dual"].build(), ignore=("visual_projection",))


@pytest.mark.parametrize("model_class", ["CLIPTextModel", "Linear"])
def test_unsupported_models_are_told_what_is_supported(model_class: str) -> None:
    if model_class == "CLIPTextModel":
        model = hf.CLIPTextModel(COMPOSITES["clip_dual"].config().text_config)
    else:
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=f"{model_class} contains no supported vision encoder. Supported: ") as error:
        find_tower(model)
    for family in FAMILIES:
        line = next(part for part in str(error.value).split("; ") if f"{family.name} (" in part)
        assert all(tower in line for tower in family.towers)
    assert supported_encoders() in str(error.value)
    assert str(error.value).endswith("They may also be the vision tower of a larger model.")


def test_a_class_that_only_borrows_the_name_is_not_a_tower() -> None:
    impostor = type("CLIPVisionModel", (nn.Module,), {})()
    with pytest.raises(ValueError, match="CLIPVisionModel contains no supported vision encoder"):
        find_tower(impostor)


def test_mlp_out_of_a_block_without_one() -> None:
    tower = find_tower(TOWERS["vit"].build())
    parent, _, name = tower.mlp_out_name(2).rpartition(".")
    delattr(tower.blocks[2].get_submodule(parent), name)
    with pytest.raises(ValueError, match=r"Block 2 of ViTModel has none of (mlp\.fc2|output\.dense)\."):
        tower.mlp_out(2)


def test_mlp_out_of_swiglu_is_the_down_projection() -> None:
    tower = find_tower(TOWERS["dinov2_swiglu"].build())
    (name,) = {tower.mlp_out_name(i) for i in range(BLOCKS)}
    assert name in ("mlp.down_proj", "mlp.weights_out")
