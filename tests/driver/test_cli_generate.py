"""``tilewright generate``: streams, stops, and says how fast; its parts against an eager model, the whole once."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import tilewright
from test_cli_signals import COMMAND
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from tilewright.cli import generate
from tilewright.cli.generate import Opened, Outcome, prompt_ids, report, stream
from tilewright.driver.traffic import Traffic
from tilewright.errors import InputError, OptionError


def _tokenizer(spaced: bool = False) -> PreTrainedTokenizerFast:
    """A letter an id; spaces between them are what a streamer waits for."""
    tokenizer = Tokenizer(WordLevel({chr(48 + number): number for number in range(64)}, unk_token="0"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    if not spaced:
        tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _model(context: int = 64) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": context, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("causal")
    _model().save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can be interrupted: it writes for seconds."""
    path = tmp_path_factory.mktemp("long")
    _model(1 << 12).save_pretrained(path)
    _tokenizer(spaced=True).save_pretrained(path)
    return path


def _opened(model: Any) -> Opened:
    return Opened(model, _tokenizer(), Traffic(1000, 10))


def _expected(prompt: str, count: int) -> str:
    ids = _tokenizer()(prompt, return_tensors="pt")["input_ids"]
    return _tokenizer().decode(_model().generate(ids, max_new_tokens=count, do_sample=False)[0, len(prompt) :])


def test_text_is_written_as_it_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    opened = _opened(_model())
    outcome = stream(opened, prompt_ids(opened.tokenizer, "Abc", False), {"max_new_tokens": 9}, None, show=True)
    assert outcome.text == _expected("Abc", 9)
    assert capsys.readouterr().out == outcome.text + "\n"
    assert len(outcome.times) == 9
    assert outcome.times == sorted(outcome.times)
    assert not outcome.stopped


class Interrupted:
    """A model that Ctrl-C meets at its fourth token."""

    def generate(self, ids: torch.Tensor, **options: Any) -> Any:
        def interrupt(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if ids.shape[1] == 3 + 3:
                raise KeyboardInterrupt
            return scores

        return _model().generate(ids, logits_processor=[interrupt], **options)


def test_ctrl_c_keeps_what_was_made(capsys: pytest.CaptureFixture[str]) -> None:
    opened = _opened(Interrupted())
    outcome = stream(opened, prompt_ids(opened.tokenizer, "Abc", False), {"max_new_tokens": 9}, None, show=True)
    assert outcome.stopped
    assert len(outcome.times) == 3
    assert outcome.text == _expected("Abc", 3)
    assert capsys.readouterr().out == outcome.text + "\n"


def test_figures() -> None:
    outcome = Outcome(prompt_tokens=20, times=[0.5, 0.6, 0.7, 0.8, 0.9])
    figures = report(outcome, Traffic(weights=1000, per_slot=10))
    assert figures["seconds to the first token"] == 0.5
    assert figures["tokens a second"] == 10.0
    assert figures["bytes read a token"] == 1000 + 10 * 22.5
    limit = figures["bytes a second that memory gives"] / figures["bytes read a token"]
    assert figures["share of the bandwidth limit"] == round(10 / limit, 3)
    assert report(Outcome(3), Traffic(1, 1)) == {"prompt tokens": 3, "new tokens": 0}
    assert "tokens a second" not in report(Outcome(3, times=[0.1]), Traffic(1, 1))


def test_prompts_that_say_nothing() -> None:
    with pytest.raises(InputError, match="no tokens"):
        prompt_ids(_tokenizer(), "", False)
    with pytest.raises(InputError, match="no chat template"):
        prompt_ids(_tokenizer(), "A", True)


def test_chat_template() -> None:
    tokenizer = _tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}A{% endif %}"
    )
    assert prompt_ids(tokenizer, "bc", True).tolist() == tokenizer("<bc>A", return_tensors="pt")["input_ids"].tolist()


def test_options_out_of_range_are_one_message() -> None:
    opened = _opened(_model())
    options = {"max_new_tokens": 2, "do_sample": True, "temperature": -1.0}
    with pytest.raises(OptionError, match="temperature"):
        stream(opened, torch.tensor([[1]]), options, None, show=False)


def test_the_command(folder: Path) -> None:
    made = json.loads(tilewright("generate", str(folder), "--prompt", "Abc", "--max-new-tokens", "9", "--json"))
    assert made["text"] == _expected("Abc", 9)
    assert made["new tokens"] == 9
    assert made["bytes read a token"] > 4 * (12 * 32 * 32 + 64 * 32)
    assert "no tokens" in tilewright("generate", str(folder), "--prompt", "", code=1)


