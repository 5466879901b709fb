"""Folders that are written whole or not at all; no torch.

A folder is written beside its final place and moved there in one step, so that a process killed at
any moment leaves the old folder or the new one. Of two that save at once the later wins wholly.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from io import RawIOBase
from pathlib import Path

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.json_text import is_object, parse_json, shown

try:
    import fcntl
except ImportError:
    fcntl = None

MANIFEST = "matryoshka.json"
# The files that say, under "digests", which others a folder of ours holds.
DESCRIBING = (MANIFEST, "run.json")
MAX_MANIFEST_BYTES = 16 * 2**20
CHUNK = 2**20
FILE_NAME = re.compile(r"[A-Za-z0-9_][\w.\-]{0,199}", re.ASCII)
NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EXDEV}
# The constants of Linux's renameat2 and of macOS's renamex_np.
AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2

Writer = Callable[[Path], object]


class FolderError(MatryoshkafyError):
    """A folder that is no checkpoint, is damaged, or cannot be written."""


def write_folder(
    folder: str | os.PathLike[str],
    files: Mapping[str, Writer],
    *,
    force: bool = False,
    check: Writer | None = None,
) -> Path:
    """Write a folder of files whole or not at all; return its absolute path.

    Args:
        folder: where; parents are made.
        files: by plain name, a function that writes the file at the path it gets; they are called
            in order, so that a later one may read the earlier ones (their digests) beside it.
        force: replace an earlier checkpoint; what no checkpoint holds is never removed.
        check: called with the path of the finished folder before it is moved into its place.

    Raises:
        FolderError: where the system refuses, or the place is taken. What else a writer or the
            check raises passes through. Nothing is left behind either way.
    """
    target = Path(os.path.realpath(folder))
    for name in files:
        check_file_name(name, "a file to write")
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.parent):
            _recover(target)
        _check_free(target, force, files)
        with _beside(target) as fresh:
            for name, write in files.items():
                write(fresh / name)
                _sync(fresh / name)
            _sync(fresh)
            if check is not None:
                check(fresh)
            with _alone(target.parent):
                _check_free(target, force, files)
                _move_into_place(fresh, target)
    return target


@contextlib.contextmanager
def whole_folder(folder: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """Give a new folder to write in, which takes the place of another at the end, or not at all.

    The place must be free, or the caller's to replace.
    """
    target = Path(os.path.realpath(folder))
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _beside(target) as fresh:
            yield fresh
            with _alone(target.parent):
                _move_into_place(fresh, target)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """Give a path to write a file at, which takes its place at the end, or not at all."""
    target = Path(path)
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(6)}.new")
    try:
        yield fresh
        _sync(fresh)
        os.replace(fresh, target)
    finally:
        fresh.unlink(missing_ok=True)


def check_target(folder: str | os.PathLike[str], *, force: bool = False) -> None:
    """Raise FolderError now where write_folder would later: before work that takes long."""
    target = Path(os.path.realpath(folder))
    with _explained(target):
        _check_free(target, force)
        parent = next(p for p in target.parents if p.exists())
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{parent} is a file")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{parent} is not writable")


def recover_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder, after undoing a replacement that was cut in two.

    Only where the system cannot swap two folders in one step can a killed process leave none.
    """
    target = Path(os.path.realpath(folder))
    if not target.exists() and _siblings(target, "old"):
        with _alone(target.parent):
            _recover(target)
    return target


def _recover(target: Path) -> None:
    left = [] if target.exists() else sorted(_siblings(target, "old"))
    for path in left:
        with contextlib.suppress(OSError):
            os.rename(path, target)
            break


def digest_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as hexadecimal text; raises FolderError if it is unreadable."""
    try:
        with open(path, "rb", buffering=0) as file:
            return sha256(file)
    except OSError as error:
        raise FolderError(f"cannot read {path}: {error.strerror or error}.") from error


def sha256(file: RawIOBase) -> str:
    """Return the SHA-256 of what an open file still holds."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def check_file_name(name: object, what: str) -> str:
    """Return a plain file name; raises FolderError for a path, "..", or hidden or odd names."""
    if isinstance(name, str) and FILE_NAME.fullmatch(name):
        return name
    raise FolderError(
        f"{what} is called {shown(name)}: expected a plain name of letters, digits, '_', '-' and "
        f"'.', without folders."
    )


