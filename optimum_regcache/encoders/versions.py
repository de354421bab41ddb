"""Versions of other packages: what this package needs, what it was tested with, and messages that say what to install."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version
from transformers.utils import logging

logger = logging.get_logger(__name__)

# what opening a checkpoint takes; setup.cfg has the same bounds (tests/test_versions.py)
REQUIRED = {"torch": "2.9", "transformers": "5.4", "huggingface_hub": "1.0", "safetensors": "0.5"}
NEXT_MAJOR = {"transformers": "6"}  # not installed beside this package
TESTED_TRANSFORMERS = ("5.4", "5.24")  # oldest and newest release that the suite passes with (docs/results/versions.md)


def requirement(package: str) -> str:
    """The requirement as pip takes it, for example ``transformers>=5.4,<6``."""
    upper = f",<{NEXT_MAJOR[package]}" if package in NEXT_MAJOR else ""
    return f"{package}>={REQUIRED[package]}{upper}"


def found_version(package: str) -> Version | None:
    """Version of an installed package, None if it is not installed."""
    try:
        return Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def problem(package: str) -> str | None:
    """What is wrong with the installed version of ``package`` and the command that repairs it; None if it will do."""
    found = found_version(package)
    if found is not None and found >= Version(REQUIRED[package]):
        return None
    return (
        f"{package} {'is not installed' if found is None else f'{found} is installed'}, at least {REQUIRED[package]} is "
        f'needed: pip install "{requirement(package)}"'
    )


def check_transformers() -> None:
    """Refuse a release of transformers that is too old; name the tested range if it is newer than any that was tested.

    Raises:
        ImportError: too old.
    """
    reason = problem("transformers")
    if reason is not None:
        raise ImportError(f"optimum-regcache: {reason}")
    found, newest = found_version("transformers"), Version(TESTED_TRANSFORMERS[1])
    if found is not None and found.release[:2] > newest.release[:2]:
        logger.warning(
            f"optimum-regcache was tested with transformers {TESTED_TRANSFORMERS[0]} to {TESTED_TRANSFORMERS[1]}; "
            f"{found} is installed. What it cannot do with it is refused with an error; if something fails, "
            f'pip install "transformers<={newest}.*" or report it.'
        )


def check_environment() -> None:
    """Everything that opening a checkpoint needs, in one message.

    Raises:
        ImportError: a package is missing or too old.
    """
    reasons = [reason for package in REQUIRED if (reason := problem(package)) is not None]
    if reasons:
        raise ImportError("RegCache checkpoints cannot be opened here. " + "; ".join(reasons))
