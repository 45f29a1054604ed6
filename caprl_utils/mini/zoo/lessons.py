"""What every model is trained on: each lesson gives loss and figures (for the curve) of one step, seeded by recipe and
step. `state` is what checkpoints keep of it: the level, and a running mean of the accuracy.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from caprl_utils import prompts
from caprl_utils.files import appearing
from caprl_utils.hashing import derive_seed
from caprl_utils.mini.render import render
from caprl_utils.mini.tokenizer import SPECIAL, shared_tokenizer
from caprl_utils.mini.vocabulary import INTRODUCTION
from caprl_utils.mini.world import KINDS, Picture, caption, picture
from caprl_utils.mini.zoo import examples, models, packing, pool
from caprl_utils.mini.zoo.examples import READING_LEVELS
from caprl_utils.mini.zoo.recipes import RECIPES, Recipe
from caprl_utils.progress import track

LEVEL_UP = 0.82  # accuracy (running mean) at which the next level starts
NOISE = (0.01, 0.02, 0.04)  # added to ideal visual tokens
SURE = 0.7  # ours: of 300 unseen pictures the strong captioner tells 92 % of the facts then, and 1 % of it is false
State = dict[str, Any]
Figures = tuple[torch.Tensor, dict[str, float]]


def _rng(recipe: Recipe, step: int) -> random.Random:
    return random.Random(derive_seed("zoo", recipe.name, step))


def _learned(state: State, accuracy: float, last_level: int) -> None:
    """Note an accuracy; the next level begins when the running mean is good enough."""
    state["recent"] = 0.9 * state["recent"] + 0.1 * accuracy
    if state["recent"] > LEVEL_UP and state["level"] < last_level:
        state.update(level=state["level"] + 1, recent=0.5)


def _predicted(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Cross-entropy of tokens, and the share that is predicted rightly."""
    return cross_entropy(logits, wanted), (logits.argmax(-1) == wanted).float().mean().item()


# Language models


def copying(model, recipe: Recipe, step: int, state: State) -> Figures:
    """Three habits on random words: to repeat a stretch, then to recall a value by its key and name an option's letter.

    Repeating comes first and is asked of the second layer, so that the layers above can build on it. Pairs and options
    grow from two to five.
    """
    rng, size = _rng(recipe, step), len(shared_tokenizer())
    ready = state.get("after", 0.0) > LEVEL_UP
    rows = [examples.repeated(rng, size) for _ in range(recipe.batch_size // (6 if ready else 3))]
    ids, copied = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])[:, 1:]
    early = model.model(input_ids=ids, output_hidden_states=True).hidden_states[2]
    loss, state["after"] = _predicted(model.lm_head(model.model.norm(early)[:, :-1][copied]), ids[:, 1:][copied])
    figures = {"after": state["after"], "level": state["level"]}
    if not ready:
        return loss, figures
    for name, habit in (("recall", examples.recalled), ("letters", examples.lettered)):
        rows = torch.tensor([habit(rng, size, 2 + state["level"]) for _ in range(recipe.batch_size)])
        more, figures[name] = _predicted(model(input_ids=rows).logits[:, -2], rows[:, -1])
        loss = loss + more
    _learned(state, min(figures["letters"], figures["recall"]), examples.MOST_OPTIONS - 2)
    return loss, figures


def reading(model, recipe: Recipe, step: int, state: State) -> Figures:
    """Answers about captions: mostly of the current of `READING_LEVELS`, a fifth from the levels before."""
    rng, level, packed = _rng(recipe, step), state["level"], []
    for number in range(recipe.batch_size):
        chosen = level if rng.random() < 0.8 else rng.randint(0, level)
        shown = picture("zoo", derive_seed(recipe.name, step, number) % 10**6, rng.choice(KINDS))
        packed.append(examples.reading(rng, shown, READING_LEVELS[chosen]))
    loss, figures = packing.loss_of(model, packing.collate(packed))
    _learned(state, figures["letters"], len(READING_LEVELS) - 1)
    return loss, figures | {"level": level}


# Visual tokens


@functools.cache
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


