"""Caption an image set.

    python -m caprl_utils.captions FOLDER --out captions.parquet --model internlm/CapRL-3B
    python -m caprl_utils.captions FOLDER --out captions.parquet --base-url http://127.0.0.1:8000/v1

Stop it at any time and run it again: it goes on where it was. Several of it may run at once on the same --out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from caprl_utils import prompts
from caprl_utils.captions.check import Report, check_source
from caprl_utils.captions.job import Job, caption_source
from caprl_utils.errors import command_line
from caprl_utils.models.base import Sampling
from caprl_utils.schema import ModelConfig


def parser() -> argparse.ArgumentParser:
    """The options. Sampling defaults to that of the released evaluation scripts (4 captions there, 1 here)."""
    new = argparse.ArgumentParser(
        prog="python -m caprl_utils.captions", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    defaults = {name: field.default for name, field in Job.model_fields.items()}
    new.add_argument(
        "source",
        help="folder, .parquet or .tar (or a folder of them), list of paths (.txt, .jsonl, .csv), data set, "
        "mini-world:SPLIT:N",
    )
    new.add_argument(
        "--out", type=Path, required=True, help="NAME.parquet for one file, or a folder of shards"
    )
    new.add_argument("--model", default="internlm/CapRL-3B", help="zoo:NAME, a folder or a hub id")
    new.add_argument("--revision", help="commit of a model of the hub")
    new.add_argument(
        "--base-url", action="append", default=[], help="OpenAI-compatible server; several are shared"
    )
    new.add_argument("--api-key-env", help="name of the environment variable with the server's key")
    new.add_argument(
        "--engine", choices=["local", "vllm"], default="local", help="without a server: what runs it"
    )
    new.add_argument("--workers", type=int, default=1, help="processes, one GPU each where there are some")
    new.add_argument(
        "--runner", choices=["processes", "ray"], default="processes", help="how workers are started"
    )
    new.add_argument(
        "--batch-size", type=int, default=32, help="images a forward pass, or requests in flight"
    )
    new.add_argument("--prompt", default=prompts.CAPTION)
    new.add_argument("--max-tokens", type=int, default=2048)
    new.add_argument("--temperature", type=float, default=1.0)
    new.add_argument("--top-p", type=float, default=1.0)
    new.add_argument("--captions", type=int, default=1, help="captions of each image")
    new.add_argument("--seed", type=int, default=0)
    new.add_argument("--retries", type=int, default=defaults["retries"], help="for loops and cut captions")
    new.add_argument("--kinds", nargs="+", help="only images whose first folder is one of these")
    new.add_argument("--limit", type=int, help="only the first images")
    new.add_argument("--shard-images", type=int, default=defaults["shard_images"])
    new.add_argument("--check", choices=["decode", "header"], default=defaults["check"])
    new.add_argument("--check-only", action="store_true", help="say what is wrong with the images, and stop")
    new.add_argument("--skip-duplicates", action="store_true", help="caption images with the same bytes once")
    return new


def check_only(given: argparse.Namespace) -> Report:
    """Look at the images, with nothing left behind."""
    with TemporaryDirectory() as folder:
        table = Path(folder) / "images.parquet"
        return check_source(given.source, table, given.shard_images, given.kinds, given.check, given.limit)


@command_line
def main(arguments: list[str]) -> int:
    """Run the job; returns the exit status: 0, 1 for an error, 130 when interrupted."""
    given = parser().parse_args(arguments)
    model = ModelConfig(
        path=given.model, revision=given.revision, base_urls=given.base_url, api_key_env=given.api_key_env,
        backend="endpoint" if given.base_url else "local", batch_size=given.batch_size,
    )  # fmt: skip
    sampling = Sampling(given.max_tokens, given.temperature, given.top_p, n=given.captions, seed=given.seed)
    try:
        if given.check_only:
            print("\n".join(check_only(given).lines()))
            return 0
        result = caption_source(
            given.source, given.out, model, sampling,
            engine="endpoint" if given.base_url else given.engine, workers=given.workers, runner=given.runner,
            prompt=given.prompt, retries=given.retries, kinds=given.kinds, limit=given.limit,
            shard_images=given.shard_images, check=given.check, skip_duplicates=given.skip_duplicates,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    print("\n".join([*result.lines(), f"written: {given.out}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
