"""`python -m flows.show ORDER`: the table of an order's result as params.yaml describes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def show(result: dict[str, Any]) -> None:
    """Print R, AP, FT and BWT of one result.json."""
    from rich.console import Console

    from gainlora.params import side_section
    from gainlora.tracking.report import matrix_table

    Console().print(matrix_table([result], side_section("report")["decimals"]))


if __name__ == "__main__":
    show(json.loads(Path("metrics", f"{sys.argv[1]}.json").read_text(encoding="utf-8")))
