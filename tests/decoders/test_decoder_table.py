"""Every family in every kind of step is right against eager in fp64, and the page says so."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.decoders.models import SOURCE_FAMILIES, VOCAB, build
from tests.decoders.page import PAGE, WAYS
from tests.decoders.test_decoder_steps import step_batch
from tests.references import ErrorRule, in_double
from tests.table_page import Row
from torch import Tensor, nn

from tilewright.driver.generators import generator_of, steps_of
from tilewright.driver.options import CompileOptions
from tilewright.driver.source_steps import SourceStepModel
from tilewright.driver.steps import Pages, StepModel
from tilewright.errors import CacheRefused
from tilewright.ir.steps import SourceBatch, StepBatch

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE_SIZE, COUNT = 8, 20
# Pages of three sequences, in no order, as an allocator that has been at work for a while gives them.
TABLE = torch.tensor([[3, 7, 1, 0, 0], [2, 13, 0, 0, 0], [11, 12, 5, 9, 0]], dtype=torch.int32)
LENGTHS = (21, 9, 30)
# The third sequence is written behind the source of the first, as a beam or a second return sequence is.
SOURCES, OF = torch.tensor([[14, 4, 18], [6, 0, 0]], dtype=torch.int32), torch.tensor([0, 1, 0])
SOURCE_LENGTHS = (19, 8)
MIXED = ((5, 0, 11), (1, 3, 1), (8, 1, 17), (6, 4, 1), (1, 1, 0))
BEAMS: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 9}


def shares(way: str) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Steps of a way: how many tokens each sequence has in it, and whether its logits are looked at."""
    if way == "prefill":
        yield LENGTHS, True
    elif way == "chunked prefill":
        yield from ((tuple(min(7, max(0, n - start)) for n in LENGTHS), True) for start in range(0, 30, 7))
    elif way == "decode":
        yield (3, 1, 2), False
        yield from ((tuple(int(i + k < n) for k, n in zip((3, 1, 2), LENGTHS, strict=True)), True) for i in range(28))
    else:
        yield from ((counts, True) for counts in MIXED)


class Sequences:
    """Three random sequences, of an encoder-decoder behind two sources, and what eager makes of them."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = (*LENGTHS, *SOURCE_LENGTHS)
        *self.tokens, first, second = (torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths)
        self.sources = [first, second] if model.config.is_encoder_decoder else []  # type: ignore[union-attr]
        with torch.no_grad():
            self.eager, self.wide = ([self._logits(each, i) for i in range(3)] for each in (model, in_double(model)))

    def _logits(self, model: nn.Module, index: int) -> Tensor:
        ids = self.tokens[index][None]
        if not self.sources:
            return model(ids).logits[0]
        return model(input_ids=self.sources[OF[index]][None], decoder_input_ids=ids).logits[0]

    def pool(self, compiled: StepModel) -> Pages:
        """A pool that holds the sources; what nobody has written must not be read."""
        pool = compiled.make_pages(COUNT)
        for tensor in pool.tensors:
            tensor.fill_(float("nan"))
        if isinstance(compiled, SourceStepModel):
            lengths = torch.tensor(SOURCE_LENGTHS, dtype=torch.int32)
            ids = torch.nn.utils.rnn.pad_sequence(self.sources, batch_first=True, padding_value=5)
            compiled.read_sources(pool, SourceBatch(ids, lengths, SOURCES))
        return pool

    def batch(self, spans: dict[int, slice], wanted: Tensor) -> StepBatch:
        """A step of these tokens of each sequence."""
        active = list(spans)
        tokens = [self.tokens[i][spans[i]] for i in active]
        made = step_batch(tokens, [spans[i].start for i in active], TABLE[active].contiguous(), wanted)
        if not self.sources:
            return made
        of = OF[active]
        lengths = torch.tensor(SOURCE_LENGTHS, dtype=torch.int32)[of]
        return replace(made, source_table=SOURCES[of].contiguous(), source_lengths=lengths)


def add_errors(rule: ErrorRule, compiled: StepModel, given: Sequences, way: str) -> None:
    """Adds the errors of the logits over all steps of a way, some rows of each."""
    pool, done = given.pool(compiled), [0, 0, 0]
    generator = torch.Generator().manual_seed(2)
    for counts, looked_at in shares(way):
        spans = {i: slice(done[i], done[i] + counts[i]) for i in range(3) if counts[i]}
        wanted = torch.rand(sum(counts), generator=generator) < 0.7
        batch = given.batch(spans, wanted)
        batch.check(page_size=PAGE_SIZE, pages=COUNT, vocab_size=compiled.vocab_size, max_length=compiled.max_length)
        found = compiled.step(pool, batch)
        done = [n + count for n, count in zip(done, counts, strict=True)]
        if looked_at:
            rule.add(found, *(_rows(logits, spans)[wanted] for logits in (given.eager, given.wide)))
    assert tuple(done) == LENGTHS


def _rows(logits: Sequence[Tensor], spans: dict[int, slice]) -> Tensor:
    return torch.cat([logits[i][span] for i, span in spans.items()])


def beams(model: Any, compiled: StepModel) -> str:
    """Whether beam search gives the tokens of transformers, for prompts of different length."""
    ids = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    # Learned positions of an encoder count places, also those that are masked: its sources are padded behind.
    mask[0, slice(-4, None) if model.config.is_encoder_decoder else slice(4)] = 0
    given = {"attention_mask": mask, "pad_token_id": 0, **BEAMS}
    found = generator_of(model, lambda: compiled).generate(ids, **given)
    return "equal" if torch.equal(found, model.generate(ids, **given)) else "different"


def row_of(family: str) -> Row:
    """Compiles a family once, and checks all ways."""
    model = build(family, seed=0)
    try:
        compiled = steps_of(model, CompileOptions(), page_size=PAGE_SIZE)
    except CacheRefused as error:
        return Row(("refused",) * 5, (("refused", " ".join(str(error.why).split())),))
    assert not compiled.compiled.spec.notes["eager"]
    assert not isinstance(compiled, SourceStepModel) or not compiled.reader.spec.notes["eager"]
    given, cells = [Sequences(model, seed) for seed in range(5)], []
    for way in WAYS:
        rule = ErrorRule()
        for each in given:
            add_errors(rule, compiled, each, way)
        rule.check(f"{family}, {way}")
        cells.append(" / ".join(f"{1e6 * error / rule.largest:.2f}" for error in (rule.ours, rule.eager)))
    return Row((*cells, beams(model, compiled)))


@pytest.mark.parametrize("family", PAGE.families)
def test_family_in_steps(family: str, request: pytest.FixtureRequest) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        row = row_of(family)
    assert row.cells[-1] != "different"
    assert (family in SOURCE_FAMILIES) == bool(build(family, 0).config.is_encoder_decoder)  # type: ignore[union-attr]
    if request.config.getoption("--accept-golden"):
        PAGE.write({**PAGE.written(), family: row})
    assert row.agrees(PAGE.written().get(family)), "docs/decoders.md is not what the code does: look, --accept-golden"
