"""Encoders beside those who serve them: each in a process of its own, all in turn, on the same batches.

    python benchmarks/encoders.py [--only CASE ...] [--contenders NAME ...] [--rounds 3] [--json]
    python benchmarks/encoders.py --steps

The first form prints, for each case, milliseconds, the time of each contender over ours in the same precision, the
largest difference from eager fp32 over real tokens, and our time over the floor: the operations of the real tokens at
the peak of a bare loop measured in the same run. A contender whose difference is above the limit of its precision is
not timed. The second form switches passes off, one after the other. Only ratios are worth quoting; a machine with other
work to do shows in the spread.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import peers
import torch
from lengths import LENGTHS
from transformers import BertConfig
from workers import FailedError, Inputs, Make, Run, Worker, in_turn, started

Contender = tuple[str, Make]  # the precision it competes in, and what sets it up
Record = dict[str, Any]

STEPS: dict[str, dict[str, Any]] = {
    "everything": {},
    "no packing": {"unpad": "off"},
    "no fusion": {"opt_level": 1},
    "no merged linears": {"without": ("merge_linears",)},
    "vendor GEMMs": {"gemm": "vendor"},
    "neither packing nor fusion": {"unpad": "off", "opt_level": 1},
}
TOO_SLOW = 8  # times eager: no contender
# Largest difference from eager in fp32 over real tokens, whose values are about 1; beyond it a result is wrong.
LIMITS = {"fp32": 1e-3, "bf16": 0.3, "int8": 0.3}
# What the time of the best other contender over ours should be, by case and precision; "floor" is ours over the floor.
TARGETS = {
    "batch16_longest128": {"fp32": 1.05, "bf16": 1.4, "int8": 1.25, "floor": 1 / 0.88},
    "batch8_longest512": {"fp32": 1.25, "bf16": 1.25, "int8": 1.25},
    "batch1_length128": {"fp32": 1.0},
}


def batch(lengths: tuple[int, ...]) -> dict[str, numpy.ndarray]:
    """Right-padded ids and mask of the given lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, BertConfig().vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    made = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}
    return {name: value.numpy() for name, value in made.items()}


def operations(config: BertConfig, lengths: tuple[int, ...]) -> float:
    """Multiplications and additions of the products of an encoder on its real tokens."""
    tokens, width = sum(lengths), config.hidden_size
    linears = 2.0 * tokens * (4 * width * width + 2 * width * config.intermediate_size)
    attention = 4.0 * width * sum(length * length for length in lengths)
    return config.num_hidden_layers * (linears + attention)


def peaks() -> Run:
    """What measures operations a second at the peak of each precision of ``LIMITS``; NaN without the instruction."""
    from peak import peak

    return lambda _: numpy.array([peak(kind) or numpy.nan for kind in LIMITS])


def bench(contenders: dict[str, Contender], cases: list[str], rounds: int, report: Callable[[Record], None]) -> None:
    """Sets contenders up and reports each case: seconds, errors, what failed and why, and the floors."""
    with ExitStack() as stack:
        reference = stack.enter_context(closing(Worker(partial(peers.contender, "eager fp32", Path()))))
        gauge = stack.enter_context(closing(Worker(peaks)))
        makes = {name: make for name, (_, make) in contenders.items()}
        workers, failed = stack.enter_context(started(makes))
        for case in cases:
            inputs = batch(LENGTHS[case])
            before = gauge.result(inputs)
            expected = reference.result(inputs)
            limit = TOO_SLOW * reference.seconds(inputs, limit=60.0)
            errors, wrong = check(workers, contenders, inputs, expected)
            seconds, left = in_turn({name: workers[name] for name in errors}, inputs, rounds, limit)
            work = operations(BertConfig(), LENGTHS[case])
            reached = numpy.fmax(before, gauge.result(inputs))  # what disturbs a loop makes it slower, never faster
            rates = dict(zip(LIMITS, reached.tolist(), strict=True))
            floors = {kind: work / rate for kind, rate in rates.items() if rate > 0}
            report({"case": case, "gflop": work / 1e9, "floors": floors, "seconds": seconds, "errors": errors,
                    "failed": failed | wrong | left})  # fmt: skip


