"""storage.py: a folder is whole at every moment, and believed only after a check."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import matryoshkafy.files.folders as storage
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.folders import (
    MANIFEST,
    FolderError,
    digest_file,
    recover_folder,
    write_folder,
)
from matryoshkafy.files.held import check_digests, open_folder
from matryoshkafy.files.json_text import JsonError

FILES = ("weights.bin", "graph.json", MANIFEST)
SAVER = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.files.saver import save
swap, stop_at = sys.argv[3] == "swap", int(sys.argv[4])
save(sys.argv[2], swap=swap, stop_at=stop_at)
"""


def text_writer(text):
    return lambda path: path.write_text(text)


def save(folder, text="a", **options):
    return write_folder(folder, {name: text_writer(text * 1000) for name in FILES}, **options)


def contents(folder):
    return {path.name: path.read_text() for path in Path(folder).iterdir()}


def read_manifest(folder, newest):
    held, manifest = open_folder(folder, newest)
    held.close()
    return manifest


def leftovers(folder):
    return [path.name for path in Path(folder).parent.iterdir() if path.name.startswith(".")]


def test_writes_a_folder_and_makes_its_parents(tmp_path):
    target = save(tmp_path / "runs" / "one" / "checkpoint")
    assert target == tmp_path / "runs" / "one" / "checkpoint"
    assert contents(target) == dict.fromkeys(FILES, "a" * 1000)
    assert not leftovers(target)


def test_an_empty_folder_may_be_written_without_force(tmp_path):
    (tmp_path / "out").mkdir()
    assert set(contents(save(tmp_path / "out"))) == set(FILES)


def test_a_later_writer_sees_the_earlier_files(tmp_path):
    def manifest(path):
        digests = {FILES[0]: digest_file(path.parent / FILES[0])}
        path.write_text(json.dumps({"format": 1, "digests": digests}))

    target = write_folder(tmp_path / "c", {FILES[0]: text_writer("x"), MANIFEST: manifest})
    digests = read_manifest(target, 1)["digests"]
    assert digests == {FILES[0]: hashlib.sha256(b"x").hexdigest()}
    check_digests(target, digests)


def test_an_existing_folder_is_replaced_only_with_force(tmp_path):
    save(tmp_path / "c")
    with pytest.raises(FolderError, match="exists and is not empty.*--force"):
        save(tmp_path / "c", "b")
    assert contents(tmp_path / "c") == dict.fromkeys(FILES, "a" * 1000)
    save(tmp_path / "c", "b", force=True)
    assert contents(tmp_path / "c") == dict.fromkeys(FILES, "b" * 1000)
    assert not leftovers(tmp_path / "c")


def test_what_is_no_file_of_a_checkpoint_is_never_removed(tmp_path):
    listed = {"format": 1, "digests": {"older.bin": "0"}}
    save(tmp_path / "c")
    (tmp_path / "c" / MANIFEST).write_text(json.dumps(listed))
    (tmp_path / "c" / "older.bin").write_text("ours, of an older format")
    (tmp_path / "c" / "thesis.txt").write_text("mine")
    before = contents(tmp_path / "c")
    with pytest.raises(FolderError, match="holds 'thesis.txt', which is of no checkpoint"):
        save(tmp_path / "c", "b", force=True)
    assert contents(tmp_path / "c") == before
    (tmp_path / "c" / "thesis.txt").unlink()
    save(tmp_path / "c", "b", force=True)
    assert contents(tmp_path / "c") == dict.fromkeys(FILES, "b" * 1000)


