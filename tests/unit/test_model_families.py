"""Model families: each works from loading to merging, or is refused by one error that says why."""

import json
import math

import pytest
import torch

from gainlora.config import load_config
from gainlora.data.collate import collate, encode_prompts
from gainlora.data.instances import Example
from gainlora.data.prompts import Prompt
from gainlora.data.tasks import Task
from gainlora.errors import GainLoRAError
from gainlora.model.adapter_config import GainLoRAConfig
from gainlora.model.base import load_base
from gainlora.model.modeling import GainLoRAModel
from gainlora.model.probe import check_behavior
from gainlora.runs.run import Run
from gainlora.sections import DataConfig
from gainlora.training.learner import ContinualLearner
from tests.families import FAMILIES, VOCABULARY, family
from tests.tiny import WORDS, tiny_llama, tiny_params, tiny_tokenizer

TARGETS = {
    "Phi3": "qkv_proj down_proj",
    **dict.fromkeys(("GPTNeoX", "Persimmon", "Falcon", "Falcon alibi", "Bloom"), "query_key_value dense_4h_to_h"),
    **dict.fromkeys(("GPT2", "GPTBigCode", "OpenAIGPT"), "c_attn c_proj c_fc"),
    **dict.fromkeys(("Mamba", "Mamba2", "FalconMamba"), "in_proj out_proj"),
    **dict.fromkeys(("DeepseekV2", "DeepseekV3"), "kv_a_proj_with_mqa o_proj"),
    "CodeGen": "qkv_proj",
    "Mpt": "Wqkv",
    "CTRL": "Wq Wv",
    "OPT": "q_proj fc1 fc2",  # fc1 sees (B * L, d)
    "Qwen2Moe": "q_proj v_proj up_proj shared_expert_gate",  # of the shared expert: (B * L, d)
    "T5": "q v wo",
}
"""Layers to adapt where they are not the default."""
ROW = "not one row per token"
FUSED = "null stands for separate query and value projections"
ANSWERS = "earlier logits change with later tokens"
REFUSED = {
    "SwitchTransformers": ("wi", ROW),  # of the experts
    "NllbMoe": ("fc1", ROW),
    "DeepseekV2": ("kv_b_proj", ROW),
    **dict.fromkeys(("LED", "PegasusX", "FSMT", "ProphetNet", "Reformer"), (None, ROW)),
    **dict.fromkeys(("Phi3", "GPTNeoX", "GPT2", "Bloom", "Mpt", "Mamba", "JetMoe", "DeepseekV3"), (None, FUSED)),
    "RecurrentGemma": ("linear_x", "fails"),
    "xLSTM": (None, "fails"),
    "Rwkv": ("key", "does not ignore padding"),
    "Roberta decoder": (None, "does not count positions from 0"),
    **dict.fromkeys(("Bert", "Roberta", "Electra", "XLMRoberta", "BertGeneration", "RoFormer"), (None, ANSWERS)),
    **dict.fromkeys(("RemBert", "MegatronBert", "Camembert", "Data2VecText", "Ernie", "BigBird"), (None, ANSWERS)),
    "XLM": ("q_lin", ANSWERS),
    "Gemma3": ("fc2", "takes no part in a forward pass"),  # of its vision tower alone
}
"""Layers to adapt, and why that is refused."""
NEVER = {"LED", "PegasusX", "FSMT", "ProphetNet", "Reformer", "JetMoe", "RecurrentGemma", "xLSTM", "Rwkv", "XLM"}
NEVER |= {name for name, (_, why) in REFUSED.items() if why == ANSWERS} | {"Roberta decoder"}
WORKING = [name for name in FAMILIES if name not in NEVER]


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    root = tmp_path_factory.mktemp("params")
    tiny_llama(root / "base")
    return tiny_params(root, root / "base", train__batch_size=4, data__max_target_tokens=3)


