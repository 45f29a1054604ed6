"""The command line, against a scripted server."""

import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from scripted_captioner import fill

from caprl_utils.captions.__main__ import main

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from fake_server import FakeServer


@pytest.fixture
def images(tmp_path):
    folder = fill(tmp_path / "images", 5)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    return folder


def test_a_folder_is_captioned_by_a_server(images, tmp_path, capsys):
    out = tmp_path / "captions.parquet"
    with FakeServer() as server:
        arguments = [
            str(images),
            "--out",
            str(out),
            "--model",
            "fake",
            "--base-url",
            server.url,
            "--captions",
            "2",
        ]
        assert main(arguments) == 0
        assert main(arguments) == 0
        assert set(server.attempts.values()) == {1}
    assert pq.read_table(out).num_rows == 10
    said = capsys.readouterr()
    assert "set aside: 1 not an image" in said.err
    assert "10 captions of 5 images" in said.out and f"written: {out}" in said.out


def test_errors_are_one_line(images, tmp_path, capsys):
    url = "http://127.0.0.1:9/v1"
    assert main([str(images), "--out", str(tmp_path / "c.parquet"), "--base-url", url]) == 1
    assert "error: no model server answers at http://127.0.0.1:9/v1" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "d.parquet"), "--base-url", url]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_ray_is_asked_for_by_name(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    out = tmp_path / "c.parquet"
    assert main([str(images), "--out", str(out), "--base-url", "http://x/v1", "--runner", "ray"]) == 1
    assert "Ray is not installed: `pip install ray`" in capsys.readouterr().err


def test_the_check_alone_needs_no_model(images, tmp_path, capsys):
    assert main([str(images), "--out", str(tmp_path / "c.parquet"), "--check-only"]) == 0
    said = capsys.readouterr().out
    assert "6 images, 5 good" in said and "set aside: 1 not an image" in said
    assert not list(tmp_path.glob("c.parquet*"))
