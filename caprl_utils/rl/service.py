"""The QA reward for other people's trainers: an element of TRL's reward_funcs, verl's compute_score, and /get_reward.

A caption whose reward cannot be had is None, never 0 (the released server scores a whole chunk 0 when anything fails).
A reader that is gone raises UserError. Rewards lie between 0 and 1 (CapRL's first server: twice that).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

from caprl_utils import prompts
from caprl_utils.errors import UserError
from caprl_utils.hashing import text_hash
from caprl_utils.models.endpoint import EndpointBackend
from caprl_utils.paths import ZOO_PREFIX
from caprl_utils.records import Question
from caprl_utils.rl.readers import askable, open_reader
from caprl_utils.rl.rewards import CaptionTask, RewardBatch, qa_rewards
from caprl_utils.schema import RL, ModelConfig, Profile

log = logging.getLogger(__name__)


class QAReward:
    """What a reader can answer from a caption (paper, equations 1-3; see `qa_rewards`). Threads may share it, as verl's
    and the server's do: calls that come while the reader works are its next batch.
    """

    def __init__(self, reader: str, seed: int = 0, **rl: Any):
        """reader: zoo:NAME, a folder, a hub id, or the URL of a vLLM server. rl: of the settings' section rl (rounds,
        reward, question_draw, reader_temperature). Draws derive from seed, step, caption and questions: asked again, a
        caption gets the same reward. Raises UserError.
        """
        self.__name__ = "qa_reward"  # after which TRL names its metrics
        model = ModelConfig(path=reader)
        if reader.startswith(("http://", "https://")):
            served = ModelConfig(path=reader, backend="endpoint", base_urls=[reader])
            model = served.model_copy(update={"path": next(iter(EndpointBackend(served).models_at(reader)))})
        words = "short" if model.path.startswith(ZOO_PREFIX) else "authors"
        profile = Profile(name=self.__name__, prompts=words, rl=RL(**rl))
        self.reader, self._rl, self._seed = open_reader(model, profile), profile.rl, seed
        self._lock, self._waiting = Lock(), deque()

    def __call__(
        self, prompts: Any, completions: Sequence[Any], reward_model: Sequence[Any], trainer_state: Any = None,
        log_metric: Any = None, **columns: Any,
    ) -> list[float | None]:  # fmt: skip
        """As TRL 1.16 calls it, which leaves None out of a group's mean and spread. completions: plain or
        conversational. reward_model: the data set's column, as in CapRL-QA-75K and as `caprl curate` writes it.
        """
        captions = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        batch = self.rewards(captions, reward_model, getattr(trainer_state, "global_step", 0))
        if captions and batch.metrics and batch.rewards.count(None) == len(captions):
            raise UserError(f"the reader answered about none of {len(captions)} captions: is its server up?")
        for name, value in batch.metrics.items() if log_metric else ():
            if not math.isnan(value):
                log_metric(name, value)
        return batch.rewards

    def compute_score(self, data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None) -> float:
        """As verl calls its custom_reward_function. Raises UserError for a missing reward: verl knows no None."""
        (reward,) = self.rewards([solution_str], [ground_truth]).rewards
        if reward is None:
            raise UserError(f"no reward for the caption {solution_str[:80]!r}: is it too long for the reader?")
        return reward

    def rewards(self, captions: Sequence[str], asked: Sequence[Any], step: int = 0) -> RewardBatch:
        """Of captions, each with its image's questions in a layout that `questions_of` reads. Raises UserError."""
        tasks: dict[int, CaptionTask] = {}
        for i, (caption, cell) in enumerate(zip(captions, asked, strict=True)):
            try:
                questions = questions_of(cell)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                log.warning("no reward for %.80r: its questions cannot be read (%s)", caption, error)
                continue
            name = text_hash("/".join([caption, *(q.model_dump_json() for q in questions)]))
            tasks[i] = CaptionTask(caption, questions, (self._seed, step, name))
        if not tasks:
            return RewardBatch([None] * len(captions))
        mine: Future = Future()
        self._waiting.append((tasks.values(), mine))
        with self._lock:
            if not mine.done():  # one batch of all calls that wait
                calls = [self._waiting.popleft() for _ in range(len(self._waiting))]
                batch = {task.key: task for some, _ in calls for task in some}
                try:
                    done = qa_rewards([*batch.values()], self.reader, self._rl)
                    tell, found = Future.set_result, (dict(zip(batch, done.rewards, strict=True)), done.metrics)
                except BaseException as error:  # each call that waits gets it
                    tell, found = Future.set_exception, error
                for _, future in calls:
                    tell(future, found)
        known, metrics = mine.result()
        return RewardBatch([known[tasks[i].key] if i in tasks else None for i in range(len(captions))], metrics)


def questions_of(cell: Any) -> list[Question]:
    """Questions of an image: CapRL-QA-75K's {"ground_truth": [{question, choices, answer}]} or that list, also as JSON
    text, or the released server's [[question with its options, letter]]. Raises KeyError, TypeError or ValueError.
    """
    cell, found = json.loads(cell) if isinstance(cell, str) else cell, []
    for row in cell["ground_truth"] if isinstance(cell, Mapping) else cell:
        if not isinstance(row, Mapping):
            question, *choices = re.split(r"\n\s*-\s*(?=[A-J]\))", row[0])
            choices = [choice for choice in choices if prompts.CANNOT_ANSWER not in choice]
            row = {"question": question.strip(), "choices": choices, "answer": row[1].strip()}
        found.append(row)
    if not found:
        raise ValueError("there are none")
    return askable(found)


def read_request(body: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """Captions and questions of a request. CapRL's scripts (OpenRLHF and verl) put both into `prompts`, [[caption,
    questions], ...]. OpenRLHF's own remote reward has `query`, prompt and response as decoded, and the data set's
    `labels`. Raises KeyError, TypeError or ValueError.
    """
    if not all(isinstance(prompt, str) for prompt in body["prompts"]):
        return [caption for caption, _ in body["prompts"]], [asked for _, asked in body["prompts"]]
    captions = []
    for query, prompt, _ in zip(body["query"], body["prompts"], body["labels"], strict=True):
        turns = max(1, prompt.count(turn := "<|im_start|>assistant\n"))  # a query may begin with padding
        after = query[len(prompt) :] if query.startswith(prompt) else query.split(turn, turns)[turns]
        captions.append(re.split(r"<\|im_end\|>|<\|endoftext\|>", after)[0].strip())
    return captions, body["labels"]


def reward_server(reward: QAReward, host: str, port: int) -> ThreadingHTTPServer:
    """Ready to `serve_forever`: answers as the released server does, but 503 (and null) where a reward is missing, so
    that the scripts' clients ask again or stop. Raises UserError for an address that cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                found = reward.rewards(*read_request(request)).rewards
                body = {"rewards": found, "scores": found, "extra_logs": {}}
            except Exception as error:  # whatever it was, there are no rewards
                found, body = [None], {"error": f"{type(error).__name__}: {error}"}
                log.error("a request got no rewards: %(error)s", body)
            self.send_response(503 if None in found else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

    class Server(ThreadingHTTPServer):
        request_queue_size = 1024  # 5 by default: the rest of a rollout's requests would be reset

    try:
        return Server((host, port), Handler)
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port} ({error.strerror}); choose another --port") from None
