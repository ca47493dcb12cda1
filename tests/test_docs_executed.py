"""Every command and Python block of the documents is run in a small form, or named here with what runs its like.

The lines of a page run in the page's order in one shell, in a folder in the repository's likeness that README.md has
left (`docs_toys.py`). What makes a command small is added by `smoke_server.py`; a line that runs on one page is not run
again on the next. A new line in a document is run as it stands, and fails here when it cannot be.
"""

import ast
import re
import subprocess
from collections.abc import Iterator

import pytest
from docs_toys import (
    GIVEN,
    PAGES,
    PAINTER_RUN,
    REPOSITORY,
    TOKENIZER_RUN,
    Clone,
    filled,
    lines,
    make_clone,
    page_name,
    python_program,
)

OUTPUTS = [
    r"v2flow export \S+ (\S+)",
    r"v2flow data (?:folder|tokens) .*--out (\S+)",
    r"v2flow data (?:shapes --held-out pairs)()",
]
"""Folders that are made once: where a page shows two ways, the reader of the second has not gone the first."""

FAULTS = "faults/test_faults.py::test_killed_runs_go_on_as_if_nothing_had_happened"
DAMAGED = "test_corrupt_samples.py::test_the_ratio_is_the_median_of_interleaved_pairs"
BOARD = "test_loggers.py::test_tensorboard_shows_grid_codes_and_entropies"
STEP = "test_planning.py::test_a_step_on_fake_tensors_costs_what_a_real_one_does"
TASKS = "test_data_latents.py::test_two_slurm_tasks_at_once_build_what_one_builds"
PROBLEMS = "test_data_validate.py::test_every_problem_of_every_shard_is_named"
PUSH = "test_t2i_hub.py::test_round_trip"
PLAIN = "test_t2i_hub.py::test_transformers_alone_writes_the_same_ids_and_the_end"
WORDS = "test_docs.py::test_commands_in_sentences_have_verb_and_options"
EXPORT = "test_cli_training.py::test_an_export_says_what_it_was_trained_on_and_scored"
FIGURES = "test_metrics_features.py::test_inception_figures_are_stock_torch_fidelitys"
GENEVAL = "test_cli_generate.py::test_geneval_s_layout"
DEVICES = "test_training_tokenizer.py::test_two_processes_stay_equal"
SHARDING = "test_t2i_sharding.py::test_two_shards_learn_what_one_process_learns"
LATENTS = "test_data_latents.py::test_the_command_takes_the_codec_of_an_experiment"
LATENT_TRAINING = "test_data_latents.py::test_a_training_on_latents_is_that_on_pictures_bit_for_bit"
HOOKS = "test_habits.py::test_hooks_are_the_commands_of_make_lint_and_what_it_installs"
FRONTIER = "test_decode_presets.py::test_the_frontier_is_measured_resumed_and_becomes_presets"
SPEED = "test_speed.py::test_a_smoke_run_of_all_parts"
GENERATION = "test_generation_speed.py::test_ratios_are_of_the_captions_of_a_file"
SUITE = "test_benchmark.py::test_rows_are_trained_once_scored_and_reported"
SOAK = "faults/test_soak.py::test_a_process_that_each_validation_leaves_behind_is_found"
PLANS = "test_cli_plan.py::test_every_experiment_is_planned_without_weights_or_data"
PAGE = "test_demo_browser.py::test_upload_shows_tokens_and_pictures"
REFERENCE = "test_experiments.py::test_reference_is_the_papers_size"
NETWORK = "installs from the network, which only CI does; its make targets do the same"
ELSEWHERE: list[tuple[str, str, str]] = [
    (r"make test-gpu$", "needs a CUDA GPU", "test_gpu.py::test_ids_agree_with_the_cpu"),
    (r"make (docs|lint|test)$", "a CI step itself", ".ci/run"),
    (r"bash \.ci/run$", "CI itself", ".ci/run"),
    (
        r"make format lint test$|make test ARGS=|\.venv/bin/python -m pytest$",
        "CI runs lint and all tests",
        ".ci/run",
    ),
    (r"make lint && .* pre-commit", NETWORK, HOOKS),
    (
        r"make coverage$",
        "takes longer than all tests",
        "test_habits.py::test_make_targets_that_it_names_exist",
    ),
    (r"make test-fuzz$", "hours; `make test` has its short form", "test_fuzz.py::test_shards"),
    (r"make test-faults ", "hours", FAULTS),
    (r"python tests/faults/soak\.py ", "an hour", SOAK),
    (r"python benchmarks/corrupt_samples\.py$", "minutes", DAMAGED),
    (r"pip install|apt-get install", NETWORK, ".ci/run"),
    (r"tensorboard ", "a server of another project", BOARD),
    (r"python tests/demo_screenshot\.py", "needs Chromium", PAGE),
    (r"(make|v2flow) benchmark", "trains for minutes a row", SUITE),
    (r"v2flow plan --all ", "plans each experiment", PLANS),
    (r"python benchmarks/decoding_frontier\.py ", "minutes of measurement", FRONTIER),
    (r"python benchmarks/generation_speed\.py ", "minutes of measurement", GENERATION),
    (r"python benchmarks/speed\.py$", "minutes of measurement", SPEED),
    (r"python benchmarks/check_plan\.py$", "minutes of measurement", STEP),
    (r"v2flow fit .*(fsdp2|FSDP2Strategy)", "needs eight GPUs", SHARDING),
    (r"v2flow fit .*--trainer\.devices=8", "needs eight GPUs", DEVICES),
    (r"srun v2flow fit .*reference-512", "needs a cluster and DC-AE's weights", DEVICES),
    (r"srun v2flow fit .*reference-llama2-7b", "needs a cluster and LLaMA-2's weights", SHARDING),
    (r"srun .* v2flow data latents", "needs a cluster", TASKS),
    (
        r"v2flow data latents --config .*(imagenet-256|reference-512)",
        "needs an autoencoder's weights",
        LATENTS,
    ),
    (r"v2flow fit .*imagenet-256.* --data\.crop center$", "needs an autoencoder's weights", LATENT_TRAINING),
    (r"export V2FLOW_SHARDS=|export TOKENIZER=", "names files at the paper's size", REFERENCE),
    (r"v2flow data validate \"\$V2FLOW_SHARDS\"", "the paper's pictures", PROBLEMS),
    (r"v2flow fit .*reference-512\.yaml .*fast_dev_run", "needs DC-AE's and LLaMA-2's weights", REFERENCE),
    (r"v2flow export checkpoints/reference", "needs a run at the paper's size", EXPORT),
    (r"v2flow evaluate checkpoints/reference", "needs a run at the paper's size", FIGURES),
    (r"v2flow generate checkpoints/t2i/reference", "needs a run at the paper's size", GENEVAL),
    (
        r"v2flow data tokens \$TOKENIZER ",
        "needs a run at the paper's size",
        "test_data_tokens.py::test_command_builds_once",
    ),
    (r"(?s)python - .*from vllm import", "needs vLLM", PLAIN),
    (r"(?s)python - .*localhost:8080", "asks a server of another project", PLAIN),
    (r"(?s)python - .*push_to_hub", "needs an account of the hub", PUSH),
    (r"vllm |python convert_hf_to_gguf\.py|llama-server ", "a server of another project", PLAIN),
    (
        r"v2flow (fit --config|evaluate --json|export --encoder|data tokens --views 6)$",
        "names an option, no whole command",
        WORDS,
    ),
]
"""Beginning of a line, why it is not run here, and what runs the nearest form: a test, or a step of `.ci/run`."""


