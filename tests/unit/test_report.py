"""Tables, figures and the page, from run folders with made-up numbers."""

from __future__ import annotations

import io
import re
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from gainlora.errors import GainLoRAError
from gainlora.tracking import charts, drawing, figures
from gainlora.tracking.folder import example_coefficients, read_run
from gainlora.tracking.report import DETAILED, matrix_table, run_figures, write_report
from tests.fake_run import TASKS, mean_coefficients, write_run

REPORT = {"decimals": 1, "dpi": 40}
THREE = TASKS[:3]
# AP = (82 + 87 + 71) / 3 = 80; FT = ((84 - 82) + (88 - 87)) / 2 = 1.5; BWT = -1.5
R = [[84.0], [81.0, 88.0], [82.0, 87.0, 71.0]]
# AP = (22 + 47 + 51) / 3 = 40; FT = ((80 - 22) + (85 - 47)) / 2 = 48
FORGETS = [[80.0], [30.0, 85.0], [22.0, 47.0, 51.0]]


@pytest.fixture(autouse=True)
def known_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts without torch: two models; 100 per rank, and 7 with gates."""
    shapes = types.ModuleType("gainlora.model.shapes")
    shapes.MODELS = {"small": None, "large": None}
    shapes.trainable_parameters = lambda model, method, rank: (
        (10 if model == "large" else 1) * (100 * rank + 7 * method.startswith("gainlora-"))
    )
    monkeypatch.setitem(sys.modules, "gainlora.model.shapes", shapes)


def report(folders: list[Path], out: Path) -> Path:
    """The page of these run folders."""
    return write_report([read_run(folder) for folder in folders], out, REPORT)[0]


def printed(renderable: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def rows(text: str, *starts: str) -> list[list[str]]:
    """The words of the lines that start so, without the table's frame."""
    lines = [re.sub(r"[│┃]", " ", line).split() for line in text.splitlines()]
    return [line for line in lines if line[: len(starts)] == list(starts)]


def test_read_run_pads_R(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, R[:2], tasks=THREE))
    assert run.R == [[84.0, None, None], [81.0, 88.0, None], [None] * 3]
    assert not run.complete
    assert run.result["AP"] == 84.5


def test_result_equals_the_written_one(tmp_path: Path) -> None:
    import json

    folder = write_run(tmp_path, R, tasks=THREE)
    assert read_run(folder).result == json.loads((folder / "result.json").read_text())


def test_one_run_prints_R_and_the_hand_computed_measures(tmp_path: Path) -> None:
    text = printed(matrix_table([read_run(write_run(tmp_path, R, tasks=THREE)).result], 1))
    assert rows(text, "2") == [["2", "news_topic", "81.0", "88.0"]]
    assert rows(text, "3") == [["3", "text_source", "82.0", "87.0", "71.0"]]
    assert "AP 80.0   FT 1.5   BWT -1.5" in text


def test_several_runs_print_a_comparison(tmp_path: Path) -> None:
    results = [
        read_run(write_run(tmp_path, matrix, method, tasks=THREE)).result
        for matrix, method in ((R, "gainlora-inflora"), (FORGETS, "seqlora"), (R[:1], "inflora"))
    ]
    text = printed(matrix_table(results, 2))
    end = ["smollm2-135m", "42"]
    assert rows(text, "embedded", "seqlora") == [["embedded", "seqlora", *end, "3/3", "40.00", "48.00", "-48.00"]]
    assert rows(text, "embedded", "inflora") == [["embedded", "inflora", *end, "1/3", "84.00", "-", "-"]]


def test_fifteen_tasks_fit_eighty_columns(tmp_path: Path) -> None:
    names = [f"task{i}_with_a_rather_long_name_like_the_benchmarks" for i in range(15)]
    matrix = [[50.0 + i for i in range(t + 1)] for t in range(15)]
    text = printed(matrix_table([read_run(write_run(tmp_path, matrix, tasks=names)).result], 1), width=80)
    assert rows(text, "15")[-1][1:] == [f"{50.0 + i}" for i in range(15)]
    assert names[14] in text


