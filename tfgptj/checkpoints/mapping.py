"""The one table of names: our variables, and what Hugging Face's PyTorch, TensorFlow and Flax classes call them.

Loading and saving both follow it. From a configuration alone it gives the complete plan of a checkpoint, every tensor
with its shape, so that a file can be judged before anything is allocated.

Source: the module names in transformers' modeling_gptj.py, modeling_tf_gptj.py and modeling_flax_gptj.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, ConfigError

Layout: TypeAlias = Literal["torch", "tensorflow", "flax"]

# Which head each model class has; a subclass has its parent's.
HEADS = {
    "TFGPTJModel": "none",
    "TFGPTJForCausalLM": "causal_lm",
    "TFGPTJForSequenceClassification": "classification",
    "TFGPTJForQuestionAnswering": "question_answering",
}

# What those classes are called in Hugging Face's PyTorch line.
ARCHITECTURES = {head: name.removeprefix("TF") for name, head in HEADS.items()}

_FRAMEWORKS: dict[Layout, str] = {"tensorflow": "TensorFlow", "flax": "Flax"}  # those that lack some weights

# Hugging Face's heads hold their backbone as `transformer`; a backbone saved by itself lacks this first part.
_PREFIX = re.compile(r"^transformer[./]")


class Row(NamedTuple):
    """One line of the table. `{i}` stands for the layer; a name of None: that framework has no such weight."""

    variable: str  # attributes, from the model with the head or from the backbone
    torch: str
    tensorflow: str | None
    flax: str | None
    shape: str  # of the variable, in the letters of the dimension key, and C labels, 1
    transpose: bool = False  # TensorFlow and Flax keep the kernels of linear layers as [in, out], PyTorch and we turned


# fmt: off
_EMBEDDING = (
    Row("embedding.wte.embeddings", "wte.weight", "wte/weight:0", "wte/embedding", "VD"),
)
_BLOCK = (
    Row("blocks.{i}.ln_1.gamma", "h.{i}.ln_1.weight", "h_._{i}/ln_1/gamma:0", "h/{i}/ln_1/scale", "D"),
    Row("blocks.{i}.ln_1.beta", "h.{i}.ln_1.bias", "h_._{i}/ln_1/beta:0", "h/{i}/ln_1/bias", "D"),
    *(
        Row(f"blocks.{{i}}.attn.{name}.kernel", f"h.{{i}}.attn.{name}.weight", f"h_._{{i}}/attn/{name}/kernel:0",
            f"h/{{i}}/attn/{name}/kernel", "DD", True)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    ),
    Row("blocks.{i}.mlp.fc_in.kernel", "h.{i}.mlp.fc_in.weight", "h_._{i}/mlp/fc_in/kernel:0",
        "h/{i}/mlp/fc_in/kernel", "FD", True),
    Row("blocks.{i}.mlp.fc_in.bias", "h.{i}.mlp.fc_in.bias", "h_._{i}/mlp/fc_in/bias:0", "h/{i}/mlp/fc_in/bias", "F"),
    Row("blocks.{i}.mlp.fc_out.kernel", "h.{i}.mlp.fc_out.weight", "h_._{i}/mlp/fc_out/kernel:0",
        "h/{i}/mlp/fc_out/kernel", "DF", True),
    Row("blocks.{i}.mlp.fc_out.bias", "h.{i}.mlp.fc_out.bias", "h_._{i}/mlp/fc_out/bias:0", "h/{i}/mlp/fc_out/bias",
        "D"),
)
_ACTIVATION = {  # only PyTorch has activations with weights
    "prelu": (Row("blocks.{i}.mlp.act.slope", "h.{i}.mlp.act.weight", None, None, "1"),),
    "xielu": (
        Row("blocks.{i}.mlp.act.alpha_p", "h.{i}.mlp.act.alpha_p", None, None, "1"),
        Row("blocks.{i}.mlp.act.alpha_n", "h.{i}.mlp.act.alpha_n", None, None, "1"),
    ),
}
_FINAL_NORM = (
    Row("ln_f.gamma", "ln_f.weight", "ln_f/gamma:0", "ln_f/scale", "D"),
    Row("ln_f.beta", "ln_f.bias", "ln_f/beta:0", "ln_f/bias", "D"),
)
_HEAD = {
    "none": (),
    "causal_lm": (
        Row("lm_head.dense.kernel", "lm_head.weight", "lm_head/kernel:0", "lm_head/kernel", "VD", True),
        Row("lm_head.dense.bias", "lm_head.bias", "lm_head/bias:0", "lm_head/bias", "V"),
    ),
    "tied_causal_lm": (  # its kernel is wte
        Row("lm_head.bias", "lm_head.bias", "lm_head/bias:0", "lm_head/bias", "V"),
    ),
    "classification": (
        Row("score.kernel", "score.weight", "score/kernel:0", None, "CD", True),
    ),
    "question_answering": (
        Row("qa_outputs.kernel", "qa_outputs.weight", "qa_outputs/kernel:0", None, "CD", True),
        Row("qa_outputs.bias", "qa_outputs.bias", "qa_outputs/bias:0", None, "C"),
    ),
}
# fmt: on

# Constants that PyTorch's modules keep beside their weights: the causal mask, which CodeGen calls so, the score of a
# masked key, the sines of older releases, and two numbers of xIELU.
_BUFFER = re.compile(r"h\.\d+\.(attn\.(bias|causal_mask|masked_bias|embed_positions)|mlp\.act\.(beta|eps))")

# xIELU's must be in the file: Hugging Face's PyTorch class leaves them uninitialised otherwise. It builds the second,
# -1e-6, in bfloat16.
_WRITTEN_BUFFERS = {"xielu": (("h.{i}.mlp.act.beta", 0.5), ("h.{i}.mlp.act.eps", -9.98377799987793e-07))}

_HEAD_NAMES = frozenset(canonical for rows in _HEAD.values() for row in rows for canonical in row[1:4] if canonical)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One weight of a planned checkpoint."""

    variable: str  # attributes, from the model with the head or from the backbone
    names: dict[str, str | None]  # by layout, without the prefix that a backbone under a head has
    shape: tuple[int, ...]  # of the variable
    transpose: bool  # in the layouts of TensorFlow and Flax
    in_head: bool

    def stored_shape(self, layout: Layout) -> tuple[int, ...]:
        """The tensor's shape in a file of that layout."""
        return self.shape[::-1] if self.is_transposed(layout) else self.shape

    def is_transposed(self, layout: Layout) -> bool:
        """Whether a file of that layout holds the variable's transpose."""
        return self.transpose and layout != "torch"


