"""Beam search within one graph: that of :mod:`tfgptj.generation.beams`, with the numbers of the export for all rows."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfgptj.generation import beams, loop
from tfgptj.generation.chain import Names, Numbers, build_chain
from tfgptj.serving.decoding import Continuation, Continued, Sampling, new_tokens, sound
from tfgptj.serving.requests import checked


class BeamContinuation(Continuation):
    """Continues rows by the best of several beams; of the numbers of each row it has no use."""

    def _chain(self) -> tuple[Names, Numbers]:
        return build_chain(self.config)

    def _continued(self, ids: Any, lengths: Any, sampling: Sampling) -> Continued:
        room, rules = new_tokens(self.config), beams.rules_of(self.config)
        ids, real = self._with_room(ids, lengths, room)
        controls = loop.Controls(
            processors=tuple(tuple(map(tf.constant, numbers)) for numbers in self._numbers),
            eos=tf.constant(self.config.eos_token_ids, "int32"),
            pad=tf.constant(self.pad_token, "int32"),
            limit=tf.constant(room, "int32"),
            uniforms=tf.zeros((tf.shape(ids)[0], room)),
            search=tf.constant(self.config.length_penalty, "float32"),
        )
        plan = loop.Plan(processors=self._names, search=rules)
        state = beams.prefill(self.model, plan, ids, real, controls)
        state = beams.decode(self.model, plan, state, controls.limit, controls)
        found = state.search.found
        tokens, parents = found.tokens[:: rules.beams], found.parents[:: rules.beams]  # [B, M], the best of each row
        lengths = tf.reduce_sum(tf.cast(parents >= 0, "int32"), axis=1)
        newest = tf.gather(tokens, lengths - 1, batch_dims=1)
        ended = tf.reduce_any(newest[:, None] == controls.eos, axis=1)
        tokens = checked(tokens[:, : tf.reduce_max(lengths)], lambda: sound(state))
        return Continued(tokens, lengths, ended)
