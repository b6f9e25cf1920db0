"""Where Q-RM's prompts and preferences come from: files, a generated world, or the policy's own samples."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from cluster.cluster import Cluster
from cluster.seeds import derive_seed
from cluster.steps import Step
from methods.advantages import Values
from methods.dealing import dealt
from methods.qrm_config import Config
from methods.qrm_data import Pair, Task, read_pairs, read_tasks, write_pairs
from methods.qrm_rollouts import Cast, Rollout, roll_out
from methods.worlds.chain import ChainWorld
from protocols.errors import BadInput
from protocols.messages import FinishReason

TASKS_PER_CALL = 128
Row = TypeVar("Row")
MOST_CALLS_WITHOUT_A_PAIR = 20


@dataclass
class World:
    """What a run learns from and is tested on."""

    pairs: list[Pair] = field(default_factory=list)
    test_pairs: list[Pair] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    """To train on; empty where `chain` makes them."""
    test_tasks: list[Task] = field(default_factory=list)
    chain: ChainWorld | None = None
    notes: list[str] = field(default_factory=list)
    """What a reader of the results must know about the input."""

    def draw_tasks(self, step: Step, count: int, seed: int) -> list[Task]:
        """The tasks of a step: of a file in a fresh random order every epoch."""
        if self.chain is not None:
            return chain_tasks(self.chain, step.rng("tasks"), count, f"step {step.index}")
        return dealt(self.tasks, step.index, count, derive_seed(seed, "tasks"))

    def draw_pairs(self, step: Step, count: int, seed: int) -> list[Pair]:
        """The pairs of a step, in a fresh random order every epoch."""
        return dealt(self.pairs, step.index - 1, count, derive_seed(seed, "pairs"))

    def take_pairs(self, pairs: list[Pair], tests: list[Pair] | None, config: Config) -> None:
        """Learn from these; without pairs for tests, a share is kept for them."""
        seed = derive_seed(config.world_seed if self.chain else config.seed, "heldout pairs")
        self.pairs, test_pairs = split(pairs, tests, config.data.heldout_share, seed)
        self.test_pairs = test_pairs[: config.test_pairs]

    def exact(self, rollouts: Sequence[Rollout]) -> list[Values] | None:
        """The true credit of each token, float64[T], where it is known."""
        if self.chain is None:
            return None
        texts = [(one.task.instruction, one.completion) for one in rollouts]
        return [self.chain.exact_credit(prompt, done.text, len(done.tokens)) for prompt, done in texts]


def chain_tasks(chain: ChainWorld, rng: np.random.Generator, count: int, name: str) -> list[Task]:
    """Fresh tasks of the generated world."""
    prompts = chain.prompts(rng, count)
    return [
        Task(uid=f"{name}/{i}", instruction=prompt, reference=chain.reference(prompt))
        for i, prompt in enumerate(prompts)
    ]


def read_world(config: Config) -> World:
    """What is there before any model: files are read, and everything wrong with them is said."""
    if config.world == "chain":
        chain = ChainWorld(config.chain, config.world_seed)
        rng = np.random.default_rng(derive_seed(config.world_seed, "test tasks"))
        return World(chain=chain, test_tasks=chain_tasks(chain, rng, config.test_prompts, "test"))
    world = World()
    data, seed = config.data, derive_seed(config.seed, "heldout")
    if data.prompts:
        found = read_tasks(Path(data.prompts))
        world.notes += left_out(data.prompts, found.dropped)
        tests = read_tasks(Path(data.test_prompts)).rows if data.test_prompts else None
        world.tasks, test_tasks = split(found.rows, tests, data.heldout_share, seed)
        world.test_tasks = test_tasks[: config.test_prompts]
    if data.pairs and config.has_reward_model:
        pairs = read_pairs(Path(data.pairs))
        world.notes += left_out(data.pairs, pairs.dropped)
        test_pairs = read_pairs(Path(data.test_pairs)).rows if data.test_pairs else None
        world.take_pairs(pairs.rows, test_pairs, config)
    return world


def left_out(file: str, dropped: Counter[str]) -> list[str]:
    """What to tell of rows that were left out."""
    return [f"{Path(file).name}: {count} rows left out: {reason}" for reason, count in sorted(dropped.items())]


def split(rows: list[Row], tests: list[Row] | None, share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to learn from and rows to test on; without a file of tests a share is kept for them.

    Raises BadInput when nothing would be left to learn from.
    """
    if tests is not None:
        return rows, tests
    order = np.random.default_rng(seed).permutation(len(rows))
    kept = max(1, round(share * len(rows)))
    if kept >= len(rows):
        raise BadInput(
            f"data.heldout_share: of {len(rows)} rows {kept} would be kept for tests; none is left to learn"
        )
    return [rows[i] for i in sorted(order[kept:])], [rows[i] for i in sorted(order[:kept])]


