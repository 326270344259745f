"""Where cutting K pays: products of 1 to 8 rows by weights of few rows, in all variants, and what the table picked.

The times are those that ``tilewright.compile(.., opt_level=3)`` takes of the graph's own regions before it chooses, so
each line is a choice it made. The ratio is the fastest variant that does not cut K over the fastest that does: above 1
where cutting pays. The note gives the parts, both times in microseconds, and the variant in the table. K is 4096, and
weights of up to 512 rows stay in the caches, as those of a small model's layers do.
"""

from collections.abc import Iterator
from typing import Any

import torch
from kernels_blocks import Linears
from timing import Line

import tilewright
from tilewright.driver.timing_store import Timings, stored_or_measured
from tilewright.ir.facts import find_fact
from tilewright.ir.regions import GemmTable
from tilewright.passes.regions.specialize import gemm_key

ROWS = (1, 2, 4, 8)
COLUMNS = (64, 128, 192, 256, 512, 4096)
K = 4096
EFFORT = 3  # the opt_level whose timings have all of ROWS


def _stored(key: Any) -> Timings:
    def fail() -> Timings:
        raise SystemExit("nothing was measured: set TILEWRIGHT_TUNE=1")

    return stored_or_measured("gemm-table", key, EFFORT, fail)


def lines_of(dtype: str, n: int) -> Iterator[Line]:
    """The switch for one weight [n, K]."""
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = Linears(kind, 1, n).eval()
    compiled = tilewright.compile(model, dtype="int4" if dtype == "int4" else None, opt_level=EFFORT)
    compiled(torch.randn(1, K, dtype=kind))
    (variant,) = compiled.variants.values()
    graph = variant.compiled.graph
    call = next(node for node in graph.graph.nodes if find_fact(node, GemmTable))
    table, timings = find_fact(call, GemmTable), _stored(gemm_key(graph.get_submodule(str(call.target))))
    assert table is not None
    for rows in ROWS:
        seconds = {name: dict(times)[rows] for name, times in timings.items()}
        picked = next(name for bound, name in table.entries if bound is None or rows <= bound)
        whole = min((time, name) for name, time in seconds.items() if ":" not in name)
        cut = min(((time, name) for name, time in seconds.items() if ":" in name), default=None)
        name = f"{dtype}, N = {n}, {rows} rows"
        if cut is None:
            yield Line(f"{name}: K is not cut", None, 1.0, f"{whole[1]} {whole[0] * 1e6:.1f} us; table: {picked}")
            continue
        note = f"{whole[1]} {whole[0] * 1e6:.1f} us, {cut[1]} {cut[0] * 1e6:.1f} us; table: {picked}"
        yield Line(f"{name}: whole / cut", None, whole[0] / cut[0], note)


def lines() -> Iterator[Line]:
    """All lines of this group."""
    with torch.no_grad():
        for dtype in ("fp32", "bf16", "int4"):
            for n in COLUMNS:
                yield from lines_of(dtype, n)
