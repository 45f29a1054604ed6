"""The reward for the trainers of others: TRL itself, verl's call, and clients as the released scripts write them."""

import inspect
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from caprl_utils import paths, prompts, qa_reward
from caprl_utils.errors import UserError
from caprl_utils.rl import service
from caprl_utils.rl.service import questions_of, reward_server
from tests.rl.conftest import ChanceReader, write_questions

ROWS = [
    {"question": "What is the value of Rome?", "choices": ["A) 17", "B) 42", "C) 5"], "answer": "B"},
    {"question": "What is the topic?", "choices": ["A) sales", "B) rain", "C) cats"], "answer": "A"},
]
RELEASED = [
    ["What is the value of Rome?\n   - A) 17\n   - B) 42\n   - C) 5\n   - E) Can not answer based on the caption", "B"],
    ["What is the topic?\n   - A) sales  \n   - B) rain\n   - C) cats", " A "],
]
RIGHT, WRONG = "The topic is sales; Rome has 42.", "Nothing."


def reads_well(request, options):
    """A reader that answers what the caption says, and fails where the caption is "too long"."""
    if "too long" in request.prompt:
        return None
    caption = request.prompt.split("Question:")[0]
    return {letter: float(text in caption or text == prompts.CANNOT_ANSWER) for letter, text in options.items()}


@pytest.fixture
def reward(monkeypatch):
    reader = ChanceReader(reads_well)
    monkeypatch.setattr(service, "open_reader", lambda model, profile: reader)
    return qa_reward("zoo:reader-reward", rounds=4, question_draw="stratified", reward="qa_expected")


def near(*values: float | None) -> list:
    """Rewards; of RIGHT 0.5: the extra option has the same chance as what the caption says."""
    return [value if value is None else pytest.approx(value, abs=1e-9) for value in values]


def test_import_is_quick():
    code = (
        "import caprl_utils, sys; assert not {'numpy', 'torch', 'pydantic'} & set(sys.modules); caprl_utils.qa_reward"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=paths.ROOT)


def test_trl_calls_it_with_plain_and_conversational_completions(reward):
    column, seen = [{"ground_truth": ROWS}] * 4, {}
    captions = [RIGHT, WRONG, "too long", RIGHT]
    plain = reward(["x"] * 4, captions, completion_ids=[[1]] * 4, reward_model=column, image=[0] * 4)
    assert plain == near(0.5, 0.0, None, 0.5)
    turns = [[{"role": "assistant", "content": caption}] for caption in captions]
    assert reward(["x"] * 4, turns, reward_model=column, log_metric=seen.__setitem__) == plain
    assert seen["cannot_answer"] > 0 and reward.__name__ == "qa_reward"


def test_questions_are_read_in_every_layout_and_a_row_without_any_has_no_reward(reward, caplog):
    for cell in (ROWS, {"ground_truth": ROWS}, json.dumps(ROWS), RELEASED, [tuple(row) for row in RELEASED]):
        assert [q.ground_truth() for q in questions_of(cell)] == ROWS
    cells = [{"ground_truth": ROWS}, {"ground_truth": []}, {"ground_truth": [ROWS[0] | {"answer": "Z"}]}, None]
    assert reward(["x"] * 4, [WRONG] * 4, reward_model=cells) == near(0.0, None, None, None)
    assert len(caplog.messages) == 3 and "'Z'" in caplog.text
    ten = {"question": "?", "choices": [f"{letter}) {letter}" for letter in "ABCDEFGHIJ"], "answer": "J"}
    for odd in ([17, 42], [[]], ["x"], [["q"]], [["q", 1]], [["q", None]], [ROWS[0] | {"choices": [17, 42]}], [ten]):
        assert reward(["x"] * 2, [RIGHT] * 2, reward_model=[{"ground_truth": ROWS}, odd]) == near(0.5, None), odd
    with pytest.raises(UserError, match="about none of 2 captions: is its server up"):  # TRL would train on nothing
        reward(["x"] * 2, ["too long"] * 2, reward_model=[{"ground_truth": ROWS}] * 2)


def test_asked_again_a_caption_gets_the_same_reward(monkeypatch):
    reader = ChanceReader(lambda request, options: dict.fromkeys(options, 1.0))
    monkeypatch.setattr(service, "open_reader", lambda model, profile: reader)
    reward = qa_reward("a/model", rounds=3)
    captions = [f"caption {i}" for i in range(40)]
    alone = [reward.rewards([caption], [ROWS]).rewards[0] for caption in captions]
    assert reward.rewards(captions, [ROWS] * 40).rewards == alone and len(set(alone)) > 1
    assert reward.rewards(captions, [ROWS] * 40, step=1).rewards != alone


def test_verl_calls_it(reward):
    assert [*inspect.signature(reward.compute_score).parameters] == [
        "data_source", "solution_str", "ground_truth", "extra_info",
    ]  # fmt: skip
    row = {"data_source": "image_caption_rl", "ground_truth": ROWS, "extra_info": None}
    assert reward.compute_score(solution_str=RIGHT, **row) == pytest.approx(0.5)
    with pytest.raises(UserError, match="no reward for the caption 'too long'"):
        reward.compute_score(solution_str="too long", **row)


