"""What needs no training: popularity, and item-to-item co-occurrence that decays with distance.

    python -m tests.benchmarks.heuristics DATA/amazon/beauty.txt DATA/ml-1m --length 50

On sparse shops such a graph of items can win against neural models, so it stands in their tables.
It is counted on what models train on (all but each user's last two items); its three numbers are
chosen on validation.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from examples.fmrlrec import data, formats
from examples.fmrlrec.config import Config, replace
from examples.fmrlrec.data import Dataset
from examples.fmrlrec.evaluation import Scorer, Table, evaluate, popularity_scorer

CHOOSING = 3000  # users on whose validation the numbers are chosen
REACH = 10  # items further apart than this do not count as neighbours
DECAYS, POWERS, MEMORIES = (0.5, 0.8), (0.0, 0.3, 0.5, 0.7), (0.3, 0.6, 0.9)


@dataclass(frozen=True)
class Graph:
    """Item-to-item weights: j after i counts decay^(distance - 1), over popularity(j)^power.

    A history scores an item by the weights from its items, the n-th last at memory^(n - 1).
    """

    decay: float
    power: float
    memory: float


def pairs(dataset: Dataset, decay: float) -> sparse.csr_matrix:
    """The weights of i (row) before j (column), [items + 1, items + 1]."""
    count = dataset.item_count + 1
    owner = np.repeat(np.arange(dataset.users), np.diff(dataset.offsets))
    place = dataset.offsets[1:][owner] - np.arange(len(dataset.items))
    items, owner = dataset.items[place > 2], owner[place > 2]
    total = sparse.csr_matrix((count, count))
    for distance in range(1, REACH + 1):
        same = owner[distance:] == owner[:-distance]
        first, second = items[:-distance][same], items[distance:][same]
        weights = np.full(len(first), decay ** (distance - 1))
        total = total + sparse.coo_matrix((weights, (first, second)), (count, count)).tocsr()
    return total


def scorer_of(dataset: Dataset, graph: Graph, weights: sparse.csr_matrix) -> Scorer:
    """Scores by a graph; what no item of a history leads to is ranked by popularity."""
    counts = data.popularity(dataset)
    scaled = (weights @ sparse.diags(1 / np.maximum(counts, 1) ** graph.power)).tocsr()
    floor = counts / (counts.max() + 1) * 1e-6

    def scores(sequences: Tensor) -> Iterator[tuple[str, Tensor]]:
        rows, places = np.nonzero(sequences.numpy())
        fading = graph.memory ** (sequences.shape[1] - 1 - places)
        shape = (len(sequences), dataset.item_count + 1)
        asked = sparse.csr_matrix((fading, (rows, sequences.numpy()[rows, places])), shape)
        yield "co-occurrence", torch.from_numpy(np.asarray((asked @ scaled).todense()) + floor)

    return scores


def best_graph(dataset: Dataset, config: Config) -> Graph:
    """The numbers with the best validation NDCG@10 of some users, ranking all items."""
    found, some = {}, dataclasses.replace(dataset, offsets=dataset.offsets[: CHOOSING + 1])
    for decay in DECAYS:
        weights = pairs(dataset, decay)
        for power, memory in itertools.product(POWERS, MEMORIES):
            graph = Graph(decay, power, memory)
            scorer = scorer_of(dataset, graph, weights)
            table = evaluate(scorer, some, "validation", config)["co-occurrence"]
            found[graph] = table["all"]["NDCG@10"]
    return max(found, key=found.__getitem__)


def heuristics(dataset: Dataset, config: Config) -> tuple[dict[str, Table], Graph]:
    """Test metrics of both heuristics under both protocols, and the graph that was chosen."""
    graph = best_graph(dataset, config)
    floor = evaluate(popularity_scorer(data.popularity(dataset)), dataset, "test", config)
    scorer = scorer_of(dataset, graph, pairs(dataset, graph.decay))
    return {**floor, **evaluate(scorer, dataset, "test", config)}, graph


def dataset_of(path: Path, folder: Path, config: Config) -> Dataset:
    """Prepared data, made once."""
    if not (folder / data.REPORT).exists():
        return data.prepare(formats.read(path, folder / "lines"), folder, config)
    return data.load(folder)


def main() -> None:
    """Prints a row for each data set, heuristic and protocol."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--length", type=int, default=50, help="items of a history that count")
    given = parser.parse_args()
    config = replace(Config(), {"max_length": given.length})
    print("| data | model | ranked | NDCG@10 | Recall@10 |\n|---|---|---|---|---|")
    for path in given.data:
        with tempfile.TemporaryDirectory() as folder:
            found, graph = heuristics(dataset_of(path, Path(folder), config), config)
        for name, table in found.items():
            for protocol, m in table.items():
                row = f"{m['NDCG@10']:.4f} | {m['Recall@10']:.4f}"
                print(f"| {path.stem} | {name} | {protocol} | {row} |", flush=True)
        print(f"<!-- {path.stem}: {graph} -->", flush=True)


if __name__ == "__main__":
    main()
