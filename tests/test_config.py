"""Profiles: every one loads, and every mistake names file, key, value and the nearest valid one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from caprl_utils import config, paths
from caprl_utils.config import load_assembly, load_experiment, load_profile, names_of, walk
from caprl_utils.errors import UserError
from caprl_utils.schema import Models, Profile

FILES = sorted(paths.PROFILES.glob("*.yaml"))
SOURCES = ("paper", "author script", "author README", "ours")


def test_all_four_profiles_load_under_their_file_names():
    assert names_of(Profile) == ["mini", "one_gpu", "paper", "smoke"]
    assert [load_profile(name).name for name in names_of(Profile)] == names_of(Profile)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_yaml_holds_only_what_differs(file):
    given = yaml.safe_load(file.read_text())
    parent = given.pop("extends", None)
    base = load_profile(parent) if parent else Profile(name="defaults")
    for section in ("images", "curation", "rl", "prism"):
        for key, value in given.get(section, {}).items():
            assert value != getattr(getattr(base, section), key), f"{section}.{key} repeats the default"


def test_every_setting_says_where_it_comes_from():
    for key, source in walk(Profile):
        if key != "name" and not key.endswith(".path"):
            assert source.startswith(SOURCES), f"{key}: {source!r}"
    for role, field in Models.model_fields.items():
        assert field.description.startswith(SOURCES), role


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"rl.lerning_rate": 1}, ["unknown key rl.lerning_rate", "did you mean rl.learning_rate?"]),
        ({"rl": {"reward": "qa_expectd"}}, ["rl.reward: 'qa_expectd'", "did you mean qa_expected?"]),
        ({"group_size": 3}, ["unknown key group_size", "did you mean rl.group_size?"]),
        ({"rl.group_size": 1}, ["rl.group_size: 1", "greater than or equal to 2"]),
        ({"models.polcy.path": "x"}, ["unknown key models.polcy", "did you mean models.policy?"]),
        ({"models.policy.backend": "endpoint"}, ["models.policy", "needs base_urls"]),
        ({"rl.steps": "many"}, ["rl.steps: 'many'"]),
        ({"rl.num_images": 1}, ["rl: num_images 1 is below prompts_per_step"]),
        ({"zzzz": 3}, ["unknown key zzzz", "valid keys here: name, description"]),
    ],
)
def test_bad_setting_is_named(overrides, expected):
    with pytest.raises(UserError) as error:
        load_profile("smoke", overrides)
    for text in ["configs/profiles/smoke.yaml", *expected]:
        assert text in str(error.value)


def _write(folder: Path, text: str) -> str:
    file = folder / "own.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "key 'seed' stands twice"),
        ("rl: [1\n", r"own\.yaml is not valid YAML"),
        ("- rl\n", "expected `key: value` lines, found list"),
        ("extends: FILE\n", "goes round in a circle"),
    ],
)
def test_a_file_that_is_no_profile_is_told(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_profile(_write(tmp_path, text.replace("FILE", str(tmp_path / "own.yaml"))))


def test_another_model_does_not_inherit_the_papers_server():
    assert load_profile("paper").models.question_writer.backend == "endpoint"
    writer = load_profile("mini").models.question_writer
    assert writer.backend == "local" and writer.base_urls == []


def test_hash_follows_what_changes_outputs_and_nothing_else():
    base = load_profile("smoke")
    changed = {key: load_profile("smoke", {key: 9}).content_hash() for key in ("rl.steps", "rl.save_every")}
    assert changed["rl.steps"] != base.content_hash() == changed["rl.save_every"]


def test_values_from_the_command_line_reach_every_process(monkeypatch):
    monkeypatch.setenv("CAPRL_SET", "rl.steps=7\nrl.learning_rate=1e-5")
    profile = load_profile("smoke", {"rl.group_size": 6})
    assert (profile.rl.steps, profile.rl.learning_rate, profile.rl.group_size) == (7, 1e-5, 6)
    with pytest.raises(UserError, match="expected name=value"):
        config.parse_overrides(["rl.steps"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rewards: {}", r"bad.yaml:\n  unknown key rewards .*did you mean reward\?"),
        ("training: {vision_towr: false}", r"unknown key training.vision_towr .*training.vision_tower\?"),
        ("reward: {terms: {qa: much}}", r"reward.terms.qa: 'much': "),
        ("rl: {betta: 1}", r"bad.yaml, section rl, over profile mini: .*unknown key rl.betta.*rl.beta\?"),
        ("data: {num_images: 0}", r"data.num_images.*: 0: "),
        ("training: {lora: {ranks: 1}}", r"unknown key training.lora.ranks .*training.lora.rank\?"),
        ("extends: papr", r"no experiment 'papr'; did you mean paper\?"),
    ],
)
def test_mistakes_in_an_experiment_are_named(text, message, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"(?s){message}"):
        load_experiment(str(file), "mini")


def test_the_command_line_wins_over_an_experiment(monkeypatch):
    monkeypatch.setenv("CAPRL_SET", "training.lora.rank=8\nrl.rounds=2")
    experiment, resolved = load_experiment("caprl", "smoke")
    assert (experiment.training.lora.rank, resolved.rl.rounds) == (8, 2)
    monkeypatch.setenv("CAPRL_SET", "training.lra.rank=8")
    with pytest.raises(UserError, match=r"--set:\n  unknown key training.lra .*training.lora\?"):
        load_profile("smoke")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("architecture: lava", r"own.yaml:\n.*architecture: 'lava'.*did you mean llava\?"),
        ("vision: {path: ''}", r"vision.path: "),
        ("visin: {}", r"unknown key visin .*did you mean vision\?"),
        ("rename_tokens: {a: b}", "rename_tokens belongs"),
        ("extends: qwen2.5-3", r"no assembly 'qwen2.5-3'; did you mean qwen2.5-3b\?"),
        ("description: a\ndescription: b", "key 'description' stands twice"),
    ],
)
def test_mistakes_in_an_assembly_are_named(text, message, tmp_path):
    text = text if "extends" in text else f"extends: mini-qwen-3b\n{text}"
    with pytest.raises(UserError, match=f"(?s){message}"):
        load_assembly(_write(tmp_path, text))
    found = load_assembly("mini-qwen-3b", {"vision.revision": "main"})
    assert (found.name, found.vision.path, found.vision.revision) == ("mini-qwen-3b", "zoo:base", "main")


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
    environment = {**os.environ, "PYTHONPATH": str(site.parent)}
    del environment["CAPRL_RUNS"]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True, check=True
    )
    runs = f"{work}/runs"
    assert done.stdout.split() == ["mini", runs, f"{runs}/mini/reports", "None", "runs/x", "False"]
