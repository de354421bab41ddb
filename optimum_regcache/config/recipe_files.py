"""Where recipes are: files, those that come with the package, and repositories of the Hub."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from optimum_regcache.config import PRESETS

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def packaged_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    package = Path(__file__).resolve().parents[1]  # beside it in a checkout, in it where it is installed
    found = next((f for f in (package / "recipes", package.parent / "recipes") if any(f.glob("*.yaml"))), None)
    return {} if found is None else {path.stem: path for path in sorted(found.glob("*.yaml"))}


def on_hub(source: str | Path) -> bool:
    """Whether a recipe is asked for at the Hub: it is no path, no packaged one, and named as a repository."""
    name = str(source)
    here = Path(source).exists() or name in packaged_recipes() or name.endswith((".yaml", ".yml"))
    return not here and _REPOSITORY.fullmatch(name) is not None


def recipe_file(source: str | Path, token: str | None = None) -> Path:
    """The file of a recipe; see `Recipe.load`.

    Raises:
        FileNotFoundError: there is none.
    """
    name, path = str(source), Path(source)
    if path.is_file():
        return path
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    packaged = packaged_recipes()
    if name in packaged:
        return packaged[name]
    reason = ""
    if on_hub(name):
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        hub: Any = huggingface_hub
        repository, _, revision = name.partition("@")
        try:
            return Path(hub.hf_hub_download(repository, "recipe.yaml", revision=revision or None, token=token))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            reason = f" The Hub says: {error}"
    near = ", ".join(get_close_matches(name, packaged) or list(packaged)[:3])
    raise FileNotFoundError(
        f"No recipe {name!r}: it is neither a preset ({', '.join(PRESETS)}) nor a file, none of the {len(packaged)} "
        f"packaged ones (such as {near}), and no repository of the Hub with a recipe.yaml.{reason}"
    )
