"""The code of a registered model: MLflow copies this file into it and runs it to serve (`mlflow models serve`).

    rows with a text each  ->  {"answer": ...} each, with the branches' coefficients by task if they are asked for

A text is a whole prompt; no task id is known here. Without --env-manager local, nothing installs this package.
"""

from pathlib import Path
from typing import Any

import mlflow.models
import pandas
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel

from gainlora.errors import GainLoRAError
from gainlora.handover.folder import base_digest, open_learned
from gainlora.handover.predict import Predictor, check_text

LONGEST = 1024
"""New tokens of one answer."""


class ServedModel(PythonModel):
    """A finished model behind MLflow's interface."""

    def load_context(self, context: Any) -> None:
        """Load it; its base model must be the one it was learned on."""
        learned = open_learned(context.artifacts["adapter"])
        recorded = context.model_config["base"]
        # another machine has it elsewhere: by its name
        base = learned.base(recorded if Path(recorded).is_dir() else None)
        if base_digest(base) != context.model_config["base_digest"]:
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
            texts = list(model_input["text"])
            for number, text in enumerate(texts):
                try:
                    check_text(text)
                except GainLoRAError as error:
                    raise GainLoRAError(f"row {number}: {error}") from None
        except GainLoRAError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None
        answers = self.predictor.answer(texts, longest)
        if not params.get("coefficients"):
            return [{"answer": answer.text} for answer in answers]
        names = self.predictor.branches
        return [
            {
                "answer": answer.text,
                "coefficients": dict(zip(names, answer.coefficients or [1.0] * len(names), strict=True)),
            }
            for answer in answers
        ]


mlflow.models.set_model(ServedModel())
