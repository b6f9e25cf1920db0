"""Let a pool answer queries and have the answers scored: side by side, once each, and resumed where it stopped.

Each model has a file of its own in the collection, a line per query, so that a larger pool asks only the new models
and a smaller one nobody.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from cluster.cluster import Cluster
from cluster.progress import Progress
from cluster.run_directory import write_atomically
from cluster.seeds import derive_seed
from cluster.together import together
from methods.lookahead_config import Config, Member
from methods.lookahead_data import Answered, Query, prompt_of
from protocols.errors import BadInput, Corrupt
from protocols.messages import Completion, FinishReason
from protocols.policy import PolicyService, SampleRequest
from protocols.reward_model import Reply, RewardModelService, RewardRequest

SCORING = {"kind", "model", "init", "seed", "match", "max_tokens", "beta", "reference"}
"""Of the reward model's configuration: what scores depend on."""

Kept = dict[str, dict[str, Any]]
"""What a model made of each query, by its id: text, tokens, finish_reason, score."""


async def collect(cluster: Cluster, config: Config, queries: Sequence[Query], pool: Mapping[str, Member]) -> Answered:
    """Every model's answer to every query, with its score. What the collection has already is not asked again.

    Raises BadInput when the collection was made in another way.
    """
    _check_references(config, queries)
    folder = collection_of(cluster, config, queries)
    kept = {name: read_kept(folder, name, how(config, member)) for name, member in pool.items()}
    missing = {name: [query for query in queries if query.id not in kept[name]] for name in pool}
    asked = {name: left for name, left in missing.items() if left}
    if asked and config.stage == "train":
        missed = ", ".join(f"{len(left)} of {name}" for name, left in asked.items())
        raise BadInput(f"stage: got 'train', but answers are missing ({missed}) in {folder}; run stage=collect first")
    if asked:
        reward = await cluster.reward_model(config.reward, name="pool-reward")
        calls = sum(-(-len(left) // config.data.batch) for left in asked.values())
        policies = {name: await cluster.policy(pool[name].policy, name=name) for name in asked}
        folder.mkdir(parents=True, exist_ok=True)
        title = f"collecting from {', '.join(asked)}"
        with ExitStack() as locks, cluster.progress(title, calls) as progress:
            work = []
            for name, left in asked.items():
                write_atomically(folder / f"{name}.json", json.dumps(how(config, pool[name]), indent=1))
                file = folder / f"{name}.jsonl"
                locks.callback(held(file).close)
                work.append((policies[name], reward, config, left, file, kept[name], progress))
            # One that fails ends the others; what was written stays.
            await together([_ask(*one) for one in work])
        for name in asked if config.gateway is None else ():
            await cluster.stop(name)
        await cluster.stop("pool-reward")
    answered = Answered(list(pool))
    for query in queries:
        made = [kept[name][query.id] for name in pool]
        answered.add(query, [one["text"] for one in made], [one["score"] for one in made])
    cut = {name: sum(one["finish_reason"] == FinishReason.LENGTH for one in kept[name].values()) for name in pool}
    answered.notes += [
        f"{name}: {count} answers ended at sampling.max_tokens" for name, count in cut.items() if count
    ]
    return answered


def _check_references(config: Config, queries: Sequence[Query]) -> None:
    if config.reward.kind == "rules":
        for query in queries:
            if not query.reference:
                raise BadInput(
                    f"data.queries: {query.id!r} has no reference, which reward.kind=rules needs;"
                    " add it, or name a reward model"
                )


def collection_of(cluster: Cluster, config: Config, queries: Sequence[Query]) -> Path:
    """Where the answers are kept."""
    if config.data.collection:
        return Path(config.data.collection).expanduser()
    # What is asked and how; not the pool, which may grow.
    asked = [[query.id, query.instruction, query.reference] for query in queries]
    digest = hashlib.sha256(json.dumps([asked, how(config, None)]).encode()).hexdigest()[:12]
    return cluster.directory.path.parent / "collections" / digest


def how(config: Config, member: Member | None) -> dict[str, Any]:
    """What an answer and its score depend on beside the query."""
    reward = config.reward.model_dump(mode="json", include=SCORING)
    given = {"sampling": config.sampling.model_dump(mode="json"), "seed": config.seed, "reward": reward}
    if member is not None:
        given["policy"] = member.policy.model_dump(mode="json", include={"model", "init", "seed", "dtype"})
    return given


def read_kept(folder: Path, name: str, wanted: Mapping[str, Any]) -> Kept:
    """What a model made of queries so far. A line that was cut off when its writer was killed is removed.

    Raises BadInput when the file was made in another way, Corrupt when it is damaged.
    """
    made, file = folder / f"{name}.json", folder / f"{name}.jsonl"
    if not made.is_file():
        return {}
    found = json.loads(made.read_text(encoding="utf-8"))
    if found != wanted:
        differs = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        raise BadInput(
            f"data.collection: {file} was made with another {', '.join(differs)};"
            f" expected {json.dumps({key: found.get(key) for key in differs})}, or another data.collection"
        )
    if not file.is_file():
        return {}
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(file, len(whole))
    kept: Kept = {}
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            kept[row["id"]] = {key: row[key] for key in ("text", "tokens", "finish_reason", "score")}
        except (ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"{file} line {number} is not an answer that was collected: {error}") from error
    return kept


def held(file: Path) -> TextIO:
    """A file that no other process may add answers to until it is closed. Raises BadInput if one does so already."""
    lines = open(file, "a")  # noqa: SIM115  held as long as its model is asked
    try:
        fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lines.close()
        raise BadInput(f"data.collection: {file} is being written by another process; wait for it") from None
    return lines


async def _ask(
    policy: PolicyService,
    reward: RewardModelService,
    config: Config,
    queries: Sequence[Query],
    file: Path,
    kept: Kept,
    progress: Progress,
) -> None:
    """One model's answers, call after call; each call's lines are written together."""
    for start in range(0, len(queries), config.data.batch):
        batch = queries[start : start + config.data.batch]
        # By the query alone, so that it does not matter what else was asked, and when.
        seeds = [derive_seed(config.seed, "answer", query.id) for query in batch]
        prompts = [prompt_of(q).model_copy(update={"seed": seed}) for q, seed in zip(batch, seeds, strict=True)]
        answer = await policy.sample(SampleRequest(prompts=prompts, params=config.sampling))
        completions = [result.completions[0] for result in answer.results]
        scored = await reward.score(
            RewardRequest(replies=[_reply(query, one) for query, one in zip(batch, completions, strict=True)])
        )
        rows = [
            {
                "id": query.id,
                "text": one.text,
                "tokens": len(one.tokens),
                "finish_reason": one.finish_reason.value,
                "score": score.score,
            }
            for query, one, score in zip(batch, completions, scored.scores, strict=True)
        ]
        with open(file, "a", encoding="utf-8", errors="backslashreplace") as lines:
            lines.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        kept |= {query.id: row for query, row in zip(batch, rows, strict=True)}
        progress.step(progress.done + 1, {}, {})


def _reply(query: Query, one: Completion) -> Reply:
    ended = one.finish_reason == FinishReason.STOP
    return Reply(uid=query.id, prompt=prompt_of(query), text=one.text, ended=ended, reference=query.reference)
