"""GainLoRAModel around tiny random models: what may not change a gate or an answer, and files."""

import pytest
import torch
from safetensors.torch import load_file

from gainlora.data.collate import collate
from gainlora.errors import GainLoRAError
from gainlora.model.adapter_config import GainLoRAConfig
from gainlora.model.base import load_base, weights_fingerprint
from gainlora.model.covariance import gate_covariances, layer_covariances
from gainlora.model.modeling import GainLoRAModel
from gainlora.model.targets import find_targets, group_layers_by_input
from gainlora.training.train import target_loss
from tests.tiny import tiny_adapter, tiny_llama, tiny_t5

MAKERS = {"llama": tiny_llama, "t5": tiny_t5}


def make(kind, branches=2, gated=True, learning=False, base=None):
    """A model with random branches and gates; the last one still learning if asked."""
    return tiny_adapter(base or MAKERS[kind](), branches, gated, learning).eval()


def rows(*lengths):
    g = torch.Generator().manual_seed(1)
    return [
        {"prompt_ids": torch.randint(3, 60, (n,), generator=g).tolist(), "target_ids": [70 + n % 3] * (n // 4) + [1]}
        for n in lengths
    ]


@pytest.mark.parametrize("kind", MAKERS)
def test_layers_and_their_inputs_are_found(kind):
    base = MAKERS[kind]()
    inputs = group_layers_by_input(base, find_targets(base, None))
    if kind == "llama":
        assert len(inputs) == 4 and len({i.group for i in inputs.values()}) == 2
        assert {i.side for i in inputs.values()} == {"source"}
    else:
        # encoder 2 x (q, v); decoder 2 x self (q, v), 2 x cross (q; v sees the encoder's output, shared by both)
        assert len(inputs) == 12
        cross = "decoder.block.1.layer.1.EncDecAttention"
        assert inputs[f"{cross}.v"].side == "source" and inputs[f"{cross}.q"].side == "target"
        assert inputs[f"{cross}.v"].group == "decoder.block.0.layer.1.EncDecAttention.v"
        assert inputs["encoder.block.0.layer.0.SelfAttention.v"].group == "encoder.block.0.layer.0.SelfAttention.q"


def test_unknown_targets_are_refused_with_what_there_is():
    with pytest.raises(GainLoRAError, match=r"lora\.targets: query .*q_proj"):
        find_targets(tiny_llama(), ["query"])
    with pytest.raises(GainLoRAError, match=r"lora\.targets: lm_head"):
        find_targets(tiny_llama(), ["lm_head"])
    model = GainLoRAModel(tiny_t5(), GainLoRAConfig("tiny", rank=2, alpha=4, targets=("q", "wo"), integration="equal"))
    model(**collate(rows(5), 0, True, targets=True))  # T5 reads wo.weight


@pytest.mark.parametrize("kind", MAKERS)
def test_closed_gates_equal_the_base_model(kind):
    batch = collate(rows(5, 9), 0, kind == "t5", targets=True)
    model = make(kind)
    model.gates.key.zero_()  # b = 0: every coefficient is exactly 0
    with torch.no_grad():
        mine = model(**batch).logits
        labels = {"labels": batch.pop("labels")}
        base = MAKERS[kind]()(**batch, **(labels if kind == "t5" else {})).logits
    assert torch.equal(mine, base)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("learning", [False, True])
def test_a_gate_ignores_padding_batch_mates_and_label_tokens(kind, learning):
    model = make(kind, learning=learning)
    examples = rows(4, 11, 7)
    together = collate(examples, 0, model.encoder_decoder, targets=True)
    model(**together)
    a = model.integration.coefficients
    assert a.shape == (3, 2) and (a - a[0]).abs().max() > 1e-3  # samples do differ
    for i, example in enumerate(examples):
        alone = collate([example], 0, model.encoder_decoder, targets=True)
        model(**alone)
        torch.testing.assert_close(model.integration.coefficients[0], a[i])
        prompt = collate([example], 0, model.encoder_decoder, targets=False)
        torch.testing.assert_close(model.coefficients(**prompt)[0], a[i])  # as generation sees it
        other = collate([{**example, "target_ids": [80, 81, 1]}], 0, model.encoder_decoder, targets=True)
        model(**other)
        torch.testing.assert_close(model.integration.coefficients[0], a[i])


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_equals_uncached_and_batches_equal_single(kind, beams):
    model = make(kind, learning=True)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=beams, pad_token_id=0)
    batch = collate(rows(4, 11, 7), 0, model.encoder_decoder, targets=False)
    answers = model.generate(**batch, use_cache=True, **options)[:, -6:]
    assert torch.equal(answers, model.generate(**batch, use_cache=False, **options)[:, -6:])
    assert len({tuple(a) for a in answers.tolist()}) > 1  # not one answer for all
    for i, row in enumerate(rows(4, 11, 7)):
        alone = collate([row], 0, model.encoder_decoder, targets=False)
        assert torch.equal(model.generate(**alone, **options)[0, -6:], answers[i])


def test_a_decoders_layers_on_the_encoders_output_share_an_input_wherever_they_are():
    """As under a device map, where each GPU has its own copy of the encoder's output."""
    base = tiny_t5()
    targets = find_targets(base, ["k", "v"])
    whole = group_layers_by_input(base, targets)
    assert len({found.group for name, found in whole.items() if "EncDecAttention" in name}) == 1

    def copied(value):
        return value.clone() if isinstance(value, torch.Tensor) and value.shape == (2, 5, 32) else value

    def to_another_gpu(block, args, kwargs):
        return tuple(map(copied, args)), {name: copied(value) for name, value in kwargs.items()}

    for block in base.decoder.block:
        block.register_forward_pre_hook(to_another_gpu, with_kwargs=True)
    assert group_layers_by_input(base, targets) == whole


@pytest.mark.parametrize("kind", MAKERS)
def test_loss_is_that_of_all_logits(kind):
    """Computing logits on target positions only changes nothing, nor does padding."""
    model = make(kind, learning=True)
    examples = [{**r, "target_ids": [70 + n, *range(3, 3 + n), 1]} for n, r in enumerate(rows(4, 11, 7))]
    batch = collate(examples, 0, model.encoder_decoder, targets=True)
    loss = target_loss(model, batch, model.encoder_decoder)
    expected = 0.0
    for example in examples:
        one = collate([example], 0, model.encoder_decoder, targets=True)
        logits = model(**one).logits[0]
        if not model.encoder_decoder:
            start = len(example["prompt_ids"])
            logits = logits[start - 1 : -1]
        expected += torch.nn.functional.cross_entropy(logits, torch.tensor(example["target_ids"]), reduction="sum")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("gated", [False, True])
def test_save_and_load_give_equal_logits(kind, gated, tmp_path):
    model = make(kind, gated=gated)
    group = model.groups[0]
    model.layer_memory[group] = (torch.eye(32)[:, :3],)
    MAKERS[kind](tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*.bin")) and not list((tmp_path / "adapter").glob("*.pkl"))
    loaded = GainLoRAModel.from_pretrained(tmp_path / "adapter", MAKERS[kind]()).eval()
    batch = collate(rows(5, 9), 0, model.encoder_decoder, targets=True)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.config == model.config and loaded.config.tasks == ("task0", "task1")
    assert torch.equal(loaded.layer_memory[group][0], model.layer_memory[group][0])


def test_base_weights_have_one_fingerprint_in_every_order_and_dtype():
    """Whatever tells them from others changes it: a value at either end or between, a name, a shape."""
    kept = {"a": torch.randn(50, 400), "b": torch.randn(7), "c": torch.tensor(2.0), "d": torch.zeros(0)}
    expected = weights_fingerprint(kept.items())
    assert weights_fingerprint((name, t.bfloat16()) for name, t in reversed(kept.items())) == expected
    for row, column in ((0, 0), (-1, -1), (25, 62)):  # of every 78th value
        other = kept["a"].clone()
        other[row, column] += 1
        assert weights_fingerprint({**kept, "a": other}.items()) != expected
    assert weights_fingerprint({**kept, "a": kept["a"].reshape(400, 50)}.items()) != expected
    assert weights_fingerprint({"A": kept["a"], **{n: kept[n] for n in "bcd"}}.items()) != expected


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_loaded_base_has_the_digest_of_its_files(kind, tmp_path):
    (tiny_t5 if kind == "t5" else tiny_llama)(tmp_path)
    stored = weights_fingerprint(load_file(tmp_path / "model.safetensors").items())
    assert {load_base(str(tmp_path), dtype)[0].weights_fingerprint for dtype in (torch.float32, torch.bfloat16)} == {
        stored
    }


@pytest.mark.parametrize("kind", MAKERS)
def test_covariances_count_real_tokens_only(kind):
    """One padded batch gives the same covariances as one example at a time, in a model that was training."""
    model = make(kind, learning=True).train()  # T5 has dropout: the pass must switch it off, and on again
    examples = rows(4, 11, 7)
    together = layer_covariances(model, [collate(examples, 0, model.encoder_decoder, targets=True)])
    alone = layer_covariances(model, [collate([e], 0, model.encoder_decoder, targets=True) for e in examples])
    for group in model.groups:
        torch.testing.assert_close(together[group], alone[group], rtol=1e-4, atol=1e-5)
    assert model.training and model.base.training


def test_covariances_are_those_of_prompt_and_target_tokens():
    """Layer inputs: prompt and target. Gate inputs: the prompt alone."""
    model = make("llama", learning=True)
    (example,) = rows(9)
    batch = collate([example], 0, False, targets=True)
    first = model.groups[0]  # its input is the normalized embedding of each token
    x = model.base.model.layers[0].input_layernorm(model.base.get_input_embeddings()(batch["input_ids"]))[0]
    torch.testing.assert_close(layer_covariances(model, [batch])[first][0], x.T @ x / len(x))
    assert len(x) == len(example["prompt_ids"]) + len(example["target_ids"])
    p = model.base.get_input_embeddings()(torch.tensor(example["prompt_ids"])).mean(0)
    torch.testing.assert_close(gate_covariances(model, model.gate, [batch])[0], torch.outer(p, p))


def test_the_base_model_alone_is_refused_and_nothing_is_left_from_a_call():
    model = make("llama")
    batch = collate(rows(5, 9), 0, False, targets=False)
    model.generate(**batch, max_new_tokens=2)
    with pytest.raises(GainLoRAError, match="no coefficients"):
        model.get_base_model()(**batch)


def test_everything_moves_with_the_model_and_stays_float32():
    model = make("t5").to(torch.bfloat16)

    def state():
        layers = (basis for group in model.layer_memory.values() for basis in group)
        return [model.gates.key, *model.gates.hidden, *model.gate_memory, *layers]

    assert {t.dtype for t in state()} == {torch.float32}
    model(**collate(rows(5, 9), 0, True, targets=True))
    model.to("meta")
    assert {t.device.type for t in state()} == {"meta"}


@pytest.mark.parametrize("kind", MAKERS)
def test_generation_settings_of_a_checkpoint_are_not_used(kind, tmp_path):
    poisoned = MAKERS[kind](tmp_path)
    poisoned.generation_config.repetition_penalty = 5.0
    poisoned.generation_config.num_beams = 4
    poisoned.save_pretrained(tmp_path)
    base, _ = load_base(str(tmp_path), torch.float32)
    settings = base.generation_config
    assert (settings.repetition_penalty, settings.num_beams, settings.do_sample) == (None, None, False)
    assert settings.eos_token_id == 1 and settings.pad_token_id == 0
    batch = collate(rows(5, 9), 0, kind == "t5", targets=False)
    plain = make(kind, base=base).generate(**batch, max_new_tokens=8, min_new_tokens=8)
    assert torch.equal(plain, make(kind).generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False))


def test_only_the_newest_branch_and_gate_train():
    model = make("llama", branches=3, learning=True)
    target_loss(model, collate(rows(5, 9), 0, False, targets=True), False).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert all(".new_" in name or name.startswith("gate.change") for name in trained)
    layer = next(iter(model.layers.values()))
    assert model.trainable_parameters() == sum(p.numel() for n, p in model.named_parameters() if n in trained)
    assert layer.branches == 3
