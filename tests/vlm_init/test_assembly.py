"""An assembled Qwen2.5-VL speaks as its language model, sees as its vision tower, has a seeded projector."""

import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from caprl_utils.config import load_assembly, names_of
from caprl_utils.errors import UserError
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.zoo import models
from caprl_utils.schema import Assembly
from caprl_utils.vlm_init import assembly
from caprl_utils.vlm_init.assembly import Summary, assemble, verify_tensors
from tests.vlm_init.conftest import same_logits, setting_with_head


@pytest.fixture(scope="module")
def assembled(qwen_setting, tmp_path_factory):
    return assemble(qwen_setting, tmp_path_factory.mktemp("out") / "model", seed=5)


@pytest.fixture(scope="module")
def vlm(assembled):
    from transformers import Qwen2_5_VLForConditionalGeneration

    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        assembled.folder, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_features_before_the_projector_equal_the_donors(vlm, vision_donor):
    from transformers import Qwen2_5_VLForConditionalGeneration

    donor = Qwen2_5_VLForConditionalGeneration.from_pretrained(vision_donor).eval()
    images = torch.randint(0, 256, (2, 3, 140, 140), dtype=torch.uint8)
    pixels = models.image_processor()(images=images, return_tensors="pt")
    with torch.no_grad():
        ours = vlm.model.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"])
        theirs = donor.model.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"])
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert not torch.equal(ours.pooler_output, theirs.pooler_output)  # the projector is a new one


def test_the_projector_is_its_seeded_draw(assembled, qwen_setting, vlm, tmp_path):
    merger = vlm.model.visual.merger
    assert merger.ln_q.weight.eq(1).all()
    for layer in (merger.mlp[0], merger.mlp[2]):
        assert layer.bias.eq(0).all() and layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
    again = assemble(qwen_setting, tmp_path / "again", seed=5)
    other = assemble(qwen_setting, tmp_path / "other", seed=6)
    assert again.projector_checksum == assembled.projector_checksum != other.projector_checksum
    ours, theirs = (load_file(s.folder / "model.safetensors") for s in (assembled, other))
    differing = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert differing == {"visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight"}


