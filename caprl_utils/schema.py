"""The typed settings of a profile, an experiment and a VLM pair. Every default stands here and nowhere else.

Each field says where its value comes from: "paper" (arXiv 2509.22647), "author script" (their training and evaluation
scripts), "author README", or "ours" with the reason. Settings marked `affects_output=False` enter no cache key.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, model_validator

from caprl_utils import paths
from caprl_utils.errors import did_you_mean
from caprl_utils.hashing import value_hash

PRISM_BENCHMARKS = [
    "chartqa", "chartqapro", "infovqa", "mmmu_pro", "mathverse", "charxiv",
    "wemath", "mathvision", "mmstar", "seed2k", "mmmu",
]  # fmt: skip
ABLATIONS = [
    "judge_vlm", "judge_unified", "short", "rounds_1", "rounds_2", "rounds_8", "questions_1", "questions_2",
    "questions_3", "leaking", "refined", "documents", "natural", "images_10", "images_30",
]  # fmt: skip
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _each_once(seeds: list[int]) -> list[int]:
    if len({*seeds}) != len(seeds):
        raise ValueError(f"{seeds} holds one seed twice")
    return seeds


Seeds = Annotated[list[NonNegativeInt], Field(min_length=1), AfterValidator(_each_once)]


def setting(default: Any, source: str, affects_output: bool = True, **limits: Any) -> Any:
    """A field with its default, the source of that default, and its limits (ge, gt, le, lt, min_length)."""
    return Field(default, description=source, json_schema_extra={"affects_output": affects_output}, **limits)


class Settings(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    def key_part(self) -> dict[str, Any]:
        """What of this section can change an output, for the key of a run (JSON values only)."""
        more = {name: field.json_schema_extra or {} for name, field in type(self).model_fields.items()}
        part = {name: getattr(self, name) for name in more if more[name].get("affects_output", True)}
        return {name: v.key_part() if isinstance(v, Settings) else v for name, v in part.items()}


class Donor(Settings):
    """A checkpoint that gives weights."""

    path: str = Field(description="hub id, folder, or zoo:NAME for a model of the small zoo", min_length=1)
    revision: str | None = setting(None, "ours: the hub's current revision unless a commit hash pins it")


class ModelConfig(Donor):
    """One model: what to load and how to reach it."""

    backend: Literal["local", "endpoint"] = setting("local", "ours: in this process, no server needed")
    base_urls: list[str] = setting([], "ours: servers to spread requests over (endpoint)", False)
    api_key_env: str | None = setting(None, "ours: environment variable that holds the API key", False)
    dtype: Dtype = setting("auto", "ours: as the checkpoint says")
    batch_size: int | None = setting(None, "ours: requests a pass (None: 32) or in flight (None: 256)", ge=1)
    max_pixels: int | None = setting(1280 * 28 * 28, "ours: as Qwen's examples; None scales no image", ge=1)

    @model_validator(mode="after")
    def _endpoint_has_a_server(self) -> "ModelConfig":
        if self.backend == "endpoint" and not self.base_urls:
            raise ValueError("backend 'endpoint' needs base_urls, for example ['http://127.0.0.1:8000/v1']")
        return self


def _role(path: str, source: str, port: int | None = None) -> Any:
    server = {"backend": "endpoint", "base_urls": [f"http://127.0.0.1:{port}/v1"]} if port else {}
    return setting(ModelConfig(path=path, **server), source)


class Models(Settings):
    """Who plays which part. A profile that names another `path` starts from ModelConfig's defaults."""

    question_writer: ModelConfig = _role("Qwen/Qwen2.5-VL-72B-Instruct", "paper, QA curation: writes", 8000)
    question_filter: ModelConfig = _role("Qwen/Qwen2.5-VL-3B-Instruct", "paper, QA curation: answers", 8001)
    policy: ModelConfig = _role("Qwen/Qwen2.5-VL-3B-Instruct", "paper: the captioner that RL starts from")
    captioner_7b: ModelConfig = _role("Qwen/Qwen2.5-VL-7B-Instruct", "paper, Table 3", 8002)
    captioner_72b: ModelConfig | None = _role("Qwen/Qwen2.5-VL-72B-Instruct", "paper, Table 3; or None", 8000)
    reward_reader: ModelConfig = _role("Qwen/Qwen2.5-3B-Instruct", "paper: answers from the caption", 8003)
    prism_reader: ModelConfig = _role("internlm/CapRL-Eval-3B", "author script: stage 2 of Prism", 8004)
    outside_reader: ModelConfig | None = setting(None, "ours: reads in `make extras` what none of ours wrote for")
    vlm_judge: ModelConfig = _role("Qwen/Qwen2.5-VL-3B-Instruct", "paper, Figure 1c: rates from 1 to 5", 8005)
    reward_judge: ModelConfig = _role("CodeGoat24/UnifiedReward-2.0-qwen-3b", "paper, Figure 1c", 8006)

    def __getitem__(self, role: str) -> ModelConfig:
        return getattr(self, role)

    def named(self) -> dict[str, ModelConfig]:
        """Role -> model; roles that the profile goes without (null) are left out."""
        return {role: model for role, model in self if model is not None}


