"""The loader of a data set that the command line names, for one process or one rank."""

from pathlib import Path

from scpl_compile.errors import DataError
from scpl_compile.ir import Plan
from scpl_compile.runtime.data import Loader
from scpl_compile.runtime.datasets import open_splits
from scpl_compile.runtime.progress import say
from scpl_compile.runtime.ranks import Ranks

__all__ = ["open_loader"]


def open_loader(
    plan: Plan,
    data: str,
    *,
    batch_size: int,
    augment: str = "none",
    seed: int = 0,
    ranks: Ranks | None = None,
    facts: Path | None = None,
    trains: bool = True,
) -> Loader:
    """The data set `data`, fitted to the plan's inputs.

    A last training batch of one sample is left out: BatchNorm refuses it, and it has no pair. On
    ranks every replica takes its share of each batch, and only the first stage reads inputs.
    facts: the file of the run whose weights are gone on with, as of open_splits. trains: False
    where the data are only evaluated on.

    Raises:
        DataError: it does not fit; a batch too small for the replicas, or no multiple of them.
        ProgramError: the facts are damaged, or those of texts missing.
    """
    splits = open_splits(
        data,
        inputs=plan.inputs,
        num_classes=plan.num_classes,
        task=plan.task,
        facts=facts,
    )
    num_samples = len(splits.train)
    replica, num_replicas = (0, 1) if ranks is None else (ranks.replica, ranks.num_replicas)
    if num_replicas > 1 and min(batch_size, num_samples) < 2 * num_replicas:
        raise DataError(
            f"a batch of {min(batch_size, num_samples)} for {num_replicas} replicas leaves one of "
            f"them less than 2 samples; give --batch-size {2 * num_replicas} or more, or start "
            "fewer ranks"
        )
    if batch_size % num_replicas:
        raise DataError(
            f"a batch of {batch_size} cannot be shared equally by {num_replicas} replicas; give "
            f"--batch-size {batch_size - batch_size % num_replicas}, a multiple of their number"
        )
    loader = Loader(
        splits,
        inputs=plan.inputs,
        num_classes=plan.num_classes,
        task=plan.task,
        batch_size=batch_size,
        augment=augment,
        seed=seed,
        drop_last=num_samples > batch_size and num_samples % batch_size < 2 * num_replicas,
        share=(replica, num_replicas),
        reads=ranks is None or 0 in ranks.stages,
        trains=trains,
    )
    if loader.fit_notice:
        say(loader.fit_notice)
    return loader
