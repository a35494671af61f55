"""GPT-J in few bits on CPUs: LiteRT's kernels for the matrices, everything else as for the Keras models.

To follow a weight, convert → quantization → blocks → graph; to follow a token, model → engine → attention.
"""
