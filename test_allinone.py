"""The paper, sentence by sentence, as tests. Run: python -m pytest (offline, two cores, 3 minutes).

Order: model and rolling (Sec. 3.1, 3.2), objectives (3.3), release, weights, data, training.
"""

from __future__ import annotations

import collections
import contextlib
import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import get_args

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # several processes share few cores here

import av
import numpy as np
import pytest
import torch

import data
import eval
import train
from allinone import (VARIANTS, AllInOne, Config, Select, Temporal, channel_shift, load_release,
                      load_vit, mlm_loss, token_rolling, vtc_loss, vtm_loss,
                      word_patch_alignment_loss, word_patch_transport)
from data import (DATASETS, Batches, Clips, DataError, Manifest, Tokenizer, Unreadable,
                  entries, speech_windows, augment, collate, convert, decode, mask_tokens,
                  sample_frames, shuffled, vtm_pairs)
from eval import count_macs, count_parameters

HERE = Path(__file__).parent
FULL = os.environ.get("FULL") == "1"            # at the sizes that the README states, not smaller
on_linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
TINY = Config(width=32, depth=3, heads=2, image_size=64, vocab_size=50, max_text_len=8,
              temporal_position=False, dropout=0.0, drop_path=0.0)


def build(seed=0, **fields) -> AllInOne:
    """A tiny model in evaluation mode, its weights large enough for effects to be seen."""
    torch.manual_seed(seed)
    model = AllInOne(replace(TINY, **fields)).eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15)
    return model


def clip(B=1, S=3, size=64, seed=1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, S, 3, size, size, generator=g)


def words(B=1, m=8, seed=2) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(5, 50, (B, m), generator=g)


def rows_before_consensus(model, video, ids) -> torch.Tensor:
    """(S, m+1+n, D): the last block's output for each frame of one clip."""
    kept = []
    hook = model.blocks[-1].register_forward_hook(lambda module, args, out: kept.append(out))
    model(video, ids)
    hook.remove()
    return kept[0]


def sees(model, reader: int, writer: int, part: str = "text", S: int = 3) -> bool:
    """Whether frame `reader`'s text (or video) tokens depend on frame `writer`'s pixels."""
    video = clip(S=S).requires_grad_()
    tokens = rows_before_consensus(model, video, words())[reader]
    tokens = tokens[:8] if part == "text" else tokens[8:]
    tokens.pow(2).sum().backward()
    return video.grad[0, writer].abs().max() > 0


# ---- Unified transformer (Sec. 3.1) and token rolling (Sec. 3.2) --------------------------------

def test_without_rolling_the_frames_are_independently_encoded():  # Sec. 3.1; Tab. 8a, Time Average
    model = build(temporal="time_average")
    assert sees(model, reader=1, writer=1)
    assert not sees(model, reader=1, writer=0) and not sees(model, reader=1, writer=2)


def test_with_rolling_text_tokens_view_other_frames_through_self_attention():  # Sec. 1
    model = build(depth=2)
    assert sees(model, reader=1, writer=0, part="text")
    assert sees(model, reader=1, writer=0, part="video")
    assert not sees(build(depth=2, roll_ratio=0.0), reader=1, writer=0)      # Tab. 8b, ratio 0


def test_longer_dependencies_are_modelled_in_deeper_layers():  # Sec. 3.2
    S = 5
    for depth in (1, 2, 3):
        model = build(depth=depth, frames=S)
        reach = [sees(model, reader=4, writer=4 - back, S=S) for back in range(S)]
        assert reach == [back <= depth for back in range(S)]


def test_rolling_starts_before_the_block_that_roll_start_names():  # Tab. 11a
    for start, reach in {1: 4, 3: 2, 4: 1}.items():   # itself, one further for each rolling block
        model = build(depth=3, roll_start=start, frames=5)
        assert sum(sees(model, reader=4, writer=w, S=5) for w in range(5)) == reach


@pytest.mark.parametrize("roll", ["paper", "release"])
def test_as_many_rolls_as_frames_return_the_clip(roll):
    x = torch.randn(2 * 4, 1 + 16, 8)
    y = x
    for _ in range(4):
        y = token_rolling(y, 4, 0.25, roll=roll)
    assert torch.equal(x, y) and not torch.equal(x, token_rolling(x, 4, 0.25, roll=roll))


def test_one_frame_does_not_roll():
    x = torch.randn(3, 17, 8)
    assert torch.equal(token_rolling(x, 1), x)


@pytest.mark.parametrize("ratio", [0, 0.1, 0.25, 0.5, 0.75])                 # Tab. 8b
@pytest.mark.parametrize("select", get_args(Select))                   # Tab. 11b
def test_a_frame_reads_exactly_the_stated_share_of_its_patches_from_the_frame_before(ratio, select):
    S, n = 3, 196
    source = torch.arange(S).repeat_interleave(1 + n).view(S, 1 + n, 1).float()  # own frame
    for layer in (1, 2, 9):
        out = token_rolling(source, S, ratio, select=select, layer=layer)[..., 0]
        assert (out[:, 0] == torch.arange(S)).all()                          # cls never rolls
        moved = out[:, 1:] != torch.arange(S)[:, None]
        assert (moved.sum(1) == round(ratio * n)).all()                      # 49 of 196 at 0.25
        assert (out[:, 1:][moved].view(S, -1) == ((torch.arange(S) - 1) % S)[:, None]).all()


def test_selections_differ_as_appendix_C2_says():  # Tab. 11b
    S, n = 2, 16
    source = torch.arange(S).repeat_interleave(1 + n).view(S, 1 + n, 1).float()

    def moved(select, layer):
        out = token_rolling(source, S, 0.25, select=select, layer=layer)[0, 1:, 0]
        return out.nonzero().flatten().tolist()

    assert moved("block", 1) == moved("block", 2) == [0, 1, 2, 3]            # one block
    assert moved("varying", 1) == [0, 1, 2, 3] and moved("varying", 2) == [4, 5, 6, 7]
    assert moved("varying", 5) == [0, 1, 2, 3]                               # past the end: anew
    torch.manual_seed(0)
    assert moved("random", 1) != moved("random", 1)


def test_the_release_rolls_24_patches_each_way_at_224_px():
    source = torch.arange(3).repeat_interleave(197).view(3, 197, 1).float()
    out = token_rolling(source, 3, 0.25, roll="release")[1, :, 0]            # the middle frame
    assert out[1:25].eq(0).all() and out[173:].eq(2).all() and out[25:173].eq(1).all()


def test_text_never_rolls():
    model = build()
    video, ids = clip(), words()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(video, ids)
    text = model.embed_text(ids)[0]
    assert all(torch.equal(row[:8], text) for row in seen[0])


@pytest.mark.parametrize("temporal", ["token_rolling", "time_average", "channel_shift", "flatten"])
def test_the_rows_of_table_8a_share_one_set_of_parameters(temporal):  # "parameter-free"
    plain = build(temporal="time_average").state_dict()
    assert {k: v.shape for k, v in build(temporal=temporal).state_dict().items()} == {
        k: v.shape for k, v in plain.items()}


def test_channel_shift_takes_an_eighth_of_the_channels_from_each_side():  # Tab. 8a, TSM
    x = torch.randn(3, 5, 16)
    y = channel_shift(x, 3)
    assert torch.equal(y[:-1, :, :2], x[1:, :, :2]) and y[-1, :, :2].eq(0).all()
    assert torch.equal(y[1:, :, 2:4], x[:-1, :, 2:4]) and y[0, :, 2:4].eq(0).all()
    assert torch.equal(y[:, :, 4:], x[:, :, 4:])


def test_flatten_sees_every_frame_at_once():  # Fig. 3
    model = build(temporal="flatten", depth=1, frames=5)
    video = clip(S=5).requires_grad_()
    tokens = rows_before_consensus(model, video, words())
    assert tokens.shape == (1, 8 + 5 * 17, 32)                               # m + S(1+n)
    tokens[0, 0].sum().backward()
    assert all(video.grad[0, s].abs().max() > 0 for s in range(5))


