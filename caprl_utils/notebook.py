"""What every notebook uses: its start, its tables and conclusions, and the light copies that are published."""

import base64
import copy
import html
import io
import math
import numbers
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.config import flat, load_profile
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.paths import shown
from caprl_utils.runs import commit, versions
from caprl_utils.schema import Profile

OFFLINE = {  # nothing is fetched, so nobody waits at a bar
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip
QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
_TEXTS = (str, list, tuple)  # what a cell of `table` shows as words
MOST_KB = 250  # ours: of a published copy; GitHub shows larger ones slowly or not at all


@dataclass(frozen=True)
class Context:
    """What a notebook works with."""

    profile: Profile
    seed: int

    def run_folder(self, stage: str, name: str) -> Path:
        """Where the run <stage>/<name> of this profile lies."""
        return paths.RUNS / self.profile.name / stage / name

    @property
    def reports(self) -> Path:
        """Where this profile's tables and figures go."""
        return paths.reports_of(self.profile.name)


def start(profile: str, seed: int = 0, needs: Mapping[str, str] | None = None, show: Sequence[str] = ()) -> Context:
    """Load the profile, prepare the process and say what runs. Raises UserError for bad parameters, missing inputs.

    needs: run "stage/name" -> notebook that makes it. show: sections or keys to list folded ("rl", "models.policy").
    """
    from IPython import get_ipython
    from IPython.display import HTML, display

    def message_alone(shell: Any, kind: type, error: BaseException, *_: Any, **__: Any) -> list[str]:
        message = [f"{kind.__name__}: {error}"]
        shell._showtraceback(kind, error, message)
        return message

    if shell := get_ipython():  # a kernel: no traceback through our own code
        shell.set_custom_exc((UserError,), message_alone)
    loaded = load_profile(profile)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"parameter seed: expected a whole number from 0 on, got {seed!r}")
    prepare_process(loaded)
    wanted = {paths.RUNS / loaded.name / item: maker for item, maker in (needs or {}).items()}
    missing = [run for run in wanted if not (run / "result.json").is_file()]
    if missing:
        told = "{} is missing; make it: make {} PROFILE={}"
        raise UserError("\n".join(told.format(shown(run), wanted[run], loaded.name) for run in missing))
    print(_summary(loaded, seed))
    if lines := settings(loaded, show):
        text = html.escape("\n".join(lines))
        display(HTML(f"<details><summary>settings used here ({len(lines)})</summary><pre>{text}</pre></details>"))
    return Context(loaded, seed)


def prepare_process(profile: Profile, any_model: bool = False) -> None:
    """Environment variables and thread counts for this process and those it starts. any_model: one of which the profile
    knows nothing may be opened in this very process, or vLLM run; else, off the hub, mistral_common is left out.
    """
    os.environ.update(QUIET)
    os.environ.update(OFFLINE if profile.offline else {})
    if profile.torch_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(profile.torch_threads)
        if "torch" in sys.modules:  # it has read the variable already
            sys.modules["torch"].set_num_threads(profile.torch_threads)
    if profile.offline and not any_model:
        leave_out_mistral()


def leave_out_mistral() -> None:
    """Tell transformers that there is no mistral_common, which came with vLLM: it imports it wherever that is, 4
    of 13 seconds of a first model. Where transformers is there (under DeepSpeed) it has looked already.
    """
    if "transformers" not in sys.modules:
        sys.modules.setdefault("mistral_common", None)


def _summary(profile: Profile, seed: int) -> str:
    code, found = commit(), versions()
    state = "" if code["dirty"] is None else (" with uncommitted changes" if code["dirty"] else ", clean")
    named = [f"{name} {found[name]}" for name in ("python", "torch", "transformers", "trl") if name in found]
    about = {
        "profile": f"{profile.name}: {profile.description}", "made for": profile.hardware, "seed": seed,
        "commit": f"{(code['commit'] or 'none')[:10]}{state}", "versions": " ".join(named),
    }  # fmt: skip
    return "\n".join(f"{key:<8}  {value}" for key, value in about.items())


def settings(profile: Profile, show: Sequence[str]) -> list[str]:
    """A line for each setting of some sections or keys that has a value. Raises UserError for one that is none."""
    found = {}
    for name in show:
        part = {key: value for key, value, _ in flat(profile) if f"{key}.".startswith(f"{name}.")}
        if not part:
            raise UserError(f"no setting {name!r} to show")
        found |= {key: value for key, value in part.items() if value is not None}
    width = max(map(len, found), default=0)
    return [f"{key:<{width}}  {value}" for key, value in found.items()]


