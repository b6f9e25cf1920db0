"""Zero-shot phenotyping with retrieval and MapReduce (arXiv 2312.06457): who has a disease, with citations.

Patterns find snippets in all notes, a policy answers one question per snippet (map), and its answers become one
decision per patient (reduce). No labels are needed. Little of the paper could be read: what is its own and what is
our design is in docs/methods/phenotyping.md.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cluster.cluster import Cluster
from cluster.parts import each
from cluster.run_directory import write_atomically
from cluster.steps import LoopState, Step
from methods.phenotyping_answers import AnswerStore, Asker, ask, make_asker
from methods.phenotyping_config import Config, preset
from methods.phenotyping_cost import cost_of, note_down, plan_of
from methods.phenotyping_decide import Decided, Origin, cases_of, decided
from methods.phenotyping_definition import Definition
from methods.phenotyping_deidentify import stage_of
from methods.phenotyping_input import check_input, id_of, input_of, keep_input
from methods.phenotyping_llm import check_reads, read_verdicts
from methods.phenotyping_notes import check_tables
from methods.phenotyping_out import write_costs
from methods.phenotyping_parts import Part, parts_of
from methods.phenotyping_report import finish, metrics_of, planned
from methods.phenotyping_scan import PartCounts, Scan, bucket_name, counts_file, read_bucket, scan_part, spread
from methods.phenotyping_source import model_digest, source_of
from protocols.model import ModelConfig
from protocols.retriever import RetrieverConfig, RetrieverService, SnippetsRequest
from protocols.service import Empty

__all__ = ["HEADLINE", "Config", "policies", "preset", "run"]

HEADLINE = ("patients", "asked", "tokens", "yes")


class State(LoopState):
    """What the past buckets came to."""

    tokens: int = 0
    """Tokens of all prompts so far."""


async def run(cluster: Cluster, config: Config) -> None:
    """Read all notes once, then bucket by bucket ask about the snippets and decide about the patients."""
    retriever = await cluster.retriever(config.retriever)
    source = await source_of(cluster, config, retriever)
    if config.reduce is None:
        check_reads(source.definitions, config.prompt)
    sets = [one.pattern_set() for one in source.definitions]
    # Patterns are checked before anything is read.
    await retriever.snippets(SnippetsRequest(sets=sets, window=config.window))
    parts = parts_of(source.notes, config.part_bytes)
    check_tables(parts, config.columns, config.encoding)
    digests = dict(stage_of(config.deidentify).digests) if config.deidentify else {}
    policy = await cluster.policy(config.policy.model_copy(update={"model": source.model}))
    info = await policy.info(Empty())
    asker = await make_asker(
        policy,
        config.prompt,
        info.context_length,
        config.questions_per_call,
        config.calls_at_once,
        structured=config.policy.sampler.engine == "vllm",
    )
    folder = cluster.directory.path
    origin = Origin(model_digest(source.model), config.prompt, folder.name, digests)
    begun = input_of(parts, source.definitions, origin)
    check_input(folder, begun)
    scan = Scan(
        sets=sets,
        window=config.window,
        columns=config.columns,
        encoding=config.encoding,
        deidentify=config.deidentify,
        digests=digests,
        folder=f"{folder}/scan",
    )
    state = State()
    stores: list[AnswerStore] = []
    try:
        async for step in cluster.steps(state, first=0):
            if step.index == 0:
                keep_input(folder, begun)
                step.log(await read_notes(config, retriever, scan, parts, step))
                spread(folder, len(parts), config.steps, step.activity)
                continue
            stores = stores or opened(config, folder)
            step.log(await decide_bucket(config, source.definitions, asker, stores, origin, folder, state, step))
    finally:
        for store in stores:
            store.close()
    if config.dry_run:
        cluster.summarize(planned(folder, config, cluster.metrics(), asker.room))
    else:
        cluster.summarize(finish(folder, config, source, origin, cluster.metrics(), info))


def opened(config: Config, folder: Path) -> list[AnswerStore]:
    """The store of answers, and of a dry run one of what has been counted."""
    answers = Path(config.answers).expanduser() if config.answers else folder / "answers.sqlite"
    return [AnswerStore(file) for file in [answers, *([folder / "dry_run.sqlite"] if config.dry_run else [])]]


async def read_notes(
    config: Config, retriever: RetrieverService, scan: Scan, parts: Sequence[Part], step: Step
) -> dict[str, float]:
    """The first pass, over the parts that have not been read yet."""
    folder = Path(scan.folder)
    folder.mkdir(parents=True, exist_ok=True)
    left = [part for part in parts if not counts_file(folder, part.index).is_file()]
    done = len(parts) - len(left)
    work = partial(scan_part, retriever, scan)
    async for _ in each(work, left, transport=config.transport, at_once=config.parallel):
        done += 1
        step.activity(f"notes: part {done} of {len(parts)}")
    counts = [PartCounts.model_validate_json(counts_file(folder, part.index).read_text()) for part in parts]
    names = ("notes", "rejects", "characters", "snippets")
    replaced = sum((Counter(one.replaced) for one in counts), Counter[str]())
    return {f"scan/{name}": float(sum(getattr(one, name) for one in counts)) for name in names} | {
        f"scan/replaced/{kind}": float(number) for kind, number in replaced.items()
    }


async def decide_bucket(
    config: Config,
    definitions: Sequence[Definition],
    asker: Asker,
    stores: Sequence[AnswerStore],
    origin: Origin,
    folder: Path,
    state: State,
    step: Step,
) -> dict[str, float]:
    """Map and reduce of one bucket of patients."""
    patients = read_bucket(folder / "buckets" / bucket_name(step.index))
    cases = cases_of(patients, definitions, config.evidence, origin)
    questions = [question for case in cases for question in case.questions]
    asked_for = f"{id_of(folder)}/{step.index}"
    if config.dry_run or config.budget_tokens:
        cost = await cost_of(asker, questions, stores, asked_for)
        if config.dry_run:
            note_down(cost, stores[-1], asked_for)
            return plan_of(cases, len(patients), cost)
        if state.tokens + cost.tokens > config.budget_tokens:
            step.stop(
                f"budget_tokens: {state.tokens} tokens were read and bucket {step.index} needs {cost.tokens} more;"
                f" {config.budget_tokens} are allowed"
            )
            return metrics_of([], 0)
    said = await ask(asker, questions, stores[0], asked_for, progress(step, "snippets asked"))
    show = progress(step, "prompts of verdicts read")
    readings = await read_verdicts(asker, cases, said, stores[0], asked_for, config.reduce, origin, show)
    found = decided(cases, said, asked_for, config.reduce, origin, readings)
    write_decisions(folder / "decisions" / bucket_name(step.index), found)
    write_costs(folder / "costs" / bucket_name(step.index), found)
    step.time({"asked_s": sum(one.seconds for one in found)})
    state.tokens += sum(one.tokens for one in found)
    return metrics_of(found, len(patients))


def progress(step: Step, what: str) -> Callable[[int, int], None]:
    """Shows how many of a bucket's questions have been answered."""
    return lambda done, of: step.activity(f"bucket {step.index}: {done} of {of} {what}")


def write_decisions(file: Path, found: Sequence[Decided]) -> None:
    """A bucket's decisions, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "".join(one.model_dump_json() + "\n" for one in found))


def policies(config: Config) -> dict[str, ModelConfig | RetrieverConfig]:
    """What the plan counts; the built-in world's policy is tiny."""
    return {"retriever": config.retriever} | ({} if config.world else {"policy": config.policy})
