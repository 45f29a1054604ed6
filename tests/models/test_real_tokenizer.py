"""With the real tokenizer and image processor: letters, frame, images, captions, curation, assembly, a vLLM server."""

import pandas as pd
import pytest
from PIL import Image

from caprl_utils.captions.job import caption_source
from caprl_utils.config import load_assembly, load_profile
from caprl_utils.curation import pipeline
from caprl_utils.errors import UserError
from caprl_utils.models import server
from caprl_utils.models.base import Request, Sampling, open_backend
from caprl_utils.models.endpoint import EndpointBackend
from caprl_utils.schema import Donor, ModelConfig
from caprl_utils.vlm_init.assembly import assemble, verify_tensors

LETTERS = [f" {letter}" for letter in "ABCDEFGHI"]


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures as people have them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate([(320, 240), (200, 300), (64, 64)]):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{number}.jpg")
    Image.new("RGBA", (90, 60)).save(folder / "clear.png")
    return folder


@pytest.fixture(scope="module")
def vlm(qwen_vlm, profile):
    return open_backend(ModelConfig(path=str(qwen_vlm)), profile)


def test_letters_and_frame_of_a_reader(qwen_reader, profile):
    backend = open_backend(ModelConfig(path=str(qwen_reader)), profile)
    request = Request("x", "What?", prefill="The answer is")
    text = backend.loaded.prompt_text(request)
    assert text.startswith("<|im_start|>system\nYou are Qwen") and text.endswith("assistant\nThe answer is")
    assert backend.loaded.choice_ids(LETTERS)[:2] == [362, 425]
    (row,) = backend.choice_logprobs([request], LETTERS)
    assert len(row) == 9 and all(value < 0 for value in row)


def test_an_image_is_seen_within_the_limit(vlm):
    inputs = vlm.loaded.encode([Request("x", "Describe.", Image.new("RGB", (640, 480), "red"))])
    assert (inputs["input_ids"] == 151_655).sum() == 23 * 17
    large = vlm.loaded.encode([Request("x", "Describe.", Image.new("RGBA", (4000, 3000)))])
    assert 1200 < (large["input_ids"] == 151_655).sum() <= 1280  # 15,301 without a limit
    assert large["pixel_values"].min() > 1.9  # transparent is white


def test_a_folder_is_captioned(vlm, photos, tmp_path):
    out = tmp_path / "captions.parquet"
    made = caption_source(photos, out, vlm, Sampling(max_tokens=6, temperature=1.0))
    assert made.captions == len(pd.read_parquet(out)) == 4 and not made.bad and not made.failed


def test_a_folder_is_curated_though_a_random_writer_writes_nothing(qwen_vlm, photos):
    model = {"path": str(qwen_vlm), "backend": "local"}
    profile = load_profile("smoke", {
        "images": {"source": str(photos), "num_images": 2, "kinds": None}, "curation.max_tokens": 8,
        "models": {"question_writer": model, "question_filter": model}, "curation.max_bad_share": 1.0,
    })  # fmt: skip
    job = pipeline.open_job(profile, 0, [])
    with job.run, pytest.raises(UserError, match="kept none of 0 questions"):
        pipeline.curate(job)


@pytest.mark.integration
def test_a_vlm_is_put_together_and_loads_again(qwen_reader, qwen_vlm, tmp_path, profile):
    """The paper's setting with folders in the hub's layout in the place of the hub's models."""
    donors = {"language": Donor(path=str(qwen_reader)), "vision": Donor(path=str(qwen_vlm))}
    record = assemble(load_assembly("qwen2.5-3b", donors), tmp_path / "vlm")
    assert record["max_image_tokens"] == 1024 and record["end_token_ids"] == [151_645, 151_643]
    assert all(verify_tensors(tmp_path / "vlm").values())
    backend = open_backend(ModelConfig(path=str(tmp_path / "vlm")), profile)
    (done,) = backend.generate([Request("x", "What?", Image.new("RGB", (90, 60)))], Sampling(max_tokens=3))
    assert done.error is None


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_a_server_answers_as_this_process_and_refuses_one_image_alone(qwen_vlm, profile):
    config, options = ModelConfig(path=str(qwen_vlm)), server.Options(max_model_len=4096)
    photo = Image.effect_noise((640, 480), 90).convert("RGB")
    asked = [Request("photo", "Describe.", photo), Request("large", "Describe.", photo.resize((4000, 3000))),
             Request("blind", "What is it?", None, "The answer is"),
             Request("strip", "Describe.", Image.new("RGB", (2500, 10)))]  # fmt: skip
    local = open_backend(config, profile)
    sampling = Sampling(max_tokens=24, temperature=1.5, repetition_penalty=1.1, n=2, seed=3)
    with server.serve(config, options=options) as running:
        served = EndpointBackend(running.config)
        assert served.generate(asked, sampling) == served.generate(asked, sampling)
        rows = [served.choice_logprobs(asked, LETTERS), local.choice_logprobs(asked, LETTERS)]
        texts = [one.generate(asked, Sampling(max_tokens=12)) for one in (served, local)]
    assert rows[0][3] is rows[1][3] is None
    for ours, theirs in zip(*(found[:3] for found in rows), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)
    assert [c.text for c in texts[0]] == [c.text for c in texts[1]] and texts[0][3].error
