"""Text in; text, labels, answers or features out.

One module per task. Importing this package loads neither Keras nor TensorFlow; `pipeline` does.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from tfgptj.errors import InputError

if TYPE_CHECKING:
    from tfgptj.pipelines.base import Pipeline

# Task to the class that does it, which lies in the module of the task's name.
TASKS = {
    "text-generation": "TextGenerationPipeline",
    "text-classification": "TextClassificationPipeline",
    "question-answering": "QuestionAnsweringPipeline",
    "feature-extraction": "FeatureExtractionPipeline",
}
ALIASES = {"sentiment-analysis": "text-classification"}


def pipeline(
    task: str,
    model: Any = None,
    tokenizer: Any = None,
    *,
    dtype: Any = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool | None = None,
    **options: Any,
) -> Pipeline:
    """Make a function of texts from a model and its tokenizer.

    Args:
        task: "text-generation", "text-classification" (or "sentiment-analysis"), "question-answering" or
            "feature-extraction".
        model: a model with that task's head; or a directory, a Hub id or the name of a packaged model. None takes the
            packaged model, which generates text and extracts features.
        tokenizer: a :class:`GPTJTokenizer`, or where to load one from; None loads the one beside the model.
        dtype: the dtype policy to load the model with.
        revision: branch, tag or commit of the model on the Hub; of a tokenizer that is named, the main branch is read.
        token, cache_dir, local_files_only: how to read from the Hub.
        **options: defaults for every call: see the `__call__` of the class that is returned.

    Returns:
        A `TextGenerationPipeline`, `TextClassificationPipeline`, `QuestionAnsweringPipeline` or
        `FeatureExtractionPipeline`.

    Raises:
        InputError: for an unknown task or option, or when a model or tokenizer is missing.
        InputTypeError: when the model has another head than the task needs.
        GenerationError: for a generation parameter that is unknown or out of range.
        CheckpointError, TokenizerError: when something cannot be loaded.

    >>> from tfgptj.config import GPTJConfig
    >>> from tfgptj.heads import TFGPTJForCausalLM
    >>> from tfgptj.tokenizer import GPTJTokenizer
    >>> model = TFGPTJForCausalLM(GPTJConfig(vocab_size=257, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    >>> generate = pipeline("text-generation", model, GPTJTokenizer.train(["abc"], vocab_size=257))
    >>> [result] = generate("To be,", max_new_tokens=3)
    >>> result["generated_text"].startswith("To be,")
    True
    """
    kind = pipeline_class(task)
    loading = {
        "dtype": dtype,
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    loading = {name: value for name, value in loading.items() if value is not None}
    kind.check_options(options)  # before anything is loaded, which may take minutes
    return kind(*kind.load(model, tokenizer, loading), **options)


def pipeline_class(task: str) -> type[Pipeline]:
    """The class that does a task.

    Raises:
        InputError: if there is no such task.
    """
    name = ALIASES.get(task, task) if isinstance(task, str) else task
    if name not in TASKS:
        raise InputError(f"unknown task {task!r}; there are {', '.join([*TASKS, *ALIASES])}")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    found: type[Pipeline] = getattr(module, TASKS[name])
    return found