def test_calls_of_several_threads_become_batches_and_share_a_failure(reward, monkeypatch):
    sizes, score, first, go_on = [], service.qa_rewards, threading.Event(), threading.Event()

    def slow(tasks, *rest):
        sizes.append(len(tasks))
        first.set()
        assert go_on.wait(20)
        if any(task.caption == "broken" for task in tasks):
            raise UserError("the reader is gone")
        return score(tasks, *rest)

    monkeypatch.setattr(service, "qa_rewards", slow)
    with ThreadPoolExecutor(20) as pool:
        one = pool.submit(reward.compute_score, "", RIGHT, ROWS)
        assert first.wait(20)
        captions = [RIGHT, *(RIGHT + "!" * i for i in range(1, 9)), RIGHT]
        more = [pool.submit(reward.compute_score, "", caption, ROWS) for caption in captions]
        while len(reward._waiting) < len(more):
            time.sleep(0.01)
        go_on.set()
        assert [f.result() for f in (one, *more)] == near(*[0.5] * 11)
        assert sizes == [1, 9]  # the same caption is asked once
        for future in [pool.submit(reward.compute_score, "", "broken", ROWS) for _ in range(3)]:
            with pytest.raises(UserError, match="gone"):
                future.result()


@pytest.fixture
def post(reward):
    """Post as the released scripts do; gives status and parsed body."""
    server = reward_server(reward, "127.0.0.1", 0)
    with pytest.raises(UserError, match="choose another --port"):
        reward_server(reward, "127.0.0.1", server.server_port)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def call(body) -> tuple[int, dict]:
        with httpx.Client(trust_env=False, timeout=20) as client:
            answer = client.post(f"http://127.0.0.1:{server.server_port}/get_reward", json=body)
        return answer.status_code, answer.json()

    yield call
    server.shutdown()
    server.server_close()


def test_clients_of_the_released_scripts_and_of_openrlhf(post):
    """CapRL's OpenRLHF and verl: prompts hold caption and questions; query and labels are empty. OpenRLHF's own remote
    reward: query is prompt and response as decoded; a label is what the data set has, as text.
    """
    prompt = "<|im_start|>user\nPlease describe this image in detail.<|im_end|>\n<|im_start|>assistant\n"
    padded = "<|endoftext|>" + prompt.replace("Please", "<|image_pad|><|image_pad|>Please")
    queries = [f"{prompt}{RIGHT}<|im_end|>\n<|endoftext|>", f"{padded}{WRONG}<|im_end|>"]
    shots = f"{prompt}{WRONG}<|im_end|>\n{prompt}"  # an earlier turn, behind padding too
    status, body = post({"query": [f"<|endoftext|>{shots}{RIGHT}"], "prompts": [shots], "labels": [json.dumps(ROWS)]})
    assert (status, body["rewards"]) == (200, near(0.5))
    for sent in ({"prompts": [[RIGHT, RELEASED], [WRONG, RELEASED]], "query": [], "labels": []},
                 {"query": queries, "prompts": [prompt] * 2, "labels": [json.dumps(ROWS)] * 2}):  # fmt: skip
        status, body = post(sent)
        assert status == 200 and body["rewards"] == body["scores"] == near(0.5, 0.0) and body["extra_logs"] == {}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"prompts": [[RIGHT, RELEASED], ["too long", RELEASED]]}, near(0.5, None)),
        ({"prompts": [[RIGHT, RELEASED], [RIGHT, []]]}, near(0.5, None)),
        ({"query": ["a"], "prompts": ["b"], "labels": [ROWS]}, None),
        ({"query": ["a"], "prompts": ["a"], "labels": []}, None),
        ([], None),
    ],
)
def test_what_fails_is_503_and_never_0(post, body, told):
    status, answer = post(body)
    assert status == 503 and answer.get("rewards") == told and (told or answer["error"])


@pytest.mark.integration
def test_plain_trl_trains_the_zoos_base(tmp_path):
    """TRL's own trainer, as its documents write it, with our reward: two steps."""
    from datasets import Dataset, Image
    from trl import GRPOConfig, GRPOTrainer

    write_questions(tmp_path / "qa.parquet", 4)
    rows = Dataset.from_parquet(str(tmp_path / "qa.parquet")).cast_column("image", Image())
    ask = [{"role": "user", "content": "Please describe this image in detail."}]
    args = GRPOConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, num_generations=4, per_device_train_batch_size=4,
        max_completion_length=40, learning_rate=1e-4, use_cpu=True, report_to="none", logging_steps=1,
        save_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        str(paths.zoo_folder("zoo:base")), [qa_reward("zoo:reader-reward", rounds=2)], args,
        train_dataset=rows.map(lambda row: {"prompt": ask}),
    )  # fmt: skip
    trainer.train()
    steps = [row for row in trainer.state.log_history if "reward" in row]
    assert len(steps) == 2 and all(0 <= row["rewards/qa_reward/mean"] <= 1 for row in steps)
