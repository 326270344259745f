"""Capture of models: numerics at sizes other than the traced ones, facts, the user's model unchanged, errors."""

import copy

import pytest
import torch
import transformers
from handwritten import Encoder
from references import masks
from torch import Tensor, nn
from torch.fx import Interpreter
from zoo import build, normalize, ops, run, zoo

import tilewright
from tilewright.errors import CaptureError, InputError
from tilewright.ir.facts import Origin, SizeValue, TensorType, TupleType, fact, find_fact
from tilewright.ir.graph import Level, get_tensor, info
from tilewright.ir.sizes import BATCH, SEQ
from tilewright.models.capture import capture, default_signature
from tilewright.models.inputs import bind, signature_of

SIZES = ((1, 1), (1, 13), (2, 1), (4, 9))
# Captured over the hooks; attention is one op already.
HOOKED = ("bert", "roberta", "distilbert", "albert", "modernbert", "gpt2", "llama", "qwen3", "gemma3")


def _eager(model: nn.Module, ids: Tensor, mask: Tensor, double: bool) -> Tensor:
    model = copy.deepcopy(model).double() if double else model
    extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **extra)[0]


@pytest.mark.parametrize("family", sorted(zoo()))
def test_numerics_and_attention(family: str) -> None:
    model = build(family)
    gm = capture(model)
    assert info(gm).level is Level.EXPORTED
    assert (ops(gm)["tilewright.attention.default"] > 0) == (family != "mpnet")
    generator = torch.Generator().manual_seed(7)
    cases = []
    for (batch, length), pattern in zip(SIZES, ("full", "left", "full", "uneven"), strict=True):
        ids = torch.randint(3, 99, (batch, length), generator=generator)
        cases.append((ids, masks(batch, length, pattern, generator)))
    exported = [run(gm, input_ids=ids, attention_mask=mask) for ids, mask in cases]
    gm, _ = normalize(gm)
    assert info(gm).level is Level.NORMALIZED
    for (ids, mask), before in zip(cases, exported, strict=True):
        after = run(gm, input_ids=ids, attention_mask=mask)
        assert type(after) is type(before)
        reference = _eager(model, ids, mask, True)[mask.bool()]
        limit = (
            2 * (_eager(model, ids, mask, False)[mask.bool()] - reference).abs().max() + 1e-6 * reference.abs().max()
        )
        assert (before[0][mask.bool()] - reference).abs().max() <= limit
        assert (after[0][mask.bool()] - reference).abs().max() <= limit
    counts = ops(gm)
    assert counts["tilewright.attention.default"] == model.config.num_hidden_layers
    assert not any("matmul" in op or "softmax" in op or "addmm" in op for op in counts)


@pytest.mark.parametrize("family", HOOKED)
def test_model_is_unchanged(family: str) -> None:
    model = build(family)
    model.config._attn_implementation = "eager"
    state = {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()}
    config, flags = copy.deepcopy(model.config.__dict__), [m.training for m in model.modules()]
    gm = capture(model)
    assert model.config.__dict__ == config
    assert [m.training for m in model.modules()] == flags
    assert {n: (t.data_ptr(), t._version) for n, t in model.state_dict().items()} == state
    shared = {get_tensor(gm, n).data_ptr() for n in gm.graph.find_nodes(op="get_attr")}
    assert all(p.data_ptr() in shared for n, p in model.named_parameters() if "pooler" not in n)


def test_implementation_is_restored_after_an_error() -> None:
    model = build("bert")
    model.embeddings.forward = lambda **_: torch.ones(3)[torch.randint(0, 3, (2,)).sum().item() :]
    before = model.config._attn_implementation
    with pytest.raises(CaptureError):
        capture(model)
    assert model.config._attn_implementation == before


def test_facts() -> None:
    gm = capture(build("bert"))
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        assert any(find_fact(node, kind) for kind in (TensorType, TupleType, SizeValue)), node
        if node.op == "call_function":
            assert find_fact(node, Origin)
    attention = gm.graph.find_nodes(op="call_function", target=torch.ops.tilewright.attention.default)[1]
    origin = fact(attention, Origin)
    assert origin.module == "encoder.layer.1.attention.self"
    assert origin.source
    assert origin.source.startswith("modeling_bert.py:")
    assert fact(attention, TensorType).shape == (BATCH, SEQ, 4, 8)
    found = info(gm)
    ids, mask, types = found.inputs
    assert (ids.name, ids.vocab, ids.default, ids.shape) == ("input_ids", 99, None, (BATCH, SEQ))
    assert (mask.name, mask.default, mask.validity, mask.vocab) == ("attention_mask", "ones", True, None)
    assert (types.name, types.default, types.vocab) == ("token_type_ids", "zeros", 2)
    assert found.bounds[SEQ][:2] == (1, 40)
    assert found.output.names == ("last_hidden_state", "pooler_output")
    assert found.output.class_path == "transformers.modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions"


