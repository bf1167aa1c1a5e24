"""What `eval` refuses before a weight is loaded."""

import pytest

from tests.conftest import chat, write_jsonl
from twinlora.cli.main import main
from twinlora.config import EvalOptions
from twinlora.errors import DataError
from twinlora.evaluate import evaluate as module


@pytest.fixture(autouse=True)
def _no_model(monkeypatch):
    monkeypatch.setattr(module, "open_model", lambda *_, **__: pytest.fail("the model was loaded"))


def test_its_own_data_is_not_overwritten(tiny, data_file, tmp_path, capsys):
    link, before = tmp_path / "link.jsonl", data_file.read_text()
    link.symlink_to(data_file)
    for output in (data_file, link):
        assert main(["eval", "--model", str(tiny), "--data", str(data_file), "--output", str(output)]) == 2
        assert "is read here, and lies where this output is written; give another --output" in capsys.readouterr().err
    assert data_file.read_text() == before


def test_rows_that_do_not_fit_come_with_flags_that_this_verb_has(tiny, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b" * 300), chat("a", "")])
    arguments = ["--data", str(rows), "--metric", "loss"]
    assert main(["eval", "--model", str(tiny), *arguments, "--max-length", "99"]) == 2
    said = capsys.readouterr().err
    assert "give --max-length 3" in said
    assert "or leave these rows out" in said
    assert "with nothing to train on" in said
    assert "--overlong" not in said
    assert "--allow-untrained" not in said


def test_what_other_verbs_measure_names_no_flags(tiny, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b" * 300), chat("a", "")])
    given = EvalOptions(model=str(tiny), data=rows, metric=["loss"], max_length=99)
    with pytest.raises(DataError, match=r"shorten these rows, or leave them out[\s\S]*mend them") as caught:
        module.evaluate(given)
    assert "--" not in str(caught.value)
