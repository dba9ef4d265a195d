"""What editing does to abilities nobody wanted to edit: four downstream tasks, and lm-evaluation-harness beside them.

tasks     the four tasks as data: file, prompt, how an output is graded
published the same in the form of the paper's authors
metrics   normalising answers, parsing outputs, accuracy / F1 / MCC
runner    greedy decoding over all checkpoints of a run, resumable
table     what the command prints
harness   the optional lm-evaluation-harness on the edited model in memory
"""

from sphere.downstream.published import PUBLISHED
from sphere.downstream.runner import TASK_FORMATS, run_downstream
from sphere.downstream.table import format_downstream
from sphere.downstream.tasks import TASKS, Example, Task

__all__ = [
    "PUBLISHED",
    "TASKS",
    "TASK_FORMATS",
    "Example",
    "Task",
    "format_downstream",
    "run_downstream",
]
