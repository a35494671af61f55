"""The vocabulary of a byte-level BPE tokenizer: its parts, the checks that they fit together, and training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from tfgptj import limits
from tfgptj.errors import InputError, InputTypeError, TokenizerError

# GPT-J has 50,400 tokens and the largest published vocabularies about 262,000; 2^19 is twice those. A merge makes
# one token, so merges have the same cap.
MAX_TOKENS = 2**19
# transformers writes 10^30 for "no limit" and reads anything above 10^20 so.
UNLIMITED_LENGTH = 10**20

DEFAULT_SPECIAL_TOKEN = "<|endoftext|>"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SIDES = ("left", "right")


class TokenizerSettings(NamedTuple):
    """How a tokenizer uses its vocabulary: the fields of `tokenizer_config.json` that tfgptj knows."""

    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    pad_token: str | None = None
    model_max_length: int | None = None
    padding_side: str = "right"
    truncation_side: str = "right"
    add_prefix_space: bool = False
    add_bos_token: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """A checked vocabulary.

    `base` maps the BPE model's tokens to their ids, 0 to n - 1; `merges` stand in the order of their rank; `added`
    maps an id to a token that is found in a text before the text is cut into words. An added token either stands in
    `base` too, with the same id, or has one of the ids from n on.
    """

    base: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[int, AddedToken]
    settings: TokenizerSettings

    def bytes_of_tokens(self, tokens: list[str]) -> list[bytes]:
        """Return the bytes that each token stands for; `tokens` are all tokens in the order of their ids.

        An added token stands for its own text, even where its characters belong to the byte alphabet.
        """
        byte_of = byte_alphabet()
        return [
            token.encode()
            if token_id in self.added or not byte_of.keys() >= set(token)
            else bytes(map(byte_of.__getitem__, token))
            for token_id, token in enumerate(tokens)
        ]


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's printable stand-in for each of the 256 bytes, as character -> byte.

    Printable Latin-1 characters stand for themselves, the other bytes take the code points from 256 on.
    Source: openai/gpt-2, encoder.py, `bytes_to_unicode`.

    >>> byte_alphabet()["A"], byte_alphabet()["Ġ"]
    (65, 32)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def checked_vocabulary(
    source: Path | str,
    base: dict[str, int],
    merges: list[tuple[str, str]],
    added: Iterable[tuple[int, AddedToken]],
    config: Mapping[str, Any],
) -> Vocabulary:
    """Check that the parts of a vocabulary fit together.

    Args:
        source: what error messages name as the origin.
        base: the BPE model's tokens and ids.
        merges: pairs of tokens, already known to be in `base` together with their joins.
        added: ids and added tokens; the special tokens that `config` names need not be among them.
        config: fields of a `tokenizer_config.json`.

    Returns:
        The vocabulary, its special tokens all among `added`.

    Raises:
        TokenizerError: if ids clash, leave gaps or are out of range, if one of the 256 bytes has no token, or if the
            settings are unusable.
    """
    _check_base(source, base)
    added = list(added)
    token_of = {token.content: token for _, token in added}
    names: dict[str, str | None] = dict.fromkeys(ROLES)
    for role, token in _named_tokens(source, config, base.keys() | token_of.keys()):
        if role in names:
            names[role] = token.content
        if token.content in token_of:
            token_of[token.content].special = True
        elif token.content in base:
            token_of[token.content] = token
            added.append((base[token.content], token))
        else:
            raise TokenizerError(f"{source}: {role} is {token.content!r:.80}, which is not a token of the vocabulary.")
    return Vocabulary(base, merges, _added_by_id(source, base, added), _checked_settings(source, config, names))


def train_vocabulary(
    texts: Iterable[str],
    vocab_size: int,
    eos_token: str,
    extra_tokens: Sequence[str],
    min_frequency: int,
    model_max_length: int | None,
) -> Vocabulary:
    """Learn a vocabulary; see :meth:`tfgptj.GPTJTokenizer.train`."""
    if isinstance(texts, str):
        raise InputTypeError("texts is one str, whose characters would be the texts. Pass a list of str.")
    check_text("eos_token", eos_token)
    alphabet = sorted(byte_alphabet())
    for name, value, least in (("vocab_size", vocab_size, len(alphabet) + 1), ("min_frequency", min_frequency, 0)):
        if not isinstance(value, int) or not least <= value <= MAX_TOKENS:
            raise InputError(f"{name} is {value!r:.80}, expected an integer from {least} to {MAX_TOKENS}.")
    if not eos_token:
        raise InputError("eos_token is empty.")
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=min_frequency, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(_pieces_between(texts, eos_token), trainer)
    model = json.loads(learner.to_str())["model"]
    base: dict[str, int] = model["vocab"]
    if eos_token in base:
        raise InputError(
            f"eos_token {eos_token!r} is also learnt as a part of words; choose one that no text contains."
        )
    base[eos_token] = len(base)
    added = [(len(base) + i, make_added_token(f"extra_tokens[{i}]", token)) for i, token in enumerate(extra_tokens)]
    merges = [(first, second) for first, second in model["merges"]]
    config = dict.fromkeys(ROLES[:3], eos_token) | {"model_max_length": model_max_length}
    return checked_vocabulary("train", base, merges, added, config)


def _pieces_between(texts: Iterable[str], separator: str) -> Iterator[str]:
    # The end of a text is a token of its own later, so its characters must not be learnt from.
    for text in texts:
        check_text("An item of texts", text)
        yield from text.split(separator)


def make_added_token(where: str, entry: object, special: bool = False) -> AddedToken:
    """Make an added token from its text, or from a JSON object of its text and flags.

    Raises:
        TokenizerError: if the text or a flag is missing or of a wrong type.
    """
    fields = entry if isinstance(entry, dict) else {"content": entry}
    content = fields.get("content")
    if not isinstance(content, str):
        raise TokenizerError(f"{where}: expected a token's text, got {content!r:.80}.")
    _check_token(where, content)
    flags = {name: as_bool(f"{where}: {name}", fields[name]) for name in TOKEN_FLAGS if name in fields}
    return AddedToken(content, **(flags | {"special": special or flags.get("special", False)}))


def check_text(name: str, text: object) -> None:
    """Raise an error that begins with `name`, unless `text` is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise InputTypeError(f"{name} is of type {type(text).__name__}, expected a str.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{name} holds the lone surrogate {text[error.start]!r} at position {error.start}, which no text file "
            "could hold. Replace it, or read the source with errors='replace'."
        ) from error


