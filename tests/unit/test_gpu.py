"""On a GPU that does not exist (tests/fake_gpu.py): the same bits as on the CPU, and how often the CPU waits for it."""

import shutil

import pytest
import torch
from datasets import Dataset

from gainlora import distributed
from gainlora.errors import GainLoRAError
from gainlora.export.saved import open_saved
from gainlora.inference import Predictor
from gainlora.model import branches, gate, subspace
from gainlora.model.adapter_config import GainLoRAConfig
from gainlora.model.base import device_name, pick_dtype
from gainlora.model.modeling import GainLoRAModel
from gainlora.training import train
from tests.fake_gpu import FakeGPU
from tests.runs import learn, project, records, state
from tests.tiny import tiny_llama

METHODS = [("llama", {}), ("t5", {}), ("llama", {"method": "olora"}), ("t5", {"method": "ewc"})]


def learn_anew(root, **options):
    shutil.rmtree(root / "runs", ignore_errors=True)
    return learn(root, **options)


def on_gpu(root, **options):
    """The run, and how often the CPU waited; transformers itself looks for padding once a forward pass."""
    with FakeGPU() as gpu:
        run = learn_anew(root, **options)
    return run, sum(count for line, count in gpu.waits.items() if "transformers" not in line)


@pytest.mark.parametrize("kind, options", METHODS, ids=str)
def test_a_gpu_learns_the_bits_of_the_cpu_and_is_waited_for_once_a_step(tmp_path, kind, options):
    root = project(tmp_path, kind, count=2, data__train_limit=16, data__test_limit=2)
    expected = state(learn(root, **options))
    run, waits = on_gpu(root, **options)
    assert state(run) == expected
    steps = 2 * 2  # 16 examples in batches of 8, two tasks
    assert on_gpu(root, train__micro_batch_size=2, train__epochs=2, **options)[1] == waits + steps


def test_bfloat16_on_a_gpu_learns_what_it_learns_on_the_cpu(tmp_path):
    """There A is a sum of two bfloat16 parts; what comes out differs by rounding."""
    root = project(tmp_path, "llama", count=2)
    options = {"model__dtype": "bfloat16", "train__gradient_checkpointing": True}
    expected = losses(learn(root, **options))
    with FakeGPU():
        found = losses(learn_anew(root, **options))
    assert found == pytest.approx(expected, rel=0.02) and found != expected


def test_tf32_is_for_the_base_alone(tmp_path, monkeypatch):
    """Products of branches, gates and bases stay float32; the process's own setting is put back."""
    setting, seen = torch.backends.cuda.matmul, {}

    def spy(owner, name, part):
        real = getattr(owner, name)

        def called(*args, **kwargs):
            seen.setdefault(part, set()).add(setting.fp32_precision)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    spy(torch.nn.Linear, "forward", "base")
    spy(branches, "_product", "gradients of branches")
    spy(branches.Weights, "project", "branches")
    spy(gate, "project_out", "gates")
    spy(gate.GateWeights, "coefficients", "frozen gates")
    spy(subspace, "principal_directions", "bases")
    before = setting.fp32_precision
    with FakeGPU():
        learn(project(tmp_path, "llama", count=2), model__tf32=True, model__dtype="float32")
    assert "tf32" in seen.pop("base") and setting.fp32_precision == before
    assert len(seen) == 5 and "tf32" not in set.union(*seen.values())


def losses(run):
    return [record["loss"] for t in (1, 2) for record in records(run.task_folder(t))]


def test_out_of_memory_halves_the_micro_batch_and_goes_on(tmp_path, caplog):
    """The longest examples are tried first; the result is that of the smaller micro-batch."""
    root = project(tmp_path, "llama", count=2)
    with FakeGPU(memory=20_000):
        run = learn_anew(root, train__checkpoint_every=1)
    assert {r["micro_batch_size"] for t in (1, 2) for r in records(run.task_folder(t))} == {4}
    assert caplog.text.count("out of memory") == 2  # once a task
    found = state(run)
    with FakeGPU():
        assert state(learn_anew(root, train__micro_batch_size=4)) == found


def test_a_gpu_too_small_for_one_example_ends_with_the_remedy(tmp_path, monkeypatch):
    def target_loss(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train, "target_loss", target_loss)
    with FakeGPU(), pytest.raises(GainLoRAError, match=r"micro_batch_size: 1: .*; set train\.gradient_checkpointing"):
        learn(project(tmp_path, "llama", count=1))


@pytest.mark.parametrize("mine, peer", [([False, True], [True, True]), ([True, True], [False, True])])
def test_several_processes_halve_their_micro_batches_together(monkeypatch, mine, peer):
    """Whichever of two GPUs has too little memory; before the first step, while no message is under way."""
    model = GainLoRAModel(tiny_llama(), GainLoRAConfig("tiny", rank=2, alpha=4))
    rows = Dataset.from_list([{"prompt_ids": [5] * n, "target_ids": [6]} for n in range(1, 17)])
    tried, peers, fits = [], iter(peer), iter(mine)

    def target_loss(model, batch, _):
        tried.append(len(batch["input_ids"]))
        if not next(fits):
            raise torch.OutOfMemoryError
        return torch.ones((), device=model.device, requires_grad=True)

    monkeypatch.setattr(train, "target_loss", target_loss)
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "index", lambda: 0)
    monkeypatch.setattr(distributed, "all_gather", lambda values: [*values, next(peers)])
    with FakeGPU():
        assert train._try_longest(model.to("cuda"), rows, 8, 0) == 4
        assert tried == [8, 4]
        monkeypatch.setattr(distributed, "sharded", lambda: True)  # there a pass itself exchanges messages
        fits = iter([False])
        with pytest.raises(GainLoRAError, match=r"micro_batch_size: 8: .*; lower it"):
            train._try_longest(model, rows, 8, 0)


@pytest.mark.parametrize("method", ["gainlora-inflora", "routed-inclora"])
def test_a_model_learned_on_a_cpu_answers_the_same_on_a_gpu(tmp_path, method):
    run = learn(project(tmp_path, "llama", count=2), method=method)
    prompts = ["the film was good Output:", "a game", "the song was slow and the end bad Output:"]
    answers = Predictor(open_saved(run.folder)).answer(prompts)
    with FakeGPU():
        predictor = Predictor(open_saved(run.folder))
        assert predictor.model.device.type == "cuda" and predictor.answer(prompts) == answers


def test_dtypes_in_which_nothing_can_be_learned_are_refused_by_name():
    gpu = torch.device("cuda")
    with FakeGPU(bfloat16=False):
        assert pick_dtype("auto", gpu) == torch.float32 and device_name() == "cuda (Fake GPU)"
        for name, told in (("bfloat16", "Fake GPU does not compute in it"), ("float16", "set float32 or bfloat16")):
            with pytest.raises(GainLoRAError, match=f"{name}: {told}"):
                pick_dtype(name, gpu)
    with pytest.raises(GainLoRAError, match="float16 weights"):
        GainLoRAModel(tiny_llama().bfloat16().half(), GainLoRAConfig("tiny", rank=2, alpha=4))
