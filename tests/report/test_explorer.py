"""The explorer in a real browser, skipped without Chromium or without playwright's driver."""

import csv
import json
import pathlib
import shutil
import threading
from xml.etree import ElementTree

import folders
import numpy as np
import pytest
from report.test_report import HOSTILE, fabricate, sample_rows

from diq_jax import config, pipeline
from diq_jax.report import compare, explorer, server, stage
from diq_jax.run import artifacts, reading

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not BROWSER, reason="there is no Chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as opened:
        started = opened.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The report of a run over the sample, with the ranks of two methods, in several chunks."""
    context = fabricate(tmp_path_factory.mktemp("run"), quoted_rows())
    table = context.table("selection/selection.parquet")
    rank, n = table["rank"].to_numpy(), len(table)
    columns = {"example_id": table["example_id"], "diq": rank, "random": n + 1 - rank}
    artifacts.write_table(context.path("selection/baselines.parquet"), columns)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(explorer, "CHUNK_CHARACTERS", 20_000)
        stage.run(context)
    return context


@pytest.fixture
def page(browser, run):
    """The open page, which must end without an error."""
    yield from opened(browser, run.path("report/report.html").as_uri())


def quoted_rows():
    """The sample, one answer of which has what JSON escapes."""
    first, *rest = sample_rows()
    return [first | {"answer": first["answer"] + ' "Red\\flag"'}, *rest]


def opened(browser, address, **options):
    page = browser.new_page(**{"viewport": {"width": 1400, "height": 900}} | options)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("#explorer[data-ready=yes]")
    yield page
    page.close()
    assert not wrong


def shown(page):
    """The number of rows in the table, and of those that are selected."""
    text = page.inner_text("#count").replace(",", "").split()
    return int(text[0]), int(text[4])


def until(page, expression):
    """Waits until an expression is true; the page's policy lets playwright poll none itself."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"{expression}: {page.inner_text('#state')}, {page.inner_text('#count')}")


def counts(page, expected):
    """Waits until the table has so many rows."""
    until(page, f"document.getElementById('count').textContent.startsWith('{expected} ')")


def canvas(page):
    """Scrolls to the scatter and returns where it is."""
    page.evaluate("document.getElementById('explorer').scrollIntoView({behavior: 'instant'})")
    return page.locator("#marks").bounding_box()


def saved(page, button):
    with page.expect_download() as found:
        page.click(button)
    return [json.loads(line) for line in pathlib.Path(found.value.path()).read_text().splitlines()]


def test_search_and_filters_agree_with_the_rows(page, run):
    rows = quoted_rows()
    assert shown(page) == (len(rows), 16)
    page.fill("#search", "Renal")
    until(page, "document.getElementById('progress').textContent === ''")
    texts = [
        "\n".join(str(row.get(n, "")) for n in ("question", "reasoning", "answer")) for row in rows
    ]
    expected = sum("renal" in text.lower() for text in texts)
    until(page, f"document.getElementById('count').textContent.startsWith('{expected} ')")
    assert 0 < expected < len(rows)
    for query in (
        "S01",
        "renal",
        '"red\\fl',
        "é",
        "no such words",
    ):  # ids; again, by row; quotes; nothing
        page.fill("#search", query)
        found = [query.lower() in f"s{i:03}\n{text}".lower() for i, text in enumerate(texts)]
        counts(page, sum(found))
    page.fill("#search", "")
    page.select_option("#only", "selected")
    counts(page, 16)
    page.select_option("#range", "tokens")
    tokens = run.table("influence/influence.parquet")["tokens"].to_numpy()
    chosen = run.table("selection/selection.parquet")["selected"].to_numpy()
    low = int(np.median(tokens[chosen]))
    page.fill("#low", str(low))
    expected = int((tokens[chosen] >= low).sum())
    until(page, f"document.getElementById('count').textContent.startsWith('{expected} ')")


