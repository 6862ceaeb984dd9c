"""All in One: one transformer for raw video patches and words, in one file (CVPR 2023).

Needs torch and the standard library only: copying this file is the whole installation. Order, the
paper's: sizes (Tab. 1), block (Eq. 2), model (Eq. 1, Eq. 2, consensus), token rolling (Sec. 3.2),
objectives (Sec. 3.3), loading of weights, factorised attention (App. B.1).

    model = AllInOne(Config())                                 # All-in-one-B, randomly initialised
    features = model(video, text_ids, text_mask)               # Features, below
    matched = model.vtm_head(features.pooled).softmax(-1)[:, 1]

Notation (the paper uses P and V twice each, so these are ours):
    B clips    S frames of a clip    m text tokens    P patch side in pixels    n = HW/P^2 patches
    D width    L blocks    |V| words in the vocabulary
Rows: where a tensor has B*S rows, the S frames of a clip are adjacent (row = b*S + s).
A joint row, one frame and its copy of the text: [text cls, m-1 text tokens, video cls, n patches].
"Release" names the authors' code, which decides where the paper is silent; each such place says so.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ---- Sizes and choices ------------------------------------------------------------------------

VARIANTS = {  # Tab. 1; L is named in App. A, its sizes are ViT-L's; nano is ours, for two CPU cores
    "nano": dict(width=64, depth=4, heads=2, init_std=0.1),  # 0.02 is too small to start from here
    "Ti": dict(width=192, depth=12, heads=3),
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
}

CHOICES = {  # the words a field of Config may say: Tab. 8a and 9, Sec. 3.2, Tab. 11b, release
    "temporal": ("token_rolling", "time_average", "channel_shift", "flatten", "timesformer",
                 "decoupled"),
    "roll": ("paper", "release"),
    "roll_select": ("block", "random", "varying"),
    "patch_order": ("raster", "random"),
    "answer_head": ("paper", "release", "linear"),
}


@dataclass(frozen=True)
class Config:
    """Everything that shapes the model; the defaults are All-in-one-B (Tab. 1).

    Raises ValueError for words that are not in CHOICES and sizes that cannot be.
    """

    width: int = 768                 # D, Tab. 1
    depth: int = 12                  # L, Tab. 1
    heads: int = 12                  # Tab. 1
    frames: int = 3                  # S, Sec. 4.1.1; Fig. 9 tries 1 to 16
    image_size: int = 224            # H = W in pixels, Sec. 4.1.1; Tab. 2a also 384
    patch_size: int = 16             # P, Sec. 4.1.1
    vocab_size: int = 30522          # |V| of bert-base-uncased, Sec. 4.1.1
    max_text_len: int = 40           # m at most; release
    temporal: str = "token_rolling"  # rows of Tab. 8a and Tab. 9, see CHOICES
    roll: str = "paper"              # the reading of Sec. 3.2: see token_rolling
    roll_ratio: float = 0.25         # Tab. 8b
    roll_start: int = 1              # first block that rolls, counted from 1; Tab. 11a
    roll_select: str = "block"       # Tab. 11b
    roll_unimodal: bool = True       # Eq. 2 rolls in every pass; the release only in the joint one
    spatial_position: bool = True    # Tab. 10, SPE: this field and the next
    temporal_position: bool = True
    modality_type: bool = True       # Tab. 10, MTE
    patch_order: str = "raster"      # "random": the release shuffles each frame on each pass
    distilled: bool = False          # a second token beside cls, as in distilled DeiT (release: S)
    vtc_dim: int = 512               # width of the shared space of VTC; release
    answers: int = 0                 # classes of the answer head (Sec. 4.2.1, Tab. 12); 0: no head
    answer_head: str = "paper"       # see AnswerHead; "linear" is the probe's
    dropout: float = 0.1             # release
    drop_path: float = 0.1           # at the last block, rising linearly from 0; release
    init_std: float = 0.02           # of random weights; ViT's, BERT's and the release's

    def __post_init__(self):
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it can be "
                                 f"{', '.join(map(repr, allowed))}")
        if self.roll == "release" and self.roll_select != "block":
            raise ValueError(f"roll 'release' rolls blocks; roll_select {self.roll_select!r} needs "
                             "roll 'paper'")
        for field in ("width", "depth", "heads", "frames", "image_size", "patch_size", "vocab_size",
                      "max_text_len", "roll_start"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be 1 or more")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size "
                             f"{self.patch_size}")
        if not 0 <= self.roll_ratio <= 1:
            raise ValueError(f"roll_ratio {self.roll_ratio} is a share of the patches: 0 to 1")

    @property
    def patches(self) -> int:
        """n, the patches of one frame: 196 at 224 px (Sec. 4.1.1)."""
        return (self.image_size // self.patch_size) ** 2


# ---- The block (Eq. 2; ViT's, pre-norm with residuals, which the equation leaves out) ------------

class Attention(nn.Module):
    """MSA of Eq. 2. x: (R, T, D), any rows and tokens. Weights are named as in timm's ViT."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: bool, (R, 1, 1, T), False hides a key. Returns (R, T, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))       # (R, T, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                       # each (R, heads, T, D/heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.drop(self.proj(x.transpose(1, 2).flatten(2)))  # (R, T, D)


