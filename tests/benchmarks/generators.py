"""Libraries that generate with a GPT-J, one class for each: what `generate.py` compares.

    PYTHON tests/benchmarks/generators.py CLASS CHECKPOINT DTYPE [--prepare]

runs a worker in the environment that has the library; --prepare writes the weights in the library's own format instead,
beside the checkpoint and once for all. CHECKPOINT is a directory with `config.json` and one `model.safetensors`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import Peer, processors, serve


class Generator(Peer):
    """A loaded model, and how long it takes to generate: greedy, and never with an end of text.

    Args:
        checkpoint: the directory.
        dtype: of the weights and of the computation.
    """

    own_format = ""  # what is added to the checkpoint's name for weights in the library's own format
    fewest_tokens: dict[str, int] = {}  # that a mode can add, where it is not 1
    most_rows = sys.maxsize  # texts at once

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self.config = json.loads((checkpoint / "config.json").read_text())
        self.load()

    @classmethod
    def converted(cls, checkpoint: Path) -> Path:
        """Where the weights are in the format that the library reads."""
        return checkpoint.with_name(checkpoint.name + cls.own_format)

    @classmethod
    def prepare(cls, checkpoint: Path) -> None:
        """Write them there, unless they are there and newer than the checkpoint."""
        target, weights = cls.converted(checkpoint), checkpoint / "model.safetensors"
        if target.exists() and target.stat().st_mtime < weights.stat().st_mtime:
            shutil.rmtree(target)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=checkpoint.parent) as temporary:
                part = Path(temporary) / "part"
                part.mkdir()
                cls.convert(checkpoint, part)
                part.rename(target)

    @classmethod
    def convert(cls, checkpoint: Path, target: Path) -> None:
        """Write the library's own format."""
        raise NotImplementedError

    def load(self) -> None:
        """Load the model."""
        raise NotImplementedError

    def generate(self, mode: str, ids: Any, new: int) -> Any:
        """Add so many tokens to int [B, P], and return the new ones, int [B, new]."""
        raise NotImplementedError

    def prompt(self, batch: int, length: int) -> Any:
        """The same random ids in every worker, int64 [B, P]."""
        import numpy as np

        return np.random.default_rng(0).integers(0, self.config["vocab_size"] - 200, (batch, length))

    def measure(self, mode: str, batch: int, prompt: int, new: int) -> dict[str, float]:
        """Milliseconds to the first token and for each further one, from the difference of two generations."""
        ids, fewest = self.prompt(batch, prompt), self.fewest_tokens.get(mode, 1)
        short = self.milliseconds(mode, ids, fewest)
        decode = (self.milliseconds(mode, ids, fewest + new) - short) / new
        return {"first_token": short - (fewest - 1) * decode, "decode": decode}

    def compile_seconds(self, mode: str, batch: int, prompt: int, new: int) -> float:
        """How much longer the first generation from a new length of prompt takes than the next one."""
        ids = self.prompt(batch, prompt)
        first = self.milliseconds(mode, ids, new)
        return (first - self.milliseconds(mode, ids, new)) / 1e3

    def tokens(self, mode: str, batch: int, prompt: int, new: int) -> list[list[int]]:
        """The new tokens, to see that all compute the same."""
        return [[int(token) for token in row] for row in self.generate(mode, self.prompt(batch, prompt), new)]

    def milliseconds(self, mode: str, ids: Any, new: int) -> float:
        """The time of one generation."""
        generated, elapsed = timed(lambda: self.generate(mode, ids, new))
        if len(generated) != len(ids) or any(len(row) != new for row in generated):
            raise RuntimeError(f"{new} new tokens for {len(ids)} prompts were asked for, and others came")
        return elapsed


class Ours(Generator):
    """tfgptj on TensorFlow, as a graph and with XLA."""

    packages = ("keras", "numpy")

    def load(self) -> None:
        from tfgptj.heads import TFGPTJForCausalLM

        self.model = TFGPTJForCausalLM.from_pretrained(self.checkpoint, dtype=self.dtype)

    def generate(self, mode: str, ids: Any, new: int) -> Any:
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "jit_compile": mode == "XLA"}
        return self.model.generate(ids, **options)[:, ids.shape[1] :]

    def facts(self) -> dict[str, Any]:
        from tfgptj.benchmark.machine import versions

        return {**super().facts(), "versions": versions()}


