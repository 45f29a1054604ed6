"""Every prompt of the project, with the reasons for its wording.

One text serves all model sizes. The order inside a prompt is fixed: instruction and caption first, question last, so
that servers can reuse the prefix of all questions about one caption (author code keeps the same order). Answers are
read after the prefill ``The answer is``: the next token is then the letter with its leading space (author code).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"

CAPTION = "Please describe this image in detail."
"""Instruction of the policy and of every captioner (paper, section 3; the released script drops the full stop)."""

ANSWER_PREFILL = "The answer is"
"""Start of the assistant's turn for every question (author code), so that the first new token is `` A``."""

CANNOT_ANSWER = "Can not answer based on the caption"
"""The extra option of the reward (paper, section 3.2); always last, never shuffled (author code)."""

READ = "Answer the question from the caption of an image alone.\nCaption: {caption}\nQuestion: {question}"
"""A question to a text-only LLM that sees the caption instead of the image (reward and Prism)."""

LOOK = "Answer the question about the image.\nQuestion: {question}"
"""A question to a VLM, with the image (visual accuracy) or without it (text accuracy), and for direct VQA."""

WRITE_QUESTIONS = (
    "Write five multiple choice questions about this image, each with the options A to D and one right answer. "
    "The answer must be visible in the image and impossible to guess without it. Write each question exactly so:\n"
    "**1. question?**\nA) option\nB) option\nC) option\nD) option\n**Answer:** A) option"
)
"""Question writing (ours: the paper gives the contract, five MCQs in a fixed Markdown format, but not the words)."""


def format_options(options: Sequence[str]) -> str:
    """Options as lines ``A) text``, in the order given."""
    return "".join(f"\n{letter}) {text}" for letter, text in zip(LETTERS, options, strict=False))


def read_question(caption: str, question: str, options: Sequence[str] = ()) -> str:
    """Prompt for a text-only reader; without ``options`` it asks for a short answer."""
    return READ.format(caption=caption, question=question) + format_options(options)


def look_question(question: str, options: Sequence[str] = ()) -> str:
    """Prompt for a VLM; the image, if any, travels beside the text."""
    return LOOK.format(question=question) + format_options(options)


def prompt_hash() -> str:
    """Hash over all prompt texts of this module: part of every cache key and run record."""
    texts = [CAPTION, ANSWER_PREFILL, CANNOT_ANSWER, READ, LOOK, WRITE_QUESTIONS, format_options(["x", "y"])]
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()[:16]
