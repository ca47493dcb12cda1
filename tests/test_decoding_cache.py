"""Decoding that computes things once gives what recomputing gives, and does compute them once."""

import pytest
import torch
import torch.nn.functional as F
from core_toys import pictures, small_config
from torch import Tensor, nn

from v2flow.config import DecoderConfig, VelocityConfig
from v2flow.decoding import DecodeOptions, draw_latents
from v2flow.errors import V2FlowError
from v2flow.flow import FlowHead
from v2flow.masked_decoder import MaskedAutoregressiveDecoder
from v2flow.probes.frontier import literal
from v2flow.tokenizer import V2FlowTokenizer
from v2flow.transformer import Transformer

BATCH, TOKEN_DIM, CHANNELS, WIDTH, LATENT_GRID = 2, 6, 4, 16, (4, 4)
POSITIONS = 16
PREFIXES = ("aligned", "attend")


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_decoder(prefix: str = "aligned", grid=(4, 2), attention: str = "self", **options):
    torch.manual_seed(0)
    config = DecoderConfig(width=WIDTH, heads=2, encoder_depth=2, decoder_depth=2, prefix=prefix,
                           prefix_attention=attention, **options)  # fmt: skip
    return MaskedAutoregressiveDecoder(TOKEN_DIM, grid, CHANNELS, LATENT_GRID, config)


def make_head(target: str = "velocity", kind: str = "per_position", **options) -> FlowHead:
    extra = {"fine_patch": 1} if kind == "joint" else {}
    config = VelocityConfig(kind=kind, width=16, depth=2, heads=2, target=target, **extra, **options)
    head = FlowHead(CHANNELS, WIDTH, LATENT_GRID, config).eval()
    g = draws(7)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    return head


