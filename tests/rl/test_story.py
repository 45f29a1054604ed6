from PIL import Image

from caprl_utils.records import Question
from caprl_utils.rl import story
from caprl_utils.rl.story import Example

ROME = Question(question="What is the value of Rome?", options=("17", "42"), answer="B")
BLUE = Question(question="Is it blue?", options=("yes", "no"), answer="A")


def test_captions_made_from_questions():
    example = Example("i", None, [ROME, BLUE])
    assert story.true_caption(example) == "The value of Rome is 42. Is it blue? yes."
    assert story.true_caption(Example("i", None, [ROME], {"true_caption": "All."})) == "All."
    everything = "The value of Rome is 17. The value of Rome is 42. Is it blue? yes. Is it blue? no."
    assert story.everything(example) == everything
    assert story.half("One is 1. Two is 2. Three is 3.") == "One is 1." and story.half("One.") == "One."


def test_what_was_won_and_lost_is_seen_on_the_card():
    example = Example("i", Image.new("RGB", (8, 8)), [ROME, BLUE])
    found = {"before": ("Rome.", [0.9, float("nan")]), "after": ("<Blue>.", [0.2, 0.8])}
    shown = story.compared(example, found)
    assert shown.count("✓") == shown.count("✗") == 2 and "&lt;Blue&gt;." in shown and "Is it blue? yes" in shown
