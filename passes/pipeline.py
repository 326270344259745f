"""The order of all passes, and how they are run. This list is the only place that knows it."""

from collections.abc import Collection, Mapping, Sequence

from torch.fx import GraphModule

from tilewright import settings
from tilewright.errors import OptionError
from tilewright.ir.measurements import Measurements
from tilewright.ir.stored_weight import StoredParameter
from tilewright.passes.base import Observer, Pass, PassRecord, run_pass
from tilewright.passes.normalization.normalize import normalization
from tilewright.passes.packing.remove_padding import RemovePadding
from tilewright.passes.packing.slice_rows import SliceRows
from tilewright.passes.regions.find_regions import FindRegions
from tilewright.passes.regions.merge_linears import MergeLinears
from tilewright.passes.regions.outline_regions import OutlineRegions
from tilewright.passes.regions.place import Place
from tilewright.passes.regions.specialize import Specialize
from tilewright.passes.regions.specialize_attention import SpecializeAttention
from tilewright.passes.spec.verify import verify as verify_graph
from tilewright.passes.steps.add_cache import AddCache
from tilewright.passes.steps.fill_pages import FillPages
from tilewright.passes.steps.split_source import SplitSource
from tilewright.passes.weights.quantize_blocks import QuantizeBlocks
from tilewright.passes.weights.quantize_linears import QuantizeLinears
from tilewright.passes.weights.round_rows import RoundRows
from tilewright.passes.weights.route_experts import RouteExperts
from tilewright.passes.weights.store_blocks import StoreBlocks

OPTIONAL = (SliceRows.name, MergeLinears.name)
"""Passes that only make a program faster, each on its own: leaving one out shows what it brings."""


def pipeline(
    opt_level: int,
    unpad: str = "auto",
    gemm: str = "auto",
    measurements: Measurements | None = None,
    attention: str = "auto",
    quantize: str = "",
    without: Collection[str] = (),
    cache: AddCache | FillPages | None = None,
    split: SplitSource | None = None,
    stored: Mapping[str, StoredParameter] | None = None,
    activations: str = "int8",
) -> tuple[Pass, ...]:
    """The passes for these options, in order.

    Args:
        opt_level: 0 stops at the normalized graph, which the reference kernels run; 1 packs and gives every op a
            kernel of its own; 2 and 3 fuse (3 differs only in how long GEMMs are measured).
        unpad: "auto", "on" or "off", as of ``RemovePadding``.
        gemm: as of ``Specialize``.
        measurements: timings of variants on this machine.
        attention: as of ``SpecializeAttention``.
        quantize: "int8" or "int4": products with weights in whole numbers of 8 or of 4 bits; not at level 0.
        without: names of passes to leave out, of those in ``OPTIONAL``.
        stored: weights that a file stores in blocks, as of ``StoreBlocks``.
        activations: of products with weights in blocks: "int8" rounds them by blocks of 32, "float" does not.
        cache: the pass that makes the graph one step of generation, or what fills the pages of a source, where that
            is wanted.
        split: the pass that takes one half of an encoder-decoder, for the former or the latter.

    Raises:
        OptionError: ``opt_level`` is not 0, 1, 2 or 3, or a pass to leave out is not optional.
    """
    if opt_level not in (0, 1, 2, 3):
        raise OptionError(f"opt_level={opt_level!r} is not a choice", hint="choose 0, 1, 2 or 3")
    if unknown := [name for name in without if name not in OPTIONAL]:
        raise OptionError(f"no pass {unknown[0]!r} can be left out", hint=f"choose among {', '.join(OPTIONAL)}")
    normalize = normalization()  # first: every other pass knows one spelling of each op
    # Linears and embeddings have one spelling now, and everything after it sees what the weights really are.
    front = (*normalize, *((StoreBlocks(stored),) if stored else ()), *((split,) if split is not None else ()))
    if opt_level == 0:
        return front
    return (
        *front,
        # Before fusion: it changes the rows that everything after it works on.
        RemovePadding(unpad, cache.token_inputs if cache is not None else ()),
        *((cache,) if cache is not None else ()),  # needs packed rows; says which of them are wanted, for the next
        # Needs packed rows to pick from; before regions, for it changes the rows of what they compute.
        *((SliceRows(),) if SliceRows.name not in without else ()),
        RouteExperts(),  # once the rows are settled: its tables are of all rows at once, which nothing moves past
        # After the rows are settled, as linears of one value may want different ones; before regions, which grow by it.
        *((MergeLinears(),) if opt_level > 1 and MergeLinears.name not in without else ()),
        # Merged weights are rounded once; regions then hold the roundings and scales as they hold all pointwise work.
        *((QuantizeLinears(),) if quantize == "int8" else (QuantizeBlocks(quantize),) if quantize else ()),
        # Likewise; weights in blocks are those just quantized, or stored so.
        *((RoundRows(),) if activations == "int8" and (stored or quantize not in ("", "int8")) else ()),
        FindRegions(fuse=opt_level > 1),  # needs the final ops and their types; only tags
        OutlineRegions(),  # acts on the tags, and nothing may come between them
        SpecializeAttention(attention, measurements or Measurements()),  # by what its region computes, as below
        Specialize(gemm, measurements or Measurements()),  # a GEMM's variants depend on its prologue and epilogue
        Place(),  # last: it places the kernels that were chosen
    )


def run_pipeline(
    gm: GraphModule,
    passes: Sequence[Pass],
    observers: Sequence[Observer] = (),
    verify: bool | None = None,
    first: int = 1,
) -> tuple[GraphModule, tuple[PassRecord, ...]]:
    """Runs the passes in order.

    Args:
        gm: rewritten in place; use the graph returned.
        passes: as ``pipeline`` returns them.
        observers: called around every pass.
        first: number of the first pass, for the observers, when the pipeline is run in parts.
        verify: check the spec of the level before the first pass and after every pass; None: as the setting says.

    Returns:
        The graph, and what each pass did.

    Raises:
        VerifierError: a pass broke a rule of the level it reached; the message names pass, rule and node.
    """
    checked = bool(settings.get("verify")) if verify is None else verify
    if checked:
        verify_graph(gm)
    records = []
    for step, pass_ in enumerate(passes, start=first):
        for observer in observers:
            observer.before(step, pass_, gm)
        gm, record = run_pass(pass_, gm)
        if checked:
            verify_graph(gm, after=str(pass_))
        for observer in observers:
            observer.after(step, pass_, gm, record)
        records.append(record)
    return gm, tuple(records)
