"""Encoder-decoders of T5-small's sizes, random weights in fp32, beside transformers' own generate.

    python benchmarks/encoder_decoders.py [--family t5] [--rounds 3]

Both take turns in one process on the same sources, new ones in each round, and make 64 greedy tokens that nothing ends:

- decode: of one source of 128 tokens, or of eight, what further tokens take behind the first
- first: one source of 512 tokens and the first token
- summaries: eight sources of 48 to 512 tokens and all tokens, as a batch; and ours submitted one by one, beside that

Tokens of both are compared before anything is timed.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

import tilewright

NEW = 64
UNEVEN = (512, 448, 352, 256, 200, 128, 96, 48)
_SIZES = {"vocab_size": 32128, "d_model": 512, "pad_token_id": 0, "decoder_start_token_id": 0}
_HALVES = {
    f"{half}_{name}": size
    for half in ("encoder", "decoder")
    for name, size in (("layers", 6), ("attention_heads", 8), ("ffn_dim", 2048))
}
_BART = _SIZES | _HALVES | {"forced_eos_token_id": None}
FAMILIES: dict[str, Callable[[], Any]] = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**_SIZES)),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**_BART)),
}
Batch = dict[str, Tensor]
_seeds = itertools.count()


def sources(*lengths: int) -> Batch:
    """Random ids that no call has had before, or what an engine remembers would be timed."""
    generator = torch.Generator().manual_seed(next(_seeds))
    rows = [torch.randint(3, 32_000, (length,), generator=generator) for length in lengths]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()}


def made(model: Any, batch: Batch, new: int) -> Tensor:
    """Greedy tokens behind each source."""
    tokens: Tensor = model.generate(**batch, max_new_tokens=new, do_sample=False, eos_token_id=None)
    return tokens[:, 1:]


def submitted(model: Any, batch: Batch) -> list[list[int]]:
    """The same by requests that come one by one and share steps."""
    lengths = batch["attention_mask"].sum(1).tolist()
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    requests = [model.submit(ids[:n], **options) for ids, n in zip(batch["input_ids"], lengths, strict=True)]
    return [request.result() for request in requests]


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def times(contenders: dict[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds by contender and case, medians; all in turn in each round."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in contenders}
    calls: dict[str, Callable[[Any], Any]] = {
        "one, first token": lambda model: made(model, sources(128), 1),
        "one, all tokens": lambda model: made(model, sources(128), 1 + NEW),
        "eight, first token": lambda model: made(model, sources(*[128] * 8), 1),
        "eight, all tokens": lambda model: made(model, sources(*[128] * 8), 1 + NEW),
        "first": lambda model: made(model, sources(512), 1),
        "summaries": lambda model: made(model, sources(*UNEVEN), NEW),
        "submitted": lambda model: submitted(model, sources(*UNEVEN)),
    }
    for _, (case, call), (name, model) in itertools.product(range(rounds), calls.items(), contenders.items()):
        if case != "submitted" or isinstance(model, tilewright.CompiledModel):
            found[name].setdefault(case, []).append(seconds(lambda call=call, model=model: call(model)))
    return {name: {case: statistics.median(all_) for case, all_ in cases.items()} for name, cases in found.items()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=tuple(FAMILIES), default="t5")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = FAMILIES[options.family]().eval()
    contenders = {"transformers": model, "ours": tilewright.compile(model)}
    batch = sources(*UNEVEN)
    want, found = (made(each, batch, NEW) for each in contenders.values())
    print(f"tokens as transformers': {int((want == found).sum())} of {want.numel()}")
    result = times(contenders, options.rounds)
    rates = {
        name: {
            "decode, tokens/s": NEW / (of["one, all tokens"] - of["one, first token"]),
            "eight at once, tokens/s": 8 * NEW / (of["eight, all tokens"] - of["eight, first token"]),
            "512 tokens and the first one, ms": 1e3 * of["first"],
            "eight summaries, ms": 1e3 * of["summaries"],
            "submitted one by one, ms": 1e3 * of.get("submitted", of["summaries"]),
        }
        for name, of in result.items()
    }
    for case in rates["ours"]:
        theirs, ours = rates["transformers"][case], rates["ours"][case]
        ratio = theirs / ours if case.endswith("ms") else ours / theirs
        print(f"{case}: ours {ours:.4g}, transformers {theirs:.4g}, {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
