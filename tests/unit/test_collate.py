"""Token ids and batches: what is cut, what is padded, what carries loss, what is kept on disk."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gainlora.data.collate import buckets, collate, encode_prompts, epoch_batches, pick_references, tokenize
from gainlora.data.instances import Example
from gainlora.data.prompts import build_prompt, parse_prompt
from gainlora.data.tasks import Task
from gainlora.errors import GainLoRAError
from gainlora.sections import DataConfig
from tests.tiny import tiny_tokenizer

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "Say", "Output", ":", "yes", "no", "maybe", "<", ">", "/", "s", "a"]


def tokenizer(bos=False, eos=False):
    """A word tokenizer that frames a text as asked."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS + [f"w{i}" for i in range(50)])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def task(*examples, name="t"):
    made = tuple(Example(text, (answer, "other")) for text, answer in examples)
    return Task(name, made, made, "Say")


def words(ids):
    return [WORDS[i] if i < len(WORDS) else f"w{i - len(WORDS)}" for i in ids]


LONG = " ".join(f"w{i}" for i in range(40))


@pytest.mark.parametrize("kind", [False, True])
@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (True, True), (False, True)])
def test_prompts_begin_as_the_tokenizer_begins_and_end_in_one_eos_for_encoders_alone(tmp_path, kind, bos, eos):
    data = DataConfig(max_prompt_tokens=10, truncate="start")
    rows = tokenize(task(("w0", "yes"), (LONG, "no")), "train", tokenizer(bos, eos), data, kind, tmp_path)
    short, long = rows
    start, end = ["<s>"] if bos else [], ["</s>"] if kind else []
    assert words(short["prompt_ids"]) == [*start, "Say", "w0", "Output", ":", *end]
    kept = 10 - len(start) - len(end) - 2
    assert words(long["prompt_ids"]) == [*start, *(f"w{n}" for n in range(40 - kept, 40)), "Output", ":", *end]
    assert (short["truncated"], long["truncated"]) == (False, True)
    assert words(short["target_ids"]) == ["yes", "</s>"] and short["references"] == ["yes", "other"]


SIDES = [  # option, definition, input: what is left of them in 10 tokens, what was lost
    ("start", "d", LONG, [*(f"w{n}" for n in range(32, 40)), "Output", ":"], "start"),
    ("end", "d", LONG, ["Say", *(f"w{n}" for n in range(9))], "end"),
    ("input", "d", LONG, ["Say", *(f"w{n}" for n in range(7)), "Output", ":"], "input"),
    ("input", LONG, "no", [*(f"w{n}" for n in range(8)), "Output", ":"], "definition"),
    ("input", "", LONG, [*(f"w{n}" for n in range(8)), "Output", ":"], "input"),
    ("input", "d", " ".join(f"w{n}" for n in range(7)), ["Say", *(f"w{n}" for n in range(7)), "Output", ":"], ""),
]


@pytest.mark.parametrize("kind", [False, True])
@pytest.mark.parametrize(("side", "definition", "text", "expected", "lost"), SIDES)
def test_what_a_long_prompt_loses(tmp_path, kind, side, definition, text, expected, lost):
    """Special tokens stay and count: 2 more than the 10 of `expected`, or 1."""
    given = replace(task((text, "yes"), ("w0", "no")), instruction="Say" if definition == "d" else definition)
    data = DataConfig(max_prompt_tokens=12 if kind else 11, truncate=side)
    long, short = tokenize(given, "train", tokenizer(True, True), data, kind, tmp_path)
    assert words(long["prompt_ids"]) == ["<s>", *expected, *(["</s>"] if kind else [])]
    assert (long["prompt_lost"], long["truncated"]) == (lost, bool(lost))
    assert short["prompt_lost"] == ("definition" if definition == LONG and side == "input" else short["prompt_lost"])


TEXT = "Ein Überblick: größer, 日本語のテキスト, 👨‍👩‍👧 {braces} </s> "
DEFINITION = "Name the topic of the text: sport, science or business. " * 2


