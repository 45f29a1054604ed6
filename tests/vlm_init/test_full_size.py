"""The settings of the paper at full size: parameters on the meta device, memory of the streaming path."""

import subprocess
import sys

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

from caprl_utils.config import load_assembly
from caprl_utils.errors import UserError
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.zoo import models
from caprl_utils.vlm_init import qwen
from caprl_utils.vlm_init.assembly import full_size_config, parameters, stored_shapes, verify_tensors
from tests.vlm_init.conftest import ROPE, at

MOST_MEMORY = (
    0.5  # of the model on disk, beside mapped files; seen 0.25: a shard of a quarter, and the libraries
)
# Parameters of the released models, as the hub counts them in their safetensors (CLIP: of its image half).
KNOWN = {"qwen2.5-3b": (3_085_938_688, 3_754_622_976), "qwen2.5-7b": (7_615_616_512, 8_292_166_656)}
LLAVA = {"language_model": 7_737_708_544, "vision_tower": 303_507_456,
         "projector": 1024 * 4096 + 4096 + 4096 * 4096 + 4096}  # fmt: skip


@pytest.mark.parametrize("name", [*KNOWN, "internlm2.5-7b-clip"])
def test_parts_of_the_papers_settings_add_up_to_the_known_models(name):
    parts = parameters(stored_shapes(full_size_config(load_assembly(name))))
    assert parts == LLAVA or (parts["language_model"], sum(parts.values())) == KNOWN[name]


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
import re, sys, threading, time
from pathlib import Path
from caprl_utils.schema import Assembly
from caprl_utils.vlm_init import assembly
assembly.MAX_SHARD = "500MB"
peak = 0
def watch():  # pages of mapped files do not count: the system drops them when it needs room
    global peak
    while True:
        kb = re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
        peak = max(peak, int(kb) * 1024)
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
out = Path(sys.argv[2])
assembly.assemble(Assembly.model_validate_json(Path(sys.argv[1]).read_text()), out)
on_disk = sum(file.stat().st_size for file in out.glob("*.safetensors"))
print(peak, on_disk)
"""


@pytest.mark.integration
@pytest.mark.timeout(1800)
def test_peak_memory_of_two_gigabytes_in_shards(tmp_path):
    """The donors' files are mapped (pages that the system may drop); beside them one shard of the new model."""
    shape = models.text_config() | {
        "hidden_size": 1536, "intermediate_size": 6912, "num_hidden_layers": 24, "num_attention_heads": 12,
        "num_key_value_heads": 12, "vocab_size": 8192, "tie_word_embeddings": True,
        "rope_parameters": ROPE,
    }  # fmt: skip
    small = models.build_vlm(0).config
    eps = small.text_config.rms_norm_eps
    language = Qwen2Config(**shape, rms_norm_eps=eps, dtype="bfloat16")
    rope = ROPE | {"mrope_section": [16, 24, 24]}
    ids = {key: getattr(small, key) for key in qwen.IMAGE_TOKENS}
    frame = Qwen2_5_VLConfig(
        text_config=shape | {"rms_norm_eps": eps, "rope_parameters": rope}, **ids, tie_word_embeddings=True,
        vision_config=small.vision_config.to_dict() | {"out_hidden_size": 1536},
    )  # fmt: skip
    language_donor, vision_donor = tmp_path / "language", tmp_path / "vision"
    save_random(Qwen2ForCausalLM, language, language_donor, "")
    shared_tokenizer().save_pretrained(language_donor)
    save_random(Qwen2_5_VLForConditionalGeneration, frame, vision_donor, "model.visual.")
    models.build_processor().save_pretrained(vision_donor)
    setting = load_assembly("qwen2.5-3b", {"language": at(language_donor), "vision": at(vision_donor)})
    (tmp_path / "setting.json").write_text(setting.model_dump_json(exclude_unset=True))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "setting.json"), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    peak, on_disk = map(int, run.stdout.split()[-2:])
    print(f"peak {peak / 1e9:.2f} GB, model {on_disk / 1e9:.2f} GB, ratio {peak / on_disk:.2f}")
    assert on_disk > 2e9 and peak <= MOST_MEMORY * on_disk
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 5
    assert verify_tensors(tmp_path / "out")["language_model"] == 24 * 12 + 2


def save_random(kind, config, folder, prefix):
    """A model of this class with random weights in bfloat16; only those with the prefix."""
    with torch.device("meta"):
        model = kind(config)
    names = [(name, tensor.shape) for name, tensor in model.named_parameters() if name.startswith(prefix)]
    state = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in names}
    model.save_pretrained(folder, state_dict=state, max_shard_size="300MB")
