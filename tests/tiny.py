"""
Tiny random models of every family whose experts transformers decorates.

The families are found by looking into the installed transformers, never from a list. A family's
configuration is made small by the names of its settings; what a family needs beyond that stands in
`OVERRIDES`, and what cannot be built at all in `CANNOT`, with the reason.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from melinoe.moe.experts import is_experts_module

VOCAB = 96
NUM_EXPERTS = 8
TOP_K = 2

_MODELS = Path(transformers.__file__).parent / "models"

# By name of a setting, wherever a configuration has it.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,  # latent attention wants as many as heads
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "sliding_window": 64,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "depth": 1,
    "num_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "encoder_layers": 1,
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "d_model": 16,
}

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _HYBRID,
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"], "topk_method": "greedy"},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        }
    },
    "glm5_next": {
        "qk_rope_head_dim": 0,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["linear_attention", "indexed_attention"],
    },
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8} | _HYBRID,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "use_mamba_kernels": False},
    "kimi_linear": _HYBRID,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral4": {"qk_rope_head_dim": 8, "head_dim": 16},
    "nemotron_h": {"n_groups": 2},
    "qwen3_5_moe": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp": _HYBRID
    | {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Where the class that transformers lists first needs more than text: the part that does not.
MODEL_CLASS: dict[str, str] = {
    "gemma4": "Gemma4ForCausalLM",
    "muse_spark": "MuseSparkTextModel",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerTextModel",
}

CANNOT: dict[str, str] = {}
"""Family to the reason why no tiny model of it can be built here; empty at the time of writing."""

ATTACHED_ONLY = {"ernie4_5_vl_moe"}
"""Families in whose files a rule mixes all experts of a layer, so that none can be read alone."""


@cache
def families() -> tuple[str, ...]:
    """Names of the model folders in which an experts class is decorated."""
    return tuple(
        sorted(
            path.parent.name
            for path in _MODELS.glob("*/modeling_*.py")
            if re.search(r"^@use_experts_implementation", path.read_text(), re.MULTILINE)
        )
    )


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any
) -> PreTrainedModel:
    """A random model of *family* with 8 experts, top-2, in evaluation mode; each call its own."""
    key = (family, seed, dtype, repr(sorted(settings.items())))
    if key not in _made:
        with torch.inference_mode(False):
            _made[key] = _new_model(family, seed, dtype, settings), torch.get_rng_state()
    model, random = _made[key]
    torch.set_rng_state(random)  # whatever is drawn next does not depend on who came before
    return copy.deepcopy(model)


# A copy takes a third of the time of a new one.
_made: dict[Any, tuple[PreTrainedModel, torch.Tensor]] = {}


def _new_model(
    family: str, seed: int, dtype: torch.dtype, settings: dict[str, Any]
) -> PreTrainedModel:
    model_class = _model_class(family)
    config = tiny_config(model_class.config_class, OVERRIDES.get(family, {}) | settings)
    torch.manual_seed(seed)
    model = model_class._from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for module in model.modules():
            if is_experts_module(module):  # large enough for the experts to matter
                for parameter in module.parameters(recurse=False):
                    parameter.normal_(std=0.3)
    return model


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without values."""
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype).eval()


def tiny_of_type(model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    """A small model of any model type, decorated or not, on the meta device: to look at only."""
    config = tiny_config(CONFIG_MAPPING[model_type], settings)
    with torch.device("meta"):
        try:
            return transformers.AutoModelForCausalLM.from_config(config)
        except ValueError:
            return transformers.AutoModel.from_config(config)


def tiny_config(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> Any:
    """A small configuration; *overrides* go to the part that has experts, or by part's name."""
    parts = config_class.sub_configs
    own = {k: v for k, v in overrides.items() if k not in parts}
    try:
        known = set(vars(config_class()))
    except Exception:
        known = set(inspect.signature(config_class).parameters)
    known |= set(inspect.signature(config_class).parameters)
    values = {key: value for key, value in _SMALL.items() if key in known} | (
        own if "text_config" not in parts else {}
    )
    for part, part_class in parts.items():
        if not issubclass(part_class, PreTrainedConfig):  # "any": take what the default has
            part_class = type(getattr(config_class(), part))
            if not issubclass(part_class, PreTrainedConfig):
                continue
        inner = overrides.get(part, {}) if part != "text_config" else own | overrides.get(part, {})
        values[part] = tiny_config(part_class, inner).to_dict()
    return config_class(**values)


@cache
def _model_class(family: str) -> type[PreTrainedModel]:
    """The class that generates text from text, if the family has one, else its base model."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    if family in MODEL_CLASS:
        return getattr(module, MODEL_CLASS[family])
    here = {
        name
        for name, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, PreTrainedModel) and member.__module__ == module.__name__
    }
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
    ):
        for names in mapping.values():
            for name in [names] if isinstance(names, str) else names:
                if name in here:
                    return getattr(module, name)
    raise LookupError(f"no model class in {family}")