def check(
    workers: dict[str, Worker], contenders: dict[str, Contender], inputs: Inputs, expected: numpy.ndarray
) -> tuple[dict[str, float], dict[str, str]]:
    """Largest difference of each contender from what is expected, over real tokens; and what is wrong with others."""
    real = inputs["attention_mask"] > 0
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, worker in workers.items():
        try:
            found = worker.result(inputs)
        except FailedError as error:
            failed[name] = f"cannot run: {error}"
            continue
        same = found.shape == expected.shape
        error = float(numpy.abs(found - expected)[real].max()) if same else float("inf")
        limit = LIMITS[contenders[name][0]]
        if error <= limit:
            errors[name] = error
        else:
            failed[name] = f"wrong result: off by {error:.1e} (limit {limit:g})"
    return errors, failed


def show(record: dict[str, Any]) -> None:
    """Prints one record as a table, targets beside the best other contender of each precision."""
    lengths = LENGTHS[record["case"]]
    print(f"\n## BERT-base, {record['case']}: {sum(lengths)} tokens of {len(lengths) * max(lengths)}, "
          f"{record['gflop']:.0f} GFLOP")  # fmt: skip
    print("| contender | ms | its time over ours | largest difference |\n| --- | --- | --- | --- |")
    ours = {name.split()[1]: value for name, value in record["seconds"].items() if name.startswith("tilewright")}
    best: dict[str, float] = {}
    for name, value in record["seconds"].items():
        kind = peers.CONTENDERS[name][0]
        ratio = value / ours[kind] if kind in ours else float("nan")
        if not name.startswith(("tilewright", "eager")):
            best[kind] = min(best.get(kind, float("inf")), ratio)
        print(f"| {name} | {value * 1e3:.1f} | {ratio:.2f} | {record['errors'][name]:.1e} |")
    for name, why in record["failed"].items():
        print(f"| {name} | | | {why[:110]} |")
    targets = TARGETS.get(record["case"], {})
    for kind, ratio in best.items():
        wanted = targets.get(kind)
        print(f"best peer in {kind}: {ratio:.2f} of our time" + (f", target {wanted:.2f}" if wanted else ""))
    for kind, floor in record["floors"].items():
        if kind in ours:
            wanted = f", target {targets['floor']:.2f}" if kind == "fp32" and "floor" in targets else ""
            print(f"{kind}: ours is {ours[kind] / floor:.2f} of the floor of {floor * 1e3:.0f} ms{wanted}", flush=True)


def show_steps(record: Record) -> None:
    """Prints what each part brings, from one record of ``STEPS``."""
    print(f"\n## Steps, {record['case']}\n| | ms | over everything |\n| --- | --- | --- |")
    for name, value in record["seconds"].items():
        print(f"| {name} | {value * 1e3:.0f} | {value / record['seconds'].get('everything', numpy.nan):.2f} |")
    for name, why in record["failed"].items():
        print(f"| {name} | | {why[:110]} |")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--contenders", nargs="+", choices=tuple(peers.CONTENDERS), default=list(peers.CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        names = ["eager fp32"] if options.steps else options.contenders
        contenders: dict[str, Contender] = {
            name: (peers.CONTENDERS[name][0], partial(peers.contender, name, Path(folder))) for name in names
        }
        if options.steps:
            contenders |= {name: ("fp32", partial(peers.compiled, chosen)) for name, chosen in STEPS.items()}
        table = show_steps if options.steps else show
        report = (lambda record: print(json.dumps(record), flush=True)) if options.json else table
        bench(contenders, options.only, options.rounds, report)


if __name__ == "__main__":
    main()
