"""The real LLaMA-Factory on fresh small models: its parser, its tokens, what it says when it fails."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.models.base import Request, Sampling, open_backend
from caprl_utils.pretraining import data, llamafactory
from caprl_utils.pretraining.sets import STAGES, Training, folder_of
from caprl_utils.records import about_image
from caprl_utils.schema import ModelConfig
from tests.pretraining.conftest import REAL, data_set, small_profile

pytestmark = REAL
SOME = data.DataSet("rows", Path("folder"), Path("media"), {"hash": "hash", "rows": 10_000})
PROBE = Path(__file__).with_name("lf_probe.py")


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    from caprl_utils.mini.zoo import models

    folder = tmp_path_factory.mktemp("model")
    model = models.build_vlm(0)
    models.prepare_generation(model)
    model.save_pretrained(folder)
    models.build_processor().save_pretrained(folder)
    return folder


def write_yaml(folder, profile, name, model, rows):
    config, training = folder / "train.yaml", Training("t", "any", name)
    config.write_text(llamafactory.train_yaml(profile, training, model, rows, folder / "out"))
    return config


def probe(kind, config, *overrides, distributed=False):
    env = {"PYTHONPATH": str(llamafactory.SITE), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if distributed:
        env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613"}
    python = llamafactory.ENVIRONMENT / "bin" / "python"
    done = subprocess.run(
        [str(python), str(PROBE), kind, str(config), *overrides],
        env=os.environ | env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(Path(f"{config}.json").read_text())


@pytest.mark.parametrize(
    ("profile", "name"), [*(("paper", name) for name in STAGES), ("one_gpu", "align"), ("mini", "further")]
)
def test_llama_factorys_parser_reads_what_we_write(profile, name, tmp_path):
    profile = load_profile(profile)
    settings, model = profile.pretraining, {"model_type": "llava" if name == "sft" else "qwen2_5_vl"}
    (tmp_path / "config.json").write_text(json.dumps(model))
    config = write_yaml(tmp_path, profile, name, tmp_path, SOME)
    # a machine without GPU has no bf16 there; everything else is as written
    read = probe("parse", config, "use_cpu=true", distributed=settings.deepspeed is not None)
    chosen = llamafactory.stage_of(settings, name)
    assert read["learning_rate"] == chosen.learning_rate
    world = max(1, settings.nodes * settings.gpus_per_node)
    assert read["batch"] * read["accumulation"] * world == chosen.batch_size
    assert read["cutoff_len"] == settings.cutoff_tokens and read["max_pixels"] == settings.max_pixels
    assert read["schedule"] == "cosine" and 0.1 in (read["warmup_ratio"], read["warmup_steps"])
    parts = ("vision_tower", "projector", "language_model")
    assert read["frozen"] == [part not in llamafactory.TRAINS[name] for part in parts]
    assert read["bf16"] == (settings.precision == "bf16") and not read["packing"]
    assert read["liger"] == (settings.gpus_per_node > 0 and llamafactory.installed("liger_kernel"))
    assert read["zero_stage"] == ({"zero3": 3, "zero2": 2, None: None}[settings.deepspeed])


def test_rows_have_the_tokens_that_we_count_and_that_the_model_is_asked_with(small_model, rows, tmp_path):
    profile, examples = small_profile(), data.read_rows(rows.folder / "sft.jsonl")
    config = write_yaml(tmp_path, profile, "sft", small_model, rows)
    encoded = probe("encode", config)
    counter = data.TokenCounter(small_model, profile.pretraining.max_pixels)
    processor = counter.processor
    assert len(encoded) == len(examples)
    for row, example in zip(encoded, examples, strict=True):
        image_tokens = counter.image_tokens(140, 140)
        text = counter.text(example).replace("<|image_pad|>", "<|image_pad|>" * image_tokens)
        assert row["input_ids"] == processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(row["input_ids"]) == counter.text_tokens(example) + image_tokens
        learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert processor.tokenizer.decode(learned).startswith(example.messages[1].content + "<|im_end|>")


def test_pictures_are_seen_as_they_were_captioned(small_model, tmp_path):
    """On white, of deep grey values, upright; LLaMA-Factory's own opener shows black, white and a lying photo."""
    import numpy as np

    def save(name, picture, **options):
        picture.save(tmp_path / name, **options)
        return about_image(name, name, [("What?", "A picture.")])

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    grey = Image.fromarray(np.linspace(0, 60_000, 3600).reshape(60, 60).astype("uint16"))
    examples = [save("clear.png", Image.new("RGBA", (80, 60))), save("deep.png", grey),
                save("side.jpg", Image.new("RGB", (120, 90)), exif=exif)]  # fmt: skip
    checked = data_set(tmp_path, examples)
    seen = probe("look", write_yaml(tmp_path, small_profile(), "sft", small_model, checked))
    clear, deep, side = seen
    assert clear["corner"] == [255] * 3 and 120 < deep["mean"][0] < 135 and side["size"] == [90, 120]
    ours = [data.image_size(tmp_path / row.images[0]) for row in examples]
    assert ours == [tuple(one["size"]) for one in seen]


def test_a_step_with_qwens_tokenizer(qwen_vlm, rows, tmp_path):
    """151,936 ids, the hub's files, a photo: LLaMA-Factory has the tokens that we count, trains, and it loads again."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.effect_noise((640, 480), 90).convert("RGB").save(folder / "photo.jpg")
    examples = [about_image(str(i), "photo.jpg", [("What is it?", "Noise, 42 %.")]) for i in range(2)]
    # two epochs, since the first step only warms up
    sizes = {"num_rows": 2, "batch_size": 2, "micro_batch_size": 2, "num_epochs": 2}
    profile = small_profile(sft=sizes, cutoff_tokens=2048, max_pixels=1024 * 28 * 28)
    training = Training("real", "mini-qwen-3b", "sft")
    made = llamafactory.train(profile, training, qwen_vlm, data_set(folder, examples))
    assert made["values"]["steps"] == 2 and all(moved > 0 for moved in made["values"]["moved"].values())
    home = folder_of(profile, "real")
    encoded = probe("encode", home / "train.yaml")
    counter = data.TokenCounter(qwen_vlm, profile.pretraining.max_pixels)
    assert len(encoded[0]["input_ids"]) == counter.text_tokens(examples[0]) + counter.image_tokens(640, 480)
    backend = open_backend(ModelConfig(path=str(home / "final")), profile)
    request = Request("x", "What?", Image.open(folder / "photo.jpg"))
    (done,) = backend.generate([request], Sampling(max_tokens=3))
    assert done.error is None


def test_a_failure_is_told_with_the_end_of_the_log(small_model, rows, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(small_model, broken)
    (broken / "model.safetensors").write_bytes(b"cut off")
    profile = small_profile()
    with pytest.raises(UserError, match="llamafactory-cli ended with status") as error:
        llamafactory.train(profile, Training("broken", "mini-qwen-3b", "sft"), broken, rows)
    assert paths.shown(folder_of(profile, "broken") / "train.log") in str(error.value)
