"""Bad task files, params.yaml and command lines: one error with name, value and remedy, and nothing is written."""

import json

import pytest

from gainlora.__main__ import main
from gainlora.data.tasks import read_task
from gainlora.errors import LONGEST, GainLoRAError
from gainlora.runs.records import read_record
from tests.fake_run import write_run
from tests.tiny import tiny_params

GOOD = b'{"Instances": [{"input": "a", "output": "b"}]}'


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose order `tiny` is fine but for what a test breaks; nothing is ever learned."""
    model = tmp_path / "base"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text("{}")
    tiny_params(tmp_path, model, count=2)
    write_run(tmp_path, [[50.0]])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def entries(folder):
    return {
        str(p): p.lstat().st_mtime_ns
        for p in sorted(folder.rglob("*"))
        if not p.name.endswith("lock") and not p.is_dir()
    }


def refused(project, capsys, *arguments):
    """What one command says, refused: code 1, one line and perhaps a page, and no file made or changed."""
    before = entries(project)
    assert main(list(arguments)) == 1
    out, err = capsys.readouterr()
    said, *more = err.splitlines()
    assert out == "" and said.startswith("error: ") and len(said) <= LONGEST + 20
    assert all(line.startswith("see docs/troubleshooting.md#") for line in more) and len(more) <= 1
    assert entries(project) == before
    return said


def one(text='"a"', answer='"b"', more=""):
    return f'{{{more}"Instances": [{{"input": {text}, "output": {answer}}}]}}'.encode()


TASK_FILES = {
    "UTF-16": (GOOD.decode().encode("utf-16"), "train.json: not UTF-8 (byte 0); save it again as UTF-8"),
    "NUL bytes": (b"\0" * 100, "train.json: not JSON"),
    "a line break in a text": (one('"a\nb"'), "train.json: not JSON: Invalid control character"),
    "two objects": (GOOD + b"\n" + GOOD, "train.json: not JSON: Extra data: line 2"),
    "a list": (b"[" + GOOD + b"]", "no columns are known as input and answer (columns: Instances)"),
    "null": (b"null", "train.json: holds null"),
    "thousands of keys": (json.dumps({f"key{i}": i for i in range(9999)}).encode(), "'Instances' is missing"),
    "nested objects": (b'{"x": ' * 100_000, "train.json: nested too deeply"),
    "a key twice": (one(more='"Instances": [], '), "not JSON: key 'Instances' is given twice; correct it"),
    "an answer twice": (one(answer='"b", "output": "c"'), "key 'output' is given twice"),
    "a huge number": (one(answer="9" * 5000), "train.json: not JSON: Exceeds the limit (4300 digits)"),
    "a long number": (one(answer="9" * 4000), "instance 0: 'output' is the number <13288 bits>"),
    "not a number": (one("NaN"), "instance 0: 'input' is the number nan; give text"),
    "infinity": (one(answer="[-Infinity]"), "'output' entry 0 is the number -inf; give text"),
    "overflow": (one("1e999"), "'input' is the number inf"),
}


@pytest.mark.parametrize("case", TASK_FILES)
def test_task_files(project, capsys, case):
    content, expected = TASK_FILES[case]
    (project / "data/tiny/task2/train.json").write_bytes(content)
    said = refused(project, capsys, "run", "tiny")
    assert expected in said and "data/tiny/task2/train.json" in said and "9999" not in said


def test_what_is_no_file_is_missing(project, capsys):
    file = project / "data/tiny/task2/train.json"
    file.unlink()
    file.mkdir()
    assert "task2 lacks train.json" in refused(project, capsys, "run", "tiny")
    file.rmdir()
    file.symlink_to(file.name)
    (project / "data/tiny/task2/test.json").unlink()
    said = refused(project, capsys, "run", "tiny")
    assert "task2 lacks train.json and test.json" in said and "--skip-incomplete" in said
    with pytest.raises(GainLoRAError, match=r"train\.json: cannot be read \(Too many levels of symbolic links\)"):
        read_task(file.parent, "superni", "rouge_l")


ORDER = "orders: {tiny: {data: data/tiny, template: superni, metric: rouge_l, tasks: [task1]}}\n"
BOMB = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9) if i else 'x'}]\n" for i in range(30))
MERGES = "".join(f"m{i}: &m{i} {{a{i}: 1, <<: [{', '.join([f'*m{i - 1}'] * 9) if i else ''}]}}\n" for i in range(30))

PARAMS = {
    "empty": ("", "params.yaml: empty; correct it"),
    "comments only": ("# nothing\n", "params.yaml: holds NoneType, not sections"),
    "a tab": ("train:\n\tepochs: 1\n", "params.yaml: not valid YAML: while scanning"),
    "not UTF-8": (b"seed: 1 # \xe9\n", "params.yaml: not UTF-8 (byte 10)"),
    "nested": ("[" * 500, "params.yaml: nested too deeply"),
    "a section twice": ("train: {epochs: 1}\ntrain: {epochs: 2}\n", "key 'train' is given twice"),
    "an option twice": ("train: {epochs: 1, 'epochs': 2}\n", "key 'epochs' is given twice"),
    "code": ("seed: !!python/object/apply:os.system [ls]\n", "params.yaml: not valid YAML"),
    "a bomb of aliases": (BOMB + "seed: *b29\n" + ORDER, "b0: unknown option"),
    "a bomb in an option": (f"seed: [{BOMB.replace(chr(10), ' ')}]".replace("b0: ", "") + "\n", "not valid YAML"),
    "a bomb of merges": (MERGES, "'<<' gathers more than 10000 keys"),
    "itself": ("seed: &s [*s]\n" + ORDER, "seed: got [[[[...]]]], expected a whole number"),
    "a long list": (f"seed: [{'1, ' * 999}]\n" + ORDER, "seed: got [1, 1, 1, 1, 1, 1, ...]"),
    "a number as name": ("1: 2\n" + ORDER, "1: unknown option; known:"),
    "a date": ("train: {epochs: 2024-01-01}\n" + ORDER, "train.epochs: got '2024-01-01', expected a whole number"),
    "a huge number": (f"seed: 0x{'f' * 9000}\n" + ORDER, "seed: got <36000 bits>, expected less than"),
    "too many digits": (f"seed: {'9' * 5000}\n" + ORDER, "params.yaml: not valid YAML: Exceeds the limit"),
    "NUL in a path": ("model: {name: base}\n" + ORDER.replace("data/tiny", '"a\\0b"'), "no such folder"),
    "no model": ("model: {name: no/such/model}\n" + ORDER, "model.name: no/such/model: no such folder, and no hub id"),
    "a user's model": ("model: {name: ~nobody-here/x}\n" + ORDER, "model.name: ~nobody-here/x: no such user"),
    "tracking nowhere": ("tracking: {uri: 'foo://bar'}\nmodel: {name: base}\n" + ORDER, "tracking.uri: 'foo://bar'"),
    "no server": ("tracking: {uri: 'http://127.0.0.1:9'}\nmodel: {name: base}\n" + ORDER, "no MLflow server answers"),
    "tracking NUL": ('tracking: {uri: "sqlite:///a\\0b"}\nmodel: {name: base}\n' + ORDER, "tracking.uri: 'sqlite:"),
    "tracking in a folder": ("tracking: {uri: /tmp}\nmodel: {name: base}\n" + ORDER, "tracking.uri: '/tmp'"),
}  # fmt: skip


@pytest.mark.parametrize("case", PARAMS)
def test_params(project, capsys, case):
    content, expected = PARAMS[case]
    (project / "params.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    assert expected in refused(project, capsys, "run", "tiny")


def test_a_folder_in_place_of_params(project, capsys):
    (project / "params.yaml").unlink()
    assert "params.yaml: not found; run from the project's folder" in refused(project, capsys, "run", "tiny")
    (project / "params.yaml").mkdir()
    assert "params.yaml: cannot be read (Is a directory)" in refused(project, capsys, "run", "tiny")


COMMANDS = [
    ("run tinny", "no order 'tinny'; did you mean 'tiny'"),
    ("run nowhere.yaml", "nowhere.yaml: no such file"),
    ("run data.yaml", "data.yaml: no such file"),
    ("run " + "x" * 300 + ".yaml", "File name too long; name another place"),
    ("run params.yaml", "orders.params.method: unknown option; known: name"),
    ("run tiny --model base/nowhere", "model.name: base/nowhere: no such folder"),
    ("run tiny --model data", "model.name: data: the folder needs config.json and weights"),
    ("run tiny --set seed=1 --set seed=1", "seed: given twice on the command line"),
    ("run tiny --set seed=1 --seed 1", "seed: given twice"),
    ("run tiny --set train.epochs=", "train.epochs: got None, expected a whole number"),
    ("run tiny --set order.tasks=[nothing]", "nothing lacks train.json and test.json"),
    ("run tiny --set order.data=nowhere", "orders.tiny.data: nowhere: no such folder"),
    ("run tiny --set orders.tiny.data=x", "orders: unknown option"),
    ("run tiny --set report.dpi=9", "report.dpi: is set in params.yaml only"),
    ("compare tiny --methods seqlora,nonsense", "method: 'nonsense' is unknown"),
    ("compare tiny --methods ,", "method: '' is unknown"),
    ("compare tiny --set method=olora", "method: given twice"),
    ("compare nothing", "no order 'nothing'"),
    ("sweep", "orders: nothing to run"),
    ("report nowhere", "nowhere: no such run; give a folder"),
    ("report nowhere.json", "nowhere.json: not found"),
    ("report params.yaml", "params.yaml/config.json: not found"),
    ("report base", "base: damaged ('tasks' is missing"),
    ("report base/config.json", "base/config.json: not a result file ('steps' is missing"),
    ("report data/tiny/task1/train.json", "train.json: not a result file ('steps' is missing"),
    ("report", "tracking.uri: sqlite:///"),
    ("results nowhere", "nowhere: no such run"),
    ("results RUN", "1 of 4 tasks are learned; run the same command again"),
    ("results RUN --label a/b", "--label: 'a/b' becomes part of a file's name"),
    ("learn nowhere", "nowhere: no such run"),
    ("forget nowhere --last", "nowhere: no such run"),
    ("promote nowhere --reason x", "nowhere: no such run"),
    ("repair nowhere", "nowhere: no such run"),
    ("repair base", "base/config.json: names no tasks"),
    ("repair RUN --from-task 0", "--from-task: 0: this run has 1 to 1 of its 4 tasks"),
    ("repair embedded --from-task 3", "--from-task: 3: this run has 1 to 1 of its 4 tasks"),
    ("rerun nowhere", "nowhere: no such run"),
    ("rerun base", "base/config.json: lacks config"),
    ("predict nowhere text", "nowhere: no such run"),
    ("predict RUN text", "adapter_config.json: format None is no GainLoRA adapter"),
    ("predict no/such text", "no/such: no such folder, and not on the hub ("),
    ("export base --out out", "base/adapter_config.json: not found"),
    ("merge base --out out", "base/adapter_config.json: not found"),
    ("push base me/name", "base/adapter_config.json: not found"),
    ("register base", "base/adapter_config.json: not found"),
    ("fetch cl-benchmark --from nowhere", "--from: nowhere: holds neither SuperNI nor Long_Sequence"),
    ("fetch cl-benchmark --from params.yaml", "--from: params.yaml: holds neither"),
    ("fetch embedded --from data", "--from: only for cl-benchmark"),
]  # fmt: skip


def test_a_run_or_result_file_of_wrong_values(project, capsys):
    """Every value of every file of a run, taken away or replaced: read, or refused by name."""
    (folder,) = project.glob("runs/*")
    files = [path for path in folder.rglob("*.json") if path.name not in ("checksums.json", "result.json")]
    read_record(folder)
    for file in files:
        before = file.read_text()
        for changed in spoiled(json.loads(before)):
            file.write_text(json.dumps(changed))
            try:
                read_record(folder)
            except GainLoRAError as error:
                assert str(folder) in str(error)
        file.write_text(before)
    refused(project, capsys, "results", str(folder))


def spoiled(value):
    """JSON values that differ from this one in one place."""
    yield from (None, "x", [])
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: other} for other in spoiled(inner))


@pytest.mark.parametrize(("line", "expected"), COMMANDS, ids=lambda text: text[:40])
def test_commands(project, capsys, line, expected):
    (project / "data.yaml").mkdir()
    (folder,) = project.glob("runs/*")
    said = refused(project, capsys, *(str(folder) if word == "RUN" else word for word in line.split(" ")))
    assert expected in said
    assert not (project / "report").exists() and not (project / "results").exists()
