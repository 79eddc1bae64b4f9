"""Prompts and targets -> token ids -> padded batches.

Token ids are cached on disk under a key of everything they depend on (texts, tokenizer, lengths, kind of model)
and memory-mapped, so that all runs, seeds and methods share one tokenization of a task.

Prompt ids. Decoder-only: the tokenizer's prefix (BOS or nothing), then the prompt, no EOS.
Encoder-decoder: the prompt, then EOS. `data.truncate` says which part a long prompt loses; never a special token.
Target ids: one reference, no special tokens but a final EOS; a long target loses tokens at its end.
"""

import hashlib
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from gainlora.data.instances import Example
from gainlora.data.prompts import Part, Prompt, shorten
from gainlora.data.tasks import Task
from gainlora.errors import GainLoRAError
from gainlora.sections import DataConfig

if TYPE_CHECKING:
    import datasets
    import torch

T = TypeVar("T")
FORMAT = 3
"""Part of the cache key; raise it when the meaning of the columns changes."""
IGNORED = -100
"""Label of positions without loss."""
Split = Literal["train", "validation", "test"]
PLACE = "[the prompt]"
"""Stands for the prompt in a chat template."""
DRAW = "reference/0"
"""Fixed seed of `data.references: sampled`."""


def tokenize(
    task: Task, split: Split, tokenizer: Any, data: DataConfig, encoder_decoder: bool, cache: Path | None
) -> "datasets.Dataset":
    """One split's token ids, in the split's order.

    Args:
        task: as read, limits applied.
        tokenizer: a transformers tokenizer with an EOS token.
        data: `max_prompt_tokens`, `max_target_tokens` (both count special tokens), `truncate` and `references`.
        encoder_decoder: prompt as T5 reads it (EOS at its end) instead of as a decoder-only model continues it.
        cache: folder of cached results; each is a file that is created atomically. None: results stay in memory.

    Returns:
        Columns prompt_ids (n_prompt,), target_ids (n_target,), references (texts to score against; the target is the
        first), prompt_lost (the part that it lost: "", "start", "end", "input", or "definition" and then its whole
        input), target_cut (whether the target lost tokens) and truncated (whether the prompt or, in training, the
        target did).

    Raises:
        GainLoRAError: the cache folder cannot be written.
    """
    import datasets

    examples: tuple[Example, ...] = getattr(task, split)
    prompts = [task.parts(e) for e in examples]
    references = [pick_references(e, data.references, task.name) for e in examples]
    limits = (data.max_prompt_tokens, data.max_target_tokens, data.truncate)
    frame = _prompt_frame(tokenizer, data, encoder_decoder) if data.template else ()
    key = _digest(FORMAT, prompts, references, split, *limits, encoder_decoder, _fingerprint(tokenizer), *frame)
    file = cache and cache / f"{task.name}-{split}-{key[:16]}.arrow"
    if file and (kept := _load(file)):
        return kept
    prompt_ids, prompt_lost = encode_prompts(prompts, tokenizer, data, encoder_decoder)
    room = data.max_target_tokens - 1
    answers = encode([r[0] for r in references], tokenizer)
    target_cut = [len(answer) > room for answer in answers]
    columns = {
        "prompt_ids": prompt_ids,
        "target_ids": [[*answer[:room], tokenizer.eos_token_id] for answer in answers],
        "references": references,
        "prompt_lost": prompt_lost,
        "target_cut": target_cut,
        "truncated": [bool(p) or (t and split == "train") for p, t in zip(prompt_lost, target_cut, strict=True)],
    }
    ids, text, flag = datasets.List(datasets.Value("int32")), datasets.Value("string"), datasets.Value("bool")
    types = dict(zip(columns, (ids, ids, datasets.List(text), text, flag, flag), strict=True))
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(types))
    if file:
        _save(made, file)
    return made


def pick_references(example: Example, which: Literal["all", "first", "sampled"], task: str) -> list[str]:
    """The references to score against, the one to train on first. The draw of `sampled` depends on the task's name
    and the example's content only."""
    references = list(example.references)
    if which == "sampled":
        drawn = int(_digest(DRAW, task, example.input, references), 16) % len(references)
        return [references[drawn]]
    return references if which == "all" else references[:1]


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, data: DataConfig, encoder_decoder: bool
) -> tuple[list[list[int]], list[str]]:
    """Token ids of at most `data.max_prompt_tokens` each, special tokens included; and the part that each prompt lost.

    Raises:
        GainLoRAError: the special tokens alone reach the limit.
    """
    if data.template:
        prompts = [prompt._replace(cue="") for prompt in prompts]
    prefix, suffix = _prompt_frame(tokenizer, data, encoder_decoder)
    room = data.max_prompt_tokens - len(prefix) - len(suffix)
    if room < 1:
        raise GainLoRAError(
            f"data.max_prompt_tokens: {data.max_prompt_tokens} leaves no room beside {len(prefix) + len(suffix)} "
            "special tokens; raise it."
        )
    ids = encode([prompt.text for prompt in prompts], tokenizer)
    side = "start" if data.truncate == "input" else data.truncate  # of a prompt without parts
    lost = ["" if len(i) <= room else side for i in ids]
    if data.truncate == "input":
        _shorten_parts(prompts, ids, lost, tokenizer, room)
    kept = [i[:room] if side == "end" else i[-room:] for i in ids]
    return [prefix + i + suffix for i in kept], lost


