"""Plain values -> sections of options (pydantic): the first thing that is wrong becomes one GainLoRAError."""

import json
from typing import Any, TypeVar, get_origin

from pydantic import TypeAdapter, ValidationError

from gainlora.errors import GainLoRAError, did_you_mean, short_repr
from gainlora.sections import Section

T = TypeVar("T")
RENAMED = {
    "gate.constrain_init": "gate.initial_key: orthogonal for true, open for false, random for the paper's ablation"
}
"""Options of earlier versions -> their replacements."""
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "string_unicode": "text in Unicode",
    "tuple_type": "a list",
    "too_short": "a list that is not empty",
    "dict_type": "option: value",
    "model_type": "a section with options",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
}
"""pydantic's error type -> the expected value."""


def parse(kind: type[T], values: Any) -> T:
    """Plain values as `kind`, a class of sections or a dataclass.

    Raises:
        GainLoRAError: the first thing that is wrong, by its dotted option.
    """
    adapter = TypeAdapter(kind)
    try:
        if issubclass(kind, Section):
            return adapter.validate_python(values)
        return adapter.validate_json(json.dumps(values), strict=True)  # strict, but lists are tuples
    except ValidationError as error:
        raise GainLoRAError(_explanation(error, kind, values)) from None


def _explanation(error: ValidationError, kind: type, values: Any) -> str:
    """The first error, unknown options before wrong values, as one sentence."""
    errors = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    found, path = errors[0], _path(errors[0]["loc"], kind)
    order = values["order"].get("name") if path[:1] == ["order"] and isinstance(values.get("order"), dict) else None
    option = ".".join([f"orders.{order}", *path[1:]] if order else path) or "options"
    if option in RENAMED:
        return f"{option}: is now {RENAMED[option]}."
    if found["type"] in ("extra_forbidden", "invalid_key", "unexpected_keyword_argument"):
        return f"{option}: unknown option{did_you_mean(path[-1], option_names(found['loc'][:-1], kind))}."
    if found["type"] in ("missing", "missing_argument"):
        return f"{option}: missing; it has no default."
    same = [e for e in errors if _path(e["loc"], kind) == path]  # of a union: one per member
    expected = [EXPECTED.get(e["type"], e["msg"]).format_map(e.get("ctx", {})) for e in same]
    return f"{option}: got {short_repr(found['input'])}, expected {' or '.join(dict.fromkeys(expected))}."


def _path(loc: tuple[int | str, ...], kind: Any) -> list[str]:
    """The option's name, without pydantic's suffix for a list's entry or a union's member."""
    known = next((n for n in range(1, len(loc)) if not option_names(loc[:n], kind)), len(loc))
    key = get_origin(_annotation(loc[:known], kind)) is dict  # of a mapping: the key belongs to the name
    return [str(part) for part in loc[: known + key]]


def _annotation(loc: tuple[int | str, ...], kind: Any) -> Any:
    for name in loc:
        field = getattr(kind, "model_fields", {}).get(name)
        kind = field.annotation if field else None
    return kind


def option_names(loc: tuple[int | str, ...], kind: Any) -> list[str]:
    """Names of the options of the section at `loc`; none where there is a value."""
    section = _annotation(loc, kind)
    return list(getattr(section, "model_fields", None) or getattr(section, "__dataclass_fields__", {}))
