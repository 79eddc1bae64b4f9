"""Prefect flows, and what `dvc repro` runs."""

import os

# Before torch is imported: OpenMP's threads wait for each other in busy loops. Beside another process on two cores, a
# step of 0.5 s took 20 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
