"""The boxes expert: a layout transformer in the form of STLT, over boxes and categories alone.

First a transformer over each frame's boxes and a CLS token, whose output stands for the frame's layout; then
a causal one over the frames with learned positions and a CLS token last, which sees every frame and is
classified. It sees no pixels: appearance cannot mislead it, nor help it.

Against the authors' code: layers start from different random weights (theirs are copies of one), CLS tokens
start small instead of zero, and, unless asked for, the embeddings' layer norms use PyTorch's epsilon (theirs:
`norm_eps` 0.1) and there are no hand side and contact state (theirs for EPIC), which Something-Else does not
annotate.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmkd.data_manifests.counted import counted
from mmkd.data_manifests.errors import InputError

CATEGORIES = 3
"""Empty, hand, object."""
SIDES = 3
"""Unknown (or no hand), left, right: EPIC's `HandSide` + 1, as the authors number them."""
STATES = 6
"""Unknown (or no hand), then touching nothing, oneself, another person, a portable object, a fixed one: EPIC's
`HandState` + 1."""
NORM_EPS = 1e-5
"""PyTorch's; the authors' is 0.1."""
MAX_FRAMES = 64
INITIAL_STD = 0.02


class BoxEmbedding(nn.Module):
    """The sum of a box's category, corners and score (and a hand's side and contact state), normalised."""

    def __init__(
        self, hidden: int, dropout: float, *, norm_eps: float = NORM_EPS, sides: bool = False, states: bool = False
    ) -> None:
        """Embed into `hidden` channels; tables of `sides` and `states` exist where they are asked for."""
        super().__init__()
        self.category = nn.Embedding(CATEGORIES, hidden, padding_idx=0)
        self.box = nn.Linear(4, hidden)
        self.score = nn.Linear(1, hidden)
        self.side = nn.Embedding(SIDES, hidden, padding_idx=0) if sides else None
        self.state = nn.Embedding(STATES, hidden, padding_idx=0) if states else None
        self.norm = nn.LayerNorm(hidden, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Map the inputs of `STLT.forward` to (B, T, N, hidden)."""
        boxes, categories = inputs["boxes"], inputs["categories"]
        scores = inputs["scores"] if "scores" in inputs else torch.ones_like(boxes[..., 0])
        # An empty slot is masked in attention, but a NaN in it would pass through the mask: 0 * NaN is NaN.
        empty = categories == 0
        total = self.category(categories) + self.box(boxes.masked_fill(empty[..., None], 0))
        total = total + self.score(scores.masked_fill(empty, 0)[..., None])
        for name, table in (("sides", self.side), ("states", self.state)):
            if table is not None and name in inputs:
                total = total + table(inputs[name].masked_fill(empty, 0))
        embedded: Tensor = self.dropout(self.norm(total))
        return embedded


class STLT(nn.Module):
    """Boxes (B, T, N, 4) and categories (B, T, N) to logits of each head."""

    def __init__(
        self,
        heads: Mapping[str, int],
        *,
        hidden: int = 768,
        attention_heads: int = 8,
        spatial_layers: int = 6,
        temporal_layers: int = 6,
        dropout: float = 0.1,
        max_frames: int = MAX_FRAMES,
        norm_eps: float = NORM_EPS,
        sides: bool = False,
        states: bool = False,
    ) -> None:
        """Build for `heads` (head name -> number of classes); the defaults are the published sizes (85 M).

        `norm_eps` is that of the two embeddings' layer norms, boxes' and frames'; `sides` and `states` add the
        tables of a hand's side and contact state.
        """
        super().__init__()
        if hidden % attention_heads:
            raise InputError(f"layout: hidden {hidden} is not a multiple of attention_heads {attention_heads}")
        self.max_frames = max_frames
        self.embedding = BoxEmbedding(hidden, dropout, norm_eps=norm_eps, sides=sides, states=states)
        self.spatial_cls = nn.Parameter(torch.randn(hidden) * INITIAL_STD)
        self.spatial = _layers(spatial_layers, hidden, attention_heads=attention_heads, dropout=dropout)
        self.position = nn.Embedding(max_frames, hidden)
        self.norm = nn.LayerNorm(hidden, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.temporal_cls = nn.Parameter(torch.randn(hidden) * INITIAL_STD)
        self.temporal = _layers(temporal_layers, hidden, attention_heads=attention_heads, dropout=dropout)
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, classes) for name, classes in heads.items()})

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return head -> float32 logits (B, classes).

        `inputs`: boxes float32 (B, T, N, 4) in 0..1, categories int64 (B, T, N) with 0 for no box, and
        optionally scores float32 (B, T, N), taken as 1 where absent, and sides and states int64 (B, T, N), taken as
        unknown (0) where absent and ignored where there is no table of them. T is anything up to `max_frames`.
        """
        clip = self.encode_frames(self.encode_layouts(inputs))[:, -1]
        return {name: head(clip).float() for name, head in self.heads.items()}

    def encode_layouts(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return one vector per frame (B, T, hidden); a frame without boxes is its CLS token alone."""
        categories = inputs["categories"]
        tokens = self.embedding(inputs).flatten(0, 1)
        tokens = torch.cat([self.spatial_cls.expand(len(tokens), 1, -1), tokens], dim=1)
        padding = nn.functional.pad(categories.flatten(0, 1) == 0, (1, 0), value=False)
        for layer in self.spatial:
            tokens = layer(tokens, src_key_padding_mask=padding)
        layouts: Tensor = tokens[:, 0].unflatten(0, categories.shape[:2])
        return layouts

    def encode_frames(self, layouts: Tensor) -> Tensor:
        """Return (B, T + 1, hidden): each frame given itself and earlier ones, then the clip's CLS token."""
        count = layouts.shape[1]
        if count > self.max_frames:
            raise InputError(f"layout: {counted(count, 'frame')}, but positions exist for {self.max_frames} only")
        positions = self.position(torch.arange(count, device=layouts.device))
        tokens: Tensor = self.dropout(self.norm(layouts + positions))
        tokens = torch.cat([tokens, self.temporal_cls.expand(len(tokens), 1, -1)], dim=1)
        later = torch.ones(count + 1, count + 1, dtype=torch.bool, device=tokens.device).triu(1)
        for layer in self.temporal:
            tokens = layer(tokens, src_mask=later)
        return tokens


def _layers(count: int, hidden: int, *, attention_heads: int, dropout: float) -> nn.ModuleList:
    # Not nn.TransformerEncoder: it copies one layer's weights, and its nested tensors depend on the padding.
    return nn.ModuleList(
        nn.TransformerEncoderLayer(
            hidden, attention_heads, 4 * hidden, dropout=dropout, activation="gelu", batch_first=True
        )
        for _ in range(count)
    )
