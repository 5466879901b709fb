"""Eleven published recommenders: judged from outside in both nestings, and trained at all sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import matryoshkafy as mk
from tests.zoo.judge import MASKED, SLICED, Case, judge, leaves, run
from tests.zoo.recommenders import PUBLISHED
from tests.zoo.registry import entries

QUICK = ("identity", "slice", "native", "beyond", "step")
NESTINGS = ("sliced", "masked")

# The authors' names, one or two of each: their checkpoints load.
NAMES = {
    "published_sasrec": "attention_layers.1.in_proj_weight forward_layers.0.conv1.weight",
    "published_bert4rec": "bert.transformer_blocks.0.attention.linear_layers.2.weight"
    " bert.embedding.position.pe.weight bert.transformer_blocks.1.input_sublayer.norm.a_2",
    "published_fmlp_rec": "item_encoder.layer.0.filterlayer.complex_weight"
    " item_encoder.layer.1.intermediate.dense_1.weight",
    "published_lru_rec": "model.lru_blocks.0.lru_layer.params_log embedding.token.weight",
    "published_unisrec": "moe_adaptor.experts.2.lin.weight moe_adaptor.w_gate"
    " trm_encoder.layer.0.multi_head_attention.query.weight plm_embedding.weight",
    "published_vq_rec": "pq_code_embedding.weight trm_encoder.layer.1.feed_forward.dense_2.bias",
    "published_recformer": "longformer.encoder.layer.0.attention.self.query_global.weight"
    " longformer.embeddings.item_position_embeddings.weight item_embedding.weight",
    "published_mmssl": "weight_dict.w_self_attention_cat user_id_embedding.weight",
    "published_vip5": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    " encoder.visual_embedding.feat_embedding.0.model.0.weight lm_head.weight"
    " decoder.block.1.layer.1.EncDecAttention.q.weight",
    "published_fmrlrec": "model.lru_blocks.1.feed_forward.gate.mrl_linear_2.weight"
    " embedding.projector.weight",
    "published_hstu": "_attention_layers.1._uvqk _attention_layers.0._rel_attn_bias._w"
    " _item_emb.weight",
}


each_model = pytest.mark.parametrize("name", PUBLISHED)
either_nesting = pytest.mark.parametrize("nesting", NESTINGS)


@either_nesting
@each_model
@pytest.mark.filterwarnings("ignore")
def test_the_slice_is_the_small_recommender(name: str, nesting: str) -> None:
    (entry,) = entries([name])
    verdict = judge(entry, nesting, only=QUICK)
    bad = {k: v for k, v in verdict.checks.items() if v != "right" and not v.startswith("none")}
    assert not bad, bad


@pytest.mark.slow
@either_nesting
@each_model
@pytest.mark.filterwarnings("ignore")
def test_every_other_check_of_the_judge(name: str, nesting: str) -> None:
    (entry,) = entries([name])
    checks = SLICED if nesting == "sliced" else MASKED
    verdict = judge(entry, nesting, only=[c for c in checks if c not in QUICK])
    assert verdict.status == "right", verdict.checks


@pytest.mark.parametrize("name", ["published_sasrec", "published_lru_rec", "published_bert4rec"])
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.filterwarnings("ignore")
def test_a_few_steps_at_all_sizes_bring_every_loss_down(name: str, nesting: str) -> None:
    (entry,) = entries([name])
    model, args, kwargs = entry.build()
    doll = mk.convert(model, args, kwargs, sizes=[0.5, 1.0], nesting=nesting)
    case = Case(entry, model, doll, (args, kwargs))
    targets = [torch.randn_like(t) for t in leaves(run(model, case.call))]
    optimizer = torch.optim.Adam(doll.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        outputs = doll.outputs(*args, **kwargs)
        each = [
            sum((a - b).square().mean() for a, b in zip(leaves(outputs[s]), targets, strict=True))
            for s in doll.sizes
        ]
        losses.append([float(loss) for loss in each])
        optimizer.zero_grad()
        torch.stack([torch.as_tensor(loss) for loss in each]).sum().backward()
        optimizer.step()
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True)), losses


@pytest.mark.parametrize("name", NAMES)
def test_parameters_carry_the_authors_names(name: str) -> None:
    (entry,) = entries([name])
    state = entry.build()[0].state_dict()
    assert set(NAMES[name].split()) <= set(state)


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.filterwarnings("ignore")
def test_a_recommender_that_is_nested_already_keeps_its_own_sizes(
    nesting: str, tmp_path: Path
) -> None:
    (entry,) = entries(["published_fmrlrec"])
    model, args, kwargs = entry.build()
    doll = mk.convert(model, args, kwargs, sizes=[8, 16, 32], nesting=nesting)
    small = mk.slice(doll, 16)
    layer = "model.lru_blocks.0.feed_forward.w_1.mrl_linear_"
    assert {n: tuple(t.shape) for n, t in small.state_dict().items() if n.startswith(layer)} == {
        f"{layer}0.weight": (8, 8),
        f"{layer}0.bias": (8,),
        f"{layer}1.weight": (8, 16),
        f"{layer}1.bias": (8,),
    }
    with torch.no_grad():
        whole, own = model(*args, **kwargs), doll(*args, **kwargs)
        for full, mine, cut in zip(*map(leaves, (whole, own, small(*args, **kwargs))), strict=True):
            # Nothing of the model is masked away: it is such a doll itself.
            torch.testing.assert_close(mine, full)
            if cut.shape != full.shape:
                torch.testing.assert_close(cut, full[..., : cut.shape[-1]])
    mk.save(small, tmp_path / "small")
    again = mk.slice(mk.load(tmp_path / "small"), 8)
    expected = mk.slice(doll, 8).state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in again.state_dict().items())
