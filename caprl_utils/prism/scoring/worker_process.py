"""One worker process: a JSON pair (answer, gold) a line in, its verdict a line out, until the input ends."""

from __future__ import annotations

import json
import sys

from caprl_utils.prism.scoring.caprl import reference_verdict


def main() -> None:
    """Answer pairs from standard input. Runs in the main thread, which math-verify's time limits need."""
    for line in sys.stdin:
        verdict = reference_verdict(*json.loads(line))
        print(json.dumps([verdict.symbolic, verdict.answer_text, verdict.gold_parsed]), flush=True)


if __name__ == "__main__":
    main()