class Images(Settings):
    """Where curation takes its images from."""

    source: str = setting("images", "ours: mini-world, folder, parquet file, data set id", min_length=1)
    num_images: int = setting(75_000, "paper: 75k images remain after the filter", ge=1)
    kinds: list[str] | None = setting(None, "paper: natural scenes, charts and documents; None takes all")


class Curation(Settings):
    """Questions: write, extract, answer, filter (paper, QA curation)."""

    max_tokens: int = setting(2048, "ours: five questions of the format take about 600 tokens", ge=1)
    rounds: int = setting(4, "paper: each question is answered 4 times, options shuffled", ge=1)
    min_visual_accuracy: float = setting(0.75, "author README: kept when strictly above", ge=0, le=1)
    max_text_accuracy: float = setting(0.25, "author README: kept when strictly below", ge=0, le=1)
    max_bad_share: float = setting(0.5, "ours: more bad rows than this stop the stage", False, ge=0, le=1)


class RL(Settings):
    """GRPO with the QA reward (paper, equations 1-3)."""

    num_images: int = setting(75_000, "paper: images of the RL set", ge=1)
    group_size: int = setting(8, "author script: captions per image (G)", ge=2)
    prompts_per_step: int = setting(128, "author script: rollout batch, images per step", ge=1)
    steps: int = setting(1800, "author script: the evaluated checkpoint, about 3 passes over 75k", ge=1)
    learning_rate: float = setting(1e-6, "author script", gt=0)
    warmup_steps: int = setting(20, "author script", ge=0)
    beta: float = setting(0.01, "ours: the paper has a KL penalty but no coefficient (script: 0)", ge=0)
    scale_rewards: Literal["group", "none"] = setting("group", "paper: group mean and std (script: none)")
    loss_type: Literal["grpo", "dapo", "bnpo", "dr_grpo"] = setting("grpo", "paper: over a caption's tokens")
    temperature: float = setting(1.0, "author script: sampling of captions", gt=0)
    max_completion_tokens: int = setting(4096, "author script", ge=1)
    rounds: int = setting(4, "paper: N questions answered per caption (Table 5)", ge=1)
    reward: Literal["qa_sampled", "qa_expected"] = setting("qa_sampled", "paper, equations 1-3")
    question_draw: Literal["replacement", "stratified"] = setting("replacement", "author script")
    reader_temperature: float = setting(0.6, "author script: the reward LLM", gt=0)
    max_failed_share: float = setting(0.1, "ours: of rewards; more stop training", False, ge=0, le=1)
    save_every: int = setting(50, "author script: steps between checkpoints", False, ge=1)
    seeds: Seeds = setting([0], "ours: one training per seed; the paper says nothing")
    preset: str | None = setting(None, "ours: experiment whose training and rl suit this hardware", False)
    report_to: Literal["wandb", "trackio"] | None = setting(None, "ours: beside TensorBoard's files, or none", False)

    @model_validator(mode="after")
    def _enough_images(self) -> "RL":
        if self.num_images < self.prompts_per_step:
            raise ValueError(f"num_images {self.num_images} is below prompts_per_step")
        return self


