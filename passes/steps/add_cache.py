"""AddCache: from a forward pass over whole sequences to one step over new tokens, with earlier ones in pages.

A packed causal model already works on rows that know their place: which sequence they belong to and which slot they
have there. So it goes on from a cache if its attentions read keys from pages instead of from the rows of this call.
Prefill, a chunk of it, decode and a mix of them are then one program with different rows. What was read off the padded
batch (row index, offsets, slots) becomes an input; whatever else depended on the batch has no meaning any more, and
the model is refused. The target's half of an encoder-decoder (``SplitSource``) has attentions over its source besides:
their keys lie in pages too, where ``FillPages`` has put them. Source: DeepSpeed Inference, section III (one program,
chosen kernels); vLLM (pages).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.errors import CacheRefused
from tilewright.ir.facts import Origin, SizeValue, TensorType, copy_origin, fact, set_fact, where
from tilewright.ir.graph import InputSpec, Level, OutputSpec, info, update_info
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ir.sizes import BATCH, PAGES, SOURCE_TABLE, TABLE, TOKENS, WANTED, Size
from tilewright.ops import Flow, traits_of
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.layout.axes import positional
from tilewright.passes.normalization.elements import Unknown
from tilewright.passes.rewrite import Rewriter, erase_dead
from tilewright.passes.steps.at_slots import AtSlots
from tilewright.passes.steps.slot_bias import SlotBiases

aten = torch.ops.aten
tw = torch.ops.tilewright

_PACKED = Layout(LayoutKind.PACKED, 0, 1)
_SEQUENCES = Layout(LayoutKind.PER_SEQUENCE, 0)
_SELECTED = Layout(LayoutKind.SELECTED, 0)
# What a step is told besides its tokens, in the order of the program's inputs. The fields of ``tilewright.ir.steps``.
_TOLD: tuple[tuple[str, tuple[Size, ...], Layout], ...] = (
    ("slots", (TOKENS,), _PACKED),
    ("places", (TOKENS,), _PACKED),
    ("cu_seqlens", (BATCH + 1,), _SEQUENCES),
    ("page_table", (BATCH, TABLE), _SEQUENCES),
    ("rows", (WANTED,), _SELECTED),
    ("cu_rows", (BATCH + 1,), _SEQUENCES),
)
# And of its sources: the slot of the last key that each token sees, and the pages.
_TOLD_OF_SOURCES: tuple[tuple[str, tuple[Size, ...], Layout], ...] = (
    ("source_slots", (TOKENS,), _PACKED),
    ("source_table", (BATCH, SOURCE_TABLE), _SEQUENCES),
)
# Operands of attention over pages that are pages; only those of whole numbers have scales.
_PAGES = ("key_pages", "value_pages", "key_scales", "value_scales")


def page_types(
    keys: TensorType, values: TensorType, page_size: int, dtype: torch.dtype | None
) -> dict[str, TensorType]:
    """Types of the pages that take keys [T, Hkv, D] and values [T, Hkv, Dv], by the names of their operands.

    Keys lie with their slots together: scores are then products of rows that are read as they are stored.

    Args:
        keys, values: what goes into them.
        page_size: slots of a page.
        dtype: of the pages; None for that of what goes into them. Whole numbers have their steps beside them.
    """
    _, heads, size = keys.shape
    value_size = values.shape[2]
    types = {
        "key_pages": TensorType((PAGES, heads, size, page_size), dtype or keys.dtype),
        "value_pages": TensorType((PAGES, heads, page_size, value_size), dtype or values.dtype),
    }
    if dtype is torch.int8:
        scales = TensorType((PAGES, heads, page_size), torch.float32)
        types |= {"key_scales": scales, "value_scales": scales}
    return types


@dataclass(frozen=True)
class AddCache(Pass):
    """Turns a packed causal graph into one step of generation.

    Its inputs are then the tokens [T], what ``tilewright.ir.steps.StepBatch`` says of them, and for each attention the
    pages of ``page_types``; its output is one row for each wanted one. The n-th attention over a source has its keys in
    the pages of the n-th one over tokens, where these are of the same type: a page id then means memory for either, and
    there is one pool.

    Attributes:
        page_size: slots of a page.
        dtype: of the pages; None for that of the keys.
        tokens: name of the input that holds the tokens.
        positions: name of the input that holds the place of each token in its sequence.
        output: name of the output that is kept.
    """

    name: ClassVar[str] = "add_cache"
    requires: ClassVar[Level] = Level.PACKED
    ensures: ClassVar[Level] = Level.PACKED

    page_size: int = 32
    dtype: torch.dtype | None = None
    tokens: str = "input_ids"
    positions: str = "position_ids"
    output: str = "logits"

    @property
    def token_inputs(self) -> tuple[str, ...]:
        """Inputs that are packed from the start: where keys are cached, no token depends on the padded batch."""
        return self.tokens, self.positions

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrites the graph in place.

        Raises:
            CacheRefused: the model is not a causal one whose tokens meet in attention alone; says at which node.
        """
        writer = _StepWriter(gm, self)
        writer.run()
        return PassResult(gm, changed=True, counts={"attention": len(writer.pages)})


