from twinlora.config import DemoOptions
from twinlora.demo.story import _write_data


def test_the_comparison_has_as_many_rows_as_asked_for(tmp_path):
    data = _write_data(DemoOptions(output=tmp_path, train_rows=7, test_rows=5))
    counts = {path.stem: len(path.read_text().splitlines()) for path in (data / "support").iterdir()}
    assert (counts["train"], counts["test"]) == (7, 5)
