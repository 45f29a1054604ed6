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


def prompt_phrases() -> list[str]:
    """Phrases that become one token each, the longest first."""
    read_head, read_middle, read_tail = re.split(r"\{caption\}|\{question\}", prompts.READ)
    look_head = prompts.LOOK.split("{question}")[0]
    options = [f"\n{letter})" for letter in prompts.LETTERS]
    numbered = [f"**{n}." for n in range(1, 6)]
    keys = ["value of", "share of", "length of", "country of", "season of", "source of", "number of sides of a",
            "chart type", "chart colour", "header colour", "line colour", "document type",
            *place_keys()]  # fmt: skip
    phrases = [prompts.CAPTION, prompts.WRITE_QUESTIONS, read_head, read_middle, look_head, prompts.ANSWER_PREFILL,
               f" {prompts.CANNOT_ANSWER}", prompts.CANNOT_ANSWER, ". The", "What is the", " What is the", "?**",
               "\n**Answer:**", "system\n", "user\n", "assistant\n", "You are a helpful assistant.",
               *options, *numbered, *words.INTRODUCTION.values(), *(f" {key}" for key in keys), read_tail]  # fmt: skip
    return sorted({p for p in phrases if p.strip()}, key=lambda p: (-len(p), p))


def place_keys() -> list[str]:
    """Keys of a scene, "top left shape" and so on: one token each, so that every key ends in a token of its own."""
    return [f"{place} {what}" for place in words.POSITIONS for what in ("shape", "colour")]


def told_keys() -> dict[str, str]:
    """Last words of keys, with the " is" that follows them in a caption -> without it, as a question has them.

    Fused, so that in a caption the value stands right after its key (reports/lab-log.md).
    """
    last = [*words.CITIES, *words.GOODS, "AB", "BC", "CD", "DA", "CA",
            "topic", "name", "city", "month", "total", "room",
            "figure", "chart type", "chart colour", "header colour", "line colour",
            "document type", *place_keys()]  # fmt: skip
    return {f" {word} is": f" {word}" for word in last}


def _words() -> list[str]:
    """Single words and marks: everything the mini world can say beyond the phrases."""
    values = {word for value in words.KNOWLEDGE.values() for word in value.split()}
    lists = [words.NUMBERS, words.COLOURS, words.SHAPES, words.CITIES, words.MONTHS, words.GOODS, words.NAMES,
             words.CHART_TOPICS, words.CHART_TYPES, words.GOODS_TOPICS, words.DOCUMENT_TYPES, words.FIGURES,
             values, ["two", "eight", "AB", "BC", "CD", "DA", "CA", "topic", "name", "city", "month", "total", "room",
                      "shape", "colour", "figure", "is", "unknown", "The", "score", "image", "caption"],
             prompts.LETTERS, [str(n) for n in range(1, 10)]]  # fmt: skip
    flat = sorted({word for group in lists for word in group})
    return [*(f" {w}" for w in flat), *flat, "\n", " ", *".,:?!*()[]{}-/%'\"\\$_=+#<>|"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh tokenizer; the same vocabulary and ids at every call."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*SPECIAL, *prompt_phrases(), *_words(), *told_keys()]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p in [*prompt_phrases(), *told_keys()]])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@functools.lru_cache
def shared_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer as a module-wide object for training and rendering code."""
    return build_tokenizer()
