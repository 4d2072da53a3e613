"""Text and names that are out to break something: HTML, control characters, marks that turn the writing around, half of
a surrogate pair, lines of 1 MB.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import HOOK, Cli

from tl_capacity import Measurement

pytestmark = pytest.mark.usefixtures("few_replicates")

HOSTILE = {
    "html": "<script>alert('w2')</script> & <img src=x onerror=alert(1)> \"w3\" w4",
    "control": "w2 \x01\x07\x1b[31mw3\x1b[0m \r w4 \x7f \x85 \u2028 \u2029",
    "right_to_left": "w2 \u202ew3\u202c \u200f w4 \u2066w5\u2069",
    "surrogate": "w2 \ud800 w3 \udfff",
    "long_line": ("w2" + " " * 98) * 10_000,
    "long_word": "w2 " + "w" * 1_000_000,
    "odd": "\ufeffw2 \ufffe \U0010ffff e\u0301\u0301\u0301 \u00a0 w6",
}


def hostile_source(folder: Path) -> Path:
    """Every hostile text once, between plain ones, in a file whose name is hostile itself."""
    path = folder / "<b onmouseover=alert(1)>\u202e.jsonl"
    plain = [" ".join(f"w{i % 60 + 2}" for i in range(start, start + 40)) for start in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*plain, *HOSTILE.values(), *plain]))
    return path


@pytest.fixture
def measured(setup: Path, tmp_path: Path, cli: Cli) -> Path:
    source = hostile_source(tmp_path)
    code, out, err = cli(
        "measure",
        "--model",
        setup / "model",
        "--sae",
        setup / "sae",
        "--source",
        source,
        "--tokens",
        10**7,
        "--out",
        tmp_path / "m",
    )
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    return tmp_path / "m"


def test_it_is_counted_and_stays_text(measured: Path, cli: Cli) -> None:
    measurement = Measurement.load(measured)
    assert measurement[HOOK].summary.n_documents == 80 + len(HOSTILE)
    assert measurement[HOOK].summary.n_tokens > 10_000
    assert measurement.provenance.source.endswith("<b onmouseover=alert(1)>\u202e.jsonl")
    page = measurement._repr_html_()
    assert "<b onmouseover" not in page
    assert "<script>" not in page
    assert cli("budget", measured)[0] == 0


class Seen(HTMLParser):
    """The elements of a page as a browser reads it: their names, attributes, and the text that follows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes), []))

    def handle_data(self, data: str) -> None:
        if self.elements:
            self.elements[-1][2].append(data)


@pytest.mark.slow
def test_in_a_report(tmp_path: Path, cli: Cli) -> None:
    """In snippets, by a tokenizer that gives every byte back: it is there as text, none of it is an element, and
    control characters are escaped.
    """
    texts = {
        "hostile": [HOSTILE[name] for name in ("html", "control", "right_to_left", "surrogate", "odd")],
        "plain": ["w2 w3 w4 w5 w6"],
    }
    pages = {}
    for name, written in texts.items():
        source = tmp_path / f"{'<b onmouseover=alert(1)>' if name == 'hostile' else name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in written * 8))
        measurement, out = tmp_path / name, tmp_path / f"{name}.html"
        sae = ["--sae", "blocks.3.hook_resid_post"]
        assert (
            cli("measure", "--model", "embedded", *sae, "--source", source, "--max-fvu", "inf", "--out", measurement)[0]
            == 0
        )
        code, said, _ = cli("report", measurement, "--widths", 8, "-o", out)
        assert code == 0
        assert "\x1b" not in said
        pages[name] = out.read_text(encoding="utf-8")
    hostile, plain = Seen(pages["hostile"]), Seen(pages["plain"])
    data = "".join(
        next(text for _, attributes, text in hostile.elements if attributes.get("id") == "feature-data")
    ).strip()
    assert "<" not in data
    assert data.isascii()
    assert data.isprintable()
    features = [feature for hook in json.loads(data)["hooks"] for feature in hook["features"].values()]
    shown = ["".join(text for text, _ in snippet["pieces"]) for feature in features for snippet in feature["snippets"]]
    for part in ("script> & <img", "onerror=", "\x1b", "\u202e"):
        assert any(part in text for text in shown)
    for tag in ("script", "img", "b"):
        assert [name for name, _, _ in hostile.elements].count(tag) == [name for name, _, _ in plain.elements].count(
            tag
        )
    assert not [attributes for _, attributes, _ in hostile.elements if attributes.keys() & {"onerror", "onmouseover"}]
    control = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    assert set(re.findall(control, pages["hostile"])) == set(re.findall(control, pages["plain"]))


def test_in_a_log(setup: Path, tmp_path: Path, cli: Cli) -> None:
    """Each line of the log is an object, whatever is in it."""
    name = tmp_path / "\u2028\x1b[31m\u202e<b>\ud800.txt"
    code, _, err = cli("--log", "json", "doctor", "--model", setup / "model", "--sae", setup / "sae", "--source", name)
    cli("plugins")
    assert code == 2
    lines = [json.loads(line) for line in err.splitlines()]
    assert [line["level"] for line in lines] == ["error"]
    assert err.isascii()


@pytest.mark.parametrize("name", HOSTILE)
def test_each_by_itself(name: str, setup: Path, tmp_path: Path, cli: Cli) -> None:
    """As a text file too, where it can be one; nothing else than a result or one sentence comes out."""
    source = tmp_path / "text.txt"
    source.write_bytes((HOSTILE[name] + "\n\n" + "w2 w3 w4 w5 " * 20).encode("utf-8", "surrogatepass"))
    code, _, err = cli(
        "measure",
        "--model",
        setup / "model",
        "--sae",
        setup / "sae",
        "--source",
        source,
        "--out",
        tmp_path / "m",
        "--max-fvu",
        "inf",
    )
    if name == "surrogate":
        assert code == 2
        assert "cannot be read as UTF-8 text" in err
    else:
        assert (code, err) == (0, "")
