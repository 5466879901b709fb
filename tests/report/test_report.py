"""The report: its numbers, its errors, and the page itself in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from matryoshkafy_cli.main import app
from torch import nn
from typer.testing import CliRunner

import matryoshkafy as mk
from matryoshkafy.files.checkpoint import save
from matryoshkafy.report.page.contents import ReportError
from matryoshkafy.report.page.html import beside, grid
from matryoshkafy.report.page.metrics import read_metrics
from matryoshkafy.report.page.numbers import counted, stored, timed
from matryoshkafy.report.report import page, report_of, write_report

METRICS = """size,ranked,NDCG@10,Recall@10
popularity,all items,0.01,0.02
4,all items,0.10,0.20
8,all items,0.20,0.30
16,all items,0.25,0.35
4,unseen items,0.11,0.21
8,unseen items,0.21,0.31
16,unseen items,0.26,0.36
"""


class Net(nn.Module):
    """Names that would break a page that does not escape them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "a <b> & c"
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    return save(mk.convert(Net().eval(), (ids,), sizes=[4, 8, 16]), folder)


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("metrics") / "metrics.csv"
    path.write_text(METRICS)
    return path


@pytest.fixture(scope="module")
def written(checkpoint: Path, metrics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    report = report_of(checkpoint, metrics)
    return write_report(report, tmp_path_factory.mktemp("page") / "report.html")


def test_the_command_writes_the_page_and_prints_its_place(
    checkpoint: Path, metrics: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    words = ["report", str(checkpoint), "--metrics", str(metrics), "-o", str(page), "--json"]
    done = CliRunner().invoke(app(), words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"report": str(page)}
    assert "NDCG@10" in page.read_text()


def test_the_command_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    done = CliRunner().invoke(app(), ["report", str(tmp_path), "-o", str(tmp_path / "r.html")])
    assert done.exit_code == 2 and "Traceback" not in done.output
    assert not (tmp_path / "r.html").exists()


class Outline(HTMLParser):
    """Tags that are never closed, and everything that a page would fetch."""

    VOID = {"meta", "link", "input", "br", "rect", "line"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "action", "data")]
        if tag not in ("meta", "link", "input", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_fetches_nothing(written: Path) -> None:
    outline = Outline()
    outline.feed(written.read_text())
    assert outline.open == []
    assert outline.fetched == ["data:,"]
    assert "url(" not in written.read_text() and "@import" not in written.read_text()


def test_counts_in_the_report_are_the_counts_of_the_sub_models(checkpoint: Path) -> None:
    costs = report_of(checkpoint).costs
    # table 11 m, up 3m (m + 1), down m (3m + 1)
    wanted = {m: 11 * m + 3 * m * (m + 1) + m * (3 * m + 1) for m in (4, 8, 16)}
    assert {m: c.parameters for m, c in costs.items()} == wanted
    assert {m: c.bytes for m, c in costs.items()} == {m: 4 * n for m, n in wanted.items()}


TUNED = {"stages": "4:20,16:10", "recall": 0.9, "reciprocal_rank": 0.7, "products": 1234.0}
ALONE = {"size": 4, "threshold": 0.9, "answers": 0.6, "accuracy_alone": 0.8, "cost_alone": 4.0}
LAST = ALONE | {"size": 16, "threshold": None, "answers": 0.4, "cost_alone": 16.0}


def test_trade_offs_are_drawn_from_what_the_commands_print(
    checkpoint: Path, tmp_path: Path
) -> None:
    tuned, cascade = tmp_path / "tuned.json", tmp_path / "cascade.json"
    tuned.write_text(json.dumps({"settings": [TUNED, TUNED | {"products": 9e6, "recall": 1.0}]}))
    cascade.write_text(json.dumps({"accuracy": 0.81, "cost": 8.0, "sizes": [ALONE, LAST]}))
    out = tmp_path / "r.html"
    words = ["report", str(checkpoint), "--retrieval", str(tuned), "--cascade", str(cascade)]
    done = CliRunner().invoke(app(), [*words, "-o", str(out)])
    assert done.exit_code == 0, done.output
    text = out.read_text()
    assert "4:20 &gt; 16:10" in text and "recall and MRR against multiply-adds" in text
    assert "answers 0.8100 right at 50% of the cost of size 16" in text and "never" in text


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"settings": [{"stages": "4:2"}]}', '{"sizes": 3}']
)
def test_tables_that_are_none_are_refused_before_anything_is_measured(
    checkpoint: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "t.json").write_text(text)
    for option, command in (("--retrieval", "retrieve"), ("--cascade", "cascade")):
        words = ["report", str(checkpoint), option, str(tmp_path / "t.json")]
        done = CliRunner().invoke(app(), [*words, "-o", str(tmp_path / "r.html")])
        assert done.exit_code == 2
        assert f"expected what this prints: matryoshkafy {command}" in " ".join(done.output.split())
    assert not (tmp_path / "r.html").exists()


def test_a_row_of_figures_that_would_leave_one_alone_is_two_rows() -> None:
    assert grid(["<b></b>"] * 4).startswith('<div class="grid pairs">')
    assert grid(["<b></b>"] * 3).startswith('<div class="grid">')
    drawn = beside(["<b></b>"] * 2, ("size", "x"), [(4, 1)])
    assert drawn.count("<div") == 3 and 'class="fill"' in drawn
    assert "fill" not in beside(["<b></b>"] * 2, "abcd", [(1, 2, 3, 4)])


