"""Five made-up examples of each downstream task, as the published files hold them."""

from __future__ import annotations

import json
from pathlib import Path

from sphere.downstream import TASKS

EXAMPLES = {
    "reasoning": [
        {
            "question": f"What is {i} plus {i}?",
            "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}",
        }
        for i in range(1, 6)
    ],
    "open_domain_qa": [
        {"question": f"who is {i}?", "answer": [f"Mr {i}", "nobody"], "output": [f"\n\nIt is Mr  {i}."]}
        for i in range(5)
    ],
    "closed_domain_qa": [
        {"question": f"is {i} even", "title": "t", "answer": i % 2 == 0, "passage": f"{i} is a\nnumber."}
        for i in range(5)
    ],
}
NLI = "index\tsentence1\tsentence2\tlabel\n" + "".join(
    f'{i}\tHe said "{i}.\tHe spoke.\t{"" if i % 2 else "not_"}entailment\n' for i in range(5)
)


def write_task_data(data_dir: Path) -> Path:
    """Write the files under `<data_dir>/task-data`; gives `data_dir` back."""
    folder = data_dir / "task-data"
    folder.mkdir(parents=True)
    for name, examples in EXAMPLES.items():
        lines = (json.dumps(example) + "\n" for example in examples)
        (folder / TASKS[name].file).write_text("".join(lines), "utf-8")
    (folder / TASKS["nli"].file).write_text(NLI, "utf-8")
    return data_dir
