"""Experiments: the YAMLs, what a profile trains, what a change retrains, how trainings are started and evaluated."""

import re
import shutil
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from caprl_utils import paths
from caprl_utils.config import load_experiment, load_profile, names_of
from caprl_utils.errors import UserError
from caprl_utils.files import write_json
from caprl_utils.progress import PROGRESS_ENV
from caprl_utils.rl import experiments
from caprl_utils.rl.experiments import batch_layout
from caprl_utils.rl.grpo import grpo_arguments
from caprl_utils.runs import Run
from caprl_utils.schema import Experiment
from tests.rl.conftest import write_questions


@pytest.mark.parametrize("name", names_of(Experiment))
def test_every_experiment_parses_with_the_real_class(name, tmp_path):
    from trl import GRPOConfig

    for profile in ("mini", "one_gpu", "paper"):
        if name == "from_strong" and profile == "one_gpu":
            with pytest.raises(UserError, match=r"from_strong trains models.captioner_72b, which profile one_gpu goes"):
                load_experiment(name, profile)
            continue
        experiment, resolved = load_experiment(name, profile)
        assert experiment.name == name and experiment.description
        rl = resolved.rl
        config = GRPOConfig(**grpo_arguments(resolved, experiment, 3, tmp_path, 1, on_gpu=False))
        assert config.generation_batch_size == rl.prompts_per_step * rl.group_size
        assert config.steps_per_generation == config.gradient_accumulation_steps  # one optimizer step per rollout
        method = (config.beta, config.scale_rewards, config.loss_type, config.use_bias_correction_kl)
        assert method == (rl.beta, rl.scale_rewards, rl.loss_type, False) and config.num_iterations == 1


def test_ablations_have_their_own_size_and_one_gpu_trains_adapters_by_its_preset():
    profile, small = load_profile("mini"), load_experiment("short", "mini")[1]
    assert small.rl.steps == profile.ablations.steps < load_experiment("caprl", "mini")[1].rl.steps == profile.rl.steps
    assert load_experiment("leaking", "mini")[0].data.num_images == profile.ablations.num_images
    experiment, profile = load_experiment("rounds_1", "one_gpu")
    assert experiment.training.lora.rank == 64 and profile.rl.learning_rate == 1e-5 and profile.rl.rounds == 1


def test_batch_layout():
    assert batch_layout(8, 8, None, 1, on_gpu=False) == (64, 1)
    assert batch_layout(128, 8, None, 16, on_gpu=True) == (4, 16)
    assert batch_layout(128, 8, 8, 16, on_gpu=True) == (8, 8)
    with pytest.raises(UserError, match=r"8 images a step .* do not divide over 16 processes"):
        batch_layout(8, 8, None, 16, on_gpu=True)  # 64 captions would, but groups would be torn apart
    with pytest.raises(UserError, match="micro_batch_size 5 does not divide 64"):
        batch_layout(8, 8, 5, 1, on_gpu=False)


@pytest.mark.parametrize(
    ("profile", "processes", "rollout"), [("one_gpu", 1, "transformers"), ("paper", 16, "vllm_colocate")]
)
def test_layout_on_gpus_parses_with_the_real_class(profile, processes, rollout, tmp_path, monkeypatch):
    """GRPOConfig refuses bfloat16 where there is no GPU: that one check is switched off."""
    import transformers.training_args
    from trl import GRPOConfig

    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setenv("CAPRL_SET", f"training.rollout={rollout}")
    experiment, resolved = load_experiment("caprl", profile)
    monkeypatch.setattr(GRPOConfig, "world_size", processes, raising=False)
    config = GRPOConfig(**grpo_arguments(resolved, experiment, 0, tmp_path, processes, on_gpu=True))
    captions = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    assert captions == resolved.rl.prompts_per_step * resolved.rl.group_size
    assert config.bf16 and config.gradient_checkpointing and config.use_vllm is (rollout != "transformers")
    assert config.vllm_importance_sampling_mode == "token_truncate"


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """Call with YAML over mini and the reward's rounds: training of some experiments -> its key."""
    questions, configs = tmp_path / "qa.parquet", tmp_path / "configs"
    questions.write_bytes(b"the same questions")
    monkeypatch.setattr(experiments, "data_file", lambda *_: questions)
    shutil.copytree(paths.CONFIGS, configs)
    monkeypatch.setattr(paths, "CONFIGS", configs)

    def call(text="", rounds=4):
        preset, file = configs / "experiments" / "paper.yaml", tmp_path / "mine.yaml"
        preset.write_text(re.sub(r"rounds: \d+", f"rounds: {rounds}", preset.read_text()))
        file.write_text(f"extends: mini\n{text}")
        found = {}
        for name in ("caprl", "short", "rounds_1", "rounds_8"):
            loaded = load_experiment(name, str(file))
            for seed in experiments.seeds_of(load_profile(str(file)), name):
                found[experiments.run_name(name, seed)] = Run(*experiments.identity(*loaded, seed)).key
        return found

    return call


