import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from tests.evaluate.results import report, rows, way
from twinlora.errors import InputError
from twinlora.evaluate import html
from twinlora.evaluate.report import Report, load, save


class Ids(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.ids, self.stack = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []


@pytest.fixture(scope="module")
def full() -> Report:
    return report(way("base", rows(0.0)), way("lora", rows(0.8)), way("qlora", rows(0.7)), way("full", rows(0.9)))


def test_page_stands_alone_and_holds_the_figures(full):
    page = html.render(full)
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", page)
    for text in (
        "80.0 %",
        "70.0 %",
        "90.0 %",
        "269 MB",
        "2.00 GB",
        "general text: loss before → after",
        "1 min 01 s",
        full.verdict.sentence.split(" by ")[0],
    ):
        assert text in page, text
    ids = Ids(page).ids
    assert len(ids) == len(set(ids)), "ids of several drawings clash"
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(drawing.replace("xlink:href", "href"))
        assert "#0" not in drawing, "a colour that does not follow the theme"


def test_every_metric_field_and_forgetting_stand_on_the_page():
    ways = [
        way("base", [0.0] * 50, "json-fields"),
        way("lora", [0.5, 1.0] * 25, "json-fields", rise=0.1, fields={"team": 0.83}),
    ]
    ways[0].fields["team"] = 0.0
    ways[1].scores["chrf"] = ways[0].scores["chrf"] = ways[1].scores["json-fields"].model_copy(update={"value": 0.613})
    page = html.render(report(*ways))
    rise = ways[1].general
    for text in (
        "JSON fields, 6",
        "61.3 %",
        "team",
        "83.0 %",
        f"{rise.before:.3f} → {rise.after:.3f}",
        "(1.65)",
        "means over the rows",
    ):
        assert text in page, text
    assert re.search(r"<small>\+0\.1\d\d \(\+0\.1", page)


def test_model_output_is_escaped(full):
    page = html.render(full)
    assert "<b>bold</b>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "</script>" not in page


def test_the_same_report_gives_the_same_page(full):
    assert html.render(full) == html.render(full)


@pytest.mark.parametrize("methods", [[], ["lora"], ["lora", "qlora"]])
def test_pages_of_fewer_methods(methods):
    page = html.render(report(way("base", rows(0.1)), *(way(m, rows(0.8)) for m in methods)))
    assert ("Difference between methods" in page) == (len(methods) > 1)
    assert ("Learning-rate search" in page) == bool(methods)


def test_report_round_trip_and_damage(full, tmp_path):
    save(full, tmp_path / "report.json")
    assert load(tmp_path / "report.json") == full
    (tmp_path / "bad.json").write_text('{"title": 3}')
    with pytest.raises(InputError, match=r"bad.json: not a comparison report(.|\n)*model_parameters: Field required"):
        load(tmp_path / "bad.json")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "none.json")


def test_the_printed_table_is_whole_where_stdout_is_no_terminal(full, capsys):
    from twinlora.cli.compare import show

    show(full)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["base", "lora", "qlora", "full"]
    assert any(line.startswith("exact match") and "80.0% (73.9–85.0)" in line for line in lines)
    assert not any("…" in line for line in lines)
