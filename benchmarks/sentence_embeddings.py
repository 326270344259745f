"""MiniLM over the sample passages through sentence-transformers: its default beside ours, in turn.

    python benchmarks/sentence_embeddings.py [--rounds 3]

Sorted: one call of ``encode`` with batches of 32, which sorts by length. As they come: one call for every 32 passages
in their order, as texts reach a server that collects them. The tokenizer's time is part of all of these, and shown too.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import numpy
from sentence_transformers import SentenceTransformer
from timing import interleaved

import tilewright
from tilewright.cli.demo import minilm_folder, passages

SIZE = 32
# (time of the default over ours, largest cosine distance) by order and precision.
TARGETS = {("sorted", "fp32"): (1.5, 1e-6), ("sorted", "bf16"): (2.3, 2e-4), ("as they come", "fp32"): (2.5, 1e-6)}


def encode_in_order(model: SentenceTransformer, texts: list[str]) -> numpy.ndarray:
    """Embeddings of the texts, a call for every ``SIZE`` of them as they come."""
    return numpy.concatenate([model.encode(texts[start : start + SIZE]) for start in range(0, len(texts), SIZE)])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    default = SentenceTransformer(str(minilm_folder()), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = {kind: tilewright.compile(default, dtype=kind) for kind in ("fp32", "bf16", "int8")}
    texts = [text for _, text in passages()]
    start = time.perf_counter()
    for begin in range(0, len(texts), SIZE):
        default.preprocess(texts[begin : begin + SIZE])
    tokenizing = time.perf_counter() - start
    reference = default.encode(texts, normalize_embeddings=True)
    print(f"{len(texts)} passages, batches of {SIZE}; the tokenizer alone takes {tokenizing * 1e3:.0f} ms\n")
    print("| order | | ms | without tokenizer | default over it | largest cosine distance |")
    print("| --- | --- | --- | --- | --- | --- |")
    orders: dict[str, Callable[[SentenceTransformer, list[str]], numpy.ndarray]] = {
        "sorted": lambda model, given: model.encode(given, batch_size=SIZE),
        "as they come": encode_in_order,
    }
    for order, run in orders.items():
        models = {"default": default, **ours}
        seconds = interleaved(
            {name: lambda m=model, r=run: r(m, texts) for name, model in models.items()}, options.rounds
        )
        for name, value in seconds.items():
            found = run(models[name], texts)
            found = found / numpy.linalg.norm(found, axis=1, keepdims=True)
            distance = float((1 - (found.astype(numpy.float64) * reference).sum(1)).max())
            ratio = seconds["default"] / value
            wanted = TARGETS.get((order, name))
            target = f" (target {wanted[0]:g})" if wanted else ""
            limit = f" (limit {wanted[1]:g})" if wanted else ""
            alone = (value - tokenizing) * 1e3
            print(
                f"| {order} | {name} | {value * 1e3:.0f} | {alone:.0f} | {ratio:.2f}{target} | {distance:.1e}{limit} |"
            )


if __name__ == "__main__":
    main()
