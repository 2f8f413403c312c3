"""The report: history read back, curves drawn, a page that stands alone; and the compressors beside the model."""

import bz2
import html.parser
import json
import lzma
import math
import random
import re
import zlib
from pathlib import Path

import pytest

from llmjax.config import InputError
from llmjax.data import Data, InMemory, TokenShards
from llmjax.eval import compressors
from llmjax.report import history, page, plots
from llmjax.report.history import Series


def write_metrics(run_dir: Path, rows: list[dict[str, object]], tail: str = "") -> Path:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return run_dir


# ---- history ---------------------------------------------------------------------------------------------------------


def test_history_is_one_series_a_metric(tmp_path: Path) -> None:
    """Steps in order, the later line of a step counts, words and nulls are no series, a torn last line is no line."""
    rows = [
        {"step": 2, "loss": 3.0, "note": "x", "mfu": None},
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 2.5, "val_nll": 2.7},
    ]
    found = history.read(write_metrics(tmp_path / "run", rows, tail='{"step": 3, "lo'))
    assert found == {"loss": Series([1, 2], [4.0, 2.5]), "val_nll": Series([2], [2.7])}


def test_a_directory_without_history_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no metrics.jsonl"):
        history.read(tmp_path)


def test_points_that_cannot_be_drawn_are_left_out() -> None:
    assert history.finite(Series([1, 2, 3], [1.0, math.nan, math.inf])) == Series([1], [1.0])


# ---- curves ----------------------------------------------------------------------------------------------------------

RUN = {
    "loss": Series([10, 20, 30], [4.0, 3.0, 2.5]),
    "val_nll": Series([30], [2.7]),
    "tokens_per_second": Series([10, 20, 30], [900.0, 1000.0, 950.0]),
}


def test_panels_with_data_become_png_files(tmp_path: Path) -> None:
    """The PNG signature and a readable size; panels without data make no file."""
    files = plots.save({"one": RUN}, tmp_path / "plots")
    assert [file.name for file in files] == ["loss.png", "throughput.png"]
    for file in files:
        data = file.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(data[16:20], "big") >= 700


def test_curves_show_the_points_that_were_logged() -> None:
    """The lines of the figure hold exactly the series; several runs share a panel, a line each."""
    panel = plots.PANELS[0]
    axes = plots.figure(panel, {"one": RUN}).axes[0]
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
    assert drawn == [(RUN["loss"].steps, RUN["loss"].values), (RUN["val_nll"].steps, RUN["val_nll"].values)]
    both = plots.figure(panel, {"one": RUN, "two": RUN}).axes[0]
    assert [text.get_text() for text in both.get_legend().get_texts()] == [
        "one, training",
        "one, held out",
        "two, training",
        "two, held out",
    ]


# ---- the page --------------------------------------------------------------------------------------------------------


class Outline(html.parser.HTMLParser):
    """Checks that tags close in order, and collects what a browser would fetch and show."""

    EMPTY = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        assert tag != "script"
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "<script>alert('x')</script> & \x1b[31m \ud800 ünï"


def outline(document: page.Page) -> Outline:
    parser = Outline()
    parser.feed(page.render(document))
    assert parser.open == []
    return parser


def test_the_page_stands_alone_and_shows_text_as_text() -> None:
    """Tags are balanced, nothing is fetched, what a model writes is shown and never run."""
    document = page.Page(
        title=HOSTILE,
        history=RUN,
        figures=[("held-out bits per byte", "1.95")],
        comparison=[("", "alone"), (HOSTILE, "2.3")],
        comparison_note="note",
        samples=[("The for", HOSTILE)],
        arithmetic=[("tokens", "5")],
        config=[("train.steps", "4", HOSTILE)],
        origin=[("command", HOSTILE)],
    )
    found = outline(document)
    assert len(found.links) == 2
    assert all(link.startswith("data:image/svg+xml;base64,") for link in found.links)
    shown = HOSTILE.replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    assert found.text.count(shown) == 6
    assert not re.search(r"url\(|@import|https?:", page.STYLE)


def test_parts_without_content_are_left_out(tmp_path: Path) -> None:
    """A page of a title alone has no headings below it; it is written under its name and leaves nothing else."""
    assert "<h2>" not in page.render(page.Page(title="bare"))
    assert page.write(page.Page(title="bare"), tmp_path) == tmp_path / "report.html"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


# ---- compressors -----------------------------------------------------------------------------------------------------

KEYWORDS = ("for", "while", "yield", "lambda", "class", "def", "return", "import", "pass", "raise")
WORDS = " ".join(random.Random(0).choices(KEYWORDS, k=3000))
TRAINING, HELD_OUT = WORDS[:12000].encode(), WORDS[12000:].encode()


def test_sizes_are_the_libraries_own() -> None:
    """Against the one-call functions of the standard library; with a dictionary the stream must unpack to the text."""
    assert compressors.zlib_size(HELD_OUT) == len(zlib.compress(HELD_OUT, 9))
    assert compressors.bz2_size(HELD_OUT) == len(bz2.compress(HELD_OUT, 9))
    assert compressors.xz_size(HELD_OUT) == len(lzma.compress(HELD_OUT, preset=9 | lzma.PRESET_EXTREME))
    packer = zlib.compressobj(9, zlib.DEFLATED, 15, 8, zlib.Z_DEFAULT_STRATEGY, TRAINING)
    stream = packer.compress(HELD_OUT) + packer.flush()
    assert zlib.decompressobj(zdict=TRAINING).decompress(stream) == HELD_OUT
    assert compressors.zlib_size(HELD_OUT, TRAINING) == len(stream)


def test_rates_obey_what_must_hold() -> None:
    """Random bytes cannot be compressed; text that was seen in training costs next to nothing; training text helps."""
    noise = random.Random(1).randbytes(4000)
    for rate in compressors.rates(noise, b"").values():
        assert rate.alone >= 8
    for rate in compressors.rates(noise, noise).values():
        assert rate.given_training_text < 0.5 * rate.alone
    for rate in compressors.rates(HELD_OUT, TRAINING).values():
        assert 0 < rate.given_training_text < rate.alone < 8
    with pytest.raises(ValueError, match="no held-out bytes"):
        compressors.rates(b"", TRAINING)


def test_texts_are_the_documents_up_to_a_limit(tmp_path: Path) -> None:
    """The splits together are the documents; beyond the limit, or without text, there is no comparison."""
    texts = tuple(f"document {n}: ünïcode {n * n}" for n in range(30))
    data = Data(source=InMemory(texts=texts, holdout=0.3), cache_dir=str(tmp_path))
    held_out, training = compressors.text(data, "validation"), compressors.text(data, "train")
    assert sorted(held_out + training) == sorted("".join(texts).encode())
    assert compressors.compare(data) == compressors.rates(held_out, training)
    assert compressors.compare(data, limit=len(held_out) - 1) is None
    assert compressors.compare(Data(source=InMemory(texts=texts, holdout=0.0), cache_dir=str(tmp_path))) is None
    assert compressors.text(Data(source=TokenShards(), cache_dir=str(tmp_path)), "train") is None
