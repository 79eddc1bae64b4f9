"""Base models and adapters that do not fit or are damaged: refused by name before anything is learned."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gainlora.config import load_config
from gainlora.errors import GainLoRAError
from gainlora.model.base import check_positions, load_base
from gainlora.model.modeling import GainLoRAModel
from gainlora.model.targets import find_targets
from gainlora.runs.run import Run
from tests.families import family
from tests.tiny import tiny_llama, tiny_params, tiny_t5, tiny_tokenizer
from tests.unit.test_model import make


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good base model and a good adapter of it."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_llama(folder / "base")
    model = make("llama")
    next(iter(model.layers.values())).memory["kept"] = torch.ones(2)
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def base(whole, tmp_path):
    return shutil.copytree(whole / "base", tmp_path / "base")


@pytest.fixture
def adapter(whole, tmp_path):
    return shutil.copytree(whole / "adapter", tmp_path / "adapter")


def edit(path, **values):
    """Lay values over a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def setting(**values):
    return lambda folder: [edit(path, **values) for path in folder.glob("*config.json") if "tok" not in path.name]


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def gone(name):
    return lambda folder: (folder / name).unlink()


def a_folder(name):
    return lambda folder: [(folder / name).unlink(), (folder / name).mkdir()]


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def replaced(name, change):
    """Change a safetensors file's tensors."""

    def spoil(folder):
        held = load_file(folder / name)
        change(held)
        save_file(held, folder / name)

    return spoil