def test_a_folder_that_holds_folders_is_never_replaced(tmp_path):
    (tmp_path / "c" / "project").mkdir(parents=True)
    with pytest.raises(FolderError, match="holds folders"):
        save(tmp_path / "c", force=True)
    assert (tmp_path / "c" / "project").is_dir()


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    save(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link", "b", force=True)
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real")[MANIFEST] == "b" * 1000


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_the_way_is_left_alone(tmp_path, force):
    (tmp_path / "c").write_text("mine")
    with pytest.raises(FolderError, match="is a file"):
        save(tmp_path / "c", force=force)
    with pytest.raises(FolderError, match="cannot write"):
        save(tmp_path / "c" / "below", force=force)
    assert (tmp_path / "c").read_text() == "mine"


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "a\\b", "..", ".", "", ".hidden", "a\0b", 3])
def test_odd_file_names_are_refused(tmp_path, name):
    with pytest.raises(FolderError, match="plain name"):
        write_folder(tmp_path / "c", {name: text_writer("x")})
    with pytest.raises(FolderError, match="plain name"):
        check_digests(tmp_path, {name: "0"})
    assert not (tmp_path / "c").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_leave_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(FolderError, match="Permission denied"):
        save(tmp_path / "closed" / "c")


def test_a_place_that_cannot_be_written_is_named():
    with pytest.raises(FolderError, match="cannot write /proc/matryoshkafy"):
        save("/proc/matryoshkafy/c")


