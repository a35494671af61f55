"""What `import tfgptj` offers: the names, where they live, and the tree of errors."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import keras
import pytest

import tfgptj
from tfgptj import errors

pytestmark = pytest.mark.core

MODELS = ("TFGPTJModel", "TFGPTJForCausalLM", "TFGPTJForSequenceClassification", "TFGPTJForQuestionAnswering")


def test_the_names_are_those_of_the_readme() -> None:
    assert set(tfgptj.__all__) == {
        *("GPTJConfig", "GPTJTokenizer", "GenerationConfig", "PrefixCache", "pipeline", "TFGPTJError"),
        *MODELS,
    }


@pytest.mark.parametrize("name", tfgptj.__all__)
def test_every_name_resolves_to_a_documented_thing(name: str) -> None:
    thing = getattr(tfgptj, name)
    assert thing.__name__ == name
    assert inspect.getdoc(thing)
    assert name in dir(tfgptj)


@pytest.mark.parametrize("name", [name for name in tfgptj.__all__ if name != "TFGPTJError"])
def test_every_name_is_documented_with_an_example(name: str) -> None:
    assert ">>> " in (getattr(tfgptj, name).__doc__ or "")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tfgptj' has no attribute 'TFGPTJForTokenClassification'"):
        tfgptj.TFGPTJForTokenClassification  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'GPTJ'"):
        from tfgptj import GPTJ  # noqa: F401


def test_a_star_import_gives_all_names() -> None:
    names: dict[str, object] = {}
    exec("from tfgptj import *", names)
    assert set(tfgptj.__all__) <= set(names)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(tfgptj.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    homes = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert homes == {name: f"tfgptj.{home}" for name, home in tfgptj._HOMES.items()}
    # `import X as X` is what type checkers take as a public name.
    assert all(alias.asname == alias.name for node in block.body for alias in node.names)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", MODELS)
def test_models_are_keras_models(name: str) -> None:
    cls = getattr(tfgptj, name)
    assert issubclass(cls, keras.Model)
    assert list(inspect.signature(cls).parameters) == ["config", "dtype", "kwargs"]
    assert keras.saving.get_registered_name(cls) == f"tfgptj>{name}"


ERRORS = {
    "ConfigError": ValueError,
    "InputError": ValueError,
    "InputTypeError": TypeError,
    "TokenizerError": ValueError,
    "CheckpointError": OSError,
    "CheckpointFormatError": (OSError, ValueError),
    "CheckpointMismatchError": (OSError, ValueError),
    "UnsafeCheckpointError": (OSError, ValueError),
    "GenerationError": ValueError,
    "NonFiniteLogitsError": ArithmeticError,
    "NonFiniteLossError": ArithmeticError,
    "ResourceLimitError": MemoryError,
    "BackendError": RuntimeError,
    "ServerError": OSError,
}


def test_every_error_descends_from_one_of_python_s_own() -> None:
    found = {name for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, Exception)}
    assert found == {*ERRORS, "TFGPTJError"}
    for name, builtin in ERRORS.items():
        cls = getattr(errors, name)
        assert issubclass(cls, errors.TFGPTJError)
        for base in builtin if isinstance(builtin, tuple) else (builtin,):
            assert issubclass(cls, base)
        assert str(cls("what, where, how")) == "what, where, how"
        assert cls.__doc__


def test_the_version_is_one() -> None:
    assert [part.isdigit() for part in tfgptj.__version__.split(".")] == [True] * 3
