"""A file is written whole or not at all."""

from __future__ import annotations

import pytest

from leaveout.files import replacing


def test_a_file_is_replaced_once_it_is_whole(tmp_path):
    path = tmp_path / "scores.csv"
    with replacing(path) as part:
        part.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("tw")
        raise KeyboardInterrupt
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    (tmp_path / "scores.csv.tmp").write_text("by half")
    with replacing(tmp_path / "scores.csv") as part, part.open("x") as file:
        file.write("whole")
    assert (tmp_path / "scores.csv").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1
