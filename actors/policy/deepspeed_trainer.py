"""The trainer over DeepSpeed ZeRO: optimiser state, gradients and weights sharded over the ranks."""

import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from actors.policy.loading import Loaded
from actors.policy.microbatch import MicroBatch
from actors.policy.ranks import use_environment
from actors.policy.torch_trainer import NOTHING, Sums, TorchTrainer, in_pieces, rate_share
from actors.policy.weights import write_model
from protocols.errors import BadInput, Corrupt, Stale
from protocols.model import Head, TrainerConfig
from protocols.training import (
    ForwardBackwardRequest,
    ForwardBackwardResponse,
    OptimStepRequest,
    OptimStepResponse,
)
from protocols.workers import Rank

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedTrainer(TorchTrainer):
    """The same verbs with the same results; each call must be made on all ranks."""

    def __init__(
        self,
        model: Any,
        config: TrainerConfig,
        *,
        seed: int = 0,
        rank: Rank,
        half: bool = False,
        head: Head = "vocabulary",
    ) -> None:
        super().__init__(model, config, seed=seed, rank=rank, head=head)
        deepspeed = import_deepspeed()
        use_environment(rank)
        deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._optimizer, config=engine_config(config, half)
        )
        self.model = self._engine
        self._make_moments()
        self._accumulated = False

    def forward_backward(self, request: ForwardBackwardRequest) -> ForwardBackwardResponse:
        """As the torch trainer's."""
        response = super().forward_backward(request)
        self._accumulated = True
        return response

    def _make_moments(self) -> None:
        """Take a step of length 0, so that the moments can be saved before the first update and loaded into."""
        tokens = torch.zeros((1, 2), dtype=torch.int64, device=self._engine.device)
        self._backward(self.model(input_ids=tokens, use_cache=False).logits.float().sum() * 0.0)
        self._step(0.0)
        self._set_updates(0.0)

    def _backward(self, loss: torch.Tensor) -> None:
        # The engine takes the mean over ranks; every term is divided by its count over all of them already.
        self._engine.backward(loss * self._rank.world)

    def _keep_in_step(self, request: ForwardBackwardRequest, group: MicroBatch, counts: dict[str, float]) -> None:
        # A forward pass gathers shards from all ranks, so a rank without rows goes through one that counts nothing.
        self._micro_batch(request, group, counts, Sums(), factor=0.0)

    def forget(self) -> None:
        """Drop the accumulated gradients."""
        self._accumulated = False
        self._engine.optimizer.zero_grad()
        self._engine.zero_grad()

    def optim_step(self, request: OptimStepRequest) -> OptimStepResponse:
        """As the torch trainer's; the engine discards a step whose gradient is not finite."""
        if not self._accumulated:
            raise Stale(NOTHING)
        rate = self._config.learning_rate * rate_share(self._config, self.version)
        if request.learning_rate is not None:
            rate = request.learning_rate
        self._step(rate)
        norm = float(self._engine.get_global_grad_norm())
        if self._engine.optimizer.overflow or not math.isfinite(norm):
            self.forget()
            raise Corrupt(f"the gradient at weight version {self.version} has norm {norm}; no step was taken")
        self.version += 1
        return OptimStepResponse(version=self.version, grad_norm=norm, learning_rate=rate)

    def _step(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        self._accumulated = False

    def buckets(self, limit: int) -> Iterator[dict[str, torch.Tensor]]:
        """The trained weights by name; of ZeRO-3 shards only one bucket is whole at a time."""
        import deepspeed

        for piece in in_pieces(self._trained(), limit):
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in piece]):
                yield {name: parameter.detach() for name, parameter in piece}

    def write(self, loaded: Loaded, directory: Path, training_state: bool) -> None:
        """As the torch trainer's. The training state is by parameter name, so any number of ranks can read it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights = self._whole_weights() if self._config.zero_stage == 3 else None
        if self._rank.index == 0:
            write_model(loaded, directory, whole=not training_state, state=weights)
        if not training_state:
            return
        parameters: dict[str, dict[str, torch.Tensor]] = {}
        for name, parameter in self._trained():
            values = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            values["master"] = safe_get_full_fp32_param(parameter)
            if self._rank.index == 0:
                parameters[name] = {key: value.detach().cpu().clone() for key, value in values.items()}
        if self._rank.index == 0:
            state = {"version": self.version, "updates": self._updates(), "parameters": parameters}
            torch.save(state, directory / "trainer.pt")

    def read(self, loaded: Loaded, directory: Path, training_state: bool) -> None:
        """Take back what `write` wrote. Raises Corrupt when a file is missing or broken."""
        self.forget()
        file = directory / "trainer.pt"
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            for name, parameter in self._trained():
                self._set(parameter, state["parameters"][name], training_state)
            if training_state:
                self._set_updates(state["updates"])
                self.version = int(state["version"])
        except Exception as error:
            raise Corrupt(f"{file} is not a saved trainer: {error}") from error

    def _whole_weights(self) -> dict[str, torch.Tensor]:
        """All weights in rank 0's memory, as a Hugging Face checkpoint needs them."""
        import deepspeed

        whole = {}
        for name, parameter in self._module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if self._rank.index == 0:
                    whole[name] = parameter.detach().cpu().clone()
        return whole

    def _set(self, parameter: torch.nn.Parameter, values: dict[str, torch.Tensor], training_state: bool) -> None:
        """Bring one parameter, its float32 master copy and its moments to saved values."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        master = values["master"].to(self._engine.device)
        with (
            deepspeed.zero.GatheredParameters([parameter], modifier_rank=0),
            torch.no_grad(),
        ):
            if self._config.zero_stage < 3 or self._rank.index == 0:
                parameter.copy_(master)
        safe_set_full_fp32_param(parameter, master)
        for key in MOMENTS if training_state else ():
            safe_set_full_optimizer_state(parameter, values[key].to(self._engine.device), key)

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(n, p) for n, p in self._module.named_parameters() if p.requires_grad]

    def _updates(self) -> float:
        """Updates that AdamW has counted, for its bias correction."""
        return max((float(state["step"]) for state in self._optimizer.state.values()), default=0.0)

    def _set_updates(self, updates: float) -> None:
        for state in self._optimizer.state.values():
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), updates)


def import_deepspeed() -> Any:
    """The library, told to be quiet. Raises BadInput when it is not installed."""
    try:
        import deepspeed
    except ImportError as error:
        raise BadInput("trainer.engine: deepspeed is not installed; pip install 'repertory[deepspeed]'") from error
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # It calls collectives by names that torch is about to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


def engine_config(config: TrainerConfig, half: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration. Micro-batches and their number are ours: `step` is called when we say so."""
    sharding: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload:
        sharding["offload_optimizer"] = {"device": "cpu"}
        if config.zero_stage == 3:
            sharding["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.grad_clip,
        "bf16": {"enabled": half},
        "steps_per_print": None,
        # AdamW from torch, so that every engine takes the same steps.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": sharding,
    }
