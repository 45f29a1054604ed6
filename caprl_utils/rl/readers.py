"""The text-only language model behind the QA reward, and two fast ways to ask it.

A `Reader` works over any backend. Plain requests are one prompt each. Where they can be had faster, `PackedPrompts` (a
model in this process) or `ListedPrompts` (a vLLM server) gives the same numbers: the first call compares them with
those of plain requests, and the reader stays plain where they differ.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from operator import eq
from typing import TYPE_CHECKING, Any

import numpy as np

from caprl_utils.answers import first_capital
from caprl_utils.models.base import Backend, Request, Sampling, Scores, open_backend
from caprl_utils.models.endpoint import Post, RequestError
from caprl_utils.models.local import draw, uniforms
from caprl_utils.records import Question
from caprl_utils.schema import ModelConfig, Profile

if TYPE_CHECKING:
    import torch

    from caprl_utils.models.endpoint import EndpointBackend
    from caprl_utils.models.local import LocalBackend

log = logging.getLogger(__name__)
ANSWERS = "ABCDEFGHI"
"""Author script: an answer is the first of these capitals."""
MAX_ANSWER_TOKENS = 10
"""Author script."""


def askable(rows: Sequence[Any]) -> list[Question]:
    """Questions in CapRL-QA-75K's schema. Raises KeyError, TypeError or ValueError for other rows, and for questions
    that cannot be asked as the reward does, with one option more.
    """
    questions = [Question.from_ground_truth(row) for row in rows]
    if any(len(question.options) >= len(ANSWERS) for question in questions):
        raise ValueError(f"{len(ANSWERS)} options leave no letter for the extra option")
    return questions


class Reader:
    """Answers questions about captions; what a model answers does not depend on how it was asked."""

    def __init__(self, backend: Backend, fast: PackedPrompts | ListedPrompts | None = None, words: str = "short"):
        """fast: a faster way to ask it, for text prompts with one prefill. words: see `prompts.reward_question`."""
        self.backend, self._fast, self.words = backend, fast, words
        self._same: bool | None = None  # whether the fast way gives the same numbers; None: not known yet

    def letter_logprobs(self, requests: Sequence[Request], letters: str) -> Scores:
        """Log-probability, at temperature 1, of each letter as the next token; None where the reader failed."""
        if self._use_fast(requests):
            return self._fast.letter_logprobs(requests, letters)
        return _plain_logprobs(self.backend, requests, letters)

    def answers(self, requests: Sequence[Request], temperature: float) -> list[str | None]:
        """One sampled answer per request, at most MAX_ANSWER_TOKENS long; None where the reader failed. The random
        numbers derive from `Request.id`. After the prefill the first token is the letter as a rule, so only the others
        get more than one.
        """
        texts = self._fast.first_tokens(requests, temperature) if self._use_fast(requests) else {}

        def go_on(asked: dict[int, Request], count: int) -> None:
            if asked:
                found = self.backend.generate(list(asked.values()), Sampling(count, temperature=temperature))
                for i, completion in zip(asked, found, strict=True):
                    texts[i] = None if completion.text is None else texts.get(i, "") + completion.text

        go_on({i: request for i, request in enumerate(requests) if i not in texts}, 1)
        unread = {i: r for i, r in enumerate(requests) if texts[i] and first_capital(texts[i]) is None}
        rest = {i: replace(r, id=f"{r.id}/rest", prefill=r.prefill + texts[i]) for i, r in unread.items()}
        go_on(rest, MAX_ANSWER_TOKENS - 1)
        return [texts[i] for i in range(len(requests))]

    def _use_fast(self, requests: Sequence[Request]) -> bool:
        if self._fast is None or self._same is not None:
            return bool(self._same)
        plain = _plain_logprobs(self.backend, requests[:4], "AB")
        try:
            fast = self._fast.letter_logprobs(requests[:4], "AB")
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            log.warning("%s takes no fast requests: %s; asking one by one", self.backend.name, error)
            self._same = False
            return False
        if known := [np.subtract(a, b) for a, b in zip(plain, fast, strict=True) if None not in (a, b)]:
            self._same = bool(np.abs(known).max() < self._fast.tolerance)
            if not self._same:
                log.warning("%s: fast requests differ from plain ones; asking one by one", self.backend.name)
        return bool(self._same)


def open_reader(model: ModelConfig, profile: Profile) -> Reader:
    """The fastest reader for a model: packed prompts for a text model in this process, lists for a server. Processes
    that train together start with different servers: the client prefers the first of those that wait.
    """
    urls = model.base_urls
    first = int(os.environ.get("RANK", "0")) % max(1, len(urls))
    backend = open_backend(model.model_copy(update={"base_urls": [*urls[first:], *urls[:first]]}), profile)
    if model.backend == "endpoint":
        return Reader(backend, ListedPrompts(backend), profile.prompts)
    return Reader(backend, None if backend.loaded.sees else PackedPrompts(backend), profile.prompts)


def _plain_logprobs(backend: Backend, requests: Sequence[Request], letters: str) -> Scores:
    """Each different prompt is asked once: the answer does not depend on the draw's name."""
    unique = {r.prompt: r for r in requests}
    rows = backend.choice_logprobs(list(unique.values()), [f" {letter}" for letter in letters])
    known = dict(zip(unique, rows, strict=True))
    return [known[r.prompt] for r in requests]


