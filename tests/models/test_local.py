"""The backend in this process, on fresh random models with the real processors."""

import json
import math
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from PIL import Image

from caprl_utils import prompts
from caprl_utils.captions.job import token_limit
from caprl_utils.errors import UserError
from caprl_utils.mini.zoo.models import build_processor, build_vlm
from caprl_utils.models.base import Request, Sampling, open_backend
from caprl_utils.models.local import RowSampler, close_all, draw, process_once, share_images, uniforms
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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_come_in_order_and_neighbours_do_not_change_them(vlm, temperature):
    sampling = Sampling(max_tokens=8, temperature=temperature, repetition_penalty=1.1, n=2, seed=3)
    requests = mixed_requests()
    together = vlm.generate(requests, sampling)
    assert together == [done for request in requests for done in vlm.generate([request], sampling)]
    assert [(c.id, c.index) for c in together] == [(r.id, i) for r in requests for i in range(2)]
    assert all(c.error is None and c.num_tokens <= 8 for c in together)


def test_an_image_shown_often_is_seen_once(vlm):
    first, second = image(0), image(1)
    questions = [prompts.look_question(f"What is the {key}?") for key in ("topic", "figure", "name")]
    shared = [Request(f"{q}{k}", q, i) for k, i in enumerate((first, second)) for q in questions]
    sizes = []
    tower = vlm.loaded.model.model.visual
    hook = tower.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    vlm.choice_logprobs(shared, LETTERS)
    hook.remove()
    assert sizes == [2 * 196]  # patches of two images


def test_training_sees_each_image_once_with_the_same_features_and_gradients():
    """Four prompts over two images, as a rollout shows them after TRL's shuffle; the pixels are prepared once, too."""
    processor = build_processor()
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe"}]}]
    text = processor.apply_chat_template(turn, tokenize=False)
    shown = {"images": [[image(i)] for i in (0, 1, 1, 0)], "text": [text] * 4}
    prepared, tool = [], processor.image_processor
    inner = type(tool)._preprocess
    tool._preprocess = lambda images, *a, **o: prepared.append(len(images)) or inner(tool, images, *a, **o)
    with process_once(processor):
        batch = processor(**shown, padding=True, return_tensors="pt")
    plain_batch = processor(**shown, padding=True, return_tensors="pt")
    with process_once(processor.tokenizer):  # others stay as they are
        pass
    assert "preprocess" not in vars(tool)  # it would be saved
    del tool._preprocess  # the processor is kept for other tests
    assert prepared == [2, 4] and all(torch.equal(batch[name], plain_batch[name]) for name in plain_batch)
    plain, shared = build_vlm(0).eval(), build_vlm(0).eval()
    share_images(shared)
    seen, grads = [], []
    shared.model.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for model in (plain, shared):
        model(**batch).logits[..., ::7].pow(2).mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert seen == [2 * len(batch["pixel_values"]) // 4]
    torch.testing.assert_close(shared(**batch).logits, plain(**batch).logits, atol=1e-5, rtol=1e-5)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-3)


def test_an_image_that_the_processor_refuses_fails_alone(vlm, tmp_path):
    image(2).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-9000])
    bad = [Request("strip", prompts.CAPTION, Image.new("RGB", (2500, 10))),
           Request("cut", prompts.CAPTION, Image.open(tmp_path / "cut.png"))]  # fmt: skip
    good = mixed_requests()
    found = vlm.generate([bad[0], *good, bad[1]], Sampling(max_tokens=5))
    assert [c.id for c in found if c.text is None] == ["strip", "cut"] and "aspect ratio" in found[0].error
    assert found[1:-1] == vlm.generate(good, Sampling(max_tokens=5))
    scores = vlm.choice_logprobs([*bad, good[0]], LETTERS)
    assert scores[:2] == [None, None] and scores[2] is not None


def test_a_caption_may_take_half_of_the_context_and_a_model_that_is_not_to_be_had_is_told(tmp_path, monkeypatch):
    for context, limit in ((1024, 512), (100_000, 2048)):
        config = {"model_type": "qwen2", "max_position_embeddings": context}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert token_limit(ModelConfig(path=str(tmp_path))) == limit
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="or for a trial --model zoo:base"):
        token_limit(ModelConfig(path="no/such-model"))


def test_memory_is_given_back_and_the_model_loaded_again(reader_folder, profile):
    backend = open_backend(ModelConfig(path=str(reader_folder)), profile)
    request = [Request("x", "What is the topic?")]
    before = backend.choice_logprobs(request, LETTERS)
    weights = weakref.ref(backend.loaded.model)
    close_all()
    assert weights() is None
    assert backend.choice_logprobs(request, LETTERS) == before


def test_greedy_equals_plain_transformers_and_seed_and_index_change_a_sampled_completion(vlm):
    request = mixed_requests()[0]
    ours = vlm.generate([request], Sampling(max_tokens=6))[0]
    loaded = vlm.loaded
    inputs = loaded.encode([request])
    tokens = loaded.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    assert ours.text == loaded.tokenizer.decode(new, skip_special_tokens=True)
    # the model's own defaults stay out
    assert loaded.model.generation_config.repetition_penalty in (None, 1.0)
    drawn = [done for seed in (0, 1) for done in vlm.generate([request], Sampling(8, 1.0, n=2, seed=seed))]
    assert len({done.text for done in drawn}) == 4


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


