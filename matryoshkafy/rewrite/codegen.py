"""The forward that a graph module gets: the user's arguments in, the user's structure out."""

from __future__ import annotations

import keyword
import re
from typing import Any

from torch import fx, nn
from torch.fx.graph import CodeGen

from matryoshkafy.graph.signature import Signature

# torch writes the tensor of a module called "class" as self.class.weight, which is no Python.
READS_STATE = re.compile(r"^\w+[^=]* = (getattr\()*self[.,]")
KEYWORD = re.compile(rf"\.({'|'.join(keyword.kwlist)})\b")


class StateCodeGen(CodeGen):
    """Writes the usual forward; tensors are reached whatever the modules on the way are called."""

    def __init__(self) -> None:
        super().__init__()
        self._body_transformer = _reached


def _reached(body: list[str]) -> list[str]:
    """x = self.class.weight  ->  x = self.__getattr__("class").weight"""
    return [
        KEYWORD.sub(r'.__getattr__("\1")', line) if READS_STATE.match(line) else line
        for line in body
    ]


def runnable(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return the module of a graph that takes flat tensors, over the state of a root."""
    graph.set_codegen(StateCodeGen())
    return fx.GraphModule(root, graph)


class CallCodeGen(StateCodeGen):
    """Writes a forward that takes the user's arguments and returns the user's output structure.

    With `flat` the outputs are returned as the list they are in the graph.
    """

    def __init__(self, signature: Signature, *, flat: bool = False) -> None:
        super().__init__()
        self.signature, self.flat = signature, flat

    def additional_globals(self) -> list[tuple[str, Any]]:
        """The signature, under a name that no node can have."""
        return [("_call_signature", self.signature)]

    def gen_fn_def(
        self, free_vars: list[str], maybe_return_annotation: str, **kwargs: object
    ) -> str:
        """def forward(self, *args, **kwargs), then the flat inputs under their names."""
        del maybe_return_annotation, kwargs
        names = [v.partition(":")[0].partition("=")[0].strip() for v in free_vars if v != "self"]
        flat = f"[{', '.join(names)}]" if names else "_"
        return (
            "def forward(self, *args, **kwargs):\n"
            f"    {flat} = _call_signature.flatten(args, kwargs)"
        )

    # torch.export and every other fx.Interpreter run the graph itself, between these two.

    def process_inputs(self, *args: Any) -> list[Any]:
        """The flat inputs of a call by position"""
        return self.signature.by_position(args)

    def process_outputs(self, outputs: Any) -> Any:
        """The flat outputs in the user's structure"""
        return outputs if self.flat else self.signature.unflatten(outputs)

    def generate_output(self, output_args: object, *args: object, **kwargs: object) -> str:
        """return the outputs in the user's structure"""
        del args, kwargs
        values = f"{output_args!r}"
        return f"return {values}" if self.flat else f"return _call_signature.unflatten({values})"
