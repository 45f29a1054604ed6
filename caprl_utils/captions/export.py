"""Caption sets for other tools, and back.

    python -m caprl_utils.captions.export sample caprl-5m.parquet --images 1000000 --out caprl-1m.parquet
    python -m caprl_utils.captions.export llamafactory captions.parquet --out data/train.jsonl --media images
    python -m caprl_utils.captions.export webdataset captions.parquet --out tars
    python -m caprl_utils.captions.export released CapRL-2M.jsonl --out caprl-2m.parquet
    python -m caprl_utils.captions.export released CapRL-2M.jsonl --out data/caprl-2m.jsonl --media images

Each file appears when it is whole; run a stopped export again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from caprl_utils import prompts
from caprl_utils.captions.llamafactory import MAX_BAD_SHARE, released_llamafactory, write_llamafactory
from caprl_utils.captions.released import write_released
from caprl_utils.captions.sets import sample
from caprl_utils.captions.webdataset import write_webdataset
from caprl_utils.errors import UserError, command_line

CAPTIONS = "a .parquet file of captions, a job's folder, or a folder of shards"
JOB = "folder of the job that made the captions (default: CAPTIONS.work beside the file)"
MEDIA = "folder that image paths start at, as media_dir of the training (default: where the images of the job are)"


def parser() -> argparse.ArgumentParser:
    """One subcommand for each kind of export."""
    new = argparse.ArgumentParser(
        prog="python -m caprl_utils.captions.export", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    kinds = new.add_subparsers(dest="kind", required=True)
    _add_sample(_kind(kinds, "sample", "a seeded sample of a set, such as CapRL-1M of CapRL-5M", _sample))
    _add_llamafactory(_kind(kinds, "llamafactory", "training data of LLaMA-Factory", _llamafactory))
    _add_webdataset(_kind(kinds, "webdataset", "tars with images and captions", _webdataset))
    _add_released(_kind(kinds, "released", "read released caption JSONL such as CapRL-2M", _released))
    return new


def _kind(
    kinds: argparse._SubParsersAction, name: str, text: str, run: Callable[[argparse.Namespace], list[str]]
) -> argparse.ArgumentParser:
    new = kinds.add_parser(name, help=text, description=text)
    new.set_defaults(run=run)
    return new


def _add_sample(new: argparse.ArgumentParser) -> None:
    new.add_argument("captions", type=Path, help=CAPTIONS)
    new.add_argument("--out", type=Path, required=True, help="NAME.parquet of the sample")
    new.add_argument("--images", type=_count, required=True, help="images in the sample")
    new.add_argument("--seed", type=int, default=0, help="samples of one seed are nested")


def _add_llamafactory(new: argparse.ArgumentParser) -> None:
    new.add_argument("captions", type=Path, help=CAPTIONS)
    new.add_argument(
        "--out", type=Path, required=True, help="NAME.jsonl; dataset_info.json is kept beside it"
    )
    new.add_argument("--job", type=Path, help=JOB)
    new.add_argument("--all", action="store_true", help="loops and cut captions too")
    _add_training(new)


def _add_training(new: argparse.ArgumentParser) -> None:
    new.add_argument("--media", type=Path, help=MEDIA)
    new.add_argument("--prompt", default=prompts.CAPTION, help="what the user says, behind the image")
    new.add_argument(
        "--max-bad-share", type=float, default=MAX_BAD_SHARE,
        help=f"stop when more captions than this share are set aside (default: {MAX_BAD_SHARE})",
    )  # fmt: skip


def _add_webdataset(new: argparse.ArgumentParser) -> None:
    new.add_argument("captions", type=Path, help=CAPTIONS)
    new.add_argument("--out", type=Path, required=True, help="folder of the tars")
    new.add_argument("--job", type=Path, help=JOB)
    new.add_argument("--all", action="store_true", help="loops and cut captions too")


def _add_released(new: argparse.ArgumentParser) -> None:
    new.add_argument(
        "files", type=Path, nargs="+", help="JSONL files, one caption with its image path a line"
    )
    new.add_argument(
        "--out",
        type=Path,
        required=True,
        help="NAME.parquet with our columns, or NAME.jsonl for LLaMA-Factory",
    )
    new.add_argument("--limit", type=_count, help="only the first lines of each file")
    _add_training(new)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def _sample(given: argparse.Namespace) -> list[str]:
    _require(given.out, ".parquet")
    rows = sample(given.captions, given.out, given.images, given.seed)
    return [f"{rows} captions of {given.images} images, seed {given.seed}"]


def _llamafactory(given: argparse.Namespace) -> list[str]:
    _require(given.out, ".jsonl")
    return write_llamafactory(
        given.captions, given.out, given.media, given.job, given.prompt, not given.all, given.max_bad_share
    ).lines()


def _webdataset(given: argparse.Namespace) -> list[str]:
    return [f"tar files: {len(write_webdataset(given.captions, given.out, given.job, not given.all))}"]


def _released(given: argparse.Namespace) -> list[str]:
    _require(given.out, ".parquet", ".jsonl")
    if given.out.suffix == ".parquet":
        return [f"{write_released(given.files, given.out, given.limit)} captions"]
    return released_llamafactory(
        given.files, given.out, given.media, given.prompt, given.limit, given.max_bad_share
    ).lines()


def _require(out: Path, *suffixes: str) -> None:
    if out.suffix not in suffixes:
        raise UserError(f"--out {out}: the name must end in {' or '.join(suffixes)}")


@command_line
def main(arguments: list[str]) -> int:
    """Write what is asked for and say how much; returns the exit status: 0, or 1 for an error."""
    given = parser().parse_args(arguments)
    print("\n".join([*given.run(given), f"written: {given.out}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
