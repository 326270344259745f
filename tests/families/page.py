"""The page ``docs/encoders.md``: what becomes of each family with each head."""

from tests.families.models import FAMILIES, HEADS
from tests.table_page import DOCS, TablePage

_TOP = """# Encoders

What Tilewright does with each family of encoders and each head. A test compiles a tiny model for every cell, compares
it with eager in fp64 on right-padded and left-padded batches, masks with holes and empty rows, and writes this page
(`pytest tests/families --accept-golden`).

- **packed**: the whole model works on real tokens only; no op runs eager.
- **padded**: the model is compiled and works on all places of the padded batch, for the reason below.
- **eager**: the model, or the part named below, runs as it was.
- blank: transformers has no such class, or it has a decoder.

`base` is the model without a head, with its pooler where it has one; of T5 and BART it is the encoder.

"""
PAGE = TablePage(DOCS / "encoders.md", _TOP, tuple(HEADS), tuple(FAMILIES))
