"""Records: read from run folders and result files, refused when changed, never overwritten by something else."""

import hashlib
import json

import pytest

from gainlora.errors import GainLoRAError
from gainlora.runs.records import Key, read_record, read_result_file, read_run, train_records
from gainlora.runs.result_files import export, write_result_file
from tests.fake_run import BASE, BEFORE, THREE, R, stored, write_run


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("method", "scores", "at_once"),
    [
        ("gainlora-inflora", R, False),
        ("seqlora", R, False),
        ("multitask", [R[2]], True),
        ("inclora", [[55.0]], False),
        ("multitask", [[55.0]], True),
    ],
)
def test_a_run_comes_back_whole(tmp_path, method, scores, at_once):
    folder = write_run(tmp_path, scores, method, tasks=THREE[: len(scores[-1])], at_once=at_once)
    run = read_run(folder)
    write_result_file(run, tmp_path / "x.json")
    again = read_result_file(tmp_path / "x.json")
    assert again == run == read_record(tmp_path / "x.json") == read_record(folder)
    assert (again.R, again.result, again.at_once, again.folder) == (run.R, run.result, at_once, None)
    assert run.result == json.loads((folder / "result.json").read_text())


def test_R_and_measures_are_those_of_the_scores(tmp_path):
    run = read_run(write_run(tmp_path, R[:2], tasks=THREE))
    assert run.R == [[84.0, None, None], [81.0, 88.0, None], [None] * 3] and not run.complete
    assert [run.measures(step) for step in run.steps] == [
        {"AP": 84.0, "FT": None, "BWT": None, "LA": 84.0, "AIA": 84.0, "FWT": None},
        {"AP": 84.5, "FT": 3.0, "BWT": -3.0, "LA": 86.0, "AIA": 84.25, "FWT": BEFORE - BASE},
    ]
    at_once = read_run(write_run(tmp_path, [R[2]], "multitask", tasks=THREE, at_once=True))
    assert at_once.complete and [[None] * 3, [None] * 3, R[2]] == at_once.R
    assert (at_once.result["AP"], at_once.result["FT"], at_once.result["BWT"]) == (80.0, None, None)
    assert not read_run(write_run(tmp_path, [], "multitask", 7, THREE, at_once=True)).complete


@pytest.mark.parametrize("name", ["scores.json", "coefficients.json", "subspace.json", "train.jsonl"])
def test_a_changed_file_of_a_finished_task_is_refused(tmp_path, name):
    folder = write_run(tmp_path, R, tasks=THREE)
    task = folder / "task_02_news_topic"
    (task / name).write_text((task / name).read_text() + " ")
    with pytest.raises(GainLoRAError, match=rf"{name}: changed since it was written .*gainlora repair"):
        (read_run(folder), train_records(task))
    (task / "checksums.json").unlink()
    with pytest.raises(GainLoRAError, match=r"checksums\.json: not found"):
        read_run(folder)


def test_measures_that_are_not_those_of_the_scores_are_refused(tmp_path):
    path = tmp_path / "x.json"
    write_result_file(read_run(write_run(tmp_path, R, tasks=THREE)), path)
    content = path.read_text()
    for change in ({"AP": 99.0}, {"FT": None}, {"R": [[84.0, None, None], [81.0, 88.0, None], [82.0, 87.0, 99.0]]}):
        edit(path, **change)
        with pytest.raises(GainLoRAError, match=f"its {next(iter(change))} is not that of its scores"):
            read_record(path)
        path.write_text(content)


