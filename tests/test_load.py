"""from_pretrained: every checkpoint into every class that can take it, and what it says of those that it cannot."""

from __future__ import annotations

import gc
import json
import re
import shutil
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import CONFIGS, GOLDENS, Golden, assert_near, elsewhere, foremost, numbers
from keras import ops
from safetensors.numpy import load_file, save_file

from tfgptj.backbone import TFGPTJModel
from tfgptj.checkpoints.mapping import canonical_name, head_of, plan, variable_of
from tfgptj.checkpoints.safetensors import SafetensorsFile, write_safetensors
from tfgptj.checkpoints.tensors import FLOAT_DTYPES, TensorSpec
from tfgptj.config import GPTJConfig
from tfgptj.errors import CheckpointError, CheckpointFormatError, CheckpointMismatchError, ConfigError
from tfgptj.heads import TFGPTJForCausalLM, TFGPTJForQuestionAnswering, TFGPTJForSequenceClassification
from tfgptj.inputs import concrete

pytestmark = pytest.mark.usefixtures("eager_steps")

LOADING, BASE = GOLDENS / "loading", GOLDENS / "base" / "causal_lm"
CLASSES = {
    "causal_lm": TFGPTJForCausalLM,
    "classification": TFGPTJForSequenceClassification,
    "question_answering": TFGPTJForQuestionAnswering,
}
Tensors = dict[str, np.ndarray]


def stored_tensors(directory: Path) -> Tensors:
    """Everything in a directory's safetensors files, bfloat16 included, by canonical name."""
    tensors = {}
    for path in directory.glob("*.safetensors"):
        with SafetensorsFile(path) as file:
            tensors |= {canonical_name(name): file.read(name) for name in file.names}
    return tensors


def loaded_tensors(model: Any) -> Tensors:
    """A model's weights in PyTorch's layout, by canonical name."""
    tensors = {}
    for entry in plan(model.config, head_of(type(model))[0]):
        variable = variable_of(model, entry)
        array = ops.convert_to_numpy(ops.cast(variable, variable.dtype))
        tensors[str(entry.names["torch"])] = array.T if entry.is_transposed("torch") else array
    return tensors


def assert_loaded(model: Any, expected: Tensors, dtype: str = "float32", fresh: tuple[str, ...] = ()) -> None:
    for name, array in loaded_tensors(model).items():
        assert array.dtype == FLOAT_DTYPES[dtype]
        if name not in fresh:
            np.testing.assert_array_equal(array, expected[name].astype(FLOAT_DTYPES[dtype]), err_msg=name)


