"""What is installed: every version pinned, its files by hash; what an audit's report means."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests import audit

ROOT = Path(__file__).parents[2]


def test_the_lock_has_every_pin_and_hashes_for_each() -> None:
    pins = {line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    locked = (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines()[1:]
    normal = {re.sub("[_.]", "-", pin.partition("==")[0]).lower() + pin[pin.index("==") :] for pin in pins}
    assert {line.split()[0] for line in locked} == {pin for pin in normal if not pin.startswith("torch==")}
    assert all(re.fullmatch(r"\S+( +--hash=sha256:[0-9a-f]{64})+", line.strip()) for line in locked)


def found(name: str) -> dict[str, Any]:
    return {"id": name, "aliases": ["CVE-1"], "fix_versions": ["2.0"]}


@pytest.mark.parametrize(
    "packages, code, expected",
    [
        ([{"skip_reason": "not found"}] * 2, 0, "not done: the advisory database does not answer from here"),
        ([{"version": "1.0", "vulns": []}, {"skip_reason": "x"}], 0, "not looked up: p"),
        ([{"version": "1.0", "vulns": [found("PYSEC-1")]}], 1, "p 1.0: PYSEC-1 CVE-1, fixed in 2.0"),
        ([{"version": "1.0", "vulns": [found("OLD")]}], 0, "p 1.0: OLD CVE-1, never called"),
    ],
)
def test_an_audit_fails_for_what_is_known_and_not_accepted(
    monkeypatch: pytest.MonkeyPatch, packages: list[dict[str, Any]], code: int, expected: str
) -> None:
    monkeypatch.setattr(audit, "ACCEPTED", {"OLD": "never called"})
    got, lines = audit.verdict({"dependencies": [{"name": "p", **entry} for entry in packages]})
    assert (got, lines[0]) == (code, expected)
