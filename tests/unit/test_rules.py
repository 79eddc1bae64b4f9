"""What each branch rule promises, on tiny models."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gainlora import rules
from gainlora.errors import GainLoRAError
from gainlora.model.layers import GatedLoRALinear, Integration
from gainlora.model.modeling import GainLoRAModel
from tests.runs import learn, project, records
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return project(tmp_path_factory.mktemp("rules"))


def make_layer(branches):
    """A layer with frozen branches and one that is learned."""
    torch.manual_seed(0)
    layer = GatedLoRALinear(nn.Linear(6, 5, bias=False), 2, 1.5, Integration(False))
    for t in range(branches):
        layer.start_branch(torch.randn(2, 6), torch.randn(5, 2), train_A=True)
        if t < branches - 1:
            layer.freeze_branch()
    return layer


def old_branches(layer):
    return list(zip(layer.A.split(2), layer.B.split(2, dim=1), strict=True))


def branches(stream, t):
    """Name of a layer -> A (T, r, d_in) and B (T, d_out, r) after step t."""
    return load_file(stream.task_folder(t) / "adapter_model.safetensors")


def layer_names(adapter):
    return [name.removesuffix(".lora_A") for name in adapter if name.endswith("lora_A")]


def losses(stream, t, key="loss"):
    return [record[key] for record in records(stream.task_folder(t))]


def test_olora_penalizes_every_overlap_of_input_directions():
    layer = make_layer(3)
    penalty = rules.get("olora").penalty(layer)
    A, B = layer.learning
    expected = sum(abs(float(row @ old)) for row in A.detach() for old_A, _ in old_branches(layer) for old in old_A)
    assert penalty().item() == pytest.approx(expected, rel=1e-5)
    penalty().backward()
    assert A.grad.abs().max() > 0 and B.grad is None
    with torch.no_grad():  # rows outside the old ones cost nothing
        A.copy_(torch.linalg.svd(layer.A).Vh[-2:])
    assert float(penalty()) < 1e-5
    assert rules.get("olora").penalty(make_layer(1)) is None


def test_nlora_penalizes_every_changed_weight():
    layer = make_layer(2)
    A, B = (p.detach() for p in layer.learning)
    assert float(rules.get("nlora").penalty(layer)()) == pytest.approx(1.5 * float((B @ A).abs().sum()), rel=1e-5)


def test_clora_penalizes_changing_what_earlier_branches_changed():
    layer = make_layer(3)
    penalty = rules.get("clora").penalty(layer)
    A, B = (p.detach() for p in layer.learning)
    earlier = sum(1.5 * old_B @ old_A for old_A, old_B in old_branches(layer))
    expected = sum((abs(float(earlier[i, j])) * float((1.5 * B @ A)[i, j])) ** 2 for i in range(5) for j in range(6))
    assert float(penalty()) == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():  # outputs that no earlier branch touched are free
        layer.B[3] = 0
        free = rules.get("clora").penalty(layer)
        B.zero_()
        B[3] = 1
    assert float(free()) == 0
    assert rules.get("clora").penalty(make_layer(1)) is None


@pytest.mark.parametrize(
    "method, weight, measure",
    [
        ("olora", 50.0, lambda A, B: (A[1] @ A[0].T).abs().sum()),
        ("gainlora-olora", 50.0, lambda A, B: (A[1] @ A[0].T).abs().sum()),
        ("nlora", 1.0, lambda A, B: (B[1] @ A[1]).abs().sum()),
        ("clora", 1e4, lambda A, B: ((B[0] @ A[0]).abs() * (B[1] @ A[1])).square().sum()),
    ],
)
def test_penalties_reach_the_training(root, method, weight, measure):
    """Four times smaller than without the penalty, at least."""

    def after(**options):
        stream = learn(root, method=method, train__epochs=4, **options)
        adapter = branches(stream, 2)
        return float(sum(measure(adapter[f"{n}.lora_A"], adapter[f"{n}.lora_B"]) for n in layer_names(adapter)))

    assert after(train__penalty_weight=weight) < 0.25 * after(train__penalty_weight=0.0)
    stream = learn(root, method=method, train__epochs=4, train__penalty_weight=weight)
    assert min(losses(stream, 2, "penalty")) >= 0 and max(losses(stream, 2, "penalty")) > 0


def test_ewc_holds_what_mattered(root):
    def moved(weight):
        stream = learn(root, method="ewc", train__epochs=4, train__penalty_weight=weight)
        fisher = load_file(stream.task_folder(1) / "rule.safetensors")
        one, two = branches(stream, 1), branches(stream, 2)
        return sum(
            float((fisher[f"{n}:fisher_B"] * (two[f"{n}.lora_B"] - one[f"{n}.lora_B"])[0] ** 2).sum())
            for n in layer_names(one)
        )

    assert moved(1e5) < 0.1 * moved(0.0)


def test_ewc_penalty_is_the_quadratic_form():
    layer = make_layer(1)
    rule = rules.get("ewc")
    assert rule.penalty(layer) is None
    A, B = layer.learning
    layer.memory = {"fisher_A": torch.rand_like(A), "fisher_B": torch.rand_like(B)}
    layer.memory |= {"anchor_A": A.detach().clone(), "anchor_B": B.detach().clone()}
    penalty = rule.penalty(layer)
    assert float(penalty()) == 0
    with torch.no_grad():
        A += 2
        B -= 1
    expected = 0.5 * float(4 * layer.memory["fisher_A"].sum() + layer.memory["fisher_B"].sum())
    assert float(penalty()) == pytest.approx(expected, rel=1e-5)


def test_slao_refuses_a_rank_that_no_orthonormal_rows_have(root):
    with pytest.raises(GainLoRAError, match=r"lora\.rank: 33: .* give 32 or less"):
        learn(root, method="slao", lora__rank=33)


def test_slao_merges_into_one_branch_of_constant_size(root):
    started = {}
    start = GainLoRAModel.start_branch

    def spy(model, branch, train_A, gate):
        started[len(model.config.tasks) + 1] = {n: (A.clone(), B.clone()) for n, (A, B) in branch.items()}
        start(model, branch, train_A, gate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GainLoRAModel, "start_branch", spy)
        stream = learn(root, method="slao", seed=12)
    adapters = [branches(stream, t) for t in (1, 2, 3)]
    kept = [load_file(stream.task_folder(t) / "rule.safetensors") for t in (1, 2, 3)]
    sizes = [sum(v.numel() for v in [*a.values(), *k.values()]) for a, k in zip(adapters, kept, strict=True)]
    assert sizes[0] == sizes[1] == sizes[2]
    for n in layer_names(adapters[0]):
        merged = [a[f"{n}.lora_B"][0] for a in adapters]
        tuned = [k[f"{n}:tuned_B"] for k in kept]
        A = [a[f"{n}.lora_A"][0] for a in adapters]
        torch.testing.assert_close(merged[0], tuned[0])
        for t in (2, 3):
            torch.testing.assert_close(merged[t - 1], merged[t - 2] + (tuned[t - 1] - merged[t - 2]) / t**0.5)
            first_A, first_B = started[t][n]
            torch.testing.assert_close(first_A @ first_A.T, torch.eye(2), atol=1e-5, rtol=0)
            torch.testing.assert_close(A[t - 2] - A[t - 2] @ first_A.T @ first_A, 0 * A[t - 2], atol=1e-5, rtol=0)
            assert ((A[t - 2] @ first_A.T).diagonal() > 0).all()  # the same way: B goes on from where it was
            torch.testing.assert_close(first_B, tuned[t - 2])


def test_single_is_never_disturbed_and_needs_the_task(root):
    stream = learn(root, method="single", train__epochs=6, train__learning_rate=0.05)
    R = stream.result()["R"]
    for i in range(3):
        assert R[i][i] == R[2][i]
    assert stream.result()["FT"] == 0
    adapter = branches(stream, 3)
    for t in range(3):  # each was trained, on its own task
        assert max(float(adapter[f"{n}.lora_B"][t].abs().max()) for n in layer_names(adapter)) > 0.01
        assert sum(losses(stream, t + 1)[-3:]) < sum(losses(stream, t + 1)[:3])
    inputs = torch.tensor([[7, 8, 9]]), torch.ones(1, 3, dtype=torch.long)
    model = GainLoRAModel.from_pretrained(stream.task_folder(3), tiny_llama())
    alone = GainLoRAModel.from_pretrained(stream.task_folder(1), tiny_llama())
    with torch.no_grad():
        for m in (model, alone):
            with pytest.raises(GainLoRAError, match=r"model\.task: None: name one of"):
                m(*inputs)
            m.task = 0
        torch.testing.assert_close(model(*inputs).logits, alone(*inputs).logits)
        model.task = 1
        assert (model(*inputs).logits - alone(*inputs).logits).abs().max() > 1e-3


def test_multitask_learns_all_tasks_in_one_step(root):
    stream = learn(root, method="multitask")
    assert stream.steps == ["all_tasks"] and len(stream.tasks) == 3
    result = stream.result()
    assert result["R"][0] == result["R"][1] == [None] * 3 and None not in result["R"][2]
    assert result["AP"] == pytest.approx(sum(result["R"][2]) / 3, abs=1e-3)
    assert result["FT"] is None and result["BWT"] is None
    assert sum(losses(stream, 1, "examples")) == 3 * 24
