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
