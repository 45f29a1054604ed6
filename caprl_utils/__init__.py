"""Helper package of the CapRL reproduction: the notebooks tell the story, this does the work."""

import os

# Servers on this machine are asked directly, whatever proxy the environment names, by every client and child process.
_direct = [*os.environ.get("NO_PROXY", "").split(","), *os.environ.get("no_proxy", "").split(",")]
_direct = ",".join(dict.fromkeys([*filter(None, _direct), "localhost", "127.0.0.1", "::1"]))
os.environ |= {"NO_PROXY": _direct, "no_proxy": _direct}