def test_requests_that_cannot_be_answered_say_why(reader):
    requests = [Request("image", "hello", image(0)), Request("special", "hello <|im_end|> there"),
                Request("long", "red " * 2000), Request("good", "hello")]  # fmt: skip
    *bad, good = reader.generate(requests, Sampling(max_tokens=2))
    assert [c.finish_reason for c in bad] == ["error"] * 3 and good.error is None
    assert all(said in c.error for c, said in zip(bad, ("no images", "<|im_end|>", "tokens"), strict=True))
    assert [row is None for row in reader.choice_logprobs(requests, LETTERS)] == [True, True, True, False]
    with pytest.raises(UserError, match="single token"):
        reader.choice_logprobs(requests, [" A B"])


def test_hash_follows_the_weights_and_a_missing_or_corrupt_folder_names_path_and_remedy(
    tmp_path, vlm_folder, reader_folder, profile
):
    copy = shutil.copytree(reader_folder, tmp_path / "copy")
    (copy / "README.md").write_text("not part of the model")
    opened = [open_backend(ModelConfig(path=str(folder)), profile) for folder in (reader_folder, copy, vlm_folder)]
    hashes = [backend.model_hash for backend in opened]
    assert hashes[0] == hashes[1] != hashes[2]
    for file in (copy / "chat_template.jinja", copy / "tokenizer_config.json"):  # where it lies is the version's choice
        if file.is_file() and "chat_template" in (file.name + file.read_text()):
            shutil.move(file, tmp_path / file.name)
    with pytest.raises(UserError, match=r"copy has no chat template"):
        open_backend(ModelConfig(path=str(copy)), profile).generate([Request("r", "What?")], Sampling(1))
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"copy cannot be loaded .* copy it again"):
        opened[1].generate([Request("x", "hello")], Sampling(max_tokens=1))
    with pytest.raises(UserError, match="json is missing"):
        open_backend(ModelConfig(path=str(tmp_path / "nowhere")), profile)
    with pytest.raises(UserError, match="make zoo"):
        open_backend(ModelConfig(path="zoo:nothing"), profile)


# Decoding: the distribution that should be drawn from, whatever else is in the batch


def first_tokens(sampling: Sampling, logits: list[float], rows: int) -> torch.Tensor:
    """First tokens of `rows` requests that all see the same logits."""
    prompt = torch.zeros(rows, 1, dtype=torch.long)
    sampler = RowSampler(sampling, [(sampling.seed, str(i), 0) for i in range(rows)], torch.ones_like(prompt))
    return sampler(prompt, torch.tensor([logits] * rows)).argmax(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax_and_top_p_keeps_the_smallest_set_that_reaches_it(temperature):
    logits = [0.0, 1.0, 2.0, -1.0]
    tokens = first_tokens(Sampling(max_tokens=1, temperature=temperature), logits, 4000)
    expected = torch.softmax(torch.tensor(logits) / temperature, 0)
    assert torch.allclose(torch.bincount(tokens, minlength=4) / 4000, expected, atol=0.03)
    probs = torch.tensor([0.1, 0.5, 0.15, 0.25])
    tokens = first_tokens(Sampling(max_tokens=1, temperature=1.0, top_p=0.7), probs.log().tolist(), 2000)
    assert set(tokens.tolist()) == {1, 3} and (tokens == 1).float().mean() == pytest.approx(0.5 / 0.75, abs=0.03)


def test_repetition_penalty_by_hand_and_padding_not_counted():
    sampling = Sampling(max_tokens=2, repetition_penalty=2.0)
    mask = torch.tensor([[0, 1, 1]])
    sampler = RowSampler(sampling, [(0, "x", 0)], mask)
    scores = sampler(torch.tensor([[0, 1, 2]]), torch.tensor([[4.0, 4.0, -1.0, 3.0]]))
    assert scores.tolist() == [[4.0, 2.0, -2.0, 3.0]]  # token 0 is padding, 1 and 2 are the prompt
    scores = sampler(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[4.0, 4.0, -1.0, 3.0]]))
    assert scores.tolist() == [[4.0, 2.0, -2.0, 1.5]]


def test_random_numbers_are_pinned_and_a_draw_inverts_the_distribution():
    assert uniforms(3, "r1", 2, 2) == pytest.approx([0.4282003418356779, 0.9698115107170981])
    assert uniforms(0, "x", 0, 2) == pytest.approx(uniforms(0, "x", 0, 3)[:2])
    logprobs = [math.log(p) for p in (0.2, 0.5, 0.3)]
    assert [draw(logprobs, 1.0, at) for at in (0.0, 0.1999, 0.2001, 0.69, 0.71, 1.0)] == [0, 0, 1, 1, 2, 2]
    assert draw(logprobs, 0.01, 0.99) == 1
