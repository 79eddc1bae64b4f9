"""What is measured beside R: a task before it is learned, general ability on plain text, gates as routers."""

import math

import pytest
import torch
import torch.nn.functional as F

from gainlora import ContinualLearner, Task
from gainlora.runs.records import read_step, train_records
from gainlora.training.general import general_ability, sentences
from tests.runs import create, learn, learner, project, rows, state
from tests.tiny import tiny_llama, tiny_t5, tiny_tokenizer


def task(name, first):
    return Task(name, rows(first), rows(first), "Sort")


@torch.no_grad()
def losses_one_by_one(base, tokenizer):
    """Mean loss of each sentence's second half, each alone and unpadded, by transformers."""
    total, count = 0.0, 0
    for words in map(str.split, sentences()):
        half = len(words) // 2
        prompt = tokenizer(" ".join(words[:half]), add_special_tokens=True)["input_ids"]
        if base.config.is_encoder_decoder:
            target = tokenizer(" ".join(words[half:]), add_special_tokens=False)["input_ids"]
            prompt += [] if prompt[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
            logits = base(input_ids=torch.tensor([prompt]), labels=torch.tensor([target])).logits[0]
        else:
            target = tokenizer(" " + " ".join(words[half:]), add_special_tokens=False)["input_ids"]
            logits = base(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        total += float(F.cross_entropy(logits.float(), torch.tensor(target), reduction="sum"))
        count += len(target)
    return total / count


@pytest.mark.parametrize("made", [tiny_llama, tiny_t5])
def test_general_ability_is_the_loss_of_plain_text_under_model_and_base(made):
    alone = losses_one_by_one(made().eval(), tiny_tokenizer())
    mine = learner((made(), tiny_tokenizer()))
    new = general_ability(mine.model, mine.tokenizer)
    assert new["loss"] == new["base_loss"] == pytest.approx(alone, rel=1e-5) and new["kl"] == pytest.approx(0, abs=1e-9)
    mine.learn(task("one", 0))
    learned = mine.history[0]["scores"]["general"]
    assert learned["base_loss"] == pytest.approx(alone, rel=1e-5) and learned["kl"] > 1e-4
    assert abs(learned["loss"] - learned["base_loss"]) > 1e-4 and len(learned["text"]) == 64


def test_a_task_is_also_answered_before_it_is_learned():
    mine, second = learner(), task("two", 30)
    mine.learn(task("one", 0))
    before = mine.evaluate([second])["two"]
    with mine.model.branches_off():
        base = mine.evaluate([second])["two"]
    mine.learn(second)
    row = mine.history[1]["scores"]
    assert (row["before"], row["base"]) == ({"two": before}, {"two": base}) and row["FWT"] == before - base
    assert "before" not in mine.history[0]["scores"] or not mine.history[0]["scores"]["before"]
    assert (
        set(row["routing"]) == {"one", "two"} and row["LA"] == (mine.accuracy_matrix[0][0] + row["scores"]["two"]) / 2
    )


def test_a_method_that_needs_the_task_has_no_forward_transfer():
    mine = learner(method="single")
    mine.learn(task("one", 0))
    mine.learn(task("two", 30))
    row = mine.history[1]["scores"]
    assert not row["before"] and row["FWT"] is None and row["general"] == {}


def test_replay_trains_on_a_share_of_every_earlier_task_and_survives_a_restart(tmp_path):
    whole = learn(project(tmp_path / "whole"), data__replay=0.26)
    root = project(tmp_path / "parts")
    for t in (1, 2):
        with create(root, data__replay=0.26) as run:
            run.seal(t)
    assert state(learn(root, data__replay=0.26)) == state(whole)
    plain = learn(project(tmp_path / "plain"))
    assert plain.ids[0] != whole.ids[0] and state(plain)[0] == state(whole)[0] and state(plain)[1] != state(whole)[1]
    rows = [read_step(whole.task_folder(t)).files["scores"] for t in (1, 2, 3)]
    assert [row.get("replayed") for row in rows] == [None, 7, 14]  # of 24 examples each, rounded up
    count = [len(train_records(whole.task_folder(t))) for t in (1, 3)]
    assert count == [3, math.ceil((24 + 14) / 8)]


def test_replay_in_memory_goes_on_after_loading(tmp_path):
    mine = learner(replay=0.2)
    mine.learn(task("one", 0))
    mine.save(tmp_path / "adapter")
    loaded = ContinualLearner.load(tmp_path / "adapter", (tiny_llama(), tiny_tokenizer()), callbacks=[])
    assert mine.learn(task("two", 30)) == loaded.learn(task("two", 30))
    assert loaded.history[1]["scores"]["replayed"] == 4
