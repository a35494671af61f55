"""The files of a byte-level BPE tokenizer, read and written, under Hugging Face's names and OpenAI's.

Only data is taken from files: tokens, merges, flags and a few settings. GPT-2's regular expression and byte-level
steps are rebuilt by :mod:`tfgptj.tokenizer`, so nothing that a file says is ever compiled or run, and a file that
calls for other steps is refused instead of being read approximately.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import AddedToken

from tfgptj import limits
from tfgptj.errors import TokenizerError
from tfgptj.files import parse_json, replaced_file
from tfgptj.vocabulary import ROLES, TOKEN_FLAGS, Vocabulary, as_list, check_count, checked_vocabulary, make_added_token

# GPT-2's tokenizer.json takes 1.4 MB, or 3.6 MB indented, for 50,257 tokens; the 2^19 tokens of the cap in
# vocabulary.py then take 38 MB.
MAX_FILE_BYTES = limits.MAX_DOCUMENT_BYTES

TOKENIZER_FILE = "tokenizer.json"
VOCAB_FILES = ("vocab.json", "encoder.json")  # Hugging Face's name, OpenAI's name
MERGES_FILES = ("merges.txt", "vocab.bpe")
ADDED_TOKENS_FILE = "added_tokens.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"

# The steps of a tokenizer.json and the kinds of each that GPT-2's byte-level BPE has; None is "no such step".
GPT2_STEPS = (
    ("normalizer", (None,)),
    ("pre_tokenizer", ("ByteLevel",)),
    ("decoder", ("ByteLevel", None)),
    ("post_processor", ("ByteLevel", None, "TemplateProcessing")),
)
# Settings of the BPE model that change how text is cut, and the values that leave GPT-2's algorithm alone. unk_token
# is not among them: it has no effect, because every byte has a token.
GPT2_MODEL = (
    ("type", ("BPE", None)),
    ("dropout", (None, 0)),
    ("continuing_subword_prefix", (None, "")),
    ("end_of_word_suffix", (None, "")),
    ("byte_fallback", (False, None)),
    ("ignore_merges", (False, None)),
)

Merges: TypeAlias = list[tuple[str, str]]
AddedTokens: TypeAlias = list[tuple[Any, AddedToken]]  # ids as they stand in a file, not yet checked


def read_vocabulary(directory: Path) -> Vocabulary:
    """Read and check the tokenizer in a directory: `tokenizer.json`, or else a vocabulary file and a merges file.

    Raises:
        TokenizerError: if files are missing, damaged, or not those of a byte-level BPE.
    """
    config = _read_optional_object(directory / CONFIG_FILE)
    if "added_tokens_decoder" not in config:  # where transformers writes that, it ignores the older file
        config = config | _read_optional_object(directory / SPECIAL_TOKENS_FILE)
    path = directory / TOKENIZER_FILE
    if path.is_file():
        content = _read_object(path)
        config = _settings_of_steps(path, content) | config
        base, merges, added = _parse_tokenizer_json(path, content)
    else:
        base, merges = _read_vocabulary_files(directory)
        added = _read_added_tokens(directory, config)
    return checked_vocabulary(directory, base, merges, added, config)


def _settings_of_steps(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Refuse steps that are not GPT-2's; return the settings that the steps of a tokenizer.json stand for."""
    steps = {name: _as_object(f"{path}: {name}", content.get(name) or {}) for name, _ in GPT2_STEPS}
    for name, kinds in GPT2_STEPS:
        _check_kind(f"{path}: {name}", steps[name].get("type"), kinds)
    _check_kind(f"{path}: pre_tokenizer.use_regex", steps["pre_tokenizer"].get("use_regex", True), (True,))
    settings = {"add_prefix_space": steps["pre_tokenizer"].get("add_prefix_space", False)}
    if steps["post_processor"].get("type") != "TemplateProcessing":
        return settings
    match steps["post_processor"].get("single"):  # transformers writes this template for add_bos_token=True
        case [{"SpecialToken": {"id": str(bos_token)}}, {"Sequence": {"id": "A"}}]:
            return settings | {"add_bos_token": True, "bos_token": bos_token}
    raise TokenizerError(f"{path}: the post_processor adds tokens to texts; only one bos_token in front is supported.")


