"""Adds to LLaMA-Factory, in its own environment, one chat template and our way to open a picture.

LLaMA-Factory 0.9.5 writes LLaVA's images only into Vicuna's turns ("USER: ... ASSISTANT:"), which no InternLM2.5 was
taught. It shows transparent places black, cuts 16-bit greys off at white, and leaves a photo on its side; captions are
made of what a viewer shows. Packages that CAPRL_LEAVE_OUT names are not imported. Python imports this module by its
name from a folder of PYTHONPATH, also in the processes that torchrun starts; it waits for LLaMA-Factory's modules and
changes them when they are there.
"""

import importlib.abc
import importlib.machinery
import os
import sys


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


def _open_as_captioned(module) -> None:
    from caprl_utils.images import as_rgb

    plugin = module.MMPluginMixin
    plain = plugin._preprocess_image
    plugin._preprocess_image = lambda self, image, **options: plain(self, as_rgb(image), **options)


_CHANGES = {"llamafactory.data.template": _register, "llamafactory.data.mm_plugin": _open_as_captioned}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in _CHANGES:
            return None
        change = _CHANGES.pop(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        plain = spec.loader.exec_module

        def exec_module(module):
            plain(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
for _name in os.environ.get("CAPRL_LEAVE_OUT", "").split():  # looked for and not found
    sys.modules[_name] = None