def edited(directory: Path, change: Callable[[Tensors], object], **fields: Any) -> Path:
    """The base checkpoint with other tensors and fields."""
    tensors = load_file(BASE / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((BASE / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.core
@pytest.mark.parametrize(
    "golden", elsewhere(foremost(CONFIGS, "odd_sizes", "tied", "prelu", "xielu"), "odd_sizes", "tied"), indirect=True
)
def test_every_golden_model(golden: Golden) -> None:
    model = golden.load(TFGPTJForCausalLM)
    assert_loaded(model, stored_tensors(golden.directory / "causal_lm"))
    assert_near(model(golden.inputs("right")), golden["right/causal_lm/logits"])


@pytest.mark.parametrize("name", foremost(["base", "tied", "xielu"], "tied"))
@pytest.mark.parametrize("head", CLASSES)
def test_every_head(name: str, head: str) -> None:
    directory = GOLDENS / name / head
    assert_loaded(CLASSES[head].from_pretrained(directory), stored_tensors(directory))


@pytest.mark.parametrize(
    ("policy", "variables"),
    [("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("mixed_bfloat16", "float32"),
     ("auto", None), (keras.DTypePolicy("mixed_float16"), "float32")],
)  # fmt: skip
@pytest.mark.parametrize("stored", foremost(["float32", "float16", "bfloat16"], "bfloat16"))
def test_every_stored_dtype_in_every_policy(stored: str, policy: Any, variables: str | None) -> None:
    directory = BASE if stored == "float32" else LOADING / stored
    model = TFGPTJForCausalLM.from_pretrained(directory, dtype=policy)
    assert_loaded(model, stored_tensors(directory), variables or stored)
    assert model.dtype_policy.name == (stored if policy == "auto" else getattr(policy, "name", policy))


@pytest.mark.core
def test_no_dtype_is_the_global_policy() -> None:
    keras.config.set_dtype_policy("bfloat16")
    assert_loaded(TFGPTJForCausalLM.from_pretrained(BASE), stored_tensors(BASE), "bfloat16")


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        ("float31", "dtype must be 'auto' or a Keras dtype policy, got 'float31'"),
        (3, "dtype must be 'auto' or a Keras dtype policy, got 3"),
        (
            "int8_from_float32",
            "'int8_from_float32' is a quantized one: load in a float dtype, then call model.quantize",
        ),
    ],
)
def test_invalid_dtypes(dtype: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        TFGPTJForCausalLM.from_pretrained(BASE, dtype=dtype)


def test_values_that_do_not_fit(tmp_path: Path) -> None:
    edited(tmp_path, lambda tensors: tensors["transformer.h.1.mlp.fc_in.weight"].__setitem__((0, 0), 1e5))
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.fc_in\.weight: holds values too large for float16"):
        TFGPTJForCausalLM.from_pretrained(tmp_path, dtype="float16")
    assert_loaded(TFGPTJForCausalLM.from_pretrained(tmp_path), stored_tensors(tmp_path))


def test_shards() -> None:
    assert_loaded(TFGPTJForCausalLM.from_pretrained(LOADING, subfolder="sharded"), stored_tensors(BASE))
    with pytest.raises(CheckpointError, match="holds no weights"):
        TFGPTJForCausalLM.from_pretrained(LOADING)


def test_a_backbone_with_and_without_a_head_above_it() -> None:
    for directory in (BASE, LOADING / "headless", GOLDENS / "base" / "classification"):
        assert_loaded(TFGPTJModel.from_pretrained(directory), stored_tensors(BASE))


@pytest.mark.parametrize(
    ("cls", "directory", "fresh"),
    [
        (TFGPTJForCausalLM, LOADING / "headless", ("lm_head.weight", "lm_head.bias")),
        (TFGPTJForSequenceClassification, BASE, ("score.weight",)),
        (TFGPTJForQuestionAnswering, LOADING / "sharded", ("qa_outputs.weight", "qa_outputs.bias")),
    ],
)
def test_a_head_that_is_not_there_begins_at_random(cls: type, directory: Path, fresh: tuple[str, ...]) -> None:
    with pytest.warns(
        UserWarning, match=f"of {cls.__name__} are not in the checkpoint: {', '.join(fresh)}. They"
    ) as seen:
        model = cls.from_pretrained(directory)
    assert [warning.filename for warning in seen if warning.category is UserWarning] == [__file__]
    assert_loaded(model, stored_tensors(directory), fresh=fresh)
    assert 0.01 < loaded_tensors(model)[fresh[0]].std() < 0.03  # initializer_range is 0.02


def test_all_differences_are_reported_at_once(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["transformer.h.0.ln_1.bias"], tensors["lm_head.bias"]
        tensors["transformer.h.0.attn.q_proj.weight"] = np.ones((16, 15), np.float32)
        tensors["transformer.h.1.mlp.fc_in.bias"] = np.ones(64, np.int32)
        tensors["transformer.wpe.weight"] = tensors["transformer.h.9.ln_1.bias"] = np.ones(3, np.float32)
        tensors["h.1.ln_1.bias"] = np.ones(16, np.float32)

    with pytest.raises(CheckpointMismatchError) as caught:
        TFGPTJForCausalLM.from_pretrained(edited(tmp_path, change))
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'model.safetensors'}: these tensors are not as the configuration calls for:",
        "  missing (2): h.0.ln_1.bias, lm_head.bias",
        "  of the wrong shape (1): transformer.h.0.attn.q_proj.weight ([16, 15], expected [16, 16])",
        "  of the wrong dtype (1): transformer.h.1.mlp.fc_in.bias (int32)",
        "  unexpected (2): transformer.h.9.ln_1.bias, transformer.wpe.weight",
        "  stored under two names (1): h.1.ln_1.bias",
        "Does the config.json belong to these weights, and does the model class?",
    ]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"n_layer": 3}, r"missing \(10\): h\.2\.ln_1\.weight"),
        ({"n_layer": 1}, r"unexpected \(10\): transformer\.h\.1\."),
        ({"n_embd": 32}, r"of the wrong shape \(24\)"),
        ({"vocab_size": 50}, r"wte\.weight \(\[48, 16\], expected \[50, 16\]\)"),
        ({"activation_function": "prelu"}, r"missing \(2\): h\.0\.mlp\.act\.weight"),
    ],
)
def test_a_configuration_of_another_size(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=text):
        TFGPTJForCausalLM.from_pretrained(BASE, **fields)


