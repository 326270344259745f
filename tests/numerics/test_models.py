"""Whole models against eager: the error rule, rows computed, fields, NaN in pad rows, no compilation after warm-up."""

import pytest
import torch
from references import PATTERNS, SEEDS, ErrorRule, build, in_double, masks, real_outputs

import tilewright

SHAPES = ((1, 1), (1, 13), (3, 7), (5, 33))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("gemm", ["auto", "triton"])
@pytest.mark.parametrize("opt_level", [1, 2])
def test_error_rule(family: str, gemm: str, opt_level: int) -> None:
    rules: dict[str, ErrorRule] = {}
    for seed in SEEDS:
        model = build(family, seed)
        double = in_double(model)
        compiled = tilewright.compile(model, gemm=gemm, opt_level=opt_level, unpad="on")
        generator = torch.Generator().manual_seed(seed)
        for (batch, length), pattern in zip(SHAPES * 2, (*PATTERNS, "full", "left"), strict=True):
            ids = torch.randint(3, 99, (batch, length), generator=generator)
            mask = masks(batch, length, pattern, generator)
            before = compiled.stats
            with torch.no_grad():
                eager, reference = model(ids, attention_mask=mask), double(ids, attention_mask=mask)
            ours = compiled(ids, attention_mask=mask)
            assert type(ours) is type(eager)
            assert list(ours.keys()) == list(eager.keys())
            rows = compiled.stats.rows_computed - before.rows_computed
            kept = mask.clone()
            if "pooler_output" in eager:
                kept[:, 0] = 1  # the pooler reads column 0, masked or not
            assert rows == int(kept.sum())
            for name, value in real_outputs(ours):
                real = mask.bool() if value.dim() == 3 else None
                rules.setdefault(name, ErrorRule()).add(value, eager[name], reference[name], real)
                if real is not None:
                    assert (value[~real] == 0).all()
        assert compiled.stats.eager_steps == 0
        assert compiled.stats.fallbacks == 0
        if gemm == "triton":
            assert compiled.stats.vendor_calls == 0
    for rule in rules.values():
        rule.check()


def test_no_mask_means_all_tokens() -> None:
    model = build("bert", 0)
    ids = torch.randint(3, 99, (3, 9))
    with torch.no_grad():
        expected = model(ids).last_hidden_state
    assert torch.allclose(tilewright.compile(model)(ids).last_hidden_state, expected, atol=1e-4)


def test_nan_in_pad_rows_changes_nothing() -> None:
    model = build("bert", 1)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7] = float("nan")
    mask = masks(4, 12, "left", torch.Generator().manual_seed(3))
    mask[1] = masks(1, 12, "right", torch.Generator().manual_seed(3))[0]
    ids = torch.randint(8, 99, (4, 12))
    for unpad in ("on", "off"):
        compiled = tilewright.compile(model, unpad=unpad)
        clean = compiled(ids, attention_mask=mask).last_hidden_state
        dirty = compiled(torch.where(mask.bool(), ids, 7), attention_mask=mask).last_hidden_state
        assert torch.equal(clean[mask.bool()], dirty[mask.bool()])


def test_an_empty_row_is_zero_and_harms_no_other() -> None:
    model = build("bert", 2)
    compiled = tilewright.compile(model)
    ids = torch.randint(3, 99, (3, 8))
    mask = masks(3, 8, "empty_row", torch.Generator().manual_seed(0))
    ours = compiled(ids, attention_mask=mask).last_hidden_state
    assert (ours[0] == 0).all()
    alone = compiled(ids[1:], attention_mask=mask[1:]).last_hidden_state
    assert torch.equal(ours[1:], alone)
    nothing = compiled(ids, attention_mask=torch.zeros_like(mask)).last_hidden_state
    assert nothing.shape == ours.shape
    assert (nothing == 0).all()


def test_no_compilation_after_warm_up() -> None:
    compiled = tilewright.compile(build("bert", 3))
    compiled.warmup()
    before = compiled.stats.compilations
    generator = torch.Generator().manual_seed(5)
    for _ in range(40):
        batch, length = torch.randint(1, 9, (1,)).item(), torch.randint(1, 70, (1,)).item()
        ids = torch.randint(3, 99, (batch, length), generator=generator)
        compiled(ids, attention_mask=masks(batch, length, "right", generator))
    assert compiled.stats.compilations == before
    assert compiled.stats.fallbacks == 0


def test_layers_share_kernels() -> None:
    from transformers import BertConfig, BertModel

    from tilewright.driver.kernels import distinct_sources

    counts = []
    for layers in (2, 12):
        config = BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64
        )
        compiled = tilewright.compile(BertModel(config).eval())
        (variant,) = compiled.variants.values()
        counts.append(len(distinct_sources(variant.compiled.spec)))
    assert counts[0] == counts[1]
