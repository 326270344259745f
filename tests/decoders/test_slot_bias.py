"""Biases of attention in steps: tables over slots or distances where that is what they are, else refused."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.decoders.models import VOCAB, build
from tests.decoders.test_decoder_steps import steps_of
from tests.decoders.test_decoder_table import Sequences, add_errors
from tests.references import ErrorRule
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.t5.modeling_t5 import T5Attention

import tilewright
from tilewright.errors import CacheRefused
from tilewright.ops.cache import attention_paged_reference

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, WIDTH, LONGEST = 4, 32, 96
Bias = Callable[["BiasedModel", Tensor, Tensor], Tensor]


class BiasedModel(nn.Module):
    """A causal model of two layers that adds a bias made by ``bias(model, mask, hidden)`` to its scores."""

    def __init__(self, bias: Bias) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bias, self.config = bias, SimpleNamespace(is_encoder_decoder=False)
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.slopes = nn.Parameter(torch.randn(HEADS, 1, 1) * 0.2)
        self.buckets = nn.Embedding(32, HEADS)
        self.table = nn.Parameter(torch.randn(2 * LONGEST, HEADS))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
    ) -> CausalLMOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        columns = torch.arange(input_ids.shape[1])
        x = self.embed(input_ids)
        lowest = torch.finfo(x.dtype).min
        allowed = (columns[None] <= columns[:, None]) & (mask[:, None, None] != 0)
        for layer in self.layers:
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in layer(x).chunk(3, dim=-1))
            scores = q @ k.transpose(-1, -2) * 0.3 + self.bias(self, mask, x).to(x.dtype)
            weights = scores.masked_fill(~allowed, lowest).softmax(-1)
            x = x + (weights @ v).transpose(1, 2).flatten(2)
        return CausalLMOutput(logits=self.head(x))


def columns(mask: Tensor) -> Tensor:
    return torch.arange(mask.shape[1])


def distances(mask: Tensor) -> Tensor:
    """[S, S]: how far a key is before its query; negative behind it."""
    return columns(mask)[:, None] - columns(mask)[None]


def by_real_tokens(model: BiasedModel, mask: Tensor, hidden: Tensor) -> Tensor:
    return model.slopes * ((mask.cumsum(-1) - 1) * mask)[:, None, None]


def by_slot(model: BiasedModel, mask: Tensor, hidden: Tensor) -> Tensor:
    return model.slopes * columns(mask)


def by_slot_for_all_heads(model: BiasedModel, mask: Tensor, hidden: Tensor) -> Tensor:
    return torch.cos(columns(mask) * 0.7)


def learned_by_slot(model: BiasedModel, mask: Tensor, hidden: Tensor) -> Tensor:
    return model.table[: mask.shape[1]].t()[:, None]


def by_distance(model: BiasedModel, mask: Tensor, hidden: Tensor) -> Tensor:
    return model.slopes * -distances(mask).abs()


def by_bucket(model: BiasedModel, mask: Tensor, hidden: Tensor) -> Tensor:
    found = T5Attention._relative_position_bucket(-distances(mask), bidirectional=False, max_distance=24)
    return model.buckets(found).permute(2, 0, 1)


def learned_by_distance(model: BiasedModel, mask: Tensor, hidden: Tensor) -> Tensor:
    return nn.functional.embedding(distances(mask).clamp(-8, 8) + 8, model.table).permute(2, 0, 1)


def the_same_for_all(model: BiasedModel, mask: Tensor, hidden: Tensor) -> Tensor:
    return model.slopes


TABLES = {
    by_real_tokens: "key",
    by_slot: "key",
    by_slot_for_all_heads: "key",
    learned_by_slot: "key",
    by_distance: "distance",
    by_bucket: "distance",
    learned_by_distance: "distance",
    the_same_for_all: "key",
}


def attentions(compiled: Any) -> list[Any]:
    graph = compiled.compiled.graph
    bodies = [graph.get_submodule(node.target).graph for node in graph.graph.nodes if node.op == "call_module"]
    return [n for b in bodies for n in b.nodes if n.target is torch.ops.tilewright.attention_paged.default]


@pytest.mark.parametrize("bias", TABLES, ids=lambda bias: bias.__name__)
def test_tables_over_slots(bias: Bias) -> None:
    model = BiasedModel(bias).eval()
    compiled = steps_of(model)
    assert not compiled.compiled.spec.notes["eager"]
    assert {node.args[-1] for node in attentions(compiled)} == {TABLES[bias]}
    rule = ErrorRule()
    for seed in range(5):
        add_errors(rule, compiled, Sequences(model, seed), "mixed batch")
    rule.check(bias.__name__)


def of_tokens(model: BiasedModel, mask: Tensor, hidden: Tensor) -> Tensor:
    return hidden[:, None, None, :, 0]


def of_both(model: BiasedModel, mask: Tensor, hidden: Tensor) -> Tensor:
    return 0.1 * (columns(mask)[:, None] - 2 * columns(mask)).float()


def of_the_length(model: BiasedModel, mask: Tensor, hidden: Tensor) -> Tensor:
    return columns(mask).float() / mask.shape[1]


def of_a_running_sum(model: BiasedModel, mask: Tensor, hidden: Tensor) -> Tensor:
    return columns(mask).cumsum(0) * 0.1


def of_the_last_token(model: BiasedModel, mask: Tensor, hidden: Tensor) -> Tensor:
    return mask[:, None, None, -1:] * 0.1


REFUSED = {
    of_tokens: "scatter_rows",
    of_both: r"-2\*k \+ q is no formula of the slot of the key; -2\*k \+ q is no formula of the distance",
    of_the_length: "S is no formula of the slot of the key",
    of_a_running_sum: "a running sum of what differs",
    of_the_last_token: "depends on input 'attention_mask'",
}


@pytest.mark.parametrize("bias", REFUSED, ids=lambda bias: bias.__name__)
def test_other_biases_are_refused(bias: Bias) -> None:
    with pytest.raises(CacheRefused, match=REFUSED[bias]) as caught:
        steps_of(BiasedModel(bias).eval())
    assert "made for a whole batch" in str(caught.value)


def test_definition() -> None:
    """What the op adds to scores: numbers in the columns that it says it reads."""
    length, table = 8, torch.tensor([[0, 1]], dtype=torch.int32)
    q, k, v = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.zeros(1, 2, length)
    pages, values = torch.zeros(2, 2, 4, 4), torch.eye(length).view(2, 1, 4, length).expand(-1, 2, -1, -1).clone()
    bias = torch.randn(2, length)
    for slot in (0, 4, 6):
        for by, seen in (("key", bias[:, : slot + 1]), ("distance", bias[:, length - 1 - slot :])):
            place = torch.tensor([slot], dtype=torch.int32)
            told = (place, torch.tensor([0, 1], dtype=torch.int32), place, table)
            v = torch.eye(length)[slot].expand(1, 2, -1)
            found = attention_paged_reference(q, k, v, pages, values, *told, None, 1.0, -1, 0.0, None, None, bias, by)
            assert torch.allclose(found[0, :, : slot + 1], seen.softmax(-1), atol=1e-6)


def test_left_padded_batches_generate_as_alone() -> None:
    model = build("bloom", seed=0)
    compiled = tilewright.compile(model, opt_level=1)
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 64, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **options)  # type: ignore[operator]
    assert torch.equal(compiled.generate(ids, attention_mask=mask, **options), expected)
