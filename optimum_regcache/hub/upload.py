"""From the folder of a result to one commit on the Hub: looked at before, all at once, and repeatable after an interruption."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from optimum_regcache.config import QUANT_METHOD, RegCacheConfig
from optimum_regcache.config.output import note
from optimum_regcache.config.validation import is_mapping, require
from optimum_regcache.hub.card import CARD, at_hub, unfinished
from optimum_regcache.hub.checks import check_saved
from optimum_regcache.hub.files import check_files
from optimum_regcache.hub.remote_code import SHIM
from optimum_regcache.hub.stored import read_files

_MODEL = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", SHIM.name)
_WORDS = (
    "tokenizer.json", "tokenizer.model", "vocab.*", "merges.txt", "spiece.model", "special_tokens_map.json",
    "added_tokens.json", "chat_template.*",
)  # fmt: skip
_OURS = (
    *_MODEL, "*processor_config.json", "tokenizer_config.json", *_WORDS, "recipe.yaml", "results.json", CARD, "analysis.png",
    "outliers.png",
)  # fmt: skip
_NEEDED = (CARD, "recipe.yaml")
_RIVALS = ("*.bin", "*.h5", "*.msgpack")  # weights that transformers would find as well
_LOCAL = re.compile(
    r"""(?:^|(?<=[\s"'`(=\[,]))(?:/(?:home|Users|root|mnt|media|tmp|var|opt|srv|data|scratch|work|private)/|~/|[A-Za-z]:\\)"""
    r"""[^\s"'`)\],]+"""
)
_HTTP: type[BaseException] = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")  # of the HTTP library
_AGAIN = "Run it again: what was uploaded is kept."


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub now.

    Attributes:
        repo_id, revision: where; ``main`` is None.
        url: of the model, or of the pull request.
        changed: whether there is a new commit; not if all files were there already.
        left_out: files of the folder that were not uploaded.
    """

    repo_id: str
    revision: str | None
    url: str
    changed: bool
    left_out: list[str]


def push_folder(  # noqa: PLR0913
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    private: bool | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    exist_ok: bool = False,
    unfinished: bool = False,
) -> Pushed:
    """Upload a result in one commit; files of an earlier one that it lacks go.

    Args:
        folder: what `quantize` or `RegCacheQuantizer.save` wrote.
        repo_id: ``user/name``; made if it does not exist.
        revision: branch, made from ``main`` if it does not exist.
        create_pr: as a pull request.
        private: of a repository that is made; None for the default of its owner.
        commit_message: first line of the commit.
        token: default: that of ``hf auth login``.
        exist_ok: the repository may hold another model, which is replaced.
        unfinished: the search may have been interrupted.

    Raises:
        ValueError: no finished result, one that was changed, paths of this machine in its files, or a repository in use.
        OSError: the Hub refuses (``PermissionError``), or cannot be reached (``ConnectionError``).
    """
    require(
        re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) is not None, f"{repo_id!r} is no name on the Hub; give user/name."
    )
    require(
        not (create_pr and revision),
        "A pull request goes to main: give a revision (--revision) or create_pr (--pr), not both.",
    )
    folder = Path(folder)
    names = check_result(folder, allow_unfinished=unfinished)
    content: dict[str, bytes | Path] = {name: folder / name for name in names}
    content[CARD] = at_hub((folder / CARD).read_text(encoding="utf-8"), repo_id, revision).encode()
    api = HfApi(token=token)
    with _explained(repo_id, api.endpoint):
        fresh = _open_repo(api, repo_id, private, create_pr)
        if revision is not None:
            fresh |= _open_branch(api, repo_id, revision)
        head = api.repo_info(repo_id, revision=revision).sha
        held = {
            entry.path: entry
            for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision)
            if isinstance(entry, RepoFile)
        }
        new = [name for name, data in content.items() if name not in held or not _same(held[name], data)]
        old = [name for name in held if name not in content and _matches(name, (*_OURS, *_RIVALS))]
        taken = [name for name in (*new, *old) if name in held and _matches(name, (*_MODEL, *_RIVALS))]
        require(
            fresh or exist_ok or create_pr or not taken,
            f"{repo_id} holds another model ({', '.join(taken[:3])}). Use another name, --revision (revision=), --pr "
            "(create_pr=True), or replace it with --exist-ok (exist_ok=True).",
        )
        operations = [
            *(CommitOperationAdd(name, cast("Any", content[name])) for name in new),
            *(CommitOperationDelete(name) for name in old),
        ]
        left_out = sorted(p.name for p in folder.iterdir() if p.name not in content and p.name != "regcache.json")
        url = f"{api.endpoint}/{repo_id}"
        if not operations:
            return Pushed(repo_id, revision, url + (f"/tree/{revision}" if revision else ""), False, left_out)
        message = commit_message or f"Upload {_label(folder)} model with optimum-regcache"
        done = api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr, parent_commit=head
        )
    if create_pr:
        return Pushed(repo_id, done.pr_revision, str(done.pr_url), True, left_out)
    return Pushed(repo_id, revision, url + (f"/tree/{revision}" if revision else ""), True, left_out)


def check_result(folder: Path, *, allow_unfinished: bool = False) -> list[str]:
    """Make sure that ``folder`` holds a finished result as it was saved, and nothing that tells where it was made.

    Returns:
        The files to upload.

    Raises:
        FileNotFoundError: no folder, or no model in it.
        ValueError: another library's model, a file that is missing, changed or damaged, an unfinished search, or paths.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no directory {folder} (the working directory is {Path.cwd()}).")
    check_files(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if not is_mapping(config) or config.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"{folder} holds no model that optimum-regcache quantized. Quantize it first (optimum-cli regcache quantize)."
        )
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    require(
        not missing,
        f"{folder} lacks {', '.join(missing)}: save_pretrained alone does not write them. Save the model with "
        "RegCacheQuantizer.save, or quantize with optimum-cli regcache quantize.",
    )
    stored, saved = read_files(sorted(folder.glob("*.safetensors")))
    if saved is None:
        raise ValueError(
            f"The weights in {folder} carry no fingerprint, so a damage could not be seen. Save them again."
        )
    check_saved(RegCacheConfig(**config), stored, saved)
    require(
        allow_unfinished or not unfinished(folder),
        f"The search behind {folder} was interrupted. Let the same command finish it with --overwrite, or publish it as it "
        "is with --unfinished (unfinished=True).",
    )
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and _matches(path.name, _OURS))
    found = [f"{name}: {text}" for name in names for text in _local_paths(folder / name)]
    require(not found, f"{folder} tells paths of this machine ({found[:1]}). Take them out, and push again.")
    return names


def _local_paths(path: Path) -> list[str]:
    if path.suffix not in (".json", ".yaml", ".md", ".py") or _matches(path.name, _WORDS):
        return []
    return _LOCAL.findall(path.read_text(encoding="utf-8"))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns) and "/" not in name


