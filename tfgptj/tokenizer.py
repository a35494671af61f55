"""GPTJTokenizer: GPT-J's byte-level BPE, over the `tokenizers` library."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from tfgptj import batching
from tfgptj.errors import InputError, InputTypeError, TokenizerError
from tfgptj.tokenizer_files import read_vocabulary, write_vocabulary
from tfgptj.vocabulary import DEFAULT_SPECIAL_TOKEN, ROLES, SIDES, Vocabulary, check_text, train_vocabulary

# Spaces that a word-level tokenizer would have put in; source: transformers, `clean_up_tokenization`.
CLEAN_UPS = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


class _SpecialToken:
    """The text of a token with a role, or None; ordinary text must never turn into it, so it must be an added one."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._role = name

    def __get__(self, tokenizer: GPTJTokenizer, owner: type | None = None) -> str | None:
        return tokenizer._special[self._role]

    def __set__(self, tokenizer: GPTJTokenizer, token: str | None) -> None:
        if token is not None and token not in tokenizer.get_added_vocab():
            raise TokenizerError(
                f"{self._role} {token!r:.80} is not an added token of this tokenizer; use one of "
                f"{', '.join(list(tokenizer.get_added_vocab())[:3])} …, or None."
            )
        tokenizer._special[self._role] = token


