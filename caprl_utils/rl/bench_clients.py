"""Clients that the reward over a server is compared with. All send one request per question; the first capital of the
sampled answer counts.

released   as the released reward server: every request opens an HTTP client of its own, and at most ten tokens
ten_tokens OpenAI's library with its connections kept, and ten tokens sampled (the model's own end is ignored)
ours       the client of this project, and an answer ends where the model ends it
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from caprl_utils.answers import parse_letter
from caprl_utils.errors import UserError
from caprl_utils.models.base import Sampling
from caprl_utils.models.endpoint import CHAT, EndpointBackend
from caprl_utils.rl.reader import MAX_ANSWER_TOKENS
from caprl_utils.rl.rewards import CaptionTask, QASettings, Round, draw_rounds

IN_FLIGHT = 64  # requests at once, as ours
_TIMEOUT_SEC = 300.0
Ask = Callable[[dict[str, Any]], Awaitable[str | None]]  # a chat's body -> the answer's text


def ours(tasks: Sequence[CaptionTask], backend: EndpointBackend, settings: QASettings) -> list[float]:
    """Rewards by this project's client."""
    rounds = _rounds(tasks, settings)
    completions = backend.generate([r.request for r in rounds], _sampling(settings))
    return _rewards([c.text for c in completions], rounds, settings.rounds)


def ten_tokens(tasks: Sequence[CaptionTask], backend: EndpointBackend, settings: QASettings) -> list[float]:
    """Rewards by OpenAI's library, connections kept."""
    return _asked(tasks, backend, settings, _openai)


def released(tasks: Sequence[CaptionTask], backend: EndpointBackend, settings: QASettings) -> list[float]:
    """Rewards by an HTTP client per request."""
    return _asked(tasks, backend, settings, _client_per_request)


@asynccontextmanager
async def _openai(url: str):
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=url, api_key="none", timeout=_TIMEOUT_SEC) as client:

        async def ask(body: dict[str, Any]) -> str | None:
            extra = {name: body.pop(name) for name in ("continue_final_message", "add_generation_prompt")}
            answer = await client.chat.completions.create(**body, extra_body={**extra, "ignore_eos": True})
            return answer.choices[0].message.content

        yield ask


@asynccontextmanager
async def _client_per_request(url: str):
    import httpx

    async def ask(body: dict[str, Any]) -> str | None:
        async with httpx.AsyncClient(timeout=_TIMEOUT_SEC) as client:
            answer = await client.post(f"{url}/{CHAT}", json=body)
            return answer.raise_for_status().json()["choices"][0]["message"]["content"]

    yield ask


def _asked(
    tasks: Sequence[CaptionTask], backend: EndpointBackend, settings: QASettings,
    open_client: Callable[[str], AbstractAsyncContextManager[Ask]],
) -> list[float]:  # fmt: skip
    rounds = _rounds(tasks, settings)
    sampling = _sampling(settings)
    bodies = [backend.chat_body(r.request, sampling) for r in rounds]

    async def ask_all() -> list[str | None]:
        room = asyncio.Semaphore(IN_FLIGHT)
        async with open_client(backend.config.base_urls[0].rstrip("/")) as ask:

            async def one(body: dict[str, Any]) -> str | None:
                async with room:
                    return await ask(body)

            return await asyncio.gather(*map(one, bodies))

    return _rewards(asyncio.run(ask_all()), rounds, settings.rounds)


def _rounds(tasks: Sequence[CaptionTask], settings: QASettings) -> list[Round]:
    return [r for task in tasks for r in draw_rounds(task, settings.rounds, settings.draw)]


def _sampling(settings: QASettings) -> Sampling:
    return Sampling(MAX_ANSWER_TOKENS, temperature=settings.temperature)


def _rewards(texts: Sequence[str | None], rounds: Sequence[Round], size: int) -> list[float]:
    if None in texts:
        raise UserError("the server failed on some requests; its log says why")
    right = [parse_letter(t, mode="first_capital") == r.gold for t, r in zip(texts, rounds, strict=True)]
    return [sum(right[i : i + size]) / size for i in range(0, len(right), size)]
