"""A model as the judge of metrics that need one, and its replies kept row by row.

Whichever model judges moves the score by points, so it is named in the record and is part of the run's key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from caprl_utils import prompts
from caprl_utils.errors import UserError
from caprl_utils.hashing import text_hash
from caprl_utils.models import Backend, Request, Sampling, open_backend
from caprl_utils.paths import shown
from caprl_utils.prism.scoring import Judge
from caprl_utils.runs import RowStore, Run
from caprl_utils.schema import Profile

MAX_TOKENS = 512  # ours: a reply is one line, with some room for words before it


class ModelJudge:
    """A `Judge` that asks a model, greedily."""

    def __init__(self, backend: Backend):
        self.backend, self.name, self.model_hash = backend, backend.name, backend.model_hash

    def __call__(self, texts: Sequence[str]) -> list[str | None]:
        """A reply to each prompt; None where the model failed."""
        requests = [Request(str(number), text) for number, text in enumerate(texts)]
        return [completion.text for completion in self.backend.generate(requests, Sampling(MAX_TOKENS))]


def judge_of(profile: Profile) -> ModelJudge | None:
    """The profile's judge (prism.judge_model), or None."""
    model = profile.prism.judge_model
    return ModelJudge(open_backend(model, profile)) if model else None


def fingerprint(judge: Judge | None) -> dict[str, Any] | None:
    """What of the judge changes a score, for the run's key."""
    if judge is None:
        return None
    return {"model": getattr(judge, "model_hash", judge.name), "prompts": prompts.judge_prompt_hash()}


def stored(judge: Judge | None, run: Run) -> Judge | None:
    """The judge, its replies kept in verdicts.jsonl of the run."""
    return StoredJudge(judge, run.rows("verdicts")) if judge else None


class StoredJudge:
    """A judge whose replies are kept in a row store, so that a stopped evaluation asks only for the rest."""

    def __init__(self, judge: Judge, store: RowStore):
        self.judge, self.name, self.store = judge, judge.name, store
        self._replies = {row["id"]: row["reply"] for row in store.read()}

    def __call__(self, texts: Sequence[str]) -> list[str | None]:
        """A reply to each prompt. Raises UserError when the judge failed; what it replied stays on disk."""
        asked = {key: text for text in texts if (key := text_hash(text)) not in self._replies}
        replies = self.judge(list(asked.values())) if asked else []
        if len(replies) != len(asked):
            raise UserError(f"judge {self.name!r} returned {len(replies)} replies for {len(asked)} prompts")
        for key, reply in zip(asked, replies, strict=True):
            if reply is not None:
                self.store.append({"id": key, "reply": reply})
                self._replies[key] = reply
        if failed := sum(reply is None for reply in replies):
            raise UserError(
                f"the judge {self.name} failed on {failed} of {len(asked)} prompts. Its replies so far are kept in "
                f"{shown(self.store.path)}; mend the cause and run again, only the missing ones are asked."
            )
        return [self._replies[text_hash(text)] for text in texts]
