"""What every model is trained on, step by step: losses and figures for the curve, seeded by recipe and step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from caprl_utils.hashing import derive_seed
from caprl_utils.mini.render import render, shown_words
from caprl_utils.mini.tokenizer import shared_tokenizer, told_keys
from caprl_utils.mini.world import KINDS, Picture, picture
from caprl_utils.mini.zoo import examples, models, packing
from caprl_utils.mini.zoo.recipes import READING_LEVELS, Recipe

LEVEL_UP = 0.82  # accuracy (running mean) at which the next level starts
Figures = tuple[torch.Tensor, dict[str, float]]
Lesson = Callable[[int, dict], Figures]
"""(step, state that checkpoints keep) -> loss and figures for the curve."""


def _rng(recipe: Recipe, step: int) -> random.Random:
    return random.Random(derive_seed("zoo", recipe.name, step))


def _shown(recipe: Recipe, step: int, number: int, kind: str | None = None) -> Picture:
    """One of the step's pictures; kinds take turns unless one is named."""
    return picture("zoo", derive_seed(recipe.name, step, number) % 10**6, kind)


def _learned(state: dict, accuracy: float, last_level: int) -> None:
    """Note an accuracy; the next level begins when the running mean is good enough."""
    state["recent"] = 0.9 * state["recent"] + 0.1 * accuracy
    if state["recent"] > LEVEL_UP and state["level"] < last_level:
        state.update(level=state["level"] + 1, recent=0.5)


# Language models


def copying_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """Three habits on random words: to repeat a stretch, then to recall a value by its key and name an option's letter.

    Repeating comes first and is asked of the second layer, so that the layers above can build on it. Pairs and options
    grow from two to five.
    """
    size = len(shared_tokenizer()) - len(told_keys())

    def lesson(step: int, state: dict) -> Figures:
        rng = _rng(recipe, step)
        ready = state.get("after", 0.0) > LEVEL_UP
        rows = [examples.repeated(rng, size) for _ in range(recipe.batch_size // (6 if ready else 3))]
        ids, copied = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])[:, 1:]
        early = model.model(input_ids=ids, output_hidden_states=True).hidden_states[2]
        logits, wanted = model.lm_head(model.model.norm(early)[:, :-1][copied]), ids[:, 1:][copied]
        loss = cross_entropy(logits, wanted)
        state["after"] = (logits.argmax(-1) == wanted).float().mean().item()
        figures = {"after": state["after"], "level": state["level"]}
        if not ready:
            return loss, figures
        for name, habit in (("recall", examples.recalled), ("letters", examples.lettered)):
            rows = torch.tensor([habit(rng, size, 2 + state["level"]) for _ in range(recipe.batch_size)])
            last = model(input_ids=rows).logits[:, -2]
            loss = loss + cross_entropy(last, rows[:, -1])
            figures[name] = (last.argmax(-1) == rows[:, -1]).float().mean().item()
        _learned(state, min(figures["letters"], figures["recall"]), examples.MOST_OPTIONS - 2)
        return loss, figures

    return lesson