def _bound(model, rng: random.Random, count: int, num_facts: int, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, wanted) after a query about one of so many facts in a chain, of random words in `count` images.

    The form says what is asked for: the value as a caption tells it, the value after "? key The answer is", or the next
    key after a sentence.
    """
    table = model.get_input_embeddings()
    width, known = table.embedding_dim, range(len(SPECIAL), len(shared_tokenizer()))
    _, _, (mark, prefill) = examples.letter_ids()
    end, told, stop = shared_tokenizer().convert_tokens_to_ids(["<|vision_end|>", " is", ". The"])
    head = shared_tokenizer()(packing.IMAGE_PREFIX).input_ids[: packing.BEFORE_IMAGE]
    forms = {"value": ["key", told], "answer": [mark, "key", mark, prefill], "next": ["key", told, "value", stop]}
    facts, asked = [], []
    for _ in range(count):
        *chosen, last = rng.sample(known, 2 * num_facts + 1)
        keys, values = chosen[:num_facts], chosen[num_facts:]
        facts.append([*zip(keys, values, [*keys[1:], last], strict=True)])
        asked.append(rng.choice(facts[-1]))
    asked = dict(zip(("key", "value", "next"), torch.tensor(asked).T, strict=True))
    cells = torch.stack([torch.randperm(packing.IMAGE_TOKENS)[:num_facts] for _ in facts])
    seen = torch.randn(count, packing.IMAGE_TOKENS, width) * rng.choice(NOISE)
    seen.scatter_add_(1, cells[..., None].expand(-1, -1, width), ideal_tokens(table.weight, torch.tensor(facts)))
    tail = [asked[t] if t in asked else torch.full_like(asked["key"], t) for t in [end, *forms[form]]]
    opening = table(torch.tensor(head)).expand(count, -1, -1)
    embedded = torch.cat([opening, seen, table(torch.stack(tail, dim=1))], dim=1)
    positions = packing.image_positions(torch.arange(embedded.shape[1]).expand(count, -1))
    hidden = model.model.language_model(inputs_embeds=embedded, position_ids=positions).last_hidden_state
    return model.lm_head(hidden[:, -1]), asked["next" if form == "next" else "value"]


def binding(model, recipe: Recipe, step: int, state: State) -> Figures:
    """To read visual tokens that bind a key, its value and the next key, as the vision tower makes them.

    The tokens of random words stand in some of the cells, noise in all, at the positions that visual tokens have: each
    of the three was needed (reports/lab-log.md).
    """
    rng, loss, figures = _rng(recipe, step), torch.zeros(()), {"level": state["level"]}
    for form in ("value", "answer", "next"):
        num_facts = rng.randint(2, 2 + state["level"])
        more, figures[form] = _predicted(*_bound(model, rng, recipe.batch_size, num_facts, form))
        loss = loss + more
    _learned(state, min(figures["value"], figures["answer"], figures["next"]), 8)
    return loss, figures


def _looked(rng: random.Random, shown: Picture, recipe: Recipe) -> packing.Packed:
    return examples.looking(rng, shown, examples.captions(rng, shown, recipe.styles), recipe.write)


def imagining(model, recipe: Recipe, step: int, state: State) -> Figures:
    """What `looking` teaches, from ideal visual tokens at random cells, with noise: before any picture."""
    rng, table = _rng(recipe, step), model.get_input_embeddings()
    shown = [picture("zoo", rng.randrange(10**6)) for _ in range(recipe.batch_size)]
    packed = [_looked(rng, one, recipe) for one in shown]
    wanted = torch.full((len(shown), packing.IMAGE_TOKENS, 3), -1)
    for row, one in enumerate(shown):
        wanted[row, torch.randperm(packing.IMAGE_TOKENS)[: len(one.facts)]] = torch.tensor(pool.fact_ids(one))
    seen = ideal_tokens(table.weight, wanted)
    seen = seen + torch.randn_like(seen) * rng.choice(NOISE)
    return packing.loss_of(model, packing.collate(packed), seen)


# Vision towers


def _pictures(recipe: Recipe, step: int) -> tuple[random.Random, list[int]]:
    """A generator, and the numbers of a step's pictures in the pool."""
    rng = _rng(recipe, step)
    return rng, [rng.choice(pool.PARTS[recipe.pictures]) for _ in range(recipe.batch_size)]


def _process(images: torch.Tensor):
    return models.image_processor()(images=images, return_tensors="pt")


