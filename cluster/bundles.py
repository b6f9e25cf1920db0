"""Which processes of a policy are set aside together."""

from protocols.placement import Resources


def bundles_for(sampler: Resources, rank: Resources, ranks: int) -> tuple[list[Resources], list[int]]:
    """What to set aside for samplers and trainer ranks, and which bundle each goes to, samplers first.

    Where a sampler and a rank fit one GPU together they share it: sampler i with rank i. Others have a bundle of
    their own.
    """
    if not 0 < rank.gpus <= 1 - sampler.gpus:
        alone = [Resources(cpus=one.cpus, gpus=one.gpus) for one in [sampler] * sampler.replicas + [rank] * ranks]
        return alone, list(range(len(alone)))
    pairs = max(sampler.replicas, ranks)
    bundles = [
        Resources(
            cpus=(sampler.cpus if i < sampler.replicas else 0) + (rank.cpus if i < ranks else 0),
            gpus=(sampler.gpus if i < sampler.replicas else 0) + (rank.gpus if i < ranks else 0),
        )
        for i in range(pairs)
    ]
    return bundles, [*range(sampler.replicas), *range(ranks)]
