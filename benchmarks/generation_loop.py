"""What generation costs outside of the model: time of a decoding step whose model does nothing.

Prints for each number of sequences and vocabulary the milliseconds of a step that chooses the largest logits, and of
steps that draw, beside steps of transformers' own loop over the same model.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from tilewright.driver.generation_candidates import on_candidates
from tilewright.ir.steps import StepBatch
from tilewright.runtime.serving.engine import Engine
from tilewright.runtime.serving.request import RequestOptions
from tilewright.runtime.serving.sampling import Sampling

PROMPT = 2000
STEPS = 60
DRAWN: dict[str, dict[str, Any]] = {
    "top-k 64, top-p 0.95": {"top_k": 64, "top_p": 0.95},
    "temperature 0.8": {"temperature": 0.8, "top_k": 0},
    "top-p 0.95": {"top_k": 0, "top_p": 0.95},
    "min-p 0.05": {"top_k": 0, "min_p": 0.05},
}
_Mixin: Any = GenerationMixin


class Nothing:
    """A cached model that has its logits ready."""

    page_size = 32
    max_length = 1 << 20

    def __init__(self, vocab_size: int, sequences: int) -> None:
        self.vocab_size = vocab_size
        self.logits = torch.randn(sequences, vocab_size) * 3

    def make_pages(self, count: int) -> None:
        """No memory."""

    def copy_pages(self, pool: None, source: torch.Tensor, target: torch.Tensor) -> None:
        """Nothing to copy."""

    def step(self, pool: None, batch: StepBatch) -> torch.Tensor:
        """Logits [R, V]."""
        return self.logits[: len(batch.rows)]


class TransformersLoop(_Mixin):
    """The same for transformers' own loop."""

    main_input_name = "input_ids"
    device = torch.device("cpu")
    dtype = torch.float32
    _is_stateful = False

    def __init__(self, model: Nothing) -> None:
        self.model = model
        self.config = PretrainedConfig(vocab_size=model.vocab_size)
        self.generation_config = GenerationConfig()
        self.times: list[float] = []

    def get_experts_implementation(self) -> dict[str, str]:
        """Asked for before decoding."""
        return {}

    def is_remote_code(self) -> bool:
        """Asked for at each step."""
        return False

    def _prepare_cache_for_generation(self, *args: object) -> None:
        """None is needed."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: Any = None, position_ids: Any = None, **more: Any
    ) -> Any:
        """Logits [B, 1, V]."""
        self.times.append(time.perf_counter())
        return CausalLMOutputWithPast(logits=self.model.logits[: len(input_ids), None])

    __call__ = forward


def engine_step(model: Nothing, sequences: int, sampling: Sampling) -> float:
    """Seconds of a decoding step of the engine, the median."""
    pages = sequences * (-(-(PROMPT + 2 * STEPS) // model.page_size) + 1)
    engine = Engine(model, pages=pages, token_budget=512)
    for _ in range(sequences):
        prompt = torch.randint(0, model.vocab_size, (PROMPT,))
        engine.add_request(prompt, RequestOptions(max_new_tokens=2 * STEPS, sampling=sampling))
    while engine.stats.made < sequences:
        engine.step()
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def transformers_step(model: Nothing, sequences: int, **options: Any) -> float:
    """Seconds from one forward of transformers' loop to the next, the median."""
    loop = TransformersLoop(model)
    ids = torch.randint(0, model.vocab_size, (sequences, PROMPT))
    loop.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, use_cache=True, **options)
    return statistics.median(b - a for a, b in zip(loop.times, loop.times[1:], strict=False))


def drawing(model: Nothing, options: dict[str, float]) -> Sampling:
    """How tokens are drawn with these options."""
    config = GenerationConfig(do_sample=True, **options)
    config.update(**config._get_default_generation_params(), defaults_only=True)
    config._eos_token_tensor = None
    return Sampling(on_candidates(TransformersLoop(model)._get_logits_processor(config)), do_sample=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 262_144])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8])
    chosen = parser.parse_args()
    print("| vocabulary | sequences | largest |" + "".join(f" {name} |" for name in DRAWN))
    print("| --- | --- | --- |" + " --- |" * len(DRAWN))
    for vocabulary in chosen.vocabularies:
        for sequences in chosen.sequences:
            model = Nothing(vocabulary, sequences)
            ours = [engine_step(model, sequences, Sampling())]
            theirs = [transformers_step(model, sequences, do_sample=False)]
            for options in DRAWN.values():
                ours.append(engine_step(model, sequences, drawing(model, options)))
                theirs.append(transformers_step(model, sequences, do_sample=True, **options))
            cells = [f"{1e3 * a:.2f} / {1e3 * b:.2f}" for a, b in zip(ours, theirs, strict=True)]
            print(f"| {vocabulary:,} | {sequences} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