class LiteRT(Generator):
    """tfgptj on LiteRT's kernels: "int8", "int4" in blocks of 32, or "int4-wide", one scale for each output."""

    packages = ("ai-edge-litert", "keras", "numpy")

    @classmethod
    def prepare(cls, checkpoint: Path) -> None:
        for dtype in LITERT:
            if not cls.directory(checkpoint, dtype).exists():
                from tfgptj.litert.convert import convert

                convert(checkpoint, cls.directory(checkpoint, dtype), **LITERT[dtype])

    @staticmethod
    def directory(checkpoint: Path, dtype: str) -> Path:
        """Where the converted model is."""
        return checkpoint.with_name(f"{checkpoint.name}-litert-{dtype}")

    def load(self) -> None:
        from tfgptj.litert.model import LiteRTGPTJForCausalLM

        self.model = LiteRTGPTJForCausalLM.from_pretrained(self.directory(self.checkpoint, self.dtype))

    def generate(self, mode: str, ids: Any, new: int) -> Any:
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
        return self.model.generate(ids, **options)[:, ids.shape[1] :]


class Bandwidth(Generator):
    """How fast this machine reads: what decoding cannot be faster than."""

    def load(self) -> None:
        from tfgptj.benchmark.machine import ReadBandwidth

        self.bandwidth = ReadBandwidth(time.perf_counter)

    def gigabytes_per_second(self) -> float:
        """Measure once."""
        return self.bandwidth() / 1e9


class HFTensorFlow(Generator):
    """Hugging Face's TensorFlow class, as it is and compiled with XLA, which is their advice."""

    packages = ("transformers", "tf_keras", "numpy")
    own_format = "-torch"
    fewest_tokens = {"XLA": 2}  # a single one makes it raise

    @classmethod
    def convert(cls, checkpoint: Path, target: Path) -> None:
        """`pytorch_model.bin`, the only file that these classes can load without TensorFlow weights."""
        import torch
        from safetensors.torch import load_file

        torch.save(load_file(checkpoint / "model.safetensors"), target / "pytorch_model.bin")
        shutil.copy(checkpoint / "config.json", target)

    def load(self) -> None:
        import tensorflow as tf
        from transformers import TFGPTJForCausalLM

        directory = str(self.converted(self.checkpoint))
        self.model = TFGPTJForCausalLM.from_pretrained(directory, from_pt=True, use_safetensors=False)
        self.model.generation_config.eos_token_id = self.model.config.eos_token_id = None
        self.compiled = tf.function(self.model.generate, jit_compile=True)

    def generate(self, mode: str, ids: Any, new: int) -> Any:
        import tensorflow as tf

        ids = tf.constant(ids, tf.int32)
        function = self.compiled if mode == "XLA" else self.model.generate
        options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return function(ids, attention_mask=tf.ones_like(ids), **options).numpy()[:, ids.shape[1] :]

    def facts(self) -> dict[str, Any]:
        import tensorflow as tf

        found = super().facts()
        return {**found, "versions": {"tensorflow": tf.__version__, **found["versions"]}}


class HFTorch(Generator):
    """Hugging Face's PyTorch class."""

    packages = ("transformers", "torch", "numpy")

    def load(self) -> None:
        import torch
        from transformers import GPTJForCausalLM

        torch.set_num_threads(processors())
        self.model = GPTJForCausalLM.from_pretrained(self.checkpoint, dtype=getattr(torch, self.dtype)).eval()
        self.model.generation_config.eos_token_id = None

    def generate(self, mode: str, ids: Any, new: int) -> Any:
        import torch

        ids = torch.as_tensor(ids)
        options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), **options).numpy()[:, ids.shape[1] :]


class CTranslate2(Generator):
    """CTranslate2; its tokens are texts, here the ids themselves in digits."""

    packages = ("ctranslate2",)
    own_format = "-ctranslate2"

    @classmethod
    def convert(cls, checkpoint: Path, target: Path) -> None:
        """Its own file, by its own converter, but for the tokenizer, which random weights have none of."""
        import torch
        from ctranslate2.converters.transformers import GPTJLoader
        from transformers import GPTJForCausalLM

        with torch.no_grad():
            model = GPTJForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
            spec = GPTJLoader().get_model_spec(model)
        spec.register_vocabulary([str(token) for token in range(model.config.vocab_size)])
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
        spec.validate()
        spec.optimize()
        spec.save(str(target))

    def load(self) -> None:
        import ctranslate2

        options = {"device": "cpu", "compute_type": self.dtype, "intra_threads": processors()}
        self.generator = ctranslate2.Generator(str(self.converted(self.checkpoint)), **options)

    def generate(self, mode: str, ids: Any, new: int) -> Any:
        texts = [[str(token) for token in row] for row in ids]
        lengths = {"min_length": new, "max_length": new}
        found = self.generator.generate_batch(texts, include_prompt_in_result=False, sampling_topk=1, **lengths)
        return [row.sequences_ids[0] for row in found]


