"""Funnels against brute force in float64, with what they cost; tables and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from matryoshkafy.serving import (
    ServingError,
    ShortIndex,
    Vectors,
    exact,
    fit_rotation,
    funnel,
    train_rotation,
    tune,
)
from matryoshkafy.serving.funnel import products
from matryoshkafy.serving.metrics import ndcg_of, recall_of, reciprocal_rank_of
from matryoshkafy.serving.select import best_of
from matryoshkafy.serving.tune import candidates, frontier, judged, measured

SIZES = (4, 8, 16, 32)


def table(rows: int, seed: int, model: str = "m") -> Vectors:
    """Vectors whose first units tell more than the later ones."""
    values = np.random.default_rng(seed).normal(size=(rows, SIZES[-1]))
    return Vectors(values / np.arange(1, SIZES[-1] + 1) ** 0.5, SIZES, model)


def cosines(queries: Vectors, documents: Vectors, size: int) -> np.ndarray:
    """All cosines of the prefixes, in float64, one row of each at a time."""
    a, b = (v.values[:, :size].astype(np.float64) for v in (queries, documents))
    return np.array([[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in b] for x in a])


@pytest.mark.parametrize("size", SIZES)
def test_exact_search_is_brute_force(size: int) -> None:
    queries, documents = table(7, 0), table(150, 1)
    wanted = cosines(queries, documents, size)
    found = exact(queries, documents, size=size, k=5)
    assert np.array_equal(found.ids, np.argsort(-wanted, axis=1)[:, :5])
    np.testing.assert_allclose(found.scores, np.sort(wanted, axis=1)[:, :-6:-1], atol=1e-6)
    assert found.products == 150 * size


def test_a_funnel_is_brute_force_stage_by_stage() -> None:
    queries, documents = table(9, 2), table(200, 3)
    found = funnel(queries, documents, sizes=[4, 16, 32], keep=[40, 12, 5], batch=4)
    for row, query in enumerate(range(len(queries))):
        left = np.arange(200)
        for size, kept in ((4, 40), (16, 12), (32, 5)):
            scores = cosines(queries, documents, size)[query, left]
            left = left[np.argsort(-scores)[:kept]]
        assert found.ids[row].tolist() == left.tolist()
    assert found.products == 200 * 4 + 40 * 12 + 12 * 16


def test_a_list_longer_than_the_table_is_the_table() -> None:
    queries, documents = table(3, 4), table(6, 5)
    found = funnel(queries, documents, sizes=[4, 32], keep=[100, 50])
    assert np.array_equal(found.ids, np.argsort(-cosines(queries, documents, 32), axis=1))


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "usearch"])
def test_an_index_that_looks_everywhere_finds_what_exact_search_finds(kind: str) -> None:
    pytest.importorskip("usearch" if kind == "usearch" else "faiss")
    queries, documents = table(20, 6), table(400, 7)
    index = ShortIndex.of(documents, 8, kind=kind, effort=400)
    found = funnel(queries, documents, sizes=[8, 32], keep=[60, 5], index=index)
    wanted = funnel(queries, documents, sizes=[8, 32], keep=[60, 5])
    assert recall_of(found.ids, wanted.ids) > 0.98
    with pytest.raises(ServingError, match="size 8 of model 'm'; the search begins with 400"):
        funnel(queries, documents, sizes=[4, 32], keep=[60, 5], index=index)


@pytest.mark.parametrize("codes", [2, 3, 4, 64])
def test_codes_of_units_that_do_not_divide_find_what_they_round(codes: int) -> None:
    pytest.importorskip("faiss")
    queries, documents = table(20, 6), table(400, 7)
    index = ShortIndex.of(documents, 8, kind="codes", effort=codes)
    found = funnel(queries, documents, sizes=[8, 32], keep=[200, 5], index=index)
    wanted = funnel(queries, documents, sizes=[8, 32], keep=[200, 5])
    assert recall_of(found.ids, wanted.ids) > 0.8
    assert found.products == 16 * 8 + min(codes, 4) * 400 + 200 * 32
    scores = cosines(queries, documents, 32)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, found.ids, 1), atol=1e-6)


def test_codes_in_cells_are_scored_anew_and_count_the_rows_they_read() -> None:
    pytest.importorskip("faiss")
    queries, documents = table(40, 6), table(2000, 7)  # three cells
    wanted = funnel(queries, documents, sizes=[8, 32], keep=[200, 5])
    fixed, every = (8 + 3 + 16) * 8 + 200 * 32, 4 * 2000
    recalls = []
    for cells in (1, 30):
        index = ShortIndex.of(documents, 8, kind="ivf-codes", effort=cells)
        found = funnel(queries, documents, sizes=[8, 32], keep=[200, 5], index=index)
        scores = np.take_along_axis(cosines(queries, documents, 32), found.ids, 1)
        np.testing.assert_allclose(found.scores, scores, atol=1e-6)
        assert (found.products == fixed + every) == (cells > 3)
        assert found.products <= fixed + every
        recalls.append(recall_of(found.ids, wanted.ids))
    assert recalls[0] < recalls[1] - 0.1 and recalls[1] > 0.9


def test_an_index_of_an_odd_size_is_widened() -> None:
    pytest.importorskip("faiss")
    values = np.random.default_rng(1).normal(size=(700, 9))
    documents = Vectors(values, (7, 9), "m")
    index = ShortIndex.of(documents, 7, kind="ivf-codes", effort=1)
    found = funnel(documents, documents, sizes=[7, 9], keep=[50, 1], index=index)
    assert (found.ids[:, 0] == np.arange(700)).mean() > 0.98


def test_an_index_is_followed_stage_by_stage() -> None:
    queries, documents = table(9, 2), table(200, 3)
    ids = np.argsort(-cosines(queries, documents, 4), axis=1)[:, :40]
    index = ShortIndex(4, lambda asked, k: (ids[:, :k], 7.0), "m", 200)
    for stages in ({"sizes": [4, 16, 32], "keep": [40, 12, 5]}, {"sizes": [4], "keep": [9]}):
        found = funnel(queries, documents, **stages, index=index)
        wanted = funnel(queries, documents, **stages)
        assert np.array_equal(found.ids, wanted.ids)
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-6)
    # One stage: what the index found is scored at its own size.
    assert found.products == 7 + 9 * 4


def test_what_an_index_does_not_find_is_no_document() -> None:
    queries, documents = table(2, 6), table(30, 7)
    ids = np.array([[3, -1, 5], [7, 8, 9]])
    index = ShortIndex(8, lambda asked, k: (ids, 0.0), "m", 30)
    found = funnel(queries, documents, sizes=[8, 32], keep=[3, 3], index=index)
    assert set(found.ids[0]) == {3, 5, -1}
    assert found.ids[0, -1] == -1 and np.isneginf(found.scores[0, -1])


def test_cutting_comes_before_normalising() -> None:
    documents = Vectors(np.array([[3.0, 4.0, 12.0]]), (2, 3))
    np.testing.assert_allclose(documents.at(2), [[0.6, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(documents.at(3), axis=1), 1, rtol=1e-6)


def test_a_rotation_keeps_full_cosines_and_betters_prefixes() -> None:
    mix = np.linalg.qr(np.random.default_rng(8).normal(size=(32, 32)))[0]
    documents = Vectors(table(500, 9).values @ mix, SIZES, "m")
    queries = Vectors(table(50, 10).values @ mix, SIZES, "m")
    turn = fit_rotation(documents)
    turned = turn(queries), turn(documents)
    np.testing.assert_allclose(
        turned[0].at(32) @ turned[1].at(32).T, queries.at(32) @ documents.at(32).T, atol=1e-5
    )
    truth = exact(queries, documents, size=32, k=10).ids
    plain = recall_of(exact(queries, documents, size=8, k=10).ids, truth)
    assert recall_of(exact(*turned, size=8, k=10).ids, truth) > plain + 0.1
    with pytest.raises(ServingError, match="nothing in common"):
        exact(turned[0], documents, size=8, k=10)
    with pytest.raises(ServingError, match="was fitted for model 'm'"):
        turn(turned[0])


def test_tuning_returns_the_settings_that_no_cheaper_one_equals() -> None:
    queries, documents = table(60, 11), table(300, 12)
    truth = exact(queries, documents, size=32, k=1).ids[:, 0]
    settings = tune(queries, documents, truth, k=5)
    assert settings[-1].recall == 1
    costs, recalls = [s.products for s in settings], [s.recall for s in settings]
    assert costs == sorted(costs) and recalls == sorted(recalls)
    for setting in settings:
        stages = tuple(zip(setting.sizes, setting.keep, strict=True))
        assert setting.products == products(300, stages)
        again = measured(queries, documents, truth, stages)
        assert (again.recall, again.reciprocal_rank) == (setting.recall, setting.reciprocal_rank)
    cheap = tune(queries, documents, truth, k=5, budget=300 * 8)
    assert max(s.products for s in cheap) <= 300 * 8
    assert frontier(settings) == settings


def test_metrics_by_hand() -> None:
    ids = np.array([[5, 3, 1], [2, 9, 4], [7, 8, 6]])
    relevant = np.array([3, 2, 0])
    assert recall_of(ids, relevant) == pytest.approx(2 / 3)
    assert recall_of(ids, np.array([[3, 1], [0, 2], [6, 7]])) == pytest.approx(5 / 6)
    assert reciprocal_rank_of(ids, relevant) == pytest.approx((1 / 2 + 1) / 3)
    assert ndcg_of(ids, relevant) == pytest.approx((1 / np.log2(3) + 1) / 3)


def test_a_table_comes_back_as_it_was_saved(tmp_path) -> None:
    documents = table(12, 13)
    documents.save(tmp_path / "d.safetensors")
    again = Vectors.load(tmp_path / "d.safetensors")
    assert np.array_equal(again.values, documents.values)
    assert (again.sizes, again.model) == (documents.sizes, documents.model)
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]
    (tmp_path / "bad").write_bytes(b"no table")
    with pytest.raises(ServingError, match="is no table of vectors"):
        Vectors.load(tmp_path / "bad")


BAD = np.ones((3, 4), dtype=np.float32)


@pytest.mark.parametrize(
    ("values", "sizes", "message"),
    [
        (np.ones(4), (4,), "expected \\[rows, units\\]"),
        (BAD, (2, 3), "expected ascending sizes that end at 4"),
        (BAD, (4, 2), "expected ascending sizes that end at 4"),
        (BAD, (), "expected ascending sizes that end at 4"),
        (np.where(np.eye(3, 4) > 0, np.nan, BAD), (2, 4), "row 0 \\(of 3 such rows\\) holds NaN"),
        (BAD * 1j, (2, 4), "vectors of complex64 were given; expected real numbers"),
        (np.array([["a", "b"]]), (2,), "expected real numbers"),
        ([[1.0, 2.0], [3.0]], (2,), "given as list .* expected a matrix of numbers"),
        (torch.ones(2, 4, requires_grad=True), (2, 4), r"of a tensor tensor.detach\(\).numpy\(\)"),
        (BAD * [0, 0, 1, 1], (2, 4), "row 0 \\(of 3 such rows\\) is zero in its first 2 units"),
    ],
)
def test_a_table_that_cannot_be_searched_is_refused(values, sizes, message: str) -> None:
    with pytest.raises(ServingError, match=message):
        Vectors(values, sizes)


@pytest.mark.parametrize(
    ("sizes", "keep", "message"),
    [
        ([4, 32], [10], "expected one list length for each size"),
        ([5, 32], [10, 5], "these vectors have the sizes 4, 8, 16, 32"),
        ([32, 4], [10, 5], "must ascend"),
        ([4, 32], [5, 10], "must not grow"),
        ([4, 32], [5, 0], "end at 1 or more"),
        ([4, 32], [5, 2.5], "expected whole numbers of documents"),
        ([4, 32], [5, "3"], "expected whole numbers of documents"),
    ],
)
def test_stages_that_do_not_fit_are_refused(sizes, keep, message: str) -> None:
    with pytest.raises(ServingError, match=message):
        funnel(table(2, 0), table(20, 1), sizes=sizes, keep=keep)


def test_vectors_of_two_models_are_never_compared() -> None:
    with pytest.raises(ServingError, match="model 'a' were compared with those of 'b'"):
        exact(table(2, 0, "a"), table(5, 1, "b"), size=4, k=1)
    short = Vectors(np.ones((2, 8)), (4, 8), "m")
    with pytest.raises(ServingError, match="vectors of 8 units were compared with vectors of 32"):
        exact(short, table(5, 1), size=4, k=1)


@pytest.mark.parametrize("rows", [[0, 500], [0, -1], [0.0, 1.0], ["a", "b"]])
def test_relevant_documents_that_are_no_rows_are_refused(rows) -> None:
    queries, documents = table(2, 0), table(20, 1)
    for call in (tune, train_rotation):
        with pytest.raises(ServingError, match="expected rows of the documents' table.* to 19"):
            call(queries, documents, np.array(rows))


def test_numbers_below_one_are_refused() -> None:
    queries, documents = table(2, 0), table(20, 1)
    with pytest.raises(ServingError, match="batch=-1 was given"):
        funnel(queries, documents, sizes=[4], keep=[2], batch=-1)
    with pytest.raises(ServingError, match="k=0 was given"):
        tune(queries, documents, np.arange(2), k=0)
    with pytest.raises(ServingError, match="effort from 1 on"):
        ShortIndex.of(documents, 4, kind="ivf", effort=0)
    with pytest.raises(ServingError, match="index 'codes' of 12 rows .* expected 16 rows or more"):
        ShortIndex.of(table(12, 1), 4, kind="codes")


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "usearch"])
def test_an_index_of_few_rows_and_of_copies_gives_each_row_once(kind: str) -> None:
    pytest.importorskip("usearch" if kind == "usearch" else "faiss")
    one, few = table(1, 1), table(3, 1)
    copies = Vectors(np.repeat(few.values, 4, axis=0), SIZES, "m")
    for documents in (one, few, copies):
        index = ShortIndex.of(documents, 4, kind=kind)
        found = funnel(table(2, 0), documents, sizes=[4, 32], keep=[50, 30], index=index)
        assert np.array_equal(np.sort(found.ids, axis=1), [np.arange(len(documents))] * 2)


def test_a_budget_below_the_cheapest_search_is_refused() -> None:
    with pytest.raises(ServingError, match="cheapest search over 20 documents needs 80"):
        tune(table(2, 0), table(20, 1), np.zeros(2, dtype=np.int64), budget=10)
    with pytest.raises(ServingError, match="1 relevant documents were given for 2 queries"):
        tune(table(2, 0), table(20, 1), np.zeros(1, dtype=np.int64))
    with pytest.raises(ServingError, match="expected one of hnsw, ivf, codes, ivf-codes, usearch"):
        ShortIndex.of(table(5, 0), 4, kind="annoy")


@pytest.mark.parametrize(("rows", "columns", "k"), [(3, 5000, 7), (2, 5003, 100), (4, 40, 20)])
def test_the_best_columns_are_those_of_a_whole_sort(rows: int, columns: int, k: int) -> None:
    scores = np.random.default_rng(k).normal(size=(rows, columns)).astype(np.float32)
    wanted = np.sort(np.argsort(-scores, axis=1)[:, :k], axis=1)
    assert np.array_equal(np.sort(best_of(scores, k), axis=1), wanted)
    # With equal scores any k of them are right: their values are compared.
    rough = np.round(scores)
    found = np.take_along_axis(rough, best_of(rough, k), axis=1)
    assert np.array_equal(np.sort(found, axis=1), np.sort(rough, axis=1)[:, columns - k :])


def test_settings_judged_together_are_those_run_one_by_one() -> None:
    queries, documents = table(70, 21), table(400, 22)
    relevant = np.random.default_rng(23).integers(0, 400, 70)
    allowed = list(candidates(documents, 4))
    assert len(allowed) == 87
    for setting in judged(queries, documents, relevant, allowed):
        stages = tuple(zip(setting.sizes, setting.keep, strict=True))
        again = measured(queries, documents, relevant, stages)
        assert (setting.recall, setting.products) == (again.recall, again.products)
        assert setting.reciprocal_rank == pytest.approx(again.reciprocal_rank, abs=1e-12)


def test_an_index_says_what_it_multiplied() -> None:
    pytest.importorskip("faiss")
    queries, documents = table(20, 6), table(400, 7)
    cells = int(4 * 400**0.5)
    everywhere = ShortIndex.of(documents, 8, kind="ivf", effort=cells)
    found = funnel(queries, documents, sizes=[8, 32], keep=[60, 5], index=everywhere)
    # Found rows are scored anew, from the first unit on.
    assert found.products == (400 + cells) * 8 + 60 * 32
    codes = ShortIndex.of(documents, 8, kind="codes")
    found = funnel(queries, documents, sizes=[8, 32], keep=[200, 5], index=codes)
    assert found.products == 16 * 8 + 4 * 400 + 200 * 32
    wanted = funnel(queries, documents, sizes=[8, 32], keep=[60, 5])
    assert recall_of(found.ids, wanted.ids) > 0.9


def test_a_trained_rotation_keeps_full_cosines_and_learns_what_tells_documents_apart() -> None:
    random = np.random.default_rng(30)
    # Half of the units are loud noise of each text; the quiet half is shared by query and document.
    topic = random.normal(size=(400, 16)) / 3
    loud = (random.normal(size=(400, 16)) for _ in range(2))
    mix = np.linalg.qr(random.normal(size=(32, 32)))[0]
    pair = [Vectors(np.hstack([noise, topic]) @ mix, (4, 16, 32), "m") for noise in loud]
    queries, documents = pair
    rows = np.arange(400)
    turn = train_rotation(queries, documents, rows, steps=150, rate=0.03)
    np.testing.assert_allclose(turn.matrix.T @ turn.matrix, np.eye(32), atol=1e-5)
    plain = fit_rotation(documents)
    found = [
        recall_of(exact(r(queries), r(documents), size=16, k=1).ids, rows) for r in (plain, turn)
    ]
    assert found[1] > found[0] + 0.3
    np.testing.assert_allclose(
        turn(queries).at(32) @ turn(documents).at(32).T,
        queries.at(32) @ documents.at(32).T,
        atol=1e-5,
    )
    with pytest.raises(ServingError, match="3 relevant documents were given for 400 queries"):
        train_rotation(queries, documents, rows[:3])


def test_lengths_of_rows_change_no_ranking() -> None:
    queries, documents = table(9, 2), table(200, 3)
    factors = np.exp(np.random.default_rng(4).normal(size=(200, 1)))
    scaled = Vectors(documents.values * factors, SIZES, "m")
    stages = {"sizes": [4, 16, 32], "keep": [40, 12, 5]}
    wanted = funnel(queries, documents, **stages)
    found = funnel(queries, scaled, **stages)
    assert np.array_equal(found.ids, wanted.ids)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-6)