def _looked_at(model, images) -> torch.Tensor:
    """(pictures * IMAGE_TOKENS, width): visual tokens of images, with gradients."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat(list(model.model.get_image_features(**images).pooler_output)).float()


def _sharpness(table: torch.Tensor) -> torch.Tensor:
    """Scale of logits at which a token equal to its word's embedding is sure of it."""
    return 20 / table.norm(dim=1).mean() ** 2


def see_everything(model) -> None:
    """A start for a vision tower: patches enter along the axes in which they vary most, each as loud as any other."""
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


def spelling(model, recipe: Recipe, step: int, state: State) -> Figures:
    """The vision tower reads pages of single words, in all fonts and sizes of the world, before any picture."""
    rng, numbers = _pictures(recipe, step)
    pages, wanted = examples.pages(rng, len(numbers))
    table, filled = model.get_input_embeddings().weight.detach(), wanted >= 0
    logits = _sharpness(table) * _looked_at(model, _process(pages))[filled] @ table.T
    loss, right = _predicted(logits, wanted[filled])
    return loss, {"words": right}


def naming(model, recipe: Recipe, step: int, state: State) -> Figures:
    """The vision tower alone: the visual token of each fact's cell is the fact, all others are silent. Also of the
    small CLIP tower with its projector.
    """
    rng, numbers = _pictures(recipe, step)
    shown, wanted = pool.pixels(numbers, rng), pool.words(numbers).flatten(0, 1)
    if isinstance(model, models.ClipReader):
        images = models.clip_image_processor()(shown, return_tensors="pt")
        return naming_loss(model(images.pixel_values), wanted, model.words)
    return naming_loss(_looked_at(model, _process(shown)), wanted, model.get_input_embeddings().weight.detach())


def naming_loss(seen: torch.Tensor, wanted: torch.Tensor, table: torch.Tensor) -> Figures:
    """Loss and figures of visual tokens (cells, width) that should be the ideal ones of `wanted` (cells, 3).

    Cross-entropy of each of the three words, plus the squared distance from the ideal token: without it tokens had
    three times its length and empty cells were as loud as full ones. `written`: of values in cells of their own.
    """
    (of_value, of_next), fact = turns(table.shape[1]), wanted[:, 0] >= 0
    away = (seen - ideal_tokens(table, wanted)).square().sum(1).mean() / table.square().sum(1).mean()
    loss, figures = away, {"away": away.item()}
    for place, (name, turn) in enumerate((("keys", None), ("values", of_value.T), ("next", of_next.T))):
        filled = wanted[:, place] >= 0
        logits = _sharpness(table) * (seen[filled] if turn is None else seen[filled] @ turn) @ table.T
        loss = loss + cross_entropy(logits, wanted[filled, place])
        right = (logits.argmax(-1) == wanted[filled, place]).float()
        figures[name] = right[fact[filled]].mean().item()
        if name == "values":
            figures["written"] = right[~fact[filled]].mean().item()
    return loss, figures


# Models that see


@functools.lru_cache(maxsize=1)
def _seen_by(tower: str, part: str) -> np.ndarray:
    """(pictures, IMAGE_TOKENS, width): what a trained tower makes of a part of the pool, once and kept."""
    file, numbers, rows = RECIPES[tower].work_folder / f"seen-{part}.npy", pool.PARTS[part], []
    if not file.exists():
        model = models.build_vlm(0)
        model.load_state_dict(torch.load(file.with_name("model.pt"), weights_only=True))
        for first in track(range(numbers.start, numbers.stop, 60), f"{tower} looks"):
            with torch.no_grad():
                images = _process(pool.pixels(range(first, min(first + 60, numbers.stop)), None))
                rows += [tokens.half().numpy() for tokens in model.model.get_image_features(**images).pooler_output]
        with appearing(file, "tmp.npy") as temporary:
            np.save(temporary, np.stack(rows))
    return np.load(file, mmap_mode="r")


def _seen(recipe: Recipe, numbers: list[int], step: int | None) -> torch.Tensor:
    """(pictures, IMAGE_TOKENS, width): visual tokens of pictures of the pool; in a step never twice the same."""
    seen, first = _seen_by(recipe.tower, recipe.pictures), pool.PARTS[recipe.pictures].start
    tokens = torch.from_numpy(np.stack([seen[number - first] for number in numbers])).float()
    if step is None:
        return tokens
    generator = torch.Generator().manual_seed(derive_seed("seen", recipe.name, step) % 2**31)
    return tokens + 0.1 * tokens.std() * torch.randn(tokens.shape, generator=generator)


