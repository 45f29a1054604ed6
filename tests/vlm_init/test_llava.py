"""InternLM2 weights under Llama names, and the LLaVA model made of them and a CLIP tower."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_donors import at, same_logits

from caprl_utils.errors import UserError
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.vlm_init import assemble, internlm, load_setting


@pytest.fixture(scope="module")
def assembled(llava_setting, tmp_path_factory):
    return assemble(llava_setting, tmp_path_factory.mktemp("out") / "model", seed=5)


@pytest.fixture(scope="module")
def vlm(assembled):
    from transformers import LlavaForConditionalGeneration

    model, report = LlavaForConditionalGeneration.from_pretrained(assembled.folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_the_fused_projection_is_read_as_internlm2_reads_it(internlm_donor):
    """The rearrangement of modeling_internlm2.py, written out: 'b q (h gs d) -> b q h gs d', then the last two."""
    raw = json.loads((internlm_donor / "config.json").read_text())
    config = internlm.llama_config(raw)
    wqkv = load_file(internlm_donor / "model.safetensors")["model.layers.0.attention.wqkv.weight"]
    hidden = torch.randn(7, raw["hidden_size"])
    heads, groups, width = 2, 2, 32
    fused = (hidden @ wqkv.T).view(7, heads, groups + 2, width)
    query, key, value = (hidden @ part.T for part in internlm.split(wqkv, config))
    torch.testing.assert_close(query, fused[:, :, :groups].reshape(7, heads * groups * width))
    torch.testing.assert_close(key, fused[:, :, -2].reshape(7, heads * width))
    torch.testing.assert_close(value, fused[:, :, -1].reshape(7, heads * width))


def test_text_logits_equal_the_language_models_bit_for_bit(vlm, llama_donor):
    from transformers import LlamaForCausalLM

    same_logits(vlm, LlamaForCausalLM.from_pretrained(llama_donor).eval(), len(shared_tokenizer()))


def test_an_internlm2_with_biases_computes_what_its_qwen2_did(clip_donor, tmp_path, language_donor):
    from transformers import LlavaForConditionalGeneration, Qwen2ForCausalLM

    from caprl_utils.mini import donors

    donors.write_internlm2(language_donor, tmp_path / "donor")
    setting = load_setting("mini-internlm-clip", language=at(tmp_path / "donor"), vision=at(clip_donor))
    assemble(setting, tmp_path / "out")
    vlm = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    same_logits(vlm, Qwen2ForCausalLM.from_pretrained(language_donor).eval(), len(shared_tokenizer()))


def test_features_before_the_projector_equal_the_donors(vlm, clip_donor):
    from transformers import CLIPVisionModel

    donor = CLIPVisionModel.from_pretrained(clip_donor, dtype=torch.float32).eval()
    pixels = torch.randn(2, 3, 140, 140)
    with torch.no_grad():
        ours = vlm.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        theirs = donor(pixels, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 6 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_whole_clip_gives_its_image_half(llava_setting, clip_donor, assembled, tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

    tower = CLIPVisionModel.from_pretrained(clip_donor)
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=tower.config.to_dict(), projection_dim=64))
    clip.vision_model.load_state_dict(tower.state_dict())
    clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(
        (clip_donor / "preprocessor_config.json").read_text()
    )
    summary = assemble(
        llava_setting.model_copy(update={"vision": at(tmp_path / "clip")}), tmp_path / "out", seed=5
    )
    assert summary.left_out.pop("CLIP's text half") > 0 and set(summary.left_out) == {
        "logit_scale", "text_projection.weight", "visual_projection.weight",
    }  # fmt: skip
    ours, other = (load_file(s.folder / "model.safetensors") for s in (summary, assembled))
    assert ours.keys() == other.keys() and all(torch.equal(ours[name], other[name]) for name in ours)


def test_an_image_becomes_as_many_tokens_as_the_model_gives_features(assembled, vlm):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(assembled.folder)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the topic?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>What is the topic?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(text=[text], images=[Image.new("RGB", (200, 100), "red")], return_tensors="pt")
    assert (
        (inputs["input_ids"] == vlm.config.image_token_id).sum() == 25 == assembled.images["max_image_tokens"]
    )
    corner, centre = inputs["pixel_values"][0, :, 0, 0], inputs["pixel_values"][0, :, 70, 70]
    assert corner.abs().max() < 0.05 < centre.abs().min()  # padded with the mean colour, nothing cut off
    assert vlm(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    plain = "The value of Rome is 42.\nA) tea"
    assert processor.tokenizer(plain).input_ids == shared_tokenizer()(plain).input_ids


def test_it_is_stored_and_saved_under_the_names_that_servers_read(assembled, vlm, tmp_path):
    stored = load_file(assembled.folder / "model.safetensors").keys()
    assert {name.split(".layers.")[0] for name in stored if ".layers.0." in name} == {
        "language_model.model",
        "vision_tower.vision_model.encoder",
    }
    vlm.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == stored


def test_rope_scaling_that_is_not_known_is_refused():
    shape = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    dynamic = internlm.llama_config(
        shape | {"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    )
    assert dynamic.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    with pytest.raises(UserError, match="rope scaling 'yarn'"):
        internlm.llama_config(shape | {"rope_scaling": {"type": "yarn", "factor": 2.0}})
    with pytest.raises(UserError, match="lacks num_key_value_heads"):
        internlm.llama_config({k: v for k, v in shape.items() if k != "num_key_value_heads"})
