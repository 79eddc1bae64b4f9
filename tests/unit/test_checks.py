"""What a task's data mean for its scores: comparison, labels, leaks, and what a tokenizer cannot write."""

import json
import unicodedata
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gainlora.config import load_config
from gainlora.data.checks import inspect, majority_score
from gainlora.data.instances import Example
from gainlora.data.tasks import Task, take_task
from gainlora.errors import GainLoRAError
from gainlora.runs.run import Run
from gainlora.training.metrics import score
from tests.tiny import tiny_llama, tiny_params


def task(train, test, metric="exact_match"):
    """Pairs of input and answer, or answers alone."""

    def examples(split, pairs):
        pairs = [p if isinstance(p, tuple) else (f"{split} input number {i}", p) for i, p in enumerate(pairs)]
        return tuple(Example(text, tuple([out] if isinstance(out, str) else out)) for text, out in pairs)

    return Task("t", examples("train", train), examples("test", test), metric=metric)


def t5_like():
    """As T5's: compatibility characters are replaced, characters outside the vocabulary are all one token."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(ord("a"), ord("z") + 1)), *"é!1-", *"GB"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\u200b", "")])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def qwen_like():
    """As Qwen's: bytes, of text in NFC."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<eos>"])}, []))
    backend.normalizer, backend.decoder = normalizers.NFC(), decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


@pytest.mark.parametrize(
    "labels",
    [["1", "-1"], ["C++", "C"], ["+", "-"], ["yes", "?"], ["a.b", "ab"], ["cafe\u0301!", "café"], ["x", "$"]],
)
def test_labels_that_punctuation_tells_apart_are_compared_with_it(labels):
    mine = task(labels * 3, labels)
    found = inspect(mine)
    assert found.keep_punctuation and len(found.notes) == 1
    assert any(repr(label) in found.notes[0] for label in labels)
    scores = [[score("exact_match", a, [b], found.keep_punctuation) for b in labels] for a in labels]
    assert scores == [[100, 0], [0, 100]]
    assert score("exact_match", f" {labels[0].upper()}\n", [labels[0]], found.keep_punctuation) == 100
    published = inspect(mine, benchmark_protocol=True)
    assert not published.keep_punctuation and "benchmark" in published.notes[0]


@pytest.mark.parametrize(
    "train", [["yes", "no"], ["Yes.", "Yes."], ["cafe\u0301", "café"], ["a  b", "a b"], ["yes", ["no", "no."]]]
)
def test_other_labels_are_compared_as_the_benchmark_does(train):
    assert not inspect(task(train, ["-", "+"])).keep_punctuation  # whatever the test labels are
    assert not inspect(task(["1", "-1"], ["1"], "rouge_l")).keep_punctuation


NOTES = {
    "punctuation in test": (["yes", "no"], ["yes", "-", "-"], "2 of 3 answers are punctuation alone", "'-'"),
    "unseen label": (["yes", "no"], ["No!", "maybe", "yes"], "1 of 3 instances have a label that train", "'maybe'"),
    "case": (["US", "us"], ["us"], "1 of 2 labels equal another but for case", "'US' and 'us'"),
    "leak": ([("A b", "x")], [("a  B", "x"), ("c", "x")], "1 of 2 inputs are also in train.json", "'a  B'"),
    "no blanks": ([("我 喜欢", "x")], [("我喜\u200b欢", "x")], "1 of 1 inputs are also", "(first"),
    "contradiction": ([("a", "x"), ("a", "y"), ("b", "x")], [("c", "x")], "train.json: 1 of 2 different inputs", "'a'"),
    "in test": (["x", "y"], [("a", "x"), ("a", "y")], "test.json: 1 of 1 different inputs", "contradictory"),
}


@pytest.mark.parametrize("case", NOTES)
def test_data_that_make_scores_doubtful_are_counted(case):
    train, test, *parts = NOTES[case]
    notes = inspect(task(train, test)).notes
    assert any(all(part in note for part in parts) for note in notes), notes


def test_the_majority_is_that_of_the_answers_that_are_learned():
    mine = task([["a", "b"], ["a", "b"], "b"], ["a", "b", ["c", "A."], "b"])
    for keep, expected in ((False, 50), (True, 25)):
        assert majority_score(replace(mine, keep_punctuation=keep)) == expected
    assert majority_score(task(["a"], ["a"], "rouge_l")) is None


def test_good_data_have_no_notes():
    more = [("a", ["x", "y"]), ("a", ["y"]), ("b", "x")]  # an answer in common
    for tokenizer in (None, t5_like(), qwen_like()):
        assert inspect(task(more, [("c", "x")]), tokenizer).notes == ()


