"""What can be wrong with donors is named before anything is written."""

import json
import shutil
import struct

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from caprl_utils.config import load_assembly
from caprl_utils.errors import UserError
from caprl_utils.mini.zoo import models
from caprl_utils.vlm_init.assembly import assemble, plan_of
from tests.vlm_init.conftest import ROPE, at, save_language


@pytest.fixture
def language(language_donor, tmp_path):
    """A language donor to spoil."""
    return shutil.copytree(language_donor, tmp_path / "language")


@pytest.fixture
def refused(tmp_path):
    """Asserts that a setting with some changes is refused in these words, and nothing written."""

    def check(setting, words: str, **changes) -> None:
        with pytest.raises(UserError, match=words):
            assemble(setting.model_copy(update=changes), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    return check


def change_config(folder, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_donors_of_different_sizes(qwen_setting, refused, tmp_path):
    shape = models.text_config() | {"num_hidden_layers": 2, "hidden_size": 64}
    save_language(Qwen2ForCausalLM(Qwen2Config(**shape, rope_parameters=ROPE)), tmp_path / "language")
    words = r"fit together: hidden_size 64 and 128; num_hidden_layers 2 and 5; head_dim 16 and 32\. Take the"
    refused(qwen_setting, words, language=at(tmp_path / "language"))


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("rms_norm_eps", 1e-4, "rms_norm_eps 0.0001 and"),
        ("hidden_act", "gelu", "hidden_act 'gelu' and"),
        ("tie_word_embeddings", True, "tie_word_embeddings True and"),
        ("rope_parameters", ROPE | {"rope_theta": 1e6}, "rope_theta 1000000.0 and 10000.0"),
    ],
)
def test_every_hyperparameter_that_must_agree_is_compared(key, value, words, qwen_setting, language, refused):
    change_config(language, **{key: value})
    refused(qwen_setting, f"do not fit together: .*{words}", language=at(language))


def test_a_donor_of_another_kind(qwen_setting, llava_setting, language, clip_donor, refused):
    words = "'clip_vision_model' model; this setting needs 'qwen2_5_vl'"
    refused(qwen_setting, words, vision=at(clip_donor))
    refused(llava_setting, "'qwen2' model, not CLIP", vision=at(language))
    words = "'clip_vision_model' model; a LLaVA takes internlm2"
    refused(llava_setting, words, language=at(clip_donor))


def test_tokenizers_with_other_ids(qwen_setting, language, refused):
    text = (language / "tokenizer.json").read_text()
    swapped = text.replace("<|vision_start|>", "?1").replace("<|vision_end|>", "<|vision_start|>")
    (language / "tokenizer.json").write_text(swapped.replace("?1", "<|vision_end|>"))
    refused(qwen_setting, "2 tokens have other ids", language=at(language))
    (language / "tokenizer.json").write_text(text.replace("<|vision_start|>", "<|other|>"))
    refused(qwen_setting, r"or none in the first: '<\|vision_start\|>' \(None and", language=at(language))


def test_a_shard_that_did_not_arrive(qwen_setting, language, refused, tmp_path):
    Qwen2ForCausalLM.from_pretrained(language).save_pretrained(language, max_shard_size="1MB")
    (language / "model.safetensors").unlink()
    shards = sorted(language.glob("model-*.safetensors"))
    shards[1].rename(tmp_path / "kept")
    words = rf"missing shard .*{shards[1].name}, .* fetch the model again"
    refused(qwen_setting, words, language=at(language))
    shutil.copy(shards[0], shards[1])
    refused(qwen_setting, "has no tensor for", language=at(language))
    (language / "model.safetensors.index.json").unlink()
    refused(qwen_setting, "has no safetensors. An interrupted download", language=at(language))


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.9999])
def test_a_file_that_was_cut(share, qwen_setting, language, refused):
    file = language / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    words = "model.safetensors .* is cut, damaged .* fetch the model again"
    refused(qwen_setting, words, language=at(language))


def test_a_pointer_instead_of_weights_and_pickled_weights(qwen_setting, language, refused):
    file = language / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    refused(qwen_setting, "git-lfs pointer", language=at(language))
    file.rename(language / "pytorch_model.bin")
    refused(qwen_setting, "has no safetensors.* save them once with", language=at(language))


def test_weights_that_are_not_of_this_config(qwen_setting, language, refused):
    content = (language / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + size].replace(b"model.norm.weight", b"model.nora.weight")
    (language / "model.safetensors").write_bytes(content[:8] + header + content[8 + size :])
    refused(qwen_setting, "no tensor for model.norm.weight", language=at(language))


def test_a_wrong_number_of_heads_in_the_fused_projection(llava_setting, internlm_donor, refused, tmp_path):
    donor = shutil.copytree(internlm_donor, tmp_path / "donor")
    change_config(donor, num_key_value_heads=4)
    words = "a fused wqkv has 256 rows, 4 heads and 4 key-value heads of 32 make 384"
    refused(llava_setting, words, language=at(donor))


def test_tokens_that_are_not_there(llava_setting, refused):
    unused = {"[UNUSED]": "<image>"}
    refused(llava_setting, r"neither '\[UNUSED\]' nor '<image>'", rename_tokens=unused)
    refused(llava_setting, "'<image>' is not in the tokenizer", rename_tokens={})
    refused(llava_setting, "has none of <eot>", end_tokens=["<eot>"])


def test_an_image_processor_of_another_size(llava_setting, clip_donor, refused, tmp_path):
    donor = shutil.copytree(clip_donor, tmp_path / "donor")
    file = donor / "preprocessor_config.json"
    file.write_text(file.read_text().replace("196", "224"))
    refused(llava_setting, "makes 224 pixels, the tower expects 196", vision=at(donor))


def test_a_donor_that_cannot_be_had():
    with pytest.raises(UserError, match=r"'Qwen/Qwen2\.5-3B' is no folder here and could not be fetched"):
        plan_of(load_assembly("qwen2.5-3b"))
