"""Which nonlinearities only bound a value: logits behind one are logits still."""

from __future__ import annotations

import math

from torch import fx

from matryoshkafy.graph.nodes import op_key


def is_cap(node: fx.Node) -> bool:
    """Tell whether a node is the tanh of cap * tanh(x / cap), which leaves small values alone."""
    inner = node.args[0] if op_key(node) == "tanh" and node.args else None
    before = _factor(inner) if isinstance(inner, fx.Node) else None
    after = [_factor(user) for user in node.users]
    return before is not None and all(
        f is not None and math.isclose(before * f, 1.0, rel_tol=1e-6) for f in after
    )


def _factor(node: fx.Node) -> float | None:
    """Return by which number a node scales a tensor; None where it does something else."""
    number = node.args[1] if len(node.args) > 1 else None
    if not isinstance(number, (int, float)) or not number:
        return None
    return {"mul": float(number), "div": 1.0 / number}.get(op_key(node))
