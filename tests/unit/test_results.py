"""Result files: written from run folders, read back, never overwritten by something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gainlora.__main__ import main
from gainlora.errors import GainLoRAError
from gainlora.tracking.folder import example_coefficients, read_run, read_step
from gainlora.tracking.results import export, read_any, read_result_file, write_result_file
from tests.fake_run import TASKS, stored, write_run

R = [[84.0], [81.0, 88.0], [82.0, 87.0, 71.0]]
THREE = TASKS[:3]


@pytest.mark.parametrize(
    ("method", "scores", "at_once"),
    [("gainlora-inflora", R, False), ("seqlora", R, False), ("multitask", [R[2]], True), ("inclora", [[55.0]], False)],
)
def test_a_run_comes_back_whole(tmp_path: Path, method: str, scores: list[list[float]], at_once: bool) -> None:
    folder = write_run(tmp_path, scores, method, tasks=THREE[: len(scores[-1])], at_once=at_once)
    run = read_run(folder)
    write_result_file(run, tmp_path / "x.json")
    again = read_result_file(tmp_path / "x.json")
    assert again == run == read_any(tmp_path / "x.json") == read_any(folder)
    assert (again.R, again.result, again.at_once) == (run.R, run.result, at_once)
    assert again.folder is None and example_coefficients(again.steps[-1]) == {}


def test_folders_without_step_names_have_one_per_task(tmp_path: Path) -> None:
    folder = write_run(tmp_path, R, tasks=THREE)
    described = json.loads((folder / "config.json").read_text())
    del described["steps"]
    (folder / "config.json").write_text(json.dumps(described))
    assert read_run(folder).config["steps"] == list(THREE)


def test_stored_parameters_are_counted_from_the_files(tmp_path: Path) -> None:
    gated, equal = (read_run(write_run(tmp_path, R, method, tasks=THREE)) for method in ("gainlora-inclora", "inclora"))
    assert [step.stored for step in gated.steps] == [stored(t, gated=True) for t in (1, 2, 3)]
    assert equal.steps[0].stored == {"adapter": 600, "subspace": 12}
    assert equal.steps[0].folder is not None
    subspace = equal.steps[0].folder / "subspace.safetensors"
    (equal.steps[0].folder / "rule.safetensors").write_bytes(subspace.read_bytes())
    assert read_step(equal.steps[0].folder).stored["rule"] == 12


def test_a_result_file_begins_with_the_result_a_row_of_R_per_line(tmp_path: Path) -> None:
    scores = [[84.123456], [81.0, 88.0], [200 / 3, 87.0, 71.0]]
    folder = write_run(tmp_path, scores, tasks=THREE)
    path = export(read_run(folder), tmp_path / "results")
    assert path == tmp_path / "results" / "embedded" / "gainlora-inflora-smollm2-135m-42.json"
    lines = path.read_text().splitlines()
    assert [line.strip() for line in lines[7:10]] == [
        "[84.1235, null, null],", "[81.0, 88.0, null],", "[66.6667, 87.0, 71.0]"
    ]  # fmt: skip
    keys = list(json.loads(path.read_text()))
    assert keys[:10] == ["order", "method", "model", "seed", "tasks", "R", "AP", "FT", "BWT", "label"]
    assert {"config", "dtype", "device", "code", "versions", "skipped", "data", "steps"} <= {*keys}


def test_labels_keep_variants_apart(tmp_path: Path) -> None:
    plain = read_run(write_run(tmp_path, R, tasks=THREE))
    ablated = read_run(write_run(tmp_path, R, tasks=THREE, options={"gate.constrain_init": False}))
    out = tmp_path / "results"
    export(plain, out)
    export(plain, out)  # the same options: replaced
    with pytest.raises(GainLoRAError, match=r"gate\.constrain_init: True there, False here.*--label"):
        export(ablated, out)
    path = export(ablated, out, "no-init")
    assert path.name == "gainlora-inflora+no-init-smollm2-135m-42.json"
    assert (read_result_file(path).label, read_result_file(path).method) == ("no-init", "gainlora-inflora+no-init")
    with pytest.raises(GainLoRAError, match="--label: 'a/b'"):
        export(ablated, out, "a/b")


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GainLoRAError, match="2 of 3 tasks are learned"):
        export(read_run(write_run(tmp_path, R[:2], tasks=THREE)), tmp_path)
    for content in ("{}", "[]", "{", '{"steps": [1]}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(GainLoRAError, match=r"x\.json"):
            read_any(tmp_path / "x.json")
    with pytest.raises(GainLoRAError, match="nowhere"):
        read_any(tmp_path / "nowhere")


def test_the_command_writes_a_file_per_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run(tmp_path, R, seed=seed, tasks=THREE) for seed in (1, 2)]
    out = tmp_path / "results"
    assert main(["results", *map(str, folders), "--out", str(out), "--label", "x"]) == 0
    files = sorted(path.name for path in (out / "embedded").iterdir())
    assert files == [f"gainlora-inflora+x-smollm2-135m-{seed}.json" for seed in (1, 2)]
    assert capsys.readouterr().out.split() == [str(out / "embedded" / name) for name in files]
    assert main(["results", str(tmp_path / "nowhere"), "--out", str(out)]) == 1


def test_options_that_an_older_version_did_not_know_have_their_defaults(tmp_path: Path) -> None:
    folder = write_run(tmp_path, R, tasks=THREE)
    run = read_run(folder)
    described = json.loads((folder / "config.json").read_text())
    del described["config"]["train"]["penalty_weight"], described["config"]["evaluate"]["num_beams"]
    (folder / "config.json").write_text(json.dumps(described))
    assert read_run(folder) == run


@pytest.mark.parametrize("key", ["run_id", "order", "method", "tasks"])
@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", ".hidden", ""])
def test_a_foreign_file_writes_nowhere_else(tmp_path: Path, key: str, name: str) -> None:
    """Names in it become parts of the report's paths."""
    path = tmp_path / "in" / "x.json"
    write_result_file(read_run(write_run(tmp_path, R, tasks=THREE)), path)
    content = json.loads(path.read_text())
    content[key] = [name, *THREE[1:]] if key == "tasks" else name
    content["data"][name] = content["data"][THREE[0]]
    path.write_text(json.dumps(content))
    with pytest.raises(GainLoRAError, match="would lead out of its folder"):
        read_result_file(path)
