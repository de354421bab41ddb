"""Build the archive and the wheel from what git knows, check them, and quantize with the installed wheel outside the checkout.

    make dist                                                   # makes .venv-dist for the tools, writes dist/
    python scripts/check_distribution.py --environment .venv --output dist

The archive holds all tracked files but those of ``LEFT_OUT``; a wheel built from it equals one built from the checkout; neither
names a path of a machine. The wheel is installed without its requirements: those of ``--environment`` are linked to.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {".gitignore"}  # says what a checkout makes; an archive makes nothing
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|[^/]+\.egg-info/.+")
MACHINE = re.compile(rb"/(?:root|work|home|tmp|Users)/[\w.-]+")
INVENTED = ("tests/",)  # whose paths are examples
QUICK = [
    "--model",
    "planted-outlier",
    "--preset",
    "w8a8",
    "--num-samples",
    "48",
    "--num-report",
    "32",
    "--no-recommend",
]
SEARCH = ["--set", "search.num_copies=[1,15]", "--set", "search.max_delete=1", "--set", "search.blocks_before=1"]
OPEN = "import optimum_regcache; from transformers import AutoModel; AutoModel.from_pretrained('out'); "
WHERE = "print(optimum_regcache.__file__)"


def run(*command: object, cwd: Path, **variables: str) -> str:
    """Output of a command.

    Raises:
        RuntimeError: it failed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**environment, **variables}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def tracked(root: Path) -> set[str]:
    """Files that git knows or would add."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=root).splitlines()
    return {name for name in listed if (root / name).is_file()}


def build(source: Path, output: Path, *kinds: str) -> None:
    """``kinds``: none for an archive and a wheel made from it."""
    run(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", output, ".", cwd=source)


def archive_files(archive: Path) -> dict[str, bytes]:
    """Name below the folder of the archive -> content."""
    with tarfile.open(archive) as opened:
        members = [member for member in opened if member.isfile()]
        return {m.name.partition("/")[2]: opened.extractfile(m).read() for m in members}  # pyright: ignore[reportOptionalMemberAccess]


def wheel_files(wheel: Path) -> dict[str, bytes]:
    """Name -> content."""
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def problems(files: set[str], archive: dict[str, bytes], wheel: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """What is wrong; ``files``: those under version control, ``other``: the wheel that was built from them."""
    found = [f"not in the archive: {name} (MANIFEST.in)" for name in sorted(files - LEFT_OUT - archive.keys())]
    extra = sorted(name for name in archive.keys() - files if not GENERATED.fullmatch(name))
    found += [f"in the archive, and not under version control: {name}" for name in extra]
    names = sorted(wheel.keys() | other.keys())
    found += [f"differs between the two wheels: {name}" for name in names if wheel.get(name) != other.get(name)]
    packaged = {name for name in files if name.startswith("optimum_regcache/") and "/commands/cli/" not in name}
    found += [f"not in the wheel: {name} (setup.cfg)" for name in sorted(packaged - wheel.keys())]
    for where, contents in (("archive", archive), ("wheel", wheel)):
        for name, content in contents.items():
            path = None if name.startswith(INVENTED) else MACHINE.search(content)
            if path:
                found.append(f"a path of a machine in the {where}: {name}: {path[0].decode()}")
    return found


def install(wheel: Path, folder: Path, environment: Path) -> Path:
    """The wheel in a new environment whose other packages are links to those of ``environment``; its folder of programs."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (mine,) = folder.glob("lib/python*/site-packages")
    theirs = environment.resolve() / mine.relative_to(folder)
    if not theirs.is_dir():
        raise ValueError(f"{environment} has no {mine.relative_to(folder)}. Give an environment of the same Python.")
    for path in theirs.iterdir():
        if "optimum_regcache" in path.name:
            continue
        if path.name == "optimum":  # the wheel adds files to it
            shutil.copytree(path, mine / path.name, ignore=shutil.ignore_patterns("*regcache*", "__pycache__"))
        else:
            (mine / path.name).symlink_to(path)
    python = folder / "bin" / "python"
    options = ("--quiet", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    text = "import sys; from optimum.commands.optimum_cli import main; sys.exit(main())\n"
    (folder / "bin" / "optimum-cli").write_text(f"#!{python}\n{text}", encoding="utf-8")
    (folder / "bin" / "optimum-cli").chmod(0o755)
    return folder / "bin"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv", help="where the requirements are installed")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of archive and wheel")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source, files = folder / "source", tracked(ROOT)
        for name in files:  # a copy: what an earlier build left in the checkout would get into the wheel
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
        build(source, folder / "made")
        build(source, folder / "direct", "--wheel")
        (archive,), (wheel,) = folder.glob("made/*.tar.gz"), folder.glob("made/*.whl")
        (direct,) = folder.glob("direct/*.whl")
        found = problems(files, archive_files(archive), wheel_files(wheel), wheel_files(direct))
        if found:
            sys.exit("\n".join(found))
        run(sys.executable, "-m", "twine", "check", "--strict", archive, wheel, cwd=folder)
        programs, empty = install(wheel, folder / "installed", arguments.environment), folder / "empty"
        empty.mkdir()
        offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        run(programs / "optimum-cli", "regcache", "quantize", *QUICK, *SEARCH, "--output", "out", cwd=empty, **offline)
        where = run(programs / "python", "-c", OPEN + WHERE, cwd=empty, **offline).strip()
        if not where.startswith(str(folder)):
            sys.exit(f"The installed package was not the one that ran: {where}")
        arguments.output.mkdir(parents=True, exist_ok=True)
        for path in (archive, wheel):
            shutil.copy2(path, arguments.output / path.name)
            print(f"{arguments.output / path.name}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
