"""Properties of file writing: whole or not at all, and an error that says what to do."""

import os
import socket
import subprocess
import sys

import pytest

from fot import files
from fot.errors import UserError


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "file"

    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write(path, half, "")
    assert list(path.parent.iterdir()) == []
    files.write(path, lambda file: file.write(b"whole"), "")
    with pytest.raises(KeyboardInterrupt):
        files.write(path, half, "")
    assert [(p.name, p.read_bytes()) for p in path.parent.iterdir()] == [("file", b"whole")]


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="file/x .*: choose another") as caught:
        files.write(tmp_path / "file" / "x", lambda file: None, "choose another")
    assert "\n" not in str(caught.value)


def test_a_new_folder_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "folder"
    with pytest.raises(KeyboardInterrupt), files.new_folder(path, "") as folder:
        (folder / "half").write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    with files.new_folder(path, "") as folder:
        (folder / "file").write_bytes(b"whole")
        assert not path.exists()
    with files.new_folder(path, "") as folder:  # who comes second is dropped
        (folder / "file").write_bytes(b"second")
    assert [p.name for p in path.parent.iterdir()] == ["folder"]
    assert [(p.name, p.read_bytes()) for p in path.iterdir()] == [("file", b"whole")]


def test_a_new_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file" / "x", tmp_path / "file"):
        with pytest.raises(UserError, match=f"{path} .*: choose another"), files.new_folder(path, "choose another"):
            pass


def test_leftovers_of_killed_writes_are_swept_out_and_nothing_else(tmp_path):
    names = ["file", "file.bak", "file2.x.tmp", "other.x.tmp"]
    for name in [*names, "file.x.tmp", "file.y.tmp"]:
        (tmp_path / name).write_text("")
    files.sweep(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_folder_is_held_by_one_and_free_again_after_the_block(tmp_path):
    with files.hold(tmp_path / "run"):
        with pytest.raises(
            UserError, match=f"in use by process {os.getpid()} on host {socket.gethostname()}: "
        ) as error:
            with files.hold(tmp_path / "run"):
                raise AssertionError
        assert "\n" not in str(error.value)
    with files.hold(tmp_path / "run"):
        pass


def test_a_killed_holder_leaves_the_folder_free(tmp_path):
    code = "import pathlib, sys; from fot import files\n"
    code += "with files.hold(pathlib.Path(sys.argv[1])):\n    print(flush=True)\n    input()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) as holder:
        holder.stdout.readline()
        with pytest.raises(UserError, match=f"in use by process {holder.pid} "), files.hold(tmp_path):
            raise AssertionError
        holder.kill()
        holder.wait()
        with files.hold(tmp_path):
            assert f"process {os.getpid()} " in (tmp_path / files.LOCK).read_text()


def test_a_folder_that_cannot_be_held_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="file/run.lock .*: choose another"), files.hold(tmp_path / "file"):
        raise AssertionError
