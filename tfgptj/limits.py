"""Caps on what a file or a caller may ask for, each with its arithmetic.

They are far above every real GPT-J and far below what would exhaust a machine by accident: a damaged or hostile
``config.json`` is refused here, before anything is allocated.
"""

# Largest published GPT-J has 28 layers of width 4096; the largest dense transformers have about 130 of 20,000.
MAX_LAYERS = 1024
MAX_WIDTH = 2**17  # n_embd and n_inner: 131,072; one [D, D] float32 kernel is then 64 GiB
MAX_HEADS = 2**12
MAX_POSITIONS = 2**22
MAX_VOCAB = 2**24  # 16.8 million tokens; GPT-J has 50,400
MAX_LABELS = 2**20

# Token ids, positions and cache slots are int32 throughout.
MAX_ID = 2**31 - 1

# 10^12 parameters are 4 TB in float32: no machine that runs Keras on one host holds them.
MAX_PARAMETERS = 10**12

# config.json of the largest label maps is a few MB; anything above this is not a configuration.
MAX_JSON_BYTES = 64 * 2**20

# What lies beside the weights and is copied with them: configurations and tokenizers.
MAX_DOCUMENT_BYTES = MAX_JSON_BYTES

# safetensors' own limit on its header: 100 MB. A tensor takes a dozen values there, the 14,000 of 1024 layers 170,000;
# Python needs at most about 100 bytes for each while it reads them.
MAX_SAFETENSORS_HEADER = 100_000_000
MAX_SAFETENSORS_VALUES = 2**19

# PyTorch's pickle spends about 25 opcodes and 150 bytes on a tensor, GPT-J-6B's 342 tensors 9,000 and 50 kB; the 14,000
# of 1024 layers come to 350,000 and 2.1 MB. An opcode makes at most one object of some 80 bytes (an empty dict and the
# reference to it), and text takes up to four times its bytes: together at most 42 + 32 MiB while a pickle is read.
MAX_PICKLE_OPCODES = 2**19
MAX_PICKLE_BYTES = 8 * 2**20

# PyTorch's ZIP files have a member for each tensor and five or six more; their directory takes about 80 bytes for each.
MAX_ZIP_MEMBERS = 2**16
MAX_ZIP_DIRECTORY = MAX_ZIP_MEMBERS * 256  # bytes: 16 MiB
