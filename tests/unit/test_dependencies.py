"""What the code depends on: every version pinned, its files by hash; what is optional, where it is used."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPTIONAL = {"mlflow": r"gainlora/tracking/.*", "prefect": r"gainlora/prefect_plugin\.py"}
"""What `pip install .` leaves out, and the files that import it when they are loaded."""


def test_only_tracking_loads_mlflow_and_only_the_plugin_prefect():
    """The package works without both."""
    for file in (ROOT / "gainlora").rglob("*.py"):
        where = str(file.relative_to(ROOT))
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for package in {name.partition(".")[0] for name in names} & OPTIONAL.keys():
                assert re.fullmatch(OPTIONAL[package], where), (where, package)


def test_the_lock_has_every_pin_and_hashes_for_each():
    pins = {line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    locked = (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines()[1:]
    normal = {re.sub("[_.]", "-", pin.partition("==")[0]).lower() + pin[pin.index("==") :] for pin in pins}
    assert {line.split()[0] for line in locked} == {pin for pin in normal if not pin.startswith("torch==")}
    assert all(re.fullmatch(r"\S+( +--hash=sha256:[0-9a-f]{64})+", line.strip()) for line in locked)
