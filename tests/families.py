"""Model classes of transformers at tiny random size, for checks of what a family does, not of its language.

family(name) makes a model; its tokens are those of `tests.tiny.tiny_tokenizer`: 0 pads, 1 ends.
"""

from typing import Any

import torch

from tests.tiny import tiny_tokenizer

# fmt: off
VOCABULARY = len(tiny_tokenizer())
COMMON = dict(
    vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    initializer_range=0.2, init_std=0.2, max_position_embeddings=64,
)
FALCON = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
DECODER = dict(**FALCON, head_dim=8)
BART = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
    encoder_attention_heads=4, decoder_attention_heads=4, decoder_start_token_id=2,
)
T5 = dict(
    d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, decoder_start_token_id=0,
    initializer_factor=3.0,
)
PROPHETNET = dict(
    hidden_size=32, encoder_ffn_dim=48, decoder_ffn_dim=48, num_encoder_layers=2, num_decoder_layers=2,
    num_encoder_attention_heads=4, num_decoder_attention_heads=4, decoder_start_token_id=0,
)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=48)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
DEEPSEEK = dict(
    **{**DECODER, "num_key_value_heads": 4}, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
    kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
    moe_intermediate_size=16,
)
MAMBA = dict(hidden_size=32, num_hidden_layers=2, state_size=4)
ZAMBA2 = dict(
    **{**FALCON, "num_key_value_heads": 4, "num_hidden_layers": 4}, hybrid_layer_ids=[1, 3],
    layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], mamba_d_state=8, n_mamba_heads=8, mamba_headdim=8,
    mamba_ngroups=1, num_mem_blocks=1, use_shared_attention_adapter=False, chunk_size=4, use_mem_rope=True,
    tie_word_embeddings=True,
)
LINEAR = dict(
    linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    shared_expert_intermediate_size=16,
)
REFORMER = dict(
    hidden_size=32, num_attention_heads=4, attention_head_size=8, feed_forward_size=48, is_decoder=True,
    axial_pos_shape=[8, 8], axial_pos_embds_dim=[16, 16], attn_layers=["local"] * 2, local_attn_chunk_length=4,
)
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> class, sizes
    # encoder-decoders
    **{name: (name, T5) for name in ("T5", "MT5", "UMT5")},
    "LongT5": ("LongT5", {**T5, "local_radius": 4}),
    "SwitchTransformers": (
        "SwitchTransformers", dict(**T5, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
    ),
    "T5Gemma": ("T5Gemma", {"encoder": {**COMMON, **DECODER}, "decoder": {**COMMON, **DECODER}}),
    **{name: (name, BART) for name in (
        "Bart", "M2M100", "Pegasus", "Marian", "Blenderbot", "BlenderbotSmall", "PLBart", "Mvp"
    )},
    "MBart": ("MBart", {**BART, "decoder_start_token_id": 7}),  # a language code
    "NllbMoe": (
        "NllbMoe", dict(**BART, num_experts=2, encoder_sparse_step=2, decoder_sparse_step=2, expert_capacity=64)
    ),
    "PegasusX": ("PegasusX", dict(**BART, num_global_tokens=2, block_size=4)),
    "BigBirdPegasus": ("BigBirdPegasus", dict(**BART, attention_type="original_full")),
    "LED": ("LED", dict(
        **BART, attention_window=4, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64
    )),
    "FSMT": ("FSMT", dict(**BART, src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, langs=["a", "b"])),
    "ProphetNet": ("ProphetNet", PROPHETNET),
    # decoder-only
    **{name: (name, DECODER) for name in (
        "Llama", "Qwen2", "Qwen3", "Mistral", "Ministral", "Gemma", "Gemma2", "Gemma3Text", "Phi", "Phi3", "GPTNeoX",
        "StableLm", "Cohere", "Cohere2", "Granite", "Olmo", "Olmo2", "SmolLM3", "Glm", "Starcoder2", "Nemotron",
        "Exaone4", "Helium", "Persimmon", "DiffLlama", "Arcee", "ModernBertDecoder", "RecurrentGemma", "BioGpt",
    )},
    **{name: (name, {**DECODER, **EXPERTS}) for name in (
        "Qwen2Moe", "Qwen3Moe", "Mixtral", "Olmoe", "GraniteMoe", "GraniteMoeShared", "Phimoe", "GptOss", "JetMoe"
    )},
    "DeepseekV3": ("DeepseekV3", dict(**DEEPSEEK, q_lora_rank=8)),
    "DeepseekV2": ("DeepseekV2", dict(**DEEPSEEK, q_lora_rank=None)),
    "Falcon": ("Falcon", FALCON),
    "Falcon alibi": ("Falcon", dict(**FALCON, alibi=True)),
    **{name: (name, GPT2) for name in ("GPT2", "GPTBigCode", "OpenAIGPT")},
    **{name: (name, dict(**GPT2, rotary_dim=4)) for name in ("GPTJ", "CodeGen")},
    "GPTNeo": ("GPTNeo", dict(
        **DECODER, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )),
    "Bloom": ("Bloom", dict(hidden_size=32, n_layer=2, n_head=4)),
    "Mpt": ("Mpt", dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=64, expansion_ratio=2)),
    "OPT": ("OPT", dict(**DECODER, ffn_dim=48, word_embed_proj_dim=32)),
    "XGLM": ("XGLM", dict(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4)),
    "CTRL": ("CTRL", dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, dff=48)),
    "Mamba": ("Mamba", MAMBA),
    "FalconMamba": ("FalconMamba", MAMBA),
    "Mamba2": ("Mamba2", {**MAMBA, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
    "Rwkv": ("Rwkv", dict(
        hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=48, context_length=64
    )),
    "Jamba": ("Jamba", dict(
        **DECODER, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=4,
        mamba_dt_rank=4,
    )),
    "Zamba2": ("Zamba2", ZAMBA2),
    "Lfm2": ("Lfm2", dict(**DECODER, layer_types=["conv", "full_attention"])),
    "Qwen3Next": ("Qwen3Next", {
        **DECODER, **EXPERTS, **LINEAR, "layer_types": ["linear_attention", "full_attention"]
    }),
    "xLSTM": ("xLSTM", dict(hidden_size=32, num_hidden_layers=2, num_heads=4)),
    # causal only if told so
    **{name: (name, DECODER) for name in (
        "Bert", "Roberta", "Electra", "XLMRoberta", "BertGeneration", "RoFormer", "RemBert", "MegatronBert",
        "Camembert", "Data2VecText", "Ernie", "BigBird",
    )},
    "Bert decoder": ("Bert", dict(**DECODER, is_decoder=True)),
    "Roberta decoder": ("Roberta", dict(**DECODER, is_decoder=True)),
    "XLM": ("XLM", dict(emb_dim=32, n_layers=2, n_heads=4)),
    "Reformer": ("Reformer", REFORMER),
    # with a vision tower
    "Gemma3": ("Gemma3", dict(
        text_config={**COMMON, **DECODER}, vision_config=VISION, mm_tokens_per_image=4, image_token_id=VOCABULARY,
        boi_token_id=VOCABULARY + 1, eoi_token_id=VOCABULARY + 2,
    )),
}
# fmt: on


def family(name: str) -> Any:
    """A model of the family `name` in eval mode; its random weights are always the same."""
    import transformers

    kind, sizes = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **sizes})
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    return auto.from_config(config).eval()
