"""What editing does to abilities nobody wanted to edit: four downstream tasks, and lm-evaluation-harness beside them.

tasks     the four tasks as data: file, prompt, how an output is graded
metrics   normalising answers, parsing outputs, accuracy / F1 / MCC
runner    greedy decoding over all checkpoints of a run, resumable
harness   the optional lm-evaluation-harness on the edited model in memory
"""

from sphere.downstream.runner import run_downstream
from sphere.downstream.tasks import TASKS, Example, Task

__all__ = ["TASKS", "Example", "Task", "run_downstream"]
