"""New places of classes that earlier versions had in other modules, so that old recipes and run folders still load."""

from lightspan.config.tree import Node

MODULES = {  # old name -> new name
    "lightspan.callbacks.subspace_projection": "lightspan.callbacks.training.subspace_projection",
    "lightspan.callbacks.adaptation": "lightspan.callbacks.training.adaptation",
    "lightspan.callbacks.intrinsic_dimension": "lightspan.callbacks.training.intrinsic_dimension",
    "lightspan.callbacks.rank_selection": "lightspan.callbacks.training.rank_selection",
    "lightspan.callbacks.dimension_tracker": "lightspan.callbacks.watching.dimension_tracker",
    "lightspan.callbacks.ledger": "lightspan.callbacks.watching.ledger",
    "lightspan.callbacks.online_probes": "lightspan.callbacks.watching.online_probes",
    "lightspan.callbacks.picture_samples": "lightspan.callbacks.watching.picture_samples",
    "lightspan.callbacks.text_samples": "lightspan.callbacks.watching.text_samples",
    "lightspan.callbacks.progress": "lightspan.callbacks.watching.progress",
    "lightspan.callbacks.run_summary": "lightspan.callbacks.watching.run_summary",
    "lightspan.callbacks.throughput": "lightspan.callbacks.watching.throughput",
    "lightspan.callbacks.checkpoint": "lightspan.callbacks.resilience.checkpoint",
    "lightspan.callbacks.preemption": "lightspan.callbacks.resilience.preemption",
    "lightspan.callbacks.watchdog": "lightspan.callbacks.resilience.watchdog",
    "lightspan.callbacks.finite": "lightspan.callbacks.resilience.finite",
    "lightspan.callbacks.random_state": "lightspan.callbacks.resilience.random_state",
    "lightspan.callbacks.accumulation": "lightspan.callbacks.resilience.accumulation",
    "lightspan.callbacks.proof": "lightspan.callbacks.resilience.proof",
    "lightspan.callbacks.jsonl_logger": "lightspan.loggers.jsonl",
    "lightspan.optim.triggers": "lightspan.optim.bases",
    "lightspan.adapters.pela": "lightspan.surgery.factorise",
    "lightspan.datamodules.loader": "lightspan.datamodules.loading.loader",
    "lightspan.datamodules.shards": "lightspan.datamodules.shards.stream",
    "lightspan.datamodules.images": "lightspan.datamodules.images.small",
    "lightspan.datamodules.text": "lightspan.datamodules.text.windows",
    "lightspan.datamodules.classes": "lightspan.datamodules.images.classes",
    "lightspan.datamodules.shapes": "lightspan.datamodules.images.shapes",
    "lightspan.datamodules.views": "lightspan.datamodules.images.views",
    "lightspan.datamodules.austen": "lightspan.datamodules.text.austen",
    "lightspan.nn.class_gates": "lightspan.nn.heads.class_gates",
    "lightspan.nn.dino_head": "lightspan.nn.heads.dino_head",
    "lightspan.nn.pooling": "lightspan.nn.heads.pooling",
    "lightspan.nn.projector": "lightspan.nn.heads.projector",
    "lightspan.nn.block_masks": "lightspan.nn.masking.block_masks",
    "lightspan.nn.centring": "lightspan.nn.teachers.centring",
    "lightspan.nn.ema": "lightspan.nn.teachers.ema",
    "lightspan.nn.frozen": "lightspan.nn.teachers.frozen",
    "lightspan.nn.prototype_network": "lightspan.nn.teachers.prototype_network",
    "lightspan.datamodules.reviews": "lightspan.datamodules.text.reviews",
}

CLASSES = {  # that have another name
    f"lightspan.estimators.{module}.Checkpoint": "lightspan.estimators.inputs.CheckpointWeights"
    for module in ("inputs", "interference")
} | {f"lightspan.methods.image_text.m3i.{name}": f"lightspan.targets.{name}" for name in ("MomentumFeatures", "Pixels")}


def followed(node: Node) -> Node:
    """The tree with every `class_path` as in this version."""
    if isinstance(node.value, list):
        return Node([followed(child) for child in node.value], node.where, node.replaced)
    if not isinstance(node.value, dict):
        return node
    children = {key: followed(child) for key, child in node.value.items()}
    named = children.get("class_path")
    if named is not None and isinstance(named.value, str):
        module, dot, name = named.value.rpartition(".")
        now = CLASSES.get(named.value, f"{MODULES.get(module, module)}{dot}{name}")
        children["class_path"] = Node(now, named.where, named.replaced)
    return Node(children, node.where, node.replaced)
