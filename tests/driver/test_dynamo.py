"""``torch.compile(model, backend="tilewright")``: same numbers, and MiniLM packs here too."""

import torch
from references import build, masks

from tilewright import dynamo


def test_backend_is_registered() -> None:
    assert "tilewright" in torch._dynamo.list_backends()


def test_minilm_packs_on_this_path() -> None:
    import transformers

    from tilewright.cli.demo import minilm_folder

    model = transformers.AutoModel.from_pretrained(minilm_folder()).eval()
    compiled = torch.compile(model, backend="tilewright", dynamic=True)
    generator = torch.Generator().manual_seed(0)
    dynamo.compiled_graphs.clear()
    for batch, length, pattern in ((3, 12, "right"), (5, 40, "uneven"), (2, 9, "left")):
        ids = torch.randint(1000, 20000, (batch, length), generator=generator)
        mask = masks(batch, length, pattern, generator)
        with torch.no_grad():
            ours = compiled(input_ids=ids, attention_mask=mask).last_hidden_state
            expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        real = mask.bool()
        torch.testing.assert_close(ours[real], expected[real], atol=1e-4, rtol=1e-4)
    rows = sum(each.stats.rows_computed for each in dynamo.compiled_graphs)
    padded = sum(each.stats.rows_padded for each in dynamo.compiled_graphs)
    assert 0 < rows < padded


def test_distilbert() -> None:
    model = build("distilbert", 0)
    compiled = torch.compile(model, backend="tilewright", dynamic=True)
    ids, mask = torch.randint(3, 99, (3, 8)), masks(3, 8, "right", torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        ours = compiled(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], atol=1e-3, rtol=1e-3)
