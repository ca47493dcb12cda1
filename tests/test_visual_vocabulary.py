"""The cosine codebook against vector-quantize-pytorch, plain loops and two processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from v2flow.config import VisualVocabularyConfig
from v2flow.errors import V2FlowError
from v2flow.visual_vocabulary import VisualVocabulary

SIZE, DIM = 16, 6


def make_vocabulary(**options) -> VisualVocabulary:
    torch.manual_seed(0)
    return VisualVocabulary(DIM, VisualVocabularyConfig(size=SIZE, **options))


def tokens(seed: int, batch: int = 4, count: int = 10) -> Tensor:
    return torch.randn(batch, count, DIM, generator=torch.Generator().manual_seed(seed)) * 3


def buffers(vocabulary: VisualVocabulary) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in vocabulary.named_buffers()}


def library(vocabulary: VisualVocabulary):
    """vector-quantize-pytorch with every option stated, on the same codes."""
    package = pytest.importorskip("vector_quantize_pytorch")
    quantiser = package.VectorQuantize(
        dim=DIM, codebook_size=SIZE, use_cosine_sim=True, decay=vocabulary.config.decay, rotation_trick=False,
        threshold_ema_dead_code=0, commitment_weight=1.0, kmeans_init=False, sync_codebook=False,
    )  # fmt: skip
    codebook = quantiser._codebook
    codebook.embed.data.copy_(vocabulary.codes[None])
    codebook.embed_avg.data.copy_(vocabulary.sums[None])
    codebook.cluster_size.data.zero_()
    return quantiser


def test_ids_agree_with_the_library() -> None:
    vocabulary = make_vocabulary().eval()
    x = tokens(1, batch=8, count=50)
    _, ids, _ = library(vocabulary).eval()(x)
    ours = vocabulary(x)
    assert torch.equal(ours.ids, ids)
    assert ours.ids.unique().numel() > SIZE / 2
    torch.testing.assert_close(ours.embeddings, vocabulary.codes[ids])


def test_update_agrees_with_the_library() -> None:
    vocabulary = make_vocabulary(decay=0.8, revive_below=0.0).train()
    theirs = library(vocabulary).train()
    for seed in range(4):
        x = tokens(seed)
        vocabulary(x)
        theirs(x)
    torch.testing.assert_close(vocabulary.codes, theirs._codebook.embed[0], atol=1e-4, rtol=1e-4)


def test_update_against_a_plain_loop() -> None:
    vocabulary = make_vocabulary(decay=0.7, revive_below=0.0).train()
    codes = vocabulary.codes.clone()
    sums, counts = codes.clone(), torch.zeros(SIZE)
    for seed in range(5):
        x = tokens(seed)
        ids = vocabulary(x).ids
        batch_sums, batch_counts = torch.zeros(SIZE, DIM), torch.zeros(SIZE)
        for b in range(x.shape[0]):
            for n in range(x.shape[1]):
                direction = x[b, n] / x[b, n].norm()
                best = max(range(SIZE), key=lambda k: float(direction @ codes[k]))
                assert ids[b, n] == best, "ids come from the codes before the update"
                batch_sums[best] += direction
                batch_counts[best] += 1
        sums, counts = 0.7 * sums + 0.3 * batch_sums, 0.7 * counts + 0.3 * batch_counts
        codes = sums / sums.norm(dim=1, keepdim=True)
        torch.testing.assert_close(vocabulary.codes, codes, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vocabulary.counts, counts)


def test_codes_move_to_the_tokens() -> None:
    """Tokens in three directions: after a few batches three codes are those directions."""
    vocabulary = make_vocabulary().train()
    centres = F.normalize(torch.randn(3, DIM), dim=-1)
    for _ in range(20):
        vocabulary(centres.repeat(4, 5, 1))
    similarity = centres @ vocabulary.codes.T
    assert (similarity.amax(1) > 0.999).all()


def test_straight_through_gradient_by_hand() -> None:
    """x = (3, 4): direction (0.6, 0.8), nearest code (0, 1); dx = (I − d dᵀ) g / |x|."""
    vocabulary = VisualVocabulary(2, VisualVocabularyConfig(size=2)).eval()
    vocabulary.codes.copy_(torch.eye(2))
    x = torch.tensor([[[3.0, 4.0]]], requires_grad=True)
    out = vocabulary(x)
    assert out.ids.tolist() == [[1]]
    torch.testing.assert_close(out.embeddings, torch.tensor([[[0.0, 1.0]]]))
    assert out.commitment.item() == pytest.approx(0.6**2 + 0.2**2)
    (gradient,) = torch.autograd.grad((out.embeddings * torch.tensor([1.0, 0.0])).sum(), x, retain_graph=True)
    torch.testing.assert_close(gradient, torch.tensor([[[(1 - 0.36) / 5, -0.48 / 5]]]))
    # |d − c|² = 2 − 2 d·c: its gradient pulls the direction to the code.
    (gradient,) = torch.autograd.grad(out.commitment, x)
    torch.testing.assert_close(gradient, torch.tensor([[[2 * 0.48 / 5, -2 * 0.36 / 5]]]))


def test_length_of_tokens_does_not_matter() -> None:
    vocabulary = make_vocabulary().eval()
    x = tokens(3)
    assert torch.equal(vocabulary(x).ids, vocabulary(x * 1e-3).ids)


def test_nothing_changes_in_evaluation_or_without_gradients() -> None:
    vocabulary = make_vocabulary()
    before = buffers(vocabulary)
    vocabulary.eval()(tokens(1))
    vocabulary.train()
    with torch.no_grad():
        vocabulary(tokens(1))
    vocabulary.nearest(F.normalize(tokens(1), dim=-1))
    vocabulary.lookup(torch.zeros(1, 4).long())
    assert all(torch.equal(before[name], value) for name, value in vocabulary.named_buffers())
    vocabulary(tokens(1))
    assert not any(torch.equal(before[name], value) for name, value in vocabulary.named_buffers())


def test_codes_stay_unit_vectors() -> None:
    vocabulary = make_vocabulary(decay=0.5).train()
    for seed in range(10):
        vocabulary(tokens(seed))
        torch.testing.assert_close(vocabulary.codes.norm(dim=1), torch.ones(SIZE))


def test_dead_codes_are_set_to_tokens_of_the_batch() -> None:
    vocabulary = make_vocabulary(decay=0.9).train()
    with torch.no_grad():
        # All codes but one point away from the tokens, which lie around e_0.
        away = F.normalize(torch.randn(SIZE, DIM) * 0.1 - 5 * torch.eye(DIM)[0], dim=-1)
        away[0] = torch.eye(DIM)[0]
        vocabulary.codes.copy_(away)
        vocabulary.sums.copy_(away)
    x = tokens(4, batch=8, count=20) * 0.2 + 2 * torch.eye(DIM)[0]
    assert vocabulary(x, torch.Generator().manual_seed(0)).ids.unique().tolist() == [0]
    directions = F.normalize(x, dim=-1).flatten(0, 1)
    distance = (1 - vocabulary.codes[1:] @ directions.T).amin(1)
    assert (distance < 1e-5).all(), "a revived code is a token of the batch"
    assert vocabulary(x).ids.unique().numel() > SIZE / 2, "revived codes are in use"


def test_without_revival_dead_codes_stay() -> None:
    vocabulary = make_vocabulary(revive_below=0.0).train()
    before = vocabulary.codes.clone()
    used = vocabulary(tokens(1, batch=1, count=2)).ids.unique()
    unused = torch.ones(SIZE).bool().index_fill(0, used, False)
    torch.testing.assert_close(vocabulary.codes[unused], before[unused])


def test_codes_in_use_are_left_alone_by_revival() -> None:
    """Two vocabularies with and without revival differ in dead codes only."""
    with_revival, without = make_vocabulary(), make_vocabulary(revive_below=0.0)
    x = tokens(2, batch=1, count=12)
    used = with_revival.train()(x, torch.Generator().manual_seed(0)).ids.unique()
    without.train()(x)
    assert 0 < len(used) < SIZE
    torch.testing.assert_close(with_revival.codes[used], without.codes[used])
    unused = torch.ones(SIZE).bool().index_fill(0, used, False)
    assert ((with_revival.codes - without.codes).abs().amax(1)[unused] > 1e-3).all()


def test_revival_depends_on_the_generator_alone() -> None:
    results = []
    for global_seed in (1, 2):
        vocabulary = make_vocabulary().train()
        torch.manual_seed(global_seed)
        vocabulary(tokens(1), torch.Generator().manual_seed(5))
        results.append(vocabulary.codes)
    assert torch.equal(*results)


def test_fp32_under_autocast() -> None:
    plain, low = make_vocabulary().train(), make_vocabulary().train()
    x = tokens(1)
    expected = plain(x, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        out = low(x, torch.Generator().manual_seed(0))
    assert out.embeddings.dtype == torch.float32
    assert torch.equal(out.ids, expected.ids) and torch.equal(low.codes, plain.codes)


def test_options_are_checked() -> None:
    with pytest.raises(V2FlowError, match="visual_vocabulary.size.*found 1"):
        VisualVocabularyConfig(size=1)
    with pytest.raises(V2FlowError, match=r"visual_vocabulary.decay.*found 1\.0"):
        VisualVocabularyConfig(decay=1.0)


# --- two processes ----------------------------------------------------------------------------------------------


def train_rank(rank: int, folder: str, revive_below: float) -> None:
    """One of two gloo processes; each trains on its half of every batch and with its own generator."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    vocabulary = make_vocabulary(decay=0.8, revive_below=revive_below).train()
    generator = torch.Generator().manual_seed(100 + rank)
    for seed in range(4):
        vocabulary(tokens(seed)[2 * rank : 2 * rank + 2], generator)
    torch.save(buffers(vocabulary), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def train_two_ranks(folder: Path, revive_below: float) -> list[dict[str, Tensor]]:
    torch.multiprocessing.spawn(train_rank, (str(folder), revive_below), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_are_one_with_the_joint_batch(tmp_path: Path) -> None:
    first, second = train_two_ranks(tmp_path, revive_below=0.0)
    joint = make_vocabulary(decay=0.8, revive_below=0.0).train()
    for seed in range(4):
        joint(tokens(seed))
    for name, value in joint.named_buffers():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-5)


def test_revival_is_the_same_in_both_processes(tmp_path: Path) -> None:
    first, second = train_two_ranks(tmp_path, revive_below=0.5)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    plain = make_vocabulary(decay=0.8, revive_below=0.0).train()
    for seed in range(4):
        plain(tokens(seed))
    assert not torch.allclose(first["codes"], plain.codes), "nothing was revived"
