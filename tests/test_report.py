"""The report of made-up runs: its numbers, its parts, what it says of missing ones, and how a browser renders it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import torch
from fake_runs import NAMES, fake_run
from scipy import stats

from scripts.report import main
from sphere.checkpoints import read_weights, write_checkpoint
from sphere.commands.common import run_cli
from sphere.errors import SphereError
from sphere.evaluation.summary import percent
from sphere.hypersphere import cosine_distribution, energy_change
from sphere.report import make_report
from sphere.report.collect import labels, load_run, load_runs, measure
from sphere.report.figures import draw, score_and_energy, score_points
from sphere.report.style import PALETTE, drawing, styles
from sphere.report.tables import spearman, tables
from sphere.report.weight_figures import densities, share_rows

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FIGURES = (
    "comparison energy_change score paired whole_model energy_against_score retention cosines downstream "
    "principal_share"
).split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four runs: two methods, each with and without SPHERE."""
    out = tmp_path_factory.mktemp("runs")
    settings = [("AlphaEdit", 0, 0.12), ("AlphaEdit", 0.5, 0.05), ("MEMIT", 0, 0.15), ("MEMIT", 0.5, 0.08)]
    return [fake_run(out, method, beta, harm=harm) for method, beta, harm in settings]


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory):
    return make_report(folders, tmp_path_factory.mktemp("out"), progress=False)


@pytest.fixture
def runs(folders):
    loaded = load_runs(folders)
    measure(loaded, progress=False)
    return loaded


