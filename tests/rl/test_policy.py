"""The policy: its parts, its final model, and passes in which what is left out or done together changes no number."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText
from trl import GRPOTrainer

from caprl_utils.errors import UserError
from caprl_utils.mini.zoo.models import build_language_model, build_processor, build_vlm
from caprl_utils.rl import policy as policies
from caprl_utils.rl.grpo import CaptionTrainer, kept_out, same_prompts
from caprl_utils.rl.policy import counts, freeze, load_policy, lora_config, save_final
from caprl_utils.rl.rewards import RewardBatch
from caprl_utils.schema import Lora, ModelConfig, Training


@pytest.fixture(scope="module")
def model():
    return build_vlm(0)


@pytest.mark.parametrize("family", ["Qwen2_5_VL", "Qwen3VL", "InternVL", "Llava"])
def test_every_family_has_all_three_parts(family):
    """On the meta device at the class's default size: no part may be missed by its parameter names."""
    with torch.device("meta"):
        config = getattr(transformers, f"{family}Config")()
        table = counts(getattr(transformers, f"{family}ForConditionalGeneration")(config))
    assert table["language_model"]["all"] > table["vision_tower"]["all"] > table["projector"]["all"] > 0


def test_freezing_and_counts(model, monkeypatch):
    freeze(model, Training(vision_tower=False))
    table = counts(model)
    assert table["vision_tower"]["trainable"] == 0 < table["vision_tower"]["all"]
    assert all(table[part]["trainable"] == table[part]["all"] for part in ("projector", "language_model"))
    whole = sum(p.numel() for p in model.parameters())
    assert sum(row["all"] for row in table.values()) == whole
    freeze(model, Training())
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match="nothing would train"):
        freeze(model, Training(vision_tower=False, projector=False, language_model=False))
    with pytest.raises(UserError, match=r"training\.projector is false, but Qwen2ForCausalLM has no such part"):
        freeze(build_language_model(0), Training(projector=False))
    for parameter in model.parameters():  # under ZeRO-3 the whole tensors count
        monkeypatch.setattr(parameter, "ds_numel", 2 * parameter.numel(), raising=False)
    assert sum(row["all"] for row in counts(model).values()) == 2 * whole


@pytest.mark.parametrize("off", ["vision_tower", "projector", "language_model"])
def test_lora_keeps_out_of_every_part_that_is_off_in_qwen3_vl(off):
    """Its deepstack mergers are projectors, though they stand inside of the tower."""
    small = {"hidden_size": 64, "intermediate_size": 64}
    config = transformers.Qwen3VLConfig(
        text_config=small | {"num_hidden_layers": 1},
        vision_config=small | {"depth": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    )
    with torch.device("meta"):
        whole = transformers.Qwen3VLForConditionalGeneration(config)
        training = Training(lora=Lora(rank=4, alpha=8), **{off: False})
        table = counts(get_peft_model(whole, lora_config(training, whole)))
    assert {part for part, row in table.items() if row["trainable"] == 0} == {off}
    assert all(row["trainable"] < row["all"] / 2 for row in table.values())


def test_a_final_model_that_lacks_weights_is_refused(model, models, tmp_path):
    """As rank 0 alone would write it under ZeRO-3, where the other processes hold the rest."""
    state = {name: tensor for name, tensor in model.state_dict().items() if "visual" not in name}
    parts = (model, build_processor(), tmp_path / "final", ModelConfig(path=str(models["policy"])))
    with pytest.raises(UserError, match=r"holds .* of the model's .* weights; the checkpoints are kept"):
        save_final(*parts, state)
    assert not (tmp_path / "final").exists()
    save_final(*parts, model.state_dict())
    assert (tmp_path / "final" / "config.json").is_file()


def test_adapters_are_float32_on_bfloat16_weights_and_the_last_model_is_as_the_first(models, tmp_path):
    """On a GPU; the policy's own folder holds float32, so that is what its trained copy holds."""
    config, training = ModelConfig(path=str(models["policy"])), Training(lora=Lora(rank=2, alpha=4))
    base = load_policy(config, training, on_gpu=True)
    assert base.dtype == torch.bfloat16 and load_policy(config, training).dtype == torch.float32
    assert load_policy(config, Training(), on_gpu=True).dtype == torch.float32
    policy = get_peft_model(base, lora_config(training, base))
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    tokens = policy.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=3)  # not under autocast
    assert tokens.shape[1] > 3
    save_final(policy, SimpleNamespace(save_pretrained=lambda folder: None), tmp_path / "final", config)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "final", dtype="auto").dtype == torch.float32


