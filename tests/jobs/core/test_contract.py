"""Numbers and words that ledgers, scripts of sites and other programs hold on to: a change here breaks runs that are still going."""

import json
import signal
from enum import Enum

import pytest

from jobs.core import contract

FROZEN: dict[type[Enum], str] = {
    contract.Exit: '{"DONE": 0, "FAILED": 1, "USAGE": 2, "REQUEUE": 75, "IMPOSSIBLE": 78, "INTERRUPTED": 130}',
    contract.Cause: """{"FINISHED": "finished", "PREEMPTED": "preempted", "TIME_LIMIT": "time_limit", "REQUEUED": "requeued",
        "NODE_FAILURE": "node_failure", "OUT_OF_MEMORY": "out_of_memory", "KILLED": "killed", "CANCELLED": "cancelled", "PRUNED": "pruned",
        "CODE_ERROR": "code_error", "HANG": "hang", "STORAGE": "storage", "UNKNOWN": "unknown"}""",
    contract.Event: """{"SUBMITTED": "submitted", "START": "start", "RESUMED": "resumed", "STOP": "stop", "CHECKPOINT": "checkpoint",
        "SAVE_FAILED": "save_failed", "DAMAGED": "damaged", "OVERFLOW": "overflow", "CHANGED": "changed", "END": "end", "REQUEUE": "requeue",
        "BAD_NODE": "bad_node", "CANCEL": "cancel"}""",
    contract.RankEnv: """{"RUN_DIR": "HOLDFAST_RUN_DIR", "ATTEMPT": "HOLDFAST_ATTEMPT", "STARTED": "HOLDFAST_STARTED", "RANK": "RANK",
        "WORLD_SIZE": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_RANK", "LOCAL_WORLD_SIZE": "LOCAL_WORLD_SIZE", "MASTER_ADDR": "MASTER_ADDR",
        "MASTER_PORT": "MASTER_PORT"}""",
}


@pytest.mark.parametrize("words", FROZEN, ids=lambda words: words.__name__)
def test_words_and_numbers_that_others_rely_on_stay_and_new_ones_are_added_here(words: type[Enum]) -> None:
    assert {member.name: member.value for member in words} == json.loads(FROZEN[words])


def test_signals_of_a_stop_are_those_that_slurm_and_the_script_send() -> None:
    assert contract.LEAD_SIGNAL is signal.SIGUSR2 and set(contract.STOP_SIGNALS) == {signal.SIGTERM, contract.LEAD_SIGNAL}
    # NCCL has a handler of its own for USR1, and an asked-for stack must not end a process without a handler.
    assert contract.STACKS_SIGNAL is signal.SIGURG
    assert contract.PRUNED_WORD == "pruned" and contract.LOCAL == "local-"


def test_ports_of_the_rendezvous_lie_below_those_that_linux_hands_out() -> None:
    assert (min(contract.RENDEZVOUS_PORTS), max(contract.RENDEZVOUS_PORTS)) == (20000, 29999)
