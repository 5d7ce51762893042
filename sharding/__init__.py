"""Where every array lives: the mesh, the rules that name logical axes, and the layout between them.

A model brings rules (regex over paths -> logical axes); a config sizes the mesh and may change the
table; `partition` gives every array its sharding and refuses what does not fit. Inside a compiled
function `constrain` places activations.
"""

from sharding.auto import derive_rules
from sharding.clusters import Cluster, cluster_mesh, place
from sharding.coded import Coding, dequantize_block, quantize_block
from sharding.constraints import constrain, gather_rows, map_devices
from sharding.context import context_attention
from sharding.distributed import (
    Processes,
    global_array,
    global_batch,
    initialize_distributed,
    rows_of_process,
)
from sharding.hierarchical import (
    SECONDARY,
    Gathered,
    Roles,
    gather,
    local_layout,
    roles_of,
    scatter,
    scatter_once,
    swizzle_index,
    weight_of,
)
from sharding.layout import (
    TABLE,
    Collectives,
    Layout,
    ShardingConfig,
    axis_names,
    check_experts,
    check_heads,
    make_layout,
)
from sharding.mesh import AXES, MeshConfig, make_mesh
from sharding.partition import check_divisible, partition, sharded_init, state_shardings
from sharding.pipeline import Pipeline, alternate, chunks_of, circulate, outside_stages
from sharding.pipeline_schedules import (
    PipelineConfig,
    Schedule,
    bubble_formula,
    check_layers,
    gpipe,
    pipeline_schedule,
)
from sharding.products import split_linear
from sharding.rules import Rule, match_rules, override_axes, prefixed, rules_table
from sharding.stage_layers import check_stage_layers

__all__ = [
    "AXES",
    "SECONDARY",
    "TABLE",
    "Cluster",
    "Coding",
    "Collectives",
    "Gathered",
    "Layout",
    "MeshConfig",
    "Pipeline",
    "PipelineConfig",
    "Processes",
    "Roles",
    "Rule",
    "Schedule",
    "ShardingConfig",
    "alternate",
    "axis_names",
    "bubble_formula",
    "check_divisible",
    "check_experts",
    "check_heads",
    "check_layers",
    "check_stage_layers",
    "chunks_of",
    "circulate",
    "cluster_mesh",
    "constrain",
    "context_attention",
    "dequantize_block",
    "derive_rules",
    "gather",
    "gather_rows",
    "global_array",
    "global_batch",
    "gpipe",
    "initialize_distributed",
    "local_layout",
    "make_layout",
    "make_mesh",
    "map_devices",
    "match_rules",
    "outside_stages",
    "override_axes",
    "partition",
    "pipeline_schedule",
    "place",
    "prefixed",
    "quantize_block",
    "roles_of",
    "rows_of_process",
    "rules_table",
    "scatter",
    "scatter_once",
    "sharded_init",
    "split_linear",
    "state_shardings",
    "swizzle_index",
    "weight_of",
]
