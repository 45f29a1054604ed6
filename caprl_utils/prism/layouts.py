"""From a row of a benchmark's Hugging Face layout to samples. One function per layout that is its own."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from caprl_utils.errors import UserError
from caprl_utils.prism.benchmarks import Benchmark
from caprl_utils.prism.metrics import as_options, gold_letter, literal_list
from caprl_utils.records import Sample

if TYPE_CHECKING:
    from caprl_utils.prism.loading import Record

CANNOT_ANSWER = "Cannot answer from the caption"  # CaptionQA's own wording
_ID_COLUMNS = (
    "id", "questionId", "question_id", "pid", "sample_index", "index", "data_id", "figure_path",
)  # fmt: skip
_IMAGE_ID_COLUMNS = (
    "image_url", "ucsf_document_id", "imageId", "figure_path", "problem_index",
)  # fmt: skip

_YES_NO_STARTS = (
    "is", "are", "was", "were", "do", "does", "did", "have", "has", "had", "can", "could", "will", "would", "should",
    "shall", "may", "might", "must",
)  # fmt: skip


def generic(record: Record, facts: Benchmark) -> list[Sample]:
    """Question, options and answer each in their columns."""
    columns = _columns(facts)
    options = _options(record, columns.options)
    gold = _gold(record, facts, columns.answer[0], options)
    return [sample(record, facts, record.text(columns.question[0]), gold, options)]


def sample(
    record: Record,
    facts: Benchmark,
    question: str,
    gold: Any,
    options: Sequence[str] = (),
    images: tuple[Callable[[], Any], ...] | None = None,
    **meta: Any,
) -> Sample:
    """A sample with the row's id and extra columns, and its first image column unless `images` are given."""
    columns = _columns(facts)
    if images is None:
        images = (record.image(columns.image[0]),)
    extras = {
        name: record.get(name) for name in columns.extra if name != "ocr" and record.get(name) is not None
    }
    identity = next((str(record.get(name)) for name in _ID_COLUMNS if record.get(name) is not None), None)
    identity = identity or str(record.index)
    return Sample(
        id=identity,
        benchmark=facts.key,
        images=images,
        question=question,
        gold=gold,
        options=tuple(options),
        meta={**extras, "image_id": _image_id(record, facts, identity), **meta},
    )


def _image_id(record: Record, facts: Benchmark, identity: str) -> str:
    known = [record.get(name) for name in _IMAGE_ID_COLUMNS if record.get(name) is not None]
    if known:
        page = record.get("ucsf_document_page_no")
        return f"{known[0]}-{page}" if page is not None else str(known[0])
    if facts.key in ("chartqa", "chartqapro", "mmstar", "realworldqa", "seed2k", "ai2d", "wemath"):
        # several questions share an image, no column says so
        return record.image(_columns(facts).image[0]).stored_hash()
    return identity


def chartqapro(record: Record, facts: Benchmark) -> list[Sample]:
    """The last turn is asked; earlier turns and the paragraph go into meta for the prompt."""
    questions = _as_list(record.get("Question"))
    answers = _as_list(record.get("Answer"))
    if not questions or len(questions) != len(answers):
        raise UserError(f"{len(questions)} questions and {len(answers)} answers in a row")
    made = sample(
        record, facts, str(questions[-1]), str(answers[-1]),
        question_type=record.text("Question Type"), year=_as_list(record.get("Year")),
        history=[list(turn) for turn in zip(questions[:-1], answers[:-1], strict=True)],
        paragraph=record.get("Paragraph"),
    )  # fmt: skip
    return [made]


def accepted_answers(record: Record, facts: Benchmark) -> list[Sample]:
    """InfoVQA and DocVQA: a list of accepted answers."""
    golds = record.get("answers")
    if not isinstance(golds, list) or not golds or not all(isinstance(gold, str) for gold in golds):
        raise UserError(
            f"column 'answers' holds {golds!r:.60}, a list of texts is needed (test has no answers)"
        )
    return [sample(record, facts, record.text("question"), list(golds))]


