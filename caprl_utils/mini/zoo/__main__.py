"""The command `make zoo`."""

from __future__ import annotations

import argparse

import torch

from caprl_utils.mini.zoo.train import RECIPES, ship, train, work_folder


def main() -> None:
    """Train and ship the zoo, or the models named."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", help=f"models to train (default: all): {', '.join(RECIPES)}")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(RECIPES):
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    torch.set_num_threads(arguments.threads)
    for name in arguments.names or RECIPES:
        recipe, done = RECIPES[name], work_folder(name) / "model.pt"
        if not done.exists():
            model = train(recipe)
            torch.save(model.state_dict(), done)
        ship(recipe)


if __name__ == "__main__":
    main()
