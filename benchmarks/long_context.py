"""Decoding behind up to 10,000 tokens: what a step costs beside the keys and values that it must read.

    python benchmarks/long_context.py [--kv-dtypes fp32 bf16 int8] [--batches 1 8] [--contexts 100 10000] [--threads N]

A model of four layers whose four query heads share one head of 256, with little else to compute. Prints the time of a
step, the bytes of keys and values it reads, and how both grow from the shortest context; and for one sequence that of
transformers, whose cache is copied to be extended. All in one run, in turn; only ratios are worth quoting.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tilewright.driver.options import CompileOptions
from tilewright.driver.steps import PAGE_SIZE, StepModel, compile_steps
from tilewright.ir.steps import StepBatch

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 64,
    "max_position_embeddings": 32768,
}
ROUNDS = 15


def decoding(sequences: int, context: int) -> StepBatch:
    """A step of one token each behind so many others, in pages of their own."""
    pages = -(-context // PAGE_SIZE)
    width = 1 << (pages - 1).bit_length()
    table = torch.zeros((sequences, width), dtype=torch.int32)
    table[:, :pages] = torch.arange(sequences * pages).reshape(sequences, pages)
    offsets = torch.arange(sequences + 1, dtype=torch.int32)
    slots = torch.full((sequences,), context - 1, dtype=torch.int32)
    return StepBatch(torch.ones(sequences).long(), slots, offsets, slots + 1, table, offsets[:-1], offsets)


def seconds(step: Callable[[], object]) -> float:
    """Median time of a step."""
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def ours(steps: StepModel, sequences: int, context: int) -> float:
    """Of our step; keys and values are random."""
    pool = steps.make_pages(sequences * -(-context // PAGE_SIZE))
    for tensor in pool.tensors:
        tensor.copy_(torch.randint(-9, 9, tensor.shape))
    batch = decoding(sequences, context)
    for _ in range(3):
        steps.step(pool, batch)
    return seconds(lambda: steps.step(pool, batch))


def theirs(model: Any, context: int) -> float:
    """Of the model's own step, with the copy of its cache, which grows by a token in each."""
    ids = torch.ones((1, 1)).long()
    shape = (1, SIZES["num_key_value_heads"], context - 1, SIZES["head_dim"])
    cache = DynamicCache()
    for layer in range(SIZES["num_hidden_layers"]):
        cache.update(torch.randn(shape), torch.randn(shape), layer)

    def step() -> None:
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)

    for _ in range(3):
        step()
    return seconds(step)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-dtypes", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--contexts", nargs="+", type=int, default=[100, 500, 2000, 10_000])
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    print("| keys | sequences | context | ms | MB read | GB/s | times the shortest |\n|" + " --- |" * 7)
    for kv_dtype in options.kv_dtypes:
        steps = compile_steps(model, CompileOptions(kv_dtype=kv_dtype))
        slot = steps.make_pages(1).bytes / PAGE_SIZE
        for batch in options.batches:
            first = None
            for context in options.contexts:
                took, read = ours(steps, batch, context), batch * context * slot
                first = first or took
                figures = f"{took * 1e3:.3f} | {read / 1e6:.2f} | {read / took / 1e9:.1f} | {took / first:.2f}"
                print(f"| {kv_dtype} | {batch} | {context} | {figures} |", flush=True)
    first = None
    for context in options.contexts:
        took = theirs(model, context)
        first = first or took
        print(f"| transformers | 1 | {context} | {took * 1e3:.3f} | | | {took / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
