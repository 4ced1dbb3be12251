from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from groupify.errors import ArtefactError, GroupifyWarning
from groupify.files import RECIPE_FILE, folder_exists, writing_folder


def make_output(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / RECIPE_FILE).write_text('{"format": "groupify"}')
    (folder / "old").write_text("old")


def names(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir())


def test_the_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with writing_folder(target) as folder:
        assert folder.parent == tmp_path
        assert folder != target
        (folder / "file").write_text("content")
        assert not target.exists()
    assert (target / "file").read_text() == "content"
    assert names(tmp_path) == ["out"]


def test_the_folder_has_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    with writing_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("force", [False, True])
def test_failure_and_interrupt_leave_nothing(tmp_path: Path, error: type[BaseException], force: bool) -> None:
    if force:
        make_output(tmp_path / "out")

    def write_half() -> None:
        with writing_folder(tmp_path / "out", force) as folder:
            (folder / "half").write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert names(tmp_path) == (["out"] if force else [])
    if force:
        assert names(tmp_path / "out") == ["old", RECIPE_FILE]


def test_missing_parents_are_made_and_removed_on_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writing_folder(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert names(tmp_path) == []
    with writing_folder(tmp_path / "a" / "b" / "out"):
        pass
    assert (tmp_path / "a" / "b" / "out").is_dir()


@pytest.mark.parametrize("content", ["output", "empty", "foreign"])
def test_an_existing_folder_needs_force(tmp_path: Path, content: str) -> None:
    target = tmp_path / "out"
    if content == "output":
        make_output(target)
    else:
        target.mkdir()
    if content == "foreign":
        (target / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtefactError, match="--force"), writing_folder(target):
        pytest.fail("refused too late")
    assert names(tmp_path) == ["out"]


def test_force_replaces_an_output_at_the_end_only(tmp_path: Path) -> None:
    target = tmp_path / "out"
    make_output(target)
    with writing_folder(target, force=True) as folder:
        (folder / "new").write_text("new")
        assert (target / "old").read_text() == "old"
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


def test_force_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with writing_folder(tmp_path / "out", force=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path / "out") == ["new"]


@pytest.mark.parametrize(
    "kind", ["foreign", "foreign recipe", "with folders", "home", "empty home", "broken recipe"]
)
def test_force_never_takes_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    target = tmp_path / "out"
    make_output(target)
    if kind == "foreign":
        (target / RECIPE_FILE).unlink()
    elif kind == "foreign recipe":
        (target / RECIPE_FILE).write_text('{"name": "goulash"}')
    elif kind == "broken recipe":
        (target / RECIPE_FILE).write_text("[" * 100_000)
    elif kind == "with folders":
        (target / ".git").mkdir()
    else:
        monkeypatch.setenv("HOME", str(target))
        if kind == "empty home":
            for child in target.iterdir():
                child.unlink()
    before = names(target)
    with pytest.raises(ArtefactError, match="does not replace"), writing_folder(target, force=True):
        pytest.fail("refused too late")
    assert names(target) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").write_text("content")
    with pytest.raises(ArtefactError, match="is a file"), writing_folder(tmp_path / "out", force):
        pytest.fail("refused too late")
    assert (tmp_path / "out").read_text() == "content"


def test_a_link_to_an_output_replaces_the_output(tmp_path: Path) -> None:
    make_output(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with writing_folder(tmp_path / "link", force=True) as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["new"]


def test_unusable_places_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError), writing_folder(tmp_path / "file" / "out"):
        pytest.fail("refused too late")
    with pytest.raises(ArtefactError, match="no usable folder name"), writing_folder("a\0b"):
        pytest.fail("refused too late")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ArtefactError), writing_folder(tmp_path / "loop" / "out"):
        pytest.fail("refused too late")

    def denied(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(ArtefactError, match="Permission denied"), writing_folder(tmp_path / "out"):
        pytest.fail("refused too late")


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="--force"), writing_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert names(tmp_path) == ["out"]


