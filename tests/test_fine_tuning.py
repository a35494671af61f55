"""`tfgptj train` and what is behind it, on Python's own documentation: runs, results, interruptions, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from documentation import definitions, paragraphs, questions, topic_texts, write_lines

from tfgptj import (
    GPTJConfig,
    GPTJTokenizer,
    TFGPTJForCausalLM,
    TFGPTJForQuestionAnswering,
    TFGPTJForSequenceClassification,
    cli,
)
from tfgptj.errors import BackendError, InputError, InputTypeError
from tfgptj.training.devices import Devices, is_first_worker
from tfgptj.training.file_kinds import kind_of
from tfgptj.training.fine_tuning import fine_tune
from tfgptj.training.optimizers import Adafactor
from tfgptj.training.rows import read_rows, renamed_rows, split_rows
from tfgptj.training.settings import FineTuning, check_output
from tfgptj.training.tasks import Classification

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SIZES: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8, "n_positions": 128}
STEPS, BLOCK = 30, 32  # one epoch and a half


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and in `model` a model that has learnt nothing."""
    place = tmp_path_factory.mktemp("fine_tuning")
    train, held_out = topic_texts()
    (place / "train.txt").write_text(train[:11000], encoding="utf-8")
    (place / "held_out.txt").write_text(held_out[:3000], encoding="utf-8")
    tokenizer = GPTJTokenizer.train([train[:11000]], vocab_size=400, model_max_length=128)
    keras.utils.set_random_seed(0)
    dropout = {"embd_pdrop": 0.1, "resid_pdrop": 0.1}
    model = TFGPTJForCausalLM(GPTJConfig(vocab_size=400, eos_token_id=tokenizer.eos_token_id, **SIZES, **dropout))
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return place


def settings_for(place: Path, output: str, **options: Any) -> FineTuning:
    fields: dict[str, Any] = {
        "train_files": (str(place / "train.txt"),),
        "validation_files": (str(place / "held_out.txt"),),
        "model": str(place / "model"),
        "output_dir": str(place / output),
        "block_size": BLOCK,
        "steps": STEPS,
        "learning_rate": 1e-2,
        "warmup_steps": 5,
    }
    return FineTuning(**{**fields, **options})


class Stop(keras.callbacks.Callback):
    """Instead of a power cut."""

    steps = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.steps += 1
        if self.steps == 26:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def tuned(place: Path) -> dict[str, Any]:
    """A run from the shell, with its printed lines in `out`."""
    flags = {"block-size": BLOCK, "steps": STEPS, "learning-rate": "1e-2", "warmup-steps": 5}
    command = ["train", "--train-file", str(place / "train.txt"), "--validation-file", str(place / "held_out.txt")]
    command += ["--model", str(place / "model"), "--output-dir", str(place / "tuned"), "--quiet"]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert cli.main(command) == cli.OK
    return json.loads((place / "tuned" / "summary.json").read_text())


def test_a_language_model_learns(place: Path, tuned: dict[str, Any]) -> None:
    """Its perplexity begins at that of a guess among all tokens."""
    assert 350 < tuned["before"]["perplexity"] < 450
    assert tuned["validation"]["perplexity"] < 130
    assert tuned["steps"] == STEPS and 1 < tuned["epochs"] < 2 and tuned["trainable"] == tuned["parameters"]
    assert sorted(path.name for path in (place / "tuned").iterdir()) == [
        *("config.json", "merges.txt", "model.safetensors", "special_tokens_map.json", "summary.json"),
        *("tokenizer.json", "tokenizer_config.json", "vocab.json"),
    ]


