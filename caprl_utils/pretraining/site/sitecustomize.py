"""Adds one chat template to LLaMA-Factory, in its own environment: ChatML turns for LLaVA models.

LLaMA-Factory 0.9.5 writes LLaVA's images only into Vicuna's turns ("USER: ... ASSISTANT:"), which no
InternLM2.5 was taught. Python imports this module by its name from a folder of PYTHONPATH, also in the
processes that torchrun starts; it waits for LLaMA-Factory's templates and adds ours behind them.
"""

import importlib.abc
import importlib.machinery
import sys

_WAITED_FOR = "llamafactory.data.template"


def _register(module) -> None:
    text = module.StringFormatter
    module.register_template(
        name="caprl_llava",
        format_user=text(slots=["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]),
        format_assistant=text(slots=["{{content}}<|im_end|>\n"]),
        format_system=text(slots=["<|im_start|>system\n{{content}}<|im_end|>\n"]),
        format_prefix=module.EmptyFormatter(slots=[{"bos_token"}]),
        stop_words=["<|im_end|>"],
        replace_eos=True,
        mm_plugin=module.get_mm_plugin(name="llava", image_token="<image>"),
    )


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != _WAITED_FOR:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        plain = spec.loader.exec_module

        def exec_module(module):
            plain(module)
            _register(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
