"""A page of keys and values, as a tile of queries visits it.

Scores are [rows, slots]: in their pages keys lie with the slots together, so both products read what is stored as it
lies.
"""

from torch.fx import Node

from tilewright.codegen.attention.heads import head_block
from tilewright.codegen.attention.paged_problem import PagedProblem
from tilewright.codegen.attention.softmax import fold_scores
from tilewright.codegen.emit_gemm import dot
from tilewright.codegen.nodes import literal
from tilewright.codegen.writer import KernelWriter


def visit_page(problem: PagedProblem, writer: KernelWriter, slots: str) -> None:
    """Writes how the keys and values of the page at slot ``start`` join the softmax.

    The text names ``queries``, their ``head``, ``sequence``, ``kv_head`` and ``key_last``, the end of the keys that are
    there.

    Args:
        slots: text of the queries' slots, along axis 0.
    """
    given, dtype = problem.given, problem.dtype
    table, kind = problem.inputs[given["page_table"]]
    entry = f"{writer.pointer(table, kind, 'page_table')} + sequence * {writer.size(table.strides[0])} + start // PAGE"
    writer.statement(f"page = tl.load({entry}).to(tl.int64) * {problem.kv_heads} + kv_head")
    writer.statement("key_slots = start + tl.arange(0, PAGE)[None, :]")
    keys, values = _keys(problem, writer), _values(problem, writer)
    writer.statement(f"scores = {dot('queries', keys, None, dtype)}")
    if problem.scaled:
        writer.statement(f"scores = scores * {_scales(problem, writer, 'key_scales')}")
    if not problem.scaled_queries:
        writer.statement(f"scores = scores * {literal(problem.factor)}")
    if float(given["softcap"]) > 0.0:
        writer.statement(f"scores = tanh(scores) * {literal(float(given['softcap']))}")
    _add_bias(problem, writer, slots)
    allowed = f"key_slots <= {slots}"
    if given["window_left"] >= 0:
        allowed = f"({allowed}) & (key_slots >= {slots} - {given['window_left']})"
    writer.statement(f'scores = tl.where({allowed}, scores, float("-inf"))')
    value_scales = _scales(problem, writer, "value_scales") if problem.scaled else None
    fold_scores(writer, values, dtype=dtype, compute=problem.compute, value_scales=value_scales)


def _scales(problem: PagedProblem, writer: KernelWriter, name: str) -> str:
    """Text of the sizes of a page's steps [1, PAGE]; slots that hold nothing yet are 0."""
    address = f"{problem.pages(writer, name)} + page * PAGE + tl.arange(0, PAGE)[None, :]"
    writer.statement(f"{name} = tl.load({address}, mask=key_slots < key_last, other=0.0)")
    return name


def _add_bias(problem: PagedProblem, writer: KernelWriter, slots: str) -> None:
    """Adds the bias of the tile's heads at the page's slots, or at their distances from the queries."""
    bias = problem.given["slot_bias"]
    if not isinstance(bias, Node):
        return
    view, kind = problem.inputs[bias]
    columns, mask = "key_slots", ""
    if problem.given["bias_by"] == "distance":
        writer.statement(f"columns = {writer.size(view.shape[1])} - 1 - {slots} + key_slots")
        columns, mask = "columns", f", mask=key_slots <= {slots}, other=0.0"  # the table ends at the query itself
    row, column = map(writer.size, view.strides)
    address = f"{writer.pointer(view, kind, 'slot_bias')} + head * {row} + {columns} * {column}"
    widened = "" if kind == problem.compute else f".to({problem.kind})"
    writer.statement(f"scores = scores + tl.load({address}{mask}){widened}")


def _keys(problem: PagedProblem, writer: KernelWriter) -> str:
    """Text of a page's keys [D, PAGE] in the type of the products; slots that hold nothing yet may be anything."""
    block = head_block(writer, problem.size)
    writer.statement(f"down = tl.arange(0, {block})[:, None]")
    full = writer.constants[block] == problem.size
    mask = "" if full else f", mask=down < {problem.size}, other=0.0"
    address = (
        f"{problem.pages(writer, 'key_pages')} + (page * {problem.size} + down) * PAGE + tl.arange(0, PAGE)[None, :]"
    )
    writer.statement(f"keys = tl.load({address}{mask}){problem.widened}")
    return "keys"


def _values(problem: PagedProblem, writer: KernelWriter) -> str:
    """Text of a page's values [PAGE, Dv]; slots that hold nothing yet are 0, as 0 * NaN is NaN."""
    column = problem.value_axis(writer)
    writer.statement("value_slots = tl.arange(0, PAGE)[:, None]")
    row = f"(page * PAGE + value_slots) * {problem.value_size}"
    masks = ["start + value_slots < key_last", writer.mask(column.deps)]
    mask = " & ".join(f"({mask})" for mask in masks if mask)
    address = f"{problem.pages(writer, 'value_pages')} + {row} + {writer.index_text(column)}"
    writer.statement(f"values = tl.load({address}, mask={mask}, other=0){problem.widened}")
    return "values"
