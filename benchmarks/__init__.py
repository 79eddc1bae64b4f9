"""Speed and memory against targets: README.md."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself otherwise; read with torch
