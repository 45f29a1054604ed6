"""Looks at a page as a reader would: opens it in headless Chromium and says what is cut, stretched, broken or wrong.

The page is copied with a script inside that measures it once it is loaded; no driver is needed.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WHY_SKIPPED = "no chromium on PATH"
RATIO_OFF = 0.03  # a picture's box may differ from its own ratio by so much: borders are whole pixels

_EARS = """<script>
const wrong = [];
const name = e => e.outerHTML.slice(0, 70);
addEventListener("error", e => wrong.push("error: " + (e.message || "cannot load " + name(e.target))), true);
for (const kind of ["error", "warn"]) console[kind] = (...words) => wrong.push("console: " + words.join(" "));
</script>"""
_EYES = """<script>
addEventListener("load", () => {
  const root = document.documentElement;
  if (root.scrollWidth > innerWidth) {
    wrong.push(`the page is ${root.scrollWidth} px wide in a window of ${innerWidth}`);
    for (const e of document.querySelectorAll("body *"))
      if (e.getBoundingClientRect().right > innerWidth + 1) wrong.push("beyond the edge: " + name(e));
  }
  for (const e of document.querySelectorAll(FITTING))
    if (e.scrollWidth > e.clientWidth + 1)
      wrong.push(`cut: ${e.scrollWidth} px in ${e.clientWidth}: ${name(e.firstElementChild || e)}`);
  for (const e of document.images) {
    const style = getComputedStyle(e), padding = side => parseFloat(style["padding" + side]);
    const w = e.clientWidth - padding("Left") - padding("Right");
    const h = e.clientHeight - padding("Top") - padding("Bottom");
    if (!e.naturalWidth) wrong.push("broken picture: " + name(e));
    else if (w > 0 && Math.abs(w / h / (e.naturalWidth / e.naturalHeight) - 1) > OFF)
      wrong.push(`stretched to ${w} x ${h}: ${name(e)}`);
  }
  const told = document.createElement("pre");
  told.id = "what-is-wrong";
  told.textContent = JSON.stringify(wrong);
  document.body.append(told);
});
</script>"""


def problems(page: Path, width: int, fitting: str = ".wide") -> list[str]:
    """What is wrong with an HTML page in a window of `width` pixels; empty where all is well. fitting: CSS selector of
    the boxes that must show their content without scrolling ("none": the page itself alone).
    """
    text = page.read_text(encoding="utf-8")
    eyes = _EYES.replace("FITTING", json.dumps(fitting)).replace("OFF", str(RATIO_OFF))
    text = re.sub(r"(<head[^>]*>)", lambda found: found[1] + _EARS + eyes, text, count=1)
    with tempfile.TemporaryDirectory() as folder:
        copy = page.with_name(f".looked-at-{width}-{page.name}")  # beside it: relative pictures are found
        copy.write_text(text, encoding="utf-8")
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
        options += [f"--window-size={width},1000", "--virtual-time-budget=20000", "--dump-dom"]
        try:
            done = subprocess.run([CHROMIUM, *options, copy.as_uri()], capture_output=True, text=True, timeout=120)
        finally:
            copy.unlink()
    found = re.search(r'<pre id="what-is-wrong">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(found[1])) if found else [f"the page did not load: {done.stderr[-500:]}"]
