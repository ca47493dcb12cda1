"""Training of stage 2 under Lightning: an LLM learns to write the visual tokens of captions."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from v2flow.config import to_dict
from v2flow.data.tokens import source_of
from v2flow.devices import host_generator
from v2flow.errors import V2FlowError
from v2flow.fingerprint import language_model_sha256
from v2flow.t2i.build import build_text_to_image
from v2flow.t2i.config import TextToImageConfig
from v2flow.t2i.small_llm import PREFIXES, backend_text
from v2flow.t2i.text_to_image import V2FlowForTextToImage
from v2flow.training.checkpoint_files import is_sharded
from v2flow.training.frozen import leave_out_frozen, trained_names
from v2flow.training.module import SeededModule, seeded_generator, valid_rows
from v2flow.training.optimizer import OptimizerConfig
from v2flow.training.sharding import shard_text_to_image
from v2flow.training.token_data_module import TokenDataModule


class TextToImageModule(SeededModule):
    """Trains captions -> visual tokens by next-token prediction (paper section 3.4); the tokenizer is frozen.

    A checkpoint holds what learns. Tokenizer and LLM are named in it, with SHA-256, and loaded again.

    Args:
        text_to_image: what the model is made of and what of it learns.
        optimizer: AdamW and its schedule.
        seed: of every random draw of the training.

    Attributes:
        perplexity_before: of the held-out text under the LLM before the training; None until it is measured.
    """

    # Where things lie and how memory is used; hashes say what they are.
    free_options = frozenset(
        f"config.{name}" for name in ("tokenizer", "llm", "pictures", "words_pictures", "checkpointing")
    )

    def __init__(
        self,
        text_to_image: TextToImageConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        self.config = text_to_image
        self.model: V2FlowForTextToImage = build_text_to_image(text_to_image)
        self.perplexity_before: float | None = None
        self.source = source_of(self.model.tokenizer)
        self._llm_sha256 = language_model_sha256(self.model.llm)
        self.model.train()  # for adapters and recomputation: the tokenizer has no part in training
        leave_out_frozen(self)

    def configure_model(self) -> None:
        """Under ModelParallelStrategy, shares what learns out over the ranks.

        Raises:
            V2FlowError: ranks that are to share one batch's tensors, Lightning's default, instead of the data; or
                weights that are to be averaged as well.
        """
        if self.device_mesh is not None:
            ranks = self.device_mesh["tensor_parallel"].size()
            if ranks != 1:
                raise V2FlowError(
                    f"option trainer.strategy.tensor_parallel_size: expected 1, found {ranks}; set it, and "
                    "data_parallel_size to the number of devices"
                )
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):  # which calls this first, and would copy the shards
                    raise V2FlowError(
                        f"option trainer.callbacks: {type(callback).__name__} cannot average weights that are sharded; "
                        "leave it out, or use --trainer.strategy=ddp"
                    )
            shard_text_to_image(self.model, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Refuse token shards of another tokenizer, and captions that are too long, before anything is trained.

        Raises:
            V2FlowError: see `TokenDataModule.check` and `V2FlowForTextToImage.caption_ids`.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TokenDataModule):
            return
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            if getattr(data, split) is None:
                continue
            data.check(split, self.source)
            # Of its tokens the one that begins a text and a space before the first word may be no byte of a caption.
            self._check_captions(data.long_captions(split, self.model.max_caption - 2))

    def _check_captions(self, places: dict[str, str]) -> None:
        """Refuses the first caption that is too long, by the place that it is given with."""
        try:
            self.model.caption_ids(list(places))
        except V2FlowError:
            for caption, where in places.items():  # one by one, to say which
                try:
                    self.model.caption_ids([caption])
                except V2FlowError as error:
                    raise V2FlowError(f"{where}: {error} (option text_to_image.max_caption)") from error

    def on_train_start(self) -> None:
        """Measures the LLM's language before the training; a resumed one has it from its checkpoint, which strategies
        that shard have not read before this hook."""
        if self.perplexity_before is None and not getattr(self.trainer, "fast_dev_run", False):
            self.perplexity_before = self.model.text_perplexity()
            rank_zero_info(f"text perplexity before the training: {self.perplexity_before:.1f}")
            for logger in self.loggers:
                logger.log_metrics({"val/text_perplexity": self.perplexity_before}, step=0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the LLM's perplexity before the training."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["v2flow"]["perplexity_before"] = self.perplexity_before

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the LLM's perplexity before the training."""
        super().on_load_checkpoint(checkpoint)
        self.perplexity_before = checkpoint["v2flow"].get("perplexity_before")

    def losses(
        self, captions: list[str | None], ids: Tensor, generator: torch.Generator, step: int | None = None
    ) -> dict[str, Tensor]:
        """Loss terms of captions (None for none) and visual token ids `[B, N]`; `loss` is what is minimised.

        Args:
            generator: draws the positions under the whole vocabulary, and `sampled_words`.
            step: of the training, which decides how many those are (`full_every`); None for the share as it is, and
                without sampled words.
        """
        share, weight = (self.config.full_share, 1) if step is None else self.config.full_at(step)
        words = 0 if step is None else self.config.sampled_words
        with self.global_draws(generator):
            found = self.model.loss(captions, ids, share, self.config.text_weight, generator, weight, words)
        terms = {"loss": found.total, "visual": found.visual}
        if share:
            terms["text_mass"] = found.text_mass
        return terms if found.text is None else terms | {"text": found.text}

    def drop_captions(self, captions: list[str], generator: torch.Generator) -> list[str | None]:
        """The captions, with None in place of a share `caption_dropout` of them."""
        draws = torch.rand(len(captions), generator=host_generator(generator))
        dropped = (draws < self.config.caption_dropout).tolist()
        return [None if drop else caption for caption, drop in zip(captions, dropped, strict=True)]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch of captions and ids, some captions left out."""
        generator = self.step_generator(batch_idx)
        captions = self.drop_captions(batch["caption"], generator)
        terms = self.losses(captions, batch["ids"], generator, self.global_step)
        self.log_losses(terms, "train", len(batch["ids"]))
        return terms["loss"]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs the terms of a batch."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs the terms of a batch."""
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: dict[str, Any], batch_idx: int, stage: str) -> None:
        """Captions are all there, and draws the same at every call."""
        rows, count = valid_rows(batch["valid"])
        generator = seeded_generator(self.device, self.seed, batch_idx, self.global_rank)
        captions: list[str | None] = [batch["caption"][row] for row in rows.tolist()]
        self.log_losses(self.losses(captions, batch["ids"][rows], generator), stage, count)

    def on_validation_epoch_end(self) -> None:
        """Logs the LLM's perplexity on text."""
        if not self.trainer.sanity_checking:
            self.log("val/text_perplexity", self.model.text_perplexity(), sync_dist=True)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint has to agree with, the weights of tokenizer and LLM by their SHA-256."""
        small = self.config.llm.startswith(PREFIXES)
        return {
            "model": V2FlowForTextToImage.__name__,  # fully_shard changes the class of its instances
            "config": to_dict(self.config),
            "tokenizer_sha256": self.source.tokenizer_sha256,
            "llm_sha256": self._llm_sha256,
            "llm_tokenizer": backend_text(self.model.llm_tokenizer) if small else None,
        }

    def initialise_from(self, path: str) -> None:
        """Take what another run of the same model and mode has learned (`--init-from`).

        Raises:
            V2FlowError: not a checkpoint of this kind, of another tokenizer or LLM, or with other trained parameters.
        """
        from v2flow.t2i.checkpoint import read_text_to_image

        if Path(path).is_dir() and not is_sharded(path):
            raise V2FlowError(f"option --init-from: {path}: expected a .ckpt file, found a folder")
        info, weights = read_text_to_image(path)
        if info["tokenizer_sha256"] != self.source.tokenizer_sha256:
            raise V2FlowError(
                f"{path}: trained with another tokenizer; name the one that it was trained with"
            )
        own = self.describe()
        if any(info.get(name) != own[name] for name in ("llm_sha256", "llm_tokenizer")):
            raise V2FlowError(
                f"{path}: trained from another LLM than {self.config.llm!r} as this experiment has it (options llm, "
                "layers, random_weights, seed; of a small LLM also pictures, whose captions make its words); start "
                "from a run of the same"
            )
        names = trained_names(self)
        different = sorted(names ^ set(weights)) or sorted(
            n for n, p in self.named_parameters() if n in names and p.shape != weights[n].shape
        )
        if different:
            raise V2FlowError(
                f"{path}: tensor {different[0]!r} is not the same in the checkpoint and in this experiment; "
                "start from a run with the same LLM, tokenizer and option train"
            )
        self.load_state_dict(weights)