class Ablations(Settings):
    """The trainings beside the main one (paper, Tables 4 to 6, Figures 1c and 5)."""

    experiments: list[str] = setting(ABLATIONS, "paper: those behind its items (ours: make extras, make rewards)")
    steps: int | None = setting(None, "ours: of experiments with size `ablation`; None takes rl.steps", ge=1)
    num_images: int = setting(20_000, "paper: of the trainings of Tables 4 and 6 and Figure 5 left", ge=1)
    seeds: Seeds = setting([0], "ours: one training per seed of each of them")
    parallel_runs: int = setting(1, "ours: trainings side by side on one machine's cores", False, ge=1)


class Prism(Settings):
    """Evaluation in two stages: caption, then answer from the caption (paper, Table 3)."""

    benchmarks: list[str] = setting(PRISM_BENCHMARKS, "paper, Table 3", min_length=1)
    num_samples: int | None = setting(None, "ours: all samples of each benchmark", ge=1)
    paths: dict[str, str] = setting({}, "ours: benchmark -> local copy of its data; others come from the hub")
    captions_per_image: int = setting(4, "author script", ge=1)
    caption_temperature: float = setting(1.0, "author script", ge=0)
    caption_max_tokens: int = setting(2048, "author script", ge=1)
    token_budgets: list[Annotated[int, Field(ge=1)]] = setting([], "ours: captions are also read cut to so many tokens")
    scoring: Literal["standard", "caprl"] = setting("standard", "ours: each benchmark's metric; caprl: author script")
    judge_model: ModelConfig | None = setting(None, "ours: None counts what needs a judge as unscored")
    evaluation_files: str | None = setting(None, "author README: CapRL-Evaluation-Files (seed2k, caprl)")
    bootstrap_draws: int = setting(10_000, "ours: paired bootstrap over images, 95 % interval", ge=100)


_APPENDIX = "paper, appendix F"
PretrainingItem = Literal["table1", "table2", "figure4"]


class PretrainingStage(Settings):
    """What the three stages of pretraining a VLM share."""

    num_epochs: float = setting(1.0, "author script", gt=0)
    micro_batch_size: int = setting(4, "ours: rows per GPU and forward pass", False, ge=1)


class Align(PretrainingStage):
    """Initial alignment on short captions: the new projector learns what the language model reads."""

    data: str = setting("data/pretraining/blip-558k.json", "ours: a LLaVA file, or mini-world")
    num_rows: int = setting(558_000, f"{_APPENDIX}: BLIP-558K", ge=1)
    learning_rate: float = setting(1e-3, _APPENDIX, gt=0)
    batch_size: int = setting(256, _APPENDIX, ge=1)
    micro_batch_size: int = setting(2, "ours: activations of frozen layers are kept, too", False, ge=1)


class Further(PretrainingStage):
    """Further pretraining on a caption set, what the paper compares. Vanilla goes without it."""

    data: str = setting("data/pretraining/{name}.json", "ours: LLaVA file of a set (sets.py), or mini-world")
    num_rows: int = setting(1_000_000, "paper: pairs of a set", ge=1)
    num_rows_large: int = setting(5_000_000, "paper: CapRL-5M", ge=1)
    growth: list[float] = setting([0.2, 0.4, 0.6, 0.8], "paper, Figure 4; none and all are rows of Table 1")
    learning_rate: float = setting(4e-5, _APPENDIX, gt=0)
    batch_size: int = setting(256, _APPENDIX, ge=1)


class Sft(PretrainingStage):
    """Supervised fine-tuning on questions and answers, the same for every row of the tables."""

    data: str = setting("data/pretraining/open-llava-next-1m.json", "ours: a LLaVA file, or mini-world")
    num_rows: int = setting(1_000_000, f"{_APPENDIX}: Open-LLaVA-NeXT-1M", ge=1)
    learning_rate: float = setting(2e-5, _APPENDIX, gt=0)
    batch_size: int = setting(128, _APPENDIX, ge=1)


