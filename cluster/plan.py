"""What a run would start, where it would go, and what does not fit: before anything starts."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from actors.policy.loading import load_outline
from actors.router.backbone import encoder_source, outline_size
from actors.router.chooser import encoder_size
from cluster.config import MethodConfig
from protocols.errors import BadInput
from protocols.model import ModelConfig
from protocols.policy import PolicyConfig
from protocols.retriever import RetrieverConfig
from protocols.reward_model import RewardModelConfig
from protocols.router import FINE_TUNED, RouterConfig

GIB = 1 << 30
ADAM, GRADIENT, WEIGHT = 8, 4, 4
"""Bytes per trained weight that AdamW's two moments, its gradient and itself take in float32."""


AT_MOST = "cache at most"
"""What sampler.max_batch_tokens allows for; most batches need far less, so it is shown but not counted."""


@dataclass(frozen=True)
class Size:
    """What memory depends on: number of weights, of trained ones, and numbers that are cached per token."""

    weights: int
    trained: int
    cached_token: int


@dataclass(frozen=True)
class Process:
    """One process of a run: its name, what it asks of the scheduler, and its memory in GiB by use.

    `device` is the memory of its GPUs, or the machine's if it has none; `host` is the machine's in either case.
    """

    name: str
    cpus: float
    gpus: float
    device: Mapping[str, float]
    host: Mapping[str, float] = field(default_factory=dict)
    computes_on: str = "auto"
    """The policy's device."""

    @property
    def on_device(self) -> float:
        """GiB of its GPUs, or of the machine's memory if it has none."""
        return sum(size for name, size in self.device.items() if name != AT_MOST)

    @property
    def on_host(self) -> float:
        """GiB of the machine's memory."""
        return sum(self.host.values()) + (0 if self.gpus else self.on_device)


@dataclass
class Node:
    """One machine: what is left of it while processes are placed."""

    name: str
    cpus: float
    memory: float
    gpus: list[float] = field(default_factory=list)
    """Free share of each GPU."""
    gpu_memory: float = 0.0
    """GiB of one GPU; 0: not known."""
    inline_memory: float = 0.0
    """GiB that inline policies have taken of the first GPU."""


@dataclass(frozen=True)
class Placed:
    """A process and its machine, or why there is none."""

    process: Process
    node: str = ""
    problem: str = ""


def size_of(config: ModelConfig) -> Size:
    """Read a model's configuration; no weights are loaded. Raises BadInput when there is no such model."""
    model = load_outline(config).model
    parameters = list(model.named_parameters())
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Size(
        weights=sum(p.numel() for _, p in parameters),
        trained=sum(p.numel() for name, p in parameters if config.lora is None or ".lora_" in name),
        cached_token=2 * text.num_hidden_layers * heads * width,
    )


def processes(name: str, config: PolicyConfig, size: Size) -> Iterator[Process]:
    """The processes of a policy with their memory; activations and logits of a micro-batch come on top."""
    own, half = config.sampler_resources, config.dtype == "bfloat16"
    if not config.split:
        frozen = {"weights": float(size.weights * (2 if half else WEIGHT))}
        parts = (_trainer_bytes(config, size)[0] if config.trainer else frozen) | _cache(config, size)
        for index in range(own.replicas):
            yield Process(
                _numbered(name, index, own.replicas), own.cpus, own.gpus, _in_gib(parts), computes_on=config.device
            )
        return
    assert config.trainer is not None
    parts = {"weights": size.weights * (2 if half else WEIGHT), **_cache(config, size)}
    for index in range(own.replicas):
        yield Process(
            _numbered(f"{name}-sampler", index, own.replicas),
            own.cpus,
            own.gpus,
            _in_gib(parts),
            computes_on=config.device,
        )
    device, host = _trainer_bytes(config, size)
    for index in range(config.trainer.workers):
        yield Process(
            f"{name}-trainer-{index}", own.cpus, config.resources.gpus, _in_gib(device), _in_gib(host), config.device
        )


