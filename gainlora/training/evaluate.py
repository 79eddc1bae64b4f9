"""Batched generation on a task's test examples, and the gates' coefficients for them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gainlora import distributed
from gainlora.config import RunConfig
from gainlora.data.collate import buckets, collate, encode_prompts
from gainlora.data.prompts import Prompt
from gainlora.errors import GainLoRAError
from gainlora.model.base import to_device
from gainlora.model.modeling import GainLoRAModel
from gainlora.progress import track
from gainlora.training.metrics import comparable, fold, normalize, routing, score, summary

MARGIN = 3
"""Tokens of an answer beyond the longest reference, for blanks, punctuation and other spellings."""
Answers = tuple[list[str], list[list[float]] | None]


def answer_batch(
    model: GainLoRAModel, tokenizer: Any, rows: Sequence[dict[str, Any]], max_new_tokens: int, num_beams: int
) -> Answers:
    """Generated answers, stripped, and the coefficients a (B, T) of their prompts; None where all are 1.

    Greedy (or beam) search; `load_base` removed the base model's own generation settings. Where a GPU's memory does not
    hold all rows, they are answered in halves.

    Args:
        rows: B examples with prompt_ids.

    Raises:
        GainLoRAError: the GPU's memory does not hold one row; or not all of them, if the base is sharded.
    """
    try:
        return _generate(model, tokenizer, rows, max_new_tokens, num_beams)
    except torch.OutOfMemoryError:
        if len(rows) == 1 or distributed.sharded():  # the others wait for this process
            raise GainLoRAError(
                f"evaluate.batch_size: {len(rows)}: the GPU's memory does not hold that many prompts; lower it or "
                "data.max_prompt_tokens."
            ) from None
    logging.getLogger(__name__).warning("out of memory: %d prompts are answered in halves", len(rows))
    torch.cuda.empty_cache()
    answers, coefficients = [], []
    for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        texts, a = answer_batch(model, tokenizer, part, max_new_tokens, num_beams)
        answers += texts
        coefficients += a or []
    return answers, coefficients or None


@torch.inference_mode()
def _generate(
    model: GainLoRAModel, tokenizer: Any, rows: Sequence[dict[str, Any]], max_new_tokens: int, num_beams: int
) -> Answers:
    inputs = collate(rows, tokenizer.pad_token_id, model.encoder_decoder, targets=False)
    inputs = to_device(inputs, model.device)
    a = model.coefficients(**inputs)  # (B, T) or None
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, num_beams=num_beams)
    if not model.encoder_decoder:
        output = output[:, inputs["input_ids"].shape[1] :]  # (B, new tokens)
    answers = [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]
    return answers, None if a is None else [[round(v, 5) for v in row] for row in a.tolist()]


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt."""

    text: str
    coefficients: list[float] | None
    """a_1..a_T; None where all are 1."""
    cut: bool
    """Whether the prompt was longer than the run's data.max_prompt_tokens and was truncated (data.truncate)."""


def answer_prompts(
    model: GainLoRAModel, tokenizer: Any, prompts: Sequence[Prompt], config: RunConfig,
    max_new_tokens: int | None = None, batch_size: int | None = None,
) -> list[Answer]:  # fmt: skip
    """Answers in the prompts' order.

    Args:
        max_new_tokens: of an answer; None: data.max_target_tokens.
        batch_size: None: evaluate.batch_size.
    """
    ids, lost = encode_prompts(prompts, tokenizer, config.data, model.encoder_decoder)
    longest, found = max_new_tokens or config.data.max_target_tokens, {}
    for batch in buckets([len(i) for i in ids], batch_size or config.evaluate.batch_size):
        rows: list[dict[str, Any]] = [{"prompt_ids": ids[i], "target_ids": []} for i in batch]
        answers, a = answer_batch(model, tokenizer, rows, longest, config.evaluate.num_beams)
        for row, i in enumerate(batch):
            found[i] = Answer(answers[row], a[row] if a else None, bool(lost[i]))
    return [found[i] for i in range(len(prompts))]


@dataclass(frozen=True)
class Prediction:
    """One test example's answer."""

    prediction: str
    references: list[str]
    score: float
    """0 to 100."""
    coefficients: list[float] | None
    """a_1..a_t of the prompt; None where all are 1."""


def mean(answers: Sequence[Prediction]) -> float:
    """Mean score, 0 to 100."""
    return sum(answer.score for answer in answers) / len(answers)


