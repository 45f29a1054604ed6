"""What every model is trained on, step by step: losses and figures for the curve, seeded by recipe and step."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from caprl_utils.hashing import derive_seed
from caprl_utils.mini.render import render
from caprl_utils.mini.tokenizer import SPECIAL, shared_tokenizer
from caprl_utils.mini.vocabulary import INTRODUCTION
from caprl_utils.mini.world import KINDS, Picture, picture
from caprl_utils.mini.zoo import examples, models, packing, pool
from caprl_utils.mini.zoo.examples import READING_LEVELS
from caprl_utils.mini.zoo.recipes import RECIPES, Recipe
from caprl_utils.progress import track

LEVEL_UP = 0.82  # accuracy (running mean) at which the next level starts
NOISE = (0.01, 0.02, 0.04)  # added to ideal visual tokens
Figures = tuple[torch.Tensor, dict[str, float]]
Lesson = Callable[[int, dict], Figures]
"""(step, state that checkpoints keep) -> loss and figures for the curve."""


def _rng(recipe: Recipe, step: int) -> random.Random:
    return random.Random(derive_seed("zoo", recipe.name, step))


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
    size = len(shared_tokenizer())

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
    """Answers about captions: mostly of the current of `READING_LEVELS`, a fifth from the levels before.

    The embeddings stay the copier's: vision towers learn to speak them at the same time.
    """
    model.get_input_embeddings().weight.requires_grad_(False)

    def lesson(step: int, state: dict) -> Figures:
        rng, level, packed = _rng(recipe, step), state["level"], []
        for number in range(recipe.batch_size):
            chosen = level if rng.random() < 0.8 else rng.randint(0, level)
            shown = picture("zoo", derive_seed(recipe.name, step, number) % 10**6, rng.choice(KINDS))
            packed.append(examples.reading(rng, shown, READING_LEVELS[chosen]))
        loss, figures = packing.loss_of(model, packing.collate(packed))
        _learned(state, figures["letters"], len(READING_LEVELS) - 1)
        return loss, figures | {"level": level}

    return lesson


# Visual tokens


@functools.lru_cache
def turns(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two fixed rotations of a language model's space: a visual token holds its value behind one, its next key behind
    the other, so that the three words of a fact can be told apart.
    """
    generator = torch.Generator().manual_seed(width)
    drawn = [torch.randn(width, width, generator=generator) for _ in range(2)]
    return torch.linalg.qr(drawn[0])[0], torch.linalg.qr(drawn[1])[0]


