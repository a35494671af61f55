"""TextStream: text from token ids as they come."""

from __future__ import annotations

import codecs
from typing import Any

from tfgptj.tokenizer import GPTJTokenizer


class TextStream:
    """Text from token ids as they come, never with half a character.

    The pieces that `put` and `end` return add up to what `decode` makes of all the ids. Each id costs the same,
    however many came before: bytes are kept back only until they complete a UTF-8 character.

    Args:
        tokenizer: the tokenizer that the ids are from.
        skip_special_tokens: as in `decode`.

    >>> tokenizer = GPTJTokenizer.train(["abc"], vocab_size=257)
    >>> stream = TextStream(tokenizer)
    >>> [stream.put(token_id) for token_id in tokenizer.encode("hé!")], stream.end()
    (['h', '', 'é', '!'], '')
    """

    def __init__(self, tokenizer: GPTJTokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, ids: Any) -> str:
        """Take an int, or a list, array or tensor [T] of ints; return the text that they complete."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids, self._skip_special_tokens))

    def copy(self) -> TextStream:
        """Another stream that has taken the same ids."""
        twin = TextStream(self._tokenizer, self._skip_special_tokens)
        twin._decoder.setstate(self._decoder.getstate())
        return twin

    def end(self) -> str:
        """Return the rest, U+FFFD for an incomplete character; the stream can then take another text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
