"""What is installed: every version pinned, its files by hash."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_lock_has_every_pin_and_hashes_for_each():
    pins = {line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    locked = (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines()[1:]
    normal = {re.sub("[_.]", "-", pin.partition("==")[0]).lower() + pin[pin.index("==") :] for pin in pins}
    assert {line.split()[0] for line in locked} == {pin for pin in normal if not pin.startswith("torch==")}
    assert all(re.fullmatch(r"\S+( +--hash=sha256:[0-9a-f]{64})+", line.strip()) for line in locked)
