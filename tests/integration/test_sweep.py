"""Sweeps: side by side, killed, resumed, one run failing; by the command and by the deployment."""

import signal

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.xdist_group("prefect")]

PLAN = [
    {"order": "tiny", "methods": ["seqlora", "inclora", "olora"], "seeds": [51]},
    {"order": "tiny", "methods": ["seqlora"], "seeds": [51], "label": "bad", "options": {"lora.targets": ["absent"]}},
]
GONE = [{"order": "gone.yaml", "methods": ["seqlora"], "seeds": [51]}]
SWEEP = ("gainlora", "sweep", "--plan", "plan.yaml", "--results", "out", "--jobs", "2")


def test_a_killed_sweep_resumes_and_a_failing_run_stops_no_other(served):
    order = {"data": "data/gone", "template": "long_sequence", "metric": "exact_match", "tasks": ["task1"]}
    (served.folder / "gone.yaml").write_text(yaml.safe_dump(order))
    (served.folder / "plan.yaml").write_text(yaml.safe_dump(PLAN + GONE))
    (served.folder / "data" / "gone" / "task1").mkdir(parents=True)
    assert served(*SWEEP, code=1).startswith("error: orders.gone: incomplete in data/gone")  # before anything runs
    given = ("--param", "plan=plan.yaml", "--param", "results=out")
    assert "incomplete in data/gone" in served("prefect", "deployment", "run", "sweep", "--watch", *given, code=1)

    (served.folder / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    code, _ = served.interrupt(*SWEEP, at="runs/tiny-*-51-*/task_01_*", number=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert "1 of 4 runs failed" in served(*SWEEP, code=1)
    files = sorted((served.folder / "out" / "tiny").iterdir())
    assert [file.name.split("-")[0] for file in files] == ["inclora", "olora", "seqlora"]
    for file in files:
        assert served.mlflow_runs()[served.read(f"out/tiny/{file.name}")["run_id"]] == ["FINISHED"]
    assert "4 runs, 1 to do" in served(*SWEEP, code=1)
    listed = served(*SWEEP, "--list").splitlines()
    assert len(listed) == 4 and sum("# there: out/tiny/" in line for line in listed) == 3
    assert listed[0].startswith("gainlora run tiny --method seqlora --seed 51")

    served("prefect", "deployment", "run", "sweep", "--watch", *given, code=1)
    state = served.last_flow_run()["state"]
    assert (state["type"], state["message"]) == ("FAILED", "runs failed; the flow's output names them")
    (log,) = (served.folder / ".cache/sweep").glob("tiny-seqlora+bad-*-51.log")
    assert "lora.targets" in log.read_text()
