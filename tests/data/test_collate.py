import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, GPT2Config

import twinlora
from twinlora.errors import ModelError


def test_packed_rows_lose_what_padded_rows_lose(tiny, tokenizer):
    """Also where every token carries loss: a row's first token is never the answer to its neighbour's last."""
    model, _ = twinlora.load(tiny, dtype="float32")
    rows = [{"input_ids": ids, "labels": list(ids)} for ids in ([1, 2, 3, 4], [9, 8], [5, 6, 7, 8, 9, 10])]
    packed = twinlora.PackedCollator(model)(rows)
    assert packed["input_ids"].shape == (1, 12)
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5]]
    padded = DataCollatorForSeq2Seq(tokenizer)(rows)
    with torch.no_grad():
        torch.testing.assert_close(model(**packed).loss, model(**padded).loss)


def test_a_model_that_cannot_is_refused(tmp_path, tokenizer):
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64)  # drops attention
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = twinlora.load(tmp_path)
    with pytest.raises(ModelError, match=r"because it uses attention dropout; pad them: .*DataCollatorForSeq2Seq"):
        twinlora.PackedCollator(model)