@pytest.mark.parametrize("tied", [True, False])
def test_heads_tied_or_not_are_as_the_language_models(tied, vision_donor, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM

    setting = setting_with_head(tied, vision_donor, tmp_path)
    summary = assemble(setting, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        summary.tied_head is tied is config["tie_word_embeddings"]
        and ("lm_head.weight" in stored) is not tied
    )
    vlm = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert (vlm.lm_head.weight is vlm.model.language_model.embed_tokens.weight) is tied
    assert sum(part["parameters"] for part in summary.parts.values()) == sum(
        p.numel() for p in vlm.parameters()
    )
    language = Qwen2ForCausalLM.from_pretrained(tmp_path / "language").eval()
    same_logits(vlm, language, len(shared_tokenizer()))


def test_the_summary_counts_what_the_model_has(assembled, vlm):
    merger = sum(p.numel() for p in vlm.model.visual.merger.parameters())
    tower = sum(p.numel() for p in vlm.model.visual.parameters()) - merger
    assert {name: part["parameters"] for name, part in assembled.parts.items()} == {
        "language_model": sum(p.numel() for p in vlm.parameters()) - tower - merger,
        "vision_tower": tower,
        "projector": merger,
    }
    assert any("rms_norm_eps" in note for note in assembled.notes)
    assert Summary.load(assembled.folder) == assembled
    compared = verify_tensors(assembled)
    assert compared == {n: p["tensors"] for n, p in assembled.parts.items() if n != "projector"}


def test_a_tensor_that_changed_is_named(assembled, qwen_setting, tmp_path):
    summary = assemble(qwen_setting, tmp_path / "out", seed=5)
    tensors = load_file(summary.folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, summary.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight in .* differs from its donor"):
        verify_tensors(summary)


def test_what_training_and_serving_read_is_there(assembled, vlm):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(assembled.folder)
    text = "The value of Rome is 42. What is the topic?"
    assert processor.tokenizer(text).input_ids == shared_tokenizer()(text).input_ids
    assert processor.tokenizer.convert_tokens_to_ids("<|image_pad|>") == vlm.config.image_token_id
    assert dict(processor.image_processor.size) == {"shortest_edge": 140 * 140, "longest_edge": 140 * 140}
    assert assembled.max_image_tokens == 25
    ends = [shared_tokenizer().convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    assert vlm.generation_config.eos_token_id == ends == assembled.end_token_ids
    assert vlm.generation_config.pad_token_id == shared_tokenizer().pad_token_id
    assert vlm.config.text_config.rms_norm_eps == 1e-6  # the language model's, not the vision donor's
    assert not vlm.generation_config.do_sample


def test_image_size_limits_are_written_into_the_model(qwen_setting, tmp_path):
    summary = assemble(qwen_setting.model_copy(update={"min_pixels": 56 * 56}), tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "processor_config.json").read_text())["image_processor"]["size"]
    assert stored == {"shortest_edge": 56 * 56, "longest_edge": 140 * 140}
    assert summary.max_image_tokens == 25
    with pytest.raises(UserError, match="min_pixels 99999999 is above max_pixels 19600"):
        assemble(qwen_setting.model_copy(update={"min_pixels": 99999999}), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_saved_again_it_is_the_same(assembled, vlm, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    vlm.save_pretrained(tmp_path)
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    same_logits(vlm, again, len(shared_tokenizer()))
    assert (
        load_file(tmp_path / "model.safetensors").keys()
        == load_file(assembled.folder / "model.safetensors").keys()
    )


def test_several_shards_hold_the_same(assembled, qwen_setting, monkeypatch, tmp_path):
    monkeypatch.setattr(assembly, "MAX_SHARD", "1MB")
    cut = assemble(qwen_setting, tmp_path / "cut", seed=5)
    index = json.loads((cut.folder / "model.safetensors.index.json").read_text())
    files = sorted(cut.folder.glob("model-*.safetensors"))
    assert len(files) > 4 and {f.name for f in files} == set(index["weight_map"].values())
    together = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(assembled.folder / "model.safetensors")
    assert together.keys() == whole.keys() and all(torch.equal(together[n], whole[n]) for n in whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())


def test_done_is_done_and_something_else_is_not_overwritten(assembled, qwen_setting):
    before = (assembled.folder / "model.safetensors").stat()
    assert assemble(qwen_setting, assembled.folder, seed=5) == assembled
    assert (assembled.folder / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(UserError, match="not empty and holds something else"):
        assemble(qwen_setting, assembled.folder, seed=6)


@pytest.mark.integration
def test_killed_while_writing_it_starts_again(assembled, qwen_setting, tmp_path):
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from caprl_utils.schema import Assembly, Assembly\n"
        "from caprl_utils.vlm_init import assembly\n"
        "assembly._checksum = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "assembly.assemble(Assembly.model_validate_json(sys.argv[1]), Path(sys.argv[2]), seed=5)\n"
    )
    command = [
        sys.executable,
        "-c",
        script,
        qwen_setting.model_dump_json(exclude_unset=True),
        str(tmp_path / "out"),
    ]
    assert subprocess.run(command, timeout=280, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").is_dir()
    again = assemble(qwen_setting, tmp_path / "out", seed=5)
    assert (
        again.projector_checksum == assembled.projector_checksum and not (tmp_path / ".out.partial").exists()
    )


@pytest.mark.integration
def test_two_processes_that_assemble_the_same_make_one_model(assembled, qwen_setting, tmp_path):
    """The first writes, the second waits for it and finds it done; neither deletes what the other writes."""
    out = tmp_path / "out"
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from caprl_utils.schema import Assembly, Assembly\n"
        "from caprl_utils.vlm_init.assembly import assemble\n"
        "setting = Assembly.model_validate_json(sys.argv[1])\n"
        "print(assemble(setting, Path(sys.argv[2]), 5).projector_checksum)\n"
    )
    command = [sys.executable, "-c", script, qwen_setting.model_dump_json(exclude_unset=True), str(out)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=280)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert all(assembled.projector_checksum in text for text in told)
    assert verify_tensors(Summary.load(out)) and not (tmp_path / ".out.partial").exists()


def test_an_assembly_waits_for_another_one(qwen_setting, tmp_path):
    """The lock is held while the weights are written, and free afterwards."""
    lock, held = tmp_path / ".out.lock", []

    def taken(*_):
        with open(lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(int(lock.read_text()))
        raise UserError("enough")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="enough"):
        patch.setattr("caprl_utils.vlm_init.assembly._save", taken)
        assemble(qwen_setting, tmp_path / "out")
    assert held == [os.getpid()] and not (tmp_path / "out").exists()
    assemble(qwen_setting, tmp_path / "out")
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("name", names_of(Assembly))
def test_every_setting_is_valid(name):
    setting = load_assembly(name)
    assert setting.name == name and setting.description
