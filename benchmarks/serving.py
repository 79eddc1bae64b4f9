"""Throughput of a run's served model against its base model served the same way, over HTTP on loopback.

    python -m benchmarks.serving RUN [--prompts 16] [--new-tokens 8] [--requests 20]

Both are behind `mlflow models serve`; requests go to one and the other in turn, so that both see the same machine.
The run's B matrices are set to 0: the cost is that of all branches and gates, the answers are the base model's, so both
generate the same tokens.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gainlora.data.tasks import read_task
from gainlora.export.hub import write_release
from gainlora.export.saved import SavedModel, open_saved
from gainlora.tracking.registry import save_model, signature


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a finished run's folder, its data beside it")
    parser.add_argument("--prompts", type=int, default=16, help="of a request")
    parser.add_argument("--new-tokens", type=int, default=8, help="most new tokens of an answer")
    parser.add_argument("--requests", type=int, default=20, help="to each of the two")
    options = parser.parse_args()
    learned = open_saved(options.run)
    with tempfile.TemporaryDirectory(prefix="gainlora-benchmark-") as scratch:
        models = {"base": _base(learned, Path(scratch)), "gainlora": _silent(learned, Path(scratch))}
        with contextlib.ExitStack() as stack:
            ports = {name: stack.enter_context(_served(path)) for name, path in models.items()}
            texts = _prompts(learned, options.prompts)
            body = {"dataframe_records": [{"text": t} for t in texts], "params": {"max_new_tokens": options.new_tokens}}
            answers = {name: _ask(port, body)[1] for name, port in ports.items()}  # warm
            seconds: dict[str, list[float]] = {name: [] for name in ports}
            for _ in range(options.requests):
                for name, port in ports.items():
                    seconds[name].append(_ask(port, body)[0])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    for name, median in medians.items():
        print(f"{name:9} {options.prompts / median:7.1f} answers/s   {1000 * median:7.1f} ms a request of {len(texts)}")
    ratio = medians["base"] / medians["gainlora"]
    print(f"ratio {ratio:.3f} of the base model's throughput; {same} of {len(texts)} answers alike")


def _silent(learned: SavedModel, scratch: Path) -> Path:
    """The run as a served model, with B = 0."""
    write_release(learned, scratch / "adapter")
    weights = scratch / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({n: torch.zeros_like(t) if n.endswith("lora_B") else t.clone() for n, t in tensors.items()}, weights)
    save_model(SavedModel(scratch / "adapter", learned.adapter, learned.run, learned.root), scratch / "gainlora")
    return scratch / "gainlora"


def _base(learned: SavedModel, scratch: Path) -> Path:
    """The base model as a served model."""
    import mlflow.pyfunc

    config = learned.config
    settings: dict[str, Any] = {"base": learned.base(), "dtype": learned.run.config["dtype"]}
    settings |= {"max_prompt_tokens": config.data.max_prompt_tokens, **vars(config.evaluate)}
    settings |= {"truncate": config.data.truncate, "template": config.order.template}
    mlflow.pyfunc.save_model(
        str(scratch / "base"),
        python_model=str(Path(__file__).with_name("served_base.py")),
        model_config=settings,
        signature=signature(learned),
        pip_requirements=["mlflow"],
    )
    return scratch / "base"


def _prompts(learned: SavedModel, count: int) -> list[str]:
    """Test prompts of all tasks, mixed."""
    order = learned.config.order
    tasks = [read_task(learned.root / order.data / n, order.template, order.metric) for n in learned.run.tasks]
    return [tasks[i % len(tasks)].prompt(tasks[i % len(tasks)].test[i // len(tasks)]) for i in range(count)]


@contextlib.contextmanager
def _served(model: Path) -> Iterator[int]:
    """`mlflow models serve`; the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
    log = model.with_suffix(".log")
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        try:
            for _ in range(600):
                if server.poll() is not None:
                    break
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                    yield port
                    return
                time.sleep(0.2)
            raise SystemExit(f"the server did not start:\n{log.read_text()}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, 15)
            server.wait(30)


def _ask(port: int, body: dict[str, Any]) -> tuple[float, list[str]]:
    """Seconds of a request, and its answers."""
    content, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", content, kind)
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=300) as reply:
        found = json.loads(reply.read())
    return time.perf_counter() - started, [row["answer"] for row in found["predictions"]]


if __name__ == "__main__":
    main()
