"""Captioning with scripted fakes of the backend: resume, failures, mixed folders."""

from PIL import Image
from pytest import fixture, raises

from caprl_utils.captions import CHUNK_IMAGES, caption_images
from caprl_utils.errors import UserError
from caprl_utils.models.base import Completion, Sampling
from caprl_utils.runs import RowStore

SAMPLING = Sampling(max_tokens=16, temperature=1.0, n=2, seed=3)


class Captioner:
    """Writes the request's id, its index and the seed; fails for the ids it is told to."""

    name, model_hash = "fake", "f00"

    def __init__(self, broken=()):
        self.broken, self.calls = set(broken), []

    def generate(self, requests, sampling, progress=None):
        self.calls.append([r.id for r in requests])
        return [self._one(r, index, sampling.seed) for r in requests for index in range(sampling.n)]

    def _one(self, request, index, seed):
        if request.id in self.broken:
            return Completion(request.id, index, None, 0, "error", "server said no")
        return Completion(request.id, index, f" {request.id} {index} {seed}", 5, "stop")


@fixture
def images():
    return [(f"i{k}", Image.new("RGB", (4, 4))) for k in range(CHUNK_IMAGES + 3)]


@fixture
def store(tmp_path):
    return RowStore(tmp_path / "captions.jsonl")


def test_every_image_gets_its_captions(images, store):
    found = caption_images(images, Captioner(), SAMPLING, store).captions
    assert list(found) == [name for name, _ in images]
    assert all([row.index for row in rows] == [0, 1] for rows in found.values())
    assert found["i0"][0].text.startswith("i0 0")
    assert len(store) == 2 * len(images)


def test_a_stopped_job_ends_with_the_same_rows(images, store, tmp_path):
    whole = caption_images(images, Captioner(), SAMPLING, store)
    lines = store.path.read_bytes().splitlines(keepends=True)
    for kept in (0, 1, 2 * CHUNK_IMAGES, 2 * CHUNK_IMAGES + 1, len(lines)):
        cut = tmp_path / f"cut{kept}.jsonl"
        cut.write_bytes(b"".join(lines[:kept]))
        captioner = Captioner()
        assert caption_images(images, captioner, SAMPLING, RowStore(cut)) == whole
        assert sorted(cut.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())
        assert len(captioner.calls) == (0 if kept == len(lines) else 1 if kept >= 2 * CHUNK_IMAGES else 2)


def test_a_failing_captioner_loses_nothing(images, store):
    with raises(UserError, match=r"1 of 67 images were not captioned; first: i5: server said no"):
        caption_images(images, Captioner(broken=["i5"]), SAMPLING, store)
    assert len(store) == 2 * (len(images) - 1)
    mended = caption_images(images, Captioner(), SAMPLING, store).captions
    assert [row.text for row in mended["i5"]] == [
        row.text for row in caption_images(images, Captioner(), SAMPLING, store).captions["i5"]
    ]


def test_a_dead_captioner_stops_at_the_first_chunk(images, store):
    captioner = Captioner(broken=[name for name, _ in images])
    with raises(UserError, match="of one batch"):
        caption_images(images, captioner, SAMPLING, store)
    assert len(captioner.calls) == 1


def test_failures_up_to_the_limit_come_back_with_their_reason(images, store):
    found = caption_images(images, Captioner(broken=["i5"]), SAMPLING, store, max_failed_share=0.1)
    assert found.failed == {"i5": "server said no"} and "i5" not in found.captions


def test_a_corrupt_image_is_named(store, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    pairs = [("good", Image.new("RGB", (4, 4))), ("bad", lambda: Image.open(bad))]
    with raises(UserError, match="bad: the image cannot be opened"):
        caption_images(pairs, Captioner(), SAMPLING, store)


def test_captions_of_another_model_or_sampling_are_not_mixed(images, store):
    caption_images(images, Captioner(), SAMPLING, store)
    other = Captioner()
    other.model_hash = "ba7"
    with raises(UserError, match=r"holds captions of fake \(f00\)"):
        caption_images(images, other, SAMPLING, store)
    with raises(UserError, match="holds captions"):
        caption_images(images, Captioner(), Sampling(max_tokens=99, n=2), store)


def test_two_images_with_one_id_are_refused(store):
    pair = ("same", Image.new("RGB", (4, 4)))
    with raises(ValueError, match="one id"):
        caption_images([pair, pair], Captioner(), SAMPLING, store)
