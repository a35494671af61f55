"""The pipelines against Hugging Face's (``fixtures/make_pipeline_goldens.py``), and what they promise beyond that."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import foremost

import tfgptj
from tfgptj import GenerationConfig, GPTJConfig, GPTJTokenizer, pipeline
from tfgptj.errors import GenerationError, InputError, InputTypeError
from tfgptj.heads import TFGPTJForCausalLM, TFGPTJForQuestionAnswering, TFGPTJForSequenceClassification
from tfgptj.pipelines import ALIASES, TASKS, pipeline_class
from tfgptj.pipelines.text_classification import apply_function, default_function
from tfgptj.spans import best_spans

FIXTURES = Path(__file__).parent / "fixtures"
GOLDENS = FIXTURES / "pipeline_goldens"
SMALL_VOCAB = FIXTURES / "small_vocab"
EXPECTED = json.loads((GOLDENS / "expected.json").read_text())
CHECKPOINTS = {
    "text-generation": "causal_lm",
    "text-classification": "classification",
    "question-answering": "question_answering",
    "feature-extraction": "causal_lm",
}
PROMPTS = ["The king", "", "naïve café 北京", "To be, or not to be, that is the", "So"]


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """One pipeline for each task, loaded once."""
    return {
        task: pipeline(task, model=GOLDENS / name, tokenizer=SMALL_VOCAB, dtype="float32")
        for task, name in CHECKPOINTS.items()
    }


@pytest.fixture(scope="module")
def generator(pipelines: dict[str, Any]) -> Any:
    return pipelines["text-generation"]


@pytest.fixture(scope="module")
def classifier(pipelines: dict[str, Any]) -> Any:
    return pipelines["text-classification"]


@pytest.fixture(scope="module")
def answerer(pipelines: dict[str, Any]) -> Any:
    return pipelines["question-answering"]


def assert_alike(actual: Any, expected: Any) -> None:
    """Equal in structure and text; floats equal up to rounding."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_alike(actual[key], expected[key])
    elif isinstance(expected, list):
        assert isinstance(actual, list) and len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, float):
        assert type(actual) is float
        assert actual == pytest.approx(expected, rel=2e-4, abs=1e-5)
    else:
        assert actual == expected


# JAX compiles for every shape, which takes long; `generate` and the heads have core tests of their own.
CASES = [(task, 1) for task in TASKS] + [
    pytest.param(task, 3, marks=[pytest.mark.core] * (task == "feature-extraction")) for task in TASKS
]


@pytest.mark.parametrize(("task", "batch_size"), CASES)
def test_results_equal_hugging_face(task: str, batch_size: int, pipelines: dict[str, Any]) -> None:
    assert len(EXPECTED[task]) >= 2
    for call in EXPECTED[task]:
        inputs, options = call["inputs"], {**call["options"], "batch_size": batch_size}
        keywords = isinstance(inputs, dict)
        actual = pipelines[task](**inputs, **options) if keywords else pipelines[task](inputs, **options)
        assert_alike(actual, call["expected"])


def test_public_name_and_alias(classifier: Any) -> None:
    assert tfgptj.pipeline is pipeline
    assert pipeline_class("sentiment-analysis") is type(classifier)
    assert ALIASES["sentiment-analysis"] in TASKS


# Text generation


def texts(results: list[list[dict[str, str]]]) -> list[list[str]]:
    return [[result["generated_text"] for result in row] for row in results]


DRAWN = {"max_new_tokens": 12, "do_sample": True, "seed": 5, "num_return_sequences": 3, "temperature": 2.0}


@pytest.mark.parametrize(
    "parameters",
    foremost([{"max_new_tokens": 12}, {"max_length": 25}, DRAWN], {"max_length": 25}, DRAWN),
)
def test_batch_size_changes_nothing(generator: Any, parameters: dict[str, Any]) -> None:
    whole = generator(PROMPTS, **parameters, batch_size=8)
    assert [len(row) for row in whole] == [parameters.get("num_return_sequences", 1)] * len(PROMPTS)
    for batch_size in (1, 2):
        assert generator(PROMPTS, **parameters, batch_size=batch_size) == whole


