"""A scripted writer and filter model that know the mini world: quick, and every number can be foretold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from caprl_utils import prompts
from caprl_utils.images import ImageItem
from caprl_utils.models import Completion, Request, Sampling
from caprl_utils.records import text_key


class FakeWriter:
    """Writes five questions about the facts that `truth` knows; `broken` ids fail."""

    name = "fake writer"
    model_hash = "writer"

    def __init__(self, items: Sequence[ImageItem], broken: Iterable[str] = ()) -> None:
        self.meta = {item.id: item.meta for item in items}
        self.broken = set(broken)
        self.asked: list[str] = []

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        for request in requests:
            self.asked.append(request.id)
            if request.id in self.broken:
                yield Completion(request.id, 0, None, 0, "error", "server is down")
            else:
                yield Completion(request.id, 0, self._write(request.id), 99, "stop")

    def _write(self, image_id: str) -> str:
        """One leaking question where there is one, then sound ones."""
        meta = self.meta[image_id]
        pairs = [*list(meta["known"].items())[:1], *meta["facts"].items()][:5]
        blocks = []
        for number, (key, value) in enumerate(pairs, start=1):
            options = [value, f"not {value}", "something else", "nothing"]
            blocks.append(
                f"**{number}. What is the {key}?**{prompts.format_options(options)}\n**Answer:** A) {value}"
            )
        return "\n".join(blocks)


class FakeReader:
    """Answers from the truth: facts with the image, known things always, the rest ` unknown`."""

    name = "fake reader"
    model_hash = "reader"

    def __init__(self, items: Sequence[ImageItem]) -> None:
        self.facts = {item.id: item.meta["facts"] for item in items}
        self.known = {key: value for item in items for key, value in item.meta["known"].items()}
        self.calls = 0

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        for request in requests:
            self.calls += 1
            yield Completion(request.id, 0, f" {self._answer(request)}", 2, "stop")

    def _answer(self, request: Request) -> str:
        image_id, view = request.id.split("#")[0], request.id.split("/")[-2]
        question, *options = request.prompt.split("Question: ")[1].split("\n")
        key = question.removeprefix("What is the ").removesuffix("?")
        value = self.known.get(key)
        if value is None and view in ("visual", "open"):
            value = self.facts[image_id].get(key)
        if value is None:
            return "unknown"
        for option in options:
            if text_key(option[2:]) == text_key(value):
                return option[0]
        return value
