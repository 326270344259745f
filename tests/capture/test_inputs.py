"""Calls: which signature they have, what is bound, and every way an argument can be wrong."""

from typing import Any

import pytest
import torch
from zoo import build

from tilewright.errors import InputError
from tilewright.ir.graph import GraphInfo, info
from tilewright.models.capture import capture, default_signature
from tilewright.models.inputs import CallSignature, bind, example_inputs, signature_of

IDS = torch.randint(0, 99, (3, 7))


@pytest.fixture(scope="module")
def bert() -> tuple[Any, CallSignature, GraphInfo]:
    model = build("bert")
    signature = default_signature(model)
    assert signature is not None
    return model, signature, info(capture(model))


def test_defaults_are_no_signature_of_their_own(bert: Any) -> None:
    model, usual, _ = bert
    mask = torch.ones_like(IDS)
    same = (
        signature_of(model, (IDS,), {}),
        signature_of(model, (IDS, mask), {}),
        signature_of(model, (), {"input_ids": IDS, "attention_mask": mask.bool(), "token_type_ids": mask}),
        signature_of(model, (IDS,), {"attention_mask": mask.float(), "inputs_embeds": None}),
    )
    assert {hash(s) for s in same} == {hash(usual)}
    assert all(s == usual for s in same)
    others = (
        signature_of(model, (IDS,), {"position_ids": IDS}),
        signature_of(model, (IDS,), {"attention_mask": torch.ones(3, 1, 7, 7)}),
        signature_of(model, (IDS,), {"output_hidden_states": True}),
        signature_of(model, (IDS,), {"return_dict": False}),
    )
    assert len({usual, *others}) == 5
    assert CallSignature.from_json(others[2].to_json()) == others[2]
    assert signature_of(model, (IDS,), {"past_key_values": object()}).obstacle


def test_bound_tensors(bert: Any) -> None:
    model, usual, found = bert
    ids, mask, types = bind(usual, found, (IDS,), {})
    assert ids is IDS
    assert mask.tolist() == torch.ones_like(IDS).tolist()
    assert types.tolist() == torch.zeros_like(IDS).tolist()
    wide = torch.randint(0, 99, (7, 3)).int().t()
    given = signature_of(model, (wide,), {"attention_mask": torch.eye(3, 7)})
    ids, mask, _ = bind(given, found, (wide,), {"attention_mask": torch.eye(3, 7)})
    assert ids.is_contiguous()
    assert ids.dtype == mask.dtype == torch.int64
    assert mask.tolist() == torch.eye(3, 7).long().tolist()
    assert [tuple(t.shape) for t in example_inputs(found, 2, 5)] == [(2, 5)] * 3


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((IDS[0],), {}, ("input_ids", "axes", "row a sequence")),
        ((IDS.float(),), {}, ("input_ids", "float32", "integers")),
        ((IDS + 99,), {}, ("input_ids", "0..98", "tokenizer")),
        ((IDS - 200,), {}, ("input_ids", "-", "tokenizer")),
        ((torch.zeros(0, 7, dtype=torch.long),), {}, ("empty", "B")),
        ((torch.zeros(3, 0, dtype=torch.long),), {}, ("empty", "S")),
        ((torch.zeros(1, 41, dtype=torch.long),), {}, ("41", "1..40", "truncate")),
        ((IDS,), {"attention_mask": torch.ones(3, 6)}, ("attention_mask", "(3, 6)", "(3, 7)")),
        ((IDS,), {"attention_mask": torch.ones(1, 7)}, ("attention_mask", "(1, 7)")),
        ((IDS,), {"attention_mask": torch.full((3, 7), 0.5)}, ("attention_mask", "0.5", "1 for real")),
        ((IDS,), {"token_type_ids": torch.full((3, 7), 2)}, ("token_type_ids", "0..1")),
        ((), {"attention_mask": torch.ones(3, 7)}, ("input_ids", "missing")),
        ((IDS.tolist(),), {}, ("input_ids", "list")),
    ],
)
def test_wrong_arguments(bert: Any, args: Any, kwargs: Any, words: tuple[str, ...]) -> None:
    _, usual, found = bert
    with pytest.raises(InputError) as caught:
        bind(usual, found, args, kwargs)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_wrong_calls(bert: Any) -> None:
    model, _, _ = bert
    with pytest.raises(InputError, match="given twice"):
        signature_of(model, (IDS,), {"input_ids": IDS})
    with pytest.raises(InputError, match="too many"):
        signature_of(build("llama"), (IDS,) * 20, {})
