"""A finished run learns one more task as if it had been there from the start, and forgets it without a trace."""

import json
import shutil

import pytest

from gainlora.errors import GainLoRAError, RunLocked
from gainlora.io import link_folder
from gainlora.model.adapter_io import find_adapter
from gainlora.runs import lineage
from gainlora.runs.grow import extended, shortened
from gainlora.runs.rerun import rerun
from gainlora.runs.run import Run
from tests.dying import killed_at
from tests.runs import create, flip, learn, project, state, tensors

TWO = {"order__tasks": ["task1", "task2"]}


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def add(name, source):
    with Run.open(name) as run, extended(run, source) as longer:
        longer.learn()
    return longer


def forget(name):
    with Run.open(name) as run, shortened(run) as shorter:
        return shorter


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A project with a finished run of two tasks, whose order's third task lies elsewhere; and that run's folder."""
    root = project(tmp_path_factory.mktemp("two"))
    run = learn(root, **TWO)
    shutil.move(root / "data" / "tiny" / "task3", root / "task3")
    return root, run.folder


@pytest.fixture
def two(base, tmp_path):
    """The run's folder in a project without the order's data; and the third task."""
    root, folder = base
    shutil.copytree(root / "runs", tmp_path / "elsewhere" / "runs")
    return tmp_path / "elsewhere" / "runs" / folder.name, shutil.copytree(root / "task3", tmp_path / "task3")


@pytest.mark.parametrize("method", ["gainlora-inflora", "gainlora-olora", "ewc"])
def test_a_task_added_later_is_as_if_it_had_been_there_from_the_start(tmp_path, method):
    """From a copy of the run's folder alone."""
    whole = learn(project(tmp_path / "whole"), method=method, subspace__horizon=2)
    root = project(tmp_path / "grown")
    two = learn(root, method=method, model__name=str(tmp_path / "whole" / "base"), **TWO)
    before = content(two.folder)
    moved = shutil.copytree(root / "runs", tmp_path / "other" / "runs") / two.folder.name
    shutil.move(root / "data" / "tiny" / "task3", tmp_path / "task3")
    shutil.rmtree(root)
    longer = add(moved, tmp_path / "task3")

    assert longer.ids == whole.ids and longer.folder.name == whole.folder.name and state(longer) == state(whole)
    results = [json.loads((run.folder / "result.json").read_text()) for run in (longer, whole)]
    assert results[0] | {"model": ""} == results[1] | {"model": ""}
    for t in (1, 2, 3):
        for name in [f"predictions/task{i}.jsonl" for i in range(1, t + 1)]:
            assert (longer.task_folder(t) / name).read_bytes() == (whole.task_folder(t) / name).read_bytes()
    assert longer.described["learned"][0]["task"] == "task3" and content(moved) == before
    assert (moved / "task_01_task1" / "scores.json").samefile(longer.task_folder(1) / "scores.json")


def test_learn_then_forget_returns_to_the_same_bits_and_ids(two):
    folder, source = two
    before = content(folder)
    longer = add(folder, source)
    after, root = state(longer), folder.parent.parent
    assert lineage.resolve(folder.name, root) == longer.folder
    shorter = forget(longer.folder)
    assert shorter.folder == folder and content(folder) == before and not longer.folder.exists()
    assert lineage.resolve(folder.name, root) == folder and lineage.resolve("latest", root) == folder
    assert state(add(folder, source)) == after
    assert content(folder) == before


def test_a_task_of_the_order_itself_is_forgotten_and_learned_again(tmp_path):
    root = project(tmp_path)
    three = learn(root)
    before = state(three)
    two = forget(three.folder)
    assert two.ids == three.ids[:2] and two.horizon == 3 and state(two) == before[:2] and not three.folder.exists()
    assert json.loads((two.folder / "result.json").read_text())["tasks"] == ["task1", "task2"]
    one = forget(two.folder)
    with Run.open(one.folder) as run, pytest.raises(GainLoRAError, match="knows one task"):
        shortened(run)
    again = learn(root)
    assert again.folder == three.folder and state(again) == before
    assert any("step 1 is" in notice or "steps 1 to 1" in notice for notice in again.notices)


