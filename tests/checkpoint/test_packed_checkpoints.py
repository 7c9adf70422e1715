"""Packed checkpoints are read as they are stored, and mean what their format's own library says."""

import json
import shutil
from dataclasses import replace

import packed_checkpoints
import pytest
import torch
from packed_checkpoints import AWQ, FP8, MXFP4, compressed, gptq
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import melinoe
from melinoe.checkpoint import describe, load_model, open_checkpoint, write_model
from melinoe.checkpoint.writing import check_rewritable
from melinoe.errors import CheckpointError, UnsupportedModelError

WAYS = {
    "mxfp4": MXFP4,
    "fp8": FP8,
    "fp8 cut": FP8,
    "gptq": gptq(),
    "gptq 8 bits": gptq(8),
    "gptq v2": gptq(checkpoint_format="gptq_v2"),
    "awq": AWQ,
    "int4 symmetric": compressed(4, True),
    "int4": compressed(4, False),
    "int8 by output": compressed(8, False, "channel"),
    "int8 plain codes": compressed(8, False, "channel", "int-quantized"),
}
# gate and up, of one and a half squares of 128 outputs each, become one matrix.
WIDTHS = {"fp8 cut": 192}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each way's checkpoint, made once."""
    found = {}

    def of(way):
        if way not in found:
            found[way] = packed_checkpoints.write_packed(
                tmp_path_factory.mktemp("way"), WAYS[way], width=WIDTHS.get(way)
            )
        return found[way]

    return of


def plain_model(packed):
    """transformers' model of the weights that a packed checkpoint means, in float32."""
    return AutoModelForCausalLM.from_pretrained(packed.parent / "plain", dtype=torch.float32).eval()


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_is_read_as_it_is_stored(made, way):
    """Its block, straight from the shards, means the plain expert bit for bit; so does `read`."""
    plain = plain_model(made(way))
    with open_checkpoint(str(made(way)), torch.float32) as checkpoint:
        for source in checkpoint.experts:
            tensors, module = source.layer.tensors, plain.get_submodule(source.layer.name)
            assert not source.format.exact
            block = {
                p.name: torch.zeros(p.shape, dtype=p.dtype) for p in source.format.parts(tensors)
            }
            read = {t.name: torch.zeros(t.shape) for t in tensors}
            for expert in (0, source.num_experts - 1):
                source.read_block(expert, source.format, block)
                source.read(expert, read)
                meant = source.format.decode(tensors, block)
                for tensor in tensors:
                    expected = module.get_parameter(tensor.name)[expert]
                    assert torch.equal(meant[tensor.name].float(), expected), tensor.name
                    assert torch.equal(read[tensor.name], expected), tensor.name


def test_the_bytes_of_a_block_are_the_checkpoints(made):
    """gpt-oss: blocks and scales of one expert, not a byte changed; fp8: codes of both halves."""
    stored = load_file(made("mxfp4") / "model.safetensors")
    with open_checkpoint(str(made("mxfp4"))) as checkpoint:
        source = checkpoint.experts[1]
        block = block_of(source, 5)
    name = f"{source.layer.name}.down_proj"
    assert torch.equal(block["down_proj.codes"].flatten(), stored[f"{name}_blocks"][5].flatten())
    assert torch.equal(block["down_proj.scales"], stored[f"{name}_scales"][5])
    assert torch.equal(block["down_proj_bias"], stored[f"{name}_bias"][5])
    stored = load_file(made("fp8") / "model.safetensors")
    with open_checkpoint(str(made("fp8"))) as checkpoint:
        source = checkpoint.experts[0]
        block = block_of(source, 2)
    halves = [stored[f"model.layers.0.mlp.experts.2.{one}_proj.weight"] for one in ("gate", "up")]
    assert torch.equal(
        block["gate_up_proj.codes"].view(torch.uint8), torch.cat(halves).view(torch.uint8)
    )


