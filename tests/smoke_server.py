"""Runs `v2flow` in small, and Python blocks: a process that has imported everything once, and forks for each.

A command of the documents then costs its own work only, not the eight seconds of imports. Usage:
`python smoke_server.py SOCKET`; the client is `smoke_client.py`.
"""

import contextlib
import importlib
import json
import os
import socket
import sys
import traceback
import urllib.request
from pathlib import Path
from typing import Any

from loopback import connect_here, free_port

TRAINER = [
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
    "--data.batch_size=4",
    "--data.eval_batch_size=4",
    "--data.num_workers=0",
]
TOKENIZER = [
    "--model.init_args.tokenizer.vocabulary.source=checkpoints/my-llm",
    "--model.init_args.tokenizer.vocabulary.size=256",
    "--model.init_args.tokenizer.resampler.width=16",
    "--model.init_args.tokenizer.visual_vocabulary.size=32",
    "--model.init_args.tokenizer.decoder.width=16",
    "--model.init_args.tokenizer.decoder.heads=2",
    "--model.init_args.tokenizer.decoder.encoder_depth=1",
    "--model.init_args.tokenizer.decoder.decoder_depth=1",
    "--model.init_args.tokenizer.velocity.width=16",
    "--model.init_args.tokenizer.velocity.heads=2",
    "--model.init_args.tokenizer.velocity.depth=1",
]
BASELINE = ["--model.init_args.autoencoder.width=16", "--model.init_args.autoencoder.heads=2"]
LONG_CAPTIONS = "--model.init_args.text_to_image.max_caption=100"
PAINTER = ["--model.init_args.text_to_image.llm=checkpoints/my-llm", LONG_CAPTIONS]
SMALL_PAINTER = ["--model.init_args.text_to_image.llm=gpt2-style:tiny"]
WORDS: dict[tuple[str, ...], list[str]] = {
    ("data", "openmoji"): ["--limit=64", "--size=32", "--processes=1"],
    ("data", "shapes"): ["--train=64", "--val=8", "--test=8"],
    ("evaluate",): ["--batch-size=4"],
    ("plan",): ["--batch-size=4"],
    ("demo",): ["--port={port}"],
}
"""What is added behind the words of a verb."""

IMPORTS = [
    "torch.utils.tensorboard",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.gpt2.modeling_gpt2",
    "v2flow.baselines.module",
    "v2flow.cli_training",
    "v2flow.demo.app",
    "v2flow.evaluate",
    "v2flow.probes",
    "v2flow.t2i.metrics.table",
    "v2flow.t2i.text_to_image",
    "v2flow.training.data_module",
    "v2flow.training.t2i_callbacks",
    "v2flow.training.t2i_module",
    "v2flow.training.token_data_module",
    "v2flow.training.tokenizer_module",
]
"""What a verb would import anew."""


def model_words(experiment: Path) -> list[str]:
    """What makes the model of an experiment file small."""
    if experiment.parent.name == "t2i":
        return SMALL_PAINTER if experiment.stem == "shapes-32" else PAINTER
    return BASELINE if experiment.stem.endswith("-vq") else TOKENIZER


def smaller(words: list[str]) -> list[str]:
    """The words with what makes the command small; those of an experiment come first, so that the page's own win."""
    if words[:1] in (["fit"], ["validate"], ["test"]) and words[1] == "--config":
        return [*words[:3], *TRAINER, *model_words(Path(words[2])), *words[3:]]
    if words[0] == "evaluate" and "/t2i/" in words[1]:
        return [*words, "--pictures=4", "--retrieval-pictures=2", "--ways=2"]
    more = next((more for verb, more in WORDS.items() if tuple(words[: len(verb)]) == verb), [])
    return [*words, *(word.format(port=free_port()) for word in more)]


def end_after_one_visit() -> None:
    """In the forked process: the demo is served until its page has been read once."""
    import gradio

    def visit(page: gradio.Blocks) -> None:
        with urllib.request.urlopen(page.local_url) as answer:
            assert b"gradio" in answer.read()
        page.close()

    gradio.Blocks.block_thread = visit  # type: ignore[method-assign]


def run(request: dict[str, Any], streams: list[int]) -> int:
    """In the forked process: the command as `v2flow` itself would run it; for `-`, the Python program on the standard
    input. Gives its exit status."""
    from v2flow.cli import main

    socket.socket.connect = connect_here  # type: ignore[method-assign]
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    words = smaller(request["words"])
    sys.argv = ["v2flow", *words]
    print("+ v2flow", *words, file=sys.stderr, flush=True)
    if words[0] == "demo":
        end_after_one_visit()
    try:
        if words == ["-"]:
            exec(sys.stdin.read(), {"__name__": "__main__"})
            return 0
        return main(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def answer(connection: socket.socket) -> None:
    """One command: it is forked, waited for, and its exit status sent back."""
    data, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 20)
    child = os.fork()
    if not child:
        os._exit(run(json.loads(data), streams))
    for stream in streams:
        os.close(stream)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(bytes([os.waitstatus_to_exitcode(status) % 256]))


def serve(path: str) -> None:
    """Imports what the verbs import, then says that it is ready by a line."""
    for module in IMPORTS:
        importlib.import_module(module)
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(5)
        print("ready", flush=True)
        while os.getppid() == parent:  # tests that were killed say no good-bye
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                with connection:
                    answer(connection)


if __name__ == "__main__":
    serve(sys.argv[1])
