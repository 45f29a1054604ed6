import pytest

from caprl_utils.config import experiment_names, load_experiment, profile_names
from caprl_utils.errors import UserError
from caprl_utils.rl.arguments import batch_layout, grpo_arguments

NAMES = experiment_names()


def test_there_are_experiments():
    assert len(NAMES) >= 9 and {"paper", "released_script", "caprl"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("profile", profile_names())
def test_every_experiment_parses_with_the_real_class(name, profile, tmp_path):
    from trl import GRPOConfig

    experiment, resolved = load_experiment(name, profile)
    assert experiment.name == name and experiment.description
    arguments = grpo_arguments(resolved, experiment, 3, tmp_path, num_processes=1, on_gpu=False)
    config = GRPOConfig(**arguments)
    rl = resolved.rl
    assert config.generation_batch_size == rl.prompts_per_step * rl.group_size
    assert config.steps_per_generation == config.gradient_accumulation_steps  # one optimizer step per rollout
    assert (config.beta, config.scale_rewards, config.loss_type) == (rl.beta, rl.scale_rewards, rl.loss_type)
    assert config.use_bias_correction_kl is False and config.num_iterations == 1


def test_presets_differ_where_paper_and_script_do():
    _, paper = load_experiment("caprl", "paper")
    script, released = load_experiment("released_script", "paper")
    assert (paper.rl.scale_rewards, released.rl.scale_rewards) == ("group", "none")
    assert paper.rl.beta > 0 and released.rl.beta == 0
    assert script.training.lr_schedule == "cosine_with_min_lr"
    _, small = load_experiment("released_script", "mini")
    assert (small.rl.reward, small.rl.question_draw) == ("qa_sampled", "replacement")


def test_profile_keeps_its_sizes():
    _, mini = load_experiment("caprl", "mini")
    _, one = load_experiment("rounds_1", "mini")
    assert (one.rl.steps, one.rl.learning_rate) == (mini.ablations.steps, mini.rl.learning_rate)
    assert (mini.rl.rounds, one.rl.rounds) == (4, 1)


def test_batch_layout():
    assert batch_layout(8, 8, None, 1, on_gpu=False) == (64, 1)
    assert batch_layout(128, 8, None, 16, on_gpu=True) == (4, 16)
    assert batch_layout(128, 8, 8, 16, on_gpu=True) == (8, 8)
    with pytest.raises(UserError, match="do not divide over 3 processes"):
        batch_layout(128, 8, None, 3, on_gpu=True)
    with pytest.raises(UserError, match=r"8 images a step .* do not divide over 16 processes"):
        batch_layout(8, 8, None, 16, on_gpu=True)  # 64 captions would, but groups would be torn apart
    with pytest.raises(UserError, match="micro_batch_size 5 does not divide 64"):
        batch_layout(8, 8, 5, 1, on_gpu=False)


@pytest.mark.parametrize(("profile", "processes"), [("one_gpu", 1), ("paper", 16)])
@pytest.mark.parametrize("rollout", ["transformers", "vllm_colocate", "vllm_server"])
def test_layout_on_gpus_parses_with_the_real_class(profile, processes, rollout, tmp_path, monkeypatch):
    """GRPOConfig refuses bfloat16 where there is no GPU: that one check is switched off."""
    import transformers.training_args
    from trl import GRPOConfig

    monkeypatch.setattr(
        transformers.training_args, "is_torch_bf16_gpu_available", lambda: True, raising=False
    )
    experiment, resolved = load_experiment("caprl", profile)
    training = experiment.training.model_copy(update={"rollout": rollout})
    experiment = experiment.model_copy(update={"training": training})
    arguments = grpo_arguments(resolved, experiment, 0, tmp_path, num_processes=processes, on_gpu=True)
    monkeypatch.setattr(GRPOConfig, "world_size", processes, raising=False)
    config = GRPOConfig(**arguments)
    rl = resolved.rl
    assert config.bf16 and config.gradient_checkpointing
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * processes == (
        rl.prompts_per_step * rl.group_size
    )
    assert config.steps_per_generation == config.gradient_accumulation_steps
    assert config.use_vllm is (rollout != "transformers")
    if config.use_vllm:
        assert config.vllm_mode == rollout.removeprefix("vllm_")
        assert config.vllm_importance_sampling_mode == "token_truncate"