def reading_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """Answers about captions: mostly of the current of `READING_LEVELS`, a fifth from the levels before."""

    def example(rng: random.Random, step: int, number: int, level: int) -> examples.Packed:
        chosen = level if rng.random() < 0.8 else rng.randint(0, level)
        most, num_options, missing = READING_LEVELS[chosen]
        shown = _shown(recipe, step, number, rng.choice(KINDS))
        return examples.reading(rng, shown, rng.randint(max(1, most // 2), most), num_options, missing)

    def lesson(step: int, state: dict) -> Figures:
        level = max(state["level"], recipe.level)
        rng = _rng(recipe, step)
        batch = packing.collate([example(rng, step, n, level) for n in range(recipe.batch_size)], shared_tokenizer())
        loss, predicted = packing.loss_of(model, batch)
        figures = packing.answer_accuracy(batch, predicted)
        _learned(state, figures["letters"], len(READING_LEVELS) - 1)
        return loss, figures | {"level": level}

    return lesson


def binding_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """To read visual tokens that are the sum of a key and a value, as the vision tower makes them: before any picture.

    The sums of random words stand in some of the 25 cells, noise in all, at the positions that visual tokens have: each
    of the three was needed (reports/lab-log.md). Asked in two forms: the value right after the key, as a caption tells
    it, and after "? key The answer is". The embeddings stay as they are.
    """
    table = model.get_input_embeddings()
    table.weight.requires_grad_(False)
    width, size = table.embedding_dim, len(shared_tokenizer()) - len(told_keys())
    _, _, (mark, prefill) = examples.letter_ids()
    head = shared_tokenizer()(packing.IMAGE_PREFIX).input_ids[:3]
    end = shared_tokenizer().convert_tokens_to_ids("<|vision_end|>")

    def answers(rng: random.Random, num_pairs: int, tail: list[int | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, wanted) after a query that ends in `tail`, where None stands for the key asked."""
        rows = [examples.bound(rng, size, num_pairs) for _ in range(recipe.batch_size)]
        keys, values, asked, wanted = (torch.tensor(part) for part in zip(*rows, strict=True))
        cells = torch.stack([torch.randperm(packing.IMAGE_TOKENS)[:num_pairs] for _ in rows])
        seen = torch.randn(len(rows), packing.IMAGE_TOKENS, width) * rng.choice((0.01, 0.02, 0.04))
        seen.scatter_add_(1, cells[..., None].expand(-1, -1, width), table(keys) + table(values))
        query = torch.stack([asked if t is None else torch.full_like(asked, t) for t in [end, *tail]], dim=1)
        opening = table(torch.tensor(head)).expand(len(rows), -1, -1)
        embedded = torch.cat([opening, seen, table(query)], dim=1)
        positions = packing.image_positions(torch.arange(embedded.shape[1]).expand(len(rows), -1))
        hidden = model.model.language_model(inputs_embeds=embedded, position_ids=positions).last_hidden_state
        return model.lm_head(hidden[:, -1]), wanted

    def lesson(step: int, state: dict) -> Figures:
        rng = _rng(recipe, step)
        torch.manual_seed(derive_seed("zoo", recipe.name, step) % 2**31)
        loss, figures = torch.zeros(()), {"level": state["level"]}
        for name, tail in (("caption", [mark, None]), ("answer", [mark, None, mark, prefill])):
            logits, wanted = answers(rng, rng.randint(2, 2 + state["level"]), tail)
            loss = loss + cross_entropy(logits, wanted)
            figures[name] = (logits.argmax(-1) == wanted).float().mean().item()
        _learned(state, min(figures["caption"], figures["answer"]), 6)
        return loss, figures

    return lesson


# Models that see


def _with_pictures(recipe: Recipe, first_step: int, make: Callable, loss: Callable[..., Figures]) -> Lesson:
    """loss(*make(rng, pictures)) of every step; the next step's is always under way in a thread."""

    def prepared(step: int) -> tuple:
        return make(_rng(recipe, step), [_shown(recipe, step, n) for n in range(recipe.batch_size)])

    def ahead() -> Iterator[tuple]:
        with ThreadPoolExecutor(1) as pool:
            step, coming = first_step, pool.submit(prepared, first_step)
            while True:
                step += 1
                ready, coming = coming, pool.submit(prepared, step)
                yield ready.result()

    batches = ahead()
    return lambda step, state: loss(*next(batches))


def pixels_of(pictures: list[Picture]) -> dict[str, torch.Tensor]:
    """Vision inputs of rendered pictures, by the real image processor."""
    arrays = torch.from_numpy(np.stack([np.asarray(render(p)) for p in pictures]))
    return dict(models.image_processor()(images=arrays.permute(0, 3, 1, 2), return_tensors="pt"))


def word_targets(shown: list[Picture], num_words: int) -> torch.Tensor:
    """(pictures * cells, words): one half for the key and one for the value of the cell's fact, else zeros."""
    convert, side = shared_tokenizer().convert_tokens_to_ids, packing.IMAGE_TOKENS_PER_SIDE
    wanted = torch.zeros(len(shown) * packing.IMAGE_TOKENS, num_words)
    for number, one in enumerate(shown):
        for (column, row), texts in shown_words(one).items():
            for text in texts:
                wanted[number * packing.IMAGE_TOKENS + row * side + column, convert(f" {text}")] = 0.5
    return wanted


def naming_loss(seen: torch.Tensor, wanted: torch.Tensor, words: torch.Tensor) -> Figures:
    """Loss and figures of visual tokens (cells, width) that should be the sum of their two words' embeddings.

    Cross-entropy with the two words as equally likely, plus the squared distance from that sum: without it tokens had
    three times its length and empty cells were as loud as full ones. `cells`: the two words are the likeliest.
    """
    scale = 20 / words.norm(dim=1).mean() ** 2  # a token equal to its word's embedding is then sure of it
    filled = wanted.sum(1) > 0
    logits = scale * seen[filled] @ words.T
    right = (wanted[filled].gather(1, logits.topk(2).indices) > 0).all(1)
    away = (seen - 2 * wanted @ words).square().sum(1).mean() / words.square().sum(1).mean()
    loss = cross_entropy(logits, wanted[filled]) + away
    return loss, {"cells": right.float().mean().item(), "away": away.item()}


def naming_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """The facts that grid cells stand for, as words of the language model's own (frozen) embeddings."""
    words = model.get_input_embeddings().weight.detach()

    def loss(pixels: dict[str, torch.Tensor], wanted: torch.Tensor) -> Figures:
        seen = torch.cat(list(model.model.get_image_features(**pixels).pooler_output))
        return naming_loss(seen, wanted, words)

    def make(_: random.Random, shown: list[Picture]) -> tuple:
        return pixels_of(shown), word_targets(shown, len(words))

    return _with_pictures(recipe, first_step, make, loss)


def clip_naming_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """The same for the small CLIP tower and its projector."""

    def make(_: random.Random, shown: list[Picture]) -> tuple:
        seen = models.clip_image_processor()(images=[render(p) for p in shown], return_tensors="pt")
        return seen.pixel_values, word_targets(shown, len(model.words))

    def loss(seen: torch.Tensor, wanted: torch.Tensor) -> Figures:
        return naming_loss(model(seen), wanted, model.words)

    return _with_pictures(recipe, first_step, make, loss)


def looking_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """Captions, questions and question writing about rendered pictures, and questions without their picture."""
    tokenizer = shared_tokenizer()

    def make(rng: random.Random, shown: list[Picture]) -> tuple:
        packed = [examples.looking(rng, p, recipe.styles, write=recipe.write) for p in shown]
        blind = [examples.guessing(rng, p) for p in shown[: recipe.guess]]
        return (
            packing.collate(packed, tokenizer, with_image=True),
            pixels_of(shown),
            packing.collate(blind, tokenizer, text_positions_of_vlm=True) if blind else None,
        )

    def loss(batch, pixels, blind) -> Figures:
        total, predicted = packing.loss_of(model, batch, pixels)
        figures = packing.answer_accuracy(batch, predicted)
        if blind is not None:
            blind_loss, blind_predicted = packing.loss_of(model, blind)
            total = total + 0.3 * blind_loss
            figures["blind"] = packing.answer_accuracy(blind, blind_predicted)["words"]
        return total, figures

    return _with_pictures(recipe, first_step, make, loss)


def score_accuracy(batch: packing.Batch, predicted: torch.Tensor) -> dict[str, float]:
    """Shares of scores predicted right, for either way of asking."""
    tokenizer = examples.judge_tokenizer()
    wanted = batch.labels[:, 1:][batch.labels[:, 1:] >= 0]
    before = torch.cat([wanted[:1], wanted[:-1]])
    places = {"amount": " is", "mistakes": examples.FINAL}
    right = (predicted == wanted).float()
    ids = {name: tokenizer.convert_tokens_to_ids(word) for name, word in places.items()}
    return {name: right[before == token].mean().item() for name, token in ids.items()}


def judging_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """Ratings of captions beside their pictures (see `examples.judged`)."""

    def make(rng: random.Random, shown: list[Picture]) -> tuple:
        packed = [examples.judged(rng, p) for p in shown]
        return packing.collate(packed, examples.judge_tokenizer(), with_image=True), pixels_of(shown)

    def loss(batch, pixels) -> Figures:
        total, predicted = packing.loss_of(model, batch, pixels)
        return total, score_accuracy(batch, predicted)

    return _with_pictures(recipe, first_step, make, loss)


LESSONS = {
    "judging": judging_lesson, "copying": copying_lesson, "reading": reading_lesson, "binding": binding_lesson,
    "naming": naming_lesson, "clip naming": clip_naming_lesson, "looking": looking_lesson,
}  # fmt: skip
