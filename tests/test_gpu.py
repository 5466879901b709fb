"""On a CUDA device what was converted on the CPU computes the same: outputs, gradients, training,
ordering, files. Skipped elsewhere; `tests/fmrlrec/test_meta.py` finds constants left on the CPU
without a device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import matryoshkafy as mk
from matryoshkafy.training import Recipe, Replayed, Term, distil
from matryoshkafy.units.norm_scales import norm_scales
from tests.rules.test_table import Recurrent
from tests.zoo.judge import error_of, leaves, loss_of
from tests.zoo.required import REQUIRED

pytestmark = pytest.mark.gpu
TOLERANCE = 2e-3  # of the largest entry, float32, sums in another order


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Convolutions in float32, not in TF32, which is torch's default for them."""
    known = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = known


class Block(nn.Module):
    """Tokens to vectors: a pre-norm block with one attention, and a head that is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.before, self.after = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 40)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        h = self.before(x)
        x = x + self.attend(h, h, h, need_weights=False)[0]
        return self.head(x + self.down(torch.relu(self.up(self.after(x)))))


def ids(rows: int = 4) -> Tensor:
    return torch.randint(0, 40, (rows, 7), generator=torch.Generator().manual_seed(rows))


def doll_of(nesting: str = "sliced") -> Any:
    torch.manual_seed(0)
    return mk.convert(Block(), (ids(),), sizes=[8, 16, 32], nesting=nesting)


def there(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.cuda(), value)


def back(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.cpu(), value)


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.filterwarnings("ignore")
def test_every_size_and_gradient_is_that_of_the_cpu(name: str, nesting: str) -> None:
    from tests.zoo.registry import entries

    (entry,) = entries([name])
    model, args, kwargs = entry.build()
    doll = mk.convert(model, args, kwargs, sizes=[0.5, 1.0], nesting=nesting).eval()
    here, size = doll.outputs(*args, **kwargs), min(doll.sizes)
    loss_of(here[size]).backward()
    known = {n: p.grad for n, p in doll.named_parameters() if p.grad is not None}
    moved = copy.deepcopy(doll).cuda()
    moved.zero_grad()
    with torch.backends.cudnn.flags(enabled="lstm" not in name and "gru" not in name):
        found = moved.outputs(*there(args), **there(kwargs))  # cuDNN trains no layer in eval mode
        for each in doll.sizes:
            assert error_of(back(found[each]), here[each]) < TOLERANCE
        loss_of(back(found[size])).backward()
    # Of the whole: a key's bias has no gradient but rounding, since softmax does not see it.
    largest = max(float(g.abs().max()) for g in known.values())
    for n, p in moved.named_parameters():
        if n in known:
            assert p.grad is not None and p.grad.is_cuda, n
            assert float((p.grad.cpu() - known[n]).abs().max()) < 10 * TOLERANCE * largest, n


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_cudnn_takes_the_weights_that_were_cut(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 6)
    doll = mk.convert(Recurrent(kind), (x,), sizes=[4, 8]).train()
    moved = copy.deepcopy(doll).cuda()
    for size in doll.sizes:
        here, found = doll.outputs(x)[size], moved.outputs(x.cuda())[size]
        torch.testing.assert_close(found.cpu(), here, rtol=1e-4, atol=1e-4)
        found.sum().backward()


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
@pytest.mark.parametrize("half", [False, True])
def test_a_step_with_the_loss_that_never_stores_scores(nesting: str, half: bool) -> None:
    here = doll_of(nesting)
    moved = copy.deepcopy(here).cuda()
    loss = mk.MatryoshkaLoss(nn.CrossEntropyLoss(), sizes=here.sizes)
    want = loss(here.outputs(ids()), ids())
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        value = loss.cuda()(moved.outputs(ids().cuda()), ids().cuda())
    torch.testing.assert_close(value.cpu(), want, rtol=2e-2 if half else 1e-4, atol=0)
    value.backward()
    want.backward()
    for (name, a), b in zip(moved.named_parameters(), here.parameters(), strict=True):
        spread = b.grad.abs().max().clamp_min(1e-6)
        assert (a.grad.cpu() - b.grad).abs().max() / spread < (0.1 if half else 1e-3), name


@pytest.mark.parametrize("start", ["order", "rotate"])
def test_units_are_ordered_there_as_here(start: str) -> None:
    """Batches may lie on the CPU, as a data loader gives them."""
    here, batches = doll_of().eval(), [ids(8), ids(5)]
    moved = copy.deepcopy(here).cuda()
    reports = [getattr(mk, start)(doll, batches) for doll in (here, moved)]
    assert all(report.error < 1e-5 for report in reports)
    for size in here.sizes:
        a, b = (doll.outputs(x)[size] for doll, x in ((here, ids()), (moved, ids().cuda())))
        torch.testing.assert_close(b.cpu(), a, rtol=1e-3, atol=1e-3)
    factors = [norm_scales(doll, batches).at(8) for doll in (here, moved)]
    assert factors[0].keys() == factors[1].keys()
    for name, value in factors[0].items():
        assert abs(value - factors[1][name]) < 1e-3 * abs(value)


@pytest.mark.parametrize("given", ["vectors", "module", "copy"])
def test_distillation_goes_where_the_doll_is(given: str, tmp_path: Path) -> None:
    """Rows, and a teacher's vectors, may lie on the CPU."""
    doll, teacher = doll_of().eval().cuda(), Block().eval()
    data = list(ids(32))
    with torch.no_grad():
        vectors = teacher(torch.stack(data))
    lessons = {"vectors": vectors, "module": teacher.cuda(), "copy": None}[given]
    recipe = Recipe(steps=12, batch=16, rate=1e-2, save=6, terms=(Term("mse"),))
    report = distil(doll, lessons, data, recipe, collate=torch.stack, folder=tmp_path / "run")
    if given != "copy":
        assert all(report.last[m] < report.first[m] for m in doll.sizes)
    assert all(p.is_cuda for p in doll.parameters())


