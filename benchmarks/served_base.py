"""The base model behind the same interface as a registered run: what benchmarks/serving.py compares with."""

from typing import Any

import mlflow.models
import pandas
import torch
from mlflow.pyfunc.model import PythonModel

from gainlora.data.collate import buckets, collate, encode_prompts
from gainlora.data.prompts import parse_prompt
from gainlora.model.base import load_base, pick_device
from gainlora.sections import DataConfig


class ServedBase(PythonModel):
    """The same prompts, batches and decoding, without adapter and gates."""

    def load_context(self, context: Any) -> None:
        self.settings = context.model_config
        model, self.tokenizer = load_base(self.settings["base"], getattr(torch, self.settings["dtype"]))
        # as in GainLoRAModel, or this comparison would be one of the output layer (several times slower without it)
        model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
        self.model = model.to(pick_device())

    @torch.inference_mode()
    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        longest = (params or {})["max_new_tokens"]
        both = self.model.config.is_encoder_decoder
        data = DataConfig(max_prompt_tokens=self.settings["max_prompt_tokens"], truncate=self.settings["truncate"])
        parts = [parse_prompt(self.settings["template"], text) for text in model_input["text"]]
        ids, _ = encode_prompts(parts, self.tokenizer, data, both)
        found = {}
        for batch in buckets([len(i) for i in ids], self.settings["batch_size"]):
            rows = [{"prompt_ids": ids[i], "target_ids": []} for i in batch]
            inputs = collate(rows, self.tokenizer.pad_token_id, both, targets=False)
            inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
            output = self.model.generate(**inputs, max_new_tokens=longest, num_beams=self.settings["num_beams"])
            if not both:
                output = output[:, inputs["input_ids"].shape[1] :]
            found |= dict(zip(batch, self.tokenizer.batch_decode(output, skip_special_tokens=True), strict=True))
        return [{"answer": found[i].strip()} for i in range(len(ids))]


mlflow.models.set_model(ServedBase())
