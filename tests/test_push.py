"""`regcache push` and `RegCacheQuantizer.push_to_hub`: one commit with everything, refusals before it, resumed after a cut."""
# pyright: reportPrivateUsage=false

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from models import DINOV2_BACKBONE, TOWERS, quantized
from optimum.commands.optimum_cli import main
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from optimum_regcache import RegCacheQuantizer
from optimum_regcache.hub.upload import push_folder

TINY = TOWERS["dinov2"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"
)  # huggingface_hub uploads large files so


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a result."""
    quantizer = RegCacheQuantizer(TINY.build(), BitImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False))
    quantizer.save(quantized(TINY), tmp_path_factory.mktemp("made") / "tiny", results={"fit": None})
    return tmp_path_factory.getbasetemp() / "made0" / "tiny"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub that takes files from 10 kB on as large ones; huggingface_hub waits for nothing before it tries again."""
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
    with HubServer(large=10_000) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_DISABLE_XET": True}
        settings |= {"HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "cache")}
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made once, for the address of then
        monkeypatch.setenv("HF_TOKEN", "dummy")
        yield server


def files(hub: HubServer, revision: str = "main", repo: str = "user/tiny") -> dict[str, bytes]:
    sha = hub.repos[repo].resolve(revision)
    assert sha is not None
    return hub.repos[repo].commits[sha]


def commits(hub: HubServer) -> int:
    return sum("/commit/" in request for request in hub.requests)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_everything_arrives_in_one_commit(hub: HubServer, folder: Path) -> None:
    (folder / "search").mkdir()
    (folder / "photo.jpg").touch()
    pushed = push_folder(folder, "user/tiny")
    assert (pushed.url, pushed.changed) == (f"{hub.url}/user/tiny", True)
    assert pushed.left_out == ["photo.jpg", "search"]
    assert commits(hub) == 1
    assert {*files(hub)} == {
        "config.json", "model.safetensors", "modeling_regcache.py", "preprocessor_config.json", "recipe.yaml", "results.json",
        "README.md",
    }  # fmt: skip
    assert files(hub)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = files(hub)["README.md"].decode()
    assert 'AutoModel.from_pretrained("user/tiny")\n' in card
    assert 'AutoModel.from_pretrained("user/tiny", trust_remote_code=True)' in card
    data: Any = ModelCard(card).data
    assert data.tags == ["optimum", "regcache", "w8a8"]


def test_a_second_push_changes_nothing_and_a_changed_card_is_all_that_goes(hub: HubServer, folder: Path) -> None:
    push_folder(folder, "user/tiny")
    assert not push_folder(folder, "user/tiny").changed
    assert commits(hub) == 1
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMore.\n")
    assert push_folder(folder, "user/tiny").changed
    assert commits(hub) == 2
    assert sum(request.startswith("PUT") for request in hub.requests) == 1
    assert files(hub)["README.md"].endswith(b"More.\n")


def test_an_upload_that_was_cut_off_is_resumed(hub: HubServer, folder: Path) -> None:
    hub.cut_after = 10_000
    with pytest.raises(ConnectionError, match=r"cannot be reached \(.*\)\. Run it again: what was uploaded is kept\."):
        push_folder(folder, "user/tiny")
    assert files(hub) == {}
    assert sum(request.startswith("CUT") for request in hub.requests) > 1  # huggingface_hub tries several times
    hub.cut_after = None
    hub.fail = ("POST /api/models/user/tiny/commit", 500)
    with pytest.raises(ConnectionError, match=r"The Hub does not do it \(500: the test says so\)\. Run it again"):
        push_folder(folder, "user/tiny")
    assert files(hub) == {}
    hub.fail, before = None, len(hub.requests)
    assert push_folder(folder, "user/tiny").changed
    assert not [request for request in hub.requests[before:] if request.startswith("PUT")]
    assert "model.safetensors" in files(hub)


def test_another_model_is_replaced_on_request_only_and_nothing_of_it_stays(hub: HubServer, folder: Path) -> None:
    push_folder(folder, "user/tiny")
    other = folder.parent / "other"
    quantizer = RegCacheQuantizer(TINY.build(seed=1))
    quantizer.save(quantized(TINY, 4), other)
    with pytest.raises(
        ValueError, match=r"user/tiny holds another model \(config\.json, model\.safetensors\)\. Use another"
    ):
        push_folder(other, "user/tiny")
    assert push_folder(other, "user/tiny", exist_ok=True).changed
    assert files(hub)["model.safetensors"] == (other / "model.safetensors").read_bytes()
    assert not {"preprocessor_config.json", "results.json"} & {*files(hub)}


def test_a_branch_and_a_pull_request_leave_main_alone(hub: HubServer, folder: Path) -> None:
    hub.repos.clear()
    push_folder(folder, "user/tiny")
    other = folder.parent / "other"
    RegCacheQuantizer(TINY.build()).save(quantized(TINY, 4), other)
    branch = push_folder(other, "user/tiny", revision="w4a4")
    assert branch.url == f"{hub.url}/user/tiny/tree/w4a4"
    assert b'from_pretrained("user/tiny", revision="w4a4")' in files(hub, "w4a4")["README.md"]
    asked = push_folder(other, "user/tiny", create_pr=True)
    assert (asked.revision, asked.url) == ("refs/pr/1", f"{hub.url}/user/tiny/discussions/1")
    weights = (other / "model.safetensors").read_bytes()
    assert files(hub, "w4a4")["model.safetensors"] == files(hub, "refs/pr/1")["model.safetensors"] == weights
    assert files(hub)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"A pull request goes to main: give a revision \(--revision\) or create_pr"):
        push_folder(other, "user/tiny", revision="w4a4", create_pr=True)
    with pytest.raises(FileNotFoundError, match=r"user/none does not exist, or this token may not see it \(404\)"):
        push_folder(other, "user/none", create_pr=True)