def _shorten_parts(prompts: Sequence[Prompt], ids: list[list[int]], lost: list[str], tokenizer: Any, room: int) -> None:
    """Encode prompts that are too long anew, without the end of their input or, if necessary, of their definition.

    A prompt without either that is still too long is left to lose its start.
    """
    parts: tuple[Part, ...] = ("input", "definition")
    for part in parts:
        too_long = {n: prompts[n] for n, found in enumerate(ids) if len(found) > room and getattr(prompts[n], part)}
        shorter = shorten(too_long, part, lambda texts: encode(texts, tokenizer), room)
        prompts = [shorter.get(n, prompt) for n, prompt in enumerate(prompts)]
        for n, found in zip(shorter, encode([p.text for p in shorter.values()], tokenizer), strict=True):
            ids[n], lost[n] = found, part


def count_cut(rows: Any) -> dict[str, int]:
    """How many prompts lost text, how many of these all of their input and some of their definition, and how many
    targets lost tokens; empty if none did."""
    lost = rows["prompt_lost"][:]
    counts = sum(map(bool, lost)), lost.count("definition"), sum(rows["target_cut"])
    return {what: n for what, n in zip(("prompts", "definitions", "targets"), counts, strict=True) if n}


def collate(
    rows: Sequence[dict[str, Any]], pad_id: int, encoder_decoder: bool, targets: bool
) -> dict[str, "torch.Tensor"]:
    """Pad rows to one batch of B sequences; every tensor is int64.

    Args:
        rows: with prompt_ids and, if `targets`, target_ids.
        pad_id: id written on padding (masked in attention, ignored in labels).
        encoder_decoder: T5-like instead of decoder-only.
        targets: training batch (teacher forced) instead of prompts to complete.

    Returns:
        Encoder-decoder: input_ids, attention_mask (B, longest prompt), padded right; with targets
        labels (B, longest target), padded right with -100.
        Decoder-only, padded left: input_ids, attention_mask (B, S), S the longest prompt, or with targets the
        longest prompt + target; then also labels (B, S), -100 on prompt and padding, and position_ids (B, S),
        counted from each row's first real token.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        side = "right" if encoder_decoder else "left"
        return pad_sequence([torch.tensor(r, dtype=torch.int64) for r in rows], True, value, side)

    inputs = [list(r["prompt_ids"]) for r in rows]
    labels = answers = [list(r["target_ids"]) for r in rows] if targets else []
    if targets and not encoder_decoder:
        labels = [[IGNORED] * len(p) + a for p, a in zip(inputs, answers, strict=True)]
        inputs = [p + a for p, a in zip(inputs, answers, strict=True)]
    mask = padded([[1] * len(i) for i in inputs], 0)
    batch = {"input_ids": padded(inputs, pad_id), "attention_mask": mask}
    if targets:
        batch["labels"] = padded(labels, IGNORED)
    if targets and not encoder_decoder:
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, S)
    return batch


def lengths(rows: Any) -> list[int]:
    """Tokens of each row's prompt and target together."""
    return [len(p) + len(t) for p, t in zip(rows["prompt_ids"], rows["target_ids"], strict=True)]


def chunks(items: list[T], size: int) -> list[list[T]]:
    """The items in lists of one size; the last may be smaller."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def buckets(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, the longest first (so that a lack of memory shows at once)."""
    return chunks(sorted(range(len(lengths)), key=lambda i: -lengths[i]), batch_size)


def epoch_batches(n: int, batch_size: int, seed: int, task: int, epoch: int) -> list[list[int]]:
    """Indices 0..n-1, shuffled by (seed, task, epoch) alone, in batches; the last may be smaller."""
    order = list(range(n))
    random.Random(f"{seed}/{task}/{epoch}").shuffle(order)
    return chunks(order, batch_size)


def _prompt_frame(tokenizer: Any, data: DataConfig, encoder_decoder: bool) -> tuple[list[int], list[int]]:
    """The tokens before and after a prompt's text: special tokens, or the chat template around a user's message."""
    if not data.template:
        prefix, suffix = _frame(tokenizer)
        return prefix, (suffix or [tokenizer.eos_token_id]) if encoder_decoder else []
    if not getattr(tokenizer, "chat_template", None):
        raise GainLoRAError(
            f"data.template: the tokenizer of {tokenizer.name_or_path or 'this model'!r} has no chat template; set it "
            "to null, or choose a model that was trained on chats."
        )
    message = [{"role": "user", "content": PLACE}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition(PLACE)
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] if part else [] for part in (before, after)]
    return ids[0], ids[1]


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text, read off a sample."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    extra = len(framed) - len(plain)
    start = next(i for i in range(extra + 1) if framed[i : i + len(plain)] == plain)
    return framed[:start], framed[start + len(plain) :]


def encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids without special tokens: "</s>" inside a text is text, not an end."""
    plain = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    return tokenizer(texts, verbose=False, **plain)["input_ids"] if texts else []


def _fingerprint(tokenizer: Any) -> str:
    """A digest of how the tokenizer turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one written in Python
        state = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    else:
        if backend.padding or backend.truncation:  # left by earlier calls, of no effect here
            backend = type(backend).from_str(backend.to_str())
            backend.no_padding()
            backend.no_truncation()
        state = backend.to_str()
    return _digest(state, *_frame(tokenizer), tokenizer.eos_token_id)


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _load(file: Path) -> "datasets.Dataset | None":
    """The cached rows, memory-mapped; None if there are none or they are damaged."""
    import datasets

    try:
        return datasets.Dataset.from_file(str(file))
    except (OSError, ValueError):
        return None


def _save(rows: "datasets.Dataset", file: Path) -> None:
    """Write beside `file`, then rename: other processes see all of it or nothing."""
    import pyarrow

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".part-") as part:
            new = Path(part) / file.name
            with pyarrow.OSFile(str(new), "wb") as stream, pyarrow.ipc.new_stream(stream, rows.data.schema) as writer:
                writer.write_table(rows.data.table)
            new.rename(file)
    except OSError as error:
        raise GainLoRAError(f"{file}: cannot be written ({error}); free or allow space there.") from None
