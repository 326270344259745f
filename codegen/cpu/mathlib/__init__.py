"""Mathematical functions and CUDA's device library as LLVM IR functions of scalars and vectors."""
