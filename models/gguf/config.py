"""From the metadata of a GGUF file to a transformers config.

transformers has the tables: which key is which field, what each architecture is called, what a file leaves out. Its
reader takes half a minute for a large vocabulary, so it is given a small file with the same metadata but for the
vocabulary, and no data. Some keys are in no table of transformers although what a model computes depends on them: they
are read here, by the names that GGUF gives them in every architecture.
"""

import math
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tilewright.errors import TilewrightError
from tilewright.models.gguf.file import GgufFile
from tilewright.models.gguf.rope import rope_fields

_LARGEST_ENTRY = 2**14  # bytes of an entry that transformers gets to see; settings are shorter, vocabularies longer
_CONVERT = "convert the model again with a current llama.cpp"

_FIELDS = {
    "context_length": ("max_position_embeddings",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "rope.scaling.original_context_length": ("original_max_position_embeddings",),
}
"""Keys and the fields that hold them; a config class has at most one of each."""

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_NUMBERS = ("embedding_length", "block_count", "attention.key_length", "attention.value_length")
"""Keys that are compared with tensors, so they must be one number each."""

_BIASES = {"attention_bias": ".attn_q.bias", "mlp_bias": ".ffn_up.bias"}
"""Fields that say whether linears have biases, and the end of the name of a tensor that is there if they do."""

_SCALED_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}
"""(architecture, layers) of models whose queries are scaled by hidden size / heads, not by the size of a head: no key
says so, llama.cpp decides by the number of layers too (``f_attention_scale``)."""


def make_config(file: GgufFile) -> Any:
    """The transformers config of the file's model.

    Raises:
        GgufError: the metadata lacks something, has a value out of range, or describes a model that is not read.
    """
    from transformers import CONFIG_MAPPING

    arch = architecture(file)
    keys = {key.removeprefix(f"{arch}."): value for key, value in file.metadata.items() if key.startswith(f"{arch}.")}
    _check(file, arch, keys)
    with foreign(file, "the metadata gives no config"):
        fields = _known_to_transformers(file, arch)
        config_class = CONFIG_MAPPING[fields.pop("model_type")]
        fields |= _left_out(file, arch, keys, fields, config_class())
        return config_class(**fields)


def architecture(file: GgufFile) -> str:
    """The file's architecture, by GGUF's name.

    Raises:
        GgufError: it has none, or one that transformers does not map; or the file is one part of a model.
    """
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    key = "general.architecture"
    name = file.metadata.get(key)
    if not isinstance(name, str):
        raise file.error("the metadata names no architecture", item=f"key '{key}'", why="it must be there, as a string")
    parts = file.metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        why = f"the model is cut into {parts} files"
        raise file.error("one part of a model", item="key 'split.count'", why=why, hint="join them: llama-gguf-split")
    # The tables of transformers spell some names with underscores that are written without them in files.
    known = {_plain(other) for other in GGUF_SUPPORTED_ARCHITECTURES if other in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    if _plain(name) not in known:
        why = f"its architecture is '{name}'; transformers knows {', '.join(sorted(known))}"
        raise file.error("this model is not read", item=f"key '{key}'", why=why, hint="use a model of those")
    return name


@contextmanager
def foreign(file: GgufFile, what: str) -> Iterator[None]:
    """Turns what transformers raises on a file that it cannot make sense of, which may be anything, into ours."""
    try:
        yield
    except TilewrightError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        raise file.error(what, why=why, hint=f"the file may be damaged; else {_CONVERT}") from error


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "")