def test_each_prompt_alone_gives_the_same(generator: Any) -> None:
    for parameters in ({"max_new_tokens": 12}, {"max_length": 25}, {}):
        assert generator(PROMPTS, **parameters) == [generator(prompt, **parameters) for prompt in PROMPTS]


def test_sampled_rows_differ(generator: Any) -> None:
    [row] = texts([generator("The king", do_sample=True, seed=1, num_return_sequences=4, temperature=3.0)])
    assert len(set(row)) == 4
    same = texts(generator(["The king"] * 3, do_sample=True, seed=1, temperature=3.0, batch_size=1))
    assert len({row[0] for row in same}) == 3


def test_seed_repeats(generator: Any) -> None:
    options = {"do_sample": True, "temperature": 3.0}
    first = generator("The king", seed=3, **options)
    assert generator("The king", seed=3, **options) == first
    assert generator("The king", seed=4, **options) != first
    ids = generator.tokenizer("The king", return_tensors="np")
    row = generator.model.generate(**ids, seed=3, **options)[0]
    assert generator.tokenizer.decode(row, skip_special_tokens=True).startswith(first[0]["generated_text"])


def test_neither_end_nor_padding_is_shown(generator: Any) -> None:
    """Of ordinary tokens too, which skip_special_tokens would not catch."""
    plain = generator("The king", max_new_tokens=12, return_tensors=True)[0]["generated_token_ids"]
    prompt = len(generator.tokenizer.encode("The king"))
    end = plain[prompt + 3]
    assert end not in plain[prompt : prompt + 3]
    options = {"max_new_tokens": 12, "eos_token_id": end, "pad_token_id": 7}
    for prompts in (["The king"], ["The king", "So"]):
        [shown], *_ = texts(generator(prompts, **options, return_full_text=False))
        assert shown == generator.tokenizer.decode(plain[prompt : prompt + 3])
        [tensors], *_ = generator(prompts, **options, return_tensors=True)
        assert tensors["generated_token_ids"] == plain[: prompt + 4]


def test_defaults_come_from_the_model_then_the_pipeline_then_the_call(generator: Any) -> None:
    def new_tokens(function: Any, **options: Any) -> int:
        return len(function("a", return_tensors=True, **options)[0]["generated_token_ids"]) - 1

    model = TFGPTJForCausalLM.from_pretrained(GOLDENS / "causal_lm", dtype="float32")
    bare = pipeline("text-generation", model, generator.tokenizer, eos_token_id=0)
    model.generation_config = GenerationConfig(max_new_tokens=3)
    assert new_tokens(bare) == 3
    assert new_tokens(bare, generation_config=GenerationConfig(max_new_tokens=4)) == 4
    assert new_tokens(bare, max_length=6) == 5
    shaped = pipeline("text-generation", model, generator.tokenizer, eos_token_id=0, max_new_tokens=7)
    assert new_tokens(shaped) == 7
    assert new_tokens(shaped, max_length=6) == 5
    assert new_tokens(shaped, max_new_tokens=2) == 2


def test_clean_up_touches_the_continuation_only(generator: Any) -> None:
    text = generator("a , b .", max_new_tokens=12, clean_up_tokenization_spaces=True)[0]["generated_text"]
    assert text.startswith("a , b .")


def test_long_prompts(generator: Any) -> None:
    long = "word " * 50
    ids = generator.tokenizer.encode(long)
    with pytest.raises(InputError, match=r"prompt 1 has \d+ tokens and is to get 1 more, over n_positions=64: shorten"):
        generator(["So", long])
    for new in (5, 20, 63):
        [result] = generator(long, max_new_tokens=new, handle_long_generation="hole", return_tensors=True)
        assert result["generated_token_ids"][: 64 - new] == ids[new - 64 :]
    assert generator(long, handle_long_generation="hole")[0]["generated_text"].startswith(long)
    with pytest.raises(InputError, match="64 new tokens leave no room for a prompt: n_positions is 64"):
        generator(long, max_new_tokens=64, handle_long_generation="hole")
    with pytest.raises(GenerationError, match="max_length=5 leaves no room after prompt 0"):
        generator(long, max_length=5)


