"""Questions for `fit`, logits back to text answers, and how good these are."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgptj import GPTJConfig, GPTJTokenizer, TFGPTJForQuestionAnswering, pipeline
from tfgptj.errors import InputError
from tfgptj.spans import contexts_of
from tfgptj.training.metrics import answer_scores, exact_match, f1_score, normalized_answer
from tfgptj.training.question_answering import question_answering_dataset, question_of, text_answers
from tfgptj.training.readers import read_squad
from tfgptj.training.rows import read_rows

FIXTURES = Path(__file__).parent / "fixtures"
CONTEXT = (
    "The king of France, naïve 北京 and bald, was a fool.  He spoke to the queen at night; she said nothing at all."
)


@pytest.fixture(scope="module")
def tokenizer() -> GPTJTokenizer:
    return GPTJTokenizer.from_directory(FIXTURES / "small_vocab")


def row(answer: str | None, question: str = "Who was it?", context: str = CONTEXT) -> dict[str, Any]:
    answers = (
        {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    )
    return {"question": question, "context": context, "answers": answers}


ROWS = [row("The king"), row("北京 and bald"), row("ool"), row("nothing at all.", "Why?"), row(None), row("a fool")]


def test_answers_are_found_among_the_tokens(tokenizer: GPTJTokenizer) -> None:
    """The span is the shortest one whose characters hold the answer: tried out."""
    [context] = contexts_of([CONTEXT], tokenizer)
    generator = random.Random(0)
    for _ in range(100):
        start = generator.randrange(len(CONTEXT) - 1)
        end = generator.randrange(start + 1, len(CONTEXT))
        size = len(context.ids)
        spans = [
            (i, j) for i in range(size) for j in range(i, size) if context.starts[i] <= start and context.ends[j] >= end
        ]
        # Bytes of one character share its place: all of them are in the span.
        first, last = max(i for i, _ in spans), min(j for _, j in spans)
        while first and context.starts[first - 1] == context.starts[first]:
            first -= 1
        while last < size - 1 and context.ends[last + 1] == context.ends[last]:
            last += 1
        assert context.tokens(start, end) == (first, last)


@pytest.mark.parametrize("stride", [None, 4, 12])
def test_windows_and_positions(tokenizer: GPTJTokenizer, stride: int | None) -> None:
    dataset = question_answering_dataset(ROWS, tokenizer, batch_size=3, max_length=40, stride=stride, shuffle=False)
    windows = [
        (ids[mask == 1].tolist(), int(start), int(end))
        for inputs, labels in dataset.as_numpy_iterator()
        for ids, mask, start, end in zip(*inputs.values(), *labels.values(), strict=True)
    ]
    overlap, place = stride or 20, 0
    for values in ROWS:
        question = tokenizer.encode(values["question"])
        [context] = contexts_of([CONTEXT], tokenizer)
        room = 40 - len(question)
        starts = [0]
        while starts[-1] + room < len(context.ids):
            starts.append(starts[-1] + room - overlap)
        held = 0
        for first in starts:
            ids, start, end = windows[place]
            place += 1
            part = context.ids[first : first + room].tolist()
            assert ids == question + part
            [answer], [begin] = values["answers"].values() if values["answers"]["text"] else ([""], [-1])
            last = first + len(part) - 1
            if context.starts[first] <= begin and begin + len(answer) <= context.ends[last]:
                held += 1
                span = context.tokens(begin, begin + len(answer)) or (0, 0)
                # A window may begin or end within a character.
                assert start == len(question) + max(span[0] - first, 0)
                assert end == len(question) + min(span[1], last) - first
            else:
                assert (start, end) == (0, 0)
        assert held or overlap < 12 or not values["answers"]["text"]  # no shorter overlap holds them all
    assert place == len(windows) > len(ROWS)


def test_logits_become_the_answers_of_the_pipeline(tokenizer: GPTJTokenizer) -> None:
    model = TFGPTJForQuestionAnswering.from_pretrained(
        FIXTURES / "pipeline_goldens" / "question_answering", dtype="float32"
    )
    answerer = pipeline("question-answering", model, tokenizer, max_seq_len=40, doc_stride=12)
    options: Any = {"max_length": 40, "stride": 12}
    count: Any = {"count_batches": True}
    dataset = question_answering_dataset(
        ROWS, tokenizer, batch_size=4, length_buckets=[40], shuffle=False, **count, **options
    )
    outputs = model.predict(dataset, verbose=0)
    for aligned, impossible in ((True, False), (False, True)):
        answers = text_answers(
            outputs,
            ROWS,
            tokenizer,
            n_best=3,
            max_answer_length=7,
            align_to_words=aligned,
            impossible=impossible,
            **options,
        )
        expected = answerer(
            [values["question"] for values in ROWS], CONTEXT, top_k=3, max_answer_len=7, align_to_words=aligned,
            handle_impossible_answer=impossible,
        )  # fmt: skip
        for mine, theirs in zip(answers, expected, strict=True):
            assert [answer["answer"] for answer in mine] == [answer["answer"] for answer in theirs]
            np.testing.assert_allclose([a["score"] for a in mine], [a["score"] for a in theirs], rtol=1e-4)
    with pytest.raises(
        InputError, match=r"the rows make \d+ windows, but there are logits of 2: predict with the same"
    ):
        text_answers({name: logits[:2] for name, logits in outputs.items()}, ROWS, tokenizer, **options)
    with pytest.raises(InputError, match=r"the logits are of 30 tokens, fewer than the 40 of a window"):
        text_answers({name: logits[:, :30] for name, logits in outputs.items()}, ROWS, tokenizer, **options)
    with pytest.raises(InputError, match="n_best is 0, expected an integer from 1 on"):
        text_answers(outputs, ROWS, tokenizer, n_best=0)


def test_perfect_logits_give_the_right_answers(tokenizer: GPTJTokenizer) -> None:
    options: Any = {"max_length": 40, "stride": 20}
    dataset = question_answering_dataset(ROWS, tokenizer, batch_size=4, length_buckets=[40], shuffle=False, **options)
    found = [labels for _, labels in dataset.as_numpy_iterator()]
    positions = {name: np.concatenate([labels[name] for labels in found]) for name in found[0]}
    outputs = {f"{side}_logits": 50.0 * np.eye(40)[positions[f"{side}_positions"]] for side in ("start", "end")}
    answers = text_answers(outputs, ROWS, tokenizer, align_to_words=False, **options)
    right = [values["answers"]["text"] for values in ROWS]
    asked = [i for i, texts in enumerate(right) if texts]
    # A token may begin with the space in front of the answer, which no score minds.
    scores = answer_scores([answers[i][0]["answer"] for i in asked], [right[i] for i in asked])
    assert scores["exact_match"] == 100.0


def test_fit_takes_it_as_it_is(tokenizer: GPTJTokenizer) -> None:
    keras.utils.set_random_seed(1)
    config = GPTJConfig(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    model = TFGPTJForQuestionAnswering(config)
    model.compile(keras.optimizers.Adam(1e-2))
    dataset = question_answering_dataset(
        ROWS[:4], tokenizer, batch_size=4, max_length=40, stride=12, length_buckets=[40], epochs=8, count_batches=True
    )
    before = model.evaluate(dataset, verbose=0)
    model.fit(dataset, shuffle=False, verbose=0)
    assert model.evaluate(dataset, verbose=0) < before - 0.3


def test_squad_files(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    answers = [{"text": "a fool", "answer_start": CONTEXT.index("a fool")}]
    questions = [{"id": "1", "question": "What was he?", "answers": answers}]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": questions}]}]}))
    [(inputs, labels)] = question_answering_dataset(read_squad(path), tokenizer, batch_size=1)
    span = slice(int(labels["start_positions"][0]), int(labels["end_positions"][0]) + 1)
    assert tokenizer.decode(inputs["input_ids"][0, span]).strip() == "a fool"


def answered(texts: Any, starts: Any) -> dict[str, Any]:
    return {"question": "Who?", "context": CONTEXT, "answers": {"text": texts, "answer_start": starts}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (answered(["a fool"], [3]), "the answer 'a fool' is not at character 3, where ' king ' stands"),
        (answered(["a fool"], [-3]), "the answer 'a fool' at -3 is not a text at a character's number"),
        (answered([""], [0]), "the answer '' at 0 is not a text at a character's number"),
        (answered(["a fool"], []), "there are 1 answers, but 0 places where they begin"),
        (answered("a fool", [3]), "the answers' text and answer_start are not lists"),
        ({**row("a fool"), "answers": None}, "the row is of type NoneType, expected a dict with the field 'text'"),
        ({**row("a fool"), "question": ""}, "the field 'question' is empty"),
        ({"question": "Who?", "context": "I."}, "there is no field 'answers', only 'question', 'context'"),
    ],
)  # fmt: skip
def test_corrupt_questions(tokenizer: GPTJTokenizer, values: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        question_of(values)
    with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(f"row 1: {message}")):
        list(question_answering_dataset([ROWS[0], values], tokenizer, batch_size=1))
    rows = read_rows([ROWS[0], values], on_error="skip")
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        assert len(list(question_answering_dataset(rows, tokenizer, batch_size=1))) == 1


def test_windows_that_cannot_be_made(tokenizer: GPTJTokenizer) -> None:
    for options, message in (
        ({"max_length": 6}, "row 0: the question has"),
        ({"max_length": 30, "stride": 29}, "row 0: neighbouring windows share 29 tokens, which must be below"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            list(question_answering_dataset(ROWS, tokenizer, batch_size=1, **options))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="stride is 0, expected an integer from 1 on"):
        question_answering_dataset(ROWS, tokenizer, batch_size=1, stride=0)


# Metrics


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The King's fool!", ["kings fool"], 1, 1),
        ("king", ["queen", "the king"], 1, 1),
        ("the king of France", ["king"], 0, 0.5),
        ("fool fool", ["fool"], 0, 2 / 3),
        ("king", ["queen"], 0, 0),
        ("", [], 1, 1),
        ("king", [], 0, 0),
        ("the", ["a"], 1, 1),
        ("", ["king"], 0, 0),
    ],
)
def test_scores(prediction: str, answers: list[str], exact: float, f1: float) -> None:
    assert exact_match(prediction, answers) == exact
    assert f1_score(prediction, answers) == pytest.approx(f1)
    assert answer_scores([prediction], [answers]) == {"exact_match": 100 * exact, "f1": pytest.approx(100 * f1)}


def test_normalized_answers() -> None:
    assert normalized_answer("An  apple, a\tday—THE end.") == "apple day— end"


def test_scores_need_an_answer_for_each_question() -> None:
    for predictions, answers in (([], []), (["a"], [])):
        with pytest.raises(InputError, match="predictions and answers to 0 questions"):
            answer_scores(predictions, answers)
