"""Through this process with the real tokenizer and image processor: letters, chat frame, an image, its size."""

from PIL import Image

from caprl_utils.models.base import Request, Sampling, open_backend
from caprl_utils.schema import ModelConfig


def test_letters_and_frame_of_a_reader(qwen_reader, profile):
    backend = open_backend(ModelConfig(path=str(qwen_reader)), profile)
    request = Request("x", "What?", prefill="The answer is")
    text = backend.loaded.prompt_text(request)
    assert text.startswith("<|im_start|>system\nYou are Qwen") and text.endswith("assistant\nThe answer is")
    letters = [f" {letter}" for letter in "ABCDEFGHI"]
    assert backend.loaded.choice_ids(letters)[:2] == [362, 425]
    (row,) = backend.choice_logprobs([request], letters)
    assert len(row) == 9 and all(value < 0 for value in row)


def test_an_image_is_captioned(qwen_vlm, profile):
    backend = open_backend(ModelConfig(path=str(qwen_vlm)), profile)
    request = Request("x", "Describe.", Image.new("RGB", (640, 480), "red"))
    inputs = backend.loaded.encode([request])
    assert (inputs["input_ids"] == 151_655).sum() == 23 * 17
    large = backend.loaded.encode([Request("x", "Describe.", Image.new("RGBA", (4000, 3000)))])
    assert 1200 < (large["input_ids"] == 151_655).sum() <= 1280  # 15,301 without a limit
    assert large["pixel_values"].min() > 1.9  # transparent is white
    (done,) = backend.generate([request], Sampling(max_tokens=4, temperature=1.0))
    assert done.error is None and done.num_tokens <= 4