def test_a_forgotten_task_that_another_run_uses_stays_there(two):
    folder, source = two
    longer = add(folder, source)
    other = shutil.copytree(source, source.parent / "task4")
    longest = add(longer.folder, other)
    kept = content(longest.folder)
    assert forget(longer.folder).folder == folder
    assert not longer.folder.exists() and content(longest.folder) == kept
    assert (longest.folder / "data" / "task3" / "train.json").is_file()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A project with a run whose order had three tasks from the start."""
    root = project(tmp_path_factory.mktemp("three"))
    return root, learn(root)


@pytest.mark.parametrize("point", ["io:rename", "runs.lineage:move", "runs.lineage:move!", "io:remove!"])
def test_a_forget_that_was_killed_takes_the_same_task_and_no_other(three, tmp_path, point):
    root, run = three
    copied = shutil.copytree(root / "runs", tmp_path / "runs").parent
    name = run.folder.name  # of the lineage, too
    killed_at(f"gainlora.{point}", 1, forget, copied / "runs" / name)
    with Run.open(name, copied) as again, shortened(again) as shorter:
        assert shorter.tasks == ["task1", "task2"] and state(shorter) == state(run)[:2]
    assert not (copied / "runs" / name).exists() and lineage.resolve(name, copied) == shorter.folder
    assert json.loads((shorter.folder / "result.json").read_text())["tasks"] == ["task1", "task2"]
    assert not list((copied / "runs").glob(".*.removed"))


@pytest.mark.parametrize("stop", ["begin", "train", "evaluate"])
def test_a_stopped_addition_goes_on_or_is_dropped(two, stop):
    folder, source = two
    before = content(folder)
    with Run.open(folder) as run, extended(run, source) as longer:
        getattr(longer, stop)(3)
        with pytest.raises(RunLocked):  # nobody else adds a task meanwhile
            Run.open(folder)
    assert lineage.head(folder.name, folder.parent.parent) == folder.name and content(folder) == before
    assert find_adapter(folder).name == "task_02_task2"
    for name in (folder, longer.folder):  # the latter is what `latest` names by then
        with Run.open(name) as run, extended(run, source) as again:
            assert again.folder == longer.folder
    assert forget(longer.folder).folder == folder and not longer.folder.exists()
    assert add(folder, source).finished == 3 and content(folder) == before


def test_what_cannot_be_added_leaves_nothing(two, monkeypatch):
    folder, source = two
    before = content(folder.parent)

    def refused(reason, source, error=GainLoRAError):
        with Run.open(folder) as run, pytest.raises(error, match=reason):
            extended(run, source)
        assert content(folder.parent) == before
        assert not list(folder.parent.glob(".taken*")) and not list(folder.parent.glob("*.new"))

    refused(r"nowhere/train\.json: not found", source.parent / "nowhere")
    refused(r"nowhere\.json: not found", source.parent / "nowhere.json")
    refused(r"'task1' is known to", shutil.copytree(source, source.parent / "task1"))
    refused(r"'a b' cannot name", shutil.copytree(source, source.parent / "a b"))
    lone = shutil.copytree(source, source.parent / "lone")
    (lone / "test.json").unlink()
    refused(r"lone/test\.json: not found; a task folder holds train\.json and test\.json", lone)
    with monkeypatch.context() as patch:
        patch.setattr("gainlora.io.write_json", lambda path, value: (_ for _ in ()).throw(OSError("No space left")))
        refused("No space", source, OSError)


def test_only_a_finished_sequence_gains_or_loses_a_task(tmp_path):
    root = project(tmp_path)
    with create(root) as run:
        run.seal(1)
        for change in (lambda: extended(run, root / "data" / "tiny" / "task3"), lambda: shortened(run)):
            with pytest.raises(GainLoRAError, match="1 of 3 tasks are learned; finish the run first"):
                change()
    with create(root, method="multitask") as at_once, pytest.raises(GainLoRAError, match="learns all tasks at once"):
        extended(at_once, root / "data" / "tiny" / "task3")


def test_the_same_task_again_is_there_already_and_another_of_its_name_is_refused(two, base):
    folder, source = two
    longer = add(folder, source)
    with Run.open(longer.folder) as run:
        assert extended(run, source) is run
        with pytest.raises(GainLoRAError, match=r"train.epochs: 5: .* has 'task3' with .*; take it back first"):
            extended(run, source, 5)
    train = json.loads((source / "train.json").read_text())
    (source / "train.json").write_text(json.dumps({**train, "Instances": train["Instances"][:9]}))
    with Run.open(longer.folder) as run, pytest.raises(GainLoRAError, match=r"'task3' is known to .* a new name"):
        extended(run, source)
    assert add(folder, source).folder != longer.folder  # other examples: another run
    shutil.copytree(base[0] / "data", folder.parent.parent / "data")
    assert rerun(longer.folder)[1] == []  # with the run's own copy of the task


# -- finished steps are taken from other runs --------------------------------------------------------------------


def test_equal_beginnings_are_shared_in_both_directions(tmp_path):
    root = project(tmp_path)
    options = {"subspace__horizon": 3}
    alone = state(learn(project(tmp_path / "alone"), **options, **TWO))
    with create(root, **options) as three:
        three.seal(1)
        three.seal(2)
        locked = create(root, **options, **TWO)  # in progress elsewhere: nothing is taken, nothing waits
        assert locked.finished == 0
        locked.close()
        shutil.rmtree(locked.folder)
    two = learn(root, **options, **TWO)  # a longer one lends
    assert two.notices == [f"steps 1 to 2 are those of runs/{three.folder.name}"]
    assert state(two) == alone
    shutil.rmtree(three.folder)
    again = learn(root, **options)  # a shorter one lends
    assert again.notices == [f"steps 1 to 2 are those of runs/{two.folder.name}"]
    assert state(again) == state(learn(project(tmp_path / "whole"), **options))
    other = learn(root, **options, order__tasks=["task1", "task3"])
    assert other.ids[0] == two.ids[0] and other.ids[1] != two.ids[1]
    assert other.task_folder(1).joinpath("gate.safetensors").samefile(two.task_folder(1) / "gate.safetensors")


def test_where_H_matters_a_longer_order_shares_nothing_and_says_so(tmp_path):
    root = project(tmp_path)
    two = learn(root, **TWO)
    with create(root) as three:
        assert three.finished == 0
        (notice,) = three.notices
    assert "learned the first 2 of these tasks with H = 2" in notice and "set subspace.horizon to 2" in notice
    learn(root, method="olora", **TWO)
    with create(root, method="olora") as without_memory:
        assert without_memory.finished == 2
    with create(root, subspace__horizon=2) as with_it:
        assert with_it.finished == 2 and with_it.ids[:2] == two.ids


def test_all_tasks_at_once_are_never_shared(tmp_path):
    root = project(tmp_path)
    learn(root, method="multitask")
    with create(root, method="multitask", order__name="other") as other:
        assert other.finished == 0 and not other.notices


def test_a_lender_gives_what_is_whole_and_the_same(tmp_path):
    root = project(tmp_path)
    three = learn(root, subspace__horizon=3)
    flip(three.task_folder(2) / "predictions" / "task1.jsonl")
    with create(root, subspace__horizon=3, **TWO) as two:
        assert two.finished == 1
    flip(three.task_folder(2) / "predictions" / "task1.jsonl")
    file = root / "data" / "tiny" / "task2" / "train.json"
    file.write_text(file.read_text().replace("w16", "w17"))
    with create(root, subspace__horizon=3) as other:  # other examples under the same name
        assert other.finished == 1


def test_a_copy_where_links_are_impossible(tmp_path, monkeypatch):
    """Another device."""
    source = learn(project(tmp_path)).task_folder(1)

    def no_link(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", no_link)
    link_folder(source, tmp_path / "task_01_task1")
    assert tensors(tmp_path / "task_01_task1") == tensors(source)
    assert not (tmp_path / "task_01_task1" / "scores.json").samefile(source / "scores.json")


def test_a_run_is_found_by_folder_name_beginning_lineage_and_latest(two):
    folder, source = two
    root = folder.parent.parent
    longer = add(folder, source)
    found = {"latest": longer, folder.name: longer, longer.folder.name: longer, longer.folder.name[:-1]: longer}
    for name, run in found.items():
        assert lineage.resolve(name, root) == run.folder
    assert lineage.resolve(folder, root) == folder
    rerun_of_it = shutil.copytree(folder, folder.with_name(f"{folder.name}{lineage.RERUN}"))
    another = shutil.copytree(folder, folder.with_name("another"))
    for newer in (another, rerun_of_it):
        (newer / "config.json").touch()
    assert lineage.resolve("latest", root) == another
    shorter = forget(longer.folder)
    assert lineage.resolve("latest", root) == shorter.folder == folder
    with pytest.raises(GainLoRAError, match="begins the names of 2 runs"):
        lineage.resolve("tiny-", root)
    with pytest.raises(GainLoRAError, match="nothing: no such run"):
        lineage.resolve("nothing", root)
