"""What only a GPU can tell, in a few minutes and without a download: random weights at the true sizes of the 3B models.

    python tests/bench/check_gpu.py --size 3b       (make check-gpu; --size tiny: the same on a CPU, within a minute)

Seven steps, each a process of its own, so that its peak of memory is its own; each prints one JSON line, and a table
ends it. A step that fails is told and does not hold up the others.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from caprl_utils import paths, prompts  # noqa: E402
from caprl_utils.models.base import Request  # noqa: E402
from tests import qwen  # noqa: E402

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "text": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 1}, "vision": {},
        "mrope": [4, 6, 6], "image": (168, 140), "prompts": 2, "group": 2, "tokens": 4, "questions": 12,
        "caption_words": 20,
    },
    "3b": {  # Qwen2.5-VL-3B and Qwen2.5-3B; a rollout of profile one_gpu
        "text": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
                 "num_key_value_heads": 2},
        "vision": {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16,
                   "fullatt_block_indexes": [7, 15, 23, 31]},
        "mrope": [16, 24, 24], "image": (1024, 768), "prompts": 16, "group": 8, "tokens": 1024,
        "questions": 512, "caption_words": 600,
    },
}  # fmt: skip
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ROUNDING = 2e-2 if GPU else 1e-4  # relative; bfloat16 on a GPU


def picture(size: dict[str, Any], seed: int) -> Image.Image:
    """Noise: no window of it is like another."""
    torch.manual_seed(seed)
    width, height = size["image"]
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy())


def models(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write both models: float32 at tiny size, bfloat16 at the true one."""
    torch.set_default_dtype(torch.bfloat16 if GPU else torch.float32)
    with torch.device(DEVICE):
        qwen.save_reader(folder / "reader", **size["text"])
        qwen.save_vlm(folder / "vlm", size["mrope"], size["vision"], **size["text"])
    files = {name: (folder / name).glob("*.safetensors") for name in ("reader", "vlm")}
    return {f"{name}_gb": sum(file.stat().st_size for file in found) / 1e9 for name, found in files.items()}


