"""vitpyramid.files: a file is there whole or not at all."""

import pytest

from vitpyramid import files


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_atomically(path, "häuser\n")
    assert path.read_bytes() == "häuser\n".encode()
    files.write_atomically(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it

    def stopped(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("os.replace", stopped)
        files.write_atomically(path, "half")
    assert path.read_bytes() == b"\x00\xff" and len(list(tmp_path.iterdir())) == 2


def test_a_relative_path_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.write_atomically("here", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
