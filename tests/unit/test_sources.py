"""Where data and models are found: the benchmark from a folder or its repository, model names, DVC hashes."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from gainlora.data import sources
from gainlora.errors import GainLoRAError


def benchmark(root: Path) -> Path:
    for task in ("SuperNI/one", "Long_Sequence/two"):
        folder = root / "CL_Benchmark" / task
        folder.mkdir(parents=True)
        for name in ("train", "test"):
            (folder / f"{name}.json").write_text('{"Instances": []}')
        folder.chmod(0o555)  # a read-only copy
    return root


@pytest.mark.parametrize("inside", [False, True])
def test_benchmark_is_copied_from_a_folder(tmp_path: Path, inside: bool) -> None:
    given = benchmark(tmp_path / "given")
    root = tmp_path / "project"
    for _ in range(2):
        place = sources.fetch_benchmark(given / "CL_Benchmark" if inside else given, root, progress=False)
        assert place == root / "data/CL_Benchmark"
        assert sorted(str(f.relative_to(place)) for f in place.rglob("*") if f.is_file()) == [
            f"{t}/{n}.json" for t in ("Long_Sequence/two", "SuperNI/one") for n in ("test", "train")
        ]


def test_a_failed_copy_or_a_wrong_folder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "project"
    with pytest.raises(GainLoRAError, match=r"--from: .*neither SuperNI nor Long_Sequence"):
        sources.fetch_benchmark(tmp_path, root, progress=False)

    def fail(source: Path, target: Path) -> None:
        (target / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setattr(sources, "_copy", fail)
    with pytest.raises(OSError, match="disk full"):
        sources.fetch_benchmark(benchmark(tmp_path / "given"), root, progress=False)
    assert list((root / "data").iterdir()) == []


def test_a_failed_import_is_one_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GainLoRAError, match=r"dvc init.*--from DIR"):
        sources.fetch_benchmark(None, tmp_path, progress=False)

    def refuse(command: list[str], cwd: Path | None = None) -> Any:

        (tmp_path / "data/CL_Benchmark").mkdir()
        (tmp_path / "data/CL_Benchmark.dvc").write_text("")
        return subprocess.CompletedProcess(command, 1, "", "hint\nERROR: failed to clone\n")

    (tmp_path / ".dvc").mkdir()
    monkeypatch.setattr(sources, "_run", refuse)
    with pytest.raises(GainLoRAError, match=r"dvc import https://.*ERROR: failed to clone.*--from DIR") as caught:
        sources.fetch_benchmark(None, tmp_path, progress=False)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


def test_models_resolve_to_folders_or_hub_ids(tmp_path: Path) -> None:
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


def test_dvc_hash_reads_what_tracks_a_folder(tmp_path: Path) -> None:
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
