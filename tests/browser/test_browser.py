"""The pages as a person sees them: MLflow, Prefect, the report and the documentation, in headless Chromium."""

import json
import re
import shutil
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from tests.newcomer import Shell
from tests.pages import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.xdist_group("newcomer"),
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)"),
]
PATIENCE = 60_000  # ms: pages of a busy machine
METHODS = ("seqlora", "gainlora-inflora")


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def look(chromium):
    """Opens an address; after the test it has asked no other machine for anything."""
    elsewhere, contexts = [], []

    def opened(address, scheme="light"):
        contexts.append(chromium.new_context(viewport={"width": 1400, "height": 1000}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda asked: None if local(asked.url) else elsewhere.append(asked.url))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not elsewhere


def local(address):
    return address.startswith(("http://127.0.0.1:", "file:", "data:", "blob:"))


@pytest.fixture(scope="module")
def shell(newcomer):
    """The project after a run of each method, one of them by the worker, with MLflow's pages served."""
    shell = Shell(*newcomer)
    try:
        shell("make serve")
        shell("prefect deployment run continual-embedded --watch --param method=seqlora")
        shell.serve("make ui", "http://127.0.0.1:5000/health")
        yield shell
    finally:
        shell.close()


@pytest.fixture(scope="module")
def runs(shell):
    """{method: (run id, result)} of the embedded order with params.yaml's options."""
    found = {}
    for method in METHODS:
        for file in shell.folder.glob(f"runs/embedded-{method}-smollm2-135m-42-????????/result.json"):
            config = json.loads(file.with_name("config.json").read_text())["config"]
            if config["train"]["learning_rate"] == 0.02 and config["lora"]["targets"] is None:
                found[method] = (file.parent.name, json.loads(file.read_text()))
    return found


def test_mlflow_lists_and_compares_the_runs(look, shell, runs):
    page = look(shell.here("http://127.0.0.1:5000"))
    page.get_by_text("Model training", exact=True).first.click()
    page.get_by_role("link", name="gainlora", exact=True).first.click()
    page.get_by_role("link", name="Runs").or_(page.get_by_role("link", name="Training runs")).first.click()
    for name, _ in runs.values():
        row = page.get_by_role("row").filter(has_text=name[-8:])
        row.get_by_role("checkbox").first.check(force=True)

    page.get_by_role("button", name="Compare").first.click()
    page.get_by_text("Comparing 2 Runs").wait_for()
    label = page.get_by_role("link", name="AP", exact=True)
    label.scroll_into_view_if_needed()
    assert sorted(beside(label)) == pytest.approx(sorted(result["AP"] for _, result in runs.values()), abs=0.01)
    for method in METHODS:
        assert page.get_by_text(method, exact=True).count()


def beside(label):
    """The visible numbers on the line of a label: rows of another table may be scrolled out of sight there."""
    return label.evaluate(
        """label => {
            const line = label.getBoundingClientRect()
            const same = e => Math.abs(e.getBoundingClientRect().y - line.y) < line.height
            const seen = e => {
                const box = e.getBoundingClientRect()
                return document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2).includes(e)
            }
            const leaves = [...document.querySelectorAll("*")].filter(e => !e.children.length && same(e) && seen(e))
            return leaves.map(e => e.textContent.trim()).filter(t => t && !isNaN(t)).map(Number)
        }"""
    )


def test_prefect_shows_deployments_and_a_finished_run_with_its_artifacts(look, shell, runs):
    page = look(shell.here("http://127.0.0.1:4200/deployments"))
    for name in ("embedded", "order1", "order2", "order3", "order4"):
        page.get_by_role("link", name=name, exact=True).first.wait_for()

    page.goto(shell.here("http://127.0.0.1:4200/runs"))
    page.locator("a[href*='/runs/flow-run/']").first.click()
    page.get_by_text("Completed", exact=True).first.wait_for()
    page.get_by_text("Artifacts", exact=True).first.click()
    page.get_by_text("accuracy-matrix", exact=False).first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_renders(look, shell, runs, scheme):
    if not (shell.folder / "report" / "browser").exists():
        shell("gainlora report {} --out report/browser".format(" ".join(f"runs/{name}" for name, _ in runs.values())))
    page = look(f"file://{shell.folder}/report/browser/index.html", scheme)
    assert page.title().startswith("GainLoRA")
    text = page.inner_text("body")
    assert all(method in text for method in METHODS)
    pictures = page.locator("img, svg")
    assert pictures.count() >= 3
    broken = "all => all.filter(i => i.tagName == 'IMG' && !i.naturalWidth).length"
    assert pictures.evaluate_all(broken) == 0
    assert darkness(page) == (scheme == "dark")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation on a port of its own: search needs a server."""
    folder = tmp_path_factory.mktemp("site")
    shell = Shell(ROOT)
    try:
        shell(f"mkdocs build --quiet --strict --site-dir {folder}")
    finally:
        shell.close()
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *request: Quiet(*request, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_documentation_renders(look, site, scheme):
    page = look(f"{site}/method.html", scheme)
    page.get_by_role("heading", name="The method").first.wait_for()
    boxes = page.locator("math[display=block]").evaluate_all("all => all.map(m => m.getBoundingClientRect().height)")
    assert len(boxes) >= 4 and min(boxes) > 10
    assert darkness(page) == (scheme == "dark")


def test_the_documentation_is_searched(look, site):
    page = look(f"{site}/index.html")
    page.get_by_role("textbox", name="Search").click()
    page.get_by_role("textbox", name="Search").press_sequentially("gate memory")
    page.get_by_role("link", name="When something fails").last.wait_for()


def darkness(page):
    """Whether the page's background is dark."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3]) < 3 * 128
