"""Steps of generation hold what was said before they ran, and no more after thousands of requests."""

import gc
import random

import pytest
import torch
from tests.decoders.models import VOCAB, build
from tests.decoders.test_decoder_steps import PAGE, step_batch, steps_of

from tilewright.errors import OptionError
from tilewright.runtime.serving.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")
# Of so few tokens the largest step is not that which needs most: parts of shared-out keys are larger.
PAGES, BUDGET, SEQUENCES = 160, 13, 4


def test_memory_is_as_planned() -> None:
    steps = steps_of(build("gemma3", seed=0))
    steps.max_length = 64 * PAGE  # a table wide enough for keys to be shared out
    plan = steps.memory(pages=PAGES, token_budget=BUDGET, max_sequences=SEQUENCES)
    pool, program = steps.make_pages(PAGES), steps.compiled.program
    assert program is not None
    assert pool.bytes == plan.pages
    table = torch.arange(PAGES).reshape(1, -1)[:, :64].expand(SEQUENCES, 64).int().contiguous()

    def run(counts: list[int], start: int = 400) -> torch.Tensor:
        wanted = torch.zeros(sum(counts), dtype=torch.bool)
        wanted[torch.tensor(counts).cumsum(0) - 1] = True
        tokens = [torch.ones(count, dtype=torch.int64) for count in counts]
        return steps.step(pool, step_batch(tokens, [start] * len(counts), table[: len(counts)], wanted))

    # Each in an arena of its own: one that grows little by little reserves a quarter more each time.
    held = []
    for counts in ([BUDGET - SEQUENCES + 1, 1, 1, 1], [8, 1, 1, 1]):
        program.release_memory()
        logits = run(counts)
        held.append(program.allocated_bytes)
        assert logits.numel() * 4 == plan.logits
    assert held[0] <= held[1]
    assert plan.arena <= max(held) < plan.arena + 4096 * len(program.phases)
    largest = max(held)
    program.release_memory()
    run([8, 1, 1, 1] if held[1] == largest else [BUDGET - SEQUENCES + 1, 1, 1, 1])
    draw = random.Random(0)
    for _ in range(30):
        run([draw.randint(1, BUDGET // SEQUENCES) for _ in range(draw.randint(1, SEQUENCES))], draw.randint(0, 450))
        assert program.allocated_bytes == largest


def test_numbers_out_of_range_are_refused() -> None:
    steps = steps_of(build("gemma3", seed=0))
    for wrong in ({"pages": 0}, {"pages": 1, "max_sequences": 600}, {"pages": 1, "most_wanted": 0}):
        with pytest.raises(OptionError, match="no such steps"):
            steps.memory(**wrong)


def test_nothing_grows_with_requests() -> None:
    """All that an engine holds, counted as objects, is the same after 200 requests and after 2,000."""
    engine = Engine(_Nothing(), pages=24, token_budget=32, max_sequences=8)  # type: ignore[arg-type]
    draw, counts = random.Random(0), []
    for number in range(1, 2001):
        prompt = [draw.randint(3, VOCAB - 1) for _ in range(draw.randint(1, 20))]
        engine.add_request(prompt, max_new_tokens=draw.randint(1, 6))
        if number % 8 == 0:
            while engine.step():
                pass
        if number in (200, 2000):
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert engine.free_pages == engine.pages
    assert counts[1] - counts[0] < 200


class _Nothing:
    """A model that computes nothing."""

    page_size, vocab_size, max_length = PAGE, VOCAB, 64

    def make_pages(self, count: int) -> int:
        return count

    def copy_pages(self, pool: object, source: torch.Tensor, target: torch.Tensor) -> None:
        pass

    def step(self, pool: object, batch: object) -> torch.Tensor:
        return torch.randn(len(batch.rows), self.vocab_size)  # type: ignore[attr-defined]
