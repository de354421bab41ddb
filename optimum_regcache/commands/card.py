"""The model card."""

from __future__ import annotations

from pathlib import Path

from optimum_regcache.commands.report import Row, markdown_table
from optimum_regcache.config import PRESETS


def write_model_card(
    directory: Path, base_model: str, label: str, dataset: str, rows: list[Row], notes: list[str], pipeline_tag: str
) -> None:
    """README.md with Hub metadata and the measured table."""
    from huggingface_hub import ModelCard, ModelCardData

    name = f"{directory.resolve().parent.name}-{directory.name}" if directory.name in PRESETS else directory.name
    data = ModelCardData(
        library_name="transformers",
        base_model=None if Path(base_model).exists() or "/" not in base_model else base_model,
        base_model_relation="quantized" if "/" in base_model and not Path(base_model).exists() else None,
        pipeline_tag=pipeline_tag,
        tags=["optimum", "regcache", label],
    )
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n"
        f"`{base_model}`, vision tower quantized to {label.upper()} with RegCache "
        "([arXiv 2510.04547](https://arxiv.org/abs/2510.04547)) by "
        "optimum-regcache.\n\n```python\nimport optimum_regcache  # registers the quantization method\n"
        "from transformers import AutoModel\n\n"
        f'model = AutoModel.from_pretrained("{name}")\n```\n\n'
        f"Measured on images of `{dataset}` that search and calibration never saw:\n\n{markdown_table(rows)}\n\n"
        + "\n".join(f"- {note}" for note in notes)
        + "\n"
    )
    ModelCard(text).save(directory / "README.md")