class Mlp(nn.Module):
    """MLP of Eq. 2: D -> 4D -> D. x: (R, T, D) in and out. Weights are named as in timm's ViT."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """z^d = MLP(MSA(z^{d-1})) of Eq. 2. x: (R, T, D) in and out; mask as in Attention."""

    def __init__(self, width: int, heads: int, dropout: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)                 # ViT's epsilon
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, dropout)
        self.drop_path = drop_path

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self._drop_rows(self.attn(self.norm1(x), mask))
        return x + self._drop_rows(self.mlp(self.norm2(x)))

    def _drop_rows(self, x: Tensor) -> Tensor:
        """Stochastic depth: a row (one frame, not one clip; release) skips the branch."""
        if not self.training or self.drop_path == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * (keep / (1 - self.drop_path)).to(x.dtype)


# ---- The model (Eq. 1, Eq. 2, consensus) -------------------------------------------------------

class Features(NamedTuple):
    """What a joint pass returns: the consensus p of Sec. 3.1, after the final LayerNorm."""

    text: Tensor    # (B, m, D)    frame-averaged text tokens, for MLM
    video: Tensor   # (B, 1+n, D)  frame-averaged video cls and patches
    pooled: Tensor  # (B, D)       tanh(Linear(text cls)), for VTM; a pooler is in the release only


class MLMHead(nn.Module):
    """Word prediction of Sec. 3.3: (..., D) -> (..., |V|). BERT's head, decoder not tied (release).

    Give it the masked positions only: |V| logits for each token of a batch are most of its memory.
    """

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)            # BERT's epsilon
        self.decoder = nn.Linear(width, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.LayerNorm(F.gelu(self.dense(x))))


class AnswerHead(nn.Sequential):
    """Classes from a cls token, (..., D) -> (..., answers); open-ended QA (Sec. 4.2.1) and probe.

    paper: "a two-layer MLP with hidden size 768", its GELU is ours. release: hidden D/2, a
    LayerNorm between, dropout 0.5 before. linear: the one layer of Tab. 12.
    """

    def __init__(self, kind: str, width: int, answers: int):
        layers = {
            "paper": lambda: [nn.Linear(width, 768), nn.GELU(), nn.Linear(768, answers)],
            "release": lambda: [nn.Dropout(0.5), nn.Linear(width, width // 2),
                                nn.LayerNorm(width // 2), nn.GELU(),
                                nn.Linear(width // 2, answers)],
            "linear": lambda: [nn.Linear(width, answers)],
        }
        super().__init__(*layers[kind]())


class AllInOne(nn.Module):
    """The All-in-one Transformer (Fig. 2): video and text through the same L blocks.

    Three passes: `forward` (joint), `encode_video` and `encode_text` (unimodal, Sec. 3.3 VTC).
    Heads are plain attributes: vtm_head, mlm_head, text_proj, video_proj; answer_head where
    config.answers says how many.
    Weights are named as in timm's ViT and in BERT.

    video: (B, S, 3, H, W), uint8 pixels (RGB; normalised here, on the device) or floats already
        normalised. S can be less than config.frames; more only without temporal positions.
    text_ids: (B, m) int64, [CLS] first. text_mask: (B, m) bool, False at padding; None: no padding.
    """

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)       # ImageNet's; release

    def __init__(self, config: Config):
        super().__init__()
        c, D = config, config.width
        self.config = c
        self.specials = 2 if c.distilled else 1                    # cls, and DeiT's second token
        self.recompute = False                                     # activation checkpointing

        self.text_embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(c.vocab_size, D),               # T of Eq. 1
            "position_embeddings": nn.Embedding(c.max_text_len, D),         # T^pos
            "LayerNorm": nn.LayerNorm(D, eps=1e-12),
        })
        self.patch_embed = nn.ModuleDict({                                  # V of Eq. 1
            "proj": nn.Conv2d(3, D, kernel_size=c.patch_size, stride=c.patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))                 # v_class
        if c.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, D))
        # V^pos of Eq. 1 is one table of S*n + 1 rows; like the release we add a spatial table
        # (which ImageNet weights fill) and a temporal one of S rows, zero at first.
        if c.spatial_position:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.specials + c.patches, D))
        if c.temporal_position:
            self.temporal_embed = nn.Parameter(torch.zeros(1, c.frames, D))
        if c.modality_type:
            self.type_embeddings = nn.Parameter(torch.zeros(2, D))          # t^type, v^type
        self.drop = nn.Dropout(c.dropout)

        self.blocks = nn.ModuleList(
            Block(D, c.heads, c.dropout, c.drop_path * d / max(1, c.depth - 1))
            for d in range(c.depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        if c.temporal in ("timesformer", "decoupled"):
            self.factorized = nn.ModuleList(FactorizedAttention(c) for _ in range(c.depth))

        self.pooler = nn.Linear(D, D)
        self.vtm_head = nn.Linear(D, 2)                                     # logit 1: matched
        self.mlm_head = MLMHead(D, c.vocab_size)
        self.text_proj = nn.Linear(D, c.vtc_dim)
        self.video_proj = nn.Linear(D, c.vtc_dim)
        if c.answers:
            self.answer_head = AnswerHead(c.answer_head, D, c.answers)

        self.register_buffer("mean", torch.tensor(self.MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.STD).view(3, 1, 1), persistent=False)
        initialise(self)

    # ---- Eq. 1: tokens of each modality ----

    def embed_text(self, text_ids: Tensor) -> Tensor:
        """t-hat of Eq. 1. (B, m) -> (B, m, D). LayerNorm and dropout before the type: release."""
        m = text_ids.shape[1]
        if m > self.config.max_text_len:
            raise ValueError(f"text has {m} tokens, the model has positions for "
                             f"{self.config.max_text_len}: shorten the text or set --max_text_len")
        e = self.text_embeddings
        text = e["word_embeddings"](text_ids) + e["position_embeddings"].weight[:m]
        text = self.drop(e["LayerNorm"](text))                     # (B, m, D)
        return text + self.type_embeddings[0] if self.config.modality_type else text

    def embed_video(self, video: Tensor, patch_order: Tensor | None = None) -> Tensor:
        """v-hat of Eq. 1. (B, S, 3, H, W) -> (B, S, 1+n, D).

        patch_order: (B*S, n), the raster patch that stands in each slot of each frame; rolling
        moves slots. None: as the config says.
        """
        c, size = self.config, self.config.image_size
        if video.dim() != 5 or video.shape[2] != 3:
            raise ValueError(f"video must be (B, S, 3, H, W), got {tuple(video.shape)}; a clip of "
                             "(B, 3, S, H, W) needs .transpose(1, 2), a single image [:, None]")
        if video.shape[3:] != (size, size):
            raise ValueError(f"frames are {tuple(video.shape[3:])} px, the model was built for "
                             f"{(size, size)}: crop them, or build it with another image_size")
        B, S = video.shape[:2]
        if c.temporal_position and S > c.frames:
            raise ValueError(f"the clip has {S} frames, the model has temporal positions for "
                             f"{c.frames}: set --frames {S}, or --no-temporal_position")
        if video.dtype == torch.uint8:
            video = (video / 255 - self.mean) / self.std
        patches = self.patch_embed["proj"](video.flatten(0, 1))    # (B*S, D, H/P, W/P)
        patches = patches.flatten(2).transpose(1, 2)               # (B*S, n, D)
        cls = self.cls_token
        if c.distilled:
            cls = torch.cat([cls, self.dist_token], 1)
        if c.spatial_position:
            cls = cls + self.pos_embed[:, :self.specials]
            patches = patches + self.pos_embed[:, self.specials:]
        if patch_order is None and c.patch_order == "random":
            patch_order = torch.rand(patches.shape[:2], device=patches.device).argsort(1)
        if patch_order is not None:
            patches = patches.gather(1, patch_order[:, :, None].expand_as(patches))
        if c.temporal_position:                                    # on patches, not on cls: release
            patches = patches + self.temporal_embed[0, :S].repeat(B, 1)[:, None]
        tokens = torch.cat([cls.expand(B * S, -1, -1).to(patches.dtype), patches], 1)
        tokens = self.drop(tokens).unflatten(0, (B, S))            # (B, S, 1+n, D)
        return tokens + self.type_embeddings[1] if c.modality_type else tokens

    # ---- Eq. 2 and the consensus ----

    def forward(self, video: Tensor, text_ids: Tensor, text_mask: Tensor | None = None,
                patch_order: Tensor | None = None) -> Features:
        """Joint pass (Sec. 3.1). Shapes as in the class; returns Features."""
        return self.fuse(self.embed_video(video, patch_order), self.embed_text(text_ids), text_mask)

    def fuse(self, video: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Features:
        """Joint pass over embeddings: video (B, S, 1+n, D), text (B, m, D) -> Features.

        z^0 = [t-hat; v-hat] for each frame (Sec. 3.1); "flatten" has all frames in one row.
        """
        S, m = video.shape[1], text.shape[1]
        if self.config.temporal == "flatten":
            z = torch.cat([text, video.flatten(1, 2)], 1)          # (B, m+S(1+n), D)
        else:
            text = text[:, None].expand(-1, S, -1, -1)             # (B, S, m, D)
            z = torch.cat([text, video], 2).flatten(0, 1)          # (B*S, m+1+n, D)
        mask = None
        if text_mask is not None:                                  # every video token is visible
            rows = text_mask.repeat_interleave(len(z) // len(text), 0)      # (rows, m)
            mask = F.pad(rows, (0, z.shape[1] - m), value=True)[:, None, None]
        z = self.transform(z, S, m, mask)
        if self.config.temporal == "flatten":
            text, video = z[:, :m], z[:, m:].unflatten(1, (S, -1)).mean(1)
        else:
            p = z.unflatten(0, (-1, S)).mean(1)                    # (B, m+1+n, D), 1/S sum z_i^L
            text, video = p[:, :m], p[:, m:]
        return Features(text, video, torch.tanh(self.pooler(text[:, 0])))

    def encode_video(self, video: Tensor, patch_order: Tensor | None = None) -> Tensor:
        """Video-only pass (Sec. 3.3 VTC). (B, S, 3, H, W) -> (B, 1+n, D); [:, 0] is cls."""
        tokens = self.embed_video(video, patch_order)              # (B, S, 1+n, D)
        S = tokens.shape[1]
        rows = (0, 1) if self.config.temporal != "flatten" else (1, 2)
        z = self.transform(tokens.flatten(*rows), S, 0, None, roll=self.config.roll_unimodal)
        return z.view(tokens.shape).mean(1)                        # (B, 1+n, D)

    def encode_text(self, text_ids: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Text-only pass (Sec. 3.3 VTC). (B, m) -> (B, m, D); [:, 0] is cls. Nothing to roll."""
        mask = None if text_mask is None else text_mask[:, None, None]
        return self.transform(self.embed_text(text_ids), 1, text_ids.shape[1], mask)

    def transform(self, z: Tensor, S: int, m: int, mask: Tensor | None,
                  roll: bool = True) -> Tensor:
        """Eq. 2, d = 1..L, then the final LayerNorm. z: (rows, m + video tokens, D) in and out."""
        c = self.config
        # DeiT's second token stays like cls; the release rolls it with the patches
        first = m + (1 if c.roll == "release" else self.specials)
        for d, block in enumerate(self.blocks, start=1):
            if c.temporal in ("timesformer", "decoupled"):
                z = self.factorized[d - 1](z, S, m, mask)
            elif S > 1 and d >= c.roll_start and roll:
                if c.temporal == "token_rolling":                  # TTR(z^{d-1})
                    z = token_rolling(z, S, c.roll_ratio, first=first, roll=c.roll,
                                      select=c.roll_select, layer=d)
                elif c.temporal == "channel_shift":
                    z = torch.cat([z[:, :m], channel_shift(z[:, m:], S)], 1)
            if self.recompute and self.training:
                z = checkpoint(block, z, mask, use_reentrant=False)
            else:
                z = block(z, mask)                                 # z^d = MLP(MSA(z^{d-1}))
        return self.norm(z)