async def sample_pairs(cluster: Cluster, cast: Cast, world: World, config: Config) -> list[Pair]:
    """Pairs of a right and a wrong reply of the untrained policy to the same prompt; made once, kept with the bases.

    Raises BadInput when it has no right reply, or no wrong one.
    """
    recipe = config.model_dump_json(
        include={"world", "chain", "world_seed", "pair_sampling", "sampling", "data", "rules"}
    )
    model = config.policy.model_dump_json(include={"model", "init", "seed", "dtype", "at"})
    tasks = hashlib.sha256(
        "".join(f"{task.instruction}\0{task.reference}\0" for task in world.tasks).encode()
    ).hexdigest()
    digest = hashlib.sha256(f"{recipe}{model}{tasks}".encode()).hexdigest()[:12]
    file = cluster.directory.path.parent / "bases" / f"pairs-{digest}.jsonl"
    if not file.is_file():
        pairs = await _sampled_pairs(cluster, cast, world, config)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        write_pairs(draft, pairs)
        os.replace(draft, file)
    return read_pairs(file).rows


async def _sampled_pairs(cluster: Cluster, cast: Cast, world: World, config: Config) -> list[Pair]:
    wanted, n = config.pair_sampling.wanted, config.pair_sampling.samples
    pairs: list[Pair] = []
    calls = 0
    with cluster.progress(f"{wanted} pairs from the policy's own replies", wanted, headline=("asked",)) as progress:
        while len(pairs) < wanted:
            rng = np.random.default_rng(derive_seed(config.world_seed, "pairs", calls))
            tasks = world.tasks[calls * TASKS_PER_CALL : (calls + 1) * TASKS_PER_CALL]
            if world.chain is not None:
                tasks = chain_tasks(world.chain, rng, TASKS_PER_CALL, f"pairs {calls}")
            if not tasks:
                break
            calls += 1
            groups = await roll_out(cast, tasks, n, config.sampling, derive_seed(config.world_seed, "sampled", calls))
            pairs += [pair for group in groups for pair in pair_of(group, rng)]
            progress.step(min(len(pairs), wanted), {"asked": calls * TASKS_PER_CALL}, {})
            if calls >= MOST_CALLS_WITHOUT_A_PAIR and not pairs:
                break
    if len(pairs) < 2:
        raise BadInput(
            f"pairs: of {calls * TASKS_PER_CALL} prompts with {n} replies each, {len(pairs)} had both a right and a"
            " wrong one, so no reward model can be trained; give pairs=, or a policy that is right at times"
        )
    return pairs[:wanted]


def pair_of(group: Sequence[Rollout], rng: np.random.Generator) -> list[Pair]:
    """A right and a wrong reply of one prompt, if there are both. Replies that were cut are neither."""
    whole = [
        one for one in group if one.completion.finish_reason is FinishReason.STOP and one.completion.text.strip()
    ]
    right, wrong = ([one for one in whole if one.right == wanted] for wanted in (True, False))
    if not right or not wrong:
        return []
    better, worse = (side[int(rng.integers(len(side)))] for side in (right, wrong))
    instruction = better.task.instruction
    return [
        Pair(
            uid=better.task.uid,
            instruction=instruction,
            chosen=better.completion.text,
            rejected=worse.completion.text,
        )
    ]
