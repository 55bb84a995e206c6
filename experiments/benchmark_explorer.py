"""How fast the explorer answers in headless Chromium, on a synthetic run.

    python experiments/benchmark_explorer.py --workdir=runs/explorer [--rows=20000] [--two] [--json]

Makes the artifacts of a run of so many rows of --characters (words of the shipped sample in random
order), writes its report, serves it, and times in the browser, from the event to the end of the
frame that shows the answer: the page from its address until all rows are drawn, then filters, zoom,
hover, budgets and the reading of a row. The median and the worst of --repeats are printed.

Needs Chromium (`apt-get install chromium`) and `pip install playwright`, which no extra brings.
"""

import dataclasses
import json
import pathlib
import shutil
import statistics
import threading
import time

import numpy as np
from absl import flags

from diq_jax import config, errors
from diq_jax.commands import cli
from diq_jax.data import sources
from diq_jax.report import compare, inputs, server
from diq_jax.report import stage as report
from diq_jax.run import artifacts, devices, stages

WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is made; kept and used again.")
ROWS = flags.DEFINE_integer("rows", 20_000, "Of the pool.", lower_bound=100)
CHARACTERS = flags.DEFINE_integer("characters", 2500, "Of each row.", lower_bound=100)
REPEATS = flags.DEFINE_integer("repeats", 9, "Of each action.", lower_bound=1)
TWO = flags.DEFINE_bool("two", False, "Time the page of two runs: this one, and a random order.")
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")

# Notes when the rows are drawn; lets a pointer made by a script be captured; times an action.
BEFORE = """
Element.prototype.setPointerCapture = () => {};
new MutationObserver((_, seen) => {
  if (!document.getElementById("explorer")?.dataset.ready) return;
  seen.disconnect();
  requestAnimationFrame(() => setTimeout(() => { window.drawn = performance.now(); }));
}).observe(document, { subtree: true, childList: true, attributes: true });
// What an event asks of the next frame is asked before this.
window.frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
window.by = id => document.getElementById(id);
window.set = (id, value) => {
  by(id).value = value;
  for (const kind of ["input", "change"]) by(id).dispatchEvent(new Event(kind, { bubbles: true }));
};
window.point = (kind, x, y) => {
  const box = by("marks").getBoundingClientRect();
  by("marks").dispatchEvent(new PointerEvent(kind,
    { clientX: box.left + x * box.width, clientY: box.top + y * box.height, bubbles: true }));
};
window.press = key =>
  by("marks").dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
"""
# {name: (what is done in turn k, what must hold when it is answered, what is undone)}
ACTIONS = {
    "nothing: one frame": ("", "", ""),
    "filter: selected": ('set("only", "selected")', "", 'set("only", "")'),
    "filter: a source": ('by("group").selectedIndex = 1 + k % 2; set("group", by("group").value)',
                         "", 'set("group", "")'),
    "filter: a range": ('set("range", "tokens"); set("low", 100 + k)', "", 'set("low", "")'),
    "sort by influence": ('document.querySelectorAll("#headers button")[5].click()', "", ""),
    "zoom in": ('press("+")', "", 'press("0")'),
    "zoom out to the whole": ('press("0")', "", 'press("+")'),
    "move": ('press("ArrowLeft")', "", 'press("ArrowRight")'),
    "hover": ('point("pointermove", 0.3 + 0.04 * k, 0.5)', "", ""),
    "lasso": ('by("lasso").click(); point("pointerdown", .3, .3); point("pointermove", .7, .3); '
              'point("pointermove", .7, .7); point("pointermove", .3, .7); '
              'point("pointerup", .3, .7)', "", 'by("lasso").click(); by("unlasso").click()'),
    "budget": ('set("percent", 2 + k)', "", ""),
    "method": ('set("method", "random")', "", 'set("method", "diq")'),
    "a threshold, dragged": ('drag(k)', "", ""),
    "color by influence": ('set("color", "influence")', "", 'set("color", "selected")'),
    "axis: tokens": ('set("x", "tokens")', "", 'set("x", "difficulty")'),
    "read a row": ('window.was = location.hash; '
                   'document.querySelectorAll("#lines .line")[k].click()',
                   'location.hash !== was && by("reader").textContent.length > 500', ""),
    "next row": ('window.was = by("reader").textContent; document.body.dispatchEvent('
                 'new KeyboardEvent("keydown", { key: "j", bubbles: true }))',
                 'by("reader").textContent !== was', ""),
    "search, first answer": ('set("search", ["renal", "fever"][k % 2])',
                             '!by("count").textContent.startsWith(all)', 'set("search", "")'),
    "search, all rows": ('set("search", ["dose", "child"][k % 2] + k)',
                         'by("progress").textContent === "" && '
                         '!by("count").textContent.startsWith(all)', 'set("search", "")'),
}  # fmt: skip
DRAG = """
window.drag = k => {
  const canvas = by("marks");
  if (k === 0) {
    for (let x = 0.1; x < 1; x += 0.002) {
      point("pointermove", x, 0.2);
      if (canvas.style.cursor !== "ew-resize") continue;
      point("pointerdown", x, 0.2);
      window.at = x;
      break;
    }
  }
  point("pointermove", window.at + 0.01 * (k + 1), 0.2);
};
"""
TIMED = """async ([act, holds]) => {
  const started = performance.now();
  new Function("k", act[0])(act[1]);
  await frame();
  while (holds && !new Function(`return ${holds}`)()) await frame();
  return performance.now() - started;
}"""


