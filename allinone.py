"""All in One: one transformer for raw video patches and words, in one file (CVPR 2023).

Needs torch and the standard library only: copying this file is the whole installation. In the
paper's order: sizes, Eq. 1, Eq. 2, consensus, block, heads, rolling (Sec. 3.2), objectives (3.3).

    model = AllInOne(Config())                                 # All-in-one-B, randomly initialised
    features = model(video, text_ids, text_mask)               # Features, below
    matched = model.vtm_head(features.pooled).softmax(-1)[:, 1]

Notation (the paper uses P and V twice each, so these are ours):
    B clips    S frames of a clip    m text tokens    P patch side in pixels    n = HW/P^2 patches
    D width    L blocks    |V| words in the vocabulary
Of B*S rows, row b*S + s is frame s of clip b and its copy of the text: [text cls, m-1 text tokens,
video cls, n patches].
"Release" names the authors' code, which decides where the paper is silent; each such place says so.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args, get_type_hints

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

Temporal = Literal["token_rolling", "time_average", "channel_shift", "flatten",     # Tab. 8a
                   "timesformer", "decoupled"]                                      # Tab. 9
Select = Literal["block", "random", "varying"]                                      # Tab. 11b


@dataclass(frozen=True)
class Config:
    """What shapes the model, by default All-in-one-B (Tab. 1). ValueError for what cannot be."""

    frames: int = 3                  # S, Sec. 4.1.1; Fig. 9 tries 1 to 16
    image_size: int = 224            # H = W in pixels, Sec. 4.1.1; Tab. 2a also 384
    width: int = 768                 # D, Tab. 1
    depth: int = 12                  # L, Tab. 1
    heads: int = 12                  # Tab. 1
    patch_size: int = 16             # P, Sec. 4.1.1
    vocab_size: int = 30522          # |V| of bert-base-uncased, Sec. 4.1.1
    max_text_len: int = 40           # m at most; release (80 for DiDeMo's paragraphs)
    temporal: Temporal = "token_rolling"  # how frames see each other, Tab. 8a and Tab. 9
    roll: Literal["paper", "release"] = "paper"  # the reading of Sec. 3.2: see token_rolling
    roll_ratio: float = 0.25         # share of the patches that roll, Tab. 8b
    roll_start: int = 1              # first block that rolls, counted from 1; Tab. 11a
    roll_select: Select = "block"    # which patches roll, Tab. 11b
    roll_unimodal: bool = True       # Eq. 2 rolls in every pass; the release only in the joint one
    spatial_position: bool = True    # Tab. 10, SPE: this field and the next
    temporal_position: bool = True   # one row a frame; a model or a clip of one frame has none
    modality_type: bool = True       # Tab. 10, MTE
    patch_order: Literal["raster", "random"] = "raster"  # release: shuffles each frame each pass
    distilled: bool = False          # a second token beside cls, as in distilled DeiT (release: S)
    vtc_dim: int = 512               # width of the shared space of VTC; release
    answers: int = 0                 # classes of the answer head (Sec. 4.2.1, Tab. 12); 0: no head
    answer_head: Literal["paper", "release", "linear"] = "paper"  # linear: the probe's
    dropout: float = 0.1             # release
    drop_path: float = 0.1           # at the last block, rising linearly from 0; release
    init_std: float = 0.02           # of random weights; ViT's, BERT's and the release's

    def __post_init__(self):
        for field, hint in get_type_hints(Config).items():
            value, words, least = getattr(self, field), get_args(hint), int(field != "answers")
            if words and value not in words or hint is int and value < least:
                can_be = " or ".join(map(repr, words)) or f"{least} or more"
                raise ValueError(f"{field} is {value!r}; it can be {can_be}")
        if self.width % self.heads or self.image_size % self.patch_size:
            raise ValueError(f"heads must divide width, and patch_size image_size; got {self}")
        if not 0 <= self.roll_ratio <= 1 or self.roll == "release" and self.roll_select != "block":
            raise ValueError("roll_ratio is a share of the patches, 0 to 1; only roll 'paper' has "
                             f"a roll_select other than 'block'; got {self}")

    @property
    def patches(self) -> int:
        """n: 196 at 224 px (Sec. 4.1.1)."""
        return (self.image_size // self.patch_size) ** 2


# ---- The model (Sec. 3.1): Eq. 1, Eq. 2, consensus ----------------------------------------------

class Features(NamedTuple):
    """What a joint pass returns, after the final LayerNorm (Sec. 3.1)."""

    text: Tensor    # (B, m, D)       frame-averaged text tokens (the consensus p), for MLM
    video: Tensor   # (B, 1+n, D)     frame-averaged video cls and patches
    pooled: Tensor  # (B, D)          tanh(Linear(text cls)), for VTM; a pooler: release only
    frames: Tensor  # (B, S, 1+n, D)  video tokens before the consensus, in the slots they end in


class AllInOne(nn.Module):
    """The All-in-one Transformer (Fig. 2): video and text through the same L blocks.

    Three passes: `forward` (joint), `encode_video` and `encode_text` (unimodal, Sec. 3.3 VTC).
    Heads are attributes, applied by the caller. Weights are named as in timm's ViT and in BERT.

    video: (B, S, 3, H, W), uint8 RGB, normalised here, or floats already normalised. S = 1 is an
        image; S is at most config.frames if there are temporal positions. Else: ValueError.
    text_ids: (B, m) int64, [CLS] first. text_mask: (B, m), False or 0 at padding; None: no padding.
    """

    def __init__(self, config: Config):
        super().__init__()
        c, D = config, config.width
        self.config = c
        self.specials = 2 if c.distilled else 1                    # cls, and DeiT's second token
        self.recompute = False                                     # activation checkpointing

        def table(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(*shape)) if wanted else None

        self.text_embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(c.vocab_size, D),               # T of Eq. 1
            "position_embeddings": nn.Embedding(c.max_text_len, D),         # T^pos
            "LayerNorm": nn.LayerNorm(D, eps=1e-12)})
        self.patch_embed = nn.ModuleDict({
            "proj": nn.Conv2d(3, D, c.patch_size, stride=c.patch_size)})    # V
        self.cls_token = table(True, 1, 1, D)                               # v_class
        self.dist_token = table(c.distilled, 1, 1, D)
        # V^pos of Eq. 1 is one table of S*n + 1 rows; like the release we add a spatial table
        # (which ImageNet weights fill) and a temporal one of S rows, zero at first.
        self.pos_embed = table(c.spatial_position, 1, self.specials + c.patches, D)
        self.temporal_embed = table(c.temporal_position and c.frames > 1, 1, c.frames, D)
        self.type_embeddings = table(c.modality_type, 2, D)                 # t^type, v^type
        self.drop = nn.Dropout(c.dropout)

        self.blocks = nn.ModuleList(
            Block(D, c.heads, c.dropout, c.drop_path * d / max(1, c.depth - 1))
            for d in range(c.depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.pooler = ExactLinear(D, D)
        self.vtm_head = ExactLinear(D, 2)                                   # logit 1: matched
        # BERT's, not tied to word_embeddings (release); masked positions only, or memory overflows
        self.mlm_head = nn.Sequential(OrderedDict(
            dense=nn.Linear(D, D), gelu=nn.GELU(), LayerNorm=nn.LayerNorm(D, eps=1e-12),
            decoder=nn.Linear(D, c.vocab_size)))
        self.text_proj, self.video_proj = ExactLinear(D, c.vtc_dim), ExactLinear(D, c.vtc_dim)
        if c.answers:
            self.answer_head = answer_head(c.answer_head, D, c.answers)

        for name, rgb in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(rgb).view(3, 1, 1), persistent=False)
        for name, p in self.named_parameters():    # Tab. 6, first row; temporal positions stay 0
            if p.ndim == 1:                                        # LayerNorm's weight, any bias
                nn.init.constant_(p, float(name.endswith("weight")))
            elif name != "temporal_embed":
                nn.init.trunc_normal_(p, std=c.init_std)
        factorized = c.temporal in ("timesformer", "decoupled")    # these start as a no-op
        self.factorized = nn.ModuleList(FactorizedAttention(c) for _ in self.blocks if factorized)

    def embed_text(self, text_ids: Tensor) -> Tensor:
        """t-hat of Eq. 1. (B, m) -> (B, m, D). LayerNorm and dropout before the type: release."""
        c, e, m = self.config, self.text_embeddings, text_ids.shape[1]
        if m > c.max_text_len:
            raise ValueError(f"{m} text tokens, positions for {c.max_text_len}: see --max_text_len")
        text = e["word_embeddings"](text_ids) + e["position_embeddings"].weight[:m]
        text = self.drop(e["LayerNorm"](text))                     # (B, m, D)
        return text if self.type_embeddings is None else text + self.type_embeddings[0]

    def embed_video(self, video: Tensor) -> Tensor:
        """v-hat of Eq. 1. (B, S, 3, H, W) -> (B, S, 1+n, D)."""
        c, (B, S), size = self.config, video.shape[:2], self.config.image_size
        if video.shape[2:] != (3, size, size) or self.temporal_embed is not None and S > c.frames:
            raise ValueError(f"video is {tuple(video.shape)}, the model was built for (B, S, 3, "
                             f"{size}, {size}), S up to --frames {c.frames}; (B, 3, S, H, W) needs "
                             ".transpose(1, 2), a single image [:, None]")
        if video.dtype == torch.uint8:
            video = (video / 255 - self.mean) / self.std
        patches = self.patch_embed["proj"](video.flatten(0, 1))    # (B*S, D, H/P, W/P)
        patches = patches.flatten(2).transpose(1, 2).to(self.cls_token.dtype)       # (B*S, n, D)
        cls = torch.cat([self.cls_token, self.dist_token], 1) if c.distilled else self.cls_token
        if self.pos_embed is not None:
            cls = cls + self.pos_embed[:, :self.specials]
            patches = patches + self.pos_embed[:, self.specials:]
        if c.patch_order == "random":
            order = torch.rand(patches.shape[:2], device=patches.device).argsort(1)  # (B*S, n)
            patches = patches.gather(1, order[:, :, None].expand_as(patches))
        if self.temporal_embed is not None:                        # on patches, not on cls: release
            times = self.temporal_embed[0, :S] * float(S > 1)      # 0 for an image, not none: DDP
            patches = patches + times.repeat(B, 1)[:, None]
        tokens = torch.cat([cls.expand(B * S, -1, -1), patches], 1)
        tokens = self.drop(tokens).unflatten(0, (B, S))            # (B, S, 1+n, D)
        return tokens if self.type_embeddings is None else tokens + self.type_embeddings[1]

    def transform(self, video: Tensor, text: Tensor, text_mask: Tensor | None = None):
        """Eq. 2, d = 1..L, then the final LayerNorm. Each frame has its own copy of the text.

        video: (B, S, 1+n, D) in and out. text: (B, m, D) in, (B, S, m, D) out; "flatten" has one
        copy, S = 1. Either may be without tokens.
        """
        c, m, shape, mask = self.config, text.shape[1], video.shape, None
        if c.temporal == "flatten":
            video = video.flatten(1, 2)[:, None]                   # (B, 1, S(1+n), D)
        B, S, count = video.shape[:3]
        z = torch.cat([text[:, None].expand(-1, S, -1, -1), video], 2)      # z^0 = [t-hat; v-hat]
        z = z.flatten(0, 1)                                        # (B*S, m+1+n, D)
        if text_mask is not None:                                  # every video token is visible
            mask = text_mask.bool().repeat_interleave(S, 0)        # (B*S, m)
            mask = F.pad(mask, (0, count), value=True)[:, None, None]
        rolls = S > 1 and (m > 0 or c.roll_unimodal)
        # DeiT's second token stays like cls; the release rolls it with the patches
        first = m + (1 if c.roll == "release" else self.specials)
        for d, block in enumerate(self.blocks, start=1):
            if self.factorized:
                z = self.factorized[d - 1](z, S, m, mask)
            elif rolls and d >= c.roll_start and c.temporal == "token_rolling":
                z = token_rolling(z, S, c.roll_ratio, first=first, roll=c.roll,      # TTR(z^{d-1})
                                  select=c.roll_select, layer=d)
            elif rolls and d >= c.roll_start and c.temporal == "channel_shift":
                z = torch.cat([z[:, :m], channel_shift(z[:, m:], S)], 1)
            if self.recompute and self.training:
                z = checkpoint(block, z, mask, use_reentrant=False)
            else:
                z = block(z, mask)                                 # z^d = MLP(MSA(z^{d-1}))
        z = self.norm(z).unflatten(0, (B, S))                      # (B, S, m+1+n, D)
        return z[:, :, m:].reshape(shape), z[:, :, :m]

    def forward(self, video: Tensor, text_ids: Tensor, text_mask: Tensor | None = None) -> Features:
        """Joint pass (Sec. 3.1). Shapes as in the class."""
        return self.fuse(self.embed_video(video), self.embed_text(text_ids), text_mask)

    def fuse(self, video: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Features:
        """Joint pass over embeddings (Sec. 3.1): video (B, S, 1+n, D), text (B, m, D)."""
        frames, texts = self.transform(video, text, text_mask)
        text = texts.mean(1)                                       # p = 1/S sum_i z_i^L
        return Features(text, frames.mean(1), torch.tanh(self.pooler(text[:, 0])), frames)

    def encode_video(self, video: Tensor) -> Tensor:
        """Video-only pass (Sec. 3.3 VTC). (B, S, 3, H, W) -> (B, 1+n, D); [:, 0] is cls."""
        video = self.embed_video(video)
        return self.transform(video, text=video[:, 0, :0])[0].mean(1)

    def encode_text(self, text_ids: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Text-only pass (Sec. 3.3 VTC). (B, m) -> (B, m, D); [:, 0] is cls. Nothing to roll."""
        text = self.embed_text(text_ids)
        return self.transform(text[:, None, :0], text, text_mask)[1].mean(1)


