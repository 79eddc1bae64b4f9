"""What identifies a step: exactly what decides its numbers."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gainlora.config import RunConfig
from gainlora.errors import GainLoRAError
from gainlora.export.saved import files_sha256
from gainlora.model.modeling import GainLoRAModel
from gainlora.runs import identity
from gainlora.runs.run import Run
from tests.runs import config_of, create, learn, project, state
from tests.tiny import tiny_llama

ANOTHER = {
    "seed": 2,
    "order.template": "superni",
    "order.metric": "rouge_l",
    "model.dtype": "bfloat16",
    "model.tf32": True,
    "model.compile": True,
    "data.max_prompt_tokens": 31,
    "data.max_target_tokens": 3,
    "data.protocol": "published",
    "data.truncate": "end",
    "data.validation": 0.3,
    "data.train_limit": 20,
    "data.test_limit": 5,
    "data.references": "first",
    "data.template": "chat",
    "data.instruction": "none",
    "data.replay": 0.2,
    "lora.rank": 3,
    "lora.alpha": 5,
    "lora.targets": ["k_proj"],
    "gate.hidden": 5,
    "gate.depth": 1,
    "gate.score": "linear",
    "gate.key_norm": 2.0,
    "gate.initial_direction": "random",
    "gate.initial_key": "open",
    "gate.constrain_update": False,
    "gate.learning_rate": 0.001,
    "gate.trained": "key",
    "subspace.threshold": 0.8,
    "subspace.gate_threshold": 0.8,
    "subspace.energy": "representation",
    "subspace.horizon": 9,
    "subspace.covariance_blocks": 2,
    "subspace.max_examples": 9,
    "train.learning_rate": 0.02,
    "train.lr_scheduler": "linear",
    "train.epochs": 2,
    "train.task_epochs": {"task1": 2},
    "train.min_steps": 4,
    "train.batch_size": 4,
    "train.weight_decay": 0.1,
    "train.penalty_weight": 0.3,
    "train.max_grad_norm": 0.5,
    "evaluate.num_beams": 2,
}
"""Option -> another value, which decides other numbers where the method uses it."""
NEVER = {
    "model.source": None,
    "model.device_map": "auto",
    "data.skip_incomplete": True,
    "data.validation_limit": 7,  # without validation
    "train.micro_batch_size": 4,
    "train.gradient_checkpointing": True,
    "train.checkpoint_every": 2,
    "evaluate.batch_size": 3,
}
"""Those that decide rounding, speed or nothing."""
NAMES = ("method", "order.name", "order.data", "order.tasks", "order.sources", "model.name")
NAMES += ("train.keep", "train.patience")
"""What names a run, or stands for what is identified by content; and options that need another one."""
UNUSED = {
    "inflora": ("gate", "subspace.gate_threshold", "train.penalty_weight"),
    "gainlora-olora": ("subspace.threshold", "subspace.covariance_blocks"),
    "olora": ("gate", "subspace"),
    "ewc": ("gate", *map("subspace.{}".format, ("threshold", "gate", "energy", "horizon", "covariance"))),
    "gainlora-inflora": ("train.penalty_weight",),
}


def options(values, prefix=""):
    return [
        name
        for key, value in values.items()
        for name in (options(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"])
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return project(tmp_path_factory.mktemp("identity"))


def tasks(**digests):
    return {name: {"sha256": sha256, "train": 24} for name, sha256 in digests.items()}


def ids(root, method, **changed):
    values = config_of(root, method=method).learning()
    for name, value in changed.items():
        section, _, option = name.rpartition(".")
        (values[section] if section else values)[option] = value
    return identity.step_ids(RunConfig.from_stored(values), tasks(task1="a", task2="b", task3="c"), "base")


def test_every_option_is_in_the_table(root):
    known = {*ANOTHER, *NEVER, *NAMES}
    assert set(options(config_of(root).learning())) <= known


@pytest.mark.parametrize("method", UNUSED)
def test_options_that_the_method_uses_identify_its_steps_and_no_others(root, method):
    unused = [name for name in ANOTHER if name.startswith(tuple(UNUSED[method]))]
    plain = ids(root, method=method)
    for name, value in {**ANOTHER, **NEVER}.items():
        changed = ids(root, method=method, **{name: value})
        same = name in NEVER or name in unused
        assert [a == b for a, b in zip(plain, changed, strict=True)] == [same] * 3, name


def test_a_step_depends_on_what_was_learned_before_it_alone(root):
    config = config_of(root, method="olora")
    known = identity.step_ids(config, tasks(x="1", y="2", z="3"), "base")
    assert identity.step_ids(config, tasks(x="1", y="2", z="4"), "base")[:2] == known[:2]
    for data in (tasks(x="0", y="2", z="3"), tasks(w="1", y="2", z="3")):
        assert not set(identity.step_ids(config, data, "base")) & set(known)
    assert not set(identity.step_ids(config, tasks(x="1"), "another base")) & set(known)
    for least, same in ((3, True), (4, False)):  # a pass has 3 steps
        floored = config.with_options({"train.min_steps": least})
        assert (identity.step_ids(floored, tasks(x="1", y="2", z="3"), "base") == known) is same
    assert identity.step_ids(config, tasks(x="1", y="2"), "base", known[:1]) == known[:2]


@pytest.mark.parametrize("method", ["gainlora-inflora", "olora"])
def test_what_does_not_identify_a_run_may_change_while_it_is_learned(tmp_path, method):
    """Tensors and R keep their bits, but for micro-batches and recomputed activations, which round otherwise."""
    expected = learn(project(tmp_path / "whole"), method=method)
    root = project(tmp_path / "changed")
    changes = {"train__checkpoint_every": 1, "evaluate__batch_size": 3, "gate__hidden": 4 if method == "olora" else 6}
    with create(root, method=method) as begun:
        begun.seal(1)
        begun.train(2)
    with create(root, method=method, **changes) as run:
        assert run.folder == begun.folder and run.finished == 1
        result = run.learn()
    assert (
        state(run) == state(expected) and result["R"] == json.loads((expected.folder / "result.json").read_text())["R"]
    )
    assert json.loads((run.folder / "config.json").read_text())["config"]["evaluate"]["batch_size"] == 3


EDITS = {
    "tokenizer.json": lambda t: t.replace('"w1"', '"w1x"'),
    "tokenizer_config.json": lambda t: t.replace('"eos_token": "</s>"', '"eos_token": "<unk>"'),
    "config.json": lambda t: t.replace('"hidden_act": "silu"', '"hidden_act": "gelu"'),
}


@pytest.mark.parametrize("name", EDITS)
def test_another_tokenizer_or_configuration_is_another_base_model(tmp_path, name):
    root = project(tmp_path)
    run = learn(root, method="inclora", order__tasks=["task1"])
    file = root / "base" / name
    changed = EDITS[name](file.read_text())
    assert changed != file.read_text()
    file.write_text(changed)
    with create(root, method="inclora", order__tasks=["task1"]) as other:
        assert other.folder != run.folder and other.finished == 0
    with pytest.raises(GainLoRAError, match=r"task_01_task1: was learned on .* with another (configuration|tokenizer)"):
        GainLoRAModel.from_pretrained(run.task_folder(1))


def test_processes_that_start_together_hash_a_base_once(tmp_path, monkeypatch):
    tiny_llama(tmp_path / "base")
    hashed = []
    monkeypatch.setattr(identity, "sha256", lambda path: hashed.append(path.name) or time.sleep(0.01) or "hash")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: identity.base_fingerprint(str(tmp_path / "base"), tmp_path), range(8)))
    assert len(set(found)) == 1 and sorted(hashed) == sorted(set(hashed))


def test_fingerprints_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    tiny_llama(tmp_path / "base")
    hashed = []
    monkeypatch.setattr(identity, "sha256", lambda path: hashed.append(path.name) or str(path.stat().st_mtime_ns))
    first = identity.base_fingerprint(str(tmp_path / "base"), tmp_path)
    assert "model.safetensors" in hashed and "generation_config.json" not in hashed
    hashed.clear()
    assert identity.base_fingerprint(str(tmp_path / "base"), tmp_path) == first and not hashed
    os.utime(tmp_path / "base" / "config.json", (1, 1))
    assert identity.base_fingerprint(str(tmp_path / "base"), tmp_path) != first and hashed == ["config.json"]
    (tmp_path / ".cache" / "fingerprints.json").write_text("{")
    identity.base_fingerprint(str(tmp_path / "base"), tmp_path)
    assert "model.safetensors" in hashed


def test_a_hub_model_is_its_commit(tmp_path, monkeypatch):
    place = tmp_path / "models--a--b" / "snapshots" / "c0ffee" / "config.json"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: str(place))
    assert identity.base_fingerprint("a/b", tmp_path) == "c0ffee"
    assert files_sha256("a/b") == "commit c0ffee"


def test_other_packages_on_resume_are_noted_once(tmp_path, monkeypatch):
    root = project(tmp_path)
    with create(root) as run:
        run.seal(1)
    monkeypatch.setattr(identity, "version", lambda name: "99" if name == "torch" else "1")
    for t, said in ((2, 1), (3, 0)):
        with Run.open(run.folder) as resumed:
            resumed.seal(t)
        assert len(resumed.notices) == said
    assert "torch" in json.dumps(json.loads((run.folder / "config.json").read_text())["resumed"])
    assert torch.__version__ not in json.dumps(resumed.described["resumed"])


def test_code_that_learns_other_numbers_does_not_continue_a_run(tmp_path, monkeypatch):
    root = project(tmp_path)
    with create(root) as run:
        run.seal(1)
    monkeypatch.setattr(identity, "learning_version", lambda method: "other")
    with Run.open(run.folder) as resumed, pytest.raises(GainLoRAError, match="begun with another learning version"):
        resumed.seal(2)
    with create(root) as other:
        assert other.folder != run.folder