def _label(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return RegCacheConfig(**config["quantization_config"]).label.upper()


def _same(held: RepoFile, data: bytes | Path) -> bool:
    """Whether a file of the repository has this content: by SHA-256 if it is a large one, else by git's own digest."""
    size = len(data) if isinstance(data, bytes) else data.stat().st_size
    if held.size != size:
        return False
    digest = hashlib.sha256() if held.lfs is not None else hashlib.sha1(b"blob %d\0" % size)
    if isinstance(data, bytes):
        digest.update(data)
    else:
        with data.open("rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
    return digest.hexdigest() == (held.lfs.sha256 if held.lfs is not None else held.blob_id)


def _open_repo(api: HfApi, repo_id: str, private: bool | None, create_pr: bool) -> bool:
    """Whether the repository was made now; refuses one that others can see where a private one is wanted."""
    try:
        info = api.model_info(repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        if create_pr and error.response.status_code == 404:
            raise
        api.create_repo(repo_id, private=private, exist_ok=True)
        return True
    require(
        private is None or bool(info.private) == private,
        f"{repo_id} exists and is {'private' if info.private else 'public'}. Change that in its settings on the Hub, or leave "
        "--private and --public (private=) out.",
    )
    return False


def _open_branch(api: HfApi, repo_id: str, revision: str) -> bool:
    """Whether the branch was made now."""
    try:
        api.repo_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        return True
    return False


@contextmanager
def _explained(repo_id: str, endpoint: str) -> Generator[None, None, None]:
    """Errors of the Hub and of the network become one line with advice."""
    try:
        yield
    except KeyboardInterrupt as error:
        note(error, f"Nothing is on the Hub yet. {_AGAIN}")
        raise
    except Exception as error:
        better = _explain(error, repo_id, endpoint)
        if better is None:
            raise
        raise better from error


def _explain(error: BaseException | None, repo_id: str, endpoint: str) -> OSError | None:
    """The error to raise in place of one of huggingface_hub, None for any other."""
    if error is None or (isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError)):
        return None
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it, and push again.")
    if isinstance(error, LocalTokenNotFoundError):
        return PermissionError("There is no token for the Hub. Log in with `hf auth login`, or give --token (token=).")
    if isinstance(error, GatedRepoError):
        return PermissionError(f"{repo_id} is gated: ask for access on {endpoint}/{repo_id}, and push again.")
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repo_id)
    if isinstance(error, (_HTTP, ConnectionError, TimeoutError)):
        return ConnectionError(f"The Hub ({endpoint}) cannot be reached ({error or type(error).__name__}). {_AGAIN}")
    return _explain(error.__cause__, repo_id, endpoint)


def _refused(error: HfHubHTTPError, repo_id: str) -> OSError:
    status, said = error.response.status_code, error.server_message or "no reason given"
    if status == 401:
        return PermissionError(
            f"The Hub knows no token that may see {repo_id} (401). Log in with `hf auth login`, or give --token (token=)."
        )
    if status == 403:
        return PermissionError(
            f"This token may not write to {repo_id} (403: {said}). Take a token with the right to write, or propose the model "
            "with --pr (create_pr=True)."
        )
    if status == 404:
        return FileNotFoundError(f"{repo_id} does not exist, or this token may not see it (404). Look at the name.")
    if status in (409, 412):
        return OSError(f"{repo_id} was changed by somebody else meanwhile ({status}). {_AGAIN}")
    return ConnectionError(f"The Hub does not do it ({status}: {said}). {_AGAIN}")
