"""The planner: for any set of living ranks, where does each expert's replica go.

    placement = replan(load_LE, view, num_experts=256, slots_per_rank=9)     what each slot is to hold
    moves     = diff(held_LP, placement, rank)                               what this rank must fill
    table_LEW = routes(placement, view, rank, width)                         which replica a token takes

Pure functions of their arguments, the same on every machine: a failure, a rejoin, a periodic rebalance and the first
start are the same call with other views. numpy only; all layers are planned at once, as arrays [L, ...].

    ground  what a plan stands on: living ranks, hosts, slots to fill     place   deal replicas out, repair conflicts
    counts  how many replicas of each expert, which ranks can be safe     even    exchanges that even the load out
    moves   plans that start from what is held                            groups  placement by groups and hosts
    plan    replan and diff        routes  the router's table             load    balancedness, gain, the window
    risk    what deaths would cost                                        dropin  the signature other engines know
"""

from phalanx.elastic.replan.counts import Priority
from phalanx.elastic.replan.dropin import rebalance_experts
from phalanx.elastic.replan.load import LoadWindow, balancedness, gain, rank_loads, worth_adopting
from phalanx.elastic.replan.plan import Move, diff, replan
from phalanx.elastic.replan.risk import Endurance, at_risk, at_risk_pairs, endurance, restore_seconds
from phalanx.elastic.replan.routes import routed_loads, routes, shares

__all__ = [
    "Endurance",
    "LoadWindow",
    "Move",
    "Priority",
    "at_risk",
    "at_risk_pairs",
    "balancedness",
    "diff",
    "endurance",
    "gain",
    "rank_loads",
    "rebalance_experts",
    "replan",
    "restore_seconds",
    "routed_loads",
    "routes",
    "shares",
    "worth_adopting",
]
