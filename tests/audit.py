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
    python = HOME / "bin" / "python"
    pins = Path("constraints.txt").read_text().splitlines()
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", HOME], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PIP_AUDIT], check=True)
        packages = audit(python, pins[:1])  # one first: nobody is asked for hundreds where none is answered
        packages = audit(python, pins) if "vulns" in packages[0] else []
    except (subprocess.CalledProcessError, json.JSONDecodeError) as error:
        print(f"audit: not done: {error}")
        return 0
    if not packages:
        print("audit: not done: the advisory database does not answer from here")
        return 0
    bad = 0
    for package in packages:
        if "vulns" not in package:
            print(f"audit: not looked up: {package['name']}")
        for found in package.get("vulns", ()):
            names = [found["id"], *found["aliases"]]
            reason = next((ACCEPTED[name] for name in names if name in ACCEPTED), None)
            bad += reason is None
            remedy = f"fixed in {', '.join(found['fix_versions']) or 'no version yet'}"
            print(f"audit: {package['name']} {package['version']}: {' '.join(names)}, {reason or remedy}")
    print(f"audit: {len(packages)} packages, {bad} vulnerabilities that are not accepted")
    return int(bad > 0)


def audit(python: Path, pins: list[str]) -> list[dict[str, Any]]:
    """pip-audit's entries for pinned requirements; without `vulns` where the database did not answer."""
    file = HOME / "pins.txt"
    file.write_text("\n".join(pins) + "\n")
    command = [python, "-m", "pip_audit", "--requirement", file, "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True)
    entries: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]  # its exit code is 1 for failures, too
    return entries


if __name__ == "__main__":
    sys.exit(main())