@pytest.mark.parametrize("revision", [None, "w8a8"])
def test_what_was_pushed_opens_with_the_same_output_and_offline(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    pushed = push_folder(folder, "user/tiny", revision=revision)
    for _ in range(2):
        model: Any = hf.AutoModel.from_pretrained("user/tiny", revision=pushed.revision or "main", cache_dir=tmp_path)
        assert torch.equal(TINY.run(model), TINY.run(quantized(TINY)))
        before = len(hub.requests)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(hub.requests) == before


def test_a_backbone_opens_with_remote_code(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = quantized(DINOV2_BACKBONE)
    RegCacheQuantizer(DINOV2_BACKBONE.build()).push_to_hub("user/backbone", model)
    opened: Any = hf.AutoBackbone.from_pretrained("user/backbone", trust_remote_code=True, cache_dir=tmp_path)
    assert type(opened).__module__.endswith(".modeling_regcache")
    inputs = DINOV2_BACKBONE.inputs()
    with torch.no_grad():
        assert torch.equal(opened(**inputs).feature_maps[-1], model(**inputs).feature_maps[-1])


def test_private_is_private(hub: HubServer, folder: Path) -> None:
    push_folder(folder, "user/tiny", private=True)
    assert hub.repos["user/tiny"].private
    push_folder(folder, "user/open")
    with pytest.raises(ValueError, match=r"user/open exists and is public\. Change that in its settings on the Hub"):
        push_folder(folder, "user/open", private=True)
    with pytest.raises(ValueError, match=r"user/tiny exists and is private\."):
        push_folder(folder, "user/tiny", private=False)


def test_the_hub_refuses(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.rights = {"reader": "read", "writer": "write"}
    with pytest.raises(PermissionError, match=r"The Hub knows no token that may see user/tiny \(401\)\. Log in with"):
        push_folder(folder, "user/tiny")
    with pytest.raises(
        PermissionError, match=r"may not write to user/tiny \(403: this token may only read\)\. Take a token"
    ):
        push_folder(folder, "user/tiny", token="reader")
    push_folder(folder, "user/tiny", token="writer")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMore.\n")
    hub.repos["user/tiny"].gated = True
    with pytest.raises(
        PermissionError, match=r"user/tiny is gated: ask for access on http.*/user/tiny, and push again"
    ):
        push_folder(folder, "user/tiny", token="writer")
    hub.repos["user/tiny"].gated = False
    hub.fail = ("POST /api/models/user/tiny/commit", 412)
    with pytest.raises(OSError, match=r"user/tiny was changed by somebody else meanwhile \(412\)\. Run it again"):
        push_folder(folder, "user/tiny", token="writer")
    hub.fail = None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"HF_HUB_OFFLINE is set, so nothing can be pushed\. Unset it"):
        push_folder(folder, "user/tiny", token="writer")


def test_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        ConnectionError, match=r"The Hub \(http://127\.0\.0\.1:9\) cannot be reached \(.*\)\. Run it again"
    ):
        push_folder(folder, "user/tiny", token="dummy")


def test_what_is_not_finished_is_refused_before_anything_is_sent(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    def refused(message: str, error: type[Exception] = ValueError, name: str = "user/tiny", **options: Any) -> None:
        with pytest.raises(error, match=message):
            push_folder(folder, name, **options)
        assert not hub.requests

    refused(r"'tiny' is no name on the Hub; give user/name", name="tiny")
    with pytest.raises(FileNotFoundError, match=r"There is no directory .*none"):
        push_folder(tmp_path / "none", "user/tiny")
    edit(folder / "results.json", fit={"search": {"unfinished": True}})
    refused(r"The search behind .*tiny was interrupted\. Let the same command finish it with --overwrite")
    edit(folder / "results.json", fit=None, seen="/home/me/photos")
    refused(r"tells paths of this machine \(\['results\.json: /home/me/photos'\]\)\. Take them out")
    edit(folder / "results.json", seen=None)
    config = json.loads((folder / "config.json").read_text())
    edit(
        folder / "config.json",
        quantization_config={**config["quantization_config"], "deletion": {"block": 2, "count": 1}},
    )
    refused(r"The checkpoint was changed after it was saved: deletion\.count was 2, is 1")
    edit(folder / "config.json", quantization_config=None)
    refused(r"holds no model that optimum-regcache quantized\. Quantize it first")
    edit(folder / "config.json", **config)
    (folder / "recipe.yaml").unlink()
    refused(r"lacks recipe\.yaml: save_pretrained alone does not write them\. Save the model with")
    (folder / "model.safetensors").unlink()
    (folder / "recipe.yaml").touch()
    refused(r"The weights in .*tiny carry no fingerprint")


def test_an_interrupted_search_is_published_on_request(hub: HubServer, folder: Path) -> None:
    edit(folder / "results.json", fit={"search": {"unfinished": True}})
    assert push_folder(folder, "user/tiny", unfinished=True).changed


def test_the_quantizer_pushes_a_model_in_memory_and_a_folder(hub: HubServer, folder: Path) -> None:
    quantizer = RegCacheQuantizer(TINY.build(), BitImageProcessorPil(size={"shortest_edge": 32}))
    assert quantizer.push_to_hub("user/tiny", quantized(TINY), commit_message="First") == f"{hub.url}/user/tiny"
    assert {"README.md", "recipe.yaml", "preprocessor_config.json", "modeling_regcache.py"} <= {*files(hub)}
    assert "# tiny\n" in files(hub)["README.md"].decode()
    assert quantizer.push_to_hub("user/other", folder) == f"{hub.url}/user/other"


def test_push_to_hub_of_transformers_warns(hub: HubServer, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = quantized(TINY)
    with caplog.at_level("WARNING"):
        model.save_pretrained(tmp_path / "saved")
        assert "push_to_hub" not in caplog.text
        model.push_to_hub("user/bare")
    assert "push_to_hub of transformers uploads weights only" in caplog.text
    assert {*files(hub, repo="user/bare")} == {"config.json", "model.safetensors", "README.md"}
    data: Any = ModelCard(files(hub, repo="user/bare")["README.md"].decode()).data
    assert data.tags == ["optimum", "regcache"]


def test_the_command_line(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "regcache", "push", str(folder), "user/tiny", *options])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert run("--revision", "try") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{hub.url}/user/tiny/tree/try",
        "",
        "import optimum_regcache",
        "from transformers import AutoModel",
        'model = AutoModel.from_pretrained("user/tiny", revision="try")',
    ]
    assert run("--revision", "try") == 0
    assert "(nothing has changed)" in capsys.readouterr().out
    hub.rights = {}
    assert run("--token", "secret") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: The Hub knows no token that may see user/tiny (401).")
    assert "secret" not in error
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert run() == 4
    assert "cannot be reached" in capsys.readouterr().err


@pytest.mark.slow
def test_push_and_pull_in_one_command() -> None:
    script = Path(__file__).parent.parent / "scripts" / "push_pull.py"
    result = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the outputs are equal") == 5