def test_generation_errors(generator: Any) -> None:
    with pytest.raises(GenerationError, match="unknown generation parameter 'temprature'; did you mean temperature"):
        generator("a", temprature=1.0)
    with pytest.raises(InputError, match="no option 'return_fulltext'; did you mean return_full_text"):
        generator("a", return_fulltext=False)
    with pytest.raises(InputError, match="no option 'device'; there are return_full_text, .* of generate: max_new_tok"):
        generator("a", device=0)
    with pytest.raises(InputError, match="return_tensors=True there is none"):
        generator("a", return_tensors=True, return_full_text=False)
    with pytest.raises(InputError, match="handle_long_generation must be None or 'hole', got 'cut'"):
        generator("a", handle_long_generation="cut")
    with pytest.raises(InputTypeError, match="text is of type int"):
        generator(3)
    config = GPTJConfig.from_pretrained(GOLDENS / "causal_lm", bos_token_id=None)
    with pytest.raises(GenerationError, match="prompt 1 is empty, and there is no bos_token_id"):
        pipeline("text-generation", TFGPTJForCausalLM(config), generator.tokenizer)(["a", ""])


# Text classification


def test_classification_shapes(classifier: Any) -> None:
    ranked = pipeline("text-classification", classifier.model, classifier.tokenizer, top_k=None)
    assert [len(row) for row in ranked(["a", "b c"])] == [3, 3]
    assert len(ranked("a")) == 3
    assert len(ranked("a", top_k=2)) == 2
    assert classifier(["a"]) == [classifier("a")[0]]
    assert classifier("a", top_k=1, function_to_apply=None, batch_size=None) == classifier("a")


def test_functions_of_logits() -> None:
    logits = np.array([1000.0, -1000.0, 0.0], "float32")
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_allclose(apply_function("softmax", logits), [1, 0, 0])
        np.testing.assert_allclose(apply_function("sigmoid", logits), [1, 0, 0.5])
    assert apply_function("none", logits) is logits


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "function"),
    [
        ("regression", 1, "none"),
        ("regression", 3, "none"),
        ("multi_label_classification", 3, "sigmoid"),
        ("single_label_classification", 3, "softmax"),
        (None, 1, "sigmoid"),
        (None, 2, "softmax"),
    ],
)
def test_default_function(problem_type: str | None, num_labels: int, function: str) -> None:
    assert default_function(GPTJConfig(problem_type=problem_type, num_labels=num_labels)) == function


def test_truncation(classifier: Any, pipelines: dict[str, Any]) -> None:
    long = "word " * 100
    with pytest.raises(InputError, match=r"text 1 has \d+ tokens, over n_positions=64: shorten it, or set truncation"):
        classifier(["a", long])
    assert len(classifier(long, truncation=True)) == 1
    extract = pipelines["feature-extraction"]
    assert np.shape(extract(long, truncation=True)) == (1, 64, 16)
    assert np.shape(extract(long, truncation=True, max_length=9)) == (1, 9, 16)
    np.testing.assert_allclose(
        extract(long, truncation=True, max_length=9)[0], np.array(extract(long, truncation=True)[0])[:9], atol=1e-5
    )


def test_classification_errors(classifier: Any) -> None:
    with pytest.raises(InputError, match="text 1 is empty: text-classification needs at least one token"):
        classifier(["a", ""])
    with pytest.raises(InputError, match="function_to_apply must be None or one of softmax, sigmoid, none; got 'tanh'"):
        classifier("a", function_to_apply="tanh")
    with pytest.raises(InputError, match="top_k is 0, expected an integer from 1"):
        classifier("a", top_k=0)
    with pytest.raises(InputError, match="max_length is 0, expected an integer from 1"):
        classifier("a", truncation=True, max_length=0)
    with pytest.raises(InputError, match="no option 'max_new_tokens'; there are top_k, function_to_apply"):
        classifier("a", max_new_tokens=3)


