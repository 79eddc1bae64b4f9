"""Scores of a task and of a sequence, all 0 to 100.

    R[t][i]   score on task i after learning task t (0-based here); None for tasks not learned yet
    AP  = mean_i R[T][i]                                       average performance
    FT  = mean_{i<T} (max_{i<=t<T} R[t][i] - R[T][i])          forgetting
    BWT = mean_{i<T} (R[T][i] - R[i][i])                       backward transfer
    LA  = mean_i R[i][i]                                       learning accuracy
    AIA = mean_t mean_{i<=t} R[t][i]                           average incremental accuracy
    FWT = mean_{i>1} (R[i-1][i] - R[0][i])                     forward transfer; R[0]: the base model

AP and FT as in Liang, Chen, Li (GainLoRA, NeurIPS 2025) and Chaudhry et al. (2018); BWT and FWT as in Lopez-Paz and
Ranzato (2017), LA as in Riemer et al. (2019), AIA as in Rebuffi et al. (2017). FT, BWT and FWT are None with one task,
and all but AP where all tasks were learned at once.
"""

import bisect
import math
import string
import unicodedata
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

Matrix = Sequence[Sequence[float | None]]

PUNCTUATION = str.maketrans("", "", string.punctuation)
UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}ーｰﾞﾟ\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Le}"
    r"\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Javanese}\p{Balinese}"
)
"""Scripts without spaces between words, for a regular expression's character set."""
MARKS = r"[\p{Mn}\p{Mc}--\p{Variation_Selector}]"
"""Combining marks, such as vowel signs: part of a word, though not letters."""


def average_performance(R: Matrix) -> float:
    """AP, from the last row."""
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


def learning_accuracy(R: Matrix) -> float | None:
    """LA, the mean of the diagonal: how well each task was learned."""
    return None if _at_once(R) else sum(_scores(row)[-1] for row in R) / len(R)


def average_incremental_accuracy(R: Matrix) -> float | None:
    """AIA: the mean of AP after each task."""
    return None if _at_once(R) else sum(map(average_performance, ([row] for row in R))) / len(R)


def forward_transfer(before: Sequence[float | None], base: Sequence[float | None]) -> float | None:
    """FWT: what earlier tasks changed on each task but the first, before it was learned.

    Args:
        before: R[i-1][i]. base: R[0][i]. Of tasks 1 to T; None where it was not measured.
    """
    gains = [b - z for b, z in zip(before[1:], base[1:], strict=True) if b is not None and z is not None]
    return sum(gains) / len(gains) if gains and len(gains) == len(before) - 1 else None


def _at_once(R: Matrix) -> bool:
    return len(R) == 1 and len(_scores(R[0])) > 1


def routing(coefficients: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, dict[str, float]]:
    """How well coefficients tell tasks apart, 0 to 1, per task of two or more; {} with one.

    Args:
        coefficients: task -> a_1..a_T of each of its prompts (n, T), the tasks in the order of their branches.

    Returns:
        task -> top1: the share of its prompts on which its own branch has the largest coefficient; auc: the
        probability that its branch's coefficient is larger on one of its prompts than on another task's, ties counted
        half (0.5: no better than chance).
    """
    found = {}
    for i, (task, rows) in enumerate(coefficients.items()):
        others = sorted(row[i] for other, theirs in coefficients.items() if other != task for row in theirs)
        if not others:
            return {}
        top1 = sum(max(range(len(row)), key=row.__getitem__) == i for row in rows) / len(rows)
        wins = sum(bisect.bisect_left(others, r[i]) + bisect.bisect_right(others, r[i]) for r in rows) / 2
        found[task] = {"top1": top1, "auc": wins / (len(rows) * len(others))}
    return found


def score(metric: str, prediction: str, references: Sequence[str], keep_punctuation: bool = False) -> float:
    """Best match of a prediction with any reference. An empty prediction scores 0.

    Args:
        metric: `rouge_l`: ROUGE-L F1 over stemmed words (`words`). `exact_match`: 100 for the same text (`comparable`).
        keep_punctuation: of a task whose labels differ in punctuation (`gainlora.data.checks`); for `exact_match`.
    """
    if metric == "rouge_l":
        return 100.0 * max((_rouge().score(r, prediction)["rougeL"].fmeasure for r in references), default=0.0)
    answer = comparable(metric, prediction, keep_punctuation)
    return 100.0 * any(answer and answer == comparable(metric, r, keep_punctuation) for r in references)


def comparable(metric: str, text: str, keep_punctuation: bool = False) -> Hashable:
    """The form of a text that `score` compares: two texts match if their forms are equal and not empty.

    For `exact_match` the `normalize`d text, or the text with punctuation if the task keeps it or nothing else remains.
    """
    if metric == "rouge_l":
        return tuple(words(text))
    return (not keep_punctuation and normalize(text)) or fold(text)


def normalize(text: str) -> str:
    """Lower case, without ASCII punctuation, single spaces, NFC."""
    return fold(unicodedata.normalize("NFC", text).translate(PUNCTUATION))


def fold(text: str) -> str:
    """Lower case, single spaces, NFC."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def words(text: str) -> list[str]:
    """Lower-case words, stemmed as English: runs of Unicode letters, digits and marks; single characters in scripts
    without spaces. For English these equal the tokens of rouge-score, which are runs of a-z and 0-9."""
    found = _word().findall(unicodedata.normalize("NFC", text).lower())
    return [_stemmer()(word) if len(word) > 3 else word for word in found]


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=words))


@cache
def _word() -> Any:
    import regex

    letter = r"[\p{L}\p{N}]"
    joiner = r"[\u200c\u200d](?=[\p{L}\p{N}])"  # inside words of Persian and of Indian languages
    single = rf"[{letter}&&[{UNSPACED}]]{MARKS}*"
    spaced = rf"[{letter}--[{UNSPACED}]]"
    return regex.compile(rf"(?V1){single}|{spaced}(?:{spaced}|{MARKS}|{joiner})*")


@cache
def _stemmer() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer

    return lru_cache(1 << 16)(PorterStemmer().stem)


def _scores(row: Sequence[float | None]) -> list[float]:
    return [value for value in row if value is not None]


def lower_bound(score: float, baseline: float, examples: int) -> float:
    """Lower end of the 95 % interval of score - baseline, both 0 to 100 and means over as many examples.

    Newcombe's interval for two independent proportions (Statistics in Medicine 17, 1998, method 10). Two systems on the
    same examples, and scores between 0 and 100, vary less, so the bound is on the safe side.
    """
    low, high = _wilson(score / 100, examples)[0], _wilson(baseline / 100, examples)[1]
    return score - baseline - 100 * math.hypot(score / 100 - low, high - baseline / 100)


def _wilson(p: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    z2 = 1.96**2
    half = math.sqrt(z2 * p * (1 - p) / n + z2 * z2 / (4 * n * n))
    return (p + z2 / (2 * n) - half) / (1 + z2 / n), (p + z2 / (2 * n) + half) / (1 + z2 / n)


def summary(
    R: list[list[float]], before: Sequence[float | None] = (), base: Sequence[float | None] = ()
) -> dict[str, float | None]:
    """AP, FT, BWT, LA, AIA and FWT (`before` and `base`: of `forward_transfer`)."""
    return {
        "AP": average_performance(R),
        "FT": forgetting(R),
        "BWT": backward_transfer(R),
        "LA": learning_accuracy(R),
        "AIA": average_incremental_accuracy(R),
        "FWT": forward_transfer(before, base) if before else None,
    }