def _draw(logprobs: np.ndarray | Sequence[float], temperature: float, request: Request) -> int:
    """A place drawn with the request's own random number."""
    return draw(logprobs, temperature, uniforms(0, request.id, 0, 1)[0])


# A model in this process: what prompts have in common is computed once. They are written as a tree of tokens, depth
# first: a token sees its ancestors and itself, at the position it would have alone.

TOKENS_PER_PASS = {"cpu": 1024, "cuda": 8192}
"""Ours. On a CPU a rollout of the mini world takes a third less than at 8192. On a GPU not measured."""
TOKENS_PER_PACK = 160
"""Ours: attention grows with the square of a pack; longer captions get packs of twice the longest prompt."""
_OPEN = 2**63 - 1  # a token that has descendants up to the end of its pack


@dataclass
class Pack:
    """Prompts as a tree of tokens, depth first."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # of each token in its prompts
    stops: list[int] = field(default_factory=list)  # the descendants of each token lie before this place
    ends: list[int] = field(default_factory=list)  # place of each prompt's last token
    rows: list[int] = field(default_factory=list)  # which prompts of the list they are
    path: list[int] = field(default_factory=list)  # places of the last prompt's tokens


def pack(prompts: Sequence[list[int]], max_tokens: int) -> list[Pack]:
    """Trees of token lists in sorted order; none grows beyond `max_tokens` unless one prompt does. A tree that is half
    full ends before a prompt that has little in common with it: captions stay whole.
    """
    packs: list[Pack] = []
    last: list[int] = []
    for row, ids in sorted(enumerate(prompts), key=lambda pair: pair[1]):
        shared = sum(takewhile(bool, map(eq, last, ids)))
        size = len(packs[-1].ids) if packs else max_tokens
        if size + len(ids) - shared > max_tokens or (2 * shared < len(ids) and 2 * size > max_tokens):
            packs.append(Pack())
            shared = size = 0
        tree, last = packs[-1], ids
        for place in tree.path[shared:]:  # the branch that the new prompt leaves ends
            tree.stops[place] = size
        tree.path[shared:] = range(size, size + len(ids) - shared)
        tree.ids += ids[shared:]
        tree.positions += range(shared, len(ids))
        tree.stops += [_OPEN] * (len(ids) - shared)
        tree.ends.append(tree.path[-1])
        tree.rows.append(row)
    return packs


def batches(packs: Sequence[Pack], max_tokens: int) -> Iterator[list[Pack]]:
    """Packs of similar length, at most `max_tokens` tokens (padding included) a batch, or one pack."""
    left = sorted(packs, key=lambda p: -len(p.ids))
    while left:
        size = max(1, max_tokens // len(left[0].ids))
        yield left[:size]
        left = left[size:]


def tensors(packs: Sequence[Pack]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input ids (B, T), positions (B, T), what is added to the attention scores (B, 1, T, T), their ends (R, 2))."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids, positions, stops = (
        pad_sequence([torch.tensor(getattr(p, name)) for p in packs], batch_first=True, padding_value=value)
        for name, value in (("ids", 0), ("positions", 0), ("stops", _OPEN))
    )  # padding sees itself: a row without any would be NaN
    place = torch.arange(ids.shape[1])
    seen = (place[:, None] >= place) & (place[:, None] < stops[:, None, :])
    hidden = torch.where(seen, 0.0, -torch.inf)  # a mask of booleans would be turned into this anew in every layer
    ends = torch.tensor([(i, end) for i, p in enumerate(packs) for end in p.ends])
    return ids, positions, hidden[:, None], ends


class PackedPrompts:
    """Asks a local text model by packs of prompts; identical prompts are computed once."""

    def __init__(self, backend: LocalBackend):
        self._backend = backend  # whose weights may be dropped and loaded again
        # how far packed numbers may lie from plain ones, in log-probability
        self.tolerance = 1e-3 if str(backend.loaded.model.dtype) == "torch.float32" else 0.1

    def letter_logprobs(self, requests: Sequence[Request], letters: str) -> Scores:
        """See `Reader`."""
        ids = self._backend.loaded.choice_ids([f" {letter}" for letter in letters])
        return [None if row is None else row.tolist() for row in self._next_logprobs(requests, ids)]

    def first_tokens(self, requests: Sequence[Request], temperature: float) -> dict[int, str | None]:
        """Place -> text of one sampled token, None where the model failed; special tokens leave no text."""
        decode = self._backend.loaded.tokenizer.decode
        how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        rows = enumerate(zip(requests, self._next_logprobs(requests), strict=True))
        return {i: None if row is None else decode([_draw(row, temperature, r)], **how) for i, (r, row) in rows}

    def _next_logprobs(self, requests: Sequence[Request], ids: list[int] | None = None) -> list[np.ndarray | None]:
        """Log-probabilities of the tokens `ids`, by default all, after each prompt; None for what is too long."""
        model, first = self._backend.loaded, replace(requests[0], prefill="")
        before, _, after = model.prompt_text(first).partition(first.prompt)
        unique = {(r.prompt, r.prefill): r for r in requests}
        texts = [before + prompt + after + prefill for prompt, prefill in unique]
        tokens = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
        asked = zip(unique.items(), tokens, strict=True)
        good = {name: found for (name, r), found in asked if model.refusal(r, len(found) + 1) is None}
        names, rows = list(good), {}
        limit = max([TOKENS_PER_PACK, *(2 * len(found) for found in good.values())])
        for batch in batches(pack(list(good.values()), limit), TOKENS_PER_PASS[model.device]):
            order = [names[row] for p in batch for row in p.rows]
            rows.update(zip(order, self._pass(batch, ids), strict=True))
        return [rows.get((r.prompt, r.prefill)) for r in requests]

    def _pass(self, packs: Sequence[Pack], ids: list[int] | None) -> np.ndarray:
        """(R, V or len(ids)) log-probabilities after each prompt of the packs, in their order; taken on the device."""
        import torch

        device, model = self._backend.loaded.device, self._backend.loaded.model
        tokens, positions, mask, ends = (x.to(device) for x in tensors(packs))
        with torch.inference_mode():
            hidden = model.model(
                input_ids=tokens, position_ids=positions, attention_mask=mask.to(model.dtype), use_cache=False
            ).last_hidden_state
            logits = model.lm_head(hidden[ends[:, 0], ends[:, 1]])
            found = torch.log_softmax(logits.float(), dim=-1)
            return (found if ids is None else found[:, ids]).cpu().numpy()


# A vLLM server: many prompts in one HTTP request to /v1/completions, the server's chat template put around each here. A
# request per question costs more in HTTP, templates and scheduling than the one new token itself.

PROMPTS_PER_REQUEST = (8, 64)
"""Ours, fewest and most: 16 captions with four questions each. Larger lists gain little; several servers get smaller
ones, so that each has some."""
MAX_STRAY = 0.001
"""Ours: an answer is drawn from the letters here where all other tokens together have at most this probability."""


class ListedPrompts:
    """Asks a vLLM server for lists of prompts; identical ones are asked once. A list that the server refuses (one
    prompt is too long, say) is asked one by one, so that only the bad one fails.
    """

    tolerance = 0.02  # between batches of another size; 16-bit servers differ by a few thousandths

    def __init__(self, backend: EndpointBackend):
        self._backend = backend
        self._frame: tuple[str, str] | None = None  # what the template puts around a prompt

    def letter_logprobs(self, requests: Sequence[Request], letters: str) -> Scores:
        """See `Reader`. Raises ValueError when no vLLM server is there."""
        self._frame = self._frame or self._template_frame(requests[0])
        if self._frame is None:
            return [None] * len(requests)
        (before, after), unique, known = self._frame, {r.prompt: r for r in requests}, {}
        ids, prompts = self._backend.choice_ids(tuple(f" {letter}" for letter in letters)), list(unique)
        fixed = {
            "model": self._backend.served, "max_tokens": 1, "temperature": 0.0, "logprobs": 0,
            "logprob_token_ids": ids, "return_tokens_as_token_ids": True, "add_special_tokens": False,
        }  # fmt: skip
        fewest, most = PROMPTS_PER_REQUEST
        size = min(most, max(fewest, math.ceil(len(prompts) / len(self._backend.config.base_urls))))

        def read(answer: dict[str, Any]) -> dict[int, list[float]]:
            tops = {choice["index"]: choice["logprobs"]["top_logprobs"][0] for choice in answer["choices"]}
            return {i: [float(top[f"token_id:{token}"]) for token in ids] for i, top in tops.items()}

        parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        bodies = [fixed | {"prompt": [before + prompt + after for prompt in part]} for part in parts]
        posts = [Post(*pair, read, "completions") for pair in zip(parts, bodies, strict=True)]
        for part, rows in list(self._backend.client.run(posts)):
            if isinstance(rows, RequestError) and rows.kind == "refused":  # the list is at fault
                rows = dict(enumerate(_plain_logprobs(self._backend, [unique[p] for p in part], letters)))
            if not isinstance(rows, RequestError):
                known |= {prompt: rows.get(i) for i, prompt in enumerate(part)}
        return [known.get(r.prompt) for r in requests]

    def first_tokens(self, requests: Sequence[Request], temperature: float) -> dict[int, str | None]:
        """Place -> one sampled letter, None where the server failed. Only where it is a letter nearly for sure: the
        places left out are asked plainly.
        """
        rows = enumerate(zip(requests, self.letter_logprobs(requests, ANSWERS), strict=True))
        sure = [(i, r, row) for i, (r, row) in rows if row is None or surely_a_letter(row, temperature)]
        return {i: None if row is None else f" {ANSWERS[_draw(row, temperature, r)]}" for i, r, row in sure}

    def _template_frame(self, request: Request) -> tuple[str, str] | None:
        """What the server's chat template puts before and after a prompt, the prefill included; None without an answer.
        Raises ValueError when it cannot be told: no vLLM server, or a template that changes the prompt.
        """
        ask, model = self._backend.client.ask, {"model": self._backend.served}
        said = {"user": request.prompt, "assistant": request.prefill}
        messages = [{"role": role, "content": content} for role, content in said.items()]
        body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
        try:
            ids = ask("/tokenize", model | body)["tokens"]
            text = ask("/detokenize", model | {"tokens": ids})["prompt"]
            same = ask("/tokenize", model | {"prompt": text, "add_special_tokens": False})["tokens"] == ids
        except RequestError as error:
            if error.kind == "refused":
                raise ValueError(f"no vLLM server ({error})") from None
            return None
        before, found, after = text.partition(request.prompt)
        if not (same and found):
            raise ValueError("the server's chat template changes the prompt")
        return before, after


def surely_a_letter(logprobs: Sequence[float], temperature: float) -> bool:
    """Whether other tokens than the letters have at most MAX_STRAY of the letters' probability at a temperature.
    logprobs: of the letters at temperature 1, which leaves 1 - sum p to the others. Their sum of p^(1/T) is largest
    when one of them has it all. Above temperature 1 it depends on how many they are: never sure.
    """
    chances = np.exp(logprobs)
    others, letters = max(0.0, 1 - chances.sum()) ** (1 / temperature), (chances ** (1 / temperature)).sum()
    return temperature <= 1 and letters > 0 and others <= MAX_STRAY * letters
