"""Each metric against its library, or against cases made by hand."""

import importlib.util
import json
from typing import get_args

import pytest

from tests.conftest import chat, write_jsonl
from twinlora.cli.main import main
from twinlora.config.values import AnswerMetric
from twinlora.data.formats import Row
from twinlora.errors import BackendError, DataError
from twinlora.evaluate import scores
from twinlora.evaluate.metrics import Prediction
from twinlora.evaluate.scores import METRICS

PAIRS = [
    ("The cat sat on the mat.", "A cat sat on my mat!"),
    ("Rust_never sleeps: 24 hours", "rust never sleeps, 24 hours a day"),
    ("one", ""),
    ("same words here", "same words here"),
]
CHINESE = [("今天天气很好，我们去公园。", "今天天气不好，我们在家。"), ("高血压患者应少吃盐", "高血压患者应少吃盐")]


def test_the_options_name_exactly_the_registry():
    assert set(get_args(AnswerMetric)) == set(METRICS)


@pytest.mark.parametrize("expected, output", PAIRS + CHINESE)
def test_chrf_is_sacrebleus(expected, output):
    sacrebleu = pytest.importorskip("sacrebleu")
    assert METRICS["chrf"].score(expected, output) == pytest.approx(
        sacrebleu.sentence_chrf(output, [expected]).score / 100
    )


@pytest.mark.parametrize("expected, output", PAIRS)
def test_rouge_l_is_rouge_scores_own_where_words_are_english(expected, output):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    stock = rouge_scorer.RougeScorer(["rougeL"]).score(expected, output)["rougeL"].fmeasure
    assert METRICS["rouge-l"].score(expected, output) == pytest.approx(stock)


def test_rouge_l_reads_chinese_by_character_and_mixed_text():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    stock = rouge_scorer.RougeScorer(["rougeL"])
    assert stock.score("今天天气很好", "今天天气很好")["rougeL"].fmeasure == 0, "its default drops them"
    assert METRICS["rouge-l"].score("今天天气很好", "今天天气很好。") == 1
    assert METRICS["rouge-l"].score("今天天气很好", "今天下雨") == pytest.approx(
        2 * (2 / 4) * (2 / 6) / (2 / 4 + 2 / 6)
    )
    assert scores._Tokenizer().tokenize("用 LoRA 微调7B模型, naïve") == [
        "用",
        "lora",
        "微",
        "调",
        "7b",
        "模",
        "型",
        "naïve",
    ]
    assert scores._Tokenizer().tokenize("ひらカナ𠀀") == ["ひ", "ら", "カ", "ナ", "𠀀"]


@pytest.mark.parametrize(
    "output, valid",
    [('{"a": 1}', 1), (' {"a": 1}\n', 1), ("{}", 1), ("[1]", 0), ('"a"', 0), ("", 0), ('{"a": 1', 0), ('{"a": NaN}', 0),
     ('```json\n{"a": 1}\n```', 0), ('{"a": 1} and more', 0), ("[" * 100_000, 0)],
)  # fmt: skip
def test_json_valid(output, valid):
    assert METRICS["json-valid"].score("{}", output) == valid


@pytest.mark.parametrize(
    "output, share",
    [
        ({"a": 1, "b": "x", "c": [1, {"d": None}], "e": True}, 1),
        ({"e": True, "c": [1, {"d": None}], "b": "x", "a": 1, "more": 0}, 1),
        ({"a": 1, "b": "y", "c": [1, {"d": None}]}, 0.5),
        ({"a": True, "b": "X", "c": [1], "e": 1}, 0),
        ({"a": "1", "b": None}, 0),
    ],
)
def test_json_fields_are_strict(output, share):
    expected = json.dumps({"a": 1, "b": "x", "c": [1, {"d": None}], "e": True})
    assert METRICS["json-fields"].score(expected, json.dumps(output)) == share
    assert METRICS["json-fields"].score(expected, json.dumps(output)[:-1]) == 0


def test_json_fields_one_by_one():
    said = [Prediction("", '{"a": 1, "b": 2}', o) for o in ('{"a": 1, "b": 2}', '{"a": 1}', "no")]
    assert scores.field_shares([*said, Prediction("", '{"b": 3}', '{"b": 3}')]) == {"a": 2 / 3, "b": 2 / 4}
    assert METRICS["json-fields"].score("{}", "{}") == 1
    assert METRICS["json-fields"].score("{}", "x") == 0


def test_summary():
    hits, means = scores.summarise("exact-match", [1, 0, 1]), scores.summarise("chrf", [0.2, 0.6, 0.1, 1.0])
    assert (hits.value, hits.hits, hits.rows) == (pytest.approx(2 / 3), 2, 3)
    assert means.hits is None
    assert means.value == pytest.approx(0.475)
    assert 0 < means.low < means.value < means.high < 1


def test_what_is_missing_is_said_before_a_model_is_loaded(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("sacrebleu", "rouge_score") else find(name)
    )
    with pytest.raises(
        BackendError, match=r"metric chrF, ROUGE-L: not installed; run\n  pip install sacrebleu rouge-score"
    ):
        scores.require(["chrf", "exact-match", "rouge-l"], [])
    scores.require(["exact-match", "loss"], [])


def test_rows_without_json_are_listed():
    rows = [
        Row("d:1", prompt="p", completion="{}"),
        Row("d:2", prompt="p", completion="[]"),
        Row("d:3", prompt="p", completion="x"),
    ]
    with pytest.raises(DataError, match=r"(?s)valid JSON, JSON fields: 2 of 3 rows.*d:2\n  d:3\nleave the metric out"):
        scores.require(["json-valid", "json-fields"], rows)
    scores.require(["exact-match"], rows)


def test_eval_writes_every_figure_and_every_row(tiny, tmp_path, capsys):
    pytest.importorskip("sacrebleu")
    data = write_jsonl(
        tmp_path / "d.jsonl", [chat(f"say {i}", json.dumps({"n": i, "词": "好"}, ensure_ascii=False)) for i in range(3)]
    )
    said = tmp_path / "said.jsonl"
    arguments = ["eval", "--model", str(tiny), "--data", str(data), "--max-new-tokens", "3", "--output", str(said)]
    names = "perplexity,exact-match,json-valid,json-fields,chrf"
    assert main([*arguments, "--metric", names, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["json_fields"]["fields"] == {"n": 0, "词": 0}
    assert result["perplexity_interval"][0] < result["perplexity"] < result["perplexity_interval"][1]
    lines = [json.loads(line) for line in said.read_text(encoding="utf-8").splitlines()]
    assert sum(line["scores"]["chrf"] for line in lines) / 3 == pytest.approx(result["chrf"]["value"])
    assert set(lines[0]) == {"prompt", "expected", "output", "loss", "scores"}
    assert main([*arguments, "--metric", names]) == 0
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("perplexity", "exact match", "chrF", "valid JSON", "JSON fields", "  词"))
    assert main([*arguments, "--metric", "loss"]) == 0
    assert set(json.loads(said.read_text(encoding="utf-8").splitlines()[0])) == {"prompt", "expected", "loss"}