class Tags(HTMLParser):
    """Text of every table cell, images, and whether tags close in order."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.images, self.anchors, self.ids = [], [], [], [], set()
        self.outside = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(attributes)
        if tag in ("td", "th"):
            self.cells.append("")
        if "id" in attributes:
            self.ids.add(attributes["id"])
        if attributes.get("href", "").startswith("#"):
            self.anchors.append(attributes["href"][1:])
        self.outside += [
            v for k, v in attributes.items() if k in ("src", "href") and v[:1] != "#" and "data:" not in v[:5]
        ]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_the_page_is_whole_and_self_contained(page, folders):
    text = page.read_text()
    tags = Tags(text)
    assert tags.open == []
    assert tags.outside == []
    assert set(tags.anchors) <= tags.ids
    assert set(FIGURES) <= tags.ids
    assert len(tags.images) == len(FIGURES)
    for image in tags.images:
        root = ET.fromstring(base64.b64decode(image["src"].partition(",")[2]))
        assert root.tag.endswith("svg")
        assert len(image["alt"]) > 40
    assert "{{" not in text
    assert "nan" not in [cell.strip() for cell in tags.cells]
    commands = [re.sub("<[^>]*>", "", found) for found in re.findall("<pre>(<span>.*?)</pre>", text)]
    for folder in folders:
        assert f"python -m sphere score --weight_folder={folder} --num_tests=50" in commands
    assert commands[0].startswith("python -m sphere edit --ds_name=mcf --num_edits=10 --beta_hse=0")


def test_figures_lie_beside_the_page(page):
    names = {path.name for path in (page.parent / "figures").iterdir()}
    assert names == {f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")}
    assert (page.parent / "figures" / "score.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_tables_show_the_numbers_of_the_runs(page, runs):
    cells = [cell.strip() for cell in Tags(page.read_text()).cells]
    for run in runs:
        assert run.label in cells
        score = run.summary["checkpoints"][-1]["metrics"]["score"]
        assert f"{score['value']:.1f} [{score['low']:.1f}, {score['high']:.1f}]" in cells
        accuracy = run.downstream["checkpoints"]["edit_40"]["tasks"]["nli"]
        low, high = (100 * x for x in accuracy["accuracy_interval"])
        assert f"{100 * accuracy['accuracy']:.1f} [{low:.1f}, {high:.1f}]" in cells
    assert "layer 4, mlp.down_proj" in cells
    assert cells.count("unedited model") == 3  # once in each table of scores: the runs share it


def test_energies_and_cosines_are_those_of_the_weights(runs):
    for run in runs:
        original = read_weights(run.folder / "edit_0.safetensors")
        for n_edits, changes in run.energy_changes.items():
            saved = read_weights(run.folder / f"edit_{n_edits}.safetensors")
            for name, change in changes.items():
                assert change == pytest.approx(energy_change(saved[name], original[name]), rel=1e-6)
        assert list(run.cosines) == [0, 40]
        last = read_weights(run.folder / "edit_40.safetensors")
        parts = [cosine_distribution(last[name]) for name in NAMES]
        pooled = run.cosines[40]
        assert pooled["pairs"] == sum(part["pairs"] for part in parts) == sum(pooled["counts"])
        assert pooled["mean"] == pytest.approx((parts[0]["mean"] + parts[1]["mean"]) / 2)


def test_energies_come_from_the_checkpoints_where_they_were_not_logged(tmp_path, runs):
    folder = tmp_path / "run"
    shutil.copytree(runs[0].folder, folder)
    log = folder / "batches.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for figures in lines[1]["layers"].values():
        del figures["energy"], figures["energy_change"]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = load_run(folder)
    measure([run], progress=False)
    assert list(run.energy_changes) == [10, 20, 30, 40]
    for n_edits, changes in runs[0].energy_changes.items():
        assert run.energy_changes[n_edits] == pytest.approx(changes, rel=1e-6)


def test_weights_that_the_model_stores_transposed_are_turned(tmp_path, runs):
    folder = tmp_path / "gpt2"
    shutil.copytree(runs[0].folder, folder)
    (folder / "batches.jsonl").unlink()
    for n_edits in (0, 10, 20, 30, 40):
        weights = read_weights(folder / f"edit_{n_edits}.safetensors")
        write_checkpoint(folder, n_edits, {name: w.T for name, w in weights.items()})
    config = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**config, "transposed": list(NAMES)}))
    run = load_run(folder)
    measure([run], progress=False)
    assert run.energy_changes[40] == pytest.approx(runs[0].energy_changes[40], rel=1e-6)


def test_spearman_is_scipys(runs):
    points = [point for run in runs for point in score_points(run)]
    assert len(points) == 16
    expected = stats.spearmanr(*zip(*points, strict=True))
    assert spearman(points) == pytest.approx((expected.statistic, expected.pvalue))
    few = [(1.0, 9.0), (2.0, 8.0), (3.0, 7.0), (4.0, 5.0)]
    rho, p = spearman(few)
    assert rho == pytest.approx(-1)
    assert p == pytest.approx(2 / 24)  # exact: 2 of the 24 orders are as extreme
    assert spearman(few[:2]) is None
    assert spearman([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]) is None


def test_densities_hold_all_pairs():
    generator = torch.Generator().manual_seed(0)
    histograms = [cosine_distribution(torch.randn(60, 30, generator=generator), 4000) for _ in range(2)]
    edges, found = densities(histograms)
    assert len(edges) == len(found[0]) + 1 <= 41
    for density in found:
        assert torch.tensor(density).nan_to_num().mul(torch.tensor(edges).diff()).sum() == pytest.approx(
            1, abs=2e-4
        )


def test_shares_are_means_over_the_weights(runs):
    batch = runs[1].batches[0]
    before = [figures["principal_share_before"] for figures in batch["layers"].values()]
    assert share_rows(runs[1])[0][1] == pytest.approx(sum(before) / 2)
    plain, sphere = share_rows(runs[0])[0], share_rows(runs[1])[0]
    assert plain[1] == plain[2]
    assert sphere[1] > sphere[2]


def test_score_and_energy_of_runs_beside_each_other(runs):
    with drawing():
        left, right = score_and_energy(runs[:2]).figure.axes
    labels = [run.label for run in runs[:2]]
    assert left.get_legend_handles_labels()[1] == right.get_legend_handles_labels()[1] == labels
    lines = {line.get_label(): line for line in right.get_lines()}
    for run in runs[:2]:
        assert list(lines[run.label].get_xdata()) == [0, *run.energy_changes]


def test_the_same_runs_give_the_same_files(page, folders):
    first = page.read_bytes()
    assert make_report(folders, page.parent.parent, progress=False) == page
    assert page.read_bytes() == first


# ---- labels and looks ----


def test_labels_say_what_differs(tmp_path):
    made = [fake_run(tmp_path, beta_hse=beta, scored=False, batches=1) for beta in (0, 0.3, 0.5)]
    assert [run.label for run in load_runs([*made, made[0]])] == [
        "AlphaEdit",
        "AlphaEdit + SPHERE, β 0.3",
        "AlphaEdit + SPHERE, β 0.5",
    ]
    more = [fake_run(tmp_path / "b", "MEMIT", seed=9, scored=False, batches=1)]  # its seed need not be said
    assert [run.label for run in load_runs([*made[1:], *more])][-1] == "MEMIT + SPHERE"
    twin = tmp_path / "twin"
    shutil.copytree(made[0], twin)
    assert labels([load_run(made[0]), load_run(twin)])[1] == f"AlphaEdit ({twin})"


def test_runs_differ_in_more_than_colour():
    pairs = styles([("A", False), ("A", True), ("B", False), ("B", True)])
    assert [style.color for style in pairs] == [PALETTE[0]] * 2 + [PALETTE[1]] * 2
    assert [style.dashed for style in pairs] == [True, False, True, False]
    assert pairs[0].marker != pairs[2].marker
    again = styles([("A", True), ("B", True), ("A", True), ("A", False)])
    assert again[0].color == again[3].color
    assert len({style.color for style in again[:3]}) == 3
    many = styles([("A", True)] * 20)
    assert len({(style.color, style.marker) for style in many}) == 20


def test_small_changes_are_in_parts_per_million():
    assert percent(0.0123) == "+1.23 %"
    assert percent(-2.5e-6) == "-2.50 ppm"
    assert percent(0.0) == "+0 %"


def test_kinds_are_not_mixed(tmp_path):
    made = [fake_run(tmp_path, kind=kind, batches=2) for kind in ("counterfact", "zsre")]
    loaded = load_runs(made)
    measure(loaded, progress=False)
    assert [run.label for run in loaded] == ["AlphaEdit + SPHERE, mcf", "AlphaEdit + SPHERE, zsre"]
    with drawing():
        names = [drawn.name for drawn in draw(loaded)]
    assert {"score_counterfact", "score_zsre", "retention_zsre"} <= set(names)
    assert {table.section for table in tables(loaded)} <= {*names, ""}


# ---- missing parts and bad input ----


def test_a_run_that_was_only_edited(tmp_path):
    folder = fake_run(tmp_path, scored=False, downstream=False)
    page = make_report([folder], progress=False)
    assert page == folder / "report" / "report.html"
    text = page.read_text()
    tags = Tags(text)
    assert len(tags.images) == 3  # energies, cosines, shares
    assert "the edits are not scored yet" in text
    assert f"--weight_folder={folder}</span> <span>--ds_name=mcf</span>" in text
    assert "the downstream tasks have not been run" in text


def test_published_checkpoints_alone(tmp_path):
    folder = tmp_path / "MEMIT" / "Llama3-8B" / "mcf_weight_data_batch_100_0.5_0.8"
    folder.mkdir(parents=True)
    for n_edits in (100, 200):
        torch.save({"weight": {name: torch.randn(12, 20) for name in NAMES}}, folder / f"edit_{n_edits}.pth")
    text = make_report([folder], progress=False).read_text()
    assert "MEMIT + SPHERE" in text
    assert "200 sequential edits of Llama3-8B" in text
    for sentence in ("no run.json", "no editing log", "no edit_0"):
        assert sentence in text
    assert Tags(text).images == []
    torch.save({"weight": {name: torch.randn(12, 20) for name in NAMES}}, folder / "edit_0.pth")
    assert len(Tags(make_report([folder], progress=False).read_text()).images) == 2  # energies and cosines


def test_a_scored_run_whose_weights_have_been_removed(tmp_path):
    folder = fake_run(tmp_path)
    (whole,) = load_runs([folder])
    measure([whole], progress=False)
    for path in folder.glob("edit_*"):
        path.unlink()
    (run,) = load_runs([folder])
    measure([run], progress=False)
    assert run.n_edits == whole.n_edits
    assert run.energy_changes == whole.energy_changes
    assert not run.cosines
    assert "its checkpoints have been removed" in make_report([folder], progress=False).read_text()
    shutil.rmtree(folder / "summary")
    with pytest.raises(SphereError, match="No checkpoints"):
        load_run(folder)


def test_the_tables_as_markdown(page, runs):
    text = (page.parent / "tables.md").read_text()
    first, *others = (
        [re.split(r" (?<!\\)\| ?", line[2:])[:-1] for line in block.splitlines() if line[:1] == "|"]
        for block in text.split("## ")[1:]
    )
    head, rule, *rows = first
    assert [row[0] for row in rows] == [run.label for run in runs]
    assert len(rule) == len(head)
    assert all(len({len(row) for row in rows}) == 1 for rows in others)


def test_figures_of_an_earlier_report_are_removed(tmp_path):
    folder = fake_run(tmp_path, batches=1, scored=False)
    figures = make_report([folder], progress=False).parent / "figures"
    assert (figures / "downstream.png").exists()
    shutil.rmtree(folder / "rect_eval")
    make_report([folder], progress=False)
    assert not (figures / "downstream.png").exists()
    assert (figures / "cosines.png").exists()


def test_names_are_escaped(tmp_path):
    folder = fake_run(tmp_path / "<b>&", scored=False, downstream=False, batches=1)
    text = make_report([folder], progress=False).read_text()
    assert "<b>&" not in text
    assert "&lt;b&gt;&amp;" in text


def test_a_last_line_cut_by_a_kill_is_left_out(tmp_path):
    folder = fake_run(tmp_path)
    with (folder / "batches.jsonl").open("a") as log:
        log.write('{"batch": 4, "n_ed')
    assert len(load_run(folder).batches) == 4


@pytest.mark.parametrize(
    "path, content, sentence",
    [
        ("batches.jsonl", "no json\n", "Line 1 of .*batches.jsonl is no batch"),
        ("run.json", "{", "run configuration .* is not valid JSON"),
        (
            "summary/summary.json",
            "[]",
            "summary of scores in .* is not as `sphere score` writes it",
        ),
        ("summary/summary.json", '{"checkpoints": [{}]}', "remove it and score again"),
        ("rect_eval/summary.json", "{}", "downstream summary in .* remove it and score again"),
        ("edit_40.safetensors", "x", "Cannot read the checkpoint"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, path, content, sentence):
    folder = fake_run(tmp_path)
    (folder / path).write_text(content)
    with pytest.raises(SphereError, match=sentence):
        make_report([folder], progress=False)
    assert not (folder / "report").exists()


def test_the_command(tmp_path, capsys):
    runs = [str(fake_run(tmp_path, m, batches=1, scored=False, downstream=False)) for m in ("MEMIT", "ROME")]
    assert main(["--weight_folder", *runs, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"Report: {tmp_path / 'report' / 'report.html'}\n"
    (tmp_path / "empty").mkdir()
    for bad, words in (("nowhere", "No folder"), ("empty", "No checkpoints")):
        with pytest.raises(SystemExit) as stop:
            run_cli(lambda _, bad=bad: main(["--weight_folder", str(tmp_path / bad)]))
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {words}")
        assert error.count("\n") == 1


# ---- in a browser ----

MEASURE = """<script>addEventListener("load", () => {
  const images = [...document.images];
  document.body.setAttribute("data-found", JSON.stringify({
    width: innerWidth, scroll: document.documentElement.scrollWidth, images: images.length,
    loaded: images.filter(i => i.complete && i.naturalWidth > 0).length,
    clipped: [...document.querySelectorAll("h1, h2, h3, p, a")].filter(e => e.scrollWidth > e.clientWidth + 1
      && getComputedStyle(e).display !== "inline").length,
  }));
});</script>"""


def browse(tmp_path, *options):
    """Run headless Chromium."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
    ]
    flags += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to render the page")
@pytest.mark.parametrize("width", [1280, 500])
def test_it_renders(page, tmp_path, width):
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</body>", MEASURE + "</body>"))
    dom = browse(tmp_path, f"--window-size={width},1000", "--dump-dom", copy.as_uri())
    found = json.loads(re.search(r'data-found="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert found["images"] == found["loaded"] == len(FIGURES)
    assert found["scroll"] <= found["width"]  # wide tables scroll in their own frame, the page does not
    assert found["clipped"] == 0


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to render the page")
def test_a_screenshot_shows_the_figures(page, tmp_path):
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    browse(tmp_path, "--window-size=1280,3000", f"--screenshot={shot}", page.as_uri())
    pixels = imread(shot)[:, :, :3]
    assert pixels.shape == (3000, 1280, 3)
    for colour in PALETTE[:2]:
        rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        near = (torch.tensor(pixels) - rgb).abs().amax(2) < 0.02
        assert int(near.sum()) > 300, f"{colour} does not show"