def table(rows: Any, decimals: int = 1, index: bool = True) -> Any:
    """Rows (a frame, or what pandas makes one of) as HTML: whole numbers with thousands separated, others with so many
    decimals, a dash for what is missing, texts and their heads aligned left and wrapped.
    """
    import pandas as pd
    from IPython.display import HTML

    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows, dtype=object)
    frame = frame.astype(object)
    frame.index, frame.columns = (one.set_names([None] * one.nlevels) for one in (frame.index, frame.columns))

    def text(value: Any) -> str:
        if isinstance(value, _TEXTS):
            plain = html.escape(value if isinstance(value, str) else ", ".join(map(str, value)))
            return f"<div style='text-align:left;white-space:normal'>{plain}</div>"
        if value is None or pd.isna(value):
            return "–"
        if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
            return f"{value + math.copysign(1e-9, value):,.{decimals}f}"  # half up, as the reports print
        return f"{value:,}" if type(value) is not bool else ("yes" if value else "no")

    cells = frame.map(text)
    if frame.columns.nlevels == 1:  # pandas sets every head right, above texts too
        of_texts = frame.map(lambda value: isinstance(value, _TEXTS)).any()
        heads = zip(frame.columns, of_texts, strict=True)
        cells.columns = [f"<div style='text-align:left'>{head}</div>" if is_text else head for head, is_text in heads]
    return HTML(cells.to_html(escape=False, border=0, index=index))


def saw(*sentences: str) -> Any:
    """What was seen, filled from the numbers: a list in Markdown."""
    from IPython.display import Markdown

    return Markdown("\n".join(f"- {sentence}" for sentence in sentences))


def publish(profile: Profile) -> list[Path]:
    """Write light copies of the executed notebooks into reports/<profile>/notebooks, and beside each executed one its
    page in HTML, which needs no network; returns the pages. Raises UserError for a copy that is too large.
    """
    import nbformat
    from latex2mathml.converter import convert
    from nbconvert import HTMLExporter

    def as_mathml(found: re.Match) -> str:
        tex = (found[1] or found[2]).replace(r"\mathbb{1}", "𝟙")  # MathML has no such letter
        return convert(tex, display="block" if found[1] else "inline")

    scripts = ("html_head_js_requirejs", "html_head_js_mathjax", "html_head_js_mermaidjs")
    without = "".join(f"{{% block {name} %}}{{% endblock %}}" for name in scripts)
    as_page = HTMLExporter(raw_template=f"{{% extends 'lab/index.html.j2' %}}{without}")

    copies, pages = {}, []
    for file in sorted((paths.RUNS / profile.name / "notebooks").glob("[0-9]*.ipynb")):
        if found := re.fullmatch(r"(\w+?)(?:-with_ablations-True)?", file.stem):  # not those that failed
            copies.setdefault(found[1], file)
    for name, file in copies.items():
        small, target = light(nbformat.read(file, 4)), paths.REPORTS / profile.name / "notebooks" / f"{name}.ipynb"
        text = f"{nbformat.writes(small)}\n"
        if len(text) > 1000 * MOST_KB:
            told = f"{shown(target)} would have {len(text) // 1000} kB, more than {MOST_KB}"
            raise UserError(f"{told}: show fewer pictures")
        write_atomic(target, text)
        pages.append(file.with_name(f"{name}.html"))
        for cell in small.cells:
            if cell.cell_type == "markdown":
                cell.source = re.sub(r"\$\$(.+?)\$\$|\$(.+?)\$", as_mathml, cell.source, flags=re.DOTALL)
        write_atomic(pages[-1], as_page.from_notebook_node(small, {"metadata": {"name": name}})[0])
    return pages


def light(notebook: Any) -> Any:
    """An executed notebook (nbformat) without what went to stderr (of earlier runs of this machine), progress bars,
    times and run metadata; figures as PNG of few colours, pictures inside HTML as small WebP.
    """
    notebook = copy.deepcopy(notebook)
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            bars = [o for o in cell.outputs if any("widget" in kind for kind in o.get("data", ()))]
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and o not in bars]
            for data in (output.get("data", {}) for output in cell.outputs):
                data.pop("image/jpeg", None)
                if "image/png" in data:
                    data["image/png"] = _small(data["image/png"], 900, colours=64)
                before, *pictures = re.split(r"data:image/\w+;base64,([\w+/=]+)", data.get("text/html", ""))
                for encoded, after in zip(pictures[::2], pictures[1::2], strict=True):
                    before += f"data:image/webp;base64,{_small(encoded, 240)}{after}"
                data.update({"text/html": before} if pictures else {})
    return notebook


def _small(encoded: str, widest: int, colours: int = 0) -> str:
    """A picture in base64 at most so many pixels wide, as WebP or as PNG of so many colours."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    image.thumbnail((widest, image.height))
    how = {"format": "PNG", "optimize": True} if colours else {"format": "WEBP"}
    (image.quantize(colours) if colours else image).save(buffer := io.BytesIO(), **how)
    return base64.b64encode(buffer.getvalue()).decode()
