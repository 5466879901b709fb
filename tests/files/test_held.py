"""held.py: only plain files of the folder are read, and what was checked is what is read."""

from __future__ import annotations

import json
import os
import shutil
import threading

import pytest
import torch

import matryoshkafy as mk
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.checkpoint import open_checkpoint
from matryoshkafy.files.folders import FolderError, write_folder
from matryoshkafy.files.held import Held, open_folder
from tests.small_models import build

WEIGHTS, GRAPH, MANIFEST = "model.safetensors", "graph.json", "matryoshka.json"


def doll_of(seed):
    model, inputs = build("tied")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(seed)
    return mk.convert(model, inputs, sizes=[4, 8, 16])


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    for seed in (1, 2):
        mk.save(doll_of(seed), folder / str(seed))
    return folder


@pytest.mark.parametrize("name", [WEIGHTS, GRAPH, MANIFEST])
@pytest.mark.parametrize("kind", ["link", "fifo", "device", "folder", "socket"])
def test_only_plain_files_are_read(sound, tmp_path, name, kind):
    folder, outside = tmp_path / "c", tmp_path / "secret"
    shutil.copytree(sound / "1", folder)
    shutil.move(folder / name, outside)
    make = {
        "link": lambda: os.symlink(outside, folder / name),
        "fifo": lambda: os.mkfifo(folder / name),
        "device": lambda: os.symlink("/dev/zero", folder / name),
        "folder": lambda: os.mkdir(folder / name),
        "socket": lambda: os.mknod(folder / name, 0o140600),
    }
    make[kind]()
    with pytest.raises(MatryoshkafyError, match="a link to a file elsewhere|no plain file|cannot"):
        mk.load(folder)


def test_a_snapshot_of_the_hugging_face_cache_is_read(sound, tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate((sound / "1").iterdir()):
        shutil.copy(path, blobs / str(i))
        os.symlink(f"../../blobs/{i}", snapshot / path.name)
    assert mk.load(snapshot, size=8) is not None


def test_a_checkpoint_replaced_after_the_check_is_read_as_it_was(sound, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(sound / "1", folder)
    with open_checkpoint(folder) as found:
        mk.save(mk.load(sound / "2"), folder, force=True)
        old = [mk.load(sound / "1"), mk.load(sound / "1", size=8)]
        for expected, read in zip(old, [found.whole(), found.sub_model(8)], strict=True):
            for name, tensor in expected.state_dict().items():
                assert torch.equal(read.state_dict()[name], tensor), name


def test_a_file_written_to_after_the_check_is_refused(sound, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(sound / "1", folder)
    with open_checkpoint(folder) as found:
        data = (sound / "2" / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data)
        os.utime(folder / WEIGHTS, ns=(1, 1))
        with pytest.raises(FolderError, match="was changed while it was being read"):
            found.whole()


def test_readers_beside_a_saver_see_whole_checkpoints(sound, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(sound / "1", folder)
    models = [mk.load(sound / name) for name in ("1", "2")]
    done = threading.Event()

    def keep_saving():
        for i in range(30):
            mk.save(models[i % 2], folder, force=True)
        done.set()

    saver = threading.Thread(target=keep_saving)
    saver.start()
    seen, reads = set(), 0
    while not done.is_set():
        with Held(folder) as _:
            values = mk.load(folder).state_dict()["up.weight"].unique().tolist()
        assert len(values) == 1
        seen |= set(values)
        reads += 1
    saver.join()
    assert seen <= {1.0, 2.0} and reads


def test_of_two_savers_one_wins_wholly(tmp_path):
    def files(version):
        def manifest(path):
            assert {p.name for p in path.parent.iterdir()} >= {"a", "b"}
            path.write_text(json.dumps({"format": 1, "version": version, "digests": {}}))

        text = f"{version}" * 4096
        write = {name: lambda path: path.write_text(text) for name in ("a", "b")}
        return {**write, MANIFEST: manifest}

    failures = []

    def saver(first):
        for i in range(60):
            try:
                write_folder(tmp_path / "c", files(first + i % 2), force=True)
            except BaseException as error:  # noqa: BLE001  the test reports it
                failures.append(error)

    threads = [threading.Thread(target=saver, args=(n,)) for n in (1, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    held, manifest = open_folder(tmp_path / "c", 1)
    texts = {held.read(name, 2**20).decode() for name in ("a", "b")}
    held.close()
    assert texts == {str(manifest["version"]) * 4096}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
