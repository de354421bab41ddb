"""The job behind `optimum-cli regcache push`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from optimum_regcache.hub.card import CARD
from optimum_regcache.hub.upload import Pushed, push_folder


def push_job(folder: str, repo_id: str, options: dict[str, Any]) -> str:
    """Upload ``folder`` to ``repo_id``, and say where it is and how it is opened.

    Args:
        folder: of the result.
        repo_id: ``user/name``.
        options: of `push_folder`.

    Raises:
        ValueError, OSError: see `push_folder`.
    """
    pushed = push_folder(folder, repo_id, **options)
    card = Path(folder, CARD).read_text(encoding="utf-8")
    found = re.search(r"(AutoModel\w*)\.from_pretrained", card)
    lines = [pushed.url if pushed.changed else f"{pushed.url} (nothing has changed)"]
    if pushed.left_out:
        lines.append(f"not uploaded: {', '.join(pushed.left_out)}")
    return "\n".join([*lines, "", *opening_lines(pushed, found.group(1) if found else "AutoModel")])


def opening_lines(pushed: Pushed, auto: str) -> list[str]:
    """The three lines of Python that open the model."""
    revision = f', revision="{pushed.revision}"' if pushed.revision else ""
    return [
        "import optimum_regcache",
        f"from transformers import {auto}",
        f'model = {auto}.from_pretrained("{pushed.repo_id}"{revision})',
    ]
