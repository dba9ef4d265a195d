"""The facts that tuning sees: those that trials edit, and those that are traced.

The tuning set is drawn, by the seed, from the second half of a dataset: runs take a dataset's first records, and so
meet none of them as long as they take no more than half of it. Knows data. Knows nothing of models.
"""

from __future__ import annotations

import random
from pathlib import Path

from sphere.data.records import Record, load_records
from sphere.data.starter import load_facts
from sphere.errors import SphereError
from sphere.resources import find
from sphere.tuning.causal_trace import Statement


def tuning_set(ds_name: str, data_dir: str | Path, n_facts: int, seed: int) -> list[Record]:
    """`n_facts` records of the second half of a dataset that a score can be made of, drawn by the seed.

    A score takes all three kinds of prompts: the edit's own, paraphrases and neighbors (`sphere.evaluation.summary`).

    Raises:
        SphereError: the half holds fewer, or none.
    """
    records = load_records(ds_name, data_dir)
    whole = records[(len(records) + 1) // 2 :]
    half = [record for record in whole if record.paraphrase_prompts and record.neighborhood]
    if whole and not half:
        raise SphereError(
            f"No fact in the second half of the dataset '{ds_name}' has both paraphrase and neighborhood prompts, of "
            "which the score that is tuned for is made: use another dataset.",
            argument="ds_name",
        )
    if len(half) < n_facts:
        those = " with paraphrase and neighborhood prompts" if len(half) < len(whole) else ""
        raise SphereError(
            f"The second half of the dataset '{ds_name}' holds {len(half)} facts{those}, {n_facts} are wanted for "
            "tuning: ask for fewer, or use another dataset.",
            argument=("n_facts", "ds_name"),
        )
    return random.Random(f"tuning set\n{seed}").sample(half, n_facts)


def statements(table: str | Path, seed: int) -> list[Statement]:
    """All facts of a table (data/README.md), each in its relation's first prompt, in seeded order."""
    found = [
        Statement(relation.prompts[0], subject, answer)
        for relation in load_facts(find(table))
        for subject, answer in relation.facts.items()
    ]
    random.Random(f"causal tracing\n{seed}").shuffle(found)
    return found
