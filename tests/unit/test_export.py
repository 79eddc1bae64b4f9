"""A learned model in other hands: answers from the shell, a card, a LoRA folder of peft, plain weights, pipelines."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

from flows import publish
from gainlora import GainLoRAError, GainLoRAModel
from gainlora.__main__ import main
from gainlora.export.hub import write_release
from gainlora.export.saved import new_folder, open_saved
from gainlora.inference import Predictor
from tests.runs import learn, project, prompt

RELEASED = {f"{name}.safetensors" for name in ("adapter_model", "gate", "subspace")}
RELEASED |= {"adapter_config.json", "run.json", "README.md"}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Finished runs by family and method, each learned once."""
    roots = {}
    runs = {}

    def get(kind, method):
        if kind not in roots:
            roots[kind] = project(tmp_path_factory.mktemp(kind), kind)
            (roots[kind] / "data" / "tiny" / "README.md").write_text("# Tiny\n\n## Sources and licences\n\n* made up\n")
        if (kind, method) not in runs:
            stream = learn(roots[kind], method=method)
            stream.result()
            runs[kind, method] = stream.folder
        return runs[kind, method]

    return get


@pytest.fixture(scope="module")
def gated(learned):
    return learned("llama", "gainlora-inflora")


def said(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 1
    out, err = capsys.readouterr()
    message, *page = err.splitlines()
    assert out == "" and message.startswith("error: ") and all(line.startswith("see docs/") for line in page)
    return err


# -- answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "method"), [("llama", "gainlora-inflora"), ("t5", "gainlora-olora"), ("llama", "single")]
)
def test_answers_are_those_of_the_run(learned, kind, method):
    """Every test example again, all tasks mixed in one batch: no answer and no coefficient moves."""
    folder = learned(kind, method)
    predictor = Predictor(open_saved(folder))
    last = max(folder.glob("task_03_*"))
    tasks = ("task2",) if method == "single" else ("task1", "task2", "task3")
    expected = [json.loads(line) for n in tasks for line in (last / "predictions" / f"{n}.jsonl").open()]
    prompts = [prompt(folder, n, i) for n in tasks for i in range(8)]
    answers = predictor.answer(prompts, task=tasks[0] if method == "single" else None)
    assert [a.text for a in answers] == [e["prediction"] for e in expected]
    for answer, e in zip(answers, expected, strict=True):
        assert answer.coefficients == pytest.approx(e["coefficients"], abs=1e-4)


def test_a_text_of_a_task_gets_the_prompt_of_training(gated, capsys):
    whole = prompt(gated, "task2")
    assert whole.startswith("Sort task 2\n")
    text = whole.split("\n")[1]
    answer = said(capsys, "predict", gated, whole)
    assert (
        said(capsys, "predict", gated, text, "--task", "task2")
        == answer
        == said(capsys, "predict", gated, whole, "--max-new-tokens", "4")
    )
    explained = said(capsys, "predict", gated, whole, "--explain").splitlines()
    assert explained[0] + "\n" == answer
    shown = [re.fullmatch(r"  (task\d)  (█*)(░*)  (\d\.\d\d)", line) for line in explained[1:]]
    assert [m and m[1] for m in shown] == ["task1", "task2", "task3"]
    assert all(m and len(m[2] + m[3]) == 20 and abs(len(m[2]) / 20 - float(m[4])) < 0.031 for m in shown)


def test_a_file_comes_back_with_answers(gated, tmp_path, capsys):
    lines = [{"text": prompt(gated, t, i), "id": f"{t}/{i}"} for i in range(3) for t in ("task3", "task1")]
    lines.append({"text": "w1 w2", "task": "task1", "id": "é"})
    file = tmp_path / "in.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    found = [
        json.loads(line)
        for line in said(capsys, "predict", gated, "--file", file, "--explain", "--batch-size", 2).splitlines()
    ]
    assert [{k: v for k, v in row.items() if k not in ("answer", "coefficients")} for row in found] == lines
    for line, row in zip(lines[:-1], found, strict=False):
        assert said(capsys, "predict", gated, line["text"]).strip() == row["answer"]
        assert list(row["coefficients"]) == ["task1", "task2", "task3"]


