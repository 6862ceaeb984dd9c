# SPDX-License-Identifier: MIT
"""All in One: one transformer for raw video patches and words (CVPR 2023), in one file.

The file needs torch and the standard library only. To install it, copy it.

    import torch
    from allinone import (AllInOne, Config, Vocabulary, compute_losses, match_logits,
                          pretraining_batch)

    model = AllInOne(Config())                       # All-in-one-B of Tab. 1 with random weights
    video = torch.randint(256, (2, 3, 3, 224, 224), dtype=torch.uint8)      # 2 clips of 3 frames
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "runs"]    # a toy's
    text_ids = torch.tensor([[2, 5, 6, 7, 3],        # [CLS] a dog runs [SEP]
                             [2, 5, 7, 3, 0]])       # [CLS] a runs [SEP] [PAD]
    text_mask = text_ids != 0                        # False at padding

    model.eval()                                     # does each text match its clip?
    with torch.no_grad():
        logits = match_logits(model, video, text_ids, text_mask)
    print(logits.softmax(1)[:, 1])                   # two probabilities

    model.train()                                    # one step of pre-training (Sec. 3.3)
    vocabulary = Vocabulary({token: i for i, token in enumerate(tokens)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-2)
    batch = pretraining_batch(video, text_ids, text_mask, vocabulary)
    losses = compute_losses(model, batch, ["vtm", "mlm"])
    sum(loss.mean for loss in losses.values()).backward()
    optimizer.step()

The file follows the paper: sizes (Tab. 1), embeddings (Eq. 1), blocks (Eq. 2), Token Rolling
(Sec. 3.2), objectives (Sec. 3.3), scores of the downstream tasks (Sec. 4.2). Then a line says that
the paper's method ends, and variants of its ablations and the loading of weights follow.

Notation. The paper uses P for two things and V for two, so the letters are ours.
    B clips                S frames of a clip        m tokens of a text
    P side of a patch      n = HW / P^2 patches of a frame
    D width                L blocks; block d, or layer d, is the d-th of them
    |V| tokens of the vocabulary      M masked words      O candidates of a clip (Sec. 4.2)
    E width of VTC's space (Sec. 3.3)      W processes
The transformer's rows are frames: row b*S + s holds frame s of clip b, and a copy of its text.

    row 0   text cls, m-1 text tokens | video cls | n patches of frame 1 of clip 1
    row 1   text cls, m-1 text tokens | video cls | n patches of frame 2 of clip 1      ...

The shapes below write the length of a row as m+1+n. DeiT's distilled models have a second token
beside the video cls: m+2+n.

"Release" names the authors' code. It decides where the paper is silent and, in the few places that
say "like the release", against the paper (README lists them). "Ours" marks what neither decides.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_type_hints

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ---- Sizes (Tab. 1) ------------------------------------------------------------------------------

VARIANTS = {
    "nano": dict(width=64, depth=4, heads=2, init_std=0.1),    # ours, to train on two CPU cores
    "Ti": dict(width=192, depth=12, heads=3),                  # Tab. 1
    "S": dict(width=384, depth=12, heads=6),                   # Tab. 1
    "B": dict(width=768, depth=12, heads=12),                  # Tab. 1
    "L": dict(width=1024, depth=24, heads=16),                 # named in App. A; sizes of ViT-L
}

Temporal = Literal["token_rolling", "time_average", "channel_shift", "flatten",     # Tab. 8a
                   "timesformer", "decoupled"]                                      # Tab. 9
Select = Literal["block", "random", "varying"]                                      # Tab. 11b


@dataclass(frozen=True)
class Config:
    """The sizes and choices of a model. The defaults are All-in-one-B (Tab. 1).

    ValueError for a value that does not exist, or for values that do not fit each other.
    """

    frames: int = 3                  # S, how many frames of a clip are read (Sec. 4.1.1, Fig. 9)
    image_size: int = 224            # height and width of a frame in pixels (Sec. 4.1.1, Tab. 2a)
    width: int = 768                 # D, the length of a token's vector (Tab. 1)
    depth: int = 12                  # L, how many blocks there are (Tab. 1)
    heads: int = 12                  # how many attention heads a block has (Tab. 1)
    patch_size: int = 16             # P, the side of a patch in pixels (Sec. 4.1.1)
    vocab_size: int = 30522          # |V|, the tokens of bert-base-uncased (Sec. 4.1.1)
    max_text_len: int = 40           # the largest m (release; 80 for DiDeMo)
    temporal: Temporal = "token_rolling"  # how frames exchange information (Tab. 8a, Tab. 9)
    roll: Literal["paper", "release"] = "paper"  # forward (Sec. 3.2), or half of them back
    roll_ratio: float = 0.25         # the share of a frame's patches that roll (Tab. 8b)
    roll_start: int = 1              # the first layer that mixes frames, from 1 (Tab. 11a)
    roll_select: Select = "block"    # which of a frame's patches roll (Tab. 11b)
    roll_unimodal: bool = True       # rolls in passes of video alone too (Eq. 2; release: never)
    spatial_position: bool = True    # adds the position of a patch in its frame (Tab. 10, SPE)
    temporal_position: bool = True   # adds the position of a frame in its clip (Tab. 10, SPE)
    modality_type: bool = True       # adds t^type to text and v^type to video (Tab. 10, MTE)
    patch_order: Literal["raster", "random"] = "raster"  # random shuffles each frame (release)
    distilled: bool = False          # has DeiT's distillation token beside cls (release: S)
    vtc_dim: int = 512               # E, the width of the shared space of VTC (release)
    answers: int = 0                 # how many classes the answer head has; 0: no such head
    answer_head: Literal["paper", "release", "linear"] = "paper"  # the kind of head for answers
    dropout: float = 0.1             # the share of values that dropout sets to zero (release)
    drop_path: float = 0.1           # how often a frame skips a branch of the last block (release)
    init_std: float = 0.02           # the standard deviation of random weights (ViT, BERT)

    def __post_init__(self):
        for field, hint in get_type_hints(Config).items():
            value = getattr(self, field)
            choices = get_args(hint)
            if choices and value not in choices:
                raise ValueError(f"{field} is {value!r}; it can be {' or '.join(choices)}")
            smallest = 0 if field == "answers" else 1
            if hint is int and value < smallest:
                raise ValueError(f"{field} is {value!r}; it must be {smallest} or more")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}: each head "
                             "takes an equal part of the width")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size "
                             f"{self.patch_size}: a frame is cut into whole patches")
        if not 0 <= self.roll_ratio <= 1:
            raise ValueError(f"roll_ratio is {self.roll_ratio}; it is a share, from 0 to 1")
        if self.roll == "release" and self.roll_select != "block":
            raise ValueError(f"roll_select is {self.roll_select!r}, but 'release' rolls blocks "
                             "alone; use roll 'paper'")

    @property
    def patches(self) -> int:
        """n: 196 patches in a frame of 224 pixels (Sec. 4.1.1)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_special(self) -> int:
        """Tokens before the patches: the video cls (Eq. 1) and, in distilled models, DeiT's."""
        return 2 if self.distilled else 1


# ---- The All-in-one Transformer (Sec. 3.1, Fig. 2) -----------------------------------------------