@pytest.mark.parametrize("temporal", ["timesformer", "decoupled"])
def test_factorized_attention_sees_every_frame_and_starts_as_a_no_op(temporal):  # App. B.1, Fig. 8
    torch.manual_seed(0)
    plain, model = build(temporal="time_average"), AllInOne(replace(TINY, temporal=temporal)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    video, ids = clip(), words()
    assert torch.allclose(model(video, ids).pooled, plain(video, ids).pooled, atol=1e-6)
    model = build(temporal=temporal, depth=1)
    assert all(sees(model, reader=1, writer=w, part="video") for w in range(3))


def test_the_consensus_ignores_the_order_of_frames_without_rolling_and_temporal_positions():
    video, ids = clip(), words()
    backwards = video.flip(1)
    for temporal, ignores in [("time_average", True), ("flatten", True), ("token_rolling", False),
                              ("channel_shift", False)]:
        model = build(temporal=temporal)
        same = torch.allclose(model(video, ids).pooled, model(backwards, ids).pooled, atol=1e-5)
        assert same == ignores, temporal
    model = build(temporal="time_average", temporal_position=True)           # Eq. 1, V^pos
    assert not torch.allclose(model(video, ids).pooled, model(backwards, ids).pooled, atol=1e-5)


def test_cyclic_rolling_cannot_tell_where_a_cycle_starts():  # the roll wraps around
    model, video, ids = build(), clip(), words()
    assert torch.allclose(model(video, ids).pooled, model(video.roll(1, 1), ids).pooled, atol=1e-5)


@pytest.mark.parametrize("temporal", get_args(Temporal))
def test_padding_changes_nothing_and_a_clip_alone_equals_the_clip_in_a_batch(temporal):
    model = build(temporal=temporal)
    video, ids = clip(B=2), words(B=2)
    short, mask = ids[:1, :5], torch.ones(2, 8, dtype=torch.bool)
    mask[0, 5:] = False
    batch = model(video, ids, mask)
    alone = model(video[:1], short)
    assert torch.allclose(batch.pooled[0], alone.pooled[0], atol=1e-5)
    assert torch.allclose(batch.text[0, :5], alone.text[0], atol=1e-5)
    assert torch.allclose(batch.video[0], alone.video[0], atol=1e-5)
    text = model.encode_text(ids, mask)[0, 0]
    assert torch.allclose(text, model.encode_text(short)[0, 0], atol=1e-5)
    assert torch.allclose(model.encode_video(video)[0], model.encode_video(video[:1])[0], atol=1e-5)


def test_each_modality_can_be_fed_alone():  # Sec. 1, "by feeding only video or text data"
    model = build()
    assert model.encode_video(clip(B=2)).shape == (2, 17, 32)                # (B, 1+n, D)
    assert model.encode_text(words(B=2)).shape == (2, 8, 32)                 # (B, m, D)
    for rolls in (True, False):                                              # Eq. 2; the release
        model = build(roll_unimodal=rolls)
        there, back = (model.encode_video(v)[:, 0] for v in (clip(), clip().flip(1)))
        assert torch.allclose(there, back, atol=1e-5) != rolls


def test_position_and_type_embeddings_can_be_left_out():  # Tab. 10
    names = set(build(temporal_position=True).state_dict())
    for field, name in [("spatial_position", "pos_embed"), ("temporal_position", "temporal_embed"),
                        ("modality_type", "type_embeddings")]:
        model = build(**{"temporal_position": True, field: False})
        assert names - set(model.state_dict()) == {name}
        assert model(clip(), words()).pooled.isfinite().all()


def test_raw_uint8_pixels_are_normalised_inside():
    model = build()
    video = torch.randint(256, (1, 3, 3, 64, 64), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    floats = (video.float() / 255 - mean) / std
    assert torch.allclose(model(video, words()).pooled, model(floats, words()).pooled, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 8, 16])                            # Fig. 9
def test_any_number_of_frames_gives_one_consensus(frames):
    model = build(frames=frames, temporal_position=True)
    assert model(clip(S=frames), words()).video.shape == (1, 17, 32)


def test_activation_checkpointing_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        model = build().train()
        model.recompute = recompute
        model(clip(), words()).pooled.sum().backward()
        grads.append(model.blocks[0].attn.qkv.weight.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("name, low, high", [
    ("Ti", 11.4, 11.5), ("S", 33.4, 33.6), ("B", 109.3, 109.9)])
def test_variants_have_the_parameters_of_table_1(name, low, high):  # without MLM's and VTC's heads
    with torch.device("meta"):
        model = AllInOne(Config(**VARIANTS[name]))
    assert low <= count_parameters(model, heads=False) / 1e6 <= high


@pytest.mark.parametrize("temporal, paper", [("timesformer", 180.5), ("decoupled", 192)])  # Tab. 9
def test_factorized_variants_have_the_parameters_of_table_9_within_3_percent(temporal, paper):
    with torch.device("meta"):
        model = AllInOne(Config(temporal=temporal))
    assert abs(count_parameters(model, heads=False) / 1e6 / paper - 1) < 0.03


def test_flatten_pays_more_for_attention_but_not_in_total():  # Fig. 3 and Sec. 3.2, corrected
    rolling, flat = count_macs(Config()), count_macs(Config(temporal="flatten"))
    assert 63.7e9 < rolling["joint"] < 63.9e9 and 52.6e9 < rolling["video"] < 52.8e9
    assert flat["attention"] > 2.3 * rolling["attention"] and flat["joint"] < rolling["joint"]


@pytest.mark.parametrize("wrong, message", [
    (lambda m: m(clip(S=2).transpose(1, 2), words()), r"\.transpose\(1, 2\)"),
    (lambda m: m(clip()[0], words()), r"single image \[:, None\]"),
    (lambda m: m(clip(size=96), words()), "built for"),
    (lambda m: m(clip(), words(m=9)), "--max_text_len"),
    (lambda m: build(temporal_position=True)(clip(S=4), words()), "--frames 4"),
    (lambda m: token_rolling(torch.randn(4, 17, 8), 3), "not whole clips"),
    (lambda m: Config(temporal="rolling"), "it can be 'token_rolling'"),
    (lambda m: Config(roll_ratio=1.5), "share of the patches"),
    (lambda m: Config(width=100), "divisible by heads"),
    (lambda m: Config(frames=0), "frames is 0"),
    (lambda m: Config(roll="release", roll_select="random"), "roll_select other than"),
])
def test_wrong_inputs_raise_the_message_a_person_needs(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(build())


# ---- Training objectives (Sec. 3.3) -------------------------------------------------------------

def test_vtm_is_the_negative_log_likelihood_over_two_classes():
    logits, labels = torch.tensor([[2.0, 0.0], [0.5, 1.5]]), torch.tensor([0, 1])
    by_hand = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    assert vtm_loss(logits, labels).item() == pytest.approx(by_hand)


def test_mlm_counts_masked_words_only_and_none_gives_zero():
    logits = torch.randn(4, 50, requires_grad=True)
    loss = mlm_loss(logits, torch.tensor([3, -100, 7, -100]))
    expected = -(logits.log_softmax(-1)[0, 3] + logits.log_softmax(-1)[2, 7])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    nothing = mlm_loss(logits, torch.full((4,), -100))
    nothing.backward()
    assert nothing.item() == 0 and logits.grad.eq(0).all()


def test_vtc_is_symmetric_in_text_and_video():
    text, video = torch.randn(4, 6), torch.randn(4, 6)
    assert vtc_loss(text, video).item() == pytest.approx(vtc_loss(video, text).item(), rel=1e-5)
    assert vtc_loss(text, text * 3).item() < vtc_loss(text, video).item()    # cosine: scale is free


def test_losses_are_computed_in_float32_under_autocast():
    torch.manual_seed(0)
    text, video, mask = torch.randn(4, 6), torch.randn(4, 6), torch.ones(2, 5, dtype=torch.bool)
    words, patches = torch.randn(2, 5, 8), torch.randn(2, 9, 8)
    losses = [lambda: vtc_loss(text, video), lambda: word_patch_transport(words, patches, mask)[0],
              lambda: vtm_loss(text[:, :2], torch.tensor([0, 1, 1, 0])),
              lambda: mlm_loss(text, torch.tensor([5, 1, -100, 0]))]
    for loss in losses:
        with torch.autocast("cpu", torch.bfloat16):
            under = loss()
        assert under.dtype is torch.float32 and torch.allclose(under, loss(), rtol=1e-6)


def test_word_patch_alignment_pulls_matched_clips_and_pushes_others():
    distance = torch.tensor([0.25, 0.75], requires_grad=True)
    loss = word_patch_alignment_loss(distance, torch.tensor([1, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(-0.25) and distance.grad.tolist() == [0.5, -0.5]


# ---- The release's own forward pass (float32, evaluation mode) ----------------------------------

def rule(count: int, shift: float) -> np.ndarray:
    """Numbers in [0, 1) without a file: u(43758.5453 sin(12.9898 i + shift)), u(x) = x mod 1."""
    x = 43758.5453 * np.sin(12.9898 * np.arange(count, dtype=np.float64) + shift)
    return x - np.floor(x)


def release_weights(D=48, L=3, V=60, m=10, n=16, S=3) -> dict[str, torch.Tensor]:
    """A tiny released model: the authors' key names in alphabetical order, filled by rule."""
    shapes = {
        "itm_score.fc": (2, D), "mlm_score.transform.dense": (D, D), "pooler.dense": (D, D),
        "txt_proj": (512, D), "vid_proj": (512, D),
        "transformer.patch_embed.proj": (D, 3, 16, 16)}
    for d in range(L):
        shapes |= {f"transformer.blocks.{d}.{name}": shape for name, shape in {
            "attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D),
            "mlp.fc2": (D, 4 * D), "norm1": (D,), "norm2": (D,)}.items()}
    shapes |= {name: (D,) for name in (
        "transformer.norm", "text_embeddings.LayerNorm", "mlm_score.transform.LayerNorm")}
    shapes = {f"{name}.weight": shape for name, shape in shapes.items()} | {
        f"{name}.bias": shape[:1] for name, shape in shapes.items()} | {
        "mlm_score.bias": (V,), "mlm_score.decoder.weight": (V, D),
        "text_embeddings.word_embeddings.weight": (V, D),
        "text_embeddings.position_embeddings.weight": (m, D),
        "text_embeddings.token_type_embeddings.weight": (2, D),
        "token_type_embeddings.weight": (2, D),
        "transformer.cls_token": (1, 1, D), "transformer.pos_embed": (1, 1 + n, D),
        "transformer.temporal_embed": (1, S, D)}
    weights = {}
    for k, name in enumerate(sorted(shapes)):
        is_norm = name.endswith("weight") and "norm" in name.lower()
        values = rule(math.prod(shapes[name]), 78.233 * (k + 1)) - 0.5 + is_norm
        weights[name] = torch.tensor(values.astype(np.float32)).reshape(shapes[name])
    return weights


SHUFFLED = [
    [10, 2, 6, 15, 0, 1, 8, 12, 5, 4, 11, 13, 9, 7, 14, 3],
    [13, 1, 3, 14, 8, 6, 0, 12, 15, 5, 10, 4, 9, 2, 11, 7],
    [7, 0, 8, 2, 4, 6, 12, 13, 1, 11, 9, 10, 15, 14, 5, 3],
    [3, 8, 11, 1, 9, 0, 13, 15, 7, 5, 4, 14, 2, 12, 6, 10],
    [9, 3, 12, 2, 11, 14, 1, 4, 7, 13, 5, 10, 6, 8, 0, 15],
    [13, 2, 12, 5, 14, 7, 6, 0, 1, 9, 4, 15, 11, 10, 3, 8],
]   # the raster patch in each slot, for each of B*S frames
RELEASE = {   # first 8 entries of the width where there is one; both clips of the batch in turn
    "raster": {
        "pooled": """
        0.745974 -0.508832 -0.995179 0.459143 0.653352 0.745695 0.947882 -0.70681 0.866959
        -0.306286 -0.090391 0.987924 -0.710182 -0.257886 0.697781 0.342492""",
        "vtm_logits": """
        -1.141158 -1.590816 -2.680779 -0.421058""",
        "match_score": """
        -1.590816 -0.421058""",
        "text, mean over width": """
        0.079467 0.056713 0.034788 0.065305 0.021487 0.099325 0.077548 0.052106 0.048628
        0.101858 0.011588 0.042823 0.034415 -0.017693 0.072733 0.035863 0.046041 0.026249
        0.07484 0.045895""",
        "text, token 1": """
        0.734284 -0.046682 0.16657 -0.774825 0.243932 1.277517 0.048543 -0.260765 0.520406
        0.151573 0.48748 0.974224 0.464299 0.308013 -0.254783 -0.209703""",
        "video cls": """
        0.245695 -0.353099 0.438103 -0.05541 -0.465426 1.063588 0.456982 -0.223901
        0.556025 -0.02882 0.909039 0.320966 0.497082 1.467271 -1.699125 -0.482506""",
        "mlm_logits, token 2": """
        0.683582 -0.972252 -2.13194 1.962842 -3.481407 0.745213 0.153956 -3.775719
        -0.883016 0.368534 -3.282304 1.450144 -1.709209 -1.264879 -2.372902 -3.495787""",
        "word_patch_distance": """
        0.294071 0.398553""",
        "video_embedding": """
        0.418106 -0.721777 -1.87211 1.293781 2.467497 1.918848 0.665154 -2.130347 1.325407
        -1.226278 -2.563486 0.149859 1.176184 0.05819 3.615343 0.509533""",
        "text_embedding": """
        -0.768555 -2.503503 -0.21226 -1.922225 -2.55049 -1.552585 -3.283664 -1.958201
        -0.866126 -0.455916 -0.437439 -1.946538 -1.194043 -1.28699 -0.066367 -1.996963""",
        "vtc_loss": """
        1.285742""",
    },
    "shuffled": {
        "pooled": """
        0.880087 -0.537205 -0.998336 0.797302 0.810602 0.831676 0.979027 -0.68831 0.975247
        0.131854 -0.721425 0.964504 -0.850516 -0.739272 0.743203 -0.163451""",
        "vtm_logits": """
        -0.667237 -1.038084 -3.046794 -1.100145""",
        "match_score": """
        -1.038084 -1.100145""",
        "text, mean over width": """
        0.08057 0.053407 0.019102 0.056939 0.013475 0.078415 0.075643 0.029353 0.058329
        0.102566 0.021862 0.075153 0.022964 -0.026864 0.051804 0.046621 0.039626 0.023299
        0.082837 0.027591""",
        "text, token 1": """
        1.290934 0.037521 0.344557 -0.683487 -0.430277 1.133434 -0.180537 -0.186025
        0.227269 0.089898 0.231086 0.730157 1.41358 0.89987 0.286197 -0.363295""",
        "video cls": """
        0.526871 -0.259179 0.380981 -0.115912 -0.147718 0.839544 -0.049738 -0.12764
        0.508819 0.021548 0.018704 0.366305 1.111891 1.176315 -1.056146 -0.282058""",
        "mlm_logits, token 2": """
        -1.036099 -0.664909 -2.370278 2.476283 -3.037283 1.27815 -1.129946 -4.052131
        1.109501 -1.326923 -4.710353 1.829274 -1.900735 -1.514824 -2.128502 -4.61168""",
        "word_patch_distance": """
        0.280989 0.387228""",
    },
}
RELEASE["shuffled"] |= {name: RELEASE["raster"][name] for name in (   # slots do not matter
    "video_embedding", "text_embedding", "vtc_loss")}


@pytest.mark.parametrize("order", ["raster", "shuffled"])
def test_released_weights_give_the_releases_own_numbers(order, tmp_path):
    torch.save({"state_dict": release_weights()}, tmp_path / "tiny.ckpt")
    model, report = load_release(tmp_path / "tiny.ckpt", heads=4)
    assert len(report["loaded"]) == 62 and not report["initialised"] and not report["ignored"]
    model.eval()
    video = torch.tensor((2 * rule(2 * 3 * 3 * 64 * 64, 0) - 1).astype(np.float32))
    video = video.reshape(2, 3, 3, 64, 64)
    ids = torch.tensor([[8, 19, 30, 41, 52] * 2, [15, 26, 37, 48, 59, 15, 0, 0, 0, 0]])
    mask = torch.arange(10) < torch.tensor([[10], [6]])
    slots = torch.tensor(SHUFFLED) if order == "shuffled" else None
    with torch.no_grad():
        features = model(video, ids, mask, slots)
        text = model.text_proj(model.encode_text(ids, mask)[:, 0])
        clips = model.video_proj(model.encode_video(video, slots)[:, 0])
        vtm = model.vtm_head(features.pooled)
        ours = {
            "pooled": features.pooled[:, :8], "vtm_logits": vtm, "match_score": vtm[:, 1],
            "text, mean over width": features.text.mean(-1),
            "text, token 1": features.text[:, 1, :8],
            "video cls": features.video[:, 0, :8],
            "mlm_logits, token 2": model.mlm_head(features.text)[:, 2, :8],
            "word_patch_distance": word_patch_transport(
                features.text, features.video[:, 1:], mask)[0],
            "video_embedding": clips[:, :8], "text_embedding": text[:, :8],
            "vtc_loss": vtc_loss(text, clips)}
    assert ours.keys() == RELEASE[order].keys()
    for name, value in ours.items():
        theirs = torch.tensor([float(x) for x in RELEASE[order][name].split()])
        assert torch.allclose(value.flatten(), theirs, atol=1e-4), name


def test_released_checkpoints_load_in_every_form_they_come_in(tmp_path):
    weights, path = release_weights(), tmp_path / "all-in-one.ckpt"
    plain = load_released(weights, path)
    assert load_released({f"module.{k}": v for k, v in weights.items()}, path)[0] == plain[0]
    renamed = {k.replace("itm_score", "vtm_score"): v for k, v in weights.items()}      # plus
    assert load_released(renamed, path)[0] == plain[0]
    without = {k: v for k, v in weights.items() if "temporal_embed" not in k}
    zeros = weights | {"transformer.temporal_embed": torch.zeros(1, 8, 48)}             # another S
    assert load_released(without, path)[0] == load_released(zeros, path)[0] != plain[0]
    extra = weights | {"rank_output.weight": torch.zeros(1, 48),
                       "text_embeddings.position_ids": torch.arange(10)[None]}
    values, report = load_released(extra, path)
    assert values == plain[0]
    assert sorted(report["ignored"]) == ["rank_output.weight", "text_embeddings.position_ids"]
    model, report = load_release(path, heads=4, max_text_len=80, frames=8, image_size=96)
    assert sorted(report["resized"]) == [
        "pos_embed", "temporal_embed", "text_embeddings.position_embeddings.weight"]
    assert model.temporal_embed[0, 3:].eq(0).all() and model.pos_embed.shape == (1, 1 + 36, 48)
    few = {k: v for k, v in weights.items() if "_proj" not in k}                        # MLM + ITM
    assert sorted({name.split(".")[0] for name in load_released(few, path)[1]["initialised"]}) == [
        "text_proj", "video_proj"]


def load_released(weights: dict, path) -> tuple[list, dict]:
    torch.save({"state_dict": weights, "epoch": 3}, path)
    model, report = load_release(path, heads=4)
    with torch.no_grad():
        pooled = model.eval()(clip(), words()).pooled
    return pooled.flatten().tolist(), report


def test_a_distilled_release_keeps_its_second_class_token_and_rolls_it(tmp_path):  # All-in-one-S
    weights = release_weights() | {"transformer.dist_token": torch.randn(1, 1, 48),
                                   "transformer.pos_embed": torch.randn(1, 18, 48)}
    torch.save({"state_dict": weights}, tmp_path / "s.ckpt")
    model, report = load_release(tmp_path / "s.ckpt", heads=4)
    assert model.config.distilled and not model.config.temporal_position  # S never used it
    assert not report["ignored"]
    rolled = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: rolled.append(args[0]))
    model.eval()(clip(), words())
    tokens = model.embed_video(clip())[0]
    assert torch.equal(rolled[0][1, 8], tokens[1, 0])                        # cls stays
    assert torch.equal(rolled[0][1, 9], tokens[0, 1])   # frame 0's second token
    assert AllInOne(replace(TINY, distilled=True))(clip(), words()).video.shape == (1, 18, 32)


class Trace:
    """Pickles as a call that would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Callback:
    """Stands for Lightning's classes, which a checkpoint pickles and nobody has installed."""

    def __init__(self):
        self.best, self.paths = 0.5, ["a", "b"]


def test_nothing_that_a_checkpoint_pickles_is_executed(tmp_path):
    weights, path, trace = release_weights(), tmp_path / "x.ckpt", tmp_path / "trace"
    torch.save({"state_dict": weights, "callbacks": {Callback: Callback()}}, path)
    assert len(load_release(path, heads=4)[1]["loaded"]) == 62
    extras = {"trap": Trace(trace), "dict": collections.defaultdict(Callback, a=Callback()),
              "set": {Callback}, "path": trace, "function": os.mkdir, "array": np.zeros(3)}
    for zipped in (True, False):                                             # torch before 1.6
        torch.save({"state_dict": weights, "hyper_parameters": extras}, path,
                   _use_new_zipfile_serialization=zipped)
        assert len(load_release(path, heads=4)[1]["loaded"]) == 62
        assert not trace.exists()
        torch.load(path, weights_only=False)                                 # the trap does work
        trace.rmdir()


@pytest.mark.parametrize("content, message", [
    (b"", "or damaged"), (b"not a checkpoint at all", "not a file of weights"),
    ({"state_dict": {"fc.weight": torch.zeros(2)}}, "not a released All-in-one checkpoint"),
    ([1, 2], "holds a list")])
def test_a_wrong_file_of_weights_gets_a_clear_error(content, message, tmp_path):
    path = tmp_path / "wrong.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_release(path)
    with pytest.raises(ValueError, match="no such file"):
        load_release(tmp_path / "absent.ckpt")


# ---- ImageNet initialisation (Sec. 3.1, Tab. 6) --------------------------------------------------

def vit_weights(model: AllInOne) -> dict:
    names = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith(names)} | {
        "head.weight": torch.zeros(1000, 32), "head.bias": torch.zeros(1000)}


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w}])      # timm; DeiT
def test_attention_and_mlp_are_initialised_from_vit_or_deit(wrap, tmp_path):
    source, model = build(seed=5), build(seed=6)
    torch.save(wrap(vit_weights(source)), tmp_path / "vit.pth")
    report = load_vit(model, tmp_path / "vit.pth")
    assert not report["ignored"]
    assert all(torch.equal(model.state_dict()[k], source.state_dict()[k]) for k in report["loaded"])
    assert "text_embeddings.word_embeddings.weight" in report["initialised"]


def test_patch_positions_are_interpolated_to_a_larger_grid(tmp_path):  # Tab. 2a, 224 -> 384 px
    source, model = build(seed=5), build(image_size=96)
    with torch.no_grad():   # a ramp along x and one along y stay ramps
        grid = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"))
        source.pos_embed[0, 1:, :2] = grid.flatten(1).T
    torch.save(vit_weights(source), tmp_path / "vit.pth")
    assert load_vit(model, tmp_path / "vit.pth")["resized"] == ["pos_embed"]
    table = model.pos_embed[0, 1:].unflatten(0, (6, 6))
    assert (table[1:, :, 0] > table[:-1, :, 0]).all() and (table[:, 1:, 1] > table[:, :-1, 1]).all()
    assert torch.equal(model.pos_embed[0, 0], source.pos_embed[0, 0])
    assert model(clip(size=96), words()).video.shape == (1, 37, 32)


@pytest.mark.parametrize("change, message", [
    (lambda w: w | {"blocks.0.gamma": torch.zeros(1)}, r"1 unknown tensors, .*\(blocks.0.gamma\)"),
    (lambda w: {k: v for k, v in w.items() if k != "norm.bias"}, r"1 missing \(norm.bias\)"),
    (lambda w: w | {"cls_token": torch.zeros(1, 1, 64)}, "another variant"),
    (lambda w: w | {"dist_token": torch.zeros(1, 1, 32)}, "--distilled")])
def test_an_unknown_or_missing_backbone_tensor_is_an_error(change, message, tmp_path):
    torch.save(change(vit_weights(build())), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=message):
        load_vit(build(), tmp_path / "vit.pth")


# ---- Clips (Sec. 3.1, 4.1.1): manifests, frames, words, batches ----------------------------------

def film(path, codec="libx264", n=60, size=(96, 64), pix_fmt="yuv420p", rate=30, pts=None, offset=0,
         **options):
    """Write n distinct frames (moving noise) to path; returns path."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 255, (size[1] * 2, size[0] * 2, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={k.replace("_", "-"): v
                                                                  for k, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.time_base = Fraction(1, rate)
        for i in range(n):
            image = noise[i % size[1]:, i * 2 % size[0]:][:size[1], :size[0]] // 2 + i % 128
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = (pts[i] if pts else i) + offset
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame.reformat(format=pix_fmt)))
        container.mux(stream.encode())
    return path


def every_frame(path, short_side=None):
    """The reference: each frame of a plain decode, first packet to last, (n, 3, h, w)."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            h, w = frame.height, frame.width
            s = short_side / min(h, w) if short_side else 1
            rgb = frame.reformat(round(w * s), round(h * s), "rgb24", interpolation="BILINEAR",
                                 threads=1).to_ndarray()
            upright = np.rot90(rgb, frame.rotation // 90).copy()
            frames.append(torch.from_numpy(upright).permute(2, 0, 1))
    return torch.stack(frames)


X264 = {"crf": "28", "preset": "veryfast"}
FILMS = {  # kind: (file name, arguments of film)
    "H.264 with B-frames, GOP 30": ("a.mp4", dict(n=90, g="30", bf="3", **X264)),
    "H.264 without B-frames": ("a.mp4", dict(g="30", bf="0", **X264)),
    "H.264, GOP 250": ("a.mp4", dict(n=300, g="250", bf="3", sc_threshold="0", **X264)),
    "H.264 with a pyramid of B-frames": (
        "a.mp4", dict(x264_params="b-pyramid=normal:bframes=8:b-adapt=0", **X264)),
    "H.264, open GOPs": (
        "a.mp4", dict(x264_params="open-gop=1:keyint=12:min-keyint=12:bframes=3", **X264)),
    "H.264 in Matroska": ("a.mkv", dict(g="15", **X264)),
    "H.264 in a transport stream, starting late": ("a.ts", dict(g="15", offset=300, **X264)),
    "H.264 in AVI": ("a.avi", dict(g="15", bf="2", **X264)),
    "H.264, interlaced": ("a.mp4", dict(g="20", x264_params="tff=1:bframes=2", **X264)),
    "HEVC, open GOPs": (
        "a.mp4", dict(codec="libx265", x265_params="keyint=15:min-keyint=15:log-level=none")),
    "HEVC with temporal layers": (
        "a.mp4", dict(codec="libx265", x265_params="keyint=15:temporal-layers=3:log-level=none")),
    "VP9": ("a.webm", dict(codec="libvpx-vp9", g="20", deadline="realtime", cpu_used="8")),
    "VP9 with hidden frames": (
        "a.webm", dict(codec="libvpx-vp9", g="30", auto_alt_ref="1", lag_in_frames="12",
                       deadline="good", cpu_used="5")),
    "VP8 with hidden frames": (
        "a.webm", dict(codec="libvpx", g="30", auto_alt_ref="1", lag_in_frames="12",
                       deadline="good", cpu_used="5")),
    "AV1": ("a.mp4", dict(codec="libsvtav1", g="20", preset="12", svtav1_params="lookahead=10")),
    "MPEG-4 in AVI": ("a.avi", dict(codec="mpeg4", g="12")),
    "MPEG-4 with B-frames in AVI": ("a.avi", dict(codec="mpeg4", g="12", bf="2")),
    "MPEG-2": ("a.mpg", dict(codec="mpeg2video", g="12", bf="2")),
    "Motion JPEG": ("a.avi", dict(codec="mjpeg", pix_fmt="yuvj420p")),
    "GIF": ("a.gif", dict(codec="gif", pix_fmt="rgb8", rate=10, n=20)),
    "a variable frame rate": (
        "a.mp4", dict(g="20", pts=[i * i // 7 + i for i in range(60)], **X264)),
    "a late first frame": ("a.mp4", dict(g="20", offset=45, **X264)),
    "odd sizes": ("a.mkv", dict(size=(97, 65), pix_fmt="yuv444p", g="20", **X264)),
    "10 bits": (
        "a.mp4", dict(codec="libx265", pix_fmt="yuv420p10le",
                      x265_params="keyint=20:log-level=none")),
    "two frames": ("a.mp4", dict(n=2, **X264)),
    "one frame": ("a.mp4", dict(n=1, **X264)),
}


# Only these have no usable times, so that they are decoded from their first frame.
SERIAL = {"H.264 in a transport stream, starting late", "H.264 in AVI",
          "MPEG-4 with B-frames in AVI", "MPEG-2"}


@pytest.mark.parametrize("kind", FILMS)
def test_each_chosen_frame_equals_that_frame_of_a_full_decode(kind, tmp_path, monkeypatch):
    serially, serial = data.decode_serially, []
    monkeypatch.setattr(data, "decode_serially", lambda *task: serial.append(1) or serially(*task))
    name, options = FILMS[kind]
    path = film(tmp_path / name, **options)
    truth, counts = every_frame(path, 48), []
    for seed in range(3):
        picked = sorted(torch.randperm(len(truth), generator=torch.manual_seed(seed))[:3].tolist())
        frames = decode(path, lambda n: counts.append(n) or picked, 48)
        assert counts[-1] == len(truth) == options.get("n", 60)
        assert torch.equal(frames, truth[picked])
    assert torch.equal(decode(path, lambda n: list(range(n))), every_frame(path))
    backwards = list(range(len(truth)))[::-1] + [0, 0]
    assert torch.equal(decode(path, lambda n: backwards, 48), truth[backwards])
    assert bool(serial) == (kind in SERIAL)


def test_a_window_holds_the_frames_shown_from_start_to_end_seconds(tmp_path):
    for name, options in [("a.mp4", X264), ("b.mkv", X264), ("c.ts", dict(offset=300, **X264)),
                          ("d.avi", dict(codec="mpeg4", bf="2"))]:
        path = film(tmp_path / name, g="15", **options)                # 60 frames, 30 a second
        truth, counts = every_frame(path), []
        window = decode(path, lambda n: counts.append(n) or list(range(n)), None, 0.5, 1.2)
        assert counts == [21] and torch.equal(window, truth[15:36])    # 0.5 s is in, 1.2 s is out
        assert torch.equal(decode(path, lambda n: list(range(n)), None, start=1.5), truth[45:])
        assert torch.equal(decode(path, lambda n: list(range(n)), None, end=0.1), truth[:3])
        shown = decode(path, lambda n: [0], None, 1.01, 1.02)               # on display then
        assert torch.equal(shown, truth[30:31])
        with pytest.raises(Unreadable, match="start and end"):
            decode(path, lambda n: [0], None, 7.0, 9.0)


def test_rotated_phone_video_comes_out_upright(tmp_path):
    path = film(tmp_path / "a.mp4", n=10, size=(96, 64), **X264)
    upright, film_bytes = every_frame(path), bytearray(path.read_bytes())
    matrix = film_bytes.index(b"tkhd") + 4 + 40                  # 16.16 fixed point, clockwise 90
    film_bytes[matrix:matrix + 20] = struct.pack(">5i", 0, 0x10000, 0, -0x10000, 0)
    path.write_bytes(film_bytes)
    frames = decode(path, lambda n: [0, 5, 9], 32)
    assert frames.shape == (3, 3, 48, 32)                        # portrait, shorter side 32
    clockwise = torch.rot90(upright, -1, (2, 3))
    assert torch.equal(decode(path, lambda n: [0, 5, 9]), clockwise[[0, 5, 9]])


def test_images_and_folders_of_images_are_clips(tmp_path):
    (tmp_path / "frames").mkdir()
    for i in (1, 2, 10):
        film(tmp_path / "frames" / f"{i}.png", codec="png", n=1, pix_fmt="rgb24", size=(30 + i, 20))
        with av.open(str(tmp_path / "frames" / f"{i}.jpg"), "w") as container:
            stream = container.add_stream("mjpeg")
            stream.width, stream.height, stream.pix_fmt = 40, 20, "yuvj420p"
            grey = np.full((20, 40, 3), i * 20, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(grey)) + stream.encode():
                container.mux(packet)
    (tmp_path / "frames" / "notes.txt").write_text("not a frame")
    image = decode(tmp_path / "frames" / "2.jpg", lambda n: sample_frames(n, 3, False), 10)
    assert image.shape == (3, 3, 10, 20) and abs(image.float().mean() - 40) < 2
    for png in (tmp_path / "frames").glob("*.png"):
        assert decode(png, lambda n: [0]).shape[2] == 20
        png.unlink()
    clip = decode(tmp_path / "frames", lambda n: list(range(n)))
    assert clip.shape == (3, 3, 20, 40)
    assert (clip.float().mean((1, 2, 3)) / 20).round().tolist() == [1, 2, 10]


def test_what_cannot_be_read_is_named_with_a_reason(tmp_path):
    film(tmp_path / "whole.mp4", movflags="faststart", **X264)
    film(tmp_path / "whole.mkv", g="10", n=300, **X264)
    for name, share in [("whole.mp4", 0.6), ("whole.mkv", 0.4)]:
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(content[:int(share * len(content))])
    content = bytearray((tmp_path / "whole.mp4").read_bytes())
    content[-2000:-1900] = bytes(100)
    (tmp_path / "zeroed.mp4").write_bytes(content)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "words.txt").write_text("once upon a time " * 50)
    (tmp_path / "folder").mkdir()
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    for name, reason in {
            "missing.mp4": "no such file", "empty.mp4": "empty", "noise.mp4": "cannot be decoded",
            "words.txt": "no video stream", "sound.wav": "no video stream", "folder": "no image",
            "cut-whole.mp4": "cannot be decoded", "cut-whole.mkv": "truncated",
            "zeroed.mp4": "cannot be decoded"}.items():
        with pytest.raises(Unreadable, match=reason) as caught:
            decode(tmp_path / name, lambda n: list(range(n)), 32)
        assert name in str(caught.value)


def memory(kind) -> float:
    """MiB of this process: "Rss" resident, "Pss" with shared pages divided among their sharers."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(rf"^{kind}: +(\d+) kB", rollup, re.M)[1]) / 1024


@on_linux
def test_fuzzed_clips_never_crash_hang_or_leak(tmp_path):
    whole = [film(tmp_path / f"a{i}.{name}", **options) for i, (name, options) in enumerate([
        ("mp4", X264), ("mkv", X264), ("webm", dict(codec="libvpx", deadline="realtime")),
        FILMS["VP9"], FILMS["AV1"], FILMS["HEVC, open GOPs"], ("avi", dict(codec="mpeg4", bf="2")),
        ("gif", dict(codec="gif", pix_fmt="rgb8", n=20))])]
    outcomes, slowest = collections.Counter(), 0.0
    turns = 1000 if FULL else 80
    for turn in range(turns):
        random = np.random.default_rng(turn)
        original = whole[turn % len(whole)]
        content = bytearray(original.read_bytes())
        at, length = int(random.integers(len(content))), int(random.integers(1, 3000))
        noise = random.bytes(length)
        content[at:at + length] = [                  # overwritten, cut out, zeroed, inserted, gone
            noise, b"", bytes(length), noise * 2, content[at:at + 1]][turn % 5]
        broken = tmp_path / f"broken{original.suffix}"
        broken.write_bytes(content[:at] if turn % 10 == 9 else content)              # or truncated
        began = time.process_time()
        signal.alarm(120)                                         # a hang ends the whole test run
        try:
            decode(broken, lambda n: sample_frames(n, 3, False), 48)
            outcomes["read"] += 1
        except Unreadable:
            outcomes["unreadable"] += 1
        signal.alarm(0)
        slowest = max(slowest, time.process_time() - began)
        if turn == turns // 4:                                    # every decoder has been at work
            before = memory("Rss")
    grown = memory("Rss") - before
    print(f"{turns} corruptions: {dict(outcomes)}, slowest {slowest:.2f} CPU-s, "
          f"grown {grown:.1f} MiB")
    assert min(outcomes["read"], outcomes["unreadable"]) > turns / 5
    assert slowest < 10 and grown < 30


def test_sampled_frames_cover_every_frame_of_every_segment():             # Sec. 3.1
    for n, frames in [(12, 3), (10, 3), (7, 3), (3, 3), (100, 8)]:
        torch.manual_seed(0)
        draws = torch.tensor([sample_frames(n, frames, True) for _ in range(100 * n)])
        bounds = [i * n // frames for i in range(frames + 1)]
        for i in range(frames):
            assert set(draws[:, i].tolist()) == set(range(bounds[i], bounds[i + 1]))
    assert sample_frames(12, 3, False) == [2, 6, 10]                      # the centres
    assert [sample_frames(12, 3, False, v, 3) for v in range(3)] == [
        [0, 4, 8], [2, 6, 10], [3, 7, 11]]
    assert sample_frames(2, 3, True) == [0, 0, 1] and sample_frames(1, 3, False) == [0, 0, 0]


def test_a_manifest_is_indexed_once_and_again_when_it_changes(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(
        json.dumps({"video": f"{i}.mp4", "text": "é" * i}) + "\n" for i in range(50)))
    first, built = Manifest(path), (tmp_path / "m.jsonl.idx").stat().st_mtime_ns
    assert len(first) == 50 and first[7]["text"] == "é" * 7
    assert first[7]["video"] == str(tmp_path / "7.mp4") and first[7]["where"] == f"{path}:8"
    assert len(Manifest(path)) == 50 and (tmp_path / "m.jsonl.idx").stat().st_mtime_ns == built
    with open(path, "a") as file:
        file.write('{"video": "last.mp4"}\n\n \n')                       # blank lines at the end
    assert len(Manifest(path)) == 51 and Manifest(path)[50]["video"].endswith("last.mp4")
    both = Manifest([path, path])
    assert len(both) == 102
    assert both[101]["where"] == f"{path}:51" and both[51]["where"] == f"{path}:1"
    assert pickle.loads(pickle.dumps(both))[101] == both[101]


class Visits(torch.utils.data.Dataset):
    """Item i reads 500 lines of a manifest in shuffled order: (process, MiB before, MiB after)."""

    def __init__(self, manifest):
        self.manifest = manifest

    def __getitem__(self, i):
        before = memory("Pss")
        for k in range(500 * i, 500 * (i + 1)):
            line = shuffled(k % len(self.manifest), len(self.manifest), seed=0)
            assert self.manifest[line]["text"].startswith(f"caption {line} ")
        return os.getpid(), before, memory("Pss")


@on_linux
def test_five_million_lines_cost_neither_time_nor_memory(tmp_path):
    lines, workers = (5_000_000, 8) if FULL else (200_000, 2)
    path = tmp_path / "m.jsonl"
    with open(path, "w") as file:
        file.writelines(f'{{"video": "clips/{i:08}.mp4", "text": "caption {i} of a clip, which is '
                        f'about as long as those that people write"}}\n' for i in range(lines))
    began = time.process_time()
    Manifest(path)
    rate = path.stat().st_size / 1e6 / (time.process_time() - began)
    began = time.perf_counter()
    manifest = Manifest(path)
    opening = time.perf_counter() - began
    loader = torch.utils.data.DataLoader(Visits(manifest), batch_size=None,
                                         sampler=range(10 * workers), num_workers=workers)
    first, last = {}, {}
    for process, before, after in loader:
        first.setdefault(process, before)
        last[process] = after
    grown = max(last[process] - first[process] for process in first)
    print(f"{lines} lines, {path.stat().st_size / 1e6:.0f} MB: indexed at {rate:.0f} MB per CPU-s,"
          f" opened in {opening:.4f} s, {len(first)} workers grew by {grown:.1f} MiB at most")
    assert len(manifest) == lines and len(first) == workers
    assert rate > 100 and opening < 1 and grown < 20


def test_a_bad_manifest_line_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"video": "a.mp4"}\n{"video": "a.mp4", text}\n{"text": "no film"}\n\n'
                    '{"video": "b"}\n'
                    '{"video": "c", "start": "1.5"}')
    for line, complaint in [(1, "not JSON"), (2, 'lacks "video"; its keys are text'),
                            (3, "not JSON"),
                            (5, "\"start\" is '1.5'")]:
        with pytest.raises(DataError, match=complaint) as caught:
            Manifest(path)[line]
        assert f"{path}:{line + 1}: " in str(caught.value) and "\n" not in str(caught.value)
    assert Manifest(path)[4]["video"].endswith("/b")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for name, complaint in [("empty.jsonl", "no samples"), ("none.jsonl", "no such manifest")]:
        with pytest.raises(DataError, match=complaint):
            Manifest(tmp_path / name)


def test_shuffling_is_a_permutation_that_needs_no_list():
    for n in (1, 2, 3, 10, 1000, 4097):
        assert sorted(shuffled(i, n, seed=1) for i in range(n)) == list(range(n))
    big = [shuffled(i, 136_000_000, 0) for i in range(1000)]
    assert len(set(big)) == 1000 and 0.4 < np.mean(big) / 136e6 < 0.6
    assert [shuffled(i, 1000, 0) for i in range(9)] != [shuffled(i, 1000, 1) for i in range(9)]


def test_any_number_of_processes_sees_the_same_batches_and_resuming_skips_nothing():
    def run(world, accumulate, start=0, steps=10):
        parts = [list(Batches([50], 24, 3, rank, world, start, accumulate, steps))
                 for rank in range(world)]
        return [[visit for part in parts for micro in part[t * accumulate:(t + 1) * accumulate]
                 for visit in micro] for t in range(steps - start)]
    alone = run(1, 1)
    assert alone == run(2, 1) == run(4, 3) == run(1, 8)
    assert alone[4:] == run(2, 2, start=4)
    visits = [visit for step in alone for visit in step]
    assert [draw for _, draw in visits] == list(range(240))
    assert sorted(index for index, _ in visits[:50]) == list(range(50))     # an epoch visits all
    assert [index for index, _ in visits[:50]] != [index for index, _ in visits[50:100]]
    with pytest.raises(DataError, match="multiple of 5"):
        Batches([50], 24, 3, world=5)


WORDS = ["a dog runs to the left", "two cats play with a ball", "a man cooks rice"]


def test_tokens_travel_as_json_and_too_long_questions_lose_their_own_last_words():
    tokenizer = Tokenizer.train(WORDS, 200)
    assert tokenizer.to_json() == Tokenizer.train(WORDS, 200).to_json()
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.encode("Á DOG, runs", 9) == tokenizer.encode("a dog, runs", 9)
    def spell(ids):
        return [tokenizer.words.id_to_token(i) for i in ids]
    assert spell(tokenizer.encode("a dog", 40)) == ["[CLS]", "a", "dog", "[SEP]"]
    assert spell(tokenizer.encode("a dog", 40, first="a man")) == [
        "[CLS]", "a", "man", "[SEP]", "a", "dog", "[SEP]"]
    assert spell(tokenizer.encode("a dog", 6, first="a man")) == [
        "[CLS]", "a", "[SEP]", "a", "dog", "[SEP]"]
    assert spell(tokenizer.encode("a dog runs", 4)) == ["[CLS]", "a", "dog", "[SEP]"]
    assert spell(tokenizer.encode("", 4)) == ["[CLS]", "[SEP]"]
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.ordinary) + 5


def test_a_local_vocabulary_is_read_and_an_unknown_name_asks_for_one(tmp_path, monkeypatch):
    tokenizer = Tokenizer.train(WORDS, 200)
    vocabulary = tokenizer.words.get_vocab()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    for name in ("vocab.txt", "tokenizer.json"):
        loaded = Tokenizer.load(tmp_path / name)
        assert loaded.encode(WORDS[0], 40) == tokenizer.encode(WORDS[0], 40)
    with pytest.raises(DataError, match="local vocab.txt"):
        Tokenizer.load(str(tmp_path / "no such vocabulary"))
    (tmp_path / "vocab.txt").write_text("a\nb\n[UNK]")
    with pytest.raises(DataError, match=r"lacks \[PAD\]"):
        Tokenizer.load(tmp_path / "vocab.txt")


def test_masking_hides_a_sixth_of_the_words_and_never_a_special():  # Sec. 3.3: 15 %
    tokenizer = Tokenizer.train(["some words " * 9], 100)
    ids = tokenizer.encode("some words zoo " * 12, 40) + [tokenizer.pad_id] * 3
    torch.manual_seed(0)
    fates = {"chosen": 0, "masked": 0, "kept": 0, "words": 0}
    for _ in range(3000):
        masked, positions, labels = mask_tokens(ids, tokenizer)
        assert labels == [ids[p] for p in positions]
        assert all(masked[p] == ids[p] for p in range(len(ids)) if p not in positions)
        specials = tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id
        fates["words"] += sum(i not in specials for i in ids)
        fates["chosen"] += len(positions)
        fates["masked"] += sum(masked[p] == tokenizer.mask_id for p in positions)
        fates["kept"] += sum(masked[p] == ids[p] for p in positions)
        assert 0 not in positions and max(positions, default=0) < ids.index(tokenizer.sep_id)
        assert not set(masked) & {tokenizer.unk_id} - set(ids)
    assert abs(fates["chosen"] / fates["words"] - 0.15) < 0.005
    assert abs(fates["masked"] / fates["chosen"] - 0.8) < 0.02
    by_chance = 0.1 / len(tokenizer.ordinary)                              # a random word is itself
    assert abs(fates["kept"] / fates["chosen"] - 0.1 - by_chance) < 0.02


def test_whole_word_masking_chooses_the_pieces_of_a_word_together():
    tokenizer = Tokenizer.train(["moss", "swoord"], 5)                     # letters only
    ids, together = tokenizer.encode("words moss", 40), set()
    torch.manual_seed(0)
    for _ in range(300):
        together.add(tuple(mask_tokens(ids, tokenizer, whole_words=True)[1]))
    assert together == {(), (1, 2, 3, 4, 5), (6, 7, 8, 9), tuple(range(1, 10))}


def test_a_mismatched_text_never_meets_a_clip_of_the_same_caption():       # Sec. 3.3, VTM
    captions, videos, kept = ["a", "b", "a", "c"], ["1", "2", "3", "2"], []
    torch.manual_seed(0)
    for _ in range(1000):
        source, labels = vtm_pairs(captions, videos)
        for i, (j, label) in enumerate(zip(source, labels)):
            assert (i == j) if label else (
                captions[i] != captions[j] and videos[i] != videos[j])     # "a different video"
        kept += labels
    assert abs(np.mean(kept) - 0.5) < 0.03
    assert vtm_pairs(["same"] * 3, "123") == ([0, 1, 2], [1, 1, 1])
    assert vtm_pairs("abc", ["same"] * 3) == ([0, 1, 2], [1, 1, 1])


def clips_of(folder, lines, task="pretrain", **options):
    """A Clips over `lines` (dicts), written to folder/m.jsonl beside one film, a.mp4."""
    if not (folder / "a.mp4").exists():
        film(folder / "a.mp4", n=12, size=(48, 40), **X264)
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = {"frames": 3, "image_size": 32, "max_text_len": 40, "train": True, **options}
    return Clips(Manifest(folder / "m.jsonl"), Tokenizer.train(WORDS, 200), task, **options)


def test_a_sample_is_a_function_of_seed_and_draw_whoever_reads_it(tmp_path):
    clips = clips_of(tmp_path, [{"video": "a.mp4", "text": text} for text in WORDS] * 4)
    merge = partial(collate, clips=clips, group=4)
    def batches(workers):
        keys = Batches([len(clips)], 8, seed=0, steps=2)
        return list(torch.utils.data.DataLoader(
            clips, batch_sampler=keys, collate_fn=merge, num_workers=workers))
    for one, other in zip(batches(0), batches(2)):
        assert one.keys() == other.keys()
        for key in one:
            same = (torch.equal(one[key], other[key]) if torch.is_tensor(one[key])
                    else one[key] == other[key])
            assert same, key
    assert not torch.equal(clips[0, 0]["video"], clips[0, 1]["video"])


def test_vtm_pairs_do_not_depend_on_the_number_of_processes(tmp_path):
    clips = clips_of(tmp_path, [{"video": "a.mp4", "text": text} for text in WORDS] * 8)
    merge = partial(collate, clips=clips, group=4)
    def pairs(world):
        parts = [merge([clips[key] for key in next(iter(Batches([len(clips)], 16, 0, rank, world)))])
                 for rank in range(world)]
        first = [16 // world * rank for rank in range(world)]
        return (torch.cat([part["vtm_source"] + at for part, at in zip(parts, first)]),
                torch.cat([part["vtm_labels"] for part in parts]))
    assert all(torch.equal(one, other) for one, other in zip(pairs(1), pairs(2)))
    source, labels = pairs(1)
    assert torch.equal(source // 4, torch.arange(16) // 4)                 # within groups of four


def test_a_pretraining_batch_is_padded_to_stable_shapes(tmp_path):
    clips = clips_of(tmp_path, [{"video": "a.mp4", "text": text} for text in WORDS])
    batch = collate([clips[i, i] for i in range(3)], clips)
    assert batch["video"].shape == (3, 3, 3, 32, 32) and batch["video"].dtype == torch.uint8
    assert batch["text_ids"].shape == batch["mlm_ids"].shape == (3, 8)
    assert batch["text_mask"].sum(1).tolist() == [len(clips.tokenizer.encode(t, 40)) for t in WORDS]
    assert len(batch["mlm_where"]) == len(batch["mlm_labels"]) and len(batch["mlm_where"]) % 32 == 0
    chosen = batch["mlm_labels"] != -100
    originals = batch["text_ids"].flatten()[batch["mlm_where"]]
    assert torch.equal(originals[chosen], batch["mlm_labels"][chosen])
    assert not batch["text_ids"][~batch["text_mask"]].any()                # padding is [PAD], 0


def test_each_task_gets_the_words_it_needs(tmp_path):
    choice = clips_of(tmp_path, [
        {"video": "a.mp4", "options": WORDS, "answer": 1, "question": "what now", "kind": "x"},
        {"video": "a.mp4", "options": WORDS[:2], "answer": WORDS[0]}], "choice", train=False)
    batch = collate([choice[0, 0], choice[1, 1]], choice)
    assert batch["label"].tolist() == [1, 0] and batch["kind"] == ["x", None]
    assert batch["option_mask"].tolist() == [[True] * 3, [True, True, False]]
    assert batch["text_ids"].shape == batch["text_mask"].shape
    assert batch["text_mask"].shape[:2] == (2, 3)
    assert not batch["text_mask"][1, 2].any()
    encoded = choice.tokenizer.encode(WORDS[2], 40, "what now")
    assert batch["text_ids"][0, 2][batch["text_mask"][0, 2]].tolist() == encoded

    asked = [{"video": "a.mp4", "question": "who", "answer": a} for a in ("dog", "yak")]
    qa = clips_of(tmp_path, asked,
                  "qa", train=False, answers=["cat", "dog"], views=3)
    batch = collate([qa[0, 0], qa[1, 1]], qa)
    assert batch["label"].tolist() == [1, -1] and batch["video"].shape == (2, 3, 3, 3, 32, 32)
    assert not torch.equal(batch["video"][0, 0], batch["video"][0, 2])     # views differ in time

    lines = [{"video": "a.mp4", "texts": WORDS}, {"video": "a.mp4", "text": WORDS[0]}]
    retrieval = clips_of(tmp_path, lines, "retrieval", train=False)
    batch = collate([retrieval[0, 0], retrieval[1, 1]], retrieval)
    assert batch["text_clip"].tolist() == [0, 0, 0, 1] and len(batch["text_ids"]) == 4
    retrieval.train = True
    assert len({tuple(retrieval[0, draw]["ids"][0]) for draw in range(30)}) == 3
    with pytest.raises(DataError, match='m.jsonl:1: "answer" is 3; expected an index into the 3'):
        clips_of(tmp_path, [{"video": "a.mp4", "options": WORDS, "answer": 3}], "choice")[0, 0]
    with pytest.raises(DataError, match='m.jsonl:1: lacks "options"; its keys are video, texts'):
        clips_of(tmp_path, lines, "choice")[0, 0]


def test_a_video_of_many_captions_gives_one_window_a_visit(tmp_path):      # HowTo100M
    film(tmp_path / "long.mp4", n=300, size=(48, 40), g="30", **X264)      # 10 s
    windows = [[0, 2, "a dog"], [7, 9, "a man"]]
    clips = clips_of(tmp_path, [{"video": "long.mp4", "captions": windows}])
    texts = {clips[0, draw]["caption"] for draw in range(20)}
    assert texts == {"a dog", "a man"}
    sample = clips.manifest[0]
    assert clips.captions(sample) and sample["end"] - max(sample["start"], 0) <= data.MIN_WINDOW


def test_training_skips_and_reports_what_evaluation_never_replaces(tmp_path):
    lines = [{"video": f"{name}.mp4", "text": WORDS[0]} for name in ("gone", "cut", "a")]
    (tmp_path / "cut.mp4").write_bytes(b"nothing like a film")
    clips = clips_of(tmp_path, lines)
    merged = partial(collate, clips=clips)
    (batch,) = data.load(clips, [[(0, 5), (2, 6)]], merged, 0)
    assert batch["index"].tolist() == [2, 2] and len(batch["errors"]) == 2
    assert "m.jsonl:1" in batch["errors"][0] and "gone.mp4: no such file" in batch["errors"][0]
    clips.train = False
    (batch,) = data.load(clips, [[(0, 0), (1, 1), (2, 2)]], merged, 0)
    assert batch["index"].tolist() == [2] and len(batch["errors"]) == 2
    (batch,) = data.load(clips, [[(0, 0), (1, 1)]], merged, 0)
    assert batch["index"].tolist() == [] and "video" not in batch
    (tmp_path / "a.mp4").unlink()                                # disappears during training
    clips.train = True
    with pytest.raises(DataError, match="in a row"):
        list(data.load(clips, [[(0, 0)]], merged, 0))


def test_crops_are_alike_in_all_frames_and_left_is_never_flipped(tmp_path, monkeypatch):
    frame = torch.arange(40 * 48).remainder(251).to(torch.uint8).reshape(40, 48)
    video = frame.expand(3, 3, 40, 48)
    torch.manual_seed(0)
    crops = {tuple(augment(video, 32, True)[0, 0, 0].tolist()) for _ in range(50)}
    assert len(crops) > 20                                                 # of 9 x 17 places
    cropped = augment(video, 32, True)
    assert torch.equal(cropped[0], cropped[2])
    assert torch.equal(augment(video, 32, False), video[..., 4:36, 8:40])
    assert augment(video, 32, True, rand_augment=True, flip=True).shape == (3, 3, 32, 32)
    flipped = {torch.equal(augment(video[..., :40], 40, True, flip=True), video[..., :40].flip(-1))
               for _ in range(20)}
    assert flipped == {True, False}
    clips = clips_of(tmp_path, [{"video": "a.mp4", "text": text} for text in WORDS[:2]], flip=True)
    asked = []
    monkeypatch.setattr(data, "augment", lambda *task: asked.append(task[-1]) or task[0])
    clips[0, 0], clips[1, 0]
    assert asked == [False, True]                                          # "to the left": never
    assert data.names_sides({"question": "is the Right door open"})
    assert not data.names_sides({"text": "a bright light"})


def test_boxes_wear_the_colour_of_their_identity():                        # VCR, Fig. 5
    video = torch.zeros(1, 3, 60, 80, dtype=torch.uint8)
    drawn = data.draw_boxes(video, [[1, 5, 5, 30, 40], [2, 40, 5, 70, 40]])
    again = data.draw_boxes(video, [[2, 5, 5, 30, 40]])
    assert torch.equal(drawn[0, :, 5, 50], again[0, :, 5, 15]) and drawn[0, :, 5, 50].any()
    assert not torch.equal(drawn[0, :, 5, 15], drawn[0, :, 5, 50])
    inside, outside = drawn[0, :, 20, 15].float(), drawn[0, :, 55, 35]
    assert torch.allclose(inside, 0.3 * drawn[0, :, 5, 15], atol=1) and not outside.any()


def test_boxes_in_pixels_of_the_stored_image_land_in_the_scaled_one(tmp_path):
    film(tmp_path / "i.png", codec="png", n=1, pix_fmt="rgb24", size=(400, 300))
    sample = {"video": "i.png", "text": "a", "boxes": [[0, 150, 100, 250, 200]]}
    clips = clips_of(tmp_path, [sample], train=False, image_size=100)
    picture = clips[0, 0]["video"][0].float()                  # the whole of it, squashed
    clips.boxes = False                                        # Tab. 5 without "Mask"
    clips.squash = True
    red = (picture - clips[0, 0]["video"][0]).abs().amax(0) > 30     # identity 0 is red
    rows, columns = red.nonzero().T
    assert rows.min() in range(32, 35) and rows.max() in range(65, 69)     # 100 / 3, 200 / 3
    assert columns.min() in range(36, 39) and columns.max() in range(61, 65)


class Deadly(Clips):
    """Clips whose sample 2 kills the process that reads it and whose sample 5 never returns."""

    def read_video(self, sample):
        if sample["where"].endswith(":3"):
            os._exit(11)
        if sample["where"].endswith(":6"):
            time.sleep(1000)
        return torch.zeros(3, 3, 32, 32, dtype=torch.uint8)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_reader_that_dies_or_hangs_costs_only_its_clip(workers, tmp_path):
    plain = clips_of(tmp_path, [{"video": "a.mp4", "text": WORDS[0]}] * 9)
    clips = Deadly(plain.manifest, plain.tokenizer, "pretrain", 3, 32, 40, train=True)
    keys = [[(i, i) for i in range(begin, begin + 3)] for begin in (0, 3, 6, 3)]
    batches = list(data.load(clips, keys, partial(collate, clips=clips), workers, timeout=1))
    errors = [error for batch in batches for error in batch["errors"]]
    assert len(errors) == 3 and errors[1] == errors[2]                     # remembered, not tried
    assert "m.jsonl:3: took its reader down (exit code 11)" in errors[0]
    assert "m.jsonl:6: took longer than 1 s" in errors[1]
    indices = [batch["index"].tolist() for batch in batches]
    assert indices == [[0, 1, 3], [3, 4, 6], [6, 7, 8], [3, 4, 6]]         # the next line stands in
    clips.train = False
    (batch,) = data.load(clips, keys[:1], partial(collate, clips=clips), workers, timeout=1)
    assert batch["index"].tolist() == [0, 1] and "took its reader down" in batch["errors"][0]


def test_the_data_doctor_names_every_fault_and_writes_a_clean_manifest(tmp_path, capsys):
    film(tmp_path / "a.mp4", n=12, **X264)
    film(tmp_path / "short.mp4", n=2, **X264)
    (tmp_path / "bad.mp4").write_bytes(b"no film")
    lines = [{"video": "a.mp4", "text": "a dog"}, {"video": "gone.mp4", "text": "a cat"},
             {"video": "bad.mp4", "text": "a cow"}, {"video": "short.mp4", "text": "a dog"},
             {"video": "a.mp4", "text": " "}, {"video": "a.mp4", "text": "so many words " * 20}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nno JSON")
    found = data.check(tmp_path / "m.jsonl", workers=1, timeout=30)
    faults = {fault: [place.split(":")[1].split()[0] for place in places]
              for fault, places in found.items()}
    assert faults == {"missing file": ["2"], "unreadable": ["3"], "short clip": ["4"],
                      "duplicate caption": ["4"], "empty text": ["5"], "text too long": ["6"],
                      "bad line": ["7"]}
    clean = Manifest(tmp_path / "m.clean.jsonl")
    assert [clean[i]["text"][:7] for i in range(len(clean))] == ["a dog", "a dog", "so many"]
    printed = capsys.readouterr().out
    assert "3 of 7 samples are usable" in printed
    assert re.search(r"decode at \d+ per CPU-second: .* 400 clips/s needs [\d.]+ workers", printed)


# ---- Every data set in its owners' form ----------------------------------------------------------

@pytest.fixture
def release(tmp_path):
    """release(name, {annotation file: content}, [clips on disk]) -> {file written: its content}."""
    def run(name, annotations, clips):
        for file, content in {**annotations, **{f"../clips/{clip}": "" for clip in clips}}.items():
            path = tmp_path / "notes" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps(content) if isinstance(content, (list, dict)) else content
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        (tmp_path / "clips").mkdir(exist_ok=True)
        notes = [tmp_path / "notes" / file for file in ("", *annotations)]   # twice, read once
        convert(name, notes, tmp_path / "clips", tmp_path / "out")
        written = {}
        for path in (tmp_path / "out").iterdir():
            written[path.stem] = [json.loads(line) for line in open(path, encoding="utf-8")]
            assert path.suffix != ".part"
            for sample in written[path.stem] if path.suffix == ".jsonl" else ():
                assert (tmp_path / "out" / sample["video"]).exists()
                sample["video"] = os.path.relpath(sample["video"], "../clips")
        return written
    return run


def jsonl(*samples):
    return "".join(json.dumps(sample) + "\n" for sample in samples)


def sentences(*videos):
    return {"sentences": [{"sen_id": 0, "video_id": video, "caption": f"{video} {i}"}
                          for video in videos for i in "ab"]}


CRC32 = [f"{zlib.crc32(b'http://x/a')}", f"{zlib.crc32(b'http://x/b')}.jpg"]
COCO = {"captions_train2014.json": {"images": [{"id": 9, "file_name": "a.jpg"}], "annotations": [
    {"image_id": 9, "caption": text} for text in ("one", "two")]}}
KARPATHY = {"images": [{"filename": name, "split": split, "sentences": [{"raw": f"{split}\n1"}]}
                       for name, split in (("a.jpg", "test"), ("b.jpg", "restval"))]}
HOWTO = {"start": [0.41, 3.9, 6.0], "end": [3.91, 5, 8.5], "text": ["pic", "", "bowl"]}
HOWTO_CSV = "start,end,text\n0.41,3.91,pic\n3.9,5.0,\n6.0,8.5,bowl\n"
KINETICS = "label,youtube_id,time_start,time_end"
WHO = {"question": "who?", "answer": "a", "answer_type": "what"}
GIFS = ["gifs/n_400.gif", "gifs/n_400.mp4"]                              # re-encoded: preferred
GIF, FIVE = {"video": GIFS[1]}, {"options": list("abcde")}
DOES = "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tkey\nn_400\tq, 4 ?\ta\tb\tc\td\te\t2\t5\n"
HOW_MANY = "gif_name\tquestion\tanswer\ttype\tkey\tdescription\nn_400\tq ?\ttwo\t1\t5\ttwo dogs\n"
MSVD = {"AllVideoDescriptions.txt": "# remark\n\nab_1_2 a man, who sings\nab_1_2 a singer\n"
        "c_0_9 a dog\n"}
LONG = "BATTLE_LA_00.03.06.170-00.03.09.675"
CUT = f'{LONG}\t0\t1\t0\t1\t"Hi, SOMEONE'
MOMENTS = [{"annotation_id": 1, "description": text, "video": video, "times": [[0, 0], [1, 4]]}
           for video, text in (("1@N_2.mov", "a cat"), ("4@N.avi", "dog"), ("1@N_2.mov", "it\nr "))]
DANCE = {"v_QOl": {"duration": 82.73, "timestamps": [[0.8, 19.9], [17.4, 60.8]],
                   "sentences": ["A woman dances.", " She turns."]}}
ASKED = {"qid": 7, "q": "Why ?", **{f"a{i}": f"o{i}" for i in range(5)}, "answer_idx": 3,
         "vid_name": "met_s01_seg02_clip_00", "show_name": "How I Met You Mother"}
MET = "frames_hq/met_frames/met_s01_seg02_clip_00"
WHY = {"video": MET, "question": "Why ?", "options": [f"o{i}" for i in range(5)], "answer": 3}
PAN = """"['u-1', 300, ""#C C's pan""]","[['u-1', 1, 'cuts'], ['u-2', 2, ""#C C's pan""]]\""""


@pytest.mark.parametrize("name, notes, clips, expected", [
    ("cc3m", {"Train_GCC-training.tsv": 'a "big" dog\thttp://x/a\n',
              "Validation_GCC-1.1.0-Validation.tsv": '"a cat\thttp://x/b\n'}, CRC32,
     {"train": [{"video": CRC32[0], "text": 'a "big" dog', "image": True}],
      "val": [{"video": CRC32[1], "text": '"a cat', "image": True}]}),
    *[("howto100m", notes, ["food/-tCQ4tCQdWE.webm"], {"train": [
        {"video": "food/-tCQ4tCQdWE.webm", "captions": [[0.41, 3.91, "pic"], [6.0, 8.5, "bowl"]]}]})
      for notes in ({"caption.json": {"-tCQ4tCQdWE": HOWTO}}, {"-tCQ4tCQdWE.csv": HOWTO_CSV})],
    ("coco", COCO, ["a.jpg"], {"train": [{"video": "a.jpg", "texts": ["one", "two"]}]}),
    ("coco", {**COCO, "dataset_coco.json": KARPATHY}, ["a.jpg", "b.jpg"],
     {"train": [{"video": "b.jpg", "texts": ["restval 1"]}],
      "test": [{"video": "a.jpg", "texts": ["test 1"]}]}),
    ("msrvtt_qa", {"msrvtt_qa_test.jsonl": jsonl({"video_id": "n_400", **WHO})}, GIFS,
     {"test": [{**GIF, "question": "who?", "answer": "a", "kind": "who?"}]}),
    ("msrvtt_mc", {"msrvtt_mc_test.jsonl": jsonl({"clip_name": "n_400", **FIVE, "answer": 1})},
     GIFS,
     {"test": [{**GIF, **FIVE, "answer": 1}]}),
    ("tgif_frameqa", {"frameqa_test.jsonl": jsonl({"gif_name": "n_400", **WHO})}, GIFS,
     {"test": [{**GIF, "question": "who?", "answer": "a", "kind": "what"}]}),
    ("activitynet", {"val1.jsonl": jsonl({"clip_name": "n_400", "caption": "One. Two."})}, GIFS,
     {"test": [{**GIF, "text": "One. Two."}]}),
    ("activitynet", {"val_1.json": DANCE, "val_2.json": {}}, ["QOl/000.jpg"],            # Tab. 3b
     {"test": [{"video": "QOl", "text": "A woman dances. She turns."}]}),
    ("didemo", {"test_data.json": MOMENTS}, ["1@N_2.mov.mp4", "4@N.avi"],                # Tab. 3c
     {"test": [{"video": "1@N_2.mov.mp4", "text": "a cat it r"},
               {"video": "4@N.avi", "text": "dog"}]}),
    ("msvd", {**MSVD, "youtube_mapping.txt": "ab_1_2 vid1\nc_0_9 vid1301\n",
              "val_list.txt": "c_0_9\n"}, ["ab_1_2.avi", "c_0_9.avi"],
     {"train": [{"video": "ab_1_2.avi", "texts": ["a man, who sings", "a singer"]}],
      "val": [{"video": "c_0_9.avi", "texts": ["a dog"]}],
      "test": [{"video": "c_0_9.avi", "texts": ["a dog"]}]}),
    ("tgif_action", {"Train_action_question.csv": DOES, "Total_action_question.csv": DOES}, GIFS,
     {"train": [{**GIF, "question": "q, 4 ?", **FIVE, "answer": 2}]}),                   # Tab. 2a
    ("tgif_frameqa", {"Train_frameqa_question.csv": HOW_MANY}, GIFS, {"answers": [["two"]],
     "train": [{**GIF, "question": "q ?", "answer": "two", "kind": "number"}]}),
    ("tvqa", {"tvqa_val.jsonl": jsonl({**ASKED, "ts": "7.5-20"}, {**ASKED, "ts": "nan-nan"}),
              "tvqa_test_public.jsonl": jsonl({**ASKED, "answer_idx": None})},
     [f"{MET}/00001.jpg", "frames_hq/met_frames/met_s01_seg02_clip_01/00001.jpg"],       # App. A
     {"test": [{**WHY, "start": 7.5, "end": 20, "fps": 3}, {**WHY, "fps": 3}]}),
    ("lsmdc", {"LSMDC16_challenge_1000_publictect.csv": f"{CUT}\n"}, [f"BATTLE_LA/{LONG}.avi"],
     {"test": [{"video": f"BATTLE_LA/{LONG}.avi", "text": '"Hi, SOMEONE'}]}),
    ("lsmdc_mc", {f"LSMDC16_multiple_choice_{split}.csv": f"{CUT}\tb\tc\td\te{end}\n"
                  for split, end in (("train", ""), ("valid", ""), ("test_randomized", "\t5"))},
     [f"{LONG}.avi"],                                                                    # Tab. 4b
     {split: [{"video": f"{LONG}.avi", "options": ['"Hi, SOMEONE', *"bcde"], "answer": answer}]
      for split, answer in (("train", 0), ("val", 0), ("test", 4))}),
    ("kinetics400", {"train.csv": f'{KINETICS},split\n"arm wrestling",-3B,59,69,train\n',
                     "validate.csv": f"{KINETICS}\nyoga,-3B,59,69\n"}, ["-3B_000059_000069.mp4"],
     {"train": [{"video": "-3B_000059_000069.mp4", "answer": "arm wrestling"}],          # Tab. 12
      "test": [{"video": "-3B_000059_000069.mp4", "answer": "yoga"}],
      "answers": [["arm wrestling"]]}),
    ("hmdb51", {"brush_hair_test_split1.txt": "a#1.avi 1 \nb.avi 2 \nc.avi 0 \n",
                "brush_hair_test_split2.txt": "b.avi 1 \n", "run_test_split1.txt": "b.avi 2\n"},
     ["brush_hair/a#1.avi", "brush_hair/b.avi", "run/b.avi"],             # one name in two folders
     {"train": [{"video": "brush_hair/a#1.avi", "answer": "brush hair"}],
      "test": [{"video": "brush_hair/b.avi", "answer": "brush hair"},
               {"video": "run/b.avi", "answer": "run"}], "answers": [["brush hair"]]}),
    ("ego4d_mc", {"mc_val.csv": f"question,answers\n{PAN}\n"}, ["u-1.mp4"],              # Tab. 13
     {"test": [{"video": "u-1.mp4", "start": 8, "end": 12, "options": ["cuts", "#C C's pan"],
                "answer": 1}]})])
def test_published_files_become_manifests(release, name, notes, clips, expected):
    assert release(name, notes, clips) == expected


def test_webvid_captions_keep_commas_quotes_and_embedded_newlines(release, capsys):
    out = release("webvid", {
        "results_2M_train.csv": "videoid,contentUrl,duration,page_dir,name\n"
        '7,https://x/7.mp4,PT10S,000001_000050,"A ""red"" car,\nparked"\n'
        "8,https://x/8.mp4,PT10S,000001_000050,gone\n9,u,d,000001_000050,\n",
        "webvid_validation_success_full.tsv": 'caption\tpath\n"The ""sea"""\t000051_000100/5\n'},
        ["000001_000050/7.mp4", "000001_000050/9.mp4", "000051_000100/5.webm"])
    assert out == {"train": [{"video": "000001_000050/7.mp4", "text": 'A "red" car, parked'}],
                   "val": [{"video": "000051_000100/5.webm", "text": 'The "sea"'}]}
    assert re.search(r"left out 1 samples of 1 clips .*such as 000001_000050/8\) and 1 without",
                     capsys.readouterr().out)


def test_a_caption_file_larger_than_memory_is_read_in_pieces(tmp_path):
    captions = {f"id{i}": {"start": [i], "text": ['a {"b": 1}, \\ é']} for i in range(50)}
    path = tmp_path / "caption.json"
    path.write_text(json.dumps(captions, indent=1))
    for chunk in 1, 7, 1 << 20:
        assert dict(entries(path, chunk)) == captions
    path.write_text(json.dumps(captions)[:-9])
    with pytest.raises(DataError, match="caption.json.*download it again"):
        list(entries(path, 64))


def test_yt_temporal_speech_is_cut_into_windows_of_ten_to_fifteen_seconds(release):
    words = [{"word": f"w{i}", "time": 1.5 * i} for i in range(40)] + [
        {"word": "&gt;&gt;", "time": 3}, {"word": "late", "time": 90}]
    clean = f"W0, W1. new {' '.join(f'w{i}' for i in range(3, 40))} late"
    video = {"info": {"id": "WAaKRUoY6Io", "duration": 97}, "subtitles": words,
             "denoised": [{"noisyasr": "", "cleanasr": clean}]}
    shard = {"yttemporal180m_train_000of100.jsonl.gz": gzip.compress(jsonl(video).encode())}
    one, other = (release("yttemporal", form, ["s/data/WAaKRUoY6Io.mp4"])["train"]
                  for form in ({"WAaKRUoY6Io.grover.json": video}, shard))   # one a file, or many
    windows = one[0]["captions"]
    assert one == other and windows[0] == [0, 12.5, "W0, W1. new w3 w4 w5 w6 w7 w8"]
    assert all(10 <= end - start <= 15 for start, end, _ in windows[:-1])
    assert windows[-2:] == [[54, 66.5, "w36 w37 w38 w39"], [90, 97, "late"]]   # after a long pause
    assert speech_windows(words[:8], [], 97)[0][2] == "w0 w1 w2 w3 w4 w5 w6 w7"
    assert speech_windows([], ["x"], 97) == []


MSRVTT = {"train_val_videodatainfo.json": sentences("video0", "video1", "video6513"),
          "test_videodatainfo.json": sentences("video7010", "video9770"),
          "MSRVTT_JSFUSION_test.csv": "key,vid_key,video_id,sentence\n"
                                      'ret0,msr9770,video9770,"a man, talking"\n'}
MSRVTT_CLIPS = [f"TrainValVideo/video{i}.mp4" for i in (0, 1, 6513, 7010, 9770)]


@pytest.mark.parametrize("name, notes, train, test", [                   # Tab. 3a
    ("9k", {}, ["0", "1", "6513", "7010"], ["a man, talking"]),
    ("7k", {}, ["0", "1", "6513"], ["a man, talking"]),
    ("7k", {f"{split}_list_miech.txt": f"video{i}\n" for i, split in enumerate(["test", "train"])},
     ["1"], ["video0 a", "video0 b"]),
    ("full", {}, ["0", "1"], ["video7010 a", "video7010 b"])])
def test_msrvtt_retrieval_has_three_protocols(release, name, notes, train, test):
    out = release(f"msrvtt_{name}", {**MSRVTT, **notes}, MSRVTT_CLIPS)
    assert sorted(sample["video"][19:-4] for sample in out["train"]) == train
    assert out["test"][0]["texts"] == test


def test_msrvtt_choices_train_on_captions_and_test_on_jsfusions_questions(release):  # Tab. 4a
    question = "\tkey\tvid_key\ta1\ta2\ta3\ta4\ta5\tanswer\n0\tmc0\tmsr7010\ta\tb\tc\td\te\t3\n"
    out = release("msrvtt_mc", {**MSRVTT, "MSR_MC_test.csv": question}, MSRVTT_CLIPS)
    assert out["test"] == [{"video": MSRVTT_CLIPS[3], **FIVE, "answer": 3}]
    assert out["train"][0]["answer"] == 0 and out["train"][0]["options"][0] == "video0 a"
    assert set(out["train"][0]["options"][1:]) == {"video1 a", "video1 b"}   # of other videos


@pytest.mark.parametrize("name, clip, mapping, kept", [                  # Tab. 2b, 2c
    ("msrvtt_qa", "video6513.mp4", "", 1500),
    ("msvd_qa", "-4wsuPCjDBc_5_15.avi", "-4wsuPCjDBc_5_15 vid6513\n", 1000)])
def test_open_questions_keep_the_commonest_training_answers(release, name, clip, mapping, kept):
    asked = [{"answer": answer, "id": 1, "question": "What is it?", "video_id": video}
             for answer, video in (("zebra", 6513), ("man", 6513), ("dog", 6513), ("man", 6513),
                                   ("rare", 99), ("unseen", 6513))]
    out = release(name, {"train_qa.json": asked[:-1], "test_qa.json": asked[-1:],
                         "youtube_mapping.txt": mapping}, [clip])
    assert out["answers"] == [["man", "zebra", "dog", "rare"]]           # ties: the first to appear
    assert len(out["train"]) == 4 and DATASETS[name][3] == kept          # one clip is gone
    assert out["test"] == [{**out["train"][0], "video": clip, "answer": "unseen", "kind": "what"}]


def test_vcr_words_boxes_and_both_tasks_agree_on_who_is_who(release):  # Tab. 5, Fig. 5
    row = {"img_fn": "lsmdc_a/x@0.jpg", "metadata_fn": "lsmdc_a/x@0.json", "objects":
           ["person", "person", "bottle", "dog"], "question": ["Why", "is", [2], "near", [1], "?"],
           "answer_choices": [["He", "is"], [[3], "ran"], [[2], "ran"], ["no"]], "answer_label": 1,
           "rationale_choices": [[[1, 2], "run"], ["a"], ["b"], ["c"]], "rationale_label": 0}
    notes = {"val.jsonl": jsonl({**row, "img_fn": "gone.jpg"}, row), "../clips/lsmdc_a/x@0.json":
             {"boxes": [[9 * i, 1, 9 * i + 5, 6, 0.99] for i in range(4)]}}
    (answer,), (reason,) = (release(name, notes, [row["img_fn"]])["test"]
                            for name in ("vcr_qa", "vcr_qar"))   # the same lines, for Q→AR
    question = "Why is bottle 0 near person 1 ?"
    boxes = [[0, 18, 1, 23, 6], [1, 9, 1, 14, 6], [2, 27, 1, 32, 6]]
    assert answer == {"video": row["img_fn"], "question": question, "answer": 1, "kind": "Q→A",
                      "options": ["He is", "dog 2 ran", "bottle 0 ran", "no"], "boxes": boxes}
    assert reason == {**answer, "question": f"{question} dog 2 ran", "answer": 0, "kind": "QA→R",
                      "options": ["person 1 bottle 0 run", *"abc"]}


@pytest.mark.parametrize("name, notes, message", [
    ("imagenet", {}, "imagenet.*webvid, howto100m"),
    ("didemo", {"readme.txt": ""}, "no annotation file is named SPLIT_data.json.*Tab. 3c"),
    ("didemo", {"test_data.json": "[{"}, "test_data.json: damaged.*download"),
    ("didemo", {"test_data.json": [{"video": "a"}]}, "test_data.json: not as published.*descript"),
    ("didemo", {"val_data.json": [{"video": "a.mp4", "description": ""}]}, "such as a.mp4"),
    ("vcr_qa", {"../out/train.jsonl": ""}, "lies in --out"),
    ("webvid", {"results_2M_train.csv": "id,name\n1,x\n"}, "2M_train.csv.*columns id, name"),
    ("msrvtt_9k", {"MSRVTT_data.json": sentences()}, "need MSRVTT_JSFUSION_test.csv")])
def test_what_is_wrong_is_said_in_one_line(release, name, notes, message):
    with pytest.raises(DataError, match=message) as error:
        release(name, notes, ["x.mp4"])
    assert "\n" not in str(error.value)


# ---- Training (Sec. 4.1.2) ----------------------------------------------------------------------

@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder with 24 toy clips, train.jsonl (captions) and choice.jsonl (order questions)."""
    folder = tmp_path_factory.mktemp("clips")
    draw = random.Random(0)
    with open(folder / "train.jsonl", "w") as train, open(folder / "choice.jsonl", "w") as choice:
        for i in range(24):
            toy_clip = data.ToyClip.drawn(draw)
            data.write_clip(folder / f"{i}.mp4", toy_clip.frames(), 4, {"crf": "18"})
            texts = [toy_clip.caption(), toy_clip.caption(order=1 - toy_clip.order)]
            print(json.dumps({"video": f"{i}.mp4", "text": texts[0]}), file=train)
            print(json.dumps({"video": f"{i}.mp4", "options": texts, "answer": 0, "kind": "order"}),
                  file=choice)
    (folder / "no_answer.jsonl").write_text(json.dumps({"video": "0.mp4", "options": texts}))
    with open(folder / "retrieval.jsonl", "w") as retrieval, open(folder / "qa.jsonl", "w") as qa:
        for i in range(7):
            samples = [json.loads(line) for line in (folder / "train.jsonl").read_text().split("\n")
                       if f'"{i}.mp4"' in line]
            text = samples[0]["text"]
            print(json.dumps({"video": f"{i}.mp4", "texts": [text, f"{i} {text}"]}), file=retrieval)
            print(json.dumps({"video": f"{i}.mp4", "question": "what shape is it?",
                              "answer": text.split()[i % 2]}), file=qa)
    return folder


TINY_RUN = ("--width 32 --depth 2 --heads 2 --image_size 32 --vocab train --batch 8 --workers 0 "
            "--lr 1e-3 --steps 12 --save_every 2 --log_every 1").split()


def run(module, *arguments) -> tuple[int, str, str]:
    """(exit code, output, error) of a command line of the project, in this process for speed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as stop:
            code = stop.code
        except (ValueError, OSError) as error:     # what the last lines of train.py, eval.py catch
            code = 1
            print(error, file=err)
    return code, out.getvalue(), err.getvalue()


FULL = os.environ.get("FULL") == "1"       # full sizes: 50 steps, 20 kills, torchrun; minutes
FORKS = multiprocessing.get_context("forkserver")      # a process that has torch loaded, and forks
FORKS.set_forkserver_preload(["test_allinone"])


def command(script, arguments, environment, output):
    """`python SCRIPT` as the last lines of train.py run it; it writes to the file `output`."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    if "RANK" in environment:
        torch.set_num_threads(1)                           # as torchrun has it
    try:
        {"train.py": train, "eval.py": eval}[script].main(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"{script}: {error}")


class Started:
    """A command line of train.py or eval.py in processes of its own, which are its ranks.

    torchrun: started by `torchrun` with these options, instead of by a fork with its variables.
    """

    def __init__(self, output, *arguments, processes=1, torchrun=None, script="train.py",
                 environment={}):
        self.output, self.launcher, arguments = Path(output), None, list(map(str, arguments))
        self.output.parent.mkdir(exist_ok=True)
        if torchrun is not None:
            with open(self.output, "w") as file:
                self.launcher = subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", "--standalone",
                     f"--nproc_per_node={processes}", *torchrun, script, *arguments],
                    cwd=HERE, stdout=file, stderr=file)
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        self.ranks = [FORKS.Process(target=command, args=(
            script, arguments, environment if processes == 1 else {**world, "RANK": str(rank)},
            f"{self.output}{rank or ''}")) for rank in range(processes)]
        for rank in self.ranks:
            rank.start()

    def pids(self) -> list[int]:
        if self.launcher is None:
            return [rank.pid for rank in self.ranks]
        children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def running(self) -> bool:
        if self.launcher is not None:
            return self.launcher.poll() is None
        return all(rank.is_alive() for rank in self.ranks)

    def kill(self, pid=None) -> None:
        """SIGKILL to one rank, or to all, and waits until every rank is gone."""
        for victim in [pid] if pid else self.pids():
            with contextlib.suppress(ProcessLookupError):      # it had just ended
                os.kill(victim, signal.SIGKILL)
        self.wait()

    def wait(self, seconds=300) -> tuple[int, str]:
        """(exit code, output); a rank that outlives another is killed, as torchrun does."""
        if self.launcher is not None:
            return self.launcher.wait(seconds), self.output.read_text()
        until = time.monotonic() + seconds
        while any(rank.is_alive() for rank in self.ranks) and time.monotonic() < until:
            time.sleep(0.02)
            if any(rank.exitcode for rank in self.ranks):
                for rank in self.ranks:
                    rank.kill()
        assert not any(rank.is_alive() for rank in self.ranks), f"still running: {self.output}"
        return max(abs(rank.exitcode) for rank in self.ranks), self.output.read_text()


def pretrain(clips, out, *flags, **options):
    return Started(f"{out}.txt", "--task", "pretrain", "--data", clips / "train.jsonl",
                   "--out", out, *TINY_RUN, *flags, **options)


def pretrain_here(clips, out, *flags):
    return run(train, "--task", "pretrain", "--data", clips / "train.jsonl", "--out", out,
               *TINY_RUN, *flags)


def finished(out) -> tuple[dict, list]:
    """(checkpoint, losses of each step) of a run folder."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["mlm"], line["vtm"], line.get("vtc", 0), line["grad_norm"])
              for line in lines if "mlm" in line]
    return torch.load(out / "checkpoint.pt", weights_only=True), losses


def equal(a, b) -> bool:
    """Whether two nests of dicts, lists and tensors are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="session")
def whole_run(clips, tmp_path_factory) -> Path:
    """A run of 12 steps that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code, _, err = pretrain_here(clips, out)
    assert code == 0, err
    return out


def test_the_learning_rate_warms_up_for_a_tenth_and_decays_linearly_to_zero():
    rates = [train.lr_at(step, 1000, 1e-4, warmup=0.1) for step in range(1001)]
    assert rates[0] == pytest.approx(1e-6) and rates[99] == max(rates) == pytest.approx(1e-4)
    assert rates[550] == pytest.approx(0.5e-4) and rates[1000] == 0
    falls = np.diff(rates[100:])
    assert np.allclose(falls, falls[0]) and falls[0] < 0
    assert train.lr_at(2499, 200_000, 1e-4, warmup=2500) == pytest.approx(1e-4)   # the release's


def test_defaults_are_the_papers_recipe():
    config, sizes, _ = train.configure(["--data", "x.jsonl"])
    assert (config.lr, config.weight_decay, config.warmup, config.steps, config.batch_per_gpu) == (
        1e-4, 1e-2, 0.1, 200_000, 16)
    assert Config(**sizes) == Config()                                       # All-in-one-B
    config, sizes, _ = train.configure("--data x.jsonl --recipe release --beta2 0.9".split())
    assert "wpa" in config.objectives and config.whole_word_masking and config.warmup == 2500
    assert sizes["roll"] == "release" and config.beta2 == 0.9   # a flag has the last word


LONG_RUN = ("--steps", 60 if FULL else 8, "--save_every", 1)


@pytest.fixture(scope="session")
def unkilled(clips, tmp_path_factory):
    """Folders of runs of LONG_RUN that nothing interrupts, by number of processes."""
    folders = {}
    def of(processes):
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp(f"unkilled{processes}") / "run"
            code, out = pretrain(clips, folders[processes], *LONG_RUN, processes=processes).wait()
            assert code == 0, out
        return folders[processes]
    return of


def same_bits(one, other):
    """Two run folders hold the same weights, optimiser state and losses of every step."""
    (saved, losses), (expected, expected_losses) = finished(one), finished(other)
    assert losses == expected_losses and len(losses) == expected["state"]["step"]
    for key in ("model", "optimizer", "scaler", "state"):
        assert equal(saved[key], expected[key]), key


def wait_for_step(process, out, step):
    """Until the log of a run tells of this step, or the run has ended."""
    log = out / "log.jsonl"
    while process.running() and not (log.exists() and f'"step": {step},' in log.read_text()):
        time.sleep(0.005)


@pytest.mark.parametrize("processes, torchrun", [(1, None), (2, None)] + [(2, [])] * FULL)
def test_a_run_killed_at_random_times_ends_with_the_same_bits(processes, torchrun, clips, unkilled,
                                                              tmp_path):
    """Every other kill falls into a checkpoint write; one rank is hit, the others then stop."""
    draw, out, kills, in_write, step = random.Random(processes), tmp_path / "run", 0, 0, 0
    while kills < (20 if FULL else 2):
        process = pretrain(clips, out, *LONG_RUN, processes=processes, torchrun=torchrun)
        wait_for_step(process, out, step + 2)             # a checkpoint or more was written
        if kills % 2:
            while process.running() and not (out / "checkpoint.partial").exists():
                pass
        else:
            time.sleep(draw.random() * 0.1)
        if not process.running():                       # it got to the end: start over
            assert process.wait()[0] == 0, process.wait()
            shutil.rmtree(out)
            step = 0
            continue
        process.kill(draw.choice(process.pids()))
        kills, in_write = kills + 1, in_write + (out / "checkpoint.partial").exists()
        if (out / "checkpoint.pt").exists():            # never unreadable
            step = torch.load(out / "checkpoint.pt", weights_only=True)["state"]["step"]
    code, printed = pretrain(clips, out, *LONG_RUN, processes=processes, torchrun=torchrun).wait()
    assert code == 0 and "resuming" in printed, printed
    same_bits(out, unkilled(processes))
    print(f"{kills} kills, {in_write} of them during a checkpoint write")
    assert in_write or not FULL


@pytest.mark.skipif(not FULL, reason="FULL=1 runs it: torchrun starts six processes")
def test_torchrun_restarts_a_killed_worker_and_the_run_ends_with_the_same_bits(
        clips, unkilled, tmp_path):
    out = tmp_path / "run"
    process = pretrain(clips, out, *LONG_RUN, processes=2, torchrun=["--max-restarts=2"])
    for step in (4, 12):
        wait_for_step(process, out, step)
        os.kill(process.pids()[-1], signal.SIGKILL)
    code, printed = process.wait()
    assert code == 0 and printed.count("resuming") == 2, printed
    same_bits(out, unkilled(2))


def test_sigterm_saves_and_exits_cleanly(clips, tmp_path):
    with open(tmp_path / "output", "w+") as output:
        process = subprocess.Popen(
            [sys.executable, "train.py", "--data", clips / "train.jsonl", "--out", tmp_path / "run",
             *TINY_RUN, "--steps", "100000"], cwd=HERE, stdout=output, stderr=output)
        log = tmp_path / "run" / "log.jsonl"
        while process.poll() is None and not (log.exists() and '"step": 2,' in log.read_text()):
            time.sleep(0.02)
        process.terminate()
        assert process.wait(60) == 0 and "stopped after step" in Path(output.name).read_text()
    assert finished(tmp_path / "run")[0]["state"]["step"] >= 2


def test_a_full_disk_leaves_the_checkpoint_before_it(clips, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    old = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limit[1]))
    try:
        code, _, err = pretrain_here(clips, tmp_path / "run", "--steps", 14)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 1 and re.search("checkpoint.pt: cannot save .*; .*checkpoint.pt is whole", err)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == old
    assert not (tmp_path / "run" / "checkpoint.partial").exists()


@pytest.fixture(scope="session")
def layouts(clips, tmp_path_factory):
    """Finished runs of 32 clips a step without dropout: (processes, clips a pass) -> folder."""
    folders = {}
    def of(processes, size):
        if (processes, size) not in folders:
            out = folders[processes, size] = tmp_path_factory.mktemp("layout") / "run"
            process = pretrain(
                clips, out, "--dropout", 0, "--drop_path", 0, "--steps", 50 if FULL else 4,
                "--batch", 32, "--batch_per_gpu", size, "--objectives", "vtm", "mlm", "vtc",
                "--save_every", 50, "--lr", 1e-4, processes=processes)
            code, printed = process.wait()
            assert code == 0, printed
        return folders[processes, size]
    return of


@pytest.mark.parametrize("processes, size",
                         [(1, 8), (2, 8)] + [(2, 16), (4, 8)] * FULL)
def test_any_number_of_processes_and_passes_gives_the_same_losses_and_weights(
        processes, size, layouts):
    """VTM's pairs, MLM's divisor and all 31 negatives of VTC belong to the whole batch."""
    (first, losses), (second, others) = finished(layouts(1, 32)), finished(layouts(processes, size))
    assert np.allclose(losses, others, rtol=2e-6, atol=0), np.abs(np.array(losses) / others).max(0)
    for name, tensor in first["model"].items():
        other = second["model"][name]
        if name.endswith("qkv.bias"):    # softmax ignores the keys' bias: Adam scales noise
            tensor, other = (torch.cat([x[:32], x[64:]]) for x in (tensor, other))
        assert torch.allclose(tensor, other, atol=5e-6), (name, (tensor - other).abs().max())


def training_batch(config, B=4, m=8):
    """A pass as data.collate makes it: random pixels and text, two words masked a clip."""
    torch.manual_seed(m)
    size = config.image_size
    ids = torch.randint(5, config.vocab_size, (B, m))
    where = (torch.rand(B, m).topk(2).indices + m * torch.arange(B)[:, None]).flatten()
    return {"video": torch.randint(256, (B, config.frames, 3, size, size), dtype=torch.uint8),
            "text_ids": ids, "text_mask": torch.ones_like(ids, dtype=torch.bool), "mlm_ids": ids,
            "mlm_where": where, "mlm_labels": ids.flatten()[where],
            "vtm_source": torch.arange(B).roll(1), "vtm_labels": torch.zeros(B, dtype=torch.int64)}


def mean(pair):
    return pair[0] / pair[1]


@pytest.fixture
def alone():
    """A process group of this process alone, as train.py and eval.py make one."""
    with eval.joined_processes():
        yield


def test_a_pass_gives_the_losses_of_two_plain_joint_passes():
    model, batch = build(), training_batch(TINY)
    parts = train.Objectives(model, ("vtm", "mlm"))(batch)
    words = model.mlm_head(model(batch["video"], batch["mlm_ids"]).text).flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(words[batch["mlm_where"]], batch["mlm_labels"])
    assert torch.allclose(mean(parts["mlm"]), plain, rtol=1e-5)
    pooled = model(batch["video"][batch["vtm_source"]], batch["text_ids"]).pooled
    plain = vtm_loss(model.vtm_head(pooled), batch["vtm_labels"])
    assert torch.allclose(mean(parts["vtm"]), plain, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0, 0.3])
def test_vtc_of_many_passes_has_the_gradient_of_one(dropout, alone):
    model = build(dropout=dropout, drop_path=dropout, depth=2).train()
    objectives = train.Objectives(model, ("vtc",))
    batch = training_batch(model.config)
    halves = [{name: batch[name][part] for name in ("video", "text_ids", "text_mask")}
              for part in (slice(0, 2), slice(2, 4))]
    found = train.contrast(objectives, halves, seeds=[5, 6])
    values = []
    for half, one, seed in zip(halves, found, (5, 6)):
        torch.manual_seed(seed)
        values.append(mean(objectives({**half, "contrast": one})["vtc"]))
    (sum(values) / 2).backward()
    many = [p.grad.clone() for p in objectives.parameters() if p.grad is not None]
    objectives.zero_grad()
    sides = []
    for half, seed in zip(halves, (5, 6)):                # all in memory at once, the same dropout
        torch.manual_seed(seed)
        sides.append(objectives.unimodal(half))
    loss = vtc_loss(*(torch.cat(side) for side in zip(*sides)))
    loss.backward()
    one = [p.grad for p in objectives.parameters() if p.grad is not None]
    assert torch.allclose(values[0], loss) and torch.allclose(values[1], loss)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(many, one))


