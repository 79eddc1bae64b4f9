"""R, AP, FT and BWT by hand; scores against their definitions and against rouge-score."""

import random
import re
import string
import unicodedata

import datasets
import pytest
from rouge_score.rouge_scorer import RougeScorer
from torch import nn

from gainlora.config import load_config
from gainlora.training import evaluate
from gainlora.training.metrics import (
    average_performance,
    backward_transfer,
    forgetting,
    forward_transfer,
    normalize,
    routing,
    score,
    summary,
)  # fmt: skip


def test_matrix_by_hand():
    R = [[80], [90, 60], [70, 50, 40]]
    assert average_performance(R) == pytest.approx((70 + 50 + 40) / 3)
    assert forgetting(R) == pytest.approx(((90 - 70) + (60 - 50)) / 2)  # best before the last task, not the first
    assert backward_transfer(R) == pytest.approx(((70 - 80) + (50 - 60)) / 2)


def test_forgetting_is_negative_where_the_last_task_helped():
    assert forgetting([[50], [60, 70]]) == -10


def test_padded_rows_and_one_task():
    R = [[80, None], [90, 60]]
    assert (average_performance(R), forgetting(R), backward_transfer(R)) == (75, -10, 10)
    assert (average_performance([[55]]), forgetting([[55]]), backward_transfer([[55]])) == (55, None, None)


@pytest.mark.parametrize(
    "prediction, references, expected",
    [
        ("Positive.", ["positive"], 100),
        ("  science  or technology", ["Science or Technology"], 100),
        ("negative", ["positive"], 0),
        ("b", ["a", "b"], 100),
        ("", ["positive"], 0),
        ("", ["+"], 0),
        (" \n", ["?", ""], 0),
        ("...", ["?"], 0),
        ("-", ["+"], 0),
        ("-", ["-"], 100),
        ("+", ["yes", "+"], 100),
        ("1", ["-1"], 100),
        ("Да.", ["да"], 100),
        (unicodedata.normalize("NFC", "Café"), [unicodedata.normalize("NFD", "café")], 100),
    ],
)
def test_exact_match(prediction, references, expected):
    assert score("exact_match", prediction, references) == expected


@pytest.mark.parametrize(
    "prediction, reference, expected",
    [("1", "-1", 0), ("-1", "-1", 100), ("c++\n", "C++", 100), ("C", "C++", 0), ("a  B", "A b", 100), ("", "+", 0)],
)
def test_exact_match_with_punctuation(prediction, reference, expected):
    assert score("exact_match", prediction, [reference], keep_punctuation=True) == expected


def test_rouge_l():
    # longest common subsequence of 3 words; precision 3/4, recall 3/3
    assert score("rouge_l", "the dogs were running", ["dog were run"]) == pytest.approx(100 * 2 * 0.75 / 1.75)
    assert score("rouge_l", "cat", ["dog", "cat"]) == 100
    assert score("rouge_l", "", ["dog"]) == 0


@pytest.mark.parametrize(
    "text, other, expected",
    [
        ("Привет, мир", "привет мир!", 100),
        ("Добрый день", "Добрый вечер", 50),
        ("我喜欢猫", "我喜欢狗。", 75),  # a character is a word
        ("ABC中文", "abc 中文", 100),
        ("ラーメン", "ラーメソ", 75),
        ("แมวดำ", "แมวขาว", 100 * 3 / 5.5),
        ("हिन्दी भाषा", "हिन्दा भाषा", 50),  # another vowel sign: another word
        ("كِتاب", "كُتاب", 0),
        ("می‌خواهم", "می خواهم", 0),
        ("한국어 좋아", "한국어 싫어", 50),
        (unicodedata.normalize("NFD", "été"), unicodedata.normalize("NFC", "été"), 100),
        ("naïve", "na ve", 0),
    ],
)
def test_rouge_l_reads_every_script(text, other, expected):
    assert score("rouge_l", text, [text]) == score("rouge_l", other, [other]) == 100
    assert score("rouge_l", text, [other]) == pytest.approx(expected)


def test_ascii_scores_as_in_rouge_score_and_the_published_exact_match():
    """Each text against itself, half of it, and another."""
    chooser, scorer = random.Random(0), RougeScorer(["rougeL"], use_stemmer=True)
    pieces = ["running", "Dogs", "don't", "a_b", "3.14", "U.S.", "well-known", "x", "2nd", "**", "e-mail@x", "\t"]
    texts = [" ".join(chooser.choices(pieces, k=chooser.randint(1, 9))) for _ in range(150)]
    texts += ["".join(chooser.choices(string.printable, k=chooser.randint(1, 40))) for _ in range(150)]
    for text in texts:
        for prediction in (text, text[: len(text) // 2], chooser.choice(texts)):
            expected = 100 * scorer.score(text, prediction)["rougeL"].fmeasure
            assert score("rouge_l", prediction, [text]) == expected, (prediction, text)
        bare = re.sub(r"\s+", " ", text.lower().translate(str.maketrans("", "", string.punctuation))).strip()
        assert normalize(text) == bare
        assert score("exact_match", text.upper(), [text]) == 100 * bool(text.strip())


def test_learning_accuracy_incremental_accuracy_and_forward_transfer_by_hand():
    found = summary([[80], [60, 90]], before=[None, 30], base=[10, 25])
    assert (found["LA"], found["AIA"], found["FWT"]) == (85, (80 + 75) / 2, 5)
    at_once = summary([[80, 90]], before=[None, None], base=[10, 25])
    assert (at_once["AP"], at_once["LA"], at_once["AIA"], at_once["FWT"]) == (85, None, None, None)
    assert forward_transfer([None, 30, None], [10, 25, 5]) is None  # never a mean of some tasks


def test_routing_counts_prompts_and_pairs():
    random.seed(1)
    a = {task: [[round(random.random(), 1) for _ in range(3)] for _ in range(20)] for task in ("x", "y", "z")}
    for i, (task, rows) in enumerate(a.items()):
        others = [row[i] for other in a if other != task for row in a[other]]
        pairs = [(row[i] > other) + (row[i] == other) / 2 for row in rows for other in others]
        found = routing(a)[task]
        assert found["auc"] == pytest.approx(sum(pairs) / len(pairs))
        assert found["top1"] == sum(row.index(max(row)) == i for row in rows) / len(rows)
    assert routing({"x": [[0.5]]}) == {}


class Words:
    """A tokenizer whose tokens are words and blanks."""

    def __call__(self, texts, **_):
        return {"input_ids": [text.split(" ") for text in texts]}


@pytest.mark.parametrize(
    "full", ["A", "A: B: C: D: E: F: G", "a.", "- - - - - - A", "- - - - - - A B", "B and much more of it"]
)
@pytest.mark.parametrize("keep_punctuation", [False, True])
def test_a_cut_answer_scores_as_in_full(monkeypatch, full, keep_punctuation):
    def answer_batch(model, tokenizer, rows, longest, beams):
        return [" ".join(full.split(" ")[:longest]) for _ in rows], None

    monkeypatch.setattr(evaluate, "answer_batch", answer_batch)
    rows = datasets.Dataset.from_list([{"prompt_ids": [1], "references": ["A"]}] * 3)
    given = (nn.Module(), Words(), rows, "exact_match", load_config("embedded"), "task", keep_punctuation)
    cut, whole = (evaluate.evaluate_task(*given, unlearned=unlearned) for unlearned in (True, False))
    assert [p.score for p in cut] == [p.score for p in whole]