class Pretraining(Settings):
    """VLMs pretrained on caption sets by LLaMA-Factory (paper, Tables 1 and 2, Figure 4, appendix F)."""

    settings: list[str] = setting(["qwen2.5-3b", "qwen2.5-7b", "internlm2.5-7b-clip"], "paper: Table 1", min_length=1)
    items: list[PretrainingItem] = setting(["table1", "table2", "figure4"], "paper: all three", min_length=1)
    align: Align = setting(Align(), "see each key")
    align_of: dict[str, dict[Literal["learning_rate", "num_epochs"], PositiveFloat]] = setting(
        {}, "ours: setting -> what its alignment does differently; the paper's three are trained alike"
    )
    seeds: Seeds = setting([0], "ours: of every row's trainings: of the order of data and the projector's start")
    further: Further = setting(Further(), "see each key")
    sft: Sft = setting(Sft(), "see each key")
    media_folder: str = setting("data/pretraining/images", "ours: image paths in data files start here")
    cutoff_tokens: int = setting(6144, "author script", ge=16)
    max_pixels: int = setting(1024 * 28 * 28, "author script", ge=1)
    precision: Literal["bf16", "float32"] = setting("bf16", "author script")
    deepspeed: Literal["zero2", "zero3"] | None = setting("zero3", "author script; None: one process", False)
    nodes: int = setting(2, "ours: as the author script's RL", False, ge=1)
    gpus_per_node: int = setting(8, "ours: as nodes; 0 trains on the CPU", False, ge=0)
    parallel_runs: int = setting(1, "ours: trainings side by side on one machine", False, ge=1)
    save_every: int = setting(200, "ours: steps between checkpoints", False, ge=1)
    max_bad_share: float = setting(0.01, "ours: rows that may be set aside before a run stops", ge=0, lt=1)

    @model_validator(mode="after")
    def _sound(self) -> "Pretraining":
        known = {*self.settings, *(file.stem for file in (paths.CONFIGS / "vlm_init").glob("*.yaml"))}
        if unknown := [name for name in self.align_of if name not in known]:
            raise ValueError(f"align_of names no setting: {unknown[0]!r}{did_you_mean(unknown[0], known)}")
        if self.nodes > 1 and self.parallel_runs > 1:
            raise ValueError(f"parallel_runs {self.parallel_runs} needs nodes 1: a training has all nodes")
        return self


class Profile(Settings):
    """All settings of one size of the work."""

    name: str = Field(description="the profile's name; the file name of its YAML", min_length=1)
    description: str = setting("", "ours: one line for the reader", False)
    hardware: str = setting("", "ours: what it is made for", False)
    seed: int = setting(0, "ours: every other seed is derived from it", ge=0)
    offline: bool = setting(False, "ours: True keeps the hub out", False)
    torch_threads: int | None = setting(None, "ours: torch's own choice", False, ge=1)
    prompts: Literal["short", "authors"] = setting("authors", "ours: readers' words; short: what the zoo's learned")
    models: Models = setting(Models(), "see each role")
    images: Images = setting(Images(), "see each key")
    curation: Curation = setting(Curation(), "see each key")
    rl: RL = setting(RL(), "see each key")
    ablations: Ablations = setting(Ablations(), "see each key")
    prism: Prism = setting(Prism(), "see each key")
    pretraining: Pretraining = setting(Pretraining(), "see each key")

    def content_hash(self) -> str:
        """Hash of all that can change an output, whatever the profile is called."""
        return value_hash({name: value for name, value in self.key_part().items() if name != "name"})


# Experiments: one YAML of configs/experiments per training run, over the settings of a profile.
class Data(Settings):
    """Which images and questions the run trains on."""

    file: str = setting("curation/main/qa.parquet", "ours: under the run folder, as CapRL-QA-75K")
    num_images: Annotated[int, Field(ge=1)] | Literal["ablation"] | None = setting(
        None, "ours: None takes rl.num_images of the profile, `ablation` its ablations.num_images"
    )
    image_share: float = setting(1.0, "ours: of those images, so many (Figure 5 right)", gt=0, le=1)
    ids: list[str] = setting([], "ours: shell patterns of image ids (Figure 5 left); empty takes all")
    questions_per_image: int | None = setting(None, "ours: None keeps all questions (Table 4: 1, 2, 3)", ge=1)
    min_questions: int = setting(1, "ours: images with fewer are left out (Table 4)", ge=1)


