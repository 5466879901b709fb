"""What an outsider can tell of a doll: checks that use the model, the public verbs and arithmetic.

Nothing here reads a plan or a graph: the user's model run eagerly is the truth, and which entries
of a parameter a size keeps is read off a slice of numbered weights. A check raises `Wrong`; an
error of the library's own is a refusal; any other exception is a crash.

    python -m tests.zoo.judge published_unisrec        # one entry in both nestings, check by check
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import matryoshkafy as mk
from tests.zoo.registry import Built, Entry, entries

RATIOS = (0.5, 1.0)
TOLERANCE, GRADIENTS = 1e-4, 1e-3
DROPOUTS = ("dropout", "dropout_p", "dropout_rate", "attn_dropout", "drop_prob", "drop", "p_drop")
DRAWN = ("identity", "gradients", "input", "training", "beyond")
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Wrong(AssertionError):
    """A doll that answers, but not what the model answers."""


@dataclass(frozen=True)
class Case:
    """A doll beside the model that it was made of, and the example call."""

    entry: Entry
    model: nn.Module
    doll: Any
    call: Call

    @property
    def small(self) -> int:
        """The smallest size."""
        return self.doll.sizes[0]

    @cached_property
    def cut(self) -> nn.Module:
        """The slice of the smallest size, in evaluation mode; checks leave the doll as it was."""
        return mk.slice(self.doll, self.small)


@dataclass
class Verdict:
    """What became of one model in one nesting: right, refused, wrong or crash, check by check."""

    name: str
    family: str
    nesting: str
    status: str = "right"
    checks: dict[str, str] = field(default_factory=dict)
    share: float | None = None

    def note(self, check: str, outcome: str) -> None:
        """Keep the outcome of a check; the worst one is the status."""
        self.checks[check] = outcome
        kind = outcome.partition(":")[0]
        order = ("right", "refused", "crash", "wrong")
        if kind in order and (kind != "refused" or check == "convert"):
            self.status = max(self.status, kind, key=order.index)


def judge(entry: Entry, nesting: str, only: Collection[str] = ()) -> Verdict:
    """Convert one entry and run the checks named, or every check that applies to the nesting.

    What is wrong in float32 is judged again in float64: some models magnify a rounding a
    thousandfold. A doll that is right there is right, and what float32 said stays in its checks.
    """
    verdict = _judged(entry, nesting, only)
    if verdict.status != "wrong":
        return verdict
    again = _judged(doubled(entry), nesting, only)
    if again.status != "right":
        return verdict
    wrong = (f"{k} {v}" for k, v in verdict.checks.items() if v.startswith("wrong"))
    again.note("float32", f"said: {'; '.join(wrong)}; right in float64")
    return again


def doubled(entry: Entry) -> Entry:
    """Return an entry whose model and floating inputs are of float64."""

    def build() -> Built:
        model, args, kwargs = entry.build()
        args, kwargs = pytree.tree_map_only(Tensor, widened, (args, kwargs))
        return model.double(), args, kwargs

    remade = entry.rebuild
    rebuild = None if remade is None else lambda ratio: remade(ratio).double()
    return replace(entry, build=build, rebuild=rebuild)


def widened(value: Tensor) -> Tensor:
    """Return a floating tensor in float64, any other as it is."""
    return value.double() if value.is_floating_point() else value


def _judged(entry: Entry, nesting: str, only: Collection[str]) -> Verdict:
    verdict = Verdict(entry.name, entry.family, nesting)
    model, args, kwargs = entry.build()
    before = snapshot(model)
    try:
        doll = mk.convert(model, args, kwargs, sizes=list(RATIOS), nesting=nesting)
    except Exception as error:  # noqa: BLE001  whatever a library raises is an outcome here
        verdict.note("convert", outcome_of(error))
        verdict.note("unchanged", _outcome(lambda: unchanged(before, model)))
        return verdict
    case = Case(entry, model, doll, (args, kwargs))
    verdict.note("convert", "right")
    verdict.note("unchanged", _outcome(lambda: _untouched(case, before)))
    for name, check in (SLICED if nesting == "sliced" else MASKED).items():
        if only and name not in only:
            continue
        outcome = _outcome(lambda check=check: check(case))
        # A draw that nothing reads is left out of the graph: the draws after it are then others.
        if "random" in entry.tags and name in DRAWN and outcome.startswith("wrong"):
            outcome = "none: draws random numbers"
        verdict.note(name, outcome)
    verdict.share = _share(case) if verdict.checks.get("slice") == "right" else None
    return verdict


def _outcome(check: Callable[[], str | None]) -> str:
    try:
        return check() or "right"
    except Exception as error:  # noqa: BLE001  whatever a library raises is an outcome here
        return outcome_of(error)


def outcome_of(error: Exception) -> str:
    """Return the kind of an outcome and its first line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    text = f"{type(error).__name__}: {lines[0][:300]}"
    if isinstance(error, Wrong):
        return f"wrong: {lines[0][:300]}"
    if isinstance(error, mk.MatryoshkafyError):
        return f"refused: {text}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"crash: {text} [{place.filename.rpartition('site-packages/')[2]}:{place.lineno}]"


