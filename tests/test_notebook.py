"""The third cell of a notebook: what it prints, what it prepares, what it refuses."""

import base64
import io
import os
import re
import sys
from unittest.mock import patch

import nbformat
import pandas as pd
import pytest
from PIL import Image

from caprl_utils import notebook, paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.files import write_json


@pytest.fixture(autouse=True)
def clean_environment():
    """`start` sets environment variables for the kernel it runs in."""
    with patch.dict(os.environ):
        yield


def test_start_prints_five_lines_and_lists_settings_folded(capsys):
    context = notebook.start("smoke", seed=3, show=("rl.steps", "models.policy"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "HTML" not in line]
    heads = ("profile   smoke", "made for", "seed      3", "commit    ", "versions  python")
    assert len(lines) == 5 and all(map(str.startswith, lines, heads)) and str(paths.ROOT) not in "".join(lines)
    shown = notebook.settings(context.profile, ("rl.steps", "models.policy"))
    assert any(line.split() == ["rl.steps", str(context.profile.rl.steps)] for line in shown)
    assert any("models.policy.path" in line for line in shown) and "None" not in "".join(shown)


def test_a_table_formats_by_kind():
    rows = {"n": 12345, "share": 0.98765, "none": None, "nan": float("nan"), "text": "<b>", "yes": True}
    shown = notebook.table([rows], decimals=2).data
    for text in (">12,345<", ">0.99<", "&lt;b&gt;", ">yes<"):
        assert text in shown, text
    nested = pd.DataFrame([[1]], pd.MultiIndex.from_tuples([("base", "chart")], names=["who", "what"]), ["count"])
    assert "who" not in notebook.table(nested).data
    assert shown.count(">–<") == 2 and notebook.saw("a", "b").data == "- a\n- b"


def executed(**outputs) -> str:
    """A notebook as papermill leaves it, with these outputs of one cell."""
    picture = io.BytesIO()
    Image.effect_noise((400, 300), 90).convert("RGB").save(picture, format="PNG")
    png = base64.b64encode(picture.getvalue()).decode()
    bar = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"}
    figure = {"image/png": png, "image/jpeg": png, "text/plain": "figure"}
    found = [nbformat.v4.new_output("display_data", data) for data in (bar, figure)]
    found += [nbformat.v4.new_output("stream", name=name, text=text) for name, text in outputs.items()]
    cell = nbformat.v4.new_code_cell("1", outputs=found, metadata={"papermill": {"duration": 3.2}})
    made = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {"start_time": "now"}})
    made.metadata |= {"kernelspec": {"name": "python3", "display_name": "Python"}, "language_info": {"name": "python"}}
    return nbformat.writes(made)


def test_published_copies_are_light(runs_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPORTS", tmp_path / "reports")
    folder = runs_folder / "smoke" / "notebooks"
    folder.mkdir(parents=True)
    (folder / "03_training-with_ablations-True.ipynb").write_text(text := executed(stdout="told", stderr="noise"))
    for other in ("03_training", "04_prism.failed", "04_prism-seed-1"):
        (folder / f"{other}.ipynb").write_text(executed(stdout="other"))
    published = notebook.publish(load_profile("smoke"))
    assert published == [folder / "03_training.html"] and published[0].is_file()
    small = (tmp_path / "reports" / "smoke" / "notebooks" / "03_training.ipynb").read_text()
    assert len(small) < len(text) / 2 and "told" in small and "other" not in small and "figure" in small
    assert not any(word in small for word in ("papermill", "widget", "jpeg", "noise"))
    (folder / "05_large.ipynb").write_text(executed(stdout="x" * 300_000))
    with pytest.raises(UserError, match=r"05_large.ipynb would have \d{3} kB, more than 250"):
        notebook.publish(load_profile("smoke"))


@pytest.mark.parametrize(
    ("profile", "any_model", "spared"), [("smoke", False, True), ("smoke", True, False), ("paper", False, False)]
)
def test_off_the_hub_no_mistral_common_is_imported_unless_any_model_may_come(profile, any_model, spared):
    with patch.dict(sys.modules):
        for name in ("transformers", "mistral_common"):
            sys.modules.pop(name, None)
        notebook.prepare_process(load_profile(profile), any_model)
        assert (sys.modules.get("mistral_common", "importable") is None) == spared


def test_start_prepares_the_process_and_only_offline_profiles_lose_the_hub():
    os.environ.pop("HF_HUB_OFFLINE", None)
    notebook.prepare_process(load_profile("paper"))
    assert "HF_HUB_OFFLINE" not in os.environ
    notebook.prepare_process(load_profile("smoke", {"torch_threads": 3}))
    assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ["OMP_NUM_THREADS"] == "3"


def test_a_missing_input_names_the_target_that_makes_it(runs_folder):
    told = "rl/policy is missing; make it: make 03_caprl_rl_training PROFILE=smoke"
    with pytest.raises(UserError, match=told):
        notebook.start("smoke", needs={"rl/policy": "03_caprl_rl_training"})
    write_json(runs_folder / "smoke" / "rl" / "policy" / "result.json", {})
    notebook.start("smoke", needs={"rl/policy": "03_caprl_rl_training"})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        *(({"seed": seed}, "parameter seed") for seed in (-1, "0", 1.0, True)),
        ({"show": ["rl.stepz"]}, "no setting 'rl.s"),
    ],
)
def test_a_bad_seed_and_an_unknown_setting_to_show_are_named(given, told):
    with pytest.raises(UserError, match=told):
        notebook.start("smoke", **given)


@pytest.mark.parametrize("file", sorted(paths.REPORTS.glob("*/notebooks/*.ipynb")), ids=lambda file: file.stem)
def test_what_is_published_can_be_read_unrun(file):
    """Small, whole, without errors, library noise, and paths of the machine that ran it."""
    text = file.read_text(encoding="utf-8")
    assert len(text) <= 1000 * notebook.MOST_KB and (paths.NOTEBOOKS / file.name).is_file()
    assert not re.search(r"/(?:root|home|tmp|work|Users)/", re.sub(r"base64,[\w+/=]+|\"image/png\": .*", "", text))
    code = [cell for cell in nbformat.reads(text, 4).cells if cell.cell_type == "code"]
    told = [output for cell in code for output in cell.outputs]
    assert all(cell.execution_count is not None for cell in code)
    assert not [one for one in told if one.output_type == "error" or one.get("name") == "stderr"]
    printed = "".join(one.get("text", "") for one in told)
    assert "all checks passed" in printed and not re.search(r"\d\.\d{7}|<Figure size|Warning:", printed)
