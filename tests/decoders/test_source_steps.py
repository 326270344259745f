"""Corners of an encoder-decoder in steps; what every family does in every kind of step is in ``test_decoder_table``."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.decoders.models import VOCAB, build
from tests.decoders.test_decoder_steps import step_batch
from tests.references import ErrorRule, in_double
from torch import Tensor
from transformers import BartForConditionalGeneration

from tilewright.driver.options import CompileOptions
from tilewright.driver.source_steps import SourceStepModel, compile_source_steps
from tilewright.driver.steps import Pages
from tilewright.errors import CacheRefused
from tilewright.ir.steps import SourceBatch, StepBatch

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = 8


def steps_of(model: torch.nn.Module, **options: Any) -> SourceStepModel:
    return compile_source_steps(model, CompileOptions(**options), page_size=PAGE)


def read(compiled: SourceStepModel, pool: Pages, sources: list[Tensor], table: Tensor) -> None:
    lengths = torch.tensor([len(each) for each in sources], dtype=torch.int32)
    ids = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_value=5)
    compiled.read_sources(pool, SourceBatch(ids, lengths, table))


def behind(batch: StepBatch, table: Tensor, lengths: tuple[int, ...], of: Tensor) -> StepBatch:
    return replace(
        batch, source_table=table[of].contiguous(), source_lengths=torch.tensor(lengths, dtype=torch.int32)[of]
    )


def random_ids(generator: torch.Generator, *lengths: int) -> list[Tensor]:
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def test_a_long_source_is_shared_out_among_programs() -> None:
    """Beyond 256 slots several programs read the keys of a sequence; T5 has no table of positions that would end."""
    model = build("t5", seed=0)
    compiled = steps_of(model)
    tokens, source = random_ids(torch.Generator().manual_seed(4), 14, 317)
    with torch.no_grad():
        eager, wide = (
            each(input_ids=source[None], decoder_input_ids=tokens[None]).logits[0] for each in (model, in_double(model))
        )
    pool, rule, done = compiled.make_pages(43), ErrorRule(), 0
    pages = torch.randperm(43, generator=torch.Generator().manual_seed(5)).int()
    own, table, every = pages[None, :2].contiguous(), pages[None, 2:42].contiguous(), torch.zeros(1, dtype=torch.int64)
    read(compiled, pool, [source], table)
    for count in (1, 1, 5, 7):
        span = slice(done, done + count)
        batch = behind(step_batch([tokens[span]], [done], own), table, (317,), every)
        rule.add(compiled.step(pool, batch), eager[span], wide[span])
        done += count
    rule.check("t5")


@pytest.mark.parametrize(("kind", "bound"), [("bf16", 0.02), ("int8", 0.03)], ids=["bf16", "int8"])
def test_one_pool_serves_tokens_and_sources(kind: str, bound: float) -> None:
    model = build("bart", seed=0)
    compiled = steps_of(model, kv_dtype=kind)
    pool = compiled.make_pages(4)
    kinds = {"bf16": [torch.bfloat16] * 2, "int8": [torch.int8] * 2 + [torch.float32] * 2}  # the latter are scales
    assert [tensor.dtype for tensor in pool.tensors] == kinds[kind] * model.config.decoder_layers
    tokens, source = random_ids(torch.Generator().manual_seed(2), 7, 12)
    table = torch.tensor([[3, 1]], dtype=torch.int32)
    read(compiled, pool, [source], table)
    own = torch.tensor([[2]], dtype=torch.int32)
    every = torch.zeros(1, dtype=torch.int64)
    found = torch.cat(
        [compiled.step(pool, behind(step_batch([tokens[i : i + 1]], [i], own), table, (12,), every)) for i in range(7)]
    )
    with torch.no_grad():
        wide = in_double(model)(input_ids=source[None], decoder_input_ids=tokens[None]).logits[0]
    # Keys and values keep 8 bits: the error is that of rounding them, and not that of another token.
    assert float((found - wide).abs().max()) < bound * float(wide.abs().max())


class PeekingBart(BartForConditionalGeneration):
    """Its decoder reads the encoder's states outside of attention too."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + out.encoder_last_hidden_state.amax()
        return out


def test_a_decoder_that_reads_its_source_elsewhere_is_refused() -> None:
    model = PeekingBart(build("bart", seed=0).config).eval()
    with pytest.raises(CacheRefused, match="which is computed from the source, and is no attention"):
        steps_of(model)