def elsewhere(line: str) -> int | None:
    """Which entry of the table a line has, if it has one."""
    return next((place for place, entry in enumerate(ELSEWHERE) if re.match(entry[0], line)), None)


def small(line: str) -> str:
    """A line with the stand-ins, and before it the removal of what it is to make."""
    line = filled(line)
    made = next((match for pattern in OUTPUTS if (match := re.match(pattern, line))), None)
    return f"rm -rf {made[1] or 'data/shapes'}; {line}" if made else line


def scripts() -> dict[str, list[str]]:
    """The lines that each page runs; the shell's own words on every page, all others on the first that has them."""
    done: set[str] = set()
    pages: dict[str, list[str]] = {}
    for page in PAGES:
        for line in (small(line) for line in lines(page) if elsewhere(line) is None):
            if line not in done or not re.match(r"(rm .*; )?(v2flow|make|python) ", line):
                pages.setdefault(page_name(page), []).append(line)
            done.add(line)
    return pages


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """As README.md leaves it."""
    clone = make_clone(tmp_path_factory.mktemp("documents"))
    try:
        check(clone.run(scripts()["README.md"]))
        yield clone
    finally:
        clone.server.kill()
        clone.server.communicate()


def check(done: subprocess.CompletedProcess[str]) -> None:
    """All ran, or the test says which line did not and what came of it."""
    said = "\n" + done.stdout.replace("\r", "\n")
    assert done.returncode == 0, said[said.rindex("\n$ ") :][-3000:]


