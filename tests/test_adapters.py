"""Adapters in files: those that the PEFT library wrote, our own, and such as must be refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import FIXTURES, GOLDENS, assert_near, elsewhere, foremost, numbers
from keras import ops
from safetensors.numpy import load_file, save_file

from tfgptj import GPTJConfig, TFGPTJForCausalLM, TFGPTJForSequenceClassification, TFGPTJModel
from tfgptj.errors import CheckpointError, CheckpointFormatError, CheckpointMismatchError, InputError
from tfgptj.training import adapters
from tfgptj.training.adapters import load_adapter, save_adapter
from tfgptj.training.lora import adaptation_of

PEFT = FIXTURES / "peft_goldens"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = np.array([[3, 5, 7, 9, 4], [40, 41, 42, 43, 44]], "int32")
CLASSES = {"classifier": (TFGPTJForSequenceClassification, "classification")}
A = "base_model.model.transformer.h.0.attn.q_proj.lora_A.weight"

pytestmark = pytest.mark.usefixtures("eager_steps")


def base(name: str = "", mode: str | None = None, quantized: str = "q_proj|v_proj") -> Any:
    cls, head = CLASSES.get(name, (TFGPTJForCausalLM, "causal_lm"))
    model = cls.from_pretrained(GOLDENS / "base" / head)
    if mode is not None:
        model.quantize(mode, filters=quantized)  # Keras is slow in this
    return model


def adapted(seed: int = 0, mode: str | None = None, **options: Any) -> Any:
    model = base(mode=mode)
    model.add_lora(**{"rank": 2, "alpha": 3, **options})
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(0.3 * rng.standard_normal(variable.shape))
    return model


@pytest.fixture(scope="module")
def untouched() -> Any:
    """A model for what is refused: nothing of it changes."""
    return base()


def state(model: Any) -> list[Any]:
    variables = [variable for variable in model.variables if "seed" not in variable.path]
    values = [np.array(ops.convert_to_numpy(ops.convert_to_tensor(variable))) for variable in variables]
    return [adaptation_of(model), [variable.trainable for variable in variables], values]


def assert_same(before: list[Any], after: list[Any]) -> None:
    assert before[:2] == after[:2]
    assert all(np.array_equal(old, new) for old, new in zip(before[2], after[2], strict=True))


@pytest.mark.core
@pytest.mark.parametrize(
    "name", elsewhere(["plain", "patterns", "lora_biases", "lm_head", "classifier", "pickled"], "patterns")
)
def test_adapters_of_peft_compute_as_there(name: str) -> None:
    model = base(name)
    load_adapter(model, PEFT / name)
    golden = np.load(PEFT / ("plain" if name == "pickled" else name) / "outputs.npz")
    assert_near(model(golden["input_ids"]), golden["logits"])


@pytest.mark.core
def test_a_step_of_training_is_that_of_peft() -> None:
    model, golden = base(), np.load(PEFT / "plain" / "outputs.npz")
    model.load_adapter(PEFT / "plain")
    model.compile(keras.optimizers.SGD(0.5))
    loss = model.train_on_batch(golden["input_ids"], golden["input_ids"])
    assert float(loss) == pytest.approx(float(golden["loss"]), rel=1e-5)
    steps = {name.removeprefix("step/"): golden[name] for name in golden.files if name.startswith("step/")}
    assert len(steps) == 8
    for i, block in enumerate(model.transformer.blocks):
        for name in ("q_proj", "v_proj"):
            layer, prefix = getattr(block.attn, name), f"base_model.model.transformer.h.{i}.attn.{name}"
            assert_near(layer.lora_kernel_a.value, steps[f"{prefix}.lora_A.weight"].T)
            assert_near(layer.lora_kernel_b.value, steps[f"{prefix}.lora_B.weight"].T)


@pytest.mark.parametrize("name", foremost(["plain", "patterns", "lora_biases", "classifier"], "patterns", "classifier"))
def test_what_peft_wrote_is_written_again(tmp_path: Path, name: str) -> None:
    model = base(name)
    model.load_adapter(PEFT / name)
    save_adapter(model, tmp_path)
    ours, theirs = load_file(tmp_path / WEIGHTS), load_file(PEFT / name / WEIGHTS)
    # PEFT writes the biases of modules_to_save three times where all biases are trained.
    assert ours.keys() == {key for key in theirs if ".modules_to_save." not in key and ".original_module." not in key}
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    other = base(name)
    other.load_adapter(tmp_path)
    assert_same(state(model), state(other))
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == (
        "SEQ_CLS" if name == "classifier" else "CAUSAL_LM"
    )


def test_the_file_is_small_and_says_what_it_is_for(tmp_path: Path) -> None:
    model = adapted(targets=("q_proj", "fc_in"), also_train="ln_f", dropout=0.25)
    save_adapter(model, tmp_path / "new" / "place", base_model="EleutherAI/gpt-j-6b", dtype="bfloat16")
    directory = tmp_path / "new" / "place"
    fields = json.loads((directory / CONFIG).read_text())
    assert (fields["r"], fields["lora_alpha"], fields["lora_dropout"]) == (2, 3, 0.25)
    assert (fields["target_modules"], fields["modules_to_save"]) == (["fc_in", "q_proj"], ["ln_f"])
    assert fields["base_model_name_or_path"] == "EleutherAI/gpt-j-6b"
    assert (directory / WEIGHTS).stat().st_size < 2 * model.num_parameters(only_trainable=True) + 4096
    assert sorted(os.listdir(directory)) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(("mode", "other"), foremost([(None, "int8"), ("int8", None), ("int4", None)], ("int4", None)))
def test_adapters_go_from_one_base_to_another(tmp_path: Path, mode: str | None, other: str | None) -> None:
    model = adapted(mode=mode)
    model.save_adapter(tmp_path)
    target = base(mode=other)
    target.load_adapter(tmp_path)
    for ours, theirs in zip(model.trainable_variables, target.trainable_variables, strict=True):
        np.testing.assert_array_equal(numbers(ours.value), numbers(theirs.value))
    plain = base()
    plain.load_adapter(tmp_path)
    assert_near(target(IDS), numbers(plain(IDS)), 2e-5 if other is None else 0.1)


def test_models_without_head_and_with_it(tmp_path: Path) -> None:
    model = adapted()
    model.save_adapter(tmp_path / "with")
    headless = TFGPTJModel.from_pretrained(GOLDENS / "base" / "causal_lm")
    headless.load_adapter(tmp_path / "with")
    assert_near(headless(IDS), numbers(model.transformer(IDS)))
    headless.save_adapter(tmp_path / "without")
    assert "base_model.model.h.0.attn.q_proj.lora_A.weight" in load_file(tmp_path / "without" / WEIGHTS)
    other = base()
    other.load_adapter(tmp_path / "without")
    assert_near(other(IDS), numbers(model(IDS)))


def test_adapters_are_swapped_without_compiling(tmp_path: Path) -> None:
    first, second = adapted(1), adapted(2)
    first.save_adapter(tmp_path / "1")
    second.save_adapter(tmp_path / "2")
    texts = [model.generate(IDS, max_new_tokens=6) for model in (first, second)]
    assert (texts[0] != texts[1]).any()
    programs = first.__dict__["_generation_programs"]
    first.load_adapter(tmp_path / "2")
    np.testing.assert_array_equal(first.generate(IDS, max_new_tokens=6), texts[1])
    assert first.__dict__["_generation_programs"] is programs
    first.load_adapter(tmp_path / "1")
    np.testing.assert_array_equal(first.generate(IDS, max_new_tokens=6), texts[0])

    fields = json.loads((tmp_path / "2" / CONFIG).read_text())
    (tmp_path / "2" / CONFIG).write_text(json.dumps(fields | {"lora_alpha": 0.001}))
    first.load_adapter(tmp_path / "2")
    assert first.transformer.blocks[0].attn.q_proj.lora_alpha == 0.001
    np.testing.assert_array_equal(first.generate(IDS, max_new_tokens=6), base().generate(IDS, max_new_tokens=6))


def test_merged_adapters_are_saved_and_not_replaced(tmp_path: Path) -> None:
    model = adapted()
    model.save_adapter(tmp_path / "before")
    model.merge_lora()
    model.save_adapter(tmp_path / "after")
    assert (tmp_path / "before" / WEIGHTS).read_bytes() == (tmp_path / "after" / WEIGHTS).read_bytes()
    with pytest.raises(InputError, match="the model's adapters are merged; unmerge_lora"):
        model.load_adapter(tmp_path / "before")


def rewrite(directory: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The golden adapters with other tensors."""
    tensors = load_file(PEFT / "plain" / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    shutil.copy(PEFT / "plain" / CONFIG, directory)
    return directory


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda t: t.pop(A), CheckpointMismatchError, r"h\.0\.attn\.q_proj: has \.lora_B\.weight alone"),
        (lambda t: t.update({A: t[A][:3].copy()}), CheckpointMismatchError, rf"{A}: is \[3, 16\], expected \[4, 16\]"),
        (lambda t: t.update({A: t[A].astype("int32")}), CheckpointMismatchError, rf"{A}: is int32, expected floats"),
        (lambda t: t.update({A: t[A] * np.nan}), CheckpointFormatError, f"{A} holds NaN or infinite values"),
        (lambda t: t.update({A.replace("h.0", "h.2"): t[A]}), CheckpointMismatchError, "1 tensors are for noth.*h.2"),
        (lambda t: t.update({A.removeprefix("base_model.model."): t[A]}), CheckpointFormatError, "under two names"),
        (lambda t: [t.pop(n) for n in list(t) if "h.1.attn.v" in n], CheckpointMismatchError,
         r"target_modules names transformer\.h\.1\.attn\.v_proj, but the file has no"),
        (lambda t: [t.pop(n) for n in list(t)], CheckpointMismatchError, "holds no LoRA adapters"),
        (lambda t: t.update({"base_model.model.lm_head.bias": np.ones(48, "float32")}), CheckpointMismatchError,
         "lm_head.bias, which is not the model's own"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(tmp_path: Path, untouched: Any, change: Any, error: Any, text: str) -> None:
    before = state(untouched)
    with pytest.raises(error, match=text):
        untouched.load_adapter(rewrite(tmp_path, change))
    assert_same(before, state(untouched))


def test_whole_weights_that_are_missing_or_quantized(tmp_path: Path) -> None:
    shutil.copytree(PEFT / "classifier", tmp_path, dirs_exist_ok=True)
    model = base("classifier", "int8", "score")
    with pytest.raises(InputError, match="score is quantized, and cannot be trained whole"):
        model.load_adapter(tmp_path)
    assert adaptation_of(model) is None
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({key: value for key, value in tensors.items() if "score" not in key}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointMismatchError, match=r"score\.weight: is missing"):
        base("classifier").load_adapter(tmp_path)
    with pytest.raises(CheckpointMismatchError, match=r"lm_head\.base_layer\.\w+, which is not the model's own"):
        base(mode="int8", quantized="dense").load_adapter(PEFT / "lm_head")


def test_adapters_of_another_model(tmp_path: Path) -> None:
    model = adapted(targets="q_proj")
    model.save_adapter(tmp_path)
    fields = {**model.config.to_dict(), "rotary_dim": 8, "vocab_size": 99}
    other = TFGPTJForCausalLM(GPTJConfig.from_dict(fields))
    with pytest.raises(CheckpointMismatchError, match="another architecture:\n  rotary_dim: 4, the model has 8$"):
        other.load_adapter(tmp_path)
    fields["rotary_dim"] = 4
    TFGPTJForCausalLM(GPTJConfig.from_dict(fields)).load_adapter(tmp_path)


@pytest.mark.parametrize(("text", "why"), [("{", "Expecting"), ("3", "'3'"), ('{"n_embd": 0}', "n_emb")])
def test_metadata_that_are_none(tmp_path: Path, untouched: Any, text: str, why: str) -> None:
    save_file(load_file(PEFT / "plain" / WEIGHTS), tmp_path / WEIGHTS, {"tfgptj_base": text})
    shutil.copy(PEFT / "plain" / CONFIG, tmp_path)
    with pytest.raises(CheckpointFormatError, match=f"tfgptj_base in the metadata is no configuration: .*{why}"):
        untouched.load_adapter(tmp_path)


def test_other_adapters_than_the_model_has(tmp_path: Path) -> None:
    model = adapted(rank=4)
    before = state(model)
    for options, text in [
        (
            {"rank": 2},
            r"4 differ; transformer\.h\.0\.attn\.q_proj: rank 2 in the file, rank 4 in the model; remove_lora",
        ),
        (
            {"rank": 4, "targets": "q_proj"},
            r"2 differ; transformer\.h\.0\.attn\.v_proj: False in the file, rank 4 in the",
        ),
        ({"rank": 4, "also_train": "ln_f"}, r"2 differ; transformer\.ln_f\.bias: True in the file, False in the model"),
    ]:
        adapted(**options).save_adapter(tmp_path)
        with pytest.raises(CheckpointMismatchError, match=text):
            model.load_adapter(tmp_path)
        assert_same(before, state(model))


def test_files_that_are_not_there(tmp_path: Path, untouched: Any) -> None:
    with pytest.raises(CheckpointError, match="adapter_config.json: cannot be read: No such file"):
        untouched.load_adapter(tmp_path)
    shutil.copy(PEFT / "plain" / CONFIG, tmp_path)
    with pytest.raises(CheckpointError, match="holds no adapters; looked for adapter_model.safetensors and adapter_mo"):
        untouched.load_adapter(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"\0" * 64)
    with pytest.raises(CheckpointFormatError, match="not a safetensors file"):
        untouched.load_adapter(tmp_path)


def test_a_load_that_fails_leaves_the_model_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    model = base()
    before = state(model)
    monkeypatch.setattr(adapters, "assign_all", fail)
    with pytest.raises(MemoryError):
        model.load_adapter(PEFT / "plain")
    assert_same(before, state(model))


def test_what_cannot_be_saved(tmp_path: Path, untouched: Any) -> None:
    with pytest.raises(InputError, match="the model has no LoRA adapters"):
        untouched.save_adapter(tmp_path)
    model = adapted()
    with pytest.raises(CheckpointError, match="dtype must be one of float32, .*; got 'int8'"):
        model.save_adapter(tmp_path, dtype="int8")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: could not be written: "):
        model.save_adapter(tmp_path / "file")
    model.transformer.ln_f.gamma.trainable = True
    with pytest.raises(CheckpointError, match=r"ln_f\.weight trains, but not the whole of its layer nor all biases"):
        model.save_adapter(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_crash_leaves_old_adapters_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, same, other = adapted(1), adapted(2), adapted(3, rank=3)
    first.save_adapter(tmp_path)
    whole = state(first)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "disk")

    with monkeypatch.context() as patch:
        patch.setattr(adapters, "write_safetensors", fail)
        with pytest.raises(CheckpointError, match="disk: could not be written: No space left"):
            same.save_adapter(tmp_path)
    model = base()
    model.load_adapter(tmp_path)
    assert_same(whole, state(model))
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "replaced_file", fail)
        with pytest.raises(CheckpointError, match="disk: could not be written: No space left"):
            other.save_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="adapter_config.json: cannot be read"):
        base().load_adapter(tmp_path)
    other.save_adapter(tmp_path)
    base().load_adapter(tmp_path)
