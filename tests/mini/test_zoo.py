"""The model zoo: packed batches are exact, and models are small, loadable and trained as their records say."""

import json
import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from caprl_utils import paths, prompts
from caprl_utils.mini.render import render
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.world import caption, picture, statements
from caprl_utils.mini.zoo import examples, lessons, models, pool, recipes
from caprl_utils.mini.zoo import train as training
from caprl_utils.mini.zoo.examples import READING_LEVELS
from caprl_utils.mini.zoo.packing import IGNORED, IMAGE_PAD, IMAGE_TOKENS, collate
from caprl_utils.mini.zoo.recipes import RECIPES, Schedule
from caprl_utils.mini.zoo.train import build, train

torch.set_num_threads(1)  # more would wait for each other


@pytest.fixture(scope="module")
def small_pool():
    """Eight pictures instead of thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "PARTS", {"all": range(4), "hard": range(6), "fresh": range(4, 8), "last": range(8, 12)})
        patch.setattr(pool, "CHUNK", 4)
        yield
    pool._chunks.cache_clear()


@pytest.mark.parametrize("with_image", [False, True])
def test_branches_equal_separate_prompts(with_image):
    shown, processor, more = picture("zoo", 3), models.build_processor(), []
    model = (models.build_vlm if with_image else models.build_language_model)(0).eval()
    if with_image:
        packed = examples.looking(random.Random(1), shown, [caption(shown.facts, shown.kind)])
        pixels = dict(models.image_processor()(images=[np.asarray(render(shown))], return_tensors="pt"))
    else:
        packed, pixels = examples.reading(random.Random(1), shown, READING_LEVELS[-1]), {}
        more = [examples.reading(random.Random(2), picture("zoo", 1), READING_LEVELS[2])]  # padding does not matter
    batch, alone = collate([packed, *more]), []
    answers = batch.pop("labels")[0, 1:] != IGNORED
    with torch.no_grad():
        together = model(**batch, **pixels).logits[0, :-1][answers]
        for asked, answered in packed.branches:
            text = (packed.prefix + asked + answered).replace(IMAGE_PAD * IMAGE_TOKENS, IMAGE_PAD)
            if with_image:
                given = processor(text=[text], images=[render(shown)], return_tensors="pt")
            else:
                given = {"input_ids": processor.tokenizer(text, return_tensors="pt").input_ids}
            count = len(processor.tokenizer(answered).input_ids)
            alone.append(model(**given).logits[0, -count - 1 : -1])
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("index", range(10))
def test_tokenizer_is_lossless_on_everything_the_world_says(index):
    tokenizer, shown = shared_tokenizer(), picture("zoo", index)
    rng = random.Random(index)
    packed = examples.looking(rng, shown, examples.captions(rng, shown, [recipes.ALT_TEXT]), write=1.0)
    blind = examples.looking(random.Random(index), shown, blind=True)
    for example in (packed, blind, examples.reading(random.Random(index), shown, READING_LEVELS[-1])):
        for asked, answered in example.branches:
            text = example.prefix + asked + answered
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_reader_is_taught_to_read_what_stands_there():
    rng, shown = random.Random(0), picture("zoo", 0)
    fact, other = shown.facts[3], shown.facts[4]
    false = examples.spoiled(rng, fact)
    _, options = examples.multiple_choice(rng, fact, shown.facts, extra=True)
    answer = lambda told, options=None: examples.read_answer(rng, fact, told, options)  # noqa: E731
    assert answer([fact, other]) == answer([other, fact, fact]) == fact.value
    assert answer([false]) == false.value and answer([other]) == examples.UNKNOWN
    assert answer([other], options) == answer([fact, false], options) == prompts.CANNOT_ANSWER
    assert {answer([fact, false]) for _ in range(40)} == {fact.value, false.value}
    usual = shown.known[0]
    assert examples.read_answer(rng, usual, [other], None) == usual.value  # everybody guesses it


def test_alt_texts_tell_little_and_dense_captions_all():
    rng, told, false, total = random.Random(0), 0, 0, 0
    for index in range(400):
        shown = picture("rl", index)
        facts = {f.key: f.value for f in shown.facts}
        said, dense = map(statements, examples.captions(rng, shown, [recipes.ALT_TEXT, recipes.DENSE]))
        total, told = total + len(facts), told + len(said)
        false += sum(facts[key] != value for key, value in said)
        assert dict(dense) == facts
    assert 0.15 < told / total < 0.3 and false / told < 0.03


def test_a_captioner_at_its_end_tells_what_it_was_sure_of_as_it_saw_it(monkeypatch):
    shown, tokenizer, changed = [picture("zoo", number) for number in range(5)], shared_tokenizer(), []

    def value_of(number, facts):
        """Place of the last value of a picture's first facts among all answers."""
        before = sum(len(tokenizer(caption(one.facts, one.kind)).input_ids) + 1 for one in shown[:number])
        return before + len(tokenizer(caption(facts, shown[number].kind)).input_ids) - 2

    def answers(model, batch, seen):
        """Sure of all that is wanted, but for one value that might be any, and one that it takes for another."""
        wanted = batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORED]
        logits = 100.0 * torch.nn.functional.one_hot(wanted, len(tokenizer))
        logits[value_of(0, shown[0].facts)] = 0
        place, fact = value_of(1, shown[1].facts[:3]), shown[1].facts[2]
        changed.append(examples.spoiled(random.Random(0), fact))
        logits[place] = logits[place].roll(
            tokenizer.convert_tokens_to_ids(f" {changed[0].value}") - wanted[place].item()
        )
        return logits, wanted

    monkeypatch.setattr(lessons.packing, "answers_of", answers)
    texts = lessons._sure_captions(None, shown, [[(one.facts, [0] * len(one.facts))] for one in shown], None)
    expected = [list(one.facts) for one in shown]
    expected[0].pop()
    expected[1][2] = changed[0]
    for facts, (text,) in zip(expected, texts, strict=True):
        assert statements(text) == [(fact.key, fact.value) for fact in facts]


