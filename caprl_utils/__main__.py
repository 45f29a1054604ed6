"""The one command of the package: `caprl`, in a checkout `.venv/bin/python -m caprl_utils`.

Each sub-command reads its profile, calls one function of its room and prints what came out. What a user can mend
is told in one line on stderr with exit status 1; wrong usage is 2, Ctrl-C 130.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from caprl_utils import paths, prompts
from caprl_utils.errors import UserError

if TYPE_CHECKING:
    from caprl_utils.schema import Profile

INTERRUPTED = 130  # exit status of a command ended by Ctrl-C
_MENDABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
app = typer.Typer(
    help="CapRL: caption images, train captioners by what a reader can answer from their captions, measure both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain lines: every help fits a screen
)
# Options that several commands share. Rooms are imported inside the commands: `--help` must not load torch.
ProfileOption = Annotated[str, Option(help="smoke, mini, one_gpu, paper, or a YAML file.")]
SetOption = Annotated[list[str], Option("--set", metavar="KEY=VALUE", help="A setting: rl.steps=10.")]

Engine = Literal["vllm", "transformers"]
PRETRAINED = ("table1", "table2", "figure4")  # items of `caprl train` that are made of pretrained VLMs


def settings_of(profile: str, overrides: list[str]) -> Profile:
    """The profile with the values of `--set`, which also reach notebooks and the processes that a command starts."""
    from caprl_utils.config import SET_ENV, load_profile

    if overrides:
        os.environ[SET_ENV] = shlex.join(overrides)
    return load_profile(profile)


@app.command()
def config(
    profile: Annotated[str, Argument()] = "mini",
    experiment: Annotated[str | None, Option(help="A training of configs/experiments.")] = None,
    overrides: SetOption = [],
) -> None:
    """Show all settings of a profile, or of a training over it, each with its source."""
    from caprl_utils.config import explain, load_experiment, reasons
    from caprl_utils.schema import Experiment, Profile

    shown, why, rl = settings_of(profile, overrides), reasons(Profile, profile), []
    if experiment:
        shown, resolved = load_experiment(experiment, profile)
        why |= reasons(Experiment, experiment)
        rl = [explain(resolved.rl, "rl.", why)]
    print(f"# {shown.name}: {shown.description}", explain(shown, why=why), *rl, sep="\n")


@app.command()
def caption(
    source: Annotated[str, Argument(help="Folder, .parquet, .tar, list or data set; s3://, hf://.")],
    out: Annotated[str | None, Option(metavar="FILE", help="By default captions-SOURCE.parquet.")] = None,
    model: Annotated[str, Option(help="zoo:NAME, folder, hub id.")] = "internlm/CapRL-3B",
    base_url: Annotated[list[str], Option(metavar="URL", help="Of a server; several share.")] = [],
    engine: Annotated[Engine | None, Option(metavar="NAME", help="vllm or transformers.")] = None,
    batch_size: Annotated[int | None, Option(metavar="N", min=1, help="A pass, or in flight.")] = None,
    workers: Annotated[int, Option(metavar="N", min=0, help="Ray actors; 0: in this process.")] = 0,
    gpus: Annotated[int, Option(metavar="N", min=1, help="Of a worker's model.")] = 1,
    captions: Annotated[int, Option(metavar="N", min=1, help="Of each image.")] = 1,
    max_tokens: Annotated[int | None, Option(metavar="N", min=1, help="2048 if they fit.")] = None,
    temperature: Annotated[float, Option(metavar="T", min=0, help="0 is greedy.")] = 1.0,
    seed: Annotated[int, Option(metavar="N", help="Of sampling.")] = 0,
    prompt: Annotated[str | None, Option(help="Instead of the paper's.")] = None,
    kind: Annotated[list[str], Option(metavar="NAME", help="Only images of such a folder.")] = [],
    limit: Annotated[int | None, Option(metavar="N", min=1, help="Only the first images.")] = None,
    max_bad_share: Annotated[float, Option(metavar="X", min=0, help="Of unusable images.")] = 0.2,
    check: Annotated[bool, Option("--check", help="Look at the images only.")] = False,
) -> None:
    """Caption images; stop it at any time and run it again: it goes on where it was."""
    from caprl_utils.captions.job import caption_source, check_source, token_limit
    from caprl_utils.image_sources import read_source
    from caprl_utils.models.base import Sampling
    from caprl_utils.registry import drawn_source
    from caprl_utils.schema import ModelConfig

    if check:
        return print("\n".join(check_source(source, kind or None, limit)))
    backend = "endpoint" if base_url else "local"
    captioner = ModelConfig(path=model, base_urls=base_url, backend=backend, batch_size=batch_size)
    read_source(source)  # or an error, before a model is asked
    sampling = Sampling(max_tokens or token_limit(captioner), temperature, n=captions, seed=seed)
    if model.startswith(paths.ZOO_PREFIX) and not drawn_source(source):
        print("models of the zoo know rendered pictures only; for photos name another (internlm/CapRL-3B)")
    here = Path(source.rstrip("/"))
    out = out or f"captions-{(here.name if here.is_dir() else here.stem) or 'images'}.parquet"
    made = caption_source(
        source, out, captioner, sampling, prompt=prompt or prompts.CAPTION,
        kinds=kind or None, limit=limit, max_bad_share=max_bad_share, engine=engine, workers=workers, gpus=gpus,
    )  # fmt: skip
    print(*made.lines(), f"written: {made.file}", sep="\n")


@app.command()
def export(
    captions: Annotated[list[str], Argument(help="A caption set, or released .jsonl files.")],
    out: Annotated[Path, Option(help="NAME.jsonl for LLaMA-Factory, or NAME.parquet.")],
    images: Annotated[int | None, Option(metavar="N", help="A sample of so many.")] = None,
    seed: Annotated[int, Option(metavar="N", min=0, help="Of the sample; they are nested.")] = 0,
    media: Annotated[Path | None, Option(help="Where image paths start (media_dir).")] = None,
    prompt: Annotated[str | None, Option(help="Instead of the paper's.")] = None,
    everything: Annotated[bool, Option("--all", help="Loops and cut captions too.")] = False,
    limit: Annotated[int | None, Option(metavar="N", min=1, help="Only the first released lines.")] = None,
    max_bad_share: Annotated[float, Option(metavar="X", min=0, help="Of unusable captions.")] = 0.05,
) -> None:
    """Write captions for other tools: training data, a sample, or released files with our columns."""
    from caprl_utils.captions.export import export as write

    prompt = prompt or prompts.CAPTION
    told = write(captions, out, images, seed, media, prompt, not everything, limit, max_bad_share)
    print(*told, f"written: {out}", sep="\n")


@app.command()
def curate(
    profile: ProfileOption = "mini",
    seed: Annotated[int, Option(help="Of sampling and of the option shuffles.")] = 0,
    as_they_are: Annotated[bool, Option("--as-they-are", help="Keep images that benchmarks have.")] = False,
    overrides: SetOption = [],
) -> None:
    """Write questions about the profile's images and keep those that only the image answers."""
    from caprl_utils.curation import keep, pipeline
    from caprl_utils.prism.loading import load_samples
    from caprl_utils.prism.sources import images_of

    settings = settings_of(profile, overrides)
    held_out = [] if as_they_are else images_of(load_samples(settings))
    job = pipeline.open_job(settings, seed, held_out)
    with job.run:
        values = pipeline.curate(job)["values"]
    for step, count in pipeline.funnel(values):
        print(f"{count:8,} questions {step}")
    print(f"{values['images_kept']:8,} images with kept questions: {paths.shown(job.run.folder / keep.QA_FILE)}")