def test_what_a_change_retrains(keys):
    """The reward's rounds: all but those with rounds of their own. The ablations' size: not the main run."""
    before, rounds, size = keys(), keys(rounds=3), keys("ablations: {steps: 7}")
    own = {f"rounds_{rounds}-seed{seed}" for rounds in (1, 8) for seed in (0, 1, 2)}
    assert {name for name in before if before[name] == rounds[name]} == own
    assert before["caprl-seed0"] == size["caprl-seed0"] and before["short-seed0"] != size["short-seed0"]
    one_seed = keys("rl: {seeds: [0]}")
    assert one_seed.items() <= before.items() and set(before) - set(one_seed) == {"caprl-seed1", "caprl-seed2"}


def test_the_main_run_has_its_seeds_and_all_others_theirs():
    profile = load_profile("mini", {"rl.seeds": [3, 4], "ablations.seeds": [5]})
    runs = experiments.planned(profile, ["rounds_1", "caprl", "natural"])
    assert [run.name for run in runs] == ["caprl-seed3", "caprl-seed4", "rounds_1-seed5", "natural-seed5"]
    with pytest.raises(UserError, match=r"no experiment 'round_1'; did you mean rounds_1\?"):
        experiments.planned(profile, ["round_1"])
    for section in ("rl", "ablations"):
        with pytest.raises(UserError, match=rf"{section}.seeds: \[1, 1\] holds one seed twice"):
            load_profile("mini", {f"{section}.seeds": [1, 1]})
    assert experiments.of_table_3(load_profile("smoke")) == ["caprl", "judge_vlm"]


RECORD = {"n": 9, "wall_sec": 60.0, "values": dict.fromkeys(
    ("steps", "reward_first", "reward_last", "completion_tokens_first", "completion_tokens_last"), 1)}  # fmt: skip


@pytest.fixture
def scripted(monkeypatch):
    """Call with what stands in for a training, each experiment's one; the list that it returns notes evaluations."""

    def install(train, score=lambda: {"values": {"average": 0.5}}) -> list:
        evaluated = []

        def judge(profile, name, captioner, reader, samples, captions_run):
            evaluated.append((name, captions_run, captioner.path.split("/")[-1]))
            return score()

        monkeypatch.setattr(experiments, "load_profile", partial(load_profile, overrides={"ablations.seeds": [0]}))
        monkeypatch.setattr(experiments, "launch", train)
        monkeypatch.setattr("caprl_utils.prism.evaluate.evaluate", judge)
        monkeypatch.setattr("caprl_utils.prism.loading.load_samples", lambda profile: [])
        monkeypatch.setattr("caprl_utils.models.base.open_backend", lambda model, profile: model)
        return evaluated

    return install


def test_the_loop_trains_two_at_once_the_longest_first_and_evaluates_each_once(scripted):
    trained, both = [], threading.Barrier(2, timeout=20)

    def train(experiment, profile, seed, tell, stopping):
        trained.append((experiment, seed))
        both.wait()  # breaks when they come one after the other
        tell(1, "reward 0.5")
        return RECORD

    evaluated = scripted(train)
    rows = experiments.run_all("mini", ["short", "judge_vlm", "judge_unified", "other_reader"])
    names = ["judge_vlm", "judge_unified", "short", "other_reader"]
    assert {*trained[:2]} == {(name, 0) for name in names[:2]} and sorted(trained) == sorted((n, 0) for n in names)
    assert [(row["run"], row["accuracy"], row["minutes"]) for row in rows] == [(f"{n}-seed0", 0.5, 1.0) for n in names]
    others = [(f"{n}-seed0-by-reward_reader", f"{n}-seed0", "final") for n in names[2:]]  # the swap of readers
    bases = [(name, "base-3b", "zoo:base") for name in ("base-3b", "base-3b-by-reward_reader")]
    assert evaluated[:2] == bases
    assert sorted(evaluated[2:]) == sorted([*((f"{n}-seed0", f"{n}-seed0", "final") for n in names), *others])


