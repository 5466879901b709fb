"""What a slice costs as a graph, beside the same size in its own class.

    python -m tests.natives.speed [names ...] [--rounds 20]

Both run in turns in one process, on one thread; CPU time is counted, which other work on the
machine moves least. Prints a Markdown table: the median of each, and of their ratios with the
quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import matryoshkafy as mk

BATCH, LENGTH, WIDTH = 32, 48, 256


def _text(kind: str, config: str, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    fields = {"vocab_size": 500, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, **more}
    layers = {"num_hidden_layers": 4, "num_attention_heads": 8, "max_position_embeddings": 64}
    made = getattr(transformers, config)(**fields, **layers)
    model = getattr(transformers, kind)(made).eval()
    ids = torch.randint(3, 500, (BATCH, LENGTH))
    return model, {"input_ids": ids, **({"use_cache": False} if "Llama" in kind else {})}


def _vit() -> tuple[nn.Module, dict[str, Any]]:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=112, embed_dim=WIDTH, num_heads=8)
    return model.eval(), {"x": torch.randn(BATCH, 3, 112, 112)}


MODELS: Mapping[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "BERT": lambda: _text("BertModel", "BertConfig"),
    "LLaMA": lambda: _text("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=4),
    "timm ViT": _vit,
}


def measure(name: str, rounds: int) -> tuple[float, float, list[float]]:
    """Return the CPU seconds of a forward pass of half the width: as a graph, and native.

    Then the quartiles of their ratios, each of two passes that follow one another.
    """
    torch.manual_seed(0)
    model, call = MODELS[name]()
    doll = mk.convert(model, (), call, sizes=[0.5, 1.0], nesting="sliced", check=False)
    graph = mk.slice(doll, doll.sizes[0])
    native = mk.native(graph, like=model)
    spent: dict[nn.Module, list[float]] = {graph: [], native: []}
    for number in range(rounds + 2):
        turns = list(spent.items())
        for one, times in turns if number % 2 else reversed(turns):  # neither is always the first
            started = time.process_time()
            with torch.no_grad():
                one(**call)
            times.append(time.process_time() - started)
    first, second = (times[2:] for times in spent.values())
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return statistics.median(first), statistics.median(second), statistics.quantiles(ratios, n=4)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| model | graph, ms | native, ms | graph to native |\n|---|---:|---:|---:|")
    for name in options.names:
        graph, native, (low, ratio, high) = measure(name, options.rounds)
        spread = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {name} | {1e3 * graph:.1f} | {1e3 * native:.1f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
