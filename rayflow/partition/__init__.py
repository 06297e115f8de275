"""Who gets which row: stable hashes of keys (K2), key groups (K1, K3) and the splitting of batches (F2)."""

from rayflow.partition.hashing import HASH_VERSION, NULL_HASH, check_key_type, hash_columns
from rayflow.partition.splitting import (
    BroadcastPartitioner,
    ForwardPartitioner,
    HashPartitioner,
    Partitioner,
    RebalancePartitioner,
    key_groups,
    split_batch,
    subtask_of_group,
)

__all__ = [
    "HASH_VERSION",
    "NULL_HASH",
    "BroadcastPartitioner",
    "ForwardPartitioner",
    "HashPartitioner",
    "Partitioner",
    "RebalancePartitioner",
    "check_key_type",
    "hash_columns",
    "key_groups",
    "split_batch",
    "subtask_of_group",
]
