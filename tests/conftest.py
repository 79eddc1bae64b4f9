"""Nothing leaves the machine, and nothing is reported anywhere, while tests run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DO_NOT_TRACK"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads only get in each other's way
