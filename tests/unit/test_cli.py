"""What a newcomer meets: the help and the Tab key."""

import subprocess
import sys
from pathlib import Path

import pytest

from gainlora.__main__ import main
from tests.pages import ROOT

COMPLETE = """
eval "$(register-python-argcomplete gainlora)"
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9
_python_argcomplete gainlora
printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_help_lists_every_command_once(capsys):
    with pytest.raises(SystemExit):
        main(["nonsense"])
    known = [name.strip(" ',)\n") for name in capsys.readouterr().err.rpartition("choose from ")[2].split(",")]
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ") and line[2] not in " -" and "  " in line[3:]]
    assert [name for name in listed if name != "gainlora"] == known and len(known) > 5
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["re"], {"repair", "rerun", "report", "results"}),
        (["run", "embed"], {"embedded "}),
        (["run", "embedded", "--method", "gainlora-o"], {"gainlora-olora "}),
        (["run", "embedded", "--model", "llama-3"], {"llama-3-8b "}),
        (["compare", "embedded", "--methods", "seqlora,gainlora-infl"], {"seqlora,gainlora-inflora "}),
        (["run", "embedded", "--set", "train.ep"], {"train.epochs="}),
    ],
)
def test_the_tab_key_in_bash(typed, expected, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    command = ["bash", "-c", COMPLETE, "bash", "gainlora", *typed]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    offered = done.stdout.splitlines()
    assert expected <= set(offered) and len(offered) < 8, done.stderr
