"""Selects examples to hold out, for validation or for testing, from the task's name and inputs alone: the same for
every seed, method and limit. Equal inputs stay on one side."""

import hashlib
import random
import re
import unicodedata
from collections.abc import Sequence

from gainlora.errors import GainLoRAError

SHARE = 0.2
"""Held out by `data.validation: auto`, as in the authors' corrected split."""
TEST_SHARE = 5
"""One in this many inputs is held out to test where there are no test examples."""
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]+")
"""Soft hyphen, zero-width characters, direction and byte order marks."""


def normalize_input(text: str) -> str:
    """A form that is equal for inputs which differ only in case, blanks or Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def split_off(inputs: Sequence[str], share: float, task: str) -> set[int]:
    """Indices to hold out: groups of equal inputs in the order of their hash, the first max(1, round(share * groups)).

    At least one group remains in training; of fewer than two groups none is held out.
    """
    groups: dict[str, list[int]] = {}
    for index, text in enumerate(inputs):
        groups.setdefault(normalize_input(text), []).append(index)
    order = sorted(groups, key=lambda text: hashlib.sha256(f"{task}/{text}".encode()).digest())
    count = min(max(1, round(share * len(order))), len(order) - 1)
    return {index for text in order[:count] for index in groups[text]}


def common_inputs(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """Inputs of `one` that are also in `other`."""
    known = {normalize_input(text) for text in other}
    return [text for text in one if normalize_input(text) in known]


def split_test(inputs: Sequence[str], task: str, where: str) -> set[int]:
    """Indices to hold out for testing: one in `TEST_SHARE` groups of inputs that differ only in case, blanks and
    punctuation.

    Raises:
        GainLoRAError: too few different inputs.
    """
    gists = [_gist(text) for text in inputs]
    groups = list(dict.fromkeys(gists))
    if len(groups) < TEST_SHARE:
        raise GainLoRAError(
            f"{where}: has {len(groups)} different inputs, too few to hold one in {TEST_SHARE} out to test (case, "
            "blanks and punctuation make no difference); add some, or give test examples of their own."
        )
    asked = set(random.Random(f"{task}/test").sample(groups, len(groups) // TEST_SHARE))
    return {index for index, gist in enumerate(gists) if gist in asked}


def squeeze(text: str) -> str:
    """The text in one case, without blanks and invisible characters, NFC."""
    folded = "".join(unicodedata.normalize("NFC", text).casefold().split())
    return folded if folded.isascii() else INVISIBLE.sub("", folded)


def _gist(text: str) -> str:
    """The text's letters, digits and marks in one case; all but blanks if it has none."""
    text = squeeze(text)
    return "".join(c for c in text if unicodedata.category(c)[0] in "LNM") or text
