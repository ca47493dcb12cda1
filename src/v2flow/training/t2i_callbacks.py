"""Lightning callback that scores a text-to-image model at every validation, and with everything at the end."""

from typing import Any, Optional

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from v2flow.errors import V2FlowError
from v2flow.images import GRID_COLUMNS, GRID_PICTURES
from v2flow.metrics.files import write_json
from v2flow.metrics.scene_verifier import score_scenes
from v2flow.origin import current_commit, origin
from v2flow.t2i.generation import GenerationOptions
from v2flow.t2i.metrics.evaluation import TextToImageEvaluation, evaluate_text_to_image
from v2flow.t2i.metrics.retrieval import distractors, retrieval_accuracy
from v2flow.t2i.metrics.rows import Drawing
from v2flow.t2i.metrics.samples import CaptionedSamples, read_samples
from v2flow.t2i.metrics.training_set import open_training_set
from v2flow.training.logged_pictures import log_picture, tile
from v2flow.training.metric_callbacks import averaged_weights
from v2flow.training.run_files import (
    describe_data,
    grid_file,
    is_dry_run,
    log_directory,
    logged_figures,
    record_validation,
    scored_checkpoint,
    shows_progress,
    written_checkpoints,
)

CEILING = 0.97
"""Of the scenes that a tokenizer has to keep before it is worth training an LLM on its tokens."""


