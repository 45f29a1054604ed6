"""From a row of a benchmark's Hugging Face layout to samples: the registry's columns, and layouts of their own."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

from caprl_utils.answers import ABCD
from caprl_utils.errors import UserError
from caprl_utils.prism.benchmarks import Benchmark
from caprl_utils.prism.metrics import as_list, gold_letter, letters_for
from caprl_utils.prompts import LETTERS
from caprl_utils.records import Sample

Row = Mapping[str, Any]  # of a data set, without empty cells; an image column holds a tuple of `loading.StoredImage`
CANNOT_ANSWER = "Cannot answer from the caption"  # CaptionQA's own wording
_ID_COLUMNS = ("id", "questionId", "question_id", "pid", "sample_index", "index", "data_id", "figure_path")
_IMAGE_ID_COLUMNS = ("image_url", "ucsf_document_id", "imageId", "figure_path", "problem_index")
# of these several questions share an image, and no column says so
_SHARED_IMAGES = ("chartqa", "chartqapro", "mmstar", "realworldqa", "seed", "ai2d", "wemath")
_YES_NO_START = re.compile(  # CaptionQA's own list
    "(?:is|are|was|were|do|does|did|have|has|had|can|could|will|would|should|shall|may|might|must) "
)


def samples_of(row: Row, number: int, facts: Benchmark) -> list[Sample]:
    """The samples of one row. Raises UserError for a row that cannot be used."""
    own = LAYOUTS[facts.key](row, facts) if facts.key in LAYOUTS else {}
    name = {"id": _first(row, _ID_COLUMNS) or str(number)}
    found = [build(row, facts, **(name | one)) for one in (own if isinstance(own, list) else [own])]
    if (most := max(len(sample.options) for sample in found)) > len(LETTERS) - (facts.key == "captionqa"):
        raise UserError(f"{most} options; there are letters for {len(LETTERS)}")
    return found


def build(
    row: Row, facts: Benchmark, id: str, images: tuple[Callable[[], Any], ...] | None = None,
    question: str | None = None, options: Sequence[str] | None = None, gold: Any = None, **meta: Any,
) -> Sample:  # fmt: skip
    """A sample of a row: what its layout gives, and the rest from the columns that the registry names."""
    columns = facts.columns
    if options is None and len(columns.options) == 1:
        options = as_list(row.get(columns.options[0])) or []
    elif options is None:
        cells = [str(row.get(name, "")).strip() for name in columns.options]
        options = [cell for cell in cells if cell and cell.lower() != "nan"]
    if facts.hub.images_config:  # GQA's are joined later, from there
        images = ()
    elif not (images := row.get(columns.image[0]) if images is None else images):
        raise UserError(f"column {columns.image[0]!r} holds nothing, an image is needed")
    extras = {name: row[name] for name in columns.extra if name in row}
    extras["image_id"], page = meta.get("image_id"), row.get("ucsf_document_page_no")
    if not extras["image_id"] and (known := _first(row, _IMAGE_ID_COLUMNS)):
        extras["image_id"] = known if page is None else f"{known}-{page}"
    elif not extras["image_id"]:
        extras["image_id"] = images[0].stored_hash() if facts.key in _SHARED_IMAGES else id
    question = text_of(row, columns.question[0]) if question is None else question
    if gold is None and facts.answer == "accepted_list":
        gold = row.get(columns.answer[0])
        if not isinstance(gold, list) or not gold or not all(isinstance(text, str) for text in gold):
            told = f"column {columns.answer[0]!r} holds {gold!r:.60}"
            raise UserError(f"{told}, a list of texts is needed (test has no answers)")
    elif gold is None:
        text = text_of(row, columns.answer[0])
        gold = _letter(text, options, facts) if facts.answer == "letter" else text
    return Sample(id, facts.key, images, question, gold, tuple(options), {**extras, **meta})


def text_of(row: Row, column: str) -> str:
    """The cell as text. Raises UserError if it is empty or no text or number."""
    value = row.get(column)
    if isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
        return str(value)
    raise UserError(f"column {column!r} holds {described(value)}, text is needed")


def described(value: Any) -> str:
    """What a cell holds that is not as it should be."""
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _first(row: Row, columns: Sequence[str]) -> str:
    """The first cell of these columns that holds something, as text; "" if none does."""
    return next((str(row[name]) for name in columns if name in row), "")


def _letter(text: str, options: Sequence[str], facts: Benchmark) -> str:
    letter, letters = gold_letter(text), letters_for(options, facts.letters or ABCD)
    if letter not in letters or len(letter) != 1:
        raise UserError(f"unknown answer {text!r}: a letter of {letters} is needed")
    return letter


# --- what a layout of its own gives to `build` ---


def chartqapro(row: Row, facts: Benchmark) -> dict[str, Any]:
    """The last turn is asked, after the paragraph beside the chart and the turns before it."""
    cells = [row.get(name, []) for name in ("Question", "Answer", "Year")]
    questions, answers, years = (cell if isinstance(cell, list) else [cell] for cell in cells)
    if not questions or len(questions) != len(answers):
        raise UserError(f"{len(questions)} questions and {len(answers)} answers in a row")
    before = [f"Paragraph: {text}"] if (text := str(row.get("Paragraph", "")).strip()) else []
    before += [f"Q: {q}\nA: {a}" for q, a in zip(questions[:-1], answers[:-1], strict=True)]
    return {
        "question": "\n".join([*before, str(questions[-1])]), "gold": str(answers[-1]), "year": years,
        "question_type": text_of(row, "Question Type"),
    }  # fmt: skip


def mmmu(row: Row, facts: Benchmark) -> dict[str, Any]:
    """Only the images named by <image n> in question and options belong to the sample; they keep their numbers."""
    options = as_list(row.get("options")) or []
    found: dict[str, Any] = {"question": str(row.get("question", "")), "options": options}
    if "image_1" in row:
        marks = re.findall(r"<image (\d+)>", found["question"] + " ".join(options))
        found["image_numbers"] = numbers = sorted(map(int, {*marks})) or [1]
        found["images"] = tuple(image for n in numbers for image in row[f"image_{n}"])
    else:  # MMMU-Pro, config vision: the question is in the picture
        found["images"] = row["image"]
    gold = text_of(row, "answer")
    if row.get("question_type") == "open" or not options:
        return {**found, "gold": as_list(gold) or [gold], "question_type": "open"}
    return {**found, "gold": _letter(gold, options, facts), "question_type": "multiple-choice"}


def charxiv(row: Row, facts: Benchmark) -> dict[str, Any]:
    """The reasoning question; descriptive ones are template numbers whose texts are not in the data."""
    answer_type = row.get("reasoning_a_type", row.get("inst_category"))
    if answer_type not in (1, 2, 3, 4):
        raise UserError(f"column 'reasoning_a_type' (or 'inst_category') holds {answer_type!r}, not 1 to 4")
    _, _, decimals = text_of(row, "reasoning_a").partition(".")
    return {"answer_type": int(answer_type), "decimals": _decimals(len(decimals))}


def _decimals(count: int) -> str:
    return f"a number with {count} decimal place{'s' * (count > 1)}" if count else "an exact integer"


def wemath(row: Row, facts: Benchmark) -> dict[str, Any]:
    """All options stand in one text, "A. 3 cm; B. 4 cm; ..."; `ID` names the problem group, `key` the part of it."""
    group, key = text_of(row, "ID"), text_of(row, "key")
    return {"options": split_options(text_of(row, "option"))[1], "id": f"{group}-{key}", "ID": group}


def split_options(text: str) -> tuple[str, list[str]]:
    """What stands before "A. red; B. blue", and these, up to a gap. Raises UserError for fewer than two."""
    marks = []
    for mark in re.finditer(r"(?:^|[;,\n]|\s)\(?([A-J])[.):]\s*", text):
        if mark[1] == ascii_uppercase[len(marks)]:
            marks.append(mark)
    if len(marks) < 2:
        raise UserError(f"options are not of the form 'A. ...; B. ...': {text[:60]!r}")
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    options = [text[mark.end() : end].strip(" ;,\n") for mark, end in zip(marks, ends, strict=True)]
    return text[: marks[0].start()].strip(), options


def mmstar(row: Row, facts: Benchmark) -> dict[str, Any]:
    """Options stand in the question, "...? Options: A: red, B: blue"; those that cannot be told apart stay there."""
    text, letter = text_of(row, "question"), gold_letter(text_of(row, "answer"))
    try:
        question, options = split_options(text)
    except UserError:
        return {}
    if letter not in ascii_uppercase[: len(options)] or not all(options):
        return {}
    return {"question": re.sub(r"\s*(?:Options|Choices)\s*:?$", "", question), "options": options}


def mathvista(row: Row, facts: Benchmark) -> dict[str, Any]:
    """The gold is the option's text; `choices` is empty for free-form questions, whose hint stands in `query`."""
    answer_type, unit = text_of(row, "answer_type"), row.get("unit")
    if answer_type not in ("integer", "float", "list", "text"):
        raise UserError(f"unknown answer type {answer_type!r}")
    found: dict[str, Any] = {"choices": as_list(row.get("choices")) or []}
    found["decimals"] = _decimals(int(float(row.get("precision", 0))))
    if unit:
        found["question"] = f"{text_of(row, 'question')} (Unit: {unit})"
    if hint := re.match(r"Hint:\s*(.+)", str(row.get("query", ""))):
        found["own_format"] = hint[1].strip()
    return found