# ---- The block (Eq. 2; ViT's, pre-norm with residuals, which it leaves out), heads (Sec. 3.3) ----

class Attention(nn.Module):
    """MSA of Eq. 2. x: (R, T, D) in and out; mask: bool, (R, 1, 1, T), False hides a key."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = F.scaled_dot_product_attention(*self.split(x), attn_mask=mask)
        return self.drop(self.proj(x.transpose(1, 2).flatten(2)))  # (R, T, D)

    def split(self, x: Tensor) -> Tensor:
        """Queries, keys and values: (3, R, heads, T, D/heads)."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What each token (row) spends on each (column), heads averaged: (R, T, T). For Fig. 4."""
        q, k, _ = self.split(x).float()
        one = torch.eye(x.shape[1], device=x.device).expand(*q.shape[:2], -1, -1)
        return F.scaled_dot_product_attention(q, k, one, attn_mask=mask).mean(1)


class Block(nn.Module):
    """z^d = MLP(MSA(z^{d-1})) of Eq. 2. x: (R, T, D) in and out; mask as in Attention."""

    def __init__(self, width: int, heads: int, dropout: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)                 # ViT's epsilon
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(                      # D -> 4D -> D
            fc1=nn.Linear(width, 4 * width), gelu=nn.GELU(), drop1=nn.Dropout(dropout),
            fc2=nn.Linear(4 * width, width), drop2=nn.Dropout(dropout)))
        self.drop_path = drop_path

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_rows(self.attn(self.norm1(x), mask))
        return x + self.drop_rows(self.mlp(self.norm2(x)))

    def drop_rows(self, x: Tensor) -> Tensor:
        """Stochastic depth: a row (one frame, not one clip; release) skips the branch."""
        return x * F.dropout(x.new_ones(len(x), 1, 1), self.drop_path, self.training)


