"""What runs inside of vLLM's workers: choosing tokens as all samplers do, and taking new weights.

Reaches into vLLM's first model runner; written against the release that pyproject.toml names.
"""

from collections import defaultdict
from functools import lru_cache
from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.sampler import Sampler

from actors.policy.choose import BLOCK, next_tokens, uniforms
from protocols.messages import SamplingParams

DRAW = "draw"
"""Key of a request's (params, seed, sample index) in its extra arguments."""
GIVEN = "given"
"""Key of the tokens of a request that are taken instead of being drawn, at the temperature of its params."""
TEMPERATURE = "temperature"
"""Key of the temperature at which a request scores its prompt."""


class SeededSampler(Sampler):  # type: ignore[misc]
    """Draws by `next_tokens`, so that a token depends on its row's logits, seed and place alone.

    vLLM's own sampler has log-probs either before the temperature or after top-p, and other seeds.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self._runner = runner

    def forward(self, logits: torch.Tensor, *_: Any, **__: Any) -> SamplerOutput:
        """Tokens int32[R, 1] and their log-probs for logits [R, V]."""
        requests = [self._runner.requests[name] for name in self._runner.input_batch.req_ids]
        logits_RV = logits.float()
        tokens_R = torch.zeros(len(requests), dtype=torch.int64, device=logits.device)
        logprobs_R = torch.zeros(len(requests), device=logits.device)
        if told := [i for i, request in enumerate(requests) if GIVEN in request.sampling_params.extra_args]:
            tokens_R[told], logprobs_R[told] = _given([requests[i] for i in told], logits_RV[told])
        for params, places in _by_params(requests):
            drawn = torch.tensor([_uniform(requests[i]) for i in places], dtype=torch.float64, device=logits.device)
            # Most batches ask for one kind of drawing; then nothing is copied.
            chosen = logits_RV if len(places) == len(requests) else logits_RV[places]
            tokens_R[places], logprobs_R[places] = next_tokens(chosen, drawn, params)
        ids_R1 = tokens_R.to(torch.int32).unsqueeze(-1)
        ranks_R = torch.zeros_like(tokens_R)
        return SamplerOutput(
            sampled_token_ids=ids_R1,
            logprobs_tensors=LogprobsTensors(ids_R1, logprobs_R.unsqueeze(-1), ranks_R),
        )

    def compute_logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """log softmax(logits / temperature) of prompts that are scored, all at one temperature."""
        scored = [self._runner.requests[name] for name in self._runner.num_prompt_logprobs]
        (temperature,) = {request.sampling_params.extra_args[TEMPERATURE] for request in scored}
        return torch.log_softmax(logits.float() / temperature, dim=-1)


def _by_params(requests: list[Any]) -> list[tuple[SamplingParams, list[int]]]:
    places: dict[tuple[float, float, int], list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        if GIVEN not in request.sampling_params.extra_args:
            temperature, top_p, top_k, _, _ = request.sampling_params.extra_args[DRAW]
            places[temperature, top_p, top_k].append(place)
    return [
        (SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k), chosen)
        for (temperature, top_p, top_k), chosen in places.items()
    ]


def _given(requests: list[Any], logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each request, int64[R], and its log softmax(logits / temperature), float32[R]."""
    extra = [request.sampling_params.extra_args for request in requests]
    next_ = [one[GIVEN][len(request.output_token_ids)] for one, request in zip(extra, requests, strict=True)]
    tokens_R = torch.tensor(next_, device=logits_RV.device)
    temperature_R = torch.tensor([one[DRAW][0] for one in extra], device=logits_RV.device)
    logprobs_RV = torch.log_softmax(logits_RV / temperature_R[:, None], dim=-1)
    return tokens_R, logprobs_RV.gather(-1, tokens_R[:, None]).squeeze(-1)


def _uniform(request: Any) -> float:
    *_, seed, sample = request.sampling_params.extra_args[DRAW]
    place = len(request.output_token_ids)
    return float(_block(seed, sample, place // BLOCK)[place % BLOCK])


_block = lru_cache(maxsize=4096)(uniforms)


def install_sampler(worker: Any) -> None:
    """Let the worker draw by `SeededSampler`."""
    worker.model_runner.sampler = SeededSampler(worker.model_runner)


def load_weights(worker: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Replace all weights; names and shapes are those of a Hugging Face checkpoint."""
    worker.model_runner.reload_weights(weights_iterator=iter(tensors.items()), is_checkpoint_format=True)
    for layer in _tied(worker.model_runner.get_model()):
        # On a CPU a layer computes with a packed copy of its weight; vLLM forgets that of a tied output layer.
        layer.quant_method.process_weights_after_loading(layer)


def _tied(model: torch.nn.Module) -> list[Any]:
    """Layers that share their weight with another one."""
    sharing: dict[int, list[Any]] = defaultdict(list)
    for layer in model.modules():
        if hasattr(layer, "quant_method") and isinstance(getattr(layer, "weight", None), torch.nn.Parameter):
            sharing[id(layer.weight)].append(layer)
    return [layer for layers in sharing.values() if len(layers) > 1 for layer in layers]
