"""What hangs on ``generate``: streamers, stop strings, processors and criteria of the caller, refused options."""

from typing import Any

import pytest
import torch
from reference_model import ReferenceModel, tiny_gpt2
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer

from tilewright.driver.generation import TextGenerator
from tilewright.errors import InputError, OptionError

GPT2 = tiny_gpt2()
IDS = torch.tensor([[5, 9, 13, 21], [8, 40, 3, 2]])


def _generator(**options: Any) -> TextGenerator:
    return TextGenerator(ReferenceModel(GPT2), GPT2.config, GPT2.generation_config, **options)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A letter an id."""
    letters = {chr(48 + number): number for number in range(64)}
    tokenizer = Tokenizer(WordLevel(letters, unk_token="0"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Columns(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[list[Any]] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.tolist())

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("rows", [1, 2])
def test_a_streamer_gets_what_transformers_gives_it(rows: int) -> None:
    options = {"max_new_tokens": 9, "eos_token_id": [5, 9, 21, 33], "pad_token_id": 0}
    streamers = Columns(), Columns()
    for generator, streamer in zip((GPT2, _generator()), streamers, strict=True):
        generator.generate(IDS[:rows], streamer=streamer, **options)
    assert streamers[1].given == streamers[0].given
    assert streamers[1].ends == 1


def test_a_streamer_waits_for_rows_that_start_later() -> None:
    streamer = Columns()
    made = _generator(max_sequences=1, token_budget=1).generate(IDS, streamer=streamer, max_new_tokens=5)
    assert torch.tensor(streamer.given[1:]).T.tolist() == made[:, 4:].tolist()


def test_text_streamer(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = _tokenizer()
    made = _generator().generate(IDS[:1], streamer=TextStreamer(tokenizer, skip_prompt=True), max_new_tokens=9)
    assert capsys.readouterr().out.strip() == tokenizer.decode(made[0, 4:]).strip()


def test_stop_strings() -> None:
    tokenizer = _tokenizer()
    free = GPT2.generate(IDS[:1], max_new_tokens=12)
    text = tokenizer.decode(free[0, 7:9])
    options = {"max_new_tokens": 12, "stop_strings": [text], "tokenizer": tokenizer}
    expected, found = GPT2.generate(IDS[:1], **options), _generator().generate(IDS[:1], **options)
    assert torch.equal(found, expected)
    assert found.shape[1] < free.shape[1]
    assert torch.equal(_generator().generate(IDS[:1], prompt_lookup_num_tokens=3, **options), expected)


def test_processors_and_criteria_of_the_caller() -> None:
    def favourite(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert ids.shape[0] == scores.shape[0]
        scores[:, 17] += 2.0 * (ids.shape[1] % 3)  # in place, as some do
        return scores

    def long_enough(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (ids == 17).sum(1) >= 2

    for rows in (1, 2):
        options = {"logits_processor": [favourite], "stopping_criteria": [long_enough], "max_new_tokens": 20}
        options |= {"pad_token_id": 0, "eos_token_id": 63}
        expected = GPT2.generate(IDS[:rows], **_lists(options))
        assert torch.equal(_generator().generate(IDS[:rows], **_lists(options)), expected)


def _lists(options: dict[str, Any]) -> dict[str, Any]:
    from transformers import LogitsProcessorList

    criteria = StoppingCriteriaList(options["stopping_criteria"])
    return options | {
        "logits_processor": LogitsProcessorList(options["logits_processor"]),
        "stopping_criteria": criteria,
    }


def test_criteria_see_scores_where_they_are_kept() -> None:
    seen = []

    def look(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(len(scores))
        return torch.zeros(len(ids), dtype=torch.bool)

    criteria = StoppingCriteriaList([look])
    asked = {"return_dict_in_generate": True, "output_scores": True}
    _generator().generate(IDS[:1], stopping_criteria=criteria, max_new_tokens=4, **asked)
    assert seen == [1, 2, 3]  # the last token ends by its number, before anything else is asked


def test_a_failing_streamer_leaves_no_request_behind() -> None:
    class Failing(Columns):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.given) == 3:
                raise KeyboardInterrupt

    generator = _generator(pages=20)
    with pytest.raises(KeyboardInterrupt):
        generator.generate(IDS, streamer=Failing(), max_new_tokens=9)
    assert not generator.engine.busy
    assert generator.engine.free_pages == 20


def test_submitted_requests_run_together() -> None:
    generator = _generator(pages=40)
    requests = [generator.submit(row, max_new_tokens=8, repetition_penalty=1.5) for row in IDS]
    expected = GPT2.generate(IDS, max_new_tokens=8, repetition_penalty=1.5)[:, 4:].tolist()
    assert [request.result() for request in requests] == expected
    assert generator.engine.stats.steps == 8
    with pytest.raises(OptionError, match="these options make 3"):
        generator.submit(IDS[0], max_new_tokens=2, do_sample=True, num_return_sequences=3)
    assert not generator.engine.busy


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "paged"},
        {"generation_config": GenerationConfig(cache_implementation="quantized")},
        {"guidance_scale": 1.5},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"past_key_values": object()},
        {"inputs_embeds": torch.zeros(1, 4, 32)},
        {"position_ids": torch.arange(4)[None] + 3},
        {"custom_generate": "someone/something"},
        {"assistant_early_exit": 1},
        {"negative_prompt_ids": IDS},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_cannot_be_honoured(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="cannot honour"):
        _generator().generate(IDS, max_new_tokens=3, **options)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"temperature": 0.0}, {"top_p": 1.5}, {"top_k": -3}, {"min_p": 2.0}, {"typical_p": 0.0}],
    ids=str,
)
def test_sampling_out_of_range(options: dict[str, float]) -> None:
    generator = _generator(pages=20)
    with pytest.raises(ValueError, match=next(iter(options))):
        generator.generate(IDS, do_sample=True, max_new_tokens=3, **options)
    assert not generator.engine.busy


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences", "prompt_lookup_num_tokens"])
def test_counts_out_of_range(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} is a count"):
        _generator().generate(IDS, max_new_tokens=3, **{name: 0})


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.empty(1, 0, dtype=torch.int64), {}, "at least one token"),
        (torch.tensor([1, 2]), {}, r"\[B, S\]"),
        (torch.ones(1, 2), {}, r"\[B, S\]"),
        ([[1, 2]], {}, "list"),
        (IDS, {"attention_mask": torch.ones(2, 3)}, "shape of input_ids"),
        (IDS, {"attention_mask": torch.tensor([[1] * 4, [0] * 4])}, "at least one token"),
        (torch.full((1, 2), 64), {}, "not in the vocabulary"),
        (torch.full((1, 2), 64), {"num_beams": 2}, "not in the vocabulary"),
        (torch.ones(1, 60, dtype=torch.int64), {}, "longer than the model's context"),
        (torch.ones(1, 60, dtype=torch.int64), {"num_beams": 2}, "longer than the model's context"),
        (torch.ones(1, 30, dtype=torch.int64), {}, "cache is smaller than this request"),
        (torch.ones(1, 14, dtype=torch.int64), {"num_beams": 2}, "cache is smaller than this search"),
    ],
)
def test_prompts_that_cannot_run(ids: Any, options: dict[str, Any], message: str) -> None:
    generator = _generator(pages=6)
    with pytest.raises(InputError, match=message):
        generator.generate(ids, max_new_tokens=5, **options)
    assert not generator.engine.busy
    assert generator.generate(IDS[:1], max_new_tokens=5).shape == (1, 9)


def test_too_many_new_tokens_are_refused_before_memory_is_taken() -> None:
    model = ReferenceModel(GPT2)
    generator = TextGenerator(model, GPT2.config, GPT2.generation_config)
    with pytest.raises(InputError, match="longer than the model's context"):
        generator.generate(IDS, max_new_tokens=10**9)
    assert model.pools == 0


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ValueError, match="tempurature"):
        _generator().generate(IDS, tempurature=1.0)


def test_there_is_no_forward_without_pages() -> None:
    with pytest.raises(InputError, match="call generate"):
        _generator()(IDS)
