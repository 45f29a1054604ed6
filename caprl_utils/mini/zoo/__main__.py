"""The command `make zoo`."""

from typing import Annotated

import torch
import typer

from caprl_utils.mini.zoo.recipes import RECIPES
from caprl_utils.mini.zoo.train import ship, train


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Models; all when none is named.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train and keep the models of the zoo from nothing, in order; stopped, run it again."""
    torch.set_num_threads(threads)
    if unknown := set(names or ()) - set(RECIPES):
        raise typer.BadParameter(f"no model {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    for recipe in (RECIPES[name] for name in names or RECIPES):
        done = recipe.work_folder / "model.pt"
        if not done.exists():
            torch.save(train(recipe).state_dict(), done)
        ship(recipe)


if __name__ == "__main__":
    typer.run(main)