# ---- Temporal modelling without parameters (Sec. 3.2, Tab. 8a) ----------------------------------

def token_rolling(tokens: Tensor, frames: int, ratio: float = 0.25, *, first: int = 1,
                  roll: str = "paper", select: str = "block", layer: int = 1) -> Tensor:
    """TTR of Eq. 2, Fig. 2b: some patches move to the next frame, the last frame's to the first.

    tokens: (B*S, first + n, D); the `first` leading tokens (text, cls) never move.
    ratio: share of the n patches that move, round(ratio * n) of them; Tab. 8b is best at 0.25.
    roll: "paper" moves them one frame forward (Sec. 3.2, "roll parts of the token by 1").
        "release" moves floor(ratio/2 * n) leading ones forward and as many trailing ones backward.
    select: which patches move forward (App. C.2, Tab. 11b): one "block", "random" ones (drawn anew
        on each call), or a block "varying" with layer = 1..L. Only "block" has a "release" reading.
    Returns the same shape. A permutation: no parameters, and sums over the frames do not change.
    Raises ValueError if the rows are not whole clips.
    """
    if tokens.shape[0] % frames:
        raise ValueError(f"{tokens.shape[0]} rows are not whole clips of {frames} frames; rows are "
                         "B*S with the frames of a clip adjacent")
    n = tokens.shape[1] - first
    k = round(ratio * n)
    if roll == "release":
        each_way = int(ratio / 2 * n)
        moves = [(slice(first, first + each_way), +1),
                 (slice(first + n - each_way, first + n), -1)]
    elif select == "random":
        moves = [(first + torch.randperm(n, device=tokens.device)[:k], +1)]
    elif select == "varying":
        block = torch.arange(k, device=tokens.device) + (layer - 1) * k
        moves = [(first + block % n, +1)]
    else:
        moves = [(slice(first, first + k), +1)]
    clips = tokens.unflatten(0, (-1, frames))                      # (B, S, first+n, D)
    rolled = clips.clone()
    for slots, step in moves:
        rolled[:, :, slots] = clips[:, :, slots].roll(step, dims=1)
    return rolled.flatten(0, 1)                                    # (B*S, first+n, D)


