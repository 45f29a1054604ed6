"""What the paper's Table 3 states, as tests on its rows. Data only."""

from caprl_utils.reports.ablation_items import DOCUMENTS, NATURAL
from caprl_utils.reports.claims import Claim
from caprl_utils.reports.results import BASE, CAPRL

UNIFIED, VLM = "UnifiedRW-as-Judge-3B", "Qwen2.5VL-as-Judge-3B"
_BY_SIZE = (
    "the zoo's captioners are all of one size, and its '7B' and '3B' are its '72B' trained on to leave facts out and "
    "to err"
)

CLAIMS = (
    Claim("CapRL's captions serve a reader better than those of the model it was trained from", CAPRL, BASE),
    Claim("The trained 3B captioner is better than the untrained 7B", CAPRL, "7B"),
    Claim("The trained 3B captioner is as good as the untrained 72B", CAPRL, "72B", "as good"),
    Claim("On documents and charts CapRL is better than the model it was trained from", CAPRL, BASE,
          benchmarks=DOCUMENTS),
    Claim("On natural images CapRL is better than the model it was trained from", CAPRL, BASE,
          benchmarks=NATURAL),
    Claim("CapRL gains more on documents and charts than on natural images", CAPRL, BASE, "larger gain",
          DOCUMENTS, NATURAL),
    Claim("CapRL's reward is better than UnifiedReward as judge", CAPRL, UNIFIED),
    Claim("CapRL's reward is better than a VLM as judge", CAPRL, VLM),
    Claim("UnifiedReward as judge makes captions worse than the base model's", BASE, UNIFIED),
    Claim("A VLM as judge improves on the base model", VLM, BASE),
    Claim("A VLM as judge is better than UnifiedReward as judge", VLM, UNIFIED),
    Claim("Untrained captioners are better the larger they are: 7B against 3B", "7B", BASE,
          built_in=_BY_SIZE),
    Claim("Untrained captioners are better the larger they are: 72B against 7B", "72B", "7B",
          built_in=_BY_SIZE),
)  # fmt: skip
