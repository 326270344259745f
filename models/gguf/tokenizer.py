"""The tokenizer of a GGUF file, built by transformers out of its vocabulary."""

from typing import Any

from tilewright.models.gguf.config import foreign
from tilewright.models.gguf.model import GgufModel


def load_tokenizer(loaded: GgufModel) -> Any:
    """A transformers tokenizer. Takes seconds where merges must be found again from a large vocabulary.

    ``AutoTokenizer.from_pretrained`` with ``gguf_file`` gives the same one, but reads the config first, which takes
    half a minute.

    Raises:
        GgufError: the file has no tokenizer, or one that transformers cannot build.
    """
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    file = loaded.file
    if "tokenizer.ggml.tokens" not in file.metadata or "tokenizer.ggml.model" not in file.metadata:
        hint = "use the tokenizer of the model it was made from"
        raise file.error("the file has no tokenizer", item="key 'tokenizer.ggml.tokens'", hint=hint)
    with foreign(file, "transformers cannot build the file's tokenizer"):
        name = TOKENIZER_MAPPING_NAMES.get(loaded.model.config.model_type) or "TokenizersBackend"
        tokenizer_class: Any = tokenizer_class_from_name(name)
        return tokenizer_class(gguf_file=file.path.name, name_or_path=str(file.path.absolute().parent))