def test_names_are_escaped(checkpoint: Path) -> None:
    assert "<h1>a &lt;b&gt; &amp; c</h1>" in page(report_of(checkpoint))


def test_metrics_are_read_by_series_and_size(metrics: Path) -> None:
    found = read_metrics(metrics, [4, 8, 16])
    assert list(found) == ["NDCG@10", "Recall@10"]
    assert found["NDCG@10"]["unseen items"] == {4: 0.11, 8: 0.21, 16: 0.26}
    assert set(found["Recall@10"]) == {"all items", "unseen items"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width,x\n4,1\n", r"has the columns \['width', 'x'\]; expected one called `size`"),
        ("size,x\n5,1\n", r"no row for any of the sizes \[4, 8\]"),
        ("size,x\n4,1\n4,2\n", "two values of x for size 4"),
        ("", r"has the columns \[\]"),
    ],
)
def test_bad_metrics_are_refused_with_a_remedy(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(ReportError, match=message):
        read_metrics(path, [4, 8])


def test_absent_metrics_and_unwritable_pages_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ReportError, match="cannot be read"):
        read_metrics(tmp_path / "absent.csv", [4])
    with pytest.raises(ReportError, match="cannot be written"):
        write_report(report_of(checkpoint), tmp_path / "absent" / "report.html")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (counted(0), "0"), (counted(999), "999"), (counted(1234), "1.23K"),
        (counted(1_000_000), "1M"), (counted(999_999), "1M"), (stored(1234), "1.23 kB"),
        (stored(5_000_000_000), "5 GB"), (timed(0.01234), "12.3 ms"),
    ],
)  # fmt: skip
def test_numbers_read_as_a_person_says_them(given: str, wanted: str) -> None:
    assert given == wanted


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def opened(browser: Any, written: Path) -> Any:
    browser.get("about:blank")
    browser.get(written.as_uri())
    return browser


def visible(browser: Any, selector: str) -> list[Any]:
    return [e for e in browser.find_elements("css selector", selector) if e.is_displayed()]


def test_the_page_opens_without_errors_and_shows_its_charts(opened: Any) -> None:
    assert opened.get_log("browser") == []
    titles = [e.text for e in visible(opened, "figure h3")]
    costs = ["parameters", "FLOPs", "latency"]
    assert titles[:5] == [
        "parameters",
        "FLOPs",
        "latency at 2 × 3",
        "NDCG@10",
        "Recall@10",
    ]
    assert titles[5:11] == [f"{m} against {c}" for m in ("NDCG@10", "Recall@10") for c in costs]
    assert titles[11:] == ["groups", "up.weight"]
    assert len(visible(opened, "figure svg")) == len(titles)
    assert all(e.size["height"] > 50 for e in visible(opened, "figure svg"))
    assert len(visible(opened, "table")) >= 3


def test_picking_a_size_tells_it_and_dims_what_lies_beyond(opened: Any) -> None:
    told = opened.find_element("id", "told")
    assert told.text.startswith("Size 16: ") and not visible(opened, ".beyond")
    opened.find_elements("css selector", ".dial label")[0].click()
    assert told.text.startswith("Size 4: ") and "NDCG@10 0.1000" in told.text
    levels = {e.get_attribute("data-level") for e in visible(opened, ".beyond")}
    assert levels == {"1", "2"}
    assert opened.find_element("css selector", "tr.picked td").text == "4"


def test_the_dial_works_from_the_keyboard(opened: Any) -> None:
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    opened.find_element("tag name", "body").send_keys(keys.TAB)
    opened.switch_to.active_element.send_keys(keys.ARROW_LEFT)
    assert opened.find_element("id", "told").text.startswith("Size 8: ")
    opened.switch_to.active_element.send_keys(keys.ARROW_LEFT)
    assert opened.find_element("id", "told").text.startswith("Size 4: ")


def test_a_phone_need_not_scroll_sideways(opened: Any) -> None:
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= 360
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("width", [390, 1280])
def test_words_of_all_drawings_are_equally_large_and_no_card_stands_alone(
    opened: Any, width: int
) -> None:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 800}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scales = opened.execute_script(
        "return [...document.querySelectorAll('figure svg')].map("
        "s => s.getBoundingClientRect().width / s.viewBox.baseVal.width)"
    )
    fonts = opened.execute_script(
        "return [...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fontSize)"
    )
    rows = opened.execute_script(
        "return [...document.querySelectorAll('.grid')].map(g => {"
        "const tops = [...g.children].map(c => Math.round(c.getBoundingClientRect().top));"
        "return [tops.length, tops.filter(t => t === tops[tops.length - 1]).length];})"
    )
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert scales == pytest.approx([1.0] * len(scales), abs=0.01)
    assert len(set(fonts)) == 1
    assert width < 800 or all(last > 1 for _, last in rows), rows


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_in_light_and_dark(opened: Any, scheme: str) -> None:
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    paper, ink = (
        luminance(opened.execute_script(f"return getComputedStyle(document.body).{name}"))
        for name in ("backgroundColor", "color")
    )
    low, high = sorted((paper, ink))
    assert (paper > ink) == (scheme == "light")
    assert (high + 0.05) / (low + 0.05) > 7


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2 of `rgb(r, g, b)`."""
    parts = [int(p) / 255 for p in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
