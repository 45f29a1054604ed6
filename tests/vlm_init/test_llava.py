"""InternLM2 weights under Llama names, and the LLaVA model made of them and a CLIP tower."""

import io
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, CLIPConfig, CLIPModel, CLIPVisionModel, LlamaForCausalLM, Qwen2ForCausalLM

from caprl_utils.config import load_assembly
from caprl_utils.errors import UserError
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.zoo import donors
from caprl_utils.vlm_init.assembly import FILE, assemble, plan_of
from caprl_utils.vlm_init.donors import fast_tokenizer, llama_config, llama_tensors, read_config, read_weights, renamed
from tests.vlm_init.conftest import at, loaded, same_logits


@pytest.fixture(scope="module")
def folder(llava_setting, tmp_path_factory):
    """An assembled model."""
    folder = tmp_path_factory.mktemp("out") / "model"
    assemble(llava_setting, folder, seed=5)
    return folder


@pytest.fixture(scope="module")
def vlm(folder):
    return loaded(folder)


def test_the_fused_projection_is_read_as_internlm2_reads_it(internlm_donor):
    """The rearrangement of modeling_internlm2.py, written out: 'b q (h gs d) -> b q h gs d', then the last two."""
    raw = json.loads((internlm_donor / "config.json").read_text())
    config = llama_config(raw)
    tensors = load_file(internlm_donor / "model.safetensors")
    wqkv, split = tensors["model.layers.0.attention.wqkv.weight"], llama_tensors(tensors, config)
    hidden = torch.randn(7, raw["hidden_size"])
    heads, groups, width = 2, 2, 32
    fused = (hidden @ wqkv.T).view(7, heads, groups + 2, width)
    query, key, value = (hidden @ split[f"model.layers.0.self_attn.{part}_proj.weight"].T for part in "qkv")
    torch.testing.assert_close(query, fused[:, :, :groups].reshape(7, heads * groups * width))
    torch.testing.assert_close(key, fused[:, :, -2].reshape(7, heads * width))
    torch.testing.assert_close(value, fused[:, :, -1].reshape(7, heads * width))


def test_an_internlm2_with_biases_computes_what_its_qwen2_did(tmp_path, language_donor):
    donors.write_internlm2(language_donor, tmp_path)
    config = llama_config(read_config(tmp_path))
    state = llama_tensors(read_weights(tmp_path), config)
    llama = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()
    same_logits(llama, Qwen2ForCausalLM.from_pretrained(language_donor).eval())


def test_features_before_the_projector_equal_the_donors(vlm, clip_donor):
    donor = CLIPVisionModel.from_pretrained(clip_donor, dtype=torch.float32).eval()
    pixels = torch.randn(1, 3, 196, 196)
    with torch.no_grad():
        ours = vlm.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        theirs = donor(pixels, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 6 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_whole_clip_gives_its_image_half(llava_setting, clip_donor, tmp_path):
    tower = CLIPVisionModel.from_pretrained(clip_donor)
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=tower.config.to_dict(), projection_dim=64))
    clip.vision_model.load_state_dict(tower.state_dict())
    clip.save_pretrained(tmp_path / "clip")
    shutil.copy(clip_donor / "preprocessor_config.json", tmp_path / "clip")
    whole, half = (llava_setting.model_copy(update={"vision": at(f)}) for f in (tmp_path / "clip", clip_donor))
    ours, other = plan_of(whole), plan_of(half)
    assert ours.config.vision_config.image_size == other.config.vision_config.image_size
    assert ours.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(ours.tensors[name], other.tensors[name]) for name in ours.tensors)


def test_an_image_becomes_as_many_tokens_as_the_model_gives_features(folder, vlm):
    processor = AutoProcessor.from_pretrained(folder)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the topic?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>What is the topic?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(text=[text], images=[Image.new("RGB", (200, 100), "red")], return_tensors="pt")
    assert (
        (inputs["input_ids"] == vlm.config.image_token_id).sum() == 49 == read_config(folder, FILE)["max_image_tokens"]
    )
    corner, centre = inputs["pixel_values"][0, :, 0, 0], inputs["pixel_values"][0, :, 98, 98]
    assert corner.abs().max() < 0.05 < centre.abs().min()  # padded with the mean colour, nothing cut off
    assert vlm(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    plain = "This is a chart. The value of Rome is 40.\nA) tea"
    assert processor.tokenizer(plain).input_ids == shared_tokenizer()(plain).input_ids


def test_it_is_stored_and_saved_under_the_names_that_servers_read(folder, vlm, tmp_path):
    stored = load_file(folder / "model.safetensors").keys()
    starts = {name.split(".layers.")[0] for name in stored if ".layers.0." in name}
    assert starts == {"language_model.model", "vision_tower.vision_model.encoder"}
    vlm.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == stored


@pytest.mark.parametrize("space_first", [True, False])
def test_a_sentencepiece_tokenizer_is_read_without_foreign_code(space_first, tmp_path):
    """As InternLM2.5 has it: a tokenizer.model, a class of its own, reserved pieces that get names."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["The value of Rome is 42.", "def f(x):\n    return x + 1"] * 30), model_writer=model,
        vocab_size=350, hard_vocab_limit=False, model_type="bpe", byte_fallback=True, split_digits=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2, add_dummy_prefix=space_first,
        user_defined_symbols=["[UNUSED_TOKEN_140]", "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"],
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "InternLM2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
    }))  # fmt: skip
    plain = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    setting = load_assembly("internlm2.5-7b-clip")
    ours = renamed(fast_tokenizer(tmp_path), setting.rename_tokens)
    for text in ("The value of Rome is 42.", "two  spaces\n\nand lines", "数字 é ☃", "def f(x):\n    return"):
        assert ours(text).input_ids == plain.encode(text)
        assert ours.decode(ours(text).input_ids) == text
    for old, new in setting.rename_tokens.items():
        assert ours.convert_tokens_to_ids(new) == plain.piece_to_id(old)
    unused = [plain.piece_to_id(f"[UNUSED_TOKEN_{number}]") for number in (140, 145)]
    assert ours("<image><|im_end|>").input_ids == unused


def test_rope_scaling_that_is_not_known_is_refused():
    shape = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    dynamic = shape | {"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert llama_config(dynamic).rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    with pytest.raises(UserError, match="rope scaling 'yarn'"):
        llama_config(shape | {"rope_scaling": {"type": "yarn", "factor": 2.0}})