def pickled(folder):
    """The same weights as torch.save writes them, beside safetensors of something else: resolve_model lets it pass."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")


CODE = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
MODELS = {
    "unknown architecture": (setting(model_type="nonsense"), "nonsense"),
    "no architecture": (setting(model_type=None), "model_type"),
    "an image model": (written("config.json", '{"model_type": "vit"}'), "its model cannot be loaded"),
    "code of its own": (written("config.json", json.dumps(CODE)), "its config.json cannot be loaded"),
    "no config": (gone("config.json"), "cannot be loaded"),
    "config no JSON": (written("config.json", "{"), "config.json"),
    "config a list": (written("config.json", "[]"), "cannot be loaded"),
    "text for a size": (setting(hidden_size="wide"), "hidden_size"),
    "no heads": (setting(num_attention_heads=0), "cannot be loaded"),
    "another width": (setting(hidden_size=64), "its model cannot be loaded"),
    "more layers": (setting(num_hidden_layers=3), "its weights lack model.layers.2"),
    "weights cut off": (cut("model.safetensors"), "its model cannot be loaded"),
    "pickled weights": (pickled, "its model cannot be loaded"),
    "no weights": (gone("model.safetensors"), "its model cannot be loaded"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "its tokenizer cannot be loaded"),
    "tokenizer no JSON": (written("tokenizer.json", "{"), "its tokenizer cannot be loaded"),
    "tokenizer of nothing": (written("tokenizer.json", "{}"), "its tokenizer cannot be loaded"),
    "no EOS": (lambda f: edit(f / "tokenizer_config.json", eos_token=None), "no EOS token"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_models(base, case, monkeypatch):
    spoil, expected = MODELS[case]
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks"))
    (base / "own.py").write_text("raise SystemExit('code of a checkpoint was run')")
    spoil(base)
    with pytest.raises(GainLoRAError) as error:
        load_base(str(base), torch.float32)
    said = str(error.value)
    assert said.startswith(f"model.name: {str(base)!r}") and expected in said and "\n" not in said and len(said) < 700


def test_without_a_pad_token_eos_pads(base):
    edit(base / "tokenizer_config.json", pad_token=None)
    model, tokenizer = load_base(str(base), torch.float32)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.generation_config.pad_token_id


def test_tied_weights_are_one_and_not_adapted(tmp_path):
    original = tiny_llama(tmp_path, tie_word_embeddings=True)
    model, _ = load_base(str(tmp_path), torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert len(find_targets(model, None)) == 4
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(tokens).logits, original(tokens).logits)


def test_a_table_of_positions_bounds_prompt_and_answer(tmp_path):
    opt, bart = family("OPT"), family("Bart")  # of 64 positions
    check_positions(opt, 60, 4)
    check_positions(bart, 64, 64)
    opt(torch.zeros(1, 64, dtype=torch.long))
    for unbounded in (tiny_llama(max_position_embeddings=8), tiny_t5()):
        check_positions(unbounded, 999, 999)
    for model, prompt, target, most in ((opt, 61, 4, 60), (bart, 65, 4, 64), (bart, 8, 65, 64)):
        with pytest.raises(GainLoRAError, match=rf"data\.max_prompt_tokens: {prompt} .*max_target_tokens.* {most} or"):
            check_positions(model, prompt, target)
    opt.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    params = tiny_params(tmp_path, tmp_path / "base", data__max_prompt_tokens=61)
    with pytest.raises(GainLoRAError, match=r"lower data\.max_prompt_tokens to 60"):
        Run.create(load_config("tiny", params=params), tmp_path)
    assert not list((tmp_path / "runs").glob("*tiny-*"))  # a run that cannot begin leaves nothing


BRANCHES, GATE, BASES = "adapter_model.safetensors", "gate.safetensors", "subspace.safetensors"
A, B = (f"model.layers.0.self_attn.q_proj.lora_{side}" for side in "AB")
ADAPTERS = {
    "config no JSON": (written("adapter_config.json", "{"), "adapter_config.json: not JSON"),
    "config a list": (written("adapter_config.json", "[]"), "holds no JSON object"),
    "config a folder": (a_folder("adapter_config.json"), "cannot be read"),
    "of peft": (written("adapter_config.json", '{"peft_type": "LORA", "r": 8}'), "is no GainLoRA adapter"),
    "older": (setting(format="gainlora-1"), "of an older version; learn it again"),
    "format a list": (setting(format=[1]), "format [1] is no GainLoRA adapter"),
    "unknown key": (setting(rnak=2), "rnak: unknown option; did you mean 'rank'"),
    "no rank": (setting(rank=None), "rank: missing"),
    "rank of text": (setting(rank="2"), "rank: got '2', expected a whole number"),
    "rank 0": (setting(rank=0), "rank: 0 is too small"),
    "alpha of nothing": (setting(alpha=float("nan")), "alpha: nan must be"),
    "targets of text": (setting(targets="q"), "targets: got 'q', expected a list"),
    "other targets": (setting(targets=["wo"]), "lora.targets: wo matches no linear"),
    "unknown score": (setting(gate_score="dot"), "gate_score: got 'dot', expected 'cosine' or 'linear'"),
    "tasks a number": (setting(tasks=3), "tasks: got 3, expected a list"),
    "another rank": (setting(rank=4), "of shape [2, 2, 32], expected [2, 4, 32]"),
    "another gate": (setting(gate_hidden=7), "gate.safetensors: hidden.1 is of shape"),
    "deeper gate": (setting(gate_depth=3), "gate.safetensors: hidden.2 is of shape"),
    "blocks that divide nothing": (setting(covariance_blocks=2), "subspace.safetensors: layer."),
    "branches cut off": (cut("adapter_model.safetensors"), "adapter_model.safetensors: damaged"),
    "branches empty": (written(BRANCHES, ""), "adapter_model.safetensors: damaged"),
    "no branches": (gone("adapter_model.safetensors"), "adapter_model.safetensors: not found"),
    "no gate": (gone("gate.safetensors"), "gate.safetensors: not found"),
    "no bases": (gone("subspace.safetensors"), "subspace.safetensors: not found"),
    "a folder for a file": (a_folder(GATE), "gate.safetensors: damaged"),
    "a layer less": (replaced(BRANCHES, lambda t: t.pop(B)), "q_proj.lora_B is missing"),
    "a layer more": (replaced(BRANCHES, lambda t: t.update(x=torch.ones(1))), "x has no place"),
    "branches of two lengths": (replaced(BRANCHES, lambda t: t.update({B: t[B][:1].clone()})), "lora_B is of shape [1"),
    "half precision": (replaced(BRANCHES, lambda t: t.update({A: t[A].half()})), "is torch.float16, expected float32"),
    "a scalar": (replaced(BRANCHES, lambda t: t.update({A: torch.tensor(1.0)})), "is of shape []"),
    "a gate less": (replaced(GATE, lambda t: t.update(key=t["key"][:1].clone())), "key is of shape [1, 32]"),
    "no key": (replaced(GATE, lambda t: t.pop("key")), "gate.safetensors: key is missing"),
    "no basis": (replaced(BASES, lambda t: t.pop("gate.2")), "gate.2 is missing"),
    "a narrow basis": (replaced(BASES, lambda t: t.update({"gate.1": torch.zeros(9, 1)})), "gate.1 is of shape [9, 1]"),
    "kept for none": (replaced("rule.safetensors", lambda t: t.update({"no:x": torch.ones(1)})), "no:x has no place"),
    "kept cut off": (cut("rule.safetensors"), "rule.safetensors: damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(adapter, case):
    spoil, expected = ADAPTERS[case]
    GainLoRAModel.from_pretrained(adapter, tiny_llama())
    spoil(adapter)
    with pytest.raises(GainLoRAError) as error:
        GainLoRAModel.from_pretrained(adapter, tiny_llama())
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_of_another_base_or_of_one_that_is_not_there(adapter):
    for other in (tiny_llama(hidden_size=16), tiny_t5()):
        with pytest.raises(GainLoRAError, match="another base model"):
            GainLoRAModel.from_pretrained(adapter, other)
    edit(adapter / "adapter_config.json", base_model="no/such/base")
    with pytest.raises(GainLoRAError, match="no/such/base: no such folder, and no hub id"):
        GainLoRAModel.from_pretrained(adapter)
