"""Opens what a user names: a local folder, a hub name, or a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.errors import InputError, TilewrightError
from tilewright.models.gguf.model import GgufModel, load_gguf
from tilewright.models.gguf.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, if it has one.

    Attributes:
        model: in eval mode.
        tokenizer: None when the folder has none.
        folder: where it came from on disk; None for a hub name.
        note: what a user should know, e.g. that the weights are random.
        stored: the file that holds its weights in blocks; ``model`` then has none of its own.
    """

    model: Any
    tokenizer: Any | None
    folder: Path | None
    note: str = ""
    stored: GgufModel | None = None


def load_model(name: str) -> Loaded:
    """Opens a model.

    Args:
        name: a folder that ``transformers`` opens; a ``.safetensors`` file in such a folder; a ``.gguf`` file; a
            ``config.json`` file, which gives the architecture with random weights; or a name on the model hub.

    Raises:
        InputError: nothing is there, or transformers cannot open it.
        GgufError: the file is damaged, or its model is not read.
    """
    path = Path(name).expanduser()
    try:
        if path.suffix == ".gguf" and path.is_file():
            stored = load_gguf(path)
            return Loaded(stored.model, load_tokenizer(stored), None, stored=stored)
        if path.suffix == ".json" and path.is_file():
            return _from_config(path)
        if path.suffix == ".safetensors" and path.is_file():
            return _from_pretrained(str(path.parent), path.parent)
        if path.exists() and not path.is_dir():
            raise InputError(f"cannot open {path}", why=f"a {path.suffix or 'plain'} file is not a model", hint=_HINT)
        if not path.exists() and (
            name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in _MODEL_FILES
        ):
            raise InputError(f"there is no {path}", hint=_HINT)
        return _from_pretrained(name, path if path.is_dir() else None)
    except (OSError, ValueError) as error:
        if isinstance(error, TilewrightError):
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot open the model '{name}'", why=why, hint=_HINT) from error


_MODEL_FILES = (".gguf", ".json", ".safetensors")
_HINT = "name a folder with config.json and weights, a .gguf file, a config.json (random weights), or a hub name"


def _model_class(config: Any) -> Any:
    import transformers

    for architecture in config.architectures or ():
        found = getattr(transformers, str(architecture), None)  # a name of a file, so it may be anything's
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModel


def _from_pretrained(name: str, folder: Path | None) -> Loaded:
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    model = _model_class(config).from_pretrained(name)
    return Loaded(model.eval(), _tokenizer(name, folder), folder)


def _tokenizer(name: str, folder: Path | None) -> Any | None:
    """The tokenizer, if there is one: transformers makes an empty one for a folder that has none of its files."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None
    files = {*type(tokenizer).vocab_files_names.values()}
    if folder is not None and files and not any((folder / file).is_file() for file in files | {"tokenizer.json"}):
        return None
    return tokenizer


def _from_config(path: Path) -> Loaded:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(path))
    torch.manual_seed(0)
    cls = _model_class(config)
    model = cls.from_config(config) if cls is transformers.AutoModel else cls(config)
    return Loaded(model.eval(), None, path.parent, note="random weights: a config has none")
