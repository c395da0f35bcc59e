"""config.json in every spelling, and what is refused."""

from __future__ import annotations

import json

import pytest

from phalanx.errors import BadCheckpoint
from phalanx.model.config import ModelConfig

QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.fixture
def read(tmp_path):
    def read_config(config: dict, generation: dict | None = None) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return ModelConfig.read(tmp_path)

    return read_config


def test_qwen3_moe_as_on_the_hub(read):
    config = read(QWEN)
    assert (config.architecture, config.num_experts, config.top_k, config.expert_width) == ("qwen3_moe", 128, 8, 768)
    assert (config.head_dim, config.num_kv_heads, config.rope_theta, config.max_position) == (128, 4, 1e6, 40960)
    assert config.qk_norm
    assert config.norm_topk
    assert config.moe_layers == tuple(range(48))
    assert config.eos_ids == (151645,)


def test_mixtral_as_on_the_hub(read):
    config = read(MIXTRAL)
    assert (config.architecture, config.num_experts, config.top_k, config.expert_width) == ("mixtral", 8, 2, 14336)
    assert (config.head_dim, config.num_moe_layers) == (128, 32)
    assert not config.qk_norm
    assert config.norm_topk


def test_the_spelling_of_transformers_5_means_the_same(read):
    new = without(QWEN, "num_experts", "rope_theta", "rope_scaling", "torch_dtype") | {
        "num_local_experts": 128,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "dtype": "bfloat16",
    }
    assert read(new) == read(QWEN)


def test_dense_layers_come_from_the_step_and_from_the_list(read):
    assert read(QWEN | {"decoder_sparse_step": 2, "num_hidden_layers": 6}).moe_layers == (1, 3, 5)
    assert read(QWEN | {"mlp_only_layers": [0, 2], "num_hidden_layers": 4}).moe_layers == (1, 3)


def test_the_ids_that_end_a_text_come_from_the_generation_config_first(read):
    assert read(QWEN, {"eos_token_id": [151645, 151643]}).eos_ids == (151645, 151643)


def test_weights_in_fp8_with_a_scale_a_block_are_known_by_the_config(read):
    assert read(QWEN).expert_format == "plain"
    assert read(QWEN | {"quantization_config": None}).expert_format == "plain"
    for said in (FP8, FP8 | {"modules_to_not_convert": ["lm_head"]}, without(FP8, "fmt", "activation_scheme")):
        config = read(QWEN | {"quantization_config": said})
        assert config.expert_format == "fp8"
        assert config.expert_layout(2).total_bytes == 3 * 2048 * 768 + 4 * 3 * 16 * 6
    assert read(QWEN).expert_layout(2).total_bytes == 2 * 3 * 2048 * 768


def test_a_missing_head_size_is_the_width_over_the_heads(read):
    assert read(without(QWEN, "head_dim")).head_dim == 64


def test_a_sliding_window_counts_only_where_it_is_switched_on(read):
    assert read(QWEN | {"sliding_window": 4096}).sliding_window is None
    assert read(QWEN | {"sliding_window": 4096, "use_sliding_window": True}).sliding_window == 4096
    assert read(MIXTRAL | {"sliding_window": 4096}).sliding_window == 4096


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (QWEN | {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM is not supported"),
        (without(QWEN, "architectures") | {"model_type": "gpt_oss"}, "gpt_oss is not supported"),
        (without(QWEN, "architectures", "model_type"), "none named"),
        (without(QWEN, "hidden_size"), "hidden_size is missing"),
        (QWEN | {"hidden_size": "2048"}, "hidden_size must be a whole number"),
        (QWEN | {"num_hidden_layers": 0}, "num_hidden_layers must be a whole number"),
        (QWEN | {"rms_norm_eps": -1}, "rms_norm_eps must be a number above 0"),
        (QWEN | {"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false"),
        (QWEN | {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (QWEN | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        (QWEN | {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type 'linear' is not supported"),
        (QWEN | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            QWEN | {"quantization_config": FP8 | {"quant_method": "awq"}},
            r"quantization_config\.quant_method 'awq' is not supported",
        ),
        (QWEN | {"quantization_config": without(FP8, "weight_block_size")}, "weight_block_size None is not supported"),
        (
            QWEN | {"quantization_config": FP8 | {"weight_block_size": [64, 128]}},
            r"weight_block_size \[64, 128\] is not",
        ),
        (QWEN | {"quantization_config": FP8 | {"activation_scheme": "static"}}, "activation_scheme 'static'"),
        (QWEN | {"quantization_config": FP8 | {"fmt": "e5m2"}}, r"quantization_config\.fmt 'e5m2'"),
        (QWEN | {"quantization_config": "fp8"}, "quantization_config must be an object"),
        (QWEN | {"num_key_value_heads": 5}, "not a multiple of num_key_value_heads 5"),
        (QWEN | {"num_experts_per_tok": 129}, "more than num_experts 128"),
        (QWEN | {"head_dim": 15}, "head_dim 15 is odd"),
        (QWEN | {"mlp_only_layers": list(range(48))}, "no layer has experts"),
        (QWEN | {"mlp_only_layers": 3}, "mlp_only_layers must be a list"),
        (QWEN | {"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(read, config, complaint):
    with pytest.raises(BadCheckpoint, match=complaint) as caught:
        read(config)
    assert "config.json" in str(caught.value)


def test_a_config_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(BadCheckpoint, match=r"config\.json is not valid JSON"):
        ModelConfig.read(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(BadCheckpoint, match="must hold a JSON object"):
        ModelConfig.read(tmp_path)


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(BadCheckpoint, match=r"config\.json: No such file"):
        ModelConfig.read(tmp_path)
    with pytest.raises(BadCheckpoint, match="is not a directory"):
        ModelConfig.read(tmp_path / "nowhere")
