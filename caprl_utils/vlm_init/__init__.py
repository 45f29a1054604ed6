"""Language model + vision tower + fresh projector = a vision-language model (paper, appendix F).

python -m caprl_utils.vlm_init mini-qwen-3b --out runs/mini/vlm_init/mini-qwen-3b
"""

from caprl_utils.vlm_init.assembly import assemble, plan_of
from caprl_utils.vlm_init.settings import Assembly, load_setting, setting_names
from caprl_utils.vlm_init.summary import Summary

__all__ = ["Assembly", "Summary", "assemble", "load_setting", "plan_of", "setting_names"]
