"""The settings of the paper at full size: parameters on the meta device, memory of the streaming path."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from caprl_utils.config import load_assembly
from caprl_utils.errors import UserError
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.zoo import models
from caprl_utils.vlm_init.assembly import full_size_config, parameters, stored_shapes
from tests.vlm_init.conftest import at

MOST_MEMORY = 1.3  # of the model on disk
LLAVA_PROJECTOR = 1024 * 4096 + 4096 + 4096 * 4096 + 4096


# Parameters of the released models, as the hub counts them in their safetensors (CLIP: of its image half).
KNOWN = {"qwen2.5-3b": (3_085_938_688, 3_754_622_976), "qwen2.5-7b": (7_615_616_512, 8_292_166_656)}
INTERNLM, CLIP = 7_737_708_544, 303_507_456


@pytest.mark.parametrize("name", KNOWN)
def test_parts_of_the_papers_qwen_settings_add_up_to_the_known_models(name):
    parts = parameters(stored_shapes(full_size_config(load_assembly(name))))
    assert (parts["language_model"], sum(parts.values())) == KNOWN[name]


def test_parts_of_the_papers_llava_setting_are_the_known_models():
    parts = parameters(stored_shapes(full_size_config(load_assembly("internlm2.5-7b-clip"))))
    assert parts == {"language_model": INTERNLM, "vision_tower": CLIP, "projector": LLAVA_PROJECTOR}


def test_donors_that_do_not_fit_are_refused_at_full_size():
    small, large = load_assembly("qwen2.5-3b"), load_assembly("qwen2.5-7b")
    with pytest.raises(UserError, match="do not fit together: hidden_size 2048 and 3584"):
        full_size_config(small.model_copy(update={"vision": large.vision}))


def test_full_size_configs_have_what_the_donors_have():
    small, large = (full_size_config(load_assembly(f"qwen2.5-{size}")) for size in ("3b", "7b"))
    assert small.tie_word_embeddings is True and large.tie_word_embeddings is False
    rope = small.text_config.rope_parameters
    assert rope["rope_theta"] == 1e6 and rope["mrope_section"] == [16, 24, 24]
    assert (small.vision_config.out_hidden_size, large.vision_config.out_hidden_size) == (2048, 3584)
    assert small.vision_config.tokens_per_second == 2  # the class's own default is another
    text = full_size_config(load_assembly("internlm2.5-7b-clip")).text_config
    assert text.rope_parameters == {"rope_type": "default", "rope_theta": 1_000_000}
    assert (text.attention_bias, text.max_position_embeddings, text.rms_norm_eps) == (False, 32768, 1e-5)


MEASURE = """
import resource, sys
from pathlib import Path
from caprl_utils.schema import Assembly
from caprl_utils.vlm_init import assembly
assembly.MAX_SHARD = "500MB"
out = Path(sys.argv[2])
assembly.assemble(Assembly.model_validate_json(Path(sys.argv[1]).read_text()), out)
on_disk = sum(file.stat().st_size for file in out.glob("*.safetensors"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, on_disk)
"""


@pytest.mark.integration
@pytest.mark.timeout(1800)
def test_peak_memory_of_two_gigabytes_in_shards(tmp_path):
    donor = large_language_donor(tmp_path / "language", layers=24)
    vision = vision_donor_for(donor, tmp_path / "vision")
    setting = load_assembly("qwen2.5-3b", {"language": at(donor), "vision": at(vision)})
    (tmp_path / "setting.json").write_text(setting.model_dump_json(exclude_unset=True))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "setting.json"), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    peak, on_disk = map(int, run.stdout.split()[-2:])
    print(f"peak {peak / 1e9:.2f} GB, model {on_disk / 1e9:.2f} GB, ratio {peak / on_disk:.2f}")
    assert on_disk > 2e9 and peak <= MOST_MEMORY * on_disk
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) >= 5
    sources = json.loads((donor / "model.safetensors.index.json").read_text())["weight_map"]
    for name in (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.23.self_attn.q_proj.bias",
        "model.norm.weight",
    ):
        with (
            safe_open(donor / sources[name], "pt") as old,
            safe_open(tmp_path / "out" / weight_map[name], "pt") as new,
        ):
            assert torch.equal(old.get_tensor(name), new.get_tensor(name))


def large_language_donor(folder, layers: int):
    """A Qwen2 of about a billion parameters in bfloat16, written shard by shard."""
    from transformers import Qwen2Config

    folder.mkdir()
    shape = models.text_config() | {
        "hidden_size": 1536, "intermediate_size": 6912, "num_hidden_layers": layers, "num_attention_heads": 12,
        "num_key_value_heads": 12, "vocab_size": 8192, "tie_word_embeddings": True,
    }  # fmt: skip
    config = Qwen2Config(
        **shape, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, dtype="bfloat16"
    )
    config.save_pretrained(folder)
    shared_tokenizer().save_pretrained(folder)
    width, inner = 1536, 6912
    shapes = {f"self_attn.{x}_proj.weight": (width, width) for x in "qkvo"}
    shapes |= {f"self_attn.{x}_proj.bias": (width,) for x in "qkv"}
    shapes |= {"mlp.gate_proj.weight": (inner, width), "mlp.up_proj.weight": (inner, width)}
    shapes |= {"mlp.down_proj.weight": (width, inner)}
    shapes |= {f"{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    shards = [{"model.embed_tokens.weight": (8192, width), "model.norm.weight": (width,)}]
    for first in range(0, layers, 4):
        stems = [f"model.layers.{layer}." for layer in range(first, first + 4)]
        shards.append({stem + name: shape for stem in stems for name, shape in shapes.items()})
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: torch.randn(s, dtype=torch.bfloat16) for n, s in names.items()}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def vision_donor_for(language, folder):
    """A Qwen2.5-VL whose language model has the donor's size and is not there: it is not needed."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config

    text = Qwen2Config.from_pretrained(language)
    config = models.build_vlm(0).config
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "vocab_size", "rms_norm_eps")  # fmt: skip
    for key in keys:
        setattr(config.text_config, key, getattr(text, key))
    config.text_config.layer_types = None
    config.text_config.rope_parameters["mrope_section"] = [16, 24, 24]
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    config.vision_config.out_hidden_size = text.hidden_size
    config = Qwen2_5_VLConfig.from_dict(config.to_dict())
    models.build_processor().save_pretrained(folder)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    tower = {
        n.removeprefix("model."): p for n, p in model.named_parameters() if n.startswith("model.visual.")
    }
    tensors = {n: torch.randn(p.shape, dtype=torch.bfloat16) for n, p in tower.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder
