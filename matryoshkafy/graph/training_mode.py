"""What a forward does in training mode alone: the trace is made in evaluation mode.

Dropout and batch norm are ops of both modes, and a flag tells them apart. The dropout probability
of fused attention is a number that evaluation sets to 0, and other randomness (stochastic depth,
layer drop, noise) leaves no op at all: one forward in training mode is watched for both.
"""

# torch has no public names for some of what is asked of it here.
# pyright: reportPrivateUsage=false
from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matryoshkafy.errors import first_line
from matryoshkafy.graph.copies import copied_inputs, drawn_by_others, spare
from matryoshkafy.graph.function_mode import FunctionMode
from matryoshkafy.graph.nodes import (
    bound_args,
    op_key,
    set_arg,
    set_info,
    source_of,
)
from matryoshkafy.graph.normalise import has_statistics, training_flag
from matryoshkafy.graph.trace import Trace
from matryoshkafy.graph.user_lines import line_of, user_frame
from matryoshkafy.graph.vocabulary import basics_of

aten = torch.ops.aten
SDPA = F.scaled_dot_product_attention
DROPOUTS: Mapping[object, str] = {
    F.dropout: "dropout",
    F.alpha_dropout: "alpha_dropout",
    F.dropout1d: "feature_dropout",
    F.dropout2d: "feature_dropout",
    F.dropout3d: "feature_dropout",
    F.feature_alpha_dropout: "feature_alpha_dropout",
}
RANDOM: Mapping[object, str] = {
    Tensor.bernoulli_: "bernoulli_",
    Tensor.bernoulli: "bernoulli",
    torch.bernoulli: "bernoulli",
    Tensor.uniform_: "uniform_",
    Tensor.normal_: "normal_",
    torch.rand: "rand",
    torch.rand_like: "rand_like",
    torch.randn: "randn",
    torch.randn_like: "randn_like",
    torch.randint: "randint",
    torch.randperm: "randperm",
    torch.multinomial: "multinomial",
}


OTHERS = (
    "training mode asks Python or numpy for random numbers (layers or spans that are left out by "
    "chance): the doll trains without what they decide"
)


@dataclass
class Watch(FunctionMode):
    """Notes the dropout of every fused attention, in order, and of torch's own attention that gives
    its weights, by line; where else chance is asked; the `training` of dropout and batch norm;
    whether random numbers were drawn that are not torch's.
    """

    attention: list[float] = field(default_factory=list[float])
    weighing: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    chances: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    flags: dict[str, list[bool]] = field(default_factory=dict[str, list[bool]])

    drawn: bool = False
    before: tuple[object, ...] = ()

    WATCHED = frozenset((SDPA, F.multi_head_attention_forward, F.batch_norm, *DROPOUTS, *RANDOM))

    def __post_init__(self) -> None:
        super().__init__()

    def __enter__(self) -> Watch:
        self.before = drawn_by_others()
        super().__enter__()
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        self.drawn |= drawn_by_others() != self.before
        super().__exit__(exc_type, exc_val, exc_tb)  # pyright: ignore[reportUnknownMemberType]

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func is SDPA:
            self.attention.append(float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0)))
        elif func is F.multi_head_attention_forward:
            self._multi_head(named_arguments(func, args, kwargs))
        elif func in DROPOUTS:
            given = named_arguments(func, args, kwargs)
            self.flags.setdefault(DROPOUTS[func], []).append(bool(given["training"]))
            if given["training"] and given["p"]:
                self._chance(DROPOUTS[func])
        elif func is F.batch_norm:
            given = named_arguments(func, args, kwargs)
            if given["running_mean"] is not None:
                self.flags.setdefault("batch_norm", []).append(bool(given["training"]))
        else:
            self._chance(RANDOM[func])
        return func(*args, **kwargs)

    def _multi_head(self, given: dict[str, Any]) -> None:
        p = float(given["dropout_p"]) if given["training"] else 0.0
        if not given["need_weights"]:
            self.attention.append(p)
        else:
            self.weighing.setdefault(_user_line(), []).append(p)

    def _chance(self, name: str) -> None:
        self.chances.setdefault(name, []).append(_user_line())


