"""What the paper's ablations compare and state: rows, baselines, claims, and our own extra tables. Data only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from caprl_utils.reports.claims import Claim
from caprl_utils.reports.results import BASE, CAPRL, Entry
from caprl_utils.reports.summary import Brief
from caprl_utils.rl.experiments import BASE_RUN, prism_name, run_name

DOCUMENTS = ("mini-chart", "mini-infographic", "mini-document", "chartqa", "chartqapro", "charxiv", "infovqa")
NATURAL = ("mini-scene", "seed2k", "mmstar")
SHORT = "CapRL"  # the run that the others are compared with, at their size


@dataclass(frozen=True)
class Row:
    """One row: its label and the experiment it was trained by (None: the model that training starts from).

    read_by: the role of the model that answered from its captions. paper: its row in the item's CSV of reports/paper.
    """

    label: str
    experiment: str | None
    read_by: str = "prism_reader"
    paper: str | None = None

    def entry(self) -> Entry:
        """Where its Prism runs stand, one for every seed of its trainings."""
        if self.experiment is None:
            return Entry(self.label, prism_name(BASE_RUN, self.read_by))
        run = prism_name(run_name(self.experiment, "{seed}"), self.read_by)
        return Entry(self.label, run, experiment=self.experiment)


@dataclass(frozen=True)
class Item:
    """One table or figure of the paper (or of ours).

    brief: its line in the README's map. needed: labels without which there is nothing to show. paper: CSV of
    reports/paper and its label column.
    figure: "curves" (training), "dots" (accuracy per benchmark) or "growth" (accuracy over images).
    """

    name: str
    title: str
    rows: Sequence[Row]
    pairs: Sequence[tuple[str, str]]
    brief: Brief
    claims: Sequence[Claim] = ()
    needed: Sequence[str] = ()
    paper: tuple[str, str] | None = None
    figure: str | None = None
    notes: Sequence[str] = ()


BASE_ROW = Row(BASE, None, paper="Qwen2.5-VL-3B")

ITEMS = (
    Item(
        "table4", "Table 4: questions per image",
        (BASE_ROW, *(Row(f"{n} QA", f"questions_{n}", paper=f"CapRL-{n}QA-20k") for n in (1, 2, 3))),
        (("1 QA", BASE), ("2 QA", "1 QA"), ("3 QA", "1 QA"), ("3 QA", "2 QA")),
        Brief(("1 QA", "2 QA", "3 QA")),
        (
            Claim("One question per image already improves on the base model", "1 QA", BASE),
            Claim("Two questions per image are better than one", "2 QA", "1 QA"),
            Claim("A third question brings no further gain", "3 QA", "2 QA", "no gain"),
        ),
        ("1 QA", "2 QA"), ("table4_qa_per_image.csv", "caption_model"),
        notes=("The three trainings share their images, those with at least three questions.",),
    ),
    Item(
        "table5", "Table 5: answer rounds in the reward",
        (BASE_ROW, Row("N = 1", "rounds_1", paper="N=1"), Row("N = 2", "rounds_2", paper="N=2"),
         Row("N = 4", "short", paper="N=4"), Row("N = 8", "rounds_8", paper="N=8")),
        (("N = 1", BASE), ("N = 2", "N = 1"), ("N = 4", "N = 1"), ("N = 4", "N = 2"), ("N = 8", "N = 4")),
        Brief(("N = 1", "N = 2", "N = 4", "N = 8")),
        (
            Claim("Four rounds are better than one", "N = 4", "N = 1"),
            Claim("Two rounds are better than one", "N = 2", "N = 1"),
            Claim("Beyond four rounds there is no gain", "N = 8", "N = 4", "no gain"),
        ),
        ("N = 1", "N = 4"), ("table5_sampling_rounds.csv", "sampling_rounds"),
    ),
    Item(
        "table6", "Table 6: leaking against filtered questions",
        (BASE_ROW, Row("Leaking", "leaking", paper="Leaking20k"), Row("Refined", "refined", paper="Refined20k")),
        (("Leaking", BASE), ("Refined", BASE), ("Refined", "Leaking")),
        Brief(("Leaking", "Refined")),
        (
            Claim("Questions that passed the filter teach more than leaking ones", "Refined", "Leaking"),
            Claim("Even leaking questions improve on the base model", "Leaking", BASE),
        ),
        ("Leaking", "Refined"), ("table6_leakage.csv", "training_data"),
    ),
    Item(
        "figure1c", "Figure 1c: three rewards",
        (BASE_ROW, Row("UnifiedReward as judge", "judge_unified"), Row("VLM as judge", "judge_vlm"),
         Row(CAPRL, "caprl")),
        (("UnifiedReward as judge", BASE), ("VLM as judge", BASE), (CAPRL, BASE),
         (CAPRL, "UnifiedReward as judge"), (CAPRL, "VLM as judge")),
        Brief(text="CapRL-3B against", pairs={
            "UnifiedReward as judge": (CAPRL, "UnifiedReward as judge"), "VLM as judge": (CAPRL, "VLM as judge"),
        }),
        (
            Claim("With UnifiedReward as judge captions become shorter than the base model's", BASE,
                  "UnifiedReward as judge", "tokens"),
            Claim("With UnifiedReward as judge captions collapse: less than half as long as the base model's", BASE,
                  "UnifiedReward as judge", "tokens", share=0.5),
            Claim("With a VLM as judge captions grow: longer than the base model's", "VLM as judge", BASE,
                  "tokens"),
            Claim("With a VLM as judge captions grow beyond CapRL's", "VLM as judge", CAPRL, "tokens"),
            Claim("CapRL's reward rises over the training", CAPRL, kind="reward"),
        ),
        ("VLM as judge", CAPRL), None, "curves",
        notes=("The paper prints no numbers of this figure; its claims are in words. Accuracies: Table 3.",),
    ),
    Item(
        "figure5_left", "Figure 5, left: kinds of training images",
        (BASE_ROW, Row("Documents and charts", "documents", paper="CapRL-DocChart-20k"),
         Row("Natural images", "natural", paper="CapRL-Natural-20k")),
        (("Documents and charts", BASE), ("Natural images", BASE), ("Documents and charts", "Natural images")),
        Brief(text=f"against {BASE}:", pairs={
            "Documents and charts": ("Documents and charts", BASE), "Natural images": ("Natural images", BASE),
        }),
        (
            Claim("Training on documents and charts alone improves natural images too", "Documents and charts",
                  BASE, benchmarks=NATURAL),
            Claim("Training on natural images alone improves documents and charts too", "Natural images", BASE,
                  benchmarks=DOCUMENTS),
            Claim("On documents and charts, training on them is better than on natural images",
                  "Documents and charts", "Natural images", benchmarks=DOCUMENTS),
        ),
        ("Documents and charts", "Natural images"), ("figure5_left_generalization.csv", "caption_model"), "dots",
    ),
    Item(
        "figure5_right", "Figure 5, right: more training images",
        (BASE_ROW, Row("10 % of the images", "images_10"), Row("30 % of the images", "images_30"),
         Row("all images", "short")),
        (("10 % of the images", BASE), ("30 % of the images", "10 % of the images"),
         ("all images", "10 % of the images")),
        Brief(("10 % of the images", "30 % of the images", "all images")),
        (
            Claim("More training images are better: all against a tenth", "all images", "10 % of the images"),
            Claim("A tenth of the images improves on the base model", "10 % of the images", BASE),
        ),
        ("10 % of the images", "all images"), None, "growth",
        notes=("Every training has as many steps, so a smaller set is seen more often.",
               "The paper's points are not printed as numbers."),
    ),
    Item(
        "extra_dice", "Ours: sampling noise in the reward",
        (BASE_ROW, Row("sampled, with replacement (paper)", "sampled"),
         Row("expected, with replacement", "replacement"), Row("this profile's reward", "short"),
         Row("expected, each question once", "expected")),
        (("this profile's reward", "sampled, with replacement (paper)"),
         ("this profile's reward", "expected, with replacement")),
        Brief(("sampled, with replacement (paper)", "this profile's reward")),
        (
            Claim("A reward without sampled answers teaches more than the paper's, at as many questions",
                  "this profile's reward", "sampled, with replacement (paper)"),
        ),
        ("sampled, with replacement (paper)", "this profile's reward"),
    ),
    Item(
        "extra_length", "Ours: CapRL++'s length term",
        (BASE_ROW, Row(SHORT, "short"), Row("with the length term", "length_term")),
        (("with the length term", SHORT),),
        Brief((SHORT, "with the length term")),
        (
            Claim("The length term makes captions shorter", SHORT, "with the length term", "tokens"),
            Claim("It costs no accuracy", SHORT, "with the length term", "no gain"),
        ),
        (SHORT, "with the length term"),
    ),
    Item(
        "extra_readers", "Ours: train with one reader, evaluate with another",
        (Row("base, read by the evaluation's reader", None), Row("base, read by the reward's", None, "reward_reader"),
         Row("trained by the reward's reader, read by the evaluation's", "short"),
         Row("trained by the reward's reader, read by it", "short", "reward_reader"),
         Row("trained by the evaluation's reader, read by it", "other_reader"),
         Row("trained by the evaluation's reader, read by the reward's", "other_reader", "reward_reader")),
        (("trained by the reward's reader, read by the evaluation's", "base, read by the evaluation's reader"),
         ("trained by the reward's reader, read by it", "base, read by the reward's"),
         ("trained by the evaluation's reader, read by it",
          "trained by the reward's reader, read by the evaluation's"),
         ("trained by the reward's reader, read by it",
          "trained by the evaluation's reader, read by the reward's")),
        Brief(("trained by the reward's reader, read by the evaluation's",
               "trained by the evaluation's reader, read by it")),
        (
            Claim("The gain is not the training reader's alone: another reader sees it too",
                  "trained by the reward's reader, read by the evaluation's",
                  "base, read by the evaluation's reader"),
            Claim("Training with the very reader that evaluates brings more",
                  "trained by the evaluation's reader, read by it",
                  "trained by the reward's reader, read by the evaluation's"),
        ),
        ("trained by the reward's reader, read by the evaluation's",
         "trained by the evaluation's reader, read by it"),
    ),
)  # fmt: skip
BY_NAME = {item.name: item for item in ITEMS}
