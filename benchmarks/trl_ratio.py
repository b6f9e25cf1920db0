"""Rollout and GRPO update, end to end, against TRL's GRPOTrainer: python benchmarks/trl_ratio.py [--model 10M].

Same model, prompts, sample counts and limits in all arms. Each arm is a process of its own that waits while the
others work: they take turns, step by step. A step samples 8 completions of 8 prompts and makes one update on them.
Completions of the long-tailed regime end at random, by a weight of the model, so that lengths are about exponential.
TRL runs with two micro-batch sizes; ratios are to the better one. Prints Markdown and writes trl_ratio.json.

With --staleness-1 it compares wall time on two cores: TRL with two threads, against a sampler and a trainer of
one thread each, where the rollouts of the next step go on while the trainer works; a turn of that arm is 6 steps.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

VOCABULARY, PROMPTS, SAMPLES = 1000, 8, 8
AHEAD, AHEAD_STEPS = "repertory, staleness 1", 6
SHAPES = {
    "0.7M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4},
    "10M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 12},
}


@dataclass(frozen=True)
class Regime:
    """Lengths in tokens: of prompts, of the longest completion, and of the mean one (0: all are the longest)."""

    prompt: int
    longest: int
    mean: int = 0


REGIMES = {
    "fixed": Regime(16, 64),
    "long tail": Regime(16, 256, mean=40),
    "long prompts": Regime(768, 32),
}
Report = dict[str, float]


def write_model(folder: Path, shape: dict[str, int], mean: int) -> None:
    """A random Llama whose end token has the same probability, 1 / mean, at every place."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    words = {"<end>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=1280, eos_token_id=0, pad_token_id=1,
        bos_token_id=None, tie_word_embeddings=False, **shape,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # The first number of the residual stream is constant, and only the end token looks at it.
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[0] = 0.0
        hidden_BTH = model.model(torch.randint(2, VOCABULARY, (8, 64))).last_hidden_state
        others_BT = model.lm_head(hidden_BTH)[..., 1:].logsumexp(-1)
        share = 1 / mean if mean else 1e-9
        model.lm_head.weight[0, 0] = (math.log(share / (1 - share)) + others_BT).mean() / hidden_BTH[..., 0].mean()
    model.save_pretrained(folder)


def prompts(regime: Regime) -> list[str]:
    import random

    rng = random.Random(0)
    return [" ".join(f"w{rng.randrange(2, VOCABULARY)}" for _ in range(regime.prompt)) for _ in range(PROMPTS)]


def serve(connection: Connection, arm: str, model: Path, regime: Regime, threads: int) -> None:
    """A process of one arm: do a step when told to, and say what it took."""
    import torch

    torch.set_num_threads(threads)
    if arm.startswith("TRL"):
        serve_trl(connection, model, regime, int(arm.split()[-1]))
    elif arm == AHEAD:
        asyncio.run(serve_ahead(connection, model, regime))
    else:
        asyncio.run(serve_own(connection, model, regime, threads, arm.split()[-1]))


def serve_trl(connection: Connection, model: Path, regime: Regime, micro_batch: int) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    batch = PROMPTS * SAMPLES
    config = GRPOConfig(
        output_dir=str(model / "trl"), use_cpu=True, bf16=False, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=batch // micro_batch, num_generations=SAMPLES, learning_rate=1e-6, beta=0.0,
        max_completion_length=regime.longest, max_steps=10_000, save_strategy="no", report_to=[], disable_tqdm=True,
        logging_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text) % 7) for text in completions]

    data = Dataset.from_dict({"prompt": prompts(regime)})
    trainer = GRPOTrainer(model=str(model), reward_funcs=reward, args=config, train_dataset=data)
    generate, spent = trainer._generate, {"generation": 0.0}

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.process_time()
        try:
            return generate(*arguments, **options)
        finally:
            spent["generation"] += time.process_time() - began

    trainer._generate = timed

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            connection.recv()
            spent["generation"] = 0.0
            self.began = time.perf_counter(), time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wall, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
            tokens = trainer._metrics["train"]["completions/mean_length"][-1] * batch
            connection.send({"tokens": tokens, "wall": wall, "cpu": cpu, "sampling": spent["generation"]})

    trainer.add_callback(Turns())
    connection.send("ready")
    trainer.train()


