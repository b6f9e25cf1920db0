"""One forward pass over rows: log-probs and entropy of the tokens that are there."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.policy.microbatch import attention_inputs, by_length, pad_right

SHARING = {
    *("gemma", "gemma2", "gemma3_text", "glm", "gpt2", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3"),
    *("qwen2", "qwen3", "qwen3_moe", "smollm3"),
}
"""Model types whose rows were compared with and without a shared prompt. Others are padded, which is always right."""


def longest_shared(config: Any) -> int:
    """Longest row, in tokens, that may share its prompt's computation; 0 if no row may.

    Rows that share follow each other, so a window of attention would be counted in the wrong places.
    """
    config = config.get_text_config()
    if config.model_type not in SHARING:
        return 0
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return (getattr(config, "sliding_window", None) if sliding else None) or sys.maxsize


def logits_of(
    model: Any, rows: Sequence[NDArray[np.int32]], wanted_BT: NDArray[np.bool_], shared: int = 0
) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]:
    """Logits that predict the wanted tokens.

    Only positions that some row wants go through the output layer, which is most of the memory for long
    prompts. Returns logits float32[B, K, V], targets int64[B, K] and the K positions of the targets in T.
    `shared`: that many leading tokens are the same in all rows, none of them wanted, and are computed once.
    """
    device = model.device
    tokens_BT = pad_right(rows).astype(np.int64)
    positions_K = np.flatnonzero(wanted_BT[:, 1:].any(axis=0)) + 1
    if shared:
        inputs, keep = _one_after_another(model, rows, positions_K, shared)
    else:
        inputs = attention_inputs([len(row) for row in rows], device)
        inputs["input_ids"], keep = torch.from_numpy(tokens_BT).to(device), positions_K - 1
    output = model(use_cache=False, logits_to_keep=torch.from_numpy(keep).to(device), **inputs)
    logits_BKV = output.logits.float().view(len(rows), len(positions_K), output.logits.shape[-1])
    return logits_BKV, torch.from_numpy(tokens_BT[:, positions_K]).to(device), positions_K


def scores_of(
    model: Any, rows: Sequence[NDArray[np.int32]], wanted_BT: NDArray[np.bool_]
) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Scores of the wanted tokens by a model with a scalar head, float32[B, K], and their K positions in T.

    The score of a token comes from the state that has read it, one position after that which predicts it.
    """
    positions_K = np.flatnonzero(wanted_BT.any(axis=0))
    inputs = attention_inputs([len(row) for row in rows], model.device)
    inputs["input_ids"] = torch.from_numpy(pad_right(rows).astype(np.int64)).to(model.device)
    output = model(use_cache=False, logits_to_keep=torch.from_numpy(positions_K).to(model.device), **inputs)
    return output.logits.float().squeeze(-1), positions_K


def _one_after_another(
    model: Any, rows: Sequence[NDArray[np.int32]], positions_K: NDArray[np.int64], shared: int
) -> tuple[dict[str, torch.Tensor], NDArray[np.int64]]:
    """One row: the shared tokens, then the rest of each row, which sees the shared tokens and itself.

    Returns the model's inputs and where the predictions of each row's K positions are, int64[B * K].
    """
    lengths = np.asarray([len(row) - shared for row in rows])
    starts = shared + np.cumsum(lengths) - lengths
    position_T = np.concatenate([np.arange(shared), *(shared + np.arange(length) for length in lengths)])
    # The shared tokens are row 0, those of row i are i + 1.
    row_T = np.repeat(np.arange(len(rows) + 1), [shared, *lengths])
    order_T = np.arange(len(row_T))
    seen_TT = (order_T[None] <= order_T[:, None]) & ((row_T[None] == 0) | (row_T[None] == row_T[:, None]))
    mask_TT = torch.from_numpy(seen_TT).to(model.device)
    # DeepSpeed's engine has a configuration of its own.
    if getattr(model, "module", model).config._attn_implementation == "eager":
        # It adds the mask to its scores.
        mask_TT = torch.zeros(mask_TT.shape, device=mask_TT.device).masked_fill(~mask_TT, -torch.inf)
    predictor_BK = starts[:, None] + positions_K[None] - shared - 1
    predictor_BK = np.where(positions_K[None] == shared, shared - 1, predictor_BK)
    # A row that ends earlier predicts something for places that nobody looks at.
    predictor_BK = np.minimum(predictor_BK, len(row_T) - 1)
    tokens_T = np.concatenate([rows[0][:shared], *(row[shared:] for row in rows)]).astype(np.int64)
    inputs = {
        "input_ids": torch.from_numpy(tokens_T)[None].to(model.device),
        "position_ids": torch.from_numpy(position_T)[None].to(model.device),
        "attention_mask": mask_TT[None, None],
    }
    return inputs, predictor_BK.ravel()


