"""What groupify keeps on disk: files and folders that appear whole or not at all, caches, weights."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from groupify.errors import ArtefactError, GroupifyWarning
from groupify.strict_json import is_finite, parse

if TYPE_CHECKING:
    from torch import Tensor

# Torch is imported inside the functions: the command line looks for folders before it needs models.

RECIPE_FILE = "recipe.json"
MAX_RECIPE_BYTES = 16 * 2**20
# Another process that finds a folder set aside puts it back, at the worst just while it is being replaced.
_ATTEMPTS = 3


def write_aside(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, then rename it; missing parents are made, nothing half-written stays.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def writing_folder(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Yield a new empty folder beside ``path``, which becomes ``path`` when the block succeeds.

    When the block fails or is interrupted (``KeyboardInterrupt`` included), the folder is removed,
    and what was at ``path`` before is as it was; after a kill the next ``folder_exists`` or
    ``writing_folder`` sees to that, and the next ``writing_folder`` removes what the killed process had
    written. Everything that can be refused is refused before the block runs.

    Args:
        path: the folder to write; missing parents are made.
        force: replace an existing folder, at the end, provided that it is empty or an earlier
            output of groupify. Anything else is refused: ``-o ~`` must not cost a home folder.

    Raises:
        ArtefactError: ``path`` exists and may not be replaced, or cannot be written.
    """
    try:
        target = Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtefactError(f"{str(path)!r} is no usable folder name: {error}") from error
    folder_exists(target)
    _check_target(target, force)
    # Not tempfile.mkdtemp: the folder keeps its mode, which should follow the umask.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    made: list[Path] = []
    try:
        _make_folders(target.parent, made)
        _remove_unfinished(target)
        with _being_written(temporary):
            _make_folders(temporary, made)
            yield temporary
            _check_target(target, force)
            _replace(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise ArtefactError(
                f"cannot write {target}: {error.strerror}; free some space or choose another folder with -o"
            ) from error
        raise


def folder_exists(path: str | Path) -> bool:
    """Whether there is a folder at ``path``.

    A process that was killed while it replaced the folder may have left it aside: it is put back first.

    Raises:
        ArtefactError: it cannot be put back.

    Warns:
        GroupifyWarning: it was put back.
    """
    try:
        target = Path(path).resolve()
        if os.path.lexists(target):
            return target.is_dir()
        aside = max(_set_aside(target), key=lambda folder: folder.stat().st_mtime, default=None)
    except (OSError, RuntimeError, ValueError):  # a name that cannot be, or a parent that cannot be read
        return False
    if aside is None:
        return False
    try:
        aside.rename(target)
    except OSError as error:
        if target.is_dir():  # another process was faster
            return True
        raise ArtefactError(
            f"a killed process left {target} as {aside.name}, and it cannot be renamed back: {error.strerror}"
        ) from error
    warnings.warn(
        f"a process was killed while it replaced {target}; what was there before is back",
        GroupifyWarning,
        stacklevel=2,
    )
    return True


def _set_aside(target: Path) -> list[Path]:
    """Return the folders that stood at ``target`` and are about to be replaced, or were left so."""
    own = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.old")
    return [
        child
        for child in (target.parent.iterdir() if target.parent.is_dir() else ())
        if own.fullmatch(child.name) and not child.is_symlink() and child.is_dir() and _is_output(child)
    ]


@contextlib.contextmanager
def _being_written(folder: Path) -> Iterator[None]:
    """Hold a lock beside a folder, by which others tell it from what a killed process has left.

    Raises:
        ArtefactError: another process holds it, or it cannot be written.
    """
    from filelock import FileLock

    path = folder.with_name(f"{folder.name}.lock")
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except OSError as error:  # a timeout is one
        raise _cannot_write_beside(path, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        lock.release()
        path.unlink(missing_ok=True)


def _remove_unfinished(target: Path) -> None:
    """Remove what killed processes have left beside ``target``, as far as that can be done."""
    own = re.compile(rf"(\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.partial)(\.lock)?")
    children = target.parent.iterdir() if target.parent.is_dir() else ()
    found = {match[1] for child in children if (match := own.fullmatch(child.name))}
    for folder in (target.with_name(name) for name in found):
        with contextlib.suppress(OSError, ArtefactError), _being_written(folder):
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Make ``folder`` and its parents; those that were missing are appended to ``made``."""
    try:
        for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            missing.mkdir()
            made.append(missing)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as error:
        raise _cannot_write_beside(folder, error) from error


def _cannot_write_beside(path: Path, error: OSError) -> ArtefactError:
    return ArtefactError(
        f"cannot write to {path.parent}: {error.strerror}; choose another output folder with -o"
    )


def _check_target(target: Path, force: bool) -> None:
    try:
        if not os.path.lexists(target):
            return
        if not target.is_dir():
            raise ArtefactError(f"{target} is a file; expected a folder to write: choose another with -o")
        if not force:
            raise ArtefactError(
                f"the folder {target} exists; pass --force to replace it, or choose another with -o"
            )
        if target == Path.home() or not (_is_empty(target) or _is_output(target)):
            raise ArtefactError(
                f"{target} is neither empty nor written by groupify, so --force does not replace it: "
                "choose another folder with -o"
            )
    except OSError as error:
        raise ArtefactError(f"cannot look into {target}: {error.strerror}") from error


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


def _is_output(folder: Path) -> bool:
    """Whether groupify wrote the folder: it holds a recipe, and no folders (groupify makes none)."""
    recipe = folder / RECIPE_FILE
    if recipe.is_symlink() or not recipe.is_file() or recipe.stat().st_size > MAX_RECIPE_BYTES:
        return False
    if any(child.is_dir() for child in folder.iterdir()):
        return False
    try:
        document = json.loads(recipe.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("format") == "groupify"


def _replace(temporary: Path, target: Path) -> None:
    """Rename ``temporary`` to ``target``; what was there is removed last, or put back."""
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    moved = False
    try:
        for attempt in range(_ATTEMPTS):
            if target.exists():
                target.rename(old)
                moved = True
            try:
                temporary.rename(target)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == _ATTEMPTS - 1:
                    raise
    except BaseException as error:
        if moved and not target.exists():
            old.rename(target)
        if isinstance(error, OSError):
            raise ArtefactError(f"cannot write {target}: {error.strerror}") from error
        raise
    with contextlib.suppress(OSError):
        for left in _set_aside(target):
            # Under another name first: what is half removed must not be put back one day.
            left.rename(temporary)
            shutil.rmtree(temporary, ignore_errors=True)
    if moved:
        shutil.rmtree(old, ignore_errors=True)


def cache_folder() -> Path:
    """Return ``$GROUPIFY_CACHE``, else ``groupify`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("GROUPIFY_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "groupify")


class NumberCache:
    """Finite numbers by name in one JSON file, which is written whole with each change.

    A file that is missing or damaged counts as empty: everything in it can be measured again.

    Args:
        path: the file; None = nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.numbers: dict[str, float] = {}
        if path is None:
            return
        try:
            document = parse(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, ArtefactError):
            return
        if isinstance(document, dict):
            self.numbers = {name: float(value) for name, value in document.items() if is_finite(value)}

    def add(self, numbers: Mapping[str, float]) -> None:
        """Keep some more numbers."""
        self.numbers |= numbers
        if self._path is not None:
            write_aside(self._path, json.dumps(self.numbers, indent=1) + "\n")


def fingerprint(texts: Iterable[str], tensors: Iterable[Tensor] = ()) -> str:
    """Return a hash of texts and of the values of tensors, 16 hexadecimal digits."""
    import torch

    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text};".encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()[:16]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, on the CPU, and its metadata.

    Raises:
        OSError: the file cannot be read.
        safetensors.SafetensorError: it is damaged.
    """
    from safetensors import safe_open
    from safetensors.torch import load

    # Not safetensors' own load_file: an interrupt in it is lost, and comes out as a ValueError.
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    return load(path.read_bytes()), metadata
