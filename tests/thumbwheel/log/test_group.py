import asyncio
from pathlib import Path

import pytest

from thumbwheel.errors import LogError
from thumbwheel.events import ROLLOUT, ReplicaReported, decode
from thumbwheel.log import SqliteLog
from thumbwheel.log.group import GroupCommit


def event(name: str) -> ReplicaReported:
    return ReplicaReported(source="test", replica=name, serving="base")


async def test_many_coroutines_share_few_transactions_and_all_are_durable(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.sqlite")
    transactions = 0
    append_all = log.append_all

    def counted(items):  # type: ignore[no-untyped-def]
        nonlocal transactions
        transactions += 1
        return append_all(items)

    log.append_all = counted  # type: ignore[method-assign]
    commit = GroupCommit(log)
    results = await asyncio.gather(*(commit.append(event(str(i))) for i in range(200)))
    assert sorted(result.offset for result in results) == list(range(200))
    assert transactions < 20
    assert log.ends(ROLLOUT) == (0, 200)
    await commit.close()
    log.close()


async def test_events_keep_the_order_in_which_they_were_submitted(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.sqlite")
    commit = GroupCommit(log)
    for i in range(50):
        commit.submit(event(str(i)))
        await asyncio.sleep(0)
    await commit.close()
    assert [decode(r.message.value).key for r in log.read(ROLLOUT, 0)] == [str(i) for i in range(50)]
    log.close()


async def test_a_failed_transaction_tells_every_waiter_and_the_next_one_goes_on(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.sqlite")
    append_all = log.append_all
    log.append_all = _fail  # type: ignore[method-assign, assignment]
    commit = GroupCommit(log)
    results = await asyncio.gather(*(commit.append(event(str(i))) for i in range(3)), return_exceptions=True)
    assert all(isinstance(result, LogError) for result in results)
    log.append_all = append_all  # type: ignore[method-assign]
    assert (await commit.append(event("after"))).offset == 0
    await commit.close()
    log.close()


def _fail(items: object) -> list[object]:
    raise LogError("disk full")


async def test_what_waits_in_memory_is_bounded(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.sqlite")
    commit = GroupCommit(log, limit=2)
    commit.submit(event("a"))
    commit.submit(event("b"))
    with pytest.raises(LogError, match="too slow"):
        commit.submit(event("c"))
    await commit.close()
    assert log.ends(ROLLOUT) == (0, 2)
    log.close()
