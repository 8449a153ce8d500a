"""The name under which a process holds leases."""

from pathlib import Path

import pytest

from forebay.errors import SetupError
from forebay.jobs.node import Node


def test_a_name_comes_back_to_the_next_bearer_and_to_nobody_else(tmp_path: Path) -> None:
    first, second = Node.claim(tmp_path), Node.claim(tmp_path)
    assert first.name != second.name
    name = first.name
    first.release()
    assert Node.claim(tmp_path).name == name


def test_two_folders_have_no_name_in_common(tmp_path: Path) -> None:
    assert Node.claim(tmp_path / "a").name != Node.claim(tmp_path / "b").name


def test_a_name_that_was_cut_off_by_a_crash_is_made_again(tmp_path: Path) -> None:
    node = Node.claim(tmp_path)
    node.release()
    (tmp_path / "nodes" / "0.name").write_text("")
    assert Node.claim(tmp_path).name.startswith("node_")


def test_a_folder_that_is_none_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("not a folder")
    with pytest.raises(SetupError, match="FOREBAY_DATA_DIR"):
        Node.claim(tmp_path)
