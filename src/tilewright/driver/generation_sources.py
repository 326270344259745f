"""``generate`` of encoder-decoders: what transformers encodes beforehand is read by the engine, request by request."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from tilewright.driver.generation import TextGenerator
from tilewright.driver.generation_beams import BeamCache
from tilewright.driver.generation_options import check_options, check_prompt
from tilewright.driver.generation_padding import Text, own_tokens
from tilewright.errors import InputError, OptionError


class SourceTextGenerator(TextGenerator):
    """Generates text behind sources: ``input_ids`` are the source, ``decoder_input_ids`` begin the text.

    Masked places of either are left out: a row gets what its own tokens get.
    """

    base_model_prefix = ""  # transformers would look for an encoder of that name

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's ``generate`` for encoder-decoders; otherwise as of ``TextGenerator.generate``."""
        source, start = kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("decoder_input_ids")
        check_options(kwargs)
        if source is None:
            raise InputError("generate needs a source", why="there are no input_ids", hint="give input_ids=")
        check_prompt(source, kwargs.get("attention_mask"))
        check_prompt(start, kwargs.get("decoder_attention_mask"))
        if start is not None and len(start) != len(source):
            why = f"it has {len(start)}, input_ids has {len(source)}"
            raise InputError("decoder_input_ids has to have a row for each source", why=why)
        if kwargs.get("assistant_model") is not None:
            raise OptionError(
                "generate cannot honour assistant_model",
                why="a draft goes on from the tokens so far, and is not given the source",
                hint="leave it out, or use prompt_lookup_num_tokens",
            )
        return super(TextGenerator, self).generate(inputs, *args, **kwargs)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        decoder_attention_mask: Tensor | None = None,
        past_key_values: BeamCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As of ``TextGenerator``, for the tokens of the decoder; the cache knows the sources."""
        return super().forward(input_ids, decoder_attention_mask, past_key_values)

    __call__ = forward  # type: ignore[assignment]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What ``forward`` takes."""
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "decoder_attention_mask": decoder_attention_mask,
        }

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict[str, Any]:
        """The source stands for what an encoder makes of it, which transformers repeats for each row it makes."""
        return model_kwargs | {"encoder_outputs": {"input_ids": inputs_tensor}}

    def _texts(self, input_ids: Tensor, attention_mask: Tensor | None, given: Mapping[str, Any]) -> list[Text]:
        prompts = own_tokens(input_ids, given.get("decoder_attention_mask"))
        sources = own_tokens(given["encoder_outputs"]["input_ids"], attention_mask)
        return [Text(prompt, source) for prompt, source in zip(prompts, sources, strict=True)]