def evaluate_task(
    model: GainLoRAModel, tokenizer: Any, rows: Any, metric: str, config: RunConfig, name: str,
    keep_punctuation: bool = False, unlearned: bool = False,
) -> list[Prediction]:  # fmt: skip
    """Generate and score an answer for every row, in the rows' order.

    Batches hold prompts of similar length; in float32 this changes no answer. All tasks share the length limit
    `data.max_target_tokens`: a limit from the task's labels would reveal the task and hide text generated after a
    correct label.

    Args:
        rows: tokenized test examples.
        keep_punctuation: argument of `score`.
        unlearned: the model has not learned the task, and so rarely ends an answer. With exact match it first gives
            only as many tokens as the longest reference has, and a few; an answer that could still become right is
            then given in full. The scores are the same, in a fraction of the time.
    """
    longest = full = config.data.max_target_tokens
    if unlearned and metric == "exact_match":
        texts = [text for references in rows["references"] for text in references]
        longest = min(longest, MARGIN + max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])))
    model.eval()
    lengths = [len(ids) for ids in rows["prompt_ids"]]

    def answered(chosen: Sequence[int], longest: int) -> dict[int, Prediction]:
        made: dict[int, Prediction] = {}
        batches = buckets([lengths[i] for i in chosen], config.evaluate.batch_size)
        for batch, counts in track(distributed.split(batches), f"evaluate {name}"):
            examples = [rows[chosen[i]] for i in batch]
            answers, a = answer_batch(model, tokenizer, examples, longest, config.evaluate.num_beams)
            if not counts:
                continue
            for row, (i, example, answer) in enumerate(zip(batch, examples, answers, strict=True)):
                references = example["references"]
                points = score(metric, answer, references, keep_punctuation)
                made[chosen[i]] = Prediction(answer, references, points, a[row] if a else None)
        return dict(distributed.all_gather(list(made.items())))

    found = answered(range(len(lengths)), longest)
    if longest < full and (undecided := [i for i in sorted(found) if _undecided(found[i], keep_punctuation)]):
        found |= answered(undecided, full)
    return [found[i] for i in range(len(lengths))]


def _undecided(cut: Prediction, keep_punctuation: bool) -> bool:
    """Whether more tokens can decide the score of a cut answer: it is blank, or the beginning of a reference."""
    given = fold(cut.prediction) if keep_punctuation else normalize(cut.prediction)
    return any(str(comparable("exact_match", r, keep_punctuation)).startswith(given) for r in cut.references)


def step_scores(
    predictions: Mapping[str, Sequence[Prediction]],
    measured: Mapping[str, Mapping[str, float | None]],
    earlier: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What is known of a step once all learned tasks are answered, ready for JSON.

    Args:
        predictions: of every task learned so far, in order.
        measured: `base`, `before` and `majority`: scores on the step's new tasks without learning them, by the base
            model, by the model before the step, and of the most frequent label; None where there is none.
        earlier: what this function returned for the steps before.

    Returns:
        scores (0 to 100, by task), the measured ones, routing (`gainlora.training.metrics.routing`), and AP, FT, BWT,
        LA, AIA and FWT.
    """
    scores = {name: mean(answers) for name, answers in predictions.items()}
    known = {kind: {n: s for n, s in found.items() if s is not None} for kind, found in measured.items()}
    steps = [*earlier, {"scores": scores, **known}]
    R = [list(step["scores"].values()) for step in steps]
    base, before = ({n: s for step in steps for n, s in step.get(k, {}).items()} for k in ("base", "before"))
    a = {name: [p.coefficients for p in answers if p.coefficients] for name, answers in predictions.items()}
    routed = routing(a) if all(a.values()) and all(len(rows[0]) == len(a) for rows in a.values()) else {}
    return {
        "scores": scores,
        **known,
        **({"routing": routed} if routed else {}),
        **summary(R, [before.get(name) for name in scores], [base.get(name) for name in scores]),
    }


def coefficient_summary(predictions: list[Prediction]) -> dict[str, list[float]]:
    """Mean and standard deviation of a_1..a_t over a task's examples."""
    a = torch.tensor([p.coefficients for p in predictions])  # (examples, t)
    return {"mean": _rounded(a.mean(0)), "std": _rounded(a.std(0, correction=0))}


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(v, 5) for v in values.tolist()]