@app.command()
def run(
    notebooks: Annotated[list[str], Argument(help="Names in notebooks/; NAME:PARAMETER=VALUE sets one.")],
    profile: ProfileOption = "mini",
    parameter: Annotated[list[str], Option("-p", metavar="NAME=VALUE", help="Of each notebook.")] = [],
    overrides: SetOption = [],
    chain: Annotated[str, Option(help="All copies that the caller will run.")] = "",
) -> None:
    """Run notebooks in order through papermill; `make` runs only those that are out of date."""
    from caprl_utils.run import run_all

    run_all(notebooks, settings_of(profile, overrides), parameter, chain.split())


@app.command()
def plan(profile: ProfileOption = "mini", overrides: SetOption = []) -> None:
    """Show what a profile needs before it starts: hardware, hours, disk, and what is missing here."""
    from caprl_utils.run import plan

    print("\n".join(plan(settings_of(profile, overrides))))


@app.command()
def score(
    captions: Annotated[str | None, Argument(help="A file of captions, or a model.", show_default=False)] = None,
    benchmark: Annotated[list[str], Option(metavar="KEY[=PATH]", help="Or local data of it.")] = [],
    num_samples: Annotated[int | None, Option(min=1, help="Of each benchmark.")] = None,
    name: Annotated[str | None, Option(help="Of the run; by default the file's or model's.")] = None,
    direct: Annotated[bool, Option("--direct", help="VQA: it answers from the image.")] = False,
    authors: Annotated[Path | None, Option(metavar="DIR", help="Their protocol and files.")] = None,
    list_them: Annotated[bool, Option("--list", help="Show the benchmarks.")] = False,
    vectors: Annotated[Path | None, Option(metavar="FILE.jsonl", help="Check the scorer.")] = None,
    profile: ProfileOption = "mini",
    overrides: SetOption = [],
) -> None:
    """Score captions, or a model that writes them: what a reader answers from them alone (Prism).

    A file: .jsonl, .json, .csv or .parquet; image_id, image or id; caption, text or conversations.
    """
    if list_them:
        from caprl_utils.prism.benchmarks import overview

        return print(overview())
    if vectors:
        from caprl_utils.prism.score import check_vectors

        passed, failures = check_vectors(vectors)
        print(*failures, f"{passed} passed, {len(failures)} failed", sep="\n")
        raise typer.Exit(1 if failures else 0)
    if captions is None:
        raise UserError("name a file of captions or a captioning model (zoo:NAME, a folder, a hub id), or --list")
    from caprl_utils.prism.loading import protocol
    from caprl_utils.prism.score import score as write

    overrides = [*(protocol(authors) if authors else []), *overrides]
    print(write(settings_of(profile, overrides), captions, benchmark, num_samples, name, direct))


