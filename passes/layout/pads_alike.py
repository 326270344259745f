"""Whether all masked places of a sequence hold the same, where one of them, kept for its column, stands for them all.

So it is where masked places start from one constant, as behind a product with the mask, and meet other places only in
attentions that weigh all of them alike. Such an attention of a masked query is a mean over the places of its sequence:
over the tokens, which are packed, and over the others, which need not be.
"""

from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, find_fact, where
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ir.sizes import SEQ
from tilewright.ops import Flow, traits_of
from tilewright.passes.layout.axes import positional, shape_of, symbols_in, tensor_operands
from tilewright.passes.layout.validity import NotPackable

_ROW_WISE = (Flow.POINTWISE, Flow.LAST_AXIS, Flow.CONTRACT, Flow.LOOKUP, Flow.REDUCE, Flow.VIEW)


def check_pads_alike(gm: GraphModule, layouts: dict[Node, Layout], columns: dict[Node, int | Node]) -> None:
    """Checks the columns that are read behind an attention of ``uniform_pads``, and the values of each.

    Raises:
        NotPackable: masked places of the values may differ, or one may stand behind a token: a query by itself is known
            as masked by its column alone, which must then come before those of all tokens.
    """
    alike: set[Node] = set()
    for node in gm.graph.nodes:
        if find_fact(node, TensorType) is None:
            continue
        uniform = traits_of(node.target).flow is Flow.ATTENTION and positional(node)[-1] is True
        later = [each for each, column in columns.items() if column != 0] if uniform else []
        if later:
            why = f"a masked query sees all places alike, and '{later[0].name}' reads one that may be behind tokens"
            raise NotPackable("masked_places_alike", where(node), why)
        if uniform and (value := positional(node)[2]) not in alike:
            why = f"a masked query sees all places alike, and masked places of '{value.name}' may differ"
            raise NotPackable("masked_places_alike", where(node), why)
        if uniform or _is_alike(node, layouts[node], alike):
            alike.add(node)


def _is_alike(node: Node, layout: Layout, alike: set[Node]) -> bool:
    if layout.pad_value is not None or SEQ not in symbols_in(shape_of(node)):
        return True
    row_wise = node.op == "call_function" and traits_of(node.target).flow in _ROW_WISE
    return row_wise and layout.kind is LayoutKind.PACKED and all(each in alike for each in tensor_operands(node))
