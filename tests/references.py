"""The error rule every numerics test uses, and small models with random weights.

Rule: the largest absolute error over real tokens against eager in fp64, the maximum over the seeds, is at most twice
eager's own maximum in the same precision, plus 1e-6 of the largest reference value.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

SEEDS = range(5)


class ErrorRule:
    """Collects errors over seeds and inputs of one output, then judges."""

    def __init__(self) -> None:
        self.ours = 0.0
        self.eager = 0.0
        self.largest = 0.0

    def add(self, ours: Tensor, eager: Tensor, reference: Tensor, real: Tensor | None = None) -> None:
        """Tensors of one shape; ``real`` [B, S] selects real tokens of per-token outputs."""
        assert ours.shape == eager.shape
        assert ours.dtype == eager.dtype
        if real is not None:
            ours, eager, reference = ours[real], eager[real], reference[real]
        if reference.numel() == 0:
            return
        assert torch.isfinite(ours).all()
        self.ours = max(self.ours, float((ours.double() - reference).abs().max()))
        self.eager = max(self.eager, float((eager.double() - reference).abs().max()))
        self.largest = max(self.largest, float(reference.abs().max()))

    def check(self, what: str = "") -> None:
        """Fails when our error breaks the rule; ``what`` says of what."""
        bound = 2 * self.eager + 1e-6 * self.largest
        assert self.ours <= bound, f"{what} error {self.ours:.3e}, eager's {self.eager:.3e}, bound {bound:.3e}"


def in_double(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model in fp64."""
    return copy.deepcopy(model).double()


def masks(batch: int, length: int, pattern: str, generator: torch.Generator) -> Tensor:
    """Attention masks [batch, length] of int64 by pattern: full, uneven, left, right, one_token, empty_row, holes."""
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    column = torch.arange(length)[None, :]
    if pattern == "full":
        return torch.ones(batch, length, dtype=torch.long)
    if pattern == "one_token":
        lengths = torch.ones(batch, dtype=torch.long)
    if pattern == "uneven":
        lengths = torch.where(torch.arange(batch) % 2 == 0, length, 1)
    if pattern == "left":
        return (column >= length - lengths[:, None]).long()
    mask = (column < lengths[:, None]).long()
    if pattern == "empty_row":
        mask[0] = 0
    if pattern == "holes":
        mask = torch.randint(0, 2, (batch, length), generator=generator)
        mask[:, 0] = 1
    return mask


PATTERNS = ("full", "uneven", "left", "right", "one_token", "holes")


def families() -> dict[str, Callable[[], Any]]:
    """Tiny encoders with random weights, by name of the family."""
    import transformers as hf

    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 112}
    return {
        "bert": lambda: hf.BertModel(hf.BertConfig(vocab_size=99, **small)),
        "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(vocab_size=99, max_position_embeddings=130, **small)),
        "distilbert": lambda: hf.DistilBertModel(
            hf.DistilBertConfig(vocab_size=99, dim=48, n_layers=2, n_heads=4, hidden_dim=112)
        ),
    }


def build(family: str, seed: int) -> Any:
    """The family's tiny model in eval mode, its weights scaled up so that errors show."""
    torch.manual_seed(seed)
    model = families()[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            elif "bias" in name:
                parameter.normal_(std=0.2)
    return model


def real_outputs(outputs: Any) -> Iterable[tuple[str, Tensor]]:
    """Named tensors of a model output."""
    return [(name, value) for name, value in outputs.items() if isinstance(value, Tensor)]
