"""Lightning's way of writing and reading checkpoints, with files that outlive a crash."""

from pathlib import Path
from typing import Any, Optional

from lightning.pytorch.plugins.io import TorchCheckpointIO

from v2flow.errors import V2FlowError
from v2flow.training.checkpoint_files import previous_of, usable_checkpoint, write_checkpoint
from v2flow.training.checkpoint_folders import remove


class CheckedCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, made safe: after a crash at any moment, and after a damage to the newest file, a
    run goes on from a whole checkpoint.

    Remote paths are left to Lightning. Sharded checkpoints do not come here: their strategy reads and writes them.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Optional[Any] = None
    ) -> None:
        """Writes atomically with a checksum and keeps the file before; a remote path is left to Lightning."""
        if _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: Optional[bool] = None
    ) -> dict[str, Any]:
        """Reads the file, or the one before where its checksum does not fit."""
        if Path(path).is_dir():
            raise V2FlowError(
                f"{path}: expected a .ckpt file, found a folder; a sharded checkpoint is read by the strategy that "
                "wrote it: --trainer.strategy=fsdp2"
            )
        if not _is_remote(path):
            path = usable_checkpoint(path)
        # Lightning's default for a URL is to unpickle whatever is in it.
        return super().load_checkpoint(path, map_location, True if weights_only is None else weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes the file or folder and the one before it."""
        super().remove_checkpoint(path)
        if not _is_remote(path):
            remove(previous_of(path))


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