class Reward(Settings):
    """What a caption is rewarded for. Kind and rounds of the QA reward stand in the profile's section rl."""

    terms: dict[str, float] = setting({"qa": 1.0}, "paper: QA alone; weights of rl/rewards.py:TERMS", min_length=1)
    reader: Literal["reward_reader", "prism_reader"] = setting("reward_reader", "paper: its own; ours: their swap")
    apart: bool = setting(False, "paper: one reward; BalCapRL: each term normalised within its image's captions")


class Lora(Settings):
    """Low-rank adapters instead of all weights."""

    rank: int = setting(64, "ours", ge=1)
    alpha: int = setting(128, "ours: twice the rank", ge=1)


class Training(Settings):
    """What trains, and how the work is laid out on the machine."""

    vision_tower: bool = setting(True, "ours: the paper does not say; the released script freezes nothing")
    projector: bool = setting(True, "as vision_tower")
    language_model: bool = setting(True, "as vision_tower")
    lora: Lora | None = setting(None, "paper: full fine-tuning")
    micro_batch_size: int | None = setting(None, "ours: captions a pass; None: all, 4 on a GPU", False, ge=1)
    lr_schedule: Literal["constant_with_warmup", "cosine_with_min_lr"] = setting(
        "constant_with_warmup", "ours: the paper says nothing"
    )
    rollout: Literal["transformers", "vllm_colocate"] = setting("transformers", "ours: vLLM for long captions on GPUs")
    rollout_rows: int | None = setting(None, "ours: captions at once; None: all, 128 on a GPU", False, ge=1)
    vllm_memory_share: float = setting(0.3, "TRL's default: of a GPU, for colocated vLLM", False, gt=0, lt=1)
    vllm_sleep: bool = setting(False, "ours: colocated vLLM gives its memory back while weights train", False)
    vllm_tensor_parallel: int = setting(1, "ours: GPUs that share one colocated vLLM", False, ge=1)
    accelerate_config: str | None = setting(None, "ours: of configs/accelerate; None: one per GPU", False)


class Experiment(Settings):
    """One training run."""

    name: str = Field(description="the file's name", min_length=1)
    description: str = setting("", "ours: one line for the reader", False)
    item: str = setting("", "what of the paper it belongs to", False)
    size: Literal["main", "ablation"] = setting("main", "ours: `ablation` takes ablations.steps")
    start: Literal["policy", "captioner_7b", "captioner_72b"] = setting("policy", "ours: the role that is trained")
    rl: dict[str, Any] = setting({}, "values over the profile's section rl")
    data: Data = setting(Data(), "see each key")
    reward: Reward = setting(Reward(), "see each key")
    training: Training = setting(Training(), "see each key")


# VLM pairs: one YAML of configs/vlm_init each.
class Assembly(Settings):
    """One setting of Table 1: a language model, a vision tower, a fresh projector."""

    name: str = Field(description="the setting's name; the file name of its YAML", min_length=1)
    description: str = setting("", "ours: one line for the reader", False)
    architecture: Literal["qwen2_5_vl", "llava"] = Field(description="the class of the assembled model")
    language: Donor = Field(description="gives language model, head and tokenizer")
    vision: Donor = Field(description="gives vision tower and image processor, and for Qwen2.5-VL the frame")
    dtype: Dtype = setting("auto", "ours: as the language model's checkpoint")
    max_pixels: int | None = setting(None, "ours: the vision donor's own limit (Qwen2.5-VL)", ge=1)
    rename_tokens: dict[str, str] = setting({}, "ours: names for reserved tokens, to add none (llava)")
    end_tokens: list[str] = setting(["<|im_end|>", "<|endoftext|>"], "ours: of chat models, of base models")

    @model_validator(mode="after")
    def _keys_fit_the_architecture(self) -> "Assembly":
        for name, architecture in (("max_pixels", "qwen2_5_vl"), ("rename_tokens", "llava")):
            if getattr(self, name) and architecture != self.architecture:
                raise ValueError(f"{name} belongs to architecture {architecture}")
        return self
