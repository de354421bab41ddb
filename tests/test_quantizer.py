"""`RegCacheQuantizer`: its arguments, its errors, what it saves."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset, Image
from models import MODELS, TOWERS
from transformers import AutoModel, AutoModelForImageClassification

from optimum_regcache import Recipe, RegCacheConfig, RegCacheQuantizer, SearchConfig
from optimum_regcache.commands.sources import split_images
from optimum_regcache.config import DeletionConfig, RegistersConfig
from optimum_regcache.config.recipe import DataConfig
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reference import planted
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.methods import resolve
from optimum_regcache.quantizer import build_quantized
from optimum_regcache.registers import get_register_cache
from optimum_regcache.search.fit import install_setup
from optimum_regcache.search.plan import split_inputs

QUICK = SearchConfig(num_copies=(2,), max_delete=1, blocks_before=0, sensitivity="block")
OFF = RegCacheConfig(registers={"mode": "none"})


def items(name: str, count: int = 8) -> list[dict[str, torch.Tensor]]:
    batch = MODELS[name].inputs(seed=3, batch=count)
    return [{k: v[i] for k, v in batch.items() if k != "input_ids"} for i in range(count)]


@pytest.mark.parametrize("name", [*TOWERS, "dinov2_classifier"])
def test_quantize_runs_the_whole_method_on_every_family(name):
    tiny = MODELS[name]
    model = tiny.build()
    before = copy.deepcopy(model.state_dict())
    quantizer = RegCacheQuantizer.from_pretrained(model)
    quantized = quantizer.quantize(calibration_dataset=items(name), batch_size=4, search=QUICK, progress=False)
    assert quantizer.fit_result is not None
    assert quantized.is_quantized
    assert torch.isfinite(tiny.run(quantized)).all()
    after = model.state_dict()  # the model that was given is untouched
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert quantized.config.quantization_config.registers.mode in ("fixed", "none")


def test_batched_items_equal_single_ones():
    model = TOWERS["clip"].build()
    single = items("clip")
    batched = [{"pixel_values": torch.stack([s["pixel_values"] for s in single[i : i + 4]])} for i in (0, 4)]
    outputs = []
    for data in (single, batched):
        quantized = RegCacheQuantizer(model).quantize(quantization_config=OFF, calibration_dataset=data)
        outputs.append(TOWERS["clip"].run(quantized))
    assert torch.equal(*outputs)


def test_dynamic_preset_without_registers_needs_no_data():
    config = RegCacheConfig.from_preset("w8a8-dynamic").replace(registers={"mode": "none"})
    model = TOWERS["dinov2"].build()
    quantized = RegCacheQuantizer(model).quantize(quantization_config=config)
    cosine = torch.cosine_similarity(TOWERS["dinov2"].run(quantized), TOWERS["dinov2"].run(model), dim=-1)
    assert cosine.min() > 0.99


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "registers.mode='search' needs images: pass calibration_dataset, call fit"),
        (OFF, "Static activations need calibration images: pass calibration_dataset, or use the preset"),
        (
            RegCacheConfig(registers={"mode": "fixed", "blocks": [2]}),
            "registers.mode='fixed' mines its registers from images",
        ),
    ],
)
def test_missing_data_is_said_so(config, message):
    with pytest.raises(ValueError, match=message):
        RegCacheQuantizer(TOWERS["clip"].build()).quantize(quantization_config=config)


def test_fixed_registers_are_mined_and_kept():
    config = RegCacheConfig(
        registers={"mode": "fixed", "blocks": [1, 2, 3], "num_copies": 3.0}, deletion={"block": 2, "count": 1}
    )
    quantizer = RegCacheQuantizer(TOWERS["vit"].build())
    quantized = quantizer.quantize(quantization_config=config, calibration_dataset=items("vit"))
    cache = get_register_cache(quantized)
    assert cache is not None
    assert cache.blocks == (1, 2, 3)
    assert cache.num_copies == 3.0
    isolated = config.replace(registers={"kv_mode": "isolated"})
    other = get_register_cache(quantizer.quantize(quantization_config=isolated, calibration_dataset=items("vit")))
    assert other is not None
    assert not torch.equal(cache.rows(3)[0], other.rows(3)[0])
    with pytest.raises(ValueError, match=r"registers.blocks=\[1, 9\], but the encoder has blocks 0 to 3"):
        quantizer.quantize(
            quantization_config=RegCacheConfig(registers={"mode": "fixed", "blocks": [1, 9]}),
            calibration_dataset=items("vit"),
        )
    with pytest.raises(ValueError, match=r"registers\.num_registers must be 1"):
        quantizer.quantize(
            quantization_config=config.replace(registers={"num_registers": 2}), calibration_dataset=items("vit")
        )


def test_build_quantized_refuses_what_does_not_fit():
    model = TOWERS["clip"].build()
    with pytest.raises(ValueError, match="describes a model that is still to be searched"):
        build_quantized(model, RegCacheConfig(), None, [TOWERS["clip"].inputs()])
    fixed = RegCacheConfig(registers={"mode": "fixed", "blocks": [1]})
    with pytest.raises(ValueError, match=r"registers\.mode='fixed' and the register cache disagree"):
        build_quantized(model, fixed, None, [TOWERS["clip"].inputs()])


def test_fit_is_reused_for_the_same_bits_and_redone_for_others():
    quantizer = RegCacheQuantizer(TOWERS["clip"].build())
    first = quantizer.fit(items("clip"), RegCacheConfig(), QUICK, DataConfig(num_samples=8), progress=False)
    quantizer.quantize(quantization_config=RegCacheConfig(), progress=False)
    assert quantizer.fit_result is first
    with pytest.raises(ValueError, match="needs images"):
        quantizer.quantize(quantization_config=RegCacheConfig.from_preset("w4a4"))
    quantizer.quantize(
        quantization_config=RegCacheConfig.from_preset("w4a4"), calibration_dataset=items("clip"), search=QUICK,
        progress=False,
    )  # fmt: skip
    assert quantizer.fit_result is not first
    assert quantizer.fit_result.config.label == "w4a4"


def test_quantized_and_unsupported_models_are_refused():
    quantized = RegCacheQuantizer(TOWERS["clip"].build()).quantize(
        quantization_config=OFF, calibration_dataset=items("clip")
    )
    with pytest.raises(ValueError, match="CLIPVisionModel is already quantized; start from the float model"):
        RegCacheQuantizer.from_pretrained(quantized)
    with pytest.raises(ValueError, match=r"Linear contains no supported vision encoder. Supported: CLIP"):
        RegCacheQuantizer(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_search_settings_that_do_not_fit_are_refused():
    quantizer = RegCacheQuantizer(TOWERS["clip"].build())
    data = DataConfig(num_samples=8)
    with pytest.raises(ValueError, match=r"search\.sensitive_block=7, but the encoder has blocks 0 to 3"):
        quantizer.fit(items("clip"), search=SearchConfig(sensitive_block=7), data=data, progress=False)
    with pytest.raises(ValueError, match="objective='accuracy' is not possible: the data set has no labels"):
        quantizer.fit(items("clip"), search=SearchConfig(objective="accuracy"), data=data, progress=False)
    with pytest.raises(ValueError, match="3 reference images are too few"):
        quantizer.fit(items("clip")[:3], search=QUICK, data=data, progress=False)
    with pytest.raises(ValueError, match=r"Nothing is left to quantize: modules\.ignore=.*takes every module out"):
        quantizer.fit(items("clip"), RegCacheConfig(modules={"ignore": ["encoder.*"]}), QUICK, data, progress=False)


def test_accuracy_objective_with_a_classifier():
    quantizer = RegCacheQuantizer(planted.build_planted_model(), planted.build_processor())
    fit = quantizer.fit(
        planted.load_dataset("search", 32),
        search=SearchConfig(objective="accuracy", num_copies=(15,), max_delete=4, sensitive_block=3, blocks_before=0),
        data=DataConfig(num_samples=32),
        progress=False,
    )
    assert fit.search.chosen.count >= 2
    assert fit.search.best_both is not None
    assert fit.search.best_both.mean == 1.0


def test_save_dir_holds_model_processor_recipe_and_results(tmp_path):
    quantizer = RegCacheQuantizer(planted.build_planted_model(), planted.build_processor())
    search = SearchConfig(num_copies=(15,), max_delete=4, sensitive_block=3, blocks_before=0)
    dataset = planted.load_dataset("search", 32)
    model = quantizer.quantize(tmp_path, calibration_dataset=dataset, search=search, progress=False)
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml", "results.json"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert Recipe.load(tmp_path / "recipe.yaml").quantization.to_dict() == model.config.quantization_config.to_dict()
    assert json.loads((tmp_path / "results.json").read_text())["fit"]["sensitive_block"] == 3
    opened = AutoModelForImageClassification.from_pretrained(tmp_path)
    pixels = next(ImageInputs(dataset, planted.build_processor()).batches(4))["pixel_values"]
    with torch.no_grad():
        assert torch.equal(opened(pixels).logits, model(pixels).logits)
    again = RegCacheQuantizer.from_pretrained
    with pytest.raises(ValueError, match="is already quantized"):
        again(tmp_path)


def test_file_prefix_is_the_variant_of_the_checkpoint(tmp_path):
    model = TOWERS["clip"].build()
    quantized = RegCacheQuantizer(model).quantize(
        tmp_path, "w8a8", quantization_config=OFF, calibration_dataset=items("clip")
    )
    assert (tmp_path / "model.w8a8.safetensors").exists()
    opened = AutoModel.from_pretrained(tmp_path, variant="w8a8")
    assert torch.equal(TOWERS["clip"].run(opened), TOWERS["clip"].run(quantized))


def test_calibration_dataset_takes_the_arguments_of_optimum(tmp_path):
    images = [planted.render("search", i)[0] for i in range(9)]
    Dataset.from_dict({"image": images}).cast_column("image", Image()).to_parquet(tmp_path / "train.parquet")
    quantizer = RegCacheQuantizer(planted.build_planted_model(), planted.build_processor())
    data = quantizer.get_calibration_dataset(str(tmp_path), num_samples=5, dataset_split="train", seed=1)
    assert len(data) == 5
    processed = quantizer.get_calibration_dataset(
        str(tmp_path),
        num_samples=5,
        dataset_split="train",
        seed=1,
        preprocess_function=lambda batch: dict(planted.build_processor()(images=batch["image"])),
    )
    assert "pixel_values" in processed.column_names
    outputs = [quantizer.quantize(quantization_config=OFF, calibration_dataset=d) for d in (data, processed)]
    layers = [find_tower(model).norm_consumers(0, 1)[0] for model in outputs]
    assert torch.equal(layers[0].input_scale, layers[1].input_scale)
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        quantizer.get_calibration_dataset(str(tmp_path), dataset_split="test")
    with pytest.raises(ValueError, match="needs the model's processor"):
        RegCacheQuantizer(planted.build_planted_model()).quantize(quantization_config=OFF, calibration_dataset=data)


def test_reference_parts_share_no_image():
    inputs = ImageInputs(items("clip", 40))
    parts = split_inputs(inputs, DataConfig(num_samples=30), 0)
    positions = [set(p.indices) for p in (parts.calibration, parts.selection, parts.confirmation)]
    assert sum(map(len, positions)) == len(set.union(*positions)) == 30


def test_everything_ignored_in_one_block_stays_float():
    config = OFF.replace(modules={"ignore": ("encoder.layers.3.*",)})
    quantized = RegCacheQuantizer(TOWERS["clip"].build()).quantize(
        quantization_config=config, calibration_dataset=items("clip")
    )
    linears = find_tower(quantized).block_linears
    assert {type(m).__name__ for m in linears(3).values()} == {"Linear"}
    assert {type(m).__name__ for m in linears(2).values()} == {"QuantLinear"}


def test_resolved_config_of_nothing_is_off():
    config = install_setup(resolve(RegCacheConfig()), None, DeletionConfig()).config
    assert config.registers == RegistersConfig(mode="none")
    assert not config.deletion.active


def test_default_calibration_images_never_meet_report_images(tmp_path):
    """A single split is divided once for all: `evaluate` may report on it later with any number and seed."""
    images = [planted.render("train", i)[0] for i in range(24)]
    Dataset.from_dict({"image": images}).cast_column("image", Image()).to_parquet(tmp_path / "data.parquet")
    quantizer = RegCacheQuantizer(planted.build_planted_model(), planted.build_processor())
    name = str(tmp_path / "data.parquet")
    calibration = {row["image"].tobytes() for row in quantizer.get_calibration_dataset(name, num_samples=24, seed=3)}
    assert len(calibration) == 16
    for seed in range(4):
        _, report = split_images(name, 4, 8, seed)
        assert not calibration & {row["image"].tobytes() for row in report}


def test_a_vision_tower_inside_a_language_model_can_be_quantized():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()
    quantized = RegCacheQuantizer(model).quantize(quantization_config=OFF, calibration_dataset=items("clip"))
    names = [name for name, _ in quant_linears(quantized)]
    assert len(names) == 24
    assert all("vision_tower" in name for name in names)


def test_the_saved_recipe_holds_the_settings_of_the_fit(tmp_path):
    quantizer = RegCacheQuantizer(TOWERS["clip"].build())
    quantizer.quantize(tmp_path, calibration_dataset=items("clip"), search=QUICK, progress=False)
    assert Recipe.load(tmp_path / "recipe.yaml").search == QUICK


def test_another_request_is_not_answered_by_the_old_fit():
    quantizer = RegCacheQuantizer(TOWERS["clip"].build())
    data = {"calibration_dataset": items("clip"), "progress": False}
    quantizer.quantize(search=QUICK, quantization_config=RegCacheConfig(), **data)
    first = quantizer.fit_result
    quantizer.quantize(search=QUICK, quantization_config=RegCacheConfig(deletion={"fill": "none"}), **data)
    assert quantizer.fit_result is not first
    assert quantizer.fit_result.requested.deletion.fill == "none"
