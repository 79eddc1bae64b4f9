"""Draws forgetting.png from committed results: `python docs/images/forgetting.py`."""

from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.image import imread, imsave

from gainlora.report.one_run import run_figures
from gainlora.runs.records import read_result_file

HERE = Path(__file__).parent
TITLES = {"seqlora": "Sequential LoRA", "gainlora-inflora": "GainLoRA"}

images = []
for method, title in TITLES.items():
    record = read_result_file(HERE.parents[1] / f"results/long5/{method}-smollm2-135m-42.json")
    figure, _ = run_figures(record, decimals=0)["accuracy_matrix"]
    average, forgetting = (record.result[name] for name in ("AP", "FT"))
    figure.suptitle(f"{title}: AP {average:.1f}, FT {forgetting:.1f}", fontsize=11, fontweight="bold")
    figure.set_size_inches(4.7, 3.6)
    png = BytesIO()
    figure.savefig(png, dpi=150)
    images.append(imread(BytesIO(png.getvalue())))
imsave(HERE / "forgetting.png", np.hstack(images), metadata={"Software": None})
