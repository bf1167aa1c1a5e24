import pytest

from twinlora.config import DemoOptions
from twinlora.demo.story import _claim, _write_data
from twinlora.errors import ConfigError


def test_the_comparison_has_as_many_rows_as_asked_for(tmp_path):
    data = _write_data(DemoOptions(output=tmp_path, train_rows=7, test_rows=5))
    counts = {path.stem: len(path.read_text().splitlines()) for path in (data / "support").iterdir()}
    assert (counts["train"], counts["test"]) == (7, 5)


def test_a_demo_replaces_demos_alone(tmp_path):
    mine = tmp_path / "mine"
    (mine / "data").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"was not made by a demo .*; give another --output"):
        _claim(DemoOptions(output=mine))
    assert [path.name for path in mine.iterdir()] == ["data"]
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "new", tmp_path / "empty"):
        _claim(DemoOptions(output=output))
        _claim(DemoOptions(output=output, overwrite=False))
        (output / "support").mkdir()
        _claim(DemoOptions(output=output))
        with pytest.raises(ConfigError, match="holds an earlier demo; leave out --no-overwrite"):
            _claim(DemoOptions(output=output, overwrite=False))
        with pytest.raises(ConfigError, match="is read here"):
            _claim(DemoOptions(output=output, model=str(output / "support" / "runs" / "full" / "model")))


def test_nothing_is_written_to_a_directory_of_another(tmp_path):
    from twinlora.demo.story import tell

    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="was not made by a demo"):
        tell(DemoOptions(output=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
