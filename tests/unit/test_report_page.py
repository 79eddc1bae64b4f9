"""The report's page is well-formed and self-contained, equals its Markdown, and passes nothing hostile on."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from gainlora.errors import GainLoRAError
from gainlora.report.one_run import matrix_table
from gainlora.report.page import markdown_table
from gainlora.report.report import write_report
from gainlora.runs.records import read_run
from gainlora.sections import ReportConfig
from tests.fake_run import FORGETS, THREE, R, run_of, write_run

REPORT = ReportConfig(decimals=1, dpi=40)


class Page(HTMLParser):
    """Everything that a browser would load, the text it would show, and whether tags match."""

    VOID = ("meta", "img", "br")

    def __init__(self, path):
        super().__init__()
        self.loads = []
        self.tags = []
        self.open = []
        self.ids = []
        self.text, self.source = "", path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open += [tag] if tag not in self.VOID else []
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_well_formed_needs_no_network_and_equals_the_markdown(tmp_path):
    records = [run_of(tmp_path, R), run_of(tmp_path, FORGETS, "seqlora")]
    files = write_report([*records, records[0]], tmp_path / "report", REPORT)  # given twice, it counts once
    page, text = Page(files[0]), files[1].read_text(encoding="utf-8")
    assert [file.name for file in files[:2]] == ["index.html", "report.md"] and all(file.is_file() for file in files)
    assert not {"script", "link", "iframe", "object"} & {*page.tags}
    assert not re.search(r"https?://|@import|url\(", page.source)
    targets = [target[1:] for target in page.loads if target.startswith("#")]
    assert {*targets} <= {*page.ids} and len(page.ids) == len({*page.ids})
    assert {"Methods", "Costs", "Runs"} <= {*re.findall(r'<li><a href="#[^"]+">([^<]+)</a>', page.source)}
    pictures = [target for target in page.loads if not target.startswith("#")]
    for picture in pictures:
        kind, _, content = picture.partition(";base64,")
        assert kind == "data:image/svg+xml"
        assert ElementTree.fromstring(base64.b64decode(content)).tag.endswith("svg")
    assert len(pictures) == len([file for file in files if file.suffix == ".svg"]) == text.count("](figures/")
    assert {files[1].parent / name for name in re.findall(r"\]\((figures/[^)]+)\)", text)} <= {*files}
    assert page.tags.count("table") == len(re.findall(r"^\| ---", text, re.MULTILINE))
    assert page.text.count(f"{records[0].run_id}:") == 1 and "| gainlora-inflora | 80.0 | 1.5 | 1 |" in text


HOSTILE = "<script>alert(1)</script>&'\"\x1b[31m\u202e$x|`*"


def test_hostile_names_reach_neither_markup_nor_terminal(tmp_path):
    """In every value of config.json that a reader shows and that is not a part of a path."""
    folder = write_run(tmp_path, R, tasks=THREE, options={"lora.targets": [HOSTILE]})
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model": HOSTILE,
        "device": HOSTILE,
        "dtype": HOSTILE,
        "skipped": [HOSTILE],
        "versions": {HOSTILE: HOSTILE},
    }
    (folder / "config.json").write_text(json.dumps(config))
    records = [read_run(folder), run_of(tmp_path, FORGETS, seed=3)]
    files = write_report(records, tmp_path / "report", REPORT)
    page = Page(files[0])
    assert "script" not in page.tags and "<script>alert(1)</script>&'\"\\x1b[31m\\u202e$x|`*" in page.text
    console = io.StringIO()
    Console(file=console, force_terminal=False).print(matrix_table([record.result for record in records], 1))
    for text in (page.source, files[1].read_text(), console.getvalue()):
        assert "\x1b" not in text and "\u202e" not in text
    for file in files:
        assert file.parent.resolve().is_relative_to(tmp_path / "report") and file.name.isprintable()
    assert markdown_table(["a|b"], [["c|d<e"]]) == "| a\\|b |\n| --- |\n| c\\|d\\<e |"


def test_reports_of_unfinished_many_and_no_runs(tmp_path):
    page = Page(write_report([run_of(tmp_path, [])], tmp_path / "report", REPORT)[0])
    assert "0 of 3 tasks" in page.text and "img" not in page.tags
    records = [run_of(tmp_path, R[:1], seed=seed) for seed in range(13)]
    few, many = (Page(write_report(some, tmp_path / "out" / "page.html", REPORT)[0]) for some in (records[:2], records))
    assert all(record.run_id[-8:] in many.text for record in records)
    assert "Row: after learning that task" in few.text and "Row: after learning that task" not in many.text
    with pytest.raises(GainLoRAError, match="no runs"):
        write_report([], tmp_path, REPORT)
