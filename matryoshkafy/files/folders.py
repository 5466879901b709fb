"""Folders that are written whole or not at all, and checked before they are believed; no torch.

A folder is written beside its final place and moved there in one step, so that a process killed at
any moment leaves the old folder or the new one.
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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.json_text import parse_json, shown

try:
    import fcntl
except ImportError:
    fcntl = None

MANIFEST = "matryoshka.json"
MAX_MANIFEST_BYTES = 64 * 2**20
CHUNK = 2**20
FILE_NAME = re.compile(r"[A-Za-z0-9_][\w.\-]{0,199}", re.ASCII)
NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EXDEV}
# The constants of Linux's renameat2 and of macOS's renamex_np.
AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2

Writer = Callable[[Path], object]


class FolderError(MatryoshkafyError):
    """A folder that is no checkpoint, is damaged, or cannot be written."""


def write_folder(
    folder: str | os.PathLike[str], files: Mapping[str, Writer], *, force: bool = False
) -> Path:
    """Write a folder of files whole or not at all; return its absolute path.

    files: by plain name, a function that writes the file at the path it gets; they are called in
    order, so that a later one may read the earlier ones (their digests) beside it. force: replace
    a folder that exists and is not empty. Raises FolderError where the system refuses; what else a
    writer raises passes through. Nothing is left behind either way.
    """
    target = Path(os.path.realpath(folder))
    for name in files:
        check_file_name(name, "a file to write")
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(target)
        _check_free(target, force)
        _clean(target)
        with _beside(target) as fresh:
            for name, write in files.items():
                write(fresh / name)
                _sync(fresh / name)
            _sync(fresh)
            _check_free(target, force)
            _move_into_place(fresh, target)
    return target


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
    if not target.exists():
        for left in sorted(_siblings(target, "old")):
            with contextlib.suppress(OSError):
                os.rename(left, target)
                break
    return target


def read_manifest(folder: str | os.PathLike[str], newest: int) -> dict[str, Any]:
    """Return the matryoshka.json of a checkpoint; its "format" is between 1 and newest.

    Raises FolderError for a folder that is no checkpoint or of a newer format, JsonError for a
    manifest that is no JSON.
    """
    target = recover_folder(folder)
    if not (target / MANIFEST).is_file():
        raise FolderError(f"{folder} is no checkpoint: {_why_not(target)}. {SAVED_HOW}")
    with _reading(target / MANIFEST), open(target / MANIFEST, "rb") as file:
        text = file.read(MAX_MANIFEST_BYTES + 1)
    if len(text) > MAX_MANIFEST_BYTES:
        raise FolderError(f"{target / MANIFEST} has over {MAX_MANIFEST_BYTES} bytes: damaged.")
    manifest = parse_json(text, str(target / MANIFEST))
    _check_format(manifest, newest, folder)
    return manifest


def digest_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as hexadecimal text; raises FolderError if it is unreadable."""
    digest = hashlib.sha256()
    with _reading(Path(path)), open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_digests(folder: str | os.PathLike[str], digests: object) -> None:
    """Compare each file of a folder with its recorded SHA-256, `{name: hexadecimal text}`.

    Raises FolderError, with the file's name, where one is missing or differs.
    """
    if not isinstance(digests, dict):
        raise FolderError(f"the digests of {folder} are {shown(digests)}, expected name: SHA-256.")
    for name, expected in digests.items():
        check_file_name(name, f"a file of {folder}")
        path = Path(folder) / name
        if not path.is_file():
            raise FolderError(f"{folder} lacks its file {name}. Copy the whole folder again.")
        found = digest_file(path)
        if found != expected:
            raise FolderError(
                f"{path} has the SHA-256 {found}, but {shown(expected)} was saved: the file was "
                f"changed or damaged. Copy it again, or save the model again."
            )


def check_file_name(name: object, what: str) -> str:
    """Return a plain file name; raises FolderError for a path, "..", or hidden or odd names."""
    if isinstance(name, str) and FILE_NAME.fullmatch(name):
        return name
    raise FolderError(
        f"{what} is called {shown(name)}: expected a plain name of letters, digits, '_', '-' and "
        f"'.', without folders."
    )


SAVED_HOW = "Give a folder that matryoshkafy.save or `matryoshkafy convert` wrote."


def _why_not(target: Path) -> str:
    if not target.exists():
        return "there is no such folder"
    if not target.is_dir():
        return "it is a file"
    return f"it has no {MANIFEST}"


def _check_format(manifest: object, newest: int, folder: object) -> None:
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if type(version) is not int or version < 1:
        raise FolderError(
            f"{folder} is no checkpoint: the format in {MANIFEST} is {shown(version)}, expected an "
            f"integer from 1 to {newest}. {SAVED_HOW}"
        )
    if version > newest:
        raise FolderError(
            f"{folder} has checkpoint format {version}, this version of matryoshkafy reads up to "
            f"{newest}. Upgrade matryoshkafy."
        )


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FolderError(
            f"cannot write {target}: {error.strerror or error}. Choose a folder that you may "
            f"write to, on a disk with free space."
        ) from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FolderError(f"cannot read {path}: {error.strerror or error}.") from error


def _check_free(target: Path, force: bool) -> None:
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
    if any(entry.is_dir() and not entry.is_symlink() for entry in target.iterdir()):
        raise FolderError(
            f"{target} holds folders, which no checkpoint does, and is not replaced. Choose "
            f"another folder, or remove this one yourself."
        )


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    fresh = target.parent / f".{target.name}.{secrets.token_hex(6)}.new"
    fresh.mkdir()
    try:
        with _locked(fresh):
            yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # The lock dies with its process, which tells a killed save from one that still runs.
    handle = _lock(folder)
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
