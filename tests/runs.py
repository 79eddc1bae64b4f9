"""Tiny runs for tests: a project, a whole run in it, and comparisons of what was learned."""

import json
import shutil
from pathlib import Path
from typing import Any

from gainlora import ContinualLearner
from gainlora.config import load_config
from gainlora.data.tasks import read_task
from gainlora.runs.run import Run
from tests.tiny import tiny_llama, tiny_params, tiny_t5, tiny_tokenizer


def project(root: Path, kind: str = "llama", dropout: float = 0.1, **options: Any) -> Path:
    """A folder with a tiny base model (dropout: T5's), three tiny tasks and params.yaml."""
    tiny_t5(root / "base", dropout_rate=dropout) if kind == "t5" else tiny_llama(root / "base")
    tiny_params(root, root / "base", **options)
    return root


def config_of(root: Path, **overrides: Any) -> Any:
    """Order `tiny` there; option names with __ for dots."""
    options = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config("tiny", options, root / "params.yaml")


def create(root: Path, **overrides: Any) -> Run:
    return Run.create(config_of(root, **overrides), root)


def learn(root: Path, **overrides: Any) -> Run:
    """The finished run, closed."""
    with create(root, **overrides) as run:
        run.learn()
    return run


def run(root: Path, method: str) -> None:
    """The whole order, as a new process would find its folder."""
    learn(root, method=method)


def copy_of(root: Path, target: Path) -> Path:
    """The same project without its runs; its base model stays where it is, so the configuration is the same."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name in ("runs", "base")] if Path(folder) == root else []

    return Path(shutil.copytree(root, target, ignore=left_out))


def tensors(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def state(run: Run) -> list[dict[str, bytes]]:
    """All tensors of every step."""
    return [tensors(run.task_folder(t)) for t in range(1, len(run.steps) + 1)]


def records(folder: Path, name: str = "train") -> list[dict[str, Any]]:
    """train.jsonl, or another, without the seconds."""
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Two projects whose only runs have the same files, but for the seconds, and nothing half-done."""
    (mine,), (theirs,) = (list(root.glob("runs/tiny-*")) for root in (one, other))
    names = sorted(path.name for path in theirs.glob("task_*"))
    assert sorted(path.name for path in mine.glob("task_*")) == names and names
    for name in names:
        assert tensors(mine / name) == tensors(theirs / name)
        assert records(mine / name) == records(theirs / name)
    assert (mine / "result.json").read_bytes() == (theirs / "result.json").read_bytes()
    assert not list(mine.glob(".task*")) and not list(mine.rglob("*checkpoint*"))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, whoever links it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def prompt(run: Path, task: str, example: int = 0) -> str:
    """A test example of a run's task, as the model is asked it."""
    read = read_task(run.parent.parent / "data" / "tiny" / task, "long_sequence", "exact_match")
    return read.prompt(read.test[example])


def learner(model: Any = None, **options: Any) -> ContinualLearner:
    """A learner in memory, of a tiny Llama or another model and its tokenizer."""
    small = {"rank": 2, "alpha": 4, "hidden": 6, "learning_rate": 0.03, "max_target_tokens": 4, "min_steps": None}
    return ContinualLearner(model or (tiny_llama(), tiny_tokenizer()), callbacks=[], **{**small, **options})


def rows(first: int, count: int = 20) -> list[dict[str, str]]:
    """Examples of a task in memory; others with another first word."""
    return [{"text": f"w{first + n % 7} w{n}", "label": ("red", "green")[n % 7 % 2]} for n in range(count)]
