"""`dvc repro order1`: run a large order only when it was asked for by name.

`dvc repro` runs every stage of ./dvc.yaml and DVC knows no default targets. So ./dvc.yaml has a stage of each
large order's name that only starts this file; the real stages are in paper/dvc.yaml. Whether the order was named
is read from the command line of the `dvc` process above. DVC gives up its lock while a stage's command runs.

    python -m flows.by_name order1
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flows.versions import STAGES


def named(order: str, command: list[str]) -> bool:
    """Whether a `dvc repro ...` or `dvc exp run ...` command line names this order as a target."""
    words = [word.removeprefix("./").removeprefix("dvc.yaml:") for word in command]
    return order in words and any(word in ("repro", "run") for word in words[: words.index(order)])


def main(order: str) -> int:
    """Hand over to the real stage; 0 when the order was not asked for, 1 without its data."""
    import psutil

    above = [process.cmdline() for process in psutil.Process().parents()]
    calls = [command for command in above if any(Path(word).name == "dvc" for word in command[:3])]
    call = next((command for command in calls if named(order, command)), None)
    if call is None:
        return 0
    if not Path("data/CL_Benchmark").is_dir():
        print(
            "data/CL_Benchmark: not there; get the benchmark with `gainlora fetch cl-benchmark`, or from a folder "
            "you have with `gainlora fetch cl-benchmark --from DIR`.",
            file=sys.stderr,
        )
        return 1
    force = ["--force"] if {"-f", "--force"} & set(call) else []
    os.execv(sys.executable, [sys.executable, "-m", "dvc", "repro", *force, *STAGES[order]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
