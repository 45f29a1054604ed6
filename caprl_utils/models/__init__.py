"""One interface to a model: transformers in this process, or an OpenAI-compatible server.

backend = open_backend(profile.models.policy, profile)
completions = backend.generate([Request("1", prompts.CAPTION, image)], Sampling(max_tokens=128))
"""

from __future__ import annotations

from caprl_utils.models.base import Backend, Completion, Request, Sampling
from caprl_utils.schema import ModelConfig, Profile

__all__ = ["Backend", "Completion", "Request", "Sampling", "open_backend"]


def open_backend(model: ModelConfig, profile: Profile) -> Backend:
    """The backend that the profile asks for. Weights are loaded at the first request, not here.

    Raises UserError when a local model's folder is missing or holds no model.
    """
    if model.backend == "endpoint":
        from caprl_utils.models.endpoint import EndpointBackend

        return EndpointBackend(model)
    from caprl_utils.models.local import LocalBackend

    return LocalBackend(model, torch_threads=profile.torch_threads)