def inputs(grid=(4, 2), masked: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    tokens = F.normalize(torch.randn(BATCH, grid[0] * grid[1], TOKEN_DIM, generator=draws(1)), dim=-1)
    latents = torch.randn(BATCH, POSITIONS, CHANNELS, generator=draws(2))
    return tokens, latents, torch.rand(BATCH, POSITIONS, generator=draws(3)).argsort(1) < masked


def count_rows(module: nn.Module) -> list[int]:
    """Rows (all but the last dimension) of the first input of every call from now on."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, x: rows.append(x[0].numel() // x[0].shape[-1]))
    return rows


# --- a prefix that attends to itself ----------------------------------------------------------------------------


def masked_run(transformer: Transformer, x: Tensor, prefix: int) -> Tensor:
    """All of x in one pass, with a mask that keeps the first `prefix` positions from seeing the others."""
    allowed = torch.ones(x.shape[1], x.shape[1]).bool()
    allowed[:prefix, prefix:] = False
    for block in transformer.blocks:
        heads, (b, n, d) = block.attention.heads, x.shape
        q, k, v = block.attention.qkv(block.norm1(x)).view(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / (d // heads) ** 0.5).masked_fill(~allowed, -torch.inf)
        x = x + block.attention.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d))
        x = x + block.mlp(block.norm2(x))
    return transformer.norm(x)


def masked_conditions(decoder, tokens: Tensor, latents: Tensor, mask: Tensor, null: Tensor) -> Tensor:
    prefix = decoder.project(tokens * TOKEN_DIM**0.5)
    prefix = torch.where(null[:, None, None], decoder.null, prefix) + decoder.token_positions
    n, rows = prefix.shape[1], []
    for b in range(BATCH):
        visible = (~mask[b]).nonzero().flatten()
        known = decoder.embed(latents[b, visible]) + decoder.latent_positions[visible]
        x = masked_run(decoder.encoder, torch.cat([prefix[b], known])[None], n)[0]
        states, full = x[:n], decoder.mask_token[0].expand(POSITIONS, -1).clone()
        full[visible] = x[n:]
        full = full + decoder.decoder_positions
        if decoder.config.prefix == "aligned":
            rows.append(masked_run(decoder.decoder, (full + states[decoder.above])[None], 0)[0])
        else:
            x = torch.cat([states + decoder.decoder_token_positions, full])[None]
            rows.append(masked_run(decoder.decoder, x, n)[0, n:])
    return torch.stack(rows)


@pytest.mark.parametrize("masked", [16, 10, 1, 0])
@pytest.mark.parametrize("grid", [(4, 2), (4, 4), (1, 1)])
@pytest.mark.parametrize("prefix", PREFIXES)
@torch.no_grad()
def test_self_is_a_block_of_the_attention_mask(prefix: str, grid, masked: int) -> None:
    decoder, null = make_decoder(prefix, grid), torch.tensor([False, True])
    tokens, latents, mask = inputs(grid, masked)
    expected = masked_conditions(decoder, tokens, latents, mask, null)
    torch.testing.assert_close(decoder(tokens, latents, mask, null), expected, atol=1e-5, rtol=1e-5)
    if 0 < masked < 16:
        full = make_decoder(prefix, grid, "full")
        assert not torch.allclose(full(tokens, latents, mask, null), expected, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("target", ["residual", "velocity"])
@pytest.mark.parametrize("kind", ["per_position", "joint"])
@pytest.mark.parametrize("attention", ["full", "self"])
@pytest.mark.parametrize("prefix", PREFIXES)
@torch.no_grad()
def test_cached_decode_is_the_uncached_one(prefix, attention, kind, target, guidance) -> None:
    velocity = VelocityConfig(kind=kind, width=16, depth=1, heads=2, fine_width=8, target=target)
    config = DecoderConfig(width=16, heads=2, encoder_depth=1, decoder_depth=1, prefix=prefix,
                           prefix_attention=attention)  # fmt: skip
    torch.manual_seed(0)
    model = V2FlowTokenizer(small_config(decoder=config, velocity=velocity)).eval()
    for parameter in model.head.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    ids = torch.randint(0, 32, (2, 8), generator=draws())
    options = {"steps": 3, "iterations": 4, "guidance": guidance, "guidance_schedule": "linear"}
    cached = model.decode(ids, draws(), **options)
    torch.testing.assert_close(cached, literal(model).decode(ids, draws(), **options), atol=1e-5, rtol=0)
    assert cached.std() > 0.01
    assert not torch.allclose(cached, model.decode(ids, draws(), steps=3), atol=1e-3)


@pytest.mark.parametrize(("attention", "reads"), [("self", 1), ("full", 4)])
@pytest.mark.parametrize("prefix", PREFIXES)
@torch.no_grad()
def test_a_self_prefix_is_computed_once(prefix: str, attention: str, reads: int) -> None:
    decoder, head = make_decoder(prefix, attention=attention), make_head()
    encoder_rows = count_rows(decoder.encoder.blocks[0].attention.qkv)
    decoder_rows = count_rows(decoder.decoder.blocks[0].attention.qkv)
    draw_latents(decoder, head, inputs()[0], POSITIONS, CHANNELS, DecodeOptions(iterations=4), draws())
    visible = 0 + 2 + 5 + 10  # 16 less the cosine schedule's 16, 14, 11 and 6
    assert sum(encoder_rows) == BATCH * (8 * reads + visible)
    assert sum(decoder_rows) == BATCH * (4 * POSITIONS + (8 * reads if prefix == "attend" else 0))


@pytest.mark.parametrize("masked", [16, 10])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_parameter_takes_part_and_checkpointing_changes_nothing(prefix: str, masked: int) -> None:
    gradients = []
    for checkpointing in (False, True):
        decoder = make_decoder(prefix, checkpointing=checkpointing).train()
        out = decoder(*inputs(masked=masked), torch.tensor([False, True]))
        (out * torch.randn(out.shape, generator=draws(4))).sum().backward()
        gradients.append({name: p.grad for name, p in decoder.named_parameters()})
    assert not [name for name, gradient in gradients[0].items() if gradient is None]
    assert sum(bool(g.any()) for g in gradients[0].values()) > 40
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_options_do_not_change_parameters_and_default_to_the_reference() -> None:
    a, b = make_decoder(attention="full").state_dict(), make_decoder(attention="self").state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    c, d = make_head().state_dict(), make_head(modulation="timestep").state_dict()
    assert {k: v.shape for k, v in c.items()} == {k: v.shape for k, v in d.items()}
    assert DecoderConfig().prefix_attention == "full" and VelocityConfig().modulation == "condition"
    with pytest.raises(V2FlowError, match="decoder.prefix_attention: expected full or self, found 'own'"):
        DecoderConfig(prefix_attention="own")
    with pytest.raises(V2FlowError, match="velocity.modulation: .*left out with kind=joint"):
        VelocityConfig(kind="joint", modulation="timestep")
    with pytest.raises(V2FlowError, match="velocity.modulation: expected condition or timestep"):
        VelocityConfig(kind="per_position", modulation="none")


# --- modulation by the timestep ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("modulation", "rows"), [("timestep", 1), ("condition", BATCH * POSITIONS)])
@torch.no_grad()
def test_modulation_is_computed_once_a_step(modulation: str, rows: int) -> None:
    head = make_head(modulation=modulation)
    parts = [head.field.modulation, *(block.modulation for block in head.field.blocks)]
    seen = [count_rows(part) for part in parts]
    draw_latents(make_decoder(), head, inputs()[0], POSITIONS, CHANNELS, DecodeOptions(steps=5), draws())
    assert seen == [[rows] * 5] * 3


def test_timestep_modulation_learns_its_condition() -> None:
    """A toy batch is overfitted at t=1, where the noise says nothing of the latents: only the condition does."""
    torch.manual_seed(0)
    config = VelocityConfig(
        kind="per_position", width=24, depth=1, target="velocity", modulation="timestep", start_share=1
    )
    head = FlowHead(CHANNELS, WIDTH, LATENT_GRID, config).train()
    condition = torch.randn(1, POSITIONS, WIDTH, generator=draws(5), requires_grad=True)
    latents = torch.randn(1, POSITIONS, CHANNELS, generator=draws(6))
    mask = torch.ones(1, POSITIONS).bool()
    optimiser, g, losses = torch.optim.Adam(head.parameters(), lr=2e-2), draws(7), []
    for _ in range(60):
        loss = head.loss(latents, condition, mask, g).total
        optimiser.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimiser.step()
    assert condition.grad is not None and (condition.grad != 0).any(-1).all()
    assert sum(losses[-10:]) < 0.2 * sum(losses[:3]) / 3 * 10


# --- guidance where it acts -------------------------------------------------------------------------------------


def field_rows(options: dict, target: str) -> tuple[list[int], int]:
    """Rows of the field a call, as multiples of the batch; and rows that read tokens, likewise."""
    decoder, head = make_decoder(), make_head(target)
    rows, read = count_rows(head.field.inputs), count_rows(decoder.project)
    with torch.no_grad():
        draw_latents(decoder, head, inputs()[0], POSITIONS, CHANNELS, DecodeOptions(**options), draws())
    return [r // (BATCH * POSITIONS) for r in rows], sum(read) // (BATCH * 8)


@pytest.mark.parametrize(("target", "twice"), [("velocity", 2), ("x0", 2), ("residual", 1)])
def test_guidance_is_one_pass_where_it_acts_and_none_elsewhere(target: str, twice: int) -> None:
    assert field_rows({"steps": 4}, target) == ([1, 1, 1, 1], 1)
    assert field_rows({"steps": 4, "guidance": 2.0}, target) == ([2, 2, 2, 2], twice)
    inside = {"steps": 4, "guidance": 2.0, "guidance_interval": [0.3, 0.8]}  # of times 1, 0.75, 0.5, 0.25
    assert field_rows(inside, target) == ([1, 2, 2, 1], twice)
    nowhere = {"steps": 4, "guidance": 2.0, "guidance_interval": [0.1, 0.2]}
    assert field_rows(nowhere, target) == ([1, 1, 1, 1], 1)


@torch.no_grad()
def test_the_interval_is_between_no_guidance_and_all_of_it() -> None:
    decoder, head, tokens = make_decoder(), make_head(), inputs()[0]

    def draw(**options) -> Tensor:
        return draw_latents(
            decoder, head, tokens, POSITIONS, CHANNELS, DecodeOptions(steps=4, **options), draws()
        )

    plain, whole = draw(), draw(guidance=3.0)
    part = draw(guidance=3.0, guidance_interval=[0.4, 0.6])
    assert torch.equal(draw(guidance=3.0, guidance_interval=[0.1, 0.2]), plain)
    assert not torch.allclose(part, plain, atol=1e-4) and not torch.allclose(part, whole, atol=1e-4)


# --- both options in training -----------------------------------------------------------------------------------


def test_a_tokenizer_with_both_options_trains_and_decodes() -> None:
    torch.manual_seed(0)
    decoder = DecoderConfig(width=16, heads=2, encoder_depth=1, decoder_depth=1, prefix_attention="self")
    velocity = VelocityConfig(kind="per_position", width=16, depth=1, modulation="timestep")
    model = V2FlowTokenizer(small_config(decoder=decoder, velocity=velocity)).train()
    model.losses(pictures(4), generator=draws()).total.backward()
    assert all(p.grad is not None for p in model.decoder.parameters() if p is not model.decoder.null)
    out = model.decode(model.encode(pictures(2)), draws(), steps=2, iterations=3, guidance=1.5)
    assert out.shape == (2, 3, 16, 16) and out.isfinite().all()