def block_of(source, expert):
    """One expert's block in the checkpoint's own format."""
    parts = source.format.parts(source.layer.tensors)
    block = {part.name: torch.empty(part.shape, dtype=part.dtype) for part in parts}
    source.read_block(expert, source.format, block)
    return block


@pytest.mark.parametrize(
    ("way", "config"),
    [("mxfp4", Mxfp4Config(dequantize=True)), ("fp8", FineGrainedFP8Config(dequantize=True))],
)
def test_the_whole_model_is_the_one_that_transformers_dequantises(made, way, config):
    """In the config's bfloat16, tensor by tensor, backbone included."""
    theirs = AutoModelForCausalLM.from_pretrained(
        made(way), dtype=torch.bfloat16, quantization_config=config
    )
    with open_checkpoint(str(made(way))) as checkpoint:
        assert checkpoint.dtype == torch.bfloat16
        ours = load_model(checkpoint).state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor), name


SERVED = [("mxfp4", "ram"), ("mxfp4", "disk"), ("fp8", "ram"), ("fp8", "disk"), ("fp8 cut", "disk"),
          ("gptq", "ram"), ("awq", "disk"), ("int4", "disk")]  # fmt: skip


@pytest.mark.parametrize(("way", "store"), SERVED)
def test_it_writes_the_text_of_the_plain_model(made, way, store):
    """Greedy, 64 tokens, three slots of eight; logits within the order of summation."""
    plain = plain_model(made(way))
    model, handle = melinoe.load(made(way), slots=3, store=store, dtype="float32")
    assert not hasattr(model.config, "quantization_config")
    assert not handle.store.format(0).exact
    # Slots hold packed experts: three of eight take less than one would in float32.
    one = sum(p[0].nbytes for p in plain.model.layers[0].mlp.experts.parameters())
    assert handle.expert_memory_bytes < 2 * one
    ids = torch.tensor([[3, 14, 15, 92, 65, 35]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=2e-5, atol=2e-5)
    settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}
    assert model.generate(ids, **settings).tolist() == plain.generate(ids, **settings).tolist()
    handle.detach()


def test_a_packed_checkpoint_is_described(made, tmp_path):
    """Supported, and the format by name; of a config alone, too."""
    found = describe(str(made("fp8")))
    assert found.supported and found.format == "fp8"
    shutil.copy(made("fp8") / "config.json", tmp_path)
    bare = describe(str(tmp_path))
    assert replace(bare, name=found.name, weights=True) == found
    # 3 matrices of 128 x 128: a byte a weight, and a float32 scale.
    assert found.bytes_per_expert == 3 * (128 * 128 + 4)
    assert describe(str(made("fp8").parent / "plain")).format == "plain"


def edited(packed, out, edit_config=None, edit_tensors=None):
    """A copy of a packed checkpoint with another config or other tensors."""
    out.mkdir()
    config = json.loads((packed / "config.json").read_text())
    if edit_config:
        edit_config(config["quantization_config"])
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(packed / "model.safetensors")
    if edit_tensors:
        edit_tensors(tensors)
    save_file(tensors, out / "model.safetensors")
    return str(out)


def without(ending):
    def edit(tensors):
        del tensors[next(name for name in tensors if name.endswith(ending))]

    return edit


def cut(ending):
    def edit(tensors):
        name = next(name for name in tensors if name.endswith(ending))
        tensors[name] = tensors[name][..., :1].clone()

    return edit


def scattered(tensors):
    for name in tensors:
        if name.endswith("g_idx"):
            tensors[name] = tensors[name].flip(0).contiguous()


