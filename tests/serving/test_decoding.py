"""One cache for all sizes: decoding is that of whole sequences, with and without a draft."""

from __future__ import annotations

import pytest
import torch

import matryoshkafy as mk
from matryoshkafy.serving.decoding import Decoder
from matryoshkafy.serving.vectors import ServingError
from tests.serving.test_session import Transformer, flops


def decoder_of(**options) -> tuple[mk.Doll, Decoder]:
    torch.manual_seed(0)
    model = Transformer(causal=True, **options).double().eval()
    ids = torch.randint(50, (1, 9))
    doll = mk.convert(model, (ids,), sizes="16..64", nesting="masked")
    return doll, Decoder(doll, ids)


def greedy(doll, ids: torch.Tensor, size: int, count: int) -> list[int]:
    """The plain way: the whole sequence at every token."""
    with torch.no_grad():
        for _ in range(count):
            logits = doll.outputs(ids)[size]
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, -count:].tolist()


@pytest.mark.parametrize("size", [16, 32, 64])
def test_decoding_with_a_cache_is_decoding_without(size: int) -> None:
    doll, decoder = decoder_of()
    ids = torch.randint(50, (1, 3))
    found = decoder.generate(ids, size=size, new_tokens=8)
    assert list(found.tokens) == greedy(doll, ids, size, 8)


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize(("draft", "size"), [(16, 32), (16, 64), (32, 64)])
def test_a_draft_changes_no_token(draft: int, size: int, window: int) -> None:
    doll, decoder = decoder_of()
    ids = torch.randint(50, (1, 3))
    found = decoder.generate(ids, size=size, draft=draft, new_tokens=8, window=window)
    assert list(found.tokens) == greedy(doll, ids, size, 8)
    assert 0 <= found.accepted <= found.drafted


def test_the_draft_adds_nothing_to_the_cache() -> None:
    _, decoder = decoder_of()
    ids = torch.randint(50, (1, 4))
    decoder.generate(ids, size=64, new_tokens=6)
    alone = [decoder.cache_bytes(size) for size in (16, 32, 64)]
    decoder.generate(ids, size=64, draft=16, new_tokens=6, window=1)
    drafted = [decoder.cache_bytes(size) for size in (16, 32, 64)]
    # 8 heads of 8 units, 2 blocks, keys and values, float64: 4 + 6 - 1 positions.
    assert sum(alone) == 8 * 8 * 2 * 2 * 8 * 9
    assert sum(drafted) <= sum(alone) + 8 * 8 * 2 * 2 * 8
    assert alone[0] == sum(alone) / 4


def test_a_text_ends_at_its_end() -> None:
    doll, decoder = decoder_of()
    ids = torch.randint(50, (1, 3))
    whole = greedy(doll, ids, 64, 8)
    found = decoder.generate(ids, size=64, draft=16, new_tokens=8, end=whole[4])
    assert list(found.tokens) == whole[: whole.index(whole[4]) + 1]


def test_a_llama_decodes() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(60, (1, 9))
    doll = mk.convert(model, kwargs={"input_ids": ids}, sizes=[16, 32, 64], nesting="masked")
    found = Decoder(doll, ids).generate(ids[:, :3], size=64, draft=16, new_tokens=6, window=2)
    with torch.no_grad():
        wanted = ids[:, :3]
        for _ in range(6):
            logits = doll(input_ids=wanted).logits
            wanted = torch.cat([wanted, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert list(found.tokens) == wanted[0, -6:].tolist()


def test_what_does_not_decode_is_refused() -> None:
    torch.manual_seed(0)
    ids = torch.randint(50, (1, 9))
    seeing = mk.convert(Transformer().eval(), (ids,), sizes="16..64", nesting="masked")
    with pytest.raises(ServingError, match="attention without a mask looks at later tokens"):
        Decoder(seeing, ids)
    sliced = mk.convert(Transformer(causal=True), (ids,), sizes="16..64", nesting="sliced")
    with pytest.raises(ServingError, match='nesting="masked"'):
        Decoder(sliced, ids)
    _, decoder = decoder_of()
    with pytest.raises(ServingError, match="expected a size below 32"):
        decoder.generate(ids, size=32, draft=64, new_tokens=2)


def test_positions_that_are_mixed_elsewhere_are_refused() -> None:
    class Mixing(Transformer):
        def forward(self, ids):
            return super().forward(ids).cumsum(1)

    torch.manual_seed(0)
    ids = torch.randint(50, (1, 9))
    doll = mk.convert(Mixing(causal=True).eval(), (ids,), sizes="16..64", nesting="masked")
    with pytest.raises(ServingError, match="some op beside the attention mixes positions"):
        Decoder(doll, ids)


def test_checking_a_draft_costs_the_difference() -> None:
    """Multiply-adds of a window of five tokens, by size and from the small size to the large."""
    doll, decoder = decoder_of()
    doll.requires_grad_(False)  # the counter of multiply-adds looks at gradients
    ids, start = torch.randint(50, (1, 9)), 4
    new = ids[:, start:]

    def window(levels: tuple[int, int], cached: dict):
        return decoder._window(new, start, levels, cached)

    def prefilled() -> None:
        decoder._forget()
        decoder._window(ids[:, :start], 0, (-1, 2), {})

    costs = []
    for level in (0, 2):
        prefilled()
        costs.append(flops(lambda level=level: window((-1, level), {})))
    # The weights of the large size, once each: two blocks of 12 D^2, whole, and the head.
    assert costs[1] < 1.2 * 2 * new.numel() * (2 * 12 * 64 * 64 + 50 * 64)
    prefilled()
    cached = window((-1, 0), {})[1]
    head = 2 * new.numel() * 50 * 16
    assert flops(lambda: window((0, 2), cached)) <= 1.1 * (costs[1] - costs[0]) + head