@pytest.mark.parametrize("nesting", ["sliced", "masked"])
def test_recorded_steps_are_the_steps(nesting: str) -> None:
    """Dropout aside a replayed step gives what the step gives, for each shape of a batch."""
    here = doll_of(nesting).cuda().eval()
    there = copy.deepcopy(here)

    def steps(doll: Any, *, records: bool) -> Replayed:
        loss = mk.MatryoshkaLoss(nn.CrossEntropyLoss(), sizes=doll.sizes)

        def backward(x: Tensor) -> Tensor:
            value = loss(doll.outputs(x), x)
            value.backward()
            return value.detach()

        adam = torch.optim.AdamW(doll.parameters(), lr=1e-3, capturable=True)
        return Replayed(backward, adam, 1.0, records=records)

    ours, plain = steps(here, records=True), steps(there, records=False)
    for number in range(16):
        x = ids(4 + number % 2).cuda()
        for step in (ours, plain):
            step.set_rates([1e-3 / (1 + number)])
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-3, atol=1e-4)
    assert len(ours.recordings) == 2 and not plain.recordings


def test_slices_files_and_classes_of_a_doll_that_lies_there(tmp_path: Path) -> None:
    doll = doll_of("masked").cuda().eval()
    want = doll.outputs(ids().cuda())[16].cpu()
    mk.save(doll, tmp_path / "doll")
    for small in (mk.slice(doll, 16).cpu(), mk.load(tmp_path / "doll", size=16)):
        torch.testing.assert_close(small(ids()), want, rtol=1e-4, atol=1e-4)
    assert all(leaf.is_cuda for leaf in leaves(doll.outputs(ids().cuda())[8]))
    assert mk.verify(doll, (ids().cuda(),)).passed
