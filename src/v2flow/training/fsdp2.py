"""`--trainer.strategy=fsdp2`: ModelParallelStrategy over all devices, with checkpoints that outlive a crash."""

from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint import CheckpointException

from v2flow.data.disk import disk_reason
from v2flow.training.checkpoint_files import damage, not_written, usable_checkpoint
from v2flow.training.checkpoint_folders import (
    check_sharded_checkpoint,
    folder_damage,
    remove,
    seal_folder,
    sums_of,
)


class FSDP2Strategy(ModelParallelStrategy):
    """Shards what learns over all devices of all nodes (`fully_shard`, in the module's `configure_model`).

    Args:
        save_distributed_checkpoint: write a folder to which every rank adds its shards, in place of one file that any
            single process reads. A folder holds the same number of bytes, but no rank ever has all of them in memory.
        process_group_backend: of torch.distributed; by default the one for the device.
        timeout: for the ranks to wait for each other.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: Optional[str] = None,
        timeout: Optional[timedelta] = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Connects the ranks; the data is shared out over all of them."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Optional[Any] = None
    ) -> None:
        """Writes a folder aside, with checksums, and renames it; a file is written by `CheckedCheckpointIO`.

        Raises:
            V2FlowError: the disk is full or read-only; the checkpoint before is untouched.
        """
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        part = path.with_name(f".{path.name}.part")
        if self.global_rank == 0:
            remove(part)
        self.barrier()
        try:
            super().save_checkpoint(checkpoint, part, storage_options)
        except (CheckpointException, OSError) as error:
            reason = _reason(error)
            if reason is None:
                raise
            raise not_written(path, reason) from error
        gathered = self._gather(sums_of(part, self.global_rank))
        if self.global_rank == 0:
            seal_folder(part, path, {name: value for sums in gathered for name, value in sums.items()})
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: Optional[bool] = None
    ) -> dict[str, Any]:
        """Reads the checkpoint, or the one before where a checksum does not fit; it has to hold plain types alone.

        Raises:
            V2FlowError: it is damaged, and so are those before; or its loading would run what it says.
        """
        path = usable_checkpoint(self.broadcast(checkpoint_path), self._damage)
        if path.is_dir():
            check_sharded_checkpoint(path)
        return super().load_checkpoint(path, True if weights_only is None else weights_only)

    def _damage(self, path: Path) -> str | None:
        """Every rank looks at its share of the files; all give the same answer."""
        if path.is_dir():
            own = folder_damage(path, rank=self.global_rank, ranks=self.world_size)
        else:
            own = damage(path) if self.global_rank == 0 else None
        return next((reason for reason in self._gather(own) if reason), None)

    def _gather(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, value)
        return found


def _reason(error: BaseException) -> str | None:
    """Why a disk refused to be written to, on whichever rank; None if it did not."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
    return next(filter(None, (disk_reason(failure) for failure, _ in failures)), None)


StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="FSDP2 over all devices, with checkpoints that outlive a crash"
)
