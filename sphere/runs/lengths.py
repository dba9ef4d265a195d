"""The lengths of all that a run's records will have the model run, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sphere.data.records import Record
from sphere.editor import Editor
from sphere.values.chat_template import in_turn
from sphere.values.joiner import Continued
from sphere.values.lengths import CaseText


def check_records(editor: Editor, records: Sequence[Record]) -> None:
    """Check that what editing and scoring run for the records fits the model's positions.

    Raises:
        SphereError: some does not; the cases, their lengths and the number of positions are named.
    """
    turn = editor.edited.user_turn
    scored = (text for record in records for text in _scored_texts(record, turn))
    editor.services.check_lengths([record.request for record in records], scored)


def _scored_texts(record: Record, turn: str) -> Iterator[CaseText]:
    request = record.request
    own = [target for target in (request.target_new, request.target_true) if target]

    def case_text(what: str, prompt: str, target: str) -> CaseText:
        return CaseText(record.case_id, what, Continued(in_turn(turn, prompt), target, request.joiner).text)

    for prompt in (request.text, *record.paraphrase_prompts):
        for target in own:
            yield case_text("scored prompt with its target", prompt, target)
    for prompt, answer in record.neighborhood:
        targets = [answer] if record.kind == "zsre" else [request.target_new, answer or request.target_true]
        for target in filter(None, targets):
            yield case_text("neighborhood prompt with its target", prompt, target)
    for probe in record.probes:
        for prompt, answers in ((q.prompt, q.answers) for q in (*probe.questions, *probe.conditions)):
            yield case_text(f"{probe.metric} prompt with its answer", prompt, answers[0] if answers else "")
    for prompt in record.generation_prompts:
        yield CaseText(record.case_id, "generation prompt", in_turn(turn, prompt))
