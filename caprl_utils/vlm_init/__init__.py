"""Language model + vision tower + fresh projector = a vision-language model (paper, appendix F).

python -m caprl_utils.vlm_init mini-qwen-3b --out runs/mini/vlm_init/mini-qwen-3b
"""

from caprl_utils.config import assembly_names, load_assembly
from caprl_utils.schema import Assembly
from caprl_utils.vlm_init.assembly import assemble, plan_of
from caprl_utils.vlm_init.summary import Summary

__all__ = ["Assembly", "Summary", "assemble", "assembly_names", "load_assembly", "plan_of"]
