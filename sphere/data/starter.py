"""The starter dataset: counterfactual edits in the CounterFact schema, built from a plain table of facts.

Knows how a table of facts becomes records, and asks a model only one thing: which of two targets it prefers.
It knows nothing of editing, and nothing of how records are read back for a run.

A fact is edited or it serves as a neighbor, never both: sequential editing would otherwise overwrite the very
facts that measure its side effects.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.files import read_json
from sphere.forward.packing import Scored
from sphere.forward.passes import PassOptions
from sphere.forward.scorer import PackedScorer
from sphere.requests import check_encodable
from sphere.values.tokenization import encode_pair

log = logging.getLogger(__name__)

TEMPLATES = {"prompts": 1, "paraphrases": 2, "generations": 3}  # key of a relation -> fewest templates


@dataclass(frozen=True, eq=False)
class Relation:
    """One relation of the facts table.

    Attributes:
        name: the key in the table, e.g. "capital of a country".
        relation_id: Wikidata property, e.g. "P36".
        prompts, paraphrases, generations: templates with one "{}" for the subject; the object follows the
            first two.
        facts: subject -> object.
        confusable: groups of objects that may hold of one subject together; none replaces another.
    """

    name: str
    relation_id: str
    prompts: list[str]
    paraphrases: list[str]
    generations: list[str]
    facts: dict[str, str]
    confusable: list[list[str]] = field(default_factory=list)

    def alternatives(self, true: str) -> list[str]:
        """Objects that are false of any subject whose object is `true`, sorted."""
        barred = {true}.union(*(group for group in self.confusable if true in group))
        return sorted(set(self.facts.values()) - barred)


@dataclass(frozen=True)
class StarterConfig:
    """What decides the records besides the facts and the model.

    Attributes:
        seed: of every choice.
        per_relation: at most so many records of a relation, spread evenly over its objects.
        margin: nats by which the true target's mean NLL must be below the new one's for the rewrite prompt.
        held_out: facts of each object kept as neighbors, as far as the object has more than these.
        neighbors: fewest and most neighborhood prompts of a record; with fewer it is left out.
        attributes: most attribute prompts of a record.
        generations: generation prompts of a record, at most.
    """

    seed: int = 0
    per_relation: int = 18
    margin: float = 0.5
    held_out: int = 6
    neighbors: tuple[int, int] = (5, 10)
    attributes: int = 5
    generations: int = 4


@dataclass(frozen=True, eq=False)
class Fact:
    """A subject and its object in a relation, with the prompt of its edit and the object to write."""

    relation: Relation
    subject: str
    true: str
    new: str
    template: str

    def fill(self, template: str) -> str:
        return fill(template, self.subject)


class Scorer(Protocol):
    """Mean negative log-likelihood of each target after its prompt, in nats per token."""

    def __call__(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]: ...


def fill(template: str, subject: str) -> str:
    """The template with its subject in place, as a sentence (first letter upper case unless it is a name
    such as "iPhone")."""
    text = template.replace("{}", subject)
    first = text.split(" ", 1)[0]
    return text[:1].upper() + text[1:] if first.islower() else text


# --- reading the facts --------------------------------------------------------------------------------------


def load_facts(path: Path) -> list[Relation]:
    """Read a facts table: relation name -> relation_id, prompts, paraphrases, generations, facts.

    Raises:
        SphereError: the file is missing, not JSON, or a relation is malformed.
    """
    table = read_json(path, "facts table")
    if not isinstance(table, dict) or not table:
        raise SphereError(f"The facts table {path} must be a JSON object of relations: see data/README.md.")
    return [_relation(name, entry, path) for name, entry in table.items()]


def _relation(name: str, entry: Any, path: Path) -> Relation:
    def fail(reason: str) -> SphereError:
        return SphereError(f"Relation '{name}' of the facts table {path} {reason}.")

    if not isinstance(entry, dict):
        raise fail("must be a JSON object with relation_id, prompts, paraphrases, generations and facts")
    known = {"relation_id", "facts", "confusable", *TEMPLATES}
    if missing := sorted(known - {"confusable"} - entry.keys()):
        raise fail(f"lacks {', '.join(missing)}: add it")
    if unknown := sorted(entry.keys() - known):
        raise fail(f"has unknown keys {', '.join(unknown)}: use {', '.join(sorted(known))}")
    for key, fewest in TEMPLATES.items():
        if not _strings(entry[key]) or len(entry[key]) < fewest:
            raise fail(f"needs a list of at least {fewest} strings as {key}")
        for template in entry[key]:
            check_encodable(template, f"A template in {key} of relation '{name}' in {path}")
            if template.count("{}") != 1:
                raise fail(f"has a template in {key} without exactly one '{{}}': {template!r}")
    facts = entry["facts"]
    if not isinstance(facts, dict) or not _strings([*facts, *facts.values()]):
        raise fail("must map each subject to its object, both non-empty strings, as facts")
    for subject, true in facts.items():
        for text in (subject, true):
            check_encodable(text, f"A fact of relation '{name}' in {path}")
        if true.lower() in subject.lower():
            raise fail(f"gives the object away in the subject {subject!r}: leave this fact out")
    confusable = entry.get("confusable", [])
    if not isinstance(confusable, list) or not all(_strings(group) for group in confusable):
        raise fail("must give confusable as a list of lists of objects")
    if not isinstance(entry["relation_id"], str) or not entry["relation_id"]:
        raise fail("needs a Wikidata property such as P36 as relation_id")
    relation = Relation(name=name, **{key: entry[key] for key in known & entry.keys()})
    if any(not relation.alternatives(true) for true in facts.values()):
        raise fail(
            "has an object that no other can replace: give at least two objects that exclude each other"
        )
    return relation


def _strings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v.strip() for v in value)


# --- asking the model ---------------------------------------------------------------------------------------


class TargetScorer:
    """Mean NLL of targets under a model; every (prompt, target) pair is scored once.

    Args:
        passes: how forward passes are cut.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, passes: PassOptions | None = None
    ) -> None:
        self.tokenizer, self.scorer = tokenizer, PackedScorer(model, passes)
        self.known: dict[tuple[str, str], float] = {}

    def __call__(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """NLL of all pairs scored so far, the given ones among them."""
        encoded = {}
        for pair in dict.fromkeys(pairs):
            if pair not in self.known:
                ids, start = encode_pair(self.tokenizer, *pair)
                encoded[pair] = Scored(tuple(ids), start)
        sequences = list(dict.fromkeys(encoded.values()))
        with tqdm(total=len(sequences), desc="scoring", unit="prompt", leave=False) as bar:
            scores = self.scorer.score(sequences, bar)
        self.known |= {pair: float(scores[sequence].nll.mean()) for pair, sequence in encoded.items()}
        return self.known


# --- from facts to records ----------------------------------------------------------------------------------


def build_starter(
    relations: Sequence[Relation], scorer: Scorer, config: StarterConfig | None = None
) -> list[dict[str, Any]]:
    """Records in the CounterFact schema, of facts that the scorer's model gets right before any edit.

    Kept are facts whose true target is `margin` nats per token likelier than the new one after the rewrite
    prompt, and likelier at all after two paraphrases. Deterministic for a given table, model and config.

    Args:
        relations: see `load_facts`.
        scorer: `TargetScorer(model, tokenizer)`.
    """
    config = config or StarterConfig()
    facts = [fact for relation in relations for fact in _facts(relation, config)]
    known = _known(facts, scorer, config.margin)
    log.info("%d of %d facts are known by %.2f nats", len(known), len(facts), config.margin)
    edits, pool = _split(facts, known, config)
    paraphrases = _paraphrases(edits, scorer)
    usable = [fact for fact in edits if fact in paraphrases]
    log.info("%d of %d are known in two paraphrases too", len(usable), len(edits))
    chosen = _balanced(usable, config.per_relation)
    neighbors = _neighbors(chosen, pool, scorer, config)
    rows = [
        _record(fact, paraphrases[fact], neighbors[fact], pool, config)
        for fact in chosen
        if len(neighbors[fact]) >= config.neighbors[0]
    ]
    log.info("%d of %d have %d neighbors or more", len(rows), len(chosen), config.neighbors[0])
    _random(config.seed, "order").shuffle(rows)
    return [{"case_id": case_id, **row} for case_id, row in enumerate(rows)]


def _random(seed: int, *what: str) -> random.Random:
    """A generator of its own for each choice, so that a new fact does not change those of the others."""
    return random.Random("\n".join([str(seed), *what]))


def _facts(relation: Relation, config: StarterConfig) -> list[Fact]:
    """All facts of a relation in seeded order, each with its prompt and its new target."""
    facts = []
    for subject, true in relation.facts.items():
        choose = _random(config.seed, relation.name, subject)
        new, template = choose.choice(relation.alternatives(true)), choose.choice(relation.prompts)
        facts.append((choose.random(), Fact(relation, subject, true, new, template)))
    return [fact for _, fact in sorted(facts, key=lambda item: (item[0], item[1].subject))]


def _known(facts: Sequence[Fact], scorer: Scorer, margin: float) -> list[Fact]:
    texts = {fact: fact.template.replace("{}", fact.subject) for fact in facts}
    nll = scorer((texts[fact], target) for fact in facts for target in (fact.true, fact.new))
    return [fact for fact in facts if nll[texts[fact], fact.new] - nll[texts[fact], fact.true] >= margin]


def _split(
    facts: Sequence[Fact], known: Sequence[Fact], config: StarterConfig
) -> tuple[list[Fact], dict[str, list[Fact]]]:
    """Candidates for an edit, and per object the facts held out as neighbors (known ones first).

    An object of one relation with n facts keeps min(held_out, n - n // 3) of them out.
    """
    groups: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for fact in facts:
        groups[fact.relation.name, fact.true].append(fact)
    right, edits = set(known), []
    pool: dict[str, list[Fact]] = defaultdict(list)
    for (_, true), group in groups.items():
        candidates = [fact for fact in group if fact in right]
        unknown = [fact for fact in group if fact not in right]
        keep = min(config.held_out, len(group) - max(1, len(group) // 3))
        wanted = max(
            keep // 2, keep - len(unknown)
        )  # at least half of those held out are known, if there are
        out = candidates[: min(wanted, max(len(candidates) - 1, 0))]
        edits += candidates[len(out) :]
        pool[true] += out + unknown
    return edits, pool


def _paraphrases(edits: Sequence[Fact], scorer: Scorer) -> dict[Fact, list[str]]:
    """Two paraphrases after which the true target is the likelier one, of the facts that have them."""
    nll = scorer(
        (fact.fill(t), target)
        for fact in edits
        for t in fact.relation.paraphrases
        for target in (fact.true, fact.new)
    )
    found = {}
    for fact in edits:
        texts = [fact.fill(template) for template in fact.relation.paraphrases]
        right = [text for text in texts if nll[text, fact.true] < nll[text, fact.new]]
        if len(right) >= 2:
            found[fact] = right[:2]
    return found


def _balanced(facts: Sequence[Fact], per_relation: int) -> list[Fact]:
    """At most `per_relation` facts of each relation, taken in turn from its objects."""
    turns: dict[str, list[tuple[int, Fact]]] = defaultdict(list)
    seen: dict[tuple[str, str], int] = defaultdict(int)
    for fact in facts:
        turns[fact.relation.name].append((seen[fact.relation.name, fact.true], fact))
        seen[fact.relation.name, fact.true] += 1
    return [
        fact for queue in turns.values() for _, fact in sorted(queue, key=lambda item: item[0])[:per_relation]
    ]


def _neighbors(
    edits: Sequence[Fact], pool: dict[str, list[Fact]], scorer: Scorer, config: StarterConfig
) -> dict[Fact, list[str]]:
    """Prompts about held-out subjects with the same object.

    In order: the same relation in the record's own prompt form, then further prompt forms of these subjects,
    then other relations with this object; those that the model gets right before the rest, within the first
    kind and within the others.
    """
    tiers: dict[Fact, tuple[list[str], list[str]]] = {}
    for fact in edits:
        others = [other for other in pool[fact.true] if not _overlap(other.subject, fact.subject)]
        same = [other for other in others if other.relation is fact.relation]
        first = [other.fill(fact.template) for other in same]
        forms = [t for t in (*fact.relation.prompts, *fact.relation.paraphrases) if t != fact.template]
        second = [other.fill(other.template) for other in others if other.relation is not fact.relation]
        if len(first) < config.neighbors[0] and len(first) + len(second) < config.neighbors[0]:
            second = [other.fill(template) for template in forms for other in same] + second
        tiers[fact] = first[: config.neighbors[1] + 4], second[: config.neighbors[1]]
    nll = scorer(
        (text, target)
        for fact, tier in tiers.items()
        for text in (*tier[0], *tier[1])
        for target in (fact.true, fact.new)
    )
    chosen = {}
    for fact, (first, second) in tiers.items():
        right = [[t for t in tier if nll[t, fact.true] < nll[t, fact.new]] for tier in (first, second)]
        fewest, most = config.neighbors
        picked = right[0][:most]
        for source in (right[1], first, second):  # only as many more as are needed
            picked += [text for text in source if text not in picked][: max(fewest - len(picked), 0)]
        chosen[fact] = picked
    return chosen


def _overlap(one: str, other: str) -> bool:
    return one.lower() in other.lower() or other.lower() in one.lower()


def _record(
    fact: Fact,
    paraphrases: list[str],
    neighbors: list[str],
    pool: dict[str, list[Fact]],
    config: StarterConfig,
) -> dict[str, Any]:
    """One record, but for its case_id."""
    shared = [other for other in pool[fact.new] if other.relation is fact.relation]
    attributes = [o.fill(fact.template) for o in shared if not _overlap(o.subject, fact.subject)]
    generations = [fact.fill(template) for template in fact.relation.generations]
    _random(config.seed, "generations", fact.relation.name, fact.subject).shuffle(generations)
    return {
        "requested_rewrite": {
            "prompt": fact.template,
            "relation_id": fact.relation.relation_id,
            "target_new": {"str": fact.new},
            "target_true": {"str": fact.true},
            "subject": fact.subject,
        },
        "paraphrase_prompts": paraphrases,
        "neighborhood_prompts": neighbors,
        "attribute_prompts": attributes[: config.attributes],
        "generation_prompts": generations[: config.generations],
    }
