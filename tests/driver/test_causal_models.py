"""``tilewright.compile`` of causal models: generate as transformers does, and models out of GGUF files."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tests.decoders.models import VOCAB, build
from tests.models.gguf_files import COMMON, tiny_model, write_model

import tilewright
from tilewright.errors import CacheRefused, InputError, OptionError

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    config = hf.LlamaConfig(**COMMON)
    return write_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model(config), "llama", "Q8_0")


def test_generate_is_that_of_transformers() -> None:
    model = build("llama", seed=0)
    compiled = tilewright.compile(model, opt_level=1)
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        expected = model.generate(ids, attention_mask=mask, **GREEDY, **options)  # type: ignore[operator]
        assert torch.equal(compiled.generate(ids, attention_mask=mask, **GREEDY, **options), expected)
    assert compiled.generator is compiled.generator
    alone = model.generate(ids[2:], **GREEDY)  # type: ignore[operator]
    assert list(compiled.submit(ids[2], **GREEDY)) == alone[0, ids.shape[1] :].tolist()
    draft = tilewright.compile(build("llama", seed=1), opt_level=1)
    assert torch.equal(compiled.generate(ids[2:], assistant_model=draft, **GREEDY), alone)


def test_parts_are_compiled_when_they_are_needed(caplog: pytest.LogCaptureFixture) -> None:
    work: list[str] = []
    compiled = tilewright.compile(
        build("gpt2", seed=0), opt_level=1, progress=lambda done, total, what: work.append(what)
    )
    ids = torch.randint(3, VOCAB, (1, 5), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="temperature"):
        compiled.generate(ids, do_sample=True, temperature=-1.0)
    with pytest.raises(InputError, match="at least one token"):
        compiled.generate(ids[:, :0])
    assert not work  # what is refused is refused before anything is compiled
    caplog.set_level("INFO", logger="tilewright")
    compiled.generate(ids, **GREEDY)
    assert work[0] == "capturing"
    assert any(what.startswith("building ") for what in work)
    assert [record.getMessage().split(" in ")[0] for record in caplog.records] == [
        "compiling GPT2LMHeadModel into steps of generation",
        "compiled",
    ]
    assert not compiled.variants
    compiled(ids)
    assert len(compiled.variants) == 1
    work.clear()
    compiled.warmup()
    compiled.generate(ids, **GREEDY)
    assert not work


def test_warmup_compiles_all_that_can_be() -> None:
    compiled = tilewright.compile(build("gpt2", seed=0), opt_level=1)
    compiled.warmup()
    assert len(compiled.variants) == 1
    steps = compiled.steps
    compiled.generate(torch.ones(1, 3, dtype=torch.long), **GREEDY)
    assert compiled.steps is steps is compiled.cached_model


def test_refused_steps_are_a_reason() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    compiled = tilewright.compile(hf.BertLMHeadModel(hf.BertConfig(vocab_size=VOCAB, **sizes)).eval(), opt_level=1)
    compiled.warmup()
    assert len(compiled.variants) == 1
    assert "keys that come after its query" in compiled.reasons["generate"]
    for _ in range(2):
        with pytest.raises(CacheRefused, match="keys that come after its query"):
            compiled.generate(torch.ones(1, 3, dtype=torch.long), **GREEDY)


def test_unpad_on_refuses_at_once() -> None:
    work: list[str] = []
    tilewright.compile(build("gpt2", seed=0), opt_level=1, unpad="on", progress=lambda *told: work.append(told[-1]))
    assert work


def test_a_file_generates_what_its_weights_say(file: Path) -> None:
    from tilewright.models.gguf.model import dense_model, load_gguf

    compiled = tilewright.compile(file, activations="float")
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    dense = dense_model(load_gguf(file))
    assert torch.equal(compiled.generate(ids, **GREEDY), dense.generate(ids, **GREEDY))
    with torch.no_grad():
        reference = dense.double()(ids).logits
    # The whole-sequence form reads the same blocks.
    assert float((compiled(ids).logits - reference).abs().max()) < 1e-4 * float(reference.abs().max())


def test_rounded_rows_stay_close(file: Path) -> None:
    from tilewright.models.gguf.model import dense_model, load_gguf

    found = tilewright.compile(file)(ids := torch.arange(3, 40)[None]).logits
    with torch.no_grad():
        reference = dense_model(load_gguf(file)).double()(ids).logits
    assert 1e-5 < float((found - reference).abs().max()) / float(reference.abs().max()) < 0.05


def test_what_cannot_generate_says_why() -> None:
    config = hf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    with pytest.raises(CacheRefused, match="no language model"):
        tilewright.compile(hf.BertModel(config).eval()).generate(torch.ones(1, 3, dtype=torch.long))


def test_the_oracle_has_no_steps() -> None:
    with pytest.raises(CacheRefused, match="opt_level=0"):
        tilewright.compile(build("gpt2", seed=0), opt_level=0).generate(torch.ones(1, 3, dtype=torch.long))


def test_commands_that_need_weights_refuse_a_file(file: Path) -> None:
    from tilewright.cli import work

    with pytest.raises(InputError, match="GGUF"):
        work.inspect_model(str(file), 2, "auto", "auto", None, quiet=True)


@pytest.mark.parametrize("options", [{"kv_dtype": "int3"}, {"activations": "int3"}])
def test_options_that_are_no_choice(options: dict[str, str]) -> None:
    with pytest.raises(OptionError, match="is not a choice"):
        tilewright.compile(build("gpt2", seed=0), **options)
