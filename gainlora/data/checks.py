"""Checks of a task's data that concern its scores: how to compare answers, and notes for the user.

`exact_match` ignores case and punctuation, as the benchmark does: `-1` equals `1`, and `+` becomes empty. If two
training labels of a task would be equal, or one empty, its answers are compared with punctuation. Test data only cause
notes. Every check is linear in the size of the files.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

from gainlora.config import RunConfig
from gainlora.data.collate import encode
from gainlora.data.instances import Example
from gainlora.data.tasks import Task, limited
from gainlora.data.validation import squeeze
from gainlora.errors import GainLoRAError, short_repr
from gainlora.training.metrics import comparable, fold, normalize

Same = Callable[[str], Hashable]
"""The form of a text that is compared (`gainlora.training.metrics.comparable`)."""


@dataclass(frozen=True)
class Findings:
    """Result of `inspect`."""

    keep_punctuation: bool
    """How `gainlora.training.metrics.score` is to compare answers."""
    notes: tuple[str, ...]
    """One sentence each, with a count and the first example."""


def inspect(task: Task, tokenizer: Any = None, benchmark_protocol: bool = False) -> Findings:
    """Check a task's labels, references and inputs.

    Args:
        task: as read, without limits.
        tokenizer: the model's; None skips the check that it can represent the references.
        benchmark_protocol: compare as the benchmark does, regardless of the labels.

    Raises:
        GainLoRAError: two training labels of an `exact_match` task are the same tokens.
    """
    keep = keeps_punctuation(task, benchmark_protocol)
    exact = task.metric == "exact_match"
    same = partial(comparable, task.metric, keep_punctuation=keep)
    if exact and tokenizer is not None:
        _check_labels(task, tokenizer, same)
    notes = [*task.notes]
    if exact:
        notes += [*_label_notes(_labels(task), keep), *_test_label_notes(task, keep, same)]
    notes += _leaks(task)
    answer = partial(comparable, "exact_match", keep_punctuation=keep)
    notes += [*_contradictions("train.json", task.train, answer), *_contradictions("test.json", task.test, answer)]
    notes += _unreachable(task, tokenizer, same)
    return Findings(keep, tuple(notes))


def data_entry(task: Task, config: RunConfig, path: str, dvc: str | None, tokenizer: Any) -> dict[str, Any]:
    """A task's entry in a run's data.json. The task is read without limits: counts are those within the limits; notes
    and comparison consider all examples."""
    used = limited(task, config.data)
    counts: dict[str, Any] = {"train": len(used.train), "test": len(used.test)}
    if used.validation:
        counts |= {"validation": len(used.validation), "validation_from": used.validation_from}
    entry = {"path": path, "dvc": dvc, "sha256": task.sha256, "definition": task.instruction, **counts}
    findings = inspect(task, tokenizer, benchmark_protocol=config.data.protocol is not None)
    return {**entry, "keep_punctuation": findings.keep_punctuation, "notes": list(findings.notes)}


def data_notes(data: dict[str, Any]) -> list[str]:
    """The notes of data.json, each with its task's name."""
    return [f"{name}: {note}" for name, entry in data.items() for note in entry.get("notes", [])]


def keeps_punctuation(task: Task, benchmark_protocol: bool = False) -> bool:
    """Whether answers are compared with their punctuation: training labels are equal or empty without it."""
    return task.metric == "exact_match" and not benchmark_protocol and bool(_ambiguous(_labels(task)))


def majority_score(task: Task) -> float | None:
    """Score (0 to 100) of the most frequent training label as the answer to every test example; None for ROUGE."""
    if task.metric != "exact_match":
        return None
    same = partial(comparable, task.metric, keep_punctuation=bool(task.keep_punctuation))
    most = Counter(same(e.references[0]) for e in task.train).most_common(1)[0][0]
    right = [most in map(same, e.references) for e in task.test]
    return 100 * sum(right) / len(right)


def _labels(task: Task) -> list[str]:
    """The distinct training targets, in file order."""
    return list(dict.fromkeys(example.references[0] for example in task.train))


