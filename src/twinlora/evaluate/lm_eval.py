"""EleutherAI's lm-evaluation-harness on a base with an adapter, by our own forward pass.

    python -m twinlora.evaluate.lm_eval run --model twinlora --model_args model=M,adapter=RUN --tasks arc_easy

or, from Python, `lm_eval.simple_evaluate(model=TwinloraLM("M", adapter="RUN"), tasks=["arc_easy"])`. Tokens, windows
and stop strings are the harness's; its own transformers backend, HFLM, gives the same log-likelihoods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from twinlora.config import EvalOptions, ModelOptions, validated
from twinlora.data.packing import make_batch
from twinlora.data.template import Example
from twinlora.errors import BackendError, ConfigError
from twinlora.evaluate.opening import open_model
from twinlora.model.forward import has_plain_head, packing_refusal, token_log_probs
from twinlora.model.generate import end_tokens, generate
from twinlora.reporter import ConsoleReporter, Reporter

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise BackendError(
        f"lm-evaluation-harness (0.4.9 or later) is not installed ({error}); run\n  pip install lm-eval"
    ) from None

__all__ = ["TwinloraLM"]

_MICRO_BATCH_TOKENS = 2048
_NO_MATTER_WHEN_GREEDY = {"top_p", "top_k"}


@register_model("twinlora")
class TwinloraLM(TemplateLM):  # type: ignore[misc]
    """A causal model for the harness: `model` as `--model`, `adapter` a PEFT directory or a run's directory.

    `batch_size` is the number of answers generated at once; `max_length` the tokens predicted at most in one pass,
    by default what the model takes. Raises InputError for a wrong model, adapter or option.
    """

    def __init__(
        self,
        model: str,
        adapter: str | Path | None = None,
        *,
        precision: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 32,
        max_length: int | None = None,
        trust_remote_code: bool = False,
        reporter: Reporter | None = None,
    ) -> None:
        super().__init__()
        given = {"model": model, "device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        checked = {"adapter": adapter, "precision": precision, "batch_size": batch_size, "data": Path()}
        options = validated(EvalOptions, given | checked, where="TwinloraLM")
        opened = open_model(
            validated(ModelOptions, given, where="TwinloraLM"),
            {"adapter": options.adapter} if options.adapter else {},
            precision=options.precision,
            reporter=reporter or ConsoleReporter(),
        )
        self.model, self.tokenizer = opened.model.eval(), opened.tokenizer
        self._device = self.model.get_input_embeddings().weight.device
        self._packed = packing_refusal(self.model, len(self.tokenizer)) is None
        self._plain_head = has_plain_head(self.model)
        self.batch_size = options.batch_size
        # One less than the model takes: the last token predicted goes through the model as well.
        self.max_length = max_length or getattr(self.model.config, "max_position_embeddings", 2049) - 1

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> TwinloraLM:
        """What `--model_args` gives, with what the harness's own flags say."""
        made: TwinloraLM = super().create_from_arg_string(arg_string, _on_this_machine(additional_config))
        return made

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> TwinloraLM:
        """The same, from a mapping."""
        made: TwinloraLM = super().create_from_arg_obj(arg_dict, _on_this_machine(additional_config))
        return made

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """The harness keys its cache of requests with it."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as the model's own chat template writes them."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; the tokenizer's special tokens are added unless `string` starts with the first of them."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For (key, context, continuation): log p(continuation | context), and whether it is the greedy answer."""
        examples = []
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ConfigError(f"max_length {self.max_length}: a continuation has {len(continuation)} tokens")
            ids = (context + continuation)[-(self.max_length + 1) :]
            trained = [False] * (len(ids) - len(continuation)) + [True] * len(continuation)
            examples.append(Example(ids, trained, str(number)))
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
        batch = make_batch(
            [examples[i] for i in order],
            _MICRO_BATCH_TOKENS,
            packed=self._packed,
            device=self._device,
        )
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        waiting, reporter = iter(order), Reporter() if disable_tqdm else ConsoleReporter()
        for done, micro in enumerate(batch.micro_batches, 1):
            log_probs, greedy = token_log_probs(self.model, micro, plain_head=self._plain_head)
            begin = 0
            while begin < len(log_probs):
                i = next(waiting)
                rows = slice(begin, begin + examples[i].trained_tokens)
                answers[i], begin = (log_probs[rows].double().sum().item(), bool(greedy[rows].all())), rows.stop
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
            reporter.progress("log-likelihoods", done, len(batch.micro_batches))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p(text) of whole texts, in the harness's windows."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (log_prob, _) in zip(owners, scored, strict=True):
            totals[owner] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string, the end token or the most tokens allowed."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        answers = [""] * len(requests)
        reporter, done = Reporter() if disable_tqdm else ConsoleReporter(), 0
        for group in groups.values():
            asked = _generation_options(requests[group[0]].args[1])
            room = self.max_length - asked["new"]
            if room <= 0:
                raise ConfigError(
                    f"max_gen_toks {asked['new']:,}: this model takes {self.max_length:,} tokens, prompt and answer "
                    "together; give fewer, as --gen_kwargs max_gen_toks=256"
                )
            prompts = {i: self.tok_encode(requests[i].args[0])[-room:] for i in group}
            order = sorted(group, key=lambda i: -len(prompts[i]))
            for begin in range(0, len(order), self.batch_size):
                chosen = order[begin : begin + self.batch_size]
                for i, text in zip(chosen, self._generate([prompts[i] for i in chosen], **asked), strict=True):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                done += len(chosen)
                reporter.progress("answering", done, len(requests))
        return answers

    def _generate(self, prompts: list[list[int]], *, until: list[str], new: int, temperature: float) -> list[str]:
        told = generate(
            self.model,
            prompts,
            max_new_tokens=new,
            stop=end_tokens(self.model, self.tokenizer),
            temperature=temperature,
            ended=self._ends_with(until),
        )
        texts = (self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in told)
        return [str(postprocess_generated_text(text, until, None)) for text in texts]

    def _ends_with(self, until: list[str]) -> Callable[[list[int]], bool]:
        """Whether the newest tokens hold a stop string; a token is a byte at least."""
        reach = max((len(text.encode()) for text in until), default=0) + 1

        def ended(tokens: list[int]) -> bool:
            tail = self.tokenizer.decode(tokens[-reach:], skip_special_tokens=True) if until else ""
            return any(text in tail for text in until)

        return ended


def _on_this_machine(config: dict[str, Any] | None) -> dict[str, Any]:
    """The harness's settings without a GPU that this machine lacks: its command line names one, asked or not."""
    config = dict(config or {})
    if str(config.get("device", "")).startswith("cuda") and not torch.cuda.is_available():
        ConsoleReporter().note(f"device {config.pop('device')}: this torch sees no GPU; running on the CPU")
    return config


def _generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """What the harness asks for, as `_generate` takes it. Raises ConfigError for what we do not do."""
    options = dict(normalize_gen_kwargs(given))
    until, new = [text for text in options.pop("until", []) if text], options.pop("max_gen_toks")
    temperature = float(options.pop("temperature", 0.0))
    if not options.pop("do_sample", False):
        temperature, options = 0.0, {k: v for k, v in options.items() if k not in _NO_MATTER_WHEN_GREEDY}
    if options:
        raise ConfigError(f"generation option(s) {', '.join(sorted(options))}: not supported; leave them out")
    return {"until": until, "new": new, "temperature": temperature}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
