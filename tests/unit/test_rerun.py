"""config.json is enough to repeat a run."""

import json
import shutil

import pytest

from gainlora.__main__ import main
from gainlora.errors import GainLoRAError
from gainlora.learning import stream as stream_module
from gainlora.learning.rerun import differences, rerun
from gainlora.learning.run_folder import hold
from tests.unit.test_checkpoint import run
from tests.unit.test_stream import project


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    root = project(tmp_path_factory.mktemp("finished"))
    run(root, "gainlora-olora")
    (folder,) = root.glob("runs/tiny-*")
    return folder


def test_a_rerun_gives_every_score_and_every_tensor_again(finished, capsys):
    (finished.parent.parent / "params.yaml").write_text("orders: {}")  # the run's own description is all that counts
    assert main(["rerun", str(finished)]) == 0
    assert "the same result: every score and every tensor" in capsys.readouterr().out
    again = finished.with_name(f"{finished.name}.rerun")
    assert json.loads((again / "config.json").read_text())["run_id"] == again.name
    assert differences(finished) == []


def test_what_differs_is_said(finished, tmp_path, capsys):
    root = shutil.copytree(finished.parent.parent, tmp_path / "copy")
    folder = root / "runs" / finished.name
    shutil.rmtree(folder.with_name(f"{folder.name}.rerun"), ignore_errors=True)
    config = json.loads((folder / "config.json").read_text())
    config["versions"]["torch"] = "1.0"
    config["code"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))
    scores = json.loads((folder / "task_02_task2" / "scores.json").read_text())
    scores["scores"]["task1"] = 99.5
    (folder / "task_02_task2" / "scores.json").write_text(json.dumps(scores))
    state = folder / "task_03_task3" / "gate.safetensors"
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["rerun", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "not as it was: torch: 1.0 then" in said and "not as it was: code: 000000000000 then" in said
    assert "after task_02_task2, score on task1: 99.5000 then" in said
    assert "came out otherwise: task_03_task3/gate.safetensors: other bytes" in said
    assert said.count("came out otherwise") == 2


def test_a_rerun_needs_a_run(tmp_path, finished):
    with pytest.raises(GainLoRAError, match=r"config\.json: not found"):
        rerun(tmp_path)
    stream_module._opened.cache_clear()
    with hold(finished):  # it is only read
        assert rerun(finished)[1] == []