def test_a_row_is_read_in_full_and_linked(page, run):
    page.click(".line[aria-rowindex='3'] .start")
    page.wait_for_selector("#reader:not([hidden])")
    ranks = run.table("selection/selection.parquet")["rank"].to_numpy()
    i = int(np.argwhere(ranks == 2)[0, 0])
    row = quoted_rows()[i]
    read = page.inner_text("#reader")
    assert row["reasoning"].strip() in read and row["answer"].strip() in read
    assert page.evaluate("location.hash") == f"#row=s{i:03}"
    page.keyboard.press("j")
    until(page, f"location.hash !== '#row=s{i:03}'")
    page.keyboard.press("Escape")
    assert page.is_hidden("#reader")


def test_decisions_by_hand_change_the_selection_and_are_exported(page, run):
    before = saved(page, "#export-selection")
    page.click(".line[aria-rowindex='2'] .start")
    page.fill("#reader input", "wrong dose")
    page.click("text=Never this one")
    until(page, "document.getElementById('state').textContent.includes('by hand')")
    first = before[0]["example_id"]
    assert saved(page, "#export-edits") == [
        {"example_id": first, "decision": "never", "reason": "wrong dose"}
    ]
    after = saved(page, "#export-selection")
    assert len(after) == len(before) == 16
    assert after[:15] == before[1:]  # the next one by rank moves up
    page.reload()
    page.wait_for_selector("#explorer[data-ready=yes]")
    assert "by hand" in page.inner_text("#state")  # kept by the browser
    page.click("#reset")
    assert page.inner_text("#state") == "As the run selected."


@pytest.mark.slow
def test_what_is_decided_in_the_browser_is_trained_on(browser, tmp_path):
    folders.decoder(tmp_path / "decoder")
    folders.write(tmp_path / "pool.jsonl", folders.pool_rows(24))
    folders.write(tmp_path / "targets.jsonl", folders.choice_rows(6, "target"))
    folders.write(tmp_path / "tests.jsonl", folders.choice_rows(2, "test"))
    settings = config.default()
    settings.model.update({"path": str(tmp_path / "decoder"), "max_tokens": 256})
    settings.data.update({n: str(tmp_path / f"{n}.jsonl") for n in ("pool", "targets", "tests")})
    settings.difficulty.source = "columns"
    settings.selection.retention_ratio = 0.25
    settings.finetune.epochs = 1

    def run(workdir, stages):
        cfg, folder = config.resolve(settings), tmp_path / workdir
        pipeline.run(cfg, folder, pipeline.parse_stages(stages), False)
        return [row["id"] for row in reading.read_jsonl(folder / "selection/selected.jsonl")]

    before = run("first", "prepare,difficulty,influence,selection,report")
    for page in opened(browser, (tmp_path / "first/report/report.html").as_uri()):
        page.click(".line[aria-rowindex='2'] .start")
        page.fill("#reader input", "wrong dose")
        page.click("text=Never this one")
        until(page, "document.getElementById('state').textContent.includes('by hand')")
        for name in ("selection", "edits"):
            artifacts.write_jsonl(tmp_path / f"{name}.jsonl", saved(page, f"#export-{name}"))
    wanted = [row["example_id"] for row in reading.read_jsonl(tmp_path / "selection.jsonl")]
    assert wanted[:5] == before[1:] and before[0] not in wanted
    settings.selection.edits = str(tmp_path / "edits.jsonl")
    assert run("edited", "prepare,difficulty,influence,selection") == wanted
    settings.selection.edits, settings.selection.method = "", f"file:{tmp_path}/selection.jsonl"
    assert run("filed", "prepare,difficulty,influence,selection,finetune") == wanted
    arms = reading.read_json(tmp_path / "filed/finetune/stage.json")["arms"]
    assert arms["selected"]["rows"] == 6
    assert (tmp_path / "filed/finetune/adapter/adapter_model.safetensors").stat().st_size > 0


