"""kill -9 at every kind of point, then the same again: it goes on by itself to the same end, bit for bit."""

import json
import sqlite3

import pytest

from gainlora.sections import ReportConfig, TrackingConfig
from tests.dying import in_a_process, killed_at
from tests.fake_run import TASKS, write_run
from tests.runs import assert_equal_runs, copy_of, project, run
from tests.unit.test_checkpoint import OPTIONS

METHOD = "gainlora-inflora"
RUNS, TRAINING = "gainlora.runs.", "gainlora.training."


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A project in which the stream was never stopped: 3 tasks of 6 steps, a checkpoint after 2, 4 and 6."""
    root = project(tmp_path_factory.mktemp("whole"), **OPTIONS)
    assert in_a_process(run, root, METHOD) == 0
    return root


POINTS = {
    "the run's description is half written": ("gainlora.io:write_json!", 1),
    "the base is loaded": (RUNS + "loading:load_base!", 1),
    "tokenized data are half written": ("os:rename", 2),
    "prepare": (TRAINING + "learner:prepare_task", 2),
    "a covariance pass": ("gainlora.model.subspace:Covariance.update", 30),
    "in a step": (TRAINING + "train:target_loss", 9),
    "between optimizer step and checkpoint": (TRAINING + "checkpoint:Checkpoints.save", 5),
    "a checkpoint's tensors are written": (TRAINING + "checkpoint:save_tensors!", 5),
    "a checkpoint is whole, the older one still there": (TRAINING + "checkpoint:seal!", 5),
    "update of the layers' subspaces": (TRAINING + "steps:expand_blocks", 4),
    "update of the gate's subspaces": (TRAINING + "steps:expand_basis", 5),
    "the learned state is half written": ("gainlora.model.adapter_io:save_tensors!", 5),
    "all but the mark of the learned state is written": ("gainlora.io:flush!", 9),
    "evaluation": (TRAINING + "learner:evaluate_task", 3),
    "a task folder before its rename": ("pathlib:Path.rename", 9),
    "a task folder after its rename": ("pathlib:Path.rename!", 9),
    "the result": (RUNS + "run:read_run", 1),
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", POINTS)
def test_killed_there_the_stream_ends_as_if_never_stopped(whole, tmp_path, name):
    root = copy_of(whole, tmp_path / "killed")
    point, call = POINTS[name]
    killed_at(point, call, run, root, METHOD)
    assert in_a_process(run, root, METHOD) == 0
    assert_equal_runs(root, whole)


# ---- MLflow -------------------------------------------------------------------------------------

TRACKING = TrackingConfig(experiment="kills")


def record(root):
    from gainlora.tracking import mlflow

    (folder,) = root.glob("runs/*")
    mlflow.record_run(folder, TRACKING, ReportConfig(decimals=1, dpi=30), root)


MLFLOW = {
    "the store is there": ("mlflow:MlflowClient.create_experiment!", 1),
    "the run is there": ("mlflow:MlflowClient.create_run!", 1),
    "a task's run is there": ("mlflow:MlflowClient.create_run!", 1),
    "a task's model is there": ("mlflow:MlflowClient.create_logged_model!", 1),
    "its scores are there, the run's not": ("mlflow:MlflowClient.log_batch!", 3),
    "half of its files": ("mlflow:MlflowClient.log_artifact!", 4),
    "closed, not marked": ("mlflow:MlflowClient.set_terminated!", 1),
    "marked": ("mlflow:MlflowClient.set_tag!", 1),
    "the table of scores": ("mlflow:MlflowClient.log_dict!", 1),
    "all but closed": ("mlflow:MlflowClient.set_terminated", 1),
}


@pytest.mark.slow
def test_records_that_are_killed_again_and_again_are_there_once(tmp_path):
    for name in ("killed", "whole"):
        write_run(tmp_path / name, [[84.0], [81.0, 88.0]], tasks=TASKS[:2])
    for point, call in MLFLOW.values():
        killed_at(point, call, record, tmp_path / "killed")
    for name in ("killed", "whole"):
        assert in_a_process(record, tmp_path / name) == 0
    assert stored(tmp_path / "killed") == stored(tmp_path / "whole")


def stored(root):
    """All that a store holds, without what is made up anew: run ids and times of day."""
    with sqlite3.connect(root / "mlruns" / "mlflow.db") as store:
        held = {"runs": store.execute("select name, status, lifecycle_stage from runs order by name").fetchall()}
        for table, columns in (("metrics", "key, step, value"), ("params", "key, value"), ("tags", "key, value")):
            rows = f"select name, {columns} from {table} join runs using (run_uuid) where key != 'mlflow.parentRunId'"
            held[table] = sorted(store.execute(rows), key=str)
        inputs = "select name, count(*) from inputs join runs on destination_id = run_uuid group by name"
        held["inputs"] = sorted(store.execute(inputs))
        places = dict(store.execute("select run_uuid, name from runs"))
    files = [path for path in (root / "mlruns" / "artifacts").rglob("*") if path.is_file()]
    held["files"] = sorted((places[path.parts[path.parts.index("artifacts") + 1]], path.name) for path in files)
    tables = [json.loads(path.read_text()) for path in files if path.name == "R.json"]
    return {**held, "R": tables}
