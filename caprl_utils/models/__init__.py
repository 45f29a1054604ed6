"""One interface to a model (`base`): transformers in this process, or an OpenAI-compatible server."""
