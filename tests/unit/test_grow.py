"""A finished run learns one more task as if it had been there from the start, and forgets it without a trace."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gainlora.__main__ import main
from gainlora.errors import GainLoRAError
from gainlora.learning import grow
from gainlora.learning.repair import repair
from gainlora.learning.rerun import rerun
from gainlora.learning.run_folder import make_run
from gainlora.learning.stream import Stream
from gainlora.model.files import find_adapter
from gainlora.params import load_config
from tests.unit.test_stream import learn, project

STATE = ("adapter_model.safetensors", "gate.safetensors", "subspace.safetensors", "rule.safetensors")
LEARN = (
    "import sys; from pathlib import Path; from gainlora.learning import grow\n"
    "stream = grow.begin(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    "stream.finish(len(stream.steps)); grow.settle(stream)"
)


def as_another_process():
    Stream.close_all()


def shorter(root: Path, **overrides) -> Path:
    """A finished run of the order's first two tasks; the third is not in its data. The run's folder."""
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["orders"]["tiny"]["tasks"] = ["task1", "task2"]
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    shutil.move(root / "data" / "tiny" / "task3", root / "task3")
    stream = learn(root, **overrides)
    stream.result()
    as_another_process()
    return stream.folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def add(folder: Path, source: Path) -> Stream:
    stream = grow.begin(folder, source)
    for t in range(1, len(stream.steps) + 1):
        stream.finish(t)
    grow.settle(stream)
    return stream


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a run of two tasks."""
    return shorter(project(tmp_path_factory.mktemp("two")))


@pytest.fixture
def copied(two, tmp_path):
    """Such a run where nothing else of its project is but the base model; and the third task."""
    as_another_process()
    folder = shutil.copytree(two, tmp_path / "elsewhere" / "runs" / two.name)
    return folder, shutil.copytree(two.parent.parent / "task3", tmp_path / "task3")


