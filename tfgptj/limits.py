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
MAX_LABELS = 2**16  # the largest sets of labels have about 20,000

# Token ids, positions and cache slots are int32 throughout.
MAX_ID = 2**31 - 1

# 10^12 parameters are 4 TB in float32: no machine that runs Keras on one host holds them.
MAX_PARAMETERS = 10**12

# A config.json with the most labels has two maps of 65,536 entries, of which each takes two values and some 30 bytes:
# 4 MB. Python needs at most about 130 bytes for a value while it reads them.
MAX_JSON_BYTES = 8 * 2**20
MAX_JSON_VALUES = 2**19

# What lies beside the weights, tokenizers above all: the largest vocabularies make files of some 30 MB.
MAX_DOCUMENT_BYTES = 64 * 2**20

# A text to calibrate with: 4,096 of its 4 million tokens are taken, which lie in memory as a list until then.
MAX_CALIBRATION_BYTES = 16 * 2**20

# NumPy's own limits: on the dimensions of an array, and on its bytes, which it counts in 63 bits.
MAX_DIMENSIONS = 64
MAX_TENSOR_BYTES = 2**63 - 1

# A tensor takes about 130 bytes and a dozen values in a safetensors header, the 14,000 of 1024 layers 1.8 MB and
# 170,000 values. Python needs at most about 130 bytes for a value while it reads them, and text takes up to four times
# its bytes, twice: 34 MiB for either. The safetensors library allows 100 MB, from which hostile files make a gigabyte.
MAX_SAFETENSORS_HEADER = 4 * 2**20
MAX_SAFETENSORS_VALUES = 2**18

# The index of a sharded checkpoint has two values and about 80 bytes for a tensor.
MAX_INDEX_BYTES = 8 * 2**20
MAX_INDEX_VALUES = 2**18

# PyTorch's pickle spends about 25 opcodes and 150 bytes on a tensor, GPT-J-6B's 342 tensors 9,000 and 50 kB; the 14,000
# of 1024 layers come to 350,000 and 2.1 MB. An opcode makes at most one object of some 80 bytes (an empty dict and the
# reference to it), and text takes up to four times its bytes: together at most 42 + 32 MiB while a pickle is read.
MAX_PICKLE_OPCODES = 2**19
MAX_PICKLE_BYTES = 8 * 2**20
MAX_PICKLE_NAME = 256  # bytes of a line with a module's or a function's name; PyTorch's have at most 18

# PyTorch's ZIP files have a member for each tensor and five or six more; their directory takes about 80 bytes for each.
MAX_ZIP_MEMBERS = 2**16
MAX_ZIP_DIRECTORY = MAX_ZIP_MEMBERS * 256  # bytes: 16 MiB

# A whole tf_model.h5 has 10 groups and 10 datasets for a layer, 20,480 for 1024 layers, in groups 7 deep.
MAX_HDF5_OBJECTS = 3 * 2**13
MAX_HDF5_DEPTH = 16

# Hugging Face stores no chunks, but h5repack and h5py can: of some 256 KiB, and then GPT-J-6B has 95,000. A chunk takes
# as little as 10 bytes in the file, and about 400 bytes of memory while the file is open: at most 50 MiB.
MAX_HDF5_CHUNKS = 2**17

# A flax_model.msgpack has 20 keys for a layer, 20,480 for 1024 layers. GPT-J's longest name has 40 characters; one of
# 256 leads through 128 maps within each other at most, and no deeper the reader descends.
MAX_MSGPACK_KEYS = 2**15
MAX_MSGPACK_NAME = 256

# One line of a JSONL file, or one value of a CSV file. The longest documents of public corpora have some 10 MB. Parsing
# and tokenising take up to about 20 times as much for a moment: some 1.3 GB.
MAX_ROW_BYTES = 64 * 2**20

# What a served model takes in one request, unless an export says otherwise. GPT-J-6B keeps 459 kB of keys and values
# for a token in bfloat16: 7.5 GB for as many tokens. The attention scores of prompts of 2048 tokens come to
# 2 · 4 · 16 · 2048 bytes for a token: 4.3 GB.
MAX_SERVED_ROWS = 64
MAX_SERVED_TOKENS = 2**14  # rows times the slots of each: the longest prompt's and the longest continuation's

# A text that a graph takes in front of a model: GPT-J's 2,048 tokens of at most 128 bytes are 256 KiB. While it is cut
# into tokens, a byte takes about 100 bytes.
MAX_TEXT_BYTES = 2**20

# A model in one file for phones: Java maps at most 2 GiB - 1 at once.
MAX_TFLITE_BYTES = 2**31 - 1
