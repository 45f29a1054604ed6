"""Cards of finished models and data: what the records say, in the format of the hub."""

from functools import partial
from unittest.mock import call, create_autospec

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, ModelCard
from typer.testing import CliRunner

from caprl_utils import paths
from caprl_utils.__main__ import app
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.reports import cards
from caprl_utils.runs import Run, load_result
from tests.reports.finished import RECIPE


@pytest.fixture
def captioner(profile, trained):
    """A training of the mini world and its evaluation; returns the run's folder."""
    trained("caprl", right=14, images=318)
    return paths.RUNS / profile.name / "rl" / "caprl-seed0"


@pytest.fixture
def made(profile):
    """The last stage of a pretraining, a curation, and a set of three captions of two images: folders and file."""
    with Run.open(profile, "pretraining", "mini-qwen-3b-vanilla-sft", {"data": "d"}, RECIPE) as vlm:
        (vlm.folder / "final").mkdir()
        vlm.finish(
            values={"steps": 9}, n=100, unit="row", setting="mini-qwen-3b", training_stage="sft", captions=None,
            start="runs/mini/pretraining/mini-qwen-3b-align/final", trains=["projector"],
        )  # fmt: skip
    values = {
        "images_read": 320, "images_kept": 318, "questions_kept": 902, "questions_extracted": 1245,
        "verdicts": {"kept": 902, "answered without the image": 291},
    }  # fmt: skip
    with Run.open(profile, "curation", "main", {}, RECIPE) as questions:
        questions.finish(values=values, n=1245, unit="question")
    row = {"image_id": "a", "num_tokens": 10, "finish_reason": "stop", "looped": False, "model": "zoo:base"}
    row["model_hash"] = "abc"
    rows = [row, row | {"num_tokens": 20}, row | {"image_id": "b", "num_tokens": 30, "looped": True}]
    file = paths.RUNS / profile.name / "pretraining" / "captions" / "sharegpt4v-by-caprl.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
    return vlm.folder, questions.folder, file


def test_everything_finished_gets_its_card_beside_it(profile, captioner, made):
    vlm, questions, captions = made
    with Run.open(profile, "rl", "short-seed0", {}, RECIPE):
        pass  # not finished
    before = (captioner / "result.json").read_bytes()
    folders = (questions, captioner, captioner.with_name("caprl-seed1"), vlm)
    files = [*(folder / "README.md" for folder in folders), captions.with_name("sharegpt4v-by-caprl.md")]
    assert cards.write_all(profile) == files
    assert not (vlm / "final" / "README.md").exists()  # a file in there would change the model's key
    assert (captioner / "result.json").read_bytes() == before
    told = {
        vlm / "README.md": ("Not evaluated.", "configs/vlm_init/mini-qwen-3b.yaml", "sft; trained: projector"),
        questions / "README.md": (
            "318 kept of 320", "902 kept of 1,245", "answered without the image 291", "`zoo:strong`",
        ),
        files[-1]: ("3 of 2 images", "`zoo:base` (abc)", "20.0", "a loop 1, stop 2"),
    }  # fmt: skip
    for file, parts in told.items():
        assert [part for part in parts if part not in file.read_text()] == []
    assert ModelCard((vlm / "README.md").read_text()).data.eval_results is None


def test_a_captioner_s_card_tells_base_data_steps_seeds_scores_limits_and_its_licence(profile, captioner):
    text = cards.model_card(profile, captioner)
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-to-text"
    assert card.data.base_model is None  # zoo models are not on the hub
    scores = {result.dataset_type: result.metric_value for result in card.data.eval_results}
    assert scores == {"mini-chart": 70.0, "mini-scene": 70.0}
    for part in ("`zoo:base`", "318 images of", "12, 8 captions per image", "**Seeds:** 0",
                 "| Mini Chart | 70.0 [", "## Limits", load_result(captioner)["key"][:16]):  # fmt: skip
        assert part in text, part
    assert str(paths.RUNS) not in text and "None" not in text
    real = profile.model_copy(update={"models": load_profile("paper").models})
    card = ModelCard(cards.model_card(real, captioner))
    assert card.data.base_model == real.models.policy.path and card.data.license == "other"
    assert "licences of the base model" in str(card)


def test_a_captioner_goes_to_the_hub_with_its_card_and_a_refusal_shows_before_the_training(
    profile, captioner, monkeypatch
):
    hub, trained = create_autospec(HfApi, instance=True), []
    hub.upload_file.return_value = "https://huggingface.co/me/captioner/commit/1"
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("caprl_utils.rl.experiments.run_all", lambda *asked: trained.append(asked) or [])
    caprl, to = partial(CliRunner().invoke, app, catch_exceptions=False), {"repo_id": "me/captioner"}
    told = caprl(["train", "caprl", "--profile", profile.name, "--push-to-hub", "me/captioner"]).stdout
    assert told.endswith("caprl-seed0: https://huggingface.co/me/captioner/commit/1\n") and len(trained) == 1
    card, message = cards.model_card(profile, captioner).encode(), {"commit_message": f"{profile.name} caprl-seed0"}
    assert hub.method_calls == [
        call.create_repo(**to, private=True, exist_ok=True),
        call.upload_folder(**to, folder_path=captioner / "final", **message),
        call.upload_file(**to, path_or_fileobj=card, path_in_repo="README.md", **message),
    ]
    hub.create_repo.side_effect = PermissionError("403 Forbidden")
    with pytest.raises(UserError, match=r"nobody/there failed: 403 Forbidden\nLog in by `hf auth login`"):
        caprl(["train", "--profile", profile.name, "--push-to-hub", "nobody/there"])
    assert len(trained) == 1
