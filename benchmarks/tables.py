"""Write the measured tables of README.md and README.zh-CN.md from benchmarks/results/*.json.

python benchmarks/tables.py            rewrites what stands between `<!-- table: NAME -->` and `<!-- end -->`
python benchmarks/tables.py --check    exits with 1 if a page is not what the results say

The tables are made in English, by subject, in benchmarks/readme; its chinese.py translates their words.
"""

from __future__ import annotations

import re
import sys

import harness  # puts src on the path
from readme import export, gpu, hybrid, plan, serve, training
from readme.chinese import translated

TABLES = {
    "banking77": training.banking77, "variants": training.variants, "cpu_train": training.cpu_train,
    "cpu_decode": training.cpu_decode, "cpu_7b": training.cpu_7b, "cpu_kernels": training.cpu_kernels,
    "hybrid": hybrid.hybrid, "gpu_steps": gpu.gpu_steps, "gpu_fits": gpu.gpu_fits, "plan_table": plan.plan_table,
    "plan_paper": plan.plan_paper, "plan_memory": plan.plan_memory, "plan_time": plan.plan_time, "serve": serve.serve,
    "export": export.export,
}  # fmt: skip


def render(page: str, name: str, tables: dict[str, str]) -> str:
    """`page`, the text of the file `name`, with every table in its place."""
    for table, text in tables.items():
        pattern = re.compile(rf"(<!-- table: {table} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(page):
            raise SystemExit(f"{name} has no place for table {table}: expected <!-- table: {table} --> … <!-- end -->")
        page = pattern.sub(lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page)
    return page


def main() -> None:
    english = {name: make() for name, make in TABLES.items()}
    for name, tables in (("README.md", english), ("README.zh-CN.md", translated(english))):
        path = harness.ROOT / name
        page = path.read_text(encoding="utf-8")
        made = render(page, name, tables)
        if "--check" not in sys.argv[1:]:
            path.write_text(made, encoding="utf-8")
        elif made != page:
            raise SystemExit(f"{name} differs from benchmarks/results: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
