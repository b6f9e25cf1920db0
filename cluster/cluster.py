"""What a method sees: actors by kind, and the steps of its run."""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from actors.actor import Actor, start
from cluster import builders
from cluster.bundles import bundles_for
from cluster.config import MethodConfig
from cluster.configure import may_change
from cluster.gateway.config import GatewayConfig
from cluster.gateway.running import logged, noted
from cluster.inline import InlineTransport
from cluster.overlap import CarriesCursor, Cursor, Rollouts, overlapped
from cluster.progress import Progress
from cluster.replicas import Replicas
from cluster.run_directory import RunDirectory, read_manifest, step_of, write_atomically
from cluster.steps import LoopState, Step, steps
from cluster.summary import Summary
from cluster.tracking import Tracker, open_tracker
from protocols.errors import BadInput, RepertoryError, classify
from protocols.handle import Transport, call_times, make_handle
from protocols.placement import Resources
from protocols.policy import PolicyConfig, PolicyService
from protocols.questioner import QuestionerConfig, QuestionerService
from protocols.retriever import RetrieverConfig, RetrieverService
from protocols.reviser import ReviserConfig, ReviserService
from protocols.reward_model import RewardModelConfig, RewardModelService
from protocols.router import RouterConfig, RouterService
from protocols.service import CheckpointRequest, Service
from protocols.verifier import VerifierConfig, VerifierService
from protocols.workers import Rank, RetrieverShardService, SamplerService, TrainerService

if TYPE_CHECKING:
    from cluster.gateway.gateway import Gateway

S = TypeVar("S", bound=Service)


