"""Dictionaries on the ranks of a process group: replicas that stay the same, and tables that are spread over them.

``docs/distributed.md`` says which way to take when.
"""

from __future__ import annotations

from pdrs._ranks.buckets import bucket_state_dict, bucket_template, load_bucket_state_dict
from pdrs._ranks.checkpoint_load import load
from pdrs._ranks.checkpoint_save import save
from pdrs._ranks.clip import clip_grad_norm_
from pdrs._ranks.data_parallel import ignored_params, leave_out
from pdrs._ranks.exchange import OutOfStepError
from pdrs._ranks.initial_values import normal, uniform
from pdrs._ranks.plan import Plan
from pdrs._ranks.replicas import broadcast, check, insert
from pdrs._ranks.sharded import ShardedParameterDict

__all__ = [
    "OutOfStepError",
    "Plan",
    "ShardedParameterDict",
    "broadcast",
    "bucket_state_dict",
    "bucket_template",
    "check",
    "clip_grad_norm_",
    "ignored_params",
    "insert",
    "leave_out",
    "load",
    "load_bucket_state_dict",
    "normal",
    "save",
    "uniform",
]
