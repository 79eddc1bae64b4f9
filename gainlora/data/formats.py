"""Rows of the usual formats -> examples: JSON, JSON Lines, CSV, TSV and Parquet files, data sets saved by
`datasets.save_to_disk`, data sets of the hub; lists of dicts, data frames and `datasets.Dataset` in memory.

The benchmark's own format (`gainlora.data.tasks`) is one JSON object; it is read with the same checks.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any, NamedTuple

from gainlora.data.instances import REMEDY, Split, benchmark_split, checked_examples, kind
from gainlora.errors import GainLoRAError, reason
from gainlora.io import decode, parse_json, read_bytes

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
"""Formats of files."""
SPLITS = {"train": ("train",), "test": ("test",), "dev": ("dev", "eval", "validation", "valid")}
"""Split -> names of its file, or of a data set's part."""
PAIRS = (("input", "output"), ("prompt", "completion"), ("prompt", "answer"), ("text", "label"), ("sentence", "label"))
"""Columns that are recognized as input and answer; besides these Alpaca's and `messages`."""
HUB = "hub:"
Reader = Callable[[Mapping[Any, Any]], Any]


class Source(NamedTuple):
    """Where a task's examples are, and how to read them."""

    place: Path | str
    """A folder with one file for each split, one file, a folder of `save_to_disk`, or hub:OWNER/NAME@REVISION."""
    input: str | None = None
    """Column of the input; None: recognized."""
    output: str | None = None
    """Column of the answer; None: recognized."""
    instruction: str | None = None
    """In place of the files' definition."""

    @classmethod
    def of(cls, place: "Source | Path | str") -> "Source":
        """A source, from its place."""
        if isinstance(place, Source):
            return place
        return cls(str(place) if str(place).startswith(HUB) else Path(place))

    @property
    def name(self) -> str:
        """The task's name: that of the file or folder, or of the data set without its owner."""
        if isinstance(self.place, str):
            return self.place.removeprefix(HUB).partition("@")[0].rpartition("/")[2]
        path = self.place.absolute()
        return path.stem if path.suffix.lower() in SUFFIXES else path.name

    def label(self, split: str) -> str:
        """The split's file, for messages."""
        if isinstance(self.place, str) or self.place.suffix.lower() in SUFFIXES or _saved(self.place):
            return f"{self.place}: {split}"
        return str(_file(self.place, split) or self.place / f"{split}.json")

    def lacks(self) -> list[str]:
        """The files of a complete folder that are missing."""
        if isinstance(self.place, str) or self.place.suffix.lower() in SUFFIXES or _saved(self.place):
            return [] if isinstance(self.place, str) or self.place.exists() else [str(self.place)]
        files = {f"{split}.json": _file(self.place, split) for split in ("train", "test")}
        return [name for name, file in files.items() if file is None or not file.is_file()]

    def read(self, split: str) -> tuple[Split, bytes] | None:
        """A split and the bytes that identify it; None: there is none. A single file is all `train`.

        Args:
            split: train, test or dev.

        Raises:
            GainLoRAError: the split cannot be read, or is in no known format.
        """
        blank = split != "test"  # the benchmark has instances without an answer, in its training files alone
        if isinstance(self.place, str) or _saved(self.place):
            parts = _hub(self.place) if isinstance(self.place, str) else _saved_parts(self.place)
            part = next((parts[name] for name in SPLITS[split] if name in parts), None)
            if part is None and split == "train":
                raise GainLoRAError(f"{self.place}: has no part 'train' (parts: {', '.join(parts)}).")
            if part is None:
                return None
            rows, notes = memory_rows(part)
            found = rows_split(rows, f"{self.place}: {split}", self.input, self.output, blank, notes)
            return self._instructed(found), _identifying(found)
        single = self.place.suffix.lower() in SUFFIXES
        path = self.place if single else _file(self.place, split)
        if (single and split != "train") or (path is None and split == "dev"):
            return None
        path = path or self.place / f"{split}.json"
        absent = "name a task's file or folder" if single else "a task folder holds train.json and test.json"
        content = read_bytes(path, absent, REMEDY)
        return self._instructed(parse_split(content, path, blank, self.input, self.output)), content

    def _instructed(self, split: Split) -> Split:
        return split if self.instruction is None else split._replace(definition=self.instruction.strip())

    @property
    def plain(self) -> bool:
        """Whether this is a folder in the benchmark's format."""
        if isinstance(self.place, str) or self.mapping:
            return False
        files = [self.place / f"{split}.json" for split in ("train", "test")]
        return all(f.is_file() and f.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{" for f in files)

    @property
    def mapping(self) -> bytes:
        """What identifies the reading beside the bytes; empty by default."""
        given = self[1:]
        return json.dumps(given).encode() if any(value is not None for value in given) else b""


def parse_split(
    content: bytes, path: Path, allow_blank: bool = False, input: str | None = None, output: str | None = None
) -> Split:
    """One file's definition and examples.

    Args:
        allow_blank: leave out instances whose reference list holds only blank text (6 in one benchmark task's
            train.json); refused otherwise.
        input: column of the input; None: recognized. output: column of the answer.

    Raises:
        GainLoRAError: the content is in no known format.
    """
    notes: list[str] = []
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows, notes = memory_rows(_parquet(content, path))
    elif suffix in (".csv", ".tsv"):
        rows = list(_table(decode(content, path), path))
    elif suffix == ".jsonl":
        lines = enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1)
        rows = [parse_json(line, f"{path}: line {number}", REMEDY) for number, line in lines if line.strip()]
    else:
        rows = parse_json(content, path, REMEDY)
        if isinstance(rows, dict):
            return benchmark_split(rows, path, allow_blank)
        if not isinstance(rows, list):
            raise GainLoRAError(f"{path}: holds {kind(rows)}; expected an object with 'Definition' and 'Instances'.")
    return rows_split(rows, str(path), input, output, allow_blank, notes)


def memory_rows(rows: Any) -> tuple[list[Any], list[str]]:
    """Rows of a list of dicts, a data frame or a `datasets.Dataset`, whose class labels become their names; notes."""
    if isinstance(rows, (list, tuple)):
        return list(rows), []
    if hasattr(rows, "to_dict") and hasattr(rows, "iloc"):  # pandas
        return rows.to_dict("records"), []
    features, notes = getattr(rows, "features", {}), []
    rows = list(rows)
    for column, feature in features.items():
        if names := getattr(feature, "names", None):
            rows = [{**row, column: None if (k := row[column]) in (None, -1) else names[k]} for row in rows]
            notes.append(f"{column}: numbers are replaced by their names: {', '.join(names)}.")
    return rows, notes


def rows_split(
    rows: Sequence[Any], where: str, input: str | None, output: str | None, allow_blank: bool, notes: Iterable[str] = ()
) -> Split:
    """Examples of rows with columns.

    Args:
        where: for messages: the file's name.

    Raises:
        GainLoRAError: the columns are not recognized, or a value is no text.
    """
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise GainLoRAError(f"{where}: row {number} is {kind(row)}; give rows with columns, such as input, output.")
    full = [(n, row) for n, row in enumerate(rows, start=1) if not all(map(_missing, row.values()))]
    if not full:
        raise GainLoRAError(f"{where}: has no row; give at least one with input and output.")
    made, numbers = [], 0
    read, answer = _columns(full[0][1], where, input, output)
    for number, row in full:
        target = answer(row)
        entries = target if isinstance(target, list) else [target]
        numbers += sum(isinstance(entry, Number) and not _missing(entry) for entry in entries)
        answers = list(map(_as_text, target)) if isinstance(target, list) else _as_text(target)
        made.append((f"{where}: row {number}", {"input": read(row), "output": answers}))
    examples, more = checked_examples(made, where, allow_blank)
    said = [*notes, *more]
    if empty := len(rows) - len(full):
        said.append(f"{Path(where).name}: {empty} empty rows are left out.")
    if numbers:
        said.append(f"{Path(where).name}: {numbers} answers are numbers, and become text.")
    return Split("", examples, said)


# ---- columns -----------------------------------------------------------------------------------------------------


def _columns(row: Mapping[Any, Any], where: str, input: str | None, output: str | None) -> tuple[Reader, Reader]:
    """How to read a row's input and its answer."""
    known = {str(column).strip().casefold(): column for column in row}
    listing = ", ".join(map(str, row)) or "none"
    for option, column in (("input", input), ("output", output)):
        if column is not None and column not in row:
            raise GainLoRAError(f"{where}: has no column {column!r} for {option} (columns: {listing}).")
    if bool(input) != bool(output):
        raise GainLoRAError(f"{where}: {'output' if input else 'input'}: name this column, too (columns: {listing}).")
    if not input and {"instruction", "output"} <= known.keys():  # Alpaca
        parts, answer = [known[name] for name in ("instruction", "input") if name in known], known["output"]
        return lambda r: _lines([_as_text(r.get(p)) for p in parts]), lambda r: r.get(answer)
    found = [(input, output)] if input else [(known[a], known[b]) for a, b in PAIRS if a in known and b in known]
    if not input and "messages" in known:
        found.append((known["messages"], known["messages"]))
    if len(found) != 1:
        why = "several columns may be input and answer" if found else "no columns are known as input and answer"
        raise GainLoRAError(
            f"{where}: {why} (columns: {listing}); name them: input=COLUMN, output=COLUMN (--input, --output)."
        )
    ((first, second),) = found
    if second != known.get("messages"):
        return lambda r: _as_text(r.get(first)), lambda r: r.get(second)
    asked: Reader = (lambda r: _chat(r.get(first))[0]) if first == second else (lambda r: _as_text(r.get(first)))
    return asked, lambda r: _chat(r.get(second))[1]


def _lines(texts: list[Any]) -> Any:
    """Texts on a line each, without empty ones; if one is no text it is returned, to be refused."""
    other = [text for text in texts if not isinstance(text, str)]
    return other[0] if other else "\n".join(text.strip() for text in texts if text)


def _chat(messages: Any) -> tuple[Any, Any]:
    """All messages before the last answer, with their roles if there are several, and that answer; ("", None) if these
    are no messages that end in an answer."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return "", None
    turns = [(str(m.get("role")), _content(m.get("content"))) for m in messages if isinstance(m, Mapping)]
    if len(turns) < max(2, len(messages)) or turns[-1][0] not in ("assistant", "gpt", "model"):
        return "", None
    *before, (_, answer) = turns
    spoken = [f"{role}: {text}" if isinstance(text, str) else text for role, text in before]
    return before[0][1] if len(before) == 1 else _lines(spoken), answer


def _content(content: Any) -> Any:
    """A message's text, also where it comes in parts of type text; anything else unchanged, to be refused."""
    parts = content if isinstance(content, list) else []
    if parts and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        return "\n".join(part["text"] for part in parts)
    return _as_text(content)


def _missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _as_text(value: Any) -> Any:
    """Numbers as text, missing values as empty text, anything else unchanged."""
    if _missing(value):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, Number) else value


