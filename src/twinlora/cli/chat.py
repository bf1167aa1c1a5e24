"""`twinlora chat`: a conversation on the terminal, adapters switched by a word."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinlora.cli.console import err, out, print_json
from twinlora.config import ChatOptions
from twinlora.errors import AdapterError, ConfigError, DataError
from twinlora.reporter import ConsoleReporter

if TYPE_CHECKING:
    from twinlora.evaluate.opening import Opened

_HELP = "/adapter NAME  answer with it · /base  the bare model · /adapters  list · /clear  forget · /quit"


def parse_adapters(entries: list[str]) -> dict[str, Path]:
    """`NAME=DIR` entries as a mapping. Raises ConfigError."""
    out: dict[str, Path] = {}
    for entry in entries:
        name, separator, path = entry.partition("=")
        if not separator or not name or not path:
            raise ConfigError(f"adapter {entry!r}: expected NAME=DIR, for example mine=runs/a/adapter")
        if name in out:
            raise ConfigError(f"adapter {name!r} is given twice: choose different names")
        out[name] = Path(path)
    return out


class Conversation:
    """The messages so far and the adapter that answers."""

    def __init__(self, opened: Opened, options: ChatOptions) -> None:
        import torch

        self.opened, self.options = opened, options
        self.generator = torch.Generator(device=opened.model.device).manual_seed(options.seed)
        self.turns: list[dict[str, Any]] = []
        self.said: list[dict[str, Any]] = []  # every answer, also of before a /clear

    @property
    def system(self) -> str | None:
        """The system message: the option's, else what the active adapter was trained with."""
        if self.options.system is not None:
            return self.options.system
        passport = self.opened.passports.get(self.opened.bank.active or "")
        return passport.system if passport else None

    def command(self, line: str) -> bool:
        """Obey a line that starts with a slash; False ends the conversation."""
        word, _, rest = line.partition(" ")
        bank = self.opened.bank
        if word in ("/quit", "/exit", "/q"):
            return False
        if word == "/base":
            bank.use(None)
            self.turns.clear()
            self._tell("the base model answers")
        elif word == "/adapter":
            try:
                bank.use(rest.strip() or None)
                self.turns.clear()
                self._tell(f"{bank.active or 'the base model'} answers")
            except AdapterError as error:
                err.print(str(error), style="red", markup=False)
        elif word == "/adapters":
            self._tell(", ".join(bank.names) or "none loaded")
        elif word == "/clear":
            self.turns.clear()
        else:
            self._tell(_HELP)
        return True

    def _tell(self, text: str) -> None:
        """A line about the conversation; with --json standard output has the document alone."""
        (err if self.options.json_output else out).print(text, style="dim")

    def _show(self, text: str) -> None:
        """A piece of an answer."""
        if not self.options.json_output:
            sys.stdout.write(text)
            sys.stdout.flush()

    def answer(self, text: str) -> str:
        """Say `text`; stream the answer to stdout (but with --json) and remember both.

        Raises DataError if the model cannot take it.
        """
        from twinlora.data.template import encode_chat, encode_text
        from twinlora.model.generate import end_tokens, generate

        model, tokenizer = self.opened.model, self.opened.tokenizer
        head = [{"role": "system", "content": self.system}] if self.system else []
        turn = {"role": "user", "content": text}
        chat = bool(tokenizer.chat_template)
        prompt = encode_chat(tokenizer, [*head, *self.turns, turn]) if chat else encode_text(tokenizer, text)
        room = self._room(len(prompt))
        self.turns.append(turn)
        tokens: list[int] = []
        shown = ""

        def stream(token: int) -> None:
            nonlocal shown
            tokens.append(token)
            decoded = tokenizer.decode(tokens, skip_special_tokens=True)
            if not decoded.endswith("\N{REPLACEMENT CHARACTER}"):  # the rest of a character is still to come
                self._show(decoded[len(shown) :])
                shown = decoded

        try:
            generate(
                model,
                [list(prompt)],
                max_new_tokens=room,
                stop=end_tokens(model, tokenizer),
                temperature=self.options.temperature,
                generator=self.generator,
                on_token=stream,
            )
        finally:  # also what was said before a Ctrl-C is part of the conversation
            final = str(tokenizer.decode(tokens, skip_special_tokens=True))
            self._show(final[len(shown) :] + "\n")
            self.turns.append({"role": "assistant", "content": final})
            self.said.append({"adapter": self.opened.bank.active, "question": text, "answer": final})
        return final

    def _room(self, used: int) -> int:
        """Tokens that the answer may have after a prompt of `used`. Raises DataError if there are none."""
        longest: int | None = getattr(self.opened.model.config, "max_position_embeddings", None)
        if longest is None:
            return self.options.max_new_tokens
        if used >= longest:
            raise DataError(
                f"{used:,} tokens with what was said before; this model takes {longest:,}: /clear forgets it"
            )
        return min(self.options.max_new_tokens, longest - used)


def _prompt(options: ChatOptions) -> str:
    """What `input` shows; with --json standard output has the document alone, and the prompt goes to stderr."""
    if not options.json_output:
        return "› "
    err.print("› ", end="")
    return ""


def run(options: ChatOptions) -> None:
    """Read lines from the terminal (or a pipe) until it ends or /quit."""
    adapters = parse_adapters(options.adapter)
    from twinlora.evaluate.opening import open_model

    opened = open_model(
        options,
        adapters,
        precision=options.precision,
        layer_precision=options.layer_precision,
        reporter=ConsoleReporter(),
    )
    conversation = Conversation(opened, options)
    interactive = sys.stdin.isatty()
    if interactive:
        err.print(f"{opened.bank.active or 'the base model'} answers. {_HELP}", style="dim")
    while True:
        try:
            line = input(_prompt(options) if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if line.startswith("/"):
            if not conversation.command(line):
                break
        elif line:
            try:
                conversation.answer(line)
            except KeyboardInterrupt:
                err.print(" (stopped)", style="dim")
            except DataError as error:
                err.print(str(error), style="red", markup=False)
    if options.json_output:
        print_json({"model": options.model, "answers": conversation.said})
