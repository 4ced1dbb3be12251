"""The options of a fine-tune, and the requests that they amount to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from groupify.cli.options import output_file
from groupify.errors import SpecError

if TYPE_CHECKING:
    from groupify.pipeline import OutputRequest, TrainingRequest
    from groupify.training.settings import FinetuneSettings

# Everything heavy (torch first of all) is imported inside the functions: --help answers at once.

Command = TypeVar("Command", bound=Callable[..., Any])
# Option → setting; what is not given keeps the setting's default.
_SETTINGS = {
    "batch_size": "batch_size",
    "accumulate": "accumulate",
    "optimizer": "optimizer",
    "learning_rate": "learning_rate",
    "learning_rate_schedule": "schedule",
    "weight_decay": "weight_decay",
    "distill": "distill",
    "distillation_weight": "distillation_weight",
    "temperature": "temperature",
    "label_smoothing": "label_smoothing",
    "ema": "ema_decay",
    "warmup": "warmup_fraction",
    "images_per_epoch": "images_per_epoch",
}
_FLAGS = ("augment", "channels_last", "freeze_batch_norms")


def recovery_options(epochs: float) -> Callable[[Command], Command]:
    """Return the options of a fine-tune; ``epochs`` is the default of the first."""
    options = [
        click.option("--epochs", type=float, default=epochs, show_default=True, help="Of fine-tuning."),
        click.option("--batch-size", type=click.IntRange(1), help="Images per step, of all processes."),
        click.option("--accumulate", type=click.IntRange(1), metavar="N",
                     help="Put a batch through the model in N parts, to need less memory."),
        click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), help="Default: sgd."),
        click.option("--learning-rate", type=float, help="Peak learning rate."),
        click.option("--learning-rate-schedule", type=click.Choice(["cosine", "one-cycle"]),
                     help="Default: cosine."),
        click.option("--warmup", type=float, metavar="SHARE",
                     help="Share of the steps in which the learning rate rises, 0 to 1."),
        click.option("--weight-decay", type=float, help="Of the weights; norms and biases have none."),
        click.option("--labels", type=click.Choice(["auto", "none"]), default="auto", show_default=True,
                     help="none: learn from the dense model alone."),
        click.option("--distill", type=click.Choice(["logits", "attention", "none"]),
                     help="What to learn from the dense model; attention: the logits and where layers look."),
        click.option("--distillation-weight", type=float, help="Share of the logits' loss, 0 to 1."),
        click.option("--temperature", type=float, help="Of the distillation."),
        click.option("--label-smoothing", type=float, help="Of the cross-entropy, 0 to 1."),
        click.option("--ema", type=float, metavar="DECAY", help="Average the weights, like 0.99."),
        click.option("--augment", is_flag=True, help="Use the data set's standard augmentation."),
        click.option("--freeze-batch-norms", is_flag=True, help="Keep the statistics of the batch norms."),
        click.option("--amp", type=click.Choice(["bf16", "none"]), default="none", show_default=True,
                     help="Mixed precision."),
        click.option("--channels-last", is_flag=True, help="Train in the channels-last memory format."),
        click.option("--images-per-epoch", type=click.IntRange(1), help="For a stream of unknown length."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
                     show_default=True, help="Where to train; auto: on a GPU if there is one."),
        click.option("--save-every", type=click.IntRange(1), metavar="STEPS",
                     help="Save the state of the training beside the output folder, as FOLDER.state."),
        click.option("--resume", is_flag=True, help="Go on from the state of an interrupted run, if any."),
        click.option("--log-file", type=click.Path(path_type=Path), metavar="FILE", callback=output_file,
                     help="Write JSON lines with loss, accuracy, learning rate and images per second."),
        click.option("--log-every", type=click.IntRange(1), default=50, show_default=True, metavar="STEPS"),
        click.option("--tensorboard", type=click.Path(path_type=Path), metavar="FOLDER",
                     help="Log for TensorBoard, where it is installed."),
    ]  # fmt: skip

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def finetune_settings(options: dict[str, Any]) -> FinetuneSettings:
    """Return how to train."""
    from groupify.training.settings import FinetuneSettings

    settings = FinetuneSettings(
        epochs=options["epochs"],
        labels=options["labels"] != "none",
        amp="bfloat16" if options["amp"] == "bf16" else None,
        seed=options["seed"],
    )
    changes = {setting: options[name] for name, setting in _SETTINGS.items() if options[name] is not None}
    changes |= {name: True for name in _FLAGS if options[name]}
    return replace(settings, **changes)


def training_request(options: dict[str, Any]) -> TrainingRequest | None:
    """Return how to train and what to keep on the way; None = not at all.

    Raises:
        SpecError: an option that says something about a training that is not asked for.
    """
    from groupify.pipeline import TrainingRequest
    from groupify.training.logs import LogSettings

    if not options["epochs"]:
        for name in ("save_every", "resume", "log_file", "tensorboard"):
            if options[name]:
                option = name.replace("_", "-")
                raise SpecError(f"--{option} is about training, and there is none; give --epochs N")
        return None
    log = None
    if options["log_file"] is not None or options["tensorboard"] is not None:
        log = LogSettings(options["log_file"], options["tensorboard"], options["log_every"])
    return TrainingRequest(
        finetune_settings(options),
        save_every=options["save_every"],
        resume=options["resume"],
        log=log,
        device=options["device"],
    )


@contextlib.contextmanager
def telling_how_to_resume(training: TrainingRequest | None, output: OutputRequest) -> Iterator[None]:
    """Put into a ``KeyboardInterrupt`` what it leaves: the state of the training, if there is one."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        keeps_state = training is not None and (training.resume or training.save_every is not None)
        if training is not None and keeps_state and (file := training.state_file(output)).exists():
            interrupt.args = (
                f"the state of the training is in {file}: the same command with --resume goes on from it",
            )
        raise
