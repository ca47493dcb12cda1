"""The arrays of the public interface, each shape and kind of number named once, as a jaxtyping type.

To a type checker all of them are `torch.Tensor`, and at run time they cost nothing: nothing checks them but the tests
(and whoever decorates a function by `jaxtyping.jaxtyped` with a type checker). Within one call an axis has one length
wherever its letter stands:

- B pictures, the first b of which are described; S, H, W pixels along a side; C channels of a latent; h, w latent
  positions along a side, L = h·w of them row by row, M that were chosen;
- N visual tokens a picture, of width D; K codes; V entries of the LLM's vocabulary, the k most probable of a token;
- W also is the width of a network. `#` before a letter: or one for all; `*name`: any axes.
"""

from jaxtyping import Bool, Float, Integer
from torch import Tensor

# --- pictures and latents ---------------------------------------------------------------------------------------

Pictures = Float[Tensor, "B 3 S S"]
"""RGB in [0, 1], as a tokenizer takes and gives them; S is its `image_size`."""

AnyPictures = Float[Tensor, "B 3 H W"]
"""RGB as a codec takes and gives them: sides that its `downsample` divides; in [0, 1], decoded ones about so."""

Latents = Float[Tensor, "B C h w"]
"""A codec's latents, of about unit scale."""

PositionLatents = Float[Tensor, "B L C"]
"""Latents as a sequence of positions, or noise, noisy latents, residuals and velocities in their place."""

# --- visual tokens and vocabularies -----------------------------------------------------------------------------

VisualIds = Integer[Tensor, "B N"]
"""Codes' numbers in [0, K): long where v2flow makes them, of any integer type where it takes them."""

TokenEmbeddings = Float[Tensor, "B N D"]
"""Tokens in the LLM's embedding space: expected rows of its centred table, directions, or unit codes."""

TokenStates = Float[Tensor, "B N W"]
"""Hidden states of visual tokens in a network of ours."""

PerToken = Float[Tensor, "b N"]
"""A number a token: entropy in nats, or the lead of the nearest code in cosine, in [0, 2]."""

TokenFlags = Bool[Tensor, "B N"]
"""True for tokens that are chosen."""

TopWords = Integer[Tensor, "b N k"]
"""The most probable entries of the LLM's vocabulary, in [0, V); k is 0 where there are no words."""

TopProbabilities = Float[Tensor, "b N k"]
"""Their probabilities in [0, 1], falling."""

WordProbabilities = Float[Tensor, "b N V"]
"""Those of all entries, in the table's order."""

Codebook = Float[Tensor, "K D"]
"""Unit vectors."""

EmbeddingTable = Float[Tensor, "V D"]
"""The LLM's rows, or what they are centred to."""

# --- decoder and flow -------------------------------------------------------------------------------------------

Conditions = Float[Tensor, "B L W"]
"""What the decoder says of each position."""

PositionMask = Bool[Tensor, "B L"]
"""As `mask`: true where a latent is to be predicted; as `known`: true where it is given."""

PictureFlags = Bool[Tensor, "B"]
"""True for pictures that go without their tokens or condition."""

Timesteps = Float[Tensor, "#B #L"]
"""Times in [0, 1]; 1 is noise, 0 data."""

DrawnTimesteps = Float[Tensor, "*shape"]
"""Times in (0, 1], of the shape that was asked for."""

ChosenPositions = Integer[Tensor, "B M"]
"""Positions in [0, L)."""

ChosenRows = Float[Tensor, "B M C"]
"""What stands at them."""

TokensAbove = Integer[Tensor, "L"]
"""For each position the visual token whose cell covers it, in [0, N)."""

State = Float[Tensor, "*state"]
"""What an ODE solver moves, of any one shape: x at a time, its velocity, or the data predicted from it."""

Scalar = Float[Tensor, ""]
"""A loss or a figure of a whole batch."""

# --- text to image ----------------------------------------------------------------------------------------------

NextLogits = Float[Tensor, "B K"]
"""Logits of the next visual token."""

NextIds = Integer[Tensor, "B"]
"""The next visual token, in [0, K)."""

PerPicture = Float[Tensor, "B"]
"""A number a picture: log-likelihood in nats, or a uniform draw in [0, 1)."""
