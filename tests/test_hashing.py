"""Keys follow values and code, and nothing else."""

import re
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprl_utils import hashing, paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.hashing import code_hashes, derive_seed, file_hash, value_hash


@hypothesis.settings(max_examples=25)
@given(st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.lists(st.text(max_size=3)), max_size=4))
def test_the_order_of_keys_does_not_count(value):
    assert value_hash({"a": value}) == value_hash({"a": dict(reversed(value.items()))})


def test_values_count_settings_by_what_changes_outputs_and_other_objects_are_refused():
    parts = [{"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": None}, {}]
    assert len({value_hash(part) for part in parts}) == len(parts)
    assert value_hash(load_profile("smoke").rl) == value_hash(load_profile("smoke", {"rl.save_every": 7}).rl)
    with pytest.raises(TypeError, match="JSON values"):
        value_hash({"a": object()})


def test_only_the_code_of_the_named_modules_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "caprl_utils").mkdir()
    found = []
    for doc, gap, value in (("Doc.", "", 1), ("Another text.", "# why\n\n\n", 1), ("Doc.", "", 2)):
        text = f'"""{doc}"""\nfrom caprl_utils import page\n{gap}def f():\n    return {value}\n'
        (tmp_path / "caprl_utils" / "a.py").write_text(text)
        (tmp_path / "caprl_utils" / "page.py").write_text(f"x = {doc!r}\n")
        found.append(code_hashes(["caprl_utils.a"]))
    assert found[0].keys() == {"caprl_utils.a"} and found[0] == found[1] != found[2]
    with pytest.raises(UserError, match=r"no module 'caprl_utils\.z'"):
        code_hashes(["caprl_utils.z"])


OWNERS = [
    ".".join(file.relative_to(paths.ROOT).with_suffix("").parts)
    for file in sorted((paths.ROOT / "caprl_utils").rglob("*.py"))
    if re.search(r"^RECIPE = ", file.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("owner", OWNERS)
def test_no_page_client_or_progress_line_is_in_a_recipe(owner):
    recipe = import_module(owner).RECIPE
    code_hashes(recipe)  # all are there
    bystanders = "reports|gallery|story|endpoint|server|monitor|progress|config|runs|files|notebook|__main__"
    assert not [name for name in recipe if re.search(rf"\b({bystanders})\b", name)]


def test_files_count_by_their_content_and_a_seed_is_the_same_everywhere(tmp_path):
    (tmp_path / "a").write_text("1")
    before = file_hash(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert file_hash(tmp_path / "b") == before
    (tmp_path / "b").write_text("other")
    assert file_hash(tmp_path / "b") != before
    with pytest.raises(UserError, match="missing file"):
        file_hash(tmp_path / "none")
    assert derive_seed("mini", 3, "a/b") == derive_seed("mini/3", "a", "b") == 7430837832773879921
    assert derive_seed(0, "x", bits=31) == derive_seed(0, "x") >> 32 < 2**31


def test_threads_may_hash_code_at_the_same_time():
    source = (paths.ROOT / "caprl_utils" / "records.py").read_text()
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(hashing._tree_hash, [f"{source}\n# {number}" for number in range(24)]))) == 1