def test_a_failed_writer_leaves_nothing_and_keeps_the_old(tmp_path):
    save(tmp_path / "c")

    def full(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    def broken(path):
        raise KeyError("bug")

    for writer, error in ((full, FolderError), (broken, KeyError)):
        files = {**dict.fromkeys(FILES, text_writer("b")), MANIFEST: writer}
        with pytest.raises(error):
            write_folder(tmp_path / "c", files, force=True)
        assert contents(tmp_path / "c") == dict.fromkeys(FILES, "a" * 1000)
        assert not leftovers(tmp_path / "c")


def test_without_a_swap_a_failed_move_puts_the_old_folder_back(tmp_path, monkeypatch):
    save(tmp_path / "c")
    monkeypatch.setattr(storage, "_exchange", lambda one, other: False)
    rename = os.rename

    def failing(source, target):
        if str(source).endswith(".new"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(FolderError, match="Input/output"):
        save(tmp_path / "c", "b", force=True)
    assert contents(tmp_path / "c") == dict.fromkeys(FILES, "a" * 1000)


def test_what_a_killed_save_left_is_removed_but_not_a_running_one(tmp_path):
    target = tmp_path / "c"
    dead, alive, foreign = (tmp_path / f".c.{n}.new" for n in ("0" * 12, "1" * 12, "mine"))
    for folder in (dead, alive, foreign):
        folder.mkdir()
        (folder / "weights.bin").write_text("half")
    handle = storage._lock(alive)
    save(target)
    os.close(handle)
    assert not dead.exists() and alive.exists() and foreign.exists()
    save(target, force=True)
    assert not alive.exists() and foreign.exists()


def start_saver(folder, swap, stop_at=-1):
    here = Path(__file__).parents[2]
    arguments = [here, folder, "swap" if swap else "journal", stop_at]
    return subprocess.Popen(
        [sys.executable, "-c", SAVER, *map(str, arguments)], stdout=subprocess.PIPE
    )


def assert_whole(folder):
    target = recover_folder(folder)
    manifest = read_manifest(target, 1)
    check_digests(target, manifest["digests"])
    assert set(contents(target)) == {*manifest["digests"], MANIFEST}
    return manifest["version"]


@pytest.mark.parametrize("swap", [True, False], ids=["swap", "journal"])
def test_killed_at_random_moments_the_old_or_the_new_is_there(tmp_path, swap):
    folder, chance, versions = tmp_path / "c", random.Random(7), set()
    for _ in range(40):
        saver = start_saver(folder, swap)
        assert saver.stdout is not None
        saver.stdout.read(1)
        # One byte comes after the first save; then it saves again and again.
        select.select([], [], [], chance.uniform(0, 0.02))
        saver.kill()
        assert saver.wait() == -signal.SIGKILL
        saver.stdout.close()
        versions.add(assert_whole(folder))
    assert len(versions) > 1


@pytest.mark.parametrize("swap", [True, False], ids=["swap", "journal"])
def test_killed_before_each_step_the_old_or_the_new_is_there(tmp_path, swap):
    folder, seen = tmp_path / "c", set()
    for step in itertools.count():
        saver = start_saver(folder, swap, step)
        code = saver.wait()
        assert saver.stdout is not None
        saver.stdout.close()
        seen.add(assert_whole(folder) if recover_folder(folder).exists() else None)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert step > 20
    assert not leftovers(folder)


def test_a_folder_that_is_no_checkpoint_says_why(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, why in (("none", "no such folder"), ("file", "is a file"), ("empty", "has no matry")):
        with pytest.raises(FolderError, match=f"no checkpoint: .*{why}") as caught:
            read_manifest(tmp_path / name, 1)
        assert isinstance(caught.value, MatryoshkafyError)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"format": 2}', FolderError, "format 2.*reads up to 1.*Upgrade"),
        ('{"format": 0}', FolderError, "expected an integer"),
        ('{"format": true}', FolderError, "expected an integer"),
        ('{"format": "1"}', FolderError, "expected an integer"),
        ('{"format": null}', FolderError, "expected an integer"),
        ("{}", FolderError, "expected an integer"),
        ("[]", FolderError, "expected an integer"),
        ("", JsonError, "no sound JSON"),
        ('{"format": 1', JsonError, "no sound JSON"),
        ('{"format": 1, "format": 1}', JsonError, "repeats a key"),
        ('{"format": 1, "x": NaN}', JsonError, "NaN"),
        ("[" * 100_000, JsonError, "nested too deeply"),
        ("\x80\x04\x95", JsonError, "no sound JSON"),
        (" " * (65 * 2**20), FolderError, "over 16777216 bytes"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_damaged_manifest_is_refused(tmp_path, text, error, message):
    (tmp_path / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(error, match=message):
        read_manifest(tmp_path, 1)


def test_a_manifest_that_is_a_folder_or_a_pipe_is_refused(tmp_path):
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(FolderError, match="no plain file"):
        read_manifest(tmp_path, 1)
    (tmp_path / MANIFEST).rmdir()
    os.mkfifo(tmp_path / MANIFEST)
    with pytest.raises(FolderError, match="no plain file"):
        read_manifest(tmp_path, 1)


@pytest.mark.parametrize(
    ("digests", "message"),
    [
        ({"weights.bin": "0" * 64}, "weights.bin has the SHA-256 .* but '000"),
        ({"weights.bin": None}, "but None was saved"),
        ({"other.bin": "0" * 64}, "lacks its file other.bin"),
        ({"../c/weights.bin": "0" * 64}, "plain name"),
        (["weights.bin"], "expected name: SHA-256"),
        (None, "expected name: SHA-256"),
    ],
    ids=repr,
)
def test_digests_that_do_not_fit_are_refused(tmp_path, digests, message):
    target = save(tmp_path / "c")
    with pytest.raises(FolderError, match=message):
        check_digests(target, digests)


def test_a_flipped_bit_is_found(tmp_path):
    target = save(tmp_path / "c")
    digests = {name: digest_file(target / name) for name in FILES}
    check_digests(target, digests)
    damaged = bytearray((target / FILES[0]).read_bytes())
    damaged[500] ^= 1
    (target / FILES[0]).write_bytes(damaged)
    with pytest.raises(FolderError, match="changed or damaged"):
        check_digests(target, digests)
    with pytest.raises(FolderError, match="cannot read"):
        digest_file(target)


@pytest.mark.parametrize(
    "foreign", ['{"mine": 1}', '{"format": 1, "digests": {"thesis.txt": "x"}}', "no JSON"]
)
def test_a_run_json_of_another_program_is_never_removed(foreign, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.json").write_text(foreign)
    (tmp_path / "c" / "thesis.txt").write_text("mine")
    before = contents(tmp_path / "c")
    with pytest.raises(FolderError, match="which is of no checkpoint"):
        save(tmp_path / "c", "b", force=True)
    (tmp_path / "c" / "thesis.txt").unlink()
    with pytest.raises(FolderError, match="holds 'run.json', which is of no checkpoint"):
        save(tmp_path / "c", "b", force=True)
    assert contents(tmp_path / "c") == {"run.json": before["run.json"]}
