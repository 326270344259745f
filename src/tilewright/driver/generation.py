"""``generate`` as Hugging Face's, over an engine and a cached model.

``TextGenerator`` is a ``GenerationMixin``: reading options, checking them, preparing masks, processors and criteria is
transformers' own code. Only the decoding loops are ours. Greedy decoding, sampling and assisted decoding give each row
to the engine as a request; beam search is transformers' own loop over page tables.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from tilewright.driver.generation_beams import BeamCache, pages_of_search
from tilewright.driver.generation_options import (
    SequenceProcessors,
    check_options,
    check_prompt,
    padding_id,
    split_criteria,
)
from tilewright.driver.generation_padding import Text, own_tokens, pads_to_the_left
from tilewright.driver.generation_requests import Submission, output, run
from tilewright.errors import InputError, OptionError
from tilewright.ir.steps import CachedModel, SourceModel
from tilewright.runtime.serving.drafts import Drafter, DraftModel, PromptLookup
from tilewright.runtime.serving.engine import Engine
from tilewright.runtime.serving.limits import checked_prompt, checked_source, most_tokens
from tilewright.runtime.serving.request import Request, RequestOptions
from tilewright.runtime.serving.sampling import Sampling

# Transformers declares that only its own PreTrainedModel has these methods; they ask for no more than is given below.
_Mixin: Any = GenerationMixin


class TextGenerator(_Mixin):
    """Generates text with a cached model.

    Args:
        model: what computes, or a function that makes it: it is called when options and prompts of the first call have
            been checked.
        config: configuration of the model it was made from.
        generation_config: defaults of ``generate``; None for those in ``config``.
        pages: of the pool for keys and values, fixed: requests wait or are computed anew where it is too small for all
            of them. None: it grows to what the largest call has needed.
        token_budget: most tokens in a step; longer prompts are computed in chunks.
        max_sequences: most sequences in a step, beam search excepted.
    """

    main_input_name = "input_ids"
    device = torch.device("cpu")
    dtype = torch.float32
    _is_stateful = False

    def __init__(
        self,
        model: CachedModel | Callable[[], CachedModel],
        config: PretrainedConfig,
        generation_config: GenerationConfig | None = None,
        *,
        pages: int | None = None,
        token_budget: int = 512,
        max_sequences: int = 64,
    ) -> None:
        self._model = model
        self.config = config
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
        self._pages = pages
        self._token_budget = token_budget
        self._max_sequences = max_sequences
        self._engine: Engine | None = None
        self._growing = threading.Lock()

    @cached_property
    def cached_model(self) -> CachedModel:
        """What computes."""
        return self._model if isinstance(self._model, CachedModel) else self._model()

    @property
    def engine(self) -> Engine:
        """The engine, for requests without transformers' options; the first call makes it."""
        return self._engine_of(1)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's ``generate``, its arguments and results.

        Rows may be padded on either side, or anywhere, as their mask says: each gets what its tokens get alone.
        docs/generation.md lists the options that are refused and what differs.

        Raises:
            OptionError: an option cannot be honoured.
            InputError: a prompt is empty or too long, or the pages are too few.
            ValueError: transformers itself refuses an option or its value.
        """
        ids, mask = kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("attention_mask")
        check_options(kwargs)
        check_prompt(ids, mask)
        self._check_assistant(kwargs.get("assistant_model"))
        moved = pads_to_the_left(ids, mask)
        if moved is None:
            return super().generate(inputs, *args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name != "input_ids"} | {"attention_mask": moved.mask}
        return moved.restore(super().generate(moved.ids, *args, **kwargs))

    def submit(self, input_ids: Tensor | Sequence[int], **kwargs: Any) -> Request:
        """Queues one prompt for continuous batching, with the options of ``generate``; returns at once.

        Args:
            input_ids: [n] or [1, n] token ids.
            kwargs: as of ``generate``, for greedy decoding, sampling or assisted decoding of one sequence.

        Returns:
            The request: iterate over it, or ``async for`` over its ``stream()``; the engine runs as they are read.

        Raises:
            OptionError, InputError, ValueError: as of ``generate``.
        """
        submission = Submission()
        ids = torch.as_tensor(input_ids)
        self.generate(ids[None] if ids.dim() == 1 else ids, streamer=submission, **kwargs)
        if len(submission.requests) != 1:
            for request in submission.requests:
                request.cancel()
            raise OptionError("submit takes one sequence", why=f"these options make {len(submission.requests)}")
        return submission.requests[0]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: BeamCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One step of transformers' beam search: logits [rows, 1, V] behind each row's last token."""
        if past_key_values is None:
            raise InputError("a generator has no forward without pages", hint="call generate")
        logits = past_key_values.advance(input_ids, attention_mask)
        return CausalLMOutputWithPast(logits=logits.unsqueeze(1), past_key_values=past_key_values)  # type: ignore[arg-type]

    __call__ = forward

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What ``forward`` takes: all tokens, of which the cache takes the new ones."""
        return {"input_ids": input_ids, "past_key_values": past_key_values, "attention_mask": attention_mask}

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        config, rest = super()._prepare_generation_config(*args, **kwargs)
        check_options(config.to_dict() | rest)
        config.use_cache = True
        return config, rest

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """The pages are the engine's."""

    def _get_logits_processor(self, generation_config: GenerationConfig, **kwargs: Any) -> SequenceProcessors:
        return SequenceProcessors(super()._get_logits_processor, generation_config, kwargs)

    def _sample(
        self,
        input_ids: Tensor,
        *,
        logits_processor: SequenceProcessors,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        attention_mask: Tensor | None = None,
        drafter: Drafter | None = None,
        draft_tokens: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Greedy decoding and sampling: each row is a request."""
        config = generation_config
        texts, columns = self._texts(input_ids, attention_mask, kwargs), input_ids.shape[1]
        longest, eos, stop = split_criteria(stopping_criteria)
        new = config.max_length - columns if longest is None else longest - columns
        keep = bool(config.return_dict_in_generate)
        options = [
            RequestOptions(
                max_new_tokens=new,
                eos_token_ids=eos,
                sampling=Sampling(
                    logits_processor.of_sequence(index, each.prompt, columns - len(each.prompt), each.source),
                    bool(config.do_sample),
                ),
                stop=stop,
                drafter=drafter,
                draft_tokens=draft_tokens,
                keep_logits=keep and bool(config.output_logits),
                keep_scores=keep and bool(config.output_scores),
            )
            for index, each in enumerate(texts)
        ]
        engine = self._engine_of(sum(each.pages(self.cached_model.page_size, new) for each in texts), texts, new)
        copies, requests = config.num_return_sequences, []
        for first in range(0, len(texts), copies):
            text = texts[first]
            requests += engine.add_requests(text.prompt, options[first : first + copies], source=text.source)
        if isinstance(streamer, Submission):
            streamer.requests = requests
            return input_ids
        run(engine, requests, streamer, padding_id(config))
        return output(input_ids, requests, config, padding_id(config))

    def _assisted_decoding(
        self,
        input_ids: Tensor,
        *,
        generation_config: GenerationConfig,
        assistant_model: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Speculative decoding: as ``_sample``, with drafts out of the prompt or by a smaller model."""
        config = generation_config
        drafter: Drafter
        if assistant_model is None:
            drafter, count = PromptLookup(config.max_matching_ngram_size or 2), config.prompt_lookup_num_tokens
        else:
            draft, count = assistant_model.cached_model, config.num_assistant_tokens
            pages = len(input_ids) * -(-config.max_length // draft.page_size)
            drafter = DraftModel(draft, pages, confidence=config.assistant_confidence_threshold or 0.0)
        return self._sample(
            input_ids,
            generation_config=config,
            attention_mask=attention_mask,
            drafter=drafter,
            draft_tokens=count,
            **kwargs,
        )

    def _beam_search(
        self,
        input_ids: Tensor,
        *,
        generation_config: GenerationConfig,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Transformers' own search. It has the engine to itself: requests wait until it is over."""
        beams, model = generation_config.num_beams, self.cached_model
        texts = self._texts(input_ids, attention_mask, kwargs)[::beams]
        sources = [each.source for each in texts if each.source is not None]
        new = generation_config.max_length - input_ids.shape[1]
        pages = pages_of_search(model, [len(each.prompt) for each in texts], beams, new, list(map(len, sources)))
        engine = self._engine_of(pages, texts, new)
        with engine.exclusive(pages) as (allocator, pool):
            cache = BeamCache(model, allocator, pool, len(input_ids), beams, self._token_budget, sources)
            found = super()._beam_search(
                input_ids,
                generation_config=generation_config,
                attention_mask=attention_mask,
                past_key_values=cache,
                **kwargs,
            )
        if isinstance(found, Tensor):
            return found
        return type(found)(**{name: value for name, value in found.items() if name != "past_key_values"})

    def _texts(self, input_ids: Tensor, attention_mask: Tensor | None, given: Mapping[str, Any]) -> list[Text]:
        """What each row is, without its masked places."""
        return [Text(row) for row in own_tokens(input_ids, attention_mask)]

    def _check_assistant(self, assistant: Any) -> None:
        if assistant is None:
            return
        draft = getattr(assistant, "cached_model", None)
        if draft is None:
            raise OptionError(
                "assistant_model is not compiled",
                why=f"it is a {type(assistant).__name__}",
                hint="compile it too, and give what was compiled",
            )
        if isinstance(draft, SourceModel):
            raise OptionError(
                "assistant_model reads sources",
                why="a draft goes on from the tokens so far, and is given nothing else",
                hint="use a causal model of the same vocabulary, or prompt_lookup_num_tokens",
            )
        if draft.vocab_size != self.cached_model.vocab_size:
            raise OptionError(
                "assistant_model has another vocabulary",
                why=f"{draft.vocab_size} tokens, the model has {self.cached_model.vocab_size}",
                hint="use a draft model of the same tokenizer",
            )

    def _engine_of(self, pages: int, texts: Sequence[Text] = (), new: int = 1) -> Engine:
        """The engine; a new one, with more pages, if their number is free and the call needs more.

        Raises:
            InputError: one of the texts cannot run, with so many new tokens; before any of them is queued.
        """
        for text in texts:
            ids = checked_prompt(text.prompt, self.cached_model.vocab_size)
            source = checked_source(self.cached_model, text.source)
            most_tokens(self.cached_model, self._pages, len(ids), new, 0 if source is None else len(source))
        with self._growing:
            made = self._engine
            if made is None or (self._pages is None and made.pages < pages):
                count = self._pages or 1 << (pages - 1).bit_length()
                options = {"token_budget": self._token_budget, "max_sequences": self._max_sequences}
                self._engine = made = Engine(self.cached_model, pages=count, **options)
            return made
