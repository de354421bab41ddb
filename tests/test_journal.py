"""The journal of a fit: nothing finished is lost, nothing damaged is believed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from optimum_regcache.search.journal import Journal

STEPS = {"a": [0.1, 0.2], "b": [math.inf], "c": [1 / 3, -5e-324, float.fromhex("0x1.fffffep+127")]}


def written(folder: Path) -> bytes:
    journal = Journal(folder, "abc")
    for name, values in STEPS.items():
        journal.put(name, values)
    journal.close()
    return (folder / "abc.jsonl").read_bytes()


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    written(tmp_path)
    again = Journal(tmp_path, "abc")
    assert {name: again.get(name) for name in STEPS} == STEPS
    assert len(again) == 3
    assert again.get("d") is None
    again.close()


def test_whatever_a_kill_leaves_of_the_last_line_is_dropped(tmp_path: Path) -> None:
    content = written(tmp_path)
    path = tmp_path / "abc.jsonl"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        journal = Journal(tmp_path, "abc")
        complete = content[:length].count(b"\n")
        assert len(journal) == complete
        for name, values in list(STEPS.items())[complete:]:  # the work goes on
            journal.put(name, values)
        journal.close()
        assert path.read_bytes() == content


def test_a_changed_character_is_noticed(tmp_path: Path) -> None:
    content = written(tmp_path)
    path = tmp_path / "abc.jsonl"
    for position in range(len(content) - 1):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(bytes(changed))
        number = content[:position].count(b"\n") + 1
        if b"\n" in (content[position : position + 1], bytes(changed[position : position + 1])):
            number = None  # other lines than before
        with pytest.raises(
            ValueError, match=rf"^Line {number or '[0-9]'} of .*abc\.jsonl is damaged\. Delete the file"
        ):
            Journal(tmp_path, "abc")


def test_one_process_writes(tmp_path: Path) -> None:
    first = Journal(tmp_path, "abc")
    with pytest.raises(ValueError, match=r"Another process is fitting with .*abc\.jsonl\. Wait for it"):
        Journal(tmp_path, "abc")
    Journal(tmp_path, "def").close()  # of another fit
    first.close()
    Journal(tmp_path, "abc").close()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / "abc.jsonl").symlink_to(target)
    with pytest.raises(ValueError, match=r"abc\.jsonl is a link; .* Remove the link"):
        Journal(tmp_path, "abc")
    assert target.read_text() == "mine"


def test_without_a_folder_it_lives_in_memory() -> None:
    journal = Journal(None, "")
    journal.put("a", [1.0])
    assert journal.get("a") == [1.0]
    journal.close()