# Question answering


def test_answers_are_parts_of_the_context(answerer: Any) -> None:
    context = "naïve café 北京, <|endoftext|>  and\n more 🎈 words. " * 4
    for aligned in (True, False):
        for answer in answerer("Who?", context, top_k=20, align_to_words=aligned, max_seq_len=40, doc_stride=6):
            assert context[answer["start"] : answer["end"]] == answer["answer"]


def test_short_contexts_give_no_impossible_spans(answerer: Any) -> None:
    """Hugging Face's pipeline fills up with spans that end before they begin."""
    answers = answerer("Who?", "a bc", top_k=9)
    assert sorted(answer["answer"] for answer in answers) == [" bc", "a", "a bc"]
    assert answerer("Who?", "a", top_k=2, handle_impossible_answer=True)[1] == {
        "score": 0.0, "start": 0, "end": 0, "answer": "",
    }  # fmt: skip


def test_best_spans_are_the_best_of_all() -> None:
    random = np.random.default_rng(0)
    start, end = random.normal(size=(2, 9))
    p, q = (np.exp(x) / np.exp(x).sum() for x in (start, end))
    every = {(i, j): p[i] * q[j] for i in range(9) for j in range(i, min(i + 3, 9))}
    best = sorted(every, key=lambda span: -every[span])
    found = best_spans(start, end, longest=3, count=100)
    assert [span[:2] for span in found] == best
    np.testing.assert_allclose([span[2] for span in found], [every[span] for span in best])
    assert best_spans(start, end, longest=3, count=2) == found[:2]


def test_question_answering_errors(answerer: Any) -> None:
    with pytest.raises(InputError, match="there are 2 questions and 1 contexts: give one for each"):
        answerer(question=["a", "b"], context=["c"])
    with pytest.raises(InputError, match="question 0 is empty"):
        answerer(question="", context="c")
    with pytest.raises(InputError, match="context 1 is empty"):
        answerer(question=["a", "b"], context=["c", ""])
    with pytest.raises(InputError, match=r"the question has \d+ tokens, which leaves no room .* in a window of 8"):
        answerer(question="Why is all of this so very long?", context="c", max_seq_len=8)
    with pytest.raises(InputError, match="share 30 tokens, which must be below 27, the tokens of context in a window"):
        answerer(question="Who", context="word " * 50, max_seq_len=30, doc_stride=30)
    with pytest.raises(InputError, match="max_answer_len is 0, expected an integer from 1"):
        answerer(question="a", context="c", max_answer_len=0)
    assert answerer(question="Who", context="no windows", max_seq_len=30, doc_stride=30)["answer"]
    assert answerer(question="Who?", context="a b", max_answer_len=None, top_k=None) == answerer("Who?", "a b")


def test_a_long_question_leaves_windows_that_advance(answerer: Any) -> None:
    question = "Why is all of this so very long, and where does it end? " + "Who knows?"
    assert 32 < len(answerer.tokenizer.encode(question)) < 60
    assert answerer(question, "word " * 20)["answer"]


# Feature extraction, and what all pipelines share


def test_features(pipelines: dict[str, Any]) -> None:
    extract, model = pipelines["feature-extraction"], pipelines["text-generation"].model
    with_head = pipeline("feature-extraction", model, extract.tokenizer, return_tensors=True)
    features = with_head(["To be", "a"])
    assert [tuple(x.shape) for x in features] == [(1, 3, 16), (1, 1, 16)]
    assert_alike(np.asarray(features[0]).tolist(), extract("To be"))


