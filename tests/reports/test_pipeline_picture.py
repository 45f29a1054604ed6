"""README's picture is what the code draws."""

from caprl_utils.paths import ROOT
from caprl_utils.reports import pipeline_picture


def test_the_picture_in_reports_is_up_to_date_and_names_notebooks_that_exist(tmp_path):
    _, drawn = pipeline_picture.draw(tmp_path / "pipeline")
    assert drawn.read_bytes() == (ROOT / "reports" / "pipeline.svg").read_bytes()
    numbers = {
        part[:2]
        for box in pipeline_picture.BOXES.values()
        for part in box.title.split(", ")
        if part[0] == "0"
    }
    assert numbers and all(list((ROOT / "notebooks").glob(f"{number}_*.ipynb")) for number in numbers)
