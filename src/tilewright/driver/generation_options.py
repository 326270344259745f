"""Options of ``generate``: what is refused, and what becomes of processors and stopping criteria for one sequence."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from tilewright.driver.generation_candidates import on_candidates
from tilewright.errors import InputError, OptionError
from tilewright.runtime.serving.request import Stop
from tilewright.runtime.serving.sampling import Processor

_REFUSED = {
    "cache_implementation": "keys and values lie in the engine's pages",
    "cache_config": "keys and values lie in the engine's pages",
    "guidance_scale": "it runs the model a second time beside each step",
    "output_attentions": "compiled attention never has its weights in memory",
    "output_hidden_states": "a compiled step keeps no hidden states",
    "assistant_early_exit": "a compiled model has no layers to leave early",
    "use_mtp": "a compiled model has no heads for further tokens",
    "token_healing": "it generates inside of generate",
    "past_key_values": "keys and values lie in the engine's pages, which find known prompts by themselves",
    "inputs_embeds": "pages are found by token ids",
    "position_ids": "tokens stand at their own places, whatever stands masked between them",
    "decoder_inputs_embeds": "pages are found by token ids",
    "encoder_outputs": "what is made of a source lies in the engine's pages, which find known sources by themselves",
    "custom_generate": "it brings a decoding loop of its own",
    "negative_prompt_ids": "it runs the model a second time beside each step",
    "negative_prompt_attention_mask": "it runs the model a second time beside each step",
    "assistant_tokenizer": "draft and model have to share their vocabulary",
}
_COUNTS = ("num_beams", "num_return_sequences", "prompt_lookup_num_tokens")
_PROBABILITIES = ("top_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_HARMLESS: dict[str, tuple[Any, ...]] = {"cache_implementation": ("dynamic",), "guidance_scale": (1, 1.0)}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses what cannot be honoured, and numbers out of range that transformers would ignore or stumble over.

    Raises:
        OptionError: such an option is set.
    """
    for name in _PROBABILITIES:
        value = options.get(name)
        if value is not None and not 0 <= value <= 1:
            raise OptionError(f"{name} is a probability", why=f"it is {value}", hint="give a number from 0 to 1")
    for name in _COUNTS:
        value = options.get(name)
        if value is not None and value < 1:
            raise OptionError(f"{name} is a count", why=f"it is {value}", hint="give a number from 1 on")
    for name, why in _REFUSED.items():
        value = options.get(name)
        if value is None or value is False or (not isinstance(value, Tensor) and value in _HARMLESS.get(name, ())):
            continue
        raise OptionError(f"generate cannot honour {name}", why=why, hint=f"leave {name} out")


def check_prompt(ids: Any, mask: Any) -> None:
    """Refuses prompts that are no [B, S] ids, and masks of another shape.

    Raises:
        InputError: they are not.
    """
    if ids is None:
        return
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError("generate takes a tensor of token ids [B, S]", why=f"it got {found}")
    if 0 in ids.shape:
        raise InputError("generate needs a prompt of at least one token", why=f"input_ids has shape {list(ids.shape)}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError("the mask has to have the shape of input_ids", why=f"{shape}, not {list(ids.shape)}")


class SequenceProcessors(LogitsProcessorList):
    """The processors of a call, as transformers makes them for its batch, and again for single sequences.

    Several of them count tokens from the start of the padded batch. Those of one sequence count its own tokens, so
    that it gets what it gets alone.
    """

    def __init__(
        self, make: Callable[..., LogitsProcessorList], config: GenerationConfig, given: dict[str, Any]
    ) -> None:
        super().__init__(make(generation_config=config, **given))
        self._make = make
        self._config = config
        self._given = given

    def of_sequence(self, index: int, ids: Tensor, padding: int, source: Tensor | None = None) -> Sequence[Processor]:
        """Processors of row ``index``, whose own tokens are ``ids`` [n] behind ``padding`` masked places.

        Some count what stands in ``source`` [m], where there is one, and in the prompt otherwise.
        """
        config = copy.copy(self._config)
        config.max_length = self._config.max_length - padding
        config.min_length = max(0, (self._config.min_length or 0) - padding)
        encoded = ids if source is None else source
        given = self._given | {"input_ids_seq_length": len(ids), "encoder_input_ids": encoded[None], "model_kwargs": {}}
        allowed = self._given.get("prefix_allowed_tokens_fn")
        if allowed is not None:
            given["prefix_allowed_tokens_fn"] = lambda _, tokens: allowed(index, tokens)
        return on_candidates(self._make(generation_config=config, **given))


def split_criteria(criteria: StoppingCriteriaList) -> tuple[int | None, frozenset[int], Stop | None]:
    """What the engine checks itself: the longest row, and the tokens that end a row; and a function for the rest."""
    lengths, eos, rest = [], set(), StoppingCriteriaList()
    for each in criteria:
        if type(each) is MaxLengthCriteria:
            lengths.append(each.max_length)
        elif type(each) is EosTokenCriteria:
            eos.update(each.eos_token_id.reshape(-1).tolist())
        else:
            rest.append(each)
    return min(lengths, default=None), frozenset(eos), _stop(rest) if rest else None


def _stop(criteria: StoppingCriteriaList) -> Stop:
    def stop(input_ids: Tensor, scores: tuple[Tensor, ...] | None) -> bool:
        return bool(criteria(input_ids, scores).all())

    return stop


def padding_id(config: GenerationConfig) -> int:
    """What stands behind the end of a shorter row: the pad token, which transformers takes from the end tokens."""
    pad = config._pad_token_tensor
    return int(pad) if pad is not None else 0
