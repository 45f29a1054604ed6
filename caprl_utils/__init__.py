"""Helper package of the CapRL reproduction: the notebooks tell the story, this does the work."""

import os
from typing import Any

# Servers on this machine are asked directly, whatever proxy the environment names, by every client and child process.
_direct = [*os.environ.get("NO_PROXY", "").split(","), *os.environ.get("no_proxy", "").split(",")]
_direct = ",".join(dict.fromkeys([*filter(None, _direct), "localhost", "127.0.0.1", "::1"]))
os.environ |= {"NO_PROXY": _direct, "no_proxy": _direct}


def qa_reward(reader: str, **settings: Any) -> Any:
    """The QA reward for TRL and verl: see `rl.service.QAReward`, loaded here, so that the package's import is quick."""
    from caprl_utils.rl.service import QAReward

    return QAReward(reader, **settings)
