"""Lowering of TTIR text to LLVM IR text.

The way of a kernel through this package: ``parser`` makes records of the text (``ttir``), ``inline`` removes calls,
``plan`` decides which tensors get memory, and ``kernel`` goes through the operations in order. Operations with loops
of their own (``memory``, ``reduce``, ``scan``, ``dot``, ``control``) evaluate their operands point by point
(``context``, ``shapes``, ``arith``, ``mathfn``), as ``lanes``, and ``builder`` writes the LLVM IR.
"""

from tilewright.codegen.cpu.lower.kernel import Lowered, lower_module

__all__ = ["Lowered", "lower_module"]
