"""The tasks of the batch group normalization paper, small but real: see `__main__`."""

from benchmarks.tasks import adaptation, adversarial, few_shot, search
from benchmarks.tasks.record import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (adversarial.TASK, few_shot.TASK, adaptation.TASK, search.TASK)
}
"""By name, in the order in which they are trained and reported."""
