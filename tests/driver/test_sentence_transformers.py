"""Pipelines of sentence-transformers, compiled by one call, against the same pipelines as they were."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

import tilewright
from tilewright.cli.demo import minilm_folder
from tilewright.driver.sentence_transformers import backbones
from tilewright.errors import CaptureError

TEXTS = [
    "one",
    "",
    "a longer text about the fish that swallowed a man " * 3,
    "zwölf Boxkämpfer",
    "in the beginning",
    "☃",
]
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 112}


def saved(folder: Path, model: Any) -> str:
    """The model in a folder with a real tokenizer beside it."""
    model.eval().save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(folder)
    return str(folder)


def tiny(folder: Path, mode: str, seed: int = 0) -> SentenceTransformer:
    """A tiny BERT with that pooling and a dense layer behind it."""
    torch.manual_seed(seed)
    transformer = Transformer(saved(folder, BertModel(BertConfig(**SMALL))))
    pooling = Pooling(48, pooling_mode=mode)
    dense = Dense(pooling.get_embedding_dimension(), 12)
    return SentenceTransformer(modules=[transformer, pooling, dense], device="cpu")


@pytest.fixture(scope="module")
def minilm() -> tuple[SentenceTransformer, SentenceTransformer]:
    """The real model, as it is and compiled."""
    pipeline = SentenceTransformer(str(minilm_folder()), device="cpu")
    return pipeline, tilewright.compile(pipeline, unpad="on")


def test_embeddings_of_a_real_model(minilm: tuple[SentenceTransformer, SentenceTransformer]) -> None:
    pipeline, compiled = minilm
    assert type(compiled) is type(pipeline)
    assert compiled is not pipeline
    expected, found = pipeline.encode(TEXTS), compiled.encode(TEXTS)
    assert found.dtype == expected.dtype
    assert 1 - (expected * found).sum(1).min() <= 1e-6
    (model,) = backbones(compiled)
    assert model.stats.fallbacks == model.stats.eager_steps == 0
    assert len(model.variants) == 1
    assert model.stats.rows_computed < model.stats.rows_padded


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"normalize_embeddings": True},
        {"truncate_dim": 7},
        {"prompt": "query: "},
        {"output_value": "token_embeddings"},
        {"show_progress_bar": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_encode(minilm: tuple[SentenceTransformer, SentenceTransformer], options: dict[str, Any]) -> None:
    expected, found = (model.encode(TEXTS, **options) for model in minilm)
    assert type(found) is type(expected)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(np.asarray(other), np.asarray(one), atol=1e-5)


def test_edges_of_encode(minilm: tuple[SentenceTransformer, SentenceTransformer]) -> None:
    pipeline, compiled = minilm
    assert compiled.encode([]).shape == (0,)
    assert compiled.encode("one text").shape == (384,)
    long = ["word " * 3000]
    np.testing.assert_allclose(compiled.encode(long), pipeline.encode(long), atol=1e-5)
    assert compiled.max_seq_length == pipeline.max_seq_length
    assert torch.allclose(compiled.similarity(compiled.encode(TEXTS), compiled.encode(TEXTS)).diagonal(), torch.ones(6))


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "weightedmean", "lasttoken", "mean_sqrt_len_tokens"])
def test_pooling_modes(tmp_path: Path, mode: str) -> None:
    pipeline = tiny(tmp_path, mode)
    compiled = tilewright.compile(pipeline)
    np.testing.assert_allclose(compiled.encode(TEXTS), pipeline.encode(TEXTS), atol=1e-5)


def test_the_pipeline_given_is_left_alone(tmp_path: Path) -> None:
    pipeline = tiny(tmp_path, "mean")
    before = {name: id(module) for name, module in pipeline.named_modules()}
    compiled = tilewright.compile(pipeline)
    assert {name: id(module) for name, module in pipeline.named_modules()} == before
    assert compiled[1] is pipeline[1]
    assert compiled.device == pipeline.device
    compiled.save(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), pipeline.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("labels", [1, 3])
def test_cross_encoder(tmp_path: Path, labels: int) -> None:
    torch.manual_seed(labels)
    model = BertForSequenceClassification(BertConfig(**SMALL, num_labels=labels))
    pipeline = CrossEncoder(saved(tmp_path, model), device="cpu")
    compiled = tilewright.compile(pipeline, unpad="on")
    pairs = [(one, other) for one in TEXTS for other in TEXTS[:3]]
    np.testing.assert_allclose(compiled.predict(pairs), pipeline.predict(pairs), atol=1e-5)
    if labels == 1:
        ranked = [[hit["corpus_id"] for hit in each.rank(TEXTS[2], TEXTS)] for each in (pipeline, compiled)]
        assert ranked[0] == ranked[1]
    (backbone,) = backbones(compiled)
    (variant,) = backbone.variants.values()
    assert variant.compiled is not None
    (record,) = (record for record in variant.compiled.records if record.name == "slice_rows")
    assert record.counts["attention"] == 1  # its head reads column 0


def test_training_is_refused(tmp_path: Path) -> None:
    pipeline = tiny(tmp_path, "mean")
    compiled = tilewright.compile(pipeline)
    compiled.train()
    with pytest.raises(CaptureError, match="cannot be trained"):
        compiled(compiled.preprocess(TEXTS))
    assert compiled.encode(TEXTS).shape == (6, 12)  # encode() goes back to evaluation
    pipeline.train()
    with pytest.raises(CaptureError, match="training mode"):
        tilewright.compile(pipeline)


def test_a_pipeline_without_a_transformer_is_refused() -> None:
    from sentence_transformers.sentence_transformer.modules import BoW

    pipeline = SentenceTransformer(modules=[BoW(vocab=["one", "fish"])], device="cpu")
    with pytest.raises(CaptureError, match="no transformers model"):
        tilewright.compile(pipeline)
