"""The semantic op set: traits and native references. Importing this package registers every built-in op.

``tilewright.ops.register(op, Traits(...))`` declares an op of your own.
"""

from tilewright.ops import aten as aten
from tilewright.ops import attention as attention
from tilewright.ops import block_linear as block_linear
from tilewright.ops import cache as cache
from tilewright.ops import columns as columns
from tilewright.ops import cross_attention as cross_attention
from tilewright.ops import expert_blocks as expert_blocks
from tilewright.ops import experts as experts
from tilewright.ops import head_linear as head_linear
from tilewright.ops import packing as packing
from tilewright.ops import quantization as quantization
from tilewright.ops import selection as selection
from tilewright.ops.registry import OpSpec, all_ops, find, is_overload, register, traits_of
from tilewright.ops.traits import Flow, Traits

__all__ = ["Flow", "OpSpec", "Traits", "all_ops", "find", "is_overload", "register", "traits_of"]