IMAGE_MEAN = (0.485, 0.456, 0.406)       # of ImageNet's red, green, blue in [0, 1]; release
IMAGE_STD = (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """What a joint pass returns, after the final LayerNorm (Sec. 3.1)."""

    text: Tensor    # (B, m, D)       text tokens, averaged over frames (the consensus p), for MLM
    video: Tensor   # (B, 1+n, D)     video cls and patches, averaged over frames
    pooled: Tensor  # (B, D)          tanh(Linear(text cls)), for VTM; the pooler is the release's
    frames: Tensor  # (B, S, 1+n, D)  video cls and patches of each frame, before the consensus


class AllInOne(nn.Module):
    """The All-in-one Transformer (Fig. 2): video and text go through the same L blocks.

    There are three passes: `forward` sees video and text together; `encode_video` and `encode_text`
    see one of them (Sec. 3.3, VTC). Heads are attributes; the functions of Sec. 3.3 below use them.
    Weights have the names of timm's ViT and of BERT.

    video: (B, S, 3, H, W), uint8 RGB from 0 to 255, or floats that are already normalised by
        IMAGE_MEAN and IMAGE_STD. An image is a clip of S = 1. With temporal positions S is at most
        config.frames. (If the axes are (B, 3, S, H, W) by mistake, a clip of 3 frames has the same
        shape, and nobody can notice.)
    text_ids: (B, m) integers, [CLS] first.
    text_mask: (B, m) bool, or integers of which 0 is padding; None: there is no padding.
    ValueError or TypeError for other shapes and types.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = config
        D = c.width
        std = c.init_std
        self.config = c
        self.num_special = c.num_special                 # tokens before a frame's patches
        self.activation_checkpointing = False            # compute blocks again in the backward pass

        # Eq. 1, text: T, T^pos, and BERT's LayerNorm. The names are BERT's, so that weights fit.
        self.text_embeddings = nn.ModuleDict({
            "word_embeddings": initialised(nn.Embedding(c.vocab_size, D), std),
            "position_embeddings": initialised(nn.Embedding(c.max_text_len, D), std),
            "LayerNorm": nn.LayerNorm(D, eps=1e-12)})
        # Eq. 1, video: V and v_class. From here to `norm` the names are those of timm's ViT.
        patches = nn.Conv2d(3, D, kernel_size=c.patch_size, stride=c.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": initialised(patches, std)})
        self.cls_token = random_table(std, 1, 1, D)
        self.dist_token = random_table(std, 1, 1, D) if c.distilled else None
        # V^pos is one table of S*n + 1 rows in Eq. 1. Like the release we add two tables: a spatial
        # one, which ImageNet's weights fill, and a temporal one of S rows, which starts at zero.
        self.pos_embed = None
        if c.spatial_position:
            self.pos_embed = random_table(std, 1, self.num_special + c.patches, D)
        self.temporal_embed = None
        if c.temporal_position and c.frames > 1:
            self.temporal_embed = nn.Parameter(torch.zeros(1, c.frames, D))
        # t^type is row 0 and v^type is row 1.
        self.type_embeddings = random_table(std, 2, D) if c.modality_type else None
        self.drop = nn.Dropout(c.dropout)

        # Eq. 2.
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(1, c.depth + 1))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.factorized = nn.ModuleList()                # Tab. 9, see FactorizedAttention
        if c.temporal in ("timesformer", "decoupled"):
            self.factorized.extend(FactorizedAttention(c) for _ in self.blocks)

        # The heads of Sec. 3.3 and of Sec. 4.2.1.
        self.pooler = initialised(Float32Linear(D, D), std)        # release
        self.vtm_head = initialised(Float32Linear(D, 2), std)      # logit 1: they match
        # BERT's head. Its last layer is not tied to the word embeddings (release). Give it the
        # masked tokens alone: logits of all tokens would take gigabytes.
        self.mlm_head = nn.Sequential(OrderedDict(
            dense=initialised(nn.Linear(D, D), std),
            gelu=nn.GELU(),
            LayerNorm=nn.LayerNorm(D, eps=1e-12),
            decoder=initialised(nn.Linear(D, c.vocab_size), std)))
        self.text_proj = initialised(Float32Linear(D, c.vtc_dim), std)
        self.video_proj = initialised(Float32Linear(D, c.vtc_dim), std)
        if c.answers:
            self.answer_head = make_answer_head(c)

    # ---- Eq. 1: embeddings

    def embed_text(self, text_ids: Tensor) -> Tensor:
        """t-hat of Eq. 1: words, positions and type. (B, m) -> (B, m, D).

        The paper's t_class is the word embedding of [CLS], which opens every text. BERT's LayerNorm
        and dropout come before the type is added (release).
        """
        self.check_text(text_ids)
        table = self.text_embeddings
        m = text_ids.shape[1]
        text = table["word_embeddings"](text_ids)                  # (B, m, D)
        text = text + table["position_embeddings"].weight[:m]
        text = self.drop(table["LayerNorm"](text))
        if self.type_embeddings is not None:
            text = text + self.type_embeddings[0]                  # t^type
        return text                                                # (B, m, D)

    def embed_video(self, video: Tensor) -> Tensor:
        """v-hat of Eq. 1: patches, positions and type. (B, S, 3, H, W) -> (B, S, 1+n, D)."""
        self.check_video(video)
        B, S = video.shape[:2]
        weight_dtype = self.cls_token.dtype
        if video.dtype == torch.uint8:
            video = normalise(video).to(weight_dtype)
        images = video.flatten(0, 1)                               # (B*S, 3, H, W)
        patches = self.patch_embed["proj"](images)                 # (B*S, D, H/P, W/P)
        patches = patches.flatten(2).transpose(1, 2)               # (B*S, n, D)
        patches = patches.to(weight_dtype)                         # autocast made it half precision
        special = self.cls_token                                   # (1, 1, D)
        if self.dist_token is not None:
            special = torch.cat([special, self.dist_token], 1)     # (1, 2, D)
        if self.pos_embed is not None:
            special = special + self.pos_embed[:, :self.num_special]
            patches = patches + self.pos_embed[:, self.num_special:]
        if self.config.patch_order == "random":
            order = torch.rand(patches.shape[:2], device=patches.device).argsort(1)  # (B*S, n)
            patches = patches.gather(1, order[:, :, None].expand_as(patches))
        if self.temporal_embed is not None:
            # On patches and not on cls (release). For images (S = 1) the table is multiplied by 0
            # rather than left out: DistributedDataParallel waits for its gradient.
            times = self.temporal_embed[0, :S] * float(S > 1)      # (S, D)
            patches = patches + times.repeat(B, 1)[:, None]
        special = special.expand(B * S, -1, -1)
        tokens = self.drop(torch.cat([special, patches], 1))       # (B*S, 1+n, D)
        if self.type_embeddings is not None:
            tokens = tokens + self.type_embeddings[1]              # v^type
        return tokens.unflatten(0, (B, S))                         # (B, S, 1+n, D)

    # ---- Eq. 2: blocks

    def mix_frames(self, z: Tensor, frames: int, text_length: int, layer: int,
                   mask: Tensor | None = None) -> Tensor:
        """What frames exchange before block `layer`: TTR of Eq. 2, or a row of Tab. 8a or Tab. 9.

        A new mixing is called here; its name goes to Temporal, and its parameters, if it has some,
        to __init__ (see where "timesformer" stands). eval.py's maps follow it. A pass of the text
        alone comes here too, with T = text_length and frames = 1. Parameters must take part for
        images (frames = 1), multiplied by 0 if need be: DistributedDataParallel waits for a
        gradient of each one. Mind roll_start and roll_unimodal, if they make sense for it.

        z: (B*S, m+1+n, D) in and out. frames: S. text_length: m, 0 in a pass of video alone.
        layer: from 1 to L. mask: as in Attention.
        """
        c = self.config
        if c.temporal in ("timesformer", "decoupled"):
            return self.factorized[layer - 1](z, frames, text_length, mask)
        stays = text_length == 0 and not c.roll_unimodal           # a pass of video alone
        if frames == 1 or layer < c.roll_start or stays:
            return z
        if c.temporal == "token_rolling":
            # DeiT's distillation token stays like the cls. The release rolls it with the patches.
            num_special = 1 if c.roll == "release" else self.num_special
            return token_rolling(z, frames, c.roll_ratio, num_fixed=text_length + num_special,
                                 roll=c.roll, select=c.roll_select, layer=layer)
        if c.temporal == "channel_shift":
            text, video = z[:, :text_length], z[:, text_length:]
            return torch.cat([text, channel_shift(video, frames)], 1)
        return z                                         # "time_average"; "flatten", see transform

    def transform(self, video: Tensor, text: Tensor,
                  text_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Eq. 2 for d = 1 to L, then the final LayerNorm. Each frame has its own copy of the text.

        video: (B, S, 1+n, D) in and out. text: (B, m, D) in, (B, S, m, D) out. One of the two may
        have no tokens. "flatten" (Fig. 3) makes one long row of all frames, with one text: the
        text that it returns has S = 1.
        """
        m = text.shape[1]
        video_shape = video.shape
        if self.config.temporal == "flatten":
            video = video.flatten(1, 2)[:, None]                   # (B, 1, S(1+n), D)
        B, S, video_length = video.shape[:3]
        text = text[:, None].expand(-1, S, -1, -1)                 # (B, S, m, D)
        z = torch.cat([text, video], 2).flatten(0, 1)              # (B*S, m+1+n, D)   z^0
        mask = None
        if text_mask is not None:                                  # every video token is visible
            mask = text_mask.bool().repeat_interleave(S, 0)        # (B*S, m)
            mask = F.pad(mask, (0, video_length), value=True)      # (B*S, m+1+n)
            mask = mask[:, None, None]                             # (B*S, 1, 1, m+1+n)
        for layer, block in enumerate(self.blocks, start=1):
            z = self.mix_frames(z, S, m, layer, mask)              # TTR(z^{d-1})
            if self.activation_checkpointing and self.training:
                z = checkpoint(block, z, mask, use_reentrant=False)
            else:
                z = block(z, mask)                                 # z^d = MLP(MSA(z^{d-1}))
        z = self.norm(z).unflatten(0, (B, S))                      # (B, S, m+1+n, D)
        text, video = z[:, :, :m], z[:, :, m:]
        return video.reshape(video_shape), text

    def fuse(self, video: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Features:
        """Joint pass over embeddings (Sec. 3.1). video: (B, S, 1+n, D), text: (B, m, D).

        The consensus is p = 1/S sum_i z_i^L. Like the release we average after the LayerNorm.
        """
        if text_mask is not None:
            self.check_text_mask(text_mask, text.shape[:2])
        if video.shape[0] != text.shape[0]:
            raise ValueError(f"{video.shape[0]} clips came with {text.shape[0]} texts; expected "
                             "one text for each clip")
        frames, texts = self.transform(video, text, text_mask)     # (B, S, 1+n, D), (B, S, m, D)
        text = texts.mean(1)                                       # (B, m, D)   p
        pooled = torch.tanh(self.pooler(text[:, 0]))               # (B, D)
        return Features(text, frames.mean(1), pooled, frames)

    def forward(self, video: Tensor, text_ids: Tensor, text_mask: Tensor | None = None) -> Features:
        """Joint pass over pixels and words (Sec. 3.1, Fig. 2)."""
        return self.fuse(self.embed_video(video), self.embed_text(text_ids), text_mask)

    def encode_video(self, video: Tensor) -> Tensor:
        """Pass of video alone (Sec. 3.3, VTC). (B, S, 3, H, W) -> (B, 1+n, D); cls is [:, 0]."""
        video = self.embed_video(video)                            # (B, S, 1+n, D)
        no_text = video[:, 0, :0]                                  # (B, 0, D)
        frames, _ = self.transform(video, no_text)
        return frames.mean(1)                                      # (B, 1+n, D)

    def encode_text(self, text_ids: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Pass of text alone (Sec. 3.3, VTC). (B, m) -> (B, m, D); cls is [:, 0]."""
        text = self.embed_text(text_ids)                           # (B, m, D)
        if text_mask is not None:
            self.check_text_mask(text_mask, text.shape[:2])
        no_video = text[:, None, :0]                               # (B, 1, 0, D)
        _, texts = self.transform(no_video, text, text_mask)
        return texts.mean(1)                                       # (B, m, D)

    # ---- What the passes accept (the class's docstring)

    def check_video(self, video: Tensor) -> None:
        """TypeError or ValueError if `video` is not as the class describes it (Sec. 3.1)."""
        size = self.config.image_size
        expected = f"expected (B, S, 3, {size}, {size})"
        if not isinstance(video, Tensor):
            raise TypeError(f"video is a {type(video).__name__}; {expected} as a torch.Tensor "
                            "(torch.from_numpy makes one of a NumPy array)")
        shape = tuple(video.shape)
        if video.dtype != torch.uint8 and not video.is_floating_point():
            raise TypeError(f"video is {video.dtype}; expected pixels from 0 to 255 as uint8 "
                            "(.byte() makes them), or floats that are already normalised")
        if video.ndim != 5 or shape[2:] != (3, size, size):
            raise ValueError(f"video is {shape}; {expected}. Axes (B, 3, S, H, W) need "
                             ".transpose(1, 2), a batch of images needs [:, None], another size "
                             "needs a Config of that image_size")
        if shape[1] == 0:
            raise ValueError(f"video is {shape}: clips without frames; {expected}, S at least 1")
        if self.temporal_embed is not None and shape[1] > self.config.frames:
            raise ValueError(f"video is {shape}: {shape[1]} frames, but the model has temporal "
                             f"positions for {self.config.frames}; build it with frames={shape[1]}")

    def check_text(self, text_ids: Tensor) -> None:
        """TypeError or ValueError if `text_ids` is not as the class describes it (Sec. 3.1)."""
        if not isinstance(text_ids, Tensor):
            raise TypeError(f"text_ids is a {type(text_ids).__name__}; expected (B, m) token ids "
                            "as a torch.Tensor")
        if text_ids.is_floating_point() or text_ids.dtype == torch.bool:
            raise TypeError(f"text_ids is {text_ids.dtype}; expected token ids as int64")
        if text_ids.ndim != 2:
            raise ValueError(f"text_ids is {tuple(text_ids.shape)}; expected (B, m). One text "
                             "needs [None]")
        longest = self.config.max_text_len
        if not 1 <= text_ids.shape[1] <= longest:
            raise ValueError(f"text_ids is {tuple(text_ids.shape)}, but the model has positions "
                             f"for texts of 1 to {longest} tokens; cut the text, or build the "
                             "model with a larger max_text_len")

    def check_text_mask(self, text_mask: Tensor, shape: torch.Size) -> None:
        """TypeError or ValueError if `text_mask` is not as the class describes it (Sec. 3.1)."""
        if not isinstance(text_mask, Tensor) or text_mask.is_floating_point():
            came = getattr(text_mask, "dtype", type(text_mask).__name__)
            raise TypeError(f"text_mask is {came}; expected a bool tensor, False at padding. An "
                            "additive mask of 0 and -inf becomes one by mask == 0")
        if text_mask.shape != shape:
            raise ValueError(f"text_mask is {tuple(text_mask.shape)}, the text {tuple(shape)}; "
                             "expected the same shape (B, m)")


def normalise(video: Tensor) -> Tensor:
    """ImageNet's normalisation (release): uint8 (B, S, 3, H, W) -> float32, mean 0 and deviation 1.

    Mean and deviation are Python's numbers, channel by channel. A tensor of them would need a copy
    to the device in each pass, or a buffer beside the weights.
    """
    channels = [(channel / 255 - mean) / std
                for channel, mean, std in zip(video.unbind(2), IMAGE_MEAN, IMAGE_STD)]
    return torch.stack(channels, 2)                                # (B, S, 3, H, W)


def initialised(layer: nn.Module, std: float) -> nn.Module:
    """Gives a layer the random start of ViT and BERT (Tab. 6, first row), and returns it.

    Layers get it where they are made. Nothing is set again afterwards, so that a layer of yours
    keeps the start that you give it.
    """
    nn.init.trunc_normal_(layer.weight, std=std)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
    return layer


def random_table(std: float, *shape: int) -> nn.Parameter:
    """A parameter of this shape with the same random start (Eq. 1: cls, positions, types)."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=std))


class Attention(nn.Module):
    """MSA of Eq. 2. x: (R, T, D) in and out, R rows of T tokens.

    mask: (R, 1, 1, T) bool, False for tokens that nobody sees; None: all are seen.
    """

    def __init__(self, config: Config):
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.qkv = initialised(nn.Linear(D, 3 * D), config.init_std)
        self.proj = initialised(nn.Linear(D, D), config.init_std)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)     # (R, heads, T, D/heads)
        x = x.transpose(1, 2).flatten(2)                                # (R, T, D)
        return self.drop(self.proj(x))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (R, heads, T, D/heads)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))            # (R, T, 3, heads, D/heads)
        q, k, v = qkv.unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """How much each token (row) attends to each token (column): (R, T, T), for Fig. 4.

        The mean of all heads. With the identity as values, attention returns its weights.
        """
        q, k, _ = self.split(x)
        identity = torch.eye(x.shape[1], device=x.device)
        identity = identity.expand(*q.shape[:2], -1, -1)                # (R, heads, T, T)
        weights = F.scaled_dot_product_attention(q.float(), k.float(), identity, attn_mask=mask)
        return weights.mean(1)                                          # (R, T, T)


