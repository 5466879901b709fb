"""What pickle keeps of a doll or a sub-model: our own JSON, and its tensors as they are.

So torch.save, copy.deepcopy, spawned workers and Ray carry models, with ties, modes and kinds, and
share the tensors' memory where they do so; generated code is made anew, never carried.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from matryoshkafy.dolls.doll import Doll, attributes_of
from matryoshkafy.dolls.slice import parts_of, state_of
from matryoshkafy.files.description import (
    check_fields,
    description_from_json,
    description_to_json,
    fitting,
    records_of,
)
from matryoshkafy.files.graph_json import callables, graph_to_json

PLACE = Path("a pickled model")


def frozen(model: nn.Module) -> tuple[str, dict[str, Tensor], dict[str, object]]:
    """Return a model as text, tensors by name, and what the user's model said of itself."""
    trace, plan = parts_of(model)
    tensors = state_of(model)
    described = description_to_json(model, trace, plan, records_of(tensors, trace, tensors))
    described["graph"] = graph_to_json(trace.graph, callables(described["namespaces"]))
    own = attributes_of(model) if isinstance(model, Doll) else {}
    return json.dumps(described, allow_nan=False), tensors, own


def revive(text: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, object]) -> nn.Module:
    """Return the model that `frozen` was given."""
    with fitting(PLACE):
        saved = json.loads(text)
        check_fields(saved, PLACE)
        described = description_from_json(saved, saved["graph"], PLACE)
        if described.kind == "doll":
            return Doll(described.over(tensors), described.plan, attributes)
        return described.model(tensors)