class ExactLinear(nn.Linear):
    """A head (Sec. 3.3) that autocast leaves in float32: in bf16 some of 1000 candidates tie."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def answer_head(kind: str, width: int, answers: int) -> nn.Sequential:
    """Classes from a cls token, (..., D) -> (..., answers): open-ended QA (Sec. 4.2.1), probe."""
    if kind == "linear":                                           # Tab. 12
        return nn.Sequential(ExactLinear(width, answers))
    if kind == "paper":                    # "a two-layer MLP with hidden size 768"; GELU is ours
        return nn.Sequential(ExactLinear(width, 768), nn.GELU(), ExactLinear(768, answers))
    half = width // 2
    return nn.Sequential(nn.Dropout(0.5), ExactLinear(width, half), nn.LayerNorm(half), nn.GELU(),
                         ExactLinear(half, answers))


# ---- Temporal modelling without parameters (Sec. 3.2, Tab. 8a) ----------------------------------

def token_rolling(tokens: Tensor, frames: int, ratio: float = 0.25, *, first: int = 1,
                  roll: str = "paper", select: Select = "block", layer: int = 1) -> Tensor:
    """TTR of Eq. 2, Fig. 2b: some patches move to the next frame, the last frame's to the first.

    tokens: (B*S, first + n, D) in and out; the `first` leading tokens (text, cls) never move.
    ratio: share of the n patches that move, round(ratio * n) of them; Tab. 8b is best at 0.25.
    roll: "paper" moves them one frame forward (Sec. 3.2, "roll parts of the token by 1").
        "release" moves floor(ratio/2 * n) leading ones forward and as many trailing ones backward.
    select: which move (App. C.2, Tab. 11b): one "block" (the paper does not say which; here the
        frame's top rows), "random" ones drawn on each call, a block "varying" with layer = 1..L.
    A permutation without parameters. ValueError if the rows are not whole clips.
    """
    if len(tokens) % frames:
        raise ValueError(f"{len(tokens)} rows are not whole clips of {frames} adjacent frames")
    n = tokens.shape[1] - first
    k = int(ratio / 2 * n) if roll == "release" else round(ratio * n)
    moves = [(slice(first, first + k), +1)]
    if roll == "release":
        moves += [(slice(first + n - k, first + n), -1)]
    elif select == "random":
        moves = [(first + torch.randperm(n, device=tokens.device)[:k], +1)]
    elif select == "varying":
        moves = [(first + ((layer - 1) * k + torch.arange(k, device=tokens.device)) % n, +1)]
    clips = tokens.unflatten(0, (-1, frames))                      # (B, S, first+n, D)
    rolled = clips.clone()
    for slots, step in moves:
        rolled[:, :, slots] = clips[:, :, slots].roll(step, dims=1)
    return rolled.flatten(0, 1)                                    # (B*S, first+n, D)


def channel_shift(tokens: Tensor, frames: int) -> Tensor:
    """Channel Shift of Tab. 8a [23]: an eighth of D from the next frame, one from the frame before.

    tokens: (B*S, 1+n, D), video only, in and out. Zeros fill the ends, and cls shifts too: release.
    """
    D, clips = tokens.shape[-1], tokens.unflatten(0, (-1, frames))
    after, before, rest = clips.split((D // 8, D // 8, D - 2 * (D // 8)), -1)
    after = F.pad(after[:, 1:], (0, 0, 0, 0, 0, 1))                # (B, S, 1+n, D/8)
    before = F.pad(before[:, :-1], (0, 0, 0, 0, 1, 0))
    return torch.cat([after, before, rest], -1).flatten(0, 1)      # (B*S, 1+n, D)


# ---- Objectives (Sec. 3.3): pure functions, each computed in float32 -----------------------------

def vtm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Video-text matching: mean over logits (B, 2) of vtm_head and labels (B,), 1: matched."""
    return F.cross_entropy(logits.float(), labels)


def mlm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Masked language modelling, *summed* over words: logits (M, |V|), labels (M,), -100: none."""
    return F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")


def vtc_loss(text: Tensor, video: Tensor, temperature: float = 0.05) -> Tensor:
    """Video-text contrast, both ways. text, video: (B, vtc_dim) projected; row i of both a pair."""
    with torch.autocast(text.device.type, enabled=False):          # or @ would be in half precision
        text, video = F.normalize(text.float(), dim=-1), F.normalize(video.float(), dim=-1)
        logits = text @ video.T / temperature                      # (B, B)
    pairs = torch.arange(len(logits), device=logits.device)        # sum of both ways, 0.05: release
    return F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)


# ==== Not in the main text ========================================================================

class FactorizedAttention(nn.Module):
    """What "timesformer" and "decoupled" add before each block's joint attention (Tab. 9, Fig. 8).

    timesformer: attention over time, then over space, each closed by a Linear (180.8 M for B; the
    paper's 180.5). decoupled: text attends to text, video over time and space (195.0 M; 192).
    App. B.1 says no more. Both start as a no-op, so that ImageNet weights fit at first.
    z: (B*S, m+1+n, D) in and out, either part may be absent; mask as in Attention.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.specials = 2 if config.distilled else 1
        D, decoupled = config.width, config.temporal == "decoupled"

        def branch() -> nn.ModuleDict:
            parts = nn.ModuleDict(dict(
                norm=nn.LayerNorm(D, eps=1e-6), attn=Attention(D, config.heads, config.dropout),
                last=nn.Identity() if decoupled else nn.Linear(D, D)))
            for p in list(parts.parameters())[-2:]:                # of the Linear that closes it
                nn.init.zeros_(p)
            return parts

        self.time, self.space = branch(), branch()
        self.text = branch() if decoupled else None

    def forward(self, z: Tensor, S: int, m: int, mask: Tensor | None) -> Tensor:
        def add(branch, x, mask=None):
            return x + branch["last"](branch["attn"](branch["norm"](x), mask))

        text, cls, patches = z.tensor_split((m, m + self.specials), 1)
        if m and self.text is not None:
            text = add(self.text, text, None if mask is None else mask[..., :m])
        if n := patches.shape[1]:
            tubes = patches.unflatten(0, (-1, S)).transpose(1, 2).flatten(0, 1)      # (B*n, S, D)
            tubes = add(self.time, tubes)
            patches = tubes.unflatten(0, (-1, n)).transpose(1, 2).flatten(0, 1)      # (B*S, n, D)
            video = add(self.space, torch.cat([cls, patches], 1))                    # (B*S, 1+n, D)
            text = torch.cat([text, video], 1)
        return text


def word_patch_transport(text: Tensor, patches: Tensor, text_mask: Tensor) -> tuple:
    """Optimal transport of words to patches (Sec. 4.6; IPOT [39]): the release's, and Fig. 6, 11.

    text: (B, m, D), patches: (B, n, D), without cls tokens; text_mask: (B, m) bool, as the text's.
    Returns the distance, (B,), and the plan, (B, m, n), which gets no gradient and sums to 1:
    [CLS], the last real token ([SEP]) and padding take no part.
    """
    words = text_mask.clone()
    words[:, 0] = False
    words.scatter_(1, text_mask.sum(1, keepdim=True) - 1, False)   # (B, m), without [SEP]
    with torch.autocast(text.device.type, enabled=False):
        text, patches = (F.normalize(x.float(), dim=-1, eps=1e-5) for x in (text, patches))
        cost = (1 - text @ patches.mT) * words[:, :, None]         # (B, m, n)
        with torch.no_grad():
            n, m = patches.shape[1], words.sum(1, keepdim=True).clamp(min=1)
            kernel = torch.exp(-cost.mT / 0.5) * words[:, None]   # (B, n, m)
            plan, sigma = torch.ones_like(kernel), words / m       # (B, n, m), (B, m)
            for _ in range(50):
                plan = kernel * plan
                delta = 1 / (n * (plan @ sigma[:, :, None])).clamp(min=1e-12)        # (B, n, 1)
                sigma = words / (m * (plan * delta).sum(1)).clamp(min=1e-12)         # (B, m)
                plan = delta * plan * sigma[:, None]
        return (cost * plan.mT).sum((1, 2)), plan.mT


def word_patch_alignment_loss(distance: Tensor, labels: Tensor) -> Tensor:
    """Release's fourth term (weight 0.1): near for matched clips, far for others. (B,), (B,)."""
    return (distance * (2 * labels - 1)).sum() / len(labels)


# ---- Weights of ViT, DeiT (Tab. 6) and the release (Tab. 1) --------------------------------------

class Inert(dict):
    """Stands for foreign classes and functions in a file (Tab. 1, 6): takes all, does nothing."""

    def __init__(self, *_, **__):
        super().__init__()

    def __call__(self, *_, **__):
        return Inert()

    __setstate__ = append = extend = add = __call__
    __hash__ = object.__hash__


class SafePickle:
    """Stands for `pickle` in torch.load (Tab. 1, 6): rebuilds tensors and calls nothing else."""

    TENSORS = {("collections", "OrderedDict"), ("torch", "Size"),
               ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            storage = module in ("torch", "torch.storage") and name.endswith("Storage")
            known = storage or (module, name) in SafePickle.TENSORS
            return super().find_class(module, name) if known else Inert

    @staticmethod
    def load(file, **how):
        return SafePickle.Unpickler(file, **how).load()


def read_weights(path) -> dict:
    """A file of torch.save (Tab. 1, 6) as tensors and plain types; nothing in it is executed.

    ValueError for a file that is no dictionary of weights, or whose checksums are wrong.
    """
    try:
        if zipfile.is_zipfile(path):                               # torch.load checks no checksum
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of its part {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=SafePickle)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:             # whatever a damaged or foreign file makes torch raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: not a file of weights, or damaged ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


def load_weights(model: AllInOne, weights: dict, source) -> dict[str, list[str]]:
    """Copies tensors of the model's own names into it, positions resized (Tab. 2a: 224 -> 384 px).

    Returns lists of names: "loaded", "resized", "initialised" (the file lacks them) and "ignored"
    (the model lacks them). ValueError naming a tensor of another shape.
    """
    own, rows = model.state_dict(), ("temporal_embed", "text_embeddings.position_embeddings.weight")
    fitted = {name: weights[name] for name in own if name in weights}
    resized = [name for name in fitted if fitted[name].shape != own[name].shape]
    for name in resized:
        table, like = fitted[name], own[name]
        if name == "pos_embed":            # (1, specials+n, D): the grid is interpolated as in timm
            side, new_side = math.isqrt(table.shape[1]), math.isqrt(like.shape[1])
            specials, grid = table.tensor_split([table.shape[1] - side * side], 1)
            grid = grid.mT.unflatten(-1, (side, side)).float()     # (1, D, H/P, W/P)
            grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic")
            table = torch.cat([specials, grid.flatten(2).mT], 1)
        elif name in rows and table.shape[-1] == like.shape[-1]:   # rows that the file lacks stay
            table = torch.cat([table[..., :like.shape[-2], :], like[..., table.shape[-2]:, :]], -2)
        if table.shape != like.shape:
            raise ValueError(f"{source}: {name} is {tuple(fitted[name].shape)}, here "
                             f"{tuple(like.shape)}: another variant; compare --variant and sizes")
        fitted[name] = table
    model.load_state_dict(fitted, strict=False)
    return {"loaded": [name for name in fitted if name not in resized], "resized": resized,
            "initialised": [name for name in own if name not in weights],
            "ignored": [name for name in weights if name not in own]}


def load_vit(model: AllInOne, path, content: dict | None = None) -> dict[str, list[str]]:
    """Backbone from a timm or DeiT file (Sec. 3.1, Tab. 6); the rest keeps its random weights.

    content: read_weights(path), if at hand. Returns the report of load_weights.
    ValueError for unknown, missing or misfit tensors.
    """
    weights, own = content or read_weights(path), model.state_dict()
    weights = weights.get("model", weights)                        # DeiT wraps them
    unused = ("head.", "head_dist.", "pre_logits.", "pos_embed")   # classifier; Tab. 10, no SPE
    backbone = ("cls_token", "dist_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
    unknown = [name for name in weights if name not in own and not name.startswith(unused)]
    missing = [name for name in own if name not in weights and name.startswith(backbone)]
    if unknown or missing:
        raise ValueError(f"{path}: not the backbone of this model: {len(unknown)} unknown tensors, "
                         f"{len(missing)} missing ({', '.join((unknown + missing)[:3])}); expected "
                         "vit_* or deit_* weights of timm (with a dist_token: add --distilled)")
    return load_weights(model, weights, path)


RENAMED = {  # prefixes of the release's names -> ours; the rest is timm's and BERT's on both sides
    "module.": "", "transformer.": "", "itm_score.fc.": "vtm_head.", "vtm_score.fc.": "vtm_head.",
    "pooler.dense.": "pooler.", "txt_proj.": "text_proj.", "vid_proj.": "video_proj.",
    "mlm_score.transform.": "mlm_head.", "mlm_score.decoder.": "mlm_head.decoder.",
    "mlm_score.bias": "mlm_head.decoder.bias", "token_type_embeddings.weight": "type_embeddings"}


def load_release(path, heads: int | None = None, content: dict | None = None, **overrides):
    """The authors' .ckpt (Tab. 1: Ti, S, B; plus) -> (AllInOne, report of load_weights).

    heads: not in such a file; None: width / 64. content: read_weights(path), if at hand.
    overrides: fields of Config other than those weights were trained with (frames, ...); their
    shuffled patches, patch_order="random", are one. ValueError for a file of something else.
    """
    content, weights = content or read_weights(path), {}
    for name, tensor in content.get("state_dict", content).items():
        for theirs, ours in RENAMED.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        weights[name] = tensor
    words, places = (f"text_embeddings.{kind}_embeddings.weight" for kind in ("word", "position"))
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", words, places)
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(f"{path}: not a released All-in-one checkpoint, which has {missing[0]}; "
                         "for ViT or DeiT weights use load_vit (--init)")
    # row 0 of BERT's types is added to every token: one table says both
    bert_type = weights.pop("text_embeddings.token_type_embeddings.weight", torch.zeros(1, 1))
    weights[places] = weights[places] + bert_type[0]
    distilled = "dist_token" in weights            # All-in-one-S: never used its temporal positions
    times = None if distilled else weights.get("temporal_embed")
    width, side = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
    grid = round((weights["pos_embed"].shape[1] - 1 - distilled) ** 0.5)
    fields = dict(
        width=width, heads=heads or max(1, width // 64), patch_size=side, image_size=grid * side,
        depth=sum(name.endswith("attn.qkv.weight") for name in weights),
        vocab_size=len(weights[words]), max_text_len=len(weights[places]), distilled=distilled,
        frames=Config.frames if times is None else times.shape[1], roll="release",
        temporal_position=times is not None, roll_unimodal=False)
    model = AllInOne(Config(**fields | overrides))
    return model, load_weights(model, weights, path)
