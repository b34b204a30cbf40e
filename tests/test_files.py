"""Properties of file writing: whole or not at all, and an error that says what to do."""

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