async def serve_own(connection: Connection, model: Path, regime: Regime, threads: int, engine: str) -> None:
    from cluster.cluster import Cluster
    from cluster.config import MethodConfig
    from protocols.messages import Prompt, SamplingParams
    from protocols.policy import PolicyConfig, SampleRequest

    policy_config = PolicyConfig.model_validate(
        {
            "model": str(model),
            "device": "cpu",
            "threads": threads,
            "sampler": {"engine": engine, "max_batch_rows": PROMPTS * SAMPLES},
            # Few tokens at once are quicker on a CPU.
            "trainer": {"learning_rate": 1e-6, "micro_batch_tokens": 2048},
        }
    )
    params = SamplingParams(max_tokens=regime.longest)
    with tempfile.TemporaryDirectory() as runs:
        async with Cluster(MethodConfig(runs_dir=runs), method="benchmark", run="one") as cluster:
            policy = await cluster.policy(policy_config)
            connection.send("ready")
            step = 0
            while await asyncio.to_thread(connection.recv):
                step += 1
                asked = [Prompt(text=text, seed=step * 100 + i) for i, text in enumerate(prompts(regime))]
                connection.send(await own_step(policy, SampleRequest(prompts=asked, n=SAMPLES, params=params)))


async def serve_ahead(connection: Connection, model: Path, regime: Regime) -> None:
    from cluster.cluster import Cluster
    from cluster.config import MethodConfig
    from protocols.messages import Prompt, SamplingParams
    from protocols.policy import PolicyConfig, SampleRequest

    given = {
        **{"model": str(model), "device": "cpu", "threads": 1},
        # A second sampler, which has nothing to do, keeps the first apart from the trainer.
        **{"sampler": {"replicas": 2, "max_batch_rows": PROMPTS * SAMPLES}, "resources": {"cpus": 0.5}},
        **{"trainer": {"learning_rate": 1e-6, "micro_batch_tokens": 2048}},
    }
    params = SamplingParams(max_tokens=regime.longest)
    with tempfile.TemporaryDirectory() as runs:
        config = MethodConfig.model_validate({"runs_dir": runs, "transport": "ray"})
        async with Cluster(config, method="benchmark", run="ahead") as cluster:
            policy = await cluster.policy(PolicyConfig.model_validate(given))

            def rollout(step: int) -> asyncio.Task[Any]:
                asked = [Prompt(text=text, seed=step * 100 + i) for i, text in enumerate(prompts(regime))]
                return asyncio.create_task(policy.sample(SampleRequest(prompts=asked, n=SAMPLES, params=params)))

            connection.send("ready")
            while await asyncio.to_thread(connection.recv):
                wall, tokens = time.perf_counter(), 0
                ahead = rollout(0)
                for step in range(AHEAD_STEPS):
                    sampled = await ahead
                    if step + 1 < AHEAD_STEPS:
                        ahead = rollout(step + 1)
                    tokens += await train_on(policy, sampled)
                seconds = (time.perf_counter() - wall) / AHEAD_STEPS
                # What Ray's processes take of the processor is not known here.
                connection.send({"tokens": tokens / AHEAD_STEPS, "wall": seconds, "cpu": math.nan, "sampling": 0.0})


async def own_step(policy: Any, request: Any) -> Report:
    wall, cpu = time.perf_counter(), time.process_time()
    sampled = await policy.sample(request)
    sampling = time.process_time() - cpu
    tokens = await train_on(policy, sampled)
    return {
        "tokens": tokens,
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "sampling": sampling,
    }


