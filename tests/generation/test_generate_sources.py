"""``generate`` of an encoder-decoder gives what Hugging Face's gives, compiled, from sources of uneven lengths."""

from typing import Any

import pytest
import torch
from reference_model import ReferenceModel, tiny_gpt2
from reference_source_model import ReferenceSourceModel, tiny_bart

import tilewright
from tilewright.driver.generation import TextGenerator
from tilewright.driver.generation_sources import SourceTextGenerator
from tilewright.errors import InputError, OptionError

BART = tiny_bart()
LENGTHS = (31, 5, 17, 40)
EOS = {"eos_token_id": [5, 9, 13, 21, 33, 40, 50]}


def _generator(**options: Any) -> SourceTextGenerator:
    return SourceTextGenerator(ReferenceSourceModel(BART), BART.config, BART.generation_config, **options)


@pytest.fixture(scope="module")
def compiled() -> Any:
    return tilewright.compile(BART)


def _sources() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 64, (length,), generator=generator) for length in LENGTHS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (torch.arange(40) < torch.tensor(LENGTHS)[:, None]).long()}


CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 60},
    "end tokens": EOS | {"min_new_tokens": 3},
    "forced": {"forced_bos_token_id": 7, "forced_eos_token_id": 2, "eos_token_id": 2},
    "sample": {"do_sample": True, "top_p": 0.9},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4} | EOS,
    "several beams": {"num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 2, "length_penalty": 2.0},
    "begun": {"decoder_input_ids": torch.tensor([[2, 5, 6], [2, 7, 8], [2, 5, 9], [2, 2, 2]])},
    "begun without the start": {"decoder_input_ids": torch.tensor([[5, 6], [7, 8], [5, 9], [3, 4]]), "num_beams": 2},
    "drafted": {"prompt_lookup_num_tokens": 3},
    "dict": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "dict of beams": {"return_dict_in_generate": True, "num_beams": 2},
}


@pytest.mark.parametrize("call", CALLS)
def test_tokens_equal_transformers(compiled: Any, call: str) -> None:
    options = {"max_new_tokens": 12} | CALLS[call]
    results = []
    for generator in (BART, compiled):
        torch.manual_seed(7)
        given = dict(options)
        if generator is BART:
            given.pop("prompt_lookup_num_tokens", None)  # of one row alone there; drafts change no token
        results.append(generator.generate(**_sources(), **given))
    want, found = results
    if isinstance(want, torch.Tensor):
        assert found.tolist() == want.tolist()
        return
    assert type(found) is type(want)
    assert found.sequences.tolist() == want.sequences.tolist()
    for name in ("scores", "logits"):
        if want.get(name) is not None:
            torch.testing.assert_close(torch.stack(found[name]), torch.stack(want[name]), rtol=1e-4, atol=1e-4)


def test_processors_that_look_at_the_source_see_its_own_tokens() -> None:
    options = {"encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.5, "max_new_tokens": 8}
    sources = _sources()
    found = _generator().generate(**sources, **options)
    for row, (ids, length) in enumerate(zip(sources["input_ids"], LENGTHS, strict=True)):
        assert found[row].tolist() == BART.generate(ids[None, :length], **options)[0].tolist()


def test_padding_of_a_source_may_be_anywhere() -> None:
    generator = _generator()
    sources = _sources()
    want = generator.generate(**sources, max_new_tokens=8)
    order = torch.argsort(sources["attention_mask"], dim=1, stable=True)  # padding to the left
    moved = {name: each.gather(1, order) for name, each in sources.items()}
    assert generator.generate(**moved, max_new_tokens=8).tolist() == want.tolist()


def test_submitted_requests_share_steps(compiled: Any) -> None:
    sources = [row[:length] for row, length in zip(_sources()["input_ids"], LENGTHS, strict=True)]
    requests = [compiled.submit(source, max_new_tokens=10) for source in sources]
    for source, request in zip(sources, requests, strict=True):
        assert list(request) == BART.generate(source[None], max_new_tokens=10)[0, 1:].tolist()


def test_pages_are_made_to_measure_or_fixed() -> None:
    free = _generator()
    free.generate(**_sources(), max_new_tokens=8)
    assert free.engine.pages >= sum(-(-length // 4) + 3 for length in LENGTHS)
    fixed = _generator(pages=13)
    assert fixed.generate(**_sources(), max_new_tokens=8).shape == (4, 9)
    with pytest.raises(InputError, match="the cache is smaller than this search"):
        fixed.generate(**_sources(), num_beams=4, max_new_tokens=8)
    with pytest.raises(InputError, match="40 need 15 pages of 4, there are 13"):
        fixed.generate(**_sources(), max_new_tokens=20)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no source": ({"input_ids": None}, InputError, "generate needs a source"),
    "empty source": ({"attention_mask": torch.zeros(4, 40).long()}, InputError, "a source has to be a row of at least"),
    "mask": ({"attention_mask": torch.ones(4, 3)}, InputError, "the mask has to have the shape"),
    "rows": ({"decoder_input_ids": torch.ones(3, 2).long()}, InputError, "a row for each source"),
    "states": ({"encoder_outputs": (torch.zeros(4, 40, 32),)}, OptionError, "generate cannot honour encoder_outputs"),
    "embeds": ({"decoder_inputs_embeds": torch.zeros(4, 2, 32)}, OptionError, "cannot honour decoder_inputs_embeds"),
    "assistant": ({"assistant_model": BART}, OptionError, "generate cannot honour assistant_model"),
    "context": ({"max_new_tokens": 64}, InputError, "longer than the model's context"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    fields, kind, why = REFUSED[case]
    generator = _generator()
    with pytest.raises(kind, match=why):
        generator.generate(**(_sources() | {"max_new_tokens": 8} | fields))
    assert not generator.engine.busy


def test_a_source_model_is_no_draft() -> None:
    model = tiny_gpt2()
    generator = TextGenerator(ReferenceModel(model), model.config)
    with pytest.raises(OptionError, match="assistant_model reads sources"):
        generator.generate(torch.tensor([[1, 2]]), assistant_model=_generator())