def test_a_tracker_that_is_not_installed_shows_before_any_model_loads(scripted, monkeypatch):
    monkeypatch.setenv("CAPRL_SET", "rl.report_to=wandb")
    monkeypatch.setattr(experiments, "find_spec", lambda name: None)
    evaluated = scripted(lambda *_: pytest.fail("trains"))
    with pytest.raises(UserError, match=r"wandb, which is not installed: .*uv pip install --python \S+ wandb$"):
        experiments.run_all("mini", ["short"])
    assert evaluated == []


def test_a_failed_training_holds_up_no_other_and_questions_about_other_images_are_told(scripted, caplog):
    write_json(paths.RUNS / "mini" / "curation" / "main" / "config.json", {"images": {"source": "my/images"}})
    done = []

    def train(experiment, *_):
        if experiment in ("rounds_1", "caprl"):
            raise UserError("no reader")
        done.append(experiment)
        return RECORD

    scripted(train)
    with pytest.raises(UserError, match=r"(?s)1 of 3 trainings failed.*rounds_1-seed0: no reader"):
        experiments.run_all("mini", ["short", "rounds_1", "rounds_2"])
    assert done == ["short", "rounds_2"]
    assert "the questions are about images of my/images, the profile names mini-world" in caplog.text
    with pytest.raises(UserError, match=r"^no reader$"):  # without the main one the others say nothing
        experiments.run_all("mini", ["caprl", "short"])


def test_interrupted_ends_all_trainings(scripted):
    ended, running = [], threading.Semaphore(0)

    def train(experiment, profile, seed, tell, stopping):
        running.release()
        assert stopping.wait(20)
        ended.append(experiment)
        raise UserError("ended")

    def interrupt():
        assert running.acquire(timeout=20) and running.acquire(timeout=20)
        raise KeyboardInterrupt

    scripted(train, interrupt)
    with pytest.raises(KeyboardInterrupt):
        experiments.run_all("mini", ["short", "rounds_1", "rounds_2"])
    assert sorted(ended) == ["rounds_1", "short"]  # the third never started


def test_on_one_gpu_nothing_is_evaluated_beside_a_training(scripted, monkeypatch):
    busy = threading.Lock()

    def alone(*_):
        assert busy.acquire(blocking=False), "two at once on one GPU"
        time.sleep(0.01)
        busy.release()
        return RECORD | {"values": RECORD["values"] | {"average": 0.5}}

    monkeypatch.setattr(experiments.processes, "visible_gpus", lambda: ["H100"])
    scripted(alone, alone)
    rows = experiments.run_all("one_gpu")
    assert [row["accuracy"] for row in rows] == [0.5] * len(experiments.planned(load_profile("one_gpu")))


WORK = """
import json, os, sys
from pathlib import Path
progress = {"label": "train", "done": 3, "total": 4, "note": "reward 0.5", "sec": 1, "time": 1}
Path(os.environ["PROGRESS"]).write_text(json.dumps(progress))
if sys.argv[1] == "fail":
    sys.exit("error: the reader is gone")
folder = Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
(folder / "result.json").write_text(json.dumps({"key": "k", "values": {"steps": 4}}))
""".replace('"PROGRESS"', f'"{PROGRESS_ENV}"')


