"""The job behind `optimum-cli regcache analyze --check`."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from optimum_regcache.commands.evaluate import Subject, refuse_itself
from optimum_regcache.commands.report import environment
from optimum_regcache.commands.sources import divided_alike, open_model, open_source, saved_recipe
from optimum_regcache.config.files import write_json
from optimum_regcache.config.output import Output
from optimum_regcache.config.recipe import LOCAL, Recipe, recorded_name
from optimum_regcache.data import reference
from optimum_regcache.data.images import ImageInputs
from optimum_regcache.data.reading import store_batches
from optimum_regcache.export.layout import is_exported
from optimum_regcache.search.check import (
    COSINE_SHARE,
    IMAGES_LEFT,
    RECALL,
    WORST,
    FitCheck,
    TokenState,
    check_fit,
    require_quantized,
)
from optimum_regcache.search.plan import space_of
from optimum_regcache.search.traces import OUTLIER_RATIO

Line = tuple[str, str, str, str]  # what, found, needed to fit, verdict


def check_job(subject: Subject, recipe: Recipe, output: Output) -> tuple[dict[str, Any], str]:
    """Whether a quantized model fits a set of images, as ``check.json``.

    The images are those that reports use (`reference_and_report`), so that a check on the data set of the fit sees none that
    the fit saw.

    Args:
        subject: the quantized model; ``original`` only if it is to be read; images default to those of its recipe.
        recipe: amounts and seed.
        output: folder of the result.

    Returns:
        (``check.json``, summary as text).

    Raises:
        ValueError: a model that is not quantized, or exported; a float original that is none, or that has other keys and
            values than the registers are made of.
        OSError: a name that leads nowhere.
    """
    if subject.original is not None:
        refuse_itself(subject.original, subject.model)
    if is_exported(subject.model):
        raise ValueError(f"{subject.model} is exported: its activations cannot be read. Give the saved model.")
    network, processor = open_model(subject.model, subject.hub, "--check")
    require_quantized(network)
    original: Any = None
    if subject.original is not None:
        hub = {k: v for k, v in subject.hub.items() if k != "revision"}
        original = open_model(subject.original, hub, "--float-model")[0].to(subject.device)  # type: ignore[arg-type]
    saved = saved_recipe(subject.model, subject.hub)
    dataset = saved.dataset if subject.dataset is None else subject.dataset
    own = dataset is None and saved.model in reference.names()  # an embedded encoder brings its scenes
    recipe = divided_alike(recipe, saved, dataset)
    few = replace(recipe.data, num_samples=4)  # those of a search are not read
    source = open_source(
        saved.model if own else subject.model, dataset, replace(recipe, model=None, dataset=None, data=few),
        device=subject.device, opened=(network, processor), hub={k: v for k, v in subject.hub.items() if k == "token"},
    )  # fmt: skip
    inputs = ImageInputs(source.report_images, source.processor)
    batches = store_batches(inputs, recipe.data, space_of(recipe.data), progress=True)
    check = check_fit(source.model, batches, original, score_site=saved.search.score_site)
    config: Any = source.model.config.quantization_config
    results: dict[str, Any] = {
        "model": recorded_name(subject.model),
        "float_model": None if subject.original is None else recorded_name(subject.original),
        "dataset": source.dataset_name,
        "dropped_images": source.dropped["report"],
        "quantization": config.label,
        **check.to_dict(),
        "environment": environment(),
    }
    with output as out:
        write_json(out.stage / "check.json", results)
    name = recorded_name(subject.model).removeprefix(LOCAL)
    title = f"{name} ({config.label}) on {check.images} images of {source.images_title}"
    lines = [render_check(check, title), *(f"note: {note}" for note in check.notes)]
    lines += [f"verdict: {check.verdict or 'nothing could be judged'}", *([check.advice] if check.advice else [])]
    return results, "\n".join([*lines, f"written: {output.path}/check.json"])


def _state(name: str, state: TokenState) -> Line:
    found = f"largest {state.largest:.2f}, {state.ratio:.1f}x the median; {state.per_image:.2f} outlier tokens an image"
    return name, found, "", ""


def check_lines(check: FitCheck) -> list[Line]:
    """What was found, what is needed to fit, and the verdict of each part."""
    parts, lines = check.parts(), list[Line]()
    if check.rows is not None:
        r = check.rows
        found = f"{r.cosine:.3f} (K {r.keys:.3f}, V {r.values:.3f})"
        found += f", attainable {r.attainable:.3f}, normal tokens {r.normal:.3f}"
        lines.append(("cosine of outlier tokens to the registers", found, "", ""))
        needed = f">= {COSINE_SHARE[0]:.0%}"
        lines.append(("  of the attainable", f"{r.share:.1%}, {r.images} images", needed, parts.get("registers", "-")))
    for name, state in (("nothing installed", check.nothing), ("with the registers", check.registers)):
        if state is not None:
            lines.append(_state(f"tokens behind block {check.block}, {name}", state))
    if check.deletion is not None:
        d = check.deletion
        recall = "no outlier tokens" if d.recall is None else f"{d.recall:.1%} of {d.outliers}"
        name = f"outlier tokens that deletion of {d.count} removes"
        lines.append((name, recall, f">= {RECALL[0]:.0%}", parts.get("deletion", "-")))
        lines.append((f"images with more than {d.count}", f"{d.images_over:.1%}", "", ""))
    if check.installed is not None:
        if check.deletion is not None:
            lines.append(_state(f"tokens behind block {check.block}, as installed", check.installed))
        left = f"{check.installed.images:.1%}"
        lines.append(("images that keep an outlier token", left, f"<= {IMAGES_LEFT[0]:.0%}", parts["outliers left"]))
    if check.clipping is not None:
        c, limit = check.clipping, check.clipped_limits[0]
        verdict = parts["activation scales"]
        lines.append((f"clipped values, mean of {len(c.shares)} scales", f"{c.mean:.4%}", f"<= {limit:.1%}", verdict))
        worst = f"{c.shares[c.worst]:.4%}, reach {c.reach[c.worst]:.2f}, {c.worst}"
        lines.append(("  most", worst, f"<= {WORST * limit:.0%}", ""))
    return lines


def render_check(check: FitCheck, title: str, width: int = 150) -> str:
    """The table for a terminal."""
    caption = f"outlier token: more than {OUTLIER_RATIO:g}x the median l_inf norm of its image; measured in the "
    caption += "float original" if check.float_model else "model's own weights with float activations"
    table = Table(title=escape(title), title_justify="left", caption=caption, caption_justify="left")
    for heading in ("", "found", "to fit", "verdict"):
        table.add_column(heading)
    for line in check_lines(check):
        table.add_row(*(escape(cell) for cell in line))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()
