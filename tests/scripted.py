"""A model whose words are a function of what it is asked; a tokenizer whose tokens are words."""

from caprl_utils.models.base import Completion


class Says:
    """Answers a request with `words(request)`; its letter is that one, or that of the option with this text."""

    name = model_hash = "scripted"

    def __init__(self, words):
        self.words = words

    def generate(self, requests, sampling, progress=None):
        return [Completion(r.id, 0, f" {self.words(r)}", 2, "stop") for r in requests]

    def choice_logprobs(self, requests, choices, progress=None):
        rows = []
        for request in requests:
            options = [line[3:] for line in request.prompt.splitlines() if line[1:3] == ") "]
            letters, said = [choice.strip() for choice in choices], self.words(request)
            right = letters.index(said) if said in letters else options.index(said) if said in options else None
            rows.append([-0.1 if place == right else -5.0 for place in range(len(choices))])
        return rows


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": text.split()}

    def decode(self, ids, **options):
        return " ".join(ids)
