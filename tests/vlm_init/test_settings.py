"""Every assembly that the profile mini pretrains can be made of the models that are shipped."""

import pytest

from caprl_utils.config import load_profile
from caprl_utils.vlm_init.assembly import assemble


@pytest.mark.parametrize("name", load_profile("mini").pretraining.settings)
def test_it_can_be_made(name, tmp_path):
    assert assemble(name, tmp_path / name)["projector_checksum"]