def _check_kind(where: str, found: object, expected: tuple[object, ...]) -> None:
    if found not in expected:
        raise TokenizerError(
            f"{where} is {found!r:.80}, expected {' or '.join(map(repr, expected))}: "
            "only GPT-2's byte-level BPE can be loaded."
        )


def _parse_tokenizer_json(path: Path, content: dict[str, Any]) -> tuple[dict[str, int], Merges, AddedTokens]:
    model = _as_object(f"{path}: model", content.get("model"))
    for name, neutral in GPT2_MODEL:
        _check_kind(f"{path}: model.{name}", model.get(name), neutral)
    base = _as_object(f"{path}: model.vocab", model.get("vocab"))
    merges = as_list(f"{path}: model.merges", model.get("merges"))
    entries = as_list(f"{path}: added_tokens", content.get("added_tokens") or [])
    added = [
        (
            _as_object(f"{path}: added token {number}", entry).get("id"),
            make_added_token(f"{path}: added token {number}", entry),
        )
        for number, entry in enumerate(entries, 1)
    ]
    return base, _parse_merges(path, "merge", enumerate(merges, 1), base), added


def _read_vocabulary_files(directory: Path) -> tuple[dict[str, int], Merges]:
    vocab_path, merges_path = _existing(directory, VOCAB_FILES), _existing(directory, MERGES_FILES)
    base = _read_object(vocab_path)
    # Only "\n" ends a line: str.splitlines would also cut at characters that may stand inside a token.
    lines = enumerate((line.removesuffix("\r") for line in _read_text(merges_path).split("\n")), 1)
    ranked = ((number, line) for number, line in lines if line and not (number == 1 and line.startswith("#version")))
    return base, _parse_merges(merges_path, "line", ranked, base)


