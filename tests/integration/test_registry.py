"""The champion moves to a better run and back, in a real registry."""

import json

import pytest

from gainlora.__main__ import main
from gainlora.learning.stream import Stream
from gainlora.tracking.promotion import promote
from gainlora.tracking.registry import register
from gainlora.tracking.store import tracking_uri
from tests.integration.test_serving import recorded
from tests.unit.test_stream import project

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return project(tmp_path_factory.mktemp("project"))


def test_rollback_leads_back_step_by_step(root, monkeypatch, capsys):
    """Three runs in the order of their AP: each replaces the one before."""
    from mlflow import MlflowClient

    runs = [recorded(root, seed=seed) for seed in (1, 2, 3)]
    worst, middle, best = sorted(runs, key=lambda folder: json.loads((folder / "result.json").read_text())["AP"])
    uri = tracking_uri(root)
    client = MlflowClient(tracking_uri=uri)

    def champion():
        version = client.get_model_version_by_alias("gainlora-tiny", "champion")
        return version.tags["gainlora.key"]

    for folder in (worst, middle, best):
        assert promote(folder, uri, None).promoted and champion() == folder.name
    monkeypatch.chdir(root)
    assert main(["rollback", "tiny"]) == 0
    assert capsys.readouterr().out == "champion of tiny: version 2 (it was version 3)\n" and champion() == middle.name
    assert main(["rollback", "tiny"]) == 0 and champion() == worst.name
    assert main(["rollback", "tiny"]) == 1 and champion() == worst.name
    assert "version 1 was the first champion, so there is none to go back to" in capsys.readouterr().err

    stays = promote(best, uri, None)  # a run that is started again when nothing is left to learn
    assert (stays.promoted, stays.reason) == (False, "stays: `gainlora rollback` took version 3 back")
    assert champion() == worst.name and len(client.search_model_versions("name = 'gainlora-tiny'")) == 3


def test_a_forget_that_was_stopped_while_it_is_recorded_takes_no_second_task(root, monkeypatch, capsys):
    """The run is the champion: rollback still leads to the version that it had replaced."""
    from mlflow import MlflowClient

    better, uri = recorded(root, seed=4), tracking_uri(root)
    client = MlflowClient(tracking_uri=uri)
    champion = client.get_model_version_by_alias("gainlora-tiny", "champion").version
    version = str(register(better, uri))
    client.set_model_version_tag("gainlora-tiny", version, "gainlora.replaced", champion)
    client.set_registered_model_alias("gainlora-tiny", "champion", version)
    monkeypatch.chdir(root)
    with monkeypatch.context() as patch:
        patch.setattr("gainlora.tracking.mlflow.record_run", interrupt)
        assert main(["forget", str(better), "--last"]) == 130
    Stream.close_all()
    assert main(["forget", str(better), "--last"]) == 0
    assert f"{better}: forgot task3\nchampion of its order: version 5" in capsys.readouterr().out
    assert json.loads((better / "result.json").read_text())["tasks"] == ["task1", "task2"]
    assert client.get_model_version_by_alias("gainlora-tiny", "champion").version == 5
    assert main(["rollback", "tiny"]) == 0
    assert client.get_model_version_by_alias("gainlora-tiny", "champion").version == champion


def interrupt(*_):
    raise KeyboardInterrupt


def test_rollback_without_a_champion_says_where_one_comes_from(tmp_path, monkeypatch, capsys):
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["rollback", "tiny"]) == 1
    assert "gainlora-tiny: has no champion in MLflow's registry; a finished `gainlora run`" in capsys.readouterr().err
