"""Encoders: eager, compiled at each level, with packing off, and with one GEMM library alone; one run, in turn.

    python benchmarks/encoders.py [--rounds 7] [--model bert-base|minilm|all]

Prints ratios to eager; absolute milliseconds are for orientation alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lengths import LENGTHS
from transformers import AutoModel, BertConfig, BertModel

import tilewright
from tilewright.cli.demo import minilm_folder

VARIANTS: dict[str, dict[str, Any]] = {
    "compiled": {},
    "gemm=triton": {"gemm": "triton"},
    "gemm=vendor": {"gemm": "vendor"},
    "no packing": {"unpad": "off"},
    "no fusion": {"opt_level": 1},
}


def batch(lengths: tuple[int, ...], vocab: int) -> dict[str, torch.Tensor]:
    """Right-padded ids and mask of the given lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, vocab, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, all run in turn within each round; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Prints one table a model and batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", choices=("bert-base", "minilm", "all"), default="all")
    options = parser.parse_args()
    models = {}
    if options.model in ("bert-base", "all"):
        torch.manual_seed(0)
        models["bert-base"] = BertModel(BertConfig()).eval()
    if options.model in ("minilm", "all"):
        models["minilm"] = AutoModel.from_pretrained(minilm_folder()).eval()
    for name, model in models.items():
        compiled = {label: tilewright.compile(model, **extra) for label, extra in VARIANTS.items()}
        for case, lengths in LENGTHS.items():
            inputs = batch(lengths, model.config.vocab_size)
            calls: dict[str, Callable[[], Any]] = {"eager": lambda m=model, i=inputs: m(**i)}
            calls |= {label: lambda c=c, i=inputs: c(**i) for label, c in compiled.items()}
            with torch.no_grad():
                seconds = interleaved(calls, options.rounds)
            print(f"\n{name}, {case}: {sum(lengths)} tokens of {len(lengths) * max(lengths)}")
            for label, value in seconds.items():
                print(f"  {label:12s} {value * 1e3:9.2f} ms   {seconds['eager'] / value:5.2f}x eager")


if __name__ == "__main__":
    main()