@pytest.mark.parametrize("method", ["gainlora-inflora", "gainlora-olora", "ewc"])
def test_a_task_added_later_is_as_if_it_had_been_there_from_the_start(tmp_path, method):
    """From a copy of the run's folder alone; once in another process."""
    whole = learn(project(tmp_path / "whole"), method=method, subspace__horizon=2)
    expected = whole.result()
    root = project(tmp_path / "grown")
    folder = shorter(root, method=method, model__name=str(tmp_path / "whole" / "base"))
    assert json.loads((folder / "config.json").read_text())["config"]["subspace"]["horizon"] is None
    moved = shutil.copytree(folder, tmp_path / "other" / "runs" / folder.name)
    shutil.move(root / "task3", tmp_path / "task3")
    shutil.rmtree(root)
    if method == "gainlora-inflora":
        environment = {"PATH": "/usr/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
        subprocess.run([sys.executable, "-c", LEARN, moved, tmp_path / "task3"], env=environment, check=True)
    else:
        add(moved, tmp_path / "task3")

    assert {k: v for k, v in json.loads((moved / "result.json").read_text()).items() if k != "model"} == {
        k: v for k, v in expected.items() if k != "model"
    }
    for t in (1, 2, 3):
        mine, theirs = moved / whole.task_folder(t).name, whole.task_folder(t)
        for name in STATE:
            assert (mine / name).exists() == (theirs / name).exists()
            if (mine / name).exists():
                assert (mine / name).read_bytes() == (theirs / name).read_bytes()
        for name in [f"predictions/task{i}.jsonl" for i in range(1, t + 1)]:
            assert (mine / name).read_bytes() == (theirs / name).read_bytes()
    described = json.loads((moved / "config.json").read_text())
    assert described["config"]["order"]["tasks"] == described["tasks"] == ["task1", "task2", "task3"]
    assert described["run_id"] == folder.name
    (entry,) = described["learned"]
    assert entry["task"] == "task3" and entry["code"] == described["code"] and entry["horizon"] is None


def test_forgetting_leaves_no_trace_and_learning_again_gives_the_same_bits(copied):
    folder, source = copied
    before = content(folder)
    first = add(folder, source)
    after = content(first.task_folder(3))
    assert grow.forget(folder) == "task3"
    assert content(folder) == before
    again = add(folder, source)
    for name in STATE:
        assert after.get(name) == content(again.task_folder(3)).get(name)
    assert grow.forget(folder) == "task3" and content(folder) == before


def test_a_task_of_the_order_itself_can_be_forgotten_and_learned_again(tmp_path):
    root = project(tmp_path)
    stream = learn(root)
    stream.result()
    whole = content(stream.folder)
    assert grow.forget(stream.folder) == "task3"
    assert [p.name for p in sorted(stream.folder.glob("task_*"))] == ["task_01_task1", "task_02_task2"]
    assert stream.horizon == 3 and len(stream.result()["R"]) == 2
    with pytest.raises(GainLoRAError, match="has learned or forgotten tasks since it was made, it knows task1, task2;"):
        Stream.create(load_config("tiny", root / "params.yaml"), root)
    again = content(add(stream.folder, root / "data" / "tiny" / "task3").folder)
    for name in (*STATE[:3], "predictions/task1.jsonl", "predictions/task3.jsonl"):
        assert again[f"task_03_task3/{name}"] == whole[f"task_03_task3/{name}"]
    assert grow.forget(stream.folder) == "task3" and grow.forget(stream.folder) == "task2"
    with pytest.raises(GainLoRAError, match="knows one task"):
        grow.forget(stream.folder)


@pytest.mark.parametrize("stop", ["begin", "train", "finish"])
def test_a_stopped_addition_goes_on_or_is_dropped(copied, stop):
    folder, source = copied
    before = content(folder)
    stream = grow.begin(folder, source)
    if stop != "begin":
        getattr(stream, stop)(3)
    as_another_process()
    del stream
    assert find_adapter(folder).name == "task_02_task2"  # all that a reader sees is as it was
    assert before.items() - {("data.json", before["data.json"])} <= content(folder).items()
    with pytest.raises(GainLoRAError, match=r"is learning 'task3'; give that one again to finish it, or drop it first"):
        grow.begin(folder, folder.parent)
    stream = grow.begin(folder, source)
    stream.finish(3)
    assert len(grow.settle(stream)["tasks"]) == 3 and not (folder / "next.json").exists()
    assert grow.forget(folder) == "task3"
    if stop == "train":
        stream = grow.begin(folder, source)
        stream.train(3)
        grow.forget(folder)
    assert content(folder) == before


@pytest.mark.parametrize("stop", ["before", "next.json", "pruned", "recorded"])
def test_a_stopped_forget_takes_the_same_task_again_and_no_other(copied, monkeypatch, stop):
    folder, source = copied
    before = content(folder)
    add(folder, source)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        place = {"before": "_shortened", "next.json": "_finish_forgetting", "pruned": "_prune"}.get(stop)
        if place:
            patch.setattr(grow, place, interrupt)
        grow.forget(folder, interrupt)
    as_another_process()
    with pytest.raises(GainLoRAError, match=r"is forgetting 'task3'; finish that: gainlora forget .* --last"):
        grow.begin(folder, source)
    as_another_process()
    recorded = []
    assert grow.forget(folder, lambda: recorded.append(content(folder))) == "task3"
    assert len(recorded) == 1 and recorded[0].pop("forgetting.json") and recorded[0] == before == content(folder)
    assert grow.newest(folder)[0] == "task2"


def test_a_failed_addition_leaves_the_run_as_it_was(copied, monkeypatch):
    folder, source = copied
    before = content(folder)

    def refused(reason, source=source):
        as_another_process()
        with pytest.raises(GainLoRAError, match=reason):
            grow.begin(folder, source)
        assert content(folder) == before

    refused(r"nowhere/train\.json: not found", source.parent / "nowhere")
    refused(r"nowhere\.json: not found", source.parent / "nowhere.json")
    refused(r"'task1': was learned by", shutil.copytree(source, source.parent / "task1"))
    refused(r"'a b' is no name", shutil.copytree(source, source.parent / "a b"))
    lone = shutil.copytree(source, source.parent / "lone")
    (lone / "test.json").unlink()
    refused(r"lone/test\.json: not found; a task folder holds train\.json and test\.json", lone)
    with monkeypatch.context() as patch:
        patch.setattr(grow, "write_json", lambda path, value: (_ for _ in ()).throw(OSError("No space left")))
        as_another_process()
        with pytest.raises(OSError, match="No space"):
            grow.begin(folder, source)
        assert content(folder) == before
    for file in folder.glob("task_*/test/*.json"):  # as in runs of earlier versions
        file.unlink()
        sums = file.parent.parent / "checksums.json"
        kept = {k: v for k, v in json.loads(sums.read_text()).items() if not k.startswith("test/")}
        sums.write_text(json.dumps(kept))
    before = content(folder)
    refused(r"orders\.tiny\.data: data/tiny: no such folder; put one folder per task there")


def test_no_free_direction_left(tmp_path):
    """The error that says so comes from the first step, which has written nothing into the run that a reader sees."""
    folder = shorter(project(tmp_path), lora__rank=4, subspace__threshold=0.9999)
    before = content(folder)
    stream = grow.begin(folder, tmp_path / "task3")
    with pytest.raises(GainLoRAError, match=r"lora\.rank: 4 is more than the \d+ input directions that old"):
        stream.prepare(3)
    grow.drop(stream)
    assert content(folder) == before


def test_only_a_finished_sequence_grows(tmp_path):
    root = project(tmp_path)
    stream = Stream.create(load_config("tiny", root / "params.yaml"), root)
    stream.finish(1)
    with pytest.raises(GainLoRAError, match="1 of 3 tasks are learned; finish the run first"):
        grow.begin(stream.folder, root / "data" / "tiny" / "task3")
    with pytest.raises(GainLoRAError, match="1 of 3 tasks are learned"):
        grow.forget(stream.folder)
    at_once = Stream.create(load_config("tiny", root / "params.yaml", {"method": "multitask"}), root)
    with pytest.raises(GainLoRAError, match="learns all tasks at once"):
        grow.begin(at_once.folder, root / "data" / "tiny" / "task3")


def test_the_same_task_again_is_there_already_and_mends_what_was_repaired(copied, two):
    folder, source = copied
    add(folder, source)
    whole = content(folder)
    add(folder, source)
    assert content(folder) == whole
    as_another_process()
    assert repair(folder, 2) == (1, ["task_02_task2", "task_03_task3"])
    shutil.copytree(two.parent.parent / "data", folder.parent.parent / "data")
    again = content(add(folder, folder / "data" / "task3").folder)
    for t in (2, 3):
        for name in STATE[:3]:
            assert again[f"task_0{t}_task{t}/{name}"] == whole[f"task_0{t}_task{t}/{name}"]
    instances = json.loads((source / "train.json").read_text())["Instances"][:9]
    (source / "train.json").write_text(json.dumps({"Instances": instances, "Definition": "Sort task 3"}))
    with pytest.raises(GainLoRAError, match="knows another task 'task3'; give it a new name"):
        grow.begin(folder, source)


def test_a_shorter_run_goes_on_by_itself_after_repair(two, tmp_path):
    """No order of params.yaml describes it any more."""
    root = shutil.copytree(two.parent.parent, tmp_path / "all")
    folder = root / "runs" / two.name
    as_another_process()
    kept = content(folder / "task_01_task1")
    assert grow.forget(folder) == "task2"
    as_another_process()
    assert repair(folder, 1) == (0, ["task_01_task1"])
    with pytest.raises(GainLoRAError, match=rf"0 of 1 tasks are learned; .* first: gainlora learn {folder}$"):
        grow.forget(folder)
    stream = grow.begin(folder, None)
    stream.finish(1)
    assert grow.settle(stream)["tasks"] == ["task1"]
    again = content(folder / "task_01_task1")
    assert {name: again[name] for name in STATE[:3]} == {name: kept[name] for name in STATE[:3]}


@pytest.mark.parametrize("at", ["written", "recorded"])
def test_a_stopped_forget_of_a_damaged_run_is_undone_by_repair(two, tmp_path, at):
    root = shutil.copytree(two.parent.parent, tmp_path / "all")
    folder = root / "runs" / two.name
    as_another_process()
    if at == "written":
        (folder / grow.FORGETTING).write_text(json.dumps({"task": "task2", "folder": "task_02_task2"}))
    else:
        with pytest.raises(ZeroDivisionError):
            grow.forget(folder, lambda: 1 // 0)
    as_another_process()
    state = folder / "task_01_task1" / "gate.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"!")
    assert repair(folder)[0] == 0
    stream = grow.begin(folder, None)
    for t in range(1, len(stream.steps) + 1):
        stream.finish(t)
    assert grow.settle(stream)["tasks"] == (["task1", "task2"] if at == "written" else ["task1"])
    assert not (folder / grow.FORGETTING).exists()


def test_another_task_of_the_same_name_is_not_the_orders(two, tmp_path):
    """The order's task forgotten, and one with other examples learned under its name."""
    root = shutil.copytree(two.parent.parent, tmp_path / "all")
    folder, source = root / "runs" / two.name, root / "mine" / "task2"
    shutil.copytree(root / "data" / "tiny" / "task2", source)
    as_another_process()
    config = load_config("tiny", root / "params.yaml")
    grow.forget(folder)
    add(folder, source)
    assert make_run(config, root) == folder
    grow.forget(folder)
    train = json.loads((source / "train.json").read_text())
    (source / "train.json").write_text(json.dumps({**train, "Instances": train["Instances"][:12]}))
    add(folder, source)
    with pytest.raises(GainLoRAError, match="has learned or forgotten tasks since it was made, it knows task1, task2;"):
        make_run(config, root)


def test_commands(copied, capsys):
    folder, _ = copied
    assert main(["learn", str(folder.parent), "--task", "x"]) == 1
    assert "config.json: not found; name a folder under runs/" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["forget", str(folder)])
    assert "--last" in capsys.readouterr().err


def test_a_grown_run_is_learned_again_from_its_description(copied, two):
    folder, source = copied
    add(folder, source)
    as_another_process()
    root = folder.parent.parent
    shutil.copytree(two.parent.parent / "data", root / "data")
    again, otherwise = rerun(folder)
    assert otherwise == [] and (again / "data" / "task3" / "train.json").exists()


def test_one_file_is_split_by_its_inputs(copied):
    folder, source = copied
    instances = json.loads((source / "train.json").read_text())["Instances"]
    file = source.parent / "mine.json"
    file.write_text(json.dumps({"Definition": "Sort", "Instances": [*instances, *instances]}))
    stream = grow.begin(folder, file)
    parts = [json.loads((folder / "data" / "mine" / f"{n}.json").read_text()) for n in ("train", "test")]
    asked, trained = ({i["input"] for i in part["Instances"]} for part in parts[::-1])
    different = len({i["input"] for i in instances})
    assert len(asked) == different // 5 and len(trained) == different - len(asked) and not asked & trained
    assert sum(len(part["Instances"]) for part in parts) == 2 * len(instances)
    assert {part["Definition"] for part in parts} == {"Sort"}
    held_out = content(folder / "data")
    grow.drop(stream)
    grow.begin(folder, file)
    assert content(folder / "data") == held_out
    file.write_text(json.dumps({"Instances": instances[:4] * 3}))
    with pytest.raises(GainLoRAError, match=r"has 4 different inputs, too few to hold one in 5"):
        grow.begin(folder, file)
    assert grow.forget(folder) == "mine"
