"""Rotations that put first what tells most, of vectors whose model was never trained nested.

Cosines at full size do not change under a rotation, so nothing is lost: `fit_rotation` takes the
principal directions, `train_rotation` learns which directions tell a query's document from others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from matryoshkafy.serving.vectors import Floats, ServingError, Vectors, check_relevant, digest_of

TEMPERATURE, BATCH = 0.05, 512


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal change of basis of one model's vectors.

    Args:
        matrix: float [D, D], orthogonal; a row vector x becomes x @ matrix.
        model: whose vectors it turns. Turned vectors carry a name of their own, so that turned and
            unturned ones are never compared.
    """

    matrix: Floats
    model: str = ""

    @property
    def turned_model(self) -> str:
        """The name that turned vectors carry."""
        return f"{self.model}+{digest_of(self.matrix)}"

    def __call__(self, vectors: Vectors) -> Vectors:
        """Return the turned table; raises `ServingError` for another model's vectors."""
        if vectors.model != self.model or vectors.width != len(self.matrix):
            raise ServingError(
                f"the rotation was fitted for model {self.model or 'unknown'!r} with "
                f"{len(self.matrix)} units; the vectors are of {vectors.model or 'unknown'!r} with "
                f"{vectors.width}. Fit it on vectors of the same model"
            )
        return Vectors(vectors.values @ self.matrix, vectors.sizes, self.turned_model)


def fit_rotation(vectors: Vectors) -> Rotation:
    """Return the rotation to the principal directions of normalised vectors, largest first.

    The second moment is taken about zero, not about the mean: cosines are about zero, too.

    Args:
        vectors: a sample of some thousands of rows is enough.
    """
    full = vectors.at(vectors.width).astype(np.float64)
    _, directions = np.linalg.eigh(np.transpose(full) @ full)
    return Rotation(np.ascontiguousarray(directions[:, ::-1], dtype=np.float32), vectors.model)


def train_rotation(  # noqa: PLR0913  the public signature
    queries: Vectors,
    documents: Vectors,
    relevant: NDArray[np.int64],
    *,
    steps: int = 600,
    rate: float = 3e-3,
    seed: int = 0,
) -> Rotation:
    """Return a rotation whose every prefix tells a query's document from those of other queries.

    The rotation is the one of `fit_rotation` times the exponential of a skew matrix, so it stays
    orthogonal while it learns. The loss is the mean over the sizes of the cross entropy of each
    query's document among the batch's, by cosine of the prefixes (MRL's loss for retrieval).

    Args:
        queries: queries to learn from; not those that a result is reported on.
        documents: the table they ask for.
        relevant: int64 [queries], the row of the relevant document of each query.
        steps: steps of Adam, on 512 pairs each.
        rate: of Adam on the skew matrix, in radians; falls to zero in a line.
        seed: of the order of the pairs.

    Raises:
        ServingError: where tables are of two models or `relevant` names no row for each query.
    """
    queries.check_against(documents)
    check_relevant(relevant, queries, documents)
    start = fit_rotation(documents)
    asked, given = (torch.as_tensor(v.at(v.width) @ start.matrix) for v in (queries, documents))
    skew = torch.zeros(documents.width, documents.width, requires_grad=True)
    optimizer: Any = torch.optim.Adam([skew], lr=rate)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.as_tensor(np.asarray(relevant))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        chosen = torch.randint(len(queries), (min(BATCH, len(queries)),), generator=generator)
        optimizer.zero_grad()
        turn = torch.matrix_exp(skew - skew.T)
        loss: Any = _loss(asked[chosen] @ turn, given[rows[chosen]] @ turn, documents.sizes)
        loss.backward()
        optimizer.step()
    found = skew.detach().double()
    learned = start.matrix.astype(np.float64) @ torch.matrix_exp(found - found.T).numpy()
    return Rotation(np.ascontiguousarray(learned, dtype=np.float32), documents.model)


def _loss(queries: Tensor, documents: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Mean over the sizes below the full one: there a rotation changes nothing."""
    own = torch.arange(len(queries))
    losses: list[Tensor] = []
    for size in sizes[:-1] or sizes:
        a, b = (F.normalize(x[:, :size], dim=-1) for x in (queries, documents))
        losses.append(F.cross_entropy(a @ b.T / TEMPERATURE, own))
    return torch.stack(losses).mean()