def test_a_bias_cut_to_the_length_bounds_it() -> None:
    """MPT's bias of 40 keys is cut to the last S, so it has min(S, 40): longer texts meet too few."""
    config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=99, max_seq_len=40)
    model = transformers.MptForCausalLM(config).eval()
    assert info(capture(model)).bounds[SEQ][:2] == (1, 40)
    compiled = tilewright.compile(model, opt_level=1)
    ids = torch.randint(0, 99, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="S = 41 is outside"):
        compiled(torch.randint(0, 99, (1, 41)))


@pytest.mark.parametrize(("family", "longest"), [("bert", 40), ("roberta", 38), ("gpt2", 40), ("mpnet", 38)])
def test_length_bound_is_what_eager_takes(family: str, longest: int) -> None:
    model = build(family)
    assert info(capture(model)).bounds[SEQ][1] == longest
    ids = torch.full((1, longest), 5)
    _eager(model, ids, torch.ones_like(ids), False)
    too_long = torch.full((1, longest + 1), 5)
    with pytest.raises((IndexError, RuntimeError)):
        _eager(model, too_long, torch.ones_like(too_long), False)


def test_grouped_heads_and_windows_are_operands() -> None:
    target = torch.ops.tilewright.attention.default
    gm = capture(build("gemma3"))
    local, full = gm.graph.find_nodes(op="call_function", target=target)
    assert local.args[7:10] == (True, 3, -1)
    assert full.args[7:10] == (True, -1, -1)
    assert local.args[3] is not None
    assert fact(local.args[1], TensorType).shape[1] == 2
    modern = capture(build("modernbert")).graph.find_nodes(op="call_function", target=target)
    assert {node.args[7:10] for node in modern} == {(False, 4, 4), (False, -1, -1)}


def test_softcap_and_sinks_are_operands() -> None:
    import transformers as hf

    target = torch.ops.tilewright.attention.default
    small = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    small |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "max_position_embeddings": 40}
    gemma = hf.Gemma2Model(hf.Gemma2Config(**small, sliding_window=4, attn_implementation="eager")).eval()
    gm = capture(gemma)
    assert [n.args[10] for n in gm.graph.find_nodes(op="call_function", target=target)] == [50.0, 50.0]
    ids, mask = torch.randint(1, 99, (2, 9)), masks(2, 9, "uneven", torch.Generator().manual_seed(0))
    expected = _eager(gemma, ids, mask, False)[mask.bool()]
    assert torch.allclose(
        run(normalize(gm)[0], input_ids=ids, attention_mask=mask)[0][mask.bool()], expected, atol=1e-5
    )


def test_dtype_makes_a_copy() -> None:
    model = build("llama")
    gm = capture(model, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    dtypes = {str(n.target): get_tensor(gm, n).dtype for n in gm.graph.find_nodes(op="get_attr")}
    assert dtypes["model.embed_tokens.weight"] == torch.bfloat16
    assert all(dtype == torch.float32 for name, dtype in dtypes.items() if "inv_freq" in name)
    ids = torch.randint(3, 99, (2, 7))
    half = copy.deepcopy(model).to(torch.bfloat16)
    reference = _eager(model, ids, torch.ones_like(ids), True)
    ours, eager = run(gm, input_ids=ids)[0], _eager(half, ids, torch.ones_like(ids), False)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - reference).abs().max() <= 2 * (eager.double() - reference).abs().max() + 1e-6


