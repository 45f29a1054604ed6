"""Figures: a model looks the same everywhere, smoothing is centred, every figure says what it is of."""

import pytest

from caprl_utils.reports import figures
from caprl_utils.reports.results import Curve


def test_a_model_looks_the_same_everywhere_unlike_others_and_caprl_is_the_strongest():
    for labels in (
        ("CapRL-3B", "CapRL, seed 0", "CapRL-1M", "caprl-seed0"),
        ("UnifiedRW-as-Judge-3B", "rating judge"), ("Qwen2.5VL-as-Judge-3B", "VLM judge"),
        ("base", "base-3b", "Vanilla"), ("strong captioner", "base-72b"), ("mid captioner", "base-7b"),
    ):  # fmt: skip
        assert len({figures.looks([label])[0].colour for label in labels}) == 1, labels
    names = ["base", "mid captioner", "strong captioner", "rating judge", "VLM judge", "documents", "CapRL"]
    looks = figures.looks(names)
    assert len({look.colour for look in looks}) == 7 and [look.strong for look in looks].index(True) == 6
    first, second = figures.looks(["CapRL-3B, training 1", "CapRL-3B, training 2"])
    assert first.colour == second.colour and first.line != second.line


def test_centred_mean_by_hand():
    assert figures.centred_mean([1.0, 2.0, 6.0], width=3) == pytest.approx([1.5, 3.0, 4.0])
    assert figures.centred_mean([0.0, 3.0, 3.0, 0.0], width=3) == pytest.approx([1.5, 2, 2, 1.5])


def test_the_limit_is_drawn_where_captions_come_near_it_and_the_same_numbers_give_the_same_bytes(tmp_path):
    near, far = (Curve("CapRL", [1, 2, 3], [0.1, 0.2, 0.3], [5.0, 8.0, longest]) for longest in (30.0, 10.0))
    for name, curve in {"near": near, "again": near, "far": far}.items():
        figures.plot_curves([curve], tmp_path / name, limit=48, note="profile mini, a step: 8 captions")
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    assert files["near.svg"] == files["again.svg"] and files["near.png"] == files["again.png"]
    text = files["near.svg"].decode()
    assert "cut at 48" in text and "cut at 48" not in files["far.svg"].decode()
    assert "profile mini, a step: 8 captions" in text and f"centred mean of {figures.SMOOTH_STEPS}" in text
