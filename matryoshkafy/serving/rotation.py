"""fit_rotation(): the first units of any vectors made the ones that tell most, without training.

Cosines at full size do not change under a rotation, so a table of a model that was never trained
nested still gets useful prefixes: its principal directions come first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from matryoshkafy.serving.vectors import Floats, ServingError, Vectors, digest_of


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
