"""An assembled model is the same in LLaMA-Factory's environment, and says the same when vLLM serves it."""

import json
import subprocess

import pytest
import torch

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.mini.render import render
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.world import picture
from caprl_utils.models import server
from caprl_utils.models.base import Request, Sampling, open_backend
from caprl_utils.models.endpoint import EndpointBackend
from caprl_utils.prompts import CAPTION
from caprl_utils.schema import ModelConfig
from caprl_utils.vlm_init.assembly import assemble
from tests.vlm_init.conftest import PADDED, loaded, tied_setting

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
PYTHON = paths.ROOT / ".venv-llamafactory" / "bin" / "python"
TWIN = """
import json, sys
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)  # as here
folder, inputs, out = sys.argv[1:]
given = torch.load(inputs, weights_only=True)
model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
AutoProcessor.from_pretrained(folder)
with torch.no_grad():
    logits = [model.eval()(input_ids=given["ids"], attention_mask=given[m]).logits for m in ("ones", "mask")]
model.save_pretrained(out)
torch.save(logits, f"{out}/logits.pt")
print(json.dumps({k: sorted(map(str, report[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")}))
"""


@pytest.fixture(scope="module", params=["qwen", "qwen-tied", "llava"])
def folder(request, qwen_setting, llava_setting, vision_donor, tmp_path_factory):
    """A model: a head of its own (the paper's 7B), tied to the embeddings (its 3B), and a LLaVA."""
    home = tmp_path_factory.mktemp("out")
    settings = {"qwen": qwen_setting, "llava": llava_setting}
    setting = settings.get(request.param) or tied_setting(vision_donor, home)
    assemble(setting, home / "out", seed=5)
    return home / "out"


@pytest.mark.skipif(not PYTHON.exists(), reason="no LLaMA-Factory environment: make setup-llamafactory")
def test_both_environments_load_and_save_the_same_model(folder, tmp_path):
    ids = torch.randint(9, len(shared_tokenizer()), PADDED.shape, generator=torch.Generator().manual_seed(0))
    masks = {"ones": torch.ones_like(PADDED), "mask": PADDED}
    torch.save({"ids": ids, **masks}, tmp_path / "inputs.pt")
    command = [str(PYTHON), "-c", TWIN, str(folder), str(tmp_path / "inputs.pt"), str(tmp_path / "saved")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not any(json.loads(run.stdout.splitlines()[-1]).values()), run.stdout
    theirs = torch.load(tmp_path / "saved" / "logits.pt", weights_only=True)
    for model in (loaded(folder), loaded(tmp_path / "saved")):
        for logits, mask in zip(theirs, masks.values(), strict=True):
            with torch.no_grad():
                ours = model(input_ids=ids, attention_mask=mask).logits
            assert torch.equal(ours[mask.bool()], logits[mask.bool()])


@pytest.mark.parametrize("folder", ["qwen-tied", "llava"], indirect=True)  # tests/models serves an untied one
def test_vllm_and_transformers_write_the_same_greedy_text(folder, tmp_path):
    model = ModelConfig(path=str(folder), batch_size=8)
    requests = [Request(f"image-{n}", CAPTION, render(picture("benchmark", n))) for n in range(3)]
    requests.append(Request("blind", "What is the topic?"))
    sampling = Sampling(max_tokens=16)
    with server.serve(model, None, server.Options(max_model_len=512), tmp_path / "server.log") as running:
        served = EndpointBackend(running.config).generate(requests, sampling)
    assert served == open_backend(model, load_profile("smoke")).generate(requests, sampling)
    assert all(completion.text for completion in served)
