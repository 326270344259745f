"""Corners of steps of generation; what every family does in every kind of step is in ``test_decoder_table``."""

from typing import Any

import pytest
import torch
from tests.decoders.models import VOCAB, build
from tests.references import ErrorRule, in_double
from torch import Tensor

from tilewright.driver.options import CompileOptions
from tilewright.driver.steps import StepModel, compile_steps
from tilewright.errors import CacheRefused
from tilewright.ir.steps import StepBatch

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = 8


def steps_of(model: torch.nn.Module, **options: Any) -> StepModel:
    return compile_steps(model, CompileOptions(**options), page_size=PAGE)


def step_batch(tokens: list[Tensor], starts: list[int], table: Tensor, wanted: Tensor | None = None) -> StepBatch:
    """A step of these new tokens; logits of all of them, or of the wanted rows (a bool for each)."""
    counts = torch.tensor([len(each) for each in tokens])
    offsets = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
    slots = torch.cat([start + torch.arange(len(each)) for start, each in zip(starts, tokens, strict=True)]).int()
    wanted = torch.ones(len(slots), dtype=torch.bool) if wanted is None else wanted
    before = torch.cat((torch.zeros(1), wanted.cumsum(0)))
    ends = (torch.tensor(starts) + counts).int()
    rows, cu_rows = wanted.nonzero().reshape(-1).int(), before[offsets.long()].int()
    return StepBatch(torch.cat(tokens), slots, offsets, ends, table, rows, cu_rows)


def test_keys_shared_out_among_programs() -> None:
    """Beyond 256 slots several programs read the keys of a sequence, in a full layer and in one of a window."""
    model = build("gemma3", seed=0)
    compiled = steps_of(model)
    tokens = torch.randint(3, VOCAB, (311,), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        eager, wide = model(tokens[None]).logits[0], in_double(model)(tokens[None]).logits[0]
    pool, rule, done = compiled.make_pages(40), ErrorRule(), 0
    table = torch.randperm(40, generator=torch.Generator().manual_seed(5)).int()[None]
    for count in (250, 1, 5, 1, 45, 1, 8):
        span = slice(done, done + count)
        rule.add(compiled.step(pool, step_batch([tokens[span]], [done], table)), eager[span], wide[span])
        done += count
    rule.check("gemma3")


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_narrow_pages(kv_dtype: str) -> None:
    model = build("llama", seed=0)
    compiled = steps_of(model, kv_dtype=kv_dtype)
    tokens = torch.randint(3, VOCAB, (12,), generator=torch.Generator().manual_seed(2))
    pool = compiled.make_pages(3)
    # Two layers of two heads of 16: of whole numbers a key and a value each have the size of a step beside them.
    assert pool.bytes == 3 * PAGE * 2 * 2 * 2 * {"bf16": 16 * 2, "int8": 16 + 4}[kv_dtype]
    table = torch.tensor([[2, 1]], dtype=torch.int32)
    found = torch.cat([compiled.step(pool, step_batch([tokens[i : i + 1]], [i], table)) for i in range(12)])
    with torch.no_grad():
        wide = in_double(model)(tokens[None]).logits[0]
    # Rounding is off by at most 1/256 of an element in bf16, and by 1/254 of the largest of a head in int8. That error
    # shows, and not that of another token.
    assert 1e-4 < float((found - wide).abs().max()) / float(wide.abs().max()) < 0.02


def test_copied_pages_go_on_alone() -> None:
    model = build("llama", seed=0)
    compiled = steps_of(model)
    generator = torch.Generator().manual_seed(3)
    prompt, one, other = (torch.randint(3, VOCAB, (n,), generator=generator) for n in (11, 4, 4))
    pool = compiled.make_pages(6)
    compiled.step(pool, step_batch([prompt], [0], torch.tensor([[4, 2]], dtype=torch.int32)))
    compiled.copy_pages(pool, torch.tensor([2]), torch.tensor([5]))  # the page that is not full
    table = torch.tensor([[4, 2], [4, 5]], dtype=torch.int32)
    found = compiled.step(pool, step_batch([one, other], [11, 11], table)).split(4)
    with torch.no_grad():
        wide = [in_double(model)(torch.cat((prompt, each))[None]).logits[0, 11:] for each in (one, other)]
    for ours, reference in zip(found, wide, strict=True):
        assert float((ours - reference).abs().max()) < 1e-4 * float(reference.abs().max())


def test_memory_that_is_no_keys_is_refused() -> None:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    with pytest.raises(CacheRefused, match="tokens meet in 'conv1d'"):
        steps_of(Lfm2ForCausalLM(Lfm2Config(vocab_size=VOCAB, **sizes, **layers)).eval())


def test_an_encoder_is_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=VOCAB
    )
    with pytest.raises(CacheRefused, match="sees keys that come after its query"):
        steps_of(BertLMHeadModel(config).eval())
