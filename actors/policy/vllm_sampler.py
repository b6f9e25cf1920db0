"""A sampler on vLLM: the same messages as the transformers sampler, tokens drawn by the same function."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from actors.policy.loading import load, load_outline
from actors.policy.rows import EncodedPrompt, OnToken, Row, new_rows
from actors.policy.sampler_worker import SamplerActor
from actors.policy.vllm_engine import Request, VLLMEngine
from protocols.errors import BadInput
from protocols.messages import Completion, SamplingParams, Structure
from protocols.policy import EmbedRequest, EmbedResponse, PolicyConfig, SampleRequest, ScoreResponse
from protocols.service import CheckpointResponse, Empty

FEW = 32
"""Last tokens of a sequence up to which they are drawn again, one by one, to score them."""


class VLLMSamplerActor(SamplerActor):
    """Encodes prompts and follows rows as the other samplers do; vLLM computes and batches."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        self._folder = TemporaryDirectory(prefix="adapter-")
        self._engine = VLLMEngine(config)
        self._scores = Scores()

    @property
    def version(self) -> int:
        """The version that was published last."""
        return self._engine.version

    async def setup(self) -> None:
        """Load the model. Raises BadInput when vLLM is not there or refuses it."""
        self._loaded = await asyncio.to_thread(load_outline, self._config)
        await self._engine.start(self._loaded)
        await self._engine.run(self._fill)

    async def close(self) -> None:
        """End what is under way, and vLLM."""
        await super().close()
        await self._engine.close()
        self._folder.cleanup()

    async def embed(self, request: EmbedRequest) -> EmbedResponse:
        """Not with this engine."""
        raise BadInput("embed: vLLM keeps its hidden states to itself; ask a policy with sampler.engine=transformers")

    async def sleep(self, request: Empty) -> Empty:
        """Keep the weights in the machine's memory and drop the cache."""
        await self._engine.sleep()
        return Empty()

    async def wake(self, request: Empty) -> Empty:
        """Take the device's memory again."""
        await self._engine.wake()
        return Empty()

    def _fill(self) -> None:
        """What vLLM does not read from the model's files: random weights, and an adapter that changes nothing yet."""
        if self._config.init == "random":
            drawn = load(self._config.model_copy(update={"lora": None, "trainer": None, "device": "cpu"})).model
            self._put({name: p.detach() for name, p in drawn.named_parameters()})
        if self._config.lora is not None:
            self._put_adapter({name: torch.zeros(p.shape) for name, p in self._replaceable().items()})

    async def _complete(
        self, prompts: list[EncodedPrompt], request: SampleRequest, stop: threading.Event, on_token: OnToken | None
    ) -> list[list[Completion]]:
        n, params = request.n, request.params
        rows = new_rows(prompts, n, params, self._loaded, text=on_token is not None)
        stops = {*self._loaded.eos_token_ids, *params.stop_token_ids}
        requests = [self._row_request(row, prompts[row.prompt], params, stops, on_token) for row in rows]
        await self._engine.complete(requests)
        done = [row.completion(self._loaded.tokenizer) for row in rows]
        return [done[p * n : p * n + n] for p in range(len(prompts))]

    def _row_request(
        self, row: Row, prompt: EncodedPrompt, params: SamplingParams, stops: set[int], on_token: OnToken | None
    ) -> Request:
        def take(output: Any, version: int) -> bool:
            (grown,) = output.outputs
            for token, entry in zip(grown.token_ids, grown.logprobs or [], strict=True):
                text = row.grow(token, entry[token].logprob, version, stops)
                if on_token:
                    on_token(row, text)
            return row.finish is not None

        draw = (params.temperature, params.top_p, params.top_k, prompt.seed, row.sample)
        return Request(prompt.tokens.tolist(), drawn(draw, row.room, sorted(stops), params.structure), take)

    async def _score(self, rows: list[NDArray[np.int32]], temperature: float, last: int) -> ScoreResponse:
        async with self._scores.at(temperature):
            while True:
                logprobs, versions = await self._score_once(rows, temperature, last)
                if len(versions) == 1:
                    return ScoreResponse(logprobs=logprobs, version=versions.pop())
                # New weights came between the sequences.

    async def _score_once(
        self, rows: list[NDArray[np.int32]], temperature: float, last: int
    ) -> tuple[list[NDArray[np.float32]], set[int]]:
        logprobs = [np.zeros(len(row), np.float32) for row in rows]
        versions: set[int] = set()

        def request(place: int) -> Request:
            def take(output: Any, version: int) -> bool:
                for t, entry in enumerate(output.prompt_logprobs[1:], start=1):
                    logprobs[place][t] = entry[int(rows[place][t])].logprob
                versions.add(version)
                return True

            return Request(rows[place].tolist(), scored(temperature), take)

        def drawn_again(place: int) -> Request:
            """The last tokens as if they were drawn: so vLLM's prefix cache serves what is before them."""
            row, first = rows[place].tolist(), max(1, len(rows[place]) - last)
            left = iter(range(first, len(row)))

            def take(output: Any, version: int) -> bool:
                (grown,) = output.outputs
                for entry, t in zip(grown.logprobs or [], left, strict=False):
                    logprobs[place][t] = entry[row[t]].logprob
                    versions.add(version)
                return False

            return Request(row[:first], given(temperature, row[first:]), take)

        if 0 < last <= FEW:
            wanted = [drawn_again(place) for place, row in enumerate(rows) if len(row) > 1]
        else:
            wanted = [request(place) for place in range(len(rows))]
        await self._engine.complete(wanted)
        if last > FEW:
            for found in logprobs:
                found[: max(0, len(found) - last)] = 0
        return logprobs, versions or {self._engine.version}

    async def _switch(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        put = self._put if self._config.lora is None else self._put_adapter
        await self._engine.run(lambda: self._engine.switch(lambda: put(tensors), version))

    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        self._engine.put(tensors)

    def _put_adapter(self, tensors: dict[str, torch.Tensor]) -> None:
        self._loaded.model.peft_config["default"].save_pretrained(self._folder.name)
        named = {name.replace(".default.", "."): tensor for name, tensor in tensors.items()}
        save_file(named, Path(self._folder.name) / "adapter_model.safetensors")
        self._engine.put_adapter(self._folder.name)

    def _save(self, directory: Path, training_state: bool) -> CheckpointResponse:
        raise BadInput("save: a vLLM sampler has no files of its own; save the policy that trains")

    def _load_from(self, directory: Path, training_state: bool) -> CheckpointResponse:
        raise BadInput("load: a vLLM sampler takes weights by publication alone; name the folder as its model")


class Scores:
    """Lets in scores of one temperature at a time: vLLM has a single one for all prompts of a step."""

    def __init__(self) -> None:
        self._temperature = 1.0
        self._inside = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def at(self, temperature: float) -> AsyncIterator[None]:
        """Wait until nobody scores at another temperature."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._inside or self._temperature == temperature)
            self._temperature, self._inside = temperature, self._inside + 1
        try:
            yield
        finally:
            self._inside -= 1
            async with self._changed:
                self._changed.notify_all()


def drawn(draw: tuple[float, float, int, int, int], room: int, stops: list[int], structure: Structure | None) -> Any:
    """vLLM's parameters of one completion. `draw`: temperature, top-p, top-k, seed and sample index."""
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
    from vllm.sampling_params import SamplingParams as VLLMParams

    from actors.policy.vllm_worker import DRAW

    form = None
    if structure is not None:
        form = StructuredOutputsParams(
            json=structure.json_schema or None, regex=structure.regex or None, choice=structure.choices or None
        )
    return VLLMParams(
        max_tokens=room,
        # What vLLM's own sampler would do; ours reads the rest.
        temperature=0.0,
        logprobs=0,
        detokenize=False,
        stop_token_ids=stops,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=form,
        extra_args={DRAW: draw},
    )


def given(temperature: float, tokens: list[int]) -> Any:
    """vLLM's parameters of tokens that are given, not drawn, and whose log-probs are wanted."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as VLLMParams

    from actors.policy.vllm_worker import DRAW, GIVEN

    return VLLMParams(
        max_tokens=len(tokens),
        temperature=0.0,
        logprobs=0,
        detokenize=False,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
        extra_args={DRAW: (temperature, 1.0, 0, 0, 0), GIVEN: tokens},
    )


def scored(temperature: float) -> Any:
    """vLLM's parameters of a prompt whose log-probs are wanted; it insists on drawing a token."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as VLLMParams

    from actors.policy.vllm_worker import DRAW, TEMPERATURE

    return VLLMParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={DRAW: (0.0, 1.0, 0, 0, 0), TEMPERATURE: temperature},
    )