def trained(kind):
    """A tokenizer whose tokens are no words."""
    special = {"special_tokens": ["<unk>", "</s>"], "show_progress": False}
    if kind == "bytes":
        backend, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **special)
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", **special)
    backend.train_from_iterator([TEXT, DEFINITION, "Now complete the following example -\nInput:\nOutput: "], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("definition", ["", DEFINITION.strip()])
@pytest.mark.parametrize("template", ["superni", "long_sequence"])
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_shortened_prompts_keep_their_beginning_and_end(kind, template, definition):
    """At any limit; a prompt that fits has the ids of its whole text. Served prompts have the parts of learned ones."""
    given = trained(kind)
    prompts = [build_prompt(template, definition, text) for text in (TEXT.strip(), TEXT * 3 + "end")]
    assert [parse_prompt(template, p.text, ["", "Na", DEFINITION.strip()]) for p in prompts] == prompts
    whole = [given(p.text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for p in prompts]
    for limit in range(8, max(map(len, whole)) + 2, 7):
        data = DataConfig(max_prompt_tokens=limit)
        ids, lost = encode_prompts(prompts, given, data, False)
        for prompt, full, found, what in zip(prompts, whole, ids, lost, strict=True):
            assert len(found) <= limit and (found == full) == (not what) == (len(full) <= limit)
            assert found[-3:] == full[-3:]
            if what and kind == "bytes" and limit > 100:  # decoding is exact
                kept = given.decode(found).removesuffix(prompt.cue)
                if what == "input":
                    assert prompt.text.startswith(kept) and limit - len(found) < 12
                else:
                    assert kept.startswith(f"{prompt.head}{definition[:4]}") and "Überblick" not in kept


def test_a_prompt_without_the_templates_end_loses_its_start():
    ids, lost = encode_prompts(
        [parse_prompt("superni", LONG)], tokenizer(), DataConfig(max_prompt_tokens=8), encoder_decoder=False
    )
    assert (words(ids[0]), lost) == ([f"w{n}" for n in range(32, 40)], ["start"])


def test_special_tokens_alone_may_not_fill_the_limit():
    many = tokenizer()
    many.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(["<s>"] * 8 + ["$A"]), special_tokens=[("<s>", 1)]
    )
    with pytest.raises(GainLoRAError, match=r"max_prompt_tokens: 8 leaves no room beside 8"):
        encode_prompts([build_prompt("superni", "", "a")], many, DataConfig(max_prompt_tokens=8), False)


def test_sampled_references(tmp_path):
    """One drawn for each example by its content: for training and scoring, whatever the others are."""
    examples = [Example(f"w{n}", ("yes", "no", "maybe")) for n in range(40)]
    made = Task("t", tuple(examples), tuple(examples[::-1]), "Say")
    train = tokenize(made, "train", tokenizer(), DataConfig(references="sampled"), False, tmp_path)
    test = tokenize(made, "test", tokenizer(), DataConfig(references="sampled"), False, tmp_path)
    drawn = [references[0] for references in train["references"]]
    assert {len(references) for references in train["references"]} == {1} and set(drawn) == {"yes", "no", "maybe"}
    assert [words(ids)[0] for ids in train["target_ids"]] == drawn == [r[0] for r in test["references"]][::-1]
    assert drawn[:2] == [pick_references(e, "sampled", "t")[0] for e in examples[:2]]
    for which, count in (("all", 3), ("first", 1)):
        rows = tokenize(made, "train", tokenizer(), DataConfig(references=which), False, tmp_path)
        assert {len(r) for r in rows["references"]} == {count} and {words(t)[0] for t in rows["target_ids"]} == {"yes"}


def test_targets_keep_eos_within_the_limit(tmp_path):
    data = DataConfig(max_target_tokens=5)
    given = task(("a", "w1 w2 w3 w4"), ("a", LONG))
    train = tokenize(given, "train", tokenizer(), data, False, tmp_path)
    assert [words(t) for t in train["target_ids"]] == [
        ["w1", "w2", "w3", "w4", "</s>"],
        ["w0", "w1", "w2", "w3", "</s>"],
    ]
    assert train["truncated"][:] == [False, True]
    assert tokenize(given, "test", tokenizer(), data, False, tmp_path)["truncated"][:] == [False, False]


def test_special_tokens_inside_a_text_are_text(tmp_path):
    rows = tokenize(task(("a </s> a", "yes </s>")), "train", tokenizer(), DataConfig(), False, tmp_path)
    assert "</s>" not in words(rows[0]["prompt_ids"])
    assert words(rows[0]["target_ids"]).count("</s>") == 1


def test_an_unwritable_cache_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GainLoRAError, match="cannot be written"):
        tokenize(task(("a", "yes")), "train", tokenizer(), DataConfig(), False, tmp_path / "file")