def channel_shift(tokens: Tensor, frames: int) -> Tensor:
    """Channel Shift of Tab. 8a [23]: an eighth of D from the next frame, one from the frame before.

    tokens: (B*S, 1+n, D), video only. Returns the same shape. The ends are filled with zeros and
    the class token is shifted too, as in the release.
    """
    clips = tokens.unflatten(0, (-1, frames))                      # (B, S, 1+n, D)
    c = tokens.shape[-1] // 8
    shifted = clips.clone()
    shifted[:, :-1, :, :c] = clips[:, 1:, :, :c]
    shifted[:, -1, :, :c] = 0
    shifted[:, 1:, :, c:2 * c] = clips[:, :-1, :, c:2 * c]
    shifted[:, 0, :, c:2 * c] = 0
    return shifted.flatten(0, 1)                                   # (B*S, 1+n, D)


# ---- Objectives (Sec. 3.3): pure functions, each computed in float32 -----------------------------

def vtm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Video-text matching, Sec. 3.3. logits: (B, 2) of vtm_head(pooled); labels: (B,), 1 = matched.

    Returns the mean negative log-likelihood.
    """
    return F.cross_entropy(logits.float(), labels)


def mlm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Masked language modelling, Sec. 3.3. logits: (M, |V|) at masked positions; labels: (M,).

    Label -100 does not count. Returns the *sum* over words: who knows how many words the whole
    batch masks, on all devices, divides. No masked word gives 0, not NaN.
    """
    return F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")


