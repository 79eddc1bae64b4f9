"""The champion moves to a better run and back, in a real registry."""

import json

import pytest

from gainlora.__main__ import main
from gainlora.sections import PromoteConfig
from gainlora.tracking.promotion import promote
from gainlora.tracking.store import tracking_uri
from tests.integration.test_serving import recorded
from tests.runs import project

pytestmark = pytest.mark.slow
ANY = PromoteConfig(max_forgetting=None, min_gain=None, max_general_loss=None)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return project(tmp_path_factory.mktemp("project"))


def test_rollback_leads_back_step_by_step(root, monkeypatch, capsys):
    """Three runs in the order of their AP: each replaces the one before. MLflow prints nothing meanwhile."""
    from mlflow import MlflowClient

    runs = [recorded(root, seed=seed) for seed in (1, 2, 3)]
    worst, middle, best = sorted(runs, key=lambda folder: json.loads((folder / "result.json").read_text())["AP"])
    uri = tracking_uri(root)
    client = MlflowClient(tracking_uri=uri)

    def champion():
        version = client.get_model_version_by_alias("gainlora-tiny", "champion")
        return version.tags["gainlora.key"]

    for folder in (worst, middle, best):
        assert promote(folder, uri, ANY).promoted and champion() == folder.name
    assert "mlflow" not in capsys.readouterr().err
    monkeypatch.chdir(root)
    assert main(["rollback", "tiny"]) == 0
    assert capsys.readouterr().out == "champion of tiny: version 2 (it was version 3)\n" and champion() == middle.name
    assert main(["rollback", "tiny"]) == 0 and champion() == worst.name
    assert main(["rollback", "tiny"]) == 1 and champion() == worst.name
    assert "version 1 was the first champion, so there is none to go back to" in capsys.readouterr().err

    stays = promote(best, uri, ANY)  # a run that is started again when nothing is left to learn
    assert (stays.promoted, stays.reason) == (False, "stays: `gainlora rollback` took version 3 back")
    assert champion() == worst.name and len(client.search_model_versions("name = 'gainlora-tiny'")) == 3


def test_a_forget_that_was_stopped_while_it_is_recorded_takes_no_second_task(root, monkeypatch, capsys):
    """The run is the champion: rollback still leads to the version that it had replaced."""
    from mlflow import MlflowClient

    better, uri = recorded(root, seed=4), tracking_uri(root)
    client = MlflowClient(tracking_uri=uri)
    before = client.get_model_version_by_alias("gainlora-tiny", "champion").version
    monkeypatch.chdir(root)
    assert main(["promote", better.name, "--reason", "a test"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("gainlora.tracking.mlflow.record_run", interrupt)
        assert main(["forget", better.name, "--last"]) == 130
    assert main(["forget", better.name, "--last"]) == 0
    said = capsys.readouterr().out
    assert "forgot task3; now runs/tiny-" in said and "the run without task3" in said
    champion = client.get_model_version_by_alias("gainlora-tiny", "champion")
    shorter = root / "runs" / champion.tags["gainlora.key"]
    assert json.loads((shorter / "result.json").read_text())["tasks"] == ["task1", "task2"] and not better.exists()
    assert main(["rollback", "tiny"]) == 0
    assert client.get_model_version_by_alias("gainlora-tiny", "champion").version == before


def interrupt(*_):
    raise KeyboardInterrupt


def test_rollback_without_a_champion_says_where_one_comes_from(tmp_path, monkeypatch, capsys):
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["rollback", "tiny"]) == 1
    assert "gainlora-tiny: has no champion in MLflow's registry; a finished `gainlora run`" in capsys.readouterr().err