def vision(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tower window by window against all windows of a size in one call."""
    from caprl_utils.rl.policy import windows_together

    model = hf.AutoModelForImageTextToText.from_pretrained(folder / "vlm", dtype="auto").to(DEVICE)
    inputs = hf.AutoProcessor.from_pretrained(folder / "vlm").image_processor(picture(size, 0), return_tensors="pt")
    inputs = inputs.to(model.device)
    seen, seconds = [], []
    for change in (lambda model: None, windows_together):
        change(model)
        for _ in range(2):  # the first is warm-up
            start = time.perf_counter()
            with torch.inference_mode():
                features = torch.cat(list(model.model.get_image_features(**inputs).pooler_output)).float().cpu()
        seen.append(features)
        seconds.append(time.perf_counter() - start)
    gap = ((seen[0] - seen[1]).abs().max() / seen[0].abs().max()).item()
    return {"ok": gap < ROUNDING, "gap": gap, "ms_single": 1e3 * seconds[0], "ms_together": 1e3 * seconds[1]}


def reader(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Packed questions against plain ones: the largest gap, letters that tie, questions a second."""
    from caprl_utils.models.local import LocalBackend
    from caprl_utils.rl.readers import PackedPrompts, Reader
    from caprl_utils.schema import ModelConfig

    backend = LocalBackend(ModelConfig(path=str(folder / "reader")))
    caption, options = ("The red tower stands left of house number seven. ", ["one", "two", prompts.CANNOT_ANSWER])
    texts = [caption * (size["caption_words"] // 9) + str(i // 4) for i in range(size["questions"])]
    asked = [prompts.reward_question(t, f"What is {i % 4}?", options, "authors") for i, t in enumerate(texts)]
    requests = [Request(str(i), text, prefill=prompts.ANSWER_PREFILL) for i, text in enumerate(asked)]
    packed, plain = Reader(backend, PackedPrompts(backend)), Reader(backend)
    packed.letter_logprobs(requests[:8], "ABC")
    start = time.perf_counter()
    fast = torch.tensor(packed.letter_logprobs(requests, "ABC"))
    seconds = time.perf_counter() - start
    some = slice(0, 32)
    gap = (fast[some] - torch.tensor(plain.letter_logprobs(requests[some], "ABC"))).abs().max().item()
    top = fast.topk(2).values
    ties = (top[:, 0] == top[:, 1]).float().mean().item()
    return {"ok": packed._same, "gap": gap, "ties": ties, "questions_per_sec": len(requests) / seconds}


def rollout(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Captions sampled through adapters on float32 weights and on bfloat16 ones: seconds and gigabytes."""
    from peft import get_peft_model

    from caprl_utils.rl.policy import load_policy, load_processor, lora_config
    from caprl_utils.schema import Lora, ModelConfig, Training

    config, training = ModelConfig(path=str(folder / "vlm")), Training(lora=Lora())
    processor, rows = load_processor(config), size["group"] * size["prompts"]
    content = [{"type": "image"}, {"type": "text", "text": prompts.CAPTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text] * rows, images=[picture(size, i) for i in range(rows)], return_tensors="pt")
    found, tokens = {}, size["tokens"]
    for name, half in (("bfloat16", True), ("float32", False)):
        base = load_policy(config, training, on_gpu=half)
        policy = get_peft_model(base, lora_config(training, base)).to(DEVICE).eval()
        start = time.perf_counter()
        peak = fresh_peak()
        try:
            with torch.no_grad():
                policy.generate(**inputs.to(policy.device), max_new_tokens=tokens, min_new_tokens=tokens)
        except torch.OutOfMemoryError:
            found |= {f"{name}_gb": "too much"}
            continue
        found |= {f"{name}_sec": time.perf_counter() - start, f"{name}_gb": peak()}
        del base, policy
    return found


def fresh_peak():
    """Call for the gigabytes that were allocated at most since now; None without a GPU."""
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return lambda: torch.cuda.max_memory_allocated() / 1e9 if GPU else None


def train(size: dict[str, Any], folder: Path, name: str, steps: int, **training: Any) -> list[dict[str, Any]]:
    """Rows of the curve of a training in folder/NAME, on from its last checkpoint."""
    from caprl_utils.rl.grpo import open_trainer
    from caprl_utils.rl.monitor import Monitor
    from caprl_utils.rl.policy import is_whole
    from caprl_utils.runs import last_checkpoint
    from caprl_utils.schema import RL, Experiment, Models, Profile, Training
    from tests.rl.conftest import write_questions

    paths.RUNS = folder
    roles = {"policy": {"path": str(folder / "vlm")}, "reward_reader": {"path": str(folder / "reader")}}
    rl = RL(
        num_images=size["prompts"], prompts_per_step=size["prompts"], group_size=size["group"], steps=steps,
        warmup_steps=0, save_every=1, max_completion_tokens=size["tokens"], reward="qa_expected", learning_rate=1e-4,
    )  # fmt: skip
    profile = Profile(name="check", models=Models(**roles), rl=rl)
    write_questions(folder / "check" / "curation" / "main" / "qa.parquet", size["prompts"], size["image"])
    run = folder / name
    run.mkdir(exist_ok=True)
    checkpoint = last_checkpoint(run, is_whole)
    trainer = open_trainer(Experiment(name=name, training=Training(**training)), profile, 0, run)
    with Monitor(trainer, run, checkpoint):
        trainer.fit(checkpoint)
    return [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]


def told(row: dict[str, Any]) -> dict[str, Any]:
    """What of a step is told."""
    names = ("seconds", "seconds_generate", "seconds_reward", "completion_tokens", "reward", "grad_norm", "kl")
    return {"ok": row["grad_norm"] is not None, **{name: row[name] for name in names}}


def lora(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Two steps of profile one_gpu: adapters of rank 64."""
    return told(train(size, folder, "lora", 2, lora={})[-1])


def full(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A step of all weights with the KL reference; it needs some 100 GB at the true size."""
    return told(train(size, folder, "full", 1)[-1])


def resume(size: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The second step of `lora` again, from the checkpoint of the first."""
    shutil.rmtree(folder / "again", ignore_errors=True)
    shutil.copytree(folder / "lora", folder / "again")
    first = json.loads((folder / "lora" / "curve.jsonl").read_text().splitlines()[-1])
    shutil.rmtree(folder / "again" / "checkpoint-2")
    again = train(size, folder, "again", 2, lora={})[-1]
    gaps = {name: abs(again[name] - first[name]) for name in ("reward", "grad_norm", "kl")}
    return {"ok": all(gap <= ROUNDING * abs(first[name]) + 1e-6 for name, gap in gaps.items()), **gaps}


STEPS = {step.__name__: step for step in (models, vision, reader, rollout, lora, full, resume)}


def main(argv: list[str]) -> int:
    """Run all steps, or one; 0 when all went well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="3b" if GPU else "tiny")
    parser.add_argument("--folder", type=Path, help="for the models, 15 GB at 3b; by default a temporary one")
    parser.add_argument("--step", choices=list(STEPS))
    given = parser.parse_args(argv)
    if given.step:  # in this process
        torch.set_num_threads(torch.get_num_threads() if GPU else 1)
        start, peak = time.perf_counter(), fresh_peak()
        found = {"step": given.step, "ok": True} | STEPS[given.step](SIZES[given.size], given.folder)
        print(json.dumps(found | {"total_sec": time.perf_counter() - start, "peak_gb": peak()}))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="check-gpu-") as temporary:
        folder = given.folder or Path(temporary)
        for step in STEPS:
            words = [sys.executable, __file__, "--step", step, "--size", given.size, "--folder", str(folder)]
            done = subprocess.run(words, capture_output=True, text=True)
            lines = done.stdout.strip().splitlines() or [""]
            told = (done.stderr.strip().splitlines() or ["no message"])[-1]
            failed = {"step": step, "ok": False, "error": told}
            rows.append(failed if done.returncode else json.loads(lines[-1]))
            print(json.dumps(rows[-1]), flush=True)
    print(f"\n{'step':8} {'ok':4} {'sec':>7} {'peak GB':>8}")
    for row in rows:
        number = [f"{row.get(name) or float('nan'):.1f}" for name in ("total_sec", "peak_gb")]
        print(f"{row['step']:8} {'yes' if row['ok'] else 'NO':4} {number[0]:>7} {number[1]:>8}")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