def vtc_loss(text: Tensor, video: Tensor, temperature: float = 0.05) -> Tensor:
    """Video-text contrast, Sec. 3.3. text, video: (B, vtc_dim) projections, row i of both a pair.

    Symmetric: text-to-video plus video-to-text over cosine similarities. The temperature and the
    sum (not the mean) of both directions are the release's.
    """
    with torch.autocast(text.device.type, enabled=False):          # or @ would be in half precision
        text, video = F.normalize(text.float(), dim=-1), F.normalize(video.float(), dim=-1)
        logits = text @ video.T / temperature                      # (B, B)
    pairs = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)


def word_patch_distance(text: Tensor, patches: Tensor, text_mask: Tensor, beta: float = 0.5,
                        steps: int = 50) -> Tensor:
    """Optimal-transport distance of words and patches, (B,): the release's, IPOT [39] (Sec. 4.6).

    text: (B, m, D), patches: (B, n, D), without cls tokens; text_mask: (B, m) bool, as the text's.
    [CLS], the last real token ([SEP]) and padding take no part. The plan gets no gradient.
    """
    words = text_mask.clone()
    words[:, 0] = False
    words.scatter_(1, text_mask.sum(1, keepdim=True) - 1, False)   # (B, m), without [SEP]
    with torch.autocast(text.device.type, enabled=False):
        text = F.normalize(text.float(), dim=-1, eps=1e-5)
        patches = F.normalize(patches.float(), dim=-1, eps=1e-5)
        cost = (1 - text @ patches.mT) * words[:, :, None]         # (B, m, n)
        with torch.no_grad():
            n, m = patches.shape[1], words.sum(1, keepdim=True).clamp(min=1)
            kernel = torch.exp(-cost.mT / beta) * words[:, None]   # (B, n, m)
            plan, sigma = torch.ones_like(kernel), words / m       # (B, n, m), (B, m)
            for _ in range(steps):
                plan = kernel * plan
                delta = 1 / (n * (plan @ sigma[:, :, None])).clamp(min=1e-12)   # (B, n, 1)
                sigma = words / (m * (plan * delta).sum(1)).clamp(min=1e-12)    # (B, m)
                plan = delta * plan * sigma[:, None]
        return (cost * plan.mT).sum((1, 2))