def reward_processes(name: str, config: RewardModelConfig, size: Size) -> Iterator[Process]:
    """The processes of a reward model: copies that do not learn, one that does, or its ranks."""
    weight = 2 if config.dtype == "bfloat16" else WEIGHT
    frozen = {"weights": float(size.weights * weight)}
    reference = {"reference": float(size.weights * weight)} if config.needs_reference else {}
    trainer, own = config.trainer, config.resources
    if trainer is None:
        for index in range(own.replicas):
            parts = _in_gib(frozen | reference)
            yield Process(_numbered(name, index, own.replicas), own.cpus, own.gpus, parts, computes_on=config.device)
        return
    device, host = _trainer_bytes(config, size)
    if not config.split:
        yield Process(name, own.cpus, own.gpus, _in_gib(device | reference), _in_gib(host), config.device)
        return
    for index in range(trainer.workers):
        rank = f"{name}-trainer-{index}"
        yield Process(rank, own.cpus, own.gpus, _in_gib(device), _in_gib(host), config.device)
    if reference:
        yield Process(name, own.cpus, own.gpus, _in_gib(reference), computes_on=config.device)


def router_processes(name: str, config: RouterConfig) -> Iterator[Process]:
    """The processes of a router: its encoder, and what training it takes."""
    own = config.resources
    size = encoder_size(config)
    trained = size if config.trainer is not None and config.kind in FINE_TUNED else 0
    parts = _in_gib({"weights": size * WEIGHT, "gradients": trained * GRADIENT, "optimiser": trained * ADAM})
    for index in range(own.replicas):
        yield Process(_numbered(name, index, own.replicas), own.cpus, own.gpus, parts, computes_on=config.device)


def retriever_processes(name: str, config: RetrieverConfig) -> Iterator[Process]:
    """The processes of a retriever or of its shards: an encoder if it has one. Indexes are read by memory map."""
    own, encodes = config.resources, config.kind in ("dense", "hybrid")
    parts = _in_gib({"weights": outline_size(encoder_source(config.encoder)) * WEIGHT} if encodes else {})
    role, count = (name, own.replicas) if config.shards == 1 else (f"{name}-shard", config.shards)
    for index in range(count):
        yield Process(_numbered(role, index, count), own.cpus, own.gpus, parts, computes_on=config.device)


def _trainer_bytes(config: ModelConfig, size: Size) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of one rank: on its device, and in the machine's memory when the optimiser is kept there."""
    trainer = config.trainer
    assert trainer is not None
    if trainer.engine == "torch":
        return {
            "weights": size.weights * WEIGHT,
            "gradients": size.trained * GRADIENT,
            "optimiser": size.trained * ADAM,
        }, {}
    half, ranks, stage = config.dtype == "bfloat16", trainer.workers, trainer.zero_stage
    element = 2 if half else WEIGHT
    weights = size.weights * element / (ranks if stage == 3 else 1)
    gradients = size.trained * element / (ranks if stage >= 2 else 1)
    # In bfloat16 the optimiser holds the float32 weights as well.
    optimiser = size.trained * (ADAM + (WEIGHT if half else 0)) / ranks
    if not trainer.offload:
        return {"weights": weights, "gradients": gradients, "optimiser": optimiser}, {}
    if stage < 3:
        return {"weights": weights, "gradients": gradients}, {"optimiser": optimiser}
    return {"gradients": gradients}, {"weights": weights, "optimiser": optimiser}


def _cache(config: PolicyConfig, size: Size) -> dict[str, float]:
    sampler = config.sampler
    if sampler.engine == "vllm":
        return {"cache": (sampler.cache_gib or (0 if config.resources.gpus else 1)) * GIB}
    element = 2 if config.dtype == "bfloat16" else WEIGHT
    return {AT_MOST: float(sampler.max_batch_tokens * size.cached_token * element)}


def _numbered(name: str, index: int, count: int) -> str:
    return name if count == 1 else f"{name}-{index}"


def _in_gib(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: size / GIB for name, size in parts.items() if size}


def this_machine() -> Node:
    """What this process may use."""
    count = torch.cuda.device_count()
    per_gpu = torch.cuda.get_device_properties(0).total_memory / GIB if count else 0.0
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    return Node("this machine", float(len(os.sched_getaffinity(0))), memory, [1.0] * count, per_gpu)


def nodes(config: MethodConfig) -> list[Node]:
    """The machines of the Ray cluster that RAY_ADDRESS names, or this one."""
    if config.transport == "ray" and os.environ.get("RAY_ADDRESS"):
        from cluster.ray_transport import cluster_nodes

        return [Node(name, cpus, memory / GIB, [1.0] * gpus) for name, cpus, memory, gpus in cluster_nodes()]
    return [this_machine()]


