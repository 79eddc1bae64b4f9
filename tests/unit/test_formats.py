"""Task files of the usual formats: what is recognized, what becomes of it, and what is refused."""

import json

import datasets
import numpy as np
import pytest

from gainlora.config import load_config
from gainlora.data.formats import Source
from gainlora.data.tasks import Task, load_order, read_task, take_task
from gainlora.errors import GainLoRAError

ROWS = [("The page stays white", "support"), ("A wrong, or late, sum", "billing"), ("Grüße; “hello”", "support")]
TABLE = [dict(zip(("text", "label"), row, strict=True)) for row in ROWS]


def tables(folder):
    """The same rows in a file of each format."""
    lines = ["text{0}label", *('"{}"{{0}}{}'.format(*row) for row in ROWS)]
    (folder / "comma.csv").write_text("\n".join(lines).format(","), encoding="utf-8")
    (folder / "semicolon.csv").write_text(
        "\r\n".join([*lines, "{0}", ""]).format(";"), encoding="utf-8-sig", newline=""
    )
    (folder / "tabs.tsv").write_text("\n".join(lines).format("\t"), encoding="utf-8")
    (folder / "list.json").write_text(json.dumps(TABLE), encoding="utf-8-sig")
    (folder / "lines.jsonl").write_text("\n\n".join(map(json.dumps, TABLE)) + "\n")
    data = datasets.Dataset.from_list(TABLE)
    data.to_parquet(folder / "table.parquet")
    data.save_to_disk(folder / "saved")
    return {path.stem: path for path in folder.iterdir()}


def pairs(task_or_split):
    return [(example.input, *example.references) for example in task_or_split]


def test_every_format_holds_the_same_examples(tmp_path):
    for name, path in tables(tmp_path).items():
        split, content = Source.of(path).read("train")
        assert pairs(split.examples) == ROWS, name
        assert content and any("empty rows" in note for note in split.notes) == (name == "semicolon")


SHAPES = {
    "input, output": {"input": "q", "output": "a"},
    "prompt, completion": {"prompt": "q", "completion": "a"},
    "TRACE": {"prompt": "q", "answer": "a"},
    "O-LoRA": {"sentence": "q", "label": "a"},
    "of a spreadsheet": {" Text": "q", "LABEL ": "a", "comment": "x"},
    "Alpaca without input": {"instruction": "q", "input": "", "output": "a"},
    "chat": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_columns_are_recognized(row):
    task = Task("t", [row], [row])
    assert pairs(task.train) == pairs(task.test) == [("q", "a")]


def test_alpaca_and_chats_keep_all_that_precedes_the_answer():
    task = Task("t", [{"instruction": "Add.", "input": "1 2", "output": "3"}], [{"input": "x", "output": "y"}])
    assert pairs(task.train) == [("Add.\n1 2", "3")]
    turns = [("system", "Be short."), ("user", "1 2?"), ("assistant", "3"), ("user", "4?"), ("assistant", "7")]
    chat = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    assert pairs(Task("t", chat, chat).train) == [("system: Be short.\nuser: 1 2?\nassistant: 3\nuser: 4?", "7")]
    parts = [[{"type": "text", "text": text}] for text in ("1 2?", "3")]
    said = [{"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), parts, strict=True)]}]
    assert pairs(Task("t", said, said).train) == [("1 2?", "3")]
    said[0]["messages"][0]["content"] = [{"type": "image", "url": "x"}]
    with pytest.raises(GainLoRAError, match="'input' is a list"):
        Task("t", said, said)


def test_numbers_and_class_labels_become_text_and_this_is_said_once():
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(4)]
    task = Task("t", [{**row, "label": np.int64(row["label"])} for row in rows], rows)
    assert [e.references for e in task.train] == [("0",), ("1",)] * 2
    assert task.notes == tuple(
        f"task t: {split}: 4 answers are numbers, and become text." for split in ("train", "test")
    )
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    named = Task("t", data := datasets.Dataset.from_list(rows, features=names), data)
    assert [e.references for e in named.train] == [("neg",), ("pos",)] * 2
    assert named.notes == ("label: numbers are replaced by their names: neg, pos.",)


def test_memory_and_files_are_one_task(tmp_path):
    pandas = pytest.importorskip("pandas")
    made = [
        Task("t", kind, kind, "Say") for kind in (TABLE, datasets.Dataset.from_list(TABLE), pandas.DataFrame(TABLE))
    ]
    assert made[0] == made[1] == made[2] and len(made[0].sha256) == 64
    assert made[0].sha256 != Task("t", TABLE, TABLE, "Tell").sha256
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, TABLE)))
    source = Source(tmp_path, instruction="Say")
    read = read_task(source, "long_sequence", "exact_match", "t")
    assert (read.train, read.test, read.instruction) == (made[0].train, made[0].test, "Say")
    assert read.sha256 != read_task(tmp_path, "long_sequence", "exact_match", "t").sha256  # the instruction counts
    taken = take_task(source, tmp_path / "run" / "t", "long_sequence", "exact_match")
    assert (taken.train, taken.test, taken.instruction) == (read.train, read.test, "Say")