def load(name, folder):
    family(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_base(str(folder), torch.float32)


def one_task():
    """Eight prompts of different lengths, with answers of one or two words."""
    answers = [f"{WORDS[k % 3]}{f' {WORDS[9]}' * (k % 2)}" for k in range(8)]
    examples = tuple(Example(" ".join(WORDS[k : 3 * k + 1]), (answer,)) for k, answer in enumerate(answers))
    return Task("one", examples, examples, "Sort task 1")


def learn(name, method, params, folder):
    """The family's model after two training steps of one task, and the task's examples."""
    base, tokenizer = load(name, folder / "base")
    targets = {"lora.targets": TARGETS[name].split()} if name in TARGETS else {}
    config = load_config("tiny", {"method": method, **targets}, params)
    learner = ContinualLearner((base, tokenizer), config, cache=folder / "cache", callbacks=[])
    learner.learn(one_task())
    assert len(learner.records) == 2 and all(math.isfinite(r["loss"]) for r in learner.records)
    unmoved = [n for n, layer in learner.model.layers.items() if not layer.B.abs().max() > 0]
    assert not unmoved
    return learner.model.eval(), learner.rows([one_task()], "train")


@torch.no_grad()
def check_answers(model, examples):
    """Greedy answers of a padded batch are the teacher-forced argmax, example by example."""
    batch = collate(list(examples), 0, model.encoder_decoder, targets=False)
    generated = model.generate(**batch, max_new_tokens=4)
    start = 1 if model.encoder_decoder else batch["input_ids"].shape[1]
    for example, answer in zip(examples, generated[:, start:].tolist(), strict=True):
        answer = answer[: answer.index(1) + 1] if 1 in answer else answer
        alone = collate([{**example, "target_ids": answer}], 0, model.encoder_decoder, targets=True)
        logits = model(**alone, use_cache=False).logits[0]
        first = 0 if model.encoder_decoder else len(example["prompt_ids"]) - 1
        assert logits[first : first + len(answer)].argmax(-1).tolist() == answer


@torch.no_grad()
def check_merge(model, examples):
    """The merged model's logits are the adapted one's."""
    batch = collate(list(examples)[2:4], 0, model.encoder_decoder, targets=True)
    expected = model(**batch, use_cache=False).logits
    merged = GainLoRAModel(model.merge_and_unload(), GainLoRAConfig("tiny", 2, 4, model.config.targets, "equal"))
    assert not isinstance(next(iter(merged.layers.values())).base, type(next(iter(model.layers.values()))))
    torch.testing.assert_close(merged(**batch, use_cache=False).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", WORKING)
def test_a_family_learns_and_answers_as_it_was_trained(name, params, tmp_path):
    check_answers(*learn(name, "gainlora-inflora", params, tmp_path))


@pytest.mark.parametrize("method", ["inflora", "seqlora"])
@pytest.mark.parametrize("name", ["MBart", "T5Gemma", "OPT", "Qwen2Moe", "GPT2", "Bloom", "Mamba", "Gemma3", "Zamba2"])
def test_equal_branches_merge(name, method, params, tmp_path):
    model, examples = learn(name, method, params, tmp_path)
    check_answers(model, examples)
    if name == "Zamba2":
        with pytest.raises(GainLoRAError, match=r"merge: .*shared_transformer.* shares its weight with 1 other"):
            model.merge_and_unload()
    else:
        check_merge(model, examples)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_is_refused_before_anything_is_learned(name, tmp_path):
    base, _ = load(name, tmp_path)
    targets, why = REFUSED[name]
    with pytest.raises(GainLoRAError) as error:
        model = GainLoRAModel(base, GainLoRAConfig(name, 2, 4, targets and tuple(targets.split())))
        check_behavior(model, 0)
    said = str(error.value)
    assert why in said and said.startswith(("model.name:", "lora.targets:")) and said.endswith(".")


def test_a_layer_that_training_bypasses_is_refused(tmp_path, monkeypatch):
    """As out_proj of a Mamba 2 is on GPUs, where one kernel computes the block from its weights."""
    base, _ = load("Mamba2", tmp_path)
    fused = "transformers.models.mamba2.modeling_mamba2.mamba2_split_conv1d_scan_combined"
    monkeypatch.setattr(
        fused, lambda projected, *args, outproj_weight, **kwargs: projected[..., :64] @ outproj_weight.T
    )
    check_behavior(GainLoRAModel(base, GainLoRAConfig("tiny", 2, 4, ("in_proj",))), 0)
    base, _ = load("Mamba2", tmp_path)
    with pytest.raises(GainLoRAError, match=r"training bypasses .*out_proj; leave out_proj out of lora\.targets"):
        check_behavior(GainLoRAModel(base, GainLoRAConfig("tiny", 2, 4, ("in_proj", "out_proj"))), 0)


def test_a_refused_model_leaves_no_run(tmp_path):
    load("Bert", tmp_path / "base")
    params = tiny_params(tmp_path, tmp_path / "base")
    with pytest.raises(GainLoRAError, match=ANSWERS):
        Run.create(load_config("tiny", params=params), tmp_path)
    assert not list((tmp_path / "runs").glob("*tiny-*"))


@pytest.mark.parametrize("name", ["MBart", "T5Gemma", "M2M100"])
def test_training_starts_from_the_token_that_generation_starts_from(name, tmp_path):
    base, _ = load(name, tmp_path)
    start = 2 if name == "T5Gemma" else base.config.decoder_start_token_id
    fed = []
    base.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"][:, :2].tolist()), with_kwargs=True
    )
    model = GainLoRAModel(base, GainLoRAConfig("tiny", 2, 4, integration="equal"))
    fed.clear()
    example = {"prompt_ids": [5, 6, 1], "target_ids": [70, 1]}
    model(**collate([example], 0, True, targets=True))
    model.generate(**collate([example], 0, True, targets=False), max_new_tokens=1)
    assert fed == [[[start, 70]], [[start]]]


def test_only_layers_that_read_text_are_adapted(tmp_path):
    base, _ = load("Gemma3", tmp_path)
    model = GainLoRAModel(base, GainLoRAConfig("tiny", 2, 4, ("q_proj", "o_proj", "v_proj")))
    assert len(model.layers) == 6 and all("language_model" in name for name in model.layers)


def test_a_noncausal_model_is_recognized_in_bfloat16(tmp_path):
    for name, refused in (("Bert", True), ("Llama", False), ("Qwen3Moe", False)):
        load(name, tmp_path / name)
        base, _ = load_base(str(tmp_path / name), torch.bfloat16)
        model = GainLoRAModel(base, GainLoRAConfig("tiny", 2, 4))
        if refused:
            with pytest.raises(GainLoRAError, match=ANSWERS):
                check_behavior(model, 0)
        else:
            check_behavior(model, 0)


def with_token(special):
    """A tokenizer with one token more than the model, as Gemma 3's <image_soft_token>."""
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=special)], special_tokens=special)
    assert tokenizer.convert_tokens_to_ids("<image>") == VOCABULARY
    return tokenizer


def test_special_tokens_beyond_the_vocabulary_never_come_from_text(tmp_path):
    tiny_llama(tmp_path)
    with_token(special=True).save_pretrained(tmp_path)
    _, tokenizer = load_base(str(tmp_path), torch.float32)
    (ids,), _ = encode_prompts([Prompt("w1 <image> w2", "", "", "", "")], tokenizer, DataConfig(), False)
    assert max(ids) < VOCABULARY and len(ids) > 3  # text, in pieces
    with_token(special=False).save_pretrained(tmp_path)
    with pytest.raises(GainLoRAError, match="more tokens than the model"):
        load_base(str(tmp_path), torch.float32)


@pytest.mark.parametrize("case", ["adapter", "quantized"])
def test_a_base_that_is_not_plain_weights_is_refused(case, tmp_path):
    tiny_llama(tmp_path)
    if case == "adapter":
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        expected = "holds an adapter (adapter_config.json)"
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (tmp_path / "config.json").write_text(json.dumps(config))
        expected = "its weights are quantized (gptq)"
    with pytest.raises(GainLoRAError) as error:
        load_base(str(tmp_path), torch.float32)
    assert expected in str(error.value)
