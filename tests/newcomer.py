"""A copy of the project as a newcomer finds it after `gainlora fetch embedded`, with a tiny model and tiny tasks in
place of the real ones, so that the documentation's commands run in it to the letter within seconds."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import yaml

from tests.pages import PAGES, ROOT
from tests.servers import answering, clean_environment, free_port
from tests.tiny import LABELS, tiny_llama, tiny_tasks, tiny_tokenizer

TINY = {
    "data": {"max_prompt_tokens": 48, "max_target_tokens": 1, "train_limit": 8, "test_limit": 8},
    "lora": {"rank": 2},
    "gate": {"hidden": 6},
    "subspace": {"threshold": 0.8, "gate_threshold": 0.8, "max_examples": 8},
    "train": {"learning_rate": 0.02, "min_steps": None},
    "report": {"dpi": 40},
    "promote": {"max_forgetting": None, "max_general_loss": None, "min_gain": None},  # what 8 examples teach is chance
}
"""Laid over the copy's params.yaml."""
FIRST = ("make serve", "make run", "make compare")
PORTS = ("4200", "5000", "5001")


def make_project(folder: Path) -> Path:
    """The tracked files, a tiny models/smollm2-135m and data/embedded, and .venv, which is this environment."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q", folder], check=True)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for section, options in TINY.items():
        params[section] |= options
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    tiny_model(folder / "models" / "smollm2-135m")
    names = params["orders"]["embedded"]["tasks"]
    for made, name in zip(tiny_tasks(folder / "data" / "embedded", len(names)), names, strict=True):
        (folder / "data" / "embedded" / made).rename(folder / "data" / "embedded" / name)

    (folder / ".venv").mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (folder / ".venv" / part).symlink_to(Path(sys.prefix, part))
    (folder / ".venv" / ".ready").touch()
    shell = Shell(folder)
    try:
        shell("dvc commit -q -f fetch")  # what is there is what the stage makes
    finally:
        shell.close()
    return folder


def tiny_model(folder: Path) -> None:
    """A random Llama that knows the pages' words, as its gates tell texts apart by their words, and answers with
    labels, as scores that are all 0 would hide a mistake."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", text)))
    model, tokenizer = tiny_llama(words=words), tiny_tokenizer(words)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(LABELS)] *= 6
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def served(folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A project with its Prefect server after the first runs.

    Yields:
        The folder, and this machine's free ports by the ones that the pages name.
    """
    make_project(folder)
    ports = {port: free_port() for port in PORTS}
    shell = Shell(folder, ports)
    try:
        for command in FIRST:
            shell(command)
        yield folder, ports
    finally:
        shell("make stop")
        shell.close()


class Shell:
    """One bash in the project's folder, as a reader has it open: variables and the environment stay.

    Args:
        ports: free ports by the ones that the pages name.
    """

    def __init__(self, folder: Path, ports: dict[str, str] | None = None) -> None:
        self.folder, self.ports = folder, ports or {}
        environment = clean_environment(
            PYTHONPATH=str(folder), UI_PORT=self.ports.get("5000", "5000"), PREFECT_PORT=self.ports.get("4200", "4200")
        )
        self.bash = subprocess.Popen(
            ["bash"], cwd=folder, env=environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __call__(self, command: str) -> str:
        """Run a command; what it prints. It must end with code 0."""
        assert self.bash.stdin and self.bash.stdout
        self.bash.stdin.write(f"{{ {self.here(command)}\n}} < /dev/null\nprintf '\\n__ended__ %s\\n' $?\n")
        lines: list[str] = []
        for line in self.bash.stdout:
            if line.startswith("__ended__ "):
                assert line.split()[1] == "0", f"$ {command}\n{''.join(lines)}"
                return "".join(lines)
            lines.append(line)
        raise AssertionError(f"bash ended in: {command}\n{''.join(lines)}")

    def serve(self, command: str, url: str) -> None:
        """A command that serves until Ctrl-C, as in another terminal; returns when the address answers."""
        log = self.folder / "served.log"
        self(f"( {command} ) > {log} 2>&1 &")
        answering(self.here(url), log=log)

    def here(self, text: str) -> str:
        """The text with the pages' ports replaced."""
        return re.sub(r"(?<!\d)\d{4}(?!\d)", lambda m: self.ports.get(m[0], m[0]), text)

    def close(self) -> None:
        """End the shell and all that it started in the background."""
        bash = psutil.Process(self.bash.pid)
        for process in [bash, *bash.children(recursive=True)]:
            process.kill()
        self.bash.wait()
