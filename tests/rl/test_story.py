import pytest

from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.records import Question
from caprl_utils.rl import story
from caprl_utils.rl.story import Example, Outcome
from caprl_utils.schema import RL
from tests.rl.reader_fakes import ChanceReader

ROME = Question(question="What is the value of Rome?", options=("17", "42"), answer="B")
BLUE = Question(question="Is it blue?", options=("yes", "no"), answer="A")
SETTINGS = RL(reward="qa_expected", rounds=2, question_draw="replacement", reader_temperature=1.0)


def believes(request, options):
    """A reader that believes what the caption says: an option that occurs in it is the answer, else the last one."""
    caption = request.prompt.split("Question:")[0]
    said = [letter for letter, text in options.items() if text in caption] or [max(options)]
    return {letter: (1.0 if letter == said[0] else 0.0) for letter in options}


def test_captions_made_from_questions():
    profile, example = load_profile("paper"), Example("i", None, [ROME, BLUE])
    assert story.true_captions(profile, [example]) == ["The value of Rome is 42. Is it blue? yes."]
    everything = "The value of Rome is 17. The value of Rome is 42. Is it blue? yes. Is it blue? no."
    assert story.everything([ROME, BLUE]) == everything
    assert story.half("One is 1. Two is 2. Three is 3.") == "One is 1." and story.half("One.") == "One."


def test_ask_and_mean_reward():
    reader, example = ChanceReader(believes), Example("i", None, [ROME])
    rows = story.ask("The value of Rome is 42.", [ROME], reader, SETTINGS)
    assert rows[0]["question"] == ROME.question and rows[0]["options"].count(")") == 3
    assert rows[0]["chance"] == pytest.approx(1.0) and rows[0]["one draw"] == 1.0
    assert story.mean_reward(["it is 42", "17"], [example, example], reader, SETTINGS) == pytest.approx(0.5)
    with pytest.raises(UserError, match="could not answer"):
        story.mean_reward(["x"], [example], ChanceReader(lambda r, o: None), SETTINGS)


def test_noise_has_one_row_per_kind_and_draw():
    """One of two questions is answered rightly: drawing with repeats leaves noise, a stratified draw of both none."""
    reader, example = ChanceReader(believes), Example("i", None, [ROME, BLUE])
    rows = story.noise(["It is 42."], [example], reader, SETTINGS, repeats=30)
    table = {(r["reward"], r["draw"]): r for r in rows}
    assert len(table) == 4
    assert table["qa_expected", "stratified"]["std"] == pytest.approx(0.0, abs=1e-9)
    assert table["qa_expected", "replacement"]["std"] > 0.2
    assert all(0.2 < row["mean"] < 0.8 for row in table.values())


def test_won_and_lost():
    before = Outcome("", 1, {"a": 0.9, "b": 0.1, "c": None})
    after = Outcome("", 1, {"a": 0.2, "b": 0.8, "c": 0.9})
    assert story.won_and_lost(before, after) == (["b", "c"], ["a"])
    assert before.reward is None and after.reward == pytest.approx(1.9 / 3)