class GGML(Generator):
    """ggml's GPT-J, by ctransformers: "q8_0" or "q4_0", blocks of 32 numbers with one scale. It has no batches.

    Its own `generate` would keep the beginning of a prompt that it has seen before, and sorts to sample; so the prompt
    is evaluated anew here, and the likeliest token looked up in its memory.
    """

    packages = ("ctransformers", "numpy")
    own_format = "-ggml"
    most_rows = 1
    batch = 128  # tokens of a prompt at once: of 8, 32, 128 and 512 the fastest

    @classmethod
    def convert(cls, checkpoint: Path, target: Path) -> None:
        """One file of each kind."""
        from ggml_file import KINDS, write_ggml

        for kind in KINDS:
            write_ggml(checkpoint, target / f"{kind}.bin", kind)

    def load(self) -> None:
        import ctypes

        from ctransformers.llm import LLM, Config

        path = self.converted(self.checkpoint) / f"{self.dtype}.bin"
        self.model = LLM(str(path), "gptj", config=Config(threads=processors(), batch_size=self.batch))
        # What a token takes in the first call is what it reserves later: so a token that looks back at all others.
        last = self.model.context_length - 1
        self.model.ctransformers_llm_batch_eval((ctypes.c_int * 1)(), 1, last, 1, processors())

    def generate(self, mode: str, ids: Any, new: int) -> Any:
        [row] = ids.tolist()
        self.model.reset()
        self.model.eval(row)
        found = [self.likeliest()]
        while len(found) < new:
            self.model.eval(found[-1:])
            found.append(self.likeliest())
        return [found]

    def likeliest(self) -> int:
        """The token with the largest logit."""
        import numpy as np

        logits = np.ctypeslib.as_array(self.model.ctransformers_llm_logits_data(), (self.config["vocab_size"],))
        return int(logits.argmax())

    def facts(self) -> dict[str, Any]:
        """What others say, and for which processors it was compiled: "local" is this one."""
        from ctransformers.lib import find_library

        return {**super().facts(), "compiled_for": Path(find_library()).parent.name}


class KerasHub(Generator):
    """KerasHub's GPT-NeoX of the same sizes, with random weights: it has no GPT-J.

    Its head is its embedding, so that it reads as much for each token. It fills the cache over prompt and room alike:
    the time for each further token is therefore taken from two prompts of different length in the same room.
    """

    packages = ("keras-hub", "keras", "tensorflow-cpu", "numpy")

    def load(self) -> None:
        import keras
        import keras_hub

        keras.utils.set_random_seed(0)
        config = self.config
        backbone = keras_hub.models.GPTNeoXBackbone(
            vocabulary_size=config["vocab_size"],
            num_layers=config["n_layer"],
            num_heads=config["n_head"],
            hidden_dim=config["n_embd"],
            intermediate_dim=config["n_inner"] or 4 * config["n_embd"],
            rotary_percentage=config["rotary_dim"] * config["n_head"] / config["n_embd"],
            max_sequence_length=config["n_positions"],
            dtype=self.dtype,
        )
        self.model = keras_hub.models.GPTNeoXCausalLM(backbone=backbone, preprocessor=None)
        self.model.compile(sampler="greedy", jit_compile=False)

    def measure(self, mode: str, batch: int, prompt: int, new: int) -> dict[str, float]:
        first = self.milliseconds(mode, self.prompt(batch, prompt), 1)
        room = prompt + new + 1
        _, short = timed(lambda: self.filled(self.prompt(batch, prompt + new), room))
        _, long = timed(lambda: self.filled(self.prompt(batch, prompt), room))
        return {"first_token": first, "decode": (long - short) / new}

    def generate(self, mode: str, ids: Any, new: int) -> Any:
        return self.filled(ids, ids.shape[1] + new)[:, ids.shape[1] :]

    def filled(self, ids: Any, room: int) -> Any:
        """Prompts int [B, P], continued until they fill the room, int [B, room]."""
        import numpy as np

        padding = ((0, 0), (0, room - ids.shape[1]))
        inputs = {"token_ids": np.pad(ids, padding), "padding_mask": np.pad(np.ones_like(ids), padding)}
        return np.asarray(self.model.generate(inputs, stop_token_ids=None)["token_ids"])


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its milliseconds."""
    start = time.perf_counter()
    found = call()
    return found, 1e3 * (time.perf_counter() - start)


LITERT: dict[str, dict[str, int]] = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4-wide": {"bits": 4, "block_size": 0},
}
CLASSES = {cls.__name__: cls for cls in (Ours, LiteRT, Bandwidth, HFTensorFlow, HFTorch, CTranslate2, GGML, KerasHub)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cls", choices=CLASSES)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("--prepare", action="store_true")
    options = parser.parse_args()
    cls = CLASSES[options.cls]
    if options.prepare:
        cls.prepare(options.checkpoint)
    else:
        serve(lambda: cls(options.checkpoint, options.dtype))


if __name__ == "__main__":
    main()
