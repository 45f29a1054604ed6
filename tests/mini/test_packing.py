"""A packed batch computes what separate sequences compute."""

import random

import pytest
import torch

from caprl_utils.mini.render import render
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.world import picture
from caprl_utils.mini.zoo import lessons, models
from caprl_utils.mini.zoo import train as zoo
from caprl_utils.mini.zoo.packing import IGNORED, IMAGE_PAD, collate


def branch_logits(logits, labels):
    return logits[:, :-1][labels[:, 1:] != IGNORED]


def test_text_branches_equal_separate_prompts():
    model, tokenizer = models.build_language_model(0).eval(), shared_tokenizer()
    packed = lessons.reading(random.Random(1), picture("zoo", 0), 4, 4, 0.2)
    other = lessons.reading(random.Random(2), picture("zoo", 1), 2, 4, 0.2)
    batch = collate([packed, other], tokenizer)
    with torch.no_grad():
        together = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.attention_mask
        ).logits
        got = branch_logits(together[:1], batch.labels[:1])
        alone = []
        for asked, answered in packed.branches:
            text = tokenizer(packed.prefix + asked + answered, return_tensors="pt")
            count = len(tokenizer(answered).input_ids)
            alone.append(model(input_ids=text.input_ids).logits[0, -count - 1 : -1])
    torch.testing.assert_close(got, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_image_branches_equal_separate_prompts():
    model, processor = models.build_vlm(0).eval(), models.build_processor()
    shown = picture("zoo", 3)
    packed = lessons.looking(random.Random(1), shown, [zoo.DENSE])
    batch = collate([packed], processor.tokenizer, with_image=True)
    pixels = zoo.pixels_of([shown])
    with torch.no_grad():
        together = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            **pixels,
        ).logits
        alone = []
        for asked, answered in packed.branches:
            text = (packed.prefix + asked + answered).replace(IMAGE_PAD * 25, IMAGE_PAD)
            inputs = processor(text=[text], images=[render(shown)], return_tensors="pt")
            count = len(processor.tokenizer(answered).input_ids)
            alone.append(model(**inputs).logits[0, -count - 1 : -1])
    torch.testing.assert_close(branch_logits(together, batch.labels), torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("index", range(10))
def test_tokenizer_is_lossless_on_everything_the_world_says(index):
    tokenizer, shown = shared_tokenizer(), picture("zoo", index)
    packed = lessons.looking(random.Random(index), shown, [zoo.TERSE_AND_ERRING], write=1.0)
    blind = lessons.guessing(random.Random(index), shown)
    for example in (packed, blind, lessons.reading(random.Random(index), shown, 5, 4, 0.3)):
        for asked, answered in example.branches:
            text = example.prefix + asked + answered
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
