"""The router of `routed-X`: joint ridge regression from sums, on features that no branch touches."""

import pytest
import torch

from gainlora import ContinualLearner, GainLoRAError, Task
from gainlora.data.collate import collate
from gainlora.model.router import RIDGE, Router
from tests.runs import create, learn, learner, project, state
from tests.tiny import tiny_llama, tiny_t5, tiny_tokenizer


def task(name, word):
    rows = [{"text": f"{word} " * 4 + f"w{n % 7}", "label": ("red", "green")[n % 7 % 2]} for n in range(20)]
    return Task(name, rows, rows)


def test_sums_solve_what_all_prompts_together_solve():
    torch.manual_seed(0)
    hidden = [torch.randn(n, 12) + 2 * torch.randn(12) for n in (30, 50, 17)]
    router = Router(12, torch.device("cpu"))
    for h in hidden:
        parts = [router.sums(part) for part in h.split(11)]
        router.add(sum(gram for gram, _ in parts), sum(target for _, target in parts))
    F = router.features(torch.cat(hidden))
    Y = torch.zeros(len(F), 3).double()
    Y[torch.arange(len(F)), torch.tensor([0] * 30 + [1] * 50 + [2] * 17)] = 1
    ridge = RIDGE * (F.T @ F).diagonal().mean() * torch.eye(F.shape[1]).double()
    joint = torch.linalg.solve(F.T @ F + ridge, F.T @ Y)
    assert (F @ router.weights - F @ joint).abs().max() < 1e-8
    assert router.coefficients(torch.cat(hidden)).argmax(1).tolist() == Y.argmax(1).tolist()


@pytest.mark.parametrize("made", [tiny_llama, tiny_t5])
def test_each_prompt_gets_the_branch_of_its_own_task(made, tmp_path):
    mine = learner((made(), tiny_tokenizer()), method="routed-inclora")
    for name, word in (("one", "w10"), ("two", "w20"), ("three", "w30")):
        mine.learn(task(name, word))
    row = mine.history[-1]["scores"]
    assert row["routing"] == {name: {"top1": 1.0, "auc": 1.0} for name in ("one", "two", "three")}
    assert row["FT"] == 0  # a branch is alone on its prompts, so nothing can change
    mine.save(tmp_path / "adapter")
    loaded = ContinualLearner.load(tmp_path / "adapter", (made(), tiny_tokenizer()), callbacks=[])
    texts = ["w10 w10 w10 w10 w3", "w30 w30 w30 w30 w2"]
    assert loaded.generate(texts) == mine.generate(texts) and loaded.evaluate() == mine.evaluate()
    with pytest.raises(GainLoRAError, match="merge: its router selects a branch"):
        mine.model.merge_and_unload()


def test_features_are_those_of_the_base_and_of_the_prompt_alone():
    mine = learner(method="routed-inclora")

    def features(ids, **answers):
        answers = answers.get("targets", [[] for _ in ids])
        rows = [{"prompt_ids": p, "target_ids": t} for p, t in zip(ids, answers, strict=True)]
        batch = collate(rows, mine.tokenizer.pad_token_id, False, targets=True)
        return mine.model.prompt_features(
            batch["input_ids"], mine.model.prompt_mask(batch["attention_mask"], batch["labels"])
        )

    prompts = [[7, 8, 9, 10], [12], [20, 21, 22, 23, 24, 25, 26]]
    before = features(prompts)
    for alone, batched in zip(prompts, before, strict=True):
        torch.testing.assert_close(features([alone])[0], batched, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features(prompts, targets=[[30], [31, 32], [33]]), before, rtol=1e-4, atol=1e-5)
    mine.learn(task("one", "w10"))
    torch.testing.assert_close(features(prompts), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_run_resumes_to_the_same_router(tmp_path, kind):
    whole = learn(project(tmp_path / "whole", kind), method="routed-inflora")
    root = project(tmp_path / "parts", kind)
    with create(root, method="routed-inflora") as run:
        run.update(1)
    assert state(learn(root, method="routed-inflora")) == state(whole)
    assert all((whole.task_folder(t) / "router.safetensors").is_file() for t in (1, 2, 3))
