"""A report shows the names, options and events that others chose as text, and its Content-Security-Policy lets nothing else run.

`python -m tests.reporting.test_hostile_page` prints a row for the table in docs/operations.md.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_patch.reporting.history import History, read_history
from megatron_patch.reporting.page import render, write_report
from megatron_patch.utils.console import one_line
from tests.reporting.browser import CHROMIUM, MISSING, open_page, version
from tests.reporting.test_report import write_run

RUN = "document.title='ran';document.documentElement.setAttribute('ran','1')"
ATTACKS = [
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"</SCRIPT\t><script>{RUN}</script>",
    f"<!--<script>--><img src=x onerror={RUN}>",
    f'"><svg onload="{RUN}">',
    f"'><iframe srcdoc='<script>parent.{RUN}</script>'>",
    f"</title><body onload={RUN}>",
    f"</style><link rel=stylesheet href='javascript:{RUN}'>",
    f"javascript:{RUN}",
    f"<a href='javascript:{RUN}' autofocus onfocus={RUN}>",
    "]]>{{script}}{{data}}",
    "&lt;script&gt;&#60;script&#62;",
    "\\u003cscript\\u003e\u2028\u2029",
    "${alert(1)}`",
    "red;background:url(http://evil.invalid/)",
    "__proto__",
]
MARK = "HOSTILE"
EVIL = MARK + "".join(ATTACKS)


class Elements(HTMLParser):
    """Collects the elements of a page with their attributes, and the content of its scripts and styles, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.raw: list[tuple[str, str]] = []
        self._raw = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, tuple(attrs)))
        self._raw = tag in ("script", "style")
        if self._raw:
            self.raw.append((tag, ""))

    def handle_endtag(self, tag):
        self._raw = False

    def handle_data(self, data):
        if self._raw:
            tag, before = self.raw[-1]
            self.raw[-1] = (tag, before + data)

    @property
    def policy(self) -> dict[str, list[str]]:
        (content,) = [dict(attrs)["content"] for tag, attrs in self.elements if dict(attrs).get("http-equiv") == "Content-Security-Policy"]
        return {words[0]: words[1:] for words in (part.split() for part in content.split(";"))}


def hostile_run(folder: Path, text: str) -> History:
    """Returns the history of a run in which every text is `text`: names of stages, corpora, checkpoints and devices, options, events."""
    save = write_run(folder, options={"lr": 1e-3, "data_path": ["1", "data/" + text], "wandb_project": text, text: text})
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        changed = {"stage": text, "device": text, "folder": f"/x/{text.replace('/', '_')}", "from_stage": text, "to_stage": text}
        line.update({name: value for name, value in changed.items() if name in line})
        line[text] = text
    (save / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [
        {"type": text, "step": 3, "message": text},
        {"type": "spike", "step": 4, "reason": text},
        {"type": "x", "step": 5, text: text},
    ]
    (save / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (state,) = save.glob("*/trainer_state.json")
    found = json.loads(state.read_text())
    found["plan"]["stages"] = [{"blend": [[text, 1.0], ["b", 1.0]]}, {"blend": [[text + text, 2.0]]}]
    state.write_text(json.dumps(found))
    return read_history(save, text)


def page_of(folder: Path, text: str) -> str:
    return render([hostile_run(folder / "one", text), hostile_run(folder / "two", text + "2")], text)


def test_no_text_becomes_an_element_or_an_attribute(tmp_path):
    plain, hostile = Elements(page_of(tmp_path / "plain", "x")), Elements(page_of(tmp_path / "hostile", EVIL))
    assert hostile.elements == plain.elements
    assert [tag for tag, _ in hostile.raw] == ["style", "script", "script"]
    # The style and the script are the page's own; the data is the only difference.
    assert hostile.raw[0] == plain.raw[0] and hostile.raw[2] == plain.raw[2]
    data = json.loads(hostile.raw[1][1])
    (first, _) = data["runs"]
    assert (
        first["label"] == one_line(EVIL)
        and first["device"] == EVIL
        and first["events"][0]["text"] == EVIL[:300]
        and first["stages"][0]["name"] == EVIL
    )
    assert dict(data["options"])["wandb_project"][0] == EVIL


def test_the_policy_allows_the_page_s_own_script_and_style_and_nothing_else(tmp_path):
    page = Elements(page_of(tmp_path, EVIL))
    hashes = {tag: "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'" for tag, text in page.raw}
    assert page.policy == {
        "default-src": ["'none'"],
        "script-src": [hashes["script"]],
        "style-src": [hashes["style"]],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    tags = [tag for tag, _ in page.elements]
    policy = next(index for index, (_, attrs) in enumerate(page.elements) if ("http-equiv", "Content-Security-Policy") in attrs)
    assert policy < min(tags.index("style"), tags.index("script"), tags.index("title"))
    for tag, attrs in page.elements:
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("style", "src", "href", "srcdoc", "action")], tag


def test_a_title_that_is_not_utf_8_is_written(tmp_path):
    save = write_run(tmp_path / "run")
    write_report([save], tmp_path / "r.html", ["a\udcff"])
    assert "<title>a\\udcff</title>" in (tmp_path / "r.html").read_text(encoding="utf-8")


def opened(folder: Path) -> dict[str, object]:
    """Opens hostile pages in the browser, and returns what happened.

    The first page is as it is written. Of the second, the escaping was broken on purpose, so that only the policy protects it. The third has
    neither, and shows that the attacks work.
    """
    (folder / "pages").mkdir()
    text = page_of(folder / "runs", EVIL)
    broken = text.replace("<main>", f"<main>{''.join(ATTACKS[:10])}", 1)
    without = broken.replace('http-equiv="Content-Security-Policy"', 'name="nothing"')
    found: dict[str, object] = {}
    for name, page in (("page", text), ("unescaped", broken), ("no policy", without)):
        path = folder / "pages" / f"{name}.html"
        path.write_text(page, encoding="utf-8")
        found[name] = open_page(path, folder / f"profile {name}")
    return found


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_a_browser_runs_nothing_but_the_page_s_script(tmp_path):
    found = {name: Elements(str(dom)) for name, dom in opened(tmp_path).items()}
    ran = {name: ("ran", "1") in dict(page.elements)["html"] for name, page in found.items()}
    assert ran == {"page": False, "unescaped": False, "no policy": True}
    charts = {name: [attrs for tag, attrs in page.elements if tag == "svg" and ("role", "img") in attrs] for name, page in found.items()}
    assert len(charts["page"]) == 9
    own = {"img", "iframe", "link", "a", "object", "embed", "form", "base"}
    assert not own & {tag for tag, _ in found["page"].elements}
    assert not [attrs for _, attrs in found["page"].elements if [name for name, _ in attrs if name.startswith("on")]]


def main() -> None:
    """Prints a row of the table in docs/operations.md."""
    with tempfile.TemporaryDirectory() as folder:
        found = opened(Path(folder))
    ran = {name: ("ran", "1") in dict(Elements(str(dom)).elements)["html"] for name, dom in found.items()}
    shown = re.sub(r'<script id="data".*?</script>', "", str(found["page"]), flags=re.DOTALL).count(MARK)
    words = ["yes" if ran[name] else "no" for name in ("page", "unescaped", "no policy")]
    print(f"| {datetime.date.today()} | {version()} | {len(ATTACKS)} attacks, {shown} places | {' | '.join(words)} |")


if __name__ == "__main__":
    main()