def as_bool(where: str, value: object) -> bool:
    """Return `value` if it is a bool, else raise a TokenizerError that names `where`."""
    if not isinstance(value, bool):
        raise TokenizerError(f"{where} is {value!r:.80}, expected true or false.")
    return value


def as_list(where: str, value: object) -> list[Any]:
    """Return `value` if it is a list, else raise a TokenizerError that names `where`."""
    if not isinstance(value, list):
        raise TokenizerError(f"{where}: expected a JSON list, got {value!r:.80}.")
    return value


def check_count(source: Path | str, what: str, count: int) -> None:
    """Raise a TokenizerError if there are more tokens or merges than any real tokenizer has."""
    if count > MAX_TOKENS:
        raise TokenizerError(f"{source}: {count} {what} are more than the {MAX_TOKENS} that tfgptj accepts.")


def _check_base(source: Path | str, base: dict[str, int]) -> None:
    check_count(source, "tokens", len(base))
    token_of: dict[int, str] = {}
    for token, token_id in base.items():
        _check_token(source, token)
        _check_id(source, token, token_id)
        if token_of.setdefault(token_id, token) is not token:
            raise TokenizerError(f"{source}: {token_of[token_id]!r:.80} and {token!r:.80} both have the id {token_id}.")
    _check_no_gap(source, token_of.keys(), 0)
    missing = [byte for char, byte in byte_alphabet().items() if char not in base]
    if missing:
        raise TokenizerError(
            f"{source}: {len(missing)} of the 256 bytes have no token in the vocabulary (first {min(missing):#04x}), "
            "so some texts could not be encoded."
        )


