"""Lowering of kernels, as records of ``codegen.cpu.ttir``, to LLVM IR text.

``kernel`` goes through the operations in order. Those with loops of their own (``memory``, ``reduce``, ``scan``,
``dot``, ``atomic``, ``control``) evaluate their operands point by point (``context``, ``shapes``, ``arith``,
``mathlib``) as ``lanes``, in the loops of ``nest`` or into ``tiles`` of scratch memory, and ``builder`` writes the LLVM
IR.
"""
