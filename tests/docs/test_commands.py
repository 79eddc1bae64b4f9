"""Every command and every Python block of the pages and the README, run as a newcomer would.

They run to the letter, page by page, in one copy of the project with a tiny model and tiny tasks (tests/newcomer.py);
a block with a title is written to that file first. What cannot run here is in NOT_RUN, with the reason.
"""

import re
import shlex

import pytest

from gainlora.__main__ import parser
from tests.newcomer import FIRST, Shell
from tests.pages import PAGES, ROOT, blocks, commands

NOT_RUN = {
    r"make test": "it is what runs this",
    r"gainlora fetch cl-benchmark.*": "downloads, or needs a copy of the benchmark",
    r"(dvc repro|gainlora run) order\d.*": "needs the benchmark's data, a GPU and days",
    r".*--model \w+/.*|gainlora push .*": "the hub",
}
SERVERS = {
    r"make ui": "http://127.0.0.1:5000/health",
    r"mlflow models serve .*": "http://127.0.0.1:5001/ping",
}
"""Commands that serve until Ctrl-C, and the address that answers when they are ready."""
ORDER = sorted(PAGES, key=lambda page: page.name == "README.md")  # last: its `make stop` ends the server


def of(table, command):
    """The entry of a table that a command belongs to."""
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, command)), None)


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
        parser().parse_args(words)
    elif program == "make":
        target, *variables = words
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        names = [variable.partition("=")[0] for variable in variables]
        assert all(re.search(rf"^(export )?{name} [?:]?=", makefile, re.MULTILINE) for name in names)
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.fixture(scope="module")
def done():
    """Commands that ran already: the same text does the same."""
    return set(FIRST)


@pytest.mark.slow
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
