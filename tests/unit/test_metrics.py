"""R, AP, FT and BWT by hand; scores against their definitions."""

import pytest

from gainlora.learning.metrics import average_performance, backward_transfer, forgetting, normalize, score


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
    ],
)
def test_exact_match(prediction, references, expected):
    assert score("exact_match", prediction, references) == expected


def test_rouge_l():
    # longest common subsequence of 3 words; precision 3/4, recall 3/3
    assert score("rouge_l", "the dogs were running", ["dog were run"]) == pytest.approx(100 * 2 * 0.75 / 1.75)
    assert score("rouge_l", "cat", ["dog", "cat"]) == 100
    assert score("rouge_l", "", ["dog"]) == 0


def test_normalize():
    assert normalize(" A-b,  C\n d. ") == "ab c d"
