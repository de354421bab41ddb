"""docs/reference/supported-models.md: what works with which model, found out with tiny models of random weights.

    python scripts/support_table.py             # prints the table
    python scripts/support_table.py --update    # writes it into the page

Every row is one run: quantize the whole model, save it, open it with its Auto class, compare. What is not as it should be is an
error and makes no row.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch.nn import functional as F
from transformers.utils import logging

from optimum_regcache import RegCacheConfig, RegCacheQuantizer
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.encoders.passes import image_features, patch_tokens
from optimum_regcache.encoders.tower import find_tower
from optimum_regcache.layers.linear import quant_linears
from optimum_regcache.registers import get_register_cache
from whole_models import WHOLES, Whole

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "supported-models.md"
BEGIN, END = "<!-- written by scripts/support_table.py -->", "<!-- end -->"
COLUMNS = ("family", "class", "tower", "registers", "deletion", "save + open", "runs", "reason")
AUTO = {
    "ForConditionalGeneration": "AutoModelForImageTextToText",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForUniversalSegmentation": "AutoModelForUniversalSegmentation",
    "ForObjectDetection": "AutoModelForObjectDetection",
    "ForDepthEstimation": "AutoModelForDepthEstimation",
    "ForSemanticSegmentation": "AutoModelForSemanticSegmentation",
}
DELETE, LEAST_COSINE = 2, 0.99  # block; of image features, 8 bits and no registers against float
REFUSED = "no token of it can be deleted. Use registers alone"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    family: str
    model_class: str
    tower: str = ""
    registers: str = "refused"
    deletion: str = "refused"
    saved: str = "-"
    runs: str = "-"
    reason: str = ""


def demand(good: bool, what: str) -> None:
    """Raise ``AssertionError`` with ``what`` unless ``good``; `python -O` does not silence it."""
    if not good:
        raise AssertionError(what)


def examine(whole: Whole) -> Row:
    """The row of a family.

    Raises:
        AssertionError: its model does what the table could say of none.
    """
    model, images = whole.build(), [whole.picture(seed) for seed in range(8)]
    try:
        tower = find_tower(model)
    except ValueError as error:
        if "contains no supported vision encoder. Supported: " not in str(error):
            raise
        demand(bool(whole.note), f"{whole.family} is refused and no note says why")
        return Row(whole.family, f"`{whole.model_class}`", reason=whole.note)
    original, batch = copy.deepcopy(model), next(ImageInputs(images).batches(len(images)))
    quantized, reason = quantize(model, images)
    demand(get_register_cache(quantized) is not None, "no registers were installed")
    require_untouched(original, quantized, tower.name)

    outputs, expected = run(whole, quantized), run(whole, original)
    demand([t.shape for t in outputs] == [t.shape for t in expected], "the shape of an output changed")
    with torch.no_grad():
        grids = [patch_tokens(m, batch)[1] for m in (quantized, original)]
        demand(grids[0] == grids[1], f"patch tokens {grids[0]} in place of {grids[1]}")
        deleted, exact = image_features(quantized, batch), image_features(original, batch)
        demand(bool(torch.isfinite(deleted).all()), "features are not finite")
        plain = fit(model, images, registers={"mode": "none"})
        cosine = float(F.cosine_similarity(image_features(plain, batch), exact).min())
    demand(cosine > LEAST_COSINE, f"cosine {cosine:.4f} of the image features")

    opened = save_and_open(whole, quantized)
    for a, b in zip(run(whole, opened), outputs, strict=True):
        demand(torch.equal(a, b), "the opened model gives other values")
    require_untouched(original, opened, tower.name, trainable=True)
    deletion = "refused" if reason else "masked grid" if keeps_places(whole, quantized) else "yes"
    return Row(
        whole.family, f"`{whole.model_class}`", f"`{type(tower.module).__name__}`", "yes", deletion, "bit-exact",
        "generate" if whole.tokens else "forward", reason,
    )  # fmt: skip


def quantize(model: Any, images: Sequence[Any]) -> tuple[Any, str]:
    """(W8A8 with mined registers and with deletion, ""), or without deletion and the reason if that is refused with advice."""
    registers = {"mode": "fixed", "blocks": (1, 2), "num_copies": 2.0}
    try:
        return fit(model, images, registers=registers, deletion={"block": DELETE, "count": 2}), ""
    except ValueError as error:
        if REFUSED not in str(error):
            raise
    reason = "patches of all images in one sequence, merged after the last block"
    return fit(model, images, registers=registers), reason


def fit(model: Any, images: Sequence[Any], **parts: Any) -> Any:
    """The quantized copy."""
    config = RegCacheConfig(**parts)
    return RegCacheQuantizer(model).quantize(quantization_config=config, calibration_dataset=images, progress=False)


def require_untouched(original: Any, model: Any, tower: str, trainable: bool = False) -> None:
    """Everything outside ``tower`` has the values of ``original``, bit for bit, and may be trained as before if ``trainable``:
    what `quantize` returns shares these tensors with the float model and is frozen."""
    inside = f"{tower}." if tower else ""
    demand(all(name.startswith(inside) for name, _ in quant_linears(model)), "a layer outside the tower is quantized")
    found = model.state_dict(keep_vars=True)
    for name, tensor in original.state_dict(keep_vars=True).items():
        if name.startswith(inside):
            continue
        demand(torch.equal(found[name], tensor), f"{name} changed")
        demand(not trainable or found[name].requires_grad == tensor.requires_grad, f"requires_grad of {name} changed")


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in the output of a model, without its key-value cache."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


@torch.no_grad()
def run(whole: Whole, model: Any) -> list[torch.Tensor]:
    """What the model puts out for a picture, three generated tokens among it."""
    inputs = whole.inputs()
    found = list(tensors(model(**inputs)))
    if whole.tokens:
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        demand(ids.shape[1] == inputs["input_ids"].shape[1] + 3, "not three tokens were generated")
        found.append(ids)
    return found


def keeps_places(whole: Whole, model: Any) -> bool:
    """Whether the whole model masks deleted tokens, because it reads its tower's states between the blocks."""
    tower, seen = find_tower(model), []
    hooks = [
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2]))
        for block in (tower.blocks[0], tower.norm(len(tower.blocks) - 1, 0))
    ]
    with torch.no_grad():
        model(**whole.inputs())
    for hook in hooks:
        hook.remove()
    return seen[0] == seen[1]


def save_and_open(whole: Whole, model: Any) -> Any:
    """The model as its Auto class opens what it saved."""
    auto = next((name for end, name in AUTO.items() if whole.model_class.endswith(end)), "AutoModel")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = getattr(hf, auto).from_pretrained(folder).eval()
    demand(type(again) is type(model), f"{auto} opened a {type(again).__name__}")
    return copy.deepcopy(again)  # tensors of a mapped file begin anywhere, and products of one row round by where


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(astuple(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def committed() -> list[str]:
    """Lines of the table on the page, its head left out."""
    text = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    return text.strip().splitlines()[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table into the page")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for whole in WHOLES:
        reason = whole.missing()
        demand(reason is None, f"The page is written with a release that has all of them: {reason}")
        rows.append(examine(whole))
    text = table(rows)
    if not arguments.update:
        print(text)
        return
    page = PAGE.read_text()
    head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")


if __name__ == "__main__":
    main()
