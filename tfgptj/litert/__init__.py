"""GPT-J in few bits on CPUs: LiteRT's kernels for the matrices, everything else as for the Keras models.

To follow a weight, convert → quantization → blocks → graph; to follow a token, model → attention → engine.
"""

from importlib.util import find_spec

from tfgptj.errors import BackendError

if find_spec("ai_edge_litert") is None:
    raise BackendError("LiteRT is not installed; get it with pip install 'tfgptj[litert]'")