def mme_realworld(row: Row, facts: Benchmark) -> dict[str, Any]:
    """Options come as "(A) red", in brackets of any width; the image is base64 text."""
    raw = as_list(row.get("multi-choice options")) or []
    return {"options": [re.sub(r"^\s*[(（]?[A-E][)）.:．：]\s*", "", option) for option in raw]}


def mmbench(row: Row, facts: Benchmark) -> dict[str, Any]:
    """An index of 1,000,000 and more is a rotation of the index modulo 1,000,000; the hint goes first."""
    hint, question, index = row.get("hint"), text_of(row, "question"), int(text_of(row, "index"))
    if hint and str(hint).strip().lower() != "nan":
        question = f"{hint}\n{question}"
    rotation, image = divmod(index, 1_000_000)
    return {"question": question, "id": str(index), "image_id": str(image), "rotation": rotation}


def captionqa(row: Row, facts: Benchmark) -> list[dict[str, Any]]:
    """A row holds an image (or several views of a thing) with all its questions; options are shuffled later, over all
    rows in order.
    """
    made = []
    for number, item in enumerate(row.get("questions", ())):
        choices, image = [str(choice) for choice in item.get("choices") or []], text_of(row, "id")
        stripped, answer = [choice.strip() for choice in choices], str(item.get("answer") or "").strip()
        if len(choices) > 1 and answer in stripped:  # as the benchmark's own code, before it draws a shuffle
            made.append({
                "id": f"{image}-{number}", "question": str(item.get("question") or ""), "options": choices,
                "gold": ascii_uppercase[stripped.index(answer)], "image_id": image, "category": item.get("category"),
            })  # fmt: skip
    if not made:
        raise UserError("no question with at least two choices and its answer among them")
    return made