def test_budget_method_and_thresholds_show_what_would_be_selected(page, run):
    page.fill("#percent", "50")
    until(page, "document.getElementById('budget-text').textContent.includes('80 rows')")
    assert shown(page) == (160, 80)
    page.click("text=Back to the run's selection")
    page.select_option("#method", "random")
    until(page, "document.getElementById('state').textContent.startsWith('Changed')")
    ranks = run.table("selection/selection.parquet")["rank"].to_numpy()
    chosen = {row["example_id"] for row in saved(page, "#export-selection")}
    assert chosen == {f"s{i:03}" for i in np.flatnonzero(ranks > 160 - 16)}
    page.click("text=Back to the run's selection")
    box = canvas(page)
    left, top, width = box["x"], box["y"], box["width"]
    for x in np.arange(left + 62, left + width - 12, 2.0):  # find it by the cursor
        page.mouse.move(x, top + 200)
        if page.evaluate("document.getElementById('marks').style.cursor") == "ew-resize":
            break
    page.mouse.down()
    page.mouse.move(x + 60, top + 200)
    page.mouse.up()
    until(page, "document.getElementById('state').textContent.includes('Thresholds')")
    assert len(saved(page, "#export-selection")) == 16


def test_the_lasso_filters(page):
    page.click("#lasso")
    box = canvas(page)
    corners = [(0.3, 0.2), (0.7, 0.2), (0.7, 0.6), (0.3, 0.6)]
    places = [(box["x"] + a * box["width"], box["y"] + b * box["height"]) for a, b in corners]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place)
    page.mouse.up()
    page.wait_for_selector("#unlasso:not([hidden])")
    inside = shown(page)[0]
    assert 0 < inside < 160
    assert len(saved(page, "#export-filtered")) == inside
    page.click("#unlasso")
    assert shown(page)[0] == 160


def test_keys_move_a_threshold_and_filter_by_the_view(page, run):
    grip = page.locator("#cut-difficulty")
    was = float(grip.get_attribute("aria-valuenow"))
    grip.press("ArrowRight")
    until(page, "document.getElementById('state').textContent.includes('Thresholds')")
    low, high, now = (float(grip.get_attribute(f"aria-value{k}")) for k in ("min", "max", "now"))
    assert now == pytest.approx(was + (high - low) / 100)
    difficulty = run.table("selection/selection.parquet")["difficulty"].to_numpy()
    influence = run.table("influence/influence.parquet")["influence"].to_numpy()
    cut = float(page.locator("#cut-influence").get_attribute("aria-valuenow"))
    first = np.sum((difficulty >= np.float32(now)) & (influence >= np.float32(cut)))
    assert grip.get_attribute("aria-valuetext").endswith(f"{first} rows in Q1")
    for key in ("+", "+", "ArrowRight", "Enter"):
        page.locator("#marks").press(key)
    page.wait_for_selector("#unlasso:not([hidden])")
    assert 0 < shown(page)[0] < 160
    page.locator("#marks").press("?")
    assert page.is_visible("#keys") and "without a pointer" in page.inner_text("#keys")
    page.keyboard.press("Escape")
    assert page.is_hidden("#keys")