def plan(config: GPTJConfig, head: str) -> list[Entry]:
    """All weights of a model, by arithmetic; nothing is allocated.

    Args:
        config: :class:`GPTJConfig`.
        head: "none", "causal_lm", "classification" or "question_answering".

    Raises:
        ConfigError: for another head.

    >>> entries = plan(GPTJConfig(n_layer=2, vocab_size=50, n_embd=16, n_head=2, rotary_dim=4), "causal_lm")
    >>> entries[0].names["torch"], entries[0].shape
    ('wte.weight', (50, 16))
    """
    if head not in HEADS.values():
        raise ConfigError(f"head must be one of {', '.join(HEADS.values())}; got {head!r}")
    if head == "causal_lm" and config.tie_word_embeddings:
        head = "tied_causal_lm"
    block = _BLOCK + _ACTIVATION.get(config.activation_function, ())
    entries = [_entry(row, config) for row in _EMBEDDING]
    entries += [_entry(row, config, layer) for layer in range(config.n_layer) for row in block]
    entries += [_entry(row, config) for row in _FINAL_NORM]
    return entries + [_entry(row, config, in_head=True) for row in _HEAD[head]]


def _entry(row: Row, config: GPTJConfig, layer: int = 0, *, in_head: bool = False) -> Entry:
    sizes = {"V": config.vocab_size, "D": config.n_embd, "F": config.inner_dim, "C": config.num_labels, "1": 1}
    names = {"torch": row.torch, "tensorflow": row.tensorflow, "flax": row.flax}
    return Entry(
        variable=row.variable.format(i=layer),
        names={layout: name and name.format(i=layer) for layout, name in names.items()},
        shape=tuple(sizes[letter] for letter in row.shape),
        transpose=row.transpose,
        in_head=in_head,
    )