@app.command()
def train(
    names: Annotated[list[str], Argument(help="Experiments (default: all), table1, table2, figure4.")] = [],
    table3: Annotated[bool, Option("--table3", help="The main one and the judges'.")] = False,
    show: Annotated[bool, Option("--list", help="Show the experiments of the profile, and stop.")] = False,
    push: Annotated[str | None, Option("--push-to-hub", metavar="REPO", help="Upload the first captioner.")] = None,
    profile: ProfileOption = "mini",
    overrides: SetOption = [],
) -> None:
    """Train captioners by RL, or VLMs on captions, and evaluate them; what is done is read, what stopped goes on."""
    from caprl_utils.notebook import prepare_process
    from caprl_utils.pretraining.pretrain import pretrain
    from caprl_utils.reports import cards
    from caprl_utils.rl import experiments

    settings = settings_of(profile, overrides)
    if show:
        return print(experiments.listing(profile))
    items = [name for name in names if name in PRETRAINED]
    chosen = [name for name in names if name not in items] + (experiments.of_table_3(settings) if table3 else [])
    first = experiments.planned(settings, chosen)[0].name
    if push:  # before a long training, and before an offline profile shuts the hub out of what trains
        cards.ask_hub("create_repo", push, private=True, exist_ok=True)
    prepare_process(settings)
    if chosen or not items:  # first: pretraining needs the captioner
        for row in experiments.run_all(profile, chosen):
            print("  ".join(f"{key} {_short(value)}" for key, value in row.items()))
    for name, record in pretrain(settings, items).items() if items else ():
        print(f"{name}  average {_short(record['values']['average'])}")
    if push:
        print(f"{first}: {cards.push(settings, first, push)}")


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "–" if value is None else str(value)