def test_a_prompt_that_leaves_no_room_for_its_caption_is_refused(model):
    processor, picture = build_processor(), Image.new("RGB", (140, 140))
    assert policies.refusal_of(processor, model.config, room=10)(picture) is None
    room = model.config.text_config.max_position_embeddings - 20
    assert "its prompt has" in policies.refusal_of(processor, model.config, room)(picture)


def test_vllm_is_given_one_token_an_image_has_to_read_what_is_trained_on_and_writes_no_marks(model):
    image = 7

    def vllm(prompts, images):
        """Reads each image as three tokens; gives back what it read, as TRL's wrapper does."""
        read = [[token for t in ids for token in [t] * (3 if t == image else 1)] for ids in prompts]
        return read, [[1]] * len(prompts), None, None

    prompts = [[1, image, image, image, 2, 2], [image, image, image, 3, image, image, image]]
    assert same_prompts(vllm, image, prompts, images=[])[0] == prompts
    with pytest.raises(UserError, match=r"read 4 tokens of a prompt that has 5.*training.rollout"):
        same_prompts(vllm, image, [[1, image, image, image, image]], images=[])
    marks = {model.config.image_token_id: -100, model.config.video_token_id: -100}
    assert kept_out(model.config)["logit_bias"].items() >= marks.items()


@pytest.mark.parametrize("side_by_side", [False, True])
def test_passes_without_padding_give_the_same_loss_and_gradients(opened, monkeypatch, side_by_side):
    """In float64; micro-batches hold two captions or eight, and every image has another size."""
    trainer = opened(micro_batch_size=8 if side_by_side else 2, rollout_rows=3)
    trainer.positions_of = trainer.positions_of if side_by_side else None
    sizes = iter([(140, 140), (28, 140), (84, 56), (280, 140)])  # each is opened once
    trainer.pictures = lambda image: Image.effect_noise(next(sizes), 80).convert("RGB")
    trainer.current_gradient_accumulation_steps = 4
    trainer.model.double()
    trainer.ref_model.double()
    trainer.reward_funcs[0].score = lambda rollout: (RewardBatch([float(len(c)) for c in rollout.captions]), "")
    widths, plain = [], GRPOTrainer._get_per_token_logps_and_entropies

    def watched(self, model, input_ids, *args, **kwargs):
        widths.append(input_ids.shape[1])
        return plain(self, model, input_ids, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", watched)
    trainer.model.train()
    first = trainer._prepare_inputs([trainer.train_dataset[i] for i in range(4) for _ in range(2)])
    assert len(trainer._buffered_inputs) == (1 if side_by_side else 4)

    def numbers() -> list[torch.Tensor]:
        found = []
        for batch in (first, trainer._buffered_inputs[-1]):
            trainer.model.zero_grad()
            loss = trainer._compute_loss(trainer.model, copy.copy(batch))
            loss.backward()
            found += [loss.detach(), *(p.grad.clone() for p in trainer.model.parameters() if p.grad is not None)]
        return found

    cut = numbers()
    monkeypatch.setattr(CaptionTrainer, "_get_per_token_logps_and_entropies", plain)
    for a, b in zip(cut, numbers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)
    assert not widths if side_by_side else len(set(widths)) > 2  # TRL's own pass has its part in one of them


def test_windows_together_see_what_single_ones_see(qwen_vlm):
    models = [AutoModelForImageTextToText.from_pretrained(qwen_vlm).double() for _ in range(2)]
    policies.windows_together(models[1])
    grid = torch.tensor([[1, 20, 26], [1, 8, 8]])  # windows of 8 by 8 patches, cut at the edges
    pixels = torch.rand(int(grid.prod(-1).sum()), 1176, dtype=torch.float64)
    outputs = []
    for model in models:
        features = torch.cat(list(model.model.get_image_features(pixels, grid).pooler_output))
        features.square().sum().backward()
        outputs.append([features, *(p.grad for p in model.model.visual.parameters())])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
