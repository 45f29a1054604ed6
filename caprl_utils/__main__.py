"""The one command of the package: `caprl`, in a checkout `.venv/bin/python -m caprl_utils`.

Each sub-command reads its profile, calls one function of its room and prints what came out. What a user can mend
is told in one line on stderr with exit status 1; wrong usage is 2, Ctrl-C 130.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from caprl_utils.errors import UserError

if TYPE_CHECKING:
    from caprl_utils.schema import Profile

app = typer.Typer(
    help="CapRL: caption images, train captioners by what a reader can answer from their captions, measure both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Options that several commands share. Rooms are imported inside the commands: `--help` must not load torch.
ProfileOption = Annotated[str, typer.Option(help="smoke, mini, one_gpu, paper, or a YAML file.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. rl.steps=10.")
]


def settings_of(profile: str, overrides: list[str]) -> Profile:
    """The profile with the values of `--set`, which also reach notebooks and the processes that a command starts."""
    from caprl_utils.config import SET_ENV, load_profile

    if overrides:
        os.environ[SET_ENV] = "\n".join(overrides)
    return load_profile(profile)


@app.command()
def config(
    profile: Annotated[str, typer.Argument()] = "mini",
    experiment: Annotated[str | None, typer.Option(help="A training of configs/experiments.")] = None,
    overrides: SetOption = [],
) -> None:
    """Show all settings of a profile, or of a training over it, each with its source."""
    from caprl_utils.config import explain, load_experiment

    found = settings_of(profile, overrides)
    if experiment is None:
        print(f"# {found.name}: {found.description}\n{explain(found)}")
        return
    training, resolved = load_experiment(experiment, profile)
    print(f"# {training.name}: {training.description}\n{explain(training)}\n{explain(resolved.rl, 'rl.')}")


@app.command()
def run(
    notebooks: Annotated[
        list[str], typer.Argument(help="Names in notebooks/; NAME:PARAMETER=VALUE sets one.")
    ],
    profile: ProfileOption = "mini",
    parameter: Annotated[
        list[str], typer.Option("-p", metavar="NAME=VALUE", help="A parameter of each notebook.")
    ] = [],
    overrides: SetOption = [],
) -> None:
    """Run notebooks in order, each only when it is out of date."""
    from caprl_utils.runner.cli import run_all

    settings_of(profile, overrides)
    run_all(notebooks, profile, parameter)


def main() -> None:
    """Entry point of the console script."""
    try:
        app(prog_name="caprl")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