@app.command()
def report(
    items: Annotated[list[str], Argument(help="table1 ... extra_readers; default: all there are.")] = [],
    train: Annotated[bool, Option("--train", help="First make the trainings that the items need.")] = False,
    publish: Annotated[bool, Option("--publish", help="Copy them into reports/ and README.")] = False,
    profile: ProfileOption = "mini",
    overrides: SetOption = [],
) -> None:
    """Write tables and figures, claims, the one HTML page and cards from what is there."""
    from caprl_utils.reports import page

    found = settings_of(profile, overrides)
    items = page.train(found, items) if train else items
    for file in page.publish(found) if publish else page.write_all(found, items):
        print(paths.shown(file))


@app.command()
def trace(
    item: Annotated[str, Argument(help='Report, words of row and column: "table3 CapRL mini-chart".')],
    profile: ProfileOption = "mini",
    overrides: SetOption = [],
) -> None:
    """Follow a printed number back to its run."""
    from caprl_utils.reports.trace import trace

    print(trace(settings_of(profile, overrides), item))


@app.command(context_settings={"allow_extra_args": True})
def serve(
    more: typer.Context,
    model: Annotated[str, Argument(help="zoo:NAME, a folder, or a hub id.")],
    port: Annotated[int, Option(min=1, max=65535, help="Where it listens.")] = 8000,
    host: Annotated[str, Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    gpus: Annotated[int | None, Option("--tensor-parallel-size", "--gpus", help="As few as hold it.")] = None,
    copies: Annotated[int, Option("--data-parallel-size", help="Copies, each on GPUs of its own.")] = 1,
    max_model_len: Annotated[int | None, Option(help="By default the model's limit.")] = None,
    max_pixels: Annotated[int | None, Option(help="Larger images are scaled down.")] = None,
    revision: Annotated[str | None, Option(help="Commit of a model of the hub.")] = None,
    api_key_env: Annotated[str | None, Option(help="Variable with the key that clients send.")] = None,
) -> None:
    """Serve a model with vLLM until Ctrl-C, for clients that speak OpenAI's protocol.

    Options of vLLM's own follow after --, for example: caprl serve MODEL -- --enable-sleep-mode
    """
    from caprl_utils.models.server import Options, serve_until_stopped
    from caprl_utils.schema import ModelConfig

    # for clients of others; ours send no larger image
    limit = ("--mm-processor-kwargs", json.dumps({"max_pixels": max_pixels})) if max_pixels else ()
    config = ModelConfig(path=model, revision=revision, api_key_env=api_key_env)
    serve_until_stopped(config, port, Options(host, max_model_len, gpus, copies, (*limit, *more.args)))


@app.command("reward-server")
def serve_reward(
    reader: Annotated[str, Argument(help="zoo:NAME, a folder, a hub id, or a vLLM server's URL.")],
    rounds: Annotated[int, Option(metavar="N", min=1, help="Questions asked of a caption.")] = 4,
    port: Annotated[int, Option(min=1, max=65535, help="Where it listens.")] = 18889,
    host: Annotated[str, Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
) -> None:
    """Answer /get_reward with the QA reward until Ctrl-C, for OpenRLHF and the authors' scripts."""
    from caprl_utils.rl.service import QAReward, reward_server

    with reward_server(QAReward(reader, rounds=rounds), host, port) as server:
        print(f"rewards at http://{host}:{server.server_port}/get_reward", flush=True)
        server.serve_forever()


def main() -> None:
    """Entry point of the console script."""
    sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema's, below nbformat: seconds to load, and of no use here
    try:
        app(prog_name="caprl")
    except SystemExit as status:
        if status.code == INTERRUPTED:
            print("stopped; run again to continue", file=sys.stderr)
        raise
    except UserError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: package {error.name!r} is missing in {sys.executable}; run `make setup`")
    except ValueError as error:
        from pydantic import ValidationError

        if not isinstance(error, ValidationError):
            raise
        told = (f"{'.'.join(map(str, one['loc']))} {one['input']!r}: {one['msg']}" for one in error.errors())
        sys.exit(f"error: {'; '.join(told)}")
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        told = f"{error.filename}: {error.strerror}" if error.filename else str(error)  # pyarrow's names it in its text
        sys.exit(f"error: {told}; choose another place, or change what is there")


if __name__ == "__main__":
    main()
