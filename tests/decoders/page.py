"""The page ``docs/decoders.md``: what becomes of each family in each kind of step."""

from tests.decoders.models import FAMILIES, SOURCE_FAMILIES
from tests.table_page import DOCS, TablePage

WAYS = ("prefill", "chunked prefill", "decode", "mixed batch")
_TOP = """# Decoders

How close steps of generation come to a forward pass over whole sequences, for each family of decoders and
encoder-decoders. A test compiles a tiny model with random weights for every row, compares each cell with eager in fp64,
and writes this page (`pytest tests/decoders/test_decoder_table.py --accept-golden`).

- A number pair is the largest error of a logit, over the largest logit, in millionths: **ours / eager's own** in fp32.
  It may be twice eager's, and one millionth more.
- **prefill**: three prompts whole, in one step. **chunked prefill**: in chunks of up to 7 tokens, across pages.
- **decode**: one token of each a step. **mixed batch**: prefill, chunks and single tokens of different sequences in one
  step.
- **beams**: `generate` with three beams and two results for each of two prompts of different length; **equal**: the
  tokens are those of transformers.
- **refused**: the model does not generate, for the reason below.

"""
PAGE = TablePage(DOCS / "decoders.md", _TOP, (*WAYS, "beams"), (*FAMILIES, *SOURCE_FAMILIES))