def word_patch_alignment_loss(distance: Tensor, labels: Tensor) -> Tensor:
    """Release's fourth term (weight 0.1): near for matched clips, far for others. (B,), (B,)."""
    return (distance * (2 * labels - 1)).sum() / len(labels)


# ---- Initialisation and loading -----------------------------------------------------------------

def initialise(model: AllInOne) -> None:
    """Random weights (Tab. 6, first row): N(0, init_std), biases and temporal positions 0."""
    for name, p in model.named_parameters():
        if p.ndim == 1:                                            # LayerNorm's weight, any bias
            nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)
        elif name == "temporal_embed":
            nn.init.zeros_(p)
        else:
            nn.init.trunc_normal_(p, std=model.config.init_std)
    for extra in getattr(model, "factorized", []):
        extra.initialise()


class Inert(dict):
    """Stands in read_weights for every foreign class and function: takes anything, does nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        pass

    def __call__(self, *args, **kwargs):
        return Inert()

    def __hash__(self):
        return id(self)

    append = extend = add = __call__


class SafePickle:
    """What torch.load takes for the pickle module: rebuilds tensors and calls nothing else."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            tensors = {("collections", "OrderedDict"), ("torch", "Size"),
                       ("torch._utils", "_rebuild_tensor_v2"),
                       ("torch._utils", "_rebuild_parameter")}
            storage = module in ("torch", "torch.storage") and name.endswith("Storage")
            if storage or (module, name) in tensors:
                return super().find_class(module, name)
            return Inert

    @staticmethod
    def load(file, **options):
        return SafePickle.Unpickler(file, **options).load()