@pytest.mark.slow
def test_what_readme_md_leaves(clone: Clone) -> None:
    made = [
        "rec/grid.png",
        "ids.npz",
        "drawn/generate.json",
        "my-model/v2flow.json",
        "data/mine/manifest.json",
    ]
    for path in (*made, TOKENIZER_RUN, PAINTER_RUN, "checkpoints/openmoji-32/evaluation.json"):
        assert (clone.folder / path).is_file(), path
    assert len(list((clone.folder / "checkpoints" / "openmoji-32").glob("version_*"))) > 3


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in scripts() if name != "README.md"])
def test_commands_of_a_page_run_in_its_order(page: str, clone: Clone) -> None:
    check(clone.run(scripts()[page]))


@pytest.mark.slow
def test_a_command_that_does_not_run_is_noticed(clone: Clone) -> None:
    for line in (
        "v2flow fit --config nowhere.yaml",
        "make tea",
        "v2flow plan --config experiments/tokenizer/openmoji-32.yaml --device abacus",
    ):
        with pytest.raises(AssertionError, match=re.escape(f"$ {line}")):
            check(clone.run(["true", line, "true"]))
    program = python_program("ids = tokenizer.encode(images)\n", [])
    with pytest.raises(AssertionError, match="NameError: name 'tokenizer' is not defined"):
        check(clone.run(["true", program, "true"]))


def test_what_is_not_run_here_is_in_the_documents_and_its_like_is_tested() -> None:
    everything = {line: elsewhere(line) for page in PAGES for line in lines(page)}
    assert sum(place is None for place in everything.values()) > 60
    steps = set((REPOSITORY / ".ci" / "run").read_text().splitlines())
    for place, (pattern, _, like) in enumerate(ELSEWHERE):
        named = [line for line, found in everything.items() if found == place]
        assert named, f"{pattern}: no document has such a line"
        if like == ".ci/run":
            targets = {target for line in named for target in re.findall(r"^make ([a-z]+)$", line)}
            assert {f"make {target}" for target in targets} <= steps, pattern
            continue
        file, _, name = like.partition("::")
        tree = ast.parse((REPOSITORY / "tests" / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, like


def test_a_block_has_what_it_takes_from_the_reader_and_from_blocks_before_it() -> None:
    first, second = "def draw(captions): ...\n", "pictures = [draw(images) for _ in range(2)]\n"
    program = python_program(second, ["import torch\n", first])
    assert program == f"python - <<'PYTHON'\nimages = {GIVEN['images']}\n{first}{second}PYTHON"
    assert python_program(first, [second]) == f"python - <<'PYTHON'\n{first}PYTHON"