def log_softmax(logits_BKV: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature)."""
    return torch.log_softmax(logits_BKV / temperature if temperature != 1 else logits_BKV, dim=-1)


def at_targets(values_BKV: torch.Tensor, targets_BK: torch.Tensor) -> torch.Tensor:
    """The targets' entries, float32[B, K]."""
    return values_BKV.gather(-1, targets_BK.unsqueeze(-1)).squeeze(-1)


def logprobs_and_entropy(
    logits_BKV: torch.Tensor, targets_BK: torch.Tensor, temperature: float, *, entropy_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / temperature) at the targets, and the entropy in nats, float32[B, K] each."""
    all_BKV = log_softmax(logits_BKV, temperature)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_BK = -(all_BKV.exp() * all_BKV).sum(-1)
    return at_targets(all_BKV, targets_BK), entropy_BK


LEAST_SHARED = 16
"""Leading tokens in common below which nothing is gained by computing them apart."""
NEAR_END = 8
"""Tokens at the end of a row within which another may leave it and still be scored with it."""


def hosts_of(rows: Sequence[NDArray[np.int32]]) -> list[int]:
    """For each row the row that it can be scored with: one that begins with all of its tokens but the last.

    So answers to one prompt, which differ in their few tokens, cost one row. A row that has none is its own.
    """
    hosts = list(range(len(rows)))
    known: dict[bytes, int] = {}
    for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i)):
        row = rows[i]
        hosts[i] = known.get(row[:-1].tobytes(), i) if len(row) > 1 else i
        if hosts[i] == i:
            for cut in range(1, min(NEAR_END, len(row) - 1) + 1):
                known.setdefault(row[:-cut].tobytes(), i)
    return hosts


@torch.no_grad()
def score(
    model: Any, rows: Sequence[NDArray[np.int32]], temperature: float, budget: int, last: int = 0
) -> list[NDArray[np.float32]]:
    """Log-probs of every token of every row, float32[T] each; entry 0 is 0. `last`: only of so many tokens at the end
    of each row, and 0 before them."""
    if last:
        return _score_ends(model, rows, temperature, budget, last)
    results: list[NDArray[np.float32]] = [np.zeros(len(row), np.float32) for row in rows]
    hosts = hosts_of(rows)
    own = [i for i, host in enumerate(hosts) if host == i]
    guests: dict[int, list[int]] = {i: [] for i in own}
    for i, host in enumerate(hosts):
        if host != i:
            guests[host].append(i)
    for group in by_length([len(rows[i]) for i in own], budget):
        chosen = [own[place] for place in group]
        width = max(len(rows[i]) for i in chosen)
        if width < 2:
            continue
        every = [rows[i] for i in chosen]
        logits, targets, _ = logits_of(model, every, np.ones((len(chosen), width), np.bool_))
        all_BKV = log_softmax(logits, temperature)
        logprobs_BK = at_targets(all_BKV, targets).cpu().numpy()
        for b, (i, logprobs_K) in enumerate(zip(chosen, logprobs_BK, strict=True)):
            results[i][1:] = logprobs_K[: len(rows[i]) - 1]
            for guest in guests[i]:
                last = len(rows[guest]) - 1
                results[guest][1:last] = logprobs_K[: last - 1]
                results[guest][last] = float(all_BKV[b, last - 1, int(rows[guest][last])])
    return results


def _score_ends(
    model: Any, rows: Sequence[NDArray[np.int32]], temperature: float, budget: int, last: int
) -> list[NDArray[np.float32]]:
    """As `score`, of the last tokens alone; what rows begin with in common is computed once."""
    results: list[NDArray[np.float32]] = [np.zeros(len(row), np.float32) for row in rows]
    ends = [np.arange(max(1, len(row) - last), len(row)) for row in rows]
    together: dict[int, list[int]] = {}
    for i, host in enumerate(hosts_of(rows)):
        together.setdefault(host, []).append(i)
    own = sorted(together)
    for group in by_length([len(rows[i]) for i in own], budget):
        chosen = [own[place] for place in group if len(rows[own[place]]) > 1]
        if not chosen:
            continue
        wanted_BT = np.zeros((len(chosen), max(len(rows[i]) for i in chosen)), np.bool_)
        scored = [(b, j) for b, i in enumerate(chosen) for j in together[i]]
        for b, j in scored:
            wanted_BT[b, ends[j]] = True
        logits, _, positions_K = _logits_behind(model, [rows[i] for i in chosen], wanted_BT)
        all_BKV = log_softmax(logits, temperature)
        for b, j in scored:
            tokens, places = (
                torch.from_numpy(rows[j][ends[j]].astype(np.int64)),
                np.searchsorted(positions_K, ends[j]),
            )
            results[j][ends[j]] = all_BKV[b, torch.from_numpy(places), tokens].cpu().numpy()
    return results


def _logits_behind(
    model: Any, rows: Sequence[NDArray[np.int32]], wanted_BT: NDArray[np.bool_]
) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]:
    """As `logits_of`; leading tokens that all rows have in common go through the model once, into a cache."""
    config = getattr(model, "module", model).config
    first = int(np.flatnonzero(wanted_BT.any(axis=0))[0])
    shared = min(common(rows), first - 1)
    if len(rows) == 1 or shared < LEAST_SHARED or wanted_BT.shape[1] > longest_shared(config):
        return logits_of(model, rows, wanted_BT)
    from transformers import DynamicCache

    cache = DynamicCache(config=config.get_text_config())
    start = torch.from_numpy(rows[0][:shared].astype(np.int64))[None].to(model.device)
    model(input_ids=start, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(len(rows))
    tokens_BT = pad_right(rows).astype(np.int64)
    positions_K = np.flatnonzero(wanted_BT[:, 1:].any(axis=0)) + 1
    output = model(
        input_ids=torch.from_numpy(tokens_BT[:, shared:]).to(model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=torch.from_numpy(positions_K - 1 - shared).to(model.device),
        **attention_inputs([len(row) for row in rows], model.device),
    )
    return output.logits.float(), torch.from_numpy(tokens_BT[:, positions_K]).to(model.device), positions_K


def common(rows: Sequence[NDArray[np.int32]]) -> int:
    """How many leading tokens all rows have in common."""
    width = min(map(len, rows))
    differs_T = (np.stack([row[:width] for row in rows]) != rows[0][:width]).any(axis=0)
    return int(differs_T.argmax()) if differs_T.any() else width


@torch.no_grad()
def token_scores(model: Any, rows: Sequence[NDArray[np.int32]], budget: int) -> list[NDArray[np.float32]]:
    """Scores of every token of every row by a model with a scalar head, float32[T] each."""
    results: dict[int, NDArray[np.float32]] = {}
    for group in by_length([len(row) for row in rows], budget, padding=0.1):
        chosen = [rows[i] for i in group]
        scores_BT, _ = scores_of(model, chosen, np.ones((len(chosen), max(map(len, chosen))), np.bool_))
        for i, scores_T in zip(group, scores_BT.cpu().numpy(), strict=True):
            results[i] = scores_T[: len(rows[i])]
    return [results[i] for i in range(len(rows))]


@torch.no_grad()
def embed(model: Any, rows: Sequence[NDArray[np.int32]], budget: int) -> NDArray[np.float32]:
    """Mean of the last layer's hidden states over each row's tokens, scaled to length 1: float32[B, D]."""
    found: dict[int, NDArray[np.float32]] = {}
    for group in by_length([len(row) for row in rows], budget):
        lengths = [len(rows[i]) for i in group]
        tokens_BT = torch.from_numpy(pad_right([rows[i] for i in group]).astype(np.int64)).to(model.device)
        inputs = attention_inputs(lengths, model.device)
        states_BTD = model.get_decoder()(input_ids=tokens_BT, use_cache=False, **inputs).last_hidden_state.float()
        there_BT = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        mean_BD = (states_BTD * there_BT.to(model.device)[..., None]).sum(1)
        unit_BD = torch.nn.functional.normalize(mean_BD, dim=-1)
        found.update(zip(group, unit_BD.cpu().numpy(), strict=True))
    return np.stack([found[i] for i in range(len(rows))])