def test_an_encoder_decoder_reads_the_prompt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    halves = {f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 48))}
    config = BartConfig(vocab_size=64, d_model=32, **halves, encoder_attention_heads=2, decoder_attention_heads=2)
    for name in ("bos_token_id", "eos_token_id", "forced_eos_token_id"):
        setattr(config, name, None)
    config.decoder_start_token_id = config.pad_token_id = 1
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12 if parameter.dim() > 1 else 1)
    model.save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    ids = _tokenizer()("Abcde", return_tensors="pt")["input_ids"]
    made = json.loads(tilewright("generate", str(tmp_path), "--prompt", "Abcde", "--max-new-tokens", "9", "--json"))
    assert made["text"] == _tokenizer().decode(model.generate(ids, max_new_tokens=9)[0, 1:])
    assert (made["prompt tokens"], made["new tokens"]) == (5, 9)


def _start(folder: Path) -> "subprocess.Popen[bytes]":
    """The command as a process, in the middle of its text: a letter of it has been read."""
    command = [*COMMAND, "generate", str(folder), "--prompt", "Abc", "--max-new-tokens", "4000"]
    options: dict[str, Any] = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "bufsize": 0}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    assert process.stdout is not None
    assert process.stdout.read(1), process.communicate()
    return process


def test_ctrl_c_in_the_middle_of_the_text(long_folder: Path) -> None:
    process = _start(long_folder)
    process.send_signal(signal.SIGINT)
    text, errors = (part.decode() for part in process.communicate())
    assert process.returncode == 130
    assert text.endswith("\n")
    assert "Traceback" not in errors
    assert errors.endswith("stopped\n")
    (made,) = re.findall(r"new tokens +(\d+)", errors)
    assert 1 + len(text.split()) == int(made) < 4000


def test_nobody_reads_the_text_any_more(long_folder: Path) -> None:
    process = _start(long_folder)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert b"Error" not in process.stderr.read()
    assert process.wait() == 1


def test_prompts_of_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "compile_model", lambda loaded, *options, **more: _opened(loaded.model))
    ask = ("generate", str(folder), "--max-new-tokens", "9")
    file = tmp_path / "prompt.txt"
    file.write_text("Abc\n")
    assert tilewright(*ask, "--prompt-file", str(file)) == _expected("Abc", 9) + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Abc\r\n")))
    assert tilewright(*ask, "--prompt-file", "-") == _expected("Abc", 9) + "\n"
    file.write_bytes(b"Ab\xff")
    assert "UTF-8" in tilewright(*ask, "--prompt-file", str(file), code=1)
    assert "UTF-8" in tilewright(*ask, "--prompt", os.fsdecode(b"Ab\xff"), code=1)
    assert "No such file" in tilewright(*ask, "--prompt-file", str(tmp_path / "none"), code=1)
    assert "no prompt" in tilewright(*ask, code=1)
    assert "two prompts" in tilewright(*ask, "--prompt", "A", "--prompt-file", str(file), code=1)


def test_a_terminal_that_lacks_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", newline="\n"))
    outcome = Outcome(prompt_tokens=1)
    generate.TimedStreamer(_tokenizer(), outcome, show=True).on_finalized_text("né", stream_end=True)
    assert written.getvalue() == b"n?\n"
    assert outcome.text == "né"


def test_models_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    for name in ("none.gguf", str(tmp_path / "none"), "none.safetensors", "none.json"):
        assert "there is no" in tilewright("generate", name, "--prompt", "A", code=1)
    (tmp_path / "short.gguf").write_bytes(b"GGUF")
    assert "ends early" in tilewright("generate", str(tmp_path / "short.gguf"), "--prompt", "A", code=1)
    _model().save_pretrained(tmp_path / "mute")
    assert "no tokenizer" in tilewright("generate", str(tmp_path / "mute"), "--prompt", "A", code=1)
    (tmp_path / "empty").mkdir()
    assert "cannot open the model" in tilewright("generate", str(tmp_path / "empty"), "--prompt", "A", code=1)


def test_options_of_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "compile_model", lambda loaded, *options, **more: _opened(loaded.model))
    ask = ("generate", str(folder), "--prompt", "Abc", "--max-new-tokens", "9")
    assert tilewright(*ask) == _expected("Abc", 9) + "\n"
    drawn = [tilewright(*ask, "--top-k", "9", "--seed", seed) for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]
    assert tilewright(*ask, "--top-k", "9", "--greedy") == _expected("Abc", 9) + "\n"
    first = _expected("Abc", 9)[0]
    assert tilewright(*ask, "--stop", first) == first + "\n"
    assert "temperature" in tilewright(*ask, "--temperature", "-1", code=1)
    monkeypatch.setattr(generate, "compile_model", lambda loaded, *options, **more: _opened(Interrupted()))
    stopped = tilewright(*ask, code=130)
    assert stopped.startswith(_expected("Abc", 3) + "\n")
    assert "new tokens" in stopped
    assert stopped.endswith("stopped\n")
