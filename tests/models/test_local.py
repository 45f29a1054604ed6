"""The backend in this process, on fresh random models with the real processors."""

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from caprl_utils import prompts
from caprl_utils.errors import UserError
from caprl_utils.models import Request, Sampling, open_backend
from caprl_utils.schema import ModelConfig

LETTERS = [" A", " B", " C", " D"]


def image(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 255, (70, 70, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((280, 280))


@pytest.fixture(scope="module")
def vlm(vlm_folder, profile):
    return open_backend(ModelConfig(path=str(vlm_folder), batch_size=8), profile)


@pytest.fixture(scope="module")
def reader(reader_folder, profile):
    return open_backend(ModelConfig(path=str(reader_folder), batch_size=8), profile)


def mixed_requests() -> list[Request]:
    """With and without image, short and long, in no order."""
    return [
        Request("caption", prompts.CAPTION, image(0)),
        Request("blind", prompts.look_question("What is the topic?")),
        Request("long", prompts.look_question("What is the value of Rome? " * 4, ["21", "24"]), image(1)),
        Request("answer", prompts.look_question("What is the figure?"), image(0), prompts.ANSWER_PREFILL),
    ]


def test_completions_come_in_the_order_asked(vlm):
    requests = mixed_requests()
    completions = vlm.generate(requests, Sampling(max_tokens=5, temperature=1.0, n=2))
    assert [(c.id, c.index) for c in completions] == [(r.id, i) for r in requests for i in range(2)]
    assert all(c.error is None and c.num_tokens <= 5 for c in completions)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neighbours_do_not_change_a_completion(vlm, temperature):
    sampling = Sampling(max_tokens=8, temperature=temperature, repetition_penalty=1.1, seed=3)
    together = vlm.generate(mixed_requests(), sampling)
    alone = [vlm.generate([request], sampling)[0] for request in mixed_requests()]
    assert together == alone


def test_an_image_shown_often_is_seen_once(vlm):
    first, second = image(0), image(1)
    questions = [prompts.look_question(f"What is the {key}?") for key in ("topic", "figure", "name")]
    shared = [Request(f"{q}{k}", q, i) for k, i in enumerate((first, second)) for q in questions]
    sizes = []
    tower = vlm.loaded.model.model.visual
    hook = tower.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    together = vlm.choice_logprobs(shared, LETTERS)
    hook.remove()
    assert sizes == [2 * 100]  # patches of two images
    for request, row in zip(shared, together, strict=True):
        assert vlm.choice_logprobs([request], LETTERS)[0] == pytest.approx(row, abs=2e-4)


def test_seed_and_index_change_a_sampled_completion(vlm):
    request = [Request("x", prompts.CAPTION, image(0))]
    first, second = vlm.generate(request, Sampling(max_tokens=8, temperature=1.0, n=2))
    other = vlm.generate(request, Sampling(max_tokens=8, temperature=1.0, seed=1))[0]
    assert len({first.text, second.text, other.text}) == 3


def test_greedy_equals_plain_transformers(vlm):
    request = mixed_requests()[0]
    ours = vlm.generate([request], Sampling(max_tokens=6))[0]
    loaded = vlm.loaded
    inputs = loaded.encode([request])
    tokens = loaded.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    assert ours.text == loaded.tokenizer.decode(new, skip_special_tokens=True)


def test_choice_logprobs_equal_the_unpadded_forward_pass(vlm, reader):
    blind = [replace(request, image=None) for request in mixed_requests()]
    for backend, requests in ((vlm, mixed_requests()), (reader, blind)):
        scores = backend.choice_logprobs(requests, LETTERS)
        ids = backend.loaded.choice_ids(LETTERS)
        for request, row in zip(requests, scores, strict=True):
            with torch.inference_mode():
                logits = backend.loaded.model(**backend.loaded.encode([request])).logits[0, -1]
            expected = torch.log_softmax(logits, -1)[ids].tolist()
            assert row == pytest.approx(expected, abs=2e-4)
            assert sum(map(math.exp, row)) < 1


def test_a_choice_of_two_tokens_is_refused(reader):
    with pytest.raises(UserError, match="single token"):
        reader.choice_logprobs([Request("x", "hello")], [" A B"])


def test_requests_that_cannot_be_answered_say_why(reader):
    requests = [
        Request("image", "hello", image(0)),
        Request("special", "hello <|im_end|> there"),
        Request("long", "red " * 2000),
        Request("good", "hello"),
    ]
    completions = reader.generate(requests, Sampling(max_tokens=2))
    assert [c.finish_reason == "error" for c in completions] == [True, True, True, False]
    assert "no images" in completions[0].error
    assert "<|im_end|>" in completions[1].error
    assert "tokens" in completions[2].error
    assert [row is None for row in reader.choice_logprobs(requests, LETTERS)] == [True, True, True, False]


def test_the_models_own_sampling_defaults_stay_out(reader):
    assert reader.loaded.model.generation_config.repetition_penalty in (None, 1.0)
    assert reader.loaded.model.generation_config.temperature in (None, 1.0)


def test_the_tokenizer_of_a_text_model_is_the_one_in_its_folder(reader):
    from caprl_utils.mini.tokenizer import build_tokenizer

    text = prompts.read_question("The value of Rome is 42.", "What is the value of Rome?", ["42", "45"])
    ours = build_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert reader.loaded.tokenizer(text, add_special_tokens=False)["input_ids"] == ours


def test_hash_follows_the_weights_and_not_the_place(vlm_folder, reader_folder, profile, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in reader_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "README.md").write_text("not part of the model")
    folders = (reader_folder, copy, vlm_folder)
    hashes = [open_backend(ModelConfig(path=str(folder)), profile).model_hash for folder in folders]
    assert hashes[0] == hashes[1] != hashes[2]


def test_missing_and_corrupt_folders_name_path_and_remedy(tmp_path, reader_folder, profile):
    with pytest.raises(UserError, match="json is missing"):
        open_backend(ModelConfig(path=str(tmp_path / "nowhere")), profile)
    with pytest.raises(UserError, match="make zoo"):
        open_backend(ModelConfig(path="zoo:nothing"), profile)
    for file in reader_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    broken = open_backend(ModelConfig(path=str(tmp_path)), profile)
    with pytest.raises(UserError, match="cannot be loaded"):
        broken.generate([Request("x", "hello")], Sampling(max_tokens=1))
