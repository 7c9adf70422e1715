"""
Write the benchmark's OLMoE checkpoint as GGUF, and as the packed one that holds the same codes.

`bf16` is the checkpoint's own numbers. `q4` has the experts in Q4_0 (a float16 scale for 32 codes
of 4 bits) and the layers beside them in Q8_0; the experts of the packed checkpoint
(compressed-tensors: symmetric, groups of 32) are the same codes and scales, so both programs
compute the same experts.

    python gguf_file.py CHECKPOINT bf16|q4 OUT.gguf [PACKED]      # with `gguf` on PYTHONPATH
"""

import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
KINDS = gguf.GGMLQuantizationType


def write_header(writer: gguf.GGUFWriter, config: dict) -> None:
    """Write sizes as llama.cpp wants them; tokens are numbers, because ids are given."""
    writer.add_context_length(4096)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    count = config["vocab_size"] - 3 - 256
    writer.add_tokenizer_model("llama")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *byte_tokens, *map(str, range(count))])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * count])  # unknown, control, byte, normal


def packed_parts(blocks: np.ndarray) -> dict[str, torch.Tensor]:
    """A matrix in Q4_0 ``(rows, bytes)`` as compressed-tensors stores it."""
    rows = len(blocks)
    own = blocks.reshape(rows, -1, 18)
    scales = np.ascontiguousarray(own[..., :2]).view(np.float16)[..., 0]
    codes = np.concatenate([own[..., 2:] & 15, own[..., 2:] >> 4], axis=-1).reshape(rows, -1)
    words = np.ascontiguousarray(codes[:, ::2] | codes[:, 1::2] << 4).view(np.int32)
    shape = torch.tensor(codes.shape)
    return {
        "weight_packed": torch.from_numpy(words),
        "weight_scale": torch.from_numpy(np.ascontiguousarray(scales)),
        "weight_shape": shape,
    }


def main() -> None:
    source, bits, out, *packed = sys.argv[1:]
    config = json.loads((Path(source) / "config.json").read_text())
    index = json.loads((Path(source) / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: safe_open(Path(source) / name, "pt") for name in set(index.values())}
    writer, written = gguf.GGUFWriter(out, "olmoe"), {}
    write_header(writer, config)

    def read(name: str) -> torch.Tensor:
        return files[index[name]].get_tensor(name)

    def add(name: str, weights: torch.Tensor, kind: gguf.GGMLQuantizationType) -> None:
        if weights.ndim == 1 or "ffn_gate_inp" in name:  # llama.cpp wants these in float32
            writer.add_tensor(name, weights.float().numpy())
        elif kind == KINDS.BF16:
            writer.add_tensor(
                name, weights.view(torch.int16).numpy().view(np.uint8), raw_dtype=kind
            )
        else:
            writer.add_tensor(
                name, gguf.quants.quantize(weights.float().numpy(), kind), raw_dtype=kind
            )

    rest = KINDS.BF16 if bits == "bf16" else KINDS.Q8_0
    add("token_embd.weight", read("model.embed_tokens.weight"), rest)
    add("output_norm.weight", read("model.norm.weight"), rest)
    add("output.weight", read("lm_head.weight"), rest)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for theirs, ours in NAMES.items():
            add(f"blk.{layer}.{ours}.weight", read(f"{prefix}.{theirs}.weight"), rest)
        for part in ("gate", "up", "down"):
            stack = []
            for expert in range(config["num_experts"]):
                name = f"{prefix}.mlp.experts.{expert}.{part}_proj"
                weights = read(f"{name}.weight")
                if bits == "bf16":
                    stack.append(weights.view(torch.int16).numpy().view(np.uint8))
                    continue
                stack.append(gguf.quants.quantize(weights.float().numpy(), KINDS.Q4_0))
                parts = packed_parts(stack[-1])
                written |= {f"{name}.{kind}": tensor for kind, tensor in parts.items()}
            kind = KINDS.BF16 if bits == "bf16" else KINDS.Q4_0
            writer.add_tensor(
                f"blk.{layer}.ffn_{part}_exps.weight", np.stack(stack), raw_dtype=kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if packed:
        target = Path(packed[0])
        target.mkdir(parents=True, exist_ok=True)
        written |= {name: read(name) for name in index if ".experts." not in name}
        save_file(written, target / "model.safetensors")
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32,
                   "symmetric": True}  # fmt: skip
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["re:.*experts.*"], "weights": weights}},
        }
        (target / "config.json").write_text(json.dumps(config))
        for extra in Path(source).glob("generation_config.json"):
            shutil.copy(extra, target)


if __name__ == "__main__":
    main()
