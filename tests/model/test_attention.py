from twinlora.model.attention import Layout


def test_positions_restart():
    assert Layout([2, 3]).positions().tolist() == [[0, 1, 0, 1, 2]]