def test_a_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    edited(tmp_path, lambda tensors: tensors.update({f"x{i}": np.ones(1, np.float32) for i in range(1001)}))
    with pytest.raises(CheckpointMismatchError, match=r"unexpected \(1,001\): x0, .*, x998, …\n"):
        TFGPTJForCausalLM.from_pretrained(tmp_path)


def test_constants_and_other_heads_are_left_out(tmp_path: Path) -> None:
    extra = {
        "transformer.h.0.attn.bias": np.ones((1, 1, 32, 32), bool),
        "transformer.h.0.attn.masked_bias": np.array(-1e9, np.float32),
        "score.weight": np.ones((2, 16), np.float32),
    }
    edited(tmp_path, lambda tensors: tensors.update(extra))
    assert_loaded(TFGPTJForCausalLM.from_pretrained(tmp_path), stored_tensors(BASE))


def test_other_sizes_on_demand(tmp_path: Path) -> None:
    directory = GOLDENS / "base" / "classification"
    with pytest.raises(CheckpointMismatchError, match=r"score\.weight \(\[2, 16\], expected \[5, 16\]\)"):
        TFGPTJForSequenceClassification.from_pretrained(directory, num_labels=5)
    with pytest.warns(UserWarning, match=r"are of other shapes there: score\.weight \(\[2, 16\], expected \[5, 16\]\)"):
        model = TFGPTJForSequenceClassification.from_pretrained(directory, num_labels=5, ignore_mismatched_sizes=True)
    assert_loaded(model, stored_tensors(directory), fresh=("score.weight",))
    assert model([[1, 2, 3]]).shape == (1, 5)


def test_files_in_tensorflows_and_flaxs_layout(tmp_path: Path) -> None:
    expected = stored_tensors(BASE)
    entries = plan(GPTJConfig.from_pretrained(BASE), "causal_lm")
    for label, layout in (("tf", "tensorflow"), ("flax", "flax")):
        tensors = {
            ("" if entry.in_head else "transformer/") + str(entry.names[layout]): np.ascontiguousarray(
                expected[str(entry.names["torch"])].T if entry.transpose else expected[str(entry.names["torch"])]
            )
            for entry in entries
        }
        save_file(tensors, tmp_path / "model.safetensors", {"format": label})
        shutil.copy(BASE / "config.json", tmp_path)
        assert_loaded(TFGPTJForCausalLM.from_pretrained(tmp_path), expected)


def test_a_weight_that_a_layout_does_not_know(tmp_path: Path) -> None:
    save_file({"wte/weight:0": np.ones((48, 16), np.float32)}, tmp_path / "model.safetensors", {"format": "tf"})
    shutil.copy(GOLDENS / "prelu" / "causal_lm" / "config.json", tmp_path)
    with pytest.raises(CheckpointMismatchError, match=r"blocks\.0\.mlp\.act\.slope \(unknown to tensorflow\)"):
        TFGPTJForCausalLM.from_pretrained(tmp_path)


def test_the_configuration_may_be_given_or_changed(tmp_path: Path) -> None:
    shutil.copy(BASE / "model.safetensors", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"config\.json: there is no such file; give the configuration as config="
    ):
        TFGPTJForCausalLM.from_pretrained(tmp_path)
    config = GPTJConfig.from_pretrained(BASE, layer_norm_epsilon=0.25)
    model = TFGPTJForCausalLM.from_pretrained(tmp_path, config=config, attn_pdrop=0.5, hidden_size=16)
    assert (model.config.layer_norm_epsilon, model.config.attn_pdrop) == (0.25, 0.5)
    assert config.attn_pdrop == 0.0
    with pytest.raises(ConfigError, match="config must be a GPTJConfig, got dict"):
        TFGPTJForCausalLM.from_pretrained(tmp_path, config={})


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="no argument, and GPTJConfig no field, dtyp, torch_dtype; for torch_dtype: give"
    ):
        TFGPTJForCausalLM.from_pretrained(BASE, dtyp="float16", torch_dtype="float16")
    with pytest.raises(
        ConfigError, match="no field, from_pt; for from_pt: leave it out, the files that there are say it$"
    ):
        TFGPTJForCausalLM.from_pretrained(BASE, from_pt=True)