class Block(nn.Module):
    """z^d = MLP(MSA(z^{d-1})) of Eq. 2, with ViT's LayerNorms and residuals, which Eq. 2 omits.

    x: (R, T, D) in and out. mask: as in Attention. layer: d, from 1 to L.
    """

    def __init__(self, config: Config, layer: int):
        super().__init__()
        D = config.width
        self.norm1 = nn.LayerNorm(D, eps=1e-6)                          # ViT's epsilon
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=initialised(nn.Linear(D, 4 * D), config.init_std),
            gelu=nn.GELU(),
            drop1=nn.Dropout(config.dropout),
            fc2=initialised(nn.Linear(4 * D, D), config.init_std),
            drop2=nn.Dropout(config.dropout)))
        # from 0 in the first block to config.drop_path in the last one
        self.drop_path = config.drop_path * (layer - 1) / max(1, config.depth - 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_rows(self.attn(self.norm1(x), mask))
        return x + self.drop_rows(self.mlp(self.norm2(x)))

    def drop_rows(self, x: Tensor) -> Tensor:
        """Stochastic depth: some rows skip the branch. A row is one frame, not a clip (release)."""
        if self.drop_path == 0 or not self.training:
            return x
        # 0 for a row that skips; 1 / (1 - drop_path) for the others, so that the mean stays
        factors = F.dropout(x.new_ones(x.shape[0], 1, 1), self.drop_path)
        return x * factors


class Float32Linear(nn.Linear):
    """A head (Sec. 3.3) that autocast leaves in float32, or in TF32 where the program allows that.

    bf16 is so coarse that some of 1,000 candidates would get equal scores.
    """

    def forward(self, x: Tensor) -> Tensor:
        device = "cpu" if x.is_meta else x.device.type         # autocast knows no "meta"
        with torch.autocast(device, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def make_answer_head(config: Config) -> nn.Sequential:
    """Classes from a cls token, (..., D) -> (..., answers), for open-ended QA (Sec. 4.2.1)."""
    D = config.width

    def linear(inputs: int, outputs: int) -> nn.Module:
        return initialised(Float32Linear(inputs, outputs), config.init_std)

    if config.answer_head == "linear":                    # the linear probe of Tab. 12
        return nn.Sequential(linear(D, config.answers))
    if config.answer_head == "paper":                     # "a two-layer MLP with hidden size 768"
        return nn.Sequential(linear(D, 768), nn.GELU(), linear(768, config.answers))  # GELU: ours
    half = D // 2
    return nn.Sequential(nn.Dropout(0.5), linear(D, half), nn.LayerNorm(half), nn.GELU(),
                         linear(half, config.answers))


# ---- Temporal Token Rolling (Sec. 3.2, Fig. 2b), and Channel Shift beside it (Tab. 8a) -----------

def token_rolling(tokens: Tensor, frames: int, ratio: float = 0.25, *, num_fixed: int = 1,
                  roll: str = "paper", select: Select = "block", layer: int = 1) -> Tensor:
    """TTR of Eq. 2, Fig. 2b: some patches move to the next frame, the last frame's to the first.

    It has no parameters: it only permutes tokens. The paper says "roll parts of the token by 1"
    (Sec. 3.2), which can be read in two ways.
        roll="paper": round(ratio * n) patches of each frame move one frame forward.
        roll="release": floor(ratio/2 * n) leading patches move forward, and as many trailing ones
            move backward. The released weights were trained so.
    Which patches move (App. C.2, Tab. 11b):
        select="block": a run of neighbours, the frame's top rows (the paper does not say which).
        select="random": drawn anew in each call, the same ones in all its frames.
        select="varying": the next run in each layer; `layer` counts from 1 to L.

    tokens: (B*S, num_fixed + n, D) in and out; the first num_fixed tokens (text, cls) never move.
    frames: S. ratio: share of the patches; 0.25 is best in Tab. 8b.
    ValueError if the rows are not whole clips.
    """
    if tokens.shape[0] % frames:
        raise ValueError(f"tokens has {tokens.shape[0]} rows, which are not whole clips of "
                         f"{frames} adjacent frames")
    n = tokens.shape[1] - num_fixed
    clips = tokens.unflatten(0, (-1, frames))                      # (B, S, num_fixed + n, D)
    if roll == "release":
        k = int(ratio / 2 * n)
        fixed, forward, still, backward = clips.split((num_fixed, k, n - 2 * k, k), dim=2)
        forward = forward.roll(1, dims=1)
        backward = backward.roll(-1, dims=1)
        return torch.cat([fixed, forward, still, backward], 2).flatten(0, 1)
    k = round(ratio * n)
    if select == "block":
        fixed, rolling, still = clips.split((num_fixed, k, n - k), dim=2)
        rolling = rolling.roll(1, dims=1)
        return torch.cat([fixed, rolling, still], 2).flatten(0, 1)
    if select == "random":
        rank = torch.randperm(n, device=tokens.device)             # k of n have a rank below k
    else:                                # layer 1 rolls the first k patches, layer 2 the next k
        rank = (torch.arange(n, device=tokens.device) - (layer - 1) * k) % n
    rolls = F.pad(rank < k, (num_fixed, 0))                        # (num_fixed + n,) bool
    clips = torch.where(rolls[:, None], clips.roll(1, dims=1), clips)
    return clips.flatten(0, 1)                                     # (B*S, num_fixed + n, D)


def channel_shift(tokens: Tensor, frames: int) -> Tensor:
    """Channel Shift of Tab. 8a [23]: an eighth of D from the next frame, one from the frame before.

    tokens: (B*S, 1+n, D) in and out, video tokens alone. Zeros fill the ends of a clip, and the cls
    tokens shift too (release).
    """
    D = tokens.shape[-1]
    clips = tokens.unflatten(0, (-1, frames))                      # (B, S, 1+n, D)
    after, before, rest = clips.split((D // 8, D // 8, D - 2 * (D // 8)), dim=-1)
    after = F.pad(after[:, 1:], (0, 0, 0, 0, 0, 1))                # (B, S, 1+n, D/8)
    before = F.pad(before[:, :-1], (0, 0, 0, 0, 1, 0))             # (B, S, 1+n, D/8)
    return torch.cat([after, before, rest], -1).flatten(0, 1)      # (B*S, 1+n, D)


# ---- Training objectives (Sec. 3.3) --------------------------------------------------------------
#
# A batch is a dictionary of tensors on one device:
#
#   video          (B, S, 3, H, W)  the clips
#   text_ids       (B, m)           the text of each clip; text_mask (B, m) is False at padding
#   mlm_ids        (B, m)           the same texts with some words masked
#   mlm_positions  (M,)             where words were chosen, as places in the B*m tokens
#   mlm_labels     (M,)             the words that stood there; a negative label is ignored
#   vtm_video      (B,)             the row of the clip that each text is paired with
#   vtm_labels     (B,)             1 if that is the text's own clip, else 0
#
# `pretraining_batch` makes one of clips and texts. An objective needs only its own entries.

# Objective -> the heads that it trains. Those that no objective trains are frozen by train.py.
OBJECTIVES = {
    "vtm": ("pooler", "vtm_head"),
    "mlm": ("mlm_head",),
    "vtc": ("text_proj", "video_proj"),
    "wpa": (),                          # the release's fourth term: see word_patch_alignment_loss
}


class Vocabulary:
    """What masking must know of a vocabulary of BERT's form (Sec. 3.3, MLM).

    tokens: {token: id}, with [PAD], [CLS], [SEP] and [MASK]; '##' begins the pieces that continue a
    word. ValueError if one of the four is missing.
    """

    def __init__(self, tokens: dict[str, int]):
        never_masked = ("[PAD]", "[CLS]", "[SEP]")
        missing = [token for token in (*never_masked, "[MASK]") if token not in tokens]
        if missing:
            raise ValueError(f"the vocabulary lacks {', '.join(missing)}; expected one made for "
                             "BERT")
        size = max(tokens.values()) + 1
        self.mask_id = tokens["[MASK]"]
        self.can_be_masked = torch.ones(size, dtype=torch.bool)            # (|V|,)
        self.is_piece = torch.zeros(size, dtype=torch.bool)                # (|V|,)
        for token in never_masked:
            self.can_be_masked[tokens[token]] = False
        replacements = []                        # neither [specials] nor the free places [unusedN]
        for token, token_id in tokens.items():
            if token.startswith("##"):
                self.is_piece[token_id] = True
            if not (token.startswith("[") and token.endswith("]") and len(token) > 2):
                replacements.append(token_id)
        self.replacements = torch.tensor(sorted(replacements))             # words and pieces


def mask_words(text_ids: Tensor, vocabulary: Vocabulary, whole_words: bool = False,
               share: float = 0.15, generator: torch.Generator | None = None
               ) -> tuple[Tensor, Tensor]:
    """MLM, Sec. 3.3: "we randomly mask text tokens with the probability of 0.15".

    As in BERT [8], of the tokens chosen 80 % become [MASK], 10 % a random word, and 10 % stay.
    [CLS], [SEP] and [PAD] are never chosen. whole_words: the pieces of a word are chosen together
    (release).

    text_ids: (m,) or (B, m). Returns the masked ids and the labels, both of that shape. A label is
    the word that stood there, or -100 where none was chosen.
    """
    device = text_ids.device
    shape = text_ids.shape

    def draw() -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    chance = draw()
    if whole_words:                              # all pieces of the k-th word take the k-th draw
        begins = ~vocabulary.is_piece.to(device)[text_ids]
        word_number = (begins.cumsum(-1) - 1).clamp(min=0)
        chance = chance.gather(-1, word_number)
    chosen = (chance < share) & vocabulary.can_be_masked.to(device)[text_ids]
    labels = torch.where(chosen, text_ids, -100)

    fate = draw()
    pick = torch.randint(len(vocabulary.replacements), shape, generator=generator, device=device)
    random_words = vocabulary.replacements.to(device)[pick]
    becomes_mask = chosen & (fate < 0.8)
    becomes_random = chosen & (fate >= 0.8) & (fate < 0.9)
    masked = torch.where(becomes_mask, vocabulary.mask_id, text_ids)
    masked = torch.where(becomes_random, random_words, masked)
    return masked, labels


def masked_positions(labels: Tensor, pad_to: int = 32) -> tuple[Tensor, Tensor]:
    """Where words were chosen (Sec. 3.3, MLM), so that the MLM head computes those alone.

    labels: (B, m) of mask_words. Returns positions in the flattened B*m and the words there, both
    (M,). M is filled up to a multiple of `pad_to` by position 0 with label -100, so that there are
    few different shapes to compile.
    """
    labels = labels.flatten()                                      # (B*m,)
    positions = (labels >= 0).nonzero()[:, 0]                      # (M,)
    words = labels[positions]
    missing = -len(positions) % pad_to
    if len(positions) == 0:
        missing = pad_to
    return F.pad(positions, (0, missing)), F.pad(words, (0, missing), value=-100)


def vtm_pairs(texts: Sequence[Hashable], clips: Sequence[Hashable],
              generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """VTM, Sec. 3.3: "we randomly replace the paired video with a different video with the
    probability of 0.5".

    The different video is another clip of the batch, of another text too: a clip of the same words
    would match after all. Where there is no such clip, the text keeps its own.

    texts, clips: something hashable for each clip, equal where the texts or the clips are. Returns
    the row of the clip that each text is paired with, and 1 where that is its own, both (B,) int64.
    """
    vtm_video, vtm_labels = [], []
    for i in range(len(texts)):
        replace = torch.rand((), generator=generator) < 0.5
        others = [j for j in range(len(texts)) if texts[j] != texts[i] and clips[j] != clips[i]]
        pick = torch.randint(max(1, len(others)), (), generator=generator)
        if replace and others:
            vtm_video.append(others[pick])
            vtm_labels.append(0)
        else:
            vtm_video.append(i)
            vtm_labels.append(1)
    return torch.tensor(vtm_video), torch.tensor(vtm_labels)


def pretraining_batch(video: Tensor, text_ids: Tensor, text_mask: Tensor, vocabulary: Vocabulary,
                      whole_words: bool = False, generator: torch.Generator | None = None
                      ) -> dict[str, Tensor]:
    """A batch for VTM, MLM and VTC (Sec. 3.3) of B clips and their texts.

    video: (B, S, 3, H, W), text_ids and text_mask: (B, m), all on one device. generator: a
    torch.Generator on the CPU, or None. Mismatches come from the whole batch. (data.py draws them
    among 8 neighbours, so that another cut of a step into batches gives the same pairs.)
    """
    device = text_ids.device
    texts = [tuple(ids) for ids in text_ids.tolist()]
    vtm_video, vtm_labels = vtm_pairs(texts, range(len(texts)), generator)
    mlm_ids, labels = mask_words(text_ids.cpu(), vocabulary, whole_words, generator=generator)
    positions, words = masked_positions(labels)
    return {"video": video, "text_ids": text_ids, "text_mask": text_mask.bool(),
            "mlm_ids": mlm_ids.to(device), "mlm_positions": positions.to(device),
            "mlm_labels": words.to(device),
            "vtm_video": vtm_video.to(device), "vtm_labels": vtm_labels.to(device)}


class Loss(NamedTuple):
    """An objective on a batch (Sec. 3.3): sums over its items, so that batches add up exactly.

    An item is a clip or, of MLM, a masked word. The fields are 0-dimensional tensors.
    """

    total: Tensor             # sum of the items' losses; the gradient comes through this one
    number: Tensor            # how many items count
    correct: Tensor | None    # how many of them the model gets right; None: no such thing

    @property
    def mean(self) -> Tensor:
        return self.total / self.number.clamp(min=1)


class Scores(NamedTuple):
    """Logits of an objective that classifies, and the right classes (Sec. 3.3).

    A row is about a clip, and clips stand in the order of the batch. If an objective has several
    rows for each clip, they stand one after the other. MLM has a row for each masked word instead.
    """

    logits: Tensor    # (K, classes)
    labels: Tensor    # (K,); a negative label does not count


def cross_entropy(logits: Tensor, labels: Tensor) -> Loss:
    """The loss of every objective that classifies, in float32.

    logits: (K, classes), labels: (K,); items with a negative label do not count.
    """
    labels = labels.clamp(min=-1)                                  # -100 too becomes -1
    total = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
    correct = logits.argmax(-1) == labels
    return Loss(total, (labels >= 0).sum(), correct.sum())


def vtm_loss(logits: Tensor, labels: Tensor) -> Loss:
    """Video-Text Matching, Sec. 3.3. logits: (B, 2) of vtm_head, labels: (B,), 1 for a match."""
    return cross_entropy(logits, labels)


def mlm_loss(logits: Tensor, labels: Tensor) -> Loss:
    """Masked Language Modeling, Sec. 3.3. logits: (M, |V|) of mlm_head, labels: (M,) words."""
    return cross_entropy(logits, labels)


def vtc_loss(text: Tensor, video: Tensor, temperature: float = 0.05) -> Loss:
    """Video-Text Contrastive, Sec. 3.3: a text must find its video among all, a video its text.

    text, video: (B, E) projected features; row i of both belongs together. The loss is the sum of
    both directions, and the temperature is fixed (release). `correct` counts the texts whose own
    video is the most similar one.
    """
    with torch.autocast(text.device.type, enabled=False):          # products in float32
        text = F.normalize(text.float(), dim=-1)
        video = F.normalize(video.float(), dim=-1)
        logits = text @ video.T / temperature                      # (B, B)
    own = torch.arange(logits.shape[0], device=logits.device)
    text_to_video = cross_entropy(logits, own)
    video_to_text = cross_entropy(logits.T, own)
    return Loss(text_to_video.total + video_to_text.total, text_to_video.number,
                text_to_video.correct)


def pretraining_scores(model: AllInOne, batch: dict[str, Tensor], objectives: Collection[str]
                       ) -> tuple[dict[str, Scores], Features | None]:
    """What VTM and MLM (Sec. 3.3) answer, as logits beside the right classes.

    Both are joint passes. MLM reads masked texts with their own clips, VTM reads whole texts with
    the clips of vtm_video. They run as one pass of 2B rows over one embedding of the video.

    A new objective that classifies is added here and to OBJECTIVES. Its loss, its accuracy in the
    log, and its accuracy in eval.py follow from its entry. Read pixels from batch["video"] if
    frames change places, because the embedded video carries their positions. Draw by torch.rand,
    which training and eval.py seed. Clips that do not count get the label -1, and count_items must
    leave them out as well.

    Returns ({objective: Scores}, the Features of VTM's pass or None).
    """
    scores = {}
    video = model.embed_video(batch["video"])                      # (B, S, 1+n, D)
    B = video.shape[0]
    videos, texts = [], []
    if "mlm" in objectives:
        videos.append(video)
        texts.append(batch["mlm_ids"])
    if "vtm" in objectives:
        videos.append(video[batch["vtm_video"]])
        texts.append(batch["text_ids"])
    vtm_features = None
    if texts:
        text = model.embed_text(torch.cat(texts))                  # (2B, m, D)
        mask = batch["text_mask"].repeat(len(texts), 1)
        features = model.fuse(torch.cat(videos), text, mask)       # rows of MLM, then of VTM
    if "mlm" in objectives:
        tokens = features.text[:B].flatten(0, 1)                   # (B*m, D)
        tokens = tokens[batch["mlm_positions"]]                    # (M, D)
        scores["mlm"] = Scores(model.mlm_head(tokens), batch["mlm_labels"])
    if "vtm" in objectives:
        vtm_features = Features(*(part[-B:] for part in features))
        scores["vtm"] = Scores(model.vtm_head(vtm_features.pooled), batch["vtm_labels"])
    return scores, vtm_features


def text_embedding(model: AllInOne, text_ids: Tensor, text_mask: Tensor | None = None) -> Tensor:
    """The text alone in the shared space of VTC (Sec. 3.3), of length 1. (B, m) -> (B, E)."""
    cls = model.encode_text(text_ids, text_mask)[:, 0]
    return F.normalize(model.text_proj(cls), dim=-1)


def video_embedding(model: AllInOne, video: Tensor) -> Tensor:
    """The video alone in the shared space of VTC (Sec. 3.3), of length 1. -> (B, E)."""
    cls = model.encode_video(video)[:, 0]
    return F.normalize(model.video_proj(cls), dim=-1)


def gather_processes(features: Tensor) -> Tensor:
    """The rows of all W processes, with gradients, for VTC (ours). (B, E) -> (W*B, E).

    Every process computes the loss of all rows. Gradients flow into its own rows alone, and
    DistributedDataParallel divides them by W when it takes the mean over processes. Multiplied by W
    here, they add up to the gradient of the whole loss.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return features
    world = dist.get_world_size()
    rows = [torch.empty_like(features) for _ in range(world)]
    dist.all_gather(rows, features.detach().contiguous())
    own = features.view_as(features)
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * world)
    rows[dist.get_rank()] = own
    return torch.cat(rows)


def compute_losses(model: AllInOne, batch: dict[str, Tensor], objectives: Collection[str]
                   ) -> dict[str, Loss]:
    """Sec. 3.3 whole: {objective: Loss} of the objectives asked for, in one call.

    objectives: keys of OBJECTIVES and, to fine-tune (Sec. 4.2), of SCORES.
    ValueError for others.
    """
    unknown = [name for name in objectives if name not in OBJECTIVES and name not in SCORES]
    if unknown:
        raise ValueError(f"no objective {', '.join(unknown)}; expected some of "
                         f"{', '.join([*OBJECTIVES, *SCORES])}")
    losses = {}
    vtm_features = None
    if any(name in OBJECTIVES and name != "vtc" for name in objectives):
        scores, vtm_features = pretraining_scores(model, batch, objectives)
        for name, (logits, labels) in scores.items():
            losses[name] = cross_entropy(logits, labels)
    if "vtc" in objectives:
        text = text_embedding(model, batch["text_ids"], batch["text_mask"])
        video = video_embedding(model, batch["video"])
        loss = vtc_loss(gather_processes(text), gather_processes(video))
        # The loss holds the rows of all W processes. Each process stands for a W-th of its sums.
        own_share = video.shape[0] / loss.number
        losses["vtc"] = Loss(*(part * own_share for part in loss))
    if "wpa" in objectives:
        losses["wpa"] = word_patch_alignment_loss(model, vtm_features, batch)
    for name in objectives:
        if name in SCORES:
            losses[name] = cross_entropy(SCORES[name](model, batch), batch["label"])
    return losses


def count_items(batch: dict[str, Tensor], objective: str) -> Tensor:
    """The `number` that compute_losses will give, known before the pass: (), on the batch's device.

    For a mean over several batches, divide each total by the sum of these numbers.
    """
    if objective == "mlm":
        return (batch["mlm_labels"] >= 0).sum()
    if objective in SCORES:
        return (batch["label"] >= 0).sum()
    return torch.full((), len(batch["video"]), device=batch["video"].device)


# ---- Scores of the downstream tasks (Sec. 4.2) ---------------------------------------------------
#
# The batch of a task has these entries beside the video:
#
#   option_ids        (B, O, m)  candidates of each clip; option_text_mask is False at padding
#   option_mask       (B, O)     False where a clip has fewer than O candidates
#   text_ids          (B, m)     the question of open-ended QA, with its text_mask
#   label             (B,)       the right candidate, or the right answer's class (-1: none of them)
#   feature           (B, D)     instead of video, for a probe: the video cls, computed before

def match_logits(model: AllInOne, video: Tensor, text_ids: Tensor, text_mask: Tensor | None = None
                 ) -> Tensor:
    """VTM's two logits for each clip and its text (Sec. 3.3): (B, 2); [:, 1] is "they match"."""
    return model.vtm_head(model(video, text_ids, text_mask).pooled)


def candidate_scores(model: AllInOne, batch: dict[str, Tensor]) -> Tensor:
    """The matched logit of each candidate (Sec. 4.2.1, 4.2.3): (B, O); -inf where there is none."""
    B, O = batch["option_mask"].shape
    video = model.embed_video(batch["video"])                      # (B, S, 1+n, D)
    video = video.repeat_interleave(O, 0)                          # (B*O, S, 1+n, D)
    text = model.embed_text(batch["option_ids"].flatten(0, 1))     # (B*O, m, D)
    mask = batch["option_text_mask"].flatten(0, 1)                 # (B*O, m)
    first_token = torch.arange(mask.shape[1], device=mask.device) == 0
    mask = mask | first_token          # "decoupled" lets text see text alone: one must be visible
    logits = model.vtm_head(model.fuse(video, text, mask).pooled)  # (B*O, 2)
    matched = logits[:, 1].view(B, O)
    return matched.masked_fill(~batch["option_mask"], -torch.inf)


def answer_scores(model: AllInOne, batch: dict[str, Tensor]) -> Tensor:
    """The logit of each answer of open-ended QA (Sec. 4.2.1): (B, answers).

    The paper's "cls token" is VTM's pooled one here (release).
    """
    features = model(batch["video"], batch["text_ids"], batch["text_mask"])
    return model.answer_head(features.pooled)


def class_scores(model: AllInOne, batch: dict[str, Tensor]) -> Tensor:
    """The logit of each action of the linear probe (App. D.1, Tab. 12): (B, answers)."""
    if "feature" in batch:
        return model.answer_head(batch["feature"])
    return model.answer_head(model.encode_video(batch["video"])[:, 0])


# Task or objective -> its scores, (model, batch) -> (B, candidates); the highest wins. "rank" is
# the release's VTM for retrieval: the clip's own caption must win among captions of other clips.
SCORES = {"choice": candidate_scores, "rank": candidate_scores, "qa": answer_scores,
          "probe": class_scores}


# ==================================================================================================
# The paper's method ends here. What follows are the heavier variants of its ablation (App. B.1),
# word-patch alignment (the release's fourth objective, and the maps of Sec. 4.6), and the loading
# of weights: ViT's and DeiT's (Sec. 3.1, Tab. 6), and the authors'.
# ==================================================================================================

class FactorizedAttention(nn.Module):
    """What "timesformer" and "decoupled" add before a block's joint attention (Tab. 9, Fig. 8).

    timesformer: attention over time, then attention over space, each closed by a Linear.
        All-in-one-B then has 180.8 M parameters (the paper says 180.5).
    decoupled: text attends to text, and video attends over time and over space.
        All-in-one-B then has 195.0 M parameters (the paper says 192).
    App. B.1 says no more. Both add zero at first, so that the model starts as the ViT whose weights
    it takes.

    z: (B*S, m+1+n, D) in and out; either part may have no tokens. mask: as in Attention.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.num_special = config.num_special
        self.time = self.branch(config)
        self.space = self.branch(config)
        self.text = self.branch(config) if config.temporal == "decoupled" else None

    @staticmethod
    def branch(config: Config) -> nn.ModuleDict:
        """LayerNorm, attention and, of timesformer, a Linear. The layer that ends it is zero."""
        D = config.width
        attention = Attention(config)
        closing = nn.Identity()
        ends = attention.proj
        if config.temporal == "timesformer":
            closing = nn.Linear(D, D)
            ends = closing
        nn.init.zeros_(ends.weight)
        nn.init.zeros_(ends.bias)
        return nn.ModuleDict({"norm": nn.LayerNorm(D, eps=1e-6), "attn": attention,
                              "last": closing})

    @staticmethod
    def add_branch(branch: nn.ModuleDict, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x with the output of a branch added to it."""
        return x + branch["last"](branch["attn"](branch["norm"](x), mask))

    def forward(self, z: Tensor, frames: int, text_length: int, mask: Tensor | None) -> Tensor:
        borders = (text_length, text_length + self.num_special)
        text, special, patches = z.tensor_split(borders, 1)
        if text_length and self.text is not None:
            text_mask = None if mask is None else mask[..., :text_length]
            text = self.add_branch(self.text, text, text_mask)
        n = patches.shape[1]
        if n == 0:                                                 # a pass of the text alone
            return text
        tubes = patches.unflatten(0, (-1, frames)).transpose(1, 2)           # (B, n, S, D)
        tubes = self.add_branch(self.time, tubes.flatten(0, 1))              # (B*n, S, D)
        patches = tubes.unflatten(0, (-1, n)).transpose(1, 2).flatten(0, 1)  # (B*S, n, D)
        video = self.add_branch(self.space, torch.cat([special, patches], 1))       # (B*S, 1+n, D)
        return torch.cat([text, video], 1)


# ---- Word-patch alignment: the release's fourth objective, and the maps of Fig. 6 and 11 ---------

def word_patch_transport(text: Tensor, patches: Tensor, text_mask: Tensor
                         ) -> tuple[Tensor, Tensor]:
    """Optimal transport of words to patches (Sec. 4.6) by IPOT [39], as in the release.

    text: (B, m, D), patches: (B, n, D), without cls tokens; text_mask: (B, m) bool. [CLS], the last
    token before the padding ([SEP]) and the padding take no part.
    Returns the distance (B,) and the plan (B, m, n). The plan sums to 1 and has no gradient.
    """
    takes_part = text_mask.clone()
    takes_part[:, 0] = False
    last_token = text_mask.sum(1, keepdim=True) - 1
    takes_part.scatter_(1, last_token, False)                      # (B, m)
    with torch.autocast(text.device.type, enabled=False):
        text = F.normalize(text.float(), dim=-1, eps=1e-5)
        patches = F.normalize(patches.float(), dim=-1, eps=1e-5)
        cost = (1 - text @ patches.mT) * takes_part[:, :, None]    # (B, m, n)
        plan = transport_plan(cost.detach(), takes_part)
        return (cost * plan).sum((1, 2)), plan


def transport_plan(cost: Tensor, takes_part: Tensor, beta: float = 0.5, steps: int = 50) -> Tensor:
    """IPOT's proximal steps [39], for Sec. 4.6: (B, m, n) costs -> (B, m, n) plan that sums to 1.

    takes_part: (B, m) bool, which words do. beta and steps are the release's.
    """
    n = cost.shape[2]
    num_words = takes_part.sum(1, keepdim=True).clamp(min=1)       # (B, 1)
    kernel = torch.exp(-cost.mT / beta) * takes_part[:, None]      # (B, n, m)
    plan = torch.ones_like(kernel)
    sigma = takes_part / num_words                                 # (B, m)
    for _ in range(steps):
        plan = kernel * plan
        received = n * (plan @ sigma[:, :, None])                  # (B, n, 1)
        delta = 1 / received.clamp(min=1e-12)
        given_away = num_words * (plan * delta).sum(1)             # (B, m)
        sigma = takes_part / given_away.clamp(min=1e-12)
        plan = delta * plan * sigma[:, None]
    return plan.mT                                                 # (B, m, n)


def word_patch_alignment_loss(model: AllInOne, features: Features, batch: dict[str, Tensor]
                              ) -> Loss:
    """The release's fourth objective (weight 0.1): words lie near the patches of a matched clip.

    features: of VTM's pass. The distance of matched pairs shrinks, that of the others grows.
    ValueError if VTM, whose pass it uses, is not among the objectives.
    """
    if features is None:
        raise ValueError("objective wpa needs vtm beside it: it uses VTM's pairs")
    patches = features.video[:, model.num_special:]
    distance, _ = word_patch_transport(features.text, patches, batch["text_mask"])
    sign = 2 * batch["vtm_labels"] - 1                             # 1 for a match, else -1
    number = torch.full((), distance.shape[0], device=distance.device)
    return Loss((distance * sign).sum(), number, None)


# ---- Reading a file of weights -------------------------------------------------------------------

class Placeholder(dict):
    """Stands for the foreign classes and functions in a pickled file. It does nothing."""

    def __init__(self, *_, **__):
        super().__init__()

    def __call__(self, *_, **__):
        return Placeholder()

    __setstate__ = append = extend = add = __call__      # what unpickling calls on an object
    __hash__ = object.__hash__


class SafePickle:
    """Stands for the module `pickle` in torch.load. It rebuilds tensors and calls nothing else.

    The authors' checkpoints (Tab. 1) hold objects of Lightning, so `weights_only=True` refuses
    them, and an ordinary unpickler would run whatever a file tells it to run.
    """

    REBUILDS_TENSORS = {("collections", "OrderedDict"), ("torch", "Size"),
                        ("torch._utils", "_rebuild_tensor_v2"),
                        ("torch._utils", "_rebuild_parameter")}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            is_storage = module in ("torch", "torch.storage") and name.endswith("Storage")
            if is_storage or (module, name) in SafePickle.REBUILDS_TENSORS:
                return super().find_class(module, name)
            return Placeholder

    @staticmethod
    def load(file, **options):
        return SafePickle.Unpickler(file, **options).load()


def read_weights(path: str | Path) -> dict:
    """A file of weights (Tab. 1, Tab. 6) as a dictionary. Nothing in the file is executed.

    It reads what torch.save wrote, and .safetensors. ValueError for any other file, which says what
    the file seems to be, and for a damaged one.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; expected a file of weights in it")
    if not path.exists():
        raise ValueError(f"{path}: no such file; expected a file of weights")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    foreign = foreign_format(path)
    if foreign:
        raise ValueError(f"{path}: {foreign}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=SafePickle)
    except Exception as error:             # whatever a damaged or foreign file makes torch raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: not a file of weights, or damaged ({reason}); copy or download "
                         "it again") from error
    if isinstance(content, Placeholder):
        raise ValueError(f"{path}: holds a whole pickled model, which only its own code can read; "
                         "save its weights: torch.save(model.state_dict(), FILE)")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected a dictionary of "
                         "weights, as torch.save(model.state_dict(), FILE) writes")
    return content


def foreign_format(path: Path) -> str | None:
    """What a file is that torch.save did not write, for files get renamed; None if it may have."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return ("a pointer of Git LFS, not the weights themselves; run `git lfs pull`, or download "
                "the file")
    if start.lstrip().startswith(b"<"):
        return "a web page, not weights; the download needs the link of the file itself"
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith(".npy") for name in names):
            return ("a NumPy archive, as JAX's ViT weights are; timm offers the same weights for "
                    "torch: give its .bin or .safetensors file")
        if any(name.endswith("constants.pkl") for name in names):
            return "a TorchScript program, not weights; save its state_dict() instead"
        damaged = archive.testzip()                                # torch.load checks no checksum
        if damaged:
            return f"damaged: the checksum of its part {damaged} is wrong; copy it again"
    return None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Weights of a .safetensors file, as timm offers them: a header of JSON, then the numbers.

    ValueError if it is damaged, or holds a type of numbers that weights do not have.
    """
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
              "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8,
              "BOOL": torch.bool}
    content = bytearray(path.read_bytes())
    try:
        data_start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:data_start])
        header.pop("__metadata__", None)
        weights = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype = dtypes[entry["dtype"]]
            if data_start + end > len(content):
                raise ValueError("its end is missing")
            if begin == end:
                weights[name] = torch.empty(entry["shape"], dtype=dtype)
                continue
            tensor = torch.frombuffer(content, dtype=torch.uint8, count=end - begin,
                                      offset=data_start + begin)
            weights[name] = tensor.clone().view(dtype).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a .safetensors file, or damaged ({error}); copy or download "
                         "it again") from error
    return weights


def bare_weights(content: dict) -> dict[str, Tensor]:
    """The weights inside a training checkpoint, under their own names.

    DeiT wraps them in "model", timm and Lightning in "state_dict". DistributedDataParallel puts
    "module." before every name, and some trainers put "model.".
    """
    for wrapper in ("state_dict", "model"):
        inner = content.get(wrapper)
        if isinstance(inner, dict) and not isinstance(inner, Placeholder):
            content = inner
    for prefix in ("module.", "model."):
        if content and all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return content


def open_weights(source: str | Path | dict) -> tuple[dict[str, Tensor], str]:
    """(the weights, what errors call them) of a path, or of what read_weights gave for it."""
    if isinstance(source, dict):
        return bare_weights(source), "the weights"
    return bare_weights(read_weights(source)), str(source)


# ---- Loading weights into a model ----------------------------------------------------------------

def load_weights(model: AllInOne, weights: dict[str, Tensor], source: str | Path
                 ) -> dict[str, list[str]]:
    """Copies tensors of the model's own names into it; positions are resized (Tab. 2a: 384 pixels).

    source: what errors call the weights. Returns lists of names: "loaded" as they are, "resized",
    "initialised" (the weights lack them, they keep their random start) and "ignored" (the model
    lacks them). ValueError that names a tensor of another shape.
    """
    current = model.state_dict()
    report = {"loaded": [], "resized": [], "initialised": [], "ignored": []}
    fitting = {}
    for name, target in current.items():
        if name not in weights:
            report["initialised"].append(name)
            continue
        tensor = weights[name]
        if tensor.shape == target.shape:
            report["loaded"].append(name)
        else:
            tensor = resize_positions(name, tensor, target)
            report["resized"].append(name)
        if tensor.shape != target.shape:
            raise ValueError(f"{source}: {name} is {tuple(weights[name].shape)}, the model's is "
                             f"{tuple(target.shape)}: the sizes differ; compare the variant (Ti, "
                             "S, B, L), image_size and vocabulary")
        fitting[name] = tensor
    report["ignored"] = [name for name in weights if name not in current]
    model.load_state_dict(fitting, strict=False)
    return report


def resize_positions(name: str, table: Tensor, target: Tensor) -> Tensor:
    """A table of positions in the shape of `target` (Tab. 2a, Fig. 9), others as they came.

    Spatial positions are interpolated on their grid, as in timm. Rows of frames or of text
    positions that the file lacks keep the model's values.
    """
    if name == "pos_embed":                                        # (1, 1+n, D) or (1, 2+n, D)
        side = math.isqrt(table.shape[1])                          # the root of n: 1 or 2 is less
        target_side = math.isqrt(target.shape[1])
        special, grid = table.tensor_split([table.shape[1] - side * side], 1)
        grid = grid.mT.unflatten(-1, (side, side)).float()         # (1, D, H/P, W/P)
        grid = F.interpolate(grid, size=(target_side, target_side), mode="bicubic")
        return torch.cat([special, grid.flatten(2).mT], 1)
    by_rows = ("temporal_embed", "text_embeddings.position_embeddings.weight")
    if name in by_rows and table.shape[-1] == target.shape[-1]:
        rows = target.shape[-2]
        shared, extra = table[..., :rows, :], target[..., table.shape[-2]:, :]
        return torch.cat([shared, extra], -2)
    return table


def load_vit(model: AllInOne, source: str | Path | dict) -> dict[str, list[str]]:
    """ImageNet's weights of a ViT or DeiT into the model's backbone (Sec. 3.1, Tab. 6).

    Text embeddings and heads keep their random start. The paper speaks of attention and MLP; like
    the release we also take the patch projection, the cls token and the positions.

    source: the path of a timm or DeiT file, or the dictionary that read_weights gave for it.
    Returns the report of load_weights. ValueError for unknown, missing or misfit tensors.
    """
    weights, called = open_weights(source)
    current = model.state_dict()
    optional = ("head.", "head_dist.", "pre_logits.", "pos_embed")     # Tab. 10 has no pos_embed
    backbone = ("cls_token", "dist_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
    unknown = [name for name in weights if name not in current and not name.startswith(optional)]
    missing = [name for name in current if name not in weights and name.startswith(backbone)]
    if unknown or missing:
        examples = ", ".join((unknown + missing)[:3])
        raise ValueError(f"{called}: not the backbone of this model: {len(unknown)} unknown "
                         f"tensors, {len(missing)} missing ({examples}); expected vit_* or deit_* "
                         "weights of timm of the same size (with a dist_token: distilled=True)")
    return load_weights(model, weights, called)


# The release's names begin so; ours begin as on the right. All others are equal.
RELEASE_PREFIXES = {
    "transformer.": "",
    "itm_score.fc.": "vtm_head.",
    "vtm_score.fc.": "vtm_head.",
    "pooler.dense.": "pooler.",
    "txt_proj.": "text_proj.",
    "vid_proj.": "video_proj.",
    "mlm_score.transform.": "mlm_head.",
    "mlm_score.decoder.": "mlm_head.decoder.",
    "mlm_score.bias": "mlm_head.decoder.bias",
    "token_type_embeddings.weight": "type_embeddings",
}
WORDS = "text_embeddings.word_embeddings.weight"
TEXT_POSITIONS = "text_embeddings.position_embeddings.weight"


def load_release(source: str | Path | dict, heads: int | None = None, **overrides
                 ) -> tuple[AllInOne, dict[str, list[str]]]:
    """The authors' checkpoint (Tab. 1: Ti, S, B; also B+) as a model with their reading of rolling.

    source: the path of a .ckpt, or the dictionary that read_weights gave for it.
    heads: how many attention heads it has, which no file says; None: width / 64, as in Tab. 1.
    overrides: fields of Config that shall differ from those that the weights were trained with,
        such as frames. Their shuffled patches are one: patch_order="random".
    Returns (model, report of load_weights). ValueError for a file of something else.
    """
    weights, called = open_weights(source)
    weights = rename_release(weights)
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", WORDS, TEXT_POSITIONS)
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"{called}: not a released All-in-one checkpoint, which has {missing[0]}; "
                         "weights of ViT or DeiT are loaded by load_vit")
    # BERT adds row 0 of its own table of types to every token. We add it to the positions.
    bert_types = weights.pop("text_embeddings.token_type_embeddings.weight", None)
    if bert_types is not None:
        weights[TEXT_POSITIONS] = weights[TEXT_POSITIONS] + bert_types[0]
    fields = release_config(weights, heads)
    fields.update(overrides)
    model = AllInOne(Config(**fields))
    return model, load_weights(model, weights, called)


def rename_release(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The release's tensors (Tab. 1) under the names of this file."""
    renamed = {}
    for name, tensor in weights.items():
        for prefix, replacement in RELEASE_PREFIXES.items():
            if name.startswith(prefix):
                name = replacement + name.removeprefix(prefix)
        renamed[name] = tensor
    return renamed


def release_config(weights: dict[str, Tensor], heads: int | None) -> dict:
    """The fields of Config that the release's tensors (Tab. 1) tell, under this file's names."""
    distilled = "dist_token" in weights
    width = weights["cls_token"].shape[-1]
    patch_size = weights["patch_embed.proj.weight"].shape[-1]
    grid_side = math.isqrt(weights["pos_embed"].shape[1])          # the root of n: 1 or 2 is less
    # All-in-one-S, which is distilled, has temporal positions in its file but never used them.
    temporal = None if distilled else weights.get("temporal_embed")
    fields = dict(
        width=width,
        heads=heads or max(1, width // 64),
        depth=sum(name.endswith("attn.qkv.weight") for name in weights),
        patch_size=patch_size,
        image_size=grid_side * patch_size,
        vocab_size=len(weights[WORDS]),
        max_text_len=len(weights[TEXT_POSITIONS]),
        temporal_position=temporal is not None,
        distilled=distilled,
        roll="release",
        roll_unimodal=False)
    if temporal is not None:
        fields["frames"] = temporal.shape[1]
    return fields
