"""The package as a wheel: whole, and usable from any folder of a machine that has no checkout."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest

from caprl_utils import paths

UV = paths.ROOT / ".tools" / "bin" / "uv"


def test_the_written_list_of_packages_is_whole():
    written = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent for file in (paths.ROOT / "caprl_utils").rglob("*.py")}
    names = {".".join(folder.relative_to(paths.ROOT).parts) for folder in folders}
    assert set(written) == names | {"caprl_utils.configs", "caprl_utils.reports.paper"}


@pytest.fixture(scope="module")
def caprl(tmp_path_factory):
    """The command of a wheel in an environment of its own, run from an empty folder."""
    if not UV.exists():
        pytest.skip("no uv: make setup")
    home = tmp_path_factory.mktemp("wheel")
    source, venv, lock = home / "source", home / "venv", paths.ROOT / "requirements" / "main-cpu.lock"
    subprocess.run(["git", "clone", "-q", str(paths.ROOT), str(source)], check=True)  # the build writes beside sources
    subprocess.run([UV, "build", "-q", "--wheel", "-o", str(home), str(source)], check=True)
    subprocess.run([UV, "venv", "-q", "--python", sys.executable, str(venv)], check=True)
    wheels = map(str, home.glob("*.whl"))
    subprocess.run([UV, "pip", "install", "-q", "--python", str(venv), "-c", str(lock), *wheels], check=True)
    (home / "elsewhere").mkdir()

    def call(*arguments: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CAPRL_RUNS")}
        done = subprocess.run(
            [venv / "bin" / "caprl", *arguments], cwd=home / "elsewhere", env=environment,
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    call.folder = home / "elsewhere"
    return call


@pytest.mark.integration
@pytest.mark.timeout(1800)
def test_a_folder_is_captioned_and_a_captioner_scored_from_any_folder(caprl):
    from caprl_utils.registry import drawn_source

    images = caprl.folder / "my images"
    images.mkdir()
    for number in range(4):
        _, image, _, _ = drawn_source("mini-world").image_at("rl", number, None, 0)
        image.save(images / f"{number}.png")
    caprl("caption", str(images), "--model", "zoo:strong", "--out", "captions.parquet", "--max-tokens", "64")
    captions = pd.read_parquet(caprl.folder / "captions.parquet")
    assert len(captions) == 4 and captions["caption"].str.len().min() > 0

    told = caprl("score", "zoo:strong", "--benchmark", "mini-chart", "--profile", "smoke")
    assert "mini-chart" in told
    assert Path(caprl.folder / "runs").is_dir()
    caprl("report")  # of the paper's values alone: they are in the wheel