# --- truth -------------------------------------------------------------------------------------


def run(model: Any, call: Call, *, seed: int = 0) -> Any:
    """Return the outputs of a call, with the random numbers of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(*call[0], **call[1])


def at_size(case: Case, call: Call) -> Any:
    """Return the doll's output of the small size; what is computed late has the same seed."""
    return run(lambda *args, **kwargs: case.doll.outputs(*args, **kwargs)[case.small], call)


def leaves(outputs: Any) -> list[Tensor]:
    """Return the tensors of an output."""
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def error_of(given: Any, expected: Any) -> float:
    """Return the largest difference of two outputs, relative to each tensor's largest value."""
    a, b = leaves(given), leaves(expected)
    if [t.shape for t in a] != [t.shape for t in b]:
        raise Wrong(f"shapes {[tuple(t.shape) for t in a]}, not {[tuple(t.shape) for t in b]}")
    return max((_tensor_error(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def _tensor_error(x: Tensor, y: Tensor) -> float:
    x, y = (t.detach().to_dense() if t.layout != torch.strided else t.detach() for t in (x, y))
    if not (y.is_floating_point() or y.is_complex()):
        return 0.0 if torch.equal(x, y) else math.inf
    wide = torch.complex128 if y.is_complex() else torch.float64
    x, y = x.to(wide), y.to(wide)
    same = (x == y) | (x.isnan() & y.isnan())
    if bool(same.all()):
        return 0.0
    finite = y[y.isfinite()].abs()
    gap = float((x - y).abs()[~same].max()) / max(
        float(finite.max()) if len(finite) else 0.0, 1e-30
    )
    return gap if gap == gap else math.inf


def close(given: Any, expected: Any, what: str, tolerance: float = TOLERANCE) -> None:
    """Raise `Wrong` where two outputs differ; in float64 by far less."""
    error = error_of(given, expected)
    if not error <= tolerance * _sharpness(expected):
        raise Wrong(f"{what} differs by {error:.1e}")


def _sharpness(expected: Any) -> float:
    floats = [t for t in leaves(expected) if t.is_floating_point() or t.is_complex()]
    exact = floats and all(t.dtype in (torch.float64, torch.complex128) for t in floats)
    return 1e-5 if exact else 1.0


def loss_of(outputs: Any) -> Tensor:
    """Return a fixed random projection of every float output."""
    draw = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    for t in leaves(outputs):
        if t.requires_grad:
            real = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
            total = total + (real.double() * torch.randn(real.shape, generator=draw)).sum()
    return total


def gradients(model: nn.Module, outputs: Any) -> dict[str, Tensor]:
    """Return the gradient of every parameter; zeros where nothing reads it."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = loss_of(outputs)
    if not loss.requires_grad:
        return {n: torch.zeros_like(p) for n, p in named.items()}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    pairs = zip(named.items(), found, strict=True)
    return {n: torch.zeros_like(p) if g is None else g.to_dense() for (n, p), g in pairs}


def same_gradients(given: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Raise `Wrong` where a gradient differs by more than rounding."""
    if given.keys() != expected.keys():
        raise Wrong(f"{what}: parameters {sorted(given.keys() ^ expected.keys())[:3]} on one side")
    largest = max((float(g.abs().max()) for g in expected.values() if g.numel()), default=0.0)
    for name, wanted in expected.items():
        if not wanted.numel():
            continue
        scale = max(float(wanted.abs().max()), 1e-3 * largest, 1e-30)
        error = float((given[name] - wanted).abs().max()) / scale
        if not error <= GRADIENTS and bool(wanted.isfinite().all()):
            raise Wrong(f"{what} of {name} differs by {error:.1e}")


# --- what is checked ---------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything of a model that a conversion must leave alone, and the random states."""
    state = {n: t.detach().clone() for n, t in _tensors(model)}
    modes = {n: m.training for n, m in model.named_modules()}
    plain = {n: _attributes(m) for n, m in model.named_modules()}
    return {"state": state, "modes": modes, "plain": plain, "random": _random_state()}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that are numbers, words, tensors or None."""
    plain = (int, float, str, bool, type(None))
    kept = {n: v for n, v in vars(module).items() if isinstance(v, plain) or torch.is_tensor(v)}
    return {n: v.detach().clone() if torch.is_tensor(v) else v for n, v in kept.items()}


def _random_state() -> Any:
    legacy = np.random.get_state()  # noqa: NPY002  the global state is what must not move
    return torch.get_rng_state(), random.getstate(), str(legacy)


def _untouched(case: Case, before: dict[str, Any]) -> None:
    """Neither converting nor slicing nor saving changes the user's model; nor does a refusal."""
    with contextlib.suppress(Exception), tempfile.TemporaryDirectory() as folder:
        mk.slice(case.doll, case.small)
        mk.save(case.doll, Path(folder) / "doll")
    unchanged(before, case.model)


def unchanged(before: dict[str, Any], model: nn.Module) -> None:
    """Raise `Wrong` where anything of the user's model differs, bit for bit."""
    now = snapshot(model)
    for name, tensor in before["state"].items():
        if name not in now["state"] or not _identical(tensor, now["state"][name]):
            raise Wrong(f"the user's {name} was changed")
    if before["modes"] != now["modes"]:
        raise Wrong("the training mode of a module was changed")
    for name, kept in before["plain"].items():
        changed = {
            k
            for k in kept.keys() | now["plain"][name].keys()
            if _moved(kept, now["plain"][name], k)
        }
        if changed:
            raise Wrong(f"attributes {sorted(changed)[:3]} of module {name!r} were changed")
    if not torch.equal(before["random"][0], now["random"][0]):
        raise Wrong("the random state of torch moved")
    if before["random"][1:] != now["random"][1:]:
        raise Wrong("the random state of Python or numpy moved")


def _moved(before: dict[str, Any], after: dict[str, Any], name: str) -> bool:
    if name not in before or name not in after:
        return True
    a, b = before[name], after[name]
    return not _identical(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else bool(a != b)


def _identical(a: Tensor, b: Tensor) -> bool:
    if a.layout != torch.strided or b.layout != torch.strided:
        a, b = a.to_dense(), b.to_dense()
    return (
        a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    )


def identity(case: Case) -> None:
    """At full width a sliced doll is the model."""
    with torch.no_grad():
        close(run(case.doll, case.call), run(case.model, case.call), "full width")


def model_gradients(case: Case) -> str | None:
    """At full width its gradients are the model's, in evaluation mode."""
    try:
        wanted = gradients(case.model, run(case.model, case.call))
    except Exception as error:  # noqa: BLE001  the model itself cannot be trained like this
        return f"none: the model's own gradient fails ({type(error).__name__})"
    try:
        same_gradients(gradients(case.doll, run(case.doll, case.call)), wanted, "the gradient")
    except Wrong as error:
        return _said(case, error)
    return None


def input_gradients(case: Case) -> str | None:
    """So are the gradients of float inputs (gradient reversal, detached inputs)."""
    grown, floats = pytree.tree_map(_leaf, case.call), []
    floats = [t for t in leaves(grown) if t.requires_grad]
    if not floats:
        return "none: no float input"
    found = []
    for model in (case.model, case.doll):
        loss = loss_of(run(model, grown))
        given = torch.autograd.grad(loss, floats, allow_unused=True) if loss.requires_grad else ()
        grads = {str(i): torch.zeros_like(t) for i, t in enumerate(floats)}
        found.append(grads | {str(i): g for i, g in enumerate(given) if g is not None})
    try:
        same_gradients(found[1], found[0], "the gradient of input")
    except Wrong as error:
        return _said(case, error)
    return None


def _leaf(value: Any) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point() and not value.is_sparse
    return value.detach().clone().requires_grad_() if floats else value


def training_step(case: Case) -> str | None:
    """In training mode outputs, gradients and statistics are the model's."""
    before = {n: t.detach().clone() for n, t in _tensors(case.model)}
    try:
        return _trained_alike(case)
    except Wrong:
        if not _has_dropout(case.model):
            raise
    finally:
        _restore(case.model, before)
        case.model.eval()
        case.doll.eval()
    # Dropout may be drawn in another order: judged once more without it.
    model, args, kwargs = case.entry.build()
    without_dropout(model)
    doll = mk.convert(model, args, kwargs, sizes=list(RATIOS), nesting="sliced")
    return _trained_alike(Case(case.entry, model, doll, (args, kwargs)))


def _trained_alike(case: Case) -> str | None:
    before = {n: t.detach().clone() for n, t in _tensors(case.model)}
    try:
        wanted = run(case.model.train(), case.call)
    except Exception:  # noqa: BLE001  models that need targets to train
        return "none: the model does not run in training mode"
    grads = gradients(case.model, wanted)
    kept = case.model.state_dict()  # caches that are not part of the state are the model's own
    after = {n: t.clone() for n, t in case.model.named_buffers() if n in kept}
    _restore(case.model, before)
    try:
        given = run(case.doll.train(), case.call)
        close(given, wanted, "training mode")
        same_gradients(gradients(case.doll, given), grads, "training gradient")
        _same_buffers(case.doll, after)
    except Wrong as error:
        return _said(case, error)
    return None


def _said(case: Case, error: Wrong) -> str:
    """Return that the plan's remarks own up to it; raise the error where they are silent."""
    owned = ("gradient", "train", "inference")
    if any(word in remark for remark in case.doll.plan.remarks for word in owned):
        return f"said: {error}"
    raise error


def _has_dropout(model: nn.Module) -> bool:
    rates = [m.p for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    named = [vars(m).get(n) for m in model.modules() for n in DROPOUTS]
    return any(isinstance(rate, float) and rate > 0 for rate in (*rates, *named))


def _same_buffers(doll: nn.Module, buffers: dict[str, Tensor]) -> None:
    mine = dict(doll.named_buffers())
    for name, wanted in buffers.items():
        if name in mine and wanted.is_floating_point():
            close(mine[name], wanted, f"buffer {name} after a training step", GRADIENTS)


def without_dropout(model: nn.Module) -> None:
    """Set every rate of dropout to zero."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in DROPOUTS:
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


def more_rows(call: Call) -> Call | None:
    """Return the call with one row more; None where no tensor has rows."""
    rows = [t.shape[0] for t in leaves(call) if t.dim()]
    if not rows:
        return None
    batch = max(set(rows), key=rows.count)
    index = torch.arange(batch + 1) % batch

    def grown(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.dim() and value.shape[0] == batch
        return value.index_select(0, index) if fits and not value.is_sparse else value

    return pytree.tree_map(grown, call)


def longer(call: Call) -> Call | None:
    """Return the call with two positions more along dim 1 of ids and of [B, L, C]."""
    tensors = [t for t in leaves(call) if t.dim() >= 2]
    if not tensors:
        return None
    length = tensors[0].shape[1]
    index = torch.cat([torch.arange(length), torch.arange(2) % length])

    def grown(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_sparse or value.dim() < 2:
            return value
        token_like = value.dim() == 3 or not value.is_floating_point()
        return value.index_select(1, index) if token_like and value.shape[1] == length else value

    return pytree.tree_map(grown, call)


def other_shape(case: Case, change: Callable[[Call], Call | None]) -> str | None:
    """A call of another shape that the model takes is answered rightly or refused by name."""
    call = change(case.call)
    if "random" in case.entry.tags:
        return "none: draws random numbers"
    if call is None or _shapes(call) == _shapes(case.call):
        return "none: no such dim"
    with torch.no_grad():
        try:
            wanted = run(case.model, call)
        except Exception:  # noqa: BLE001  the model itself refuses
            return "none: the model itself takes no other"
        if not case.doll.plan.masked:
            close(run(case.doll, call), wanted, "another shape")
        given = at_size(case, call)
        close(given, run(case.cut, call), "another shape at the small size")
        if [t.shape for t in leaves(given)] != [t.shape for t in leaves(wanted)]:
            _same_rows(given, wanted, case)
    return None


def _same_rows(given: Any, wanted: Any, case: Case) -> None:
    """Where outputs nest, the dims that do not must still be the model's."""
    example = leaves(run(case.model, case.call))
    small = leaves(at_size(case, case.call))
    for g, w, e, s in zip(leaves(given), leaves(wanted), example, small, strict=True):
        for dim in range(w.dim()):
            if e.shape[dim] == s.shape[dim] and g.shape[dim] != w.shape[dim]:
                raise Wrong(f"another shape: output {tuple(g.shape)} where {tuple(w.shape)} is due")


def _shapes(call: Call) -> list[torch.Size]:
    return [t.shape for t in leaves(call)]


def other_values(case: Case) -> str | None:
    """The same shapes with other values: rows in another order, floats moved."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_sparse or not value.dim():
            return value
        turned = value.flip(0)
        return 0.9 * turned + 0.1 if value.is_floating_point() else turned

    call = pytree.tree_map(moved, case.call)
    if "random" in case.entry.tags:
        return "none: draws random numbers"
    with torch.no_grad():
        try:
            wanted = run(case.model, call)
        except Exception:  # noqa: BLE001  the model itself refuses
            return "none: the model itself takes no other"
        if not case.doll.plan.masked:
            close(run(case.doll, call), wanted, "the answer to other values")
        alone = run(case.cut, call)
        close(at_size(case, call), alone, "the small answer to other values")
    return None


def other_batch(case: Case) -> str | None:
    """One row more."""
    return other_shape(case, more_rows)


def other_length(case: Case) -> str | None:
    """Two positions more."""
    return other_shape(case, longer)


def slices(case: Case) -> None:
    """A slice runs alone, equals the doll's output of its size, and is smaller."""
    with torch.no_grad():
        small = case.cut
        given = at_size(case, case.call)
        alone = run(small, case.call)
        # One masked pass draws numbers for all units, a slice for its own: they cannot be equal.
        if not (case.doll.plan.masked and "random" in case.entry.tags):
            close(alone, given, "the slice")
    whole = dict(case.model.named_parameters(remove_duplicate=False))
    for name, tensor in small.named_parameters():
        if name in whole and any(
            a > b for a, b in zip(tensor.shape, whole[name].shape, strict=True)
        ):
            raise Wrong(f"{name} of the slice is {tuple(tensor.shape)}")
    extra = [n for n in small.state_dict() if n not in case.model.state_dict()]
    if extra:
        raise Wrong(f"the slice has keys that the model has not: {extra[:3]}")


def _share(case: Case) -> float:
    parts = [sum(p.numel() for p in m.parameters()) for m in (case.cut, case.model)]
    return parts[0] / max(1, parts[1])


def native(case: Case) -> str | None:
    """A slice of half the width is the same class built from the smaller config."""
    if case.entry.rebuild is None or "no-native" in case.entry.tags:
        return "none: no smaller config"
    small, truth = case.cut, case.entry.rebuild(RATIOS[0])
    shapes = {n: tuple(t.shape) for n, t in truth.state_dict().items()}
    differing = [f"{n} {tuple(t.shape)} not {shapes[n]}" for n, t in small.state_dict().items()
                 if n in shapes and tuple(t.shape) != shapes[n]]  # fmt: skip
    if differing:
        return f"shapes: {'; '.join(differing[:3])}"
    truth.load_state_dict(small.state_dict(), strict=False)
    with torch.no_grad():
        close(run(small, case.call), run(truth.eval(), case.call), "the native small class")
    return None


def beyond(case: Case) -> None:
    """What a size does not keep does not move it, and gets no gradient from it."""
    kept = kept_entries(case)
    given = at_size(case, case.call)
    for name, gradient in gradients(case.doll, given).items():
        outside = gradient[~kept[name]] if name in kept else gradient[:0]
        if outside.numel() and float(outside.abs().max()) > 0:
            raise Wrong(f"a small size sends gradients to entries of {name} that it does not keep")
    before = {n: t.detach().clone() for n, t in _tensors(case.doll)}
    try:
        _disturb(case.doll, kept)
        with torch.no_grad():
            moved = at_size(case, case.call)
        close(moved, given, "a small size under noise beyond its prefix", 1e-5)
    finally:
        _restore(case.doll, before)


def kept_entries(case: Case) -> dict[str, Tensor]:
    """Number every entry of the weights, slice, and see which numbers come out: {name: mask}."""
    before = {n: t.detach().clone() for n, t in _tensors(case.doll)}
    plain = {n: t for n, t in _tensors(case.doll) if _countable(t)}
    try:
        with torch.no_grad():
            for tensor in plain.values():
                tensor.copy_(torch.arange(1, tensor.numel() + 1).view(tensor.shape))
            small = dict(mk.slice(case.doll, case.small).state_dict())
    finally:
        _restore(case.doll, before)
    return {n: _found(t, small[n]) for n, t in plain.items() if n in small}


def _countable(tensor: Tensor) -> bool:
    return (
        tensor.dtype in (torch.float32, torch.float64)
        and 0 < tensor.numel() < 2**23
        and tensor.is_contiguous()
    )


def _found(whole: Tensor, part: Tensor) -> Tensor:
    kept = torch.ones(whole.shape, dtype=torch.bool)
    numbers = part.detach().flatten().double()
    exact = bool((numbers == numbers.round()).all()) and bool((numbers <= whole.numel()).all())
    if not exact or bool((numbers < 0).any()):
        return kept  # a reparametrised weight: its cut is not made of its entries
    flat = torch.zeros(whole.numel() + 1, dtype=torch.bool)
    flat[numbers.long()] = True
    return flat[1:].view(whole.shape)


def _disturb(doll: nn.Module, kept: dict[str, Tensor]) -> None:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in _tensors(doll):
            if name in kept and not bool(kept[name].all()):
                scale = float(tensor.abs().mean().clamp(min=1e-3))
                noise = scale * torch.randn(tensor.shape, generator=draw)
                noise = noise.abs() + scale / 2 if bool((tensor >= 0).all()) else noise
                tensor.copy_(torch.where(kept[name], tensor, noise.to(tensor.dtype)))


def _restore(doll: nn.Module, before: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _tensors(doll):
            tensor.copy_(before[name])


def all_sizes_step(case: Case) -> None:
    """Every size trains: one step of gradients over all of them, in training mode."""
    before = {n: t.detach().clone() for n, t in _tensors(case.doll)}
    case.doll.train()
    try:
        sizes = case.doll.sizes
        outputs = run(lambda *a, **k: dict(case.doll.outputs(*a, **k).items()), case.call)
        loss = torch.stack([loss_of(outputs[s]) for s in sizes]).sum()
        named = [p for p in case.doll.parameters() if p.requires_grad]
        if named and loss_of(run(case.model, case.call)).requires_grad:
            given = (
                torch.autograd.grad(loss, named, allow_unused=True) if loss.requires_grad else ()
            )
            if not any(g is not None and bool((g != 0).any()) for g in given):
                raise Wrong("a step over all sizes has no gradient")
    finally:
        _restore(case.doll, before)  # running statistics moved, and a slice was cut before
        case.doll.eval()


def saved(case: Case) -> None:
    """A checkpoint is the doll, and its small size the slice, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "doll"
        try:
            mk.save(case.doll, path)
            loaded, small = mk.load(path), mk.load(path, size=case.small)
        except mk.MatryoshkafyError as error:
            raise Wrong(f"a doll that convert returned is not saved and loaded: {error}") from error
    ours, theirs = case.doll.state_dict(), loaded.state_dict()
    if ours.keys() != theirs.keys() or not all(_identical(ours[k], theirs[k]) for k in ours):
        raise Wrong("the loaded doll has another state")
    with torch.no_grad():
        close(run(loaded, case.call), run(case.doll, case.call), "the loaded doll", 1e-9)
        close(run(small, case.call), run(case.cut, case.call), "the loaded small size", 1e-9)


SLICED: dict[str, Callable[[Case], str | None]] = {
    "identity": identity,
    "gradients": model_gradients,
    "input": input_gradients,
    "slice": slices,
    "native": native,
    "beyond": beyond,
    "values": other_values,
    "batch": other_batch,
    "length": other_length,
    "training": training_step,
    "step": all_sizes_step,
    "saved": saved,
}
MASKED: dict[str, Callable[[Case], str | None]] = {
    "slice": slices,
    "beyond": beyond,
    "values": other_values,
    "batch": other_batch,
    "length": other_length,
    "step": all_sizes_step,
    "saved": saved,
}


def main() -> None:
    """Print the verdicts of the entries named."""
    for entry in entries(sys.argv[1:]):
        for nesting in ("sliced", "masked"):
            verdict = judge(entry, nesting)
            print(f"{verdict.name} {nesting}: {verdict.status}, share {verdict.share}")
            for check, outcome in verdict.checks.items():
                print(f"    {check:10} {outcome}")


def exports(built: Built) -> bool:
    """Tell whether a plain torch.export takes the model as it is."""
    model, args, kwargs = built
    try:
        torch.export.export(model, args, kwargs, strict=False)
    except Exception:  # noqa: BLE001  torch.export raises errors of every kind
        return False
    return True


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
