"""Forward passes of a training: what is left out of them or done together changes no number."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText
from trl import GRPOTrainer

from caprl_utils.errors import UserError
from caprl_utils.mini.zoo.models import build_vlm
from caprl_utils.rl import grpo
from caprl_utils.rl.grpo import kept_out, same_prompts
from caprl_utils.rl.policy import checkpoint_dtype, load_policy, lora_config, save_final, windows_together
from caprl_utils.rl.rewards import RewardBatch
from caprl_utils.schema import Lora, ModelConfig, Training

PAD, IMAGE = 0, 7


def vllm(prompts, images):
    """Reads each image as three tokens; gives back what it read, as TRL's wrapper does."""
    read = [[token for t in ids for token in [t] * (3 if t == IMAGE else 1)] for ids in prompts]
    return read, [[1]] * len(prompts), None, None


def test_vllm_is_given_one_token_an_image_and_has_to_read_what_is_trained_on():
    prompts = [[1, IMAGE, IMAGE, IMAGE, 2, 2], [IMAGE, IMAGE, IMAGE, 3, IMAGE, IMAGE, IMAGE]]
    assert same_prompts(vllm, IMAGE, prompts, images=[])[0] == prompts
    with pytest.raises(UserError, match=r"read 4 tokens of a prompt that has 5.*training.rollout"):
        same_prompts(vllm, IMAGE, [[1, IMAGE, IMAGE, IMAGE, IMAGE]], images=[])


def test_vllm_writes_no_marks_of_images():
    from vllm import SamplingParams

    config = build_vlm(0).config
    options = kept_out(config)
    assert {config.image_token_id, config.video_token_id} <= set(options["logit_bias"])
    assert min(SamplingParams(**options).logit_bias.values()) == -100


@pytest.fixture
def trainer(opened):
    """A trainer in float64 whose micro-batches hold two captions; every image has another size."""
    found = opened(micro_batch_size=2, rollout_rows=3)
    sizes = iter([(140, 140), (28, 140), (84, 56), (280, 140)])  # each is opened once
    found.pictures = lambda image: Image.effect_noise(next(sizes), 80).convert("RGB")
    found.current_gradient_accumulation_steps = 4
    found.model.double()
    found.ref_model.double()
    found.reward_funcs[0].score = lambda rollout: (RewardBatch([float(len(c)) for c in rollout.captions]), "")
    return found


def test_passes_without_padding_give_the_same_loss_and_gradients(trainer, monkeypatch):
    rows = [trainer.train_dataset[i] for i in range(4) for _ in range(2)]
    widths = []
    plain = GRPOTrainer._get_per_token_logps_and_entropies

    def watched(self, model, input_ids, *args, **kwargs):
        widths.append(input_ids.shape[1])
        return plain(self, model, input_ids, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", watched)
    trainer.model.train()
    batches = [trainer._prepare_inputs(rows), *trainer._buffered_inputs[1:]]

    def numbers() -> list[torch.Tensor]:
        found = []
        for batch in batches:
            trainer.model.zero_grad()
            loss = trainer._compute_loss(trainer.model, copy.copy(batch))
            loss.backward()
            found += [loss.detach(), *(p.grad.clone() for p in trainer.model.parameters() if p.grad is not None)]
        return found

    cut = numbers()
    monkeypatch.setattr(grpo.CaptionTrainer, "_get_per_token_logps_and_entropies", plain)
    for a, b in zip(cut, numbers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)
    assert len(set(widths)) > 2 and len(batches) == 4


def test_windows_together_see_what_single_ones_see(qwen_vlm):
    models = [AutoModelForImageTextToText.from_pretrained(qwen_vlm).double() for _ in range(2)]
    windows_together(models[1])
    grid = torch.tensor([[1, 20, 26], [1, 8, 8]])  # windows of 8 by 8 patches, cut at the edges
    pixels = torch.rand(int(grid.prod(-1).sum()), 1176, dtype=torch.float64)
    outputs = []
    for model in models:
        features = torch.cat(list(model.model.get_image_features(pixels, grid).pooler_output))
        features.square().sum().backward()
        outputs.append([features, *(p.grad for p in model.model.visual.parameters())])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


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
    for dtype in (checkpoint_dtype(config), torch.bfloat16):
        save_final(policy, SimpleNamespace(save_pretrained=lambda folder: None), tmp_path / "final", dtype)
        assert AutoModelForImageTextToText.from_pretrained(tmp_path / "final", dtype="auto").dtype == dtype
