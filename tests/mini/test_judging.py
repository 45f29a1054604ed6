"""The lesson of the judge: ratings by hand, captions as said, and a tokenizer that speaks both judges' contracts."""

import random

import pytest

from caprl_utils import prompts
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.world import picture
from caprl_utils.mini.zoo import judge_lesson as judging
from caprl_utils.rl.judges import final_score


@pytest.mark.parametrize(
    ("statements", "false", "amount", "mistakes"),
    [(0, 0, 1, 5), (2, 0, 2, 5), (4, 1, 3, 3), (4, 3, 2, 1), (7, 0, 4, 5), (8, 0, 5, 5), (11, 2, 5, 1)],
)
def test_ratings_by_hand(statements, false, amount, mistakes):
    assert judging.by_amount(statements, false) == amount
    assert judging.by_mistakes(statements, false) == mistakes


def test_false_statements_are_counted_against_the_picture():
    rng = random.Random(0)
    for index in range(40):
        shown = picture("zoo", index)
        text, statements, false = judging._told(rng, shown)
        told = [s for s in text.split(". ")[1:] if s]
        wrong = sum(not any(f"{s.rstrip('.')}." == fact.sentence for fact in shown.facts) for s in told)
        assert (len(told), wrong) == (statements, false)


def test_the_judge_speaks_both_contracts():
    tokenizer = judging.judge_tokenizer()
    packed = judging.judged(random.Random(1), picture("zoo", 3), captions=1)
    (asked, score), (asked_unified, explained) = packed.branches
    assert asked.startswith(prompts.RATE[:40]) and score.startswith(f"{prompts.SCORE_PREFILL} ")
    assert asked_unified.startswith(prompts.UNIFIED[:40])
    assert final_score(explained) is not None
    for text in (asked, score, asked_unified, explained):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_its_own_words_stand_behind_the_shared_ones():
    own, shared = judging.judge_tokenizer(), shared_tokenizer()
    assert len(own) == len(shared) + len(judging.WORDS)
    assert own("The value of Rome is 42.")["input_ids"] == shared("The value of Rome is 42.")["input_ids"]