def ideal_tokens(table: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """(..., 3) ids of key, value and next key -> (..., width): their visual token; an id of -1 adds nothing."""
    told = table[words.clamp(min=0)] * (words[..., None] >= 0)  # (..., 3, width)
    of_value, of_next = turns(table.shape[1])
    return told[..., 0, :] + told[..., 1, :] @ of_value + told[..., 2, :] @ of_next


def fact_ids(shown: Picture) -> torch.Tensor:
    """(facts, 3): ids of each fact's key, value and the key told next; after the last one the turn ends."""
    convert = shared_tokenizer().convert_tokens_to_ids
    keys = [convert(f" {fact.word}") for fact in shown.facts]
    values = [convert(f" {fact.value}") for fact in shown.facts]
    return torch.tensor([*zip(keys, values, [*keys[1:], convert(packing.END)], strict=True)])


def binding_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """To read visual tokens that bind a key, its value and the next key, as the vision tower makes them.

    The tokens of random words stand in some of the cells, noise in all, at the positions that visual tokens have: each
    of the three was needed (reports/lab-log.md). Asked for the value as a caption tells it, for the value after "? key
    The answer is", and for the next key after a sentence. The embeddings stay as they are.
    """
    table = model.get_input_embeddings()
    table.weight.requires_grad_(False)
    width, words = table.embedding_dim, range(len(SPECIAL), len(shared_tokenizer()))
    _, _, (mark, prefill) = examples.letter_ids()
    end, told, stop = shared_tokenizer().convert_tokens_to_ids(["<|vision_end|>", " is", ". The"])
    head = shared_tokenizer()(packing.IMAGE_PREFIX).input_ids[: packing.BEFORE_IMAGE]
    forms = {"value": ["key", told], "answer": [mark, "key", mark, prefill], "next": ["key", told, "value", stop]}

    def answers(rng: random.Random, num_facts: int, form: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, wanted) after a query about one of so many facts in a chain."""
        facts, asked = [], []
        for _ in range(recipe.batch_size):
            *chosen, last = rng.sample(words, 2 * num_facts + 1)
            keys, values = chosen[:num_facts], chosen[num_facts:]
            facts.append([*zip(keys, values, [*keys[1:], last], strict=True)])
            asked.append(rng.choice(facts[-1]))
        asked = dict(zip(("key", "value", "next"), torch.tensor(asked).T, strict=True))
        cells = torch.stack([torch.randperm(packing.IMAGE_TOKENS)[:num_facts] for _ in facts])
        seen = torch.randn(len(facts), packing.IMAGE_TOKENS, width) * rng.choice(NOISE)
        seen.scatter_add_(1, cells[..., None].expand(-1, -1, width), ideal_tokens(table.weight, torch.tensor(facts)))
        tail = [asked[t] if t in asked else torch.full_like(asked["key"], t) for t in [end, *forms[form]]]
        opening = table(torch.tensor(head)).expand(len(facts), -1, -1)
        embedded = torch.cat([opening, seen, table(torch.stack(tail, dim=1))], dim=1)
        positions = packing.image_positions(torch.arange(embedded.shape[1]).expand(len(facts), -1))
        hidden = model.model.language_model(inputs_embeds=embedded, position_ids=positions).last_hidden_state
        return model.lm_head(hidden[:, -1]), asked["next" if form == "next" else "value"]

    def lesson(step: int, state: dict) -> Figures:
        rng = _rng(recipe, step)
        torch.manual_seed(derive_seed("zoo", recipe.name, step) % 2**31)
        loss, figures = torch.zeros(()), {"level": state["level"]}
        for form in forms:
            logits, wanted = answers(rng, rng.randint(2, 2 + state["level"]), form)
            loss = loss + cross_entropy(logits, wanted)
            figures[form] = (logits.argmax(-1) == wanted).float().mean().item()
        _learned(state, min(figures[form] for form in forms), 8)
        return loss, figures

    return lesson


# Models that see


def _with_pictures(
    recipe: Recipe, first_step: int, make: Callable, loss: Callable[..., Figures], part: str = "fresh"
) -> Lesson:
    """loss(*make(rng, numbers of pictures of a part of the pool, step)) of every step; a thread is one step ahead."""

    def prepared(step: int) -> tuple:
        rng = _rng(recipe, step)
        return make(rng, [rng.choice(pool.PARTS[part]) for _ in range(recipe.batch_size)], step)

    worker = ThreadPoolExecutor(1)
    coming = [worker.submit(prepared, first_step)]

    def lesson(step: int, state: dict) -> Figures:
        coming.append(worker.submit(prepared, step + 1))
        return loss(*coming.pop(0).result())

    return lesson


def word_targets(numbers: list[int]) -> torch.Tensor:
    """(pictures, cells, 3): ids of the words that each cell's token stands for, -1 where there is none.

    The cell of a fact has its three words; one in which a value stands written has that, ready to be copied.
    """
    wanted = torch.full((len(numbers), packing.IMAGE_TOKENS, 3), -1)
    for row, number in enumerate(numbers):
        wanted[row, :, 1] = pool.written(number)
        wanted[row, pool.cells(number)] = fact_ids(pool.picture_of(number))
    return wanted


def naming_loss(seen: torch.Tensor, wanted: torch.Tensor, table: torch.Tensor) -> Figures:
    """Loss and figures of visual tokens (cells, width) that should be the ideal ones of `wanted` (cells, 3).

    Cross-entropy of each of the three words, plus the squared distance from the ideal token: without it tokens had
    three times its length and empty cells were as loud as full ones. `written`: of values in cells of their own.
    """
    scale = 20 / table.norm(dim=1).mean() ** 2  # a token equal to its word's embedding is then sure of it
    of_value, of_next = turns(table.shape[1])
    fact = wanted[:, 0] >= 0
    away = (seen - ideal_tokens(table, wanted)).square().sum(1).mean() / table.square().sum(1).mean()
    loss, figures = away, {"away": away.item()}
    for place, (name, turn) in enumerate((("keys", None), ("values", of_value.T), ("next", of_next.T))):
        filled = wanted[:, place] >= 0
        logits = scale * (seen[filled] if turn is None else seen[filled] @ turn) @ table.T
        loss = loss + cross_entropy(logits, wanted[filled, place])
        right = (logits.argmax(-1) == wanted[filled, place]).float()
        figures[name] = right[fact[filled]].mean().item()
        if name == "values":
            figures["written"] = right[~fact[filled]].mean().item()
    return loss, figures


def _looked_at(model, images) -> torch.Tensor:
    """(pictures * IMAGE_TOKENS, width): visual tokens of images, with gradients."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat(list(model.model.get_image_features(**images).pooler_output)).float()


def _process(images: torch.Tensor):
    return models.image_processor()(images=images, return_tensors="pt")


def spelling_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """The vision tower reads pages of single words, in all fonts and sizes of the world, before any picture.

    Patches enter along the axes in which they vary most, each as loud as any other: a start that sees everything.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual" in name)
    if first_step == 0:
        torch.nn.init.normal_(model.model.visual.merger.mlp[2].weight, std=0.002)  # tokens as quiet as words
        pixels = _process(examples.pages(random.Random(0), 64)[0]).pixel_values
        patches = pixels[pixels.std(1) > 0.05]  # not the blank ones
        patches = patches - patches.mean(0)
        variances, axes = torch.linalg.eigh(patches.T @ patches / len(patches))
        weight = model.model.visual.patch_embed.proj.weight
        axes, variances = axes[:, -len(weight) :], variances[-len(weight) :]
        turn = torch.linalg.qr(torch.randn(len(weight), len(weight), generator=torch.Generator().manual_seed(0)))[0]
        with torch.no_grad():
            weight.copy_(0.5 * (turn @ (axes * (variances + 1e-4 * variances[-1]).rsqrt()).T).view_as(weight))
    table = model.get_input_embeddings().weight.detach()

    def make(rng: random.Random, numbers: list[int], _: int) -> tuple:
        pages, wanted = examples.pages(rng, len(numbers))
        return _process(pages), wanted

    def loss(pixels, wanted) -> Figures:
        seen = _looked_at(model, pixels)
        filled = wanted >= 0
        logits = 20 / table.norm(dim=1).mean() ** 2 * seen[filled] @ table.T
        right = (logits.argmax(-1) == wanted[filled]).float().mean()
        return cross_entropy(logits, wanted[filled]), {"words": right.item()}

    return _with_pictures(recipe, first_step, make, loss, recipe.pictures)


def naming_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """The vision tower alone: the visual token of each fact's cell is the fact, all others are silent. Also of the
    small CLIP tower with its projector.
    """
    clip = isinstance(model, models.ClipReader)
    if not clip:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("visual" in name)
    table = model.words if clip else model.get_input_embeddings().weight.detach()
    process = models.clip_image_processor() if clip else models.image_processor()

    def make(rng: random.Random, numbers: list[int], _: int) -> tuple:
        return process(images=pool.pixels(numbers, rng), return_tensors="pt"), word_targets(numbers)

    def loss(images, wanted) -> Figures:
        seen = model(images.pixel_values) if clip else _looked_at(model, images)
        return naming_loss(seen, wanted.flatten(0, 1), table)

    return _with_pictures(recipe, first_step, make, loss, recipe.pictures)


def imagining_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """What `looking_lesson` teaches, from ideal visual tokens at random cells, with noise: before any picture."""
    table = model.get_input_embeddings()
    table.weight.requires_grad_(False)

    def lesson(step: int, state: dict) -> Figures:
        rng = _rng(recipe, step)
        torch.manual_seed(derive_seed("zoo", recipe.name, step) % 2**31)
        shown = [picture("zoo", rng.randrange(10**6)) for _ in range(recipe.batch_size)]
        packed = [examples.looking(rng, one, recipe.styles, recipe.write) for one in shown]
        wanted = torch.full((len(shown), packing.IMAGE_TOKENS, 3), -1)
        for row, one in enumerate(shown):
            wanted[row, torch.randperm(packing.IMAGE_TOKENS)[: len(one.facts)]] = fact_ids(one)
        seen = ideal_tokens(table.weight, wanted)
        seen = seen + torch.randn_like(seen) * rng.choice(NOISE)
        return packing.loss_of(model, packing.collate(packed, with_image=True), seen)

    return lesson


@functools.lru_cache(maxsize=1)
def _seen_by(tower: str) -> np.ndarray:
    """(pictures, IMAGE_TOKENS, width): what a trained tower makes of the pool's fresh pictures, once and kept."""
    file, numbers, rows = RECIPES[tower].work_folder / "seen.npy", pool.PARTS["fresh"], []
    if not file.exists():
        model = models.build_vlm(0)
        model.load_state_dict(torch.load(file.with_name("model.pt"), weights_only=True))
        for first in track(range(numbers.start, numbers.stop, 60), f"{tower} looks"):
            with torch.no_grad():
                images = _process(pool.pixels(range(first, first + 60), None))
                rows += [tokens.half().numpy() for tokens in model.model.get_image_features(**images).pooler_output]
        np.save(file, np.stack(rows))
    return np.load(file, mmap_mode="r")


def _seen(recipe: Recipe, numbers: list[int], step: int) -> torch.Tensor:
    """(pictures, IMAGE_TOKENS, width): visual tokens of pictures of the pool, never twice the same."""
    first = pool.PARTS["fresh"].start
    tokens = torch.from_numpy(np.stack([_seen_by(recipe.tower)[number - first] for number in numbers])).float()
    generator = torch.Generator().manual_seed(derive_seed("seen", recipe.name, step) % 2**31)
    return tokens + 0.1 * tokens.std() * torch.randn(tokens.shape, generator=generator)


def looking_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """Captions, questions and question writing about rendered pictures, and questions without their picture."""

    def make(rng: random.Random, numbers: list[int], step: int) -> tuple:
        shown = [pool.picture_of(number) for number in numbers]
        blind = [examples.guessing(rng, one) for one in shown[: recipe.guess]]
        packed = [examples.looking(rng, one, recipe.styles, recipe.write) for one in shown]
        seen = _seen(recipe, numbers, step)
        return packing.collate(packed, with_image=True), seen, packing.collate(blind) if blind else None

    def loss(batch, seen, blind) -> Figures:
        total, figures = packing.loss_of(model, batch, seen)
        if blind is not None:
            blind_loss, blind_figures = packing.loss_of(model, blind)
            total, figures = total + 0.3 * blind_loss, figures | {"blind": blind_figures["words"]}
        return total, figures

    return _with_pictures(recipe, first_step, make, loss)


def judging_loss(model, made: list[tuple], seen: torch.Tensor, mark: bool = True) -> Figures:
    """Loss and figures of scores of pairs (`examples.preferred`): their differences should tell which of two captions
    raters would prefer (Bradley and Terry's model).

    The score is the mean of the digits 1 to 5 under the model's probabilities, as `rl.rewards` reads it. The words
    around the digit, and the verifier's letters, are learned as any other. `short` and `long`: pairs of either pool
    told as the raters told them; `verified`: sentences rightly found true or false. mark: the end of every statement
    that is judged is to say the same; without it, neither was learned in 80 steps (reports/lab-log.md).
    """
    convert = shared_tokenizer().convert_tokens_to_ids
    digits, letters = torch.tensor(convert([f" {n}" for n in range(1, 6)])), torch.tensor(convert([" A", " B"]))
    packed, first_wins, true = zip(*made, strict=True)
    first_wins = torch.tensor(first_wins)  # (pictures, 2 pools)
    batch = packing.collate(packed, with_image=True)
    answer = batch.labels[:, 1:] != packing.IGNORED
    if mark:
        mark_statements(batch, true, letters)
    logits, wanted = packing.answers_of(model, batch, seen)
    answer = answer[batch.labels[:, 1:] != packing.IGNORED]  # of the learned tokens, those of answers
    scored, verified = answer & torch.isin(wanted, digits), torch.isin(wanted, letters)
    chances = logits[scored][:, digits].log_softmax(-1)
    scores = chances.exp() @ torch.arange(1.0, 6.0)
    ahead = scores.view(-1, 2, 2).diff(dim=2).squeeze(2).neg()  # first caption's score - second's
    told = ((ahead > 0) == first_wins).float().mean(0)
    unequal = binary_cross_entropy_with_logits(2 * ahead, first_wins.float())
    within = 0.1 * (scores.mean() - 3).square() - 0.1 * chances.mean()  # one sure digit would have no slope to learn by
    words = cross_entropy(logits[~scored], wanted[~scored])
    other = (logits[scored].logsumexp(-1) - logits[scored][:, digits].logsumexp(-1)).mean()  # than a digit
    spread = scores.view(-1, 2, 2).std(dim=(0, 2))
    right = (logits.argmax(-1) == wanted).float()
    figures = {"short": told[0], "long": told[1], "spread_short": spread[0], "spread_long": spread[1],
               "verified": right[verified & answer].mean()} | (
               {"marked": right[verified & ~answer].mean()} if mark else {})  # fmt: skip
    return unequal + within + words + other, {name: value.item() for name, value in figures.items()}


def mark_statements(batch: packing.Batch, true: list[list[bool]], letters: torch.Tensor) -> None:
    """Label the last word of each statement with the letter of true or false; before each caption's first there is one
    more full stop, that of its introduction or of the verifier's question.
    """
    stops = torch.tensor([i for word, i in shared_tokenizer().get_vocab().items() if word.startswith(".")])
    opening = torch.tensor(shared_tokenizer().convert_tokens_to_ids([*INTRODUCTION.values(), " image"]))
    ends = torch.isin(batch.input_ids[:, 1:], stops) & ~torch.isin(batch.input_ids[:, :-1], opening)
    for row, marks in enumerate(true):
        places = ends[row].nonzero().flatten() + 1
        batch.labels[row, places] = letters[(~torch.tensor(marks)).long()]


def judging_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """See `judging_loss`."""

    def make(rng: random.Random, numbers: list[int], step: int) -> tuple:
        return [examples.preferred(rng, pool.picture_of(number)) for number in numbers], _seen(recipe, numbers, step)

    return _with_pictures(recipe, first_step, make, lambda made, seen: judging_loss(model, made, seen))


@torch.no_grad()
def held_out_pairs(model, batches: int = 10, pictures: int = 50) -> dict[str, float]:
    """The figures of `judging_loss` on pictures that no model of the zoo has seen."""
    found = []
    for number in range(batches):
        shown = [picture("zoo-held-out", number * pictures + i) for i in range(pictures)]
        rng = random.Random(derive_seed("held-out pairs", number))
        images = torch.from_numpy(np.stack([np.asarray(render(one)) for one in shown])).permute(0, 3, 1, 2)
        seen = _looked_at(model, _process(images)).view(pictures, packing.IMAGE_TOKENS, -1)
        found.append(judging_loss(model, [examples.preferred(rng, one) for one in shown], seen, mark=False)[1])
    return {name: round(sum(one[name] for one in found) / batches, 4) for name in found[0]}


LESSONS = {
    "copying": copying_lesson, "reading": reading_lesson, "binding": binding_lesson, "spelling": spelling_lesson,
    "naming": naming_lesson, "clip naming": naming_lesson, "imagining": imagining_lesson,
    "looking": looking_lesson, "judging": judging_lesson,
}  # fmt: skip
