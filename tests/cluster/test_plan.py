"""What a run would take, against worked numbers, and what does not fit."""

from typing import Any

import pytest

from cluster.config import MethodConfig
from cluster.plan import AT_MOST, GIB, Node, Placed, Process, Size, check, place, plan, processes, size_of, table
from protocols.errors import BadInput
from protocols.policy import PolicyConfig
from protocols.retriever import RetrieverConfig

SIZE = Size(weights=GIB, trained=GIB, cached_token=1000)


def wanted(size: Size = SIZE, **given: Any) -> list[Process]:
    return list(processes("p", PolicyConfig.model_validate(given), size))


def test_one_process_for_all() -> None:
    (one,) = wanted(sampler={"max_batch_tokens": GIB // 1000})
    assert one.name == "p"
    assert one.device == pytest.approx({"weights": 4, "gradients": 4, "optimiser": 8, AT_MOST: 4}, rel=1e-5)
    assert (one.on_device, one.on_host) == (16, 16)


def test_frozen_policies_have_nothing_but_weights() -> None:
    ones = wanted(trainer=None, dtype="bfloat16", resources={"replicas": 2, "gpus": 1})
    assert [one.name for one in ones] == ["p-0", "p-1"]
    assert [one.on_device for one in ones] == [2, 2]
    assert ones[0].on_host == 0


def test_an_adapter_alone_has_gradients() -> None:
    (one,) = wanted(Size(GIB, GIB // 8, 1), lora={"rank": 4})
    assert (one.device["weights"], one.device["gradients"], one.device["optimiser"]) == (4, 0.5, 1)


@pytest.mark.parametrize(
    ("trainer", "dtype", "device", "host"),
    [
        ({"engine": "torch"}, "float32", {"weights": 4, "gradients": 4, "optimiser": 8}, {}),
        ({"zero_stage": 1}, "float32", {"weights": 4, "gradients": 4, "optimiser": 2}, {}),
        ({"zero_stage": 2}, "float32", {"weights": 4, "gradients": 1, "optimiser": 2}, {}),
        ({"zero_stage": 3}, "float32", {"weights": 1, "gradients": 1, "optimiser": 2}, {}),
        ({"zero_stage": 2}, "bfloat16", {"weights": 2, "gradients": 0.5, "optimiser": 3}, {}),
        ({"zero_stage": 2, "offload": True}, "bfloat16", {"weights": 2, "gradients": 0.5}, {"optimiser": 3}),
        ({"zero_stage": 3, "offload": True}, "float32", {"gradients": 1}, {"weights": 1, "optimiser": 2}),
    ],
)
def test_a_rank_of_four(trainer: dict[str, Any], dtype: str, device: Any, host: Any) -> None:
    given = {"engine": "deepspeed", "workers": 4} | trainer
    ones = wanted(trainer=given, dtype=dtype, resources={"gpus": 1, "cpus": 3})
    assert [one.name for one in ones] == ["p-sampler", *(f"p-trainer-{i}" for i in range(4))]
    assert (ones[1].device, ones[1].host, ones[1].cpus, ones[1].gpus) == (device, host, 3, 1)
    assert ones[1].on_host == sum(host.values())


def test_vllm_samplers() -> None:
    sampler = {"engine": "vllm", "replicas": 2, "tensor_parallel": 2, "cache_gib": 3}
    ones = wanted(sampler=sampler, dtype="bfloat16", resources={"gpus": 1})
    assert [(one.name, one.gpus, one.on_device) for one in ones] == [
        ("p-sampler-0", 2, 5), ("p-sampler-1", 2, 5), ("p-trainer-0", 1, 16)
    ]  # fmt: skip
    assert wanted(sampler={"engine": "vllm"})[0].device["cache"] == 1


def test_sizes_are_those_of_the_model() -> None:
    size = size_of(PolicyConfig())
    assert size.weights == size.trained == 1476000
    assert size.cached_token == 2 * 4 * 5 * 32
    adapter = size_of(PolicyConfig.model_validate({"lora": {"rank": 1}}))
    assert 0 < adapter.trained < adapter.weights - size.weights + 1


def a_process(name: str = "a", cpus: float = 0, gpus: float = 0, **device: float) -> Process:
    return Process(name, cpus, gpus, device)


@pytest.mark.parametrize(
    ("process", "problem"),
    [
        (a_process(cpus=3), "needs 3 cpus, n has 2 left"),
        (a_process(weights=9), "needs 9.0 GiB of memory, n has 8.0 left"),
        (a_process(gpus=2), "needs gpus=2, n has 1 left"),
        (a_process(gpus=1, weights=41), "needs 41.0 GiB of each GPU, 1 of one of n is 40.0"),
        (a_process(gpus=0.5, weights=21), "needs 21.0 GiB of each GPU, 0.5 of one of n is 20.0"),
        (Process("a", 0, 1, {}, {"optimiser": 10}), "needs 10.0 GiB of memory, n has 8.0 left"),
    ],
)
def test_what_does_not_fit_says_of_what(process: Process, problem: str) -> None:
    (placed,) = place([process], [Node("n", 2, 8, [1.0], 40)], inline=False)
    assert placed == Placed(process, "", problem)
    assert "NOWHERE: needs" in table([placed])
    with pytest.raises(BadInput, match="a does not fit: needs"):
        check([placed])


def test_inline_policies_share_the_memory_of_one_gpu() -> None:
    ones = [
        Process("first", 9, 0, {"weights": 30}, {"optimiser": 5}),
        Process("second", 9, 0, {"weights": 20}),
        Process("third", 9, 0, {"weights": 6}, computes_on="cpu"),
        Process("fourth", 9, 0, {"weights": 1}, {"optimiser": 5}),
    ]
    placed = place(ones, [Node("n", 2, 8, [1.0, 1.0], 40)], inline=True)
    assert [one.problem for one in placed] == [
        "",
        "needs 20.0 GiB of the GPU, n has 10.0 left there",
        "needs 6.0 GiB of memory, n has 3.0 left",
        "needs 5.0 GiB of memory, n has 3.0 left",
    ]


def test_the_largest_go_first_and_all_share_what_there_is() -> None:
    nodes = [Node("one", 4, 10, [1.0]), Node("two", 4, 10, [1.0, 1.0])]
    ones = [
        a_process("small", 1, 0.5),
        a_process("other", 1, 0.5),
        a_process("large", 1, 2),
        a_process("third", 1, 0.5),
    ]
    placed = place(ones, nodes, inline=False)
    assert [one.node for one in placed] == ["one", "one", "two", ""]
    assert placed[3].problem == "needs gpus=0.5, one has 0 left; needs gpus=0.5, two has 0 left"
    check(placed[:3])


def test_a_process_takes_from_its_own_machine_alone() -> None:
    nodes = [Node("one", 2, 10), Node("two", 2, 10)]
    placed = place([a_process(name, 2, weights=6) for name in "abc"], nodes, inline=False)
    assert [one.node for one in placed] == ["one", "two", ""]


def test_in_one_process_memory_counts_and_nothing_else() -> None:
    placed = place([a_process("a", 5, weights=6), a_process("b", weights=6)], [Node("n", 1, 10)], inline=True)
    assert [one.problem for one in placed] == ["", "needs 6.0 GiB of memory, n has 4.0 left"]


def test_retrievers_are_planned_as_they_are_started() -> None:
    shards = RetrieverConfig(kind="dense", shards=2)
    several = RetrieverConfig.model_validate({"kind": "pattern", "resources": {"cpus": 2, "replicas": 2}})
    placed = plan(MethodConfig(transport="ray"), {"notes": shards, "patterns": several}, [Node("n", 6, 100)])
    told = [(one.process.name, one.process.cpus, one.node, sorted(one.process.device)) for one in placed]
    assert told == [
        ("notes-shard-0", 1, "n", ["weights"]), ("notes-shard-1", 1, "n", ["weights"]),
        ("patterns-0", 2, "n", []), ("patterns-1", 2, "n", []),
    ]  # fmt: skip
    # MiniLM has 23 million weights.
    assert placed[0].process.on_device * GIB / 4 == pytest.approx(23e6, rel=0.05)


def test_a_plan_is_of_all_policies() -> None:
    config = MethodConfig(transport="ray")
    policy = PolicyConfig.model_validate({"sampler": {"engine": "vllm"}, "resources": {"cpus": 1}})
    policies = {"policy": policy, "reference": PolicyConfig(trainer=None)}
    placed = plan(config, policies, [Node("n", 2, 100)])
    assert [(one.process.name, one.node) for one in placed] == [
        ("policy-sampler", "n"), ("policy-trainer-0", "n"), ("reference", "")
    ]  # fmt: skip
    assert table(placed).splitlines()[1].split()[:4] == ["policy-sampler", "1", "0", "1.01"]