def test_a_state_after_each_task_answers(gated, capsys):
    text = prompt(gated, "task1")
    explained = said(capsys, "predict", gated / "task_02_task2", text, "--explain")
    assert len(explained.splitlines()) == 3  # the answer and two branches
    assert said(capsys, "predict", gated / "task_03_task3", text) == said(capsys, "predict", gated, text)


LINES = [
    ('{"text": "a"}\n{"text": ""}', "line 2: text: empty"),
    ('\n{"text": 3}', "line 2: text: is the number 3; give text"),
    ('{"text": "a"}\n{"txt": "a"}', 'line 2: no object with "text"'),
    ("[1]", "line 1: no object"),
    ('{"text": "a"}\n{"text": "a"', "line 2: not JSON"),
    ('{"text": "a", "answer": "b"}', "line 1: has a key 'answer'"),
    ('{"text": "a", "task": "tsk1"}', "line 1: task: 'tsk1' is no task of this run; did you mean 'task1'"),
    ('{"text": "a", "task": 1}', "line 1: task: no text"),
    ('{"text": "\\ud800"}', "line 1: text: holds half a surrogate"),
    ("", "in.jsonl: empty"),
]


@pytest.mark.parametrize(("content", "expected"), LINES)
def test_a_bad_line_is_named_before_any_work(gated, tmp_path, capsys, monkeypatch, content, expected):
    monkeypatch.setattr(Predictor, "__init__", lambda *_: pytest.fail("loads the model"))
    (tmp_path / "in.jsonl").write_text(content)
    assert expected in refused(capsys, "predict", gated, "--file", tmp_path / "in.jsonl")


def test_what_predict_refuses(learned, gated, tmp_path, capsys):
    assert "text: empty" in refused(capsys, "predict", gated, " ")
    assert "adapter_config.json: not found; give a run folder" in refused(capsys, "predict", tmp_path, "a")
    assert "no/such/base: no such folder" in refused(capsys, "predict", gated, "a", "--base", "no/such/base")
    single = learned("llama", "single")
    assert "--task: none: method single" in refused(capsys, "predict", single, "a")
    assert "--explain: method single has neither gates nor a router" in refused(
        capsys, "predict", single, "a", "--task", "task1", "--explain"
    )


def test_a_damaged_run_is_not_used(gated, tmp_path, capsys):
    away = shutil.copytree(gated.parent.parent, tmp_path / "project") / "runs" / gated.name
    state = away / "task_03_task3" / "gate.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"!")
    for command in (["predict", away, "a"], ["export", away, "--branch", "1", "--out", tmp_path / "out"]):
        assert "changed since it was written (another SHA-256); `gainlora repair" in refused(capsys, *command)


def test_a_prompt_that_is_cut_is_said(gated, capsys):
    assert main(["predict", str(gated), "w1 " * 40]) == 0
    assert "1 of 1 prompts were cut to 32 tokens (data.truncate: input)" in capsys.readouterr().err


# -- as any transformers model -----------------------------------------------------------------------------


