"""Where the parts of a model's weights go on several devices of the JAX backend."""

from __future__ import annotations

import keras

from tfgptj.config import GPTJConfig
from tfgptj.errors import BackendError, InputError

AXES = ("batch", "model")

# What is computed for each head, or for each unit between the two layers of the MLP, stays on one device; what sums
# over those is summed over devices.
_SPLIT, _SUMMED = "(q_proj|k_proj|v_proj|fc_in)", "(out_proj|fc_out)"


def layout_map(mesh: keras.distribution.DeviceMesh, config: GPTJConfig | None = None) -> keras.distribution.LayoutMap:
    """Layouts of a GPT-J's weights, for `keras.distribution.ModelParallel` on the JAX backend.

    Every matrix of the blocks, the embedding and the language model's head are parted along the mesh's axis "model";
    biases and layer norms that all devices need are on all of them. Where the vocabulary cannot be parted evenly, its
    matrices are parted along the model's width. Optimizer state follows its weights, and adapters of LoRA their layer.

    Args:
        mesh: a mesh with the axes "batch", for data, and "model", for weights.
        config: the model's; None is that of GPT-J-6B.

    Returns:
        A `keras.distribution.LayoutMap`. Rules are for variables' paths; a model within another is found, too.

    Raises:
        BackendError: on another backend, where Keras accepts layouts and ignores them.
        InputError: if the mesh has other axes, or heads or widths cannot be parted evenly.

    Source: Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
    Parallelism", section 3.
    """
    backend = keras.backend.backend()
    if backend != "jax":
        remedy = "tf.distribute.MirroredStrategy" if backend == "tensorflow" else "KERAS_BACKEND=jax"
        raise BackendError(
            f"keras.distribution parts weights on the JAX backend only, and this is {backend}: take {remedy}"
        )
    config = GPTJConfig() if config is None else config
    if sorted(mesh.axis_names) != sorted(AXES):
        raise InputError(f"the mesh has the axes {', '.join(mesh.axis_names)}; expected {' and '.join(AXES)}")
    devices = mesh.shape[mesh.axis_names.index("model")]
    for name, size in (("n_head", config.n_head), ("n_inner", config.inner_dim), ("n_embd", config.n_embd)):
        if size % devices:
            raise InputError(f"{name}={size} cannot be parted evenly among {devices} devices of the axis model")
    layouts = keras.distribution.LayoutMap(mesh)
    # Kernels are [out, in], A is [in, rank] and B [rank, out].
    layouts[f".*{_SPLIT}/kernel"] = ("model", None)
    layouts[f".*{_SPLIT}/lora_kernel_b"] = (None, "model")
    layouts[f".*{_SPLIT}/bias"] = ("model",)
    layouts[f".*{_SUMMED}/kernel"] = (None, "model")
    layouts[f".*{_SUMMED}/lora_kernel_a"] = ("model", None)
    if config.vocab_size % devices == 0:
        layouts[".*wte/embeddings"] = ("model", None)
        layouts[".*lm_head/dense/kernel"] = ("model", None)
        layouts[".*lm_head/(dense/)?bias"] = ("model",)
    else:
        layouts[".*wte/embeddings"] = (None, "model")
        layouts[".*lm_head/dense/kernel"] = (None, "model")
    return layouts
