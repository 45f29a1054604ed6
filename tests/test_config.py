"""Settings: every profile loads, and every mistake names file, key, value and the nearest valid one."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from caprl_utils import config, paths
from caprl_utils.config import load_assembly, load_experiment, load_profile, names_of, walk
from caprl_utils.errors import UserError
from caprl_utils.schema import Models, Profile

SOURCES = ("paper", "author script", "author README", "ours")


@pytest.mark.parametrize("name", ["mini", "one_gpu", "paper", "smoke"])
def test_profiles_load_under_their_file_names_and_hold_only_what_differs(name):
    assert load_profile(name).name == name in names_of(Profile) and len(names_of(Profile)) == 4
    given = config.read_yaml(paths.PROFILES / f"{name}.yaml")
    base = load_profile(given["extends"]) if "extends" in given else Profile(name="defaults")
    for section in ("images", "curation", "rl", "prism"):
        for key, value in given.get(section, {}).items():
            assert value != getattr(getattr(base, section), key), f"{section}.{key} repeats the default"


def test_every_setting_says_where_it_comes_from():
    told = {key: source for key, source in walk(Profile) if key != "name" and not key.endswith(".path")}
    told |= {role: field.description for role, field in Models.model_fields.items()}
    assert len(told) > 100 and not {key for key, source in told.items() if not source.startswith(SOURCES)}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"rl.lerning_rate": 1}, r"unknown key rl\.lerning_rate .*; did you mean rl\.learning_rate\?"),
        ({"rl": {"reward": "qa_expectd"}}, r"rl\.reward: 'qa_expectd'.*; did you mean qa_expected\?"),
        ({"group_size": 3}, r"unknown key group_size .*; did you mean rl\.group_size\?"),
        ({"rl.group_size": 1}, r"rl\.group_size: 1: .*greater than or equal to 2"),
        ({"models.polcy.path": "x"}, r"unknown key models\.polcy .*; did you mean models\.policy\?"),
        ({"models.policy.backend": "endpoint"}, r"models\.policy: .*needs base_urls"),
        ({"rl.steps": "many"}, r"rl\.steps: 'many'"),
        ({"rl.num_images": 1}, "rl: num_images 1 is below prompts_per_step"),
        ({"zzzz": 3}, "unknown key zzzz .*; valid keys here: name, description"),
    ],
)
def test_bad_setting_is_named(overrides, expected):
    with pytest.raises(UserError, match=rf"configs/profiles/smoke\.yaml with overrides:\n  {expected}"):
        load_profile("smoke", overrides)


def load_in_mini(file):
    return load_experiment(file, "mini")


@pytest.mark.parametrize(
    ("load", "text", "message"),
    [
        (load_profile, "rl: &a {rounds: 2}\ncuration: {<<: *a, rounds: x}", r"own.yaml:\n  curation.rounds: 'x'"),
        (load_profile, "seed: 1\nseed: 2\n", "key 'seed' stands twice"),
        (load_profile, "rl: [1\n", r"own\.yaml is not valid YAML"),
        (load_profile, "- rl\n", "expected `key: value` lines, found list"),
        (load_profile, "extends: FILE\n", "goes round in a circle"),
        (load_in_mini, "rewards: {}", r"own.yaml:\n  unknown key rewards .*did you mean reward\?"),
        (load_in_mini, "training: {vision_towr: false}", r"unknown key training.vision_towr .*training.vision_tower\?"),
        (load_in_mini, "reward: {terms: {qa: much}}", r"reward.terms.qa: 'much': "),
        (load_in_mini, "rl: {betta: 1}", r"section rl, over profile mini: .*unknown key rl.betta.*rl.beta\?"),
        (load_in_mini, "data: {num_images: 0}", r"data.num_images.*: 0: "),
        (load_in_mini, "training: {lora: {ranks: 1}}", r"unknown key training.lora.ranks .*training.lora.rank\?"),
        (load_in_mini, "extends: papr", r"no experiment 'papr'; did you mean paper\?"),
        (load_assembly, "PAIR\narchitecture: lava", r"own.yaml:\n.*architecture: 'lava'.*did you mean llava\?"),
        (load_assembly, "PAIR\nvision: {path: ''}", r"vision.path: "),
        (load_assembly, "PAIR\nvisin: {}", r"unknown key visin .*did you mean vision\?"),
        (load_assembly, "PAIR\nrename_tokens: {a: b}", "rename_tokens belongs"),
        (load_assembly, "extends: qwen2.5-3", r"no assembly 'qwen2.5-3'; did you mean qwen2.5-3b\?"),
    ],
)
def test_mistakes_in_a_file_are_named(load, text, message, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(text.replace("FILE", str(file)).replace("PAIR", "extends: mini-qwen-3b"))
    with pytest.raises(UserError, match=f"(?s){message}"):
        load(str(file))


def test_another_model_does_not_inherit_the_papers_server_and_the_hash_follows_what_changes_outputs():
    assert load_profile("paper").models.question_writer.backend == "endpoint"
    writer = load_profile("mini").models.question_writer
    assert writer.backend == "local" and writer.base_urls == []
    pair = load_assembly("mini-qwen-3b", {"vision.revision": "main"})
    assert (pair.name, pair.vision.path, pair.vision.revision) == ("mini-qwen-3b", "zoo:base", "main")
    base = load_profile("smoke")
    changed = {key: load_profile("smoke", {key: 9}).content_hash() for key in ("rl.steps", "rl.save_every")}
    assert changed["rl.steps"] != base.content_hash() == changed["rl.save_every"]


def test_values_from_the_command_line_reach_every_process_and_win_over_an_experiment(monkeypatch):
    monkeypatch.setenv("CAPRL_SET", "rl.steps=7\nrl.learning_rate=1e-5 training.lora.rank=8 rl.rounds=2")
    profile = load_profile("smoke", {"rl.group_size": 6})
    assert (profile.rl.steps, profile.rl.learning_rate, profile.rl.group_size) == (7, 1e-5, 6)
    experiment, resolved = load_experiment("caprl", "smoke")
    assert (experiment.training.lora.rank, resolved.rl.rounds) == (8, 2)
    monkeypatch.setenv("CAPRL_SET", "training.lra.rank=8")
    with pytest.raises(UserError, match=r"--set:\n  unknown key training.lra .*training.lora\?"):
        load_profile("smoke")


def test_parameters_are_read_as_numbers_words_and_lists():
    items = ["lr=1e-5", "n=3", "name=x=y", "on=true", "none=null", "names=[a, b]", "word=yes please"]
    values = {"lr": 1e-5, "n": 3, "name": "x=y", "on": True, "none": None, "names": ["a", "b"], "word": "yes please"}
    assert config.parse_overrides(items, "-p") == values
    with pytest.raises(UserError, match=re.escape("--set rl.steps: expected name=value")):
        config.parse_overrides(["rl.steps"])


def test_an_installed_package_keeps_a_users_files_in_the_working_folder(tmp_path):
    site, work = tmp_path / "site" / "caprl_utils", tmp_path / "work"
    work.mkdir()
    shutil.copytree(paths.ROOT / "caprl_utils", site, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    shutil.copytree(paths.CONFIGS, site / "configs")
    code = (
        "import sys; from caprl_utils import paths, runs; from caprl_utils.config import load_profile;"
        "print(load_profile('mini').name, paths.RUNS, paths.reports_of('mini'), runs.commit()['commit'],"
        "paths.shown(paths.RUNS / 'x'), 'torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(site.parent)}
    del env["CAPRL_RUNS"]
    done = subprocess.run([sys.executable, "-c", code], cwd=work, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["mini", f"{work}/runs", f"{work}/runs/mini/reports", "None", "runs/x", "False"]
