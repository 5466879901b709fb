"""NestedSentenceLoss: any loss of sentence-transformers, over every size of a doll."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matryoshkafy.dolls.doll import Doll, trace_of
from matryoshkafy.errors import MatryoshkafyError


class SentenceLossError(MatryoshkafyError):
    """A doll, a model and a loss that do not belong together."""


class NestedSentenceLoss(nn.Module):
    """The weighted sum of one loss of sentence-transformers over the sizes of a doll.

    Give it to SentenceTransformerTrainer in the place of the loss. The model that the loss calls
    embeds at one size after the other, through the doll, whatever the doll's scope: "full" and
    "ffn" cut the encoder, "output" the embedding (Kusupati et al. 2022, as MatryoshkaLoss of
    sentence-transformers does). The model's own parameters learn. One process.

    Args:
        doll: `convert(model, ...)` of the SentenceTransformer that the loss was made for.
        loss: a loss of sentence-transformers, made with that model.
        weights: {size: weight}, 1 where none is given; 0 leaves a size out.

    Raises:
        SentenceLossError: the loss has another model than the doll, or none; weights that no size
            answers to.
    """

    def __init__(
        self, doll: Doll, loss: nn.Module, weights: Mapping[int, float] | None = None
    ) -> None:
        super().__init__()
        model = getattr(loss, "model", None)
        if not isinstance(model, nn.Module) or not _share(doll, model):
            raise SentenceLossError(
                f"{type(loss).__name__} was made for a model whose parameters are not the doll's; "
                "convert a SentenceTransformer, and make the loss with that same model"
            )
        given = dict(weights or {})
        if not set(given) <= set(doll.sizes) or not any(given.get(m, 1.0) for m in doll.sizes):
            raise SentenceLossError(
                f"weights={given} was given for the sizes {doll.sizes}; expected {{size: weight}} "
                "with a weight that is not 0"
            )
        self.loss, self.model = loss, model
        # Past nn.Module's __setattr__: the doll's parameters are the model's.
        self.__dict__["doll"] = doll
        self.weights = {m: w for m in doll.sizes if (w := given.get(m, 1.0))}
        own = {m: _replaced(loss, model, _Sized(model, doll, m)) for m in self.weights}
        self.__dict__["losses"] = own
        self.per_size: dict[int, float] = {}

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> Tensor:
        """Return the sum; `per_size` holds what each size lost.

        Raises:
            SentenceLossError: several processes, whose gradients would not meet.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise SentenceLossError(
                "several processes train, but the doll computes past the wrapper that sums their "
                "gradients; train on one process, or with AllSizes and a MatryoshkaLoss"
            )
        features = list(sentence_features)
        parts: list[Tensor] = []
        for size, weight in self.weights.items():
            value = self.__dict__["losses"][size]([dict(one) for one in features], labels)
            value = _total(value)
            self.per_size[size] = float(value.detach())
            parts.append(weight * value)
        return torch.stack(parts).sum()

    def get_config_dict(self) -> dict[str, object]:
        """Return what sentence-transformers writes into a model card."""
        options = self.__dict__["doll"].plan.options
        return {
            "loss": type(self.loss).__name__,
            "weights": self.weights,
            "nesting": options.nesting,
            "scope": options.scope,
        }


class _Sized(nn.Module):
    """A SentenceTransformer that embeds at one size; in all else it is the model."""

    def __init__(self, model: nn.Module, doll: Doll, size: int) -> None:
        super().__init__()
        self.__dict__.update(model=model, doll=doll, size=size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def forward(self, features: Mapping[str, Tensor], **_: object) -> dict[str, object]:
        """Return the features with the embedding of the size."""
        doll = self.__dict__["doll"]
        read = trace_of(doll).signature.inputs[0].spec.context
        known = {name: features[name] for name in read if name in features}
        return {**features, **doll.outputs(known)[self.__dict__["size"]]}


def _total(lost: Tensor | dict[str, Tensor]) -> Tensor:
    """Return a loss that came whole or in named parts."""
    return cast("Tensor", sum(lost.values())) if isinstance(lost, dict) else lost


def _replaced(part: nn.Module, model: nn.Module, sized: nn.Module) -> Any:
    """Return a loss like this, parts and parameters shared, that calls the sized model.

    A loss of its own for each size: those that cache gradients keep them between two calls.
    """
    if part is model:
        return sized
    if not any(one is model for one in part.modules()):
        return part
    made = copy.copy(part)
    children: dict[str, nn.Module | None] = part.__dict__["_modules"]
    made.__dict__ = dict(part.__dict__)
    made.__dict__["_modules"] = {
        name: child if child is None else _replaced(child, model, sized)
        for name, child in children.items()
    }
    return made


def _share(doll: Doll, model: nn.Module) -> bool:
    """Whether every parameter of the doll is one of the model's."""
    own = {id(p) for p in model.parameters()}
    return bool(own) and all(id(p) in own for p in doll.parameters())
