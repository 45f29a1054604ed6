"""transformers in this process: no server, one model, batches sorted by image and length.

Sampling is per row (`RowSampler`), so neither batch size nor neighbours change a completion. The model's own
generation defaults stay out, but for its end-of-turn tokens.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.hashing import derive_seed
from caprl_utils.images import fit
from caprl_utils.models.base import GENERAL_TOKENIZERS, Backend, Completion, Request, Sampling, Scores, check_folder
from caprl_utils.schema import ModelConfig

if TYPE_CHECKING:
    import torch

BATCH = 32  # requests a forward pass, where the model's config says nothing
STREAM_BATCHES = 8
# Families whose tower gives one tensor an image; Qwen3-VL's feeds further layers of the language model.
SHARED_FAMILIES = ("qwen2_vl", "qwen2_5_vl")
_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorPil")  # of all Qwen-VL families
Job = tuple[int, int]  # (row of the requests, index of the completion)


class LocalBackend(Backend):
    """A model of transformers, text-only or with images; the weights are loaded when first used."""

    def __init__(self, config: ModelConfig, torch_threads: int | None = None) -> None:
        """Raises UserError when `config.path` names a folder that is no model."""
        self.name, self.config = config.path, config
        self.batch_size = config.batch_size or BATCH
        self._path = paths.resolve_model(config.path)
        self._torch_threads = torch_threads
        check_folder(self._path, config.path)
        _backends.add(self)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The weights in memory, also for callers that compute with them directly (a packed reader)."""
        return LoadedModel(self._path, self.config, self._torch_threads)

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """See `Backend.stream`. A list is sorted as a whole; of others a few batches are gathered at a time. Last come
        the requests that the model cannot take, with the reasons.
        """
        size = len(requests) if isinstance(requests, Sequence) else STREAM_BATCHES * self.batch_size
        waiting = iter(requests)
        while some := list(islice(waiting, size)):
            refused: dict[int, str] = {}
            for batch, inputs in self._batches(some, sampling.n, sampling.max_tokens, refused):
                yield from self.loaded.complete([(some[row], index) for row, index in batch], inputs, sampling)
            for row, why in sorted(refused.items()):
                yield from (Completion(some[row].id, i, None, 0, "error", why) for i in range(sampling.n))

    def choice_logprobs(self, requests: Sequence[Request], choices: Sequence[str]) -> Scores:
        """See `Backend.choice_logprobs`. Raises UserError for a choice that is not one token."""
        ids = self.loaded.choice_ids(choices)
        scores: Scores = [None] * len(requests)
        for batch, inputs in self._batches(requests, 1, 0, {}):
            for (row, _), values in zip(batch, self.loaded.next_logprobs(inputs, ids), strict=True):
                scores[row] = values
        return scores

    def _batches(
        self, requests: Sequence[Request], copies: int, room: int, refused: dict[int, str]
    ) -> Iterator[tuple[list[Job], Mapping[str, torch.Tensor]]]:
        """What the model can take, each request `copies` times, in batches with its inputs. The requests of one image
        stay together, and so do those without. room: tokens for a completion. refused: gets the reasons for others.
        """
        loaded, images, good = self.loaded, {}, []
        texts = [loaded.prompt_text(request) for request in requests]
        ids = loaded.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        for row, request in enumerate(requests):
            image, length = images.setdefault(id(request.image), len(images)), len(ids[row])  # an image is one token
            if why := loaded.refusal(request, length + room):
                refused[row] = why
            else:
                good += [(image, -length, row, index) for index in range(copies)]
        jobs = [job[2:] for job in sorted(good)]
        for start in range(0, len(jobs), self.batch_size):
            batch = jobs[start : start + self.batch_size]
            try:
                yield batch, loaded.encode([requests[row] for row, _ in batch])
            except ProcessorError:
                for row in {row for row, _ in batch}:
                    try:
                        loaded.encode([requests[row]])
                    except ProcessorError as error:
                        refused[row] = str(error)
                if batch := [job for job in batch if job[0] not in refused]:
                    yield batch, loaded.encode([requests[row] for row, _ in batch])