def test_packaged_model_is_the_default(monkeypatch: pytest.MonkeyPatch, pipelines: dict[str, Any]) -> None:
    loaded = []

    def load(kind: str, made: Any) -> Any:
        return classmethod(lambda cls, name, **options: loaded.append((kind, name, options)) or made)

    generator, extractor = pipelines["text-generation"], pipelines["feature-extraction"]
    for made in (generator, extractor):
        monkeypatch.setattr(type(made.model), "from_pretrained", load("model", made.model))
    monkeypatch.setattr(GPTJTokenizer, "from_pretrained", load("tokenizer", generator.tokenizer))
    assert pipeline("text-generation").model is generator.model
    assert pipeline("feature-extraction").model is extractor.model
    assert loaded == [("tokenizer", "shakespeare", {}), ("model", "shakespeare", {})] * 2

    loaded.clear()
    pipeline("text-generation", "owner/model", dtype="bfloat16", revision="float16", token="secret")
    assert loaded == [
        ("tokenizer", "owner/model", {"revision": "float16", "token": "secret"}),
        ("model", "owner/model", {"dtype": "bfloat16", "revision": "float16", "token": "secret"}),
    ]
    loaded.clear()
    pipeline("text-generation", "owner/model", "owner/other", revision="float16", local_files_only=True)
    assert loaded[0] == ("tokenizer", "owner/other", {"local_files_only": True})


def test_packaged_model() -> None:
    generate = pipeline("text-generation")
    [first], [second] = (generate("ROMEO:", seed=1, max_new_tokens=24) for _ in range(2))
    assert first == second
    assert first["generated_text"].startswith("ROMEO:") and len(first["generated_text"]) > 20


def test_construction_errors(generator: Any) -> None:
    model, tokenizer = generator.model, generator.tokenizer
    with pytest.raises(InputError, match="unknown task 'translation'; there are text-generation, .*sentiment-analysis"):
        pipeline("translation")
    with pytest.raises(InputError, match="text-classification needs a model that was trained for it, and none is pack"):
        pipeline("sentiment-analysis")
    with pytest.raises(
        InputError, match="question-answering needs .*give model=, a TFGPTJForQuestionAnswering or where"
    ):
        pipeline("question-answering")
    with pytest.raises(
        InputTypeError, match="needs a TFGPTJForSequenceClassification, got a TFGPTJForCausalLM: load it"
    ):
        pipeline("text-classification", model, tokenizer)
    with pytest.raises(InputTypeError, match="tokenizer must be a GPTJTokenizer, got a dict"):
        pipeline("text-generation", model, {})
    with pytest.raises(InputError, match="does not say where its tokenizer is: give tokenizer= too"):
        pipeline("text-generation", model)
    with pytest.raises(InputError, match="dtype, revision would have no effect: the model is loaded already"):
        pipeline("text-generation", model, tokenizer, dtype="float32", revision="main")
    with pytest.raises(InputError, match="batch_size is 0, expected an integer from 1"):
        pipeline("text-generation", model, tokenizer, batch_size=0)
    with pytest.raises(GenerationError, match="unknown generation parameter 'topp'"):
        pipeline("text-generation", "never/loaded", topp=0.9)  # found out before anything is loaded


def test_hidden_states_in_the_outputs_do_no_harm(pipelines: dict[str, Any]) -> None:
    for model_class, task, inputs in (
        (TFGPTJForSequenceClassification, "text-classification", ("a",)),
        (TFGPTJForQuestionAnswering, "question-answering", ("Who?", "the fool")),
        (TFGPTJForCausalLM, "feature-extraction", ("a",)),
    ):
        model = model_class.from_pretrained(GOLDENS / CHECKPOINTS[task], output_hidden_states=True)
        talkative = pipeline(task, model, pipelines[task].tokenizer)
        assert_alike(talkative(*inputs), pipelines[task](*inputs))


def test_functions_reach_generation(generator: Any) -> None:
    def only(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return np.where(np.arange(scores.shape[1]) == 70, scores, -np.inf)

    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "return_tensors": True}
    for functions, new in (
        ({"logits_processor": only}, [70] * 6),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [70]}, [70] * 6),
        ({"logits_processor": only, "stopping_criteria": lambda ids, scores: [True] * len(ids)}, [70]),
    ):
        results = generator(["The king", "So"], **functions, **options)
        assert all(result[0]["generated_token_ids"][-len(new) :] == new for result in results)