def test_the_cache_knows_what_it_depends_on(tmp_path):
    def run(examples, split="train", given=None, kind=False, **options):
        tokenize(examples, split, given or tokenizer(), DataConfig(**options), kind, tmp_path)

    base, used = task(("a", "yes")), tokenizer()
    run(base, given=used)
    used(["a", "a a"], padding=True, truncation=True, max_length=7)  # leaves traces in the tokenizer's state
    run(base, given=used)
    run(base)
    assert len(list(tmp_path.iterdir())) == 1
    bigger = tokenizer()
    bigger.add_tokens(["w99"])
    run(task(("a", "no")))
    run(task(("a a", "yes")))
    run(base, split="test")
    run(base, given=bigger)
    run(base, given=tokenizer(bos=True))
    run(base, kind=True)
    run(base, max_prompt_tokens=9)
    run(base, max_target_tokens=9)
    run(base, truncate="start")
    run(base, references="first")
    assert len(list(tmp_path.iterdir())) == 11


def test_a_damaged_cache_is_made_again(tmp_path):
    given = (task(("a", "yes")), "train", tokenizer(), DataConfig(), False, tmp_path)
    rows = tokenize(*given)[:]
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", b"no table", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        assert tokenize(*given)[:] == rows
        assert file.stat().st_size == len(whole)


ROWS = [{"prompt_ids": [5, 6, 7], "target_ids": [8, 2]}, {"prompt_ids": [5], "target_ids": [9, 9, 9, 2]}]


def test_decoder_only_training_batch_is_padded_left_with_loss_on_targets_only():
    batch = collate([*ROWS, {"prompt_ids": [5], "target_ids": [2]}], 0, False, True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2], [5, 9, 9, 9, 2], [0, 0, 0, 5, 2]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 5, [0, 0, 0, 1, 1]]
    assert batch["labels"].tolist() == [[-100] * 3 + [8, 2], [-100, 9, 9, 9, 2], [-100] * 4 + [2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    assert all(t.dtype == torch.int64 for t in batch.values())


def test_pad_and_eos_may_be_the_same_token():
    batch = collate([*ROWS[:1], {"prompt_ids": [5], "target_ids": [2]}], 2, False, True)
    assert batch["labels"][:, -1].tolist() == [2, 2]
    assert (batch["labels"] != -100).sum() == 3


def test_decoder_only_prompts_are_padded_left():
    batch = collate(ROWS, 0, False, False)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_encoder_decoder_batches_are_padded_right():
    batch = collate(ROWS, 0, True, True)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[8, 2, -100, -100], [9, 9, 9, 2]]
    assert set(collate(ROWS, 0, True, False)) == {"input_ids", "attention_mask"}


def test_buckets_hold_every_index_once_longest_first():
    lengths = [3, 9, 1, 7, 7]
    made = buckets(lengths, 2)
    assert made == [[1, 3], [4, 0], [2]]
    assert buckets([], 2) == []


def test_epoch_batches_are_a_permutation_of_seed_task_and_epoch():
    made = epoch_batches(23, 5, seed=1, task=2, epoch=0)
    assert [len(b) for b in made] == [5, 5, 5, 5, 3]
    assert sorted(i for b in made for i in b) == list(range(23))
    assert made == epoch_batches(23, 5, 1, 2, 0)
    others = [epoch_batches(23, 5, *key) for key in ((0, 2, 0), (1, 3, 0), (1, 2, 1))]
    assert made not in others


def test_a_chat_template_surrounds_the_text_and_is_never_cut(tmp_path):
    tokenizer = tiny_tokenizer()
    with pytest.raises(GainLoRAError, match=r"data\.template: .*has no chat template"):
        tokenize(task(("w1", "red")), "train", tokenizer, DataConfig(template="chat"), False, None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<end>", "<model>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}"
    )
    given = Task("t", [{"input": "w1 <end> w2 w3", "output": "red"}], [{"input": "w4", "output": "red"}], "Sort")
    for limit, kept in ((50, ["Sort", "w1", *["<unk>"] * 3, "w2", "w3"]), (6, ["Sort", "w1", "<unk>"])):
        data = DataConfig(template="chat", max_prompt_tokens=max(limit, 8))
        data = data.model_copy(update={"max_prompt_tokens": limit})
        rows = tokenize(given, "train", tokenizer, data, False, tmp_path / "cache")
        tokens = tokenizer.convert_ids_to_tokens(rows["prompt_ids"][0])
        assert tokens == ["<user>", *kept, "<end>", "<model>"]  # an <end> in the text is text
        assert rows["truncated"][:] == [limit == 6]
    plain = tokenize(given, "train", tokenizer, DataConfig(), False, tmp_path / "cache")
    assert tokenizer.convert_ids_to_tokens(plain["prompt_ids"][0])[-2:] == ["Output", ":"]
