"""``pdrs.distributed``: a named table that is spread over the ranks of a process group."""

from pdrs._ranks.clip import clip_grad_norm_
from pdrs._ranks.data_parallel import ignored_params, leave_out
from pdrs._ranks.exchange import OutOfStepError
from pdrs._ranks.initial_values import normal, uniform
from pdrs._ranks.plan import Plan
from pdrs._ranks.sharded import ShardedParameterDict

__all__ = [
    "OutOfStepError",
    "Plan",
    "ShardedParameterDict",
    "clip_grad_norm_",
    "ignored_params",
    "leave_out",
    "normal",
    "uniform",
]