def test_launch_returns_the_record_shows_progress_and_tells_what_failed_or_was_stopped(world, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    write_questions(tmp_path / "tiny" / "curation" / "main" / "qa.parquet", num_images=2)
    seen = []
    monkeypatch.setattr(experiments.SharedProgress, "update", lambda bar, count, note: seen.append((count, note)))

    def work(how: str, **options):
        """`launch` on the small world, with a stand-in for the training's process."""
        line = [sys.executable, "-c", WORK, how, str(tmp_path / "tiny" / "rl" / "small-seed0")]

        def popen(python, imports, run, words, log, env, own):
            return experiments.processes.popen(line, log, env | own)

        monkeypatch.setattr(experiments.warm, "popen", popen)
        return experiments.launch(str(world / "small.yaml"), str(world / "tiny.yaml"), **options)

    assert work("well")["values"] == {"steps": 4} and (3, "small-seed0 reward 0.5") in seen
    with pytest.raises(UserError, match=r"(?s)status 1.*small-seed0.log:.*the reader is gone.*Run it again"):
        work("fail")
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(UserError, match="small-seed0 ended with status"):
        work("well", stopping=stopping)
    monkeypatch.setattr(Run, "find", lambda *_: {"values": {"steps": 5}})
    assert work("fail")["values"] == {"steps": 5}  # complete: read without a process


def test_command_and_layout_with_one_and_several_gpus(world, runs, monkeypatch):
    """As many processes as GPUs are visible, also where a config of one node names another number. Four images a step
    do not divide over three GPUs, which is told before the start; with two the models of this process go first.
    """
    plain = experiments.command("caprl", "mini", 1, 0, None)
    assert plain[1:3] == ["-m", "caprl_utils.rl.train"] and plain[-1] == "1"
    for config in (None, "one_node.yaml"):
        several = experiments.command("caprl", "paper", 0, 5, config)
        assert several[several.index("--num_processes") + 1] == "5" and "accelerate.commands.launch" in several
        assert ("--config_file" in several) is bool(config)
    assert [experiments.layout("one_node.yaml", n) for n in (0, 3)] == [(1, 1), (1, 3)]
    assert experiments.layout("two_nodes.yaml", 8) == (2, 16)
    assert load_experiment("one_node", "paper")[0].training.vllm_sleep

    closed, started = [], []
    monkeypatch.setattr(experiments, "close_all", lambda: closed.append(1))
    monkeypatch.setattr(experiments.processes, "popen", lambda words, *_, **__: started.append(words) or 1 / 0)
    for gpus, wanted, match in (("012", UserError, r"4 images a step .* over 3 processes: take 3 or 6, or as many"),
                                ("01", ZeroDivisionError, "division")):  # fmt: skip
        monkeypatch.setattr(experiments.processes, "visible_gpus", partial(list, gpus))
        with pytest.raises(wanted, match=match):
            experiments.launch(str(world / "small.yaml"), str(world / "tiny.yaml"))
    assert closed == [1] and started[0][started[0].index("--num_processes") + 1] == "2"


def test_several_nodes_start_by_srun_in_a_job_of_as_many(monkeypatch, tmp_path):
    """With a stand-in for srun, which runs the words once as the second node: accelerate's own parser takes them."""
    from accelerate.commands.launch import launch_command_parser

    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    with pytest.raises(UserError, match=r"two_nodes.yaml is for 2 nodes.*here: none.*grpo.slurm"):
        experiments.command("caprl", "paper", 0, 8, "two_nodes.yaml")
    given = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    words = experiments.command("caprl", "paper", 0, 8, "two_nodes.yaml")
    assert words[:3] == ["srun", "--nodes=2", "--ntasks-per-node=1"]
    place = words.index("-m")
    shown = [*words[3 : place - 1], "echo", *words[place + 2 :]]  # instead of Python and the launcher
    said = subprocess.run(shown, capture_output=True, text=True, check=True).stdout.split()
    found = launch_command_parser().parse_args(said)
    assert (found.machine_rank, found.main_process_ip, found.main_process_port) == (1, "first", 29500)
    assert found.training_script == "caprl_utils.rl.train" and "--experiment" in found.training_script_args


ACCELERATE = sorted((paths.CONFIGS / "accelerate").glob("*.yaml"))


def test_accelerate_configs_parse():
    """By accelerate's own reader; what stands under deepspeed_config has to be an option of its launcher."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    options = {action.dest for action in launch_command_parser()._actions}
    for file in ACCELERATE:
        config = load_config_from_file(str(file))
        assert str(config.distributed_type).endswith("DEEPSPEED") and config.num_processes == 8 * config.num_machines
        assert set(config.deepspeed_config) <= options, file


DEEPSPEED = """
import sys, yaml
from accelerate import DeepSpeedPlugin
from deepspeed.runtime.config import DeepSpeedConfig
batch = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 16,
         "gradient_clipping": 1.0}
for file in sys.argv[1:]:
    given = yaml.safe_load(open(file))["deepspeed_config"]
    given.pop("deepspeed_multinode_launcher", None)
    config = DeepSpeedConfig({**DeepSpeedPlugin(**given).deepspeed_config, **batch})
    print(config.zero_optimization_stage, config.zero_config.gather_16bit_weights_on_model_save)
"""


@pytest.mark.integration
def test_deepspeed_takes_the_configs():
    """By accelerate's plugin and DeepSpeed's own class, which the environment of LLaMA-Factory has."""
    python = paths.ROOT / ".venv-llamafactory" / "bin" / "python"
    done = subprocess.run([python, "-c", DEEPSPEED, *ACCELERATE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # else the last model could not be written
    stages = ["3 True" if "zero3" in file.stem else "2 False" for file in ACCELERATE]
    assert done.stdout.splitlines()[-len(ACCELERATE) :] == stages
