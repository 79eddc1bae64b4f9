"""Every command and every Python block of the pages and the README, run as a newcomer would.

They run to the letter, page by page, in one copy of the project with a tiny model and tiny tasks (tests/newcomer.py);
a block with a title is written to that file first. What cannot run here is in NOT_RUN, with the reason.
"""

import functools
import re
import shlex
import subprocess

import pytest
import typer

from gainlora.cli import app
from tests.newcomer import FIRST, Shell
from tests.pages import PAGES, ROOT, blocks, commands
from tests.servers import BIN, clean_environment

NOT_RUN = {
    r"make test": "it is what runs this",
    r"gainlora (fetch|run embedded --model) gemma-3-270m": "downloads 238 MB",
    r"gainlora fetch cl-benchmark.*": "downloads, or needs a copy of the benchmark",
    r"(cd paper && dvc repro |gainlora run |run=\$\(gainlora run )order\d.*": "needs data, a GPU and days",
    r".*--model \w+/.*|gainlora push .*": "the hub",
    r"(gainlora|prefect deployment run) sweep .*": "many runs: tests/integration/test_sweep.py has few",
    r"accelerate launch .*|sbatch .*": "several machines",
    r".*(HOST|0\.0\.0\.0|prefect (work-pool|deploy --all|worker)).*": "other machines and their servers",
}
SERVERS = {
    r"make ui": "http://127.0.0.1:5000/health",
    r"mlflow models serve .*": "http://127.0.0.1:5001/ping",
}
"""Commands that serve until Ctrl-C, and the address that answers when they are ready."""
SUBCOMMANDS = {"prefect": 2, "mlflow": 1, "accelerate": 1}
"""Words that name a command of another program."""
ORDER = sorted(PAGES, key=lambda page: page.name == "README.md")  # last: its `make stop` ends the server


def of(table, command):
    """The entry of a table that a command belongs to."""
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, command, re.DOTALL)), None)


def everything():
    shown = [block for page in PAGES for block in blocks(page) if block.language == "sh"]
    return [command for block in shown for command in commands(block)]


def test_there_are_commands_and_every_exception_is_one():
    found = everything()
    assert len(found) > 40
    for pattern in (*NOT_RUN, *SERVERS):
        assert any(re.fullmatch(pattern, command) for command in found), pattern


@pytest.mark.parametrize("command", sorted({c for c in everything() if c.startswith(("gainlora ", "make "))}))
def test_the_command_line_understands(command):
    program, *words = shlex.split(re.split(" [>|] ", command)[0])
    if program == "gainlora" and "--help" not in words:
        group = typer.main.get_command(app)
        context = group.make_context("gainlora", list(words))
        name, subcommand, rest = group.resolve_command(context, words)
        subcommand.make_context(name, rest, parent=context)
    elif program == "make":
        target, *variables = words
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        names = [variable.partition("=")[0] for variable in variables]
        assert all(re.search(rf"^(export )?{name} [?:]?=", makefile, re.MULTILINE) for name in names)
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def others():
    """Commands of other programs that do not run here, each one by itself, without what is set for it."""
    parts = [part for command in everything() if of(NOT_RUN, command) for part in command.split(" && ")]
    words = [[word for word in shlex.split(part) if not re.match(r"[A-Z_]+=", word)] for part in parts]
    return {" ".join(command): command for command in words if command[0] in SUBCOMMANDS}


@pytest.mark.slow
@pytest.mark.parametrize("command", others().values(), ids=others())
def test_options_of_other_programs_exist(command):
    shown = help_of(*command[: 1 + SUBCOMMANDS[command[0]]])
    own = command[: command.index("-m")] if "-m" in command else command  # what follows belongs to the module
    for option in (word.partition("=")[0] for word in own if word.startswith("--")):
        assert option in shown, f"{option}: {shown}"


@functools.cache
def help_of(program, *subcommands):
    command, environment = [BIN / program, *subcommands, "--help"], clean_environment(COLUMNS="200")
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment).stdout


@pytest.fixture(scope="module")
def done():
    """Commands that ran already: the same text does the same."""
    return set(FIRST)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.xdist_group("newcomer")
@pytest.mark.parametrize("page", ORDER, ids=lambda page: page.name)
def test_page(page, newcomer, done):
    folder, ports = newcomer
    shell = Shell(folder, ports)
    try:
        for block in blocks(page):
            if block.title:
                (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
                (folder / block.title).write_text(block.text)
            elif block.language == "python":
                shell(f"python -c {shlex.quote(block.text)}")
            elif block.language == "sh":
                for command in commands(block):
                    run(shell, command, done)
    finally:
        shell.close()


def run(shell, command, done):
    if of(NOT_RUN, command) or command in done:
        return
    if url := of(SERVERS, command):
        shell.serve(command, url)
    else:
        shell(command)
    if "$" not in command and command.startswith(("gainlora ", "make ")) and command != "make stop":
        done.add(command)