def test_other_signatures() -> None:
    model = build("bert")
    ids = torch.randint(0, 99, (2, 7))
    kwargs = {"inputs_embeds": model.embeddings.word_embeddings(ids).detach(), "position_ids": torch.arange(7)[None]}
    gm = capture(model, example=((), kwargs))
    assert [s.name for s in info(gm).inputs] == ["attention_mask", "token_type_ids", "position_ids", "inputs_embeds"]
    with torch.no_grad():
        expected = model(**kwargs, attention_mask=torch.ones_like(ids))[0]
    flat = bind(signature_of(model, (), kwargs), info(gm), (), kwargs)
    assert torch.allclose(Interpreter(gm).run(*flat)[0], expected, atol=1e-5)
    hidden = capture(model, signature_of(model, (ids,), {"output_hidden_states": True}))
    names = ("last_hidden_state", "pooler_output", "hidden_states.0", "hidden_states.1", "hidden_states.2")
    assert info(hidden).output.names == names
    assert len(run(hidden, input_ids=ids).hidden_states) == 3
    weights = capture(model, signature_of(model, (ids,), {"output_attentions": True}))
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids, output_attentions=True).attentions
    for graph in (weights, normalize(weights)[0]):
        ours = run(graph, input_ids=ids).attentions
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, expected, strict=True))
    assert any("used elsewhere" in reason for reason in info(weights).reasons.values())


def test_full_mask_is_a_bias() -> None:
    model = build("bert")
    ids, allowed = torch.randint(0, 99, (2, 6)), torch.rand(2, 1, 6, 6) > 0.4
    allowed |= torch.eye(6, dtype=torch.bool)
    gm, _ = normalize(capture(model, example=((ids, allowed), {})))
    attention = gm.graph.find_nodes(op="call_function", target=torch.ops.tilewright.attention.default)[0]
    assert attention.args[3] is None
    assert attention.args[4] is not None
    with torch.no_grad():
        expected = model(ids, allowed)[0]
    assert torch.allclose(run(gm, input_ids=ids, attention_mask=allowed)[0], expected, atol=1e-5)


def test_wrapped_model_uses_the_hooks() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("bert")

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            states = self.inner(ids, attention_mask=mask).last_hidden_state
            return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    model, ids = Pooled().eval(), torch.randint(0, 99, (3, 8))
    mask = masks(3, 8, "uneven", torch.Generator().manual_seed(2))
    gm, _ = normalize(capture(model, example=((ids[:1], mask[:1]), {})))
    attention = gm.graph.find_nodes(op="call_function", target=torch.ops.tilewright.attention.default)
    assert all(node.args[3] is not None and node.args[4] is None for node in attention)
    with torch.no_grad():
        assert torch.allclose(run(gm, ids=ids, mask=mask), model(ids, mask), atol=1e-5)


@pytest.mark.parametrize("form", ["module", "exported program", "graph module"])
def test_not_hugging_face(form: str) -> None:
    torch.manual_seed(3)
    model = Encoder().eval()
    ids, mask = torch.randint(0, 50, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    if form == "exported program":
        dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        gm = capture(torch.export.export(model, (ids, mask), dynamic_shapes=(dynamic, dynamic)))
    else:
        source = model if form == "module" else torch.fx.symbolic_trace(model)
        gm = capture(source, example=((ids, mask), {}))
    assert info(gm).inputs[0].vocab == 50
    assert info(gm).bounds[SEQ][1] == 64
    gm, _ = normalize(gm)
    counts = ops(gm)
    wanted = {"tilewright.attention.default": 2, "aten.linear.default": 8, "aten.layer_norm.default": 2}
    wanted |= {"aten.rms_norm.default": 2, "aten.gelu.default": 2, "aten.softmax.int": 0, "aten.matmul.default": 0}
    assert {op: counts[op] for op in wanted} == wanted
    attention = gm.graph.find_nodes(op="call_function", target=torch.ops.tilewright.attention.default)[0]
    assert attention.args[6] == pytest.approx(8**-0.5)
    assert attention.args[3] is not None
    assert attention.args[4] is None
    for batch, length in SIZES:
        ids = torch.randint(0, 50, (batch, length))
        mask = masks(batch, length, "uneven", torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = model(ids, mask)
        for ours, theirs in zip(run(gm, ids=ids, mask=mask), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_training_mode_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"model\.eval\(\)"):
        capture(build("bert").train())


class _Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class _Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class _DataSized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class _Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count


@pytest.mark.parametrize("module", [_Branches, _Random, _DataSized, _Writes])
def test_what_cannot_be_captured_says_why(module: type[nn.Module]) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(module().eval(), example=((torch.randn(3, 5),), {}))
    assert caught.value.why
    assert caught.value.hint
    assert caught.value.where


def test_inputs_unknown() -> None:
    model = Encoder().eval()
    assert default_signature(model) is None
    with pytest.raises(CaptureError, match="inputs"):
        capture(model)
    cache = signature_of(build("gpt2"), (torch.ones(1, 2, dtype=torch.long),), {"past_key_values": object()})
    with pytest.raises(CaptureError, match="past_key_values"):
        capture(build("gpt2"), cache)
