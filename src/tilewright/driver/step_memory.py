"""Memory that steps of generation need, known before any runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy

from tilewright.errors import OptionError
from tilewright.ir.regions import PAGED_VARIANTS
from tilewright.ir.sizes import BATCH, PAGES, SOURCE_TABLE, TABLE, TOKENS, WANTED

if TYPE_CHECKING:
    from tilewright.driver.steps import StepModel


@dataclass(frozen=True)
class StepMemory:
    """Bytes that an engine and its model hold at most.

    Attributes:
        weights: as the kernels read them; what the model itself keeps of them beside that is not counted.
        pages: keys and values.
        arena: values between kernels in the largest step. What grows step by step may reserve a quarter more, which
            nothing touches.
        buffers: what a step is told.
        logits: of the largest step.
    """

    weights: int
    pages: int
    arena: int
    buffers: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.pages + self.arena + self.buffers + self.logits


def step_memory(
    model: "StepModel", *, pages: int, token_budget: int, max_sequences: int, most_wanted: int | None
) -> StepMemory:
    """What ``StepModel.memory`` says.

    Raises:
        OptionError: a number is out of range.
    """
    wanted = max_sequences if most_wanted is None else most_wanted
    if pages < 1 or not 1 <= max_sequences <= token_budget or not 1 <= wanted <= token_budget:
        raise OptionError(
            "there are no such steps",
            why=f"pages={pages}, token_budget={token_budget}, max_sequences={max_sequences}, {wanted} rows of logits",
            hint="pages are at least one; sequences and rows of logits at least one and at most the token budget",
        )
    program = model.compiled.program
    assert program is not None, "steps are compiled at a level that has a program"
    longest = min(-(-model.max_length // model.page_size), pages)
    width = 1 << (longest - 1).bit_length()
    sizes = {BATCH: max_sequences, WANTED: wanted, TABLE: width, SOURCE_TABLE: width, PAGES: pages}
    arena = 0
    for tokens in _largest_steps(token_budget, max_sequences):
        values: Mapping[sympy.Symbol, int] = {**sizes, TOKENS: tokens}
        arena = max(arena, program.planned_bytes(*(values[symbol] for symbol in program.spec.symbols)))
    page = model.make_pages(1).bytes
    (output,) = (program.spec.values[index].dtype for index in program.spec.outputs)
    row = model.vocab_size * sum({4, output.itemsize})  # in the model's type, and widened
    told = token_budget * (8 + 4 + 4) + (max_sequences + 1) * (4 + 4) + max_sequences * 4 * (1 + width)
    return StepMemory(program.weight_bytes, pages * page, arena, told, wanted * row)


def _largest_steps(budget: int, sequences: int) -> set[int]:
    """Tokens of the steps of which one needs most: the largest, and the largest whose keys are shared out."""
    few = max(most for most in PAGED_VARIANTS.values() if most is not None)
    return {budget, min(budget, sequences + few - 1)}
