import json

import pytest

from caprl_utils.rl import live


def row(step, **values):
    names = {name for columns in live.PANELS.values() for name in columns}
    return {"id": str(step), "step": step, **dict.fromkeys(names, 0.5), **values}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "curve.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in (row(1), row(2, kl=None))) + '{"id": "3", "st'
    )
    samples = [
        {"step": 1, "image_id": "a", "reward": 0.25, "caption": "old"},
        {"step": 2, "image_id": "b", "reward": None, "caption": "a <b> & more"},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return tmp_path


def test_half_a_line_is_left_out_and_a_missing_file_is_no_step(folder):
    assert [r["step"] for r in live.read_rows(folder / "curve.jsonl")] == [1, 2]
    assert live.read_rows(folder / "absent.jsonl") == []


def test_a_panel_a_sign_and_gaps_where_nothing_is_known(folder):
    figure = live.draw(live.read_rows(folder / "curve.jsonl"))
    assert [axis.get_title() for axis in figure.axes] == list(live.PANELS)
    (kl,) = figure.axes[2].lines
    assert kl.get_ydata()[0] == 0.5 and kl.get_ydata()[1] != kl.get_ydata()[1]
    assert len(figure.axes[3].lines) == 3


def test_the_newest_captions_and_no_html_of_theirs(folder):
    text = live.captions_table(live.read_rows(folder / "samples.jsonl"))
    assert "a &lt;b&gt; &amp; more" in text and "old" not in text and "none" in text


def test_drawn_in_a_notebook_alone_and_only_when_there_is_something_new(folder, monkeypatch):
    shown = []
    monkeypatch.setattr(live.LiveFigure, "_show", lambda figure, text: shown.append(text))
    live.LiveFigure(folder).update(now=True)
    assert shown == []
    monkeypatch.setattr(live, "in_kernel", lambda: True)
    figure = live.LiveFigure(folder)
    figure.update()
    figure.update(now=True)
    assert len(shown) == 1 and "data:image/png" in shown[0]
    with open(folder / "curve.jsonl", "w") as curve:
        curve.writelines(json.dumps(row(step)) + "\n" for step in (1, 2, 3))
    figure.update()  # too soon
    assert len(shown) == 1
    figure.update(now=True)
    assert len(shown) == 2
