"""The command `make zoo`: trains and keeps the small models, or with `--measure` says what the kept ones can do."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from caprl_utils.errors import UserError
from caprl_utils.mini.zoo.measure import print_figures
from caprl_utils.mini.zoo.recipes import RECIPES
from caprl_utils.mini.zoo.train import ship, train


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Models; all when none is named.")] = None,
    measure: Annotated[
        bool, typer.Option(help="Measure the kept models on pictures never trained on.")
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train the zoo from nothing, in order; stopped, run it again."""
    torch.set_num_threads(threads)
    if unknown := set(names or ()) - set(RECIPES):
        raise UserError(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    for recipe in (RECIPES[name] for name in names or RECIPES):
        if measure:
            print_figures(recipe)
            continue
        done = recipe.work_folder / "model.pt"
        if not done.exists():
            torch.save(train(recipe).state_dict(), done)
        ship(recipe)


if __name__ == "__main__":
    typer.run(main)
