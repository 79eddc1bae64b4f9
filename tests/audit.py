"""`make audit`: known vulnerabilities in what constraints.txt pins, by pip-audit in an environment of its own.

Fails for a vulnerability that ACCEPTED does not name. Where the advisory database does not answer, it says so and
passes: pip-audit itself would call packages that it could not look up free of vulnerabilities.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PIP_AUDIT = "pip-audit==2.10.1"
HOME = Path(".cache", "audit")
ACCEPTED: dict[str, str] = {}
"""Advisory (CVE-..., GHSA-..., PYSEC-...) -> why it does not concern this project."""


def main() -> int:
    pins = Path("constraints.txt").read_text().splitlines()
    python = HOME / "bin" / "python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", HOME], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PIP_AUDIT], check=True)
        report = audit(python, pins[:1])  # one first: nobody is asked for hundreds where none is answered
        report = report if unanswered(report) else audit(python, pins)
    except (subprocess.CalledProcessError, json.JSONDecodeError) as error:
        print(f"audit: not done: {error}")
        return 0
    code, lines = verdict(report)
    print("\n".join(f"audit: {line}" for line in lines))
    return code


def audit(python: Path, pins: list[str]) -> dict[str, Any]:
    """pip-audit's report on pinned requirements."""
    file = HOME / "pins.txt"
    file.write_text("\n".join(pins) + "\n")
    command = [python, "-m", "pip_audit", "--requirement", file, "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True)
    report: dict[str, Any] = json.loads(done.stdout)  # its exit code is 1 for findings and for failures
    return report


def unanswered(report: dict[str, Any]) -> list[str]:
    """Packages that the database did not know or answer for."""
    return [entry["name"] for entry in report["dependencies"] if "skip_reason" in entry]


def verdict(report: dict[str, Any]) -> tuple[int, list[str]]:
    """Exit code and lines for a report."""
    skipped, total = unanswered(report), len(report["dependencies"])
    if len(skipped) == total:
        return 0, ["not done: the advisory database does not answer from here"]
    lines = [f"not looked up: {', '.join(skipped)}"] if skipped else []
    code = 0
    for entry in report["dependencies"]:
        for found in entry.get("vulns", ()):
            names = [found["id"], *found["aliases"]]
            reason = next((ACCEPTED[name] for name in names if name in ACCEPTED), None)
            remedy = f"fixed in {', '.join(found['fix_versions']) or 'no version yet'}"
            lines.append(f"{entry['name']} {entry['version']}: {' '.join(names)}, {reason or remedy}")
            code |= reason is None
    return int(code), [*lines, f"{total - len(skipped)} packages looked up"]


if __name__ == "__main__":
    sys.exit(main())
