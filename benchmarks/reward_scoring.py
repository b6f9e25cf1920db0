"""Scoring replies token by token: python benchmarks/reward_scoring.py PAIRS.jsonl[.gz] [--replies 128].

The embedded model with a scalar head, on this machine's CPU. Peers in the same run: transformers' own sequence
classifier over batches of 8 in the order given, padded to their longest reply; and padded to 1,024 tokens, as Q-RM's
reference code does. All read the same tokens and give the same last scores, which is checked.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from actors.actor import start
from actors.policy.loading import EMBEDDED
from actors.policy.microbatch import pad_right
from actors.reward_model.reading import PromptReader, read
from actors.reward_model.reward_model import RewardModelActor
from methods.qrm_data import read_pairs
from protocols.reward_model import Reply, RewardModelConfig, RewardRequest

BATCH = 8
LIMIT = 1024


def by_transformers(model: torch.nn.Module, rows: list[np.ndarray], width: int) -> list[float]:
    """Last scores; `width`: pad to at least so many tokens."""
    scores: list[float] = []
    with torch.inference_mode():
        for i in range(0, len(rows), BATCH):
            chosen = rows[i : i + BATCH]
            lengths = np.array([len(row) for row in chosen])
            tokens = pad_right([*chosen, np.zeros(width, np.int32)])[:-1].astype(np.int64)
            mask = torch.from_numpy((np.arange(tokens.shape[1])[None] < lengths[:, None]).astype(np.int64))
            states = model.model(input_ids=torch.from_numpy(tokens), attention_mask=mask).last_hidden_state
            logits = model.score(states).squeeze(-1)
            scores += logits[torch.arange(len(chosen)), torch.from_numpy(lengths - 1)].tolist()
    return scores


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--replies", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pairs = read_pairs(options.pairs).rows[: options.replies // 2]
    replies = [one for pair in pairs for one in (pair.preference().chosen, pair.preference().rejected)]

    actor = RewardModelActor(RewardModelConfig(kind="outcome", max_tokens=LIMIT))
    await start(actor)
    prompts = PromptReader(actor._outline.tokenizer)
    rows = [read(reply, prompts, LIMIT).tokens for reply in replies]
    torch.manual_seed(0)
    peer = AutoModelForSequenceClassification.from_pretrained(EMBEDDED, num_labels=1, dtype=torch.float32).eval()
    peer.score.weight.data = actor._own[0]._loaded.model.score.weight.data.clone()

    async def ours(given: list[Reply]) -> list[float]:
        return [one.score for one in (await actor.score(RewardRequest(replies=given))).scores]

    arms: dict[str, Callable[[], object]] = {
        "transformers, padded to the batch": lambda: by_transformers(peer, rows, 0),
        "transformers, padded to 1,024": lambda: by_transformers(peer, rows, LIMIT),
    }
    expected = await ours(replies)
    for name, arm in arms.items():
        np.testing.assert_allclose(arm(), expected, atol=1e-3, err_msg=name)
    seconds: dict[str, list[float]] = {"Repertory": [], **{name: [] for name in arms}}
    for _ in range(options.rounds):
        for name in seconds:
            began = time.perf_counter()
            if name == "Repertory":
                await ours(replies)
            else:
                arms[name]()
            seconds[name].append(time.perf_counter() - began)
    tokens, mine = sum(map(len, rows)), statistics.median(seconds["Repertory"])
    print(f"{len(rows)} replies, {tokens} tokens with their prompts, {torch.get_num_threads()} threads")
    print("| arm | tokens per second | seconds, median (smallest to largest) | Repertory's time over it |")
    print("|---|---|---|---|")
    for name, found in seconds.items():
        middle = statistics.median(found)
        spread = f"{min(found):.2f} to {max(found):.2f}"
        print(f"| {name} | {tokens / middle:,.0f} | {middle:.2f} ({spread}) | {mine / middle:.2f} |")
    await actor.close()


if __name__ == "__main__":
    asyncio.run(main())