class _SpecialTokenId:
    """The id of the token with a role, or None; read-only, it follows the token."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._role = name.removesuffix("_id")

    def __get__(self, tokenizer: GPTJTokenizer, owner: type | None = None) -> int | None:
        token = tokenizer._special[self._role]
        return None if token is None else tokenizer._id_of[token]

    def __set__(self, tokenizer: GPTJTokenizer, token_id: object) -> None:
        raise AttributeError(f"{self._role}_id cannot be set; set {self._role}.")


class GPTJTokenizer:
    """Text to token ids and back, exactly as GPT-2 and GPT-J were trained.

    Made by `from_pretrained`, `from_directory` or `train`. Any text can be encoded, and decoding gives it back.

    Args:
        vocabulary: a checked vocabulary.
        dropout: float from 0 to 1, the probability with which each merge is skipped.

    Attributes:
        model_max_length: int or None, where `truncation=True` cuts when no `max_length` is given.
        padding_side: "left" or "right"; generation wants "left".
        truncation_side: "left" or "right", the side that loses tokens.
        bos_token, eos_token, unk_token, pad_token: str or None; may be set to any added token. Without a pad token,
            padding uses eos_token: harmless, because the attention mask says what is padding.
        bos_token_id, eos_token_id, unk_token_id, pad_token_id: int or None, the ids of these tokens.

    Example:

    >>> tokenizer = GPTJTokenizer.train(["low lower lowest"] * 9, vocab_size=262)
    >>> tokenizer.encode("lower low<|endoftext|>")
    [257, 68, 81, 258, 261]
    >>> tokenizer.decode([257, 68, 81, 258, 261], skip_special_tokens=True)
    'lower low'
    >>> tokenizer(["low", "lower"], padding=True, padding_side="left", return_tensors="np")["attention_mask"].tolist()
    [[0, 0, 1], [1, 1, 1]]
    """

    bos_token, eos_token, unk_token, pad_token = (_SpecialToken() for _ in ROLES)
    bos_token_id, eos_token_id, unk_token_id, pad_token_id = (_SpecialTokenId() for _ in ROLES)

    def __init__(self, vocabulary: Vocabulary, dropout: float = 0.0) -> None:
        self._vocabulary = vocabulary
        settings = vocabulary.settings
        self._special: dict[str, str | None] = {role: getattr(settings, role) for role in ROLES}
        self.model_max_length = settings.model_max_length
        self.padding_side, self.truncation_side = settings.padding_side, settings.truncation_side
        self._id_of = vocabulary.base | {token.content: token_id for token_id, token in vocabulary.added.items()}
        self._token_of = sorted(self._id_of, key=self._id_of.__getitem__)
        self._bytes_of = vocabulary.bytes_of_tokens(self._token_of)
        self._flagged_ids = {token_id for token_id, token in vocabulary.added.items() if token.special}
        self._backend = _build_backend(vocabulary, dropout)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **hub_options: Any) -> GPTJTokenizer:
        """Load the tokenizer of a directory, a model on the Hugging Face Hub, or a packaged model.

        Args:
            name_or_path: a directory, a Hub id such as "EleutherAI/gpt-j-6b", or the name of a packaged model.
            **hub_options: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`.

        Raises:
            TokenizerError: if the files are missing, damaged, or not those of a byte-level BPE.
            CheckpointError: if the name cannot be resolved.
        """
        from tfgptj.checkpoints.hub import resolve_directory  # a higher level, needed by this method alone

        return cls.from_directory(resolve_directory(name_or_path, files="tokenizer", **hub_options))

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> GPTJTokenizer:
        """Load a tokenizer from files.

        Reads `tokenizer.json`, or else `vocab.json`, `merges.txt` and `added_tokens.json` (or OpenAI's `encoder.json`
        and `vocab.bpe`), then `tokenizer_config.json` and `special_tokens_map.json` where they exist. By default,
        `<|endoftext|>` is bos, eos and unk token if the vocabulary has it, and there is no pad token.

        Raises:
            TokenizerError: if the files are missing, damaged, or not those of a byte-level BPE.
        """
        return cls(read_vocabulary(Path(directory)))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        eos_token: str = DEFAULT_SPECIAL_TOKEN,
        extra_tokens: Sequence[str] = (),
        min_frequency: int = 2,
        model_max_length: int | None = None,
    ) -> GPTJTokenizer:
        """Train a byte-level BPE; the same texts always give the same tokenizer.

        Args:
            texts: the training texts; `eos_token` inside them separates texts and is not learnt from.
            vocab_size: 256 bytes, the merges, and `eos_token` with the last id; fewer if the corpus is small.
            eos_token: the end-of-text token, bos and unk token too.
            extra_tokens: tokens to add behind `eos_token`, such as GPT-J's `<|extratoken_1|>`.
            min_frequency: how often a pair of tokens must occur to be merged.
            model_max_length: the new tokenizer's `model_max_length`.

        Raises:
            InputError: if `vocab_size` is below 257, or an argument cannot be used.
            InputTypeError: if `texts` is one string, or does not yield strings.
            TokenizerError: if `eos_token` or an extra token is unusable.

        >>> GPTJTokenizer.train(["abc abc"], vocab_size=300, extra_tokens=["<pad>"]).get_vocab()["<pad>"]
        259
        """
        return cls(train_vocabulary(texts, vocab_size, eos_token, extra_tokens, min_frequency, model_max_length))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write all files that tfgptj and Hugging Face's GPT2Tokenizer and GPT2TokenizerFast read.

        The directory is made if needed. Each file is written beside its place and then renamed, so a crash never
        leaves half a file. Dropout belongs to a training run and is not written.

        Raises:
            OSError: if the directory cannot be written.
        """
        write_vocabulary(Path(directory), self.current_vocabulary())

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Save all files and upload them: see :func:`tfgptj.checkpoints.push.push_to_hub`."""
        from tfgptj.checkpoints.push import push_to_hub

        return push_to_hub(self, repo_id, **options)

    def with_dropout(self, dropout: float) -> GPTJTokenizer:
        """Return a copy that skips each BPE merge with a probability, which varies training data.

        The random numbers are those of the `tokenizers` library, which cannot be seeded. Source: BPE-Dropout,
        Provilkov et al. 2020.

        Args:
            dropout: float from 0 (none; a plain copy) to 1 (bytes only).

        Raises:
            InputError: if `dropout` is not from 0 to 1.
        """
        if not isinstance(dropout, Real) or not 0 <= dropout <= 1:
            raise InputError(f"dropout is {dropout!r}, expected a probability from 0 to 1.")
        return type(self)(self.current_vocabulary(), dropout)

    def __len__(self) -> int:
        """All tokens, added ones included: 50,400 for GPT-J."""
        return len(self._token_of)

    @property
    def vocab_size(self) -> int:
        """Tokens without those that were added behind the BPE model's: 50,257 for GPT-J, as in Hugging Face."""
        return len(self._vocabulary.base)

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs of tokens that BPE joins, most important first."""
        return list(self._vocabulary.merges)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that `skip_special_tokens=True` leaves out: tokens flagged as special or named for a role."""
        return sorted(self._special_ids())

    def get_vocab(self) -> dict[str, int]:
        """Return all tokens and their ids, added ones included."""
        return dict(self._id_of)

    def get_added_vocab(self) -> dict[str, int]:
        """Return the added tokens and their ids; they are found in a text before it is cut into words."""
        return {token.content: token_id for token_id, token in sorted(self._vocabulary.added.items())}

    def convert_ids_to_tokens(self, ids: Any) -> str | list[str]:
        """Return the token of an int, or the list of tokens of several; in GPT-2's byte alphabet."""
        tokens = [self._token_of[token_id] for token_id in self._checked_ids(ids)]
        return tokens[0] if np.ndim(ids) == 0 else tokens

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int]:
        """Return the id of a token, or the list of ids of several.

        Raises:
            TokenizerError: if there is no such token (Hugging Face would return the id of `unk_token`).
        """
        ids = []
        for token in [tokens] if isinstance(tokens, str) else tokens:
            if token not in self._id_of:
                raise TokenizerError(f"{token!r:.80} is not one of the {len(self)} tokens.")
            ids.append(self._id_of[token])
        return ids[0] if isinstance(tokens, str) else ids

    def encode(
        self, text: str, *, add_special_tokens: bool = True, truncation: bool = False, max_length: int | None = None
    ) -> list[int]:
        """Turn a text into token ids.

        Args:
            text: any string without lone surrogates.
            add_special_tokens: whether bos_token goes in front, if the files say `add_bos_token` (GPT-J's do not).
            truncation: whether to keep at most `max_length` tokens.
            max_length: int; None means `model_max_length`.

        Returns:
            List of int; empty for the empty text.

        Raises:
            InputTypeError: if `text` is not a string.
            TokenizerError: if `text` holds a lone surrogate.
            InputError: if `max_length` is below 1, missing, or given without effect.
        """
        check_text("text", text)
        length = batching.length_in_use(truncation, False, max_length, self.model_max_length)
        return self._encode_rows([text], add_special_tokens, length, self.truncation_side)[0]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        padding_side: str | None = None,
        truncation_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
    ) -> dict[str, Any]:
        """Turn one text or a batch of texts into a model's inputs.

        Args:
            text: a string, or a list or tuple of B strings.
            add_special_tokens: as in `encode`.
            padding: True or "longest" fills up to the longest row, "max_length" up to `max_length`.
            truncation: whether to keep at most `max_length` tokens of each row.
            max_length: int; None means `model_max_length`.
            padding_side: "left" or "right", None for the tokenizer's own.
            truncation_side: "left" or "right", None for the tokenizer's own.
            pad_to_multiple_of: int, rounds the width of padded rows up.
            return_tensors: "np" or "tf" for int32 arrays, None for lists.
            return_attention_mask: whether to return `attention_mask` too.

        Returns:
            `input_ids` and `attention_mask` (1 for a token, 0 for padding): [B, T] for a batch or for tensors, a
            flat list for one string.

        Raises:
            InputTypeError: if `text` is neither a string nor a list of strings.
            TokenizerError: if a text holds a lone surrogate, or there is nothing to pad with.
            InputError: if the batch is empty, an option is invalid or without effect, or an array's rows would differ.
        """
        batching.check_choice("return_tensors", return_tensors, batching.TENSOR_TYPES)
        texts = batching.texts_of(text)
        length = batching.length_in_use(truncation, padding, max_length, self.model_max_length)
        kept = length if truncation else None
        ids = self._encode_rows(texts, add_special_tokens, kept, truncation_side or self.truncation_side)
        masks = [[1] * len(row) for row in ids]
        if padding:
            shortest = (length or 0) if padding == "max_length" else 0
            width = batching.padded_width(ids, shortest, pad_to_multiple_of)
            ids, masks = batching.pad(ids, width, self._fill_id(), padding_side or self.padding_side)
        elif pad_to_multiple_of is not None:
            raise InputError("pad_to_multiple_of needs padding=True or padding='max_length' to have an effect.")
        batch = {"input_ids": ids} | ({"attention_mask": masks} if return_attention_mask else {})
        if return_tensors is not None:
            return batching.as_tensors(batch, return_tensors)
        return {name: rows[0] for name, rows in batch.items()} if isinstance(text, str) else batch

    def decode(self, ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False) -> str:
        """Turn token ids into text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: an int, or a list, array or tensor [T] of ints.
            skip_special_tokens: whether to leave out the tokens of `all_special_ids`.
            clean_up_tokenization_spaces: whether to remove spaces before punctuation, as Hugging Face can. Lossy.

        Raises:
            TokenizerError: if an id is not one of the tokenizer's.
            InputTypeError: if `ids` are not integers or have more than one axis.
        """
        text = self.decode_bytes(ids, skip_special_tokens).decode("utf-8", errors="replace")
        if clean_up_tokenization_spaces:
            for spaced, clean in CLEAN_UPS:
                text = text.replace(spaced, clean)
        return text

    def decode_bytes(self, ids: Any, skip_special_tokens: bool = False) -> bytes:
        """Turn token ids into the bytes that they stand for; arguments and errors as in `decode`."""
        skipped = self._special_ids() if skip_special_tokens else ()
        return b"".join([self._bytes_of[token_id] for token_id in self._checked_ids(ids) if token_id not in skipped])

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> list[str]:
        """Decode each row of a list or array [B, T]; arguments and errors as in `decode`."""
        rows = sequences if isinstance(sequences, list | tuple) else np.asarray(sequences)
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in rows]

    def current_vocabulary(self) -> Vocabulary:
        """Return the vocabulary with the settings as they are now."""
        batching.check_choice("padding_side", self.padding_side, SIDES)
        batching.check_choice("truncation_side", self.truncation_side, SIDES)
        names = (*ROLES, "model_max_length", "padding_side", "truncation_side")
        current = {name: getattr(self, name) for name in names} | {"add_bos_token": bool(self._leading_ids())}
        return replace(self._vocabulary, settings=self._vocabulary.settings._replace(**current))

    def _encode_rows(
        self, texts: list[str], add_special_tokens: bool, length: int | None, side: str
    ) -> list[list[int]]:
        front = self._leading_ids() if add_special_tokens else []
        rows = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        if length is not None:
            rows = [batching.truncate(row, length - len(front), side) for row in rows]
        return [front + row for row in rows]

    def _leading_ids(self) -> list[int]:
        return [bos] if self._vocabulary.settings.add_bos_token and (bos := self.bos_token_id) is not None else []

    def _fill_id(self) -> int:
        fill = self.eos_token_id if self.pad_token_id is None else self.pad_token_id
        if fill is None:
            raise TokenizerError("There is neither a pad_token nor an eos_token to pad with; set tokenizer.pad_token.")
        return fill

    def _special_ids(self) -> set[int]:
        return self._flagged_ids | {self._id_of[token] for token in self._special.values() if token is not None}

    def _checked_ids(self, ids: Any) -> list[int]:
        try:
            array = np.asarray(ids)
        except (TypeError, ValueError, NotImplementedError) as error:  # ragged lists, symbolic tensors
            raise InputTypeError(f"ids cannot be read as an array of integers: {error}") from error
        if array.ndim > 1 or (array.size and array.dtype.kind not in "iu"):
            raise InputTypeError(
                f"ids have {array.ndim} axes and dtype {array.dtype}, expected integers along one axis. "
                "For a batch, use batch_decode."
            )
        if array.size and not 0 <= array.min() <= array.max() < len(self):
            bad = int(array.min() if array.min() < 0 else array.max())
            raise TokenizerError(f"Token id {bad} is not one of the {len(self)} tokens (0 to {len(self) - 1}).")
        checked: list[int] = array.reshape(-1).tolist()
        return checked


def _build_backend(vocabulary: Vocabulary, dropout: float) -> Tokenizer:
    backend = Tokenizer(BPE(vocabulary.base, vocabulary.merges, dropout=float(dropout) or None))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=vocabulary.settings.add_prefix_space)
    # In order of id, all at once: ids come out as checked, and the index of added tokens is built a single time.
    backend.add_tokens([token for _, token in sorted(vocabulary.added.items())])
    return backend
