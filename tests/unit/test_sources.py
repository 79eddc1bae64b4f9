"""Where data and models are found: the benchmark from a folder or its repository, model names, DVC hashes."""

import shutil
import subprocess
from pathlib import Path

import pytest

from gainlora.data import sources
from gainlora.errors import GainLoRAError


def benchmark(root):
    for task in ("SuperNI/one", "Long_Sequence/two"):
        folder = root / "CL_Benchmark" / task
        folder.mkdir(parents=True)
        for name in ("train", "test"):
            (folder / f"{name}.json").write_text('{"Instances": []}')
        folder.chmod(0o555)  # a read-only copy
    return root


@pytest.mark.parametrize("inside", [False, True])
def test_benchmark_is_copied_from_a_folder(tmp_path, inside):
    given = benchmark(tmp_path / "given")
    root = tmp_path / "project"
    for _ in range(2):
        place = sources.fetch_benchmark(given / "CL_Benchmark" if inside else given, root, progress=False)
        assert place == root / "data/CL_Benchmark"
        assert sorted(str(f.relative_to(place)) for f in place.rglob("*") if f.is_file()) == [
            f"{t}/{n}.json" for t in ("Long_Sequence/two", "SuperNI/one") for n in ("test", "train")
        ]


def test_a_failed_copy_or_a_wrong_folder_leaves_nothing(tmp_path, monkeypatch):
    root = tmp_path / "project"
    with pytest.raises(GainLoRAError, match=r"--from: .*neither SuperNI nor Long_Sequence"):
        sources.fetch_benchmark(tmp_path, root, progress=False)

    def fail(source, target):
        (target / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setattr(sources, "_copy", fail)
    with pytest.raises(OSError, match="disk full"):
        sources.fetch_benchmark(benchmark(tmp_path / "given"), root, progress=False)
    assert list((root / "data").iterdir()) == []


def revision(repository, files):
    for name, content in files.items():
        file = repository / "CL_Benchmark" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def contents(place):
    return {str(f.relative_to(place)): f.read_text() for f in place.rglob("*") if f.is_file()}


ONE, TWO = "SuperNI/one", "Long_Sequence/two"


def test_the_benchmark_is_composed_of_two_revisions(tmp_path, monkeypatch):
    """A real repository: train and dev of the correction, test of the first one; its dev, the test set, is left."""
    upstream, root = tmp_path / "upstream", tmp_path / "project"
    first = {f"{task}/{name}.json": f"old {name}" for task in (ONE, TWO) for name in ("train", "test", "labels")}
    old = revision(upstream, first | {f"{task}/dev.json": "old test" for task in (ONE, TWO)})
    revision(upstream, {f"{ONE}/train.json": "new train", f"{ONE}/dev.json": "new dev", f"{ONE}/test.json": "?"})
    (upstream / "CL_Benchmark" / TWO / "dev.json").unlink()
    new = revision(upstream, {})
    monkeypatch.setattr(sources, "BENCHMARK_URL", str(upstream))
    monkeypatch.setattr(sources, "TEST_REVISION", old)
    monkeypatch.setattr(sources, "TRAIN_REVISION", new)
    place = sources.fetch_benchmark(None, root, progress=False)
    expected = first | {f"{ONE}/train.json": "new train", f"{ONE}/dev.json": "new dev"}
    assert contents(place) == expected
    monkeypatch.setattr(sources, "BENCHMARK_URL", "/nowhere")
    assert contents(sources.fetch_benchmark(None, root, progress=False)) == expected  # there already
    assert [path.name for path in (root / ".cache").iterdir()] == ["fetch.lock"]


def test_a_copy_may_hold_new_train_and_dev_files_alone(tmp_path):
    root, given = tmp_path / "project", tmp_path / "given"
    old = {f"CL_Benchmark/{task}/{name}.json": f"old {name}" for task in (ONE, TWO) for name in ("train", "test")}
    new = {f"CL_Benchmark/{ONE}/{name}.json": f"new {name}" for name in ("train", "dev")}
    for files in (old, new, new):
        shutil.rmtree(given, ignore_errors=True)
        for name, content in files.items():
            (given / name).parent.mkdir(parents=True, exist_ok=True)
            (given / name).write_text(content)
        place = sources.fetch_benchmark(given, root, progress=False)
        known = old if files is old else old | new
        assert contents(place) == {name.removeprefix("CL_Benchmark/"): text for name, text in known.items()}


def test_a_repository_out_of_reach_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(command, cwd=None):
        assert cwd is not None
        (cwd / "half").mkdir()
        return subprocess.CompletedProcess(command, 1, "", "hint\nERROR: failed to clone\n")

    monkeypatch.setattr(sources, "_run", refuse)
    with pytest.raises(GainLoRAError, match=r"dvc get https://.*ERROR: failed to clone.*--from DIR") as caught:
        sources.fetch_benchmark(None, tmp_path, progress=False)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == [] and len(list((tmp_path / ".cache").iterdir())) == 1


def test_models_resolve_to_folders_or_hub_ids(tmp_path):
    assert sources.resolve_model("google-t5/t5-large", tmp_path) == "google-t5/t5-large"
    assert sources.resolve_model("gpt2", tmp_path) == "gpt2"
    with pytest.raises(GainLoRAError, match="smollm2-135m: not fetched yet; get it by `gainlora fetch embedded`"):
        sources.resolve_model("smollm2-135m", tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / "mine" / name).write_text("")
    with pytest.raises(GainLoRAError, match=r"mine.*safetensors"):
        sources.resolve_model("mine", tmp_path)
    (tmp_path / "mine/model.safetensors").write_text("")
    assert sources.resolve_model("mine", tmp_path) == str(tmp_path / "mine")
    for name in ("./none", "/no/such/folder", "a/b/c", "two words"):
        with pytest.raises(GainLoRAError, match="no such folder, and no hub id"):
            sources.resolve_model(name, tmp_path)


def test_dvc_hash_reads_what_tracks_a_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "data/CL_Benchmark.dvc").write_text("outs:\n- md5: aa.dir\n  path: CL_Benchmark\n")
    (tmp_path / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  fetch:\n    cmd: x\n    outs:\n    - path: data/embedded\n      md5: bb.dir\n"
        "    - path: models/m\n  empty:\n    cmd: y\n"
    )
    (tmp_path / "other/dvc.lock").write_text(
        "stages:\n  s:\n    cmd: x\n    outs:\n    - path: ../data/far\n      md5: cc\n"
    )
    expected = {
        "data/CL_Benchmark": "aa.dir",
        "data/CL_Benchmark/SuperNI/task": "aa.dir",
        "data/embedded/news_topic": "bb.dir",
        "data/embedded2/news_topic": None,
        "data/far": "cc",
        "models/m": None,
        "data": None,
    }
    assert {p: sources.dvc_hash(Path(p), tmp_path) for p in expected} == expected
    assert sources.dvc_hash(Path("data/embedded"), tmp_path / "data") is None
