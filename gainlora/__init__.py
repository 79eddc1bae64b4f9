"""GainLoRA: gated integration of low-rank adaptation for continual learning of language models.

Liang, Chen, Li (NeurIPS 2025, arXiv 2505.15424). `ContinualLearner` and `Task` are the library's entrance,
`GainLoRAModel` is a learned model; `python -m gainlora --help` is the shell's.
"""

from importlib import import_module

__version__ = "0.1.0"
PUBLIC = {
    "ContinualLearner": "gainlora.training.learner",
    "Task": "gainlora.data.tasks",
    "GainLoRAModel": "gainlora.model.modeling",
    "GainLoRAConfig": "gainlora.model.adapter_config",
    "Callback": "gainlora.training.callbacks",
    "Console": "gainlora.training.callbacks",
    "GainLoRAError": "gainlora.errors",
}
"""Public name -> its module: torch and transformers take seconds to import, so nothing is imported until it is used."""
__all__ = [*PUBLIC]


def __getattr__(name: str) -> object:
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    raise AttributeError(f"module 'gainlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
