"""Sweeps: which runs a plan stands for, what is refused before anything runs, and that a failed run stops no other."""

import signal
import time
from pathlib import Path

import pytest
import yaml

from gainlora import plans
from gainlora.config import load_config
from gainlora.errors import GainLoRAError
from tests.tiny import tiny_params

ENTRY = {"order": "tiny", "methods": ["seqlora", "olora"], "seeds": [1, 2]}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    tiny_params(tmp_path, "any")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*entries):
    Path("plan.yaml").write_text(yaml.safe_dump(list(entries)))
    return Path("plan.yaml")


def test_every_combination_and_a_plan_give_the_same_runs():
    found = plans.experiments(["tiny"], ["seqlora", "olora"], [1, 2])
    assert [e.name for e in found] == [
        f"tiny/{method}-any-{seed}" for method in ("seqlora", "olora") for seed in (1, 2)
    ]
    assert found == plans.experiments(plan=plan(ENTRY))
    for e in found:
        assert e.config == load_config("tiny", {"method": e.config.method, "seed": e.config.seed})
    assert [e.name for e in plans.experiments(["tiny"])] == ["tiny/gainlora-inflora-any-1"]  # params.yaml's


def test_a_choice_from_a_plan():
    options = {"train.epochs": 2, "lora.targets": ["q_proj"], "train.learning_rate": 1e-5}
    file = plan(ENTRY, {**ENTRY, "methods": ["olora"], "label": "long", "options": options})
    chosen = plans.experiments(methods=["olora"], seeds=[2], plan=file)
    assert [e.name for e in chosen] == ["tiny/olora-any-2", "tiny/olora+long-any-2"]
    assert chosen[1].config.train.epochs == 2
    entries = ENTRY, {**ENTRY, "methods": ["olora"], "label": "long"}, {**ENTRY, "options": {"model.name": "other"}}
    assert len({e.file(Path("results")) for e in plans.experiments(plan=plan(*entries))}) == 10
    words = chosen[1].command  # as typed, it describes the same run
    sets = dict(word.partition("=")[::2] for word in words[words.index("--set") + 1 :: 2])
    given = {name: yaml.safe_load(value) for name, value in sets.items()}
    assert load_config("tiny", {**given, "method": "olora", "seed": 2}) == chosen[1].config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "orders: nothing to run"),
        ({"orders": ["tiny"], "methods": ["seqlor"]}, "method: 'seqlor' is unknown"),
        ({"orders": ["tiny", "tinny"]}, "no order 'tinny'; did you mean 'tiny'"),
        ({"orders": ["tiny"], "seeds": [1, 1]}, "tiny/gainlora-inflora-any-1: given twice"),
        ({"orders": ["tiny"], "overrides": {"train.epoch": 2}}, "train.epoch: unknown option; did you mean 'epochs'"),
        ({"plan": Path("none.yaml")}, "none.yaml: not found"),
        ({"plan": [ENTRY], "overrides": {"train.epochs": 2}}, "--set: train.epochs: not with a plan"),
        ({"plan": [ENTRY], "methods": ["ewc"]}, "methods: ewc is not in plan.yaml; known: olora, seqlora"),
        ({"plan": [ENTRY, ENTRY]}, "tiny/seqlora-any-1: given twice"),
        ({"plan": ["tiny"]}, "plan.yaml: entry 1: options: got 'tiny', expected a section"),
        ({"plan": [{**ENTRY, "sedes": [1]}]}, "plan.yaml: entry 1: sedes: unknown option; did you mean 'seeds'"),
        ({"plan": [{"order": "tiny", "seeds": [1]}]}, "plan.yaml: entry 1: methods: missing"),
        ({"plan": [{**ENTRY, "methods": "olora"}]}, "entry 1: methods: got 'olora', expected a list"),
        ({"plan": [{**ENTRY, "seeds": [True]}]}, "entry 1: seeds: got True, expected a whole number"),
        ({"plan": [{**ENTRY, "label": 3}]}, "entry 1: label: got 3, expected text"),
        ({"plan": [{**ENTRY, "options": [1]}]}, "entry 1: options: got [1], expected option: value"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_plans_are_refused_before_anything_runs(given, message):
    if isinstance(given.get("plan"), list):
        given = {**given, "plan": plan(*given["plan"])}
    with pytest.raises(GainLoRAError) as error:
        plans.experiments(**given)
    assert message in str(error.value)


FAKE = """import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
words = sys.argv[1:]
method, results = words[words.index("--method") + 1], pathlib.Path("started")
results.mkdir(exist_ok=True)
(results / f"{method}-{time.time_ns()}").touch()
try:
    time.sleep({"seqlora": 30, "olora": 0.2}.get(method, 0))
except KeyboardInterrupt:
    (results / f"{method}-interrupted").touch()
    sys.exit(130)
if method == "ewc":
    print("error: it does not work", file=sys.stderr)
    sys.exit(1)
print("AP 50.0")
"""


@pytest.fixture
def fake_runs(project, monkeypatch):
    """`gainlora run` that learns nothing."""
    (project / "gainlora_fake.py").write_text(FAKE)
    start = plans.subprocess.Popen

    def popen(command, **options):
        return start([command[0], str(project / "gainlora_fake.py"), *command[3:]], **options)

    monkeypatch.setattr(plans.subprocess, "Popen", popen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_failed_run_stops_no_other(fake_runs, capsys):
    chosen = plans.experiments(["tiny"], ["ewc", "olora"], [1, 2])
    assert plans.run_all(chosen, None, jobs=2) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "4 runs, 4 to do" and len(lines) == 5
    assert sum("| error: it does not work |" in line for line in lines) == 2
    assert sum("| AP 50.0 |" in line for line in lines) == 2
    assert "2 of 4 runs failed" in err and "tiny/ewc-any-1: .cache/sweep/tiny-ewc-any-1.log" in err


def test_an_interrupted_sweep_ends_its_runs_and_starts_no_other(fake_runs):
    """Also in the background of a script, where SIGINT is ignored, by its runs, too."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    chosen = plans.experiments(["tiny"], ["seqlora", "ewc"], [1])
    previous = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 3)
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            plans.run_all(chosen, None, jobs=1)
    finally:
        signal.signal(signal.SIGALRM, previous)
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 20
    names = [path.name for path in Path("started").iterdir()]
    assert "seqlora-interrupted" in names and not any(name.startswith("ewc") for name in names)


def test_runs_take_turns_on_gpus_and_share_cpu_cores(monkeypatch):
    (one,) = plans.experiments(["tiny"], overrides={"launch.num_processes": 1})
    (two,) = plans.experiments(["tiny"], overrides={"launch.num_processes": 2})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = [plans.environment(one, slot, 3, ["3", "5"])["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert found == ["3", "5", "3"] and plans.visible_gpus() == ["3", "5"]
    assert plans.environment(two, 1, 3, ["3", "5"])["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert plans.environment(one, 0, 10**6, [])["OMP_NUM_THREADS"] == "1"
