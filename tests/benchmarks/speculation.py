"""Steps and time with drafts and without, on texts that repeat their prompt more or less.

    python tests/benchmarks/speculation.py [--width 2048] [--layers 8] [--new 96] [--drafts 10] [--rounds 5] [--xla]

The model has random weights and does all of a GPT-J's work; its embedding and head are made such that it writes a text
that is known beforehand (see tests/successors.py). The prompt is a passage of 96 tokens that all differ, and the text
is one of these:

- `copied`: the passage again, as in a quotation;
- `edited`: the passage with every eighth token exchanged, as when text or code is corrected;
- `new`: tokens that the prompt has not, so that nothing can be drafted;
- `misled`: the tokens of the passage in another order, so that drafts are always made and never right.

For `edited` there is also an assistant, a model of a quarter of the width and half of the layers that knows seven of
eight tokens. All ways take turns in every round, so that all meet the same neighbours on the machine. Times are those
of a token after the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfgptj.config import GPTJConfig
from tfgptj.heads import TFGPTJForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from successors import teach

PASSAGE = 96
OTHERS = 20_000  # tokens from here on are not in the passage


def texts(passage: Sequence[int]) -> dict[str, list[int]]:
    """What is written after the passage: each text is a circle, so that it has any length."""
    edited = [token if place % 8 else OTHERS + place for place, token in enumerate(passage)]
    shuffled = np.random.default_rng(1).permutation(passage).tolist()
    return {
        "copied": list(passage),
        "edited": edited,
        "new": list(range(2 * OTHERS, 2 * OTHERS + 1000)),
        "misled": shuffled,
    }


def successors_of(vocabulary: int, last: int, text: Sequence[int]) -> list[int]:
    """A text that begins after the token `last`, and begins again at its end."""
    found = list(range(vocabulary))
    for token, following in zip(text, [*text[1:], text[0]], strict=True):
        found[token] = following
    if last not in text:
        found[last] = text[0]
    return found


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def new_model(width: int, layers: int, dtype: str) -> TFGPTJForCausalLM:
    config = GPTJConfig(n_embd=width, n_layer=layers, n_head=max(width // 256, 1), eos_token_id=None)
    return TFGPTJForCausalLM(config, dtype=dtype)


class Way:
    """One way to generate one text.

    Args:
        model: that writes it.
        prompt: int [1, P].
        text: what it must write.
        options: of the run.
        parameters: the drafts.
    """

    def __init__(
        self, model: TFGPTJForCausalLM, prompt: Any, text: list[int], options: argparse.Namespace, **parameters: Any
    ) -> None:
        self.model, self.prompt, self.new, self.text = model, prompt, options.new, text
        self.parameters = {**parameters, "jit_compile": options.xla or None}
        self.times: list[float] = []

    def check(self) -> int:
        """The steps that it takes; the text must be the one that is known."""
        parameters = {**self.parameters, "return_dict_in_generate": True, "max_new_tokens": self.new}
        output = self.model.generate(self.prompt, **parameters)
        place = self.text.index(output.sequences[0, self.prompt.shape[1]])
        expected = [self.text[(place + i) % len(self.text)] for i in range(self.new)]
        assert output.sequences[0, self.prompt.shape[1] :].tolist() == expected
        return output.model_steps or self.new

    def measure(self) -> None:
        long, short = (
            seconds(lambda new=new: self.model.generate(self.prompt, max_new_tokens=new, **self.parameters))
            for new in (self.new, 1)
        )
        self.times.append(1e3 * (long - short) / (self.new - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 2048, "layers": 8, "new": 96, "drafts": 10, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--xla", action="store_true")
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    model = new_model(options.width, options.layers, options.dtype)
    passage = np.random.default_rng(0).permutation(OTHERS)[:PASSAGE].tolist()
    prompt, vocabulary = np.array([passage]), model.config.vocab_size
    for name, text in texts(passage).items():
        teach(model, successors_of(vocabulary, passage[-1], text))
        drafts: dict[str, dict[str, Any]] = {
            "plain": {},
            "lookup": {"prompt_lookup_num_tokens": options.drafts},
        }
        if name == "edited":
            assistant = new_model(options.width // 4, options.layers // 2, options.dtype)
            known = [token if place % 8 else OTHERS // 2 + place for place, token in enumerate(text)]
            wrong = dict(zip(text, [*known[1:], known[0]], strict=True))
            taught = successors_of(vocabulary, passage[-1], text)
            teach(assistant, [wrong.get(token, following) for token, following in enumerate(taught)])
            drafts["assisted"] = {"assistant_model": assistant, "num_assistant_tokens": options.drafts}
        ways = {way: Way(model, prompt, text, options, **parameters) for way, parameters in drafts.items()}
        steps = {way: measured.check() for way, measured in ways.items()}
        for way in ways.values():
            way.measure()  # compiles
            way.times.clear()
        for _ in range(options.rounds):
            for way in ways.values():
                way.measure()
        times = {way: statistics.median(measured.times) for way, measured in ways.items()}
        found = {
            way: {
                "steps": steps[way],
                "ms per token": round(times[way], 2),
                "samples": ways[way].times,
                "faster": round(times["plain"] / times[way], 2),
            }
            for way in ways
        }
        print(json.dumps({"text": name, **found}), flush=True)


if __name__ == "__main__":
    main()
