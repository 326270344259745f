"""One mixture-of-experts layer of OLMoE's sizes (hidden 2048, 64 experts of 1024, top 8) beside other ways to run it.

Contenders compute the same layer from the same weights and take turns in one process, at several numbers of tokens:

- one-hot: the form of GShard and DeepSpeed-MoE's baseline: a tensor [tokens, experts, capacity] of ones and zeros takes
  tokens to experts and back by two einsums. The capacity is what the fullest expert needs, found by looking, so nothing
  is dropped: DeepSpeed's ``drop_tokens=False``.
- dropping: the same with the capacity that DeepSpeed takes by default: the mean number of rows of an expert, or 4.
  What an expert gets above that is left out, so the result is another; it is not compared.
- all experts: every expert computes every token, and a one-hot sum weighs them.
- loop, grouped_mm: transformers' own, which loop over experts, or sort rows and call torch's grouped product.

Each result is compared with the loop's before anything is timed. The last column is how fast our weights are read at
the least: the experts that have rows, once, over the time. "int8" and "int4" are our layer with rounded weights, beside
the others in fp32.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import interleaved
from torch import Tensor
from torch.nn.functional import one_hot
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

import tilewright

TARGET = 6.0  # over the one-hot form
PEERS = ["one-hot", "dropping", "all experts", "loop", "grouped_mm"]
LEAST_CAPACITY = 4
ERRORS = {"fp32": 1e-4, "bf16": 3e-2, "int8": 3e-2, "int4": 0.2}  # allowed, relative to the largest result
STORED_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 36 / 64}  # of an element of a weight
Layer = Callable[[Tensor], Tensor]


def made(config: OlmoeConfig, dtype: torch.dtype) -> Any:
    """The layer with random weights."""
    torch.manual_seed(0)
    block = OlmoeSparseMoeBlock(config).eval()
    with torch.no_grad():
        for weight in block.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
    return block.to(dtype)


def one_hot_layer(block: Any, drops: bool) -> Layer:
    """Rows to experts and back by products with a tensor of ones and zeros."""

    def run(x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        _, weights, chosen = block.gate(rows)
        count = block.experts.num_experts
        taken = one_hot(chosen, count)  # [T, k, E]
        place = taken.flatten(0, 1).cumsum(0).view_as(taken) * taken  # from 1, by expert
        capacity = max(LEAST_CAPACITY, -(-chosen.numel() // count)) if drops else int(place.max())
        # Slot 0 is of rows that are not with the expert, the last of those above the capacity.
        slots = one_hot(place.clamp(max=capacity + 1), capacity + 2)[..., 1:-1].to(rows.dtype)  # [T, k, E, C]
        dispatch = slots.sum(1)
        combine = torch.einsum("tkec,tk->tec", slots, weights.to(rows.dtype))
        given = torch.einsum("tec,th->ech", dispatch, rows)
        gate, up = torch.bmm(given, block.experts.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
        out = torch.bmm(block.experts.act_fn(gate) * up, block.experts.down_proj.transpose(1, 2))
        return torch.einsum("tec,ech->th", combine, out).view_as(x)

    return run


def all_experts_layer(block: Any) -> Layer:
    """Every expert on every token."""

    def run(x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        _, weights, chosen = block.gate(rows)
        share = (one_hot(chosen, block.experts.num_experts) * weights.unsqueeze(-1)).sum(1).to(rows.dtype)  # [T, E]
        gate, up = torch.einsum("th,enh->etn", rows, block.experts.gate_up_proj).chunk(2, dim=-1)
        out = torch.bmm(block.experts.act_fn(gate) * up, block.experts.down_proj.transpose(1, 2))
        return torch.einsum("te,eth->th", share, out).view_as(x)

    return run


def transformers_layer(block: Any, implementation: str) -> Layer:
    """The layer as transformers runs it."""

    def run(x: Tensor) -> Tensor:
        block.experts.config._experts_implementation = implementation
        result: Tensor = block(x)
        return result

    return run


def main() -> None:
    """Prints one table for each element type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 32, 128, 512])
    parser.add_argument("--dtypes", nargs="*", default=["fp32", "bf16"], choices=list(ERRORS))
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top", type=int, default=8)
    given = parser.parse_args()
    config = OlmoeConfig(
        hidden_size=given.hidden,
        intermediate_size=given.inner,
        num_experts=given.experts,
        num_experts_per_tok=given.top,
    )
    for name in given.dtypes:
        with torch.no_grad():
            _table(made(config, torch.bfloat16 if name == "bf16" else torch.float32), name, given)


def _table(block: Any, name: str, given: argparse.Namespace) -> None:
    options = {"dtype": name} if name.startswith("int") else {}
    ours = tilewright.compile(block, gemm="triton", **options)
    loop = transformers_layer(block, "eager")
    forms = [*(one_hot_layer(block, drops) for drops in (False, True)), all_experts_layer(block)]
    forms += [loop, transformers_layer(block, "grouped_mm")]
    peers = [key for key in PEERS if key in given.peers]
    calls = {"ours": ours, **{key: form for key, form in zip(PEERS, forms, strict=True) if key in peers}}
    print(f"\n{name}; peers' time over ours\n\n| tokens | ours | {' | '.join(peers)} | GB/s |")
    print(f"| --- | --- | {'--- | ' * len(peers)}--- |")
    dtype = next(block.parameters()).dtype
    many = torch.randn(1, max(given.tokens), given.hidden, dtype=dtype)
    for _ in range(2):  # a system that takes back memory nobody has touched for a while must have brought it all in
        for call in calls.values():
            call(many)
    for tokens in given.tokens:
        x = torch.randn(1, tokens, given.hidden, dtype=dtype)
        expected = loop(x).float()
        for key, call in calls.items():
            if key == "dropping":
                continue
            # The median over rows: in bf16 scores are often equal, and then the router's choice is anybody's.
            error = (call(x).float() - expected).abs().amax(-1).median() / expected.abs().max()
            if error > ERRORS[name if key == "ours" or name == "bf16" else "fp32"]:
                raise SystemExit(f"{key} differs from the loop by {error:.1e} at {tokens} tokens")
        if ours.stats.eager_steps or ours.stats.fallbacks:
            raise SystemExit(f"ours does not run on kernels alone: {ours.reasons}")
        seconds = interleaved({key: partial(call, x) for key, call in calls.items()}, given.rounds)
        used = block.gate(x.flatten(0, 1))[2].unique().numel()
        read = used * 3 * given.hidden * given.inner * STORED_BYTES[name]
        ratios = {key: seconds[key] / seconds["ours"] for key in peers}
        cells = [f"**{r:.2f}**" if key == "one-hot" and r < TARGET else f"{r:.2f}" for key, r in ratios.items()]
        rate = read / seconds["ours"] / 1e9
        print(f"| {tokens} | {seconds['ours'] * 1e3:.2f} ms | {' | '.join(cells)} | {rate:.1f} |", flush=True)


if __name__ == "__main__":
    main()
