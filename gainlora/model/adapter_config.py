"""The adapter's definition."""

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

from gainlora.errors import GainLoRAError
from gainlora.model.gate import Score


@dataclass(frozen=True)
class GainLoRAConfig:
    """The adapter's definition; saved as adapter_config.json."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # of values from a file

    base_model: str
    """Folder or hub id of the base model."""
    rank: int
    alpha: float
    targets: tuple[str, ...] | None = None
    """Last parts of the adapted layers' names; None: query and value projections."""
    integration: Literal["gated", "routed", "equal", "single"] = "gated"
    """Coefficients: from the gates; 1 only for the branch that the router chooses; all 1; 1 only for the branch of
    `GainLoRAModel.task`."""
    gate_hidden: int = 50
    gate_depth: int = 2
    gate_score: Score = "cosine"
    covariance_blocks: int = 1
    tasks: tuple[str, ...] = ()
    """Tasks learned so far, in order."""
    horizon: int = 1
    """H of the threshold schedule that the bases were built with."""
    base_digest: str | None = None
    """`gainlora.model.base.weights_fingerprint` of the base model; None: not known."""
    base_setup: str | None = None
    """`gainlora.model.base.setup_digest` of its configuration and tokenizer; None: not known."""

    def __post_init__(self) -> None:
        for name in ("rank", "gate_hidden", "gate_depth", "covariance_blocks", "horizon"):
            if getattr(self, name) < 1:
                raise GainLoRAError(f"{name}: {getattr(self, name)} is too small; give at least 1.")
        if not 0 < self.alpha < float("inf"):
            raise GainLoRAError(f"alpha: {self.alpha} must be a finite number above 0.")

    @property
    def gated(self) -> bool:
        """Whether there are gates."""
        return self.integration == "gated"

    @property
    def by_prompt(self) -> bool:
        """Whether coefficients depend on the prompt."""
        return self.integration in ("gated", "routed")

    def check_mergeable(self) -> None:
        """Require that W + s * sum_i B_i A_i equals the model on every prompt.

        Raises:
            GainLoRAError: it does not, since coefficients are not all 1.
        """
        if self.integration == "equal":
            return
        why = {
            "gated": "its gates give every branch a coefficient that depends on the prompt, so no single weight is "
            "equivalent for all prompts; serve the model unmerged",
            "routed": "its router selects a branch for each prompt",
            "single": "the task id selects a branch for each prompt",
        }[self.integration]
        raise GainLoRAError(f"merge: {why}; or export one branch, with coefficient 1: `gainlora export --branch`.")