def test_a_folder_that_vanishes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="cannot write"), writing_folder(tmp_path / "out") as folder:
        folder.rmdir()
    assert names(tmp_path) == []


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="No space left"), writing_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_a_failed_replacement_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    make_output(target)
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ArtefactError, match="Input/output"), writing_folder(target, force=True):
        pass
    assert names(tmp_path) == ["out"]
    assert names(target) == ["old", RECIPE_FILE]


def set_aside(target: Path, digits: str = "0123abcd") -> Path:
    """Leave what a process leaves that is killed between the two renames of a replacement."""
    make_output(target)
    return target.rename(target.with_name(f".{target.name}.{digits}.old"))


def test_what_a_killed_process_set_aside_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "out"
    older = set_aside(target, "ffffffff")
    os.utime(older, (1, 1))
    set_aside(target)
    with pytest.warns(GroupifyWarning, match="killed while it replaced .*out; what was there before is back"):
        assert folder_exists(target)
    assert names(target) == ["old", RECIPE_FILE]
    assert folder_exists(target)
    # The next replacement takes away what is left over.
    with writing_folder(target, force=True) as folder:
        (folder / "new").touch()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


WRITER = """
import pathlib, sys, time
from groupify.files import writing_folder
with writing_folder(sys.argv[1]) as folder:
    (folder / "weights").touch()
    pathlib.Path(sys.argv[2]).touch()
    time.sleep(600)
"""


def test_what_a_killed_process_was_writing_goes_with_the_next_one(tmp_path: Path) -> None:
    outputs, ready = tmp_path / "outputs", tmp_path / "ready"
    outputs.mkdir()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(outputs / "out"), str(ready)])
    while not ready.exists():
        assert writer.poll() is None
        time.sleep(0.02)
    [unfinished, lock] = names(outputs)
    with writing_folder(outputs / "out") as folder:  # beside one that is alive
        assert unfinished in names(outputs)
        assert folder.name != unfinished
    assert names(outputs) == [unfinished, lock, "out"]
    writer.kill()
    writer.wait()
    with writing_folder(outputs / "out", force=True):
        assert not {unfinished, lock} & set(names(outputs))
    assert names(outputs) == ["out"]
    assert names(outputs / "out") == []


def test_only_folders_that_nobody_writes_are_removed(tmp_path: Path) -> None:
    kept = [".out.0123.partial", ".other.0123abcd.partial"]
    for name in [*kept, ".out.0123abcd.partial"]:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.00000000.partial").write_text("a file")
    (tmp_path / ".out.11111111.partial.lock").touch()
    with writing_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted([*kept, ".out.00000000.partial", "out"])


def test_what_a_killed_process_set_aside_is_not_overwritten_without_force(tmp_path: Path) -> None:
    set_aside(tmp_path / "out")
    with (
        pytest.warns(GroupifyWarning, match="is back"),
        pytest.raises(ArtefactError, match="--force"),
        writing_folder(tmp_path / "out"),
    ):
        pytest.fail("refused too late")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", [".out.0123.old", ".other.0123abcd.old", ".out.0123abcd.partial", "link"])
def test_nothing_else_is_taken_for_set_aside(tmp_path: Path, name: str) -> None:
    aside = set_aside(tmp_path / "out")
    if name == "link":
        aside.rename(tmp_path / "elsewhere")
        aside.symlink_to(tmp_path / "elsewhere")
    else:
        aside.rename(tmp_path / name)
    assert not folder_exists(tmp_path / "out")
    assert not folder_exists(tmp_path / "missing" / "out")
    assert not folder_exists("a\0b")


def test_what_cannot_be_put_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_aside(tmp_path / "out")

    def denied(self: Path, to: Path) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "rename", denied)
    with pytest.raises(ArtefactError, match=r"as \.out\.0123abcd\.old, .*: Read-only file system"):
        folder_exists(tmp_path / "out")


def test_a_reader_in_the_middle_of_a_replacement_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    make_output(target)
    rename = Path.rename
    seen: list[Path] = []

    def interrupted(self: Path, to: Path) -> Path:
        moved = rename(self, to)
        if moved.suffix == ".old" and not seen:
            seen.append(moved)
            assert folder_exists(target)
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.warns(GroupifyWarning, match="is back"), writing_folder(target, force=True) as folder:
        (folder / "new").touch()
    assert seen
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]
