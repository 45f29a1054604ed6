"""Every prompt of the project, with the reasons for its wording.

Readers are asked in two wordings (`Profile.prompts`): READ and LOOK, which the mini world's models have learned, and
the authors' for all others. The order inside a prompt is fixed: instruction and caption first, question last, so
that servers can reuse the prefix of all questions about one caption (author code keeps the same order). Answers are
read after the prefill ``The answer is``: the next token is then the letter with its leading space (author code).
"""

from __future__ import annotations

from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"

# The instruction of the policy and of every captioner (paper, section 3; the released script drops the full stop).
CAPTION = "Please describe this image in detail."
ANSWER_PREFILL = "The answer is"  # starts the assistant's turn, so that the first new token is ` A` (author code)
WORDS_PREFILL = "It is"  # the same where words are asked for (ours: SmolLM2-135M goes on with the value)
SCORE_PREFILL = "The score is"  # the same for the VLM judge: the next token is the digit (ours)
# The extra option of the reward (paper, section 3.2); always last, never shuffled (author code).
CANNOT_ANSWER = "Can not answer based on the caption"

# A question to a text-only LLM that sees the caption instead of the image (reward and Prism).
READ = "Answer the question from the caption of an image alone.\nCaption: {caption}\nQuestion: {question}"
# A question to a VLM, with the image (visual accuracy) or without it (text accuracy), and for direct VQA.
LOOK = "Answer the question about the image.\nQuestion: {question}"
# The reward's question (author code's contract in words of our own: the caption alone, two examples, one unanswerable).
READ_STRICTLY = (
    "You get a caption of an image, and a question about the image with lettered options. Answer strictly from the "
    "caption: what you know of the world or find likely does not count. When the caption does not tell, choose the "
    "option that says so. Reply with the letter alone.\n\n"
    "Caption: Two children hold the string of a red kite above a beach.\nQuestion: What colour is the kite?"
    "\nA) Blue\nB) Green\nC) Red\nD) White\nE) Can not answer based on the caption\nThe answer is C\n\n"
    "Caption: A bar chart shows the rainfall of four cities; the tallest bar is that of Oslo.\n"
    "Question: How much rain fell in Rome?"
    "\nA) 20 mm\nB) 35 mm\nC) 50 mm\nD) 80 mm\nE) Can not answer based on the caption\nThe answer is E\n\n"
    "Caption: {caption}\nQuestion: {question}"
)
# Before a question to Prism's reader (author script, stage 2: their reader is trained on these words).
READ_AUTHORS = "Here is a detailed caption of an image: {caption}. Please answer the question based on the caption."
# The format of every question with options (ours; those without: `ask` in configs/benchmarks.yaml).
LETTER_ONLY = "Answer with the letter of the right option only."
# The layout that the authors' scorer reads; their own files ask for it (the wording is ours).
THINK = (
    "Think first, between <think> and </think>. Then write the final answer alone (a letter if there are options) as "
    "<answer>\\boxed{...}</answer>."
)
# Question writing (ours; the authors' script has other words for the same contract, and its layout is read).
WRITE_QUESTIONS = (
    "Write five multiple choice questions about this image, each with the options A to D and one right answer. "
    "The answer must be visible in the image and impossible to guess without it. Write each question exactly so:\n"
    "**1. question?**\nA) option\nB) option\nC) option\nD) option\n**Answer:** A) option"
)

# MM-Vet's contract: a grade from 0.0 to 1.0 in tenths (the wording of all judge prompts is ours).
GRADE = (
    "Grade an answer to a question about an image against the reference answer.\n"
    "In the reference, <AND> joins parts that must all be there, <OR> joins parts of which one is enough.\n"
    "Give the share of the required parts that the answer states correctly, from 0.0 to 1.0 in steps of 0.1; "
    "wording, order and further correct details do not matter.\n"
    "Question: {question}\nReference: {gold}\nAnswer: {answer}\n"
    'Reply with one line: "Grade: X".'
)
# First call of MathVerse and MathVista: the answer out of a response, without solving anything.
EXTRACT = (
    "Copy the final answer out of a response to a question, without solving the question yourself: the "
    "letter for a multiple-choice question, else the number, expression or words.{hint}\n"
    "Question: {question}\nResponse: {answer}\n"
    'Reply with one line: "Extracted: X". If the response gives no answer, reply "Extracted: none".'
)
# Verdict of MathVerse and CharXiv; `rule` is one of the texts below.
COMPARE = (
    "Decide whether an answer agrees with the correct answer of a question.{rule}\n"
    "Question: {question}\nCorrect answer: {gold}\nAnswer: {answer}\n"
    'Reply with one line: "Verdict: yes" or "Verdict: no".'
)
MATH_RULE = " Equal values in another notation, and a letter or its option's text, agree."
# By the type of CharXiv's answer: text in the chart, text in general, number in the chart, number in general.
CHARXIV_RULES = {
    1: " The answer must be the same text of the chart, whatever its notation or case.",
    2: " The answer must mean the same; another wording is fine.",
    3: " The answer must be the same number, whatever its notation; a near value is wrong.",
    4: " The answer must be the same number to the precision asked for; a near value is wrong.",
}
TYPE_HINTS = {"integer": " Give an integer.", "float": " Give a decimal number.", "list": " Give a Python list."}

# Question to the VLM judge (ours: the paper asks for an overall score of 1-5, its words are not known).
RATE = (
    "Rate this description of the image with one whole number from 1 (poor) to 5 (excellent), for how correct and "
    "how complete it is.\nDescription: {caption}"
)
# Question to the verifier of single sentences, read as the chance of its first option (ours).
VERIFY = "Here is a statement about the image. {sentence}\nIs it true?\nA) Yes\nB) No"
# Question to UnifiedReward (shortened from its repository; the scale is the paper's).
UNIFIED = (
    "You are provided with an image and a question for this image. Please review the corresponding response based on "
    "its accuracy in describing objects, relationships and attributes, its helpfulness and its ethical side. "
    "From 1 to 5, how much do you rate this response in terms of the correct and comprehensive description "
    "of the image?\n"
    'Provide a few lines for explanation and the rate number at last after "Final Score:".\n'
    "Your task is provided as follows:\nQuestion: [{question}]\nResponse: [{caption}]\n"
)


def format_options(options: Sequence[str]) -> str:
    """Options as lines ``A) text``, in the order given."""
    return "".join(f"\n{letter}) {text}" for letter, text in zip(LETTERS, options, strict=False))


def read_question(caption: str, question: str, options: Sequence[str] = ()) -> str:
    """Prompt for a text-only reader in the mini world's words."""
    return READ.format(caption=caption, question=question) + format_options(options)


def reward_question(caption: str, question: str, options: Sequence[str], words: str) -> str:
    """Prompt for the reward's reader. words: "short", as in Prism, or "authors", with instruction and examples."""
    if words == "short":
        return read_question(caption, question, options)
    return READ_STRICTLY.format(caption=caption, question=question) + format_options(options)


def ask(question: str, options: Sequence[str], form: str, caption: str | None) -> str:
    """A question as benchmarks and the authors put it, to a reader of a caption or (None) to a VLM with the image.
    form: what the answer is to look like.
    """
    body = question + format_options(options) + (f"\n{form}" if form else "")
    if caption is None:
        return body
    return READ_AUTHORS.format(caption=caption) + ("" if body[:1].isspace() else "\n") + body


def look_question(question: str, options: Sequence[str] = ()) -> str:
    """Prompt for a VLM; the image, if any, travels beside the text."""
    return LOOK.format(question=question) + format_options(options)
