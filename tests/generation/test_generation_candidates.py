"""Processors on the candidates of top-k give what they give on all scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tilewright.driver.generation_candidates import AmongCandidates, on_candidates
from tilewright.runtime.serving.sampling import draw

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
    top_k=st.sampled_from([0, 2, 3, 10, 40]),
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


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [1, 700, 5000])
@pytest.mark.parametrize("count", [1, 3, 9, 64, 10_000])
def test_the_largest_are_those_of_transformers(size: int, count: int, ties: bool) -> None:
    top_k = TopKLogitsWarper(count)
    for seed in range(5):
        scores = torch.randn(1, size, generator=torch.Generator().manual_seed(seed))
        scores[0, -(size // 7) :] = -torch.inf  # taken out by a processor before
        if ties:
            scores = (scores * 2).round()
        if seed == 4:
            scores[0, size // 2] = 1e30
        expected = top_k(IDS, scores.clone())
        found = AmongCandidates(top_k, ())(IDS, scores.clone())
        assert torch.equal(found, expected)
    assert AmongCandidates(top_k, ()).candidates(IDS, torch.full((1, size), torch.nan)).scores.isnan().all()


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("size", [1, 2, 3000])
def test_the_nucleus_is_that_of_transformers(size: int, top_p: float) -> None:
    warper = TopPLogitsWarper(top_p, min_tokens_to_keep=2)
    for seed in range(5):
        scores = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * (3 if seed else 0)
        scores[0, : size // 3] = -torch.inf
        found = AmongCandidates(warper, ())(IDS, scores.clone()).sort().values
        assert torch.equal(found, warper(IDS, scores.clone()).sort().values)


def test_only_what_stands_behind_is_gathered() -> None:
    top_k, top_p = TopKLogitsWarper(3), TopPLogitsWarper(0.5)

    def own(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores

    assert on_candidates([own]) == (own,)
    alone, *rest = on_candidates([top_k, own, top_p])
    assert isinstance(alone, AmongCandidates)
    assert rest == [own, top_p]
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
        draw([scores], 16, None)


@pytest.mark.parametrize("filter_value", [-1e9])
def test_another_filter_value_is_left_alone(filter_value: float) -> None:
    processors = (TopKLogitsWarper(3, filter_value=filter_value), TopPLogitsWarper(0.5))
    assert on_candidates(processors)[0] is processors[0]