def place(wanted: Sequence[Process], nodes: Sequence[Node], *, inline: bool) -> list[Placed]:
    """Give each process the first machine with room for it, the largest first. Takes what it gives from `nodes`.

    `inline`: there is one process, so cores and shares of GPUs are not given out; memory is, of a GPU if it has one.
    """
    found: dict[str, Placed] = {}
    for process in sorted(wanted, key=lambda one: (-one.gpus, -one.on_device, -one.cpus)):
        found[process.name] = _settle(process, nodes, inline)
    return [found[process.name] for process in wanted]


def _settle(process: Process, nodes: Sequence[Node], inline: bool) -> Placed:
    problems = []
    for node in nodes:
        problem = _take(process, node, inline)
        if not problem:
            return Placed(process, node.name)
        problems.append(problem)
    return Placed(process, problem="; ".join(problems))


def _take(process: Process, node: Node, inline: bool) -> str:
    """Take a process's share from a machine, unless it has not enough: then say of what."""
    if not inline and process.cpus > node.cpus + 1e-9:
        return f"needs {process.cpus:g} cpus, {node.name} has {node.cpus:.2g} left"
    if inline and node.gpus and process.computes_on != "cpu":
        return _take_inline(process, node)
    if process.on_host > node.memory:
        return f"needs {process.on_host:.1f} GiB of memory, {node.name} has {node.memory:.1f} left"
    gpus = [] if inline else _gpus_for(process.gpus, node.gpus)
    if gpus is None:
        return f"needs gpus={process.gpus:g}, {node.name} has {sum(node.gpus):g} left"
    share = min(process.gpus, 1.0)
    if gpus and node.gpu_memory and process.on_device / len(gpus) > share * node.gpu_memory:
        return (
            f"needs {process.on_device / len(gpus):.1f} GiB of each GPU, {share:g} of one of {node.name}"
            f" is {share * node.gpu_memory:.1f}"
        )
    for index in gpus:
        node.gpus[index] -= share
    node.cpus -= process.cpus
    node.memory -= process.on_host
    return ""


def _take_inline(process: Process, node: Node) -> str:
    """Take memory of the GPU that all inline policies share, whatever they ask of a scheduler."""
    left, host = node.gpu_memory - node.inline_memory, sum(process.host.values())
    if process.on_device > left:
        return f"needs {process.on_device:.1f} GiB of the GPU, {node.name} has {left:.1f} left there"
    if host > node.memory:
        return f"needs {host:.1f} GiB of memory, {node.name} has {node.memory:.1f} left"
    node.inline_memory += process.on_device
    node.memory -= host
    return ""


def _gpus_for(wanted: float, free: Sequence[float]) -> list[int] | None:
    """Indexes of GPUs with room: one for a fraction, as many whole ones as asked otherwise."""
    count, share = (1, wanted) if 0 < wanted < 1 else (round(wanted), 1.0)
    fitting = [index for index, left in enumerate(free) if left >= share - 1e-9]
    return fitting[:count] if len(fitting) >= count else None


def plan(
    config: MethodConfig, models: Mapping[str, ModelConfig | RetrieverConfig], nodes: Sequence[Node]
) -> list[Placed]:
    """Where each process of the models goes. The actors of other kinds hold no weights and take no core."""
    wanted: list[Process] = []
    for name, model in models.items():
        if isinstance(model, RewardModelConfig):
            wanted += reward_processes(name, model, size_of(model))
        elif isinstance(model, RouterConfig):
            wanted += router_processes(name, model)
        elif isinstance(model, RetrieverConfig):
            wanted += retriever_processes(name, model)
        elif isinstance(model, PolicyConfig) and model.at is None:
            wanted += processes(name, model, size_of(model))
    return place(wanted, nodes, inline=config.transport == "inline")


def check(placed: Sequence[Placed]) -> None:
    """Raise BadInput that names the first process that fits nowhere."""
    for one in placed:
        if one.problem:
            raise BadInput(f"{one.process.name} does not fit: {one.problem}")


def table(placed: Sequence[Placed]) -> str:
    """One line per process: what it asks for, its memory by use, and where it goes."""
    rows = [("process", "cpus", "gpus", "GiB", "of which", "where")]
    for one in placed:
        process = one.process
        parts = {**process.device, **{f"{name} (host)": size for name, size in process.host.items()}}
        uses = ", ".join(f"{name} {size:.2f}" for name, size in parts.items())
        total = process.on_device + sum(process.host.values())
        where = one.node or f"NOWHERE: {one.problem}"
        rows.append((process.name, f"{process.cpus:g}", f"{process.gpus:g}", f"{total:.2f}", uses, where))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
