"""The helper that runs functions in two processes keeps its promises."""

from __future__ import annotations

import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from tests.helpers import world


def _describe(rank, group, x, own):
    assert dist.get_rank(group) == rank
    assert dist.get_world_size(group) == 2
    return rank, os.getpid(), x, own, torch.rand(1).item(), torch.get_num_threads()


def _meet_alone(rank, group):
    if rank == 0:
        raise ValueError("only here")
    dist.barrier(group)


def _sleep(rank, group):
    time.sleep(60 * rank)


def _warn(rank, group):
    warnings.warn("a warning", stacklevel=1)


def _exit(rank, group):
    os._exit(3)


def _identity(rank, group):
    return os.getpid()


def test_both_ranks_answer_and_stay():
    x = torch.arange(3.0)
    first, second = world.run(_describe, x, world.per_rank("a", "b"))
    assert (first[0], second[0]) == (0, 1)
    assert (first[3], second[3]) == ("a", "b")
    assert torch.equal(first[2], x)
    assert torch.equal(second[2], x)
    assert first[4] == second[4]
    assert first[5] == second[5] == 1
    assert len({first[1], second[1], os.getpid()}) == 3
    assert world.run(_identity) == [first[1], second[1]]


@pytest.mark.sweep  # each failure starts new processes
def test_a_failure_does_not_wait_for_the_other_rank():
    # rank 1 waits in gloo for TIMEOUT, and would then answer with gloo's error
    told = r"(?s)rank 0: .*_meet_alone.*ValueError: only here.*rank 1: not done in time"
    with pytest.raises(world.RankError, match=told):
        world.run(_meet_alone, timeout=2 * world.TIMEOUT)


@pytest.mark.sweep  # each failure starts new processes
def test_a_hang_and_an_end_are_failures_and_the_next_call_works():
    with pytest.raises(world.RankError, match="rank 1: not done in time"):
        world.run(_sleep, timeout=8.0)
    with pytest.raises(world.RankError, match="rank 0: the process ended"):
        world.run(_exit)
    before = world.run(_identity)
    with pytest.raises(world.RankError, match="UserWarning: a warning"):
        world.run(_warn)
    assert not set(before) & set(world.run(_identity))
