"""The forward that a graph module gets: the user's arguments in, the user's structure out."""

from __future__ import annotations

from typing import Any

from torch.fx.graph import CodeGen

from matryoshkafy.graph.signature import Signature


class CallCodeGen(CodeGen):
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

    def generate_output(self, output_args: object, *args: object, **kwargs: object) -> str:
        """return the outputs in the user's structure"""
        del args, kwargs
        values = f"{output_args!r}"
        return f"return {values}" if self.flat else f"return _call_signature.unflatten({values})"
