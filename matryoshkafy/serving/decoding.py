"""Decoder: a causal model that decodes with one key-value cache for all of its sizes.

In masked nesting the keys and values of a small size are the first heads of the large one's. So a
draft by the small size leaves in the cache what the large size needs of those heads, and checking
the draft computes the other heads and columns alone: speculative decoding (Leviathan et al. 2023)
without a second model and without a second cache.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from matryoshkafy.axes import dims
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.dolls.slice import parts_of
from matryoshkafy.graph.nodes import bound_args
from matryoshkafy.graph.trace import Trace
from matryoshkafy.plan.plan import Plan
from matryoshkafy.rewrite.codegen import runnable
from matryoshkafy.rules import op_of
from matryoshkafy.serving.escalation import CACHE, PART, WHOLE, Step, Writer, answer, node_of
from matryoshkafy.serving.positions import Positions, check_one_input, positions_of
from matryoshkafy.serving.session import grown
from matryoshkafy.serving.vectors import ServingError

POSITION, KEYS, VALUES, CAUSAL = "position_", "past_keys_", "past_values_", "causal"
TOLERANCE = 1e-4
Values = dict[str, Any]


@dataclass(frozen=True)
class Generated:
    """What a decoder wrote.

    Args:
        tokens: the new token ids.
        drafted: how many tokens the small size proposed.
        accepted: how many of them the large size would have written, too.
    """

    tokens: tuple[int, ...]
    drafted: int = 0
    accepted: int = 0


class Decoder:
    """Greedy decoding of a masked doll with a cache that all sizes share.

    Args:
        doll: a causal model in masked nesting that takes token ids [1, T] alone and returns logits
            [1, T, V], or an output with the attribute `logits`.
        ids: example ids [1, T], T >= 4: the decoder compares itself with the doll on them.

    Raises:
        ServingError: where the doll does not decode token by token: another input, attention that
            is not causal or not `scaled_dot_product_attention`, positions mixed anywhere else.

    Example:
        decoder = Decoder(doll, ids)
        text = decoder.generate(ids, size=256, draft=64, new_tokens=100)
    """

    def __init__(self, doll: Doll, ids: Tensor) -> None:
        self._trace, self._plan = parts_of(doll)
        if not self._plan.masked or self._plan.options.scope != "full":
            raise ServingError(
                'a decoder needs a doll with nesting="masked" and scope="full", in which a small '
                "size is a prefix of a large one"
            )
        check_one_input(self._trace)
        self._doll = doll.eval()
        self._positions = positions_of(self._trace, ids)
        levels = self._plan.levels
        self._answers = [self._module(answer(self._writer((i, i)))) for i in range(levels)]
        reads = {name for step, _ in self._answers for name in step.reads}
        steps = grown(lambda i: self._writer((i - 1, i)), levels, reads)
        self._steps = [self._module(step) for step in steps]
        self._past: list[Values] = [{} for _ in range(levels)]
        self._check(ids)

    def generate(
        self,
        ids: Tensor,
        *,
        size: int,
        new_tokens: int,
        draft: int | None = None,
        window: int = 4,
        end: int | None = None,
    ) -> Generated:
        """Write tokens greedily: those of `size`, whether a draft is used or not.

        Args:
            ids: the prompt, [1, T].
            size: the size whose tokens are written.
            new_tokens: most tokens to write.
            draft: a smaller size that proposes; None for none.
            window: how many tokens it proposes at a time.
            end: a token that ends the text.
        """
        large = self._plan.level(size)
        small = large if draft is None else self._plan.level(draft)
        if draft is not None and small >= large:
            raise ServingError(f"draft={draft} was given; expected a size below {size}")
        self._forget()
        logits = self._window(ids, 0, (-1, large), {})[0]
        writing = _Writing(ids.shape[1], [int(logits[0, -1].argmax())])
        while len(writing.tokens) < new_tokens and writing.tokens[-1] != end:
            if draft is None:
                self._next(writing, large)
            else:
                # No position past the last token that may be written: tables of positions end.
                left = new_tokens - len(writing.tokens)
                self._checked(writing, (small, large), min(window, left))
        tokens = writing.tokens[:new_tokens]
        tokens = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        return Generated(tuple(tokens), writing.drafted, writing.accepted)

    def cache_bytes(self, size: int) -> int:
        """Return the bytes of keys and values that a size adds to those of the sizes below."""
        held = self._past[self._plan.level(size)].values()
        return sum(t.numel() * t.element_size() for t in held)

    # Writing.

    def _next(self, writing: _Writing, level: int) -> None:
        token = torch.tensor([[writing.tokens[-1]]])
        logits = self._window(token, writing.length, (-1, level), {})[0]
        writing.length += 1
        writing.tokens.append(int(logits[0, -1].argmax()))

    def _checked(self, writing: _Writing, levels: tuple[int, int], window: int) -> None:
        """Let the small size propose, then let the large one say how far it agrees."""
        small, large = levels
        proposed = [writing.tokens[-1]]
        cached: list[Values] = []
        for i in range(window):
            token = torch.tensor([proposed[-1:]])
            logits, values = self._window(token, writing.length + i, (-1, small), {})
            cached.append(values)
            proposed.append(int(logits[0, -1].argmax()))
        asked = torch.tensor([proposed[:-1]])
        logits, _ = self._window(asked, writing.length, (small, large), self._joined(cached))
        wanted = [int(token) for token in logits[0].argmax(-1)]
        agreed = next((i for i in range(window) if wanted[i] != proposed[i + 1]), window)
        writing.drafted, writing.accepted = writing.drafted + window, writing.accepted + agreed
        written = wanted[: agreed + 1]
        writing.tokens += written
        writing.length += len(written)
        self._cut(writing.length)

    def _joined(self, cached: list[Values]) -> Values:
        """Lay the values of single tokens one after the other."""
        out: Values = {}
        for name, value in cached[-1].items():
            along = self._positions.dims.get(node_of(name), ())
            if isinstance(value, Tensor) and along:
                value = torch.cat([values[name] for values in cached], along[0])
            out[name] = value
        return out

    # One window of tokens, from level to level.

    @torch.no_grad()
    def _window(
        self, ids: Tensor, start: int, levels: tuple[int, int], cached: Values
    ) -> tuple[Tensor, Values]:
        """Return the logits of a window at the second level, and its values for further ones."""
        length = start + ids.shape[1]
        values = cached | self._of_positions(ids, start, length)
        for level in range(levels[0] + 1, levels[1] + 1):
            step, module = self._steps[level]
            found = module(ids, *self._given(step, values, level))
            for name, value in zip(step.returns, found, strict=True):
                (self._past[level] if name.startswith((KEYS, VALUES)) else values)[name] = value
        step, module = self._answers[levels[1]]
        flat = module(ids, *self._given(step, values, levels[1]))
        kept = {name: v for name, v in values.items() if name.startswith(CACHE)}
        return _logits(self._trace.signature.unflatten(flat)), kept

    def _of_positions(self, ids: Tensor, start: int, length: int) -> Values:
        rows = self._positions.rows(length, start, ids)
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()[start:]
        return {POSITION + name: value for name, value in rows.items()} | {CAUSAL: causal}

    def _given(self, step: Step, values: Values, level: int) -> list[Any]:
        return [values[n] if n in values else self._past[level].get(n) for n in step.reads]

    def _cut(self, length: int) -> None:
        for held in self._past:
            for name, value in held.items():
                held[name] = value[..., :length, :]

    def _forget(self) -> None:
        self._past = [{} for _ in self._steps]

    # Making.

    def _writer(self, levels: tuple[int, int]) -> Writer:
        return _Decoding(self._trace, self._plan, levels, self._positions)

    def _module(self, step: Step) -> tuple[Step, fx.GraphModule]:
        return step, runnable(self._trace.root, step.graph)

    def _check(self, ids: Tensor) -> None:
        """Decode the example in windows of two and one, and compare with the doll."""
        with torch.no_grad():
            outputs = self._doll.outputs(ids)
            expected = [_logits(outputs[size]) for size in self._plan.sizes]
        top, split = self._plan.levels - 1, ids.shape[1] - 1
        self._forget()
        first, cached = self._window(ids[:, :split], 0, (-1, 0), {})
        rest = self._window(ids[:, :split], 0, (0, top), cached)[0]
        last = self._window(ids[:, split:], split, (-1, top), {})[0]
        self._forget()
        found = (first, expected[0][:, :split]), (rest, expected[-1][:, :split]), (
            last, expected[-1][:, split:],
        )  # fmt: skip
        for logits, wanted in found:
            error = float((logits - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
            if not error <= TOLERANCE:
                raise ServingError(
                    "decoding token by token does not give the doll's logits (relative error "
                    f"{error:.1e}): some op beside the attention mixes positions, or the attention "
                    "is not causal. Compute whole sequences with doll.outputs"
                )


@dataclass
class _Writing:
    """A text on its way: how many of its tokens are in the cache, and what was written."""

    length: int
    tokens: list[int]
    drafted: int = 0
    accepted: int = 0


def _logits(output: object) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.ndim != 3:
        raise ServingError(
            f"the model returns a {type(output).__name__}; expected logits [1, T, V], or an output "
            "with the attribute logits"
        )
    return found


def attend(
    query: Tensor,
    new: tuple[Tensor, Tensor],
    past: tuple[Tensor | None, Tensor | None],
    mask: Tensor,
    how: tuple[float | None, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention over past and new keys, and both with the past before them.

    Args:
        query: [1, heads, new, units].
        new: keys and values of the new positions.
        past: those before them; None twice at the start.
        mask: [..., new, all], True (or 0) where a query may look.
        how: the scale, and whether heads share keys.
    """
    keys, values = (
        n if p is None else torch.cat([p, n], -2) for p, n in zip(past, new, strict=True)
    )
    scale, grouped = how
    out = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, mask, scale=scale, enable_gqa=grouped
    )
    return out, keys, values


