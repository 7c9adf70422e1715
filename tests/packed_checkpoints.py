"""Tiny checkpoints whose weights are packed as the hub's are: names, shapes and types the same."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def gptq(bits: int = 4, **more: object) -> dict:
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, **more}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def compressed(bits: int, symmetric: bool, strategy: str = "group", kind: str = "pack-quantized"):
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
        "group_size": 32 if strategy == "group" else None,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


def write_packed(directory: Path, settings: dict, seed: int = 0, width: int | None = None) -> Path:
    """
    Write a tiny model whose ``quantization_config`` is *settings*, and the same one plain.

    mxfp4 is a gpt-oss, all else a Qwen3-MoE, whose vectors have *width* numbers. Codes and scales
    are drawn, but for fp8, which transformers' own quantiser makes, if 128 divides the shapes.

    Returns:
        The packed checkpoint, ``directory/packed``. In ``directory/plain`` lies one in float32
        with the weights that the packed ones mean, by the definition of their format.
    """
    method = settings["quant_method"]
    torch.manual_seed(seed)
    if method == "mxfp4":
        model = tiny_model("gpt_oss", dtype=torch.bfloat16, hidden_size=64)
    else:
        wide = width or (128 if method == "fp8" else 64)
        model = tiny_model(
            "qwen3_moe", dtype=torch.bfloat16, hidden_size=wide, moe_intermediate_size=wide,
            head_dim=32, mlp_only_layers=[],
        )  # fmt: skip
    stored, meant = {}, {}
    for one in ("packed", "plain"):
        model.save_pretrained(directory / one)
    for name, tensor in load_file(directory / "plain" / "model.safetensors").items():
        stored[name], meant[name] = tensor, tensor.float()
        experts = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        if experts if method == "mxfp4" else name.endswith("_proj.weight"):
            del stored[name]
            more, meant[name] = _PACK[method](name, tensor, settings)
            stored |= more
    for one, tensors in (("packed", stored), ("plain", meant)):
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, directory / one / "model.safetensors", metadata={"format": "pt"})
    config = directory / "packed" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"quantization_config": settings})
    )
    return directory / "packed"


Packed = tuple[dict[str, torch.Tensor], torch.Tensor]


def _mxfp4(name: str, plain: torch.Tensor, settings: dict) -> Packed:
    """Codes of every kind, and scales that keep weights near .1."""
    experts, inputs, outputs = plain.shape
    shape = (experts, outputs, inputs // 32)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
    scales = torch.randint(121, 126, shape, dtype=torch.uint8)
    meant = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, meant


def _fp8(name: str, plain: torch.Tensor, settings: dict) -> Packed:
    rows, columns = plain.shape
    if rows % 128 or columns % 128:  # square by square, the last ones cut
        scales = torch.rand(-(-rows // 128), -(-columns // 128)) / 100
        codes = (torch.randn(rows, columns) * 10).to(torch.float8_e4m3fn)
        meant = codes.float()
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                square = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
                meant[square] *= scales[row, column]
        return {name: codes, f"{name}_scale_inv": scales}, meant
    config = SimpleNamespace(weight_block_size=[128, 128], scale_fmt=None)
    quantizer = SimpleNamespace(quantization_config=config)
    made = Fp8Quantize(quantizer)._quantize_one(name, plain)
    return made, Fp8Dequantize(quantizer)._dequantize_one(*made.values(), torch.float32)


def _numbers(rows: int, columns: int, bits: int, group: int = 32) -> tuple[torch.Tensor, ...]:
    """Codes (rows, columns), zero points and scales (rows, groups)."""
    groups = columns // group
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.int32)
    zeros = torch.randint(1, 2**bits, (rows, groups), dtype=torch.int32)
    return codes, zeros, (torch.rand(rows, groups) + 0.3) / 2**bits


def _meaning(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    group = codes.shape[1] // zeros.shape[1]
    wide = [one.repeat_interleave(group, 1) for one in (zeros, scales.float())]
    return (codes - wide[0]) * wide[1]


def words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack numbers along the last dimension into int32 words, the first in the lowest bits."""
    each = 32 // bits
    shifted = numbers.to(torch.int64).unflatten(-1, (-1, each)) << (torch.arange(each) * bits)
    return shifted.sum(-1).view(torch.int32)[..., ::2].contiguous()


def _gptq(name: str, plain: torch.Tensor, settings: dict) -> Packed:
    bits, base = settings["bits"], name.removesuffix(".weight")
    codes, zeros, scales = _numbers(*plain.shape, bits)
    less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    return {
        f"{base}.qweight": words(codes, bits).T.contiguous(),
        f"{base}.qzeros": words((zeros - less).T.contiguous(), bits),
        f"{base}.scales": scales.half().T.contiguous(),
        f"{base}.g_idx": torch.arange(plain.shape[1], dtype=torch.int32) // 32,
    }, _meaning(codes, zeros, scales.half())


def _awq(name: str, plain: torch.Tensor, settings: dict) -> Packed:
    base = name.removesuffix(".weight")
    codes, zeros, scales = _numbers(*plain.shape, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the output that each position of a word holds

    def packed(numbers: torch.Tensor) -> torch.Tensor:  # (..., outputs)
        return words(numbers.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4)

    return {
        f"{base}.qweight": packed(codes.T),
        f"{base}.qzeros": packed(zeros.T),
        f"{base}.scales": scales.half().T.contiguous(),
    }, _meaning(codes, zeros, scales.half())


def _compressed(name: str, plain: torch.Tensor, settings: dict) -> Packed:
    base, weights = name.removesuffix(".weight"), settings["config_groups"]["group_0"]["weights"]
    bits, (rows, columns) = weights["num_bits"], plain.shape
    codes, zeros, scales = _numbers(rows, columns, bits, weights["group_size"] or columns)
    half, scales = 2 ** (bits - 1), scales.bfloat16()
    found = {f"{base}.weight_scale": scales}
    if settings["format"] == "pack-quantized":
        found[f"{base}.weight_packed"] = words(codes, bits)
        found[f"{base}.weight_shape"] = torch.tensor([rows, columns])
        packed_zeros = words(zeros.T.contiguous(), bits).T.contiguous()
    else:
        found[f"{base}.weight"] = (codes - half).to(torch.int8)
        packed_zeros = (zeros - half).to(torch.int8)
    if weights["symmetric"]:
        zeros = torch.full_like(zeros, half)
    else:
        found[f"{base}.weight_zero_point"] = packed_zeros
    return found, _meaning(codes, zeros, scales)


_PACK = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}
