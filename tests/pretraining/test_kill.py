"""`kill -9` in the middle, of both architectures and both kinds of stages: what goes on ends with the same weights."""

import contextlib
import threading
import time

import psutil
import pytest

from caprl_utils.errors import UserError
from caprl_utils.hashing import file_hash
from caprl_utils.pretraining import llamafactory
from caprl_utils.pretraining.sets import Training, folder_of
from caprl_utils.vlm_init.assembly import assemble
from tests.pretraining.conftest import REAL, STEPS, small_profile

pytestmark = REAL
KILLED_AT = 4


@pytest.mark.parametrize(("setting", "name"), [("mini-qwen-3b", "align"), ("mini-internlm-clip", "sft")])
def test_killed_in_the_middle_it_ends_with_the_same_weights(setting, name, rows, tmp_path):
    model, profile = tmp_path / "model", small_profile()
    assemble(setting, model, 0)
    whole, killed = (Training(f"{kind}-{name}", setting, name) for kind in ("undisturbed", "killed"))
    homes = [folder_of(profile, training.name) for training in (whole, killed)]

    undisturbed = llamafactory.train(profile, whole, model, rows)
    killer = threading.Thread(target=kill_at, args=(homes[1] / "work", KILLED_AT))
    killer.start()
    with pytest.raises(UserError, match="llamafactory-cli ended"):
        llamafactory.train(profile, killed, model, rows)
    killer.join()
    resumed = llamafactory.train(profile, killed, model, rows)

    assert "/checkpoint-" in (homes[1] / "train.yaml").read_text()
    assert resumed["values"] == undisturbed["values"] and resumed["values"]["steps"] == STEPS
    assert len({file_hash(home / "final" / "model.safetensors") for home in homes}) == 1
    moved = resumed["values"]["moved"]
    assert (moved["language_model"] > 0) == (name != "align") and moved["projector"] > 0
    assert not (homes[1] / "work").exists()


def kill_at(work, step):
    """`kill -9` LLaMA-Factory once the checkpoint of this step is begun."""
    while not (work / f"checkpoint-{step}" / "trainer_state.json").exists():
        time.sleep(0.02)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # the training dies with the server that it is a fork of
            if "llamafactory.train.tuner" in child.cmdline():
                child.kill()
