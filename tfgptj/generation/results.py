"""What `generate` returns beside the tokens: scores, logits, hidden states, attentions of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from keras import ops

from tfgptj.errors import InputError
from tfgptj.generation.config import GenerationConfig
from tfgptj.generation.tokens import FORBIDDEN


@dataclass(frozen=True)
class GenerationOutput:
    """The result of `generate(return_dict_in_generate=True)`; what was not asked for is None.

    Shapes are Hugging Face's: tuples have one item for each new token. Prompts are aligned to the right, as if they had
    been padded on the left; what stands at padding says nothing. All arrays are NumPy's. With beams the rows of a step
    are all beams of all prompts, [B · K, …], in their places before it.

    Attributes:
        sequences: int32 [B, P + new], prompt included; B counts `num_return_sequences` too.
        scores: with `output_scores`, float32 [B, V] for each step, what the token was chosen by: logits after all
            processors, -inf for forbidden tokens.
        logits: with `output_logits`, float32 [B, V] for each step, as the model gave them.
        hidden_states: with `output_hidden_states`, for each step L + 1 arrays, of the prompt [B, P, D] and then
            [B, 1, D]: the input of each block, and the last hidden state.
        attentions: with `output_attentions`, for each step L arrays, [B, N, P, P] and then [B, N, 1, P + step].
        sequences_scores: of beams, float32 [B], the sum of the log-probabilities after the length penalty.
        beam_indices: of beams, int32 [B, new], the row of the scores that each token was chosen by, -1 after the end.
        model_steps: with drafts, how often the model was run, all rows together; without them it is run once a token.
        draft_steps: with an `assistant_model`, how often that was run.
    """

    sequences: np.ndarray
    scores: tuple[np.ndarray, ...] | None = None
    logits: tuple[np.ndarray, ...] | None = None
    hidden_states: tuple[tuple[np.ndarray, ...], ...] | None = None
    attentions: tuple[tuple[np.ndarray, ...], ...] | None = None
    sequences_scores: np.ndarray | None = None
    beam_indices: np.ndarray | None = None
    model_steps: int | None = None
    draft_steps: int | None = None


class Records:
    """What is kept of each step.

    Args:
        config: says what.
        rows: how many there are, without those of negative prompts.
        width: columns of the prompt as the caller gave it (P).
    """

    def __init__(self, config: GenerationConfig, rows: int, width: int) -> None:
        self._rows, self._width = rows, width
        wanted = config.return_dict_in_generate
        self.scores: list[np.ndarray] | None = [] if wanted and config.output_scores else None
        self.logits: list[np.ndarray] | None = [] if wanted and config.output_logits else None
        self.hidden_states: list[tuple[np.ndarray, ...]] | None = [] if wanted and config.output_hidden_states else None
        self.attentions: list[tuple[np.ndarray, ...]] | None = [] if wanted and config.output_attentions else None

    @property
    def recording(self) -> bool:
        """Whether hidden states or attentions are kept."""
        return self.hidden_states is not None or self.attentions is not None

    @property
    def wanted(self) -> bool:
        """Whether anything is kept."""
        return self.recording or self.scores is not None or self.logits is not None

    @property
    def so_far(self) -> tuple[np.ndarray, ...] | None:
        """The scores of the steps so far, if they are kept."""
        return None if self.scores is None else tuple(self.scores)

    def add(self, logits: Any, scores: Any, record: tuple[Any, ...], slot: int, step: int) -> None:
        """Keep what a step made.

        Args:
            logits: float32 [B, V], perhaps with the rows of negative prompts after them.
            scores: float32 [B, V].
            record: hidden states and attentions in turn, as :meth:`tfgptj.backbone.TFGPTJModel.step` records them.
            slot: the slots that are used.
            step: the new tokens so far.
        """
        if self.scores is not None:
            values = _numpy(scores)
            self.scores.append(np.where(values <= FORBIDDEN / 2, np.float32("-inf"), values))
        if self.logits is not None:
            self.logits.append(_numpy(logits)[: self._rows])
        queries = 1 if step else self._width
        if self.hidden_states is not None:
            states = (_numpy(x)[: self._rows] for x in record[::2])
            self.hidden_states.append(tuple(_last(x, 1, queries) for x in states))
        if self.attentions is not None:
            weights = (_numpy(x)[: self._rows, :, :, :slot] for x in record[1::2])
            self.attentions.append(tuple(_last(_last(x, 2, queries), 3, self._width + step) for x in weights))

    def put_together(self, parts: Sequence[Records]) -> None:
        """Take what was kept of each row by itself; rows that ended earlier than others have zeros there."""

        def rows(steps: Sequence[Any]) -> Any:
            there = next(step for step in steps if step is not None)
            if isinstance(there, tuple):
                return tuple(rows([None if step is None else step[i] for step in steps]) for i in range(len(there)))
            return np.concatenate([np.zeros_like(there) if step is None else step for step in steps])

        for name in ("scores", "logits", "hidden_states", "attentions"):
            if getattr(self, name) is not None:
                setattr(self, name, [rows(steps) for steps in zip_longest(*(getattr(part, name) for part in parts))])

    def output(self, sequences: np.ndarray) -> GenerationOutput:
        """All of it."""
        names = ("scores", "logits", "hidden_states", "attentions")
        kept: dict[str, Any] = {name: getattr(self, name) for name in names}
        found: dict[str, Any] = {name: tuple(values) for name, values in kept.items() if values is not None}
        return GenerationOutput(sequences, **found)


def _numpy(tensor: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(tensor))


def _last(array: np.ndarray, axis: int, count: int) -> np.ndarray:
    """The last `count` entries of an axis, with zeros before them where there are fewer."""
    missing = max(count - array.shape[axis], 0)
    padding = [(missing if i == axis else 0, 0) for i in range(array.ndim)]
    return np.pad(np.take(array, range(max(array.shape[axis] - count, 0), array.shape[axis]), axis=axis), padding)


def compute_transition_scores(
    sequences: Any, scores: Any, beam_indices: Any = None, normalize_logits: bool = False
) -> np.ndarray:
    """The score by which each new token was chosen.

    Args:
        sequences: int [B, P + new], as `generate` returned them.
        scores: for each new token float [B or B · beams, V], as `generate` returned them.
        beam_indices: of beams, int [B, new], as `generate` returned them.
        normalize_logits: whether to make log-probabilities of the scores.

    Returns:
        float32 [B, new]; with beams 0 after the end of a row, without them the score of the padding there.

    Raises:
        InputError: for arrays that do not belong together.

    >>> compute_transition_scores([[7, 1, 0]], [[[0.0, 2.0]], [[1.0, 0.0]]]).tolist()
    [[2.0, 1.0]]
    """
    sequences, values = np.asarray(sequences), np.stack([np.asarray(step, "float32") for step in scores])
    if normalize_logits:
        values = values - values.max(axis=-1, keepdims=True)
        values = values - np.log(np.exp(values).sum(axis=-1, keepdims=True))
    if beam_indices is None:
        indices = np.tile(np.arange(len(sequences))[:, None], (1, len(values)))
    else:
        indices = np.asarray(beam_indices)
        indices = indices[:, : int((indices >= 0).sum(axis=1).max())]
    steps = indices.shape[1]
    if sequences.ndim != 2 or len(indices) != len(sequences) or steps > min(len(values), sequences.shape[1]):
        raise InputError(
            f"sequences of the shape {sequences.shape}, {len(values)} steps of scores {values.shape[1:]} and choices "
            f"of the shape {indices.shape} do not belong together"
        )
    tokens = sequences[:, sequences.shape[1] - steps :]
    chosen = values[np.arange(steps), np.maximum(indices, 0), tokens]  # [B, new]
    return np.where(indices < 0, np.float32(0), chosen)
