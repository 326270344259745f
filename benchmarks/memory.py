"""Peak memory of embedding the demo's passages, eager and compiled, each in a process of its own.

    python benchmarks/memory.py

The peak is the growth of the resident set's high-water mark from the loaded (or compiled) model on.
"""

import subprocess
import sys

CODE = """
import resource, sys, torch
from transformers import AutoModel, AutoTokenizer
from tilewright.cli.demo import minilm_folder, passages
model = AutoModel.from_pretrained(minilm_folder()).eval()
tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
texts = [text for _, text in passages()]
batches = [tokenizer(texts[i:i + 32], padding=True, truncation=True, max_length=512, return_tensors="pt")
           for i in range(0, len(texts), 32)]
if sys.argv[1] == "compiled":
    import tilewright
    model = tilewright.compile(model)
with torch.no_grad():
    model(**tokenizer(["warm"], return_tensors="pt"))
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for inputs in batches:
        model(**inputs)
print(base, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def main() -> None:
    """Prints both peaks in MiB."""
    for name in ("eager", "compiled"):
        text = subprocess.run([sys.executable, "-c", CODE, name], capture_output=True, text=True, check=True).stdout
        base, peak = map(int, text.split())
        print(f"{name:9s} before {base / 1024:8.1f} MiB   growth {(peak - base) / 1024:8.1f} MiB")


if __name__ == "__main__":
    main()