LAYOUTS: dict[str, Callable[[Row, Benchmark], dict[str, Any] | list[dict[str, Any]]]] = {
    "chartqapro": chartqapro, "mmmu": mmmu, "mmmu_pro": mmmu, "charxiv": charxiv, "wemath": wemath, "mmstar": mmstar,
    "mathvista": mathvista, "mme_realworld": mme_realworld, "mmbench": mmbench, "captionqa": captionqa,
}  # fmt: skip


def shuffle_captionqa(samples: Sequence[Sample]) -> list[Sample]:
    """CaptionQA's option order: one generator for all questions; each but yes/no ones first gets `CANNOT_ANSWER`."""
    generator, shuffled = random.Random(0), []
    for item in samples:
        asked = all(any(word in choice.lower() for choice in item.options) for word in ("yes", "no"))
        extra = not (asked or _YES_NO_START.match(item.question.strip().lower()))
        options = [*item.options, *([CANNOT_ANSWER] if extra else [])]
        order = list(range(len(options)))
        generator.shuffle(order)
        gold = ascii_uppercase[order.index(ascii_uppercase.index(item.gold))]
        cannot = ascii_uppercase[order.index(len(options) - 1)] if extra else None
        meta = {**item.meta, "cannot_answer": cannot}
        shuffled.append(replace(item, gold=gold, options=tuple(options[place] for place in order), meta=meta))
    return shuffled