def test_the_scatter_and_the_methods_are_saved(page):
    def fetched(button):
        with page.expect_download() as found:
            page.click(button)
        return pathlib.Path(found.value.path()).read_bytes()

    page.click("#methods-fold summary")
    page.click("#methods th button:text('random')")  # its rank against the run's
    page.select_option("#only", "selected")
    table = list(csv.reader(fetched("#csv").decode().splitlines()))
    assert table[0] == ["example_id", "rank by diq", "rank by random", "selected"]
    assert [row[3] for row in table[1:]] == ["selected"] * 16
    assert all(float(x) + float(y) == 161 for _, x, y, _ in table[1:])
    svg = ElementTree.fromstring(fetched("#svg"))
    shown = [mark for mark in svg.iter() if mark.get("fill") == "rgb(213,94,0)"]
    assert len(shown) == 16 and "rank by random" in "".join(svg.itertext())
    assert fetched("#png").startswith(b"\x89PNG")
    assert fetched("#methods button:text('CSV') >> nth=0").decode().count("\n") == 4
    drawn = ElementTree.fromstring(fetched("#methods button:text('SVG') >> nth=1"))
    assert {"diq", "random", "Rows"} <= {mark.text for mark in drawn.iter()}
    assert fetched("#methods button:text('PNG') >> nth=1").startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_is_wider_than_the_window(browser, run, width):
    size = {"width": width, "height": 800}
    for page in opened(browser, run.path("report/report.html").as_uri(), viewport=size):
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_hostile_rows_are_text(browser, tmp_path):
    attack = HOSTILE + "<img src=x onerror=alert(1)>"
    rows = [row | dict.fromkeys(("question", "answer", "source"), attack) for row in sample_rows()]
    context = fabricate(tmp_path, [*rows[:2], *sample_rows()[2:30]])
    table = context.table("influence/influence.parquet").to_pydict()
    table["influence_by_target"] = [[-1.0]] * 30
    artifacts.write_table(context.path("influence/influence.parquet"), table)
    target = {"example_id": ["t"], "task": ["test"], "question": [attack]}
    artifacts.write_table(context.path("prepare/targets.parquet"), target)
    stage.run(context)
    for page in opened(browser, context.path("report/report.html").as_uri()):
        page.on("dialog", lambda _: pytest.fail("a script of the data ran"))
        page.fill("#search", "onerror")
        counts(page, 2)
        page.click(".line[aria-rowindex='2'] .start")
        page.wait_for_selector("#reader:not([hidden])")
        assert page.text_content("#reader .text") == attack
        read = page.text_content("#reader")
        assert "Targets that it helps most: none" in read and "onerror" in read.split("hurts")[1]
        assert page.locator("#explorer :is(img, script, b:text-is('bold'))").count() == 0


def test_a_large_report_is_served(browser, run, tmp_path, monkeypatch):
    monkeypatch.setattr(explorer, "INLINE_BYTES", 1000)
    monkeypatch.setattr(explorer, "CHUNK_CHARACTERS", 20_000)
    shutil.copytree(run.workdir, tmp_path / "run")
    import dataclasses

    stage.run(dataclasses.replace(run, workdir=tmp_path / "run"))
    with server.open_server(str(tmp_path / "run"), 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        for page in opened(browser, f"http://127.0.0.1:{serving.server_address[1]}/report.html"):
            page.click(".line[aria-rowindex='2'] .start")
            page.wait_for_selector("#reader h4")
            assert "Answer" in page.inner_text("#reader")
            page.route("**/rows/*", lambda route: route.fulfill(body="cut off"))
            page.evaluate("location.hash = '#row=s159'")
            until(page, "document.getElementById('reader').textContent.includes('still run')")
        serving.shutdown()


def test_two_runs_stand_against_each_other(browser, run, tmp_path):
    other = np.random.default_rng(1).normal(size=160)
    fabricate(tmp_path / "other", quoted_rows(), influence=other)
    sides = compare.load(str(run.workdir), str(tmp_path / "other"), "diq view", verified=False)
    compare.write(tmp_path / "page", sides)
    who = compare.picked(*sides)
    for page in opened(browser, (tmp_path / "page/report.html").as_uri()):
        page.select_option("#group", label="selected by: only other")
        counts(page, int((who == 2).sum()))
        ids = {row["example_id"] for row in saved(page, "#export-filtered")}
        assert ids == {f"s{i:03}" for i in np.flatnonzero(who == 2)}
        page.select_option("#group", "")
        page.select_option("#method", "other")
        until(page, "document.getElementById('state').textContent.startsWith('Changed')")
        chosen = {row["example_id"] for row in saved(page, "#export-selection")}
        assert chosen == {f"s{i:03}" for i in np.flatnonzero(sides[1].examples["selected"])}
        page.click("#methods-fold summary")
        until(page, "document.getElementById('methods').textContent.split('other').length > 2")
