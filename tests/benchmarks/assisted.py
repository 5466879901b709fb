"""A small native size drafts for its large one: how much is accepted, how long it takes.

    python -m tests.benchmarks.assisted FOLDER [--sentences 12]

FOLDER is a transformers folder of whisper-tiny.en. Its sizes are ordered, not trained: half of the
feed-forward units (`ffn`), or 320 of 384 units of everything. Sentences come from `pydoc_data`,
spoken by espeak-ng (Debian). A LLaMA with random weights follows, for the text alone. Texts must be
those of greedy decoding; anything else ends the run. One thread, CPU seconds, both ways in turns.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import matryoshkafy as mk
from tests.benchmarks.whisper import hear

CALIBRATION = 8
Call = Mapping[str, Any]


@dataclass
class Count:
    """What decoding asked of the two models, over all texts."""

    tokens: int = 0
    large: int = 0
    drafted: int = 0
    greedy_seconds: float = 0.0
    assisted_seconds: float = 0.0

    def row(self, name: str) -> str:
        """Return the table's row: share of drafts that stand, tokens a pass, time to greedy."""
        accepted = (self.tokens - self.large) / max(1, self.drafted)
        return (
            f"| {name} | {self.tokens} | {self.large} | {self.drafted} | {100 * accepted:.0f} % | "
            f"{self.greedy_seconds:.1f} | {self.assisted_seconds:.1f} | "
            f"{self.greedy_seconds / self.assisted_seconds:.2f} |"
        )


@contextmanager
def _passes(model: nn.Module) -> Iterator[list[int]]:
    """Count the passes of a model while it decodes."""
    seen: list[int] = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    try:
        yield seen
    finally:
        handle.remove()


def compared(large: Any, small: Any, calls: list[Call]) -> Count:
    """Decode greedily and with the small model's drafts; raise where the texts differ."""
    count = Count()
    for call in calls:
        started = time.process_time()
        with _passes(large) as alone:
            wanted: Tensor = large.generate(**call, do_sample=False)
        count.greedy_seconds += time.process_time() - started
        started = time.process_time()
        with _passes(large) as checks, _passes(small) as drafts:
            found: Tensor = large.generate(**call, do_sample=False, assistant_model=small)
        count.assisted_seconds += time.process_time() - started
        if not torch.equal(found, wanted):
            raise SystemExit(f"another text: {found.tolist()} instead of {wanted.tolist()}")
        count.tokens += len(alone)
        count.large += len(checks)
        count.drafted += len(drafts)
    return count


def _whisper(folder: Path, sentences: int) -> None:
    heard = hear(folder, sentences + CALIBRATION)
    model, sound, batches = heard.model, heard.sound, heard.batches(CALIBRATION)
    calls = [{"input_features": f, "max_new_tokens": 40} for f in sound[CALIBRATION:]]
    for scope, size in (("ffn", 0.5), ("full", 320 / 384)):
        doll = mk.convert(
            copy.deepcopy(model), batches[0], sizes=[size, 1.0], nesting="sliced", scope=scope
        ).eval()
        mk.order(doll, batches, unread="leave")
        small = mk.native(mk.slice(doll, doll.sizes[0]), like=model)
        large = mk.native(mk.slice(doll, doll.sizes[-1]), like=model)
        for each in (small, large):
            each.generation_config = copy.deepcopy(model.generation_config)
        count = compared(large, small, calls)
        print(count.row(f"whisper-tiny.en, {scope} {size:.2f}"), flush=True)


def _llama() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=500,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    large = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 500, (6, 9))
    call = {"input_ids": ids, "use_cache": False}
    doll = mk.convert(large, (), call, sizes=[0.5, 1.0], nesting="sliced")
    small = mk.native(mk.slice(doll, 0.5), like=large)
    calls = [
        {"input_ids": row[None], "attention_mask": torch.ones(1, 9), "max_new_tokens": 40}
        for row in ids
    ]
    print(compared(large, small, calls).row("LLaMA, random weights, 0.5"))


def main() -> None:
    """Print the rows of the table."""
    parser = argparse.ArgumentParser(description="a small size drafts for its large one")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sentences", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | tokens | passes of the large | drafted | accepted | greedy, s | drafted, s |"
          " speed |\n|---|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    _llama()
    _whisper(options.folder, options.sentences)


if __name__ == "__main__":
    main()