def _added_by_id(
    source: Path | str, base: dict[str, int], added: list[tuple[int, AddedToken]]
) -> dict[int, AddedToken]:
    check_count(source, "tokens", len(base.keys() | {token.content for _, token in added}))
    by_id: dict[int, AddedToken] = {}
    contents: set[str] = set()
    for token_id, token in added:
        _check_id(source, token.content, token_id)
        if token_id in by_id or token.content in contents:
            raise TokenizerError(f"{source}: the added token {token.content!r:.80} or its id {token_id} comes twice.")
        if base.get(token.content, max(token_id, len(base))) != token_id:
            expected = base.get(token.content, f"{len(base)} or more, after those of the vocabulary")
            raise TokenizerError(
                f"{source}: the added token {token.content!r:.80} has the id {token_id}, expected {expected}."
            )
        by_id[token_id] = token
        contents.add(token.content)
    _check_no_gap(source, {token_id for token_id in by_id if token_id >= len(base)}, len(base))
    return by_id


def _check_token(where: Path | str, token: str) -> None:
    if not token or any("\ud800" <= char <= "\udfff" for char in token):
        raise TokenizerError(f"{where}: {token!r:.80} cannot be a token: it is empty or holds a lone surrogate.")


def _check_id(where: Path | str, token: str, token_id: object) -> None:
    if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id <= limits.MAX_ID:
        raise TokenizerError(
            f"{where}: the id of {token!r:.80} is {token_id!r:.80}, expected an integer from 0 to {limits.MAX_ID}."
        )


def _check_no_gap(source: Path | str, ids: Iterable[int], first: int) -> None:
    taken = set(ids)
    gaps = set(range(first, first + len(taken))) - taken
    if gaps:
        raise TokenizerError(f"{source}: no token has the id {min(gaps)}, but there are tokens with higher ids.")


def _named_tokens(source: Path | str, config: Mapping[str, Any], contents: Set[str]) -> list[tuple[str, AddedToken]]:
    """The special tokens that a configuration names, each with its role."""
    # The default is Hugging Face's, but it never names a token that the vocabulary does not have.
    default = DEFAULT_SPECIAL_TOKEN if DEFAULT_SPECIAL_TOKEN in contents else None
    entries = [(role, config.get(role, None if role == "pad_token" else default)) for role in ROLES]
    more = "additional_special_tokens"
    entries += [(more, entry) for entry in as_list(f"{source}: {more}", config.get(more) or [])]
    return [
        (role, make_added_token(f"{source}: {role}", entry, special=True))
        for role, entry in entries
        if entry is not None
    ]


def _checked_settings(source: Path | str, config: Mapping[str, Any], names: dict[str, Any]) -> TokenizerSettings:
    length = config.get("model_max_length")
    if length is not None:
        if isinstance(length, bool) or not isinstance(length, int | float) or length < 1 or length % 1:
            raise TokenizerError(f"{source}: model_max_length is {length!r:.80}, expected a whole number from 1 on.")
        length = None if length > UNLIMITED_LENGTH else int(length)
    checked: dict[str, Any] = {name: config.get(name, "right") for name in ("padding_side", "truncation_side")}
    for name, side in checked.items():
        if side not in SIDES:
            raise TokenizerError(f"{source}: {name} is {side!r:.80}, expected 'left' or 'right'.")
    for name in ("add_prefix_space", "add_bos_token"):
        checked[name] = as_bool(f"{source}: {name}", config.get(name, False))
    if checked["add_bos_token"] and names["bos_token"] is None:
        raise TokenizerError(f"{source}: add_bos_token is true, but there is no bos_token to add.")
    return TokenizerSettings(model_max_length=length, **names, **checked)