def mmmu(record: Record, facts: Benchmark) -> list[Sample]:
    """Only the images named by <image n> in question and options belong to the sample, in that order."""
    options = as_options(record.get("options")) or []
    question = str(record.get("question", ""))
    if record.has_image("image_1"):
        numbers = sorted({int(n) for n in re.findall(r"<image (\d+)>", question + " ".join(options))}) or [1]
        images = tuple(record.image(f"image_{number}") for number in numbers)
    else:
        images = (record.image("image"),)  # MMMU-Pro, config vision: the question is in the picture
    gold: Any = record.text("answer")
    open_question = record.get("question_type") == "open" or not options
    accepted = [str(item) for item in literal_list(gold) or [gold]]
    gold = accepted if open_question else _letter(gold, options, facts)
    kind = "open" if open_question else "multiple-choice"
    return [sample(record, facts, question, gold, options, images, question_type=kind)]


def charxiv(record: Record, facts: Benchmark) -> list[Sample]:
    """The reasoning question; descriptive ones are template numbers whose texts are not in the data."""
    category = record.get("reasoning_q_source")
    if category not in (1, 2, 3, 4):
        raise UserError(f"column 'reasoning_q_source' holds {category!r}, not 1 to 4")
    return [sample(record, facts, record.text("reasoning_q"), record.text("reasoning_a"))]


def wemath(record: Record, facts: Benchmark) -> list[Sample]:
    """All options stand in one text, "A. 3 cm; B. 4 cm; ..."; `ID` names the problem group, `key` the part of it."""
    options = split_options(record.text("option"))
    gold = _letter(record.text("answer"), options, facts)
    identity = f"{record.text('ID')}-{record.text('key')}"
    made = sample(record, facts, record.text("question"), gold, options, ID=record.text("ID"))
    return [_renamed(made, identity)]


def split_options(text: str) -> list[str]:
    """The options of "A. red; B. blue"; the letters must run from A without a gap."""
    marks = [m for m in re.finditer(r"(?:^|[;\n]|\s)\(?([A-J])[.):]\s*", text)]
    options: list[str] = []
    places = []
    for mark in marks:
        if mark[1] == ascii_uppercase[len(places)]:
            places.append(mark)
    for place, following in zip(places, [*places[1:], None], strict=False):
        end = following.start() if following else len(text)
        options.append(text[place.end() : end].strip(" ;\n"))
    if len(options) < 2:
        raise UserError(f"options are not of the form 'A. ...; B. ...': {text[:60]!r}")
    return options


def mathvista(record: Record, facts: Benchmark) -> list[Sample]:
    """The gold is the option's text; `choices` is empty for free-form questions."""
    kind, answer_type = record.text("question_type"), record.text("answer_type")
    if answer_type not in ("integer", "float", "list", "text"):
        raise UserError(f"unknown answer type {answer_type!r}")
    choices = as_options(record.get("choices")) or []
    if kind == "multi_choice" and not choices:
        raise UserError("a multi_choice question without choices")
    made = sample(record, facts, record.text("question"), record.text("answer"), choices, choices=choices)
    return [made]


def seed(record: Record, facts: Benchmark) -> list[Sample]:
    """SEED-Bench: images only; the image cell is a list."""
    options = _options(record, _columns(facts).options)
    gold = _letter(record.text("answer"), options, facts)
    return [sample(record, facts, record.text("question"), gold, options)]


def mme_realworld(record: Record, facts: Benchmark) -> list[Sample]:
    """Options come as "(A) red"; the image is base64 text."""
    raw = as_options(record.get("multi-choice options")) or []
    options = [re.sub(r"^\s*\(?[A-E][).]\s*", "", option) for option in raw]
    gold = _letter(record.text("answer"), options, facts)
    return [sample(record, facts, record.text("question"), gold, options)]