_backends: weakref.WeakSet[LocalBackend] = weakref.WeakSet()


def close_all() -> None:
    """Give the memory of all weights back, as before a training on the GPU; the next request loads them again."""
    import torch

    for backend in _backends:
        vars(backend).pop("loaded", None)
    gc.collect()  # models lie in cycles (`share_images`)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # torch keeps what was freed


class ProcessorError(Exception):
    """Why a request cannot be prepared: what a processor or a decoder says of its image."""


class LoadedModel:
    """Weights and processor in memory (of a text model the tokenizer is its processor), and the forward passes."""

    def __init__(self, path: str, config: ModelConfig, torch_threads: int | None) -> None:
        import torch
        import transformers as hf

        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        self.max_pixels, options = config.max_pixels, {"revision": config.revision}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # 16-bit arithmetic is emulated on most CPUs
        dtype = "float32" if (self.device, config.dtype) == ("cpu", "auto") else config.dtype
        try:
            self.sees = hasattr(hf.AutoConfig.from_pretrained(path, **options), "vision_config")
            self.processor = (hf.AutoProcessor.from_pretrained if self.sees else load_tokenizer)(path, **options)
            kind = hf.AutoModelForImageTextToText if self.sees else hf.AutoModelForCausalLM
            model = kind.from_pretrained(path, dtype=dtype, **options)
        except Exception as error:  # many kinds: JSON, safetensors, missing files, shapes
            where, why = path, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            remedy = "Check the name and the connection; profiles with `offline: true` use local folders only."
            if Path(path).is_dir():
                where, remedy = paths.shown(path), "Delete the folder and make it again, or copy it again."
            if config.path.startswith(paths.ZOO_PREFIX):
                remedy = "Restore the file from git (`git checkout caprl_utils/mini/weights`), or train it: `make zoo`."
            raise UserError(f"the model {where} cannot be loaded ({why}). {remedy}") from error
        if not self.processor.chat_template:
            raise UserError(f"the model {path} has no chat template; name one that was taught to answer (Instruct)")
        share_images(model)
        self.tokenizer, self.model = getattr(self.processor, "tokenizer", self.processor), model.to(self.device).eval()
        if self.tokenizer.pad_token is None:  # Llama's
            self.tokenizer.pad_token = self.tokenizer.eos_token
        own = model.generation_config.eos_token_id
        ends = own if own is not None else self.tokenizer.eos_token_id
        self.end_ids = set(ends if isinstance(ends, list) else [ends])
        # generate() fills unset fields from the model's own defaults, so these must hold nothing else.
        ends, pad = sorted(self.end_ids), self.tokenizer.pad_token_id
        self.model.generation_config = hf.GenerationConfig(eos_token_id=ends, pad_token_id=pad)
        self._special = [token for token in self.tokenizer.all_special_tokens if token]

    def prompt_text(self, request: Request) -> str:
        """The request in the model's chat template, with the start of the assistant's turn."""
        parts = [] if request.image is None else [{"type": "image"}]
        content = [*parts, {"type": "text", "text": request.prompt}] if self.sees else request.prompt
        turns, how = [{"role": "user", "content": content}], {"tokenize": False, "add_generation_prompt": True}
        return self.processor.apply_chat_template(turns, **how) + request.prefill

    def refusal(self, request: Request, tokens: int) -> str | None:
        """Why the model cannot take a request of so many tokens, completion included; None when it can."""
        if request.image is not None and not self.sees:
            return "this model takes no images"
        said = request.prompt + request.prefill
        if special := next((token for token in self._special if token in said), None):
            return f"the prompt holds the special token {special}"
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and tokens > most:
            return f"prompt and completion take {tokens} tokens, the model {most}"
        return None

    def encode(self, requests: Sequence[Request]) -> Mapping[str, torch.Tensor]:
        """Left-padded model inputs, (B, T) and the pixels of all images. Raises ProcessorError."""
        texts = [self.prompt_text(request) for request in requests]
        shown = [request.image for request in requests if request.image is not None]
        try:
            fitted = {id(image): fit(image, self.max_pixels) for image in shown}
            options = {"images": [fitted[id(image)] for image in shown]} if shown else {}
            options |= {"padding": True, "padding_side": "left", "return_tensors": "pt"}
            with process_once(self.processor):
                inputs = self.processor(text=texts, add_special_tokens=False, **options)
        except Exception as error:  # of many kinds: strips, files that were cut off
            told = str(error) or type(error).__name__
            raise ProcessorError(f"the image cannot be prepared for the model ({told})") from error
        return inputs.to(self.device)

    def complete(
        self, rows: Sequence[tuple[Request, int]], inputs: Mapping[str, torch.Tensor], sampling: Sampling
    ) -> list[Completion]:
        """One completion per (request, index). inputs: of their requests, see `encode`."""
        import torch
        from transformers import LogitsProcessorList

        drawn = [(sampling.seed if r.seed is None else r.seed, r.id, index) for r, index in rows]
        decoding = LogitsProcessorList([RowSampler(sampling, drawn, inputs["attention_mask"])])
        options = {"max_new_tokens": sampling.max_tokens, "do_sample": False, "logits_processor": decoding}
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, **options)
        found = []
        for (request, index), ids in zip(rows, tokens[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            kept = list(takewhile(lambda token: token not in self.end_ids, ids))
            text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            ended = len(kept) < len(ids)  # the end of the turn was generated, and servers count it
            found.append(Completion(request.id, index, text, len(kept) + ended, "stop" if ended else "length"))
        return found

    def choice_ids(self, choices: Sequence[str]) -> list[int]:
        """Token id of each choice. Raises UserError for one that is not one token."""
        ids = [self.tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
        for choice, tokens in zip(choices, ids, strict=True):
            if len(tokens) != 1 or tokens[0] == self.tokenizer.unk_token_id:
                raise UserError(f"{choice!r} is no single token of this model ({len(tokens)} tokens)")
        return [tokens[0] for tokens in ids]

    def next_logprobs(self, inputs: Mapping[str, torch.Tensor], ids: Sequence[int]) -> list[list[float]]:
        """Log-probabilities of the tokens `ids` right after each prompt (see `encode`): one forward pass."""
        import torch

        places = {}
        if not self.sees:  # VLMs derive positions from the mask; text models would count the padding
            places = {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
        with torch.inference_mode():
            logits = self.model(**inputs, **places, use_cache=False, logits_to_keep=1).logits[:, -1]
            return torch.log_softmax(logits.float(), dim=-1)[:, list(ids)].tolist()


def load_tokenizer(path: str, **options: Any) -> Any:
    """The tokenizer as its folder says: one that names the general class gets that one."""
    import transformers as hf
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    named = get_tokenizer_config(path, **options).get("tokenizer_class")
    kind = hf.PreTrainedTokenizerFast if named in GENERAL_TOKENIZERS else hf.AutoTokenizer
    return kind.from_pretrained(path, **options)


# Sampling that does not depend on what else is in the batch: each row has random numbers of its own


def uniforms(seed: int, request_id: str, index: int, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1) for one completion, the same on every machine."""
    bits = derive_seed(seed, index, request_id, bits=128)
    return np.random.Generator(np.random.PCG64(bits)).random(count)


def draw(logprobs: np.ndarray | Sequence[float], temperature: float, at: float) -> int:
    """A place in (V,) log-probabilities, by inverting the distribution at a random number in [0, 1)."""
    values = np.asarray(logprobs)
    weights = np.exp((values - values.max()) / temperature).cumsum(dtype=np.float64)
    return min(int(np.searchsorted(weights, at * weights[-1], side="right")), len(weights) - 1)


class RowSampler:
    """Repetition penalty (of prompt and completion, as in vLLM), temperature and top-p per row; leaves only the drawn
    token for the greedy decoder. rows: (seed, request id, index) of each; prompt_mask: of the prompts, (B, T).
    """

    def __init__(self, sampling: Sampling, rows: Sequence[tuple[int, str, int]], prompt_mask: torch.Tensor):
        import torch

        self.sampling = sampling
        self.prompt_mask = prompt_mask.bool()
        self.seen: torch.Tensor | None = None  # (B, V)
        draws = [uniforms(seed, name, index, sampling.max_tokens) for seed, name, index in rows]
        self.draws = torch.tensor(np.stack(draws), device=prompt_mask.device)  # (B, max_tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        step, penalty = input_ids.shape[1] - self.prompt_mask.shape[1], self.sampling.repetition_penalty
        if penalty != 1.0 and step == 0:
            counts = torch.zeros(scores.shape, dtype=torch.long, device=scores.device)
            self.seen = counts.scatter_add_(1, input_ids, self.prompt_mask.long()) > 0
        elif penalty != 1.0:
            self.seen.scatter_(1, input_ids[:, -1:], True)
        if penalty != 1.0:
            scores = torch.where(self.seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
        if self.sampling.temperature == 0:
            return scores
        probs = torch.softmax(scores.double() / self.sampling.temperature, dim=-1)  # from here on as `draw`
        if self.sampling.top_p < 1:
            probs, order = probs.sort(dim=-1, descending=True)
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= self.sampling.top_p, 0.0)
        total = probs.cumsum(-1)
        chosen = torch.searchsorted(total, self.draws[:, step : step + 1] * total[:, -1:], right=True)
        chosen = chosen.clamp(max=scores.shape[1] - 1)
        if self.sampling.top_p < 1:
            chosen = order.gather(1, chosen)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


# Each image of a batch is seen once, however many requests show it (in GRPO `group_size`): the numbers are those of
# separate passes, gradients add up, and on a CPU the vision tower would take a third of a training step.


def distinct(images: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    """Of each image its place among the distinct ones; the indices of these."""
    import torch

    sums = torch.stack([image.sum() for image in images]).tolist()
    rows, first = [], []
    for i, image in enumerate(images):
        same = (p for p, j in enumerate(first) if sums[j] == sums[i] and torch.equal(images[j], image))
        rows.append(next(same, len(first)))
        first += [i] * (rows[-1] == len(first))
    return rows, first


def share_images(model: Any) -> None:
    """Make a model of SHARED_FAMILIES encode each distinct image of a batch once; others stay as they are."""
    if model.config.model_type not in SHARED_FAMILIES:
        return
    inner = model.model.get_image_features

    def features(pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **options: Any) -> Any:
        import torch

        images = torch.split(pixel_values, image_grid_thw.prod(-1).tolist())
        rows, first = distinct(images)
        if len(first) == len(rows):
            return inner(pixel_values, image_grid_thw, **options)
        seen = inner(torch.cat([images[i] for i in first]), image_grid_thw[first], **options)
        seen.pooler_output = [seen.pooler_output[place] for place in rows]
        return seen

    model.model.get_image_features = features


@contextmanager
def process_once(processor: Any) -> Iterator[None]:
    """Within the block, Qwen's image processors prepare each distinct image of a call once; others are as ever."""
    tool = getattr(processor, "image_processor", None)
    if type(tool).__name__ not in _PROCESSORS:
        yield
        return
    inner = tool.preprocess

    def preprocess(images: Any, *args: Any, **options: Any) -> Any:
        import torch
        from transformers.image_utils import make_flat_list_of_images

        flat = make_flat_list_of_images(images)
        keys = [(image.mode, image.size, image.tobytes()) for image in flat]
        distinct = dict(zip(keys, flat, strict=True))
        place = {key: number for number, key in enumerate(distinct)}
        rows = [place[key] for key in keys]
        batch = inner(list(distinct.values()), *args, **options)
        grid = torch.as_tensor(batch["image_grid_thw"])
        patches = torch.split(torch.as_tensor(batch["pixel_values"]), grid.prod(-1).tolist())
        batch["pixel_values"] = torch.cat([patches[row] for row in rows])
        batch["image_grid_thw"] = grid[rows]
        return batch

    tool.preprocess = preprocess
    try:
        yield
    finally:
        del tool.preprocess  # an attribute of its own would be written into checkpoints