def test_a_pipeline_answers_as_generate_does(gated, caplog):
    model = GainLoRAModel.from_pretrained(gated, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(gated.parent.parent / "base")
    prompts = [prompt(gated, t) for t in ("task1", "task2", "task3")]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = pipe(prompts, max_new_tokens=3, return_full_text=False, batch_size=2)
    for text, answer in zip(prompts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = tokenizer.decode(model.generate(ids, max_new_tokens=3)[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer[0]["generated_text"].strip() == expected.strip()
    assert "not supported" not in caplog.text


# -- the finished model and its card -----------------------------------------------------------------------


def test_a_finished_model_stands_alone(gated, tmp_path, capsys):
    """Copied away, and its run gone: the same answers, and a card with the run's numbers and the data's terms."""
    away = shutil.copytree(gated.parent.parent, tmp_path / "project")
    text = prompt(gated, "task2").split("\n")[1]
    expected = said(capsys, "predict", gated, text, "--task", "task2", "--explain")
    write_release(open_saved(away / "runs" / gated.name), tmp_path / "model")
    shutil.rmtree(away)
    assert {p.name for p in (tmp_path / "model").iterdir()} == RELEASED
    base = gated.parent.parent / "base"
    assert said(capsys, "predict", tmp_path / "model", text, "--task", "task2", "--explain", "--base", base) == expected
    card = (tmp_path / "model" / "README.md").read_text()
    result = json.loads((gated / "result.json").read_text())
    assert f"AP {result['AP']:.1f}, FT {result['FT']:.1f}" in card and "* made up" in card and "24 | 8" in card
    assert card.count("|\n|") == len(result["tasks"]) * 2 + 2 and "|\n\n|" not in card  # rows of two tables
    for row, task in zip(result["R"], result["tasks"], strict=True):
        assert " | ".join([f"| {task}", *("" if v is None else f"{v:.1f}" for v in row)]) in card
    write_release(open_saved(tmp_path / "model"), tmp_path / "again")  # a copy of a copy keeps it all
    assert (tmp_path / "again" / "README.md").read_text() == card
    assert (tmp_path / "again" / "run.json").read_bytes() == (tmp_path / "model" / "run.json").read_bytes()


def test_what_a_flow_publishes_is_a_finished_model(gated, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        publish.publish("tiny", gated)
    assert (tmp_path / "metrics" / "tiny.json").read_bytes() == (gated / "result.json").read_bytes()
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["tiny"]
    text = prompt(gated, "task3")
    assert said(capsys, "predict", "adapters/tiny", text) == said(capsys, "predict", gated, text)


def test_a_run_goes_to_the_hub_and_comes_back(gated, tmp_path, capsys, monkeypatch):
    """Nothing but the adapter, the run and the card goes there, and the answers are the same."""
    monkeypatch.chdir(tmp_path)

    def upload(*, repo_id, folder_path, allow_patterns, commit_message):
        names = [path.name for path in Path(folder_path).iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path, name), tmp_path / "hub" / repo_id)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    api = create_autospec(HfApi)
    api.return_value.upload_folder.side_effect = upload
    monkeypatch.setattr("huggingface_hub.HfApi", api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: tmp_path / "hub" / name)
    assert said(capsys, "push", gated, "me/tiny", "--private") == "https://hub/me/tiny/commit/1\n"
    api.return_value.create_repo.assert_called_once_with("me/tiny", private=True, exist_ok=True)
    assert {path.name for path in (tmp_path / "hub" / "me" / "tiny").iterdir()} == RELEASED
    assert 'from_pretrained("me/tiny")' in (tmp_path / "hub" / "me" / "tiny" / "README.md").read_text()
    here, there = (said(capsys, "predict", place, prompt(gated, "task2"), "--explain") for place in (gated, "me/tiny"))
    assert here == there and here.count("█") > 3


# -- peft and plain weights --------------------------------------------------------------------------------


def logits(model, kind, ids):
    decoder = {"decoder_input_ids": ids[:, :3]} if kind == "t5" else {}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder).logits


def fresh(run, kind):
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(run.parent.parent / "base").eval()


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("branch", ["2", "task3"])
def test_a_branch_in_peft_is_the_model_with_that_coefficient_1(learned, kind, branch, tmp_path, capsys, monkeypatch):
    from peft import PeftModel

    run = learned(kind, "gainlora-olora")
    assert said(capsys, "export", run, "--branch", branch, "--out", tmp_path / "lora") == f"{tmp_path}/lora\n"
    model = GainLoRAModel.from_pretrained(run, dtype="float32")
    index = {"2": 1, "task3": 2}[branch]
    monkeypatch.setattr(model, "coefficients", lambda input_ids, _: torch.eye(3)[[index] * len(input_ids)])
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    theirs = PeftModel.from_pretrained(fresh(run, kind), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(theirs, kind, ids), logits(model, kind, ids), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(theirs, kind, ids), logits(fresh(run, kind), kind, ids), atol=1e-3)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "library_name: peft" in card and f"branch {index + 1}, learned on task{index + 1}" in card


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_all_branches_weighed_for_a_prompt_are_one_lora(learned, kind, tmp_path, capsys):
    """Its logits on that prompt are the gated model's; another prompt has other coefficients."""
    from peft import PeftModel

    run = learned(kind, "gainlora-olora")
    text = prompt(run, "task2").split("\n")[1]
    said(capsys, "export", run, "--prompt", text, "--task", "task2", "--out", tmp_path / "lora")
    said(capsys, "export", run, "--prompt", prompt(run, "task3"), "--out", tmp_path / "other")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 3 * 2
    ids = torch.tensor(AutoTokenizer.from_pretrained(run.parent.parent / "base")(prompt(run, "task2")).input_ids)[None]
    ids = torch.cat((ids, torch.ones_like(ids[:, :1])), dim=1) if kind == "t5" else ids  # EOS ends T5's prompts
    ours = logits(GainLoRAModel.from_pretrained(run, dtype="float32"), kind, ids)
    theirs, others = (
        logits(PeftModel.from_pretrained(fresh(run, kind), tmp_path / name).eval(), kind, ids)
        for name in ("lora", "other")
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(others, ours, atol=1e-3)
    assert "with the coefficients of one prompt on every prompt: task1 0." in (tmp_path / "lora/README.md").read_text()


@pytest.mark.parametrize(
    ("kind", "method"), [("llama", "inclora"), ("t5", "olora"), ("llama", "slao"), ("llama", "multitask")]
)
def test_equal_branches_are_one_lora_and_one_weight(learned, kind, method, tmp_path, capsys):
    from peft import PeftModel

    run = learned(kind, method)
    said(capsys, "export", run, "--out", tmp_path / "lora")
    said(capsys, "merge", run, "--out", tmp_path / "merged")
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    ours = logits(GainLoRAModel.from_pretrained(run, dtype="float32"), kind, ids)
    theirs = logits(PeftModel.from_pretrained(fresh(run, kind), tmp_path / "lora").eval(), kind, ids)
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    merged = logits(auto.from_pretrained(tmp_path / "merged").eval(), kind, ids)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, logits(fresh(run, kind), kind, ids), atol=1e-3)
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(
        load_file(run.parent.parent / "base" / "model.safetensors")
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("w1 w2").input_ids


def test_what_cannot_be_handed_over_is_refused_with_the_reason(learned, gated, tmp_path, capsys):
    out = tmp_path / "out"
    single, shared = learned("llama", "single"), learned("llama", "slao")
    assert "gates give every branch a coefficient that depends on the prompt" in refused(
        capsys, "merge", gated, "--out", out
    )
    assert "the task id selects a branch" in refused(capsys, "merge", single, "--out", out)
    assert "the prompt decides how much each counts (--prompt); name one: task1, task2" in refused(
        capsys, "export", gated, "--out", out
    )
    assert "--branch: '4' is neither 1 to 3 nor a task" in refused(
        capsys, "export", gated, "--branch", "4", "--out", out
    )
    assert "did you mean 'task3'" in refused(capsys, "export", gated, "--branch", "tsk3", "--out", out)
    assert "shares the one branch" in refused(capsys, "export", shared, "--branch", "task2", "--out", out)
    assert "--prompt: the coefficients of method slao do not depend on a prompt" in refused(
        capsys, "export", shared, "--prompt", "a", "--out", out
    )
    assert "give one of the two" in refused(capsys, "export", gated, "--prompt", "a", "--branch", "1", "--out", out)
    earlier = gated / "task_02_task2"
    assert "2 of 3 tasks are learned" in refused(capsys, "export", earlier, "--branch", "1", "--out", out)
    assert not list(tmp_path.iterdir())
    assert "exists already" in refused(capsys, "export", gated, "--branch", "1", "--out", tmp_path)
    assert "not pushed" in refused(capsys, "push", gated, "no slash or ../..")


@pytest.mark.slow
def test_a_long_file_stops_cleanly(gated, tmp_path):
    """Whole lines only, by Ctrl-C as by a reader that has seen enough."""
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"text": prompt(gated, "task1", i % 8), "id": i}) + "\n" for i in range(5000)))
    command = [sys.executable, "-m", "gainlora", "predict", str(gated), "--file", str(file), "--batch-size", "1"]
    for stopped_by, code in (("Ctrl-C", 130), ("reader", 0)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout and process.stderr and json.loads(process.stdout.readline())["id"] == 0
            rest = ""
            if stopped_by == "Ctrl-C":
                process.send_signal(signal.SIGINT)
                rest = process.stdout.read()
            else:
                process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == code
        lines = [json.loads(line)["id"] for line in rest.splitlines()]
        assert lines == list(range(1, len(lines) + 1)) and len(lines) < 4999


def test_a_place_that_another_process_took_meanwhile_is_left_to_it(tmp_path):
    with pytest.raises(GainLoRAError, match="exists already"), new_folder(tmp_path / "out") as part:
        (part / "mine").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]