def _ambiguous(labels: Sequence[str]) -> list[tuple[str, ...]]:
    """Labels that are empty without punctuation; and pairs that are equal without it, not with it."""
    first: dict[str, str] = {}
    found: list[tuple[str, ...]] = []
    for label in labels:
        bare = normalize(label)
        other = first.setdefault(bare, label)
        if not bare:
            found.append((label,))
        elif fold(other) != fold(label):
            found.append((other, label))
    return found


def _label_notes(labels: Sequence[str], keep: bool) -> Iterator[str]:
    if ambiguous := _ambiguous(labels):
        how = "so answers are compared with it" if keep else "which the benchmark's comparison ignores all the same"
        yield _note("train.json", ambiguous, labels, f"labels are empty or equal to another without punctuation, {how}")
    first: dict[str, str] = {}
    pairs = [(first.setdefault(fold(label), label), label) for label in labels]
    cased = [(a, b) for a, b in pairs if unicodedata.normalize("NFC", a) != unicodedata.normalize("NFC", b)]
    if cased:
        yield _note("train.json", cased, labels, "labels equal another but for case or blanks, and count as equal")


def _test_label_notes(task: Task, keep: bool, same: Same) -> Iterator[str]:
    references = [reference for example in task.test for reference in example.references]
    if bare := [(r,) for r in references if not keep and not normalize(r)]:
        yield _note("test.json", bare, references, "answers are punctuation alone and compared as they are")
    trained = {same(reference) for example in task.train for reference in example.references}
    if unseen := [e.references[:1] for e in task.test if trained.isdisjoint(map(same, e.references))]:
        yield _note("test.json", unseen, task.test, "instances have a label that train.json never shows")


def _leaks(task: Task) -> Iterator[str]:
    trained = {squeeze(example.input) for example in task.train}
    if leaked := [(e.input,) for e in task.test if squeeze(e.input) in trained]:
        yield _note("test.json", leaked, task.test, "inputs are also in train.json, apart from case and blanks")


def _contradictions(file: str, examples: Sequence[Example], answer: Same) -> Iterator[str]:
    """Inputs that occur several times without an answer in common."""
    shared: dict[str, set[Hashable]] = {}
    for example in examples:
        text, answers = " ".join(example.input.split()), {answer(reference) for reference in example.references}
        shared[text] = shared.get(text, answers) & answers
    if torn := [(text,) for text, answers in shared.items() if not answers]:
        yield _note(file, torn, shared, "different inputs are repeated with contradictory answers")


def _check_labels(task: Task, tokenizer: Any, same: Same) -> None:
    """Refuse labels that are the same tokens for the model."""
    labels = _labels(task)
    first: dict[tuple[int, ...], str] = {}
    for label, ids in zip(labels, encode(labels, tokenizer), strict=True):
        other = first.setdefault(tuple(ids), label)
        if same(other) != same(label):
            raise GainLoRAError(
                f"{task.name}/train.json: labels {_shown((other, label))} are the same tokens for this model's "
                "tokenizer, so no answer can tell them apart; rename one, or choose a model whose vocabulary has both."
            )


def _unreachable(task: Task, tokenizer: Any, same: Same) -> Iterator[str]:
    """References that score below 100 against themselves, or against the decoded text of their own tokens."""
    references = list(dict.fromkeys(r for e in (*task.train, *task.test) for r in e.references))
    where = "train.json and test.json"
    if wordless := [(r,) for r in references if not same(r)]:
        yield _note(where, wordless, references, "different references have no word and can only score 0")
    if tokenizer is None:
        return
    decoded = tokenizer.batch_decode(encode(references, tokenizer), skip_special_tokens=True)
    pairs = zip(references, map(str.strip, decoded), strict=True)
    if lost := [(r, d) for r, d in pairs if same(r) and r != d and same(r) != same(d)]:
        what = "different references cannot score 100, as the tokenizer writes them differently"
        yield _note(where, lost, references, what)


def _note(file: str, found: Sequence[tuple[str, ...]], all_of: Sized, what: str) -> str:
    return f"{file}: {len(found)} of {len(all_of)} {what} (first: {_shown(found[0])})."


def _shown(texts: tuple[str, ...]) -> str:
    return " and ".join(map(short_repr, texts))