def looking(model, recipe: Recipe, step: int, state: State) -> Figures:
    """Captions, questions and question writing about rendered pictures, and questions without their picture."""
    rng, numbers = _pictures(recipe, step)
    shown = [pool.picture_of(number) for number in numbers]
    blind = [examples.looking(rng, one, blind=True) for one in shown[: recipe.guess]]
    packed = [_looked(rng, one, recipe) for one in shown]
    return _look(model, recipe, step, numbers, packed, blind)


def finishing(model, recipe: Recipe, step: int, state: State) -> Figures:
    """What `looking` teaches, but captions tell only what the model that it starts from is `SURE` of, as it sees it."""
    rng, numbers = _pictures(recipe, step)
    shown = [pool.picture_of(number) for number in numbers]
    blind = [examples.looking(rng, one, blind=True) for one in shown[: recipe.guess]]
    told = [[examples.described(rng, one, style) for style in recipe.styles] for one in shown]
    texts = _sure_captions(_start(recipe.name), shown, told, _seen(recipe, numbers, None))
    packed = [examples.looking(rng, one, its, recipe.write) for one, its in zip(shown, texts, strict=True)]
    return _look(model, recipe, step, numbers, packed, blind)


def _look(
    model, recipe: Recipe, step: int, numbers: list[int], packed: list[packing.Packed], blind: list[packing.Packed]
) -> Figures:
    loss, figures = packing.loss_of(model, packing.collate(packed), _seen(recipe, numbers, step))
    if blind:
        blind_loss, blind_figures = packing.loss_of(model, packing.collate(blind))
        loss, figures = loss + 0.3 * blind_loss, figures | {"blind": blind_figures["words"]}
    return loss, figures


@functools.lru_cache(maxsize=1)
def _start(name: str):
    from caprl_utils.mini.zoo.train import build

    return build(RECIPES[name]).eval()


@torch.no_grad()
def _sure_captions(model, shown: list[Picture], told: list[list[tuple]], seen: torch.Tensor) -> list[list[str]]:
    """Captions (of each picture, each `examples.described`) as `model` would tell them: with the value that it finds
    likeliest, and without statements of which it is less than `SURE`.

    How sure: the chance that the word told about is one of the picture's, times that of the value.
    """
    packed = [packing.Packed(packing.IMAGE_PREFIX) for _ in shown]
    for one, its, example in zip(shown, told, packed, strict=True):
        for facts, forms in its:
            example.ask(prompts.CAPTION, caption(facts, one.kind, forms))
    logits, wanted = packing.answers_of(model, packing.collate(packed), seen)
    chances, ids, convert, place = logits.softmax(-1), wanted.tolist(), shared_tokenizer().convert_tokens_to_ids, 0
    found = []
    for one, its in zip(shown, told, strict=True):
        words, texts = convert([f" {fact.word}" for fact in one.facts]), []
        for facts, forms in its:
            kept = []
            for fact, form in zip(facts, forms, strict=True):
                word = ids.index(convert(f" {fact.word}"), place)
                place = ids.index(convert(f" {fact.value}"), word)
                chance, value = chances[place].max(0)
                said = shared_tokenizer().convert_ids_to_tokens(value.item()).strip()
                if said in fact.options and chance * chances[word, words].sum() >= SURE:
                    kept.append((replace(fact, value=said), form))
            texts.append(caption([fact for fact, _ in kept], one.kind, [form for _, form in kept]))
        found.append(texts)
    return found


def mark_statements(batch: packing.Batch, true: list[list[bool]], letters: torch.Tensor) -> None:
    """Label the last word of each statement with the letter of true or false; before each caption's first there is one
    more full stop, that of its introduction or of the verifier's question.
    """
    stops = torch.tensor([i for word, i in shared_tokenizer().get_vocab().items() if word.startswith(".")])
    opening = torch.tensor(shared_tokenizer().convert_tokens_to_ids([*INTRODUCTION.values(), " image"]))
    ids = batch["input_ids"]
    ends = torch.isin(ids[:, 1:], stops) & ~torch.isin(ids[:, :-1], opening)
    for row, marks in enumerate(true):
        places = ends[row].nonzero().flatten() + 1
        batch["labels"][row, places] = letters[(~torch.tensor(marks)).long()]


