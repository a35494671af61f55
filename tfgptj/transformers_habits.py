"""What people write who come from transformers, and what it is here: for messages that say how to go on."""

from __future__ import annotations

from collections.abc import Iterable

_FOUND = "leave it out, the files that there are say it"

# Arguments that Hugging Face's classes take and these do not.
REMEDIES = {
    "from_pt": _FOUND,
    "from_flax": _FOUND,
    "use_safetensors": "give weights='safetensors' or 'bin', or leave it out",
    "torch_dtype": "give dtype",
    "device_map": "leave it out, TensorFlow places a model on the device that there is",
    "low_cpu_mem_usage": "leave it out, weights are always streamed",
    "trust_remote_code": "leave it out, no code is ever loaded",
    "load_in_8bit": "call model.quantize('int8')",
    "load_in_4bit": "call model.quantize('int4')",
    "quantization_config": "call model.quantize",
    "labels": "compile the model and give them to fit, evaluate or train_on_batch; model.score tells of texts",
    "output_hidden_states": "give it to from_pretrained or GPTJConfig",
    "output_attentions": "give it to from_pretrained or GPTJConfig",
    "past_key_values": "generate keeps keys and values itself",
    "use_cache": "generate keeps keys and values itself",
    "return_dict": "a model returns its logits, or a dict where its configuration asks for more",
    "head_mask": "there are no masks of heads",
}


def remedies(names: Iterable[str]) -> str:
    """What to do instead, for those of some names that are known; to be put at the end of a message.

    >>> remedies(["dtyp", "torch_dtype"])
    '; for torch_dtype: give dtype'
    """
    return "".join(f"; for {name}: {REMEDIES[name]}" for name in names if name in REMEDIES)