def _check(file: GgufFile, arch: str, keys: Mapping[str, Any]) -> None:
    """Settings against tensors, before anything is made of their sizes."""

    def wrong(key: str, why: str) -> TilewrightError:
        found = f"it is {str(keys[key])[:80]}" if key in keys else "it is missing"
        return file.error("the metadata is wrong", item=f"key '{arch}.{key}'", why=f"{found}; {why}", hint=_CONVERT)

    for key, value in keys.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise wrong(key, "a finite number was expected")
        if key in _NUMBERS and type(value) is not int:
            raise wrong(key, "a whole number was expected")
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        hint = "this is not the file of a language model, or it is incomplete"
        raise file.error("the file has no table of embeddings", item="tensor 'token_embd.weight'", hint=hint)
    width = table.shape[1]
    if keys.get("embedding_length") != width:
        raise wrong("embedding_length", f"rows of tensor 'token_embd.weight' have {width}")
    layers = len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})
    if keys.get("block_count") != layers:
        raise wrong("block_count", f"there are the tensors of {layers} layers")
    heads = keys.get("attention.head_count")
    if type(heads) is not int or not 0 < heads <= width:
        raise wrong("attention.head_count", f"a number from 1 to {width} was expected")
    lengths = keys.get("attention.key_length"), keys.get("attention.value_length")
    if None not in lengths and lengths[0] != lengths[1]:
        raise wrong("attention.value_length", f"heads of keys have {lengths[0]}, and the two must be equal")


def _known_to_transformers(file: GgufFile, arch: str) -> dict[str, Any]:
    """The fields that transformers finds, from a file with the metadata but for long arrays, and empty tensors."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    entries = [
        bytes(file.mapped[start:end])
        for key, (start, end) in file.entries.items()
        if end - start <= _LARGEST_ENTRY and key not in ("general.alignment", "tokenizer.ggml.tokens")
    ]
    # transformers counts the tokens; here the table of embeddings does.
    entries.append(_text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 1) + _text(""))
    tensors = [_text(name) + struct.pack("<IQIQ", 1, 1, 0, 0) for name in file.tensors]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    with tempfile.NamedTemporaryFile(suffix=".gguf") as small:
        small.write(b"".join((header, *entries, *tensors, bytes(64))))
        small.flush()
        fields = load_gguf_checkpoint(small.name)["config"]
    # transformers ties some models whatever the file has.
    return fields | {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _left_out(
    file: GgufFile, arch: str, keys: Mapping[str, Any], fields: Mapping[str, Any], default: Any
) -> dict[str, Any]:
    """Fields that the file states and transformers leaves at the default of the class."""
    names = default.attribute_map
    known = default.to_dict()
    # Ids that the file does not state are none, not those of the model that the class has its defaults from.
    found: dict[str, Any] = {name: None for name in _SPECIAL if name in known and name not in fields}
    for key, candidates in _FIELDS.items():
        name = next((names.get(n, n) for n in candidates if names.get(n, n) in known), None)
        if key in keys and name is not None and name not in fields:
            found[name] = keys[key]
    if "num_key_value_heads" in known and "attention.head_count_kv" not in keys:
        found["num_key_value_heads"] = keys["attention.head_count"]
    if "use_sliding_window" in known:
        found.pop("sliding_window", None)  # these models have none unless they say so, and no key does
    width = keys["embedding_length"] // keys["attention.head_count"]
    head = keys.get("attention.key_length", width)
    if head != fields.get("head_dim", width) or ("head_dim" in known and "head_dim" not in fields):
        found[names.get("head_dim", "head_dim")] = head
    if "layer_types" in known and "sliding_window" in known:
        found |= _layer_types(keys.get("attention.sliding_window_pattern"))
    for name, part in _BIASES.items():
        if name in known:
            found[name] = any(tensor.endswith(part) for tensor in file.tensors)
    if (arch, keys["block_count"]) in _SCALED_BY_WIDTH:
        found["query_pre_attn_scalar"] = width
    return found | rope_fields(file, keys, default, head)


def _layer_types(pattern: Any) -> dict[str, Any]:
    """Which layers see a window: every one but each n-th, or one truth value a layer."""
    if pattern is None:
        return {}
    if isinstance(pattern, int):
        return {"sliding_window_pattern": pattern}
    return {"layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in pattern]}
