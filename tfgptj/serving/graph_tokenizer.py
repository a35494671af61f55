"""GraphTokenizer: GPTJTokenizer as TensorFlow operators, for tf.data and for graphs that are served."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfgptj import limits
from tfgptj.errors import InputError
from tfgptj.serving.added_tokens import CPU, MARK, PLAIN, AddedTokens, Pieces
from tfgptj.serving.merge_table import make_merge_table
from tfgptj.serving.merger import Merger
from tfgptj.serving.word_splitter import WordSplitter
from tfgptj.tokenizer import GPTJTokenizer
from tfgptj.vocabulary import byte_alphabet


class GraphTokenizer(tf.Module):
    """What GPTJTokenizer does, by TensorFlow's own operators alone: no Python, no TF-Text, no tables to initialise.

    All that it knows stands in constants, 2.5 MB for GPT-2's vocabulary. It works in any `tf.function`, in `tf.data`
    and in a SavedModel, always on the CPU. Text that is not UTF-8 is read as `bytes.decode("utf-8", "replace")` reads
    it.

    Texts of n bytes take O(n) memory, and rounds of O(n) time each, in which all words are merged at once: about eight
    for prose, and for GPT-2's vocabulary some twenty at most, however long a word without spaces is.

    Args:
        tokenizer: the tokenizer; what is changed in it afterwards has no effect here, and dropout is left out.
        max_bytes: the longest text that `encode` takes, in bytes of UTF-8.

    Raises:
        InputError: if `max_bytes` is below 1.
        TokenizerError: if an added token takes in the spaces beside it or must be a word of its own, if there are too
            many added tokens, or if the merges stand in an order that no training gives.

    Example:

    >>> tokenizer = GraphTokenizer(GPTJTokenizer.train(["low lower lowest"] * 9, vocab_size=262))
    >>> tokenizer.encode(["lower low<|endoftext|>", "low"]).to_list()
    [[257, 68, 81, 258, 261], [257]]
    >>> tokenizer.decode([[257, 68, 81], [257, 0, 0]], lengths=[3, 1]).numpy().tolist()
    [b'lower', b'low']

    In front of a model, or after it:

    >>> dataset = tf.data.Dataset.from_tensor_slices(["lower low", "low"]).batch(2).map(tokenizer.encode)
    >>> next(iter(dataset)).to_list()
    [[257, 68, 81, 258], [257]]
    """

    def __init__(self, tokenizer: GPTJTokenizer, max_bytes: int = limits.MAX_TEXT_BYTES) -> None:
        super().__init__(name="graph_tokenizer")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or not 1 <= max_bytes <= limits.MAX_ID:
            raise InputError(f"max_bytes is {max_bytes!r:.80}, expected an integer from 1 to {limits.MAX_ID}.")
        vocabulary = tokenizer.current_vocabulary()
        self.max_bytes = max_bytes
        self._adds_space = vocabulary.settings.add_prefix_space
        self._first_id = tokenizer.bos_token_id if vocabulary.settings.add_bos_token else None
        self._added = AddedTokens(vocabulary.added)
        self._words = WordSplitter()
        self._merger = Merger(make_merge_table(vocabulary.merges, vocabulary.base))
        byte_ids = {byte: vocabulary.base[char] for char, byte in byte_alphabet().items()}
        tokens = sorted(known := tokenizer.get_vocab(), key=known.__getitem__)
        skipped = np.isin(np.arange(len(tokens)), tokenizer.all_special_ids)
        with tf.device(CPU):
            self._byte_ids = tf.constant([byte_ids[byte] for byte in range(256)], tf.int32)
            self._token_bytes = tf.constant(vocabulary.bytes_of_tokens(tokens))
            self._skipped = tf.constant(skipped)

    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Turn texts into token ids, those of `GPTJTokenizer.encode`.

        Args:
            texts: string [B], UTF-8.

        Returns:
            Ragged int32 [B, None].

        Raises:
            tf.errors.InvalidArgumentError: if a text has more than `max_bytes` bytes.
        """
        with tf.device(CPU):
            texts = tf.convert_to_tensor(texts, tf.string)
            texts = tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")
            rows = tf.shape(texts, tf.int64)[0]
            check = tf.debugging.assert_less_equal(
                tf.strings.length(texts),
                self.max_bytes,
                f"A text has more than {self.max_bytes} bytes, the most that this graph takes. Send less.",
            )
            with tf.control_dependencies([check] if check is not None else []):  # None when run eagerly
                pieces = self._added.cut(texts)
            symbols, words, row_of_word = self._symbols(pieces)
            ids, words = self._merger.merge(symbols, words)
            ragged = tf.RaggedTensor.from_value_rowids(ids, tf.gather(row_of_word, words), rows, validate=False)
            if self._first_id is None:
                return ragged
            return tf.concat([tf.fill([rows, 1], self._first_id), ragged], axis=1)

    def _symbols(self, pieces: Pieces) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The token of each byte, or of an added token as a whole; the word each belongs to; and each word's row."""
        plain = pieces.tokens == PLAIN
        texts = pieces.texts
        if self._adds_space:
            lacks_space = plain & (texts != "") & (tf.strings.substr(texts, 0, 1) != " ")
            texts = tf.where(lacks_space, " " + texts, texts)
        texts = tf.where(plain, texts, MARK)
        data = tf.io.decode_raw(tf.strings.reduce_join(texts), tf.uint8)  # [N]
        piece = tf.repeat(tf.range(tf.size(texts)), tf.strings.length(texts))
        words, word_starts = self._words.split(data, piece)
        tokens = tf.gather(pieces.tokens, piece)
        symbols = tf.where(tokens == PLAIN, tf.gather(self._byte_ids, tf.cast(data, tf.int32)), tokens)
        return symbols, words, tf.gather(pieces.rows, tf.gather(piece, word_starts))

    def decode(self, ids: tf.Tensor, lengths: tf.Tensor, skip_special_tokens: bool = False) -> tf.Tensor:
        """Turn token ids into text; bytes that are not UTF-8 become U+FFFD, as in `GPTJTokenizer.decode`.

        Args:
            ids: int32 [B, T].
            lengths: int32 [B], how many ids of each row count.
            skip_special_tokens: whether to leave out the tokenizer's `all_special_ids`.

        Returns:
            String [B], UTF-8.

        Raises:
            tf.errors.InvalidArgumentError: if an id that counts is not one of the tokenizer's.
        """
        with tf.device(CPU):
            data = self.decode_bytes(ids, lengths, skip_special_tokens)
            return tf.strings.unicode_transcode(data, "UTF-8", "UTF-8", errors="replace")

    def decode_bytes(self, ids: tf.Tensor, lengths: tf.Tensor, skip_special_tokens: bool = False) -> tf.Tensor:
        """Turn token ids into the bytes that they stand for, string [B]; arguments and errors as in `decode`."""
        with tf.device(CPU):
            ids, lengths = tf.convert_to_tensor(ids, tf.int32), tf.convert_to_tensor(lengths, tf.int32)
            counts = tf.sequence_mask(lengths, tf.shape(ids)[1])  # [B, T]
            ids = tf.where(counts, ids, 0)
            count = self._token_bytes.shape[0]
            check = tf.debugging.assert_equal(
                tf.reduce_all((ids >= 0) & (ids < count)),
                True,
                f"A token id is not one of the tokenizer's {count} tokens (0 to {count - 1}).",
            )
            with tf.control_dependencies([check] if check is not None else []):
                shown = counts & ~tf.gather(self._skipped, ids) if skip_special_tokens else counts
            return tf.strings.reduce_join(tf.where(shown, tf.gather(self._token_bytes, ids), b""), axis=1)
