"""Scores of a task and of a sequence, all 0 to 100.

    R[t][i]   score on task i after learning task t (0-based here); None for tasks not learned yet
    AP  = mean_i R[T][i]                                       average performance
    FT  = mean_{i<T} (max_{i<=t<T} R[t][i] - R[T][i])          forgetting
    BWT = mean_{i<T} (R[T][i] - R[i][i])                       backward transfer

AP and FT as in Liang, Chen, Li (GainLoRA, NeurIPS 2025) and Chaudhry et al. (2018); BWT as in Lopez-Paz and
Ranzato (2017). FT and BWT are None with one task.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import cache
from typing import Any

Matrix = Sequence[Sequence[float | None]]


def average_performance(R: Matrix) -> float:
    """AP of the last row."""
    row = _scores(R[-1])
    return sum(row) / len(row)


def forgetting(R: Matrix) -> float | None:
    """FT: how far each earlier task fell from the best it had reached before the last task."""
    last = len(R) - 1
    drops = [max(_scores([R[t][i] for t in range(i, last)])) - _scores(R[last])[i] for i in range(last)]
    return sum(drops) / last if last else None


def backward_transfer(R: Matrix) -> float | None:
    """BWT: how later tasks changed each earlier task's score, negative where they harmed."""
    last = len(R) - 1
    changes = [_scores(R[last])[i] - _scores(R[i])[i] for i in range(last)]
    return sum(changes) / last if last else None


def score(metric: str, prediction: str, references: Sequence[str]) -> float:
    """Best match of a prediction with any reference: ROUGE-L F1 (stemmed), or exact match."""
    match = _rouge_l if metric == "rouge_l" else _exact_match
    return max(match(prediction, reference) for reference in references)


def normalize(text: str) -> str:
    """Lower case, without punctuation, single spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\s+", " ", text).strip()


def _exact_match(prediction: str, reference: str) -> float:
    return 100.0 * (normalize(prediction) == normalize(reference))


def _rouge_l(prediction: str, reference: str) -> float:
    return 100.0 * float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def _scores(row: Sequence[float | None]) -> list[float]:
    return [value for value in row if value is not None]


def summary(R: list[list[float]]) -> dict[str, float | None]:
    """AP, FT and BWT."""
    return {"AP": average_performance(R), "FT": forgetting(R), "BWT": backward_transfer(R)}
