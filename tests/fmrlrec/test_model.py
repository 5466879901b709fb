"""The recommender: what it imports, what padding may touch, steps against the whole sequence."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch

from examples.fmrlrec import model as module
from examples.fmrlrec.model import FeatureItems, LinearRecurrentUnit, Recommender, Shape

SHAPE = Shape(items=20, width=8)


def build(kind: str = "id") -> Recommender:
    torch.manual_seed(0)
    features = None if kind == "id" else torch.randn(21, 6)
    built = Recommender(SHAPE, features, trainable_features=kind == "trainable")
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built.double().eval()


@pytest.mark.parametrize("name", ["model.py", "scan.py"])
def test_model_imports_nothing_of_the_library(name: str) -> None:
    tree = ast.parse((Path(module.__file__).parent / name).read_text("utf-8"))
    imported = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    imported += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    roots = {"__future__", "dataclasses", "math", "torch", "typing", "examples"}
    assert {name.split(".")[0] for name in imported} <= roots
    assert {n for n in imported if n.startswith("examples")} <= {"examples.fmrlrec.scan"}


@pytest.mark.parametrize("kind", ["id", "frozen", "trainable"])
def test_scores_cover_all_items_and_padding(kind: str) -> None:
    assert build(kind)(torch.randint(1, 21, (3, 5))).shape == (3, 5, 21)


def test_features_are_a_buffer_unless_trainable() -> None:
    features = torch.randn(21, 6)
    assert "features" not in dict(FeatureItems(features, 4).named_parameters())
    assert "features" in dict(FeatureItems(features, 4, trainable=True).named_parameters())


@pytest.mark.parametrize("padding", [1, 4, 30])
def test_left_padding_never_leaks(padding: int) -> None:
    built = build("frozen")
    sequences = torch.randint(1, 21, (3, 5))
    padded = torch.nn.functional.pad(sequences, (padding, 0))
    torch.testing.assert_close(built(padded)[:, padding:], built(sequences))
    with torch.no_grad():
        built.items.features[0] += 100.0  # type: ignore[index]
    torch.testing.assert_close(built(padded)[:, padding:, 1:], built(sequences)[..., 1:])


def test_sequences_may_share_a_row() -> None:
    built = build("frozen")
    first, second = torch.randint(1, 21, (1, 4)), torch.randint(1, 21, (1, 6))
    shared = torch.cat((first, torch.zeros(1, 1, dtype=torch.int64), second), 1)
    scores = built(shared)
    torch.testing.assert_close(scores[:, :4], built(first))
    torch.testing.assert_close(scores[:, 5:], built(second))


def test_no_position_sees_the_future() -> None:
    built, sequences = build(), torch.randint(1, 20, (2, 6))
    changed = sequences.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(built(changed)[:, :4], built(sequences)[:, :4])


@pytest.mark.parametrize("kind", ["id", "frozen"])
def test_steps_give_the_scores_of_the_whole_sequence(kind: str) -> None:
    built = build(kind)
    sequences = torch.nn.functional.pad(torch.randint(1, 21, (3, 6)), (2, 0))
    whole, states = built(sequences), built.start(3)
    for t in range(sequences.shape[1]):
        hidden, states = built.advance(sequences[:, t], states, built.items())
        scores = torch.nn.functional.linear(hidden, built.items(), built.bias)
        torch.testing.assert_close(scores[:, 1:], whole[:, t, 1:])


@pytest.mark.parametrize("r_min", [0.0, 0.4, 0.8])
def test_ring_initialisation(r_min: float) -> None:
    torch.manual_seed(0)
    unit = LinearRecurrentUnit(4, 4096, r_min)
    radius = unit.transition().double().norm(dim=-1)
    assert radius.min() >= r_min - 1e-6 and radius.max() <= r_min + module.RING + 1e-6
    # Uniform in area: the mean squared radius lies midway between the squared bounds.
    middle = (r_min**2 + (r_min + module.RING) ** 2) / 2
    assert math.isclose(radius.square().mean().item(), middle, rel_tol=0.05)
    gamma = unit.gamma_log.double().exp()
    torch.testing.assert_close(gamma, (1 - radius**2).sqrt(), rtol=1e-4, atol=1e-4)


def test_recurrence_is_the_complex_one() -> None:
    """y = Re(C h), h_t = lambda h_{t-1} + gamma B x_t, written out in complex128."""
    torch.manual_seed(1)
    unit = LinearRecurrentUnit(4, 3, 0.5).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    paired = unit.in_proj.weight.unflatten(0, (-1, 2))
    b = torch.complex(paired[:, 0], paired[:, 1])
    shift = torch.view_as_complex(unit.in_proj.bias.unflatten(0, (-1, 2)).contiguous())
    columns = unit.out_proj.weight.unflatten(1, (-1, 2))
    c = torch.complex(columns[..., 0], -columns[..., 1])
    lam = torch.view_as_complex(unit.transition())
    h = torch.zeros(2, 3, dtype=torch.complex128)
    for t in range(5):
        h = lam * h + unit.gamma_log.exp() * (x[:, t].to(b.dtype) @ b.t() + shift)
    expected = (h @ c.t()).real + unit.out_proj.bias
    found = unit(x, torch.ones(2, 5, dtype=torch.bool))[:, -1]
    torch.testing.assert_close(found, expected)


def test_model_exports_and_compiles_to_the_same_values() -> None:
    built, sequences = build("frozen"), torch.randint(0, 21, (3, 5))
    exported = torch.export.export(built, (sequences,), strict=False).module()
    torch.testing.assert_close(exported(sequences), built(sequences))