class _StepWriter:
    def __init__(self, gm: GraphModule, options: AddCache) -> None:
        self.gm, self.graph, self.options = gm, gm.graph, options
        self.pages: list[dict[str, Node]] = []
        self.specs: list[InputSpec] = []
        self.old = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.row_index = next(iter(self.graph.find_nodes(op="call_function", target=tw.pack_index.default)), None)

    def run(self) -> None:
        if self.row_index is None:
            why = info(self.gm).reasons.get("packing", "the graph has no row index")
            raise CacheRefused("the model cannot go on from a cache", why=f"its padding cannot be removed: {why}")
        crossing = self.graph.find_nodes(op="call_function", target=tw.cross_attention.default)
        self._make_inputs(bool(crossing))
        for node in list(self.graph.nodes):
            if node.target is tw.gather_rows.default:
                self._gathered(node)
            elif node.target is tw.attention_packed.default:
                self._attention(node)
            elif node.target is aten.sym_size.int:
                self._size(node)
        for number, node in enumerate(crossing):
            self._cross_attention(number, node)
        self._outputs()
        erase_dead(self.gm)
        self._remove_old_inputs()
        update_info(self.gm, inputs=tuple(self.specs))
        self.graph.lint()
        self.gm.recompile()

    # Inputs

    def _input(self, name: str, shape: tuple[Size, ...], dtype: torch.dtype, layout: Layout, state: bool) -> Node:
        whole = {"slots": self.options.positions}.get(name, name)  # the input of the whole batch that it stands for
        spec = next((each for each in info(self.gm).inputs if each.name == whole), None)
        with self.graph.inserting_before(self.old[0]):
            # The name of an old input may be taken until that is removed.
            node = self.graph.create_node("placeholder", name, name=f"step_{name}")
        set_fact(node, TensorType(shape, dtype))
        set_fact(node, layout)
        set_fact(node, Origin(made_by=AddCache.name))
        self.specs.append(InputSpec(name, dtype, shape, vocab=spec.vocab if spec else None, state=state))
        return node

    def _make_inputs(self, of_sources: bool) -> None:
        self.ids = self._input(self.options.tokens, (TOKENS,), torch.int64, _PACKED, state=False)
        told = (*_TOLD, *(_TOLD_OF_SOURCES if of_sources else ()))
        self.told = {name: self._input(name, shape, torch.int32, layout, state=False) for name, shape, layout in told}
        self.at_slots = AtSlots(self.told["slots"], AddCache.name)
        rw = Rewriter(self.gm, AddCache.name)
        self.slot_biases = SlotBiases(rw, self.told["page_table"], self.options.page_size)

    def _pages(self, prefix: str, number: int, types: dict[str, TensorType]) -> dict[str, Node]:
        """New pages for keys and values."""
        return {
            kind: self._input(f"{prefix}{kind}_{number}", type_.shape, type_.dtype, Layout(LayoutKind.FREE), state=True)
            for kind, type_ in types.items()
        }

    def _page_types(self, keys: TensorType, values: TensorType) -> dict[str, TensorType]:
        return page_types(keys, values, self.options.page_size, self.options.dtype)

    def _remove_old_inputs(self) -> None:
        for node in self.old:
            if node.users:
                self._refuse_mixing()
                user = next(iter(node.users))
                raise CacheRefused(
                    "the model cannot go on from a cache",
                    where=where(user),
                    why=f"'{user.name}' reads input '{node.target}' of the whole batch, which a step does not have",
                    hint="only per-token inputs, read token by token, and causal attention are known here",
                )
            self.graph.erase_node(node)

    def _refuse_mixing(self) -> None:
        """Raises where tokens meet in something else than attention: there they have been padded again."""
        pending = list(self.graph.find_nodes(op="call_function", target=tw.scatter_rows.default))
        for node in pending:  # grows while it is read
            moves = node.target is tw.scatter_rows.default or traits_of(node.target).flow in (Flow.VIEW, Flow.POINTWISE)
            if moves:
                pending += [user for user in node.users if user not in pending and user.op == "call_function"]
            elif node.target is not tw.gather_rows.default:
                raise CacheRefused(
                    "the model cannot go on from a cache",
                    where=where(node),
                    why=f"tokens meet in '{node.name}' ({node.target}), and what it would have to keep of earlier ones "
                    "is no keys and values",
                    hint="forward passes over whole sequences work; generate with transformers",
                )

    # What was read off the padded batch

    def _call(self, origin: Node, target: Any, args: tuple[Any, ...], type_: TensorType, layout: Layout) -> Node:
        with self.graph.inserting_before(origin):
            made = self.graph.create_node("call_function", target, args, {}, f"{origin.name}_step")
        set_fact(made, type_)
        set_fact(made, layout)
        copy_origin(origin, made, AddCache.name)
        return made

    def _gathered(self, node: Node) -> None:
        source = positional(node)[0]
        rows: Node | None = None
        if source.op != "placeholder":
            rows = self.at_slots.of(source, node)
        elif source.target == self.options.tokens:
            rows = self.ids
        elif source.target == self.options.positions:
            wanted = fact(node, TensorType)
            args = (self.told["slots"], wanted.dtype)
            rows = self._call(node, torch.ops.prims.convert_element_type.default, args, wanted, _PACKED)
        else:
            rows = self._left_out(node, source.target)
        if rows is not None:
            node.replace_all_uses_with(rows)

    def _left_out(self, node: Node, name: Any) -> Node | None:
        """What an input holds that callers leave out, or that marks real tokens, which all tokens of a step are."""
        spec = next(each for each in info(self.gm).inputs if each.name == name)
        value = 1 if spec.validity else {"zeros": 0, "ones": 1}.get(spec.default or "")
        type_ = fact(node, TensorType)
        if value is None or type_.shape != (TOKENS,):
            return None
        with self.graph.inserting_before(node):
            count = self.graph.call_function(aten.sym_size.int, (self.ids, 0))
        set_fact(count, SizeValue(TOKENS))
        copy_origin(node, count, AddCache.name)
        made = self._call(node, aten.full.default, ([count], value), type_, _PACKED)
        made.kwargs = {"dtype": type_.dtype, "device": torch.device("cpu"), "pin_memory": False}
        return made

    def _size(self, node: Node) -> None:
        if fact(node, SizeValue).value == TOKENS:
            node.args = (self.ids, 0)

    def _attention(self, node: Node) -> None:
        q, k, v, _, _, _, slots_q, slots_k, bias, sinks, _, _, scale, causal, left, right, cap, *tables = positional(
            node
        )
        table = next((each for each in tables if isinstance(each, Node)), None)
        why = None
        if slots_q is not slots_k:
            why = "its queries are not all tokens"
        elif not causal or right >= 0:
            why = "it sees keys that come after its query"
        elif table is not None:
            why = f"its table '{table.name}' is made for a whole batch"
        if why:
            raise CacheRefused("the model cannot go on from a cache", where=where(node), why=why)
        types = self._page_types(fact(k, TensorType), fact(v, TensorType))
        self.pages.append(self._pages("", len(self.pages), types))
        keys, values, key_scales, value_scales = map(self.pages[-1].get, _PAGES)
        told = [self.told[name] for name in ("places", "cu_seqlens", "slots", "page_table")]
        options = (sinks, scale, left, cap, key_scales, value_scales, *self._slot_bias(node, q, bias))
        args = (q, k, v, keys, values, *told, *options)
        made = self._call(node, tw.attention_paged.default, args, fact(node, TensorType), _PACKED)
        node.replace_all_uses_with(made)

    def _slot_bias(self, attention: Node, q: Node, bias: Node | None) -> tuple[Node | None, str]:
        """The bias as a table over slots, and what its columns are."""
        if bias is None:
            return None, "key"
        try:
            return self.slot_biases.of(bias, int(fact(q, TensorType).shape[1]), attention)
        except Unknown as unknown:
            raise CacheRefused(
                "the model cannot go on from a cache",
                where=where(attention),
                why=f"its bias '{bias.name}' is made for a whole batch: {unknown}",
                hint="a bias of the slot of the key, or of its distance from the query, would be a table",
            ) from None

    def _cross_attention(self, number: int, node: Node) -> None:
        """Its keys are no rows of the step, so nothing is put into pages; every query sees the whole source."""
        q, k, v, _, _, scale, cap = positional(node)
        new = (_by_rows(k), _by_rows(v))
        types, pages = self._page_types(*new), self.pages[number] if number < len(self.pages) else None
        if pages is None or types != {kind: fact(each, TensorType) for kind, each in pages.items()}:
            pages = self._pages("source_", number, types)
        keys, values, *scales = pages.values()
        told = [self.told[name] for name in ("cu_seqlens", "source_slots", "source_table")]
        args = (q, None, None, keys, values, None, *told, None, scale, -1, cap, *scales)
        node.replace_all_uses_with(self._call(node, tw.attention_paged.default, args, fact(node, TensorType), _PACKED))

    # Results

    def _outputs(self) -> None:
        output = next(node for node in self.graph.nodes if node.op == "output")
        described = info(self.gm).output
        if self.options.output not in described.names:
            raise CacheRefused(
                f"the model has no output '{self.options.output}'", why=f"it has {', '.join(described.names)}"
            )
        place = described.names.index(self.options.output)
        found: Any = output.args[0]
        result = found[place]
        if result.target is not tw.scatter_rows.default:
            raise CacheRefused(
                "the model cannot go on from a cache",
                where=where(result),
                why=f"output '{self.options.output}' is not computed token by token",
            )
        packed = positional(result)[0]
        old = fact(packed, TensorType)
        type_ = TensorType((WANTED, *old.shape[1:]), old.dtype)
        with self.graph.inserting_before(output):
            made = self.graph.call_function(tw.take_rows.default, (packed, self.told["rows"], self.told["cu_rows"]))
        set_fact(made, type_)
        set_fact(made, _SELECTED)
        copy_origin(result, made, AddCache.name)
        output.args = ((made,),)
        update_info(self.gm, output=OutputSpec(build=lambda flat: flat[0], names=(self.options.output,)))


def _by_rows(heads: Node) -> TensorType:
    """Of keys or values [B, H, S, D], the type of their rows [T, H, D]."""
    _, count, _, size = fact(heads, TensorType).shape
    return TensorType((TOKENS, count, size), fact(heads, TensorType).dtype)
