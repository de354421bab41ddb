"""A recipe: quantization config, search settings and data amounts in one YAML file, with a measured result beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from optimum_regcache.config import PRESETS, RegCacheConfig
from optimum_regcache.config.expect import ExpectConfig
from optimum_regcache.config.files import write_text
from optimum_regcache.config.migrate import migrate_field, migrate_recipe
from optimum_regcache.config.recipe_files import recipe_file
from optimum_regcache.config.validation import build_part, check_types, is_mapping, plain, require
from optimum_regcache.config.yaml_text import MAX_BYTES, read_yaml

MOST_IMAGES = 10_000_000
MOST_WORKERS = 256
OBJECTIVES = ("cosine", "patch_cosine", "similarity_kl", "logit_kl", "accuracy", "knn")
REFINEMENTS = {  # name -> how a table says it
    "clusters": "k-means registers",
    "block_copies": "tau per block",
    "tuned": "tuned by gradient",
    "replace": "replaced",
    "late_deletion": "deleted late",
    "per_token": "per token at fc2",
    "threshold": "by threshold",
}
DELETION_REFINEMENTS = {  # those that change the deletion and leave the registers as they are -> fields of DeletionConfig
    "replace": {"action": "replace"},
    "late_deletion": {"action": "late"},
    "per_token": {"action": "per_token"},
    "threshold": {"rule": "threshold"},
}
LOCAL = "local:"  # before the name of a folder that was somewhere on the machine where a recipe was made


@dataclass(frozen=True)
class SearchConfig:
    """How registers and deletion are searched (docs/method.md 2 to 9).

    How keys and values are computed is set by ``registers.kv_mode``, for searched and for fixed registers; a recipe of version
    0.1.0 with ``search.kv_mode`` opens with the same meaning.

    Attributes:
        strategy: ``averaged_tokens`` (average of the top tokens per start block: start block x tau, then k~ for the best tau of
            each start block, then tau again for the best pair) or ``single_token`` (single tokens of the sensitive block in
            place of start blocks). Recipes of version 0.1.0 call them ``v4`` and ``v2``, and still open.
        objective: score of an image, higher is better. Label-free, against the float model: ``cosine`` (final features),
            ``patch_cosine`` (patch tokens, for dense use), ``similarity_kl`` (similarities to other images), ``logit_kl``
            (class probabilities of a classifier). With labels: ``accuracy`` (classifier, or zero-shot), ``knn`` (nearest
            neighbours among the reference images).
        algorithm: way through the space of configurations: ``halving`` (all on a few images, the better ones on more),
            ``coordinate`` (start block and tau, then k~, then tau again; all images) or ``exhaustive`` (the paper's grid, every
            start, tau and k~; many times the work). A recipe saved before there was a choice means ``coordinate``.
        always: search even where round to nearest loses less than ``min_gain``.
        sensitivity: ``coarse`` (on a quarter of the images blocks, then the linear layers of the worst, and of the second where
            it loses at least a quarter as much; the worst layer of each on all images), ``linear`` (every linear layer, one
            quantized at a time) or ``block`` (all linears of a block).
        sensitivity_images: at most this many selection images are used by the scan.
        sensitive_block: skip the scan and take this block as l_q.
        score_site: tokens are ranked by l_inf at the ``block_input`` or at the ``fc2_input`` of the block.
        blocks_before: how many blocks before l_q may be the start block (``averaged_tokens``).
        scopes: ``onwards`` (prefix from the start block to the last block) and/or ``single`` (the start block only).
        num_copies: tau grid. The paper scans 1 to 15; the default is the same range on a coarser, roughly geometric grid,
            because tau enters as ln(tau).
        max_delete: largest k~ tried, at most a quarter of the patches.
        top_tokens: tokens averaged per start block (``averaged_tokens``), at most one per reference image on average.
        num_candidates: single tokens tried (``single_token``), at most one per reference image on average.
        min_gain: smallest mean gain of the objective worth installing anything for, in its own unit (nats for a KL).
        noise_sigmas: the gain on held-out search images must also exceed this many paired standard errors.
        retune: with methods other than round to nearest: try neighbouring k~ and tau again with the final quantizer before the
            decision; each costs one run of all methods.
        refinements: what the best setup with a prefix is refined by once the search is done. Its registers: ``clusters`` (2 or
            4 per block by k-means), ``block_copies`` (tau per block, or none), ``tuned`` (keys, values and tau by gradients).
            What happens to its outlier tokens, at neighbouring k~, and to those of the best deletion alone where that is the
            best of all: ``replace``, ``late_deletion``, ``per_token``, ``threshold`` (`DeletionConfig`). Each looks at the
            calibration and selection images only, and is installed only if it beats both "nothing" and what would be
            installed without it on the confirmation images.
        seed: division of the images into calibration, selection and confirmation parts, also where nothing is searched, and
            sampling of normal tokens.
    """

    strategy: str = "averaged_tokens"
    objective: str = "cosine"
    algorithm: str = "halving"
    always: bool = False
    sensitivity: str = "coarse"
    sensitivity_images: int = 64
    sensitive_block: int | None = None
    score_site: str = "block_input"
    blocks_before: int = 3
    scopes: tuple[str, ...] = ("onwards",)
    num_copies: tuple[float, ...] = (1, 2, 4, 8, 15)
    max_delete: int = 10
    top_tokens: int = 100
    num_candidates: int = 20
    min_gain: float = 0.001
    noise_sigmas: float = 2.0
    retune: bool = False
    refinements: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "search")
        object.__setattr__(self, "num_copies", tuple(float(c) for c in self.num_copies))
        for name, allowed in (
            ("strategy", ("averaged_tokens", "single_token")),
            ("objective", OBJECTIVES),
            ("algorithm", ("halving", "coordinate", "exhaustive")),
            ("sensitivity", ("coarse", "linear", "block")),
            ("score_site", ("block_input", "fc2_input")),
        ):
            value = getattr(self, name)
            require(value in allowed, f"search.{name} must be one of {', '.join(allowed)}; got {value!r:.80}.")
        require(
            bool(self.scopes) and set(self.scopes) <= {"onwards", "single"},
            f"search.scopes must hold 'onwards' and/or 'single', got {list(self.scopes)}.",
        )
        require(
            set(self.refinements) <= set(REFINEMENTS) and len(set(self.refinements)) == len(self.refinements),
            f"search.refinements must hold each of {', '.join(REFINEMENTS)} at most once, got {list(self.refinements)!r:.80}.",
        )
        require(
            bool(self.num_copies) and all(0 < c < math.inf for c in self.num_copies),
            f"search.num_copies must be a non-empty list of numbers > 0, got {list(self.num_copies)}.",
        )
        for name in ("blocks_before", "max_delete", "min_gain", "noise_sigmas"):
            require(getattr(self, name) >= 0, f"search.{name} must be >= 0, got {getattr(self, name)}.")
        require(0 <= self.seed < 2**32, f"search.seed must lie between 0 and 2**32 - 1, got {self.seed}.")
        for name in ("top_tokens", "num_candidates", "sensitivity_images"):
            require(getattr(self, name) >= 1, f"search.{name} must be at least 1, got {getattr(self, name)}.")
        require(
            self.sensitive_block is None or self.sensitive_block >= 0,
            f"search.sensitive_block must be >= 0, got {self.sensitive_block}.",
        )


@dataclass(frozen=True)
class DataConfig:
    """How much data each step sees. The three parts never share an image.

    The reference images are divided in the same way whether registers are searched, given or left out, so that the scales are
    calibrated on the same images.

    Attributes:
        num_samples: reference images for calibration and search together.
        calibration_fraction: share of them for the activation scales (at least 1, at most 128 images).
        confirm_fraction: share of the remaining images held back from the ranking of configurations; the best ones have to
            beat "install nothing" on these.
        num_report: images of the command line's report, from another split.
        batch_size: images per forward pass.
        memory_budget: GiB of memory for processed images and recorded states; what is beyond goes to files in the work
            directory, so that any number of images can be used. Default: a quarter of what is free. Changes no result.
        workers: processes that decode images; by default as many as there are cores less one where that is worth it, 0 for
            none. Changes no result.
        skip_broken: leave out images that are missing or cannot be decoded, with a warning and a count in the results, instead
            of stopping at the first. The search and the report keep their images, less the broken ones.
        streaming: of the command line's data set read as many images as are used, in place of downloading all of it
            (`optimum_regcache.data.streaming`). Other images than without.
    """

    num_samples: int = 256
    calibration_fraction: float = 0.25
    confirm_fraction: float = 0.33
    num_report: int = 512
    batch_size: int = 32
    memory_budget: float | None = None
    workers: int | None = None
    skip_broken: bool = False
    streaming: bool = False

    def __post_init__(self) -> None:
        check_types(self, "data")
        require(self.num_samples >= 4, f"data.num_samples must be at least 4, got {self.num_samples}.")
        require(self.num_report >= 1, f"data.num_report must be at least 1, got {self.num_report}.")
        require(
            self.memory_budget is None or 0 <= self.memory_budget < math.inf,
            f"data.memory_budget must be >= 0 (GiB) or null, got {self.memory_budget}.",
        )
        require(
            self.workers is None or 0 <= self.workers <= MOST_WORKERS,
            f"data.workers must lie between 0 and {MOST_WORKERS}, or be null; got {self.workers}.",
        )
        require(self.batch_size >= 1, f"data.batch_size must be at least 1, got {self.batch_size}.")
        for name in ("num_samples", "num_report", "batch_size"):
            value = getattr(self, name)
            require(value <= MOST_IMAGES, f"data.{name} must be at most {MOST_IMAGES}, got {value}.")
        for name in ("calibration_fraction", "confirm_fraction"):
            value = getattr(self, name)
            require(0.0 < value < 1.0, f"data.{name} must lie between 0 and 1, got {value}.")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a quantized model, given a float model and a data set.

    Attributes:
        quantization: what the result is made of.
        search: how registers and deletion are found.
        data: how many images.
        model, dataset: Hub ids, paths or names of reference encoders; the command line may override them. A saved recipe
            holds no path: ``local:NAME`` stands for a folder or file of the machine that it was made on.
        revision: of ``model`` on the Hub.
        notes: free text: what was measured with this recipe, or that it was not measured yet.
        expect: what a result should reach; ``optimum-cli regcache run`` says whether it does.
    """

    quantization: RegCacheConfig = field(default_factory=lambda: RegCacheConfig())
    search: SearchConfig = field(default_factory=SearchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: str | None = None
    dataset: str | None = None
    revision: str | None = None
    notes: str = ""
    expect: ExpectConfig | None = None

    def __post_init__(self) -> None:
        for name in ("model", "dataset", "revision"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str)):
                raise TypeError(f"{name} must be a string or null, got {value!r:.80}.")
            require(value is None or bool(value.strip()), f"{name} must not be empty; leave it out, or write null.")
        if not isinstance(self.notes, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"notes must be a string, got {self.notes!r:.80}.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Build a recipe from a nested mapping; ``preset`` may stand in for (part of) ``quantization``.

        Raises:
            ValueError: unknown keys or bad values, named.
        """
        values = migrate_recipe(values)
        preset = values.pop("preset", None)
        if not (preset is None or isinstance(preset, str)):
            raise TypeError(f"preset must be a string, got {preset!r:.80}.")
        base = RegCacheConfig.from_preset(preset) if preset is not None else RegCacheConfig()
        quantization = values.pop("quantization", None)
        if isinstance(quantization, RegCacheConfig):
            require(preset is None, "A recipe has either 'preset' or a complete RegCacheConfig, not both.")
            base = quantization
        elif quantization is not None:
            if not is_mapping(quantization):
                raise TypeError(f"quantization must be a mapping, got {type(quantization).__name__}.")
            parts = {str(k): v for k, v in quantization.items() if k not in ("quant_method", "version")}
            RegCacheConfig(**{k: v for k, v in quantization.items() if k in ("quant_method", "version")})
            base = base.replace(**parts)
        known = {f.name for f in fields(cls)} | {"preset"}
        unknown = sorted(str(key)[:40] for key in set(values) - known)
        require(
            not unknown,
            f"Unknown key{'s' if len(unknown) > 1 else ''} in the recipe: {', '.join(unknown[:5])}. "
            f"Known keys: {', '.join(sorted(known))}.",
        )
        return cls(
            quantization=base,
            search=build_part(SearchConfig, values.get("search"), "search"),
            data=build_part(DataConfig, values.get("data"), "data"),
            model=values.get("model"),
            dataset=values.get("dataset"),
            revision=values.get("revision"),
            notes=values.get("notes", ""),
            expect=None if values.get("expect") is None else build_part(ExpectConfig, values["expect"], "expect"),
        )

    @classmethod
    def load(cls, source: str | Path, token: str | None = None) -> Recipe:
        """A preset name, a YAML file, the name of a packaged recipe, or a repository of the Hub that holds ``recipe.yaml``.

        Args:
            source: for example ``w8a8``, ``my.yaml``, ``clip-vit-base-patch16-w8a8``, ``user/name`` or ``user/name@revision``.
            token: of the Hub.

        Raises:
            FileNotFoundError: none of these.
            ValueError: not a recipe.
        """
        if str(source) in PRESETS:
            return cls(quantization=RegCacheConfig.from_preset(str(source)))
        path = recipe_file(source, token)
        with path.open("rb") as file:
            data = read_yaml(file.read(MAX_BYTES + 1), str(path))
        require(isinstance(data, dict), f"{path} is not a recipe: expected a mapping with keys such as 'quantization'.")
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(": ".join((str(path), str(error)))) from None
        except TypeError as error:
            raise TypeError(": ".join((str(path), str(error)))) from None

    def override(self, assignments: list[str]) -> Recipe:
        """Apply ``section.field=value`` strings, for example ``search.max_delete=4`` or
        ``quantization.activations.observer=mse``; values are YAML.

        Raises:
            ValueError: a string without '=', or an unknown field.
        """
        data = self.to_dict()
        for text in assignments:
            path, equals, value = text.partition("=")
            require(bool(equals), f"Expected section.field=value, got {text!r:.80}.")
            *parents, leaf = migrate_field(path).split(".")
            node: Any = data
            for part in parents:
                require(is_mapping(node) and part in node, f"Unknown recipe field {path!r}.")
                node = node[part]
            require(is_mapping(node) and leaf in node, f"Unknown recipe field {path!r}.")
            node[leaf] = read_yaml(value.encode(), text)
        return Recipe.from_dict(data)

    def with_quantization(self, config: RegCacheConfig) -> Recipe:
        """The same recipe with another quantization config."""
        return replace(self, quantization=config)

    def with_effort(self, name: str) -> Recipe:
        """The same recipe with the settings of `EFFORTS` (``quick``, ``thorough``) wherever it has the default.

        Raises:
            ValueError: an unknown name, or a recipe that searches nothing.

        Example:
            >>> Recipe().with_effort("quick").data.num_samples
            96
        """
        from optimum_regcache.config.efforts import with_effort  # which reads what a search reads, and so this module

        return with_effort(self, name)

    def to_dict(self) -> dict[str, Any]:
        """Nested mapping that `from_dict` reads."""
        parts = {name: {k: plain(v) for k, v in asdict(getattr(self, name)).items()} for name in ("search", "data")}
        return {
            "model": self.model,
            "dataset": self.dataset,
            "revision": self.revision,
            "notes": self.notes,
            "quantization": self.quantization.to_dict(),
            **parts,
            "expect": None if self.expect is None else asdict(self.expect),
        }

    def portable(self, known: Collection[str] = ()) -> Recipe:
        """The same recipe without paths of this machine; names of ``known`` stay as they are."""
        names = {name: getattr(self, name) for name in ("model", "dataset")}
        return replace(self, **{k: v if v is None or v in known else recorded_name(v) for k, v in names.items()})

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe as YAML."""
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))


def recorded_name(name: str) -> str:
    """What may be written down of a model or data set: a name as it is, of a path the last part only."""
    if name.startswith(LOCAL):
        return name
    looks = name.startswith(("/", ".", "~")) or "\\" in name or re.match(r"[A-Za-z]:", name)
    return LOCAL + (Path(name).resolve().name or "folder") if looks or Path(name).exists() else name
