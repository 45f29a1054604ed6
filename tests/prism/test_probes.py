"""Captions of known truth for readers: what each says, and a reader that finds what is told."""

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.mini.world import statements
from caprl_utils.prism import probes
from caprl_utils.prism.loading import load_samples
from caprl_utils.prism.scores import read_samples
from caprl_utils.prism.told import counts
from tests.scripted import Says


def literal(samples):
    """Says what the caption says of the question's key, if it says one thing."""
    asked = {question: key for sample in samples for question, key in sample.meta["asked"].items()}

    def said(request):
        caption, _, question = request.prompt.partition("Caption: ")[2].partition("\nQuestion: ")
        key = asked[question.partition("\n")[0]]
        told = {value for about, value in filter(None, statements(caption)) if about == key}
        return told.pop() if len(told) == 1 else "unknown"

    return said


def test_a_reader_that_finds_what_is_told_passes_every_probe(monkeypatch):
    profile = load_profile("smoke")
    samples = load_samples(profile)
    monkeypatch.setattr(probes, "open_backend", lambda *unused: Says(literal(samples)))
    record = probes.probe(profile, "prism_reader", samples)
    assert record["stage"] == "readers" and record["captions_per_image"] == len(probes.names(profile)) == 9
    scores = {}
    for row in read_samples(paths.RUNS / "smoke" / "readers" / "prism_reader"):
        scores.setdefault(probes.names(profile)[row["caption_index"]], []).append(100 * row["score"])
    means = {name: sum(found) / len(found) for name, found in scores.items()}
    full = {name for name in means if name.startswith(("true", "complete"))}
    assert {means[name] for name in full} == {100.0} and len(full) == 6
    assert means["nothing"] < 50 and 24 < means["every option of every question"] < 30  # some have three options
    meta = {f"{s.benchmark}/{s.meta['image_id']}": s.meta for s in samples}
    for row in read_samples(paths.RUNS / "smoke" / "readers" / "prism_reader"):
        name = probes.names(profile)[row["caption_index"]]
        found = counts(row["caption"], meta[row["image_id"]])
        if name in full:
            assert found["told"] == found["facts"] and found["wrong"] == found["garbled"] == 0, name
        if name.endswith(" invented"):
            assert found["not_shown"] == int(name.split()[3]) and found["repeats"] == 0
        if name.startswith("true facts repeated"):
            assert row["num_tokens"] <= max(int(name.split()[4]), 56) and found["not_shown"] == 0  # 56: the longest
        if name == "nothing":
            assert row["caption"] == "" and row["num_tokens"] == 0
    assert probes.lengths(profile) == [51, 64]


def test_without_known_facts_there_is_nothing_to_probe():
    assert probes.probe(load_profile("smoke"), "prism_reader", []) is None
