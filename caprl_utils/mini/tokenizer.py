"""The tokenizer of the small models: words with their leading space, and whole phrases of our prompts as one token.

Lossless (decoding returns the text), because parsers read what the models write. A phrase token keeps the prompts of
the large models affordable for the small ones; a character outside the vocabulary becomes ``<unk>``.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from caprl_utils import prompts
from caprl_utils.mini import vocabulary as words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>", "<unk>"]  # fmt: skip
FINAL = "\nFinal Score:"
"""Before the number of UnifiedReward's reply (`rl.rewards` reads it)."""
WORD_PATTERN = r" ?[A-Za-z]+| ?[0-9]+|\n| |[^\sA-Za-z0-9]"
CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message['role'] + '\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') or 'image' in part -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>{{ 'assistant\n' }}{%- endif -%}"""


def _phrases() -> list[str]:
    """What becomes one token each, the longest first: phrases of prompts, what stands between the words of sentences
    and questions, and names of several words.
    """
    read_head, read_middle, _ = re.split(r"\{caption\}|\{question\}", prompts.READ)
    unified = prompts.UNIFIED.format(question=prompts.CAPTION, caption="\x00").split("\x00")
    phrases = {prompts.CAPTION, prompts.WRITE_QUESTIONS, read_head, read_middle, prompts.LOOK.split("{question}")[0],
               prompts.RATE.split("{caption}")[0], *unified, FINAL, prompts.ANSWER_PREFILL, prompts.SCORE_PREFILL,
               f" {prompts.CANNOT_ANSWER}", prompts.CANNOT_ANSWER, "?**", "\n**Answer:**", "system\n", "user\n",
               "assistant\n", "You are a helpful assistant.", *(f"\n{letter})" for letter in prompts.LETTERS),
               *(f"**{n}." for n in range(1, 6)), *words.INTRODUCTION.values(), " is"}  # fmt: skip
    phrases.update(f" {name}" for name in words.ALONE if " " in name)
    for relation, forms in words.RELATIONS.items():
        told = [f". {sentence}" for sentence in forms.statements]
        for template in (*told, *forms.questions, *(f" {question}" for question in forms.questions)):
            # around its head and value (or, without a head, around the relation's name)
            places = r" \{[hv]\}" if "{h}" in template else rf" \{{v\}}| {relation}"
            phrases.update(piece for piece in re.split(places, template) if len(piece.strip()) > 1)
    return sorted(phrases, key=lambda p: (-len(p), p))


def _words() -> list[str]:
    """Single words and marks: everything the mini world can say beyond the phrases."""
    skewed = [words.UNITS, words.SKIES, words.REGIONS, words.CURRENCIES, words.LENGTHS]
    lists = [words.NUMBERS, words.COUNTS, words.YEARS, words.COLOURS, words.HEADS, words.MONTHS, words.NAMES,
             words.CHART_TOPICS, words.CHART_TYPES, words.TRENDS, words.GOODS_TOPICS, words.DOCUMENT_TYPES,
             words.GROUNDS, words.FIGURES, words.RIGHT_ANGLES, *([t["usual"], *t["others"]] for t in skewed),
             [name for name in words.ALONE if " " not in name],
             ["unknown", "The", "score", "image", "caption"], prompts.LETTERS,
             [str(n) for n in range(1, 10)]]  # fmt: skip
    flat = sorted({word for group in lists for word in group})
    return [*(f" {w}" for w in flat), *flat, "\n", " ", *".,:?!*()[]{}-/%'\"\\$_=+#<>|"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh tokenizer; the same vocabulary and ids at every call."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    phrases = _phrases()
    ids = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *phrases, *_words()]))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p in phrases])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>",
        padding_side="left", clean_up_tokenization_spaces=False, model_max_length=1024,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


shared_tokenizer = functools.cache(build_tokenizer)
"""One for all that only read it."""