def test_what_the_summary_says_is_true_of_the_saved_model(place: Path, tuned: dict[str, Any]) -> None:
    """Computed again in NumPy, from logits."""
    model = TFGPTJForCausalLM.from_pretrained(place / "tuned")
    tokenizer = GPTJTokenizer.from_pretrained(place / "tuned")
    text = (place / "held_out.txt").read_text(encoding="utf-8")
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    blocks = [ids[start : start + BLOCK] for start in range(0, len(ids), BLOCK)]
    nats, tokens, size = 0.0, 0, 0
    logits = np.asarray(model(np.array([block + [0] * (BLOCK - len(block)) for block in blocks])))
    for block, rows in zip(blocks, logits.astype("float64"), strict=True):
        for target, row in zip(block[1:], rows, strict=False):
            nats += math.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
            tokens += 1
            size += 0 if target == tokenizer.eos_token_id else len(tokenizer.decode_bytes([target]))
    found = tuned["validation"]
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-3)
    assert found["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-4)


def test_a_run_that_was_cut_off_goes_on(place: Path, tuned: dict[str, Any]) -> None:
    settings = settings_for(place, "cut", save_freq=8)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(settings, callbacks=[Stop()], verbose=0)
    assert [path.name for path in (place / "cut" / "checkpoints").iterdir()] == ["step-00000024.safetensors"]
    with pytest.raises(InputError, match=r"the run there has learning_rate=0\.01, and now it is 0\.5; to go on"):
        check_output(dataclasses.replace(settings, learning_rate=0.5))
    summary = fine_tune(settings, verbose=0)
    assert summary["validation"] == tuned["validation"] and summary["before"] == tuned["before"]
    one, other = ((place / name / "model.safetensors").read_bytes() for name in ("tuned", "cut"))
    assert one == other
    with pytest.raises(InputError, match="there is something already, and no run that was cut off; choose another"):
        fine_tune(settings)
    assert not (place / "cut" / "checkpoints").exists()


def test_lora(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_for(
        place,
        "lora",
        steps=8,
        lora=2,
        lora_alpha=4.0,
        lora_targets=("all-linear",),
        lora_dropout=0.1,
        sample_prompt="def",
    )
    summary = fine_tune(dataclasses.replace(settings, validation_files=(), validation_split=0.0), verbose=0)
    assert summary["trainable"] == 2 * 2 * (4 * (32 + 32) + 2 * (32 + 128)) // 2
    assert capsys.readouterr().out.startswith("\ndef")
    assert json.loads((place / "lora/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        place / "model"
    )
    merged = TFGPTJForCausalLM.from_pretrained(place / "lora")
    base = TFGPTJForCausalLM.from_pretrained(place / "model")
    ids = np.arange(8)[None]
    before = np.asarray(base(ids))
    base.load_adapter(place / "lora" / "adapter")
    assert np.abs(np.asarray(base(ids)) - np.asarray(merged(ids))).max() < 1e-4
    assert np.abs(before - np.asarray(merged(ids))).max() > 1e-2


def test_options_reach_the_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that `fit` is called with, and on what."""
    seen: dict[str, Any] = {}

    def fit(model: Any, data: Any, callbacks: Any, **options: Any) -> keras.callbacks.History:
        seen.update(options, model=model, data=data, callbacks=[type(each).__name__ for each in callbacks])
        history = keras.callbacks.History()
        history.on_train_begin()
        return history

    monkeypatch.setattr(TFGPTJForCausalLM, "fit", fit)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    (place / "rows.csv").write_text("body,n\n" + "".join(f"what is {n},{n}\n" for n in range(60)))
    settings = FineTuning(
        train_files=(str(place / "rows.csv"),), text_column="body", model=str(place / "model"), validation_split=0.0,
        output_dir=str(place / "options"), block_size=16, batch_size=4, micro_batches=2, optimizer="adafactor",
        schedule="cosine", freeze=("wte", "ln_1"), remat=True, tensorboard=True, save_freq="epoch", sample_prompt="a",
        dtype="mixed_bfloat16", global_clipnorm=0.5, weight_decay=0.1, epochs=2, learning_rate=0.5, warmup_steps=2,
    )  # fmt: skip
    summary = fine_tune(settings)
    model, optimizer, steps = seen["model"], seen["model"].optimizer, seen["steps_per_epoch"]
    assert seen["callbacks"] == ["StopOnNaN", "_StopAt", "Checkpointing", "TensorBoard", "SampleText"]
    assert (seen["epochs"], seen["initial_epoch"], seen["verbose"], seen["validation_data"]) == (2, 0, 2, None)
    (inputs, _), *_ = seen["data"].take(1)
    assert inputs["input_ids"].shape == (4, 16)
    assert type(optimizer) is Adafactor and (optimizer.global_clipnorm, optimizer.weight_decay) == (0.5, 0.1)
    rates = [float(optimizer._learning_rate(step)) for step in (0, 2, steps + 1, 2 * steps)]
    assert rates == pytest.approx([0.0, 0.5, 0.25, 0.0])
    assert model.micro_batches == 2 and model.is_gradient_checkpointing and model.dtype_policy.name == "mixed_bfloat16"
    assert {weight.path.split("/")[-2] for weight in model.weights if not weight.trainable} == {"wte", "ln_1"}
    assert summary["steps"] == 2 * steps and summary["epochs"] == 2.0
    assert not {"train", "validation", "before", "baseline"} & summary.keys()


@pytest.mark.filterwarnings("ignore:[0-9]+ of [0-9]+ texts were cut")
def test_a_classifier_learns(place: Path) -> None:
    """Which of three topics a paragraph is from, held out at random."""
    rows = [(text, topic) for text, topic in paragraphs(most=3, shortest=60)]
    write_lines(place / "topics.jsonl", ({"sentence": text, "topic": topic} for text, topic in rows))
    settings = FineTuning(
        task="text-classification", train_files=(str(place / "topics.jsonl"),), model=str(place / "model"),
        output_dir=str(place / "classifier"), text_column="sentence", label_column="topic", validation_split=0.25,
        truncation=True, block_size=64, epochs=4, batch_size=16, learning_rate=1e-2,
    )  # fmt: skip
    summary = fine_tune(settings, verbose=0)
    assert summary["validation"]["accuracy"] > summary["baseline"]["accuracy"] + 0.2
    assert summary["validation"]["macro_f1"] > summary["baseline"]["macro_f1"] + 0.3
    config = GPTJConfig.from_pretrained(place / "classifier")
    assert config.id2label == dict(enumerate(sorted({topic for _, topic in rows})))
    TFGPTJForSequenceClassification.from_pretrained(place / "classifier")


def test_a_question_answering_model_learns(place: Path) -> None:
    """What a name means, with its definition in the context."""
    pairs = definitions()[::4]
    write_lines(place / "train.jsonl", questions(pairs[:-60], entries=1, rounds=1, seed=0))
    held_out = [
        {"context": row["context"], "qas": [{"id": str(n), "question": row["question"], "answers": [
            {"text": row["answers"]["text"][0], "answer_start": row["answers"]["answer_start"][0]}]}]}
        for n, row in enumerate(questions(pairs[-60:], entries=1, rounds=1, seed=0))
    ]  # fmt: skip
    (place / "held_out.json").write_text(json.dumps({"data": [{"paragraphs": held_out}]}))
    settings = FineTuning(
        task="question-answering", train_files=(str(place / "train.jsonl"),), model=str(place / "model"),
        validation_files=(str(place / "held_out.json"),), output_dir=str(place / "answers"), epochs=4, batch_size=16,
        learning_rate=1e-2, max_answer_length=60, block_size=96,
    )  # fmt: skip
    summary = fine_tune(settings, verbose=0)
    assert summary["before"]["exact_match"] < 10
    assert summary["validation"]["exact_match"] > 60 and summary["validation"]["f1"] > 75
    TFGPTJForQuestionAnswering.from_pretrained(place / "answers")


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_files": ()}, "fine-tuning needs train_files and an output_dir"),
        ({"train_files": "a.txt"}, "train_files must be a tuple of texts, got 'a.txt'"),
        ({"task": "poetry"}, "task must be one of text-generation, text-classification, .*; got 'poetry'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"validation_split": 1.0, "validation_files": ()}, "must be at least 0 and below 1, got 1.0"),
        ({"epochs": 1.5}, "epochs must be of type int, got 1.5"),
        ({"remat": 1}, "remat must be of type bool, got 1"),
        ({"save_freq": "often"}, "save_freq must be of type int, got 'often'"),
        ({"learning_rate": math.nan}, "learning_rate must be at least 0, got nan"),
        ({"label_column": "mood"}, "label_column is for text-classification, and the task is text-generation"),
        ({"lora_alpha": 2.0}, "lora_alpha has no effect without lora"),
        ({"lora": 2, "freeze": ("wte",)}, "freeze has no effect beside lora"),
        ({"validation_split": 0.1}, "validation_split has no effect beside validation_files"),
        ({"strategy": "multiworker", "task": "question-answering"}, "multiworker is for text-generation only"),
        ({"logs": "logs"}, "TensorBoard's logs need its package: pip install tensorboard"),
    ],
)
def test_settings(options: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises((InputError, InputTypeError), match=message):
        settings_for(Path("nowhere"), "output", **options).check()


def test_directories_of_others(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: is no directory; choose another output_dir"):
        check_output(settings_for(tmp_path, "file"))
    with pytest.raises(InputError, match="there is something already"):
        check_output(settings_for(tmp_path, "."))
    check_output(settings_for(tmp_path, ".", overwrite=True))
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json: is damaged: Expecting"):
        check_output(settings_for(tmp_path, "."))


def test_kinds_of_files(tmp_path: Path) -> None:
    paths = {name: str(tmp_path / name) for name in ("a.txt", "a.jsonl", "b.json.gz", "c.tsv", "d")}
    for path in paths.values():
        Path(path).touch()
    found = [kind_of([path], "text-generation") for path in paths.values()]
    assert found == ["text", "JSON lines", "JSON", "TSV", "text"]
    with pytest.raises(InputError, match=r"a\.jsonl and .*a\.txt are of different kinds: JSON lines and text"):
        kind_of([str(tmp_path / "a.*")], "text-generation")
    with pytest.raises(InputError, match="is text by its name, and text-classification needs JSON lines, JSON, CSV"):
        kind_of([paths["d"]], "text-classification")
    with pytest.raises(InputError, match="is TSV by its name, and question-answering needs JSON, JSON lines"):
        kind_of([paths["c.tsv"]], "question-answering")


def test_models_and_labels_that_do_not_fit(place: Path) -> None:
    with pytest.raises(InputError, match="block_size is 129, and .*model takes 128 tokens at most"):
        fine_tune(settings_for(place, "none", block_size=129))
    rows = place / "labels.jsonl"
    options: dict[str, Any] = {"task": "text-classification", "validation_files": (), "overwrite": True}
    for label in (1.5, True, -1, ["a"]):
        write_lines(rows, [{"text": "a", "label": 1}, {"text": "b", "label": label}])
        with pytest.raises(InputError, match="the label is .*, expected a name, or a number from 0 on"):
            fine_tune(settings_for(place, "none", train_files=(str(rows),), validation_split=0.0, **options))
    write_lines(rows, [{"text": "a", "label": 1}])
    with pytest.raises(InputError, match="1 rows cannot be split into two parts"):
        fine_tune(settings_for(place, "none", train_files=(str(rows),), **options))


def tf_record(path: Path, rows: list[dict[str, Any]]) -> None:
    def feature(value: str | bytes) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode() if type(value) is str else value]))

    with tf.io.TFRecordWriter(str(path)) as file:
        for row in rows:
            features = tf.train.Features(feature={name: feature(value) for name, value in row.items()})
            file.write(tf.train.Example(features=features).SerializeToString())


def test_labels(place: Path) -> None:
    """Names, numbers, numbers as text, and bytes; and those that the model knows stay as they are."""
    config = GPTJConfig.from_pretrained(place / "model")
    tokenizer = GPTJTokenizer.from_pretrained(place / "model")

    def labels_of(config: GPTJConfig, labels: list[Any], write: Any = None) -> dict[int, str]:
        rows = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]
        path = place / ("some.tfrecord" if write else "some.jsonl")
        (write or write_lines)(path, rows)
        files = (str(path),)
        settings = settings_for(
            place, "none", train_files=files, validation_files=files, task="text-classification", block_size=None
        )
        task = Classification(settings, tokenizer, config)
        assert task.baseline().keys() == {"accuracy", "macro_f1"}
        return task.config.id2label

    named = labels_of(config, ["sad", "happy", "sad", "calm"])
    assert named == {0: "calm", 1: "happy", 2: "sad"}
    assert labels_of(config, [0, 2]) == labels_of(config, ["2", "0"]) == {n: f"LABEL_{n}" for n in range(3)}
    known = GPTJConfig.from_dict(config.to_dict(), id2label=named, label2id={name: n for n, name in named.items()})
    assert labels_of(known, ["sad", "happy"]) == labels_of(known, [0, 1]) == named
    labels = [b"good", b"bad"]
    assert labels_of(config, labels, tf_record) == {0: "bad", 1: "good"}


def test_rows_in_two_parts() -> None:
    rows = read_rows([{"n": n} for n in range(40)])
    train, held_out = ([row["n"] for row in part] for part in split_rows(rows, 0.1, seed=3))
    assert len(held_out) == 4 and sorted([*train, *held_out]) == list(range(40)) and held_out != [0, 1, 2, 3]
    renamed = renamed_rows(rows, {"number": "n"})
    assert [row["number"] for row in renamed] == list(range(40))
    with pytest.raises(InputError, match=r"row 0: there is no field 'm', only 'n'"):
        list(renamed_rows(rows, {"number": "m"}))


# Devices


def test_strategies_need_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(BackendError, match="strategy mirrored needs TensorFlow, and Keras runs on jax"):
        Devices("mirrored")


@pytest.mark.parametrize("devices", [3, 6])
def test_workers_have_even_shares(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Strategy:
        def distribute_datasets_from_function(self, share: Any) -> Any:
            return [share(tf.distribute.InputContext(3, index, devices)) for index in range(3)]

    def make(size: int, shard: tuple[int, int]) -> tf.data.Dataset:
        return tf.data.Dataset.range(12).shard(shard[1], shard[0]).batch(size)

    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", Strategy)
    found = [[list(map(int, batch)) for batch in worker] for worker in Devices("multiworker").feed(make, 6)]
    if devices == 3:
        assert found == [[[0, 3], [6, 9]], [[1, 4], [7, 10]], [[2, 5], [8, 11]]]
    else:  # two of each worker, which take a batch each in every step
        assert found == [[[0], [3], [6], [9]], [[1], [4], [7], [10]], [[2], [5], [8], [11]]]
    with pytest.raises(InputError, match=f"batch_size 8 cannot be divided evenly among {devices} devices"):
        Devices("multiworker").feed(make, 8)


def test_one_worker_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        ('{"cluster": {"worker": ["a", "b"]}, "task": {"type": "worker", "index": 0}}', True),
        ('{"cluster": {"worker": ["a", "b"]}, "task": {"type": "worker", "index": 1}}', False),
        ('{"cluster": {"chief": ["c"], "worker": ["a"]}, "task": {"type": "worker", "index": 0}}', False),
        ('{"cluster": {"chief": ["c"], "worker": ["a"]}, "task": {"type": "chief", "index": 0}}', True),
        ("", True),
    ]
    for content, is_first in cases:
        monkeypatch.setenv("TF_CONFIG", content)
        assert is_first_worker("multiworker") is is_first and is_first_worker("none")
    monkeypatch.setenv("TF_CONFIG", "{")
    with pytest.raises(InputError, match="TF_CONFIG in the environment is not what TensorFlow wants"):
        is_first_worker("multiworker")


# The command


def test_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are understood, with files of these names."""
    (section,) = re.findall(
        r"### Fine-tuning from the shell.*?```bash no-run\n(.*?)^```", README, re.DOTALL | re.MULTILINE
    )
    commands = [shlex.split(line, comments=True) for line in section.replace("\\\n", "").splitlines()]
    commands = [command for command in commands if command]
    monkeypatch.chdir(tmp_path)
    seen: list[FineTuning] = []

    def record(settings: FineTuning, verbose: Any) -> dict[str, Any]:
        seen.append(settings)
        return {"validation": {"loss": 0.5}, "task": settings.task}

    monkeypatch.setattr("tfgptj.training.fine_tuning.fine_tune", record)
    for command in commands:
        for part in command:
            if re.fullmatch(r"[\w.]+\.(txt|jsonl|csv|json)", part):
                Path(part).touch()
        assert command[0] == "tfgptj" and cli.main(command[1:]) == cli.OK
    assert [settings.task for settings in seen] == [
        *["text-generation"] * 3,
        "text-classification",
        "question-answering",
    ]


def test_wrong_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(*flags: str) -> str:
        try:
            assert (
                cli.main(["train", "--train-file", str(tmp_path / "a.txt"), "--output-dir", "b", *flags]) == cli.FAILED
            )
        except SystemExit as exit_:
            assert exit_.code == 2
        return capsys.readouterr().err

    assert "a.txt: there is no such file" in message()
    assert "argument --epochs: epochs must be at least 1, got 0" in message("--epochs", "0")
    assert "argument --save-freq: invalid int or epoch value: 'x'" in message("--save-freq", "x")
    assert "lora_alpha has no effect without lora" in message("--lora-alpha", "2")
    assert "task must be one of text-generation, " in message("--task", "poetry")
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert "the following arguments are required: --train-file, --output-dir" in capsys.readouterr().err


def test_help_tells_of_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(FineTuning):
        assert field.metadata["meaning"].replace("\n", " ") in shown
