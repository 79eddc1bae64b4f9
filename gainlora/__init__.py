"""GainLoRA: gated integration of low-rank adaptation for continual learning of language models.

Liang, Chen, Li (NeurIPS 2025, arXiv 2505.15424). `GainLoRAModel` is the library's entrance;
`python -m gainlora --help` is the shell's.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # torch and transformers take seconds to import: only who asks for the model pays.
    if name == "GainLoRAModel":
        from gainlora.model.gainlora_model import GainLoRAModel

        return GainLoRAModel
    raise AttributeError(f"module 'gainlora' has no attribute {name!r}")
