"""The code of a registered model: MLflow copies this file into it and runs it (`mlflow models serve`).

    rows with a text each, and perhaps a task  ->  {"answer": ...} each, with coefficients by task on request

A text is a complete prompt; with a task, that task's instruction and template are put around it, as in training. The
task chooses no branch. The model checks its input itself: MLflow's schema would drop unknown columns without a word.
Without --env-manager local, nothing installs this package.
"""

from pathlib import Path
from typing import Any

import mlflow.models
import pandas
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel

from gainlora.errors import GainLoRAError, add_context
from gainlora.export.saved import files_sha256, open_saved
from gainlora.inference import Predictor, make_prompt

LONGEST = 1024
"""Largest number of new tokens of an answer."""
ROWS, CHARACTERS = 1000, 1_000_000
"""Largest number of rows of a request, and of characters of its texts together."""
COLUMNS = ("text", "task")


class ServedModel(PythonModel):
    """A finished model behind MLflow's interface."""

    def load_context(self, context: Any) -> None:
        """Load the model; its base must be the one on which it was learned."""
        learned = open_saved(context.artifacts["adapter"])
        recorded = context.model_config["base"]
        # on another machine: look it up by name
        base = learned.base(recorded if Path(recorded).is_dir() else None)
        if files_sha256(base) != context.model_config["base_digest"]:
            raise GainLoRAError(f"{base}: not the base model that this adapter was learned on (another SHA-256).")
        self.predictor = Predictor(learned, base)

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Answers in the rows' order."""
        params = params or {}
        longest = params.get("max_new_tokens")
        try:
            if longest is not None and not 1 <= longest <= LONGEST:
                raise GainLoRAError(f"max_new_tokens: {longest} is out of range; give 1 to {LONGEST}.")
            prompts = self._prompts(model_input)
        except GainLoRAError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None
        answers = self.predictor.answer(prompts, longest)
        rows: list[dict[str, Any]] = [{"answer": answer.text} for answer in answers]
        if params.get("coefficients"):
            names = self.predictor.branches
            for row, answer in zip(rows, answers, strict=True):
                row["coefficients"] = dict(zip(names, answer.coefficients or [1.0] * len(names), strict=True))
        return rows

    def _prompts(self, rows: pandas.DataFrame) -> list[str]:
        """The rows' prompts, all checked before any is answered."""
        if not isinstance(rows, pandas.DataFrame) or "text" not in rows:
            raise GainLoRAError('request: no column "text"; give dataframe_records with a "text" each.')
        if unknown := [str(name) for name in rows if name not in COLUMNS]:
            raise GainLoRAError(f"request: {', '.join(unknown)}: unknown; a row has {' and '.join(COLUMNS)} alone.")
        size = sum(len(text) for text in rows["text"] if isinstance(text, str))
        if len(rows) > ROWS or size > CHARACTERS:
            raise GainLoRAError(
                f"request: {len(rows)} rows with {size} characters; give at most {ROWS} with {CHARACTERS} at once."
            )
        tasks = rows["task"] if "task" in rows else [None] * len(rows)
        prompts = []
        for number, (text, task) in enumerate(zip(rows["text"], tasks, strict=True)):
            with add_context(f"row {number}"):
                prompts.append(make_prompt(self.predictor.learned, text, None if pandas.isna(task) else str(task)))
        return prompts


mlflow.models.set_model(ServedModel())
