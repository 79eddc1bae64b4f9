"""A finished run in MLflow's registry, served by `mlflow models serve` and asked over HTTP."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from gainlora.__main__ import main
from gainlora.errors import GainLoRAError
from gainlora.export.saved import open_saved
from gainlora.inference import Predictor
from gainlora.sections import ReportConfig, TrackingConfig
from gainlora.tracking import mlflow as tracked
from gainlora.tracking.registry import register
from gainlora.tracking.store import tracking_uri
from tests.runs import learn, project, prompt
from tests.servers import post, serving

TRACKING = TrackingConfig(experiment="tiny")
REPORT = ReportConfig(decimals=1, dpi=50)
TASKS = ("task1", "task2", "task3")


def recorded(root, **options):
    """A finished run that is in MLflow."""
    folder = learn(root, **options).folder
    tracked.record_run(folder, TRACKING, REPORT, root)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded(project(tmp_path_factory.mktemp("project")))


@pytest.fixture(scope="module")
def uri(run):
    return tracking_uri(run.parent.parent)


@pytest.fixture(scope="module")
def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@pytest.fixture(scope="module")
def version(run, uri):
    return register(run, uri)


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_version_is_the_finished_model_and_its_code(run, uri, client, version):
    assert version == 1 == register(run, uri)  # again: the same
    (found,) = client.search_model_versions("name = 'gainlora-tiny'")
    assert client.get_registered_model("gainlora-tiny").aliases == {}  # promotion is another thing
    assert found.tags["gainlora.key"] == run.name and found.tags["method"] == "gainlora-inflora"
    from mlflow.artifacts import download_artifacts
    from mlflow.models import get_model_info

    here = run.parent.parent / "downloaded"
    source = client.get_model_version_download_uri("gainlora-tiny", "1")
    download_artifacts(artifact_uri=source, tracking_uri=uri, dst_path=str(here))
    here = here / source.rpartition("/")[2]
    assert {path.suffix for path in files(here)} <= {".safetensors", ".json", ".md", ".py", ".yaml", ".txt", ""}
    assert [path.name for path in files(here) if path.suffix == ""] == ["MLmodel"]
    base = run.parent.parent / "base" / "model.safetensors"
    assert all(path.stat().st_size != base.stat().st_size for path in files(here))
    info = get_model_info(str(here))
    assert info.signature.outputs.input_names()[0] == "answer"
    assert {p.name for p in info.signature.params} == {"max_new_tokens", "coefficients"}
    example = json.loads((here / "input_example.json").read_text())
    assert [row[0].split("\n")[0] for row in example["data"]] == ["Sort task 1", "Sort task 2", "Sort task 3"]


def test_another_run_is_another_version_and_registering_promotes_none(run, uri, client, version):
    other = recorded(run.parent.parent, seed=2)
    assert register(other, uri) == 2 == register(other, uri) and register(run, uri) == 1
    assert client.get_registered_model("gainlora-tiny").aliases == {}


def test_what_cannot_be_registered(run, uri, version, capsys, monkeypatch, tmp_path):
    root = run.parent.parent
    with pytest.raises(GainLoRAError, match="method single needs a task id"):
        register(recorded(root, method="single"), uri)
    with pytest.raises(GainLoRAError, match="MLflow has no such run; give its `gainlora run` command again"):
        register(learn(root, method="olora").folder, uri)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("orders: {}")
    assert main(["register", str(run)]) == 1
    assert f"{tmp_path}/mlruns/mlflow.db is not there" in capsys.readouterr().err
    other = shutil.copytree(run, tmp_path / "project" / "runs" / run.name)
    shutil.rmtree(other / "task_03_task3")
    with pytest.raises(GainLoRAError, match="2 of 3 tasks are learned"):
        register(other, uri)


# -- over HTTP -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(uri, version, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with serving("models:/gainlora-tiny/1", log, MLFLOW_TRACKING_URI=uri, MLFLOW_DISABLE_TELEMETRY="true") as address:
        yield address


def ask(address, body):
    """Status and answers, or what is said."""
    status, content = post(f"{address}/invocations", body)
    return status, json.loads(content) if status == 200 else content


BAD = [
    ({"dataframe_records": [{"txt": "a"}]}, "text"),
    ({"dataframe_records": [{"text": 3}]}, "text"),
    ({"dataframe_records": [{"text": "a"}, {"text": " "}]}, "row 1: text: empty"),
    ({"dataframe_records": [{"text": "a", "tsk": "task1"}]}, "tsk: unknown; a row has text and task alone"),
    (
        {"dataframe_records": [{"text": "a", "task": "tsk1"}]},
        "row 0: task: 'tsk1' is no task of this run; did you mean",
    ),
    ({"dataframe_records": [{"text": "a"}] * 1001}, "1001 rows with 1001 characters; give at most 1000"),
    ({"dataframe_records": [{"text": "a" * 1_000_001}]}, "give at most 1000 with 1000000 at once"),
    ({"inputs": ["a"]}, "text"),
    ({"dataframe_records": [{"text": "a"}], "params": {"max_new_tokens": 0}}, "max_new_tokens: 0 is out of range"),
    ({"rows": [{"text": "a"}]}, "dataframe_records"),
    (b"{", "JSON"),
]


@pytest.mark.slow
def test_mixed_tasks_over_http_are_answered_as_by_predict(run, address, capsys):
    prompts = [prompt(run, task, i) for i in range(4) for task in TASKS]
    rows = [{"text": text} for text in prompts]
    expected = Predictor(open_saved(run)).answer(prompts)
    status, found = ask(address, {"dataframe_records": rows, "params": {"coefficients": True}})
    assert status == 200 and [row["answer"] for row in found["predictions"]] == [a.text for a in expected]
    for row, answer in zip(found["predictions"], expected, strict=True):
        assert row["coefficients"] == pytest.approx(dict(zip(TASKS, answer.coefficients, strict=True)), abs=1e-4)
    assert main(["predict", str(run), prompts[5]]) == 0
    assert capsys.readouterr().out.strip() == found["predictions"][5]["answer"]
    status, short = ask(
        address, {"dataframe_split": {"columns": ["text"], "data": [[prompts[0]]]}, "params": {"max_new_tokens": 1}}
    )
    assert status == 200 and list(short["predictions"][0]) == ["answer"]
    assert len(short["predictions"][0]["answer"].split()) <= 1
    by_task = [{"text": prompts[3 * i].split("\n")[1], "task": TASKS[0]} for i in range(4)]
    status, found = ask(address, {"dataframe_records": [*by_task, rows[1]]})  # one row without a task
    assert (status, [row["answer"] for row in found["predictions"]]) == (
        200,
        [expected[i].text for i in (0, 3, 6, 9, 1)],
    )
    with ThreadPoolExecutor(8) as many:  # at the same time, in batches of different prompts
        replies = list(many.map(lambda i: ask(address, {"dataframe_records": rows[i : i + 3]}), range(10)))
    for i, (status, reply) in enumerate(replies):
        assert (status, [row["answer"] for row in reply["predictions"]]) == (200, [a.text for a in expected[i : i + 3]])


@pytest.mark.slow
@pytest.mark.parametrize(("body", "expected"), BAD, ids=lambda value: str(value)[:40])
def test_wrong_input_is_the_callers_error_and_says_so(address, body, expected):
    status, said = ask(address, body)
    assert 400 <= status < 500 and expected in said, (status, said)


@pytest.mark.slow
def test_another_base_model_is_not_served(run, uri, version, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = run.parent.parent / "base" / "model.safetensors"
    held = load_file(weights)
    kept = weights.read_bytes()
    held["lm_head.weight"][0, 0] += 1
    save_file(held, weights, {"format": "pt"})
    try:
        with (
            pytest.raises(AssertionError, match="not the base model that this adapter was learned on"),
            serving("models:/gainlora-tiny/1", tmp_path / "log", MLFLOW_TRACKING_URI=uri),
        ):
            pass
    finally:
        weights.write_bytes(kept)