REFUSED = {
    "no known columns": (
        "body,team\na,b\n",
        "no columns are known as input and answer (columns: body, team); name them",
    ),
    "several": ("text,label,input,output\na,b,c,d\n", "several columns may be input and answer (columns: text, label,"),
    "a short row": ("text,label\na,b\nc\n", "line 3: has 1 values for 2 columns"),
    "an open quote": ('text,label\n"a,b\n', "line 2: unexpected end of data"),
    "a column twice": ("text,text\na,b\n", "a column is given twice"),
    "no row": ("text,label\n,\n", "has no row"),
    "a byte order mark alone": ("\ufeff", "has no row"),
    "no input": ("text,label\n,b\n", "row 1: 'input' is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_tables_name_file_row_and_columns(tmp_path, case):
    content, message = REFUSED[case]
    (tmp_path / "mine.csv").write_text(content)
    with pytest.raises(GainLoRAError) as caught:
        Source.of(tmp_path / "mine.csv").read("train")
    assert message in str(caught.value) and str(tmp_path / "mine.csv") in str(caught.value)


@pytest.mark.parametrize("content", ["\ntext;label\na,b;c\n", "sep=;\ntext;label\na,b;c\n"])
def test_a_table_begins_at_its_first_line_that_holds_columns(tmp_path, content):
    (tmp_path / "MINE.CSV").write_text(content)
    assert pairs(Source.of(tmp_path / "MINE.CSV").read("train")[0].examples) == [("a,b", "c")]


def test_named_columns_are_read_and_must_exist(tmp_path):
    (tmp_path / "mine.csv").write_text("text,label,body,team\na,b,c,d\n")
    assert pairs(Source(tmp_path / "mine.csv", "body", "team").read("train")[0].examples) == [("c", "d")]
    with pytest.raises(GainLoRAError, match=r"no column 'teams' for output \(columns: text, label, body, team\)"):
        Source(tmp_path / "mine.csv", "body", "teams").read("train")
    with pytest.raises(GainLoRAError, match="output: name this column, too"):
        Source(tmp_path / "mine.csv", "body").read("train")


def test_an_order_of_folders_files_and_deeper_folders(tmp_path):
    """TRACE's three files, O-LoRA's folder of folders, SuperNI's single files, and a table with other columns."""
    rows = [{"input": f"text {n}", "output": "yes"} for n in range(10)]
    data = tmp_path / "data"
    for folder, names, (a, b) in (
        ("trace", ("train", "eval", "test"), ("prompt", "answer")),
        ("SC/yelp", ("train", "dev", "test"), ("sentence", "label")),
    ):
        (data / folder).mkdir(parents=True)
        for name in names:
            part = [{a: f"{name} {r['input']}", b: r["output"]} for r in rows]
            (data / folder / f"{name}.json").write_text(json.dumps(part))
    superni = {"Contributors": ["x"], "Definition": ["Judge."], "Positive Examples": [], "Instance License": ["y"]}
    instances = [{"id": f"task1-{n}", "input": r["input"], "output": [r["output"]]} for n, r in enumerate(rows)]
    (data / "task1_x.json").write_text(json.dumps({**superni, "Instances": instances}))
    (data / "mine.csv").write_text("body,team\n" + "".join(f"text {n},support\n" for n in range(10)))
    (tmp_path / "mixed.yaml").write_text(
        "data: data\ntemplate: long_sequence\nmetric: exact_match\ntasks: [trace, yelp, task1_x, tickets]\n"
        'sources:\n  tickets: {path: mine.csv, input: body, output: team, instruction: "Which team?"}\n'
        "settings: {data.validation: auto}\n"
    )
    config = load_config(str(tmp_path / "mixed.yaml"), params={})
    tasks, skipped = load_order(config.order, config.data, tmp_path)
    assert skipped == [] and [task.name for task in tasks] == ["trace", "yelp", "task1_x", "tickets"]
    assert [len(part) for t in tasks for part in (t.train, t.validation, t.test)] == [10] * 6 + [6, 2, 2] * 2
    assert [t.validation_from for t in tasks[:2]] == ["eval.json", "dev.json"]
    assert [t.instruction for t in tasks] == ["", "", "Judge.", "Which team?"]
    assert "2 of 10 rows, one in 5 different inputs, are held out to test." in tasks[2].notes[0]
    plain, _ = load_order(config.order, config.data.model_copy(update={"instruction": "none"}), tmp_path)
    assert [t.instruction for t in plain] == [""] * 4
    (data / "MT" / "yelp").mkdir(parents=True)
    with pytest.raises(GainLoRAError, match=r"yelp is .*MT/yelp or .*SC/yelp; name its path under sources"):
        load_order(config.order, config.data, tmp_path)


def test_a_data_set_of_the_hub_is_its_parts(monkeypatch):
    asked = []

    def load(name, revision):
        asked.append((name, revision))
        return datasets.DatasetDict(train=datasets.Dataset.from_list(TABLE), test=datasets.Dataset.from_list(TABLE[:1]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = read_task("hub:someone/tickets@v1", "long_sequence", "exact_match")
    assert asked[0] == ("someone/tickets", "v1") and (task.name, pairs(task.train)) == ("tickets", ROWS)
    assert pairs(task.test) == ROWS[:1]


def test_a_hub_that_does_not_answer_is_named():
    with pytest.raises(GainLoRAError, match=r"hub:someone/tickets: cannot be loaded from the hub \("):
        Source.of("hub:someone/tickets").read("train")