class _Decoding(Writer):
    """Writes steps that take a window of tokens: attention reads a cache, positions are given."""

    def __init__(
        self, trace: Trace, plan: Plan, levels: tuple[int, int], positions: Positions
    ) -> None:
        super().__init__(trace, plan, levels)
        self.positions = positions

    def known(self, node: fx.Node) -> bool:
        """What is made of positions is made again: it is longer at every token."""
        return node.name not in self.positions.rebuilt and super().known(node)

    def parted(self, node: fx.Node) -> bool:
        """What is given or made again has no parts."""
        made = node.name in self.positions.names or node.name in self.positions.rebuilt
        return not made and super().parted(node)

    def sources(self, node: fx.Node, how: str) -> list[tuple[fx.Node, str]]:
        """Values of positions need nothing: they are given."""
        return [] if node.name in self.positions.names else super().sources(node, how)

    def write(self, node: fx.Node, how: str) -> Any:
        """Write a value of positions as a cut of what is given."""
        if node.name not in self.positions.names:
            return super().write(node, how)
        value, shape = self.hole(POSITION + node.name), self.shapes(node)[0]
        for i, dim in enumerate(shape):
            value = self.kept(value, i, dims.relative(dim, self.full, self.widths))
        return self.new_units(value, shape) if how == PART else value

    def call(self, node: fx.Node, how: str) -> Any:
        """Write attention over the cache, anything else as it is."""
        if not op_of(node).attends:
            return super().call(node, how)
        a = bound_args(node)
        read = {n: self.written[n, self.role(node, n) if how == PART else WHOLE]
                for n in node.all_input_nodes}  # fmt: skip
        query, *new = (read[a[name]] for name in ("query", "key", "value"))
        past = (self.hole(KEYS + node.name), self.hole(VALUES + node.name))
        target, args = attend, (query, tuple(new), past, self._mask(node, a, read),
                                (a["scale"], a["enable_gqa"]))  # fmt: skip
        whole = self.graph.call_function(target, args)
        item = self.graph.call_function
        for i, kind in enumerate((KEYS, VALUES), 1):
            self.extra[kind + node.name] = item(operator.getitem, (whole, i))
        return item(operator.getitem, (whole, 0))

    def _mask(self, node: fx.Node, a: dict[str, Any], read: dict[fx.Node, Any]) -> Any:
        if isinstance(a["attn_mask"], fx.Node):
            return read[a["attn_mask"]]
        if a["is_causal"] is not True:
            raise ServingError(
                f"{node.meta.get('source') or node.name}: attention without a mask looks at later "
                "tokens, so this model does not decode token by token"
            )
        return self.hole(CAUSAL)
