"""checkpoint.py: what is loaded is what was saved, whole and at every size, and is no code."""

from __future__ import annotations

import itertools
import json
import os
import random
import select
import signal
import sys
import time
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils import _pytree as pytree

import matryoshkafy as mk
from matryoshkafy.errors import MatryoshkafyError
from matryoshkafy.files.checkpoint import CheckpointWarning, open_checkpoint
from matryoshkafy.files.json_text import signed
from matryoshkafy.files.records import record_from_json, record_of, record_to_json
from tests.small_models import MODELS, build

SIZES = [4, 8, 16]
CASES = list(itertools.product(MODELS, ("masked", "sliced")))


@pytest.fixture(scope="module")
def dolls():
    made = {}
    for name, nesting in CASES:
        model, inputs = build(name)
        made[name, nesting] = (mk.convert(model, inputs, sizes=SIZES, nesting=nesting), inputs)
    return made


@pytest.fixture(scope="module")
def saved(dolls, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for (name, nesting), (doll, _) in dolls.items():
        mk.save(doll, folder / f"{name}-{nesting}")
    return folder


def assert_same_tensors(one, other):
    one, other = (pytree.tree_leaves(v) for v in (one, other))
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def assert_same_state(one, other):
    assert list(one.state_dict()) == list(other.state_dict())
    assert_same_tensors(list(one.state_dict().values()), list(other.state_dict().values()))
    first, second = (dict(m.named_parameters(remove_duplicate=False)) for m in (one, other))
    assert list(first) == list(second)
    assert [p.requires_grad for p in first.values()] == [p.requires_grad for p in second.values()]
    assert ties(first) == ties(second)


def ties(named):
    return {(a, b) for a, p in named.items() for b, q in named.items() if p is q}


@pytest.mark.parametrize(("name", "nesting"), CASES)
def test_a_loaded_doll_is_the_saved_one(dolls, saved, name, nesting):
    doll, inputs = dolls[name, nesting]
    loaded = mk.load(saved / f"{name}-{nesting}")
    assert isinstance(loaded, mk.Doll)
    assert loaded.plan == doll.plan
    assert_same_state(doll, loaded)
    with torch.no_grad():
        assert_same_tensors(doll(*inputs), loaded(*inputs))
        for size in SIZES:
            assert_same_tensors(doll.outputs(*inputs)[size], loaded.outputs(*inputs)[size])


@pytest.mark.parametrize(("name", "nesting"), CASES)
def test_loading_a_size_is_slicing(dolls, saved, name, nesting, tmp_path):
    doll, inputs = dolls[name, nesting]
    folder = saved / f"{name}-{nesting}"
    whole = mk.load(folder)
    for size in SIZES:
        expected, streamed, cut = mk.slice(doll, size), mk.load(folder, size), mk.slice(whole, size)
        assert_same_state(expected, streamed)
        assert_same_state(expected, cut)
        with torch.no_grad():
            assert_same_tensors(expected(*inputs), streamed(*inputs))


@pytest.mark.parametrize(("name", "nesting"), CASES)
def test_a_sub_model_is_a_checkpoint_too(dolls, name, nesting, tmp_path):
    doll, inputs = dolls[name, nesting]
    small = mk.slice(doll, 8)
    mk.save(small, tmp_path / "8")
    loaded, smaller = mk.load(tmp_path / "8"), mk.load(tmp_path / "8", size=4)
    assert_same_state(small, loaded)
    assert_same_state(mk.slice(doll, 4), smaller)
    with torch.no_grad():
        assert_same_tensors(small(*inputs), loaded(*inputs))
        assert_same_tensors(mk.slice(doll, 4)(*inputs), smaller(*inputs))
    mk.save(loaded, tmp_path / "again")
    assert_same_state(small, mk.load(tmp_path / "again"))


@pytest.mark.parametrize("nesting", ["masked", "sliced"])
def test_a_plan_of_format_1_is_read(dolls, nesting, tmp_path):
    doll, inputs = dolls[next(iter(MODELS)), nesting]
    mk.save(doll, tmp_path / "old")
    manifest = tmp_path / "old" / "matryoshka.json"
    saved = json.loads(manifest.read_text())
    for field in ("masks", "stored", "order", "blocks", "stairs"):
        saved["plan"].pop(field, None)
    old = {n: v[0] if len(v) == 1 else {"many": v} for n, v in saved["plan"]["nodes"].items()}
    saved["plan"]["nodes"] = old
    saved["plan"]["format"] = 1
    manifest.write_text(json.dumps(signed(saved)))
    small = mk.load(tmp_path / "old", size=8)
    assert_same_state(small, mk.slice(doll, 8))
    assert_same_tensors(small(*inputs), mk.slice(doll, 8)(*inputs))
    assert mk.load(tmp_path / "old").plan == doll.plan


@pytest.mark.parametrize("change", [{"dims": [[1], [1]]}, {"source": "add"}])
def test_a_plan_that_stores_other_axes_is_refused(dolls, change, tmp_path):
    doll, _ = dolls[next(iter(MODELS)), "masked"]
    mk.save(doll, tmp_path / "bad")
    manifest = tmp_path / "bad" / "matryoshka.json"
    saved = json.loads(manifest.read_text())
    name = next(iter(saved["plan"]["stored"]))
    saved["plan"]["stored"][name] |= change
    manifest.write_text(json.dumps(signed(saved)))
    with pytest.raises(MatryoshkafyError, match="with other axes than it has"):
        mk.load(tmp_path / "bad")


def test_a_tuned_sub_model_keeps_what_training_wrote_into_the_zeros(dolls, tmp_path):
    doll, _ = dolls["tied", "masked"]
    small = mk.slice(doll, 16)
    for parameter in small.parameters():
        parameter.data.add_(1.0)
    mk.save(small, tmp_path / "tuned")
    assert_same_state(small, mk.load(tmp_path / "tuned"))


def test_a_masked_doll_with_a_norm_written_by_hand_is_saved(tmp_path):
    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(9, 16), nn.Linear(16, 5)

        def forward(self, x):
            h = self.up(x)
            h = (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-6)
            return self.down(h * h.amax(-1, keepdim=True))

    x = torch.randn(3, 7, 9)
    doll = mk.convert(ByHand(), (x,), sizes=[0.5, 1.0], nesting="masked")
    mk.save(doll, tmp_path / "c")
    assert torch.equal(mk.load(tmp_path / "c")(x), doll(x))
    small = mk.slice(doll, doll.sizes[0])
    assert torch.equal(mk.load(tmp_path / "c", size=doll.sizes[0])(x), small(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_the_dtype_survives(tmp_path, dtype):
    model, inputs = build("tied")
    doll = mk.convert(model, inputs, sizes=SIZES).to(dtype)
    mk.save(doll, tmp_path / "c")
    assert_same_state(doll, mk.load(tmp_path / "c"))
    assert_same_state(mk.slice(doll, 4), mk.load(tmp_path / "c", size=4))


def test_training_mode_survives(dolls, tmp_path):
    doll, _ = dolls["images", "sliced"]
    doll.train()
    try:
        mk.save(doll, tmp_path / "c")
    finally:
        doll.eval()
    assert mk.load(tmp_path / "c").training
    assert mk.load(tmp_path / "c", size=4).training


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_are_saved_by_their_parts(tmp_path):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            places = torch.tensor([[0, 1, 2, 2], [1, 0, 0, 2]])
            edges = torch.sparse_coo_tensor(places, torch.rand(4), (3, 3)).coalesce()
            self.register_buffer("edges", edges)
            self.embed = nn.Parameter(torch.randn(3, 16))
            self.head = nn.Linear(16, 16)

        def forward(self, which):
            return self.head(torch.sparse.mm(self.edges, self.embed))[which]

    doll = mk.convert(Graph(), (torch.tensor([0, 2]),), sizes=SIZES, nesting="sliced")
    mk.save(doll, tmp_path / "c")
    loaded = mk.load(tmp_path / "c")
    with torch.no_grad():
        assert torch.equal(doll(torch.tensor([1])), loaded(torch.tensor([1])))
    assert loaded.edges.is_coalesced()
    assert torch.equal(doll.edges.to_dense(), loaded.edges.to_dense())


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_tensor_of_two_names_is_packed(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            edges = torch.sparse_coo_tensor([[0, 1, 2], [1, 2, 0]], torch.rand(3), (3, 3))
            self.register_buffer("there", edges.coalesce())
            self.register_buffer("back", self.there)
            self.embed, self.head = nn.Parameter(torch.randn(3, 8)), nn.Linear(8, 2)

        def forward(self, which):
            once = torch.sparse.mm(self.there, self.embed)
            return self.head(torch.sparse.mm(self.back, once))[which]

    model, which = Twice(), torch.tensor([1, 0])
    doll = mk.convert(model, (which,), sizes=[4, 8], nesting="sliced")
    packed = mk.load(mk.pack(doll, tmp_path / "packed"), 4)
    assert torch.equal(packed(which), mk.slice(doll, 4)(which))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_records_round_trip(layout):
    tensor = torch.eye(3).to_sparse(layout=layout)
    record = record_of("a.b", tensor, "hidden")
    assert record_from_json(json.loads(json.dumps(record_to_json(record)))) == record


def test_other_readers_see_the_users_names(dolls, saved):
    read = safetensors.torch.load_file(saved / "tied-masked" / "model.safetensors")
    doll, _ = dolls["tied", "masked"]
    assert read.keys() == doll.state_dict().keys() - {"head.weight"}
    assert_same_tensors(read, {name: doll.state_dict()[name] for name in read})


def test_no_pickle_is_written_or_read(dolls, tmp_path):
    seen = []
    active = True
    sys.addaudithook(lambda event, _: seen.append(event) if active and "pickle" in event else None)
    mk.save(dolls["tied", "masked"][0], tmp_path / "c")
    mk.load(tmp_path / "c")
    mk.load(tmp_path / "c", size=4)
    active = False
    assert not seen
    for path in (tmp_path / "c").iterdir():
        assert path.suffix in (".json", ".safetensors")


def test_nan_weights_are_warned_of_and_saved(tmp_path):
    model, inputs = build("images")
    doll = mk.convert(model, inputs, sizes=SIZES)
    with torch.no_grad():
        doll.conv.weight[3, 2, 1, 1] = float("nan")
    with pytest.warns(CheckpointWarning, match=r"NaN.*conv\.weight.*finite.*Check the training"):
        mk.save(doll, tmp_path / "c")
    assert int(mk.load(tmp_path / "c").conv.weight.isnan().sum()) == 1


def test_sound_weights_are_not_warned_of(dolls, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mk.save(dolls["images", "masked"][0], tmp_path / "c")


def test_a_size_that_is_not_there_lists_the_sizes(saved):
    for size in (5, 32, "8", 0):
        with pytest.raises(MatryoshkafyError, match="4, 8, 16"):
            mk.load(saved / "tied-masked", size=size)


def test_what_is_no_doll_is_refused(tmp_path):
    with pytest.raises(MatryoshkafyError, match=r"Linear was given; expected .* Convert it first"):
        mk.save(nn.Linear(2, 2), tmp_path / "c")
    assert not any(tmp_path.iterdir())


def test_an_existing_folder_is_replaced_only_with_force(dolls, tmp_path):
    doll = dolls["tied", "masked"][0]
    mk.save(doll, tmp_path / "c")
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    with pytest.raises(MatryoshkafyError, match=r"not empty.*--force"):
        mk.save(mk.slice(doll, 4), tmp_path / "c")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    mk.save(mk.slice(doll, 4), tmp_path / "c", force=True)
    assert open_checkpoint(tmp_path / "c").kind == "submodel"


def test_operators_of_other_libraries_need_to_be_registered(tmp_path):
    with torch.library._scoped_library("mk_test_ops", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        library.impl("twice", lambda x: torch.empty_like(x), "Meta")

        class Doubling(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)

            def forward(self, x):
                return torch.ops.mk_test_ops.twice(self.b(torch.relu(self.a(x))))

        doll = mk.convert(Doubling(), (torch.randn(2, 4),), sizes=SIZES, nesting="sliced")
        mk.save(doll, tmp_path / "c")
        assert mk.load(tmp_path / "c").sizes == SIZES
    with pytest.raises(MatryoshkafyError, match=r"mk_test_ops.*not registered.*import"):
        mk.load(tmp_path / "c")


def assert_whole(folder):
    """The checkpoint is one of the two versions: every weight is its version's number."""
    loaded = mk.load(folder)
    values = {float(p.detach().flatten()[0]) for p in loaded.parameters()}
    assert len(values) == 1
    assert values <= {1.0, 2.0}
    return values.pop()


def versions(dolls):
    doll = dolls["tied", "masked"][0]
    filled = []
    for value in (1.0, 2.0):
        copy = mk.slice(doll, 16)
        with torch.no_grad():
            for parameter in copy.parameters():
                parameter.fill_(value)
        filled.append(copy)
    return filled


def forked(work):
    """Run a function in a child process; return its id and a pipe that it may write to."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    try:
        work(writer)
    finally:
        os._exit(0)


def kill_after(child, reader, seconds):
    """Kill a child some time after its first sign of life; the pipe never says more."""
    assert os.read(reader, 1)
    select.select([], [], [], seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_the_old_or_the_new_is_there(dolls, tmp_path):
    folder, chance, seen = tmp_path / "c", random.Random(3), set()
    first, second = versions(dolls)
    mk.save(first, folder)
    started = time.perf_counter()
    mk.save(first, folder, force=True)
    # Moments within three saves, however long one takes on this machine.
    within = 3 * (time.perf_counter() - started)

    def save_forever(writer):
        for model in itertools.cycle((second, first)):
            mk.save(model, folder, force=True)
            os.write(writer, b".")

    for _ in range(60):
        child, reader = forked(save_forever)
        kill_after(child, reader, chance.uniform(0, within))
        seen.add(assert_whole(folder))
    assert seen == {1.0, 2.0}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_before_each_step_of_a_save_the_old_or_the_new_is_there(dolls, tmp_path):
    folder = tmp_path / "c"
    first, second = versions(dolls)

    def save_until(stop_at):
        def work(_):
            steps = itertools.count()
            watched = ("open", "os.", "shutil.", "ctypes.dlsym")

            def hook(event, _):
                if event.startswith(watched) and next(steps) == stop_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            mk.save(second, folder, force=True)

        return work

    for step in itertools.count():
        mk.save(first, folder, force=True)
        child, reader = forked(save_until(step))
        _, status = os.waitpid(child, 0)
        os.close(reader)
        assert_whole(folder)
        if not os.WIFSIGNALED(status):
            break
    assert assert_whole(folder) == 2.0
    assert step > 20


NUMBERS = {
    "units": lambda plan: plan["scalars"][0].update(units=17),
    "power": lambda plan: plan["scalars"][0].update(power=0.25),
    "dropped": lambda plan: plan["scalars"].pop(),
    "ladder": lambda plan: plan["ladder"][0].__setitem__(0, plan["ladder"][0][0] + 1),
}


@pytest.mark.parametrize("what", list(NUMBERS))
def test_a_number_of_the_plan_that_changed_on_disk_is_refused(what, tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(3, 16), nn.Linear(16, 5)

        def forward(self, x):
            return self.head(self.first(x) * self.first.out_features**0.5)

    x = torch.randn(2, 3)
    doll = mk.convert(Scaled().eval(), x, sizes=[4, 8, 16], nesting="sliced")
    manifest = mk.save(doll, tmp_path / "c") / "matryoshka.json"
    saved = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(saved))  # laid out in another way, it is the same
    torch.testing.assert_close(mk.load(tmp_path / "c")(x), doll(x))
    NUMBERS[what](saved["plan"])
    manifest.write_text(json.dumps(saved))
    with pytest.raises(MatryoshkafyError, match="its own SHA-256 differs"):
        mk.load(tmp_path / "c")
    with pytest.raises(MatryoshkafyError, match="its own SHA-256 differs"):
        mk.load(tmp_path / "c", size=4)
