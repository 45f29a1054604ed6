"""Run by LLaMA-Factory's own Python: what its parser and its data processing make of our files.

lf_probe.py parse TRAIN.yaml [KEY=VALUE ...]     the parsed arguments, as JSON
lf_probe.py encode TRAIN.yaml                    input ids and labels of every row, as JSON
lf_probe.py look TRAIN.yaml                      pixels of the first row's images: size, corner and mean, as JSON
"""

import json
import sys


def arguments(file, *overrides):
    from llamafactory.hparams.parser import get_train_args
    from omegaconf import OmegaConf

    values = OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_cli(list(overrides)))
    return get_train_args(OmegaConf.to_container(values))


def parse(file, *overrides):
    model, data, training, finetuning, _ = arguments(file, *overrides)
    return {
        "cutoff_len": data.cutoff_len, "max_pixels": model.image_max_pixels, "packing": data.packing,
        "liger": model.enable_liger_kernel, "learning_rate": training.learning_rate, "bf16": training.bf16,
        "batch": training.per_device_train_batch_size, "accumulation": training.gradient_accumulation_steps,
        "schedule": str(training.lr_scheduler_type.value), "warmup_ratio": float(training.warmup_ratio or 0),
        "warmup_steps": float(training.warmup_steps),
        "zero_stage": training.hf_deepspeed_config.config["zero_optimization"]["stage"] if training.deepspeed else None,
        "frozen": [finetuning.freeze_vision_tower, finetuning.freeze_multi_modal_projector,
                   finetuning.freeze_language_model],
    }  # fmt: skip


def encode(file):
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.model import load_tokenizer

    model, data, training, _, _ = arguments(file)
    loaded = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(loaded["tokenizer"], data)
    rows = get_dataset(template, model, data, training, stage="sft", **loaded)["train_dataset"]
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]


def look(file):
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.model import load_tokenizer
    from PIL import ImageStat

    model, data, *_ = arguments(file)
    loaded = load_tokenizer(model)
    plugin = get_template_and_fix_tokenizer(loaded["tokenizer"], data).mm_plugin
    with open(f"{data.dataset_dir}/{data.dataset[0]}.jsonl") as rows:
        names = [name for row in rows for name in json.loads(row)["images"]]
    limits = {"image_max_pixels": model.image_max_pixels, "image_min_pixels": model.image_min_pixels}
    images = plugin._regularize_images([f"{data.media_dir}/{name}" for name in names], **limits)["images"]
    return [{"size": i.size, "corner": i.getpixel((0, 0)), "mean": ImageStat.Stat(i).mean} for i in images]


result = {"parse": parse, "encode": encode, "look": look}[sys.argv[1]](*sys.argv[2:])
with open(sys.argv[2] + ".json", "w") as out:
    json.dump(result, out)
