"""A learned model on disk: the adapter's folder and its run.

runs/<run>/                    a run, for its last finished task
runs/<run>/task_02_<name>/     the state after task 2
adapters/<order>/              a finished model (export/hub.py); the same from a hub, by its id
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gainlora.config import RunConfig
from gainlora.data.sources import resolve_model
from gainlora.data.tasks import KEPT, as_file, read_kept_test
from gainlora.errors import GainLoRAError
from gainlora.io import sha256, verify_checksums, whole_folder, write_json
from gainlora.model.adapter_config import GainLoRAConfig
from gainlora.model.adapter_io import find_adapter, read_config
from gainlora.runs import identity
from gainlora.runs.records import Record, read_result_file, read_run, step_of
from gainlora.runs.result_files import write_result_file

if TYPE_CHECKING:
    from gainlora.training.learner import ContinualLearner

RUN = "run.json"
"""The run of a finished model, as written by `gainlora results`; beside the adapter."""


@dataclass(frozen=True)
class SavedModel:
    """A learned model, not loaded."""

    folder: Path
    """The adapter's folder."""
    adapter: GainLoRAConfig
    run: Record
    """The run that learned it."""
    root: Path
    """The project's folder, to which names of base models and data are relative."""

    @cached_property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return RunConfig.from_stored(self.run.config["config"])

    def base(self, given: str | None = None) -> str:
        """Source of the base model: a folder's absolute path, or a hub id.

        Args:
            given: hub id or folder; None: the one that the adapter names.

        Raises:
            GainLoRAError: no such model.
        """
        found = resolve_model(given) if given else resolve_model(self.adapter.base_model, self.root)
        return str(Path(found).resolve()) if Path(found).is_dir() else found

    def check_finished(self) -> None:
        """Refuse a run that has not learned all of its tasks, or an earlier task's state (GainLoRAError)."""
        self.run.check_finished(len(self.adapter.tasks))


def open_saved(place: str | Path) -> SavedModel:
    """Describe the learned model at `place` without loading it.

    Args:
        place: a run folder, a task folder, adapters/<order>, or a hub id.

    Raises:
        GainLoRAError: none of these, or a file is missing or damaged.
    """
    folder = find_adapter(place)
    adapter = read_config(folder)
    if (folder / RUN).exists():
        return SavedModel(folder, adapter, read_result_file(folder / RUN), Path("."))
    run_folder = folder.resolve().parent
    if not (run_folder / "config.json").exists():
        raise GainLoRAError(
            f"{folder / RUN}: not found, and {run_folder} is no run folder; give the run folder itself, or make the "
            "finished model anew by its `gainlora run`."
        )
    verify_checksums(folder)
    return SavedModel(folder, adapter, read_run(run_folder), run_folder.parent.parent)


def write_learned(learner: "ContinualLearner", folder: Path) -> None:
    """Write what a learner in memory learned to its own folder, in place of an earlier state of it.

    Raises:
        GainLoRAError: nothing is learned yet, or the folder holds something else.
    """
    if not learner.history:
        raise GainLoRAError("learner: nothing is learned yet, so there is nothing to save.")
    learner.check_scored()
    if folder.exists() and not (folder / RUN).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise GainLoRAError(f"{folder}: holds other files; name a new folder.")
    config, base = learner.config, learner.model.config.base_digest or ""
    fixed = config.with_options({"subspace.horizon": learner.horizon})
    ids = identity.step_ids(fixed, learner.entries, base)
    described = identity.describe(config, list(learner.tasks), [], ids, base)
    described["dtype"] = str(learner.model.get_base_model().dtype).removeprefix("torch.")
    record = Record(described, learner.entries, [step_of(step) for step in learner.history])
    with whole_folder(folder) as part:
        learner.model.save_pretrained(part)
        write_result_file(record, part / RUN)
        for name, task in learner.tasks.items():
            write_json(part / KEPT / f"{name}.json", as_file(task, task.test, task.train))


def read_learned(saved: SavedModel, learner: "ContinualLearner") -> None:
    """Give a learner the record and the test examples of what its adapter learned."""
    order, names = learner.config.order, learner.model.config.tasks
    places = {file.stem: file for file in saved.folder.parent.glob(f"task_*/{KEPT}/*.json")}
    places |= {file.stem: file for file in saved.folder.glob(f"{KEPT}/*.json")}
    tasks = saved.run.tasks if saved.run.at_once else names
    learner.entries = {name: saved.run.data[name] for name in tasks}
    learner.history = [step.files for step in saved.run.steps[: len(names)]]
    learner.tasks = {
        name: read_kept_test(places[name], order.template, order.metric, entry)
        for name, entry in learner.entries.items()
        if name in places
    }
    learner.config = learner.config.with_options({"order.tasks": tuple(tasks)})


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """`gainlora.io.whole_folder` for a place that is free, and still is when the block has filled it.

    Raises:
        GainLoRAError: `place` exists.
    """
    _check_free(place)
    with whole_folder(place) as part:
        yield part
        _check_free(place)


def _check_free(place: Path) -> None:
    if place.exists():
        raise GainLoRAError(f"--out: {place} exists already; name a new folder, or remove it.")


def files_sha256(source: str) -> str:
    """Fingerprint of a base model: SHA-256 of a folder's weights, or the commit of a hub id."""
    if not Path(source).is_dir():
        return f"commit {identity.hub_commit(source)}"
    digest = hashlib.sha256()
    for path in sorted(Path(source).glob("*.safetensors")):
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()