# ---- files -------------------------------------------------------------------------------------------------------


def _file(folder: Path, split: str) -> Path | None:
    """The folder's file of a split."""
    found = [p for name in SPLITS[split] for suffix in SUFFIXES if (p := folder / f"{name}{suffix}").exists()]
    if len(found) > 1:
        raise GainLoRAError(f"{folder}: {found[0].name} and {found[1].name} are the same split; keep one.")
    return found[0] if found else None


def _table(text: str, path: Path) -> Iterator[dict[str, str]]:
    """Rows of CSV or TSV; spreadsheets of many countries separate by semicolons."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    declared = re.fullmatch("sep=(.)", header.strip())  # as spreadsheets write it
    usual = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    delimiter = declared[1] if declared else usual
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = filter(None, reader)
        if declared:
            next(rows)
        names = [name.strip() for name in next(rows, [])]
        if len(set(names)) < len(names):
            raise GainLoRAError(f"{path}: a column is given twice (columns: {', '.join(names)}); {REMEDY}.")
        for row in rows:
            if len(row) != len(names):
                place = f"{path}: line {reader.line_num}"
                raise GainLoRAError(f"{place}: has {len(row)} values for {len(names)} columns; {REMEDY}.")
            yield dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise GainLoRAError(f"{path}: line {reader.line_num}: {error}; {REMEDY}.") from None


def _parquet(content: bytes, path: Path) -> Any:
    import datasets
    import pyarrow
    from pyarrow import parquet

    try:
        return datasets.Dataset(datasets.table.InMemoryTable(parquet.read_table(pyarrow.BufferReader(content))))
    except (pyarrow.ArrowException, ValueError, TypeError) as error:
        raise GainLoRAError(f"{path}: cannot be read ({reason(error)}); {REMEDY}.") from None


def _saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _saved_parts(folder: Path) -> Mapping[str, Any]:
    """The parts of a folder that `save_to_disk` wrote."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # any exception: datasets does not check the files' content
        raise GainLoRAError(f"{folder}: cannot be read ({reason(error)}); {REMEDY}.") from None
    return found if isinstance(found, Mapping) else {"train": found}


def _hub(name: str) -> Mapping[str, Any]:
    """The parts of a data set of the hub."""
    import datasets

    repo, _, revision = name.removeprefix(HUB).partition("@")
    try:
        found = datasets.load_dataset(repo, revision=revision or None)
    except Exception as error:  # of the hub, the network, or the data set
        raise GainLoRAError(
            f"{name}: cannot be loaded from the hub ({reason(error)}); give hub:OWNER/NAME@REVISION of a data "
            "set that you have access to."
        ) from None
    return dict(found)


def _identifying(split: Split) -> bytes:
    return json.dumps([split.definition, *((e.input, e.references) for e in split.examples)]).encode()
