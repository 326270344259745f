"""The forms of attention on packed tokens against one another: BERT-base heads, fixed batches and rising lengths.

Only the attention's own kernels are timed, by the program's profile; the ratio is that of the online form to the form.
"""

import time
from collections.abc import Iterator

import torch
from lengths import LENGTHS
from timing import Line

from tilewright.driver.compile_graph import compile_attention
from tilewright.driver.tune_attention import attention_graph, attention_inputs, uneven_lengths
from tilewright.ir.measurements import AttentionKey
from tilewright.ir.regions import ATTENTION_VARIANTS
from tilewright.runtime.program import Program

HEADS, SIZE = 12, 64
BATCHES = {name: LENGTHS[name] for name in ("batch16_longest128", "batch8_longest512")}
UNEVEN = (32, 64, 128, 256, 512, 1024)
EQUAL = ((16, 64), (16, 128), (4, 512))
ROUNDS = 12


def lines() -> Iterator[Line]:
    """Each form at each batch it takes."""
    key = AttentionKey(SIZE, SIZE, 1, "float32")
    programs = {form: compile_attention(attention_graph(key, HEADS), form) for form in ATTENTION_VARIANTS}
    batches = {
        **BATCHES,
        **{f"{count} of {length}": (length,) * count for count, length in EQUAL},
        **{f"uneven up to {longest}": tuple(uneven_lengths(longest)) for longest in UNEVEN},
    }
    peak = _peak()
    for name, lengths in batches.items():
        fits = {form: most is None or max(lengths) <= most for form, most in ATTENTION_VARIANTS.items()}
        seconds = _seconds({form: programs[form] for form in programs if fits[form]}, key, lengths)
        work = sum(4.0 * length * length for length in lengths) * HEADS * SIZE
        for form, each in seconds.items():
            note = (
                f"{each * 1e3:.2f} ms, {work / each / 1e9:.0f} GFLOP/s, {work / each / peak:.2f} of a large product's"
            )
            yield Line(f"{name}: {form}", None, seconds["online"] / each, note)


def _peak() -> float:
    """FLOP/s of torch's product of two matrices of 1024 x 1024."""
    x = torch.randn(1024, 1024)
    return float(2 * 1024**3 / min(_time_product(x) for _ in range(20)))


def _time_product(x: torch.Tensor) -> float:
    begin = time.perf_counter()
    torch.mm(x, x)
    return time.perf_counter() - begin


def _seconds(programs: dict[str, Program], key: AttentionKey, lengths: tuple[int, ...]) -> dict[str, float]:
    """Least seconds of the attention's kernels of each program, which take turns."""
    inputs = attention_inputs(key, HEADS, lengths)
    found = dict.fromkeys(programs, float("inf"))
    for _ in range(ROUNDS):
        for form, program in programs.items():
            steps = program.profile(*inputs)
            found[form] = min(found[form], sum(seconds for name, seconds in steps if "attention" in name))
    return found
