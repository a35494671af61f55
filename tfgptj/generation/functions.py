"""The caller's own functions between the logits and the choice; they run on the host, once a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfgptj.errors import GenerationError
from tfgptj.generation.chain import CUSTOM, PREFIX
from tfgptj.generation.tokens import FORBIDDEN

Processor = Callable[[np.ndarray, np.ndarray], Any]
AllowedTokens = Callable[[int, np.ndarray], Iterable[int]]


class Functions(NamedTuple):
    """The caller's logits processors, and the function that says which tokens may follow."""

    processors: tuple[Processor, ...] = ()
    prefix_allowed_tokens: AllowedTokens | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What :func:`tfgptj.generation.chain.build_chain` calls those that there are."""
        given = ((PREFIX, self.prefix_allowed_tokens is not None), (CUSTOM, bool(self.processors)))
        return tuple(name for name, there in given if there)

    def apply(self, name: str, texts: Sequence[np.ndarray], scores: np.ndarray, skipped: Any, beams: int = 1) -> Any:
        """The scores float32 [B, V] after the functions of this name.

        Args:
            name: one of `names`.
            texts: the tokens of each row, int32 [n], prompt included, padding not.
            scores: float32 [B, V].
            skipped: bool [B], rows that have ended: no function sees them.
            beams: rows for each prompt.

        Raises:
            GenerationError: for results of a wrong shape or range.
        """
        result = np.array(scores)
        for row in np.flatnonzero(~np.asarray(skipped)).tolist():
            if name == PREFIX:
                result[row] = self._only_allowed(row // beams, texts[row], scores[row])
            else:
                result[row] = self._processed(texts[row], scores[row])
        return result

    def _only_allowed(self, prompt: int, text: np.ndarray, scores: np.ndarray) -> np.ndarray:
        assert self.prefix_allowed_tokens is not None  # `names` says so
        allowed = np.asarray(list(self.prefix_allowed_tokens(prompt, text)))
        if not allowed.size:
            raise GenerationError(f"prefix_allowed_tokens_fn allows no token for row {prompt}: {text.tolist()}")
        if allowed.dtype.kind not in "iu" or allowed.min() < 0 or allowed.max() >= len(scores):
            raise GenerationError(f"prefix_allowed_tokens_fn must return token ids in 0…{len(scores) - 1}")
        result = np.full_like(scores, FORBIDDEN)
        result[allowed] = scores[allowed]
        return result

    def _processed(self, text: np.ndarray, scores: np.ndarray) -> np.ndarray:
        scores = np.where(scores <= FORBIDDEN / 2, np.float32("-inf"), scores)[None]
        for processor in self.processors:
            result = np.asarray(processor(text[None], scores))
            if result.shape != scores.shape or result.dtype.kind not in "fiu":
                raise GenerationError(
                    f"a logits processor must return scores of the shape {scores.shape}, as it was given; got "
                    f"{result.dtype} of the shape {result.shape}"
                )
            if np.isnan(result).any() or np.isposinf(result).any():
                raise GenerationError("a logits processor returned scores that are NaN or infinite")
            scores = result.astype("float32")
        return np.maximum(scores[0], FORBIDDEN)


def functions_of(logits_processor: Any, prefix_allowed_tokens_fn: Any) -> Functions:
    """What the caller gave, checked.

    Args:
        logits_processor: a function, a list of functions, or None.
        prefix_allowed_tokens_fn: a function, or None.

    Raises:
        GenerationError: for what cannot be called.
    """
    if prefix_allowed_tokens_fn is not None and not callable(prefix_allowed_tokens_fn):
        raise GenerationError(f"prefix_allowed_tokens_fn must be a function, got {prefix_allowed_tokens_fn!r}")
    return Functions(listed("logits_processor", logits_processor), prefix_allowed_tokens_fn)


def listed(name: str, given: Any) -> tuple[Any, ...]:
    """A function, several, or none, as a tuple.

    Raises:
        GenerationError: for what cannot be called.
    """
    # Hugging Face's lists of processors can be called themselves, so that a list must be looked for first.
    found = tuple(given) if isinstance(given, (list, tuple)) else () if given is None else (given,)
    for function in found:
        if not callable(function):
            raise GenerationError(f"{name} must be a function or a list of functions, got {function!r}")
    return found
