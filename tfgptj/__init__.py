"""GPT-J for TensorFlow and Keras 3.

Letters for dimensions, used in every shape comment:

    B batch · T new tokens (queries) · S key/value slots · D model width (n_embd) · N heads · H head width ·
    R rotary width · F feed-forward width · V vocabulary · L layers

To read the model, follow heads → backbone → block → attention → rotary; to follow a prompt, pipelines → generation →
heads; to follow a file, checkpoints/load → mapping → one reader.

Public names are imported on first use, so that `import tfgptj` loads neither Keras nor TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "GPTJConfig": "config",
    "GPTJTokenizer": "tokenizer",
    "GenerationConfig": "generation.config",
    "PrefixCache": "generation.prefix_cache",
    "TFGPTJModel": "backbone",
    "TFGPTJForCausalLM": "heads",
    "TFGPTJForSequenceClassification": "heads",
    "TFGPTJForQuestionAnswering": "heads",
    "pipeline": "pipelines",
    "TFGPTJError": "errors",
}

__all__ = [*_HOMES]  # noqa: PLE0604

if TYPE_CHECKING:
    from tfgptj.backbone import TFGPTJModel as TFGPTJModel
    from tfgptj.config import GPTJConfig as GPTJConfig
    from tfgptj.errors import TFGPTJError as TFGPTJError
    from tfgptj.generation.config import GenerationConfig as GenerationConfig
    from tfgptj.generation.prefix_cache import PrefixCache as PrefixCache
    from tfgptj.heads import TFGPTJForCausalLM as TFGPTJForCausalLM
    from tfgptj.heads import TFGPTJForQuestionAnswering as TFGPTJForQuestionAnswering
    from tfgptj.heads import TFGPTJForSequenceClassification as TFGPTJForSequenceClassification
    from tfgptj.pipelines import pipeline as pipeline
    from tfgptj.tokenizer import GPTJTokenizer as GPTJTokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tfgptj' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tfgptj.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