def test_compiling_breaks_no_graph_and_stops_at_the_second_text_length():
    model = build(depth=1, dropout=0.1, drop_path=0.1, max_text_len=40).train()
    objectives, graphs = train.Objectives(model, ("vtm", "mlm")), []
    if FULL:                                              # the compiler itself, minutes
        model.eval()
        batch = training_batch(model.config)
        plain = objectives(batch)
        model.transform = torch.compile(model.transform, fullgraph=True)
        fast = objectives(batch)
        assert all(torch.allclose(plain[name][0], fast[name][0], rtol=1e-5) for name in plain)
        del model.transform
        model.train()
    torch._dynamo.reset()
    model.transform = torch.compile(model.transform, fullgraph=True, backend=lambda graph, _: (
        graphs.append(graph), graph.forward)[1])          # counts what is given to be compiled
    seen = []
    for m in (16, 24, 8):
        mean(objectives(training_batch(model.config, m=m))["vtm"]).backward()
        seen.append(len(graphs))
    assert seen == [1, 2, 2]                              # then text of any length


def test_compile_without_a_compiler_is_refused_in_one_line(clips, tmp_path):
    code, printed = pretrain(clips, tmp_path / "run", "--compile", environment={
        "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}).wait()
    assert code == 1 and "Traceback" not in printed, printed
    assert "cannot compile without a C++ compiler" in printed.splitlines()[-1], printed


def test_frozen_parts_keep_their_weights_and_others_learn(clips, tmp_path):
    code, _, err = pretrain_here(clips, tmp_path / "run", "--freeze", "blocks.0", "patch_embed",
                                 "--steps", 1)
    assert code == 0, err
    content = finished(tmp_path / "run")[0]
    torch.manual_seed(0)                                 # as train() draws the first weights
    start = AllInOne(Config(**content["sizes"])).state_dict()
    for name, tensor in content["model"].items():
        if name.startswith(("blocks.0.", "patch_embed.")):
            assert torch.equal(tensor, start[name]), name
    assert not torch.equal(content["model"]["blocks.1.attn.qkv.weight"],
                           start["blocks.1.attn.qkv.weight"])


def test_any_batch_is_cut_into_the_fewest_equal_passes():
    def cut(batch, most, world=1):
        return train.split_batch(train.TrainConfig(batch=batch, batch_per_gpu=most), world)
    assert cut(64, 16) == (64, 16, 4) and cut(24, 16) == (24, 8, 3) and cut(9, 4) == (9, 3, 3)
    with pytest.raises(DataError, match="34 on 2 processes makes passes of 1 clip"):
        cut(34, 16, world=2)                               # VTM would see matched pairs only
    assert cut(64, 16, world=4) == (64, 16, 1) and cut(0, 16, world=4) == (64, 16, 1)
    with pytest.raises(DataError, match="10 does not divide among 4 processes"):
        cut(10, 16, world=4)


def test_a_run_folder_of_another_run_is_refused_and_can_be_set_aside(clips, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    code, _, err = pretrain_here(clips, tmp_path / "run", "--seed", 5, "--warmup", "0.2")
    assert code == 1 and "warmup was 0.1, now 0.2; seed was 0, now 5" in err, err
    code, out, err = pretrain_here(clips, tmp_path / "run", "--lr", "5e-4", "--steps", 14)
    assert code == 0 and "lr was 0.001; from step 13 on it is 0.0005" in out, err
    code, _, err = pretrain_here(clips, tmp_path / "run", "--seed", 5, "--no-resume", "--steps", 2)
    assert code == 0 and (tmp_path / "run" / "checkpoint.pt.aside").exists(), err


def test_a_non_finite_loss_stops_before_the_step_and_names_the_samples(clips, tmp_path):
    code, _, err = pretrain_here(clips, tmp_path / "run", "--lr", "1e38", "--save_every", "1")
    assert code == 1 and re.search(r"step \d+: .*(mlm|vtm|grad_norm).* not finite", err), err
    assert "train.jsonl:" in err
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["state"]["step"] == int(re.search(r"step (\d+):", err)[1])


def test_vtm_labels_say_whose_video_a_text_meets(clips):
    manifest = data.Manifest([clips / "train.jsonl"])
    tokenizer = data.Tokenizer.train([manifest[i]["text"] for i in range(24)], 1000)
    samples = data.Clips(manifest, tokenizer, "pretrain", 3, 32, 40, train=True)
    matched = 0
    for first in range(0, 480, 8):
        items = [samples[i % 24, i] for i in range(first, first + 8)] if first < 48 else [
            {**items[j], "draw": first + j} for j in range(8)]
        batch = data.collate(items, samples, group=8)
        for i, (j, label) in enumerate(zip(batch["vtm_source"], batch["vtm_labels"])):
            own = items[i]["caption"] == items[j]["caption"]
            assert own == bool(label)
        matched += int(batch["vtm_labels"].sum())
    assert 0.4 < matched / 480 < 0.6                                         # Sec. 3.3: p = 0.5


def test_a_checkpoint_is_plain_and_scores_without_any_other_file(clips, whole_run):
    content = torch.load(whole_run / "checkpoint.pt", weights_only=True)
    assert content["config"]["lr"] == 1e-3 and content["sizes"]["width"] == 32
    scores = [run(eval, "--task", "choice", "--data", clips / "choice.jsonl", "--checkpoint",
                  whole_run / "checkpoint.pt", "--workers", "0") for _ in range(2)]
    assert scores[0] == scores[1]                                            # twice the same number
    assert scores[0][0] == 0 and re.search(r"order +\d+\.\d +50\.0 +24", scores[0][1]), scores[0]


def test_unreadable_clips_are_never_replaced_in_evaluation_and_stop_training_above_1_in_10(
        clips, whole_run, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"not a film")
    lines = (clips / "choice.jsonl").read_text().splitlines()
    lines = [line.replace('"video": "', f'"video": "{clips}/') for line in lines[:6]]
    broken = [line.replace(f"{clips}/", f"{tmp_path}/broken.mp4") for line in lines[:2]]
    broken = [re.sub(r"broken.mp4[^\"]*", "broken.mp4", line) for line in broken]
    (tmp_path / "choice.jsonl").write_text("\n".join(lines + broken) + "\n")
    code, out, err = run(eval, "--task", "choice", "--data", tmp_path / "choice.jsonl",
                         "--checkpoint", whole_run / "checkpoint.pt", "--workers", "0")
    assert code == 0 and re.search(r"order .* 6\n", out), err
    assert "INCOMPLETE: 2 of 8 samples" in out and out.count("broken.mp4") == 2
    code, out, err = run(train, "--task", "choice", "--data", tmp_path / "choice.jsonl",
                         "--out", tmp_path / "run", "--init", whole_run / "checkpoint.pt",
                         "--batch", "8", "--epochs", "50", "--workers", "0")
    assert code == 1 and "above 1 in 10" in err and "broken.mp4" in err, err
    assert '"unreadable": ["' in (tmp_path / "run" / "log.jsonl").read_text()


def test_the_choice_head_starts_as_the_pretrained_vtm_head(clips, whole_run, tmp_path):
    questions = clips / "choice.jsonl"                                       # Sec. 4.2.3
    code, out, err = run(train, "--task", "choice", "--data", questions, "--val", questions,
                         "--out", tmp_path / "run", "--init", whole_run / "checkpoint.pt",
                         "--batch", "8", "--epochs", "1", "--lr", "0", "--workers", "0")
    assert code == 0 and "choice_accuracy" in out, err
    (tuned, _), (pretrained, _) = finished(tmp_path / "run"), finished(whole_run)
    assert equal(tuned["model"]["vtm_head.weight"], pretrained["model"]["vtm_head.weight"])
    scored = run(eval, "--task", "choice", "--data", clips / "choice.jsonl", "--checkpoint",
                 whole_run / "checkpoint.pt", "--workers", "0")[1]
    assert re.search(r"order.*", out)[0] == re.search(r"order.*", scored)[0]


def test_the_toys_order_questions_cannot_be_answered_from_a_bag_of_its_frames(tmp_path):
    draw, events = random.Random(7), set()
    while events != {"light", "motion"}:
        toy_clip = data.ToyClip.drawn(draw)
        twin = toy_clip.twin()
        events.add(toy_clip.event)
        assert toy_clip.caption() != twin.caption()                          # the other answer
        both = []
        for name, one in (("a", toy_clip), ("b", twin)):
            data.write_clip(tmp_path / f"{name}.mp4", one.frames(), 4, data.TOY_X264)
            both.append(decode(tmp_path / f"{name}.mp4", lambda n: list(range(n))))
        assert torch.equal(both[0], both[1].flip(0))   # from the files


@pytest.mark.parametrize("flags, code, message", [
    (["--task", "pretrane"], 2, "invalid choice: 'pretrane'"),
    (["--task", "pretrain", "--widht", "3"], 2, "unrecognized arguments: --widht"),
    (["--temporal", "rolling"], 2, "invalid choice: 'rolling'"),
    (["--data", "absent.jsonl"], 1, "absent.jsonl"),
    (["--objectives", "vtx"], 1, "--objectives vtx: those of --task pretrain are vtm, mlm"),
    (["--objectives", "wpa"], 1, "wpa needs vtm"),
    (["--task", "choice", "--objectives", "vtm"], 1, "those of --task choice are choice"),
    (["--task", "retrieval", "--objectives", "rank", "--hard_negatives"], 1, "needs --objectives"),
    (["--data", "a", "--val", "b/x_test.clean.jsonl", "--val_every", "5"], 1, "the validation"),
    (["--log_every", "0"], 1, "must be 1 or more"),
    (["--data", "{clips}/train.jsonl", "--vocab", "train", "--freeze", "blocks.99"], 1,
     "--freeze blocks.99: no such part; there are cls_token"),
    (["--task", "choice", "--data", "{clips}/no_answer.jsonl", "--vocab", "train", "--workers",
      "0"], 1, '"answer" is None; expected an index into the 2 options'),
    (["--data", "{clips}/train.jsonl", "--init", "absent.pth"], 1, "absent.pth: no such file"),
    (["--data", "{clips}/train.jsonl", "--vocab", "absent.txt"], 1, "local vocab.txt"),
    (["--data", "{clips}/choice.jsonl", "--vocab", "train", "--workers", "0"], 1, 'choice.jsonl:'),
])
def test_wrong_flags_and_files_say_in_one_line_what_to_do(flags, code, message, clips, tmp_path):
    flags = [flag.format(clips=clips) for flag in flags]
    returned, out, err = run(train, *flags, "--out", tmp_path / "run")
    assert returned == code and message in err, err


# ---- Downstream tasks (Sec. 4.2) ----------------------------------------------------------------

def evaluate_here(task, manifest, checkpoint, *flags, code=0) -> str:
    """What eval.py prints."""
    returned, out, err = run(eval, "--task", task, "--data", manifest, "--checkpoint", checkpoint,
                             "--workers", "0", *flags)
    assert returned == code, err
    return out if code == 0 else err


def table(out) -> list[str]:
    """The rows of numbers that eval.py printed."""
    return [line for line in out.splitlines() if re.search(r"\d+\.\d", line) and ":" not in line]


def fine_tune(task, manifest, out, whole_run, *flags, code=0) -> str:
    returned, printed, err = run(
        train, "--task", task, "--data", manifest, "--init", whole_run / "checkpoint.pt", "--out",
        out, "--batch", "4", "--steps", "3", "--workers", "0", "--log_every", "1", *flags)
    assert returned == code, err
    return printed if code == 0 else err


def test_ranks_count_ties_and_several_captions_of_a_clip():  # Tab. 3, Tab. 7
    scores = torch.tensor([[.9, .1, .1], [.5, .5, .2], [.3, .3, .3], [.1, .2, .8]])
    owner = torch.tensor([0, 1, 1, 2])                 # the clip of each caption: clip 1 has two
    own = owner[:, None] == torch.arange(3)
    above, wrong, right = (n.tolist() for n in eval.places(scores, own))       # text to video
    assert (above, wrong, right) == ([0, 0, 0, 0], [0, 1, 2, 0], [1, 1, 1, 1])
    above, wrong, right = (n.tolist() for n in eval.places(scores.T, own.T))       # video to text
    assert (above, wrong, right) == ([0, 0, 0], [0, 0, 0], [1, 1, 1])
    scores[3, 0] = 0.95                                # a wrong caption now beats clip 0's own
    assert eval.places(scores.T, own.T)[0].tolist() == [1, 0, 0]
    above, wrong, right = (n.tolist() for n in eval.places(torch.zeros(3, 4), own.T))
    assert (wrong, right) == ([3, 2, 3], [1, 2, 1])    # who says nothing is right by chance
    assert [eval.recall(1, *n) for n in zip(above, wrong, right)] == pytest.approx([1/4, 2/4, 1/4])


@pytest.mark.parametrize("above, wrong, right", [(0, 3, 1), (2, 3, 2), (1, 0, 1), (0, 4, 3)])
def test_ties_count_what_a_random_order_of_them_would_give(above, wrong, right):
    firsts = [above + 1 + min(order.index(i) for i in range(right))
              for order in itertools.permutations(range(wrong + right))]
    for k in (1, 2, 5):
        assert eval.recall(k, above, wrong, right) == pytest.approx(np.mean(np.array(firsts) <= k))
    assert above + (wrong + right + 1) / (right + 1) == pytest.approx(np.mean(firsts))


def test_a_model_that_gives_no_number_scores_nothing(clips, whole_run, tmp_path):
    content, _ = finished(whole_run)
    content["model"]["norm.weight"].fill_(torch.nan)
    torch.save(content, tmp_path / "nan.pt")
    for task, flags in (("choice", ()), ("retrieval", ("--rerank", "2"))):
        manifest = clips / f"{task}.jsonl"
        err = evaluate_here(task, manifest, tmp_path / "nan.pt", *flags, code=1)
        assert f"{task}.jsonl:1" in err and "score is not a number" in err


def test_tied_options_and_unknown_answers_are_not_counted_as_right():
    same = torch.zeros(5)
    assert [eval.top(same, 0, k) for k in (1, 5)] == pytest.approx([0.2, 1])
    items = {"label": torch.tensor([-1, 2]), "index": torch.arange(2), "where": ["a:1", "a:2"],
             "kind": [None, None]}
    scores, answers = torch.tensor([0., 1, 5, 2, 3, 4]), list("abcdef")
    unknown, known = (eval.predict("qa", items, i, scores, answers) for i in range(2))
    assert unknown["metrics"] == {"accuracy %": 0}     # the release leaves such questions out
    assert known["metrics"] == {"accuracy %": 100, "in vocabulary %": 100}
    probed = eval.predict("probe", items | {"label": torch.tensor([3, 0])}, 0, scores, answers)
    assert probed["metrics"] == {"top-1 %": 0, "top-5 %": 100, "top-10 %": 100}
    assert probed["answers"] == ["c", "f", "e", "d", "b"]


def test_a_column_of_ranks_gives_its_median_and_mean_with_a_repeatable_interval():
    ranks = [1, 1, 2, 9]
    columns = eval.summarise([{"kind": "t", "metrics": {"rank": r}} for r in ranks])["t"]
    assert [float(eval.average(k, v)) for k, v in columns.items()] == [1.5, 3.25]
    low, high = eval.interval("mean rank", columns["mean rank"], 200)
    assert 1 <= low < 3.25 < high <= 9
    assert (low, high) == eval.interval("mean rank", columns["mean rank"], 200)


@pytest.mark.parametrize("flags", [[], ["--rerank", "2"], ["--rerank", "99", "--clips", "3"]])
def test_retrieval_does_not_depend_on_the_order_or_batching_of_samples(
        flags, clips, whole_run, tmp_path):
    lines = (clips / "retrieval.jsonl").read_text().replace('"video": "', f'"video": "{clips}/')
    (tmp_path / "turned.jsonl").write_text("\n".join(reversed(lines.split("\n")[:-1])))
    fine_tune("retrieval", clips / "retrieval.jsonl", tmp_path / "run", whole_run)
    there = evaluate_here("retrieval", clips / "retrieval.jsonl", tmp_path / "run/checkpoint.pt",
                          *flags)
    back = evaluate_here("retrieval", tmp_path / "turned.jsonl", tmp_path / "run/checkpoint.pt",
                         "--batch", "3", *flags)
    assert table(there) == table(back) and len(table(there)) == 2
    if not flags:                                      # the best alone stays the best
        assert table(there) == table(evaluate_here(
            "retrieval", clips / "retrieval.jsonl", tmp_path / "run/checkpoint.pt", "--rerank", 1))
    assert " 14\n" in there and " 7\n" in there        # two captions of each of the seven clips


def test_two_processes_score_exactly_what_one_scores(clips, whole_run, tmp_path):
    flags = ("--task", "retrieval", "--data", clips / "retrieval.jsonl", "--checkpoint",
             whole_run / "checkpoint.pt", "--rerank", "3", "--workers", "0", "--predictions")
    code, out = Started(tmp_path / "out.txt", *flags, tmp_path / "two.jsonl", processes=2,
                        script="eval.py").wait()
    assert code == 0, out                              # seven clips: two does not divide them
    assert table(run(eval, *flags, tmp_path / "one.jsonl")[1]) == table(out)
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    assert len((tmp_path / "one.jsonl").read_text().splitlines()) == 14 + 7


@pytest.fixture(scope="session")
def strong(whole_run, tmp_path_factory) -> Path:
    """The checkpoint of a run of 12 steps, its opinions made stronger; it says it learnt VTC."""
    content, _ = finished(whole_run)
    content["model"] = {k: v * 5 if v.ndim > 1 else v for k, v in content["model"].items()}
    content["config"]["objectives"] = ["vtc"]
    path = tmp_path_factory.mktemp("strong") / "strong.pt"
    torch.save(content, path)
    return path


def loaded(path):
    """(model, tokenizer) of a checkpoint."""
    content = torch.load(path, weights_only=True)
    model, tokenizer, _ = eval.checkpoint_model(content, path, say=lambda _: None)
    return model.eval(), tokenizer


def test_candidates_are_scored_by_the_matched_logit_of_each_alone():  # Sec. 4.2.1, 4.2.3
    model, video = build(), clip(B=2)
    lengths, ids = [[4, 8, 6], [5, 3]], torch.randint(5, 50, (2, 3, 8))
    mask = torch.zeros(2, 3, 8, dtype=torch.bool)
    for i, row in enumerate(lengths):
        for j, length in enumerate(row):
            mask[i, j, :length] = True
    batch = {"video": video, "text_ids": ids, "text_mask": mask, "option_mask": mask.any(-1)}
    with torch.no_grad():
        scores = eval.score_options(model, batch)
        for i, row in enumerate(lengths):
            alone = [model.vtm_head(model(video[i:i + 1], ids[i:i + 1, j, :length]).pooled)[0, 1]
                     for j, length in enumerate(row)]
            assert torch.allclose(scores[i, :len(row)], torch.stack(alone), atol=1e-5)
        assert scores[1, 2] == -torch.inf                      # the second clip has two candidates
        text, _ = train.Objectives(model, ("vtc",)).unimodal(batch)
        own = model.text_proj(model.encode_text(ids[:, 0], mask[:, 0])[:, 0])
    assert torch.allclose(text, own)                   # retrieval's true caption comes first


def test_three_views_of_a_clip_are_averaged(clips, strong, tmp_path):  # 3 x 3 of Tab. 2 to 4
    manifest, saved = clips / "choice.jsonl", tmp_path / "p.jsonl"
    evaluate_here("choice", manifest, strong, "--clips", "3", "--predictions", saved)
    predictions = [json.loads(line) for line in saved.read_text().splitlines()]
    model, tokenizer = loaded(strong)
    samples = data.Clips(data.Manifest(manifest), tokenizer, "choice", 3, 32, 40, train=False,
                         views=3)
    differ = 0
    for i in range(24):
        batch = data.collate([samples[i, i]], samples)
        with torch.no_grad():
            views = torch.cat([eval.score_options(model.eval(), batch | {"video": view})
                               for view in batch["video"].unbind(1)])
        assert torch.allclose(torch.tensor(predictions[i]["scores"]), views.mean(0), atol=1e-5)
        differ = max(differ, float((views - views[0]).abs().max()))
    assert differ > 1e-3                                       # of different frames, where all move


def test_retrieval_encodes_each_side_alone_and_padding_changes_nothing(clips, strong, tmp_path):
    manifest, saved = clips / "retrieval.jsonl", tmp_path / "p.jsonl"
    evaluate_here("retrieval", manifest, strong, "--predictions", saved)
    best = [json.loads(line)["best"] for line in saved.read_text().splitlines()]
    model, tokenizer = loaded(strong)
    samples = data.Clips(data.Manifest(manifest), tokenizer, "retrieval", 3, 32, 40, train=False)
    items = [samples[i, i] for i in range(7)]
    with torch.no_grad():
        video = torch.cat([model.eval().video_proj(model.encode_video(item["video"][None])[:, 0])
                           for item in items])
        text = torch.cat([model.text_proj(model.encode_text(torch.tensor([ids]))[:, 0])
                          for item in items for ids in item["ids"]])
    cosines = torch.cosine_similarity(text[:, None], video[None], dim=-1)
    for q, name in enumerate(best):
        line, k = re.search(r":(\d+)(?:#(\d+))?", name).groups()
        row = cosines[q] if q < 14 else cosines[:, q - 14]
        found = int(line) - 1 if k is None else 2 * int(line) - 2 + int(k)
        assert row[found] > row.max() - 1e-6


def test_reranking_all_is_the_order_of_vtms_matched_logit(clips, strong, tmp_path):
    evaluate_here("retrieval", clips / "retrieval.jsonl", strong,
                  "--rerank", "99", "--predictions", tmp_path / "p.jsonl")
    best = [json.loads(line)["best"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    numbers = [re.search(r":(\d+)(?:#(\d+))?", name).groups() for name in best]
    best = [int(line) - 1 if k is None else 2 * int(line) - 2 + int(k) for line, k in numbers]
    model, tokenizer = loaded(strong)
    manifest = data.Manifest(clips / "retrieval.jsonl")
    samples = data.Clips(manifest, tokenizer, "retrieval", 3, 32, 40, train=False)
    batch = data.collate([samples[i, i] for i in range(7)], samples)
    video, ids, mask = batch["video"], batch["text_ids"], batch["text_mask"]
    with torch.no_grad():
        matched = torch.stack([model.eval().vtm_head(model(
            video, ids[t].expand(7, -1), mask[t].expand(7, -1)).pooled)[:, 1] for t in range(14)])
    assert best[:14] == matched.argmax(1).tolist()
    said = [row.tolist() for row in ids]                       # two clips may share a caption
    assert [said[t] for t in best[14:]] == [said[t] for t in matched.argmax(0)]


def test_retrieval_without_vtc_is_refused_and_ranked_by_vtm_instead(clips, whole_run):
    err = evaluate_here("retrieval", clips / "retrieval.jsonl", whole_run / "checkpoint.pt", code=1)
    assert "was not trained with VTC" in err and "--rerank" in err


def test_false_captions_are_never_the_clips_own(clips):  # Sec. 4.2.2
    manifest = data.Manifest(clips / "retrieval.jsonl")
    texts = [text for i in range(7) for text in manifest[i]["texts"]]
    tokenizer = data.Tokenizer.train(texts, 1000)
    samples = data.Clips(manifest, tokenizer, "retrieval", 3, 32, 40, train=True, false_texts=9)
    seen = set()
    for draw in range(21):
        item = samples[draw % 7, draw]
        own = [tokenizer.encode(text, 40) for text in manifest[draw % 7]["texts"]]
        assert item["ids"][0] in own and not any(ids in own for ids in item["ids"][1:])
        seen.add(len(item["ids"]))
    assert max(seen) > 5                               # as many as asked but for its own


def test_hard_negatives_are_the_likest_captions_of_other_words():
    ids = torch.tensor([[1, 2], [1, 2], [1, 3], [1, 4]])[:, None]        # 0 and 1 are equal
    batch = {"text_ids": ids, "text_mask": torch.ones_like(ids, dtype=torch.bool)}
    text = torch.tensor([[1., 0], [1, 0], [.8, .6], [0, 1]])
    hard = train.hard_options(batch, text, text, 2)
    assert hard["text_ids"][0, :, 1].tolist() == [2, 3, 4]
    assert hard["text_ids"][3, :2, 1].tolist() == [4, 3] and hard["option_mask"].all()
    assert train.hard_options(batch, text, text, 3)["option_mask"].sum(1).tolist() == [3, 3, 4, 4]


def test_a_probe_moves_nothing_but_its_layer_and_reads_each_clip_once(clips, whole_run, tmp_path):
    fine_tune("probe", clips / "qa.jsonl", tmp_path / "run", whole_run)               # Tab. 12
    (probed, _), (pretrained, _) = finished(tmp_path / "run"), finished(whole_run)
    assert all(equal(probed["model"][k], v) for k, v in pretrained["model"].items())
    new = probed["model"].keys() - pretrained["model"].keys()
    assert new == {"answer_head.0.weight", "answer_head.0.bias"}
    kept = tmp_path / "run" / "features.pt"
    written = kept.stat().st_mtime_ns
    fine_tune("probe", clips / "qa.jsonl", tmp_path / "run", whole_run, "--no-resume", "--lr", "1")
    assert kept.stat().st_mtime_ns == written
    changed, _ = finished(tmp_path / "run")
    assert not equal(changed["model"]["answer_head.0.weight"],
                     probed["model"]["answer_head.0.weight"])
    out = evaluate_here("probe", clips / "qa.jsonl", tmp_path / "run" / "checkpoint.pt")
    assert re.search(r"top-1 % +top-5 % +top-10 %", out) and len(table(out)) == 1


def test_open_questions_are_answered_by_a_two_layer_mlp_of_768(clips, whole_run, tmp_path):
    fine_tune("qa", clips / "qa.jsonl", tmp_path / "run", whole_run, "--val_every", "1", "--val",
              clips / "qa.jsonl")                                                  # Sec. 4.2.1
    content, _ = finished(tmp_path / "run")
    answers = content["answers"]
    assert content["model"]["answer_head.0.weight"].shape == (768, 32)
    assert content["model"]["answer_head.2.weight"].shape == (len(answers), 768)
    chosen = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    scores = [json.loads(line)["result"]["all"] for line in
              (tmp_path / "run" / "log.jsonl").read_text().splitlines() if '"result"' in line]
    assert len(scores) == 3 and chosen["state"]["best"] == max(scores)
    assert chosen["state"]["step"] == 1 + scores.index(max(scores))          # the first of the best
    out = evaluate_here("qa", clips / "qa.jsonl", tmp_path / "run" / "best.pt", "--clips", "3")
    assert "3 frames x 3 views" in out and "in vocabulary %" in out and "majority %" in out
    saved = tmp_path / "run" / f"qa-{clips.name}-qa-clips3.predictions.jsonl"
    assert len(saved.read_text().splitlines()) == 7
    err = evaluate_here("probe", clips / "qa.jsonl", tmp_path / "run" / "best.pt", code=1)
    assert "fine-tune it with train.py --task probe" in err
    err = fine_tune("qa", clips / "train.jsonl", tmp_path / "none", whole_run, code=1)
    assert 'no line has words as its "answer"' in err


def test_a_head_for_other_answers_is_not_taken_over(clips, whole_run, tmp_path):
    fine_tune("probe", clips / "qa.jsonl", tmp_path / "probe", whole_run)
    shutil.copytree(clips, tmp_path / "clips")
    (tmp_path / "clips" / "answers.json").write_text(json.dumps(list(reversed(
        finished(tmp_path / "probe")[0]["answers"]))))
    probe = tmp_path / "probe"
    shutil.copytree(probe, tmp_path / "run")
    (probe / "checkpoint.pt").rename(tmp_path / "init.pt")
    init = ("--init", tmp_path / "init.pt", "--lr", "0", "--no-resume")
    printed = fine_tune("qa", clips / "qa.jsonl", tmp_path / "qa", whole_run, *init)
    assert "answer_head.2.weight" in printed                   # a new head, and of two layers
    printed = fine_tune("probe", clips / "qa.jsonl", tmp_path / "run", whole_run, *init)
    assert "initialised" not in printed and "features of" not in printed   # the same answers: kept
    other = tmp_path / "clips" / "qa.jsonl"
    printed = fine_tune("probe", other, tmp_path / "run", whole_run, *init)
    assert "answer_head.0.weight" in printed and "features of 7 clips" in printed


def test_a_probe_names_the_clips_it_lacks_and_stops_above_1_in_10(clips, whole_run, tmp_path):
    lines = (clips / "qa.jsonl").read_text().replace('"video": "', f'"video": "{clips}/')
    broken = lines.splitlines()[0].replace("0.mp4", "absent.mp4") + "\n"
    (tmp_path / "one.jsonl").write_text(2 * lines + broken)
    fine_tune("probe", tmp_path / "one.jsonl", tmp_path / "run", whole_run)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "absent.mp4" in log and '"unreadable": 1' in log
    (tmp_path / "two.jsonl").write_text(lines + broken)
    err = fine_tune("probe", tmp_path / "two.jsonl", tmp_path / "other", whole_run, code=1)
    assert "1 of 8 clips cannot be read" in err


def test_frames_can_be_shuffled_reversed_or_repeated_to_see_what_needs_order():
    video = torch.arange(12).view(2, 2, 3, 1, 1, 1)                      # B, views, S, 3, H, W
    index = torch.tensor([4, 9])
    changed = {name: eval.reorder(video, eval.EvalConfig(**{name: True}), index)[1, 0].flatten()
               for name in ("reverse", "repeat_first", "shuffle_frames")}
    assert changed["reverse"].tolist() == [8, 7, 6] and changed["repeat_first"].tolist() == [6] * 3
    assert sorted(changed["shuffle_frames"].tolist()) == [6, 7, 8]
    alone = eval.reorder(video[1:], eval.EvalConfig(shuffle_frames=True), index[1:])
    assert alone[0, 0].flatten().tolist() == changed["shuffle_frames"].tolist()


def test_vcrs_q_to_ar_needs_both_answers_right(clips, whole_run, tmp_path):  # Sec. 4.2.4
    lines = (clips / "choice.jsonl").read_text().replace('"video": "', f'"video": "{clips}/')
    lines = "".join(line for line in lines.splitlines(True) if " turns " in line)
    (tmp_path / "qa.jsonl").write_text(lines)
    (tmp_path / "qar.jsonl").write_text(lines.replace('"answer": 0', '"answer": 1'))
    out = evaluate_here("choice", tmp_path / "qa.jsonl", whole_run / "checkpoint.pt",
                        "--data", tmp_path / "qa.jsonl", tmp_path / "qar.jsonl", "--together")
    assert re.search(r"together +0\.0 +25\.0", out), out          # right in one, wrong in the other
    (tmp_path / "qar.jsonl").write_text("\n".join(lines.split("\n")[:5]))
    code, _, err = run(eval, "--task", "choice", "--data", tmp_path / "qa.jsonl",
                       tmp_path / "qar.jsonl", "--together", "--checkpoint",
                       whole_run / "checkpoint.pt", "--workers", "0")
    assert code == 1 and "differ in length" in err


def test_the_papers_numbers_stand_in_the_readme_too():
    readme = (HERE / "README.md").read_text()
    for name, numbers in eval.PAPER.items():
        row = next(line for line in readme.splitlines() if re.search(rf"\b{name}\b", line))
        assert re.search(r"\bB (\d+\.\d+)", numbers)[1] in row, name


def test_a_killed_fine_tuning_ends_with_the_same_bits_and_the_same_best(clips, whole_run, tmp_path):
    manifest = clips / "retrieval.jsonl"
    flags = ("--task", "retrieval", "--data", manifest, "--val", manifest, "--val_every", 2,
             "--init", whole_run / "checkpoint.pt", "--batch", 4, "--steps", 6, "--save_every", 1,
             "--log_every", 1, "--workers", 0)
    code, printed = Started(tmp_path / "1.txt", *flags, "--out", tmp_path / "whole").wait()
    assert code == 0, printed
    killed = Started(tmp_path / "2.txt", *flags, "--out", tmp_path / "killed")
    wait_for_step(killed, tmp_path / "killed", 3)
    killed.kill()
    code, printed = Started(tmp_path / "3.txt", *flags, "--out", tmp_path / "killed").wait()
    assert code == 0 and "resuming" in printed, printed
    for name in ("checkpoint.pt", "best.pt"):
        one, other = (torch.load(tmp_path / run / name, weights_only=True)
                      for run in ("whole", "killed"))
        assert all(equal(one[key], other[key]) for key in ("model", "optimizer", "state"))
