"""What is set aside of sound images: small, plain, copied, or like a benchmark's."""

import io

import numpy as np
from PIL import Image

from caprl_utils.curation.checks import MAX_DISTANCE, DuplicateFinder, check_image, perceptual_hash
from caprl_utils.images import ImageItem


def picture(seed: int, size: tuple[int, int] = (128, 96)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size)


def jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG")
    return Image.open(buffer)


def test_small_plain_and_copied_images():
    finder, benchmarks = DuplicateFinder(), DuplicateFinder([("benchmark 7", perceptual_hash(picture(5)))])
    first = check_image(ImageItem("first", lambda: picture(0)), finder, benchmarks)
    assert first["reason"] is None
    cases = {
        "copy": (picture(0), "near-duplicate", "first"),
        "scaled": (picture(0, (256, 192)), "near-duplicate", "first"),
        "jpeg": (jpeg(picture(0)), "near-duplicate", "first"),
        "test image": (picture(5), "too close to a benchmark image", "benchmark 7"),
        "small": (picture(1, (40, 200)), "too small", "40 x 200"),
        "plain": (Image.new("RGB", (100, 100), "grey"), "too plain", "grey values spread by 0.0"),
        "other": (picture(2), None, None),
    }
    for name, (image, reason, detail) in cases.items():
        row = check_image(ImageItem(name, image.copy), finder, benchmarks)
        assert (row["reason"], row["detail"]) == (reason, detail), name


def test_every_hash_within_the_distance_is_found():
    rng = np.random.default_rng(0)
    finder = DuplicateFinder()
    finder.add("it", "0" * 64)
    for _ in range(200):
        bits = sum(1 << int(bit) for bit in rng.choice(256, MAX_DISTANCE, replace=False))
        assert finder.nearest(f"{bits:064x}") == "it"
        far = bits | sum(1 << int(bit) for bit in rng.choice(256, 40, replace=False))
        assert finder.nearest(f"{far:064x}") is None
