"""A folder that is read: its files are opened once, plain files only, and checked; no torch.

What was checked is what is read later: the files stay open, so that a folder which is replaced in
the meantime goes on being the one that was checked.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, TypeVar

from matryoshkafy.files.folders import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    FolderError,
    check_file_name,
    recover_folder,
    sha256,
)
from matryoshkafy.files.json_text import is_object, parse_json, shown

MAX_FILES = 512
# The files of the progressive layout.
LEVEL_FILE = re.compile(r"level-\d{1,4}\.safetensors", re.ASCII)
RELATIVE = os.open in os.supports_dir_fd
# A fifo would make open() wait for a writer; on systems without these flags there are none.
PLAINLY = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
SAVED_HOW = "Give a folder that matryoshkafy.save or `matryoshkafy convert` wrote."
# How often a folder that is replaced while its files are being opened is opened again.
ATTEMPTS = 5

T = TypeVar("T")


class Replaced(Exception):
    """The folder was replaced while its files were being opened."""


class Closing:
    """What a with statement closes; who holds it longer calls `close`."""

    def close(self) -> None:
        """Close every file."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is closed")

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Held(Closing):
    """The open files of a folder, by plain name. Close it, or use it in a with statement.

    Only regular files are read. A link may point into the folder itself, or into the `blobs` of
    the Hugging Face cache that the folder is a snapshot of.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = recover_folder(folder)
        self._files: dict[str, int] = {}
        self._stamps: dict[str, tuple[int, ...]] = {}
        self._folder = -1
        if RELATIVE and self.path.is_dir():
            with reading(self.path):
                self._folder = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def file(self, name: str) -> int:
        """Return the descriptor of a file; raises FolderError for one that is no plain file."""
        if name not in self._files:
            check_file_name(name, f"a file of {self.path}")
            if len(self._files) >= MAX_FILES:
                raise FolderError(f"{self.path} lists over {MAX_FILES} files: damaged.")
            self._files[name] = self._open(name)
            self._stamps[name] = _stamp(self._files[name])
        return self._files[name]

    @property
    def names(self) -> tuple[str, ...]:
        """The files that are open."""
        return tuple(self._files)

    def hold(self, names: object) -> None:
        """Open the files of these names now, so that all of them are of one folder.

        Files of levels may be missing: a device holds those that it needs.
        """
        for name in names if is_object(names) else ():
            if self.has(name) or not LEVEL_FILE.fullmatch(name):
                self.file(name)

    def has(self, name: str) -> bool:
        """Tell whether there is a file of this name."""
        return os.path.lexists(self.path / check_file_name(name, f"a file of {self.path}"))

    def read(self, name: str, limit: int) -> bytes:
        """Return the bytes of a small file; raises FolderError where it has more than the limit."""
        handle = self.file(name)
        if os.fstat(handle).st_size > limit:
            raise FolderError(f"{self.path / name} has over {limit} bytes: damaged.")
        with reading(self.path / name), _whole(handle) as file:
            return file.read(limit)

    def digest(self, name: str) -> str:
        """Return the SHA-256 of a file as hexadecimal text."""
        handle = self.file(name)
        with reading(self.path / name), _whole(handle) as file:
            return sha256(file)

    def check(self, digests: object, names: Iterable[str] | None = None) -> None:
        """Compare files with their recorded SHA-256; raises FolderError with the file's name.

        Args:
            digests: SHA-256 in hexadecimal by file name.
            names: the files to compare; None: all of them.
        """
        if not is_object(digests):
            raise FolderError(
                f"the digests of {self.path} are {shown(digests)}, expected name: SHA-256."
            )
        for name in digests if names is None else names:
            found = self.digest(name)
            if found != digests.get(name):
                raise FolderError(
                    f"{self.path / name} has the SHA-256 {found}, but {shown(digests.get(name))} "
                    "was saved: the file was changed or damaged. Copy it again, or save the model "
                    "again."
                )

    def check_unchanged(self) -> None:
        """Raise FolderError where a file was written to since it was opened."""
        for name, handle in self._files.items():
            if _stamp(handle) != self._stamps[name]:
                raise FolderError(
                    f"{self.path / name} was changed while it was being read. Load it again once "
                    "nothing writes to it."
                )

    def close(self) -> None:
        handles = [*self._files.values(), *([self._folder] if self._folder >= 0 else [])]
        self._files, self._folder = {}, -1
        for handle in handles:
            os.close(handle)

    def __del__(self) -> None:
        if getattr(self, "_files", None) or getattr(self, "_folder", -1) >= 0:
            self.close()

    def _open(self, name: str) -> int:
        self._check_link(name)
        try:
            if self._folder >= 0:
                handle = os.open(name, PLAINLY, dir_fd=self._folder)
            else:
                handle = os.open(self.path / name, PLAINLY)
        except FileNotFoundError:
            if self._was_replaced():
                raise Replaced(str(self.path)) from None
            raise FolderError(
                f"{self.path} lacks its file {name}. Copy the whole folder again."
            ) from None
        except OSError as error:
            raise FolderError(f"cannot read {self.path / name}: {error.strerror}.") from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise FolderError(f"{self.path / name} is no plain file, and is not read.")
        return handle

    def _was_replaced(self) -> bool:
        if self._folder < 0:
            return False
        try:
            now = os.stat(self.path)
        except OSError:
            return True
        held = os.fstat(self._folder)
        return (now.st_dev, now.st_ino) != (held.st_dev, held.st_ino)

    def _check_link(self, name: str) -> None:
        link = self.path / name
        if not link.is_symlink():
            return
        homes = [self.path]
        if self.path.parent.name == "snapshots":
            homes.append(self.path.parent.parent / "blobs")
        target = Path(os.path.realpath(link))
        if target.parent not in map(Path, map(os.path.realpath, homes)):
            raise FolderError(
                f"{link} is a link to a file elsewhere, which is not read. Copy the file itself."
            )


def open_folder(folder: str | os.PathLike[str], newest: int) -> tuple[Held, dict[str, Any]]:
    """Return a checkpoint folder held open, and its matryoshka.json, of format 1 to newest.

    Every file that the manifest lists and that is there is open. Raises FolderError for a folder
    that is no checkpoint or of a newer format, JsonError for a manifest that is no JSON.
    """
    for _ in range(ATTEMPTS):
        held = Held(folder)
        try:
            return held, _manifest(held, folder, newest)
        except Replaced:
            held.close()
        except BaseException:
            held.close()
            raise
    raise FolderError(
        f"{folder} was replaced {ATTEMPTS} times while it was being opened. Load it when it is no "
        "longer saved without pause."
    )


def check_digests(folder: str | os.PathLike[str], digests: object) -> None:
    """Compare each listed file of a folder with its recorded SHA-256; raises FolderError."""
    with Held(folder) as held:
        held.check(digests)


def _manifest(held: Held, folder: str | os.PathLike[str], newest: int) -> dict[str, Any]:
    if not os.path.lexists(held.path / MANIFEST):
        raise FolderError(f"{folder} is no checkpoint: {_why_not(held.path)}. {SAVED_HOW}")
    text = held.read(MANIFEST, MAX_MANIFEST_BYTES)
    manifest = parse_json(text, str(held.path / MANIFEST))
    check_format(manifest, newest, folder)
    held.hold(manifest.get("digests"))
    return manifest


def _why_not(target: Path) -> str:
    if not target.exists():
        return "there is no such folder"
    if not target.is_dir():
        return "it is a file"
    return f"it has no {MANIFEST}"


def check_format(manifest: object, newest: int, folder: object) -> None:
    """Raise FolderError unless the manifest is of a format from 1 to newest."""
    version = manifest.get("format") if is_object(manifest) else None
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
def reading(path: Path) -> Generator[None, None, None]:
    """What the system refuses to read is one error, which names the file."""
    try:
        yield
    except OSError as error:
        raise FolderError(f"cannot read {path}: {error.strerror or error}.") from error


def _stamp(handle: int) -> tuple[int, ...]:
    found = os.fstat(handle)
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _whole(handle: int) -> Generator[Any, None, None]:
    with open(os.dup(handle), "rb", buffering=0) as file:
        file.seek(0)
        yield file
