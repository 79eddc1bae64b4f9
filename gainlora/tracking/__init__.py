"""MLflow, imported by the modules of this package alone; it reads these variables when it is imported."""

import os

os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
