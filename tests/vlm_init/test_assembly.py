"""An assembled Qwen2.5-VL speaks as its language model, sees as its vision tower, has a seeded projector."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM

from caprl_utils.config import load_assembly, load_profile
from caprl_utils.errors import UserError
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.zoo import models
from caprl_utils.vlm_init import assembly
from caprl_utils.vlm_init.assembly import (
    FILE,
    assemble,
    full_size_config,
    parameters,
    plan_of,
    stored_shapes,
    text_differences,
    verify_tensors,
)
from caprl_utils.vlm_init.donors import read_config
from tests.vlm_init.conftest import PADDED, loaded, same_logits, tied_setting


@pytest.fixture(scope="module")
def folder(qwen_setting, tmp_path_factory):
    """An assembled model."""
    folder = tmp_path_factory.mktemp("out") / "model"
    assert assemble(qwen_setting, folder, seed=5) == read_config(folder, FILE)
    return folder


@pytest.fixture(scope="module")
def record(folder):
    return read_config(folder, FILE)


@pytest.fixture(scope="module")
def vlm(folder):
    return loaded(folder)


@pytest.mark.parametrize("name", load_profile("mini").pretraining.settings)
def test_each_pair_of_the_mini_world_is_its_donors_and_says_the_same(name, tmp_path):
    record = assemble(name, tmp_path / name)
    copied = {part: row["tensors"] for part, row in record["parts"].items() if part != "projector"}
    assert verify_tensors(tmp_path / name) == copied and all(copied.values())
    ids = torch.randint(9, 500, PADDED.shape, generator=torch.Generator().manual_seed(1))
    assert set(text_differences(tmp_path / name, ids, PADDED).values()) == {0.0}


def test_features_before_the_projector_equal_the_donors(vlm, vision_donor):
    donor = Qwen2_5_VLForConditionalGeneration.from_pretrained(vision_donor).eval()
    images = torch.randint(0, 256, (1, 3, 196, 196), dtype=torch.uint8)
    pixels = models.image_processor()(images=images, return_tensors="pt")
    with torch.no_grad():
        ours, theirs = (
            model.model.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]) for model in (vlm, donor)
        )
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert not torch.equal(ours.pooler_output, theirs.pooler_output)  # the projector is a new one


def test_the_projector_is_its_seeded_draw(folder, record, qwen_setting, vlm, tmp_path):
    merger = vlm.model.visual.merger
    assert merger.ln_q.weight.eq(1).all()
    for layer in (merger.mlp[0], merger.mlp[2]):
        assert layer.bias.eq(0).all() and layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
    other = assemble(qwen_setting, tmp_path, seed=6)
    assert other["projector_checksum"] != record["projector_checksum"]
    ours, theirs = (load_file(f / "model.safetensors") for f in (folder, tmp_path))
    differing = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert differing == {"visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight"}


@pytest.mark.parametrize("tied", [True, False])
def test_heads_tied_or_not_are_as_the_language_models(tied, folder, vlm, language_donor, vision_donor, tmp_path):
    donor = language_donor
    if tied:
        donor, folder = tmp_path / "language", tmp_path / "out"
        assemble(tied_setting(vision_donor, tmp_path), folder)
        vlm = loaded(folder)
    assert read_config(folder)["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    assert (vlm.lm_head.weight is vlm.model.language_model.embed_tokens.weight) is tied
    parts = read_config(folder, FILE)["parts"].values()
    assert sum(part["parameters"] for part in parts) == vlm.num_parameters()
    same_logits(vlm, Qwen2ForCausalLM.from_pretrained(donor).eval())


def test_the_record_counts_what_the_model_has_and_a_tensor_that_changed_is_named(folder, record, vlm, tmp_path):
    tower = vlm.model.visual.num_parameters()
    merger = sum(parameter.numel() for parameter in vlm.model.visual.merger.parameters())
    assert {name: part["parameters"] for name, part in record["parts"].items()} == {
        "vision_tower": tower - merger, "projector": merger, "language_model": vlm.num_parameters() - tower,
    }  # fmt: skip
    out = shutil.copytree(folder, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight in .* differs from its donor"):
        verify_tensors(out)


def test_what_training_and_serving_read_is_there(folder, record, vlm, qwen_setting):
    processor, shared = AutoProcessor.from_pretrained(folder), shared_tokenizer()
    text = "This is a chart. The value of Rome is 40. What is the topic?"
    assert processor.tokenizer(text).input_ids == shared(text).input_ids
    assert processor.tokenizer.convert_tokens_to_ids("<|image_pad|>") == vlm.config.image_token_id
    limited = plan_of(qwen_setting.model_copy(update={"max_pixels": 280 * 280}))
    for images, most in ((processor.image_processor, 196 * 196), (limited.processor.image_processor, 280 * 280)):
        assert dict(images.size) == {"shortest_edge": 196 * 196, "longest_edge": most}
    assert (record["max_image_tokens"], limited.max_image_tokens) == (49, 100)
    ends = [shared.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    generation = vlm.generation_config
    assert generation.eos_token_id == ends == record["end_token_ids"] and not generation.do_sample
    assert generation.pad_token_id == shared.pad_token_id


def test_saved_again_and_in_several_shards_it_is_the_same(folder, record, vlm, qwen_setting, monkeypatch, tmp_path):
    whole = load_file(folder / "model.safetensors")
    vlm.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)
    monkeypatch.setattr(assembly, "MAX_SHARD", "1MB")
    assert assemble(qwen_setting, tmp_path / "cut", seed=5) == record
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "cut").glob("model-*.safetensors"))
    assert len(files) > 4 and {f.name for f in files} == set(index["weight_map"].values())
    together = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert together.keys() == whole.keys() and all(torch.equal(together[n], whole[n]) for n in whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())


def test_done_is_done_and_something_else_is_not_overwritten(folder, record, qwen_setting):
    before = (folder / "model.safetensors").stat()
    assert assemble(qwen_setting, folder, seed=5) == record
    assert (folder / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(UserError, match="not empty and holds something else"):
        assemble(qwen_setting, folder, seed=6)


def started(setting, out, before=""):
    """Another process that assembles into `out`. before: what it does first."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from caprl_utils.schema import Assembly\n"
        f"from caprl_utils.vlm_init import assembly\n{before}\n"
        "assembly.assemble(Assembly.model_validate_json(sys.argv[1]), Path(sys.argv[2]), seed=5)\n"
    )
    command = [sys.executable, "-c", script, setting.model_dump_json(exclude_unset=True), str(out)]
    return subprocess.Popen(command)


