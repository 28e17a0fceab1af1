"""What goes into the next question: signatures of one lane together, in fair parts, fewer of a slow token, and never behind what is alone."""

from __future__ import annotations

import asyncio

from keyreeve_common.errors import KeyNotFound
from keyreeve_common.schemes import SignatureScheme
from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.backends.worker_queue import QUESTION_S, Job, JobQueue, Lane, merged, parted

EC, RSA = Lane("ec", most=16), Lane("rsa", most=4)


def signing(lane: Lane, *messages: bytes) -> Job:
    items = tuple(
        frames.TokenSignItem("k", SignatureScheme.ECDSA_SECP256R1_SHA256, 2**63, message) for message in messages
    )
    return Job(frames.TokenSign(items), asyncio.get_running_loop().create_future(), None, lane)


def plain(question: frames.Question) -> Job:
    return Job(question, asyncio.get_running_loop().create_future(), None)


async def test_what_waits_in_a_lane_goes_together_up_to_its_most() -> None:
    queue, jobs = JobQueue(), [signing(EC, b"%d" % number) for number in range(20)]
    for job in jobs:
        queue.add(job)
    assert queue.take(workers=1) == jobs[:16]
    assert queue.take(workers=1) == jobs[16:]
    assert queue.take(workers=1) == []
    assert len(queue) == 0


async def test_workers_share_what_waits_and_a_lane_may_keep_a_few_together() -> None:
    for lane, size in ((EC, 2), (Lane("vault", most=32, least=8, paced=False), 8)):
        queue = JobQueue()
        for number in range(8):
            queue.add(signing(lane, b"%d" % number))
        assert len(queue.take(workers=4)) == size


async def test_lanes_take_turns() -> None:
    queue = JobQueue()
    for _ in range(8):
        queue.add(signing(RSA, b"r"))
    queue.add(signing(EC, b"e"))
    taken = [queue.take(workers=1)[0].lane for _ in range(3)]
    assert taken == [RSA, EC, RSA]


async def test_what_is_no_signature_goes_alone_and_behind_nothing() -> None:
    queue, create = JobQueue(), plain(frames.Find("k"))
    queue.add(create)
    queue.add(plain(frames.Find("l")))
    assert queue.take(workers=1, behind_another=True) == []
    assert queue.take(workers=1) == [create]
    assert len(queue) == 1


async def test_a_slow_token_gets_fewer_at_a_time() -> None:
    queue = JobQueue()
    assert queue.share(EC, 100, workers=1) == 16
    queue.answered(EC, items=16, seconds=16 * QUESTION_S / 4)
    assert queue.share(EC, 100, workers=1) == 4
    for _ in range(50):
        queue.answered(EC, items=1, seconds=QUESTION_S * 2)
    assert queue.share(EC, 100, workers=1) == 1
    assert queue.share(RSA, 100, workers=1) == 4


async def test_what_is_put_back_is_next_and_what_is_removed_is_gone() -> None:
    queue, first, second, third = JobQueue(), signing(EC, b"1"), signing(EC, b"2"), signing(RSA, b"3")
    for job in (second, third):
        queue.add(job)
    queue.add(first, first=True)
    assert queue.remove(second)
    assert not queue.remove(second)
    assert queue.take(workers=1) == [first]
    assert queue.take_all() == [third]
    assert len(queue) == 0


async def test_each_gets_its_own_part_of_the_answer() -> None:
    jobs = [signing(EC, b"1", b"2"), signing(EC, b"3")]
    question = merged(jobs)
    assert isinstance(question, frames.TokenSign)
    assert [item.message for item in question.items] == [b"1", b"2", b"3"]
    error = KeyNotFound()
    parts = parted(jobs, frames.TokenSigned((b"s1", error, b"s3")))
    assert parts == [frames.TokenSigned((b"s1", error)), frames.TokenSigned((b"s3",))]
    assert parted(jobs, frames.TokenSigned((b"s1", b"s2"))) is None
    refused = frames.Failed(error)
    assert parted(jobs, refused) == [refused, refused]
