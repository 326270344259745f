"""GGUF files: read by mmap and checked, their configuration, names, tokenizer and weights."""