def stored_name(entry: Entry, head: str, layout: Layout) -> str:
    """What a weight is called in a file of that layout.

    Raises:
        CheckpointError: if that framework has no such weight.
    """
    name = entry.names[layout]
    if name is None:
        raise CheckpointError(
            f"{entry.variable}: Hugging Face's {_FRAMEWORKS[layout]} classes have no such weight; save as safetensors"
        )
    # A backbone by itself goes without the prefix, but in TensorFlow.
    has_prefix = not entry.in_head and (head != "none" or layout == "tensorflow")
    return f"transformer{'.' if layout == 'torch' else '/'}{name}" if has_prefix else name


def written_weights(config: GPTJConfig, head: str, layout: Layout) -> list[tuple[str, Entry, bool]]:
    """What a file of that layout holds: names, entries of the plan, and whether the variable is to be transposed.

    Raises:
        CheckpointError: if that framework has not all of the weights.
    """
    entries = plan(config, head)
    weights = [(stored_name(entry, head, layout), entry, entry.is_transposed(layout)) for entry in entries]
    if layout == "tensorflow" and head == "causal_lm" and config.tie_word_embeddings:
        # Hugging Face's TensorFlow class always has a kernel of its own.
        weights.append(("lm_head/kernel:0", entries[0], True))
    return weights


def written_buffers(config: GPTJConfig) -> list[tuple[str, float]]:
    """Names and values of the constants that a file in PyTorch's layout holds beside the weights."""
    templates = _WRITTEN_BUFFERS.get(config.activation_function, ())
    return [(name.format(i=layer), value) for layer in range(config.n_layer) for name, value in templates]


def canonical_name(name: str) -> str:
    """A tensor's name without the prefix that tells a backbone under a head from one saved by itself.

    >>> canonical_name("transformer.wte.weight"), canonical_name("wte.weight"), canonical_name("lm_head.bias")
    ('wte.weight', 'wte.weight', 'lm_head.bias')
    """
    return _PREFIX.sub("", name)


def is_ignorable(canonical: str) -> bool:
    """Whether a tensor that is not in the plan is no difference: a constant, or a weight of another head.

    >>> is_ignorable("h.0.attn.masked_bias"), is_ignorable("score.weight"), is_ignorable("h.99.ln_1.bias")
    (True, True, False)
    """
    return canonical in _HEAD_NAMES or _BUFFER.fullmatch(canonical) is not None


def heads_in(names: Iterable[str], layout: Layout) -> list[str]:
    """The heads of which there are weights among some tensors, by their names without prefix.

    >>> heads_in(["wte.weight", "qa_outputs.weight"], "torch"), heads_in(["wte.weight"], "torch")
    (['question_answering'], [])
    """
    present = set(names)
    heads = [head for head, rows in _HEAD.items() if any(getattr(row, layout) in present for row in rows)]
    return [head for head in heads if head in HEADS.values()]


def head_of(model_class: type) -> tuple[str, str]:
    """A model class's head, and the class's name in Hugging Face's PyTorch line.

    Raises:
        ConfigError: if it is none of the classes that can be loaded and saved, and no subclass of one.
    """
    for parent in model_class.__mro__:
        if parent.__name__ in HEADS:
            return HEADS[parent.__name__], parent.__name__.removeprefix("TF")
    raise ConfigError(f"{model_class.__name__} is none of {', '.join(HEADS)}: it has no checkpoint format")


def variable_of(model: Any, entry: Entry) -> Any:
    """The model's variable for an entry of its plan."""
    return getattr(layer_of(model, entry), entry.variable.rpartition(".")[2])


def layer_of(model: Any, entry: Entry) -> Any:
    """The model's layer that has the variable of an entry."""
    node = model if entry.in_head else getattr(model, "transformer", model)
    for part in entry.variable.split(".")[:-1]:
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return node
