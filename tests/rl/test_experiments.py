import pytest

from caprl_utils.config import profile_names
from caprl_utils.errors import UserError
from caprl_utils.rl import experiment as ex
from caprl_utils.rl.arguments import batch_layout, grpo_arguments
from caprl_utils.rl.experiment import experiment_names, load_experiment

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


def test_profile_keeps_its_sizes():
    _, mini = load_experiment("caprl", "mini")
    _, one = load_experiment("rounds_1", "mini")
    assert (one.rl.steps, one.rl.learning_rate) == (mini.ablations.steps, mini.rl.learning_rate)
    assert (mini.rl.rounds, one.rl.rounds) == (4, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rewards: {}", r"bad.yaml:\n  unknown key rewards .*did you mean reward\?"),
        (
            "training: {vision_towr: false}",
            r"unknown key training.vision_towr .*did you mean training.vision_tower\?",
        ),
        (
            "reward: {length: {wieght: 1}}",
            r"unknown key reward.length.wieght .*did you mean reward.length.weight\?",
        ),
        ("rl: {betta: 1}", r"bad.yaml, section rl, over profile mini: .*unknown key rl.betta.*rl.beta\?"),
        ("data: {num_images: 0}", r"data.num_images.*: 0: "),
        ("reward: {judge: vllm}", r"reward.judge: 'vllm': "),
        ("data: {num_images: some}", r"data.num_images"),
        ("extends: papr", r"no experiment 'papr'; did you mean paper\?"),
    ],
)
def test_mistakes_are_named(text, message, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"(?s){message}"):
        load_experiment(str(file), "mini")


def test_circle_of_extends(tmp_path, monkeypatch):
    monkeypatch.setattr(ex, "EXPERIMENTS", tmp_path)
    (tmp_path / "a.yaml").write_text("extends: b")
    (tmp_path / "b.yaml").write_text("extends: a")
    with pytest.raises(UserError, match="goes round in a circle"):
        load_experiment("a", "mini")


def test_batch_layout():
    assert batch_layout(64, None, 1, on_gpu=False) == (64, 1)
    assert batch_layout(1024, None, 16, on_gpu=True) == (4, 16)
    assert batch_layout(1024, 8, 16, on_gpu=True) == (8, 8)
    with pytest.raises(UserError, match="do not divide over 3 processes"):
        batch_layout(1024, None, 3, on_gpu=True)
    with pytest.raises(UserError, match="micro_batch_size 5 does not divide 64"):
        batch_layout(64, 5, 1, on_gpu=False)


def test_show(capsys):
    assert ex.main(["rounds_8", "mini"]) == 0
    shown = capsys.readouterr().out
    assert "rounds: 8" in shown and "name: rounds_8" in shown
    assert ex.main(["round_8", "mini"]) == 1
    assert "did you mean rounds_8?" in capsys.readouterr().err
