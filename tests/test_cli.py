"""The `tfgptj` command, in this process but for what concerns the process itself: imports, noise, the terminal."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf
from safetensors import safe_open

from tfgptj import cli, pipeline
from tfgptj.pipelines.text_generation import TextGenerationPipeline
from tfgptj.serving.deployment import model_config
from tfgptj.training.recipe import Recipe

FIXTURES = Path(__file__).parent / "fixtures"
GOLDENS = FIXTURES / "pipeline_goldens"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"} | {
    "PYTHONPATH": str(Path(__file__).parents[1]),
}


def model_flags(name: str) -> list[str]:
    return ["--model", str(GOLDENS / name), "--tokenizer", str(FIXTURES / "small_vocab"), "--dtype", "float32"]


RUN = ["run", "--task", "text-generation", *model_flags("causal_lm")]


@pytest.fixture(scope="module")
def generator() -> Any:
    return pipeline("text-generation", GOLDENS / "causal_lm", FIXTURES / "small_vocab", dtype="float32")


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put bytes on standard input."""
    return lambda content: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(arguments) == cli.FAILED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tfgptj: error: ") and captured.err.count("\n") == 1
    return captured.err


def test_help_and_checkpoints_load_no_framework(tmp_path: Path) -> None:
    program = f"""
import sys
from tfgptj import cli
for arguments in ("--help", "run --help", "train --help", "pretrain --help", "convert --help", "bench --help",
                  "bench generate --help", "--version", "", "run --greedy --top-k 3", "bench generate --rounds many",
                  "export --help", "export shakespeare there --greedy --seed 3",
                  "train --train-file a --output-dir b --epochs 0", "train --output-dir a"):
    try:
        cli.main(arguments.split())
    except SystemExit:
        pass
print([name for name in ("tensorflow", "keras", "numpy", "huggingface_hub") if name in sys.modules])
assert cli.main(["info", {str(GOLDENS / "causal_lm")!r}]) == 0
assert cli.main(["convert", {str(GOLDENS / "causal_lm")!r}, {str(tmp_path / "new")!r}]) == 0
assert cli.main(["validate", {str(tmp_path / "new")!r}]) == 0
print([name for name in ("tensorflow", "keras") if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert result.stdout.count("[]\n") == 2
    assert "PROMPT" in result.stdout and "OUTPUT_DIR" in result.stdout


def test_no_verb_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.USAGE
    captured = capsys.readouterr()
    assert captured.out == "" and "Fine-tune a model on text" in captured.err


def test_lines_through_a_pipe_without_a_word_on_standard_error(generator: Any) -> None:
    """`echo -e … | tfgptj run`, in a process of its own."""
    command = [sys.executable, "-m", "tfgptj.cli", *RUN, "--max-new-tokens", "8"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, input=b"The king\n\nSo\r\n", check=True)
    assert result.stderr == b""
    texts = [row[0]["generated_text"] for row in generator(["The king", "So"], max_new_tokens=8)]
    assert result.stdout.decode() == "".join(f"{text}\n" for text in texts)


# run


def test_prompt(generator: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*RUN, "--max-new-tokens", "6", "The king"]) == cli.OK
    assert capsys.readouterr().out == generator("The king", max_new_tokens=6)[0]["generated_text"] + "\n"
    assert cli.main([*RUN, "--max-new-tokens", "6", "--no-full-text", "The king"]) == cli.OK
    expected = generator("The king", max_new_tokens=6, return_full_text=False)[0]["generated_text"]
    assert capsys.readouterr().out == expected + "\n"
    assert cli.main([*RUN, "--max-new-tokens", "6", ""]) == cli.OK
    assert capsys.readouterr().out == generator("", max_new_tokens=6)[0]["generated_text"] + "\n"


def test_json_and_sampling(generator: Any, stdin: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stdin("naïve\n \t\nSo".encode())
    flags = ["--temperature", "2", "--seed", "5", "--num-return-sequences", "2", "--json", "--batch-size", "1"]
    assert cli.main([*RUN, *flags]) == cli.OK
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    results = generator(["naïve", "So"], do_sample=True, temperature=2.0, seed=5, num_return_sequences=2)
    assert [record["input"] for record in records] == ["naïve", "naïve", "So", "So"]
    assert [record["generated_text"] for record in records] == [one["generated_text"] for row in results for one in row]


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("The king\nSo\n")
    files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main(["run", "--task", "feature-extraction", *model_flags("causal_lm"), *files, "--json"]) == cli.OK
    assert capsys.readouterr().out == ""
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["input"] for record in records] == ["The king", "So"]
    assert [len(row) for row in records[1]["features"]] == [16] * len(records[1]["features"])


def test_labels(stdin: Any, capsys: pytest.CaptureFixture[str]) -> None:
    classify = ["run", "--task", "sentiment-analysis", *model_flags("classification")]
    stdin(b"The king\nSo\n")
    assert cli.main(classify) == cli.OK
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and lines[0][0] == "neutral" and 0 < float(lines[0][1]) < 1
    assert cli.main([*classify, "--top-k", "3", "--json", "The king"]) == cli.OK
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(record["label"] for record in records) == ["happy", "neutral", "sad"]


def test_answers(capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["run", "--task", "question-answering", *model_flags("question_answering")]
    ask += ["--question", "Who?", "--context", "The king and I"]
    assert cli.main(ask) == cli.OK
    best = capsys.readouterr().out
    assert cli.main([*ask, "--top-k", "2", "--json"]) == cli.OK
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(record) for record in records] == [["input", "score", "start", "end", "answer"]] * 2
    assert best == records[0]["answer"] + "\n"


def test_features_are_always_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--task", "feature-extraction", *model_flags("causal_lm"), "So"]) == cli.OK
    assert len(json.loads(capsys.readouterr().out)[0]) == 16


def test_text_appears_on_a_terminal_while_it_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals on this system")
    ours, theirs = pty.openpty()
    seen = []

    def stream(self: Any, texts: list[str], **options: Any) -> Any:
        def pieces(text: str) -> Any:
            for piece in (text, "naïve ", "text"):
                yield piece
                seen.append(os.read(ours, 1000).decode())  # would block if it were still in a buffer

        assert options == {"return_full_text": True}
        return [pieces(text) for text in texts]

    monkeypatch.setattr(TextGenerationPipeline, "stream", stream)
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert cli.main([*RUN, "A "]) == cli.OK
        monkeypatch.undo()
    assert seen == ["A ", "naïve ", "text"]
    os.close(ours)


def test_a_terminal_shows_what_a_pipe_gets(
    monkeypatch: pytest.MonkeyPatch, stdin: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--seed", "5", "--do-sample", "--temperature", "2", "--max-new-tokens", "20"]
    shown = []
    for on_terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda on_terminal=on_terminal: on_terminal)
        stdin(b"The king\nSo\n")
        assert cli.main([*RUN, *flags]) == cli.OK
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""


def test_usage_errors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert "there is no text: give a PROMPT or --input" in usage_error([*RUN], capsys)
    assert "give one of PROMPT, --input and --question" in usage_error([*RUN, "a", "--input", "b"], capsys)
    assert "belong to --task question-answering" in usage_error([*RUN, "--question", "a", "--context", "b"], capsys)
    assert "it needs both" in usage_error(["run", "--task", "question-answering", "--question", "a"], capsys)
    assert "--greedy draws nothing, so --top-k would" in usage_error([*RUN, "a", "--greedy", "--top-k", "3"], capsys)
    assert "not allowed with argument" in usage_error([*RUN, "a", "--greedy", "--do-sample"], capsys)
    assert "there is no directory nowhere" in usage_error([*RUN, "a", "--output", "nowhere/out"], capsys)
    assert "invalid choice: 'poetry'" in usage_error(["run", "--task", "poetry", "a"], capsys)
    assert "must be at least 1, got 0" in usage_error(["pretrain", "a", "b", "--epochs", "0"], capsys)
    assert "invalid int value: 'x'" in usage_error(["pretrain", "a", "b", "--epochs", "x"], capsys)


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], stdin: Any, tmp_path: Path) -> None:
    assert "neither a directory" in failure(["run", "--model", "no such model", "a"], capsys)
    assert "No such file" in failure([*RUN, "--input", str(tmp_path / "nothing")], capsys)
    assert "temperature must be between" in failure([*RUN, "--temperature", "-1", "a"], capsys)
    assert "has no option 'max_new_tokens'" in failure(
        ["run", "--task", "text-classification", "--max-new-tokens", "3", "a"], capsys
    )
    stdin(b"\n \n")
    assert "standard input: holds no text, only blank lines" in failure(RUN, capsys)
    stdin(b"caf\xe9\n")
    assert "standard input: is not text in UTF-8" in failure(RUN, capsys)


def test_debug_shows_where_an_error_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--debug", "--model", "no such model", "a"]) == cli.FAILED
    assert "Traceback" in capsys.readouterr().err


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tfgptj.pipelines.pipeline", interrupt)
    assert cli.main(["run", "a"]) == cli.INTERRUPTED


def test_closed_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main([*RUN, "--max-new-tokens", "2", "a"]) == cli.PIPE_CLOSED
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    visible = []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["first", "second"])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda devices, kind: visible.append((devices, kind)))
    for number in ("-1", "1"):
        assert cli.main([*RUN, "--max-new-tokens", "2", "--device", number, "a"]) == cli.OK
    assert visible == [([], "GPU"), (["second"], "GPU")]
    capsys.readouterr()
    for number in ("2", "-2"):
        assert f"--device {number}: TensorFlow sees 2 GPUs" in failure([*RUN, "--device", number, "a"], capsys)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    assert "--device needs TensorFlow, and Keras runs on jax" in failure([*RUN, "--device", "0", "a"], capsys)


# pretrain and info


def test_pretrain_has_a_flag_for_everything_in_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name.replace('_', '-')} X" in shown
        assert f"{field.metadata['meaning']}; default: {field.default}" in shown


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")  # of Keras's, for every tf.data.Dataset
def test_pretrain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 65)
    sizes = {"vocab-size": 270, "n-embd": 16, "n-layer": 1, "n-head": 2, "rotary-dim": 4}
    steps = {"block-size": 16, "batch-size": 4, "epochs": 2, "warmup-steps": 2, "bpe-dropout": 0, "dtype": "float32"}
    flags = [part for name, value in (sizes | steps).items() for part in (f"--{name}", str(value))]
    command = ["pretrain", str(text), str(tmp_path / "made"), *flags, "--quiet"]
    assert cli.main(command) == cli.OK
    out = capsys.readouterr().out
    assert "nats per character" in out and f"saved in {tmp_path / 'made'}" in out
    continued = pipeline("text-generation", tmp_path / "made")("To be", max_new_tokens=5)
    assert continued[0]["generated_text"].startswith("To be")
    assert "there is something already; choose another place, or add --overwrite" in failure(command, capsys)
    assert cli.main([*command, "--overwrite"]) == cli.OK
    assert capsys.readouterr().out == out  # the same seed trains the same model
    text.write_bytes(b"caf\xe9")
    assert f"{text}: is not text in UTF-8" in failure(["pretrain", str(text), str(tmp_path / "other")], capsys)


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gptj"}))  # of which the defaults are GPT-J-6B
    assert cli.main(["info", str(tmp_path)]) == cli.OK
    out = capsys.readouterr().out
    assert "parameters    6,050,882,784, with the head: causal lm\n" in out
    assert "weights take  22.5 GiB in float32, 11.3 GiB in bfloat16 or float16\n" in out
    assert "cache takes   1.8 GiB in float32, 896.0 MiB in bfloat16 or float16, for one text of 2,048 tokens\n" in out
    for name, head in (("classification", "classification"), ("question_answering", "question answering")):
        assert cli.main(["info", str(GOLDENS / name)]) == cli.OK
        assert f"with the head: {head}\n" in capsys.readouterr().out
    assert "holds no config.json" in failure(["info", str(FIXTURES)], capsys)


def test_info_of_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["convert", "shakespeare", str(tmp_path), "--max-shard-size", "3MB", "--dtype", "float32"]) == cli.OK
    )
    assert cli.main(["info", str(tmp_path)]) == cli.OK
    text = capsys.readouterr().out
    assert re.search(r"weights +model\.safetensors\.index\.json, 45 tensors in 6 files\n", text)
    assert re.search(r"stored as +float32: 14\.0 MiB\n", text)


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(GOLDENS / "causal_lm"), str(tmp_path / "new")]
    assert cli.main([*command, "--format", "h5", "--quiet"]) == cli.OK
    assert capsys.readouterr().out == f"saved in {tmp_path / 'new'}\n"
    assert (tmp_path / "new" / "tf_model.h5").is_file()
    assert "is not empty; choose another directory" in failure(command, capsys)
    assert cli.main([*command, "--overwrite", "--dtype", "bfloat16"]) == cli.OK
    assert not (tmp_path / "new" / "tf_model.h5").exists()
    capsys.readouterr()
    with safe_open(tmp_path / "new" / "model.safetensors", "np") as file:
        assert file.get_slice("lm_head.bias").get_dtype() == "BF16"
    assert "max_shard_size must be a number of bytes" in failure(
        [*command, "--overwrite", "--max-shard-size", "x"], capsys
    )
    assert "--format" in usage_error([*command, "--format", "onnx"], capsys)


def test_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "shakespeare"]) == cli.OK
    assert capsys.readouterr().out.endswith("no faults\n")
    assert cli.main(["convert", "shakespeare", str(tmp_path), "--quiet"]) == cli.OK
    (tmp_path / "generation_config.json").write_text('{"top_k": "many"}')
    capsys.readouterr()
    assert cli.main(["validate", str(tmp_path)]) == cli.FAILED
    captured = capsys.readouterr()
    assert "fault: " in captured.out and "top_k" in captured.out
    assert captured.err == f"tfgptj: error: {tmp_path}: 1 fault(s), listed above\n"


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(GOLDENS / "causal_lm"), str(tmp_path / "served"), *model_flags("causal_lm")[2:]]
    flags = ["--max-new-tokens", "3", "--seed", "5", "--version", "4", "--max-batch-size", "2", "--top-k", "7"]
    deployment = ["--deployment", "king", "--label", "stable=4", "--label", "canary=4"]
    assert cli.main([*command, *flags, *deployment]) == cli.OK
    home = tmp_path / "served"
    assert capsys.readouterr().out == f"saved in {home}/4\nhow to serve it: {home}/README.md\n"
    assert "# king\n" in (home / "README.md").read_text()
    assert (home / "models.config").read_text() == model_config("king", home, [4], {"stable": 4, "canary": 4})
    served = tf.saved_model.load(str(tmp_path / "served" / "4")).signatures["serving_default"]
    expected = pipeline("text-generation", GOLDENS / "causal_lm", FIXTURES / "small_vocab", dtype="float32")
    text = expected("the", max_new_tokens=3, do_sample=True, top_k=7, seed=5, return_full_text=False)
    assert served(prompt=tf.constant(["the"]))["text"].numpy()[0].decode() == text[0]["generated_text"]
    assert "exists already" in failure([*command, *flags], capsys)
    assert "--greedy draws nothing, so --seed would" in usage_error([*command, "--greedy", "--seed", "5"], capsys)


def test_deployments_that_cannot_be_written_are_refused_before_the_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "shakespeare", str(tmp_path / "served")]
    king = [*command, "--deployment", "king", "--label"]
    assert "--label belongs to --deployment" in usage_error([*command, "--label", "stable=1"], capsys)
    assert "a --label is given twice" in usage_error([*king, "stable=1", "--label", "stable=1"], capsys)
    for label in ("stable", "=1", "stable=new", "stable="):
        assert f"expected LABEL=N, such as stable=1, got {label}" in usage_error([*king, label], capsys)
    assert "The label 'stable' is of version 2, but there are [1]" in failure([*king, "stable=2"], capsys)
    assert "The label 'old' is of version 1, but there are [3]" in failure([*king, "old=1", "--version", "3"], capsys)
    assert "cannot be a name on a server" in failure([*command, "--deployment", ""], capsys)
    assert not (tmp_path / "served").exists()
