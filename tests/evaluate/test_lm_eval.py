"""Against the harness's own transformers backend, on the same model in float32."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from twinlora.model.generate import generate

PAIRS = [
    ("The sky is", " blue"), ("", "alone"), ("two words ", "and a gap"), ("今天", "天气"), ("x" * 90, "y" * 30), ("a", "b"),
]  # fmt: skip
TEXTS = ["A short text.", "z" * 300, "长一点的文字。" * 10]


def test_without_the_harness_the_error_says_how_to_get_it():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from twinlora.errors import BackendError\n"
        "try:\n    import twinlora.evaluate.lm_eval\n"
        "except BackendError as error:\n    print(error)"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("run\n  pip install lm-eval\n"), done.stderr


needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed: pip install lm-eval"
)


def requests(*arguments):
    return [SimpleNamespace(args=a) for a in arguments]


@pytest.fixture(scope="module")
def sides(tiny, tmp_path_factory):
    """(ours, theirs) over the same base with the same adapter, whose B is not zero."""
    from lm_eval.models.huggingface import HFLM

    from twinlora.evaluate.lm_eval import TwinloraLM

    directory = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    config = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(directory)
    ours = TwinloraLM(str(tiny), adapter=directory, dtype="float32", device="cpu", max_length=100, batch_size=2)
    theirs = HFLM(
        pretrained=str(tiny), peft=str(directory), dtype="float32", device="cpu", max_length=100, batch_size=2
    )
    return ours, theirs


@needs_harness
def test_log_likelihoods_are_hflms(sides):
    ours, theirs = (side.loglikelihood(requests(*PAIRS), disable_tqdm=True) for side in sides)
    for (mine, greedy), (other, their_greedy) in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-3)
        assert greedy == their_greedy
    ids = sides[0].tok_encode("The sky is")
    (likeliest,) = generate(sides[0].model, [ids], max_new_tokens=3, stop=set())
    for side in sides:
        scored = side._loglikelihood_tokens([(("a", "b"), ids, likeliest), (("a", "c"), ids, [*likeliest, 0])])
        assert [greedy for _, greedy in scored] == [True, False]


@needs_harness
def test_rolling_windows_are_hflms(sides):
    ours, theirs = (side.loglikelihood_rolling(requests(*((t,) for t in TEXTS)), disable_tqdm=True) for side in sides)
    assert ours == pytest.approx(theirs, rel=1e-4)


@needs_harness
def test_answers_are_hflms(sides):
    long = {"until": [], "do_sample": False, "max_gen_toks": 12}
    asked = requests(("The sky is", long), ("x" * 150, long), ("今天", long))
    ours, theirs = (side.generate_until(asked, disable_tqdm=True) for side in sides)
    assert ours == theirs
    assert len(ours[0]) > 3
    short = requests(("The sky is", long | {"until": [ours[0][2:4]]}))
    assert sides[0].generate_until(short, disable_tqdm=True) == [ours[0].split(ours[0][2:4])[0]]


@needs_harness
def test_stop_strings_end_an_answer_when_they_come(sides):
    steps = []
    ended = sides[0]._ends_with(["lo w"])
    for end in range(1, 12):
        steps.append(ended(sides[0].tok_encode("hello world")[:end]))
    assert steps.index(True) == len("hello w") - 1


@needs_harness
def test_what_we_do_not_do_is_an_error(sides):
    from twinlora.errors import ConfigError
    from twinlora.evaluate.lm_eval import TwinloraLM

    with pytest.raises(ConfigError, match="num_beams: not supported"):
        sides[0].generate_until(requests(("a", {"until": [], "num_beams": 4})), disable_tqdm=True)
    with pytest.raises(ConfigError, match="max_gen_toks 4,000: this model takes"):
        sides[0].generate_until(requests(("a", {"until": [], "max_gen_toks": 4000})), disable_tqdm=True)
    with pytest.raises(ConfigError, match=r"TwinloraLM: 1 problem.*(.|\n)*batch_size"):
        TwinloraLM("nowhere", batch_size="auto")


@needs_harness
def test_the_harness_runs_it_by_name_where_it_names_a_gpu_that_is_not_here(tiny, capsys, monkeypatch):
    import torch
    from lm_eval.api.registry import get_model

    from twinlora.evaluate.lm_eval import TwinloraLM

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = get_model("twinlora").create_from_arg_string(f"model={tiny}", {"device": "cuda:0", "batch_size": "1"})
    assert isinstance(made, TwinloraLM)
    assert made.batch_size == 1
    assert "cuda:0: this torch sees no GPU" in capsys.readouterr().err
