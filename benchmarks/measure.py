"""Timing in turns, A B C A B C …, so that a machine that is slow for a while slows all contenders equally."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

from .contenders import Contender
from .problem import Problem
from .worker import ContenderError, Worker

TURN = 0.1
"""Seconds of one turn. Shorter steps are repeated, and their median counts."""
MOST_ROUNDS = 200


class Entry(NamedTuple):
    contender: Contender
    problem: Problem
    step: str
    """infer or train"""


Times = dict[int, float]
"""Seconds by round."""


def take_turns(
    entries: Sequence[Entry],
    worker_of: Callable[[Contender], Worker],
    seconds: float,
    least_rounds: int,
    give_up: Callable[[Entry, str], None],
) -> dict[Entry, Times]:
    """Times entries in turns until the seconds, which they share equally, are used up.

    An entry that has used its share takes no more turns, but each has `least_rounds`. The check before was each entry's
    warm-up. An entry that raises is given up, and has no times.
    """
    share = seconds / len(entries)
    turn = min(TURN, share / least_rounds)
    times: dict[Entry, Times] = {entry: {} for entry in entries}
    used = dict.fromkeys(entries, 0.0)
    for k in range(MOST_ROUNDS):
        due = [entry for entry in times if k < least_rounds or used[entry] < share]
        if not due:
            break
        for entry in due:
            try:
                took = worker_of(entry.contender).turn(*entry, turn)
            except ContenderError as error:
                del times[entry]
                give_up(entry, str(error))
                continue
            times[entry][k] = median(took)
            used[entry] += sum(took)
    return times


def ratio(ours: Times, theirs: Times) -> float:
    """Returns how many times as long as ours theirs took: the median over the rounds in which both ran."""
    return median(theirs[k] / ours[k] for k in ours.keys() & theirs.keys())