async def train_on(policy: Any, sampled: Any) -> int:
    """One update on the completions, and its publication. Returns their number of tokens."""
    import numpy as np

    from protocols.losses import GRPOLoss
    from protocols.service import Empty
    from protocols.training import ForwardBackwardRequest, OptimStepRequest, TrainRow

    rows, tokens = [], 0
    for p, result in enumerate(sampled.results):
        rewards_G = np.array([float(len(one.text) % 7) for one in result.completions])
        advantages_G = (rewards_G - rewards_G.mean()) / (rewards_G.std() + 1e-4)
        for one, advantage in zip(result.completions, advantages_G, strict=True):
            lengths = len(result.prompt_tokens), len(one.tokens)
            on_completion = np.r_[np.zeros(lengths[0]), np.ones(lengths[1])]
            rows.append(
                TrainRow(
                    row_id=str(p),
                    tokens=np.r_[result.prompt_tokens.array, one.tokens.array],
                    terms={"grpo": on_completion},
                    advantages=on_completion * advantage,
                    sampled_logprobs=np.r_[np.zeros(lengths[0]), one.logprobs.array],
                )
            )
            tokens += lengths[1]
    await policy.forward_backward(ForwardBackwardRequest(rows=rows, losses={"grpo": GRPOLoss()}))
    await policy.optim_step(OptimStepRequest())
    await policy.publish(Empty())
    return tokens


def measure(
    regime: Regime, shape: dict[str, int], arms: list[str], rounds: int, threads: int
) -> dict[str, list[Report]]:
    """Each arm's steps, in turns; the first of each warms up and is left out."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        write_model(model, shape, regime.mean)
        running = {}
        for arm in arms:
            here, there = spawn.Pipe()
            process = spawn.Process(target=serve, args=(there, arm, model, regime, threads), daemon=True)
            process.start()
            there.close()
            running[arm] = process, here
            assert here.recv() == "ready"
        found: dict[str, list[Report]] = {arm: [] for arm in arms}
        for turn in range(rounds + 1):
            for arm, (_, here) in running.items():
                here.send(True)
                report = here.recv()
                if turn:
                    found[arm].append(report)
        for process, _ in running.values():
            process.kill()
            process.join()
    return found


def summary(found: dict[str, list[Report]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for arm, reports in found.items():
        rate = sorted(report["tokens"] / report["cpu"] for report in reports)
        rows.append(
            {
                "arm": arm,
                "tokens_per_cpu_s": statistics.median(rate),
                "range": [rate[0], rate[-1]],
                "wall_s": statistics.median(report["wall"] for report in reports),
                "tokens_per_wall_s": statistics.median(report["tokens"] / report["wall"] for report in reports),
                "sampling_share": statistics.median(report["sampling"] / report["cpu"] for report in reports),
            }
        )
    for ratio, rate in (("ratio", "tokens_per_cpu_s"), ("wall_ratio", "tokens_per_wall_s")):
        best = max(row[rate] for row in rows if row["arm"].startswith("TRL"))
        for row in rows:
            row[ratio] = row[rate] / best
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="0.7M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("trl_ratio.json"))
    parser.add_argument("--staleness-1", action="store_true")
    options = parser.parse_args()
    arms = ["TRL, micro-batch 64", "TRL, micro-batch 16", "repertory, transformers", "repertory, vllm"]
    if options.staleness_1:
        arms, options.threads = [*arms[:2], AHEAD], 2
    results = {}
    print("| regime | arm | tokens per CPU-s (range) | to TRL | s per step | wall, to TRL | sampling |")
    print("|---|---|---|---|---|---|---|")
    for name, regime in REGIMES.items():
        rows = summary(measure(regime, SHAPES[options.model], arms, options.rounds, options.threads))
        results[name] = rows
        for row in rows:
            low, high = row["range"]
            rate = f"{row['tokens_per_cpu_s']:.0f} ({low:.0f}-{high:.0f})"
            print(
                f"| {name} | {row['arm']} | {rate} | {row['ratio']:.2f}x"
                f" | {row['wall_s']:.2f} | {row['wall_ratio']:.2f}x | {row['sampling_share']:.0%} |",
                flush=True,
            )
    options.out.write_text(
        json.dumps({"model": options.model, "threads": options.threads, "regimes": results}, indent=1)
    )


if __name__ == "__main__":
    main()
