"""An encoder-decoder in steps gives what a forward pass over both texts gives, however tokens are shared out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.decoders.models import SOURCE_FAMILIES, VOCAB, build
from tests.decoders.test_decoder_steps import step_batch
from tests.references import ErrorRule, in_double
from torch import Tensor
from transformers import BartForConditionalGeneration

from tilewright.driver.options import CompileOptions
from tilewright.driver.source_steps import SourceStepModel, compile_source_steps
from tilewright.driver.steps import Pages
from tilewright.errors import CacheRefused
from tilewright.ir.steps import SourceBatch, SourceModel, StepBatch

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = 8
TABLE = torch.tensor([[3, 7, 1, 0], [2, 13, 0, 0], [11, 12, 5, 9]], dtype=torch.int32)
# The third sequence is written behind the source of the first, as a beam or a second return sequence is.
SOURCES = torch.tensor([[14, 4, 18], [6, 0, 0]], dtype=torch.int32)
OF = torch.tensor([0, 1, 0])
SOURCE_LENGTHS = (19, 8)
LENGTHS = (21, 9, 30)
STEPS = ((5, 0, 11), (1, 3, 1), (8, 1, 17), (6, 4, 1), (1, 1, 0))


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


@pytest.mark.parametrize("family", SOURCE_FAMILIES)
def test_steps_equal_one_forward_pass(family: str) -> None:
    model = build(family, seed=0)
    compiled = steps_of(model)
    assert isinstance(compiled, SourceModel)
    assert not compiled.compiled.spec.notes["eager"]
    assert not compiled.reader.spec.notes["eager"]
    generator = torch.Generator().manual_seed(1)
    sequences, sources = random_ids(generator, *LENGTHS), random_ids(generator, *SOURCE_LENGTHS)
    with torch.no_grad():
        eager, wide = (
            [
                each(input_ids=sources[of][None], decoder_input_ids=ids[None]).logits[0]
                for of, ids in zip(OF.tolist(), sequences, strict=True)
            ]
            for each in (model, in_double(model))
        )
    pool = compiled.make_pages(20)
    for tensor in pool.tensors:
        tensor.fill_(float("nan"))  # what nobody has written must not be read
    read(compiled, pool, sources[:1], SOURCES[:1])
    done, rule = [0, 0, 0], ErrorRule()
    for step, counts in enumerate(STEPS):
        if step == 1:  # the first step leaves the second sequence out
            read(compiled, pool, sources[1:], SOURCES[1:, :1])
        active = [i for i in range(3) if counts[i]]
        spans = {i: slice(done[i], done[i] + counts[i]) for i in active}
        tokens = [sequences[i][spans[i]] for i in active]
        wanted = torch.rand(sum(counts), generator=generator) < 0.7
        batch = step_batch(tokens, [done[i] for i in active], TABLE[active].contiguous(), wanted)
        batch = behind(batch, SOURCES, SOURCE_LENGTHS, OF[active])
        batch.check(page_size=PAGE, pages=20, vocab_size=compiled.vocab_size, max_length=compiled.max_length)
        found = compiled.step(pool, batch)
        rule.add(found, *(torch.cat([each[i][spans[i]] for i in active])[wanted] for each in (eager, wide)))
        done = [n + count for n, count in zip(done, counts, strict=True)]
    rule.check(family)


def test_one_pool_serves_tokens_and_sources() -> None:
    model = build("bart", seed=0)
    compiled = steps_of(model, kv_dtype="bf16")
    pool = compiled.make_pages(4)
    assert len(pool.tensors) == 2 * model.config.decoder_layers
    assert {tensor.dtype for tensor in pool.tensors} == {torch.bfloat16}
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
    assert float((found - wide).abs().max()) < 0.02 * float(wide.abs().max())


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