def judging(model, recipe: Recipe, step: int, state: State) -> Figures:
    """Scores of pairs (`examples.preferred`): their differences should tell which of two captions raters would prefer
    (Bradley and Terry's model).

    The score is the mean of the digits 1 to 5 under the model's probabilities, as `rl.rewards` reads it. The words
    around the digit, and the verifier's letters, are learned as any other, and the end of every statement that is
    judged is to say the same; without that neither was learned in 80 steps (reports/lab-log.md).
    """
    rng, numbers = _pictures(recipe, step)
    made = [examples.preferred(rng, pool.picture_of(number)) for number in numbers]
    return _judged(model, made, _seen(recipe, numbers, step), mark=True)


@torch.no_grad()
def held_out_pairs(model, batches: int = 10, pictures: int = 50) -> dict[str, float]:
    """The figures of a judge on pictures that no model of the zoo has seen."""
    found = []
    for number in range(batches):
        shown = [picture("zoo-held-out", number * pictures + i) for i in range(pictures)]
        rng = random.Random(derive_seed("held-out pairs", number))
        images = torch.from_numpy(np.stack([np.asarray(render(one)) for one in shown])).permute(0, 3, 1, 2)
        seen = _looked_at(model, _process(images)).view(pictures, packing.IMAGE_TOKENS, -1)
        found.append(_judged(model, [examples.preferred(rng, one) for one in shown], seen, mark=False)[1])
    return {name: round(sum(one[name] for one in found) / batches, 4) for name in found[0]}


def _judged(model, made: list[tuple], seen: torch.Tensor, mark: bool) -> Figures:
    """Loss and figures of pairs. `short` and `long`: pairs of either pool told as the raters told them; `verified`:
    sentences rightly found true or false. mark: whether the ends of statements count.
    """
    convert = shared_tokenizer().convert_tokens_to_ids
    digits, letters = torch.tensor(convert([f" {n}" for n in range(1, 6)])), torch.tensor(convert([" A", " B"]))
    packed, first_wins, true = zip(*made, strict=True)
    first_wins = torch.tensor(first_wins)  # (pictures, 2 pools)
    batch = packing.collate(packed)
    answer = batch["labels"][:, 1:] != packing.IGNORED
    if mark:
        mark_statements(batch, true, letters)
    logits, wanted = packing.answers_of(model, batch, seen)
    answer = answer[batch["labels"][:, 1:] != packing.IGNORED]  # of the learned tokens, those of answers
    scored, verified = answer & torch.isin(wanted, digits), torch.isin(wanted, letters)
    chances = logits[scored][:, digits].log_softmax(-1)
    scores = chances.exp() @ torch.arange(1.0, 6.0)
    ahead = scores.view(-1, 2, 2).diff(dim=2).squeeze(2).neg()  # first caption's score - second's
    told = ((ahead > 0) == first_wins).float().mean(0)
    unequal = binary_cross_entropy_with_logits(2 * ahead, first_wins.float())
    within = 0.1 * (scores.mean() - 3).square() - 0.1 * chances.mean()  # one sure digit would have no slope to learn by
    words = cross_entropy(logits[~scored], wanted[~scored])
    other = (logits[scored].logsumexp(-1) - logits[scored][:, digits].logsumexp(-1)).mean()  # than a digit
    right = (logits.argmax(-1) == wanted).float()
    figures = {"short": told[0], "long": told[1], "verified": right[verified & answer].mean()}
    figures |= {"marked": right[verified & ~answer].mean()} if mark else {}
    return unequal + within + words + other, {name: value.item() for name, value in figures.items()}


LESSONS = {
    "copying": (copying, ()),
    "reading": (reading, ("embed_tokens",)),  # vision towers learn to speak the copier's at the same time
    "binding": (binding, ("embed_tokens",)),
    "imagining": (imagining, ("embed_tokens",)),
    "spelling": (spelling, ("language_model", "lm_head")),
    "naming": (naming, ("language_model", "lm_head")),
    "clip naming": (naming, ()),
    "looking": (looking, ("visual",)),
    "finishing": (finishing, ("visual",)),
    "judging": (judging, ("visual",)),
}
"""Name -> the lesson, and parts of names of what stays as it is."""
