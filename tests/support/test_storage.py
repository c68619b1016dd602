"""The old file or the new one is there, whole, whatever happens in between."""

import errno
import os

import pytest

from lightning_easier.support.storage import check_writable, clean_up, replacing, temporary


def fill(path, text, is_folder):
    if is_folder:
        path.mkdir()
        path = path / "part"
    path.write_text(text)


def text_of(path):
    return (path / "part" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("now", [True, False], ids=["a folder", "a file"])
@pytest.mark.parametrize("before", [True, False], ids=["for a folder", "for a file"])
def test_the_new_takes_the_place_of_the_old(tmp_path, before, now):
    path = tmp_path / "sub" / "it"
    path.parent.mkdir()
    fill(path, "old", before)
    with replacing(path) as new:
        assert text_of(path) == "old"
        assert new.parent == path.parent
        fill(new, "new", now)
    assert path.is_dir() == now
    assert text_of(path) == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("is_folder", "fails_at"), [  # a file is replaced in one step
    (True, "write"), (True, 0), (True, 1), (False, "write"), (False, 0)
])  # fmt: skip
def test_what_fails_leaves_the_old(tmp_path, monkeypatch, is_folder, fails_at):
    path, replace, calls = tmp_path / "it", os.replace, iter(range(9))
    fill(path, "old", is_folder)

    def fail(*args):
        if next(calls) == fails_at:
            raise OSError(errno.EROFS, "Read-only file system")
        replace(*args)

    def write():
        with replacing(path, "Do so.") as new:
            fill(new, "new", is_folder)
            if fails_at == "write":
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=f"{path} could not be written, and is as it was before: .*Do so") as caught:
        write()
    assert caught.value.errno == (errno.ENOSPC if fails_at == "write" else errno.EROFS)
    assert text_of(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "it"
    with pytest.raises(OSError, match=f"{path} could not be written"), replacing(path) as new:
        new.write_text("new")


def test_what_is_written_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    with replacing(tmp_path / "it") as new:
        new.write_text("new")
    assert events == ["fsync", "replace", "fsync"]


def test_what_a_killed_process_has_left_is_removed_or_comes_back(tmp_path):
    for name, text in (("a", "kept"), (".a.old", "replaced"), (".b.old", "put aside"), (".c.part", "cut")):
        (tmp_path / name).write_text(text)
    fill(temporary(tmp_path / "d"), "cut", is_folder=True)
    (tmp_path / ".other").write_text("of somebody else")
    clean_up(tmp_path, lambda name: name in "abcd")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a": "kept", "b": "put aside", ".other": "of somebody else"
    }  # fmt: skip


def test_what_others_have_left_stays(tmp_path):
    for name in ("env", ".env.old", ".notes.part", ".bashrc.old", "a.part", ".a", ".a.part.part", ".aa.old", ".old"):
        (tmp_path / name).write_text(name)
    clean_up(tmp_path, lambda name: name == "a")
    assert {path.name for path in tmp_path.iterdir()} == {
        "env", ".env.old", ".notes.part", ".bashrc.old", "a.part", ".a", ".a.part.part", ".aa.old", ".old"
    }  # fmt: skip


def test_what_can_not_be_written_is_told_before_and_nothing_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    check_writable("output", tmp_path / "file")
    check_writable("output", tmp_path / "new" / "folder" / "file")
    with pytest.raises(ValueError, match="Expected argument `output` to be a file, but .* is a folder"):
        check_writable("output", tmp_path)
    for path in (tmp_path / "file" / "it", tmp_path / "file" / "folder" / "it"):
        with pytest.raises(NotADirectoryError, match=rf"Expected argument `output` .*{tmp_path}/file is a file: "):
            check_writable("output", path)
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path)
    with pytest.raises(PermissionError, match=rf"Expected argument `output` .*{tmp_path} may not be written to: "):
        check_writable("output", tmp_path / "new" / "it")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