def test_a_configuration_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> GPTJConfig:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(GPTJConfig, "from_json_file", refuse)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: Permission denied"):
        TFGPTJForCausalLM.from_pretrained(BASE)


def test_a_damaged_configuration(tmp_path: Path) -> None:
    edited(tmp_path, lambda tensors: None, n_head=0)
    with pytest.raises(ConfigError, match=r"config\.json: n_head must be between 1 and"):
        TFGPTJForCausalLM.from_pretrained(tmp_path)


@pytest.mark.core
def test_nothing_is_drawn_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = keras.initializers.RandomNormal.__call__

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = draw(self, *args, **kwargs)
        drawn.append(concrete(result) is not None and getattr(result, "device", None) != "meta")
        return result

    monkeypatch.setattr(keras.initializers.RandomNormal, "__call__", spy)
    TFGPTJForCausalLM.from_pretrained(BASE)
    if keras.backend.backend() == "tensorflow":
        assert not any(drawn)


@pytest.mark.parametrize("error", [CheckpointFormatError("cut short"), KeyboardInterrupt()])
def test_a_failure_leaves_keras_as_it_was(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    read, calls = SafetensorsFile._read_bytes, []

    def fail(self: SafetensorsFile, start: int, out: memoryview, what: str) -> None:
        calls.append(what)
        if len(calls) > 10:
            raise error
        read(self, start, out, what)

    monkeypatch.setattr(SafetensorsFile, "_read_bytes", fail)
    with pytest.raises(type(error)):
        TFGPTJForCausalLM.from_pretrained(BASE)
    monkeypatch.undo()
    with keras.StatelessScope():  # when it closes, Keras initialises what was left uninitialised
        pass
    assert_loaded(TFGPTJForCausalLM.from_pretrained(BASE), stored_tensors(BASE))
    assert keras.Sequential([keras.layers.Dense(2)])(np.ones((1, 3))).shape == (1, 2)


def test_all_files_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, init = [], SafetensorsFile.__init__
    monkeypatch.setattr(SafetensorsFile, "__init__", lambda self, path: (opened.append(self), init(self, path))[1])
    TFGPTJForCausalLM.from_pretrained(LOADING / "sharded")
    with pytest.raises(CheckpointMismatchError):
        TFGPTJForCausalLM.from_pretrained(LOADING / "sharded", n_layer=5)
    assert len(opened) == 6
    assert all(file._file.closed for file in opened)


@pytest.mark.core
def test_loaded_weights_are_the_models_own(base: Golden) -> None:
    model = base.load(TFGPTJForCausalLM)
    gc.collect()
    _ = [
        np.full(size, 7, np.float32) for size in (256, 768, 1024) for _ in range(50)
    ]  # over memory that was given back
    assert_near(model(base.inputs("none")), base["none/causal_lm/logits"])
    before = loaded_tensors(model)
    model.compile(keras.optimizers.Adam(0.01), jit_compile=keras.backend.backend() == "jax")
    model.fit(base["none/input_ids"], verbose=0, epochs=2)
    after = loaded_tensors(model)
    assert all(np.abs(after[name] - before[name]).max() > 1e-4 for name in before)
    assert_loaded(base.load(TFGPTJForCausalLM), before)


def test_dropout_in_the_configuration() -> None:
    model = TFGPTJForCausalLM.from_pretrained(BASE, embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
    assert_loaded(model, stored_tensors(BASE))
    one, other = (ops.convert_to_numpy(model(np.ones((1, 5), "int32"), training=True)) for _ in range(2))
    assert np.abs(one - other).max() > 0.01


def test_many_threads_load_at_once() -> None:
    expected = stored_tensors(BASE)
    with ThreadPoolExecutor(4) as pool:
        for model in pool.map(lambda _: TFGPTJForCausalLM.from_pretrained(LOADING / "sharded"), range(4)):
            assert_loaded(model, expected)


def test_a_checkpoint_that_is_replaced_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are opened before, the configuration is read after another save."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(BASE, first)
    shutil.copytree(GOLDENS / "silu" / "causal_lm", second)
    from_json_file = GPTJConfig.from_json_file

    def replace_then_read(path: Path, **overrides: Any) -> GPTJConfig:
        for source in second.glob("*"):
            source.replace(first / source.name)
        return from_json_file(path, **overrides)

    monkeypatch.setattr(GPTJConfig, "from_json_file", replace_then_read)
    model = TFGPTJForCausalLM.from_pretrained(first)
    assert model.config.activation_function == "silu"
    assert_loaded(model, stored_tensors(GOLDENS / "silu" / "causal_lm"))


def test_a_checkpoint_that_never_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(BASE, tmp_path, dirs_exist_ok=True)
    from_json_file = GPTJConfig.from_json_file

    def touch_then_read(path: Path, **overrides: Any) -> GPTJConfig:
        (tmp_path / "model.safetensors").write_bytes((BASE / "model.safetensors").read_bytes())
        return from_json_file(path, **overrides)

    monkeypatch.setattr(GPTJConfig, "from_json_file", touch_then_read)
    with pytest.raises(CheckpointError, match="its files are being replaced again and again"):
        TFGPTJForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(("matrices", "vectors"), [("float64", "float64"), ("bfloat16", "float32")])
def test_other_dtypes_in_a_file(tmp_path: Path, matrices: str, vectors: str) -> None:
    stored = {
        name: array.astype(FLOAT_DTYPES[matrices if array.ndim == 2 else vectors])
        for name, array in load_file(BASE / "model.safetensors").items()
    }
    specs = [TensorSpec(name, array.shape, array.dtype) for name, array in stored.items()]
    write_safetensors(tmp_path / "model.safetensors", specs, stored.items())
    shutil.copy(BASE / "config.json", tmp_path)
    assert_loaded(TFGPTJForCausalLM.from_pretrained(tmp_path), stored_tensors(tmp_path))
    if (matrices, keras.backend.backend()) == ("float64", "jax"):
        with pytest.raises(ConfigError, match="JAX has float64 only with jax_enable_x64 set"):
            TFGPTJForCausalLM.from_pretrained(tmp_path, dtype="auto")
    elif (matrices, keras.backend.backend()) != ("float64", "torch"):  # there Keras's layers mix float32 into float64
        assert TFGPTJForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype_policy.name == matrices


def test_classes_without_a_checkpoint_format() -> None:
    from tfgptj.backbone import GPTJBase

    with pytest.raises(ConfigError, match=re.escape("GPTJBase is none of TFGPTJModel")):
        GPTJBase.from_pretrained(BASE)


# Values


def test_values_that_no_model_has(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["transformer.h.0.mlp.fc_in.weight"][3, 5] = np.nan
        tensors["transformer.h.0.mlp.fc_in.bias"][3] = -np.inf
        for name in ("h.0.attn.q_proj.weight", "h.1.ln_1.weight", "ln_f.weight", "wte.weight"):
            tensors[f"transformer.{name}"][:] = 0.0
        tensors["transformer.h.1.mlp.fc_in.weight"][:] = -0.0
        tensors["lm_head.weight"][:] = 0.0
        for name in ("h.0.ln_1.bias", "h.1.mlp.fc_in.bias"):  # as in a model that was never trained
            tensors[f"transformer.{name}"][:] = 0.0

    edited(tmp_path, change)
    with pytest.warns(UserWarning) as seen:
        model = TFGPTJForCausalLM.from_pretrained(tmp_path)
    assert [warning.filename for warning in seen] == [__file__]
    assert str(seen[0].message) == (
        f"{tmp_path / 'model.safetensors'}: of the tensors, 2 hold NaN or infinite values "
        "(transformer.h.0.mlp.fc_in.bias, transformer.h.0.mlp.fc_in.weight) and 6 are all zero (lm_head.weight, "
        "transformer.h.0.attn.q_proj.weight, transformer.h.1.ln_1.weight, transformer.h.1.mlp.fc_in.weight, "
        "transformer.ln_f.weight, …). They were loaded, but no trained model has such weights; "
        "are the files those that were published?"
    )
    assert_loaded(model, stored_tensors(tmp_path))


def test_values_that_a_model_may_have(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["transformer.h.0.mlp.fc_in.weight"][:] = 0.0
        tensors["transformer.h.0.mlp.fc_in.weight"][-1, -1] = 1e-45
        tensors["transformer.ln_f.bias"][:] = 0.0

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TFGPTJForCausalLM.from_pretrained(edited(tmp_path, change))


# Into a model that exists


def other_model(cls: Any = TFGPTJForCausalLM, **options: Any) -> Any:
    """A model of the base checkpoint's configuration, with weights of its own."""
    return cls(GPTJConfig.from_pretrained(BASE), **options)


def fail_after(monkeypatch: pytest.MonkeyPatch, cls: type, method: str, count: int, error: BaseException) -> list[Any]:
    """Let a method fail once, after so many calls."""
    calls: list[Any] = []
    original = getattr(cls, method)

    def call(self: Any, *args: Any) -> Any:
        calls.append(self)
        if len(calls) == count + 1:
            raise error
        return original(self, *args)

    monkeypatch.setattr(cls, method, call)
    return calls


@pytest.mark.core
@pytest.mark.parametrize("directory", [BASE, LOADING / "sharded", LOADING / "bfloat16"])
@pytest.mark.parametrize("dtype", elsewhere(["float32", "bfloat16", "mixed_bfloat16"], "bfloat16"))
def test_loading_into_a_model(directory: Path, dtype: str) -> None:
    model = other_model(dtype=dtype)
    variables = [variable.path for variable in model.variables]
    assert model.load_pretrained(directory) is None
    assert_loaded(model, stored_tensors(directory), "bfloat16" if dtype == "bfloat16" else "float32")
    assert [variable.path for variable in model.variables] == variables


def test_loading_into_a_trained_model_goes_on_with_it(base: Golden) -> None:
    model = other_model()
    model.compile(keras.optimizers.Adam(0.01), jit_compile=False)
    model.fit(base["none/input_ids"], verbose=0)
    first = model.predict(base["none/input_ids"], verbose=0)
    steps = int(model.optimizer.iterations)
    model.load_pretrained(BASE)
    assert_near(model(base.inputs("none")), base["none/causal_lm/logits"])
    second = model.predict(base["none/input_ids"], verbose=0)  # what was compiled sees the new values
    assert_near(second, base["none/causal_lm/logits"])
    assert np.abs(first - second).max() > 0.1
    before = loaded_tensors(model)
    model.fit(base["none/input_ids"], verbose=0)
    assert int(model.optimizer.iterations) == 2 * steps
    assert all(np.abs(array - before[name]).max() > 1e-5 for name, array in loaded_tensors(model).items())
    assert_loaded(TFGPTJForCausalLM.from_pretrained(BASE), stored_tensors(BASE))


@pytest.mark.parametrize("error", [CheckpointFormatError("cut short"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["read", "assign first", "assign midway"])
def test_after_a_failure_nothing_has_changed(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    model = other_model()
    before, threads = loaded_tensors(model), threading.active_count()
    if where == "read":
        fail_after(monkeypatch, SafetensorsFile, "_fill", 10, error)
    else:
        kind = type(model.variables[0])
        calls = fail_after(monkeypatch, kind, "assign", 0 if where == "assign first" else 7, error)
    with pytest.raises(type(error)):
        model.load_pretrained(BASE)
    monkeypatch.undo()
    assert where == "read" or len(calls) in (2, 16)  # each of the first is given back its value
    assert_loaded(model, before)
    assert threading.active_count() == threads
    model.load_pretrained(BASE)
    assert_loaded(model, stored_tensors(BASE))


def test_values_too_large_change_nothing(tmp_path: Path) -> None:
    edited(tmp_path, lambda tensors: tensors["transformer.ln_f.bias"].__setitem__(0, 1e5))  # among the last
    model = other_model(dtype="float16")
    before = loaded_tensors(model)
    with pytest.raises(CheckpointError, match=r"ln_f\.bias: holds values too large for float16"):
        model.load_pretrained(tmp_path)
    assert_loaded(model, before, "float16")


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    model = other_model()
    before = loaded_tensors(model)
    edited(tmp_path, lambda tensors: None, rotary_dim=8, activation_function="relu", layer_norm_epsilon=1e-6, n_head=1)
    with pytest.raises(CheckpointMismatchError) as caught:
        model.load_pretrained(tmp_path)
    assert str(caught.value).splitlines()[1:-1] == [
        "  n_head: 1, the model has 2",
        "  activation_function: 'relu', the model has 'gelu_new'",
        "  layer_norm_epsilon: 1e-06, the model has 1e-05",
        "  rotary_dim: 8, the model has 4",
    ]
    assert_loaded(model, before)


def test_other_tensors_than_the_models(tmp_path: Path) -> None:
    model = other_model()
    before = loaded_tensors(model)
    edited(tmp_path, lambda tensors: tensors.pop("transformer.ln_f.bias"))
    with pytest.raises(CheckpointMismatchError, match=r"missing \(1\): ln_f\.bias"):
        model.load_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: there is no such file; give .* to from_pretrained"):
        model.load_pretrained(tmp_path)
    assert_loaded(model, before)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # TensorFlow's own
def test_a_head_that_is_not_there_keeps_its_values() -> None:
    model = other_model(TFGPTJForSequenceClassification)
    score = loaded_tensors(model)["score.weight"]
    text = r"of TFGPTJForSequenceClassification are not in the checkpoint: score\.weight\. They keep the values"
    with pytest.warns(UserWarning, match=text) as seen:
        model.load_pretrained(BASE)
    assert [warning.filename for warning in seen if warning.category is UserWarning] == [__file__]
    assert_loaded(model, stored_tensors(BASE) | {"score.weight": score})


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # TensorFlow's own
def test_a_resized_vocabulary_keeps_its_values() -> None:
    model = other_model()
    model.resize_token_embeddings(50)
    before = loaded_tensors(model)
    with pytest.raises(CheckpointMismatchError, match="vocab_size: 48, the model has 50"):
        model.load_pretrained(BASE)
    with pytest.warns(UserWarning, match=r"of other shapes there: transformer\.wte\.weight .* They keep the values"):
        model.load_pretrained(BASE, ignore_mismatched_sizes=True)
    resized = {name: before[name] for name in ("wte.weight", "lm_head.weight", "lm_head.bias")}
    assert_loaded(model, stored_tensors(BASE) | resized)


def test_a_model_with_lora_is_refused() -> None:
    model = other_model()
    model.transformer.blocks[1].attn.v_proj.enable_lora(2)
    before = [numbers(variable) for variable in model.variables]
    with pytest.raises(
        CheckpointError, match=r"blocks\.1\.attn\.v_proj\.kernel: has LoRA weights; load the weights into"
    ):
        model.load_pretrained(BASE)
    assert all(np.array_equal(numbers(v), old) for v, old in zip(model.variables, before, strict=True))


def test_a_quantized_model_is_refused() -> None:
    model = other_model()
    model.transformer.blocks[0].attn.q_proj.quantize("int8")
    with pytest.raises(
        CheckpointError, match=r"blocks\.0\.attn\.q_proj\.kernel: is quantized; load the weights into a new"
    ):
        model.load_pretrained(BASE)


@pytest.mark.parametrize("error", [CheckpointFormatError("cut short"), KeyboardInterrupt()])
def test_a_failed_load_leaves_other_models_and_no_threads(
    monkeypatch: pytest.MonkeyPatch, base: Golden, error: BaseException
) -> None:
    model, threads = base.load(TFGPTJForCausalLM), threading.active_count()
    files = fail_after(monkeypatch, SafetensorsFile, "_fill", 12, error)
    with pytest.raises(type(error)):
        TFGPTJForCausalLM.from_pretrained(LOADING / "sharded")
    monkeypatch.undo()
    assert all(file._file.closed for file in files)
    assert threading.active_count() == threads
    assert_loaded(model, stored_tensors(BASE))
    assert_near(model(base.inputs("none")), base["none/causal_lm/logits"])
