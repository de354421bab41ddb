"""Checkpoints that were changed after they were saved: mutants, accepted edits, and the forms a checkpoint may have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from models import MODELS, TOWER_PREFIX, TOWERS, quantized
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from campaign import FORMS, Subject, campaign, save
from optimum_regcache import RegCacheConfig, accept_edits
from optimum_regcache.config.migrate import ADDED
from optimum_regcache.hub.stored import FINGERPRINT, digest, sort_metadata
from optimum_regcache.layers.linear import quant_linears

CLIP = TOWERS["clip"]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    quantized(CLIP).save_pretrained(folder)
    return folder


def copy(folder: Path, target: Path, change: Any = None, metadata: bool = True, **settings: dict[str, Any]) -> Path:
    """A copy with changed tensors or settings, under the fingerprint of the original."""
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        known = handle.metadata() if metadata else {"format": "pt"}
    state = load_file(folder / "model.safetensors")
    if change is not None:
        change(state)
    target.mkdir(exist_ok=True)
    save_file(state, target / "model.safetensors", metadata=known)
    config = json.loads((folder / "config.json").read_text())
    for part, values in settings.items():
        config["quantization_config"][part].update(values)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("family", "form"), [("clip_dual", "w8a8 registers"), ("dinov2", "w4a4"), ("vit_classifier", "noisyquant")]
)
def test_no_mutant_is_wrong_in_silence(family: str, form: str, tmp_path: Path) -> None:
    """The short form of `make campaign`."""
    parts = FORMS.get(form, {"methods": ["noisyquant"]})
    for seed, name in enumerate(("intact", "stranger")):
        save(family, parts, seed, tmp_path / name)
    subject = Subject(f"{family}/{form}", family, tmp_path / "intact", tmp_path / "stranger", torch.empty(0))
    output = subject.run(subject.open(subject.intact))
    subject = Subject(subject.name, family, subject.intact, subject.stranger, output)
    counts, bad = campaign([subject], 36, tmp_path, progress=False)
    assert not bad
    assert sum(n for (_, outcome), n in counts.items() if outcome == "named error") > 25


def test_changes_are_named(intact: Path, tmp_path: Path) -> None:
    def halve(state: dict[str, torch.Tensor]) -> None:
        state[f"{TOWER_PREFIX}encoder.layers.1.mlp.fc2.weight_scale"] *= 0.5

    name = re.escape(f"{TOWER_PREFIX}encoder.layers.1.mlp.fc2.weight_scale")
    tensor = rf"changed after it was saved: tensors {name}\. Download it again"
    with pytest.raises(ValueError, match=tensor):
        hf.AutoModel.from_pretrained(copy(intact, tmp_path / "a", halve))
    setting = (
        r"changed after it was saved: registers\.num_copies was 2\.0, is 3\.0; deletion\.count was 2, is 1\. Download"
    )
    with pytest.raises(ValueError, match=setting):
        hf.AutoModel.from_pretrained(copy(intact, tmp_path / "b", registers={"num_copies": 3.0}, deletion={"count": 1}))


def test_an_accepted_edit_opens_and_is_official_once_it_is_saved(intact: Path, tmp_path: Path) -> None:
    edited = copy(intact, tmp_path / "edited", deletion={"count": 1})
    with accept_edits():
        model = hf.AutoModel.from_pretrained(edited)
    assert model.config.quantization_config.deletion.count == 1
    with pytest.raises(ValueError, match="changed after it was saved"):
        hf.AutoModel.from_pretrained(edited)
    model.save_pretrained(edited)
    again = hf.AutoModel.from_pretrained(edited)
    assert torch.equal(CLIP.run(again), CLIP.run(model))
    with accept_edits(), pytest.raises(ValueError, match=r"holds the code -128"):
        hf.AutoModel.from_pretrained(copy(intact, tmp_path / "bad", lowest_code))


def lowest_code(state: dict[str, torch.Tensor]) -> None:
    state[f"{TOWER_PREFIX}encoder.layers.0.mlp.fc1.weight"][0, 0] = -2139062144  # 0x80808080: four codes of -128


def zero_point(state: dict[str, torch.Tensor]) -> None:
    state[f"{TOWER_PREFIX}encoder.layers.0.mlp.fc1.input_zero_point"] += 100000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lowest_code, r"encoder\.layers\.0\.mlp\.fc1\.weight holds the code -128"),
        (zero_point, r"encoder\.layers\.0\.mlp\.fc1\.input_zero_point lies outside 0 to 0"),
    ],
)
def test_values_out_of_range_are_refused_without_a_fingerprint_too(
    intact: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hf.AutoModel.from_pretrained(copy(intact, tmp_path / "old", change, metadata=False))


@pytest.mark.parametrize("form", ["one file", "shards", "pickle", "state dict"])
def test_every_form_of_a_checkpoint_is_checked(intact: Path, tmp_path: Path, form: str) -> None:
    model, folder = quantized(CLIP), tmp_path / "made"
    if form == "shards":
        model.save_pretrained(folder, max_shard_size="50KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    else:
        copy(intact, folder)

    def open_without(name: str) -> Any:
        state: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            part = load_file(path)
            if name in part and form in ("one file", "shards"):
                with safe_open(path, framework="pt") as handle:
                    known = handle.metadata()
                del part[name]
                save_file(part, path, metadata=known)
            state |= part
        state.pop(name, None)
        if form == "pickle":
            (folder / "model.safetensors").unlink(missing_ok=True)
            torch.save(state, folder / "pytorch_model.bin")
        if form == "state dict":
            config = hf.AutoConfig.from_pretrained(folder)
            return hf.CLIPVisionModel.from_pretrained(None, config=config, state_dict=state)
        return hf.AutoModel.from_pretrained(folder)

    assert torch.equal(CLIP.run(open_without("")), CLIP.run(model))
    names = [
        TOWER_PREFIX + name for name in ("encoder.layers.2.mlp.fc1.bias", "encoder.layers.1.self_attn.q_proj.weight")
    ]
    for name in names:
        if form == "pickle":
            copy(intact, folder)
        with pytest.raises(ValueError, match=rf"incomplete: .*{re.escape(name)}"):
            open_without(name)


@pytest.mark.parametrize("kind", ["weight", "weight_scale", "input_scale", "bias"])
def test_a_state_dict_lacks_nothing(intact: Path, kind: str) -> None:
    """Neither integers, at which transformers would fail, nor numbers that it would draw."""
    state = {n: t for n, t in load_file(intact / "model.safetensors").items() if not n.endswith(f"fc2.{kind}")}
    message = (
        rf"The state_dict is incomplete: .*layers\.0\.mlp\.fc2\.{kind}, .* missing\. Give all tensors of state_dict\(\)"
    )
    with pytest.raises(ValueError, match=message):
        hf.CLIPVisionModel.from_pretrained(None, config=hf.AutoConfig.from_pretrained(intact), state_dict=state)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (
            lambda t: t.half() if t.is_floating_point() else t,
            r"The state_dict was converted: .* precision of torch\.float16",
        ),
        (
            lambda t: t.bfloat16() if t.is_floating_point() else t,
            r"converted: .* precision of torch\.bfloat16",
        ),
        (lambda t: t.long() if t.dtype == torch.int32 else t, r"or belongs to another config: .*torch\.int64, not"),
    ],
    ids=["half", "bfloat16", "int64"],
)
def test_a_state_dict_of_other_dtypes_is_refused(intact: Path, convert: Any, message: str) -> None:
    state = {n: convert(t) for n, t in load_file(intact / "model.safetensors").items()}
    with pytest.raises(ValueError, match=message):
        hf.CLIPVisionModel.from_pretrained(None, config=hf.AutoConfig.from_pretrained(intact), state_dict=state)


@pytest.mark.parametrize(
    "name", ["text_model.encoder.layers.0.mlp.fc1.weight", "logit_scale", "text_projection.weight"]
)
def test_what_is_around_the_encoder_is_missed_too(name: str, tmp_path: Path) -> None:
    quantized(MODELS["clip_dual"]).save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=rf"incomplete: {name} missing"):
        hf.AutoModel.from_pretrained(copy(tmp_path / "whole", tmp_path / "part", lambda state: state.pop(name)))


def test_other_dtypes_are_refused(intact: Path, tmp_path: Path) -> None:
    def half(state: dict[str, torch.Tensor]) -> None:
        state.update({n: t.half() if t.is_floating_point() else t for n, t in state.items()})

    with pytest.raises(ValueError, match=r"converted to other dtypes: .*scale is float16, not float32.* and \d+ more"):
        hf.AutoModel.from_pretrained(copy(intact, tmp_path / "half", half, metadata=False))
    opened = hf.AutoModel.from_pretrained(intact, dtype=torch.float16)  # this is how to get one
    assert opened.dtype == torch.float16
    assert all(m.weight_scale.dtype == torch.float32 for _, m in quant_linears(opened))


def test_other_bits_are_refused_even_where_mismatched_sizes_are_ignored(intact: Path, tmp_path: Path) -> None:
    folder = copy(intact, tmp_path / "bits", metadata=False, weights={"bits": 4})
    with pytest.raises(
        ValueError, match=r"damaged or belongs to another config: .*weight is \[64, 16\], not \[64, 8\]"
    ):
        hf.AutoModel.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_a_new_head_is_no_damage_and_trains(tmp_path: Path) -> None:
    quantized(TOWERS["dinov2"]).save_pretrained(tmp_path)
    probe = hf.AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3)
    assert probe.classifier.weight.requires_grad
    assert not any(p.requires_grad for p in probe.dinov2.parameters())
    loss = probe(torch.rand(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert probe.classifier.weight.grad is not None
    assert probe.classifier.weight.grad.abs().max() > 0


def test_a_config_that_lacks_keys_is_refused(intact: Path, tmp_path: Path) -> None:
    complete = RegCacheConfig().to_dict()
    for part, values in complete.items():
        for field in values if isinstance(values, dict) else ():
            left = {**complete, part: {k: v for k, v in values.items() if k != field}}
            if field in ADDED.get(part, {}):  # stored before there was such a field
                assert RegCacheConfig.from_dict(left) == RegCacheConfig()
                continue
            with pytest.raises(ValueError, match=rf"The stored quantization_config lacks {part}\.{field}\."):
                RegCacheConfig.from_dict(left)
    with pytest.raises(ValueError, match="lacks deletion, methods"):
        RegCacheConfig.from_dict({k: v for k, v in complete.items() if k not in ("deletion", "methods")})
    assert RegCacheConfig.from_dict(complete) == RegCacheConfig()
    assert RegCacheConfig(weights={"bits": 4}).weights.symmetric  # the constructor fills in


def test_a_digest_sees_bytes_dtype_and_shape() -> None:
    x = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    others = [x + 0, x.double(), x.reshape(3, 2), x.flatten(), -x, x.flip(0), x.view(torch.int32)]
    assert digest(others[0]) == digest(x.t().contiguous().t())
    assert len({digest(t) for t in others}) == len(others)
    assert digest(torch.ones(()).expand(1)) == digest(torch.ones(1))


def test_the_fingerprint_lies_in_the_file(intact: Path) -> None:
    with safe_open(intact / "model.safetensors", framework="pt") as handle:
        found = json.loads(handle.metadata()[FINGERPRINT])
        assert set(found["tensors"]) == set(handle.keys())
    assert found["config"] == json.loads((intact / "config.json").read_text())["quantization_config"]


def test_equal_models_are_equal_files(intact: Path, tmp_path: Path) -> None:
    """The library writes the metadata in an order that differs from file to file."""
    contents = set()
    for number in range(4):
        folder = copy(intact, tmp_path / str(number))
        sort_metadata(folder)
        contents.add((folder / "model.safetensors").read_bytes())
        assert torch.equal(CLIP.run(hf.AutoModel.from_pretrained(folder)), CLIP.run(quantized(CLIP)))
    assert len(contents) == 1


def test_a_part_of_a_larger_model_opens_without_a_list_of_the_rest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = quantized(MODELS["clip_dual"])
    whole.save_pretrained(tmp_path)
    hf.utils.logging.set_verbosity_warning()
    part = hf.CLIPVisionModel.from_pretrained(tmp_path)
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    pixels = MODELS["clip_dual"].inputs()["pixel_values"]
    with torch.no_grad():
        expected = whole.vision_model(pixel_values=pixels).last_hidden_state
        assert torch.equal(part(pixel_values=pixels).last_hidden_state, expected)