def _existing(directory: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise TokenizerError(
        f"{directory}: found no {' or '.join(names)}. A tokenizer is a {TOKENIZER_FILE}, "
        f"or a {' or '.join(VOCAB_FILES)} together with a {' or '.join(MERGES_FILES)}."
    )


def _parse_merges(path: Path, unit: str, entries: Iterable[tuple[int, Any]], base: dict[str, int]) -> Merges:
    merges: Merges = []
    for number, entry in entries:
        pair = entry.split(" ") if isinstance(entry, str) else entry
        # The tokens must be free of spaces, or merges.txt could not hold them.
        if not (isinstance(pair, list) and len(pair) == 2 and all(_is_one_word(part) for part in pair)):
            raise TokenizerError(f"{path}: {unit} {number}: expected two tokens and one space, got {entry!r:.80}.")
        for token in (*pair, "".join(pair)):
            if token not in base:
                raise TokenizerError(
                    f"{path}: {unit} {number}: the merge of {pair[0]!r:.80} and {pair[1]!r:.80} needs the token "
                    f"{token!r:.80}, which is not in the vocabulary."
                )
        merges.append((pair[0], pair[1]))
    check_count(path, "merges", len(merges))
    return merges


def _is_one_word(part: object) -> bool:
    return isinstance(part, str) and part.split() == [part]


def _read_added_tokens(directory: Path, config: dict[str, Any]) -> AddedTokens:
    """Added tokens with their flags from `tokenizer_config.json`, and those that only `added_tokens.json` has."""
    where = f"{directory / CONFIG_FILE}: added_tokens_decoder"
    added: dict[str, tuple[Any, AddedToken]] = {}
    for key, entry in _as_object(where, config.get("added_tokens_decoder", {})).items():
        if not (key.isascii() and key.isdigit() and len(key) <= len(str(limits.MAX_ID))):
            raise TokenizerError(f"{where}: {key!r:.80} is not a token id.")
        token = make_added_token(where, entry)
        added[token.content] = (int(key), token)
    path = directory / ADDED_TOKENS_FILE
    for content, token_id in _read_optional_object(path).items():
        added.setdefault(content, (token_id, make_added_token(str(path), content)))
    return list(added.values())


def _read_optional_object(path: Path) -> dict[str, Any]:
    return _read_object(path) if path.is_file() else {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(_read_text(path))
    except ValueError as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from error
    return _as_object(str(path), content)


def _read_text(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise TokenizerError(f"{path}: {size} bytes are more than the {MAX_FILE_BYTES} that a tokenizer file may have.")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 text: {error}") from error


def _as_object(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TokenizerError(f"{where}: expected a JSON object, got {value!r:.80}.")
    return value


def write_vocabulary(directory: Path, vocabulary: Vocabulary) -> None:
    """Write all of Hugging Face's files for a tokenizer, replacing each file in one step."""
    directory.mkdir(parents=True, exist_ok=True)
    base = dict(sorted(vocabulary.base.items(), key=lambda entry: entry[1]))
    beyond_base = {token.content: token_id for token_id, token in vocabulary.added.items() if token_id >= len(base)}
    merges = [" ".join(pair) for pair in vocabulary.merges]
    settings = vocabulary.settings._asdict()
    contents = {
        VOCAB_FILES[0]: _as_json(base),
        MERGES_FILES[0]: "\n".join(["#version: 0.2", *merges, ""]),
        TOKENIZER_FILE: _as_json(_tokenizer_json(vocabulary, base, merges)),
        SPECIAL_TOKENS_FILE: _as_json({role: settings[role] for role in ROLES if settings[role] is not None}),
        CONFIG_FILE: _as_json(_tokenizer_config(vocabulary)),
    }
    if beyond_base:
        contents[ADDED_TOKENS_FILE] = _as_json(beyond_base)
    else:  # one that an earlier tokenizer left here would be read as part of this one
        (directory / ADDED_TOKENS_FILE).unlink(missing_ok=True)
    for name, content in contents.items():
        with replaced_file(directory / name) as file:
            file.write(content.encode())


def _tokenizer_json(vocabulary: Vocabulary, base: dict[str, int], merges: list[str]) -> dict[str, Any]:
    settings = vocabulary.settings
    byte_level = {"type": "ByteLevel", "trim_offsets": False, "use_regex": True}
    processor: dict[str, Any] = byte_level | {"add_prefix_space": True}
    if settings.add_bos_token and settings.bos_token is not None:
        bos: dict[str, Any] = {"SpecialToken": {"id": settings.bos_token, "type_id": 0}}
        first, second = ({"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB"))
        bos_id = next(i for i, token in vocabulary.added.items() if token.content == settings.bos_token)
        details = {"id": settings.bos_token, "ids": [bos_id], "tokens": [settings.bos_token]}
        processor = {"type": "TemplateProcessing", "single": [bos, first], "pair": [bos, first, bos, second]}
        processor["special_tokens"] = {settings.bos_token: details}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": "", "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i} | _token_fields(token) for i, token in sorted(vocabulary.added.items())],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"add_prefix_space": settings.add_prefix_space},
        "post_processor": processor,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": model | {"vocab": base, "merges": merges},
    }


def _tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    settings = vocabulary.settings._asdict()
    if settings["model_max_length"] is None:  # absent is how transformers spells "no limit"
        del settings["model_max_length"]
    flags = {str(i): _token_fields(token) for i, token in sorted(vocabulary.added.items())}
    fixed = {"clean_up_tokenization_spaces": False, "errors": "replace", "tokenizer_class": "GPT2Tokenizer"}
    return settings | fixed | {"added_tokens_decoder": flags}


def _token_fields(token: AddedToken) -> dict[str, Any]:
    return {"content": token.content} | {flag: getattr(token, flag) for flag in TOKEN_FLAGS}


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