class Cluster:
    """The actors of one run. Use it as an async context manager; leaving it stops them."""

    def __init__(self, config: MethodConfig, *, method: str, run: str, headline: tuple[str, ...] = ()) -> None:
        self.config = config
        self.method = method
        self.directory = RunDirectory(Path(config.runs_dir).expanduser().resolve() / run)
        self._run = run
        self._headline = headline
        self._started: dict[str, list[Transport]] = {}
        self._handles: dict[str, Service] = {}
        self._committed: dict[str, Service] = {}
        # What must end however the run is left, last in, first out; a failure in one does not spare the others.
        self._open = AsyncExitStack()
        self._connected = False
        self._commits_first = False
        """Whether the run needs a commit before its first step, because an actor does not begin anew with it."""
        self._gateway: Gateway | None = None
        self._activity: Callable[[str], None] = print

    @property
    def saved_config(self) -> dict[str, Any]:
        """What the run's config.yaml holds."""
        return {"method": self.method, **self.config.model_dump(mode="json")}

    async def __aenter__(self) -> "Cluster":
        self._open.callback(self.directory.close)
        self.directory.claim(self.saved_config, may_change(self.config))
        if self.config.gateway is not None:
            await self._serve(self.config.gateway)
        return self

    async def __aexit__(self, *error: object) -> None:
        try:
            # While the actors can still answer what is under way.
            if self._gateway is not None:
                await self._gateway.close()
        finally:
            await self._open.aclose()

    async def _serve(self, config: GatewayConfig) -> None:
        """Open the gateway; it finds actors as they start."""
        from cluster.gateway.gateway import Gateway

        self._gateway = Gateway(config, self._handles)
        try:
            if self.config.transport == "ray":
                # It forks processes, which may never begin where gRPC's threads are at work.
                self._connect()
            await self._gateway.start()
        except BaseException:
            await self._open.aclose()
            raise

    def progress(self, title: str, total: int, headline: Sequence[str] = ()) -> Progress:
        """A display for long work outside of the run's own steps; a context manager."""
        return Progress(title, total, headline=headline)

    async def policy(self, config: PolicyConfig, *, name: str = "policy") -> PolicyService:
        """A policy. One with a trainer is part of every commit; a frozen one has nothing to commit."""
        if config.at is not None:
            return await self._remote_policy(config, name)
        if config.trainer is not None and config.resources.replicas > 1:
            raise BadInput(f"{name}.resources.replicas: a policy that trains has one replica (see sampler.replicas)")
        if config.split and config.sampler.sleep and self.config.gateway is not None:
            raise BadInput(
                f"{name}.sampler.sleep: callers of the gateway would wake a sampler whose GPU the trainer has"
            )
        if config.split:
            return await self._split_policy(config, name)

        build = partial(builders.policy, config)
        commit = config.trainer is not None
        return await self._spawn(PolicyService, name, build, config.sampler_resources, commit=commit)

    async def _remote_policy(self, config: PolicyConfig, name: str) -> PolicyService:
        """A policy that goes on when this run ends."""
        from cluster.remote import remote_policy

        self._reserve(name)
        policy = await remote_policy(name, config, self._run, self.config.deadline_s)
        self._handles[name] = policy
        if config.trainer is not None:
            self._committed[name] = policy
            self._commits_first = True
        return policy

    async def _split_policy(self, config: PolicyConfig, name: str) -> PolicyService:
        """A policy whose samplers and trainer ranks are processes of their own."""
        assert config.trainer is not None
        if config.trainer.workers > 1 and self.config.transport != "ray":
            raise BadInput(f"{name}.trainer.workers: more than one rank needs transport=ray")

        def build_rank(rank: Rank) -> Actor:
            from actors.policy.trainer_worker import TrainerActor

            return TrainerActor(config, rank, sampler)

        def build() -> Actor:
            from actors.policy.split_policy import SplitPolicyActor

            return SplitPolicyActor(config, sampler, single, trainer)

        apart, count = f"{name}-sampler", config.sampler_resources.replicas
        places = await self._places(name, config)
        sampler = await self._spawn(
            SamplerService,
            apart,
            partial(builders.sampler, config),
            config.sampler_resources,
            commit=False,
            places=places[:count],
        )
        single = [
            make_handle(SamplerService, transport, self.config.deadline_s) for transport in self._started[apart]
        ]
        trainer = await self._spawn_ranks(
            f"{name}-trainer", build_rank, config.resources, config.trainer.workers, places[count:]
        )
        # It only hands calls on, so it takes no core.
        return await self._spawn(PolicyService, name, build, Resources())

    async def _places(self, name: str, config: PolicyConfig) -> list[Any]:
        """On Ray, room for all processes of a policy, samplers first, set aside together; inline there is none."""
        assert config.trainer is not None
        bundles, bundle_of = bundles_for(config.sampler_resources, config.resources, config.trainer.workers)
        if self.config.transport != "ray" or not any(one.cpus or one.gpus for one in bundles):
            return [None] * len(bundle_of)
        from cluster.ray_transport import Place, release, reserve

        self._connect()
        group = await reserve(name, bundles, self.config.deadline_s)
        self._open.callback(release, group)
        return [Place(group, bundle) for bundle in bundle_of]

    async def _spawn_ranks(
        self,
        name: str,
        build: Callable[[Rank], Actor],
        resources: Resources,
        workers: int,
        places: Sequence[Any],
    ) -> TrainerService:
        """Start the ranks of a trainer and give back one handle to all of them."""
        names = [f"{name}-{i}" for i in range(workers)]
        self._reserve(name)
        if self.config.transport == "ray":
            from cluster.ray_transport import Part, spawn_group

            part = Part(handle=name, service=TrainerService.__name__)
            self._started[name] += await spawn_group(
                names, self._run, part, build, resources, self.config.deadline_s, places
            )
        else:
            self._started[name].append(await self._start_inline(names[0], lambda: build(Rank())))
        handle = make_handle(TrainerService, Replicas(name, self._started[name]), self.config.deadline_s)
        self._handles[name] = handle
        return handle

    async def questioner(
        self, config: QuestionerConfig, policy: PolicyService, *, name: str = "questioner"
    ) -> QuestionerService:
        """A questioner that plays its role over a policy."""
        return await self._spawn(
            QuestionerService, name, partial(builders.questioner, config, policy), config.resources
        )

    async def verifier(
        self, config: VerifierConfig, policy: PolicyService | None, *, name: str = "verifier"
    ) -> VerifierService:
        """A verifier; without a policy it goes by rules alone."""
        build = partial(builders.verifier, config, policy)
        return await self._spawn(VerifierService, name, build, config.resources, commit=False)

    async def reviser(self, config: ReviserConfig, policy: PolicyService, *, name: str = "reviser") -> ReviserService:
        """A reviser that plays its role over a policy."""
        return await self._spawn(ReviserService, name, partial(builders.reviser, config, policy), config.resources)

    async def reward_model(self, config: RewardModelConfig, *, name: str = "reward_model") -> RewardModelService:
        """A reward model. One that learns is part of every commit; of several ranks each is a process of its own."""

        def build_rank(rank: Rank) -> Actor:
            from actors.policy.trainer_worker import TrainerActor

            return TrainerActor(config, rank)

        ranks, trainer = None, config.trainer
        if trainer is not None and config.split:
            if trainer.workers > 1 and self.config.transport != "ray":
                raise BadInput(f"{name}.trainer.workers: more than one rank needs transport=ray")
            places = [None] * trainer.workers
            ranks = await self._spawn_ranks(f"{name}-trainer", build_rank, config.resources, trainer.workers, places)

        build = partial(builders.reward_model, config, ranks)
        # Before its ranks it computes nothing, unless there is a reference.
        own = config.resources if not config.split or config.needs_reference else Resources()
        return await self._spawn(RewardModelService, name, build, own, commit=config.learns)

    async def router(self, config: RouterConfig, *, name: str = "router") -> RouterService:
        """A router. One that learns is part of every commit."""
        build = partial(builders.router, config)
        return await self._spawn(RouterService, name, build, config.resources, commit=config.trainer is not None)

    async def retriever(self, config: RetrieverConfig, *, name: str = "retriever") -> RetrieverService:
        """A retriever. One whose index has no folder of its own is part of every commit."""
        commit = not config.path and config.kind != "pattern"
        build, own = partial(builders.retriever, config), config.resources
        if config.shards > 1:
            shards = []
            for i in range(config.shards):
                part = partial(builders.retriever_shard, config, i)
                shards.append(await self._spawn(RetrieverShardService, f"{name}-shard-{i}", part, own, commit=False))
            # It only hands calls on, so it takes no core.
            build, own = partial(builders.sharded_retriever, config, shards), Resources()
        return await self._spawn(RetrieverService, name, build, own, commit=commit)

    async def _spawn(
        self,
        service: type[S],
        name: str,
        build: Callable[[], Actor],
        resources: Resources,
        *,
        commit: bool = True,
        places: Sequence[Any] = (),
    ) -> S:
        """Start the replicas of an actor and give back one handle to them."""
        count = resources.replicas
        names = [name] if count == 1 else [f"{name}-{i}" for i in range(count)]
        self._reserve(name)
        try:
            for index, (replica, place) in enumerate(zip(names, places or [None] * count, strict=True)):
                part = (name, service, index)
                self._started[name].append(await self._start_one(replica, part, build, resources, place))
        except BaseException:
            await self.stop(name)
            raise
        transport = self._started[name][0] if count == 1 else Replicas(name, self._started[name])
        handle = make_handle(service, transport, self.config.deadline_s)
        self._handles[name] = handle
        if commit:
            self._committed[name] = handle
        return handle

    def _reserve(self, name: str) -> None:
        """Make sure that the actor is new, and stopped with the run. Joins Ray if that carries the calls."""
        if name in self._started:
            raise BadInput(f"there is an actor {name!r} in this run already")
        if self.config.transport == "ray":
            self._connect()
        self._started[name] = []
        self._open.push_async_callback(self.stop, name)

    async def _start_one(
        self,
        name: str,
        part: tuple[str, type[Service], int],
        build: Callable[[], Actor],
        resources: Resources,
        place: Any,
    ) -> Transport:
        """Start one actor; `part`: the handle that it stands behind, its service, and its place there."""
        if self.config.transport == "ray":
            from cluster.ray_transport import Part, spawn

            handle, service, index = part
            role = Part(handle=handle, service=service.__name__, index=index)
            return await spawn(name, self._run, role, build, resources, self.config.deadline_s, place)
        return await self._start_inline(name, build)

    async def _start_inline(self, name: str, build: Callable[[], Actor]) -> Transport:
        try:
            actor = build()
        except Exception as error:
            raise classify(error) from error
        try:
            await start(actor)
        except BaseException:
            await actor.close()
            raise
        return InlineTransport(name, actor)

    def _connect(self) -> None:
        """Join Ray with the first actor: bad input is found before, and without Ray."""
        from cluster.ray_transport import connect, disconnect

        if not self._connected and connect(self._run):
            self._open.callback(disconnect)
        self._connected = True

    async def stop(self, name: str) -> None:
        """End an actor and give back what it took; nothing happens if there is none of that name."""
        for transport in self._started.pop(name, []):
            if isinstance(transport, InlineTransport):
                await transport.actor.close()
            else:
                from cluster.ray_transport import RayTransport, stop

                assert isinstance(transport, RayTransport)
                await stop(transport)
        self._handles.pop(name, None)
        self._committed.pop(name, None)

    async def attach(self, run: str) -> None:
        """Reach the actors of another run in this Ray cluster, which owns them. Raises BadInput when it has none."""
        from cluster.attached import attached

        if not os.environ.get("RAY_ADDRESS"):
            raise BadInput("attach: set RAY_ADDRESS to the Ray cluster of the run")
        self._connect()
        self._handles |= await attached(run, self.config.deadline_s)

    async def serve_until_stopped(self, announce: Callable[[str], None]) -> None:
        """Keep the actors up for callers of the gateway; give its address away first."""
        assert self._gateway is not None
        self.directory.open(self.saved_config, may_change(self.config))
        self._note_gateway()
        announce(" and ".join(filter(None, (self._gateway.address, self._gateway.base_url))))
        await asyncio.Event().wait()

    def _note_gateway(self) -> None:
        """Leave in the run's folder where the gateway is while it is up, and its log."""
        if self._gateway is None:
            return
        self._gateway.admission.checkpoints = self.directory.path / "remote"
        self._open.enter_context(noted(self.directory.path, self._gateway.address, self._gateway.base_url))
        self._open.enter_context(logged(self.directory.path / "gateway.log"))

    async def steps(self, state: LoopState, *, first: int = 1) -> AsyncIterator[Step]:
        """The steps of the run that are left, `first` to `config.steps`, each committed when it ends.

        The run's folder is created or taken over here, after all actors are up: a run that cannot start
        leaves nothing behind. Raises BadInput if the folder belongs to another configuration.
        """
        async with aclosing(self._steps(state, first, {})) as iterator:
            async for step in iterator:
                yield step

    async def overlapped(
        self,
        state: CarriesCursor[Cursor],
        produce: Callable[[Step, Cursor], Awaitable[Rollouts]],
        *,
        staleness: int,
        first: int = 1,
    ) -> AsyncIterator[tuple[Step, Rollouts]]:
        """As `steps`, each with what `produce` made for it, up to `staleness` steps ahead of the loop's body.

        `produce` gets the step and the loop's cursor, `state.rollout`, which it may change. Policies are committed
        as they are after the body of a step, all other actors as they were when its rollouts were done.
        """
        assert isinstance(state, LoopState)
        begun: dict[int, Step] = {}

        def step_of(index: int) -> Step:
            return begun.setdefault(index, Step(index, self.config.seed, self._activity))

        async def keep(index: int) -> None:
            for name, actor in self._committed.items():
                if not isinstance(actor, PolicyService):
                    await actor.save(CheckpointRequest(path=str(self.directory.ahead(index) / name)))

        iterator = overlapped(
            self._steps(state, first, begun),
            state,
            produce,
            staleness=staleness,
            last=self.config.steps,
            step_of=step_of,
            keep=keep,
        )
        async with aclosing(iterator):
            async for step, rollouts in iterator:
                yield step, rollouts

    async def _steps(self, state: LoopState, first: int, begun: dict[int, Step]) -> AsyncGenerator[Step, None]:
        config = self.config
        tracker = self._open_run()
        latest = self.directory.latest()
        done = step_of(latest) if latest else first - 1
        title = f"{self.method} {self._run}"
        progress = self._open.enter_context(Progress(title, config.steps, done=max(done, 0), headline=self._headline))
        self._activity = progress.activity
        iterator = steps(
            self.directory,
            self._committed,
            state,
            first=first,
            total=config.steps,
            seed=config.seed,
            checkpoint_every=config.checkpoint_every,
            keep=config.keep_checkpoints,
            show=self._activity,
            on_commit=partial(_show, progress, tracker),
            begun=begun,
            commit_first=self._commits_first,
        )
        async with aclosing(iterator):
            async for step in iterator:
                before = self._call_seconds()
                yield step
                after = self._call_seconds()
                step.time({key: after[key] - before.get(key, 0.0) for key in after})

    def _open_run(self) -> Tracker:
        config, saved, path = self.config, self.saved_config, self.directory.path
        new = self.directory.open(saved, may_change(self.config))
        try:
            tracker = open_tracker(config.wandb, path, config.wandb_project, self._run, saved)
        except RepertoryError:
            if new:
                self.directory.discard()
            raise
        self._open.callback(tracker.close)
        self._note_gateway()
        return tracker

    def _call_seconds(self) -> dict[str, float]:
        """Seconds spent so far in calls, by `actor.method`."""
        return {
            f"{name}.{method}": seconds
            for name, handle in self._handles.items()
            for method, seconds in call_times(handle).seconds.items()
        }

    def metrics(self) -> list[dict[str, float]]:
        """The committed rows of metrics.jsonl, in order of steps."""
        file = self.directory.path / "metrics.jsonl"
        if not file.is_file():
            return []
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def finished(self) -> str:
        """Why the run ended before its last step, if it did."""
        latest = self.directory.latest()
        return read_manifest(latest).finished if latest else ""

    def summarize(self, summary: Summary) -> None:
        """Keep the result of the run with it; the report shows it first."""
        values = summary.model_dump(exclude={"panels"})
        write_atomically(self.directory.path / "summary.json", json.dumps(values, ensure_ascii=False, indent=1))
        write_atomically(self.directory.path / "panels.json", json.dumps(summary.panels, indent=1))


def _show(progress: Progress, tracker: Tracker, step: Step) -> None:
    progress.step(step.index, step.metrics, step.timings)
    tracker.log(step.index, step.metrics)