@pytest.mark.parametrize("labels", [["正面", "负面"], ["да", "нет"], ["yes", "yes\u200b"], ["½", "1\u20442"]])
def test_labels_that_are_the_same_tokens_are_refused(labels):
    with pytest.raises(GainLoRAError, match=r"t/train\.json: labels .* are the same tokens") as caught:
        inspect(task(labels, ["yes"]), t5_like())
    assert all(repr(label) in str(caught.value) for label in labels)
    inspect(task(labels, labels), qwen_like())
    inspect(task(labels, labels, "rouge_l"), t5_like())
    inspect(task(["yes", "no"], labels), t5_like())  # test labels refuse nothing


@pytest.mark.parametrize(
    "metric, answers, first",
    [
        ("exact_match", ["{a}", "{a", "b"], ["2 of 3 different references", "'{a}' and 'a'"]),  # told apart by braces
        ("exact_match", ["yes", "ja\u0308"], ["1 of 2 different references", "'ja\u0308' and 'j'"]),
        ("exact_match", ["½", "b"], ["1 of 2 different references", "'½'"]),
        ("rouge_l", ["so é", "то же"], ["1 of 2 different references", "'то же'"]),
        ("rouge_l", ["a", "**"], ["1 of 2 different references have no word", "'**'"]),
    ],
)
def test_references_that_the_model_cannot_write_are_counted(metric, answers, first):
    examples = [(f"i {n}", answer) for n, answer in enumerate(answers)]
    notes = inspect(task(examples, [("c", answers[-1])], metric), t5_like()).notes
    assert any(all(part in note for part in first) for note in notes), notes
    assert inspect(task(["{a}", "b"], ["b"], "rouge_l"), t5_like()).notes == ()  # ROUGE ignores braces anyway


def test_what_a_tokenizer_normalizes_to_nfc_is_right():
    label, tokenizer = unicodedata.normalize("NFD", "café"), qwen_like()
    written = tokenizer.decode(tokenizer(label)["input_ids"])
    assert written != label and score("exact_match", written, [label]) == score("rouge_l", written, [label]) == 100
    assert inspect(task([label, "tea"], [label]), tokenizer).notes == ()


def test_a_run_compares_by_its_training_labels_and_keeps_its_notes(tmp_path):
    labels = ["1", "-1"]
    tiny_llama(tmp_path / "base", ["-"])
    tiny_params(tmp_path, tmp_path / "base", count=2)
    for split, answers in (("train", labels * 8), ("test", labels * 2)):
        rows = [{"input": f"w{n} w{n + 1} {split}", "output": answer} for n, answer in enumerate(answers)]
        (tmp_path / "data/tiny/task1" / f"{split}.json").write_text(json.dumps({"Instances": rows}))
    config = load_config("tiny", {"data.train_limit": 1}, tmp_path / "params.yaml")
    with Run.create(config, tmp_path) as run:
        run.seal(1)
    recorded = json.loads((run.folder / "data.json").read_text())
    assert [recorded[name]["keep_punctuation"] for name in ("task1", "task2")] == [True, False]
    assert recorded["task1"]["train"] == 1  # the limit; the labels are those of the whole file
    assert run.notices == [f"task1: {note}" for note in recorded["task1"]["notes"]] != []
    lines = (run.task_folder(1) / "predictions/task1.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert line["score"] == score("exact_match", line["prediction"], line["references"], keep_punctuation=True)
    with Run.create(config, tmp_path) as again:
        assert again.notices == []  # said once


def test_inputs_that_differ_in_case_blanks_or_punctuation_are_held_out_together(tmp_path):
    kinds = ["The cat {}.", "the  CAT {}", "the cat, {}!", "thecat {}", "“The cat” {}\n"]
    rows = [{"input": kind.format(f"no{chr(97 + n)}"), "output": "x"} for n in range(20) for kind in kinds]
    (tmp_path / "mine.json").write_text(json.dumps({"Instances": rows}))
    made = take_task(tmp_path / "mine.json", tmp_path / "run" / "mine", "long_sequence", "exact_match")
    sides = [{"".join(filter(str.isalnum, e.input.lower())) for e in split} for split in (made.train, made.test)]
    assert [len(side) for side in sides] == [16, 4] and not sides[0] & sides[1]
    assert inspect(made).notes == ("20 of 100 rows, one in 5 different inputs, are held out to test.",)
    (tmp_path / "few.json").write_text(json.dumps({"Instances": rows[:20]}))
    with pytest.raises(GainLoRAError, match="has 4 different inputs"):
        take_task(tmp_path / "few.json", tmp_path / "run" / "few", "long_sequence", "exact_match")