REFUSED = {
    "another method": ("fp8", lambda q: q.update(quant_method="hqq"), None, r"quantised \(hqq\)"),
    "no method": ("fp8", lambda q: q.pop("quant_method"), None, "of an unnamed kind"),
    "other blocks": ("fp8", lambda q: q.update(weight_block_size=[64, 64]), None, "blocks of 128"),
    "act-order": ("gptq", lambda q: q.update(desc_act=True), None, "act-order"),
    "3 bits": ("gptq", lambda q: q.update(bits=3), None, "with 3 bits"),
    "gemv": ("awq", lambda q: q.update(version="gemv"), None, "as gemv"),
    "no bits": ("gptq", lambda q: q.pop("bits"), None, "not readable"),
    "marlin": ("int4", lambda q: q.update(format="marlin-24"), None, "as marlin-24"),
    "another group": ("gptq", lambda q: q.update(group_size=16), None, "has shape 2x.* needs 4x"),
    "no scale": ("fp8", None, without("2.up_proj.weight_scale_inv"), "only with scales"),
    "no scales of blocks": ("mxfp4", None, without("_proj_scales"), "without .*_scales"),
    "no zero points": ("awq", None, without("3.up_proj.qzeros"), "qzeros, which .* not hold"),
    "cut scales": ("mxfp4", None, cut("gate_up_proj_scales"), "scales has shape .*_blocks needs"),
    "cut zeros": ("gptq", None, cut("1.up_proj.qzeros"), "qzeros has shape"),
    "a plain expert": (
        "fp8", None,
        lambda t: (without("0.mlp.experts.2.up_proj.weight_scale_inv")(t), t.update({
            "model.layers.0.mlp.experts.2.up_proj.weight": torch.zeros(128, 128)})),
        "different formats",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_sentence(made, tmp_path, name):
    """Before any weight is read, and with the way out."""
    way, edit_config, edit_tensors, words = REFUSED[name]
    path = edited(made(way), tmp_path / "edited", edit_config, edit_tensors)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=words) as raised:
        open_checkpoint(path)
    assert "; " in str(raised.value) and "\n" not in str(raised.value)


def test_scattered_groups_are_refused_when_they_are_read(made, tmp_path):
    """GPTQ with an index that the config does not speak of: never decoded wrong in silence."""
    path = edited(made("gptq"), tmp_path / "edited", None, scattered)
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match="act-order"):
        block_of(checkpoint.experts[0], 0)


def test_a_changed_router_is_written_and_changed_experts_are_refused(made, tmp_path):
    """What is stored plain can be overwritten; packed experts name the two ways that remain."""
    router = "model.layers.0.mlp.gate.weight"
    with open_checkpoint(str(made("fp8"))) as checkpoint:
        model = load_model(checkpoint)
        with pytest.raises(UnsupportedModelError, match=r"packed \(fp8\).*--save adapter.*pack"):
            check_rewritable(model, checkpoint)
    model.get_parameter(router).data.add_(1)
    write_model(model, str(made("fp8")), tmp_path / "out", {}, [router])
    with open_checkpoint(str(tmp_path / "out")) as checkpoint:
        again = load_model(checkpoint).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("way", ["int4", "int4 symmetric", "int8 by output", "int8 plain codes"])
def test_compressed_tensors_decodes_the_same(made, way):
    """Where the library is installed: its own decompression of every packed matrix."""
    library = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    settings = WAYS[way]
    group = settings["config_groups"]["group_0"]
    scheme = quantization.QuantizationScheme(**group, format=settings["format"])
    compressor = library.BaseCompressor.get_value_from_registry(settings["format"])
    stored = load_file(made(way) / "model.safetensors")
    with open_checkpoint(str(made(way))) as checkpoint:
        packed = [
            p
            for p in checkpoint.tensors.values()
            if p.name not in stored or p.name + "_scale" in stored
        ]
        assert packed
        for place in packed[:12]:
            base = place.name.removesuffix("weight")
            own = {n.removeprefix(base): t for n, t in stored.items() if n.startswith(base)}
            plain = torch.empty(place.info.shape, dtype=place.info.dtype)
            place.read(plain)
            assert torch.equal(plain, compressor.decompress(own, scheme)["weight"]), place.name