def mmbench(record: Record, facts: Benchmark) -> list[Sample]:
    """An index of 1,000,000 and more is a rotation of the index modulo 1,000,000; the hint goes first."""
    options = _options(record, _columns(facts).options)
    hint = record.get("hint")
    question = record.text("question")
    if hint and str(hint).strip().lower() != "nan":
        question = f"{hint}\n{question}"
    index = int(record.text("index"))
    made = sample(record, facts, question, _letter(record.text("answer"), options, facts), options)
    return [_renamed(made, str(index), image_id=str(index % 1_000_000), rotation=index // 1_000_000)]


def gqa(record: Record, facts: Benchmark) -> list[Sample]:
    """Questions only; `loading.load` joins the images from their own configuration."""
    return [sample(record, facts, record.text("question"), record.text("answer"), images=())]


def captionqa(record: Record, facts: Benchmark) -> list[Sample]:
    """One row holds an image and all its questions; options are shuffled later, over all rows in order."""
    questions = record.get("questions")
    if not isinstance(questions, list) or not questions:
        raise UserError("column 'questions' holds no list of questions")
    made = []
    for number, item in enumerate(questions):
        choices = [str(choice) for choice in item.get("choices") or []]
        answer = str(item.get("answer") or "").strip()
        places = [place for place, choice in enumerate(choices) if choice.strip() == answer]
        if len(choices) < 2 or not places:
            continue  # the benchmark's own code leaves these out, before it draws a shuffle
        base = sample(record, facts, str(item.get("question") or ""), ascii_uppercase[places[0]], choices)
        made.append(_renamed(base, f"{base.id}-{number}", image_id=base.id, category=item.get("category")))
    if not made:
        raise UserError("no question with at least two choices and its answer among them")
    return made


def shuffle_captionqa(samples: Sequence[Sample]) -> list[Sample]:
    """CaptionQA's option order: one generator runs over all questions, and each but yes/no questions gets
    the option "Cannot answer from the caption" first. The order is copied, not drawn anew per question."""
    generator = random.Random(0)
    shuffled = []
    for item in samples:
        options = list(item.options)
        extra = not _yes_no(item.question, options)
        if extra:
            options.append(CANNOT_ANSWER)
        order = list(range(len(options)))
        generator.shuffle(order)
        gold = ascii_uppercase[order.index(ascii_uppercase.index(item.gold))]
        cannot = ascii_uppercase[order.index(len(options) - 1)] if extra else None
        texts = tuple(options[place] for place in order)
        shuffled.append(replace(item, gold=gold, options=texts, meta={**item.meta, "cannot_answer": cannot}))
    return shuffled


def _yes_no(question: str, choices: Sequence[str]) -> bool:
    texts = [choice.strip().lower() for choice in choices]
    if any("yes" in text for text in texts) and any("no" in text for text in texts):
        return True
    question = question.strip().lower()
    return " " in question and question.split(" ")[0] in _YES_NO_STARTS


LAYOUTS: dict[str, Callable[[Record, Benchmark], list[Sample]]] = {
    "chartqapro": chartqapro,
    "infovqa": accepted_answers,
    "docvqa": accepted_answers,
    "mmmu": mmmu,
    "mmmu_pro": mmmu,
    "charxiv": charxiv,
    "wemath": wemath,
    "mathvista": mathvista,
    "seed2k": seed,
    "mme_realworld": mme_realworld,
    "mmbench": mmbench,
    "gqa": gqa,
    "captionqa": captionqa,
}


def _columns(facts: Benchmark) -> Any:
    if facts.columns is None:
        raise UserError(f"{facts.name} has no columns in the registry")
    return facts.columns


def _options(record: Record, names: Sequence[str]) -> list[str]:
    if len(names) == 1:
        return as_options(record.get(names[0])) or []
    cells = [str(record.get(name, "")).strip() for name in names]
    return [cell for cell in cells if cell and cell.lower() != "nan"]


def _gold(record: Record, facts: Benchmark, column: str, options: Sequence[str]) -> Any:
    text = record.text(column)
    if facts.answer == "letter":
        return _letter(text, options, facts)
    return text


def _letter(text: str, options: Sequence[str], facts: Benchmark) -> str:
    letter = gold_letter(text)
    letters = ascii_uppercase[: len(options)] if options else facts.letters or "ABCD"
    if letter not in letters or len(letter) != 1:
        raise UserError(f"unknown answer {text!r}: a letter of {letters} is needed")
    return letter


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _renamed(item: Sample, identity: str, **meta: Any) -> Sample:
    return replace(item, id=identity, meta={**item.meta, **meta})
