"""The report as a reader's browser sees it, of whole and of half-written runs."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from trivium import objectives
from trivium.datasets.registry import InputError
from trivium.evals.charts import Series, line_chart, scatter, smooth, ticks
from trivium.evals.curves import learning_curves
from trivium.evals.diagnostics import tsne
from trivium.evals.record import read_run
from trivium.evals.report import duration, status, wilson, write_comparison, write_report
from trivium.pretrain.loop import exchange

VOID = {"meta", "link", "br", "img", "hr", "input"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
SECTIONS = {"retrieval", "examples", "curves", "space", "run"}


class Page(HTMLParser):
    """Checks that elements nest; collects sections, text, attributes and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.tags, self.sections, self.words, self.attributes = [], [], set(), [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag == "section":
            self.sections.add(dict(attrs).get("id"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def assert_self_contained(path: Path) -> None:
    page, source = Page(path), path.read_text(encoding="utf-8")
    assert not {"script", "iframe", "object", "embed", "img"} & set(page.tags)
    for tag, key, value in page.attributes:
        if key in ("src", "href", "action", "srcset"):
            assert value.startswith("data:"), (tag, key, value)
        assert not key.startswith("on"), f"<{tag} {key}> runs a script"
    assert all(address.startswith("data:image/jpeg;base64,") for address in re.findall(r'url\("?([^")]*)', source))
    assert not re.search(r"@import|https?://", source)


def test_a_finished_run(run):
    path = write_report(run)
    assert path == run / "report.html"
    assert_self_contained(path)
    page = Page(path)
    assert page.sections == SECTIONS
    for words in ("tiny", "gram", "40 of 40", "finished", "text → video", "text → video + audio", "chance",
                  "13 queries", "Learning curves", "Geometry: gap", "Throughput", "by modality",
                  "by class (4 buckets)", "cut <short>", "2 <cores>", "seed: 3", "R@1 on val by volume",
                  "Recall at k"):  # fmt: skip
        assert words in page.text, words
    assert "have not" not in page.text and "No evaluation" not in page.text
    assert page.text.count(" a <b>") >= 8 * 6  # captions of eight queries and five clips each, as text, not as markup
    assert not any(path.name.startswith(".") for path in run.iterdir())  # no temporary file is left


@pytest.mark.skipif(BROWSER is None, reason=f"looks at the page in a browser: {', '.join(BROWSERS)}; none is here")
def test_a_browser_has_nothing_to_complain_about(run, tmp_path):
    write_comparison([run, run], tmp_path / "comparison.html")
    for page, words in ((write_report(run), "How it ended"), (tmp_path / "comparison.html", "Side by side")):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        command = [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert words in done.stdout
        assert "CONSOLE" not in done.stderr


def charts(run: Path) -> dict[str, list[str]]:
    """The curves of each chart of the run's report, by the chart's title."""
    found = {}
    for chart in learning_curves(read_run(run)):
        names = re.findall(r'class="line"[^>]*><title>([^<]*)', chart["svg"])
        found[chart["title"]] = list(dict.fromkeys(names))
    return found


def test_the_fixtures_record_has_the_names_that_training_logs(run):
    one_process, record = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1)), read_run(run)
    names = exchange(one_process, objectives.build("gram")(objectives.Embeddings(record.embeddings.z)))[0]
    assert list(names) == record.keys("loss")


def test_what_is_no_part_of_the_loss_is_not_drawn_among_its_parts(run):
    found = charts(run)
    assert found["Loss by modality"] == ["text-tuple", "tuple-text"]
    assert found["Objective: temperature"] == found["Objective: volume"] == ["whole"]
    assert "Objective: temperature" in Page(write_report(run)).text


@pytest.mark.parametrize(
    ("parts", "expected"),
    [(["uniformity/text", "uniformity/video", "alignment", "centroid_uniformity"],
      {"Objective: uniformity": ["text", "video"], "Objective: alignment": ["whole"],
       "Objective: centroid uniformity": ["whole"]}),
     (["text-video", "text-audio", "temperature", "bias"],
      {"Loss by modality": ["text-video", "text-audio"], "Objective: temperature": ["whole"],
       "Objective: bias": ["whole"]}),
     (["text-video/negative", "text-video/positive", "text-audio/negative"],
      {"Objective: negative": ["text-video", "text-audio"], "Objective: positive": ["text-video"]}),
     (["infonce", "infonce/text-video", "infonce/temperature", "context"],
      {"Objective: infonce": ["whole", "text-video"], "Objective: infonce temperature": ["whole"],
       "Objective: context": ["whole"]})],
    ids=["unialign", "siglip", "bucket", "sum"],
)  # fmt: skip
def test_each_kind_of_quantity_has_a_chart_of_its_own(run, parts, expected):
    lines = [{"step": step, "loss": 1.0, **{f"loss/{part}": 0.5 for part in parts}} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert charts(run) == {"Loss": ["loss"], **expected}


def test_the_geometry_says_its_tau_and_its_items(run):
    text = Page(write_report(run)).text
    assert text.count("zeta, chi and Hölder divergence are taken at tau = 0.07") == 2  # the curves and the numbers
    assert "13 items, 1 text, 1 video, 1 audio missing, test split, final evaluation." in text


def test_the_unreadable_samples_of_an_evaluation_are_listed(run):
    page = Page(write_report(run))
    assert "Skipped samples (2)" in page.text  # one of training, one of the test split
    assert "test 5 clip5 test-000001.tar 512 cut short" in page.text
    assert "13 items; 1 unreadable; relevance: bucket" in page.text
    (run / "skipped.jsonl").write_text((run / "evals/test/skipped.jsonl").read_text())
    assert len(read_run(run).skipped) == 1  # the same sample, named twice


def test_frames_are_those_of_the_shards(run):
    from PIL import Image

    source = write_report(run).read_text()
    films = re.findall(r"base64,([A-Za-z0-9+/=]+)", source)
    assert 5 <= len(films) <= 12
    strips = [Image.open(io.BytesIO(base64.b64decode(film))) for film in films]
    assert {strip.size for strip in strips} == {(8 * 112, 112)}
    assert all(max(strip.getextrema()[0]) > 180 for strip in strips)  # the bright bar
    assert "Frames of" not in source


def test_hits_are_the_clips_of_the_querys_bucket(run):
    source = write_report(run).read_text()
    queries = source.split('<div class="query">')[1:]
    assert len(queries) == 8
    for query in queries:
        asked = re.search(r'class="said">a &lt;b&gt;(\d)', query)[1]
        clips = re.findall(r'<figure class="clip (hit|miss)">.*?aria-label="a &lt;b&gt;(\d)', query, flags=re.S)
        assert len(clips) == 5
        assert [kind for kind, _ in clips] == ["hit" if found == asked else "miss" for _, found in clips]


def test_missing_shards_are_named(run):
    card = json.loads((run / "evals/test/results.json").read_text())
    (run / "evals/test/results.json").write_text(json.dumps(card | {"shards": "/nowhere/test-*.tar"}))
    page = Page(write_report(run))
    assert "No frames: no shards match '/nowhere/test-*.tar'" in page.text
    assert "first hit at rank" in page.text  # the captions are still there


def test_shards_that_changed_are_not_shown(run):
    items = json.loads((run / "evals/test/embeddings.json").read_text())
    items["keys"] = [f"other{key}" for key in items["keys"]]
    (run / "evals/test/embeddings.json").write_text(json.dumps(items))
    source = write_report(run).read_text()
    assert "the shards have changed since the evaluation" in source and "base64" not in source


@pytest.mark.parametrize(
    ("gone", "words"),
    [("config.yaml", "config.yaml is not there"), ("environment.json", "environment.json is not there"),
     ("exit.json", "running, or killed"), ("metrics.jsonl", "No step has been logged yet"),
     ("skipped.jsonl", "Skipped samples (1)"), ("evals", "val split at step 40")],
)  # fmt: skip
def test_a_missing_piece_is_named(run, gone, words):
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    written = write_report(run)
    assert_self_contained(written)
    page = Page(written)
    assert words in page.text and page.sections == SECTIONS


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "config.yaml").write_text("name: young\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    page = Page(write_report(tmp_path))
    assert page.sections == SECTIONS
    assert "Not evaluated yet" in page.text and "No t-SNE" in page.text and "No throughput" in page.text
    assert "svg" in page.tags


def test_a_run_that_failed(run):
    (run / "exit.json").write_text(json.dumps({"outcome": "failed", "error": "loss <nan> at step 7", "exit_code": 2}))
    with (run / "evals.jsonl").open("a") as file:
        file.write(
            '{"step": 41, "split": "val", "task": "retrieval", "metrics": {}, "protocol": {}, "error": "no room"}\n'
        )
    shutil.rmtree(run / "evals")
    page = Page(write_report(run))
    assert "failed with exit code 2: loss <nan> at step 7" in page.text
    assert "The evaluation failed: no room" in page.text
    assert "retrieval on val at step 41" in page.text


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no config"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not YAML"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("ending", "kind"),
    [({"outcome": "finished", "error": None, "exit_code": 0}, "good"), ({"outcome": "stopped", "exit_code": 0}, "open"),
     ({"outcome": "failed", "error": "x", "exit_code": 1}, "bad"), ({"unreadable": "exit.json is not JSON"}, "open")],
)  # fmt: skip
def test_status(run, ending, kind):
    (run / "exit.json").write_text(json.dumps(ending))
    assert status(read_run(run))[0] == kind


def test_a_repeated_step_counts_once_and_the_last_one_wins(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "loss": 7.0, "step_seconds": 0.08}\n')
    record = read_run(run)
    assert len(record.metrics) == 40 and record.curve("loss")[1][-1] == 7.0
    assert record.training_seconds() == pytest.approx(40 * 0.08)


def test_comparison(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    card = json.loads((other / "evals/test/results.json").read_text())
    metrics = card["tasks"][0]["metrics"]
    was = [f"{metrics[f'{row}/R@1']:.1f}" for row in ("text->video/cosine", "text->video+audio/volume")]
    level = f"{card['tasks'][0]['protocol']['rows']['text->video/cosine']['chance']['R@1']:.1f}"
    metrics["text->video/cosine/R@1"], metrics["text->video+audio/volume/R@1"] = 100.0, 0.0
    (other / "evals/test/results.json").write_text(json.dumps(card))
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.yaml").write_text("name: young\n")
    out = tmp_path / "out" / "comparison.html"
    text = write_comparison([run, other, young], out)
    assert_self_contained(out)
    lines = {re.split(r"\s{2,}", line)[0]: re.split(r"\s{2,}", line)[1:] for line in text.splitlines()}
    # two are called "tiny", so folders tell the runs apart
    assert lines["R@1, percent"] == ["a run", "other", "young", "chance", "queries / gallery / missing"]
    assert lines["text → video, cosine"] == [was[0], "100.0*", "n/a", level, "13 / 12 / 1"]
    assert lines["text → video + audio, volume"] == [f"{was[1]}*", "0.0", "n/a", level, "13 / 12 / 1"]
    assert lines["training time"] == ["3.2 s", "3.2 s", "n/a"]
    assert lines["measured on"] == ["test split", "test split", "not evaluated yet"]
    assert lines["items, unreadable"] == ["13, 1", "13, 1", "n/a, n/a"]
    digest = card["split_sha256"][:12]
    assert lines["split sha256"] == [digest, digest, "n/a"]
    assert "zeta" in lines and lines["tau of zeta, chi, Hölder divergence"] == ["0.07", "0.07", "n/a"]
    page = Page(out)
    assert "100.0" in page.text and "Geometry" in page.text


def test_wilson_interval():
    # the limits are the shares p from which the measured one is 1.96 standard errors away
    for percent, n in ((0, 20), (37.5, 16), (92.4, 500), (100, 50)):
        for limit in wilson(percent, n):
            p, q = limit / 100, percent / 100
            assert abs(q - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-9)


def test_duration():
    assert [duration(s) for s in (8.13, 125, 3725)] == ["8.1 s", "2 min 05 s", "1 h 02 min"]


def test_ticks_are_round_and_cover_the_range():
    for low, high in ((0, 1), (-3.2, -0.4), (1e-5, 4e-5), (0, 0), (5, 5), (12, 98_000)):
        found = ticks(low, high)
        slack = 1e-9 * (high - low)
        assert found[0] <= low + slack and found[-1] >= high - slack and 3 <= len(found) <= 9
        step = found[1] - found[0]
        assert min(abs(step / 10 ** math.floor(math.log10(step) + 1e-9) - m) for m in (1, 2, 2.5, 5)) < 1e-6


def test_charts_bear_gaps_and_nothing():
    assert line_chart([], label="x") == "" and line_chart([Series("a", [1, 2], [None, float("nan")])], label="x") == ""
    svg = line_chart([Series("a<b", [1, 2, 3, 4], [1.0, None, 3.0, 2.0])], label="x")
    assert svg.count("<path") == 2 and "a&lt;b" in svg
    assert scatter([], [], label="x") == ""
    assert "nan" not in scatter([(1.0, 1.0), (1.0, 1.0)], ["red", "red"], label="x")


def test_smoothing_keeps_a_straight_line_and_gaps():
    line = [2.0 * i for i in range(50)]
    assert smooth(line) == pytest.approx(line)
    assert smooth([1.0, None, 3.0])[1] is None


def test_tsne_is_the_same_each_time_and_leaves_out_what_is_missing(run):
    embeddings = read_run(run).embeddings
    first, second = tsne(embeddings), tsne(embeddings)
    assert (first.xy == second.xy).all() and first.xy.shape == (36, 2)
    assert 5 not in first.item.tolist() and first.modality.count("video") == 12
    few = tsne(embeddings, max_items=4)
    assert len(few.xy) == len(few.item) <= 12
