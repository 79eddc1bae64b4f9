"""Writes a finished model to its own folder: everything for inference, nothing for training.

adapter_config.json  *.safetensors    the adapter
run.json                              the run, as written by `gainlora results`
README.md                             the model card
"""

import shutil
import tempfile
from pathlib import Path

from gainlora.errors import GainLoRAError, reason
from gainlora.export.card import CARD, check_finished, make_card
from gainlora.export.saved import RUN, SavedModel, open_saved
from gainlora.model.adapter_io import FILES, PUBLISHED
from gainlora.runs.records import write_result_file


def write_release(learned: SavedModel, target: Path, name: str | None = None) -> None:
    """Fill the folder `target` with a finished model.

    Args:
        name: for loading, in the card; None: adapters/<order>.

    Raises:
        GainLoRAError: the run is not finished, or a file is missing or damaged.
    """
    check_finished(learned)
    known_as = name or f"adapters/{learned.config.order.name}"
    target.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        if (learned.folder / file).exists():
            shutil.copy2(learned.folder / file, target)
    write_result_file(learned.run, target / RUN)
    (target / CARD).write_text(make_card(learned, known_as, "adapter"), encoding="utf-8")


def push(place: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a finished model to the hub (HF_ENDPOINT, HF_TOKEN); returns its address.

    Args:
        place: a finished run's folder, or a finished model.
        repo_id: owner/name; created if missing.

    Raises:
        GainLoRAError: the run is not finished, or the hub refuses.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory(prefix="gainlora-push-") as folder:
        write_release(open_saved(place), Path(folder), repo_id)
        try:
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, allow_patterns=list(PUBLISHED), commit_message="GainLoRA adapter"
            )
        except Exception as error:  # of the hub or the network
            raise GainLoRAError(
                f"{repo_id}: not pushed ({reason(error)}); give OWNER/NAME, and log in by `hf auth login` or HF_TOKEN."
            ) from None
    return str(done.commit_url)
