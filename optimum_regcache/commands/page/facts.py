"""The sections that tell what a result is and how good it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimum_regcache.commands.page.parts import Item, Picture, Pictures, Table, Text, number, percent, with_error
from optimum_regcache.commands.page.plots import Plotter
from optimum_regcache.commands.page.runs import ANALYZE, CHECK, EVALUATE, Run
from optimum_regcache.config.recipe import LOCAL

_MACHINE = ("machine", "cpu_model", "system", "cpu_capability", "threads", "logical_cpus", "int8_kernel")


def title_of(name: Any) -> str:
    """The name of a model or of images for readers."""
    return "-" if name is None else str(name).removeprefix(LOCAL)


def what_it_is(run: Run, plotter: Plotter) -> list[Item]:
    """Model, scheme, what is installed, images, versions and machine."""
    del plotter
    config, environment = run.at("recipe", "quantization") or {}, run.at("environment") or {}
    searched, dropped = run.at("search_images"), run.at("dropped_images")
    facts: dict[str, Any] = {
        "result of": run.kind,
        "model": title_of(run.at("model")),
        "float original": title_of(run.at("float_model")) if run.kind in (CHECK, EVALUATE) else None,
        "images": title_of(run.at("dataset")),
        "scheme": run.at("quantization"),
        "quantized": run.at("protocol"),
        "quantized layers": run.at("quantized_layers"),
        "methods": " + ".join(str(m["name"]) for m in run.at("methods") or ()) or None,
        "simulated, not run in integers": run.at("simulated"),
        "registers": _registers(config.get("registers")),
        "deletion": _deletion(config.get("deletion")),
        "sensitive block": run.at("fit", "sensitive_block"),
        "images of the search": searched and ", ".join(f"{count} {part}" for part, count in searched.items()),
        "images of the scan": run.at("images") if run.kind == ANALYZE else None,
        "images of the report": run.at("images") if run.kind in (CHECK, EVALUATE) else run.at("report_images"),
        "broken images left out": _dropped(dropped),
        "seed": run.at("recipe", "search", "seed"),
        "seconds": run.at("seconds"),
        "versions": ", ".join(f"{k} {v}" for k, v in environment.items() if k not in _MACHINE and isinstance(v, str)),
        "machine": ", ".join(f"{k} {environment[k]}" for k in _MACHINE if k in environment),
    }
    rows = [[name, str(value)] for name, value in facts.items() if value not in (None, "", "-")]
    note = run.at("note")
    items: list[Item] = [Text(str(note))] if note else []
    return [*items, Table(["", ""], rows, words=frozenset({0, 1}))]


def _registers(config: Mapping[str, Any] | None) -> str | None:
    if config is None:
        return None
    if config.get("mode") == "none" or not config.get("blocks"):
        return "none"
    blocks = ", ".join(map(str, config["blocks"]))
    copies = config["num_copies"]
    tau = ", ".join(f"{c:.4g}" for c in (copies if isinstance(copies, list) else [copies]))
    return f"{config['num_registers']} in blocks {blocks}; tau {tau}"


def _deletion(config: Mapping[str, Any] | None) -> str | None:
    if config is None:
        return None
    if not config.get("count"):
        return "none"
    return f"{'at most ' * (config['rule'] != 'topk')}{config['count']} tokens (k~) at block {config['block']}"


def _dropped(dropped: Any) -> str | None:
    if isinstance(dropped, Mapping):
        return ", ".join(f"{count} of the {part}" for part, count in dropped.items() if count) or None
    return str(dropped) if dropped else None


def saved_row(run: Run) -> Mapping[str, Any]:
    """The row of what was saved: the last one."""
    return run.data["rows"][-1]


def accuracy(run: Run, plotter: Plotter) -> list[Item]:
    """Float, naive, what was saved, and what lies between."""
    if run.kind == EVALUATE:
        return _evaluated(run, plotter)
    rows: Sequence[Mapping[str, Any]] = run.data["rows"]
    base, labelled = rows[0]["flops"], rows[0]["accuracy"] is not None
    headings = [
        "variant",
        "top-1",
        "cosine",
        "retention",
        "recovered",
        "max norm",
        "mean norm",
        "max fc2",
        "FLOPs",
        "installed",
    ]
    lines = [
        [
            r["name"] + (" (below naive)" if r["below_naive"] else ""),
            with_error(r["accuracy"], r.get("standard_error"), True),
            with_error(r["cosine"], None if labelled else r.get("standard_error"), False),
            percent(r["retention"]),
            percent(r["recovered_loss"]),
            number(r["max_block_norm"], ".2f"),
            number(r["mean_block_norm"], ".2f"),
            number(r["max_fc2_norm"], ".2f"),
            f"{100 * (r['flops'] / base - 1):+.1f} %" if r["flops"] and base else "-",
            r["installed"],
        ]
        for r in rows
    ]
    if not labelled:
        headings, lines = [h for h in headings if h != "top-1"], [[line[0], *line[2:]] for line in lines]
    caption = (
        f"Measured on the report split: {run.data['report_images']} images of {title_of(run.at('dataset'))} that neither "
        "search nor calibration saw. ±: standard error over these images. The metric is top-1 where there are labels, else the "
        "cosine to the float model. retention: metric / that of float; recovered: (metric - naive) / (float - naive)."
    )
    items: list[Item] = [Table(headings, lines, caption, words=frozenset({0, len(headings) - 1}))]
    worse = [str(name) for name in run.at("below_naive") or ()]
    if worse:
        items.insert(0, Text(f"Worse than round to nearest: {', '.join(worse)}. Do not use these settings here.", True))
    if rows[0].get("standard_error") is None:
        items.append(Text("This result was written without standard errors."))
    picture = _top1_bars(rows, plotter) if labelled else _cosine_marks(rows, plotter)
    items += [] if picture is None else [Pictures([picture])]
    return [*items, *_seeds(run, labelled), *_others(run)]


def _top1_bars(rows: Sequence[Mapping[str, Any]], plotter: Plotter) -> Picture:
    values = [100 * r["accuracy"] for r in rows]
    errors = [None if r.get("standard_error") is None else 100 * r["standard_error"] for r in rows]
    name, names = "top-1 in %", [r["name"] for r in rows]
    alt = f"Bars, {name}: " + ", ".join(f"{n} {v:.4g}" for n, v in zip(names, values, strict=True))
    return plotter.bars(names, {name: (values, errors)}, f"{name}, with standard errors", alt, x=name)


def _cosine_marks(rows: Sequence[Mapping[str, Any]], plotter: Plotter) -> Picture | None:
    rows = [r for r in rows if r["name"] != "float"]
    series = {"variant": ([r["cosine"] for r in rows], [r.get("standard_error") for r in rows])}
    return plotter.losses([r["name"] for r in rows], series, ", with standard errors")


def _seeds(run: Run, labelled: bool) -> list[Item]:
    seeds = run.at("seeds")
    if not seeds:
        return []
    rows = [[k, with_error(v["mean"], v["std"], labelled)] for k, v in seeds.items() if k != "seeds"]
    return [Table(["variant", "mean ± standard deviation"], rows, f"Over {len(seeds['seeds'])} sets of report scenes.")]


def _others(run: Run) -> list[Item]:
    """Other quantizers that were tried."""
    found = run.at("recommendation")
    if not found or not found["alternatives"]:
        return []
    rows = [
        [a["name"], number(a["score"]), number(a["gain"], "+.4f"), number(a["standard_error"]), number(a["needed"]),
         "yes" if a["clearly_better"] else a.get("not_applicable") or "no"]
        for a in found["alternatives"]
    ]  # fmt: skip
    caption = f"Other quantizers, by {found['objective']} on {found['images']} held-out images of the search split."
    headings = ["quantizer", "score", "gain", "its error", "needed", "clearly better"]
    return [Table(headings, rows, caption, words=frozenset({0, 5}))]


def _evaluated(run: Run, plotter: Plotter) -> list[Item]:
    """`evaluate`: the model beside its float original, and fused."""
    data = run.data
    rows: list[list[str]] = []
    if data.get("float_accuracy") is not None:
        rows.append(["float original", percent(data["float_accuracy"], 2), number(1.0), "100.0 %", ""])
    name = "the model"
    rows.append([
        name, percent(data.get("accuracy"), 2), number(data.get("feature_cosine")), percent(data.get("retention")), "",
    ])  # fmt: skip
    fused = data.get("fused") or {}
    for kind, found in fused.items():
        cells = percent(found.get("accuracy"), 2), number(found.get("feature_cosine"))
        rows.append([f"fused, {kind}", *cells, "", str(found["how"])])
    caption = f"On {data['images']} report images of {title_of(data['dataset'])}."
    headings = ["variant", "top-1", "cosine", "retention", "how"]
    items: list[Item] = [Table(headings, rows, caption, words=frozenset({0, 4}))]
    tasks: list[list[str]] = []
    for task, scores in (data.get("tasks") or {}).items():
        for figure, score in scores.items():
            share = score["share"]
            shown = with_error(score["value"], score["standard_error"], share)
            base = with_error(score["float_value"], None, share)
            difference = with_error(score["difference"], score["difference_error"], share)
            tasks.append([f"{task}, {figure}", shown, base, difference, str(score["count"])])
    if tasks:
        caption = (
            "± standard errors over images or texts; differences one by one. Cosines are those to the float original."
        )
        headings = ["figure", name, "float original", "difference", "images or texts"]
        items.append(Table(headings, tasks, caption, words=frozenset({0})))
    if data.get("accuracy_note"):
        items.append(Text(f"top-1: {data['accuracy_note']}"))
    if data.get("accuracy") is not None and data.get("float_accuracy") is not None:
        values = {"float original": data["float_accuracy"], name: data["accuracy"]}
        alt = "Bars, top-1 in %: " + ", ".join(f"{k} {100 * v:.4g}" for k, v in values.items())
        series = {"top-1": ([100 * v for v in values.values()], [None] * len(values))}
        items.append(Pictures([plotter.bars(list(values), series, "top-1", alt, x="top-1 in %")]))
    return items


def fitness(run: Run, plotter: Plotter) -> list[Item]:
    """`analyze --check`: the verdict and its parts."""
    del plotter
    verdict = run.data["verdict"]
    rows = [[str(part), str(found)] for part, found in run.data["parts"].items()]
    text = f"Verdict: {verdict or 'nothing could be judged'}. {run.data.get('advice') or ''}"
    items: list[Item] = [Text(text.strip(), verdict is not None and verdict != "fits")]
    items += [Table(["part", "verdict"], rows, words=frozenset({0, 1}))] if rows else []
    return [*items, *(Text(str(note)) for note in run.data.get("notes") or ())]


def speed(run: Run, plotter: Plotter) -> list[Item]:
    """A benchmark: times and ratios of every contender."""
    found: list[Item] = []
    results: Sequence[Mapping[str, Any]] = run.data["results"]
    for model, batch in dict.fromkeys((r["model"], r["batch_size"]) for r in results):
        mine = [r for r in results if (r["model"], r["batch_size"]) == (model, batch)]
        rows = [
            [r["contender"], number(r["median_ms"], ".1f"), number(r.get("spread"), ".2f"), f"{r['ratio_to_float32']:.2f}",
             number(r["cosine"]), str(r.get("variant", ""))]
            for r in mine
        ]  # fmt: skip
        where = f"{model}, batches of {batch}"
        headings = ["contender", "median ms", "spread", "ratio to float32", "cosine", "variant"]
        caption = (
            f"{where}. ratio: larger is faster; spread: interquartile range / median, a difference below it is none."
        )
        found.append(Table(headings, rows, caption, words=frozenset({0, 5})))
        ratios = [r["ratio_to_float32"] for r in mine]
        alt = f"Bars, speed as a multiple of float32, {where}: "
        alt += ", ".join(f"{r['contender']} {ratio:.2f}" for r, ratio in zip(mine, ratios, strict=True))
        series = {"ratio": (ratios, [None] * len(mine))}
        picture = plotter.bars([r["contender"] for r in mine], series, where, alt, x="speed, multiple of float32")
        found.append(Pictures([picture]))
    return found
