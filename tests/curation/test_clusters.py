"""Near-duplicates by embedding, on points with known neighbours."""

import io

import numpy as np
import pytest
from PIL import Image

from caprl_utils.config import load_profile
from caprl_utils.curation import clusters, pipeline
from caprl_utils.curation.clusters import semantic_duplicates
from caprl_utils.errors import UserError
from caprl_utils.images import open_images
from caprl_utils.models import open_backend


@pytest.mark.parametrize("cluster_images", [10_000, 50])
def test_copies_are_found_and_the_first_stays(cluster_images, monkeypatch):
    monkeypatch.setattr(clusters, "CLUSTER_IMAGES", cluster_images)
    rng = np.random.default_rng(0)
    first = rng.normal(size=(200, 32))
    copies = 3.0 * first[:40] + 0.01 * rng.normal(size=(40, 32))  # length does not count
    ids = [f"a{i}" for i in range(200)] + [f"copy{i}" for i in range(40)]
    found = semantic_duplicates(ids, np.concatenate([first, copies]), 0.97)
    assert found == {f"copy{i}": f"a{i}" for i in range(40)}


def test_nothing_in_nothing_out():
    assert semantic_duplicates([], np.zeros((0, 4)), 0.9) == {}


class Tower:
    """A filter model whose embedding is the picture's mean colour by quarter."""

    name = model_hash = "tower"

    def image_features(self, images):
        return np.stack(
            [np.asarray(image.resize((6, 6)).convert("RGB"), float).ravel() - 128 for image in images]
        )


def job_with(monkeypatch, reader, **settings):
    profile = load_profile(
        "smoke", {"images.num_images": 6, "curation.near_duplicates": "embedding", **settings}
    )
    items = list(open_images(profile))
    turned = items[0].image.rotate(180)
    twin = items[0].__class__("twin", lambda: turned, kind=items[0].kind, meta=items[0].meta)
    monkeypatch.setattr(pipeline, "open_images", lambda *_: iter([*items, twin]))
    monkeypatch.setattr(pipeline, "open_backend", lambda *_: reader)
    return pipeline.open_job(profile)


def test_similar_images_are_set_aside_and_counted(monkeypatch):
    class Blind(Tower):
        def image_features(self, images):  # sees no difference between a picture and its turned copy
            return super().image_features(images) + super().image_features([i.rotate(180) for i in images])

    job = job_with(monkeypatch, Blind(), **{"curation.max_similarity": 0.9999})
    pipeline.check_images(job)
    rows = list(job.rows(pipeline.SIMILAR).read())
    assert [(row["id"], row["detail"]) for row in rows if row["id"] == "twin"] == [
        ("twin", rows[-1]["detail"])
    ]
    assert "twin" not in job.good_ids and len(job.good_ids) == 7 - len(rows)
    assert pipeline.set_aside(job)["near-duplicate by embedding"] == len(rows)
    pipeline.check_images(job)  # nothing twice
    assert len(list(job.rows(pipeline.SIMILAR).read())) == len(rows)


def test_a_model_behind_a_server_has_no_embeddings(monkeypatch):
    class Endpoint:
        name = model_hash = "far"

    with pytest.raises(UserError, match="in this process"):
        pipeline.check_images(job_with(monkeypatch, Endpoint()))


def saved_again(image: Image.Image) -> Image.Image:
    """The picture smaller and as JPEG: other bytes, another size, the same to look at."""
    buffer = io.BytesIO()
    image.convert("RGB").resize((image.width * 3 // 4, image.height * 3 // 4)).save(
        buffer, "JPEG", quality=60
    )
    return Image.open(buffer)


def test_the_mini_filters_own_tower_finds_saved_again_images_and_keeps_the_others():
    profile = load_profile("smoke", {"images.num_images": 15})
    items = list(open_images(profile))
    again = {f"{item.id} again": item.id for item in items[:5]}  # one of each kind
    pictures = [item.image for item in items] + [saved_again(item.image) for item in items[:5]]
    features = open_backend(profile.models.question_filter, profile).image_features(pictures)
    found = semantic_duplicates(
        [*(item.id for item in items), *again], features, 0.99
    )  # drawn alike: up to 0.98
    assert found == again