def named_arguments(
    func: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults included."""
    bound = _signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


_signature = cache(inspect.signature)


def _user_line() -> str:
    frame = user_frame()
    if frame is None:
        return "an unknown line"
    return line_of(frame.f_code, frame.f_lineno)


def follow_training(
    traced: Trace, model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
) -> Trace:
    """Return the trace with attention dropout in training mode, and remarks on what it lacks.

    A spare of the model runs once more on the example, in training mode. What stays in evaluation
    mode there (a frozen batch norm: a `train` of the user's, `training=False`, or `eval()` on a
    part of a model in training mode) does so in the doll.
    """
    watch = Watch()
    try:
        with spare(model) as twin, torch.no_grad(), watch:
            own_args, own_kwargs = copied_inputs(args, kwargs)
            (twin if model.training else twin.train())(*own_args, **own_kwargs)
    except Exception as error:  # noqa: BLE001  the user's forward may raise anything
        return _noted(
            traced,
            "the forward fails on the example inputs in training mode "
            f"({type(error).__name__}: {first_line(error)}), so what it does there "
            "alone was not looked at; dropout and batch norm follow train()",
        )
    return follow(traced, watch)


def follow(traced: Trace, watch: Watch) -> Trace:
    """Return the trace with what was seen of a forward in training mode."""
    _keep_frozen(traced, watch.flags)
    for line, rates in watch.weighing.items():
        if not _drop_weights(traced, line, rates):
            watch.chances.setdefault("dropout", []).extend(line for rate in rates if rate)
    notes = [_set_attention(traced, watch.attention), *_unseen(traced, watch.chances)]
    notes += [OTHERS] if watch.drawn else []
    return _noted(traced, *(note for note in notes if note))


def _keep_frozen(traced: Trace, flags: dict[str, list[bool]]) -> None:
    """What does not train in training mode follows no flag."""
    for key, training in flags.items():
        nodes = [n for n in traced.graph.nodes if op_key(n) == key and has_statistics(n)]
        # In order the calls are the nodes; where their numbers differ, nobody knows which is which.
        if len(nodes) == len(training):
            for node in (n for n, flag in zip(nodes, training, strict=True) if not flag):
                set_arg(node, basics_of(key).training, False)


def _drop_weights(traced: Trace, line: str, rates: list[float]) -> bool:
    """Put the dropout of attention that gives its weights behind its softmax, where evaluation mode
    has none; tell whether each was found.
    """
    nodes = [n for n in traced.graph.nodes if op_key(n) == "softmax" and source_of(n) == line]
    for node, rate in zip(nodes, rates, strict=True) if len(nodes) == len(rates) else ():
        if not rate:
            continue
        flag = training_flag(traced.graph)
        with traced.graph.inserting_after(node):
            dropped = traced.graph.call_function(aten.dropout.default, (node, rate, flag))
        dropped.meta = dict(node.meta)
        node.replace_all_uses_with(dropped)
        dropped.update_arg(0, node)
    return len(nodes) == len(rates)


def _set_attention(traced: Trace, rates: list[float]) -> str | None:
    """Give every fused attention of the graph its dropout, `training * p`; else say why not."""
    if not any(rates):
        return None
    nodes = [n for n in traced.graph.nodes if op_key(n) == SDPA.__name__]
    if len(nodes) != len(rates):
        return (
            f"the dropout of attention (p={max(rates):g}) does not follow train(): the forward "
            f"calls fused attention {len(rates)} times in training mode and {len(nodes)} times in "
            "evaluation mode"
        )
    for node, rate in zip(nodes, rates, strict=True):
        if rate and bound_args(node)["dropout_p"] == 0:
            flag = training_flag(traced.graph)
            with traced.graph.inserting_before(node):
                product = traced.graph.call_function(operator.mul, (flag, rate))
            set_info(product, 0.0)
            set_arg(node, "dropout_p", product)
    return None


def _unseen(traced: Trace, chances: dict[str, list[str]]) -> Iterator[str]:
    """Say which randomness of training mode the graph lacks."""
    present = Counter(op_key(n) for n in traced.graph.nodes if n.op == "call_function")
    for name, lines in chances.items():
        missing = len(lines) - present[name] - present[name.removesuffix("_")]
        if missing > 0:
            yield (
                f"training mode alone asks for random numbers ({name}, {missing} times, first at "
                f"{lines[0]}): the doll trains without them"
            )


def _noted(traced: Trace, *notes: str) -> Trace:
    return replace(traced, notes=(*traced.notes, *notes))