class Page(HTMLParser):
    """Everything that a browser would load, and the text it would show."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def test_page_needs_no_network(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, R, tasks=THREE), write_run(tmp_path, FORGETS, "seqlora", tasks=THREE)]
    path = report(runs, tmp_path / "report")
    source, page = path.read_text(encoding="utf-8"), parsed(path)
    assert path == tmp_path / "report" / "index.html"
    assert all(target.startswith(("#", "data:image/")) for target in page.loads)
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert not re.search(r"https?://|@import", source)
    assert "prefers-color-scheme: dark" in source and "@media print" in source
    assert drawing.INK not in source.split("</style>")[1]  # text in the page's own colour
    assert page.tags.count("figure") == page.tags.count("figcaption") == 4 + 6 + 3


def test_links_and_ids_of_the_page_match(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, R, seed=seed, tasks=THREE) for seed in (1, 2)]
    source = report(runs, tmp_path / "report").read_text(encoding="utf-8")
    ids = set(re.findall(r'\bid="([^"]+)"', source))
    used = set(re.findall(r'href="#([^"]+)"', source)) | set(re.findall(r"url\(#([^)]+)\)", source))
    assert used <= ids


def test_figures_stand_beside_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path, R, tasks=THREE)
    path = report([folder], tmp_path / "out" / "page.html")
    for name in (f"{folder.name}/accuracy_matrix", "embedded-smollm2-135m-curves", "trainable_parameters"):
        assert (path.parent / "figures" / f"{name}.png").is_file()
        assert ElementTree.parse(path.parent / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
    assert path.name == "page.html"


def test_markdown_has_the_page_s_tables_and_names_files_that_are_there(tmp_path: Path) -> None:
    files = write_report([read_run(write_run(tmp_path, R, tasks=THREE))], tmp_path / "report", REPORT)
    page, text = parsed(files[0]), files[1].read_text(encoding="utf-8")
    assert files[1].name == "report.md"
    rulers = [line for line in text.splitlines() if line.startswith("| ---")]
    assert len(rulers) == page.tags.count("table")
    assert "| gainlora-inflora | 80.0 | 1.5 | 1 |" in text
    named = set(re.findall(r"\]\((figures/[^)]+)\)", text))
    assert {files[1].parent / name for name in named} == {f for f in files if f.suffix == ".svg"}
    assert all(file.is_file() for file in files)


def test_page_escapes_names(tmp_path: Path) -> None:
    folder = write_run(tmp_path, R[:1], tasks=THREE)
    text = (
        (folder / "config.json").read_text().replace('"model": "smollm2-135m"', '"model": "<script>alert(1)</script>&"')
    )
    (folder / "config.json").write_text(text)
    path = report([folder], tmp_path / "report")
    assert "<script" not in path.read_text(encoding="utf-8")
    assert "<script>alert(1)</script>&" in parsed(path).text


def test_seeds_give_mean_and_deviation_and_unfinished_runs_do_not_count(tmp_path: Path) -> None:
    lower = [[score - 4 for score in row] for row in R]
    runs = [
        write_run(tmp_path, R, seed=1, tasks=THREE),
        write_run(tmp_path, lower, seed=2, tasks=THREE),
        write_run(tmp_path, R[:2], seed=3, tasks=THREE),
    ]
    page = parsed(report(runs, tmp_path / "report"))
    assert "78.0 ± 2.8" in page.text  # of 80 and 76
    assert "2 of 3" in page.text and "2 of 3 tasks" in page.text


def test_run_without_a_finished_task(tmp_path: Path) -> None:
    page = parsed(report([write_run(tmp_path, [], tasks=THREE)], tmp_path / "report"))
    assert "0 of 3 tasks" in page.text and page.tags.count("svg") == 1  # trainable parameters, which no run decides


def test_report_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(GainLoRAError, match="no runs"):
        write_report([], tmp_path, REPORT)
    with pytest.raises(GainLoRAError, match=r"nowhere/config\.json: not found"):
        read_run(tmp_path / "nowhere")
    folder = write_run(tmp_path, R, tasks=THREE)
    for name, content, complaint in (
        ("scores.json", "{", r"scores\.json: not JSON"),
        ("scores.json", "{}", "'index' is missing"),
        ("gate.safetensors", "short", r"gate\.safetensors: damaged"),
    ):
        path = folder / "task_01_movie_sentiment" / name
        before = path.read_bytes()
        path.write_text(content)
        with pytest.raises(GainLoRAError, match=complaint):
            read_run(folder)
        path.write_bytes(before)


def test_many_runs_are_a_table(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, R[:1], seed=seed, tasks=THREE) for seed in range(DETAILED + 1)]
    few, many = (parsed(report(some, tmp_path / "out")) for some in (folders[:2], folders))
    assert all(folder.name[-8:] in many.text for folder in folders)
    assert "Row: after learning that task" in few.text and "Row: after learning that task" not in many.text


def test_a_run_given_twice_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path, R, tasks=THREE)
    page = parsed(report([folder, folder], tmp_path / "report"))
    assert page.text.count(f"{folder.name}:") == 1


def test_tasks_learned_at_once_have_one_row_and_no_sequence(tmp_path: Path) -> None:
    folder = write_run(tmp_path, [[80.0, 90.0, 70.0]], "multitask", tasks=THREE, at_once=True)
    run = read_run(folder)
    assert run.complete and run.at_once
    assert run.R == [[None] * 3, [None] * 3, [80.0, 90.0, 70.0]]
    assert (run.result["AP"], run.result["FT"], run.result["BWT"]) == (80.0, None, None)
    assert set(run_figures(run, 1)) == {"accuracy_matrix", "time_line"}
    page = parsed(report([folder, write_run(tmp_path, R, tasks=THREE)], tmp_path / "report"))
    assert "1 all_tasks" in page.text
    assert rows(printed(matrix_table([run.result, run.result], 1)), "embedded")[0][-4:] == ["3/3", "80.0", "-", "-"]
    assert not read_run(write_run(tmp_path, [], "multitask", 7, THREE, at_once=True)).complete


def test_heat_map_holds_R() -> None:
    figure = figures.accuracy_matrix(THREE, THREE, R)
    axes = figure.axes[0]
    cells = axes.collections[0].get_array()
    assert np.ma.filled(cells, -1).tolist() == [[84, -1, -1], [81, 88, -1], [82, 87, 71]]
    assert [text.get_text() for text in axes.texts] == ["84.0", "81.0", "88.0", "82.0", "87.0", "71.0"]
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"{i} {n}" for i, n in enumerate(THREE, 1)]


def test_curves_hold_R_and_AP() -> None:
    lines = figures.accuracy_curves(THREE, R).axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[84, 81, 82], [88, 87], [71], [84, 84.5, 80]]
    assert list(lines[1].get_xdata()) == [2, 3]
    made = charts.performance_curves({"x": [R, FORGETS], "multitask": [[[None] * 3, [None] * 3, R[2]]]})
    line, level = made.axes[0].lines
    assert list(line.get_ydata()) == [82, 71, 60]  # means of (84, 80), (84.5, 57.5), (80, 40)
    assert (list(level.get_xdata()), list(level.get_ydata())) == ([1, 3], [80, 80])


def test_a_rule_keeps_its_colour_and_gated_lines_are_solid() -> None:
    labels = [prefix + rule for rule in "abcdefghij" for prefix in ("", "gainlora-")]
    styles = charts.method_styles(labels)
    looks = {(s["color"], s["marker"], s["linestyle"]) for s in styles.values()}
    assert len(looks) == len(labels)
    assert styles["a"]["color"] == styles["gainlora-a"]["color"]
    assert (styles["a"]["linestyle"], styles["gainlora-a"]["linestyle"]) == ("--", "-")


def test_gate_figures_hold_the_coefficients(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, R, tasks=THREE))
    made = run_figures(run, 1)
    cells = made["gate_coefficients"][0].axes[0].collections[0].get_array()
    assert cells.tolist() == [mean_coefficients(3, i) for i in (1, 2, 3)]
    panels = made["coefficient_violins"][0].axes
    assert [axes.get_title() for axes in panels] == ["1 movie_sentiment", "2 news_topic", "3 text_source"]
    highest = [shape.get_paths()[0].vertices[:, 1].max() for shape in panels[0].collections[:3]]
    rows = example_coefficients(run.steps[-1])[THREE[0]]
    assert highest == pytest.approx([max(row[branch] for row in rows) for branch in range(3)])
    gate, layers = made["basis_growth"][0].axes
    assert [bar.patches[0].get_width() for bar in gate.containers] == pytest.approx([100 * k / 576 for k in (5, 3, 3)])
    ends = [bar.patches[29].get_x() + bar.patches[29].get_width() for bar in layers.containers]
    assert ends == pytest.approx([100 * (5 * t + 29) / 576 for t in (1, 2, 3)])
    assert [text.get_text() for text in gate.texts] == ["11 of 576", "13 of 50", "15 of 576"]


def test_time_line_holds_the_phases_one_after_another(tmp_path: Path) -> None:
    (axes,) = run_figures(read_run(write_run(tmp_path, R, tasks=THREE)), 1)["time_line"][0].axes
    starts = sorted(bar.patches[0].get_x() for bar in axes.containers)
    assert starts == pytest.approx([at + phase for at in (0, 10, 20) for phase in (0, 1, 7, 7.5)])
    assert axes.get_xlim()[1] == pytest.approx(30) and axes.get_xlabel() == "seconds of work"


def test_names_are_told_apart_by_what_differs() -> None:
    assert drawing.distinct(["model.layers.0.attn.q", "model.layers.1.attn.q"]) == ["0", "1"]
    assert drawing.distinct(["encoder.0.q", "decoder.0.q"]) == ["encoder", "decoder"]
    assert drawing.distinct(["a.q"]) == ["a.q"] and drawing.distinct(["a", "a.b"]) == ["a", "a.b"]


def test_ungated_run_has_no_gate_figures(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, R, "seqlora", tasks=THREE))
    assert set(run_figures(run, 1)) == {"accuracy_matrix", "accuracy_curves", "time_line"}
