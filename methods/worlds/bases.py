"""Models that built-in worlds train on the spot: made once, whole or not at all, and found again by later runs."""

import hashlib
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from cluster.cluster import Cluster


async def base_of(company: Cluster, kind: str, recipe: str, train: Callable[[Path], Awaitable[None]]) -> str:
    """Folder of the model of a recipe, made now if it is not there yet; `train` leaves it as FOLDER/model.

    The folder is named after the recipe, so that whatever changes the model must be in it.
    """
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    target = company.directory.path.parent / "bases" / f"{kind}-{digest}"
    if not (target / "config.json").is_file():
        staging = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            await train(staging)
            # Another run may have made the same one meanwhile; then theirs is as good.
            if not target.exists():
                os.rename(staging / "model", target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return str(target)
