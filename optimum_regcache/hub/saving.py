"""The files of a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from optimum_regcache.config.files import write_json
from optimum_regcache.config.recipe import Recipe
from optimum_regcache.hub.remote_code import add_remote_code
from optimum_regcache.hub.stored import sort_metadata


def write_model(
    folder: Path,
    model: PreTrainedModel,
    processor: Any,
    recipe: Recipe,
    results: dict[str, Any] | None = None,
    file_prefix: str | None = None,
) -> None:
    """Write model, processor, ``recipe.yaml``, ``results.json`` and the code for ``trust_remote_code`` into an empty folder."""
    cast("Any", model).save_pretrained(folder, variant=file_prefix)
    sort_metadata(folder)
    add_remote_code(folder, model.config)
    if processor is not None:
        processor.save_pretrained(folder)
    recipe.save(folder / "recipe.yaml")
    if results is not None:
        write_json(folder / "results.json", results)
