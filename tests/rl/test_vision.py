import pytest
import torch

from caprl_utils.rl.vision import places, process_once, share_images


def test_places():
    a, b = torch.ones(4, 3), torch.zeros(4, 3)
    assert places((a, b, a.clone(), b, torch.ones(2, 3))) == [0, 1, 0, 1, 2]


@pytest.fixture(scope="module")
def batch():
    """Six prompts over two images, as a rollout shows them after TRL's shuffle."""
    from PIL import Image

    from caprl_utils.mini.zoo.models import build_processor

    red, blue = (Image.new("RGB", (140, 140), colour) for colour in ("red", "blue"))
    processor = build_processor()
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe"}]}],
        tokenize=False,
    )
    shown = [red, blue, blue, red, red, blue]
    return processor(images=[[i] for i in shown], text=[text] * 6, padding=True, return_tensors="pt")


def test_same_features_and_gradients_with_fewer_passes(batch):
    from caprl_utils.mini.zoo.models import build_vlm

    plain, shared = build_vlm(0).eval(), build_vlm(0).eval()
    share_images(shared)
    seen = []
    shared.model.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    grads = []
    for model in (plain, shared):
        logits = model(**batch).logits
        logits[..., ::7].pow(2).mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert seen == [2 * len(batch["pixel_values"]) // 6]
    torch.testing.assert_close(shared(**batch).logits, plain(**batch).logits, atol=1e-5, rtol=1e-5)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-3)


def test_same_pixels_processed_once(tmp_path):
    from PIL import Image

    from caprl_utils.mini.zoo.models import build_processor

    processor = build_processor()
    shown = [[Image.new("RGB", size, colour)] for size, colour in
             (((140, 140), "red"), ((280, 140), "blue"), ((140, 140), "red"), ((140, 140), "blue"))]  # fmt: skip
    plain = processor.image_processor(shown, return_tensors="pt")
    counted, inner = [], type(processor.image_processor)._preprocess
    tool = processor.image_processor
    tool._preprocess = lambda images, *a, **o: counted.append(len(images)) or inner(tool, images, *a, **o)
    with process_once(processor):
        once = processor.image_processor(shown, return_tensors="pt")
    del tool._preprocess
    assert counted == [3]
    assert torch.equal(once["pixel_values"], plain["pixel_values"])
    assert torch.equal(once["image_grid_thw"], plain["image_grid_thw"])
    processor.save_pretrained(tmp_path)  # nothing of it stays behind


def test_other_processors_stay_as_they_are():
    class Other:
        image_processor = object()

    with process_once(Other()):
        pass
