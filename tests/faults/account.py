"""The account of a fault run: every acknowledged event looked up by its id, on the log itself and where it was counted.

The log is read by a plain kafka-python consumer that knows nothing of ours.
"""

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from tests.faults.traffic import Told


@dataclass(frozen=True)
class Account:
    """`lost`: acknowledged, and not on the log or not counted. `twice`: counted more than once. `disordered`: keys with
    an event before an earlier one. `copies`: records on the log beyond the first of an id, which nobody counts."""

    acknowledged: int
    lost: int
    twice: int
    disordered: int
    copies: int
    responses: int
    votes: int

    def as_json(self) -> dict[str, int]:
        return asdict(self)


def read_topic(bootstrap: str, topic: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Partition and event of every record, from the beginning to the end as it is now."""
    with closing(
        KafkaConsumer(bootstrap_servers=bootstrap.split(","), auto_offset_reset="earliest", enable_auto_commit=False)
    ) as consumer:
        places = [TopicPartition(topic, partition) for partition in consumer.partitions_for_topic(topic)]
        consumer.assign(places)
        ends = consumer.end_offsets(places)
        while any(consumer.position(place) < ends[place] for place in places):
            for place, records in consumer.poll(timeout_ms=1000).items():
                for record in records:
                    yield place.partition, json.loads(record.value)


def counted(buffer: Path) -> tuple[Counter[str], list[tuple[str, str]]]:
    """Response ids, and (vote id, response id) in the order in which they were counted."""
    with closing(sqlite3.connect(buffer)) as db:
        responses = Counter(row[0] for row in db.execute("SELECT response_id FROM responses"))
        votes = db.execute("SELECT feedback_id, response_id FROM votes ORDER BY rowid").fetchall()
        return responses, votes


def settle(
    told: Told,
    responses_on_log: Sequence[Mapping[str, Any]],
    votes_on_log: Sequence[tuple[int, Mapping[str, Any]]],
    counted_responses: Counter[str],
    counted_votes: Sequence[tuple[str, str]],
) -> Account:
    """Compare. Pure."""
    on_log = {event["response_id"] for event in responses_on_log}
    first: dict[str, tuple[int, int, Mapping[str, Any]]] = {}
    for place, (partition, event) in enumerate(votes_on_log):
        first.setdefault(event["id"], (place, partition, event))
    times = Counter(id for id, _ in counted_votes)
    number = {vote.id: vote.number for vote in told.votes}
    lost = [id for id in told.responses if id not in on_log or not counted_responses[id]]
    lost += [vote.id for vote in told.votes if vote.id not in first or not times[vote.id]]
    # A vote has one user of its own: two events of one user on one response would be one vote counted twice.
    people = Counter((event["response_id"], event["user"]) for _, _, event in first.values())
    twice = sum(count - 1 for count in (*times.values(), *counted_responses.values(), *people.values()))
    arrived: dict[str, list[int]] = defaultdict(list)
    for _, _, event in first.values():  # a dict keeps the order of the first ones
        arrived[event["response_id"]].append(event["metadata"]["number"])
    for id, response_id in counted_votes:
        if id in number:
            arrived[f"counted {response_id}"].append(number[id])
    disordered = sum(numbers != sorted(numbers) for numbers in arrived.values())
    copies = len(responses_on_log) - len({event["id"] for event in responses_on_log}) + len(votes_on_log) - len(first)
    return Account(
        acknowledged=len(told.responses) + len(told.votes),
        lost=len(lost),
        twice=twice,
        disordered=disordered,
        copies=copies,
        responses=len(told.responses),
        votes=len(told.votes),
    )