@pytest.mark.integration
def test_killed_while_writing_it_starts_again(record, qwen_setting, tmp_path):
    out, kill = tmp_path / "out", "assembly.write_json = lambda *a: os.kill(os.getpid(), signal.SIGKILL)"
    assert started(qwen_setting, out, kill).wait(timeout=280) == -signal.SIGKILL
    assert not out.exists() and (tmp_path / ".out.partial").is_dir()
    assert assemble(qwen_setting, out, seed=5) == record and not (tmp_path / ".out.partial").exists()


@pytest.mark.integration
def test_two_processes_that_assemble_the_same_make_one_model(record, qwen_setting, tmp_path):
    """The first writes, the second waits for it and finds it done; neither deletes what the other writes."""
    both = [started(qwen_setting, tmp_path / "out") for _ in range(2)]
    assert [process.wait(timeout=280) for process in both] == [0, 0]
    assert read_config(tmp_path / "out", FILE) == record and verify_tensors(tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


# The settings of the paper at full size, on the meta device

# Parameters of the released models, as the hub counts them in their safetensors (CLIP: of its image half).
KNOWN = {"qwen2.5-3b": (3_085_938_688, 3_754_622_976), "qwen2.5-7b": (7_615_616_512, 8_292_166_656)}
LLAVA = {"language_model": 7_737_708_544, "vision_tower": 303_507_456,
         "projector": 1024 * 4096 + 4096 + 4096 * 4096 + 4096}  # fmt: skip


@pytest.fixture(scope="module")
def full_size():
    """Configs of the paper's pairs."""
    return {name: full_size_config(load_assembly(name)) for name in (*KNOWN, "internlm2.5-7b-clip")}


@pytest.mark.parametrize("name", [*KNOWN, "internlm2.5-7b-clip"])
def test_parts_of_the_papers_settings_add_up_to_the_known_models(name, full_size):
    parts = parameters(stored_shapes(full_size[name]))
    assert parts == LLAVA or (parts["language_model"], sum(parts.values())) == KNOWN[name]


def test_full_size_configs_have_what_the_donors_have(full_size):
    small, large, llava = full_size.values()
    assert small.tie_word_embeddings is True and large.tie_word_embeddings is False
    rope = small.text_config.rope_parameters
    assert rope["rope_theta"] == 1e6 and rope["mrope_section"] == [16, 24, 24]
    assert (small.vision_config.out_hidden_size, large.vision_config.out_hidden_size) == (2048, 3584)
    assert small.vision_config.tokens_per_second == 2  # the class's own default is another
    text = llava.text_config
    assert text.rope_parameters == {"rope_type": "default", "rope_theta": 1_000_000}
    assert (text.attention_bias, text.max_position_embeddings, text.rms_norm_eps) == (False, 32768, 1e-5)