def make_run(workdir: pathlib.Path) -> stages.Context:
    """Writes the artifacts that a report reads, of rows that have no meaning."""
    rng, n = np.random.default_rng(0), ROWS.value
    settings = config.default()
    settings.update({"model": {"path": "none"}})  # of which nothing is read
    cfg = config.resolve(settings)
    context = stages.Context(cfg, workdir, devices.make_placement(cfg.parallel))
    pool = sources.load_examples("sample")
    words = np.array(sorted({w for e in pool for w in f"{e.question} {e.reasoning}".split()}))
    each = CHARACTERS.value // (1 + int(np.mean([len(w) for w in words])))
    shares = (each * 15 // 100, each * 75 // 100, each * 10 // 100)
    texts = [[" ".join(rng.choice(words, k)) for k in shares] for _ in range(n)]
    ids = [f"row-{i:06}" for i in range(n)]
    columns = dict(zip(("question", "reasoning", "answer"), zip(*texts, strict=True), strict=True))
    tokens = rng.integers(60, 900, n).astype(np.int32)
    difficulty = np.clip(rng.normal(3, 0.8, n), 1, 5).astype(np.float32)
    influence = (rng.standard_t(4, n) - 0.002 * tokens).astype(np.float32)
    cuts = float(np.median(difficulty)), float(np.median(influence))
    quadrant = (1 + (difficulty < cuts[0]) + 2 * (influence < cuts[1])).astype(np.int8)
    rank = np.empty(n, np.int32)
    rank[np.lexsort((np.arange(n), -difficulty, -influence, quadrant))] = np.arange(1, n + 1)
    of = {"example_id": ids}
    source = rng.choice(["notes", "exams", "papers"], n).tolist()
    rows = [
        json.dumps({"id": i, "source": s} | dict(zip(columns, text, strict=True)))
        for i, s, text in zip(ids, source, texts, strict=True)
    ]
    pool_columns = columns | {"source": source, "row": rows}
    written = {
        "prepare/pool.parquet": pool_columns | dict.fromkeys(("input_ids", "labels"), [[1]] * n),
        "influence/influence.parquet": {
            "influence": influence, "loss": rng.gamma(9, 0.3, n).astype(np.float32),
            "tokens": tokens,
        },
        "selection/selection.parquet": {
            "difficulty": difficulty, "influence": influence, "quadrant": quadrant, "rank": rank,
            "selected": rank <= n // 100, "why": [f"place {r}" for r in rank],
        },
        "selection/baselines.parquet": {
            "diq": rank, "random": (rng.permutation(n) + 1).astype(np.int32),
        },
    }  # fmt: skip
    for name, found in written.items():
        artifacts.write_table(workdir / name, of | found)
    limits = dict(zip(("difficulty", "influence"), cuts, strict=True))
    artifacts.write_json(workdir / "selection/thresholds.json", limits)
    return context


def compare_with_random(context: stages.Context, folder: pathlib.Path) -> None:
    """Writes the page of the run against its rows in random order."""
    examples, rows = inputs.read_examples(context.workdir)
    ranks = context.table("selection/baselines.parquet")["random"].to_numpy()
    other = dict(examples) | {"rank": ranks, "selected": ranks <= ROWS.value // 100}
    by = (("diq", examples), ("random", other))
    sides = [compare.Side(name, context.config, columns, rows) for name, columns in by]
    compare.write(folder, (sides[0], sides[1]))


def measure(address: str, browser: str) -> dict[str, list[float]]:
    """Opens the page and times ACTIONS: {name: milliseconds}."""
    from playwright import sync_api

    found: dict[str, list[float]] = {}
    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        # The page allows no evaluation of texts, which the actions need.
        context = started.new_context(viewport={"width": 1400, "height": 900}, bypass_csp=True)
        context.add_init_script(BEFORE + DRAG)
        for _ in range(3):
            page = context.new_page()
            page.goto(address)
            page.wait_for_function("window.drawn", timeout=120_000)
            paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"
            for name, value in (("first paint", paint), ("all rows drawn", "window.drawn")):
                found.setdefault(name, []).append(page.evaluate(value))
        page.evaluate(f"window.all = '{ROWS.value:,} of'")
        page.evaluate("by('explorer').scrollIntoView({ behavior: 'instant' })")
        for name, (act, holds, undo) in ACTIONS.items():
            if TWO.value and "threshold" in name:
                continue  # two runs are shown without
            for k in range(REPEATS.value):
                found.setdefault(name, []).append(page.evaluate(TIMED, [[act, k], holds]))
                if undo:
                    page.evaluate(f"async () => {{ {undo}; await frame(); await frame(); }}")
            page.evaluate("() => { point('pointerup', .9, .9); by('reset').click(); press('0'); }")
        started.close()
    return found


def main() -> None:
    """Makes the run, unless it is there, and measures."""
    cli.require(WORKDIR)
    workdir = cli.folder(WORKDIR)
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        raise errors.UserError("there is no Chromium: apt-get install chromium.")
    folder = workdir / ("compared" if TWO.value else "report")
    page = folder / server.PAGE
    if not page.exists():
        context = make_run(workdir)
        began = time.perf_counter()
        if TWO.value:
            compare_with_random(context, folder)
        else:
            report.run(dataclasses.replace(context, workdir=workdir))
        print(f"report of {ROWS.value:,} rows: {time.perf_counter() - began:.1f} s")
    beside = sum(path.stat().st_size for path in page.parent.glob("rows/*"))
    print(f"page {page.stat().st_size / 2**20:.1f} MiB, files beside it {beside / 2**20:.1f} MiB")
    with server.open_server(str(folder), 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        found = measure(f"http://127.0.0.1:{serving.server_address[1]}/{server.PAGE}", browser)
        serving.shutdown()
    if JSON.value:
        print(json.dumps(found))
        return
    print(f"{'ms':<24}{'median':>8}{'worst':>8}")
    for name, values in found.items():
        print(f"{name:<24}{statistics.median(values):>8,.0f}{max(values):>8,.0f}")


if __name__ == "__main__":
    cli.run(main)
