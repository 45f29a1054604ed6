"""The settings of the paper at full size: parameters on the meta device."""

import pytest

from caprl_utils.config import load_assembly
from caprl_utils.errors import UserError
from caprl_utils.vlm_init.assembly import full_size_config, parameters, stored_shapes

# Parameters of the released models, as the hub counts them in their safetensors (CLIP: of its image half).
KNOWN = {"qwen2.5-3b": (3_085_938_688, 3_754_622_976), "qwen2.5-7b": (7_615_616_512, 8_292_166_656)}
LLAVA = {"language_model": 7_737_708_544, "vision_tower": 303_507_456,
         "projector": 1024 * 4096 + 4096 + 4096 * 4096 + 4096}  # fmt: skip


@pytest.mark.parametrize("name", [*KNOWN, "internlm2.5-7b-clip"])
def test_parts_of_the_papers_settings_add_up_to_the_known_models(name):
    parts = parameters(stored_shapes(full_size_config(load_assembly(name))))
    assert parts == LLAVA or (parts["language_model"], sum(parts.values())) == KNOWN[name]


def test_donors_that_do_not_fit_are_refused_at_full_size():
    small, large = load_assembly("qwen2.5-3b"), load_assembly("qwen2.5-7b")
    with pytest.raises(UserError, match="do not fit together: hidden_size 2048 and 3584"):
        full_size_config(small.model_copy(update={"vision": large.vision}))


def test_full_size_configs_have_what_the_donors_have():
    small, large = (full_size_config(load_assembly(f"qwen2.5-{size}")) for size in ("3b", "7b"))
    assert small.tie_word_embeddings is True and large.tie_word_embeddings is False
    rope = small.text_config.rope_parameters
    assert rope["rope_theta"] == 1e6 and rope["mrope_section"] == [16, 24, 24]
    assert (small.vision_config.out_hidden_size, large.vision_config.out_hidden_size) == (2048, 3584)
    assert small.vision_config.tokens_per_second == 2  # the class's own default is another
    text = full_size_config(load_assembly("internlm2.5-7b-clip")).text_config
    assert text.rope_parameters == {"rope_type": "default", "rope_theta": 1_000_000}
    assert (text.attention_bias, text.max_position_embeddings, text.rms_norm_eps) == (False, 32768, 1e-5)
