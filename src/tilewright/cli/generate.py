"""``tilewright generate``: the text behind a prompt as it is made, and how fast it was made."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TextStreamer

from tilewright.cli.work import compile_progress
from tilewright.driver.compiled import CompiledModel
from tilewright.driver.options import CompileOptions
from tilewright.driver.traffic import Traffic, read_bandwidth, traffic
from tilewright.errors import InputError, OptionError, TilewrightError
from tilewright.models.load import Loaded, load_model


@dataclass(frozen=True)
class Opened:
    """A model that generates.

    Attributes:
        generator: has ``generate`` as transformers' models have it.
        tokenizer: of the model.
        traffic: what it reads of memory for a token.
    """

    generator: Any
    tokenizer: Any
    traffic: Traffic


@dataclass
class Outcome:
    """What was made of a prompt.

    Attributes:
        prompt_tokens: of the prompt; of an encoder-decoder, of its source.
        text: made, without the prompt.
        times: seconds from the start to each new token.
        stopped: whether Ctrl-C ended it.
    """

    prompt_tokens: int
    text: str = ""
    times: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def rate(self) -> float | None:
        """Tokens a second behind the first one; None where there is none."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 else None


class TimedStreamer(TextStreamer):
    """Writes text as words are complete, and notes when each token came."""

    def __init__(self, tokenizer: Any, outcome: Outcome, show: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._outcome = outcome
        self._show = show
        self._start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then each token."""
        if not self.next_tokens_are_prompt:
            self._outcome.times.append(time.perf_counter() - self._start)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Text that will not change any more."""
        self._outcome.text += text
        if self._show:
            encoding = sys.stdout.encoding or "utf-8"
            # A terminal that cannot show a character shows a question mark.
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + ("\n" if stream_end else ""))
            sys.stdout.flush()


def open_model(name: str) -> Loaded:
    """A model with its tokenizer: a folder or hub name, or a ``.gguf`` file.

    Raises:
        InputError: there is no such model, or it has no tokenizer.
    """
    opened = load_model(name)
    if opened.tokenizer is None:
        raise InputError("the model has no tokenizer", where=name, hint="add tokenizer.json to its folder")
    return opened


def compile_model(
    opened: Loaded, ids: torch.Tensor, options: Mapping[str, Any], choices: CompileOptions, *, quiet: bool
) -> Opened:
    """Checks the options of generating behind a prompt [1, n], and compiles the model for that.

    Raises:
        CacheRefused: it is no language model that can go on from tokens it has seen.
        InputError: the prompt is too long.
        OptionError: an option is out of range.
    """
    with compile_progress(quiet) as report:
        compiled = CompiledModel(opened.model, choices, stored=opened.stored, progress=report)
        with _option_errors():
            # What is submitted has been checked, and runs when it is read, which nobody does.
            compiled.submit(ids, tokenizer=opened.tokenizer, **options).cancel()
    return Opened(compiled, opened.tokenizer, traffic(compiled.steps))


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt: a text, or what a file has (``-``: standard input), without the end of its last line.

    Raises:
        InputError: there is none, or two; it cannot be read, or is not UTF-8.
    """
    if (text is None) == (file is None):
        raise InputError(
            "there is no prompt" if text is None else "there are two prompts",
            hint="give --prompt TEXT, or --prompt-file FILE (- for standard input)",
        )
    try:
        if file is None:
            prompt = str(text)
            prompt.encode()  # bytes of a command line that are no UTF-8 are lone surrogates
        else:
            content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
            prompt = content.decode().removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeError) as error:
        raise InputError(
            "cannot read the prompt", where=str(file or ""), why=str(error), hint="give UTF-8 text"
        ) from None
    return prompt


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """Ids [1, n] of a prompt, as a message to the assistant if it is a chat.

    Raises:
        InputError: the tokenizer has no chat template, or makes nothing of the prompt.
    """
    if not chat:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    elif tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template", hint="leave out --chat")
    else:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = ids["input_ids"]
    if ids.numel() == 0:
        raise InputError("the prompt has no tokens", why=f"it is {prompt!r}", hint="give a text")
    return ids.long()


def stream(opened: Opened, ids: torch.Tensor, options: Mapping[str, Any], seed: int | None, show: bool) -> Outcome:
    """Generates behind a prompt [1, n]; Ctrl-C ends it with what was made so far.

    Raises:
        OptionError: transformers refuses an option.
    """
    outcome = Outcome(ids.shape[1])
    streamer = TimedStreamer(opened.tokenizer, outcome, show)
    if seed is not None:
        transformers.set_seed(seed)
    given = {"attention_mask": torch.ones_like(ids), "streamer": streamer, "tokenizer": opened.tokenizer}
    try:
        with _option_errors():
            opened.generator.generate(ids, **given, **options)
    except KeyboardInterrupt:
        outcome.stopped = True
        streamer.end()
    return outcome


@contextmanager
def _option_errors() -> Iterator[None]:
    """What transformers says of options, as an error of ours."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, TilewrightError):
            raise
        raise OptionError("an option is out of range, or does not fit another", why=str(error)) from error


def report(outcome: Outcome, read: Traffic) -> dict[str, Any]:
    """Figures of a run, by name."""
    figures: dict[str, Any] = {"prompt tokens": outcome.prompt_tokens, "new tokens": len(outcome.times)}
    if outcome.times:
        figures["seconds to the first token"] = round(outcome.times[0], 4)
    if outcome.rate is not None:
        bandwidth = read_bandwidth()
        bytes_read = read.per_token(outcome.prompt_tokens + len(outcome.times) / 2)
        figures["tokens a second"] = round(outcome.rate, 2)
        figures["bytes read a token"] = round(bytes_read)
        figures["bytes a second that memory gives"] = round(bandwidth)
        figures["share of the bandwidth limit"] = round(outcome.rate * bytes_read / bandwidth, 3)
    return figures
