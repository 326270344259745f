"""Encoders beside those who serve them: one run, all in turn, on the same batches.

    python benchmarks/encoders.py [--only CASE ...] [--contenders NAME ...] [--rounds 5] [--json]
    python benchmarks/encoders.py --steps

The first form prints, for each case, milliseconds, the time of each contender over ours in the same precision, the
largest difference from eager fp32 over real tokens, and our time over the floor: the operations of the real tokens at
the peak of a bare loop measured in the same run. The second switches passes off, one after the other. Only ratios are
worth quoting; a machine with other work to do shows in the spread.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import peers
import torch
from lengths import LENGTHS
from peak import peak
from timing import interleaved
from transformers import BertConfig, BertModel

import tilewright

STEPS: dict[str, dict[str, Any]] = {
    "everything": {},
    "no packing": {"unpad": "off"},
    "no fusion": {"opt_level": 1},
    "no merged linears": {"without": ("merge_linears",)},
    "vendor GEMMs": {"gemm": "vendor"},
    "neither packing nor fusion": {"unpad": "off", "opt_level": 1},
}
# What the time of the best other contender over ours should be, by case and precision; "floor" is ours over the floor.
TOO_SLOW = 8  # times eager: no contender
TARGETS = {
    "batch16_longest128": {"fp32": 1.05, "bf16": 1.4, "int8": 1.25, "floor": 1 / 0.88},
    "batch8_longest512": {"fp32": 1.25, "bf16": 1.25, "int8": 1.25},
    "batch1_length128": {"fp32": 1.0},
}


def batch(lengths: tuple[int, ...], vocab: int) -> dict[str, torch.Tensor]:
    """Right-padded ids and mask of the given lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, vocab, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}


def operations(config: BertConfig, lengths: tuple[int, ...]) -> float:
    """Multiplications and additions of the products of an encoder on its real tokens."""
    tokens, width = sum(lengths), config.hidden_size
    linears = 2.0 * tokens * (4 * width * width + 2 * width * config.intermediate_size)
    attention = 4.0 * width * sum(length * length for length in lengths)
    return config.num_hidden_layers * (linears + attention)


def compare(
    model: BertModel, case: str, runs: dict[str, peers.Run], failed: dict[str, str], rounds: int
) -> dict[str, Any]:
    """One case as a record: seconds and error of each contender, what could not run and why, and the floors."""
    inputs = batch(LENGTHS[case], model.config.vocab_size)
    real = inputs["attention_mask"].bool()
    runs, failed = dict(runs), dict(failed)
    with torch.no_grad():
        start = time.perf_counter()
        reference = model(**inputs).last_hidden_state[real]
        patience = TOO_SLOW * (time.perf_counter() - start)
        errors = {}
        for name in list(runs):
            start = time.perf_counter()
            try:
                runs[name](inputs)  # the first call may compile
                start = time.perf_counter()
                out = runs[name](inputs)
                found = out.float() if isinstance(out, torch.Tensor) else torch.as_tensor(numpy.asarray(out)).float()
                errors[name] = float((found[real] - reference).abs().max())
            except Exception as error:
                failed[name] = peers.one_line(error)
                del runs[name]
                continue
            if time.perf_counter() - start > patience:
                failed[name] = f"left out: a call took {time.perf_counter() - start:.1f} s"
                del runs[name]
        seconds = interleaved({name: lambda run=run: run(inputs) for name, run in runs.items()}, rounds)
    work = operations(model.config, LENGTHS[case])
    floors = {kind: work / rate for kind in ("fp32", "bf16", "int8") if (rate := peak(kind)) is not None}
    return {"case": case, "seconds": seconds, "errors": errors, "failed": failed, "floors": floors, "gflop": work / 1e9}


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
        print(f"| {name} | | | cannot run: {why[:110]} |")
    targets = TARGETS.get(record["case"], {})
    for kind, ratio in best.items():
        wanted = targets.get(kind)
        print(f"best peer in {kind}: {ratio:.2f} of our time" + (f", target {wanted:.2f}" if wanted else ""))
    for kind, floor in record["floors"].items():
        if kind in ours:
            wanted = f", target {targets['floor']:.2f}" if kind == "fp32" and "floor" in targets else ""
            print(f"{kind}: ours is {ours[kind] / floor:.2f} of the floor of {floor * 1e3:.0f} ms{wanted}", flush=True)


def steps(model: BertModel, rounds: int) -> None:
    """What each part brings, by switching it off."""
    compiled = {name: tilewright.compile(model, **options) for name, options in STEPS.items()}
    for case in ("batch16_longest128", "batch8_longest512"):
        inputs = batch(LENGTHS[case], model.config.vocab_size)
        calls: dict[str, Callable[[], Any]] = {"eager": lambda i=inputs: model(**i)}
        calls |= {name: lambda c=c, i=inputs: c(**i) for name, c in compiled.items()}
        with torch.no_grad():
            seconds = interleaved(calls, rounds)
        print(f"\n## Steps, {case}\n| | ms | over everything |\n| --- | --- | --- |")
        for name, value in seconds.items():
            print(f"| {name} | {value * 1e3:.0f} | {value / seconds['everything']:.2f} |", flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--contenders", nargs="+", choices=tuple(peers.CONTENDERS), default=list(peers.CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval()
    if options.steps:
        steps(model, options.rounds)
        return
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        runs, failed = peers.set_up(model, options.contenders, Path(folder))
        for case in options.only:
            record = compare(model, case, runs, failed, options.rounds)
            print(json.dumps(record), flush=True) if options.json else show(record)


if __name__ == "__main__":
    main()
