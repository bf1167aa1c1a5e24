"""`twinlora demo`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from twinlora.cli import compare
from twinlora.cli.console import as_typed, carry_out, out
from twinlora.config import DemoOptions

if TYPE_CHECKING:
    from twinlora.demo.story import Story


def run(options: DemoOptions) -> None:
    """Tell the story, then show what it found and what to try next."""
    from twinlora.demo.story import tell

    carry_out(options, tell, lambda story: show(story, options), _document)


def _document(story: Story) -> dict[str, Any]:
    return asdict(story) | {"report": story.report.model_dump(mode="json")}


def show(story: Story, options: DemoOptions) -> None:
    """The comparison, each adapter's answers, and what to try next."""
    out.print()
    compare.show(story.report)
    out.print(
        f"\nOne base in memory, {len(story.adapters)} adapters; a switch took {1e3 * story.switch_seconds:.2f} ms:"
    )
    for answer in story.answers:
        out.print(f"\n[{answer.task}] {answer.prompt}", markup=False, style="bold")
        for way, text in answer.outputs.items():
            mark = "✓" if text.strip() == answer.expected.strip() else " "
            shown = " ".join(text.split())
            out.print(f"  {mark} {way:<8} {shown if len(shown) <= 110 else shown[:109] + '…'}", markup=False)
    out.print(f"\ndone in {story.seconds:.0f} s; the report: {(options.output / 'support' / 'report.html').resolve()}")
    out.print("\nnext, try:")
    for command in story.next_commands:
        out.print(f"  {as_typed(command)}", markup=False)
