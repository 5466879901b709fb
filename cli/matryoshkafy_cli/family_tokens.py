"""A causal language model as the subject of a family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import matryoshkafy
from matryoshkafy.dolls.doll import Doll
from matryoshkafy.training import Term
from matryoshkafy_cli.families import computed, split
from matryoshkafy_cli.screen import CommandError


def logits(output: Any, batch: Any) -> Tensor:
    """Return the logits of a model's output."""
    del batch
    return output.logits


@dataclass
class Tokens:
    """A causal language model and stretches of tokens, all of one length."""

    folder: Path
    model: nn.Module
    train: Sequence[Tensor]
    held: Sequence[Tensor]
    lengths: Sequence[int] | None = None

    def batch(self, rows: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the stretches as a batch."""
        return {"input_ids": torch.stack(list(rows))}

    def terms(self, doll: Doll) -> tuple[Term, ...]:
        """Return the next token's distribution."""
        del doll
        return (Term("kl", of=logits),)

    def quality(self, model: nn.Module, truth: Any) -> tuple[dict[str, float], Any]:
        """Return the perplexity of the held-out tokens, and how often the likeliest next token is
        the full model's.
        """
        said = [out.logits for out in computed(model, self, self.held)]
        likeliest = torch.cat([one.argmax(-1) for one in said])
        ids = torch.stack(list(self.held))
        parts = zip(said, ids.split([len(one) for one in said]), strict=True)
        lost = sum(
            float(F.cross_entropy(one[:, :-1].mT.float(), part[:, 1:], reduction="sum"))
            for one, part in parts
        )
        same = 1.0 if truth is None else float((likeliest == truth).double().mean())
        return {"perplexity": math.exp(lost / ids[:, 1:].numel()), "same token": same}, likeliest

    def write(self, doll: Doll, small: GraphModule, folder: Path) -> nn.Module:
        """Write the folder of a size in the model's own class, the tokenizer beside it."""
        from matryoshkafy.natives.loading import load_native

        del doll
        matryoshkafy.save(small, folder, to="hf", like=self.folder, force=True)
        return load_native(folder)


def tokens_subject(folder: Path, texts: Sequence[str], length: int, seed: int) -> Tokens:
    """Return the subject of a folder and texts: joined, and cut into stretches of `length`."""
    import transformers

    from matryoshkafy_cli.transformers_models import from_folder

    model = from_folder(folder).model.eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    end = tokenizer.eos_token or "\n"
    ids = tokenizer(end.join(texts), add_special_tokens=False)["input_ids"]
    rows = list(torch.tensor(ids).split(length))[: len(ids) // length]
    if len(rows) < 100:
        raise CommandError(
            f"the texts have {len(ids)} tokens; expected at least 100 stretches of --length "
            f"{length}, of which a fifth is held out. Give more text, or a smaller --length."
        )
    return Tokens(folder, model, *split(rows, seed, "stretches"))
