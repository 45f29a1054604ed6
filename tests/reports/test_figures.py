"""Figures: a model looks the same everywhere, smoothing is centred, every figure says what it is of."""

import pytest

from caprl_utils.reports import figures
from caprl_utils.reports.results import Curve


def test_a_model_has_one_look_under_all_its_labels():
    for labels in (
        ("CapRL-3B", "CapRL, seed 0", "CapRL-1M", "caprl-seed0"),
        ("UnifiedRW-as-Judge-3B", "UnifiedReward as judge"),
        ("Qwen2.5VL-as-Judge-3B", "VLM as judge"),
        ("3B (base)", "base-3b", "Vanilla"),
        ("72B", "base-72b"),
        ("7B", "base-7b"),
    ):
        assert len({figures.looks([label])[0].colour for label in labels}) == 1, labels


def test_models_differ_and_caprl_is_the_strongest():
    models = (
        "3B (base)",
        "7B",
        "72B",
        "UnifiedReward as judge",
        "VLM as judge",
        "CapRL-3B",
        "DenseFusion-1M",
    )
    looks = figures.looks(models)
    assert len({look.colour for look in looks}) == len(models)
    assert [look.strong for look in looks].count(True) == 1 and looks[5].of_line()["linewidth"] > max(
        look.of_line()["linewidth"] for look in looks[:5]
    )


def test_two_trainings_of_a_model_share_its_colour_and_differ_in_line():
    first, second = figures.looks(["CapRL-3B, training 1", "CapRL-3B, training 2"])
    assert first.colour == second.colour and first.line != second.line


def test_what_is_no_model_gets_a_look_of_its_own():
    assert len({look.colour for look in figures.looks(["documents", "natural", "3B (base)"])}) == 3


@pytest.mark.parametrize(
    ("values", "means"),
    [([1.0, 2.0, 6.0], [1.5, 3.0, 4.0]), ([5.0], [5.0]), ([0.0, 3.0, 3.0, 0.0], [1.5, 2, 2, 1.5])],
)
def test_centred_mean_by_hand(values, means):
    assert figures.centred_mean(values, width=3) == pytest.approx(means)


@pytest.mark.parametrize(("longest", "drawn"), [(30.0, True), (10.0, False)])
def test_the_limit_is_drawn_where_captions_come_near_it(tmp_path, longest, drawn):
    curve = Curve("CapRL", [1, 2, 3], [0.1, 0.2, 0.3], [5.0, 8.0, longest])
    _, svg = figures.plot_curves(
        [curve], tmp_path / "curve", limit=48, note="profile mini, a step: 8 captions"
    )
    text = svg.read_text(encoding="utf-8")
    assert ("cut at 48" in text) == drawn and "profile mini, a step: 8 captions" in text
    assert f"centred mean of {figures.SMOOTH_STEPS}" in text


def test_places_without_a_panel_stay_empty():
    with figures.styled():
        figure, axes = figures.new_grid(4, 3)
    assert len(axes) == 4 and [ax.axison for ax in figure.axes] == [True] * 4 + [False] * 2
