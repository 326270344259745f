"""Chooses a form of attention for each padded length."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch.fx import GraphModule, Node

from tilewright.errors import OptionError
from tilewright.ir.facts import SizeValue, TensorType, fact, find_fact, set_fact
from tilewright.ir.graph import Level
from tilewright.ir.measurements import AttentionKey, Measurements
from tilewright.ir.regions import ATTENTION_VARIANTS, PAGED_VARIANTS, Anchor, AttentionTable, Region
from tilewright.ir.sizes import TOKENS, Size
from tilewright.ops import Flow, traits_of
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.layout.axes import positional
from tilewright.passes.regions.specialize import Entries, measured_entries

ONLINE, LONG = "online", "long"

# Without measurements the form that takes any length: it is never far from the fastest.
_BY_RULE: Entries = ((None, ONLINE),)
# Decoding has one query a sequence, or a few where drafts are checked; whatever has more is prefill, or contains some.
_OVER_PAGES: Entries = tuple((most, variant) for variant, most in PAGED_VARIANTS.items())


@dataclass(frozen=True)
class SpecializeAttention(Pass):
    """Gives each attention region its ``AttentionTable``.

    Attributes:
        attention: "auto" for a choice by length, or one variant wherever it fits.
        measurements: timings on this machine; "auto" goes by a rule where there are none.
    """

    name: ClassVar[str] = "specialize_attention"
    requires: ClassVar[Level] = Level.FUSED
    ensures: ClassVar[Level] = Level.FUSED
    attention: str = "auto"
    measurements: Measurements = field(default_factory=Measurements, repr=False)

    def run(self, gm: GraphModule) -> PassResult:
        """Sets the facts.

        Raises:
            OptionError: ``attention`` is not one of the choices.
        """
        if self.attention not in ("auto", *ATTENTION_VARIANTS):
            choices = ", ".join(("auto", *ATTENTION_VARIANTS))
            raise OptionError(f"attention={self.attention!r} is not a choice", hint=f"choose one of {choices}")
        counts = {"measured": 0, "by_rule": 0}
        for node in gm.graph.nodes:
            region = find_fact(node, Region)
            if region is None or region.anchor is not Anchor.ATTENTION:
                continue
            anchor = attention_of(gm.get_submodule(str(node.target)))  # type: ignore[arg-type]
            length = key_length(anchor)
            if over_pages(anchor):
                set_fact(node, AttentionTable(length, _OVER_PAGES))
                continue
            entries, measured = self._entries(attention_key(anchor))
            if isinstance(length, int):
                entries = _only(entries, length)
            set_fact(node, AttentionTable(length, entries, measured))
            counts["measured" if measured else "by_rule"] += 1
        return PassResult(gm, True, {topic: count for topic, count in counts.items() if count})

    def _entries(self, key: AttentionKey) -> tuple[Entries, bool]:
        if self.attention not in ("auto", *forms_of(key)):
            return _BY_RULE, False
        if self.attention != "auto":
            longest = ATTENTION_VARIANTS[self.attention]
            return (((longest, self.attention), *_BY_RULE) if longest else ((None, self.attention),)), False
        timings = self.measurements.attention.get(key)
        return (_measured(timings), True) if timings else (_BY_RULE, False)


def _only(entries: Entries, length: int) -> Entries:
    """The one entry for a length that is known."""
    return ((None, next(variant for upper, variant in entries if upper is None or length <= upper)),)


def _measured(timings: dict[str, tuple[tuple[int, float], ...]]) -> Entries:
    """A table by ``measured_entries``; a form is no choice where it does not fit, and one fits everywhere."""
    lengths = [length for length, _ in timings[ONLINE]]
    beyond = max(lengths[-1], *(most for most in ATTENTION_VARIANTS.values() if most is not None)) + 1
    complete = {}
    for variant, times in timings.items():
        seconds = dict(times)
        known = [(length, seconds.get(length, float("inf"))) for length in lengths]
        complete[variant] = (*known, (beyond, 1.0 if variant == ONLINE else float("inf")))
    return measured_entries(complete)


def attention_of(body: GraphModule) -> Node:
    """The attention that a region is built around."""
    return next(node for node in body.graph.nodes if traits_of(node.target).flow is Flow.ATTENTION)


def _arguments(anchor: Node) -> dict[str, object]:
    names = (argument.name for argument in anchor.target._schema.arguments)  # type: ignore[union-attr]
    return dict(zip(names, positional(anchor), strict=True))


def over_pages(anchor: Node) -> bool:
    """Whether an attention reads its keys from pages."""
    return "page_table" in _arguments(anchor)


def key_length(anchor: Node) -> Size:
    """Bound of the keys of one sequence; over pages, of its queries: each has one of the new tokens at least."""
    given = _arguments(anchor)
    if "page_table" in given:
        table = fact(given["page_table"], TensorType)  # type: ignore[arg-type]
        return TOKENS - table.shape[0] + 1
    if "max_seqlen_k" not in given:
        return fact(given["k"], TensorType).shape[2]  # type: ignore[arg-type]
    length = given["max_seqlen_k"]
    return fact(length, SizeValue).value if isinstance(length, Node) else length


def attention_key(anchor: Node) -> AttentionKey:
    """What timings of this attention are filed under."""
    given = _arguments(anchor)
    q, k, v = (fact(given[name], TensorType) for name in "qkv")  # type: ignore[arg-type]
    return AttentionKey(
        size=int(q.shape[-1]),
        value_size=int(v.shape[-1]),
        group=int(q.shape[1]) // int(k.shape[1]),
        dtype=str(q.dtype).removeprefix("torch."),
        causal=bool(given["causal"]),
        window_left=int(given["window_left"]),  # type: ignore[call-overload]
        window_right=int(given["window_right"]),  # type: ignore[call-overload]
        bias=isinstance(given["bias"], Node),
        query_table=_entries_of(given["query_table"]),
        key_table=_entries_of(given["key_table"]),
        uniform_pads=bool(given["uniform_pads"]),
    )


def _entries_of(table: object) -> int:
    return int(fact(table, TensorType).shape[-1]) if isinstance(table, Node) else 0


def forms_of(key: AttentionKey) -> tuple[str, ...]:
    """The forms there are of an attention: that which stores scores between two products has keys with scores alone."""
    return tuple(form for form in ATTENTION_VARIANTS if form != LONG or not key.uniform_pads)
