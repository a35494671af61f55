"""What a `config.json` may hold that no GPT-J has: the configuration of a CodeGen, and the names of Python code."""

from __future__ import annotations

from typing import Any

from tfgptj import limits
from tfgptj.errors import ConfigError

# Fields of config.json that name Python code to import. tfgptj runs no code from files.
CODE_FIELDS = ("auto_map", "custom_pipelines")

# Salesforce's CodeGen is a GPT-J; its attention weights are stored in so many groups of heads (checkpoints/codegen.py).
CODEGEN = "codegen"
CODEGEN_GROUPS = 4


def code_fields(fields: dict[str, Any]) -> str:
    """Which fields name Python code, for messages; nothing where there are none."""
    return ", ".join(name for name in CODE_FIELDS if fields.get(name))


def as_gptj(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a CodeGen as those of a GPT-J; those of a GPT-J as they are.

    All fields mean the same. `n_ctx` has no effect: CodeGenModel caps a `rotary_dim` by it that nothing uses, and the
    attention rotates by the field itself.

    Args:
        fields: what `config.json` holds, without Hugging Face's generic names.

    Raises:
        ConfigError: if the weights of such a model are not stored in CodeGen's groups.

    Source: transformers, configuration_codegen.py and modeling_codegen.py.

    >>> as_gptj({"model_type": "codegen", "n_head": 8, "architectures": ["CodeGenForCausalLM"]})
    {'model_type': 'gptj', 'n_head': 8, 'architectures': ['GPTJForCausalLM']}
    """
    if fields.get("model_type") != CODEGEN:
        return fields
    code = code_fields(fields)
    if code:
        raise ConfigError(
            f"this CodeGen comes with Python code ({code}), which is not run. Some such models, among them CodeGen2, "
            f"keep their attention weights in other than {CODEGEN_GROUPS} groups, and would load as a wrong model "
            f"without an error; if yours is none of them, remove {code} from config.json"
        )
    check_codegen_heads(fields.get("n_head", 16))
    changed = {**fields, "model_type": "gptj"}
    if isinstance(fields.get("architectures"), list):
        changed["architectures"] = [str(name).replace("CodeGen", "GPTJ") for name in fields["architectures"]]
    return changed


def check_codegen_heads(n_head: Any) -> None:
    """Refuse a number of heads that CodeGen's groups cannot share out.

    Raises:
        ConfigError: naming the number.
    """
    # What is no number of heads at all is reported by the configuration itself.
    if isinstance(n_head, int) and 0 < n_head <= limits.MAX_HEADS and n_head % CODEGEN_GROUPS:
        raise ConfigError(
            f"n_head must be divisible by {CODEGEN_GROUPS} in a CodeGen, whose attention weights are stored in "
            f"{CODEGEN_GROUPS} groups of heads; got {n_head}"
        )
