"""From image sets to checked data files, with captions that a test wrote and a counter of words."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.pretraining import chain, launch, prepare, sets
from caprl_utils.pretraining.data import read_examples
from caprl_utils.pretraining.sets import Training


class Counter:
    """A token a word and 25 an image."""

    def image_tokens(self, width, height):
        return 25

    def text_tokens(self, example):
        return sum(len(message.content.split()) for message in example.messages)


@pytest.fixture
def profile():
    return load_profile("smoke", {"pretraining": {"further": {"num_rows": 10, "num_rows_large": 15, "growth": [0.5]},
                                                  "align": {"num_rows": 10}, "sft": {"num_rows": 10}}})  # fmt: skip


@pytest.fixture
def captioned(monkeypatch, tmp_path):
    """Captions of every rendered set, each naming its image and who wrote it; the first one is empty."""
    from caprl_utils.mini.source import images

    def caption(profile, pairs_name):
        split, total, seed = prepare.image_source(profile, pairs_name.split("-by-")[0]).split(":")[1:]
        rows = [{"image_id": found[0], "caption": f"{pairs_name} {found[0]}"} for found in
                images(split, int(total), None, int(seed))]  # fmt: skip
        rows[0]["caption"] = " "
        file = tmp_path / f"{pairs_name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file

    monkeypatch.setattr(prepare, "caption", caption)
    monkeypatch.setattr(prepare, "_counters", lambda profile, models: dict.fromkeys(models, Counter()))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return {"mini-qwen-3b": model}


def test_every_data_set_is_written_and_a_smaller_one_is_part_of_the_larger(profile, captioned):
    trainings = sets.wanted(profile.pretraining)
    made = prepare.prepare(profile, trainings, captioned)
    found = made.record["values"]["data_sets"]
    assert set(found) == {prepare.dataset_of(t) for t in trainings}
    rows = {name: read_examples(made.folder / f"{name}.jsonl") for name in found}
    assert len(rows["align"]) == len(rows["sft"]) == 10
    half, full = ({row.images for row in rows[name]} for name in ("caprl-1m-x0.5", "caprl-1m"))
    assert half < full
    assert all((made.media / image).is_file() for name in rows for row in rows[name] for image in row.images)
    for row in rows["densefusion-1m"]:
        assert row.messages[1].content == f"densefusion-by-densefusion {row.id}"
        assert row.messages[0].content.startswith("<image>Please describe")
    assert len(rows["sft"][0].messages) > 2 and "The answer is" in rows["sft"][0].messages[1].content
    everything = [
        image for row in (*rows["align"], *rows["sft"], *rows["densefusion-1m"]) for image in row.images
    ]
    assert len(set(everything)) == len(everything)
    again = prepare.prepare(profile, trainings, captioned)
    assert again.record == made.record
    given = made.inputs(trainings[0], captioned["mini-qwen-3b"])
    assert (given.dataset, given.num_rows, given.data_hash) == ("align", 10, found["align"]["hash"])


def test_a_row_over_the_limit_stops_before_any_training(profile, captioned):
    short = profile.model_copy(
        update={"pretraining": profile.pretraining.model_copy(update={"cutoff_tokens": 30})}
    )
    with pytest.raises(UserError, match=r"data set \w+: \d+ of 10 rows .* tokens .* over the cutoff 30"):
        prepare.prepare(short, sets.wanted(short.pretraining), captioned)


def test_files_of_a_user_are_read_and_missing_ones_named(profile, captioned, tmp_path):
    given = profile.pretraining.model_copy(
        update={
            "align": profile.pretraining.align.model_copy(
                update={"data": str(tmp_path / "blip.json"), "num_rows": 1}
            ),
            "media_folder": str(tmp_path / "media"),
        }
    )
    own = profile.model_copy(update={"pretraining": given})
    training = Training("a", "mini-qwen-3b", "align", None)
    with pytest.raises(UserError, match=r"no data file .*blip\.json \(pretraining\.align\.data\)"):
        prepare.prepare(own, [training], captioned)
    row = {"id": 3, "image": "x.png", "conversations": [{"from": "human", "value": "<image>?"},
                                                       {"from": "gpt", "value": "A cat."}]}  # fmt: skip
    (tmp_path / "blip.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match="row 3: no image"):
        prepare.prepare(own, [training], captioned)


def test_without_the_trained_captioner_its_notebook_is_named(profile):
    with pytest.raises(UserError, match="make 03_caprl_rl_training PROFILE=smoke"):
        prepare._captioner(profile, sets.CAPRL)
    assert prepare._captioner(profile, "densefusion").path == "zoo:vlm-7b"


def test_trainings_wait_for_their_start_and_run_side_by_side(profile):
    done, most, running = [], 0, set()

    def make(training):
        nonlocal most
        running.add(training.name)
        most = max(most, len(running))
        assert training.start is None or training.start in done
        running.remove(training.name)
        done.append(training.name)
        return {}

    records = {}
    trainings = sets.wanted(profile.pretraining)
    chain._in_order(trainings, make, 2, records)
    assert set(records) == {t.name for t in trainings} and most <= 2


def test_a_failed_training_stops_the_rest():
    def make(training):
        raise UserError(f"{training.name} failed")

    with pytest.raises(UserError, match="align failed"):
        chain._in_order(
            [Training("s-align", "s", "align", None), Training("s-sft", "s", "sft", "s-align")], make, 1, {}
        )


def test_nodes_must_know_who_they_are(monkeypatch, tmp_path):
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    paper = load_profile("paper")
    with pytest.raises(UserError, match="NODE_RANK"):
        launch.environment(paper, tmp_path)
    for name, value in (("NODE_RANK", "1"), ("MASTER_ADDR", "host"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    found = launch.environment(paper, tmp_path)
    assert (found["NNODES"], found["NPROC_PER_NODE"], found["FORCE_TORCHRUN"]) == ("2", "8", "1")
    assert str(launch.SITE) in found["PYTHONPATH"]


def test_side_by_side_on_a_cpu_the_threads_are_shared(tmp_path):
    assert launch.environment(load_profile("mini"), tmp_path)["OMP_NUM_THREADS"] == "1"


def test_a_notebooks_way_of_plotting_stays_in_the_notebook(tmp_path):
    assert launch.environment(load_profile("mini"), tmp_path)["MPLBACKEND"] == "Agg"


def test_without_its_environment_make_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "ENVIRONMENT", tmp_path)
    with pytest.raises(UserError, match="make setup-llamafactory"):
        launch.command(tmp_path / "train.yaml")
