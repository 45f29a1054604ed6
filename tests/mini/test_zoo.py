"""The model zoo: packed batches are exact, and models are small, loadable and trained as their records say."""

import json
import random
from dataclasses import replace

import pytest
import torch

from caprl_utils import paths, prompts
from caprl_utils.mini.render import render
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.world import picture
from caprl_utils.mini.zoo import examples, models, recipes
from caprl_utils.mini.zoo import train as training
from caprl_utils.mini.zoo.lessons import pixels_of
from caprl_utils.mini.zoo.packing import IGNORED, IMAGE_PAD, collate
from caprl_utils.mini.zoo.recipes import RECIPES, Schedule
from caprl_utils.mini.zoo.train import build, train
from caprl_utils.rl.rewards import final_score


def branch_logits(logits, labels):
    return logits[:, :-1][labels[:, 1:] != IGNORED]


def test_text_branches_equal_separate_prompts():
    model, tokenizer = models.build_language_model(0).eval(), shared_tokenizer()
    packed = examples.reading(random.Random(1), picture("zoo", 0), 4, 4, 0.2)
    other = examples.reading(random.Random(2), picture("zoo", 1), 2, 4, 0.2)
    batch = collate([packed, other], tokenizer)
    with torch.no_grad():
        together = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.attention_mask
        ).logits
        got = branch_logits(together[:1], batch.labels[:1])
        alone = []
        for asked, answered in packed.branches:
            text = tokenizer(packed.prefix + asked + answered, return_tensors="pt")
            count = len(tokenizer(answered).input_ids)
            alone.append(model(input_ids=text.input_ids).logits[0, -count - 1 : -1])
    torch.testing.assert_close(got, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_image_branches_equal_separate_prompts():
    model, processor = models.build_vlm(0).eval(), models.build_processor()
    shown = picture("zoo", 3)
    packed = examples.looking(random.Random(1), shown, [recipes.DENSE])
    batch = collate([packed], processor.tokenizer, with_image=True)
    pixels = pixels_of([shown])
    with torch.no_grad():
        together = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.attention_mask, **pixels
        ).logits
        alone = []
        for asked, answered in packed.branches:
            text = (packed.prefix + asked + answered).replace(IMAGE_PAD * 25, IMAGE_PAD)
            inputs = processor(text=[text], images=[render(shown)], return_tensors="pt")
            count = len(processor.tokenizer(answered).input_ids)
            alone.append(model(**inputs).logits[0, -count - 1 : -1])
    torch.testing.assert_close(branch_logits(together, batch.labels), torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("index", range(10))
def test_tokenizer_is_lossless_on_everything_the_world_says(index):
    tokenizer, shown = shared_tokenizer(), picture("zoo", index)
    packed = examples.looking(random.Random(index), shown, [recipes.TERSE_AND_ERRING], write=1.0)
    blind = examples.guessing(random.Random(index), shown)
    for example in (packed, blind, examples.reading(random.Random(index), shown, 5, 4, 0.3)):
        for asked, answered in example.branches:
            text = example.prefix + asked + answered
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("statements", "false", "amount", "mistakes"),
    [(0, 0, 1, 5), (2, 0, 2, 5), (4, 1, 3, 3), (4, 3, 2, 1), (7, 0, 4, 5), (8, 0, 5, 5), (11, 2, 5, 1)],
)
def test_the_judges_ratings_by_hand(statements, false, amount, mistakes):
    assert examples.by_amount(statements, false) == amount
    assert examples.by_mistakes(statements, false) == mistakes


def test_the_judge_speaks_both_contracts_in_words_behind_the_shared_ones():
    tokenizer, shared = examples.judge_tokenizer(), shared_tokenizer()
    (asked, score), (asked_unified, explained) = examples.judged(random.Random(1), picture("zoo", 3)).branches[:2]
    assert asked.startswith(prompts.RATE[:40]) and score.startswith(f"{prompts.SCORE_PREFILL} ")
    assert asked_unified.startswith(prompts.UNIFIED[:40]) and final_score(explained) is not None
    for text in (asked, score, asked_unified, explained):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    assert len(tokenizer) == len(shared) + len(examples.JUDGE_WORDS)
    assert tokenizer("The value of Rome is 42.")["input_ids"] == shared("The value of Rome is 42.")["input_ids"]


def test_a_terse_style_omits_and_errs():
    rng, told, wrong, total = random.Random(0), 0, 0, 0
    for index in range(400):
        shown = picture("rl", index)
        facts = examples.styled_facts(rng, shown.facts, recipes.TERSE_AND_ERRING)
        total += len(shown.facts)
        told += len(facts)
        wrong += sum(fact not in shown.facts for fact in facts)
    assert 0.25 < told / total < 0.5
    assert 0.1 < wrong / told < 0.2


COPIER = RECIPES["copier"]


def test_weights_are_at_most_20_megabytes_in_16_bit():
    files = [f for f in paths.ZOO.rglob("*.safetensors") if not f.is_symlink()]  # a shared tower counts once
    assert files and {f.parent.name for f in files} <= {n for n, r in RECIPES.items() if r.shipped}
    assert sum(f.stat().st_size for f in files) < 20 * 2**20


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_model_has_a_record_and_a_curve_that_fell(recipe):
    record = json.loads((recipe.weights_folder / "record.json").read_text())
    lines = (recipe.weights_folder / "curve.jsonl").read_text().splitlines()
    first, last = (json.loads(line) for line in (lines[0], lines[-1]))
    assert record["steps"] == recipe.schedule.steps == last["step"] + 1
    assert last["loss"] < first["loss"]


@pytest.mark.parametrize("name", [pytest.param("copier", marks=pytest.mark.integration), "clip-tower"])
def test_a_short_retraining_follows_the_curve_on_record(name, tmp_path):
    recipe, steps = RECIPES[name], 2
    torch.set_num_threads(2)
    train(recipe, steps=steps, folder=tmp_path)
    again = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    recorded = (recipe.weights_folder / "curve.jsonl").read_text().splitlines()
    assert len(again) == steps
    for row, line in zip(again, recorded, strict=False):
        assert row["loss"] == pytest.approx(json.loads(line)["loss"], rel=1e-3)


def test_a_stopped_training_goes_on_where_it_was(tmp_path):
    recipe = replace(COPIER, schedule=Schedule(2), batch_size=4)
    whole = train(recipe, folder=tmp_path / "whole")
    train(recipe, steps=1, folder=tmp_path / "parts")
    parts = train(recipe, folder=tmp_path / "parts")
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("copier", "clip-tower", "reader-prism")])
def test_every_lesson_takes_a_step(name, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_trained", lambda name: training.untrained(RECIPES[name]).state_dict())
    recipe = replace(RECIPES[name], batch_size=4, guess=min(1, RECIPES[name].guess), schedule=Schedule(1))
    train(recipe, folder=tmp_path)
    (row,) = map(json.loads, (tmp_path / "curve.jsonl").read_text().splitlines())
    assert row["step"] == 0 and row["loss"] > 0 and len(row) > 3


def test_a_model_takes_its_vision_tower_from_the_recipe_named(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    made = {}
    for seed, name in enumerate(("binder", "vision-tower")):
        made[name] = models.build_vlm(seed)
        RECIPES[name].work_folder.mkdir(parents=True)
        torch.save(made[name].state_dict(), RECIPES[name].work_folder / "model.pt")
    weights = build(RECIPES["vlm-72b"]).state_dict()
    for key, tensor in weights.items():
        assert torch.equal(tensor, made["vision-tower" if "visual." in key else "binder"].state_dict()[key])
