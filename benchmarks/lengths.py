"""Fixed batches of sequence lengths, so that every figure names the same work."""

# Uniform draws with a mean of about 0.6 of the longest; written out so that no generator can change them.
LENGTHS = {
    # 16 sequences, longest 128, sum 1305 of 2048
    "batch16_longest128": (128, 121, 117, 110, 104, 98, 93, 87, 80, 74, 69, 62, 55, 46, 35, 26),
    # 8 sequences, longest 512, sum 2457 of 4096
    "batch8_longest512": (512, 450, 402, 340, 281, 221, 150, 101),
    # one sequence
    "batch1_length128": (128,),
    "batch1_length16": (16,),
}