class TextToImageCallback(Callback):
    """Logs retrieval and the shapes score; at the end of the fit writes metrics.json, grid.png and grid.txt.

    At every validation, and under `test/` in `v2flow test`: `val/retrieval` (with `val/retrieval_se`), and with
    `shapes_pictures` `val/shapes/TASK` and `val/shapes/overall` of the first captions; a validation's figures, with the
    module's own losses and text perplexity, are also a line of LOGDIR/validation.jsonl. Pictures of the first captions
    go to LOGDIR/grids/step-XXXXXX.png, with the captions beside it as .txt, and with TensorBoard or W&B are shown as
    `val/generated`. When training ends, the validation shards are scored by the code of `v2flow evaluate`, with the
    averaged weights if a weight-averaging callback is there, beside ids drawn from the marginal of the training shards.
    With `shapes_pictures` the score of the tokenizer's own pictures, the ceiling, is printed before the first step.
    Every rank computes the same, but for that; sanity checking is skipped; fast_dev_run leaves no files.

    Args:
        retrieval_pictures: pictures of the validation shards whose captions are to be found at each validation.
        ways: captions among which they are to be found.
        shapes_pictures: captions that are drawn and verified at each validation; 0 for none. Needs scenes.
        grid_images: captions that are drawn and shown at each validation, the first ones; 0 for none, at most 64.
        final_pictures: captions that are drawn at the end.
        final_retrieval_pictures: pictures whose captions are to be found at the end.
        final_features: feature distances and CLIPScore at the end.
        sampling: how visual tokens are drawn.
        batch_size: captions drawn at a time.
        seed: of all draws.
    """

    def __init__(
        self,
        retrieval_pictures: int = 64,
        ways: int = 16,
        shapes_pictures: int = 0,
        grid_images: int = 8,
        final_pictures: int = 256,
        final_retrieval_pictures: int = 256,
        final_features: bool = True,
        sampling: GenerationOptions = GenerationOptions(),
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("retrieval_pictures", retrieval_pictures, 1),
            ("ways", ways, 2),
            ("shapes_pictures", shapes_pictures, 0),
            ("grid_images", grid_images, 0),
            ("final_pictures", final_pictures, 1),
            ("final_retrieval_pictures", final_retrieval_pictures, 1),
        ):
            if value < least:
                raise V2FlowError(f"option {name}: expected at least {least}, found {value}")
        if grid_images > GRID_PICTURES:
            raise V2FlowError(f"option grid_images: expected at most {GRID_PICTURES}, found {grid_images}")
        self.retrieval_pictures = retrieval_pictures
        self.ways = ways
        self.shapes_pictures = shapes_pictures
        self.grid_images = grid_images
        self.final_pictures = final_pictures
        self.final_retrieval_pictures = final_retrieval_pictures
        self.final_features = final_features
        self.drawing = Drawing(vars(sampling), batch_size=batch_size, seed=seed)
        self._samples: dict[str, CaptionedSamples] = {}
        self._found: Optional[TextToImageEvaluation] = None  # of this validation or test
        self._result: Optional[TextToImageEvaluation] = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be scored before any work is done.

        Raises:
            V2FlowError: no data module with shards, too few groups of captions, or no scenes where they are needed.
        """
        self._samples, self._result = {}, None
        current_commit()
        split = {"fit": "val", "validate": "val", "test": "test"}.get(stage)
        data: Any = getattr(trainer, "datamodule", None)
        if split is None or (stage == "fit" and data is not None and data.val is None):
            return
        if getattr(data, split, None) is None:
            raise V2FlowError(
                f"callback TextToImageCallback: expected a data module with {split} shards, found none; name them "
                f"in data.{split}"
            )
        samples = read_samples(
            getattr(data, split), pl_module.model.tokenizer, limit=getattr(data, f"{split}_limit"),
            num_workers=data.num_workers, allow_pipe=data.allow_pipe,
        )  # fmt: skip
        if self.shapes_pictures and samples.scenes is None:
            raise V2FlowError(
                f"option shapes_pictures: expected scenes of `v2flow data shapes` in data.{split}, found other "
                "samples; set it to 0"
            )
        groups = len(set(samples.groups))
        if groups < self.ways:
            raise V2FlowError(
                f"option ways: expected at most {groups}, the groups of captions in data.{split}, found {self.ways}"
            )
        # What retrieval would complain of at the end of the training, it says now.
        scored = min(max(self.retrieval_pictures, self.final_retrieval_pictures), len(samples))
        for index in range(scored):
            distractors(samples, index, self.ways, self.drawing.seed)
        self._samples = {split: samples}

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Says how many scenes the tokenizer keeps: the ceiling of this training, known before its first step."""
        samples = self._samples.get("val")
        if not self.shapes_pictures or samples is None or is_dry_run(trainer) or not trainer.is_global_zero:
            return
        few = samples.first(self.shapes_pictures)
        scores = score_scenes(self.drawing.pictures(pl_module.model.tokenizer, few.ids), few.scenes or [])
        shares = ", ".join(f"{task} {share:.1%}" for task, share in scores.items())
        print(f"v2flow: ceiling of the shapes score, the tokenizer's pictures of the true ids: {shares}")
        if scores["overall"] < CEILING:
            rank_zero_warn(
                f"the tokenizer keeps {scores['overall']:.1%} of the scenes, less than {CEILING:.0%}: no LLM can score "
                "more; train the tokenizer for longer first"
            )

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Scores once a validation, while averaged weights, if any, are swapped in."""
        if batch_idx == 0 and not trainer.sanity_checking and "val" in self._samples:
            self._found = self._score(pl_module.model, self._samples["val"])

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Scores once a test."""
        if batch_idx == 0 and "test" in self._samples:
            self._found = self._score(pl_module.model, self._samples["test"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Logs the figures and pictures."""
        self._log("val", trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Writes the validation's line: by now the module's own figures are there as well."""
        if self._found is None:
            return
        own = {
            name.removeprefix("val/"): value
            for name, value in logged_figures(trainer).items()
            if name.startswith("val/")
        }
        record_validation(trainer, own | self._found.report)
        self._found = None

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Logs the figures and pictures."""
        self._log("test", trainer, pl_module)
        self._found = None

    def _score(self, model: Any, samples: CaptionedSamples) -> TextToImageEvaluation:
        found = retrieval_accuracy(model, samples, self.ways, self.drawing.seed, self.retrieval_pictures)
        figures = {"retrieval": found["accuracy"], "retrieval_se": found["accuracy_se"]}
        few = samples.first(max(self.shapes_pictures, self.grid_images))
        drawn = self.drawing.draw(model, few.captions) if len(few) else torch.empty(0)
        if self.shapes_pictures and few.scenes is not None:
            scores = score_scenes(drawn[: self.shapes_pictures], few.scenes[: self.shapes_pictures])
            figures |= {f"shapes/{task}": score for task, score in scores.items()}
        shown = slice(self.grid_images)
        return TextToImageEvaluation(figures, list(few.captions[shown]), drawn[shown])

    def _log(self, stage: str, trainer: Trainer, pl_module: Any) -> None:
        found = self._found
        if found is None:
            return
        directory = log_directory(trainer)
        for name, value in found.report.items():
            # Equal on every rank: the synchronising mean changes nothing.
            pl_module.log(
                f"{stage}/{name}", value, prog_bar=name == "retrieval", sync_dist=True, batch_size=1
            )
        if found.captions and trainer.is_global_zero and not is_dry_run(trainer):
            found.save_grid(grid_file(trainer, directory, stage))
            log_picture(
                trainer, f"{stage}/generated", tile(found.pictures.split(GRID_COLUMNS)), found.captions
            )

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Scores everything while the model is still on its device."""
        if is_dry_run(trainer) or "val" not in self._samples:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        model = pl_module.model
        with averaged_weights(trainer, pl_module) as weights:
            self._result = evaluate_text_to_image(
                model,
                self._samples["val"],
                pictures=self.final_pictures,
                retrieval_pictures=self.final_retrieval_pictures,
                ways=self.ways,
                drawing=self.drawing,
                features=self.final_features,
                training=open_training_set(data.train, model.tokenizer, data.num_workers, data.allow_pipe),
                perplexity_before=pl_module.perplexity_before,
                protocol=describe_data(trainer) | {"weights": weights},
                progress=shows_progress(trainer),
            )

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Writes the files and says where everything lies: now the last checkpoint has its name."""
        directory = log_directory(trainer)
        if self._result is None or not trainer.is_global_zero:
            return
        places = written_checkpoints(trainer)
        head = {
            "checkpoint": scored_checkpoint(trainer),
            "model": type(pl_module.model).__name__,
            "step": trainer.global_step,
        }
        places["metrics"] = str(directory / "metrics.json")
        write_json(places["metrics"], head | origin() | self._result.report)
        places["grid"] = str(directory / "grid.png")
        self._result.save_grid(places["grid"])
        print("v2flow: " + ", ".join(f"{name} {path}" for name, path in places.items()))
