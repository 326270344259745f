"""Processors on the candidates of top-k give what they give on all scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tilewright.driver.generation_candidates import AmongCandidates, on_candidates
from tilewright.runtime.sampling import draw

IDS = torch.tensor([[1, 2]])
OPTIONS = {
    "top_p": st.floats(0.05, 0.99),
    "min_p": st.floats(0.01, 0.9),
    "typical_p": st.floats(0.05, 0.99),
    "epsilon_cutoff": st.floats(0.001, 0.2),
    "eta_cutoff": st.floats(0.001, 0.2),
    "renormalize_logits": st.just(True),
}


@settings(max_examples=60, deadline=None)
@given(
    options=st.fixed_dictionaries({}, optional=OPTIONS),
    top_k=st.integers(2, 40),
    seed=st.integers(0, 999),
    step=st.sampled_from([0.0, 0.5]),
)
def test_scores_equal_those_on_the_whole_vocabulary(
    options: dict[str, float], top_k: int, seed: int, step: float
) -> None:
    from transformers import GenerationMixin

    class Bare(GenerationMixin):
        pass

    config = GenerationConfig(do_sample=True, top_k=top_k, temperature=0.7, **options)
    config.update(**config._get_default_generation_params(), defaults_only=True)
    config._eos_token_tensor = None
    processors = Bare()._get_logits_processor(config)
    scores = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)) * 3
    if step:
        scores = (scores / step).round() * step  # ties, also at the k-th
    expected = processors(IDS, scores.clone())
    found = scores.clone()
    for processor in on_candidates(processors):
        found = processor(IDS, found)
    if step:  # of equal scores either may stay
        found, expected = found.sort().values, expected.sort().values
    torch.testing.assert_close(found, expected)


def test_only_what_stands_behind_top_k_is_gathered() -> None:
    top_k, top_p = TopKLogitsWarper(3), TopPLogitsWarper(0.5)

    def own(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores

    assert on_candidates([top_p, top_k]) == (top_p, top_k)
    assert on_candidates([top_k, own, top_p]) == (top_k, own, top_p)
    first, among, last = on_candidates([own, top_k, top_p, own])
    assert (first, last) == (own, own)
    assert isinstance(among, AmongCandidates)
    assert on_candidates([]) == ()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=["nan", "nothing left"])
def test_scores_that_are_no_distribution_stay_so(value: float) -> None:
    scores = torch.zeros(1, 16).index_fill(1, torch.arange(16) if value < 0 else torch.tensor([3]), value)
    for processor in on_candidates([TopKLogitsWarper(3), MinPLogitsWarper(0.1), TopPLogitsWarper(0.9)]):
        scores = processor(IDS, scores)
    with pytest.raises(RuntimeError, match="probability"):
        draw(scores, None)


@pytest.mark.parametrize("filter_value", [-1e9])
def test_another_filter_value_is_left_alone(filter_value: float) -> None:
    processors = (TopKLogitsWarper(3, filter_value=filter_value), TopPLogitsWarper(0.5))
    assert on_candidates(processors) == processors