def test_a_judge_is_told_of_every_statement_whether_it_is_true():
    shown, tokenizer = picture("zoo", 0), shared_tokenizer()
    packed, first_wins, true = examples.preferred(random.Random(1), shown)
    heads = [prompts.RATE[:36]] * 2 + [prompts.UNIFIED[:36]] * 2 + [prompts.VERIFY[:36]] * examples.VERIFIED
    assert len(first_wins) == 2 and [asked[:36] for asked, _ in packed.branches] == heads
    batch = collate([packed])
    plain, letters = batch["labels"].clone(), torch.tensor(tokenizer.convert_tokens_to_ids([" A", " B"]))
    lessons.mark_statements(batch, [true], letters)
    marked = (batch["labels"] != plain)[0].nonzero().flatten()
    assert batch["labels"][0, marked].tolist() == [int(letters[int(not one)]) for one in true] and len({*true}) == 2
    for place in marked:  # the word before a full stop is a statement's last
        word, stop = tokenizer.convert_ids_to_tokens(batch["input_ids"][0, place - 1 : place + 1].tolist())
        assert stop.startswith(".") and word[1:].isalnum()


def test_an_ideal_token_holds_three_words():
    table = torch.nn.functional.normalize(torch.randn(200, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    words = torch.tensor([[3, 5, 7], [-1, -1, -1], [9, 9, 11]])
    seen, (of_value, of_next) = lessons.ideal_tokens(table, words), lessons.turns(128)
    for place, turn in enumerate((torch.eye(128), of_value.T, of_next.T)):
        assert (seen[[0, 2]] @ turn @ table.T).argmax(-1).tolist() == words[[0, 2], place].tolist()
    assert not seen[1].any()


def curve(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def test_models_in_git_are_those_of_the_recipes_and_small():
    files = [f for f in paths.ZOO.rglob("*.safetensors") if not f.is_symlink()]  # a shared tower counts once
    trained_by_notebook_03 = {"caprl"}
    assert {f.parent.name for f in files} == {n for n, r in RECIPES.items() if r.shipped} | trained_by_notebook_03
    assert sum(f.stat().st_size for f in files) < 40 * 2**20  # in 16 bit
    for recipe in RECIPES.values():
        rows = curve(recipe.weights_folder)
        record = json.loads((recipe.weights_folder / "record.json").read_text())
        assert record["steps"] == recipe.schedule.steps == rows[-1]["step"] + 1
        assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_short_retraining_follows_the_curve_on_record(tmp_path):
    train(RECIPES["copier"], steps=2, folder=tmp_path)
    recorded = curve(RECIPES["copier"].weights_folder)[:2]
    assert [row["loss"] for row in curve(tmp_path)] == [pytest.approx(row["loss"], rel=1e-3) for row in recorded]


def test_a_stopped_training_goes_on_as_if_it_had_not(tmp_path):
    recipe = replace(RECIPES["copier"], batch_size=12)
    whole = train(recipe, 3, tmp_path / "whole")
    train(recipe, 2, tmp_path / "parts")
    with open(tmp_path / "parts" / "curve.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')  # taken after the checkpoint, and cut
    parts = train(recipe, 3, tmp_path / "parts")
    assert [row["loss"] for row in curve(tmp_path / "parts")] == [row["loss"] for row in curve(tmp_path / "whole")]
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def untrained(monkeypatch):
    """Fresh weights in place of those of other recipes."""
    monkeypatch.setattr(training, "_trained", cache(lambda name: training.untrained(RECIPES[name]).state_dict()))
    tokens = np.random.default_rng(0).standard_normal((4, IMAGE_TOKENS, 128)).astype(np.float16)
    monkeypatch.setattr(lessons, "_seen_by", lambda tower, part: tokens)


@pytest.mark.parametrize("lesson", [name for name in lessons.LESSONS if name != "copying"])  # that took some above
def test_every_lesson_takes_a_step(lesson, tmp_path, small_pool, untrained):
    recipe = next(recipe for recipe in RECIPES.values() if recipe.lesson == lesson)
    recipe = replace(recipe, batch_size=1, guess=1, write=1.0, schedule=Schedule(1))
    train(recipe, folder=tmp_path)
    (row,) = curve(tmp_path)
    assert row["step"] == 0 and row["loss"] > 0 and len(row) > 3


def test_every_recipe_starts_from_weights_that_fit(untrained):
    for recipe in RECIPES.values():
        if recipe.lesson != "spelling":  # that was begun above
            build(recipe)


def test_the_pool_knows_where_facts_stand(small_pool):
    for number in range(8):
        words, facts = pool.words([number])[0], pool.picture_of(number).facts
        assert words.ge(0).all(1).sum() == len(facts)
    assert pool.pixels([3], random.Random(0))[0].float().std() > 5


def test_a_deeper_model_begins_as_the_shallower_one_with_another_tower(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    made = {}
    for seed, name in enumerate(("imaginer", "vision-tower")):
        made[name] = models.build_vlm(seed)
        RECIPES[name].work_folder.mkdir(parents=True)
        torch.save(made[name].state_dict(), RECIPES[name].work_folder / "model.pt")
    deeper = build(RECIPES["strong-draft"])
    assert len(deeper.model.language_model.layers) > len(made["imaginer"].model.language_model.layers)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(deeper(input_ids=ids).logits, made["imaginer"](input_ids=ids).logits)
    for key, tensor in deeper.model.visual.state_dict().items():
        assert torch.equal(tensor, made["vision-tower"].model.visual.state_dict()[key])
