"""The keys of a sequence shared out among programs ("flash decoding"): each leaves a part, a second kernel merges them.

A few queries over one head of keys are work for one program, and one thread, however many keys there are. Here a
program has a stretch of them instead, and leaves a maximum, a sum and an unfinished result. Stretches are of one length
whatever the batch and the machine are, so the numbers of a sequence depend on neither; and since a program of each is
handed out when a thread is free, long and short sequences in one step balance.

Source: Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023; the second form of vLLM's
PagedAttention.
"""

from tilewright.codegen.attention.paged_problem import PagedProblem
from tilewright.codegen.attention.softmax import fold_part
from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.columns import next_power_of_2
from tilewright.codegen.index import Index, constant, linear
from tilewright.codegen.writer import KernelWriter, Var
from tilewright.ir.program import KernelStep, View
from tilewright.ir.sizes import Size, at_most, ceil_div, contiguous_strides

_STRETCH = 256  # slots of one program, or a page; steps whose longest table has no more are not split


class SplitKeys:
    """The parts of one attention.

    Attributes:
        active: 1 in a step whose keys are split, else 0: a factor of grids.
        count: parts of the longest sequence.
        stretch: slots of a part, whole pages.
    """

    def __init__(self, problem: PagedProblem, builder: ProgramBuilder, most_queries: int) -> None:
        """For steps of at most so many queries a sequence: what has more fills the threads with blocks of queries."""
        few = at_most(problem.most_queries, most_queries)
        self.problem = problem
        pages = max(_STRETCH // problem.slots, 1)
        self.active: Size = few - few * at_most(problem.table, pages)
        self.stretch = pages * problem.slots
        self.count = ceil_div(problem.table, pages)

        def scratch(what: str, *columns: int) -> View:
            shape = (self.active, problem.queries, problem.heads, self.count, *columns)
            return builder.scratch(f"{problem.call.name}_{what}", problem.compute, shape)

        self._peaks, self._totals = scratch("part_peaks"), scratch("part_totals")
        self._accs = scratch("part_accs", problem.value_size)

    def write(self, writer: KernelWriter, query: Index, head: Index) -> None:
        """Stores the softmax's state of the program's ``part``."""
        part = writer.define(Var("part", self.count))
        for view, text in ((self._peaks, "peak"), (self._totals, "total"), (self._accs, "acc")):
            address, mask = self._place(writer, view, query, head, part)
            writer.statement(f"tl.store({address}, {text}, mask={mask})")

    @property
    def written(self) -> list[View]:
        """What a program leaves."""
        return [self._peaks, self._totals, self._accs]

    def merge(self) -> KernelStep:
        """The step that merges the parts of each query."""
        problem = self.problem
        writer, evaluator = problem.kernel()
        group = problem.group
        writer.constants.update(BLOCK_M=next_power_of_2(group), STRETCH=self.stretch)
        writer.statement("query = tl.program_id(0).to(tl.int64)")
        writer.statement("lanes = tl.arange(0, BLOCK_M)[:, None]")
        writer.statement(f"lane_mask = lanes < {group}")
        writer.statement(f"head = tl.program_id(1) * {group} + lanes")
        query = writer.define(Var("query", problem.queries))
        head = writer.define(Var("head", problem.heads, 0, "BLOCK_M", "lane_mask"))
        slot = evaluator.value(problem.given["slots_q"], (query,)).text
        left = problem.given["window_left"]
        first = f"tl.maximum(0, {slot} - {left}) // STRETCH" if left >= 0 else "0"
        problem.start(writer, evaluator, head)
        with writer.block(f"for part in range({first}, {slot} // STRETCH + 1):"):
            part = writer.define(Var("part", self.count))
            for view, text in ((self._peaks, "part_peak"), (self._totals, "part_total"), (self._accs, "part_acc")):
                address, mask = self._place(writer, view, query, head, part)
                writer.statement(f"{text} = tl.load({address}, mask={mask}, other=0.0)")
            fold_part(writer)
        problem.store(writer, evaluator, query, head)
        grid = (problem.queries * self.active, problem.kv_heads, 1)
        return problem.finish(writer, evaluator, grid, "A program merges the parts of a query in the heads of one.")

    def _place(self, writer: KernelWriter, view: View, query: Index, head: Index, part: Index) -> tuple[str, str]:
        """Address of a part's share of a scratch value, and its mask."""
        index: tuple[Index, ...] = (constant(0), query, head, part)
        if len(view.shape) > len(index):
            index = (*index, self.problem.value_axis(writer))
        at = linear(index, contiguous_strides(view.shape))
        pointer = writer.pointer(view, self.problem.compute, "part")
        return f"{pointer} + {writer.index_text(at)}", writer.mask(at.deps) or "True"
