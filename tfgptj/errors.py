"""Every error that tfgptj raises on purpose.

All descend from :class:`TFGPTJError` and from the built-in class that a caller would expect, so that both
``except TFGPTJError`` and ``except ValueError`` work. Each message says what was wrong, where, what was expected and
how to mend it.
"""


class TFGPTJError(Exception):
    """Base class of all errors raised by tfgptj."""


class ConfigError(TFGPTJError, ValueError):
    """A configuration value is missing, of the wrong type, or contradicts another one."""


class InputError(TFGPTJError, ValueError):
    """Data given to a model or a tokenizer has a wrong shape, range or length."""


class InputTypeError(TFGPTJError, TypeError):
    """Data given to a model or a tokenizer is of a wrong type or dtype."""


class TokenizerError(TFGPTJError, ValueError):
    """Tokenizer files, tokens or text cannot be used."""


class CheckpointError(TFGPTJError, OSError):
    """A checkpoint cannot be found, read or written."""


class CheckpointFormatError(CheckpointError, ValueError):
    """A checkpoint file is damaged, or is not what its place or name promises."""


class UnsafeCheckpointError(CheckpointError, ValueError):
    """A checkpoint file asks for more than its tensors: for code to be run, or for other files to be read."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """A checkpoint is sound, but its tensors are not those that the configuration calls for."""


class GenerationError(TFGPTJError, ValueError):
    """A generation parameter is unknown, out of range, or cannot be combined with another one."""


class NonFiniteLogitsError(TFGPTJError, ArithmeticError):
    """The model produced NaN or infinite logits, or every token was forbidden."""


class NonFiniteLossError(TFGPTJError, ArithmeticError):
    """Training came to a loss, or to weights, that are NaN or infinite."""


class ResourceLimitError(TFGPTJError, MemoryError):
    """Something would take more memory than there is; nothing was allocated yet."""


class BackendError(TFGPTJError, RuntimeError):
    """A device or Keras backend lacks what was asked for."""


class ServerError(TFGPTJError, OSError):
    """A model server cannot be reached, refuses a request, or answers what it should not."""