def read_weights(path) -> dict:
    """A file of torch.save as tensors and plain types; nothing that it pickles is executed.

    Objects of other classes (Lightning's, say) become Inert.
    Raises ValueError for a file that is no dictionary of weights.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=SafePickle)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:             # whatever a damaged or foreign file makes torch raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a file of weights, or damaged ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


def fit_table(name: str, table: Tensor, like: Tensor, specials: int = 1) -> Tensor:
    """A table of positions cut or grown to the shape of `like`; other tensors are returned.

    pos_embed (1, specials+n, D): the grid is interpolated, as timm does (Tab. 2a: 224 -> 384 px).
    temporal_embed (1, S, D): the first rows; missing ones are 0 (release).
    position_embeddings (m, D) of text: the first rows; missing ones keep `like`'s values.
    """
    if table.shape == like.shape or table.shape[-1:] != like.shape[-1:]:
        return table
    if name == "pos_embed":
        old, new = (round((t.shape[1] - specials) ** 0.5) for t in (table, like))
        if old * old != table.shape[1] - specials:
            return table                                           # no square: load_weights says so
        grid = table[:, specials:].mT.unflatten(-1, (old, old)).float()
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
        return torch.cat([table[:, :specials], grid.flatten(2).mT.to(table.dtype)], 1)
    if name == "temporal_embed":
        return F.pad(table[:, :like.shape[1]], (0, 0, 0, max(0, like.shape[1] - table.shape[1])))
    if name == "text_embeddings.position_embeddings.weight":
        return torch.cat([table[:len(like)], like[len(table):].to(table.dtype)])
    return table


def load_weights(model: AllInOne, weights: dict, source: str) -> dict[str, list[str]]:
    """Copies tensors of the model's own names into it; tables of positions are fitted (fit_table).

    Returns {"loaded", "resized", "initialised", "ignored"}, lists of names: initialised are the
    model's that the file lacks, ignored are the file's that the model lacks.
    Raises ValueError naming tensors of another shape.
    """
    own = model.state_dict()
    report = {"loaded": [], "resized": [], "initialised": [k for k in own if k not in weights],
              "ignored": [k for k in weights if k not in own]}
    fitted, wrong = {}, []
    for name in [name for name in own if name in weights]:
        fitted[name] = fit_table(name, weights[name], own[name], model.specials)
        if fitted[name].shape != own[name].shape:
            wrong.append(f"{name} {tuple(weights[name].shape)}, here {tuple(own[name].shape)}")
        same = weights[name].shape == own[name].shape
        report["loaded" if same else "resized"].append(name)
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} tensors have another shape ({sorted(wrong)[0]}): "
                         "this is another variant; compare --variant and the sizes")
    model.load_state_dict(fitted, strict=False)
    return report


def load_vit(model: AllInOne, path) -> dict[str, list[str]]:
    """Backbone from a timm or DeiT file (Sec. 3.1, Tab. 6); the rest keeps its random weights.

    The image classifier is ignored and positions are interpolated to the model's grid.
    Returns the report of load_weights. Raises ValueError for unknown, missing or misfit tensors.
    """
    weights = read_weights(path)
    weights = weights.get("model", weights)                        # DeiT wraps them
    heads = ("head.", "head_dist.", "pre_logits.")
    weights = {k: v for k, v in weights.items() if not k.startswith(heads)}
    report = load_weights(model, weights, str(path))
    backbone = ("cls_token", "dist_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
    unknown = report["ignored"]
    missing = [name for name in report["initialised"] if name.startswith(backbone)]
    if "dist_token" in unknown:
        raise ValueError(f"{path}: a distilled DeiT has a second class token: add --distilled")
    if unknown or missing:
        raise ValueError(
            f"{path}: not the backbone of this model: {len(unknown)} unknown tensors "
            f"({', '.join(unknown[:3])}), {len(missing)} missing ({', '.join(missing[:3])}); "
            "expected timm's vit_* or deit_* weights of the same --variant")
    return report


RENAMED = {  # the release's names -> ours; the rest is timm's and BERT's on both sides
    "transformer.": "", "itm_score.fc.": "vtm_head.", "vtm_score.fc.": "vtm_head.",
    "pooler.dense.": "pooler.", "mlm_score.transform.": "mlm_head.",
    "mlm_score.decoder.": "mlm_head.decoder.", "mlm_score.bias": "mlm_head.decoder.bias",
    "txt_proj.": "text_proj.", "vid_proj.": "video_proj.",
    "token_type_embeddings.weight": "type_embeddings"}


def load_release(path, heads: int | None = None, **overrides):
    """The authors' .ckpt (Tab. 1: Ti, S, B; plus) -> (AllInOne, report of load_weights).

    heads: not stored in such a file; None means width / 64 (Tab. 1).
    overrides: other fields of Config (frames, image_size, max_text_len, ...).
    The config becomes what those weights were trained with: roll="release", no rolling in the
    unimodal passes; their shuffled patches are `patch_order="random"`.
    Raises ValueError for a file of something else.
    """
    content = read_weights(path)
    weights = {}
    for name, tensor in content.get("state_dict", content).items():
        name = name.removeprefix("module.")
        for theirs, ours in RENAMED.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        weights[name] = tensor
    bert_type = weights.pop("text_embeddings.token_type_embeddings.weight", None)
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight",
              "text_embeddings.word_embeddings.weight",
              "text_embeddings.position_embeddings.weight")
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(f"{path}: not a released All-in-one checkpoint: it lacks "
                         f"{', '.join(missing)}; for ViT or DeiT weights use load_vit (--init)")
    positions = weights["text_embeddings.position_embeddings.weight"]
    if bert_type is not None:  # its row 0 is added to every token: one table says both
        weights["text_embeddings.position_embeddings.weight"] = positions + bert_type[0]
    width, patch = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
    distilled = "dist_token" in weights
    grid = round((weights["pos_embed"].shape[1] - 1 - distilled) ** 0.5)
    temporal_position = "temporal_embed" in weights and not distilled  # S never used its table
    config = Config(
        width=width, heads=heads or width // 64, patch_size=patch, image_size=grid * patch,
        depth=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        vocab_size=len(weights["text_embeddings.word_embeddings.weight"]),
        max_text_len=len(positions), distilled=distilled, temporal_position=temporal_position,
        roll="release", roll_unimodal=False)
    model = AllInOne(replace(config, **overrides))
    return model, load_weights(model, weights, str(path))


# ---- Factorised attention (App. B.1, Fig. 8) ----------------------------------------------------

class FactorizedAttention(nn.Module):
    """What "timesformer" and "decoupled" of Tab. 9 add before the joint attention of each block.

    App. B.1 gives a sentence and a figure to each, Tab. 9 the parameters (180.5 M, 192 M). We read:
    timesformer: attention over time, then over space, each closed by a Linear (180.8 M for B).
    decoupled: text attends to text, video over time and over space (195.0 M for B).
    Both start as a no-op, so that ImageNet weights are met unchanged at the first step.
    """

    def __init__(self, config: Config):
        super().__init__()
        c, D = config, config.width
        self.specials = 2 if c.distilled else 1
        self.norm_time, self.norm_space = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.time = Attention(D, c.heads, c.dropout)
        self.space = Attention(D, c.heads, c.dropout)
        self.time_fc, self.space_fc = nn.Identity(), nn.Identity()
        self.decoupled = c.temporal == "decoupled"
        if self.decoupled:
            self.norm_text = nn.LayerNorm(D, eps=1e-6)
            self.text = Attention(D, c.heads, c.dropout)
        else:
            self.time_fc, self.space_fc = nn.Linear(D, D), nn.Linear(D, D)

    def initialise(self) -> None:
        """Zeroes the last layer of each branch."""
        last = [self.time.proj, self.space.proj, self.text.proj] if self.decoupled else [
            self.time_fc, self.space_fc]
        for layer in last:
            nn.init.zeros_(layer.weight)

    def forward(self, z: Tensor, S: int, m: int, mask: Tensor | None) -> Tensor:
        """z: (B*S, m+1+n, D) in and out; either part may be empty (unimodal passes)."""
        text, video = z[:, :m], z[:, m:]
        if m and self.decoupled:
            own = None if mask is None else mask[..., :m]
            text = text + self.text(self.norm_text(text), own)
        if video.shape[1]:
            cls, patches = video[:, :self.specials], video[:, self.specials:]
            n = patches.shape[1]
            tubes = patches.unflatten(0, (-1, S)).transpose(1, 2).flatten(0, 1)  # (B*n, S, D)
            tubes = tubes + self.time_fc(self.time(self.norm_time(tubes)))
            patches = tubes.unflatten(0, (-1, n)).transpose(1, 2).flatten(0, 1)  # (B*S, n, D)
            video = torch.cat([cls, patches], 1)
            video = video + self.space_fc(self.space(self.norm_space(video)))
        return torch.cat([text, video], 1)
