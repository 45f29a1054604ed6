import pytest
import torch
import transformers
from peft import get_peft_model

from caprl_utils.errors import UserError
from caprl_utils.mini.zoo.models import build_language_model, build_processor, build_vlm
from caprl_utils.rl.policy import counts, freeze, lora_config, save_final
from caprl_utils.schema import Lora, Training


@pytest.fixture(scope="module")
def model():
    return build_vlm(0)


@pytest.mark.parametrize("family", ["Qwen2_5_VL", "Qwen3VL", "InternVL", "Llava"])
def test_every_family_has_all_three_parts(family):
    """On the meta device at the class's default size: no part may be missed by its parameter names."""
    with torch.device("meta"):
        config = getattr(transformers, f"{family}Config")()
        whole = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    table = counts(whole)
    assert all(table[part]["all"] > 0 for part in table)
    assert table["language_model"]["all"] > table["vision_tower"]["all"] > table["projector"]["all"]


def test_freezing_and_counts(model, monkeypatch):
    freeze(model, Training(vision_tower=False))
    table = counts(model)
    assert table["vision_tower"]["trainable"] == 0 < table["vision_tower"]["all"]
    assert all(table[part]["trainable"] == table[part]["all"] for part in ("projector", "language_model"))
    whole = sum(p.numel() for p in model.parameters())
    assert sum(row["all"] for row in table.values()) == whole
    freeze(model, Training())
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match="nothing would train"):
        freeze(model, Training(vision_tower=False, projector=False, language_model=False))
    with pytest.raises(UserError, match=r"training\.projector is false, but Qwen2ForCausalLM has no such part"):
        freeze(build_language_model(0), Training(projector=False))
    for parameter in model.parameters():  # under ZeRO-3 the whole tensors count
        monkeypatch.setattr(parameter, "ds_numel", 2 * parameter.numel(), raising=False)
    assert sum(row["all"] for row in counts(model).values()) == 2 * whole


@pytest.mark.parametrize("off", ["vision_tower", "projector", "language_model"])
def test_lora_keeps_out_of_every_part_that_is_off_in_qwen3_vl(off):
    """Its deepstack mergers are projectors, though they stand inside of the tower."""
    small = {"hidden_size": 64, "intermediate_size": 64}
    config = transformers.Qwen3VLConfig(
        text_config=small | {"num_hidden_layers": 1},
        vision_config=small | {"depth": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    )
    with torch.device("meta"):
        whole = transformers.Qwen3VLForConditionalGeneration(config)
        training = Training(lora=Lora(rank=4, alpha=8), **{off: False})
        table = counts(get_peft_model(whole, lora_config(training, whole)))
    assert {part for part, row in table.items() if row["trainable"] == 0} == {off}
    assert all(row["trainable"] < row["all"] / 2 for row in table.values())


def test_a_final_model_that_lacks_weights_is_refused(model, tmp_path):
    """As rank 0 alone would write it under ZeRO-3, where the other processes hold the rest."""
    state = {name: tensor for name, tensor in model.state_dict().items() if "visual" not in name}
    with pytest.raises(UserError, match=r"holds .* of the model's .* weights; the checkpoints are kept"):
        save_final(model, build_processor(), tmp_path / "final", torch.float32, state)
    assert not (tmp_path / "final").exists()
    save_final(model, build_processor(), tmp_path / "final", torch.float32, model.state_dict())
    assert (tmp_path / "final" / "config.json").is_file()
