"""The model card."""

from __future__ import annotations

from pathlib import Path

from optimum_regcache.commands.report import Row, markdown_table
from optimum_regcache.config import PRESETS
from optimum_regcache.config.recipe import LOCAL, Recipe


def write_model_card(  # noqa: PLR0913
    directory: Path,
    path: Path,
    recipe: Recipe,
    rows: list[Row],
    notes: list[str],
    *,
    dataset: str,
    pipeline_tag: str,
    installed: bool,
) -> None:
    """README.md with Hub metadata and the measured table.

    Args:
        directory: where it is written.
        path: the folder that it will lie in.
        recipe: of the result.
        rows, notes: of the report.
        dataset: name of the images.
        pipeline_tag: task.
        installed: whether the model holds registers or deletes tokens.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path, label = path.resolve(), recipe.quantization.label
    name = f"{path.parent.name}-{path.name}" if path.name in PRESETS else path.name
    base = (recipe.model or "").removeprefix(LOCAL)
    on_hub = "/" in base and not (recipe.model or "").startswith(LOCAL)
    data = ModelCardData(
        library_name="transformers",
        base_model=base if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        pipeline_tag=pipeline_tag,
        tags=["optimum", "regcache", label],
    )
    what = "with RegCache ([arXiv 2510.04547](https://arxiv.org/abs/2510.04547))" if installed else "without registers"
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n"
        f"`{base}`, vision tower quantized to {label.upper()} {what} by optimum-regcache.\n\n"
        "```python\nimport optimum_regcache  # registers the quantization method\n"
        "from transformers import AutoModel\n\n"
        'model = AutoModel.from_pretrained(".")  # this folder, or the repository that it was pushed to\n```\n\n'
        f"Measured on images of `{dataset}` that search and calibration never saw:\n\n{markdown_table(rows)}\n\n"
        + "\n".join(f"- {note}" for note in notes)
        + "\n"
    )
    ModelCard(text).save(directory / "README.md")
