"""The optimizers: PyTorch's numbers, and float32 state for weights of fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from conftest import FIXTURES, foremost, numbers
from keras import ops
from test_models import IDS, config

from tfgptj import TFGPTJForCausalLM
from tfgptj.errors import InputError
from tfgptj.training.optimizers import Adafactor, AdamW
from tfgptj.training.schedules import learning_rate_schedule

STEPS, DECAY, RATE = 5, 0.1, 0.02  # of fixtures/make_optimizer_goldens.py
CASES: dict[str, Any] = {
    "adamw": lambda: AdamW(RATE, DECAY),
    "adamw_betas": lambda: AdamW(RATE, DECAY, beta_2=0.95),
    "adamw_scheduled": lambda: AdamW(learning_rate_schedule("linear", RATE, warmup_steps=2, total_steps=6), DECAY),
    "adamw_clipped": lambda: AdamW(RATE, DECAY, global_clipnorm=1.0),
    "adafactor": lambda: Adafactor(RATE, DECAY),
    "adafactor_scheduled": lambda: Adafactor(
        learning_rate_schedule("linear", RATE, warmup_steps=2, total_steps=6), DECAY
    ),
}
OPTIMIZERS: dict[str, Any] = {"adamw": AdamW, "adafactor": Adafactor}
RATES = {"adamw": 1e-3, "adafactor": 5e-3}  # which change most weights by less than bfloat16 can hold


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "optimizer_goldens.npz") as file:
        return dict(file)


def variables_of(values: list[np.ndarray], dtype: str = "float32") -> list[keras.Variable]:
    return [keras.Variable(value, dtype=dtype, name=f"w{i}") for i, value in enumerate(values)]


def initial(goldens: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [goldens[f"weights/{i}"] for i in range(4)]


@pytest.mark.core
@pytest.mark.parametrize("case", CASES)
def test_weights_are_pytorch_s_after_each_step(case: str, goldens: dict[str, np.ndarray]) -> None:
    variables, optimizer = variables_of(initial(goldens)), CASES[case]()
    for step in range(STEPS):
        optimizer.apply([ops.convert_to_tensor(goldens[f"gradients/{step}/{i}"]) for i in range(4)], variables)
        for i, variable in enumerate(variables):
            np.testing.assert_allclose(numbers(variable), goldens[f"{case}/{step}/{i}"], atol=1e-6, rtol=1e-6)


@pytest.mark.core
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_narrow_weights_go_the_way_of_wide_ones(name: str, goldens: dict[str, np.ndarray]) -> None:
    start = [numbers(v) for v in variables_of(initial(goldens), "bfloat16")]
    narrow, wide = variables_of(start, "bfloat16"), variables_of(start)
    optimizers = [OPTIMIZERS[name](1e-5, weight_decay=0.1) for _ in range(2)]
    for step in range(60):
        gradients = [ops.cast(goldens[f"gradients/{step % STEPS}/{i}"], "bfloat16") for i in range(4)]
        optimizers[0].apply(gradients, narrow)
        optimizers[1].apply([ops.cast(g, "float32") for g in gradients], wide)
    assert {v.dtype for v in optimizers[0].variables} <= {"float32", "int64", "int32"}
    for a, b in zip(optimizers[0]._masters, wide, strict=True):
        np.testing.assert_array_equal(numbers(a), numbers(b))
    for a, b in zip(narrow, wide, strict=True):
        np.testing.assert_array_equal(numbers(a), numbers(ops.cast(b, "bfloat16")))


def test_without_masters_small_updates_are_lost(goldens: dict[str, np.ndarray]) -> None:
    start = [np.ones((3, 4), "float32")]
    gradient = [ops.ones((3, 4), "bfloat16")]
    for master, expected in ((True, 0.99), (False, 1.0)):
        [variable], optimizer = variables_of(start, "bfloat16"), AdamW(1e-3, 0.0, float32_master=master)
        for _ in range(10):
            optimizer.apply(gradient, [variable])
        np.testing.assert_allclose(numbers(variable), expected, atol=2**-9)
    # Of larger ones none, while Keras's own class makes none at all.
    for optimizer, expected in ((AdamW(0.1, 0.0, float32_master=False), 0.9), (keras.optimizers.Adam(0.1), 1.0)):
        [variable] = variables_of(start, "bfloat16")
        optimizer.apply(gradient, [variable])
        np.testing.assert_allclose(numbers(variable), expected, atol=2**-9)


def test_a_weight_that_is_assigned_to_is_taken_up() -> None:
    [variable], optimizer = variables_of([np.ones((2, 2), "float32")], "bfloat16"), AdamW(1e-4, 0.0)
    gradient = [ops.ones((2, 2), "bfloat16")]
    for _ in range(2):
        optimizer.apply(gradient, [variable])
    variable.assign(np.array([[5.0, 1.0], [1.0, 1.0]]))
    optimizer.apply(gradient, [variable])
    [master] = optimizer._masters
    np.testing.assert_allclose(numbers(master), [[5 - 1e-4, 1 - 3e-4], [1 - 3e-4, 1 - 3e-4]], atol=2e-7)


def names_that_decay(optimizer: Any, model: Any) -> set[str]:
    """Weights that change where the gradient is zero."""
    before = [numbers(v) for v in model.trainable_variables]
    optimizer.apply([ops.zeros(v.shape, v.dtype) for v in model.trainable_variables], model.trainable_variables)
    changed = zip(model.trainable_variables, before, strict=True)
    return {v.path.split("/")[-2] for v, old in changed if not np.array_equal(numbers(v), old)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_decay_and_embeddings_by_choice(name: str) -> None:
    matrices = {"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out", "dense"}
    model = TFGPTJForCausalLM(config())
    assert names_that_decay(OPTIMIZERS[name](0.1, 0.1), model) == {*matrices, "wte"}
    assert names_that_decay(OPTIMIZERS[name](0.1, 0.1, decay_embeddings=False), model) == matrices
    assert names_that_decay(OPTIMIZERS[name](0.1, 0.0), model) == set()
    excluding = OPTIMIZERS[name](0.1, 0.1)
    excluding.exclude_from_weight_decay(var_list=[model.lm_head.dense.kernel])
    assert "dense" not in names_that_decay(excluding, model)


def losses(model: Any, optimizer: Any, epochs: int, **options: Any) -> list[float]:
    model.compile(optimizer, **options)
    return list(model.fit(IDS, batch_size=2, epochs=epochs, verbose=0).history["loss"])


JIT: dict[str, Any] = {"not compiled": {}, "xla": {"jit_compile": True}}


@pytest.mark.core
@pytest.mark.parametrize("jit", foremost(JIT, "not compiled"))
@pytest.mark.parametrize("name", foremost(OPTIMIZERS, "adafactor"))
def test_a_bfloat16_model_learns_as_a_float32_one_does(name: str, jit: str) -> None:
    found = {}
    for dtype in ("float32", "bfloat16"):
        keras.utils.set_random_seed(0)
        model = TFGPTJForCausalLM(config(), dtype=dtype)
        found[dtype] = losses(model, OPTIMIZERS[name](RATES[name], global_clipnorm=1.0), 8, **JIT[jit])
    assert {v.dtype for v in model.trainable_variables} == {"bfloat16"}
    apart = []
    for master, v in zip(model.optimizer._masters, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(numbers(ops.cast(master, "bfloat16")), numbers(v))
        apart.append(np.abs(numbers(master) - numbers(v)).max())
    assert max(apart) > 0  # what the weights cannot hold is kept
    falls = {dtype: series[0] - series[-1] for dtype, series in found.items()}
    assert falls["bfloat16"] == pytest.approx(falls["float32"], rel=0.1) and falls["float32"] > 0.1


@pytest.mark.usefixtures("eager_steps")
def test_training_goes_on_from_a_saved_model(tmp_path: Path) -> None:
    model = TFGPTJForCausalLM(config(), dtype="bfloat16")
    schedule = learning_rate_schedule("linear", 1e-2, warmup_steps=2, total_steps=20)
    losses(model, AdamW(schedule, 0.1, decay_embeddings=False), 3)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again.optimizer) is AdamW and not again.optimizer.decay_embeddings
    for a, b in zip(again.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(numbers(a), numbers(b))
    for each in (model, again):
        each.fit(IDS, batch_size=2, epochs=2, verbose=0)
    for a, b in zip(again.optimizer._masters, model.optimizer._masters, strict=True):
        np.testing.assert_allclose(numbers(a), numbers(b), atol=5e-4)  # JAX compiles anew, and rounds otherwise


@pytest.mark.usefixtures("eager_steps")
def test_training_that_broke_off_goes_on(tmp_path: Path) -> None:
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                raise KeyboardInterrupt

    found = []
    for callbacks in ([], [Stop()]):
        keras.utils.set_random_seed(0)
        model = TFGPTJForCausalLM(config(), dtype="bfloat16")
        model.compile(Adafactor(1e-2))
        backup = [keras.callbacks.BackupAndRestore(tmp_path / "state", delete_checkpoint=False)] if callbacks else []
        options = {"batch_size": 2, "epochs": 4, "verbose": 0, "shuffle": False}
        if callbacks:
            with pytest.raises(KeyboardInterrupt):
                model.fit(IDS, callbacks=[*backup, *callbacks], **options)
            keras.utils.set_random_seed(7)
            model = TFGPTJForCausalLM(config(), dtype="bfloat16")
            model.compile(Adafactor(1e-2))
        model.fit(IDS, callbacks=backup, **options)
        found.append([numbers(v) for v in (*model.trainable_variables, *model.optimizer.variables)])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_adafactor_keeps_rows_and_columns_alone() -> None:
    model = TFGPTJForCausalLM(config())
    losses(model, Adafactor(), 1)
    assert sum(int(np.prod(v.shape)) for v in model.optimizer.variables) < 0.35 * model.num_parameters()


def test_accumulated_gradients_of_narrow_weights(goldens: dict[str, np.ndarray]) -> None:
    found = []
    for steps in (None, 2):
        variables = variables_of(initial(goldens), "bfloat16")
        optimizer = AdamW(RATE, gradient_accumulation_steps=steps)
        for _ in range(steps or 1):
            optimizer.apply([ops.cast(goldens[f"gradients/0/{i}"], "bfloat16") for i in range(4)], variables)
        found.append([numbers(v) for v in variables])
    for a, b, before in zip(*found, initial(goldens), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2)
        assert (a != before).any()


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="amsgrad is Keras's: take keras.optimizers.AdamW"):
        AdamW(amsgrad=True)
    variables = variables_of([np.ones((2, 2), "float32")], "bfloat16")
    with pytest.raises(InputError, match="use_ema keeps averages in place of the weights, and w0 would round them"):
        AdamW(use_ema=True).build(variables)
    wide = variables_of([np.ones((2, 2), "float32")])
    optimizer = AdamW(0.1, 0.0, use_ema=True, ema_momentum=0.5)
    for _ in range(2):
        optimizer.apply([ops.ones((2, 2))], wide)
    optimizer.finalize_variable_values(wide)
    np.testing.assert_allclose(numbers(wide[0]), 0.85, rtol=1e-5)
