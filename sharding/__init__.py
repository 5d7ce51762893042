"""Where every array lives: the mesh, the rules that name logical axes, and the layout between them.

A model brings rules (regex over paths -> logical axes); a config sizes the mesh and may change the
table; `partition` gives every array its sharding and refuses what does not fit. Inside a compiled
function `constrain` places activations.
"""

from sharding.auto import derive_rules
from sharding.constraints import constrain, gather_rows
from sharding.context import context_attention
from sharding.distributed import (
    Processes,
    global_array,
    global_batch,
    initialize_distributed,
    rows_of_process,
)
from sharding.layout import (
    TABLE,
    Layout,
    ShardingConfig,
    axis_names,
    check_experts,
    check_heads,
    make_layout,
)
from sharding.mesh import AXES, MeshConfig, make_mesh
from sharding.partition import check_divisible, partition, sharded_init, state_shardings
from sharding.products import split_linear
from sharding.rules import Rule, match_rules, override_axes, prefixed, rules_table

__all__ = [
    "AXES",
    "TABLE",
    "Layout",
    "MeshConfig",
    "Processes",
    "Rule",
    "ShardingConfig",
    "axis_names",
    "check_divisible",
    "check_experts",
    "check_heads",
    "constrain",
    "context_attention",
    "derive_rules",
    "gather_rows",
    "global_array",
    "global_batch",
    "initialize_distributed",
    "make_layout",
    "make_mesh",
    "match_rules",
    "override_axes",
    "partition",
    "prefixed",
    "rows_of_process",
    "rules_table",
    "sharded_init",
    "split_linear",
    "state_shardings",
]