def test_what_is_damaged_or_no_run_is_named(tmp_path):
    with pytest.raises(GainLoRAError, match=r"nowhere/config\.json: not found"):
        read_record(tmp_path / "nowhere")
    for content in ("{}", "[]", "{", '{"steps": [1]}', '{"steps": [{"task": "\\u001b[31m"}]}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(GainLoRAError, match=r"x\.json") as error:
            read_record(tmp_path / "x.json")
        assert str(error.value).isprintable()
    folder = write_run(tmp_path, R, seed=2, tasks=THREE)
    (folder / "task_01_movie_sentiment" / "gate.safetensors").write_text("short")
    with pytest.raises(GainLoRAError, match=r"gate\.safetensors: damaged"):
        read_run(folder)


def test_older_folders_have_defaults(tmp_path):
    folder = write_run(tmp_path, R, tasks=THREE)
    run = read_run(folder)
    described = json.loads((folder / "config.json").read_text())
    del described["steps"], described["config"]["train"]["penalty_weight"], described["config"]["evaluate"]["num_beams"]
    edit(folder / "config.json", **described)
    assert read_run(folder).options == run.options and read_run(folder).complete


def test_validation_curves_are_read_and_kept_in_result_files(tmp_path):
    task = write_run(tmp_path, R, tasks=THREE) / "task_01_movie_sentiment"
    curve = [{"step": 6, "loss": 1.0, "score": 50.0}, {"step": 12, "loss": 0.5, "score": 75.0}]
    content = "".join(json.dumps(row) + "\n" for row in curve)
    (task / "validation.jsonl").write_text(content)
    edit(task / "checksums.json", **{"validation.jsonl": hashlib.sha256(content.encode()).hexdigest()})
    run = read_run(task.parent)
    assert [step.validation for step in run.steps] == [curve, [], []]
    assert read_result_file(export(run, tmp_path)) == run


def test_stored_parameters_are_counted_from_the_files(tmp_path):
    gated, equal = (read_run(write_run(tmp_path, R, method, tasks=THREE)) for method in ("gainlora-inclora", "inclora"))
    assert [step.total("stored") for step in gated.steps] == [sum(stored(t, gated=True).values()) for t in (1, 2, 3)]
    assert [equal.steps[0].values[Key(f"stored.{kind}")] for kind in ("adapter", "subspace")] == [600, 12]


def test_a_result_file_begins_with_the_result_a_row_of_R_per_line(tmp_path):
    scores = [[84.123456], [81.0, 88.0], [200 / 3, 87.0, 71.0]]
    path = export(read_run(write_run(tmp_path, scores, tasks=THREE)), tmp_path / "results")
    assert path == tmp_path / "results" / "embedded" / "gainlora-inflora-smollm2-135m-42.json"
    rows = [line.strip() for line in path.read_text().splitlines()[7:10]]
    assert rows == ["[84.1235, null, null],", "[81.0, 88.0, null],", "[66.6667, 87.0, 71.0]"]
    assert read_result_file(path).R[2] == [66.6667, 87.0, 71.0]


def test_a_result_file_is_replaced_by_its_own_run_alone(tmp_path):
    plain, other_code = (read_run(write_run(tmp_path, R, tasks=THREE, code=code)) for code in ("c0de", "beef"))
    ablated = read_run(write_run(tmp_path, R, tasks=THREE, options={"gate.constrain_update": False}))
    out = tmp_path / "results"
    path = export(plain, out)
    assert export(plain, out) == path
    with pytest.raises(GainLoRAError, match=r"gate\.constrain_update: True there, False here.*--label"):
        export(ablated, out)
    with pytest.raises(GainLoRAError, match=f"holds another run with the same options .{plain.run_id}.*--label"):
        export(other_code, out)
    assert read_result_file(path) == plain
    labelled = export(ablated, out, "no-update")
    assert labelled.name == "gainlora-inflora+no-update-smollm2-135m-42.json"
    assert read_result_file(labelled).method == "gainlora-inflora+no-update"


@pytest.mark.parametrize("key", ["run_id", "order", "method", "tasks"])
@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", ".hidden", "", "a\x1b[31mb"])
def test_a_foreign_file_writes_nowhere_else(tmp_path, key, name):
    """Names in it become parts of the report's paths."""
    path = tmp_path / "in" / "x.json"
    write_result_file(read_run(write_run(tmp_path, R, tasks=THREE)), path)
    content = json.loads(path.read_text())
    data = {**content["data"], name: content["data"][THREE[0]]}
    edit(path, data=data, **{key: [name, *THREE[1:]] if key == "tasks" else name})
    with pytest.raises(GainLoRAError, match=r"would lead out of its folder|not a result file"):
        read_result_file(path)
