"""Prompts as separate parts, so that truncation removes only text of the input or definition.

Templates: the authors' (GainLoRA, NeurIPS 2025). Parts are concatenated: braces in the data are text.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from gainlora.errors import GainLoRAError, did_you_mean, short_repr

NOW = "Now complete the following example -\nInput: "
CUE = "\nOutput: "
"""End of every template: asks for the answer."""
Part = Literal["input", "definition"]


class Prompt(NamedTuple):
    """The text that the model completes: definition and input, and the template's text around them."""

    head: str
    definition: str
    middle: str
    input: str
    cue: str = CUE

    @property
    def text(self) -> str:
        """The whole prompt."""
        return "".join(self)

    def keep(self, part: Part, length: int) -> Self:
        """The prompt with the first `length` characters of that part; without trailing blanks."""
        return self._replace(**{part: getattr(self, part)[:length].rstrip()})


def build_prompt(template: str, definition: str, text: str) -> Prompt:
    """The prompt for an input text of a task.

    Args:
        template: `superni` or `long_sequence`.
        definition: the task's instruction; "": none.
    """
    if template == "superni":
        return Prompt("Definition: " if definition else "", definition, f"\n\n{NOW}" if definition else NOW, text)
    return Prompt("", definition, "\n" if definition else "", text)


def parse_prompt(template: str, text: str, definitions: Iterable[str] = ()) -> Prompt:
    """The parts of a prompt given as one text.

    Args:
        definitions: of the tasks to which it may belong. With another definition, all but the template's end is
            input; a text without that end is all head.
    """
    if not text.endswith(CUE):
        return Prompt(text, "", "", "", "")
    body = text.removesuffix(CUE)
    for definition in sorted(definitions, key=len, reverse=True):
        prompt = build_prompt(template, definition, "")
        before = prompt.text.removesuffix(CUE)
        if body.startswith(before):
            return prompt._replace(input=body.removeprefix(before))
    return Prompt("", "", "", body)


def shorten(
    prompts: Mapping[int, Prompt], part: Part, encode: Callable[[list[str]], list[list[int]]], room: int
) -> dict[int, Prompt]:
    """Shorten one part of each prompt to the longest beginning with which the prompt has at most `room` tokens; to
    nothing if it is still too long then.

    Args:
        prompts: by any index; each has more than `room` tokens.
        encode: texts -> token ids. Every candidate is encoded in full, so the limit is exact however the tokenizer
            treats the cut.
    """
    fits = dict.fromkeys(prompts, 0)  # characters; 0 counts as fitting
    too_long = {n: len(getattr(prompt, part)) for n, prompt in prompts.items()}
    while open_ := [n for n in prompts if too_long[n] - fits[n] > 1]:
        tried = {n: (fits[n] + too_long[n]) // 2 for n in open_}
        ids = encode([prompts[n].keep(part, length).text for n, length in tried.items()])
        for (n, length), found in zip(tried.items(), ids, strict=True):
            (fits if len(found) <= room else too_long)[n] = length
    return {n: prompt.keep(part, fits[n]) for n, prompt in prompts.items()}


def as_prompts(texts: Any, template: str, instructions: Mapping[str, str], task: str | None = None) -> list[Prompt]:
    """Prompts for texts: inputs, which get a task's instruction, or complete prompts, which end in "Output: ".

    Args:
        instructions: of each learned task.
        task: whose instruction; None: the one that all tasks share.

    Raises:
        GainLoRAError: no texts; no such task; or none is given and the tasks have several instructions.
    """
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise GainLoRAError(f"texts: {short_repr(texts)}: give a list of texts.")
    if task is not None and task not in instructions:
        raise GainLoRAError(f"task: {task!r} is not learned{did_you_mean(task, instructions)}.")
    chosen = [instructions[task]] if task else sorted(set(instructions.values()))
    if len(chosen) != 1 and not all(text.endswith(CUE) for text in texts):
        names = ", ".join(instructions) or "none"
        raise GainLoRAError(f"task: name the one whose instruction to ask with, as there are several ({names}).")
    whole = [t if t.endswith(CUE) else build_prompt(template, chosen[0], t.strip()).text for t in texts]
    return [parse_prompt(template, text, set(instructions.values())) for text in whole]
