"""Lightning callback that scores reconstructions at every validation and once more, with everything, at the end."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Optional

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from tqdm import tqdm

from v2flow.decode_modes import select_modes
from v2flow.errors import V2FlowError
from v2flow.evaluate import evaluation_loader, make_report, run_evaluator
from v2flow.images import save_grid
from v2flow.metrics.evaluator import ReconstructionEvaluator
from v2flow.metrics.features import FeatureNetworks, load_networks
from v2flow.metrics.files import write_json
from v2flow.metrics.floors import data_floors
from v2flow.origin import current_commit
from v2flow.training.logged_pictures import (
    TokenEntropies,
    code_counts,
    log_histogram,
    log_picture,
    takes_pictures,
    tile,
    usage_map,
)
from v2flow.training.run_files import (
    describe_data,
    grid_file,
    is_dry_run,
    log_directory,
    record_validation,
    scored_checkpoint,
    shows_progress,
    written_checkpoints,
)


@dataclass(frozen=True)
class FinalResult:
    """What the end of the fit found, until the files are written.

    Attributes:
        figures: `ema` or `raw` -> what `evaluate_model` gives.
        floors: rows that cost nothing, if asked for.
        grid: row name -> uint8 [n, 3, H, W]; empty for no grid.
        directory: where the files go.
    """

    figures: dict[str, dict[str, Any]]
    floors: Optional[dict[str, dict[str, float]]]
    grid: dict[str, torch.Tensor]
    directory: Path


class ReconstructionCallback(Callback):
    """Logs reconstruction figures and grids; at the end of the fit writes metrics.json and grid.png.

    At every validation, and under `test/` in `v2flow test`, over all ranks: `val/MODE/psnr`, `psnr_pooled`, `ssim` of
    each mode, `val/codebook_usage`, `val/codebook_perplexity`, with `features` also the feature distances (KID with its
    standard error), and `val/psnr`, the psnr of the first mode, for ModelCheckpoint to monitor; a validation's figures
    are also a line of LOGDIR/validation.jsonl. A grid, originals in the first row and each mode beneath, goes to
    LOGDIR/grids/step-XXXXXX.png and, with TensorBoard or W&B, is shown as `val/grid`. They also show
    `val/codebook_usage_map`, how often each code was used (see `usage_map`), and, of a tokenizer with a vocabulary,
    `val/token_entropy_histogram`, the entropies of the tokens' distributions over words, in nats.

    When training ends, the validation set (as far as `limit_val_batches` lets it) is scored in all modes of
    the module, by the code of `v2flow evaluate`, with the averaged weights if a weight-averaging callback is
    there and with the raw ones otherwise. metrics.json names the checkpoint that was written at the last
    step, if any: it holds the weights scored. Sanity checking is skipped; fast_dev_run validates but leaves
    no files.

    Args:
        modes: which of the module's `decode_modes` to score at each validation; None for all.
        features: feature distances at each validation.
        final_features: feature distances at the end.
        floors: at the end, also the rows of the mean training picture and the nearest training picture (one
            process and a data module with shards only).
        grid_images: pictures in a grid, and in the histogram of entropies; 0 for neither.
        seed: seed of the decoding noise.
    """

    def __init__(
        self,
        modes: Optional[list[str]] = None,
        features: bool = False,
        final_features: bool = True,
        floors: bool = False,
        grid_images: int = 32,
        seed: int = 0,
    ) -> None:
        if grid_images < 0:
            raise V2FlowError(f"option grid_images: expected 0 or more, found {grid_images}")
        self.modes = modes
        self.features = features
        self.final_features = final_features
        self.floors = floors
        self.grid_images = grid_images
        self.seed = seed
        self._evaluator: Optional[ReconstructionEvaluator] = None
        self._entropies = TokenEntropies(0)
        self._networks: Optional[FeatureNetworks] = None
        self._result: Optional[FinalResult] = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuses unknown modes, and floors where they cannot be had, before any work is done."""
        self._result = None
        current_commit()
        select_modes(self.modes, pl_module.decode_modes)
        data = getattr(trainer, "datamodule", None)
        shards = getattr(data, "train", None)
        if self.floors and stage == "fit" and (trainer.world_size > 1 or not shards):
            raise V2FlowError(
                "option floors: expected one process and a data module with training shards, found "
                f"{trainer.world_size} processes and {shards or 'no shards'}; set floors to false"
            )
        if self.floors and stage == "fit" and getattr(data, "latents", None) is not None:
            raise V2FlowError(
                "option floors: expected training shards of pictures, found cached latents; set floors to false"
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts from nothing."""
        self._evaluator = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Scores one batch while averaged weights, if any, are swapped in."""
        if trainer.sanity_checking:
            return
        if self._evaluator is None:
            if self.features and self._networks is None:
                height, width = batch["image"].shape[2:]
                self._networks = load_networks(height, width, pl_module.device)
            self._evaluator = ReconstructionEvaluator(
                pl_module.model,
                select_modes(self.modes, pl_module.decode_modes),
                device=pl_module.device,
                seed=self.seed,
                networks=self._networks,
                grid_images=self.grid_images,
            )
            shown = trainer.is_global_zero and takes_pictures(trainer)
            self._entropies = TokenEntropies(self.grid_images if shown else 0)
        self._evaluator.update(batch, batch_idx)
        self._entropies.update(pl_module.model, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Logs the figures. The model is not run, so averaged weights may be swapped out before or after."""
        self._log("val", trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts from nothing."""
        self._evaluator = None

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Scores one batch."""
        self.on_validation_batch_end(*args, **kwargs)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Logs the figures."""
        self._log("test", trainer, pl_module)

    def _log(self, stage: str, trainer: Trainer, pl_module: Any) -> None:
        if self._evaluator is None:
            return
        result = self._evaluator.compute()
        figures = {
            f"{mode}/{name}": value for mode, row in result["modes"].items() for name, value in row.items()
        }
        figures["psnr"] = next(iter(result["modes"].values()))["psnr"]
        figures["codebook_usage"] = result["codebook"]["usage"]
        figures["codebook_perplexity"] = result["codebook"]["perplexity"]
        for name, value in figures.items():
            # Equal on every rank: the synchronising mean changes nothing.
            pl_module.log(f"{stage}/{name}", value, prog_bar=name == "psnr", sync_dist=True, batch_size=1)
        if stage == "val":
            record_validation(trainer, figures)
        self._show(stage, trainer, self._evaluator)
        self._evaluator = None

    def _show(self, stage: str, trainer: Trainer, evaluator: ReconstructionEvaluator) -> None:
        """Pictures, for the loggers that take them, and the grid's file."""
        directory = log_directory(trainer)
        if self.grid_images > 0 and trainer.is_global_zero and not is_dry_run(trainer):
            grid = evaluator.grid()
            save_grid([row.float() / 255.0 for row in grid.values()], grid_file(trainer, directory, stage))
            log_picture(trainer, f"{stage}/grid", tile(list(grid.values())))
        if takes_pictures(trainer):  # counts are summed over the ranks: not for nobody
            log_picture(trainer, f"{stage}/codebook_usage_map", usage_map(code_counts(evaluator)))
            log_histogram(trainer, f"{stage}/token_entropy_histogram", self._entropies.values())

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Scores everything while the model is still on its device."""
        loader = _validation_loader(trainer)
        limit = _validation_batches(trainer)
        if is_dry_run(trainer) or loader is None or limit == 0:
            return
        with averaged_weights(trainer, pl_module) as weights:
            evaluator = run_evaluator(
                pl_module.model,
                loader,
                pl_module.decode_modes,
                seed=self.seed,
                features=self.final_features,
                grid_images=self.grid_images,
                max_batches=limit,
                device=pl_module.device,
                progress=shows_progress(trainer),
            )
            figures = evaluator.compute()
        figures["protocol"] = describe_data(trainer) | figures["protocol"]
        floors = self._score_floors(trainer, islice(loader, limit), pl_module.device) if self.floors else None
        self._result = FinalResult({weights: figures}, floors, evaluator.grid(), log_directory(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Writes metrics.json and grid.png and says where everything lies: now the last checkpoint has its name."""
        if self._result is None or not trainer.is_global_zero:
            return
        places = written_checkpoints(trainer)
        report = make_report(
            scored_checkpoint(trainer),
            type(pl_module.model).__name__,
            trainer.global_step,
            self._result.figures,
            self._result.floors,
        )
        places["metrics"] = str(self._result.directory / "metrics.json")
        write_json(places["metrics"], report)
        if self._result.grid:
            places["grid"] = str(self._result.directory / "grid.png")
            save_grid([row.float() / 255.0 for row in self._result.grid.values()], places["grid"])
        print("v2flow: " + ", ".join(f"{name} {path}" for name, path in places.items()))

    def _score_floors(
        self, trainer: Trainer, loader: Iterable[Mapping[str, Any]], device: torch.device
    ) -> dict[str, dict[str, float]]:
        shards: Any = trainer.datamodule  # type: ignore[attr-defined]
        train = evaluation_loader(
            shards.train,
            shards.image_size,
            shards.eval_batch_size,
            num_workers=shards.num_workers,
            allow_pipe=shards.allow_pipe,
        )
        bar = tqdm(
            train,
            "training pictures",
            unit="batch",
            disable=not shows_progress(trainer),
            delay=2.0,
            leave=False,
        )
        return data_floors(bar, loader, features=self.final_features, device=device)


@contextmanager
def averaged_weights(trainer: Trainer, pl_module: Any) -> Iterator[str]:
    """Puts averaged weights into the module if a weight-averaging callback has them; yields `ema` or `raw`.

    Uses the callback's own validation hooks, so it holds whether or not the callback has already copied its
    average at the end of the training.
    """
    averaging = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
    for callback in averaging:
        callback.on_validation_epoch_start(trainer, pl_module)
    try:
        yield "ema" if averaging else "raw"
    finally:
        for callback in averaging:
            callback.on_validation_epoch_end(trainer, pl_module)


def _validation_loader(trainer: Trainer) -> Optional[Iterable[Mapping[str, Any]]]:
    """The loader that the trainer validates on, or None if there is no single one."""
    loader = trainer.val_dataloaders
    if isinstance(loader, (list, tuple)):
        loader = loader[0] if len(loader) == 1 else None
    return loader


def _validation_batches(trainer: Trainer) -> Optional[int]:
    """Batches that `limit_val_batches` lets through; None for all."""
    batches = trainer.num_val_batches
    count = sum(batches) if isinstance(batches, list) else batches
    return None if count == float("inf") else int(count)