@contextlib.contextmanager
def _explained(target: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise FolderError(
            f"cannot write {target}: {error.strerror or error}. Choose a folder that you may "
            f"write to, on a disk with free space."
        ) from error


def _check_free(target: Path, force: bool, files: Iterable[str] = ()) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FolderError(f"{target} is a file, expected a folder. Choose another name.")
    if not any(target.iterdir()):
        return
    if not force:
        raise FolderError(
            f"{target} exists and is not empty. Choose another folder, or replace it with force "
            f"(--force)."
        )
    _check_own(target, {*files, MANIFEST, *_listed(target)})


def _check_own(target: Path, known: Collection[str]) -> None:
    """Refuse to remove what was not saved there: force is for checkpoints."""
    for entry in target.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            raise FolderError(
                f"{target} holds folders, which no checkpoint does, and is not replaced. Choose "
                f"another folder, or remove this one yourself."
            )
        if entry.name not in known:
            raise FolderError(
                f"{target} holds {shown(entry.name)}, which is of no checkpoint, and is not "
                f"replaced. Choose another folder, or remove that file yourself."
            )


def _listed(target: Path) -> set[str]:
    """The files that the checkpoint or run at a place lists as its own, and the list itself."""
    found = set[str]()
    for name in DESCRIBING:
        saved = _read_json(target / name)
        digests = saved.get("digests") if is_object(saved) and "format" in saved else None
        # Another program's JSON may have such a key as well, and does not hold such digests.
        if is_object(digests) and all(map(_is_hexadecimal, digests.values())):
            found |= {name, *digests}
    return found


def _is_hexadecimal(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]+", value) is not None


def _read_json(path: Path) -> object:
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            return parse_json(file.read(MAX_MANIFEST_BYTES + 1), path.name)
    except (OSError, MatryoshkafyError):
        return None


@contextlib.contextmanager
def _beside(target: Path) -> Generator[Path, None, None]:
    fresh = target.parent / f".{target.name}.{secrets.token_hex(6)}.new"
    with contextlib.ExitStack() as stack:
        # Made and locked in one go: another save would take what nobody holds for a dead one's.
        with _alone(target.parent):
            _clean(target)
            fresh.mkdir()
            stack.callback(shutil.rmtree, fresh, ignore_errors=True)
            # The lock dies with its process, which tells a killed save from one that still runs.
            handle = _lock(fresh)
            if handle is not None:
                stack.callback(os.close, handle)
        yield fresh


@contextlib.contextmanager
def _alone(parent: Path) -> Generator[None, None, None]:
    """Only one process at a time is in here for a parent folder; where it cannot be locked, all."""
    handle = None
    if fcntl is not None:
        with contextlib.suppress(OSError):
            handle = os.open(parent, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int | None:
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _clean(target: Path) -> None:
    for left in (*_siblings(target, "new"), *_siblings(target, "old")):
        with contextlib.suppress(OSError):
            handle = _lock(left)
            if handle is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(handle)


def _siblings(target: Path, suffix: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{12}}\.{suffix}")
    if not target.parent.is_dir():
        return []
    return [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]


def _sync(path: Path) -> None:
    flags = os.O_RDONLY if os.name == "posix" else os.O_RDWR
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move_into_place(fresh: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        os.rename(fresh, target)
    elif not _exchange(fresh, target):
        old = fresh.with_suffix(".old")
        os.rename(target, old)
        try:
            os.rename(fresh, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    pair = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        failed = libc.renameat2(AT_FDCWD, pair[0], AT_FDCWD, pair[1], RENAME_EXCHANGE)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*pair, RENAME_SWAP)
    else:
        return False
    code = ctypes.get_errno()
    if failed and code not in NOT_SUPPORTED:
        raise OSError(code, os.strerror(code), str(other))
    return not failed
