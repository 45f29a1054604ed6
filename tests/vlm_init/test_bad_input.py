"""What can be wrong with donors is named before anything is written."""

import json
import shutil

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from caprl_utils.config import load_assembly
from caprl_utils.errors import UserError
from caprl_utils.mini.zoo import models
from caprl_utils.vlm_init.assembly import assemble, plan_of
from tests.vlm_init.conftest import ROPE, at, save_language

WEIGHTS, TOKENIZER, CONFIG = "model.safetensors", "tokenizer.json", "config.json"
CUT = r"model.safetensors .* is cut, damaged .* fetch the model again"


@pytest.fixture
def refused(tmp_path):
    """Asserts that a setting with some changes is refused in these words, and nothing written."""

    def check(setting, words: str, **changes) -> None:
        with pytest.raises(UserError, match=words):
            assemble(setting.model_copy(update=changes), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    return check


def first(share):
    return lambda data: data[: int(len(data) * share)]


def changed(**values):
    return lambda data: json.dumps(json.loads(data) | values).encode()


def swapped(data):
    start, end, other = b"<|vision_start|>", b"<|vision_end|>", b"?1"
    return data.replace(start, other).replace(end, start).replace(other, end)


@pytest.mark.parametrize(
    "file, change, words",
    [
        (WEIGHTS, first(0.0), CUT), (WEIGHTS, first(0.0001), CUT), (WEIGHTS, first(0.5), CUT),
        (WEIGHTS, first(0.9999), CUT),
        (WEIGHTS, lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git-lfs pointer"),
        (WEIGHTS, lambda data: data.replace(b"model.norm.weight", b"model.nora.weight", 1),
         "no tensor for model.norm.weight"),
        (TOKENIZER, swapped, "2 tokens have other ids"),
        (TOKENIZER, lambda data: data.replace(b"<|vision_start|>", b"<|other|>"),
         r"or none in the first: '<\|vision_start\|>' \(None and"),
        (CONFIG, changed(rms_norm_eps=1e-4), "do not fit together: .*rms_norm_eps 0.0001 and"),
        (CONFIG, changed(hidden_act="gelu"), "hidden_act 'gelu' and"),
        (CONFIG, changed(tie_word_embeddings=True), "tie_word_embeddings True and"),
        (CONFIG, changed(rope_parameters=ROPE | {"rope_theta": 1e6}), "rope_theta 1000000.0 and 10000.0"),
    ],
)  # fmt: skip
def test_what_is_damaged_or_does_not_agree(file, change, words, qwen_setting, language_donor, refused, tmp_path):
    donor = shutil.copytree(language_donor, tmp_path / "language")
    (donor / file).write_bytes(change((donor / file).read_bytes()))
    refused(qwen_setting, words, language=at(donor))


def test_donors_of_different_sizes(qwen_setting, refused, tmp_path):
    shape = models.text_config() | {"num_hidden_layers": 2, "hidden_size": 64}
    save_language(Qwen2ForCausalLM(Qwen2Config(**shape, rope_parameters=ROPE)), tmp_path / "language")
    words = r"fit together: hidden_size 64 and 128; num_hidden_layers 2 and 5; head_dim 16 and 32\. Take the"
    refused(qwen_setting, words, language=at(tmp_path / "language"))


def test_a_donor_of_another_kind_or_without_what_is_asked_for(
    qwen_setting, llava_setting, language_donor, clip_donor, refused
):
    clip, words = at(clip_donor), "'clip_vision_model' model; this setting needs 'qwen2_5_vl'"
    refused(qwen_setting, words, vision=clip)
    refused(llava_setting, "'qwen2' model, not CLIP", vision=at(language_donor))
    refused(llava_setting, "'clip_vision_model' model; a LLaVA takes internlm2", language=clip)
    refused(llava_setting, r"neither '\[UNUSED\]' nor '<image>'", rename_tokens={"[UNUSED]": "<image>"})
    refused(llava_setting, "'<image>' is not in the tokenizer", rename_tokens={})
    refused(llava_setting, "has none of <eot>", end_tokens=["<eot>"])
    with pytest.raises(UserError, match=r"'Qwen/Qwen2\.5-3B' is no folder here and could not be fetched"):
        plan_of(load_assembly("qwen2.5-3b"))


def test_a_shard_that_did_not_arrive_and_pickled_weights(qwen_setting, language_donor, refused, tmp_path):
    language = shutil.copytree(language_donor, tmp_path / "language")
    Qwen2ForCausalLM.from_pretrained(language).save_pretrained(language, max_shard_size="1MB")
    (language / WEIGHTS).unlink()
    shards = sorted(language.glob("model-*.safetensors"))
    shards[1].unlink()
    words = rf"missing shard .*{shards[1].name}, .* fetch the model again"
    refused(qwen_setting, words, language=at(language))
    shutil.copy(shards[0], shards[1])
    refused(qwen_setting, "has no tensor for", language=at(language))
    (language / "model.safetensors.index.json").rename(language / "pytorch_model.bin")
    words = "has no safetensors. An interrupted download .* save them once with"
    refused(qwen_setting, words, language=at(language))


def test_a_wrong_number_of_heads_in_the_fused_projection_and_an_image_processor_of_another_size(
    llava_setting, internlm_donor, clip_donor, refused, tmp_path
):
    donors = internlm_donor, clip_donor
    internlm, clip = (shutil.copytree(donor, tmp_path / f"{number}") for number, donor in enumerate(donors))
    (internlm / CONFIG).write_bytes(changed(num_key_value_heads=4)((internlm / CONFIG).read_bytes()))
    words = "a fused wqkv has 256 rows, 4 heads and 4 key-value heads of 32 make 384"
    refused(llava_setting, words, language=at(internlm))
    file = clip / "preprocessor_config.json"
    file.write_text(file.read_text().replace("196", "224"))
    refused(llava_setting, "makes 224 pixels, the tower expects 196", vision=at(clip))
