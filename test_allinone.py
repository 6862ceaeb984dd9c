"""The paper, sentence by sentence, as tests. Run: python -m pytest (offline, two minutes).

Order: model and rolling (Sec. 3.1, 3.2), objectives (3.3), release, weights, data, training, tasks.
"""

import ast
import collections
import contextlib
import fcntl
import gc
import gzip
import io
import itertools
import json
import math
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import textwrap
import time
import tracemalloc
import zlib
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import get_args

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # several processes share few cores here

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import allinone
import data
import eval
import train
from allinone import (OBJECTIVES, SCORES, VARIANTS, AllInOne, Config, Scores, Temporal, Vocabulary,
                      answer_scores, candidate_scores, channel_shift, class_scores, compute_losses,
                      count_items, load_release, load_vit, load_weights, mask_words,
                      masked_positions, match_logits, mlm_loss, pretraining_batch,
                      pretraining_scores, read_weights, text_embedding, token_rolling,
                      video_embedding, vtc_loss, vtm_loss, vtm_pairs, word_patch_transport)
from data import (BatchSampler, Clips, DataError, Manifest, Tokenizer, Unreadable, collate, convert,
                  crop, decode, sample_frames, shuffled)
from eval import count_macs, count_parameters

torch.set_num_threads(1)                                 # sums in one order, whoever runs them
gc.set_threshold(50_000)                                 # look for cycles of objects less often
HERE = Path(__file__).parent
FULL = os.environ.get("FULL") == "1"       # at the sizes that the README states, not smaller: hours
on_linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
TINY = Config(width=32, depth=3, heads=2, image_size=64, vocab_size=50, max_text_len=8,
              temporal_position=False, dropout=0.0, drop_path=0.0)


MAY_IMPORT = {                                   # of our own files; imports run one way
    "allinone": set(), "data": {"allinone"}, "eval": {"allinone", "data"},
    "train": {"allinone", "data", "eval"}, "test_allinone": {"allinone", "data", "eval", "train"}}


def imports_of(path: Path) -> set[str]:
    """Names of the packages that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_the_house_rules_hold(name):
    path = HERE / f"{name}.py"
    imported = imports_of(path)
    assert imported & MAY_IMPORT.keys() <= MAY_IMPORT[name]
    assert max(map(len, path.read_text("utf-8").splitlines())) <= 100
    if name == "allinone":                       # copying the file is the whole installation
        assert imported <= sys.stdlib_module_names | {"torch"}


def build(seed=0, **fields) -> AllInOne:
    """A tiny model in evaluation mode, its weights large enough for effects to be seen."""
    torch.default_generator.manual_seed(seed)      # torch.manual_seed prepares for GPUs too
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


def close(actual: torch.Tensor, expected: torch.Tensor, rtol=1e-4, atol=1e-5) -> None:
    """Equal but for the rounding of float32."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# ---- Processes of their own ----------------------------------------------------------------------

FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="session", autouse=True)
def fork_server():
    """A process that has this file loaded, and forks: others start in a moment."""
    FORKS.set_forkserver_preload([Path(__file__).stem])
    multiprocessing.forkserver.ensure_running()


def command(arguments, environment, output):
    """`python arguments`; it writes to the file `output`."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    sys.argv = arguments
    script = HERE / arguments[0]
    if script.parent != HERE:                      # a copy: its files are imported, not ours
        sys.path[:] = [str(script.parent)] + [path for path in sys.path if path != str(HERE)]
        for name in MAY_IMPORT:
            sys.modules.pop(name, None)
    runpy.run_path(str(script), run_name="__main__")


class Started:
    """A command line in processes of its own, which are its ranks."""

    def __init__(self, output, *arguments, processes=1):
        self.outputs = [Path(f"{output}{rank or ''}") for rank in range(processes)]
        arguments = [str(argument) for argument in arguments]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.ranks = []
        for rank in range(processes):
            environment = {}
            if processes > 1:
                environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                               "WORLD_SIZE": str(processes), "RANK": str(rank)}
            self.ranks.append(FORKS.Process(target=command, daemon=True, args=(
                arguments, environment, str(self.outputs[rank]))))
            self.ranks[-1].start()

    def running(self, rest=0.0) -> bool:
        """Whether all ranks are running, after a rest of some seconds."""
        time.sleep(rest)
        return all(rank.is_alive() for rank in self.ranks)

    def wait(self, *codes) -> int:
        """The exit code, one of those expected: by default 0.

        A rank that outlives another by more than a second is killed, as torchrun does.
        """
        while alive := [rank.sentinel for rank in self.ranks if rank.is_alive()]:
            ended = multiprocessing.connection.wait(alive, 300)
            assert ended, f"still running: {self.outputs[0]}"
            if any(rank.exitcode for rank in self.ranks):
                for rank in self.ranks:
                    rank.join(1)
                    rank.kill()
        code = max(abs(rank.exitcode) for rank in self.ranks)
        assert code in (codes or [0]), self.printed()
        return code

    def printed(self) -> str:
        return "".join(output.read_text() for output in self.outputs)


# ---- Unified transformer (Sec. 3.1) and Token Rolling (Sec. 3.2) --------------------------------

@pytest.mark.parametrize("fields, reach", [          # frames that the last of 5 sees, with its own
    (dict(temporal="time_average"), 1),              # Tab. 8a: no exchange
    (dict(roll_ratio=0.0), 1),                       # Tab. 8b: nothing rolls
    (dict(depth=1), 2),
    (dict(depth=2), 3),                              # "gradually modeled in deeper layers"
    (dict(depth=3), 4),
    (dict(roll_start=3), 2),                         # Tab. 11a: of three blocks the last one rolls
    (dict(roll_start=4), 1),
    (dict(temporal="timesformer", depth=1), 5),      # Tab. 9: attention over all frames
    (dict(temporal="decoupled", depth=1), 5)])
def test_each_rolling_block_reaches_one_frame_further(fields, reach):
    model = build(frames=5, **fields)
    video = clip(S=5).requires_grad_()
    for tokens in model.transform(model.embed_video(video), model.embed_text(words())):
        last_frame = tokens[0, 4, :, 0].pow(2).sum()             # of video tokens, of text tokens
        gradient, = torch.autograd.grad(last_frame, video, retain_graph=True)
        sees = gradient[0].abs().amax((1, 2, 3)) > 0             # (5,) frames
        assert sees.tolist() == [False] * (5 - reach) + [True] * reach


def labelled(S: int, n: int, num_fixed: int = 1) -> torch.Tensor:
    """(S, num_fixed + n, 2) tokens that tell their frame and their slot."""
    frame = torch.arange(S)[:, None].expand(-1, num_fixed + n)
    slot = torch.arange(num_fixed + n).expand(S, -1)
    return torch.stack([frame, slot], -1)


def test_a_quarter_of_the_patches_moves_one_frame():                         # Fig. 2b
    rolled = token_rolling(labelled(S=3, n=8), frames=3, ratio=0.25)
    assert rolled[..., 0].tolist() == [
        [0, 2, 2, 0, 0, 0, 0, 0, 0],                 # cls, then the patches: "roll ... by 1"
        [1, 0, 0, 1, 1, 1, 1, 1, 1],
        [2, 1, 1, 2, 2, 2, 2, 2, 2]]


@pytest.mark.parametrize("ratio, moved", [(0, 0), (0.1, 20), (0.25, 49), (0.5, 98), (0.75, 147)])
@pytest.mark.parametrize("select", ["block", "random", "varying"])           # Tab. 8b, Tab. 11b
def test_the_ratio_is_the_share_that_moves(select, ratio, moved):
    tokens = labelled(S=3, n=196)
    rolled = token_rolling(tokens, frames=3, ratio=ratio, select=select, layer=2)
    differs = rolled[..., 0] != tokens[..., 0]
    assert differs.sum(1).tolist() == [moved] * 3


@pytest.mark.parametrize("options", [{}, {"roll": "release"}, {"select": "random"},
                                     {"select": "varying", "layer": 3}])
def test_tokens_keep_their_slot(options):
    tokens = labelled(S=3, n=196)
    rolled = token_rolling(tokens, frames=3, **options)
    assert torch.equal(rolled[..., 1], tokens[..., 1])


@pytest.mark.parametrize("options", [{}, {"roll": "release"}, {"select": "random"},
                                     {"select": "varying", "layer": 3}])
def test_tokens_before_the_patches_never_roll(options):
    tokens = labelled(S=3, n=16, num_fixed=9)                    # 8 of a text, and the video cls
    rolled = token_rolling(tokens, frames=3, num_fixed=9, **options)
    assert torch.equal(rolled[:, :9], tokens[:, :9])


@pytest.mark.parametrize("options", [{}, {"roll": "release"}, {"select": "random"}])
def test_a_single_frame_stays_as_it_is(options):
    tokens = labelled(S=1, n=16)
    assert torch.equal(token_rolling(tokens, frames=1, **options), tokens)


def test_clips_of_a_batch_do_not_mix():
    tokens = torch.cat([labelled(S=2, n=8), 10 + labelled(S=2, n=8)])
    rolled = token_rolling(tokens, frames=2)
    assert rolled[:, 1, 0].tolist() == [1, 0, 11, 10]


@pytest.mark.parametrize("layer, block", [(1, [1, 2]), (2, [3, 4]), (4, [7, 8]), (5, [1, 2])])
def test_varying_layers_roll_the_next_quarter_each(layer, block):            # App. C.2
    tokens = labelled(S=3, n=8)
    rolled = token_rolling(tokens, frames=3, select="varying", layer=layer)
    assert (rolled != tokens)[0, :, 0].nonzero().flatten().tolist() == block


def test_random_selection_draws_anew_in_each_call():                         # Tab. 11b
    torch.manual_seed(0)
    tokens = labelled(S=3, n=196)
    one = token_rolling(tokens, frames=3, select="random")
    another = token_rolling(tokens, frames=3, select="random")
    assert not torch.equal(one, another)


@pytest.mark.parametrize("n", [196, 197])            # 197: with DeiT's second token, as in S
def test_the_release_rolls_half_forward_half_backward(n):
    rolled = token_rolling(labelled(S=3, n=n), frames=3, roll="release")
    assert rolled[1, 1:, 0].tolist() == [0] * 24 + [1] * (n - 48) + [2] * 24


@pytest.mark.parametrize("roll, source_frame", [("paper", 1), ("release", 0)])
def test_the_distillation_token_rolls_only_in_the_release(roll, source_frame):      # DeiT
    model = build(roll=roll, distilled=True)
    tokens = torch.randn(3, 8 + 2 + 16, 32)                      # 8 of the text, cls, distillation
    rolled = model.mix_frames(tokens, frames=3, text_length=8, layer=1)
    assert torch.equal(rolled[1, 9], tokens[source_frame, 9])
    assert torch.equal(rolled[:, :9], tokens[:, :9])
    assert torch.equal(rolled[1, 10], tokens[0, 10])             # the first patch


def test_every_block_mixes_frames_by_one_method():
    layers = []

    class Recorded(AllInOne):
        def mix_frames(self, z, frames, text_length, layer, mask=None):
            layers.append((layer, frames, text_length))
            return z

    Recorded(TINY)(clip(), words())
    assert layers == [(1, 3, 8), (2, 3, 8), (3, 3, 8)]


def test_channel_shift_takes_an_eighth_from_each_side():                     # Tab. 8a, TSM
    x = torch.randn(3, 5, 16)
    y = channel_shift(x, frames=3)
    assert torch.equal(y[:-1, :, :2], x[1:, :, :2])              # 2 of 16 from the next frame
    assert torch.equal(y[1:, :, 2:4], x[:-1, :, 2:4])            # 2 from the frame before
    assert torch.equal(y[:, :, 4:], x[:, :, 4:])
    assert y[-1, :, :2].eq(0).all()
    assert y[0, :, 2:4].eq(0).all()


@pytest.mark.parametrize("temporal", ["token_rolling", "channel_shift", "flatten"])
def test_temporal_modelling_adds_no_parameter(temporal):                     # "parameter-free"
    without = build(temporal="time_average").state_dict()
    assert build(temporal=temporal).state_dict().keys() == without.keys()


@pytest.mark.parametrize("variant, width, depth, heads", [           # Tab. 1, L: App. A
    ("Ti", 192, 12, 3), ("S", 384, 12, 6), ("B", 768, 12, 12), ("L", 1024, 24, 16)])
def test_variants_are_those_of_vit(variant, width, depth, heads):
    config = Config(**VARIANTS[variant])
    assert (config.width, config.depth, config.heads) == (width, depth, heads)


@pytest.mark.parametrize("temporal", ["timesformer", "decoupled"])           # App. B.1
def test_factorized_attention_starts_as_a_no_op(temporal):
    plain = build(temporal="time_average")
    model = AllInOne(replace(TINY, temporal=temporal)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    close(model(clip(), words()).pooled, plain(clip(), words()).pooled, atol=1e-6)


@pytest.mark.parametrize("distilled", [False, True])                         # DeiT's second token
@pytest.mark.parametrize("frames", [1, 3])
def test_attention_over_time_is_that_of_patches(frames, distilled):          # Tab. 9, Fig. 8
    model = build(temporal="timesformer", distilled=distilled)
    specials = model.num_special
    with torch.no_grad():
        model.factorized[0].space["last"].weight.zero_()
        model.factorized[0].space["last"].bias.zero_()
        z = torch.randn(frames, 8 + specials + 16, 32)
        mixed = model.mix_frames(z, frames, text_length=8, layer=1)
    moved = (mixed - z).abs().amax((0, 2)) > 1e-4
    assert moved.tolist() == (8 + specials) * [False] + 16 * [True]


@pytest.mark.parametrize("temporal", get_args(Temporal))
def test_an_image_has_no_time(temporal):
    model = build(temporal=temporal, temporal_position=True)
    image = model(clip(S=1), words()).pooled
    model.temporal_embed = None
    assert torch.equal(image, model(clip(S=1), words()).pooled)


@pytest.mark.parametrize("temporal", get_args(Temporal))
def test_images_reach_every_parameter_that_clips_reach(temporal):      # processes wait for it
    reached = []
    for S in (3, 1):
        model = build(temporal=temporal, temporal_position=True)
        model(clip(S=S), words()).pooled.sum().backward()
        reached.append({name for name, p in model.named_parameters() if p.grad is not None})
    assert reached[0] == reached[1]
    assert model.temporal_embed.grad.eq(0).all()


@pytest.mark.parametrize("temporal", ["token_rolling", "channel_shift", "flatten"])
def test_an_image_is_read_without_any_exchange(temporal):
    model = build(temporal=temporal)
    plain = build(temporal="time_average")
    assert torch.equal(model(clip(S=1), words()).pooled, plain(clip(S=1), words()).pooled)


def test_patches_take_their_positions_along():                               # release's shuffle
    raster = build().embed_video(clip())[0, 0, 1:]               # (16, 32)
    shuffled = build(patch_order="random").embed_video(clip())[0, 0, 1:]
    assert not torch.equal(raster, shuffled)
    close(raster.sort(0).values, shuffled.sort(0).values)


def test_without_temporal_positions_clips_have_any_length():
    assert build(frames=1, temporal_position=False)(clip(S=5), words()).pooled.shape == (1, 32)


@pytest.mark.parametrize("mask, message", [
    (torch.zeros(1, 8), "bool"), (torch.ones(2, 8) > 0, r"\(1, 8\)")])
def test_a_text_alone_needs_a_mask_of_its_shape_too(mask, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build().encode_text(words(), mask)


def test_a_shorter_clip_has_the_first_positions():                           # Eq. 1
    model = build(temporal_position=True)
    torch.nn.init.normal_(model.temporal_embed)
    close(model.embed_video(clip()[:, :2]), model.embed_video(clip())[:, :2])


def test_channel_shift_leaves_the_text_alone():                              # Tab. 8a
    z = torch.randn(3, 8 + 17, 32)
    mixed = build(temporal="channel_shift").mix_frames(z, frames=3, text_length=8, layer=1)
    assert torch.equal(mixed[:, :8], z[:, :8])
    assert not torch.equal(mixed[:, 8:], z[:, 8:])


@pytest.mark.parametrize("temporal", get_args(Temporal))
@pytest.mark.parametrize("frames", [2, 8, 16])                               # Fig. 9
def test_any_number_of_frames_gives_the_same_shapes(temporal, frames):
    model = build(temporal=temporal, frames=frames, temporal_position=True)
    features = model(clip(S=frames), words())
    assert features.text.shape == (1, 8, 32)
    assert features.video.shape == (1, 1 + 16, 32)
    assert features.pooled.shape == (1, 32)
    assert features.frames.shape == (1, frames, 1 + 16, 32)


REVERSED = clip().flip(1)
TURNED = clip().roll(1, 1)                       # the last frame comes first


@pytest.mark.parametrize("fields, other, same_joint, same_alone", [
    (dict(temporal="time_average"), REVERSED, True, True),
    (dict(temporal="flatten"), REVERSED, True, True),
    (dict(temporal="channel_shift"), REVERSED, False, False),
    (dict(temporal="time_average", temporal_position=True), REVERSED, False, False),       # Eq. 1
    (dict(), REVERSED, False, False),
    (dict(), TURNED, True, True),                # rolling is cyclic
    (dict(roll_unimodal=False), REVERSED, False, True)])                     # release
def test_only_rolling_and_temporal_positions_tell_the_order(fields, other, same_joint, same_alone):
    model = build(**fields)
    joint = torch.allclose(model(clip(), words()).pooled, model(other, words()).pooled, atol=1e-5)
    alone = torch.allclose(model.encode_video(clip()), model.encode_video(other), atol=1e-5)
    assert (joint, alone) == (same_joint, same_alone)


def test_the_consensus_is_the_mean_over_frames():                # p = 1/S sum_i z_i^L
    model = build()
    features = model(clip(), words())
    video, text = model.transform(model.embed_video(clip()), model.embed_text(words()))
    close(features.text, (text[:, 0] + text[:, 1] + text[:, 2]) / 3)
    close(features.video, (video[:, 0] + video[:, 1] + video[:, 2]) / 3)
    close(features.pooled, torch.tanh(model.pooler(features.text[:, 0])))    # the text cls


# ---- Embeddings (Eq. 1) --------------------------------------------------------------------------

def test_text_is_words_positions_and_type():                                 # t-hat of Eq. 1
    model = build()
    table = model.text_embeddings
    ids = words(m=5)
    summed = table["word_embeddings"].weight[ids] + table["position_embeddings"].weight[:5]
    expected = table["LayerNorm"](summed) + model.type_embeddings[0]         # LayerNorm: release
    close(model.embed_text(ids), expected)


def test_video_is_patches_positions_and_type():                              # v-hat of Eq. 1
    model = build(temporal_position=True)
    torch.nn.init.normal_(model.temporal_embed)
    v_type = model.type_embeddings[1]
    tokens = model.embed_video(clip())[0]                                    # (S, 1+n, D)
    patch = clip()[0, 2, :, 16:32, 48:64]                                    # row 1, column 3 of 4
    weight = model.patch_embed["proj"].weight.flatten(1)                     # (D, 3*P*P)
    V = weight @ patch.flatten() + model.patch_embed["proj"].bias
    slot = 1 + 4 * 1 + 3                                                     # after the cls
    close(tokens[2, slot], V + model.pos_embed[0, slot] + model.temporal_embed[0, 2] + v_type)
    cls = model.cls_token[0, 0] + model.pos_embed[0, 0] + v_type             # without time: release
    for frame in range(3):
        close(tokens[frame, 0], cls)


@pytest.mark.parametrize("field, table", [                                   # Tab. 10
    ("spatial_position", "pos_embed"), ("temporal_position", "temporal_embed"),
    ("modality_type", "type_embeddings")])
def test_each_embedding_can_be_left_out(field, table):
    complete = build(temporal_position=True)
    fields = {"temporal_position": True, field: False}
    model = build(**fields)
    assert complete.state_dict().keys() - model.state_dict().keys() == {table}
    assert model(clip(), words()).pooled.isfinite().all()


def test_the_releases_shuffle_is_another_in_each_frame():
    model = build(spatial_position=False)
    shuffled = build(spatial_position=False, patch_order="random")
    tokens, mixed = model.embed_video(clip())[0], shuffled.embed_video(clip())[0]   # (S, 1+n, D)
    same = torch.cdist(mixed, tokens) < 1e-3                     # (S, 1+n, 1+n)
    assert same.sum(1).eq(1).all()                               # every token is there once
    assert same[:, 0, 0].all()                                   # cls stays
    assert len(same.unique(dim=0)) == 3


RAW = torch.randint(256, (1, 3, 3, 64, 64), dtype=torch.uint8,
                    generator=torch.Generator().manual_seed(3))


def test_raw_pixels_are_normalised_as_imagenets():
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    model = build()
    close(model.embed_video(RAW), model.embed_video((RAW / 255 - mean) / std))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_reads_raw_pixels(dtype):
    model = build()
    full = model(RAW, words()).pooled
    half = model.to(dtype)(RAW, words()).pooled
    assert half.dtype is dtype
    close(half.float(), full, atol=0.1)


def test_a_model_built_without_memory_takes_weights_later():
    model = build()
    with torch.device("meta"):
        empty = AllInOne(TINY).eval()
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty(RAW, words()).pooled, model(RAW, words()).pooled)


def test_the_model_exports_with_any_number_of_clips():
    batch = torch.export.Dim("batch")
    mask = torch.ones(2, 8, dtype=torch.bool)
    program = torch.export.export(build(), (clip(B=2), words(B=2), mask),
                                  dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    video, ids, mask = clip(B=5), words(B=5), torch.ones(5, 8, dtype=torch.bool)
    close(program.module()(video, ids, mask).pooled, build()(video, ids, mask).pooled)


# ---- The transformer's parts (Eq. 2, Tab. 1) -----------------------------------------------------

def test_a_block_is_attention_then_mlp_with_residuals():                     # Eq. 2, ViT's pre-norm
    model = build(heads=1)
    block = model.blocks[0]
    x = torch.randn(2, 5, 32)
    q, k, v = block.attn.qkv(block.norm1(x)).split(32, -1)
    attended = (q @ k.mT / 32 ** 0.5).softmax(-1) @ v
    y = x + block.attn.proj(attended)
    y = y + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(y))))
    close(block(x), y)


def test_attention_weights_are_those_attention_uses():                       # Fig. 4
    attention = build().blocks[0].attn
    x, mask = torch.randn(2, 5, 32), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    mask = mask[:, None, None]
    q, k, _ = attention.split(x)
    logits = (q @ k.mT / 16 ** 0.5).masked_fill(~mask, -torch.inf)
    close(attention.weights(x, mask), logits.softmax(-1).mean(1))


@pytest.mark.parametrize("temporal", get_args(Temporal))
def test_padding_changes_nothing(temporal):
    model = build(temporal=temporal)
    short = words(m=5)
    padded = F.pad(short, (0, 3), value=7)                       # 7 is a word, but nobody sees it
    mask = torch.arange(8)[None] < 5
    without, with_padding = model(clip(), short), model(clip(), padded, mask)
    close(with_padding.text[:, :5], without.text)
    close(with_padding.video, without.video)
    close(with_padding.pooled, without.pooled)
    close(model.encode_text(padded, mask)[:, :5], model.encode_text(short))


@pytest.mark.parametrize("temporal", get_args(Temporal))
def test_a_clip_alone_equals_the_clip_in_a_batch(temporal):
    model = build(temporal=temporal)
    video, ids = clip(B=2), words(B=2)
    close(model(video, ids).pooled[1], model(video[1:], ids[1:]).pooled[0])
    close(model.encode_video(video)[1], model.encode_video(video[1:])[0])
    close(model.encode_text(ids)[1], model.encode_text(ids[1:])[0])


def test_a_mask_of_integers_is_a_mask_of_bools():
    mask = torch.arange(8)[None] < 5
    model = build()
    assert torch.equal(model(clip(), words(), mask.long()).pooled,
                       model(clip(), words(), mask).pooled)


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = build(dropout=0.5, drop_path=0.5).train()      # drawn alike in both passes
        model.activation_checkpointing = checkpointing
        torch.manual_seed(0)
        model(clip(), words(), torch.arange(8)[None] < 5).pooled.sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("checkpointing, calls", [(False, 1), (True, 2)])
def test_activation_checkpointing_computes_blocks_twice(checkpointing, calls):
    model = build().train()
    model.activation_checkpointing = checkpointing
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda *_: seen.append(1))
    model(clip(), words()).pooled.sum().backward()
    assert len(seen) == calls


def test_drop_path_rises_linearly_to_the_last_block():
    rates = [block.drop_path for block in build(drop_path=0.3).blocks]
    assert rates == pytest.approx([0, 0.15, 0.3])


def test_drop_path_drops_whole_rows_and_keeps_the_mean():
    torch.manual_seed(0)
    block = build(drop_path=0.3).train().blocks[2]
    rows = block.drop_rows(torch.ones(1000, 2, 4))
    assert sorted(set(rows.flatten().tolist())) == pytest.approx([0, 1 / 0.7])
    assert torch.equal(rows, rows[:, :1, :1].expand_as(rows))
    assert abs(rows.mean() - 1) < 0.1


def test_drop_path_rests_in_evaluation():
    block = build(drop_path=0.3).blocks[2]
    assert block.drop_rows(torch.ones(1000, 1, 1)).eq(1).all()


def test_dropout_reaches_text_video_attention_and_mlp():
    model = build(dropout=0.5).train()
    dropped = []
    for module in (model.drop, model.blocks[0].attn.drop, model.blocks[0].mlp.drop1,
                   model.blocks[0].mlp.drop2):
        module.register_forward_hook(lambda module, args, out: dropped.append((out == 0).any()))
    model(clip(), words())
    assert len(dropped) == 5                                     # text and video share the first
    assert all(dropped)


def test_dropout_of_the_text_follows_its_layernorm():                        # release
    model = build(dropout=0.5, modality_type=False).train()
    zeros = (model.embed_text(words(B=8)) == 0).float().mean()
    assert float(zeros) == pytest.approx(0.5, abs=0.1)


def test_layernorms_have_the_epsilons_of_vit_and_bert():
    model = build()
    assert model.norm.eps == model.blocks[0].norm1.eps == model.blocks[0].norm2.eps == 1e-6
    assert model.text_embeddings["LayerNorm"].eps == model.mlm_head.LayerNorm.eps == 1e-12


def test_random_weights_start_as_vit_and_bert():                             # Tab. 6, first row
    torch.manual_seed(0)
    model = AllInOne(replace(TINY, width=64, init_std=0.05, temporal_position=True, answers=9))
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():                               # LayerNorm: scale by 1, add 0
            assert parameter.eq(float(name.endswith("weight"))).all(), name
        elif name.endswith("bias") or name == "temporal_embed":
            assert parameter.eq(0).all(), name
        else:
            tolerance = 4 / parameter.numel() ** 0.5             # of a sample's deviation
            assert abs(parameter.std() / 0.05 - 1) < tolerance, name


@pytest.mark.parametrize("fields, millions, paper", [            # without the heads of MLM and VTC
    (VARIANTS["Ti"], 11.4, 12), (VARIANTS["S"], 33.6, 33), (VARIANTS["B"], 109.9, 110),    # Tab. 1
    (VARIANTS["L"], 335.7, 320),                                                           # App. A
    (dict(temporal="timesformer"), 180.8, 180.5), (dict(temporal="decoupled"), 195.0, 192)])
def test_variants_have_the_papers_parameters(fields, millions, paper):       # Tab. 1, Tab. 9
    with torch.device("meta"):
        model = AllInOne(Config(**fields))
    count = count_parameters(model, heads=False) / 1e6
    assert count == pytest.approx(millions, abs=0.06)
    assert count == pytest.approx(paper, rel=0.06)


def test_flatten_costs_more_in_attention_and_less_in_all():                  # Fig. 3, corrected
    rolling = count_macs(Config())
    flat = count_macs(Config(temporal="flatten"))
    assert rolling["joint"] / 1e9 == pytest.approx(63.8, abs=0.1)
    assert rolling["video"] / 1e9 == pytest.approx(52.7, abs=0.1)
    assert flat["attention"] > 2.3 * rolling["attention"]
    assert flat["joint"] < rolling["joint"]


FOUR = torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize("compute", [
    lambda x: vtm_loss(x[:, :2], FOUR).total,
    lambda x: mlm_loss(x, torch.tensor([5, 1, -100, 0])).total,
    lambda x: vtc_loss(x, x.flip(0)).total,
    lambda x: word_patch_transport(x[None], x[None].flip(1), FOUR[None] >= 0)[0],
    lambda x: build().pooler(x),
    lambda x: build().vtm_head(x),                               # 1,000 candidates must not tie
    lambda x: build().text_proj(x),
    lambda x: build().video_proj(x),
    lambda x: build(answers=4).answer_head(x),
    lambda x: build(answers=4, answer_head="release").answer_head(x),
    lambda x: build(answers=4, answer_head="linear").answer_head(x)])
def test_losses_and_heads_stay_in_float32_under_autocast(compute):
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = compute(x)
    assert under_autocast.dtype is torch.float32
    close(under_autocast, compute(x), rtol=1e-6)


def test_embeddings_stay_in_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        video = build(spatial_position=False, modality_type=False).embed_video(clip())
    assert video.dtype is torch.float32


@pytest.mark.parametrize("video, text_ids, text_mask, message", [
    (clip()[0], words(), None, r"a batch of images needs \[:, None\]"),
    (clip(S=2).transpose(1, 2), words(), None, r"need \.transpose\(1, 2\)"),
    (clip(size=96), words(), None, "another size needs a Config of that image_size"),
    (clip(S=0), words(), None, "clips without frames"),
    (clip().long(), words(), None, r"video is torch.int64; .* as uint8 \(\.byte\(\) makes them"),
    (clip().numpy(), words(), None, "torch.from_numpy"),
    (clip(B=2), words(), None, "2 clips came with 1 texts"),
    (clip(), words()[0], None, r"One text needs \[None\]"),
    (clip(), words().float(), None, "expected token ids as int64"),
    (clip(), words().numpy(), None, "expected .* token ids as a torch.Tensor"),
    (clip(), words(m=9), None, "positions for texts of 1 to 8 tokens"),
    (clip(), words(m=0), None, "positions for texts of 1 to 8 tokens"),
    (clip(), words(), torch.zeros(1, 8), r"an additive mask .* becomes one by mask == 0"),
    (clip(), words(), torch.ones(1, 7).bool(), r"text_mask is \(1, 7\), the text \(1, 8\)")])
def test_wrong_input_is_told_what_was_expected(video, text_ids, text_mask, message):
    with pytest.raises((TypeError, ValueError), match=f"(?i){message}"):
        build()(video, text_ids, text_mask)


def test_more_frames_than_temporal_positions_are_refused():
    with pytest.raises(ValueError, match="4 frames, but .* positions for 3; .* frames=4"):
        build(temporal_position=True)(clip(S=4), words())


def test_rows_that_are_not_whole_clips_are_refused():
    with pytest.raises(ValueError, match="4 rows, which are not whole clips of 3 adjacent frames"):
        token_rolling(torch.zeros(4, 9, 8), frames=3)


@pytest.mark.parametrize("fields, message", [
    (dict(temporal="rolling"), "temporal is 'rolling'; it can be token_rolling or time_average"),
    (dict(frames=0), "frames is 0; it must be 1 or more"),
    (dict(answers=-1), "answers is -1; it must be 0 or more"),
    (dict(width=100), "width 100 is no multiple of heads 12"),
    (dict(image_size=99), "image_size 99 is no multiple of patch_size 16"),
    (dict(roll_ratio=1.5), "roll_ratio is 1.5; it is a share"),
    (dict(roll="release", roll_select="random"), "'release' rolls blocks alone")])
def test_a_config_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_the_examples_of_the_file_run_with_the_file_alone(tmp_path):
    shutil.copy(HERE / "allinone.py", tmp_path)
    lines = allinone.__doc__.split("    import torch\n")[1].split("\nThe file follows")[0]
    example = "import torch\n" + textwrap.dedent("    \n" + lines)
    example = example.replace("Config()", "Config(width=32, depth=2, heads=2, vocab_size=8)")
    (tmp_path / "example.py").write_text(example)
    process = Started(tmp_path / "printed", tmp_path / "example.py")
    process.wait()
    assert re.fullmatch(r"tensor\(\[0\.\d+, 0\.\d+\]\)\n", process.printed())


# ---- Training objectives (Sec. 3.3) -------------------------------------------------------------

TOKENS = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "run",
          "##ning", "cat"]
VOCABULARY = Vocabulary({token: i for i, token in enumerate(TOKENS)})
SENTENCE = [TOKENS.index(token) for token in ["[CLS]", "a", "dog", "##s", "run", "##ning", "[SEP]",
                                              "[PAD]"]]
MANY = torch.tensor(SENTENCE).repeat(20_000, 1)


def masked_many(**options) -> tuple[torch.Tensor, torch.Tensor]:
    return mask_words(MANY, VOCABULARY, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("whole_words", [False, True])
def test_15_percent_of_the_words_are_chosen(whole_words):                    # Sec. 3.3
    _, labels = masked_many(whole_words=whole_words)
    chosen = (labels >= 0).float().mean(0)                       # by place in the sentence
    assert chosen[[0, 6, 7]].eq(0).all()                         # [CLS], [SEP], [PAD]
    assert chosen[1:6].tolist() == pytest.approx([0.15] * 5, abs=0.01)


def test_80_10_10_percent_become_mask_random_and_stay():                     # BERT [8]
    masked, labels = masked_many()
    becomes, was = masked[labels >= 0], labels[labels >= 0]
    is_mask = (becomes == VOCABULARY.mask_id).float().mean()
    stays = (becomes == was).float().mean()
    assert float(is_mask) == pytest.approx(0.8, abs=0.01)
    assert float(stays) == pytest.approx(0.1 + 0.1 / 6, abs=0.01)            # a random one of 6


def test_random_words_are_ordinary_words_of_the_vocabulary():
    masked, labels = masked_many()
    replaced = masked[(labels >= 0) & (masked != VOCABULARY.mask_id)]
    names = {TOKENS[i] for i in replaced.tolist()}
    assert names == {"a", "dog", "##s", "run", "##ning", "cat"}


def test_labels_are_the_words_that_stood_there():
    masked, labels = masked_many()
    assert torch.equal(labels[labels >= 0], MANY[labels >= 0])
    assert labels[labels < 0].eq(-100).all()
    assert torch.equal(masked[labels < 0], MANY[labels < 0])


def test_whole_words_are_chosen_with_all_their_pieces():                     # release
    _, whole = masked_many(whole_words=True)
    _, single = masked_many()
    for labels, together in ((whole, True), (single, False)):
        chosen = labels >= 0
        assert torch.equal(chosen[:, 2], chosen[:, 3]) == together           # dog ##s
        assert torch.equal(chosen[:, 4], chosen[:, 5]) == together           # run ##ning
        assert not torch.equal(chosen[:, 2], chosen[:, 4])


def test_the_share_of_masked_words_can_be_changed():
    _, labels = masked_many(share=1.0)
    assert (labels[:, 1:6] >= 0).all()


def test_masks_follow_their_generator():
    text = torch.tensor(SENTENCE * 10)
    rng = torch.Generator()
    one, again = (mask_words(text, VOCABULARY, generator=rng.manual_seed(5))[0] for _ in range(2))
    another = mask_words(text, VOCABULARY, generator=rng.manual_seed(6))[0]
    assert torch.equal(one, again)
    assert not torch.equal(one, another)


def test_a_vocabulary_that_is_not_berts_is_refused():
    with pytest.raises(ValueError, match=r"lacks \[CLS\], \[MASK\]; expected one made for BERT"):
        Vocabulary({"[PAD]": 0, "[SEP]": 1, "dog": 2})


def test_masked_positions_are_filled_up_to_32():
    labels = torch.full((2, 5), -100)
    labels[0, 3], labels[1, 1] = 11, 7
    positions, words_there = masked_positions(labels)
    assert positions.tolist() == [3, 6] + [0] * 30
    assert words_there.tolist() == [11, 7] + [-100] * 30
    assert masked_positions(torch.full((2, 5), -100))[1].tolist() == [-100] * 32


def test_half_of_the_texts_meet_another_clip():                              # "probability of 0.5"
    rng = torch.Generator().manual_seed(0)
    labels = [vtm_pairs(range(8), range(8), rng)[1] for _ in range(500)]
    assert float(torch.cat(labels).float().mean()) == pytest.approx(0.5, abs=0.03)


def test_labels_say_whether_the_clip_is_the_texts_own():
    meets, labels = vtm_pairs(range(100), range(100), torch.Generator().manual_seed(0))
    assert torch.equal(labels == 1, meets == torch.arange(100))


def test_another_clip_has_another_text_and_another_video():
    texts = ["a dog", "a dog", "a cat", "a cow"]
    clips = ["1.mp4", "2.mp4", "2.mp4", "3.mp4"]
    rng = torch.Generator().manual_seed(0)
    met = [vtm_pairs(texts, clips, rng)[0].tolist() for _ in range(200)]
    assert {row[0] for row in met} == {0, 2, 3}                  # never clip 1: the same text
    assert {row[1] for row in met} == {1, 3}                     # nor 2: the same video
    assert {row[3] for row in met} == {0, 1, 2, 3}


def test_a_text_without_an_alternative_keeps_its_clip():
    meets, labels = vtm_pairs(["a dog"] * 3, range(3), torch.Generator().manual_seed(0))
    assert meets.tolist() == [0, 1, 2]
    assert labels.tolist() == [1, 1, 1]


def objective_batch(padded_to: int = 5) -> dict[str, torch.Tensor]:
    """3 clips with texts of 5 tokens, padded with a word that nobody may see, for every task."""
    texts = torch.tensor([[3, 6, 7, 8, 4], [3, 6, 9, 10, 4], [3, 6, 11, 9, 4]])
    masked = texts.clone()
    masked[0, 2] = masked[2, 3] = VOCABULARY.mask_id
    options = torch.stack([texts, texts.flip(0)], 1)             # (B, O, m)
    positions = torch.tensor([0 * padded_to + 2, 2 * padded_to + 3, 0])

    def pad(rows, value=7):
        return F.pad(rows, (0, padded_to - 5), value=value)

    return {"video": clip(B=3), "text_ids": pad(texts),
            "text_mask": pad(torch.ones(3, 5), value=0).bool(), "mlm_ids": pad(masked),
            "mlm_positions": positions, "mlm_labels": torch.tensor([7, 9, -100]),
            "vtm_video": torch.tensor([0, 2, 2]), "vtm_labels": torch.tensor([1, 0, 1]),
            "option_ids": pad(options),
            "option_text_mask": pad(torch.ones(3, 2, 5), value=0).bool(),
            "option_mask": torch.tensor([[1, 1], [1, 0], [1, 1]]).bool(),
            "label": torch.tensor([0, 0, -1])}


EVERY_OBJECTIVE = [*OBJECTIVES, *SCORES]
TASKS_MODEL = dict(vocab_size=12, answers=4, vtc_dim=16)


def test_vtm_asks_the_pooled_cls_of_each_pair():
    model, batch = build(**TASKS_MODEL), objective_batch()
    pooled = model(batch["video"][[0, 2, 2]], batch["text_ids"]).pooled
    expected = F.cross_entropy(model.vtm_head(pooled), torch.tensor([1, 0, 1]))
    close(compute_losses(model, batch, ["vtm"])["vtm"].mean, expected)


def test_mlm_asks_the_masked_tokens_beside_their_own_clip():
    model, batch = build(**TASKS_MODEL), objective_batch()
    text = model(batch["video"], batch["mlm_ids"]).text
    logits = model.mlm_head(torch.stack([text[0, 2], text[2, 3]]))
    expected = F.cross_entropy(logits, torch.tensor([7, 9]))
    close(compute_losses(model, batch, ["mlm"])["mlm"].mean, expected)


def test_vtc_contrasts_videos_and_texts_alone():
    model, batch = build(**TASKS_MODEL), objective_batch()
    text = F.normalize(model.text_proj(model.encode_text(batch["text_ids"])[:, 0]), dim=1)
    video = F.normalize(model.video_proj(model.encode_video(batch["video"])[:, 0]), dim=1)
    cosines = text @ video.T / 0.05                              # the release's temperature
    own = torch.arange(3)
    expected = F.cross_entropy(cosines, own) + F.cross_entropy(cosines.T, own)
    close(compute_losses(model, batch, ["vtc"])["vtc"].mean, expected)


def test_alignment_nears_matched_pairs_and_parts_others():                   # release
    model, batch = build(**TASKS_MODEL), objective_batch()
    features = model(batch["video"][[0, 2, 2]], batch["text_ids"])
    distance, _ = word_patch_transport(features.text, features.video[:, 1:], batch["text_mask"])
    expected = (distance[0] - distance[1] + distance[2]) / 3
    close(compute_losses(model, batch, ["vtm", "wpa"])["wpa"].mean, expected)


def test_both_passes_together_equal_each_alone():
    model, batch = build(**TASKS_MODEL), objective_batch()
    together = compute_losses(model, batch, ["vtm", "mlm", "vtc"])
    for name in ("vtm", "mlm", "vtc"):
        close(compute_losses(model, batch, [name])[name].mean, together[name].mean)


def test_candidates_are_scored_by_their_matched_logit():                     # Sec. 4.2.1, 4.2.3
    model, batch = build(**TASKS_MODEL), objective_batch()
    scores = candidate_scores(model, batch)
    for clip_number, option in [(0, 0), (0, 1), (1, 0), (2, 1)]:
        pair = batch["video"][clip_number, None], batch["option_ids"][clip_number, option, None]
        close(scores[clip_number, option], match_logits(model, *pair)[0, 1])
    assert scores[1, 1] == -torch.inf                            # that clip has one option


@pytest.mark.parametrize("head, rates", [("paper", []), ("linear", []), ("release", [0.5])])
def test_only_the_releases_answer_head_drops_out(head, rates):
    model = build(answers=3, answer_head=head, dropout=0.1)
    dropouts = [module.p for module in model.answer_head.modules()
                if isinstance(module, torch.nn.Dropout)]
    assert dropouts == rates


def test_answers_are_scored_on_the_pooled_cls():                             # Sec. 4.2.1
    model, batch = build(**TASKS_MODEL), objective_batch()
    pooled = model(batch["video"], batch["text_ids"]).pooled
    hidden, activation, last = model.answer_head
    assert hidden.out_features == 768                            # "hidden size 768"
    close(answer_scores(model, batch), last(F.gelu(hidden(pooled))))


def test_a_probe_reads_the_video_cls_alone():                                # Tab. 12
    model, batch = build(**TASKS_MODEL, answer_head="linear"), objective_batch()
    feature = model.encode_video(batch["video"])[:, 0]
    assert len(model.answer_head) == 1
    close(class_scores(model, batch), model.answer_head(feature))
    close(class_scores(model, {"feature": feature}), model.answer_head(feature))


@pytest.mark.parametrize("objective", ["qa", "choice", "rank", "probe"])
def test_a_label_that_is_no_class_teaches_nothing(objective):
    model, batch = build(**TASKS_MODEL), objective_batch()
    loss = compute_losses(model, batch, [objective])[objective]
    scores = SCORES[objective](model, batch)
    close(loss.mean, F.cross_entropy(scores[:2], torch.tensor([0, 0])))
    assert int(loss.number) == 2


@pytest.mark.parametrize("objective", EVERY_OBJECTIVE)
def test_padding_changes_no_objective(objective):
    model = build(**TASKS_MODEL)
    losses = []
    for length in (5, 8):
        batch = objective_batch(padded_to=length)
        losses.append(compute_losses(model, batch, {"vtm", objective})[objective])
    close(losses[0].mean, losses[1].mean)


@pytest.mark.parametrize("task", SCORES)
def test_padding_changes_no_score(task):         # a loss may hide what shifts all candidates alike
    model = build(**TASKS_MODEL)
    scores = SCORES[task](model, objective_batch(padded_to=5))
    close(SCORES[task](model, objective_batch(padded_to=8)), scores)


@pytest.mark.parametrize("objective", EVERY_OBJECTIVE)
def test_the_number_of_items_is_known_before_the_pass(objective):
    batch = objective_batch()
    loss = compute_losses(build(**TASKS_MODEL), batch, {"vtm", objective})[objective]
    assert int(count_items(batch, objective)) == int(loss.number)


@pytest.mark.parametrize("objective, correct", [
    ("vtm", 2), ("mlm", 1), ("vtc", None), ("qa", 1), ("rank", None)])
def test_accuracy_counts_items_whose_label_scores_highest(objective, correct):
    model, batch = build(**TASKS_MODEL), objective_batch()
    with torch.no_grad():
        scores, _ = pretraining_scores(model, batch, ["vtm", "mlm"])
    if objective in scores:
        best = scores[objective].logits.argmax(1)
        right = (best == scores[objective].labels).sum()
    elif objective == "vtc":
        cosines = (text_embedding(model, batch["text_ids"]) @
                   video_embedding(model, batch["video"]).T)
        right = (cosines.argmax(1) == torch.arange(3)).sum()
    else:
        right = (SCORES[objective](model, batch)[:2].argmax(1) == 0).sum()
    assert int(compute_losses(model, batch, [objective])[objective].correct) == int(right)


HEADS = {"pooler", "vtm_head", "mlm_head", "text_proj", "video_proj", "answer_head"}


@pytest.mark.parametrize("objectives, heads", [
    (["vtm"], {"pooler", "vtm_head"}),
    (["mlm"], {"mlm_head"}),
    (["vtc"], {"text_proj", "video_proj"}),
    (["vtm", "wpa"], {"pooler", "vtm_head"}),
    (["rank"], {"pooler", "vtm_head"}),
    (["choice"], {"pooler", "vtm_head"}),
    (["qa"], {"pooler", "answer_head"}),
    (["probe"], {"answer_head"})])
def test_each_objective_trains_its_own_heads(objectives, heads):
    model, batch = build(**TASKS_MODEL), objective_batch()
    losses = compute_losses(model, batch, objectives)
    sum(loss.total for loss in losses.values()).backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert moved & HEADS == heads
    if objectives[0] in OBJECTIVES:
        assert heads == set().union(*(OBJECTIVES[name] for name in objectives))


def test_a_batch_without_masked_words_has_no_loss_and_no_gradient():
    logits = torch.randn(4, 50, requires_grad=True)
    nothing = mlm_loss(logits, torch.full((4,), -100))
    assert nothing.total == 0
    assert nothing.mean == 0
    assert torch.autograd.grad(nothing.total, logits)[0].eq(0).all()


def test_an_unknown_objective_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="no objective order; expected some of vtm, mlm, vtc"):
        compute_losses(build(), {}, ["order"])


def test_alignment_without_matching_is_refused():
    with pytest.raises(ValueError, match="wpa needs vtm beside it"):
        compute_losses(build(**TASKS_MODEL), objective_batch(), ["wpa"])


def test_a_pretraining_batch_masks_words_and_pairs_clips():
    text_mask = torch.tensor(SENTENCE).repeat(8, 1) != 0
    ids = torch.tensor(SENTENCE).repeat(8, 1)
    ids[:, 2] = torch.tensor([7, 11] * 4)                        # two different texts
    batch = pretraining_batch(clip(B=8), ids, text_mask, VOCABULARY, whole_words=True,
                              generator=torch.Generator().manual_seed(1))
    chosen = batch["mlm_labels"] >= 0
    places = batch["mlm_positions"][chosen]
    assert torch.equal(ids.flatten()[places], batch["mlm_labels"][chosen])
    own = batch["vtm_video"] == torch.arange(8)
    assert torch.equal(own, batch["vtm_labels"] == 1)
    assert (ids[batch["vtm_video"]] != ids).any(1).logical_or(own).all()     # else another text
    losses = compute_losses(build(vocab_size=12), batch, ["vtm", "mlm", "vtc"])
    assert all(loss.mean.isfinite() for loss in losses.values())


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_pretraining_batch_masks_pieces_or_words(whole_words):
    ids = MANY[:200]
    batch = pretraining_batch(torch.zeros(200, 1), ids, ids != 0, VOCABULARY, whole_words,
                              torch.Generator().manual_seed(1))
    chosen = torch.zeros(200 * 8, dtype=torch.bool)
    chosen[batch["mlm_positions"][batch["mlm_labels"] >= 0]] = True
    dog, s = chosen.view(200, 8)[:, 2:4].T                       # the pieces of "dogs"
    assert torch.equal(dog, s) == whole_words


def test_a_text_without_words_is_aligned_with_nothing():
    distance, plan = word_patch_transport(torch.randn(1, 4, 8), torch.randn(1, 4, 8),
                                          torch.tensor([[True, True, False, False]]))
    assert distance.tolist() == [0.0]
    assert plan.isfinite().all()


def test_the_word_of_id_0_can_be_masked():
    positions, masked = masked_positions(torch.tensor([[-100, 0, 5, -100]]), pad_to=1)
    assert positions.tolist() == [1, 2]
    assert masked.tolist() == [0, 5]


def test_vtc_is_right_where_a_text_finds_its_clip():
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    video = torch.tensor([[1.0, 0.1], [1.0, 0.2]])               # both are nearest to text 0
    assert vtc_loss(text, video).correct == 2
    assert vtc_loss(video, text).correct == 1


@pytest.mark.parametrize("distilled", [False, True])
def test_words_are_aligned_with_patches_alone(distilled):
    model = build(distilled=distilled)
    patches = torch.randn(2, 16, 32)
    features = allinone.Features(text=torch.randn(2, 8, 32), pooled=None, frames=None,
                                 video=F.pad(patches, (0, 0, model.num_special, 0), value=9.0))
    batch = {"text_mask": torch.ones(2, 8) > 0, "vtm_labels": torch.tensor([1, 0])}
    distance, _ = word_patch_transport(features.text, patches, batch["text_mask"])
    loss = allinone.word_patch_alignment_loss(model, features, batch)
    close(loss.total, distance[0] - distance[1])


def test_the_plan_of_transport_has_no_gradient():
    text = torch.randn(1, 6, 8, requires_grad=True)
    distance, plan = word_patch_transport(text, torch.randn(1, 4, 8), torch.ones(1, 6) > 0)
    assert distance.requires_grad and not plan.requires_grad


def test_transport_moves_all_mass_between_words_and_patches():               # Sec. 4.6, IPOT
    text, patches = torch.randn(2, 6, 8), torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    distance, plan = word_patch_transport(text, patches, mask)
    close(plan.sum((1, 2)), torch.ones(2))
    assert plan[0].sum(1).gt(0).tolist() == [False, True, True, True, True, False]
    assert plan[1].sum(1).gt(0).tolist() == [False, True, True, False, False, False]
    close(plan.sum(1), torch.full((2, 4), 0.25), atol=0.05)      # each patch gets its part
    cosine = F.normalize(text, dim=-1) @ F.normalize(patches, dim=-1).mT
    close(distance, ((1 - cosine) * plan).sum((1, 2)))


# ---- The release's own forward pass (float32, evaluation mode) ----------------------------------

def rule(count: int, shift: float) -> np.ndarray:
    """Numbers in [0, 1) without a file: u(43758.5453 sin(12.9898 i + shift)), u(x) = x mod 1."""
    return 43758.5453 * np.sin(12.9898 * np.arange(count, dtype=np.float64) + shift) % 1


def release_weights(D=48, L=3, V=60, m=10, n=16, S=3) -> dict[str, torch.Tensor]:
    """A tiny released model: the authors' names in alphabetical order, filled by rule."""
    layers = {                                                   # weight and bias
        "itm_score.fc": (2, D), "mlm_score.transform.dense": (D, D), "pooler.dense": (D, D),
        "txt_proj": (512, D), "vid_proj": (512, D), "transformer.patch_embed.proj": (D, 3, 16, 16),
        "transformer.norm": (D,), "text_embeddings.LayerNorm": (D,),
        "mlm_score.transform.LayerNorm": (D,)}
    for d in range(L):
        block = f"transformer.blocks.{d}"
        layers[f"{block}.attn.qkv"] = (3 * D, D)
        layers[f"{block}.attn.proj"] = (D, D)
        layers[f"{block}.mlp.fc1"] = (4 * D, D)
        layers[f"{block}.mlp.fc2"] = (D, 4 * D)
        layers[f"{block}.norm1"] = (D,)
        layers[f"{block}.norm2"] = (D,)
    shapes = {
        "mlm_score.bias": (V,), "mlm_score.decoder.weight": (V, D),
        "text_embeddings.word_embeddings.weight": (V, D),
        "text_embeddings.position_embeddings.weight": (m, D),
        "text_embeddings.token_type_embeddings.weight": (2, D),
        "token_type_embeddings.weight": (2, D),
        "transformer.cls_token": (1, 1, D), "transformer.pos_embed": (1, 1 + n, D),
        "transformer.temporal_embed": (1, S, D)}
    for name, shape in layers.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]
    weights = {}
    for k, name in enumerate(sorted(shapes)):
        is_norm = name.endswith("weight") and "norm" in name.lower()
        values = rule(math.prod(shapes[name]), 78.233 * (k + 1)) - 0.5 + is_norm
        weights[name] = torch.tensor(values.astype(np.float32)).reshape(shapes[name])
    return weights


RELEASE_VIDEO = torch.tensor((2 * rule(2 * 3 * 3 * 64 * 64, 0) - 1).astype(np.float32))
RELEASE_VIDEO = RELEASE_VIDEO.reshape(2, 3, 3, 64, 64)
RELEASE_TEXT = torch.tensor([[8, 19, 30, 41, 52] * 2, [15, 26, 37, 48, 59, 15, 0, 0, 0, 0]])
RELEASE_MASK = torch.arange(10) < torch.tensor([[10], [6]])


@pytest.mark.parametrize("output, expected", [       # of both clips, 4 numbers each at most
    ("vtm", [-1.14116, -1.59082, -2.68078, -0.42106]),
    ("text", [0.07947, 0.05671, 0.03479, 0.06531, 0.01159, 0.04282, 0.03442, -0.01769]),
    ("video_cls", [0.24569, -0.35310, 0.43810, -0.05541, 0.55602, -0.02882, 0.90904, 0.32097]),
    ("mlm_2", [0.68358, -0.97225, -2.13194, 1.96284, -0.88302, 0.36853, -3.28230, 1.45014]),
    ("wpa", [0.29407, 0.39855]),
    ("vtc", [1.28574]),
    ("video_emb", [0.41811, -0.72178, -1.87211, 1.29378, 1.32541, -1.22628, -2.56349, 0.14986])])
def test_released_weights_give_the_releases_numbers(output, expected):
    model, _ = load_release({"state_dict": release_weights()}, heads=4)
    model.eval()
    features = model(RELEASE_VIDEO, RELEASE_TEXT, RELEASE_MASK)
    video = model.video_proj(model.encode_video(RELEASE_VIDEO)[:, 0])
    text = model.text_proj(model.encode_text(RELEASE_TEXT, RELEASE_MASK)[:, 0])
    transport = word_patch_transport(features.text, features.video[:, 1:], RELEASE_MASK)
    outputs = {"vtm": model.vtm_head(features.pooled), "text": features.text.mean(-1),
               "video_cls": features.video[:, 0], "mlm_2": model.mlm_head(features.text[:, 2]),
               "wpa": transport[0], "vtc": vtc_loss(text, video).mean, "video_emb": video}
    value = outputs[output]
    if value.ndim == 2:
        value = value[:, :4]
    close(value.flatten(), torch.tensor(expected), atol=1e-4)


def pooled_of(weights: dict, **fields) -> torch.Tensor:
    model, _ = load_release({"state_dict": weights, "epoch": 3}, heads=4, **fields)
    return model.eval()(clip(size=64), words()).pooled


def test_every_tensor_of_a_release_is_loaded():
    _, report = load_release(release_weights(), heads=4)
    assert [len(names) for names in report.values()] == [62, 0, 0, 0]


@pytest.mark.parametrize("rename", [
    lambda name: f"module.{name}",                               # DistributedDataParallel
    lambda name: name.replace("itm_score", "vtm_score")])        # All-in-one+
def test_releases_load_under_their_other_names(rename):
    weights = release_weights()
    renamed = {rename(name): tensor for name, tensor in weights.items()}
    assert torch.equal(pooled_of(renamed), pooled_of(weights))


def test_heads_that_we_lack_are_ignored_by_name():
    extra = {"rank_output.weight": torch.zeros(1, 48),
             "text_embeddings.position_ids": torch.arange(10)[None]}
    weights = release_weights()
    weights.update(extra)
    _, report = load_release(weights, heads=4)
    assert report["ignored"] == list(extra)


def test_a_release_without_temporal_positions_has_none():
    weights = release_weights()
    weights["transformer.temporal_embed"] = torch.zeros(1, 8, 48)
    zeros = pooled_of(weights)
    assert load_release(weights, heads=4)[0].config.frames == 8
    del weights["transformer.temporal_embed"]
    assert torch.equal(pooled_of(weights), zeros)


def test_a_pretraining_release_lacks_only_vtcs_projections():
    weights = {name: tensor for name, tensor in release_weights().items() if "_proj" not in name}
    _, report = load_release(weights, heads=4)
    assert report["initialised"] == ["text_proj.weight", "text_proj.bias", "video_proj.weight",
                                     "video_proj.bias"]


def test_released_spatial_positions_are_interpolated():                      # Tab. 2a: 384 px
    weights = release_weights()
    model, report = load_release(weights, heads=4, image_size=96)
    grid = weights["transformer.pos_embed"][:, 1:].mT.reshape(1, 48, 4, 4)
    grid = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    close(model.pos_embed[:, 1:], grid.flatten(2).mT)
    assert torch.equal(model.pos_embed[:, 0], weights["transformer.pos_embed"][:, 0])
    assert report["resized"] == ["pos_embed"]


@pytest.mark.parametrize("frames", [2, 8])
def test_released_frames_are_cut_or_filled_with_zeros(frames):
    weights = release_weights()
    times = weights["transformer.temporal_embed"]
    model, report = load_release(weights, heads=4, frames=frames)
    expected = F.pad(times, (0, 0, 0, max(0, frames - 3)))[:, :frames]
    assert torch.equal(model.temporal_embed, expected)
    assert report["resized"] == ["temporal_embed"]


def test_longer_texts_keep_the_released_positions():
    weights = release_weights()
    model, _ = load_release(weights, heads=4, max_text_len=80)
    position = weights["text_embeddings.position_embeddings.weight"]
    bert_type = weights["text_embeddings.token_type_embeddings.weight"][0]
    positions = model.text_embeddings["position_embeddings"].weight
    assert torch.equal(positions[:10], position + bert_type)
    assert positions[10:].std() > 0


def distilled_release() -> dict[str, torch.Tensor]:
    """All-in-one-S: a second special token, and temporal positions that were never used."""
    weights = release_weights()
    weights["transformer.dist_token"] = torch.randn(1, 1, 48)
    weights["transformer.pos_embed"] = torch.randn(1, 2 + 16, 48)
    return weights


def test_a_distilled_release_never_used_its_temporal_positions():
    model, report = load_release(distilled_release(), heads=4)
    assert model.config.distilled
    assert model.temporal_embed is None
    assert report["ignored"] == ["temporal_embed"]


def test_positions_with_two_special_tokens_are_resized():
    weights = distilled_release()
    model, _ = load_release(weights, heads=4, image_size=96)
    special, grid = weights["transformer.pos_embed"].split((2, 16), 1)
    grid = F.interpolate(grid.mT.reshape(1, 48, 4, 4), size=(6, 6), mode="bicubic")
    close(model.pos_embed, torch.cat([special, grid.flatten(2).mT], 1))


@pytest.mark.parametrize("field, value", [
    ("roll", "release"), ("roll_unimodal", False), ("patch_order", "raster"), ("heads", 4),
    ("width", 48), ("depth", 3), ("image_size", 64), ("patch_size", 16), ("vocab_size", 60),
    ("max_text_len", 10), ("frames", 3), ("temporal_position", True), ("distilled", False)])
def test_a_releases_config_is_read_off_its_tensors(field, value):
    model, _ = load_release(release_weights(), heads=4)
    assert getattr(model.config, field) == value


def test_heads_of_a_release_are_its_width_by_64():                           # Tab. 1
    model, _ = load_release(release_weights(D=192, L=1))
    assert model.config.heads == 3


def trap(function, *args):
    """Pickles as a call of a function, which whoever unpickles it makes."""
    return type("Trap", (), {"__reduce__": lambda self: (function, args)})()


@pytest.mark.parametrize("zipped, protocol", [(True, 2), (True, 4), (False, 2)])  # torch before 1.6
def test_nothing_that_a_checkpoint_pickles_is_executed(zipped, protocol, tmp_path):
    made = [str(tmp_path / name) for name in "abcd"]
    traps = [trap(os.mkdir, made[0]), trap(open, made[1], "w"), trap(torch.save, {}, made[2]),
             trap(exec, f"import os; os.mkdir('{made[3]}')")]
    # Config stands for Lightning's classes, which a checkpoint holds and nobody has installed.
    extras = {"traps": traps, "dict": collections.defaultdict(Config, a=TINY), "set": {TINY},
              "path": tmp_path, "function": os.mkdir, "array": np.zeros(3), TINY: Config}
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": release_weights(), "hyper_parameters": extras}, path,
               pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    _, report = load_release(path, heads=4)
    assert len(report["loaded"]) == 62
    assert not any(map(os.path.exists, made))
    torch.load(path, weights_only=False)                         # the traps do work
    assert all(map(os.path.exists, made))


# ---- ImageNet initialisation (Sec. 3.1, Tab. 6) --------------------------------------------------

def vit_weights(**fields) -> dict[str, torch.Tensor]:
    """A ViT's or DeiT's weights with the classifier that it was trained with."""
    backbone = ("cls_token", "dist_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
    weights = {}
    for name, tensor in build(5, **fields).state_dict().items():
        if name.startswith(backbone):
            weights[name] = tensor
    weights["head.weight"], weights["head.bias"] = torch.zeros(1000, 32), torch.zeros(1000)
    if fields.get("distilled"):                                  # DeiT's second classifier
        weights["head_dist.weight"] = torch.zeros(1000, 32)
        weights["head_dist.bias"] = torch.zeros(1000)
    return weights


def training_checkpoint(weights: dict, prefix: str) -> dict:
    state = {prefix + name: tensor for name, tensor in weights.items()}
    return {"epoch": 3, "arch": "vit", "state_dict": state, "optimizer": {"state": {}}}


@pytest.mark.parametrize("wrap", [
    lambda weights: weights,                                     # timm
    lambda weights: {"model": weights},                          # DeiT
    lambda weights: training_checkpoint(weights, ""),            # timm's own training
    lambda weights: training_checkpoint(weights, "module."),
    lambda weights: training_checkpoint(weights, "model."),
    lambda weights: training_checkpoint(weights, "module.model.")])
def test_the_backbone_is_initialised_from_vit_or_deit(wrap, tmp_path):
    weights, model = vit_weights(), build()
    torch.save(wrap(weights), tmp_path / "vit.pth")
    report = load_vit(model, tmp_path / "vit.pth")
    assert report["ignored"] == ["head.weight", "head.bias"]
    assert set(report["loaded"]) == weights.keys() - {"head.weight", "head.bias"}
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in report["loaded"])


def test_text_and_heads_keep_their_random_start():                           # Sec. 3.1
    model, before = build(), build().state_dict()
    report = load_vit(model, vit_weights())
    assert {name.split(".")[0] for name in report["initialised"]} == {
        "text_embeddings", "type_embeddings", "pooler", "vtm_head", "mlm_head", "text_proj",
        "video_proj"}
    assert all(torch.equal(model.state_dict()[name], before[name])
               for name in report["initialised"])


def test_a_distilled_deit_brings_its_second_token_and_classifier():
    weights, model = vit_weights(distilled=True), build(distilled=True)
    report = load_vit(model, weights)
    assert torch.equal(model.dist_token, weights["dist_token"])
    assert report["ignored"] == ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]


def test_a_model_without_positions_takes_none_of_vits():                     # Tab. 10
    report = load_vit(build(spatial_position=False), vit_weights())
    assert "pos_embed" in report["ignored"]


def write_safetensors(path: Path, weights: dict[str, torch.Tensor]) -> None:
    header, content = {"__metadata__": {"format": "pt"}}, b""
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    for name, tensor in weights.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        header[name] = {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(content), len(content) + len(raw)]}
        content += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


def test_weights_saved_on_a_gpu_are_read_without_one(tmp_path, monkeypatch):
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "a.pt")
    weights = read_weights(tmp_path / "a.pt")["model"]
    assert weights["a"].device.type == "cpu" and weights["a"].tolist() == [1, 1]


def test_safetensors_are_read_without_a_further_package(tmp_path):
    weights = {"a": torch.randn(3, 5), "b": torch.arange(4), "c": torch.randn(2).bfloat16(),
               "d": torch.zeros(0, 3)}
    write_safetensors(tmp_path / "model.safetensors", weights)
    content = read_weights(tmp_path / "model.safetensors")
    assert content.keys() == weights.keys()
    assert all(torch.equal(content[name], weights[name]) for name in weights)


def save_numpy(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, kernel=np.zeros(3))


def cut_safetensors(path: Path) -> None:
    write_safetensors(path.with_suffix(".safetensors"), {"a": torch.zeros(9)})
    content = path.with_suffix(".safetensors").read_bytes()
    path.with_suffix(".safetensors").write_bytes(content[:-8])


def flip_a_byte(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name, write, message", [
    ("x.pth", lambda path: None, "no such file"),
    ("x.pth", lambda path: path.mkdir(), "is a folder"),
    ("x.pth", lambda path: path.write_bytes(b""), "not a file of weights, or damaged"),
    ("x.pth", lambda path: path.write_bytes(b"not one at all"), "not a file of weights"),
    ("x.pth", lambda path: path.write_bytes(b"\n<!DOCTYPE html>"), "a web page, not weights"),
    ("x.pth", lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
     "a pointer of Git LFS.*git lfs pull"),
    ("x.npz", save_numpy, "a NumPy archive.*timm offers"),
    ("x.pth", save_numpy, "a NumPy archive"),
    ("x.pth", lambda path: torch.save(build(), path), "holds a whole pickled model.*state_dict"),
    ("x.pth", lambda path: torch.save([1, 2], path), "holds a list"),
    ("x.pth", flip_a_byte, "the checksum of its part .* is wrong"),
    ("x.safetensors", cut_safetensors, "not a .safetensors file, or damaged"),
    ("x.safetensors", lambda path: path.write_bytes(b"<html>"), "not a .safetensors file")])
def test_a_file_that_holds_no_weights_says_what_it_is(name, write, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*{message}"):
        read_weights(tmp_path / name)


def changed(weights: dict, **tensors) -> dict:
    """The weights with some tensors set, or taken out by None."""
    weights = dict(weights)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        weights[name] = tensor
        if tensor is None:
            del weights[name]
    return weights


@pytest.mark.parametrize("weights, message", [
    (changed(vit_weights(), blocks__0__gamma=torch.zeros(1)), r"1 unknown .*\(blocks.0.gamma\)"),
    (changed(vit_weights(), norm__bias=None), r"1 missing \(norm.bias\)"),
    (changed(vit_weights(), cls_token=torch.zeros(1, 1, 64)), "cls_token is .* the sizes differ"),
    (vit_weights(distilled=True), r"1 unknown .*\(dist_token\).*distilled=True"),
    (release_weights(), "not the backbone of this model")])
def test_weights_of_another_vit_are_refused(weights, message):
    with pytest.raises(ValueError, match=f"the weights: .*{message}"):
        load_vit(build(), weights)


@pytest.mark.parametrize("weights", [vit_weights(), {"state_dict": {"fc.weight": torch.zeros(2)}}])
def test_weights_of_something_else_are_no_release(weights):
    with pytest.raises(ValueError, match="the weights: not a released All-in-one checkpoint"):
        load_release(weights)


# ---- Frames and pixels of a clip (Sec. 3.1, 4.1.1) -----------------------------------------------

@cache
def noise(count: int, width: int, height: int, pix_fmt: str) -> list[av.VideoFrame]:
    """Frames that are all distinct: moving noise."""
    source = np.random.default_rng(0).integers(0, 255, (height * 2, width * 2, 3), np.uint8)
    frames = []
    for i in range(count):
        image = source[i % height:, i * 2 % width:][:height, :width] // 2 + i % 128
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frames.append(frame.reformat(format=pix_fmt))
    return frames


def film(path: Path, text: str = "") -> Path:
    """Write n frames of noise to path; `text` says arguments as in FILMS.

    What is no argument of ours is an option of the encoder.
    """
    arguments = dict(word.split("=", 1) for word in text.split())
    n = int(arguments.pop("n", 60))
    w = int(arguments.pop("w", 96))
    h = int(arguments.pop("h", 64))
    rate = int(arguments.pop("rate", 30))
    offset = int(arguments.pop("offset", 0))                    # frames before the first one
    vary = int(arguments.pop("vary", 0))                        # i * i / vary ticks more at frame i
    codec = arguments.pop("codec", "libx264")
    pix_fmt = arguments.pop("pix_fmt", "yuv420p")
    muxer = {name: arguments.pop(name) for name in ("movflags", "live") if name in arguments}
    options = {"crf": "28", "preset": "veryfast"} if codec == "libx264" else {}
    for key, value in arguments.items():
        options[key.replace("_", "-")] = value
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = w, h, pix_fmt
        stream.codec_context.time_base = Fraction(1, rate)
        for i, frame in enumerate(noise(n, w, h, pix_fmt)):
            frame.pts = i + offset + (i * i // vary if vary else 0)
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def film_of(folder: Path, kind: str) -> Path:
    """A film by its name and arguments, as in FILMS."""
    name, _, text = kind.partition(" ")
    return film(folder / name, text)


def plain_decode(path: Path, size: tuple[int, int] | None = None) -> torch.Tensor:
    """The reference: every frame from the first packet to the last, uint8 (n, 3, height, width)."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            height, width = size or (frame.height, frame.width)
            rgb = frame.reformat(width, height, "rgb24", interpolation="BILINEAR", threads=1)
            frames.append(torch.from_numpy(rgb.to_ndarray().copy()).permute(2, 0, 1))
    return torch.stack(frames)


def is_planned(path: Path) -> bool:
    """Whether all frames of a film come from the headers' plan, none from the plain decode."""
    source = data.Source(str(path))
    container, stream = data.open_video(source)
    with container:
        try:
            clip = data.PlannedDecode(source, container, stream, None, None)
            return len(list(clip.frames(list(range(len(clip.seconds)))))) > 0
        except data.Doubtful:
            return False


def picture(path: Path, size: tuple[int, int] = (40, 20), grey: int | None = None) -> Path:
    """A PNG of noise, or a file of one shade of grey; size: (width, height)."""
    if grey is None:
        return film(path, f"codec=png n=1 pix_fmt=rgb24 w={size[0]} h={size[1]}")
    data.save_image(torch.full((3, size[1], size[0]), grey / 255), path)
    return path


FILMS = {  # kind: file name and arguments of film
    "H.264 with B-frames, GOP 30": "a.mp4 n=90 g=30 bf=3",
    "H.264, GOP 250": "a.mp4 n=300 x264_params=keyint=250:scenecut=0:bframes=3:b-adapt=0",
    "H.264 with a pyramid of B-frames": "a.mp4 x264_params=b-pyramid=normal:bframes=8:b-adapt=0",
    "H.264, open GOPs": "a.mp4 x264_params=open-gop=1:keyint=12:min-keyint=12:bframes=3",
    "H.264, refreshed without keyframes": "a.mkv x264_params=intra-refresh=1:keyint=15",
    "H.264, interlaced": "a.mp4 g=20 x264_params=tff=1:bframes=2",
    "HEVC, open GOPs": "a.mp4 codec=libx265 x265_params=keyint=15:min-keyint=15:log-level=none",
    "VP9 with hidden frames": "a.webm codec=libvpx-vp9 g=30 auto_alt_ref=1 lag_in_frames=12 "
                              "deadline=good cpu_used=5",
    "VP8 with hidden frames": "a.webm codec=libvpx g=30 auto_alt_ref=1 lag_in_frames=12 "
                              "deadline=good cpu_used=5",
    "AV1": "a.mp4 codec=libsvtav1 g=20 preset=12 svtav1_params=lookahead=10",
    "MPEG-4 in AVI": "a.avi codec=mpeg4 g=12",
    "MJPEG in AVI": "a.avi codec=mjpeg pix_fmt=yuvj420p n=20",
    "a variable frame rate": "a.mp4 g=20 vary=7",
    "a late first frame": "a.mp4 g=20 offset=45",
    "odd sizes": "a.mkv w=97 h=65 pix_fmt=yuv444p g=20",
    "10 bits": "a.mp4 codec=libx265 pix_fmt=yuv420p10le x265_params=keyint=20:log-level=none",
    "one frame": "a.mp4 n=1",
    # These have no usable times or no keyframes that a decoder confirms.
    "H.264 in AVI": "a.avi g=15 bf=2",
    "MPEG-4 with B-frames in AVI": "a.avi codec=mpeg4 g=12 bf=2",
    "MPEG-2": "a.mpg codec=mpeg2video g=12 bf=2",
    "GIF": "a.gif codec=gif pix_fmt=rgb8 rate=10 n=20",
    "H.263 in AVI": "a.avi codec=h263 w=176 h=144 g=12",
    "Flash": "a.flv codec=flv g=12",
    "Windows Media": "a.wmv codec=wmv2 g=12",
    "raw H.264": "a.h264 g=15"}
UNPLANNED = {"H.264, refreshed without keyframes", "H.264 in AVI", "MPEG-4 with B-frames in AVI",
             "MPEG-2", "GIF", "H.263 in AVI", "Flash", "Windows Media", "raw H.264"}


@pytest.mark.parametrize("kind", FILMS)
def test_chosen_frames_equal_those_of_a_plain_decode(kind, tmp_path):
    path = film_of(tmp_path, FILMS[kind])
    truth = plain_decode(path, (48, 72))
    n = len(truth)
    for seed in range(3):
        chosen = torch.randperm(n, generator=torch.manual_seed(seed))[:3].sort().values.tolist()
        assert torch.equal(decode(path, lambda n: chosen, (48, 72)), truth[chosen])
    assert torch.equal(decode(path, range, (48, 72)), truth)
    backwards = [*reversed(range(n)), 0, 0]
    assert torch.equal(decode(path, lambda n: backwards, (48, 72)), truth[backwards])


@pytest.mark.parametrize("kind", FILMS)
def test_headers_are_trusted_where_a_decoder_confirms_them(kind, tmp_path):
    assert is_planned(film_of(tmp_path, FILMS[kind])) == (kind not in UNPLANNED)


@pytest.mark.parametrize("order", [[0, 2, 1], [0, 1, 1], [1, 2, 3]])
def test_frames_in_another_order_are_doubtful(order, tmp_path):
    path = film(tmp_path / "a.mp4", "n=5 bf=0")
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    source = data.Source(str(path))
    assert list(data.in_order(source, frames, key=frames[0].pts)) == frames
    with pytest.raises(data.Doubtful):
        list(data.in_order(source, [frames[i] for i in order], key=frames[order[0]].pts))


def marked(path: Path, is_key: bool, copy: Path) -> Path:
    """A copy of a film whose container marks every packet as a keyframe, or none."""
    with av.open(str(path)) as film_in, av.open(str(copy), "w") as film_out:
        stream = film_out.add_stream_from_template(film_in.streams.video[0])
        for packet in film_in.demux(video=0):
            if packet.size:
                packet.is_keyframe = is_key
                packet.stream = stream
                film_out.mux(packet)
    return copy


@pytest.mark.parametrize("is_key", [True, False])
@pytest.mark.parametrize("kind", [
    "a.avi codec=h263 w=176 h=144 g=50", "a.avi codec=mpeg4 g=50", "a.mp4 codec=mpeg4 g=50",
    "a.mp4 g=50 bf=2", "a.mp4 g=50 bf=0", "a.mkv g=50 bf=2", "a.flv codec=flv g=50",
    "a.avi codec=msmpeg4 g=50", "a.mkv codec=mpeg2video g=50 bf=2",
    "a.mp4 codec=libx265 x265_params=keyint=50:log-level=none",
    "a.webm codec=libvpx g=50 deadline=realtime",
    "a.webm codec=libvpx-vp9 g=50 deadline=realtime cpu_used=8"])
def test_untrue_keyframe_marks_change_no_pixel(kind, is_key, tmp_path):
    path = film_of(tmp_path, kind)
    path = marked(path, is_key, path.with_name(f"marked{path.suffix}"))
    chosen = [7, 31, 58]
    assert torch.equal(decode(path, lambda n: chosen), plain_decode(path)[chosen])


@pytest.mark.parametrize("kind, index, other", [
    ("a.mp4 g=20", b"stss", b"free"), ("a.avi codec=mpeg4 g=20", b"idx1", b"JUNK"),
    ("a.avi codec=h263 w=176 h=144 g=20", b"idx1", b"JUNK"),
    ("a.mkv g=20", b"\x1c\x53\xbb\x6b", b"\x1c\x53\xbb\x6c")])       # Cues
def test_a_film_without_its_index_is_read_alike(kind, index, other, tmp_path):
    path = film_of(tmp_path, kind)
    content = path.read_bytes()
    place = content.rindex(index)
    path.write_bytes(content[:place] + other + content[place + 4:])
    chosen = [7, 31, 58]
    assert torch.equal(decode(path, lambda n: chosen), plain_decode(path)[chosen])


def test_frames_that_nobody_needs_are_not_decoded(tmp_path):
    path = film(tmp_path / "a.mp4", "n=250 x264_params=keyint=100:scenecut=0:bframes=3:b-adapt=0")
    source = data.Source(str(path))
    container, stream = data.open_video(source)
    clip = data.PlannedDecode(source, container, stream, None, None)
    decoded = [number for number, _ in clip.frames([5, 190, 245])]  # keyframes are 0, 100 and 200:
    assert {5, 190, 245} <= set(decoded)
    assert len(decoded) < 100                                       # 147 without skipping B-frames


def test_a_gif_is_painted_frame_over_frame(tmp_path):
    pictures = [Image.new("P", (40, 20)) for _ in range(5)]
    for i, image in enumerate(pictures):
        image.putpalette([0, 0, 0, 250, 250, 250])
        image.paste(1, (0, 0, 4 * i + 4, 4 * i + 4))            # stored: what differs from the last
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], disposal=1)
    last = decode(tmp_path / "a.gif", lambda n: [n - 1])
    assert torch.equal(last, plain_decode(tmp_path / "a.gif")[4:])


def boxes_of(content: bytes) -> dict[bytes, bytes]:
    """The boxes of an ISO base media file, or in one, by kind."""
    boxes = {}
    while content:
        size, kind = struct.unpack(">I4s", content[:8])
        boxes[kind] = content[:size]
        content = content[size:]
    return boxes


def test_a_cover_picture_is_no_film(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(film(tmp_path / "b.mp4", "n=5"))) as film_in, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(film_in.streams.video[0])
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        grey = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 99, np.uint8), format="rgb24")
        out.mux(cover.encode(grey.reformat(format="yuvj420p")) + cover.encode())
        for packet in film_in.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    files = boxes_of(path.read_bytes())
    movie = boxes_of(files[b"moov"][8:])
    files[b"moov"] = iso_box(b"moov", movie[b"mvhd"], movie[b"udta"], movie[b"trak"])
    path.write_bytes(b"".join(files.values()))
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "mjpeg"         # the cover
    assert torch.equal(decode(path, range), plain_decode(tmp_path / "b.mp4"))


# -- windows and times

@pytest.mark.parametrize("start, end, shown", [                 # of 60 frames, 30 a second
    (0.5, 1.2, range(15, 36)),                                  # 0.5 s is in, 1.2 s is out
    (0.6, 0.9, range(18, 27)),                                  # borders among B-frames
    (1.5, None, range(45, 60)), (None, 0.1, range(0, 3)),
    (1.01, 1.02, range(30, 31)), (1.0, 1.0, range(30, 31)),     # on display then
    (0.0, 0.0, range(0, 1)),
    (1.98, 1.99, range(59, 60))])                               # the last one still is
@pytest.mark.parametrize("kind", [
    "a.mp4 bf=3", "a.mp4 bf=0", "a.mkv bf=3", "a.ts offset=300", "a.avi codec=mpeg4 bf=2",
    "a.mp4 offset=45", "a.flv codec=flv", "a.h264"])
def test_a_window_holds_the_frames_shown_in_it(kind, start, end, shown, tmp_path):
    path = film_of(tmp_path, f"{kind} g=15")
    if path.suffix == ".h264":                                  # without times: FFmpeg assumes 25
        start, end = (t and t * 30 / 25 for t in (start, end))
    assert torch.equal(decode(path, range, None, start, end), plain_decode(path)[list(shown)])


@pytest.mark.parametrize("start, end, reason", [
    (7.0, 9.0, "no frame lies between"), (1e300, None, "no frame lies between"),
    (math.nan, None, '"start" is nan; expected seconds'),
    (0.0, math.nan, '"end" is nan'), (math.inf, None, "an end after the start"),
    (1.0, 0.5, '"start" is 1.0 and its "end" 0.5')])
def test_a_wrong_window_is_not_the_films_fault(start, end, reason, tmp_path):
    with pytest.raises(Unreadable, match=reason):
        decode(film(tmp_path / "a.mp4", "n=10"), range, None, start, end)


def test_frames_hidden_by_an_edit_list_stay_hidden(tmp_path):
    path = film(tmp_path / "a.mp4", "n=40 g=15 bf=2 rate=25")
    whole = plain_decode(path)
    content = bytearray(path.read_bytes())
    entry = content.index(b"elst") + 12                         # duration, time at which it begins
    duration, begin = struct.unpack(">ii", content[entry:entry + 8])
    ticks = 12800 // 25
    content[entry:entry + 8] = struct.pack(">ii", duration - 400, begin + 10 * ticks)
    path.write_bytes(content)
    assert is_planned(path)
    assert torch.equal(decode(path, range), whole[10:])
    assert torch.equal(decode(path, range, None, 0.2, 0.4), whole[15:20])


# The clock of the later part is equal, ahead, a little behind, or so far behind that FFmpeg takes
# it for a clock of 33 bits that has run over.
@pytest.mark.parametrize("offset", [9000, 12000, 8500, 100])
def test_transport_streams_joined_end_to_end_are_one(offset, tmp_path):
    earlier = film(tmp_path / "a.ts", "g=15 offset=9000")
    later = film(tmp_path / "b.ts", f"g=15 bf=2 offset={offset}")
    joined = tmp_path / "joined.ts"
    joined.write_bytes(earlier.read_bytes() + later.read_bytes())
    truth = plain_decode(joined)
    assert len(truth) == 120
    assert torch.equal(decode(joined, range), truth)
    if offset != 12000:
        assert torch.equal(decode(joined, range, None, 2.0, 3.0), truth[60:90])
        assert data.duration({"video": str(joined)}) == pytest.approx(4.0)


def test_a_show_of_slides_is_whole(tmp_path):
    path = tmp_path / "slides.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(1, 20))      # one each 20 s
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(3):
            slide = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 80 * i, np.uint8), "rgb24")
            slide.pts, slide.time_base = i, Fraction(20)
            container.mux(stream.encode(slide.reformat(format="yuv420p")))
        container.mux(stream.encode())
    assert torch.equal(decode(path, range), plain_decode(path))
    assert torch.equal(decode(path, range, None, 50.0, 55.0), plain_decode(path)[2:])


@pytest.mark.parametrize("kind, seconds", [
    ("a.mp4", 2.0), ("a.webm codec=libvpx live=1", 2.0), ("a.h264 n=50", 2.0), ("a.ts", 2.0),
    ("a.avi codec=mpeg4", 2.0), ("a.gif codec=gif pix_fmt=rgb8 rate=10 n=20", 2.0)])
def test_a_duration_is_measured_where_none_is_stored(kind, seconds, tmp_path):
    sample = {"video": str(film_of(tmp_path, kind))}
    assert data.duration(sample) == pytest.approx(seconds, abs=0.05)


def test_a_clip_lasts_as_long_as_its_pictures(tmp_path):
    """Not as its sound, which goes on after the last picture."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("libx264", rate=10)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("aac", rate=16000, layout="mono")
        for _ in range(10):                                    # 1 s
            container.mux(pictures.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(pictures.encode())
        for i in range(3):                                     # 3 s
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
            samples.sample_rate, samples.pts = 16000, 16000 * i
            container.mux(sound.encode(samples))
        container.mux(sound.encode())
    assert data.duration({"video": str(path)}) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("fps, seconds", [(4, 0.5), (None, 0)])
def test_a_folder_of_frames_lasts_as_its_rate_says(fps, seconds, tmp_path):
    for name in "12":
        picture(tmp_path / f"{name}.png")
    assert data.duration({"video": str(tmp_path), "fps": fps}) == seconds


def test_what_cannot_be_read_has_no_duration(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no film")
    for name in "a.mp4", "missing.mp4":
        assert data.duration({"video": str(tmp_path / name)}) == 0


# -- turned and mirrored

# What a viewer shows of a stored picture, by its EXIF orientation; and the (a, b, c, d) by which a
# film says the same: column x and row y are shown in column a x + c y and row b x + d y.
ORIENTATIONS = {
    1: (lambda image: image, (1, 0, 0, 1)),
    2: (lambda image: image.flip(-1), (-1, 0, 0, 1)),
    3: (lambda image: image.flip(-1, -2), (-1, 0, 0, -1)),
    4: (lambda image: image.flip(-2), (1, 0, 0, -1)),
    5: (lambda image: image.mT, (0, 1, 1, 0)),
    6: (lambda image: image.mT.flip(-1), (0, 1, -1, 0)),
    7: (lambda image: image.mT.flip(-1, -2), (0, -1, -1, 0)),
    8: (lambda image: image.mT.flip(-2), (0, -1, 1, 0))}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_films_are_shown_as_their_matrix_says(orientation, tmp_path):
    shown, (a, b, c, d) = ORIENTATIONS[orientation]
    path = film(tmp_path / "a.mp4", "n=10")
    stored = plain_decode(path)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    content[matrix:matrix + 20] = struct.pack(">5i", a << 16, b << 16, 0, c << 16, d << 16)
    path.write_bytes(content)
    assert torch.equal(decode(path, range), shown(stored))
    assert torch.equal(decode(path, range, tuple(shown(stored).shape[-2:])), shown(stored))
    portrait = orientation >= 5
    assert decode(path, range, 32).shape == ((10, 3, 48, 32) if portrait else (10, 3, 32, 48))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pictures_are_shown_as_exif_says(orientation, ending, tmp_path):
    stored = picture(tmp_path / "a.png", (40, 24))
    plain = tmp_path / f"plain.{ending}"
    turned = tmp_path / f"turned.{ending}"
    exif = Image.Exif()
    exif[0x112] = orientation
    with Image.open(stored) as image:
        image.save(plain)
        image.save(turned, exif=exif)
    shown, _ = ORIENTATIONS[orientation]
    assert torch.equal(decode(turned, range), shown(decode(plain, range)))


@pytest.mark.parametrize("orientation", [0, 9, 200])
def test_an_unknown_orientation_is_upright(orientation, tmp_path):
    picture(tmp_path / "a.png", (40, 24))
    exif = Image.Exif()
    exif[0x112] = orientation
    with Image.open(tmp_path / "a.png") as image:
        image.save(tmp_path / "a.jpg")
        image.save(tmp_path / "b.jpg", exif=exif)
    assert torch.equal(decode(tmp_path / "b.jpg", range), decode(tmp_path / "a.jpg", range))


# -- pictures

def test_a_colon_in_a_path_is_no_protocol(tmp_path, monkeypatch):
    picture(tmp_path / "12:30.jpg", grey=40)
    monkeypatch.chdir(tmp_path)
    assert decode("12:30.jpg", range).shape == (1, 3, 20, 40)


def test_an_image_is_a_clip_of_one_frame(tmp_path):
    picture(tmp_path / "a.jpg", grey=40)
    image = decode(tmp_path / "a.jpg", lambda n: sample_frames(n, 3, False), 10)
    assert image.shape == (3, 3, 10, 20)
    assert abs(image.float().mean() - 40) < 2


@pytest.mark.parametrize("start, end, fps, shown", [
    (None, None, None, [1, 2, 10]), (0.75, None, 2, [10]), (0, 0.5, 2, [1]),
    (1.2, 1.3, 2, [10])])                                       # on display until 1.5 s
def test_a_folder_of_images_is_a_clip(start, end, fps, shown, tmp_path):
    for i in (1, 2, 10):
        picture(tmp_path / f"{i}.jpg", grey=i * 20)
    (tmp_path / "notes.txt").write_text("not a frame")
    clip = decode(tmp_path, range, None, start, end, fps)
    assert clip.shape == (len(shown), 3, 20, 40)
    assert (clip.float().mean((1, 2, 3)) / 20).round().tolist() == shown


@pytest.mark.parametrize("ending", ["avif", "webp", "bmp", "tiff", "png"])
def test_a_folder_may_hold_any_kind_of_image(ending, tmp_path):
    Image.new("RGB", (40, 20), (200, 100, 50)).save(tmp_path / f"1.{ending}")
    assert decode(tmp_path, range).shape == (1, 3, 20, 40)
    assert data.is_image({"video": f"1.{ending}"})


def test_hidden_files_are_no_frames(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "._1.png").write_bytes(b"of macOS")
    assert decode(tmp_path, range).shape[0] == 1


def test_a_bad_image_of_a_folder_is_named(tmp_path):
    picture(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(Unreadable, match="2.png: cannot be decoded"):
        decode(tmp_path, range)


def test_images_of_a_folder_take_the_first_ones_size(tmp_path):
    picture(tmp_path / "1.png", (40, 20))
    picture(tmp_path / "2.png", (31, 20))
    assert decode(tmp_path, range).shape == (2, 3, 20, 40)


@pytest.mark.parametrize("start, end", [(0, 0.5), (0, None), (None, 0.5)])
def test_a_folder_without_a_rate_has_no_times(start, end, tmp_path):
    picture(tmp_path / "1.png")
    with pytest.raises(Unreadable, match='give their rate as "fps"'):
        decode(tmp_path, range, None, start, end)


def iso_box(kind: bytes, *parts: bytes) -> bytes:
    """A box of an ISO base media file (MP4, AVIF, HEIC)."""
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def grid_avif(path: Path) -> Path:
    """A picture of 2 x 2 tiles of 64 x 64 pixels, as phones store large ones."""
    Image.new("RGB", (64, 64), (200, 100, 50)).save(path)
    with av.open(str(path)) as container:
        tile = bytes(next(container.demux(video=0)))
    parts = [tile] * 4 + [struct.pack(">BBBBHH", 0, 0, 1, 1, 128, 128)]         # the grid, item 5
    kinds = [b"av01"] * 4 + [b"grid"]
    version, handler = bytes(4), iso_box(b"hdlr", bytes(8), b"pict", bytes(13))
    primary = iso_box(b"pitm", version, struct.pack(">H", 5))
    infos = [iso_box(b"infe", b"\2\0\0\0", struct.pack(">HH4s", i + 1, 0, kind), b"\0")
             for i, kind in enumerate(kinds)]
    information = iso_box(b"iinf", version, struct.pack(">H", 5), *infos)
    reference = iso_box(b"iref", version, iso_box(b"dimg", struct.pack(">6H", 5, 4, 1, 2, 3, 4)))
    sizes = [iso_box(b"ispe", version, struct.pack(">II", side, side)) for side in (64, 128)]
    properties = iso_box(b"ipco", iso_box(b"av1C", bytes([0x81, 0, 12, 0])), *sizes)
    of_tiles = [struct.pack(">HBBB", i, 2, 0x81, 2) for i in (1, 2, 3, 4)]
    of_items = iso_box(b"ipma", version, struct.pack(">I", 5), *of_tiles,
                       struct.pack(">HBB", 5, 1, 3))

    def meta(position: int) -> bytes:
        places = []
        for i, part in enumerate(parts):
            places.append(struct.pack(">HHHII", i + 1, 0, 1, position, len(part)))
            position += len(part)
        location = iso_box(b"iloc", version, bytes([0x44, 0]), struct.pack(">H", 5), *places)
        return iso_box(b"meta", version, handler, primary, location, information, reference,
                       iso_box(b"iprp", properties, of_items))

    brand = iso_box(b"ftyp", b"avif", version, b"avifmif1miaf")
    begin = len(brand) + len(meta(0)) + 8
    path.write_bytes(brand + meta(begin) + iso_box(b"mdat", *parts))
    return path


def test_a_picture_of_tiles_is_refused_by_name(tmp_path):
    path = grid_avif(tmp_path / "grid.avif")
    with Image.open(path) as image:
        assert image.size == (128, 128)
    with pytest.raises(Unreadable, match="grid.avif: a picture stored as a grid of tiles"):
        decode(path, range)


def test_a_picture_of_one_tile_is_read(tmp_path):
    Image.new("RGBA", (64, 40), (200, 100, 50, 9)).save(tmp_path / "a.avif")
    image = decode(tmp_path / "a.avif", range).float()
    assert image.shape == (1, 3, 40, 64)
    assert torch.allclose(image.mean((0, 2, 3)), torch.tensor([200.0, 100.0, 50.0]), atol=4)


# -- pixels

def read(path: Path, size: int, resize: str, train: bool = False, **sample) -> torch.Tensor:
    """Frame 0 of a film through read_frames, (3, size, size)."""
    return data.read_frames({"video": str(path), **sample}, lambda n: [0], size, resize, train)[0]


def test_release_scales_the_whole_frame_and_crops(tmp_path):    # whatever its proportions
    path = film(tmp_path / "a.mp4", "n=1 w=640 h=360")
    square = plain_decode(path, (268, 268))[0]
    assert torch.equal(read(path, 224, "release"), square[:, 22:246, 22:246])


def test_paper_scales_the_whole_frame(tmp_path):                # "resize each frame to 224 x 224"
    path = film(tmp_path / "a.mp4", "n=1 w=640 h=360")
    assert torch.equal(read(path, 224, "paper"), plain_decode(path, (224, 224))[0])


def test_proportions_keeps_them_and_crops(tmp_path):
    path = film(tmp_path / "a.mp4", "n=1 w=640 h=360")
    scaled = plain_decode(path, (268, 476))[0]
    assert torch.equal(read(path, 224, "proportions"), scaled[:, 22:246, 126:350])


@pytest.mark.parametrize("resize", data.RESIZE)
@pytest.mark.parametrize("kind", ["a.mp4 n=1 w=64 h=96", "b.png n=1 w=31 h=64 codec=png "
                                                         "pix_fmt=rgb24"])
def test_every_mode_gives_squares_of_contiguous_pixels(kind, resize, tmp_path):
    pixels = read(film_of(tmp_path, kind), 48, resize, train=True)
    assert pixels.shape == (3, 48, 48)
    assert pixels.dtype == torch.uint8
    video = data.read_frames({"video": str(tmp_path / kind.split()[0])}, lambda n: [0, 0], 48,
                             resize, True)
    assert video.is_contiguous()                                # not a view of the larger frame


@pytest.mark.parametrize("resize, places", [("release", 20), ("proportions", 20), ("paper", 1)])
def test_crops_are_random_in_training(resize, places, tmp_path):
    path = film(tmp_path / "a.mp4", "n=1 w=96 h=64")
    torch.manual_seed(0)
    crops = {read(path, 48, resize, train=True).numpy().tobytes() for _ in range(40)}
    assert len(crops) == 1 if places == 1 else len(crops) > places


def test_a_crop_is_the_same_in_all_frames():
    video = (torch.arange(40 * 48) % 251).byte().view(40, 48).expand(3, 3, 40, 48)
    torch.manual_seed(0)
    for _ in range(20):
        square = crop(video, 32, True)
        assert square[0].equal(square[2])
    assert crop(video, 32, False).equal(video[..., 4:36, 8:40])


@pytest.mark.parametrize("resize, refused", [
    ("release", False), ("paper", False), ("proportions", True)])
def test_a_line_of_pixels_is_not_blown_up(resize, refused, tmp_path):
    path = picture(tmp_path / "a.png", (5000, 3))
    if refused:
        with pytest.raises(Unreadable, match="frames of 5000 x 3 pixels; expected a longer side"):
            read(path, 224, resize)
    else:
        assert read(path, 224, resize).shape == (3, 224, 224)


# -- members of shards

def shard(path: Path, content: bytes) -> data.Source:
    """A .tar that holds `content` among other files; the place of that member."""
    with tarfile.open(path, "w") as archive:
        for name, part in (("a.txt", b"a dog"), ("b.mp4", content), ("c.txt", b"a cat")):
            info = tarfile.TarInfo(name)
            info.size = len(part)
            archive.addfile(info, io.BytesIO(part))
    with tarfile.open(path) as archive:
        info = archive.getmember("b.mp4")
        return data.Source(str(path), info.name, info.offset_data, info.size)


@pytest.mark.parametrize("kind", [
    "a.mp4 g=15", "a.mkv g=15", "a.webm codec=libvpx deadline=realtime", "a.ts g=15",
    "a.avi codec=mpeg4 bf=2", "a.gif codec=gif pix_fmt=rgb8 n=20", "a.png codec=png pix_fmt=rgb24 "
    "n=1", "a.jpg codec=mjpeg pix_fmt=yuvj420p n=1"])
def test_a_member_of_a_shard_is_read_as_a_file(kind, tmp_path):
    path = film_of(tmp_path, kind)
    member = shard(tmp_path / "0.tar", path.read_bytes())
    assert torch.equal(decode(member, range), decode(path, range))
    assert torch.equal(decode(member, lambda n: [n - 1], None, 0.0, 1.0),
                       decode(path, lambda n: [n - 1], None, 0.0, 1.0))
    assert data.duration(member.fields()) == data.duration({"video": str(path)})


def test_a_members_picture_is_turned_by_its_exif(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 7
    Image.fromarray(np.arange(40 * 24 * 3, dtype=np.uint8).reshape(24, 40, 3)).save(
        tmp_path / "a.png", exif=exif)
    member = shard(tmp_path / "0.tar", (tmp_path / "a.png").read_bytes())
    assert torch.equal(decode(member, range), decode(tmp_path / "a.png", range))


def test_a_sample_names_its_member(tmp_path):
    path = film(tmp_path / "a.mp4", "n=3")
    member = shard(tmp_path / "0.tar", path.read_bytes()).fields()["member"]
    assert torch.equal(read(tmp_path / "0.tar", 32, "release", member=member),
                       read(path, 32, "release"))


@pytest.mark.parametrize("shift, cut", [(0, 9000), (300, 0), (10 ** 7, 0)])
def test_a_member_that_is_not_there_is_named(shift, cut, tmp_path):
    path = film(tmp_path / "a.mp4", "n=10")
    member = shard(tmp_path / "0.tar", path.read_bytes())
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[:len(content) - cut])
    with pytest.raises(Unreadable, match="0.tar: holds no b.mp4 of .* changed or is cut off"):
        decode(replace(member, offset=member.offset + shift), range)


# -- damage

def cut_behind_its_index(path: Path) -> bytes:
    """A film whose index stands before its packets, without all packets from the 30th on."""
    whole = film(path, "movflags=faststart").read_bytes()
    with av.open(str(path)) as container:
        between_packets = [packet.pos for packet in container.demux(video=0)][30]
    return whole[:between_packets]


@pytest.fixture(scope="session")
def broken(tmp_path_factory) -> Path:
    """A folder of files that are no readable film."""
    folder = tmp_path_factory.mktemp("broken")
    whole = film(folder / "whole.mp4").read_bytes()
    avi = film(folder / "whole.avi", "codec=mpeg4").read_bytes()
    mkv = film(folder / "whole.mkv", "g=10 n=300").read_bytes()
    sound = b".snd" + struct.pack(">5I", 24, 80, 3, 8000, 1) + bytes(80)
    (folder / "folder").mkdir()
    for name, content in {
            "words.txt": b"once upon " * 50, "sound.au": sound, "empty.mp4": b"",
            "noise.mp4": bytes(range(256)) * 20, "cut.mp4": whole[:len(whole) * 6 // 10],
            "zeroed.mp4": whole[:-2000] + bytes(100) + whole[-1900:],
            "cut-indexed.mp4": cut_behind_its_index(folder / "indexed.mp4"),
            "cut.avi": avi[:len(avi) * 6 // 10],
            "cut.mkv": mkv[:len(mkv) * 4 // 10]}.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name, reason", [
    ("missing.mp4", "no such file"), ("folder", "no frame"), ("words.txt", "no video stream"),
    ("sound.au", "no video stream"), ("empty.mp4", "cannot be decoded"),
    ("noise.mp4", "cannot be decoded"), ("zeroed.mp4", "damaged around"),
    ("cut.mp4", "cannot be decoded"), ("cut-indexed.mp4", "truncated"), ("cut.avi", "truncated"),
    ("cut.mkv", "truncated")])
def test_what_cannot_be_read_is_named_with_a_reason(name, reason, broken):
    with pytest.raises(Unreadable, match=f"{name}: .*{reason}"):
        decode(broken / name, range, 32)


@pytest.mark.parametrize("share", [0.6, 0.8])
@pytest.mark.parametrize("kind", ["a.mkv g=10", "a.webm codec=libvpx g=10"])
def test_a_film_without_its_end_is_no_whole_film(kind, share, tmp_path):
    path = film_of(tmp_path, f"{kind} rate=5 n=200")           # 40 s
    assert len(decode(path, range)) == 200
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(Unreadable, match="truncated"):
        decode(path, range)


def damage(path: Path, number: int, zeros: bool = False) -> Path:
    """Overwrite the middle of a film's packet, by its number in the file, with noise or zeros."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
        begin = packet.pos + int(0.3 * packet.size)
        size = int(0.3 * packet.size)
    content = path.read_bytes()
    middle = bytes(size) if zeros else np.random.default_rng(0).bytes(size)
    path.write_bytes(content[:begin] + middle + content[begin + size:])
    return path


# H.264 without arithmetic coding, of which noise is often decoded without an error.
DAMAGED_FILMS = ["a.mp4 bf=0 x264_params=cabac=0:keyint=30:scenecut=0",
                 "a.mkv bf=0 x264_params=cabac=0:keyint=30:scenecut=0",
                 "a.mp4 codec=mpeg4 g=30 sc_threshold=1000000000",
                 "a.avi bf=2 x264_params=cabac=0:keyint=30:scenecut=0",
                 "a.mkv codec=mpeg2video g=30 bf=0 sc_threshold=1000000000"]


def keyframes(path: Path) -> list[int]:
    """Numbers of the keyframes, by the decoder."""
    with av.open(str(path)) as container:
        return [i for i, frame in enumerate(container.decode(video=0)) if frame.key_frame]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("kind", DAMAGED_FILMS)
def test_damage_ends_at_the_next_keyframe(kind, zeros, tmp_path):
    path = film_of(tmp_path, f"{kind} n=90")
    whole = plain_decode(path)
    later = next(number for number in keyframes(path) if number > 45)
    damage(path, 40, zeros)
    chosen = [5, 20, later, later + 1, 89]
    assert torch.equal(decode(path, lambda n: chosen), whole[chosen])


@pytest.mark.parametrize("kind", DAMAGED_FILMS)
def test_damage_spoils_what_is_predicted_from_it(kind, tmp_path):
    path = film_of(tmp_path, f"{kind} n=90")
    later = next(number for number in keyframes(path) if number > 45)
    damage(path, 40, zeros=True)
    for number in (42, later - 1):
        with pytest.raises(Unreadable, match="damaged around"):
            decode(path, lambda n: [number])


@pytest.mark.parametrize("number", [5, 7, 8, 9, 20])
def test_damage_spoils_the_b_frames_before_it(number, tmp_path):
    path = film(tmp_path / "a.mp4",
                "n=30 x264_params=cabac=0:keyint=30:bframes=3:b-adapt=0:b-pyramid=0")
    damage(path, 5)                                         # frame 8, from which 5, 6, 7 are
    assert len(decode(path, lambda n: [0, 1, 4])) == 3      # predicted too
    with pytest.raises(Unreadable, match="damaged around"):
        decode(path, lambda n: [number])


@pytest.mark.parametrize("kind", DAMAGED_FILMS[:3])
def test_a_hole_in_the_file_keeps_frames_numbers(kind, tmp_path):
    path = film_of(tmp_path, f"{kind} n=90")
    whole = plain_decode(path)
    later = next(number for number in keyframes(path) if number > 45)
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][40]
    content = path.read_bytes()
    place = content.index(bytes(packet))
    path.write_bytes(content[:place] + bytes(packet.size) + content[place + packet.size:])
    assert torch.equal(decode(path, lambda n: [39, later]), whole[[39, later]])
    for number in (40, 41):
        with pytest.raises(Unreadable, match="damaged around"):
            decode(path, lambda n: [number])


@on_linux
def test_fuzzed_clips_never_crash_hang_or_leak(tmp_path):
    films = ["a.mp4", "b.mkv", "c.webm codec=libvpx deadline=realtime", "d.avi codec=mpeg4 bf=2"]
    films += [f"{i}{FILMS[kind]}"
              for i, kind in enumerate(["VP9 with hidden frames", "AV1", "HEVC, open GOPs", "GIF"])]
    whole = [film(tmp_path / text.split()[0], text.partition(" ")[2]) for text in films]
    outcomes, slowest, pages, turns = collections.Counter(), 0.0, [], 1000 if FULL else 80
    for turn in range(turns):
        random, original = np.random.default_rng(turn), whole[turn % len(whole)]
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
        pages.append(int(Path("/proc/self/statm").read_text().split()[1]))   # resident
    grown = (pages[-1] - pages[turns // 4]) * resource.getpagesize() / 2 ** 20   # all have worked
    print(f"{turns} corruptions: {dict(outcomes)}, slowest {slowest:.2f} CPU-s, {grown:.1f} MiB")
    assert min(outcomes["read"], outcomes["unreadable"]) > turns / 5
    assert slowest < 10 and grown < 30


# -- sampling and boxes

@pytest.mark.parametrize("n, frames", [(12, 3), (10, 3), (7, 3), (3, 3), (100, 8)])
def test_training_samples_every_frame_of_each_segment(n, frames):               # Sec. 3.1
    torch.manual_seed(0)
    visits = [sample_frames(n, frames, train=True) for _ in range(100 * n)]
    bounds = [segment * n // frames for segment in range(frames + 1)]
    for segment in range(frames):
        sampled = {visit[segment] for visit in visits}
        assert sampled == set(range(bounds[segment], bounds[segment + 1]))


def test_evaluation_samples_the_centres_of_segments():
    assert sample_frames(12, 3, train=False) == [2, 6, 10]


def test_each_view_samples_a_part_of_segments():                                # "3 x 3", Tab. 2
    views = [sample_frames(12, 3, train=False, view=view, views=3) for view in range(3)]
    assert views == [[0, 4, 8], [2, 6, 10], [3, 7, 11]]


def test_short_clips_repeat_frames_in_order():
    assert sample_frames(2, 3, train=True) == [0, 0, 1]
    assert sample_frames(1, 3, train=False) == [0, 0, 0]


def test_boxes_wear_the_colour_of_their_identity():                             # VCR, Fig. 5
    video = torch.zeros(1, 3, 60, 80, dtype=torch.uint8)
    drawn = data.draw_boxes(video, [[1, 5, 5, 30, 40], [2, 40, 5, 70, 40]])[0]
    again = data.draw_boxes(video, [[2, 5, 5, 30, 40]])[0]
    outline_1, outline_2, outside = drawn[:, 5, 15], drawn[:, 5, 50], drawn[:, 55, 35]
    assert outline_2.any()
    assert torch.equal(outline_2, again[:, 5, 15])
    assert not torch.equal(outline_1, outline_2)
    assert torch.allclose(drawn[:, 20, 15].float(), 0.3 * outline_1, atol=1)
    assert not outside.any()


@pytest.mark.parametrize("resize", data.RESIZE)
def test_boxes_are_in_pixels_of_the_stored_image(resize, tmp_path):
    path = picture(tmp_path / "a.png", (400, 300))
    sample = {"video": str(path), "boxes": [[0, 150, 100, 250, 200]]}           # 0 is red
    drawn, bare = (data.read_frames(sample, range, 100, resize, False, boxes)[0].float()
                   for boxes in (True, False))
    rows, columns = ((drawn - bare).abs().amax(0) > 30).nonzero().T
    assert rows.min() in range(32, 35) and rows.max() in range(65, 69)          # 100 / 3, 200 / 3
    assert columns.min() in range(36, 39) and columns.max() in range(61, 65)


# ---- Manifests: lines, tables, folders, shards ---------------------------------------------------

def json_lines(*samples) -> str:
    """The samples as lines of a manifest."""
    return "".join(json.dumps(sample) + "\n" for sample in samples)


def samples_of(paths, columns=()) -> list[dict]:
    """The samples of a manifest without what tests of other fields need."""
    samples = list(Manifest(paths, columns))
    for sample in samples:
        sample["video"] = Path(sample["video"]).name
        del sample["source_line"]
    return samples


def source_lines(paths) -> list[str]:
    """file:line of each sample, without the folder."""
    return [Path(sample["source_line"]).name for sample in Manifest(paths)]


def test_five_million_lines_are_indexed_once(tmp_path):
    lines, path = 5_000_000 if FULL else 200_000, tmp_path / "m.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f'{{"video": "{i:08}.mp4", "text": "caption {i} of a café’s clip, which is '
                        f'about as long as those that people write"}}\n' for i in range(lines))
    began = time.process_time()
    Manifest(path)
    rate = path.stat().st_size / 1e6 / (time.process_time() - began)
    built = os.stat(f"{path}.idx").st_mtime_ns
    tracemalloc.start()
    began = time.perf_counter()
    manifest = Manifest(path)
    opening = time.perf_counter() - began
    for k in range(2000):
        line = shuffled(k, lines, seed=0)
        assert manifest[line]["text"].startswith(f"caption {line} ")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{lines} lines, {path.stat().st_size / 1e6:.0f} MB: indexed at {rate:.0f} MB per CPU-s, "
          f"opened in {opening:.4f} s, at most {peak / 1e3:.0f} kB in memory")
    assert len(manifest) == lines
    assert rate > 100
    assert opening < 1
    assert peak < 500e3
    assert len(pickle.dumps(manifest)) < 2000                             # what a worker is sent
    assert os.stat(f"{path}.idx").st_mtime_ns == built


def test_writers_of_one_file_do_not_meet(tmp_path):                # as several processes may be
    with data.replacing(tmp_path / "m.idx") as one, data.replacing(tmp_path / "m.idx") as another:
        one.write(b"one")
        another.write(b"another")
    assert (tmp_path / "m.idx").read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [tmp_path / "m.idx"]


def test_manifests_in_folders_that_are_read_only_have_an_index_each(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    manifests = []
    for folder, lines in (("a", '{"video": "a"}\n{"video": "a long name"}\n'),
                          ("b", '{"video": "another name"}\n{"video": "b"}\n')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.jsonl").write_text(lines)
        manifests.append(Manifest(tmp_path / folder / "m.jsonl"))
        assert not (tmp_path / folder / "m.jsonl.idx").exists()
    assert [Path(manifest[1]["video"]).name for manifest in manifests] == ["a long name", "b"]


def test_a_checksum_is_that_of_the_whole_file(tmp_path):
    content = os.urandom(1000) + bytes(1 << 24)                    # above 16 MiB
    (tmp_path / "m.jsonl").write_bytes(content)
    assert data.checksum(tmp_path / "m.jsonl") == zlib.crc32(content)


def test_columns_are_read_as_they_are_named_now(tmp_path):
    (tmp_path / "t.csv").write_text("video,en,fr\na.mp4,a dog,un chien\n")
    for column, text in (("en", "a dog"), ("fr", "un chien"), ("en", "a dog")):
        assert Manifest(tmp_path / "t.csv", (f"text={column}",))[0]["text"] == text


def test_clips_of_a_table_are_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("video,text\na.mp4,a dog\n")
    monkeypatch.chdir(tmp_path)
    assert Manifest("t.csv")[0]["video"] == str(tmp_path / "a.mp4")


def test_blank_lines_are_no_samples(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('\n{"video": "a"}\n\n \t\n{"video": "b"}\r\n{"video": "c"}\n\n \n')
    assert [sample["video"] for sample in samples_of(path)] == ["a", "b", "c"]
    assert source_lines(path) == ["m.jsonl:2", "m.jsonl:5", "m.jsonl:6"]


@pytest.mark.parametrize("content, time_changed", [
    ('{"video": "a"}\n{"video": "c"}', True),               # as long as it was
    ('{"video": "a"}\n\n{"video": "c"}\n', False)])          # with the time that it had
def test_a_changed_manifest_is_indexed_again(content, time_changed, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"video": "a"}\n{"video": "b"}')
    before = Manifest(path).contents()
    assert before[0][:2] == [str(path), 2]
    status = path.stat()
    path.write_text(content)
    os.utime(path, ns=(0, status.st_mtime_ns + time_changed))
    assert [sample["video"] for sample in samples_of(path)] == ["a", "c"]
    assert Manifest(path).contents() != before


def test_several_manifests_follow_one_another(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"video": "a0"}\n{"video": "a1"}\n{"video": "a2"}\n')
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.jsonl").write_text('{"video": "b0"}\n{"video": "/b1"}\n')
    both = Manifest([tmp_path / "a.jsonl", tmp_path / "b" / "b.jsonl"])
    assert [sample["video"] for sample in both] == [
        *(str(tmp_path / name) for name in ("a0", "a1", "a2", "b/b0")), "/b1"]
    assert both[3]["source_line"] == f"{tmp_path}/b/b.jsonl:1"
    assert [both.locate(i) for i in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [both.after(1, steps) for steps in range(4)] == [1, 2, 0, 1]   # round its own manifest
    assert [both.after(4, steps) for steps in range(3)] == [4, 3, 4]


@pytest.mark.parametrize("line, complaint", [
    ('{"video": "a.mp4", text}', "not JSON"),
    ('{"video": "\xe9"}', "not JSON"),                                    # written as Latin-1
    ('{"text": "no film"}', 'lacks "video"; its keys are text'),
    ('{"path": "a.mp4"}', 'lacks "video"; rename "path" to "video"'),
    ('{"viedo": "a.mp4"}', 'lacks "video"; rename "viedo" to "video"'),
    ("[1]", "is \\[1\\]; expected a JSON object"),
    ('{"video": 7}', '"video" is 7; expected a text'),
    ('{"video": "a", "start": "1.5"}', "\"start\" is '1.5'; expected a finite number"),
    ('{"video": "a", "start": NaN}', '"start" is nan; expected a finite number'),
    ('{"video": "a", "end": 1e999}', '"end" is inf; expected a finite number'),
    ('{"video": "a", "end": -Infinity}', '"end" is -inf; expected a finite number'),
    ('{"video": "a", "end": 1%s}' % ("0" * 5000), "not JSON"),
    ('{"video": "a", "end": 1%s}' % ("0" * 400), '"end" is 10+; expected a finite number'),
    ('{"video": "a", "start": true}', '"start" is True; expected a finite number'),
    ('{"video": "a", "fps": 0}', '"fps" is 0; expected frames a second, more than 0'),
    ('{"video": "a", "start": 3, "end": 2}', '"end" is 2 and "start" 3; expected a start before'),
    ('{"video": "a", "start": 3, "end": 3}', '"end" is 3 and "start" 3; expected a start before'),
    ('{"video": "a", "captions": [[0, NaN, "x"]]}', '"captions" is .*; expected a list of'),
    ('{"video": "a", "captions": [[0, 1]]}', '"captions" is .*; expected a list of'),
    ('{"video": "a", "captions": [[0, 1, "x"]], "start": 2}', 'has "captions".* beside "start"'),
    ('{"video": "a", "boxes": [[0, 1, 2, 3, "x"]]}', '"boxes" is .*; expected a list of'),
    ('{"video": "a", "texts": "x"}', "\"texts\" is 'x'; expected a list of texts"),
    ('{"video": "a", "options": ["x", 1]}', '"options" is .*; expected a list of texts'),
    ('{"video": "a", "answer": 1.0}', '"answer" is 1.0; expected an integer or a text'),
    ('{"video": "a", "answer": true}', '"answer" is True; expected an integer or a text'),
    ('{"video": "a", "image": 1}', '"image" is 1; expected true or false'),
    ('{"video": "a", "member": {"name": "b"}}', '"member" is .*; expected {"name": text'),
])
def test_a_bad_line_is_named(line, complaint, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"video": "a.mp4"}\n' + line + '\n{"video": "b.mp4"}\n', encoding="latin-1")
    manifest = Manifest(path)
    assert manifest[2]["video"] == str(tmp_path / "b.mp4")                # others can be read
    with pytest.raises(DataError, match=f"m.jsonl:2: .*{complaint}") as error:
        manifest[1]
    assert "\n" not in str(error.value)


def test_every_field_of_a_good_line_is_kept(tmp_path):
    fields = {"text": "a", "texts": ["a", "b"], "captions": [[0, 1.5, "a"]], "question": "a?",
              "options": ["a", "b"], "answer": 1, "fps": 3,
              "boxes": [[0, 1, 2, 3, 4.5]], "kind": "x", "image": False, "id": {"any": "thing"},
              "member": {"name": "a.mp4", "offset": 512, "size": 3}}
    (tmp_path / "m.jsonl").write_text(json_lines({"video": "a.tar", "note": None, **fields}))
    assert samples_of(tmp_path / "m.jsonl") == [{"video": "a.tar", **fields}]


@pytest.mark.parametrize("name, content, complaint", [
    ("empty.jsonl", b"\n\n", "empty.jsonl: no samples"),
    ("u.jsonl", '{"video": "a"}\n'.encode("utf-16"), "u.jsonl: is UTF-16; save it as UTF-8"),
    ("a.tar.gz", b"x", "a.tar.gz: is compressed; unpack it"),
    ("a.zip", b"x", "a.zip: is compressed; unpack it"),
    ("a.xlsx", b"PK", "a.xlsx: is no text file; save the table as .csv in UTF-8"),
    ("none.jsonl", None, "none.jsonl: no such manifest"),
    ("none.csv", None, "none.csv: no such manifest"),
    ("none.tar", None, "none.tar: no such manifest"),
])
def test_what_is_no_manifest_is_named(name, content, complaint, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        Manifest(tmp_path / name)


def test_half_an_emoji_is_replaced(tmp_path):
    # A program that cuts a text after so many units of UTF-16 leaves half of the last emoji.
    path = tmp_path / "m.jsonl"
    line = r'{"video": "a", "text": "a dog \ud83d", "options": ["\ude00", "\ud83d\ude00"]}'
    path.write_text(line)
    (sample,) = samples_of(path)
    assert sample["text"] == "a dog \N{REPLACEMENT CHARACTER}"
    assert sample["options"] == ["\N{REPLACEMENT CHARACTER}", "\N{GRINNING FACE}"]
    assert Tokenizer.train(["a dog"], 50).encode(sample["text"], 10)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"video": "a"}\n', encoding="utf-8-sig")
    (tmp_path / "t.csv").write_text("video,text\na,x\n", encoding="utf-8-sig")
    assert samples_of(tmp_path / "m.jsonl") == [{"video": "a"}]
    assert samples_of(tmp_path / "t.csv") == [{"video": "a", "text": "x"}]


@pytest.mark.parametrize("name, content, columns, expected", [
    ("a.csv", 'path,caption\na.mp4,"a ""red"" dog,\nruns"\n', (), {"text": 'a "red" dog, runs'}),
    ("a.csv", 'text,path\n"a dog,\nruns",a.mp4\n', (), {"text": "a dog, runs"}),
    ("a.csv", "video,text\na.mp4,a 5\" disk\n", (), {"text": 'a 5" disk'}),
    ("a.csv", "video;text\na.mp4;a dog, it runs\n", (), {"text": "a dog, it runs"}),
    ("a.csv", "video\ttext\na.mp4\ta dog, it runs\n", (), {"text": "a dog, it runs"}),
    ("a.csv", "video,text,,\na.mp4,a dog,,\n\n", (), {"text": "a dog"}),   # a spreadsheet's
    ("A.CSV", "video,text,member\na.mp4,a dog,yes\n", (), {"text": "a dog"}),
    ("a.csv", "video,text,image\na.mp4,a dog,TRUE\n", (), {"text": "a dog", "image": True}),
    ("a.csv", "video,question,answer\na.mp4,how many?,2\n", (),
     {"question": "how many?", "answer": "2"}),
    ("a.tsv", "file\tTitle\tstart\tTexts\na.mp4\ta, cat\t.5\t['x', 'y  z']\n", (),
     {"text": "a, cat", "start": 0.5, "texts": ["x", "y z"]}),
    ("a.tsv", 'video\ttexts\na.mp4\t["x", "it\'s"]\n', (), {"texts": ["x", "it's"]}),
    ("a.csv", "name,en,text\na.mp4,a cow,eine Kuh\n", ["video=name", "text=EN"], {"text": "a cow"}),
])
def test_a_table_is_a_manifest(name, content, columns, expected, tmp_path):
    (tmp_path / name).write_text(content)
    assert samples_of(tmp_path / name, columns) == [{"video": "a.mp4", **expected}]


def test_a_utf_16_table_is_read(tmp_path):                                # "Unicode text" of Excel
    (tmp_path / "a.csv").write_text("video\ttext\na.mp4\tein Hündchen\n", encoding="utf-16")
    assert samples_of(tmp_path / "a.csv") == [{"video": "a.mp4", "text": "ein Hündchen"}]


def test_rows_are_named_by_their_line(tmp_path):
    (tmp_path / "a.csv").write_text('video,text\na.mp4,"x\ny"\n\nb.mp4,z\n')
    assert source_lines(tmp_path / "a.csv") == ["a.csv:2", "a.csv:5"]


def test_rows_without_a_caption_are_counted(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("video,text,answer\na,x,\nb,,\nc, ,\nd,,yes\n")
    assert [sample["video"] for sample in samples_of(tmp_path / "a.csv")] == ["a", "d"]
    assert "left out 2 rows without a caption, such as" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["tsv", "csv"])
@pytest.mark.parametrize("name", ["clips/{}.mp4", "video{}"])
@pytest.mark.parametrize("quoted", [
    {-1: '"text'},                              # of a column's name
    {3: '"cat 3'},                              # never closed
    {9: '"cat 9\nand more'},                    # never closed in the last row
    {3: '"cat 3', 6: '"small" cat 6'},          # ends where the next quote begins
    {3: '"cat 3', 6: 'cat 6"'},                 # closed by another stray quote
])
def test_a_stray_quote_swallows_no_rows(quoted, name, ending, tmp_path):
    delimiter = {"tsv": "\t", "csv": ","}[ending]
    lines = [f"video{delimiter}{quoted.get(-1, 'text')}"]
    lines += [f"{name.format(100 + i)}{delimiter}{quoted.get(i, 'a cat')}" for i in range(10)]
    path = tmp_path / f"a.{ending}"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=f"a.{ending}:{min(quoted) + 2}: a quote that opens here"):
        Manifest(path)


def test_a_stray_quote_between_tabs_swallows_no_rows_of_any_names(tmp_path):
    rows = ["video\ttext", 'dawn\t"a cat', "noon\ta cow", 'dusk\ta "hen', "night\ta pig"]
    (tmp_path / "a.tsv").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match="a.tsv:2: a quote that opens here"):
        Manifest(tmp_path / "a.tsv")


@pytest.mark.parametrize("content, line, complaint", [
    ("path,start\na,0.5\nb,soon\n", 3, "\"start\" is 'soon'; expected a finite number"),
    ("path,start\na,nan\n", 2, '"start" is .*; expected a finite number'),
    ("path;start\na;2,5\n", 2, "\"start\" is '2,5'; expected a finite number"),
    ("path,texts\na,\"['x']\"\nb,x;y\n", 3, "\"texts\" is 'x;y'; expected a list of texts"),
    ("path,text\na.mp4,a dog, it runs\n", 2, "has 3 cells, but the first line names 2 columns"),
    ("name,text\na.mp4,x\n", 2, 'lacks "video"; .* text, name .*--columns video=NAME'),
    ("path,text\na,x\nb," + "x" * 140_000, 3, "the row that begins here cannot be read"),
])
def test_a_bad_row_is_named(content, line, complaint, tmp_path):
    (tmp_path / "a.csv").write_text(content, encoding="cp1252")
    with pytest.raises(DataError, match=f"a.csv:{line}: {complaint}") as error:
        list(Manifest(tmp_path / "a.csv"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("columns, complaint", [
    (["text=en"], ":2: --columns text=en: there is no such column; its columns are video, text"),
    (["text"], "--columns text: expected FIELD=COLUMN"),
    (["caption=text"], "--columns caption=text: expected FIELD=COLUMN, with a FIELD of video, te"),
])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_wrong_column_is_refused(name, columns, complaint, tmp_path):
    (tmp_path / "a.csv").write_text("video,text\na.mp4,x\n")
    (tmp_path / "a.jsonl").write_text('\n{"video": "a.mp4", "text": "x"}\n')
    with pytest.raises(DataError, match=complaint):
        list(Manifest(tmp_path / name, columns))


def test_keys_of_lines_may_have_other_names(tmp_path):
    line = {"Clip": "a.mp4", "text": "eine Kuh", "en": "cow"}
    (tmp_path / "m.jsonl").write_text(json_lines(line))
    (sample,) = Manifest(tmp_path / "m.jsonl", ["video=clip", "text=en"])
    assert (sample["video"], sample["text"]) == (str(tmp_path / "a.mp4"), "cow")


def test_windows_1252_tables_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("video,text\na.mp4,ein Hündchen\n", encoding="cp1252")
    assert samples_of(tmp_path / "a.csv") == [{"video": "a.mp4", "text": "ein Hündchen"}]


def test_a_bad_row_leaves_the_others(tmp_path):
    (tmp_path / "a.csv").write_text("video,start,end\na.mp4,5,3\nb.mp4,1,2\n")
    assert Manifest(tmp_path / "a.csv")[1]["end"] == 2


def test_a_changed_table_is_read_again(tmp_path):
    (tmp_path / "a.csv").write_text("video,text\na.mp4,x\n")
    assert samples_of(tmp_path / "a.csv") == [{"video": "a.mp4", "text": "x"}]
    (tmp_path / "a.csv").write_text("video,text\na.mp4,xx\n")
    assert samples_of(tmp_path / "a.csv") == [{"video": "a.mp4", "text": "xx"}]


# Files of a folder or of a shard, and the samples that they make.
CAPTIONED = [
    ({"a.mp4": "", "a.txt": "a cat\n sleeps"}, [("a.mp4", "a cat sleeps")]),
    ({"a.mp4": "", "a.json": '{"caption": "a cat", "start": 7, "end": "x"}'}, [("a.mp4", "a cat")]),
    ({"a.mp4": "", "a.json": '{"caption": "a cat"}', "a.txt": "a dog"}, [("a.mp4", "a dog")]),
    ({"a.mp4": "", "a.json": '{"caption": "a cat"}', "a.txt": "\n"}, [("a.mp4", "a cat")]),
    ({"a.jpg": "", "a.mp4": "", "a.txt": "x"}, [("a.mp4", "x")]),         # a thumbnail
    ({"a.mp4": "", "a.png": "", "a.txt": "x"}, [("a.mp4", "x")]),
    ({"a.jpg": "", "a.txt": "x"}, [("a.jpg", "x")]),
    ({"a.heic": "", "a.txt": "x"}, [("a.heic", "x")]),                    # a phone's
    ({"s/a.b.mkv": "", "s/a.b.txt": "x", "s/a.mkv": "", "s/a.txt": "y"},
     [("s/a.b.mkv", "x"), ("s/a.mkv", "y")]),
    ({"a.MP4": "", "a.TXT": "x", "._a.mp4": "", "._a.txt": "\xff"}, [("a.MP4", "x")]),
]


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="latin-1")


def write_shard(path, files, form=tarfile.PAX_FORMAT):
    """An uncompressed .tar of {name: bytes or text}."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode("latin-1")
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("files, expected", CAPTIONED)
def test_a_folder_of_captioned_clips_is_a_manifest(files, expected, tmp_path):
    write_files(tmp_path, files)
    found = [(sample["video"], sample["text"]) for sample in Manifest(tmp_path)]
    assert found == [(str(tmp_path / name), text) for name, text in expected]


@pytest.mark.parametrize("files, expected", CAPTIONED)
def test_a_shard_of_captioned_clips_is_a_manifest(files, expected, tmp_path):
    shard = write_shard(tmp_path / "0.tar", files)
    samples = list(Manifest(shard))
    assert [(sample["member"]["name"], sample["text"]) for sample in samples] == expected
    for sample, (name, _) in zip(samples, expected):
        assert sample["video"] == str(shard)
        assert sample["source_line"] == f"{shard}:{name}"
        assert data.is_image(sample) == name.endswith((".jpg", ".heic"))


def test_clips_without_a_readable_caption_are_counted(tmp_path, capsys):
    files = {"a.mp4": "", "a.txt": "x", "b.mp4": "", "c.mp4": "", "c.txt": " ", "d.mp4": "",
             "d.json": "[1]", "e.mp4": "", "e.txt": "\xff", "f.mp4": "", "f.webm": "", "f.txt": "x"}
    (tmp_path / "folder").mkdir()
    write_files(tmp_path / "folder", files)
    write_shard(tmp_path / "0.tar", files)
    for path in (tmp_path / "folder", tmp_path / "0.tar"):
        assert [sample["text"] for sample in Manifest(path)] == ["x", "x"]
        printed = capsys.readouterr().err
        assert f"{path}: left out 2 clips without a caption, such as" in printed
        assert "left out 2 clips with an unreadable caption, such as" in printed
        assert "left out 1 clips beside another clip of their name, such as" in printed


def test_what_is_left_out_is_said_each_time(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.csv").write_text("video,text\na,x\nb,\n")
    for rank, times in ("0", 1), ("0", 1), ("1", 0):
        monkeypatch.setenv("RANK", rank)
        Manifest(tmp_path / "a.csv")
        assert capsys.readouterr().err.count("left out 1 rows without a caption") == times


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "set").mkdir()
    write_files(tmp_path / "disk", {"a.mp4": "", "a.txt": "x"})
    (tmp_path / "set" / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "itself").symlink_to(tmp_path / "disk")
    assert samples_of(tmp_path / "set") == [{"video": "a.mp4", "text": "x"}]


def test_frames_of_a_folder_with_an_ending_are_no_clips(tmp_path):
    write_files(tmp_path, {"a.mp4/1.jpg": "", "a.mp4/2.jpg": ""})
    assert [file.name for file in data.clip_files(tmp_path)] == [str(tmp_path / "a.mp4")]


def test_a_changed_folder_is_read_again(tmp_path):
    write_files(tmp_path, {"a.mp4": "", "a.txt": "x"})
    assert samples_of(tmp_path) == [{"video": "a.mp4", "text": "x"}]
    write_files(tmp_path, {"a.txt": "yy"})
    assert samples_of(tmp_path) == [{"video": "a.mp4", "text": "yy"}]
    write_files(tmp_path, {"b.mp4": "", "b.txt": "z"})
    assert [sample["text"] for sample in samples_of(tmp_path)] == ["yy", "z"]


LONG = "clips/" + "long" * 40 + "ä.mp4"


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("name", ["a.mp4", LONG])
def test_a_member_is_its_range_of_bytes(form, name, tmp_path):
    files = {"b.mp4": b"before", name: b"0123456789" * 300, "c.mp4": b"after"}
    files.update({key[:-4] + ".txt": "x" for key in list(files)})
    shard = write_shard(tmp_path / "0.tar", files, form)
    samples = list(Manifest(shard))
    assert [sample["member"]["name"] for sample in samples] == ["b.mp4", name, "c.mp4"]
    for sample in samples:
        member = sample["member"]
        content = shard.read_bytes()[member["offset"]:][:member["size"]]
        assert content == files[member["name"]]
        data.check_place(data.source_of(sample))                          # as it should be


def test_shards_of_one_folder_are_one_manifest(tmp_path):
    for folder, names in ("a", "01"), ("b", "2"):
        (tmp_path / folder).mkdir()
        for name in names:
            write_shard(tmp_path / folder / f"{name}.tar", {"k.mp4": "", "k.txt": f"text {name}"})
    shards = [tmp_path / name for name in ("a/0.tar", "a/1.tar", "b/2.tar")]
    listed = Manifest(shards)
    assert listed.sizes == [2, 1]
    assert listed.names == [f"{tmp_path}/a/0.tar to 1.tar", f"{tmp_path}/b/2.tar"]
    texts = ["text 0", "text 1", "text 2"]
    assert [sample["text"] for sample in listed] == texts
    assert [sample["text"] for sample in Manifest(tmp_path)] == texts     # a folder of shards


def test_clips_are_found_without_captions(tmp_path):
    write_files(tmp_path, {"a.mp4": "", "s/b.JPG": "", "s/notes.txt": "", "._a.mp4": ""})
    shard = write_shard(tmp_path / "s" / "0.tar", {"c.mp4": "film", "c.txt": "", "d.webm": ""})
    member = {"name": "c.mp4", "offset": 512, "size": 4}
    found = [file.fields() for file in data.clip_files(tmp_path)]
    assert [Path(fields["video"]).name for fields in found] == ["a.mp4", "b.JPG", "0.tar", "0.tar"]
    assert found[2] == {"video": str(shard), "member": member}
    assert [file.name for file in data.clip_files(shard)] == ["c.mp4", "d.webm"]
    assert [file.fields() for file in data.clip_files(tmp_path / "none.xyz")] == [
        {"video": str(tmp_path / "none.xyz")}]


def test_captions_of_a_shard_are_read_with_its_headers(tmp_path):
    shard = write_shard(tmp_path / "0.tar", {"a.mp4": "", "a.txt": "x"})
    _, caption = data.shard_files(shard)
    shard.unlink()
    assert caption.read() == b"x"


def test_a_shard_within_a_shard_is_no_clip(tmp_path):
    shard = write_shard(tmp_path / "0.tar", {"a.mp4": "", "b.tar": ""})
    assert [file.name for file in data.clip_files(shard)] == ["a.mp4"]


def test_headers_of_shards_are_read_once(tmp_path):
    shard = write_shard(tmp_path / "0.tar", {"a.mp4": "", "a.txt": "x"})
    built = Manifest(shard).paths[0]
    time_built = built.stat().st_mtime_ns
    assert Manifest(shard).paths == [built]
    assert built.stat().st_mtime_ns == time_built
    os.utime(shard, ns=(0, 0))
    assert Manifest(shard).paths != [built]


@pytest.mark.parametrize("cut", [300, 512, 1000, 1536, 1700, 2560, 3072])
def test_a_shard_that_is_cut_off_is_named(cut, tmp_path):
    files = {"a.mp4": b"x" * 600, "a.txt": "x", "b.mp4": b"y", "b.txt": "y"}
    whole = write_shard(tmp_path / "0.tar", files).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:cut])
    with pytest.raises(DataError, match="1.tar: is cut off or .*; fetch it again or remove it"):
        Manifest([tmp_path / "0.tar", tmp_path / "1.tar"])


@pytest.mark.parametrize("content", [b"", b"no tar" * 200, b"whole, then another"])
def test_what_is_no_shard_is_named(content, tmp_path):
    shard = write_shard(tmp_path / "0.tar", {"a.mp4": "", "a.txt": "x"})
    if content.startswith(b"whole"):
        content = shard.read_bytes() * 2                                  # joined by cat
    shard.write_bytes(content)
    with pytest.raises(DataError, match="0.tar: is cut off or "):
        Manifest(shard)


def test_clips_of_a_shard_equal_those_of_files(tmp_path):
    (tmp_path / "folder").mkdir()
    files = {}
    for name in ("a.mp4", "b.mkv", "c.avi"):
        codec = "mpeg4" if name == "c.avi" else "libx264"
        path = film(tmp_path / "folder" / name, f"n=20 codec={codec}")
        path.with_suffix(".txt").write_text(f"a dog in {name}")
        for file in (path, path.with_suffix(".txt")):
            files[file.name] = file.read_bytes()
    write_shard(tmp_path / "0.tar", files)
    tokenizer = Tokenizer.train(["a dog"], 50)
    stored, packed = [Clips(Manifest(path), tokenizer, "pretrain", 3, 32, 40, train=True)
                      for path in (tmp_path / "folder", tmp_path / "0.tar")]
    assert len(stored) == len(packed) == 3
    for key in [(0, 0), (2, 1), (1, 2), (2, 3)]:
        assert torch.equal(stored[key]["video"], packed[key]["video"])


@pytest.mark.parametrize("name", ["a" * 96 + ".mp4", "a" * 97 + ".mp4", "a" * 200 + ".mp4",
                                  "für.mp4"])
def test_a_member_may_have_a_long_name(name, tmp_path):
    shard = write_shard(tmp_path / "0.tar", {name: b"film", f"{name[:-4]}.txt": "x"})
    (sample,) = Manifest(shard)
    data.check_place(data.source_of(sample))                       # does not raise


def test_a_truncated_film_in_a_shard_is_no_whole_one(tmp_path):
    whole = film(tmp_path / "whole.mp4").read_bytes()
    shard = write_shard(tmp_path / "0.tar", {
        "a.mp4": cut_behind_its_index(tmp_path / "a.mp4"), "a.txt": "x",
        "b.mp4": whole, "b.txt": "y"})
    cut, complete = Manifest(shard)
    data.read_frames(complete, range, 32, "release", train=False)
    with pytest.raises(Unreadable, match="truncated"):
        data.read_frames(cut, range, 32, "release", train=False)


def test_notes_of_macos_in_a_shard_are_no_clips(tmp_path):
    files = {"._a.mp4": "note", "._a.txt": "note", "a.mp4": "film", "a.txt": "x", "._b.mp4": "note"}
    (sample,) = Manifest(write_shard(tmp_path / "0.tar", files))
    assert sample["member"]["name"] == "a.mp4"


def test_a_shard_that_was_cut_after_it_was_indexed_is_named(tmp_path):
    shard = write_shard(tmp_path / "0.tar", {"a.txt": "x", "a.mp4": "0123456789"})
    (sample,) = Manifest(shard)
    source = data.source_of(sample)
    os.truncate(shard, source.offset + source.size - 1)
    with pytest.raises(Unreadable, match="0.tar: holds no a.mp4 of 10 bytes .* is cut off"):
        data.check_place(source)


@pytest.mark.parametrize("files", [
    {"b.mp4": "0123456789", "b.txt": "x"},                                # another name
    {"a.mp4": "01234567890", "a.txt": "x"},                               # another size
    {"z.txt": "x" * 1000, "a.mp4": "0123456789", "a.txt": "x"},           # another place
    {},
    None])
def test_a_shard_that_has_changed_is_named(files, tmp_path):
    shard = write_shard(tmp_path / "0.tar", {"a.mp4": "0123456789", "a.txt": "x"})
    (sample,) = Manifest(shard)
    if files is None:
        shard.unlink()
    else:
        write_shard(shard, files)
    with pytest.raises(Unreadable, match="0.tar: (holds no a.mp4 of 10 bytes|no such file)"):
        data.check_place(data.source_of(sample))
    with pytest.raises(Unreadable, match="0.tar"):
        data.read_frames(sample, range, 32, "release", train=False)


# ---- Order of visits (Sec. 4.1.1) ----------------------------------------------------------------

def micro_batches(sizes, world, accumulation_steps, batch=24, start=0, steps=40, shares=()):
    """Each step's micro-batches on all processes: a list of lists of (sample, visit)."""
    processes = [list(BatchSampler(sizes, batch, 3, rank, world, start, accumulation_steps, steps,
                                   shares)) for rank in range(world)]
    of_steps = []
    for step in range(steps - start):
        of_steps.append([])
        for process in processes:
            begin = step * accumulation_steps
            of_steps[-1] += process[begin:begin + accumulation_steps]
    return of_steps


def samples_in(step):
    return [sample for micro_batch in step for sample, _ in micro_batch]


ONE, TWO, MIXED = ([50], ()), ([50, 20], ()), ([50, 20], (1, 3))


@pytest.mark.parametrize("sizes, shares", [ONE, TWO, MIXED])
def test_any_number_of_processes_reads_the_same_micro_batches(sizes, shares):
    one_process = micro_batches(sizes, 1, 4, shares=shares)
    assert one_process == micro_batches(sizes, 2, 2, shares=shares)
    assert one_process == micro_batches(sizes, 4, 1, shares=shares)


@pytest.mark.parametrize("sizes, shares", [ONE, TWO, MIXED])
def test_a_resumed_run_skips_and_repeats_nothing(sizes, shares):
    whole = micro_batches(sizes, 2, 2, shares=shares)
    assert micro_batches(sizes, 2, 2, start=7, shares=shares) == whole[7:]


def test_micro_batches_of_any_size_read_one_manifest_alike():
    by_two, by_twelve = micro_batches([50], 4, 3), micro_batches([50], 1, 2)
    assert len(by_two[0][0]) == 2 and len(by_twelve[0][0]) == 12
    assert [samples_in(step) for step in by_two] == [samples_in(step) for step in by_twelve]


def test_visits_are_counted_from_the_runs_first():
    steps = micro_batches([50, 20], 2, 2, start=7)
    visits = [visit for step in steps for micro_batch in step for _, visit in micro_batch]
    assert visits == list(range(24 * 7, 24 * 40))


@pytest.mark.parametrize("count", [64, 1000, 4096])
def test_an_order_tells_nothing_of_another(count):
    orders = []
    for seed in (1, 2):
        orders.append(np.array([shuffled(k, count, seed) for k in range(count)]))
        assert abs(np.corrcoef(np.arange(count), orders[-1])[0, 1]) < 0.3
    assert abs(np.corrcoef(*orders)[0, 1]) < 0.3


def test_manifests_of_equal_length_are_read_in_orders_of_their_own():
    read = {0: [], 1: []}
    for step in micro_batches([48, 48], 1, 4, steps=8):
        for sample in samples_in(step):
            read[sample // 48].append(sample % 48)
    assert read[0] != read[1]


def test_an_epoch_visits_each_sample_once_in_new_order():
    read = [sample for step in micro_batches([48], 1, 4) for sample in samples_in(step)]
    epochs = [read[begin:begin + 48] for begin in range(0, len(read), 48)]
    assert len(epochs) == 20 and all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20


def test_each_seed_has_an_order_of_its_own():
    orders = set()
    for seed in range(5):
        (micro_batch,) = BatchSampler([48], 48, seed)
        orders.add(tuple(sample for sample, _ in micro_batch))
    assert len(orders) == 5


@pytest.mark.parametrize("sizes, world, batch, shares", [
    ([6], 1, 4, ()), ([50], 4, 24, ()), ([24], 4, 24, ()), ([7], 1, 6, ()),
    ([40, 24], 1, 24, ()), ([40, 40], 2, 24, (1, 2)), ([60, 50, 40], 1, 24, (3, 2, 1))])
def test_no_step_holds_a_sample_twice(sizes, world, batch, shares):
    for step in micro_batches(sizes, world, 2, batch, steps=300, shares=shares):
        assert len(set(samples_in(step))) == batch


def test_samples_of_uneven_epochs_are_visited_equally_often():
    counts = collections.Counter()
    for step in micro_batches([7], 1, 1, batch=4, steps=2100):
        counts.update(samples_in(step))
    assert all(abs(counts[sample] - 1200) < 60 for sample in range(7)), counts


@pytest.mark.parametrize("sizes, batch, shares, expected", [
    ([6], 24, (), [24]),                       # 24 clips of 6: each sample four times
    ([50, 20], 24, (), [18, 12]),              # 4 micro-batches: at most 3 of one, 2 of the other
    ([50, 20], 24, (1, 3), [6, 18])])
def test_the_clips_of_a_step_are_foretold(sizes, batch, shares, expected):
    for world in (1, 2, 4):
        sampler = BatchSampler(sizes, batch, 3, 0, world, accumulation_steps=4 // world,
                               shares=shares)
        assert sampler.clips_per_step() == expected
    most = [0] * len(sizes)
    for step in micro_batches(sizes, 1, 4, batch, steps=500, shares=shares):
        of_first = sum(sample < sizes[0] for sample in samples_in(step))
        for manifest, clips in enumerate([of_first, batch - of_first][:len(sizes)]):
            most[manifest] = max(most[manifest], clips)
    assert most == expected


@pytest.mark.parametrize("sizes, shares", [TWO, MIXED])
def test_a_micro_batch_reads_one_manifest(sizes, shares):
    for step in micro_batches(sizes, 1, 4, shares=shares):
        for micro_batch in step:
            assert len({sample < 50 for sample, _ in micro_batch}) == 1


@pytest.mark.parametrize("sizes, shares, expected", [
    ([50, 20], (), [5 / 7, 2 / 7]), ([50, 20], (1, 3), [0.25, 0.75]),
    ([5, 5, 5], (0.1, 0.2, 0.3), [1 / 6, 1 / 3, 1 / 2])])
def test_manifests_are_read_by_their_shares(sizes, shares, expected):
    sampler = BatchSampler(sizes, 24, 3, accumulation_steps=4, steps=250, shares=shares)
    for number in 10, 100, 1000:
        for count, share in zip(sampler.counts(number), expected):
            assert abs(count - share * number) < 2              # evenly, from the start


@pytest.mark.parametrize("shares", [(1, 1, 1), (1,), (1, 0), (2, -1)])
def test_shares_that_do_not_fit_are_refused(shares):
    with pytest.raises(DataError, match="--mix .*: expected 2 positive numbers, one for each"):
        BatchSampler([50, 20], 24, 3, shares=shares)


@pytest.mark.parametrize("batch", [0, 2, 6])
def test_a_batch_that_cannot_be_cut_evenly_is_refused(batch):
    with pytest.raises(DataError, match=f"a batch of {batch} clips .*expected a multiple of 4"):
        BatchSampler([50], batch, 3, world=2, accumulation_steps=2)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000])
def test_shuffling_is_a_permutation(n):
    assert sorted(shuffled(i, n, 5) for i in range(n)) == list(range(n))


# ---- Words and batches (Sec. 3.3, 4.2) -----------------------------------------------------------

WORDS = ["a dog runs to the left", "two cats play with a ball", "a man cooks rice"]


def tokens_of(tokenizer, ids):
    return " ".join(tokenizer.words.id_to_token(i) for i in ids)


@pytest.mark.parametrize("text, question, max_len, expected", [
    ("a dog", None, 40, "[CLS] a dog [SEP]"),
    ("A DOG", None, 40, "[CLS] a dog [SEP]"),                       # case
    ("á dög", None, 40, "[CLS] a dog [SEP]"),                       # accents
    ("", None, 4, "[CLS] [SEP]"),
    ("a dog runs", None, 4, "[CLS] a dog [SEP]"),
    ("a dog", "a man", 40, "[CLS] a man [SEP] a dog [SEP]"),
    ("a dog", "a man", 6, "[CLS] a [SEP] a dog [SEP]"),             # the question loses its end
    ("a dog runs", "a man", 5, "[CLS] [SEP] a dog [SEP]"),          # and then the text
    ("a dog", "", 4, "[CLS] a dog [SEP]"),
    ("a dog \ud83d", None, 40, "[CLS] a dog [SEP]"),                # half an emoji
    ("a dog", "\udcff", 40, "[CLS] a dog [SEP]"),                   # a byte that is no character
    ("a fog", None, 40, "[CLS] a f ##o ##g [SEP]")])
def test_a_text_becomes_these_tokens(text, question, max_len, expected):
    tokenizer = Tokenizer.train([*WORDS, "f"], 200)
    assert tokens_of(tokenizer, tokenizer.encode(text, max_len, question)) == expected


def test_a_vocabulary_is_the_same_in_every_run():
    tokenizer = Tokenizer.train(WORDS, 200)
    assert tokenizer.words.to_str() == Tokenizer.train(map(str.upper, WORDS), 200).words.to_str()


def test_a_vocabulary_keeps_the_most_frequent_words():
    tokenizer = Tokenizer.train(["aa bb bb cc cc cc"], 5 + 6 + 2)   # specials, letters, two words
    assert tokenizer.words.get_vocab().keys() - set(data.SPECIALS) == {
        "a", "b", "c", "##a", "##b", "##c", "cc", "bb"}


@pytest.fixture
def vocabulary_files(tmp_path) -> Path:
    tokenizer = Tokenizer.train(WORDS, 200)
    tokens = tokenizer.words.get_vocab()
    lines = "\n".join(sorted(tokens, key=tokens.get)) + "\n"
    (tmp_path / "vocab.txt").write_text(lines)
    (tmp_path / "mark.txt").write_text(lines, "utf-8-sig")              # with a byte order mark
    (tmp_path / "mark.json").write_text(tokenizer.words.to_str(), "utf-8-sig")
    tokenizer.words.enable_truncation(4)
    tokenizer.words.enable_padding(length=9)
    (tmp_path / "tokenizer.json").write_text(tokenizer.words.to_str())
    (tmp_path / "no_unk.txt").write_text("a\nb\n[UNK]")
    (tmp_path / "gaps.json").write_text(tokenizer.words.to_str().replace('"rice":', '"rice":9'))
    return tmp_path


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "mark.txt", "mark.json"])
def test_a_vocabulary_is_read_from_a_file(name, vocabulary_files):
    expected = Tokenizer.train(WORDS, 200)
    read = Tokenizer.load(vocabulary_files / name)
    assert read.encode(WORDS[0], 40) == expected.encode(WORDS[0], 40)
    assert read.words.get_vocab() == expected.words.get_vocab()


@pytest.mark.parametrize("name, message", [
    ("no such name", "give the path of a local vocab.txt"),
    ("none.txt", "give the path of a local vocab.txt"),
    ("no_unk.txt", "not found in the vocabulary")])
def test_a_wrong_vocabulary_is_refused(name, message, vocabulary_files):
    path = vocabulary_files / name if name.endswith(".txt") else name
    with pytest.raises(DataError, match=message):
        Tokenizer.load(path)


@pytest.mark.parametrize("texts, expected", [
    (["a dog runs"], []),
    (["A Dog, [MASK]!", ""], []),                                   # punctuation is no word
    (["a zebra runs"], ["zebra"]),                                  # z is no letter of it: [UNK]
    (["The God ran", "a god"], ["god", "ran"]),                     # g ##o ##d, r ##a ##n
    (["no dog"], ["no"]),                                           # n ##o
    (["dogs"], []),                                                 # dog ##s says enough
    (["towards"], ["towards"]),                                     # to ##w ##a ##r ##d ##s
    (["dög"], []), (["göd"], ["göd"])])
def test_words_without_tokens_are_listed(texts, expected):
    assert Tokenizer.train(WORDS, 200).unknown_words(texts) == expected


def clips_of(folder, lines, task="pretrain", **options):
    """Clips over `lines` (samples or captions) of folder/a.mp4, unless a line has its own video."""
    if not (folder / "a.mp4").exists():
        film(folder / "a.mp4", "n=12 w=48 h=40")
    samples = []
    for line in lines:
        fields = {"text": line} if isinstance(line, str) else line
        samples.append({"video": "a.mp4", **fields})
    (folder / "m.jsonl").write_text(json_lines(*samples))
    options = {"frames": 3, "image_size": 32, "max_text_len": 40, "train": True, **options}
    return Clips(Manifest(folder / "m.jsonl"), Tokenizer.train(WORDS, 200), task, **options)


def batch_of(clips, indices, group=None):
    return collate([clips[index, visit] for visit, index in enumerate(indices)], clips, group)


def texts_in(clips, ids, mask):
    """The texts of (N, m) ids, each as its tokens."""
    return [tokens_of(clips.tokenizer, row[valid].tolist()) for row, valid in zip(ids, mask)]


def many_clips(folder, count=24, **options):
    """Clips of `count` films with the texts of WORDS in turn."""
    for i in range(count):
        (folder / f"{i}.mp4").symlink_to(folder / "a.mp4")
    lines = [{"video": f"{i}.mp4", "text": WORDS[i % 3]} for i in range(count)]
    return clips_of(folder, lines, **options)


def assert_equal_batches(batch, expected):
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(batch[name], value) if torch.is_tensor(value) else batch[name] == value
        assert same, name


def test_other_processes_read_the_same_batches(tmp_path):
    clips = many_clips(tmp_path)
    merge = partial(collate, clips=clips, group=4)
    sampler = BatchSampler([24], 16, 0, steps=2)
    here = list(data.load(clips, sampler, merge, workers=0))
    for batch, expected in zip(data.load(clips, sampler, merge, workers=2), here, strict=True):
        assert_equal_batches(batch, expected)


@pytest.mark.parametrize("change", [{"visit": 1}, {"seed": 1}])
def test_another_visit_or_seed_reads_other_pixels(change, tmp_path):
    clips = clips_of(tmp_path, WORDS)
    other = replace(clips, seed=change.get("seed", 0))[0, change.get("visit", 0)]
    assert not torch.equal(clips[0, 0]["video"], other["video"])
    assert torch.equal(clips[0, 0]["video"], clips[0, 0]["video"])


def test_reading_leaves_the_callers_random_numbers_alone(tmp_path):
    clips = clips_of(tmp_path, WORDS)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    clips[0, 0]
    assert torch.equal(torch.rand(1), expected)


def test_masks_do_not_depend_on_the_longest_text(tmp_path):      # Sec. 3.3, MLM
    clips = clips_of(tmp_path, ["a dog runs", "a dog runs to the left " * 5])
    for visit in range(20):
        alone = collate([clips[0, visit]], clips)
        beside = collate([clips[0, visit], clips[1, visit]], clips)
        assert torch.equal(alone["mlm_ids"][0, :5], beside["mlm_ids"][0, :5])


def test_masks_change_from_visit_to_visit(tmp_path):
    clips = clips_of(tmp_path, WORDS)
    assert len({tuple(clips[0, visit]["mlm_caption"]) for visit in range(30)}) > 5


def test_mlm_labels_are_the_words_that_stood_there(tmp_path):
    clips = clips_of(tmp_path, WORDS)
    batch = batch_of(clips, [0, 1, 2] * 8)
    chosen = batch["mlm_labels"] >= 0
    positions, labels = batch["mlm_positions"][chosen], batch["mlm_labels"][chosen]
    assert torch.equal(batch["text_ids"].flatten()[positions], labels)
    changed = (batch["mlm_ids"] != batch["text_ids"]).flatten().nonzero()[:, 0]
    assert 0 < len(changed) <= len(labels) and set(changed.tolist()) <= set(positions.tolist())
    assert batch["mlm_positions"].shape == batch["mlm_labels"].shape == (32,)


class Unseen(Clips):
    """Clips that are black, without a file being read."""

    def read_video(self, sample):
        return torch.zeros(3, 3, 32, 32, dtype=torch.uint8)


def test_pieces_of_a_word_are_masked_together(tmp_path):         # release
    plain = clips_of(tmp_path, ["god ran"])                      # [CLS] g ##o ##d r ##a ##n [SEP]
    clips = Unseen(plain.manifest, plain.tokenizer, "pretrain", 3, 32, 40, True, whole_words=True)
    patterns = set()
    for visit in range(500):
        labels = clips[0, visit]["mlm_labels"]
        patterns.add("".join(".x"[label >= 0] for label in labels))
    assert patterns == {"........", ".xxx....", "....xxx.", ".xxxxxx."}


def test_pairs_are_drawn_within_groups_of_neighbours(tmp_path):  # Sec. 3.3, VTM
    batch = batch_of(many_clips(tmp_path), range(16), group=4)
    assert torch.equal(batch["vtm_video"] // 4, torch.arange(16) // 4)
    assert torch.equal(batch["vtm_labels"] == 1, batch["vtm_video"] == torch.arange(16))
    assert 0 < batch["vtm_labels"].sum() < 16


def test_another_seed_draws_other_pairs(tmp_path):
    clips = many_clips(tmp_path)
    items = [clips[i, i] for i in range(16)]
    partners = [collate(items, replace(clips, seed=seed))["vtm_video"].tolist()
                for seed in (0, 0, 1)]
    assert partners[0] == partners[1] != partners[2]


def test_two_processes_draw_the_pairs_of_one(tmp_path):
    clips = many_clips(tmp_path)
    items = [clips[i, i] for i in range(16)]
    whole = collate(items, clips, group=4)
    halves = [collate(items[:8], clips, group=4), collate(items[8:], clips, group=4)]
    assert torch.equal(whole["vtm_labels"], torch.cat([half["vtm_labels"] for half in halves]))
    assert torch.equal(whole["vtm_video"][:8], halves[0]["vtm_video"])
    assert torch.equal(whole["vtm_video"][8:], halves[1]["vtm_video"] + 8)


def test_pairs_change_from_epoch_to_epoch(tmp_path):
    clips = many_clips(tmp_path)
    pairs = set()
    for epoch in range(5):
        items = [clips[i, 24 * epoch + i] for i in range(8)]
        pairs.add(tuple(collate(items, clips)["vtm_video"].tolist()))
    assert len(pairs) == 5


def test_an_unreadable_clip_leaves_other_groups_alone(tmp_path):
    clips = many_clips(tmp_path)
    items = [clips[i, i] for i in range(12)]
    expected = collate(items, clips, group=4)["vtm_video"][4:]
    del items[1]["video"]
    batch = collate(items, clips, group=4)
    assert torch.equal(batch["vtm_video"][3:] + 1, expected)
    assert batch["index"].tolist() == [0, *range(2, 12)]


def test_clips_of_one_film_are_never_a_mismatch(tmp_path):
    clips = clips_of(tmp_path, WORDS)                            # three texts of a.mp4
    assert batch_of(clips, [0, 1, 2] * 5)["vtm_labels"].all()


@pytest.mark.parametrize("text, max_text_len, expected", [
    ("a dog", 40, 8), ("a dog runs to the left", 40, 8), ("a dog runs to the left a", 40, 16),
    ("a dog runs to the left " * 9, 40, 40), ("a dog runs to the left " * 9, 20, 20)])
def test_texts_are_padded_to_multiples_of_eight(text, max_text_len, expected, tmp_path):
    clips = clips_of(tmp_path, ["a", text], max_text_len=max_text_len)
    batch = batch_of(clips, [0, 1])
    assert batch["text_ids"].shape == batch["text_mask"].shape == (2, expected)
    assert batch["mlm_ids"].shape == (2, expected)


def test_padding_is_the_pad_token_under_a_false_mask(tmp_path):
    clips = clips_of(tmp_path, ["a dog", "a man cooks rice"])
    batch = batch_of(clips, [0, 1])
    assert batch["text_mask"].sum(1).tolist() == [4, 6]
    assert (batch["text_ids"][~batch["text_mask"]] == clips.tokenizer.pad_id).all()
    assert texts_in(clips, batch["text_ids"], batch["text_mask"]) == [
        "[CLS] a dog [SEP]", "[CLS] a man cooks rice [SEP]"]


def test_images_are_clips_of_one_frame(tmp_path):
    picture(tmp_path / "i.png", (48, 40))
    clips = clips_of(tmp_path, [{"video": "i.png", "text": "a"}] * 2)
    assert batch_of(clips, [0, 1])["video"].shape == (2, 1, 3, 32, 32)


def test_images_and_clips_do_not_mix(tmp_path):
    picture(tmp_path / "i.png", (48, 40))
    clips = clips_of(tmp_path, [{"video": video, "text": "a"} for video in ("i.png", "a.mp4")])
    with pytest.raises(DataError, match="m.jsonl:2: images and clips in one manifest"):
        batch_of(clips, [0, 1])


def test_a_batch_says_which_lines_it_holds(tmp_path):
    clips = clips_of(tmp_path, [{"text": "a", "kind": "x"}, "b"])
    (tmp_path / "other.jsonl").write_text(json_lines({"video": "none.mp4", "text": "c"}))
    clips.manifest = Manifest([tmp_path / "m.jsonl", tmp_path / "other.jsonl"])
    batch = batch_of(clips, [1, 0])
    assert batch["index"].tolist() == [1, 0] and batch["kind"] == [None, "x"]
    assert [line.rsplit("/")[-1] for line in batch["source_line"]] == ["m.jsonl:2", "m.jsonl:1"]
    assert batch["manifest_id"].tolist() == [0, 0]
    assert clips[2, 0]["manifest_id"] == 1 and "video" not in clips[2, 0]


def test_an_unreadable_clip_is_named_and_left_out(tmp_path):
    clips = clips_of(tmp_path, ["a dog", {"video": "none.mp4", "text": "a"}], train=False)
    batch = batch_of(clips, [0, 1])
    assert batch["index"].tolist() == [0] and len(batch["video"]) == 1
    assert re.fullmatch(r"\S+m.jsonl:2: \S+none.mp4: no such file", batch["unreadable"][0])
    empty = batch_of(clips, [1])
    assert empty["index"].shape == (0,) and "video" not in empty and len(empty["unreadable"]) == 1


def test_options_are_padded_to_the_most_of_a_clip(tmp_path):     # Sec. 4.2.1, 4.2.3
    clips = clips_of(tmp_path, [{"options": WORDS, "answer": 1, "question": "a man"},
                                {"options": WORDS[:2], "answer": 0}], "choice", train=False)
    batch = batch_of(clips, [0, 1])
    assert batch["option_mask"].tolist() == [[True, True, True], [True, True, False]]
    assert batch["option_ids"].shape == batch["option_text_mask"].shape == (2, 3, 16)
    assert not batch["option_text_mask"][1, 2].any()
    assert (batch["option_ids"][1, 2] == clips.tokenizer.pad_id).all()
    assert texts_in(clips, batch["option_ids"][0], batch["option_text_mask"][0])[2] == (
        "[CLS] a man [SEP] a man cooks rice [SEP]")
    assert texts_in(clips, batch["option_ids"][1], batch["option_text_mask"][1])[:2] == [
        "[CLS] a dog runs to the left [SEP]", "[CLS] two cats play with a ball [SEP]"]
    assert batch["label"].tolist() == [1, 0] and "text_ids" not in batch


def test_a_small_vocabulary_can_spell_every_word():
    tokenizer = Tokenizer.train(["the quick brown fox jumps over a lazy dog"], vocab_size=8)
    tokens = tokens_of(tokenizer, tokenizer.encode("quick dog", max_len=40))
    assert "[UNK]" not in tokens
    assert re.sub(r" ##|\[\w+\]", "", tokens).strip() == "quick dog"


def test_an_option_comes_before_an_index():
    assert data.right_option({"source_line": "m:1", "options": ["3", "2", "1"], "answer": "1"}) == 2


@pytest.mark.parametrize("answer, expected", [(1, 1), ("1", 1), ("y", 1), ("x", 0)])
def test_an_answer_is_an_index_or_an_option(answer, expected, tmp_path):
    clips = clips_of(tmp_path, [{"options": ["x", "y"], "answer": answer}], "choice")
    assert clips[0, 0]["label"] == expected


def test_questions_are_answered_by_a_class(tmp_path):            # Sec. 4.2.1
    lines = [{"question": "a dog", "answer": "rice"}, {"question": "a", "answer": "no class"}]
    clips = clips_of(tmp_path, lines, "qa", answers=["ball", "rice"])
    batch = batch_of(clips, [0, 1])
    assert batch["label"].tolist() == [1, -1]
    assert texts_in(clips, batch["text_ids"], batch["text_mask"]) == [
        "[CLS] a dog [SEP]", "[CLS] a [SEP]"]


def test_a_probe_reads_a_class_and_no_words(tmp_path):           # Tab. 12
    clips = clips_of(tmp_path, [{"answer": "rice"}], "probe", answers=["ball", "rice"])
    batch = batch_of(clips, [0])
    assert batch["label"].tolist() == [1] and not any("text" in name for name in batch)


def answers_in(folder, lines):
    (folder / "m.jsonl").write_text(json_lines(*({"video": "a.mp4", **line} for line in lines)))
    return data.answers_of(Manifest(folder / "m.jsonl"))


def test_classes_are_the_answers_by_frequency(tmp_path):
    answers = ["cow", "cow", "dog", 7, "dog", "dog", 7, 7, 7]
    assert answers_in(tmp_path, [{"answer": answer} for answer in answers]) == ["7", "dog", "cow"]


def test_a_list_of_answers_beside_the_manifest_counts(tmp_path):
    (tmp_path / "answers.json").write_text('["cat", "dog", 7, "cat"]')
    assert answers_in(tmp_path, [{"answer": "cow"}, {"answer": "dog"}]) == ["cat", "dog", "7"]


@pytest.mark.parametrize("listed, lines, message", [
    ('["cat"]', [{"answer": "cow"}], "answers.json: holds no answer of .*m.jsonl; it may belong"),
    ('{"cat"', [{"answer": "cat"}], "answers.json: not a JSON list of answers"),
    ("7", [{"answer": "cat"}], "answers.json: not a JSON list of answers, but 7"),
    ('{"cat": 1}', [{"answer": "cat"}], "answers.json: not a JSON list of answers, but {'cat'"),
    (None, [{"text": "a cat"}], 'm.jsonl: no line has an "answer"')])
def test_answers_that_do_not_fit_are_refused(listed, lines, message, tmp_path):
    if listed:
        (tmp_path / "answers.json").write_text(listed)
    with pytest.raises(DataError, match=message):
        answers_in(tmp_path, lines)


@pytest.mark.parametrize("task, line, message", [
    ("choice", {"options": WORDS, "answer": 3}, '"answer" is 3; expected an index into the 3'),
    ("choice", {"options": WORDS, "answer": -1}, '"answer" is -1; expected an index'),
    ("choice", {"options": WORDS}, '"answer" is None; expected an index'),
    ("choice", {"texts": WORDS}, 'lacks "options"; its keys are video, texts'),
    ("qa", {"answer": "a"}, 'lacks "question"'),
    ("qa", {"question": "a", "anwser": "b"}, 'lacks "answer"; rename "anwser" to "answer"'),
    ("probe", {"text": "a"}, 'lacks "answer"'),
    ("retrieval", {"answer": "a"}, 'lacks "text"'),
    ("pretrain", {"caption": "a cat"}, 'lacks "text"; rename "caption" to "text"; its')])
def test_a_line_without_a_tasks_words_is_named(task, line, message, tmp_path):
    with pytest.raises(DataError, match=f"m.jsonl:1: {message}"):
        clips_of(tmp_path, [line], task)[0, 0]


def test_an_unknown_task_is_refused_at_once(tmp_path):
    with pytest.raises(DataError, match="no task 'frame'; expected one of pretrain, retrieval, "
                                        "choice, qa, probe"):
        clips_of(tmp_path, WORDS, "frame")


def test_retrieval_is_scored_on_all_captions(tmp_path):          # Sec. 4.2.2
    film(tmp_path / "b.mp4", "n=12 w=48 h=40")
    lines = [{"texts": WORDS}, {"video": "b.mp4", "text": "rice"}]
    clips = clips_of(tmp_path, lines, "retrieval", train=False)
    batch = batch_of(clips, [0, 1])
    assert batch["text_clip"].tolist() == [0, 0, 0, 1]
    assert texts_in(clips, batch["text_ids"], batch["text_mask"]) == [
        f"[CLS] {text} [SEP]" for text in [*WORDS, "rice"]]


GALLERY = [                            # a line a caption, as tables have it
    {"video": "a.mp4", "text": "a dog"}, {"video": "b.mp4", "texts": ["a cat", "a dog"]},
    {"video": "a.mp4", "text": "a man"}, {"video": "a.mp4", "text": "a dog"},
    {"video": "a.mp4", "text": "rice", "start": 0, "end": 0.2},
    {"video": "b.mp4", "captions": [[0, 1, "a cat"]]}]


def test_lines_of_a_clip_are_one_gallery_entry(tmp_path, capsys):
    film(tmp_path / "b.mp4", "n=12 w=48 h=40")
    clips = clips_of(tmp_path, GALLERY, "retrieval", train=False)
    assert [sample.get("texts") for sample in clips.manifest] == [
        ["a dog", "a man"], ["a cat", "a dog"], ["rice"], None]
    assert [sample["source_line"][-1] for sample in clips.manifest] == ["1", "2", "5", "6"]
    assert "m.jsonl: 6 lines are of 4 clips" in capsys.readouterr().err
    assert batch_of(clips, range(4))["text_clip"].tolist() == [0, 0, 1, 1, 2, 3]
    assert clips.manifest.names == [str(tmp_path / "m.jsonl")]


def test_windows_of_a_film_are_clips_of_their_own(tmp_path):
    lines = [{"start": 1, "end": 2, "text": "a"}, {"start": 1, "end": 3, "text": "b"},
             {"start": 0, "end": 2, "text": "c"}, {"start": 1, "end": 2, "text": "d"}]
    clips = clips_of(tmp_path, lines, "retrieval", train=False)
    assert [sample["texts"] for sample in clips.manifest] == [["a", "d"], ["b"], ["c"]]


def test_members_of_a_shard_are_clips_of_their_own(tmp_path):
    whole = film(tmp_path / "a.mp4", "n=12 w=48 h=40").read_bytes()
    shard = write_shard(tmp_path / "0.tar", {"a.mp4": whole, "a.txt": "a dog", "b.mp4": whole,
                                             "b.txt": "a man"})
    clips = Clips(Manifest(shard), Tokenizer.train(WORDS, 200), "retrieval", 3, 32, 40, False)
    assert len(clips) == 2
    assert len({clips[i, 0]["clip_id"] for i in range(2)}) == 2


def test_columns_are_kept_where_another_manifest_is_merged(tmp_path):
    lines = {"a.jsonl": [{"video": "a.mp4", "text": "a dog", "fr": "un chien"},
                         {"video": "a.mp4", "text": "a man", "fr": "un homme"}],
             "b.jsonl": [{"video": "b.mp4", "text": "rice", "fr": "du riz"}]}
    for name, samples in lines.items():
        (tmp_path / name).write_text(json_lines(*samples))
    manifest = Manifest([tmp_path / name for name in lines], ("text=fr",))
    gallery = data.one_line_per_clip(manifest)
    assert [sample.get("texts") or [sample["text"]] for sample in gallery] == [
        ["un chien", "un homme"], ["du riz"]]
    assert gallery.columns == manifest.columns


def test_a_gallery_of_one_line_a_clip_stays_as_it_is(tmp_path, capsys):
    clips = clips_of(tmp_path, GALLERY[:2], "retrieval", train=False)
    assert clips.manifest.paths == [tmp_path / "m.jsonl"] and not capsys.readouterr().err


def test_every_line_of_a_clip_is_trained_on(tmp_path):
    assert len(clips_of(tmp_path, GALLERY, "retrieval")) == 6


def test_retrieval_trains_on_each_caption_in_turn(tmp_path):
    clips = clips_of(tmp_path, [{"texts": WORDS}], "retrieval")
    batch = batch_of(clips, [0] * 30)
    assert set(texts_in(clips, batch["text_ids"], batch["text_mask"])) == {
        f"[CLS] {text} [SEP]" for text in WORDS}


def false_captions_of(folder, lines, visits=60):
    """What retrieval sets beside the captions of the first line, over many visits; each line is of
    a film of its own, unless it names one."""
    samples = []
    for number, line in enumerate(lines):
        fields = {"text": line} if isinstance(line, str) else line
        samples.append({"video": f"{number}.mp4", **fields})
    clips = clips_of(folder, samples, "retrieval", false_captions=3)
    options = [clips[0, visit]["options"][1:] for visit in range(visits)]
    return {tokens_of(clips.tokenizer, ids)[6:-6] for ids in itertools.chain(*options)}


def test_the_first_option_is_the_clips_caption(tmp_path):
    clips = many_clips(tmp_path, 3, task="retrieval", false_captions=9)
    batch = batch_of(clips, [0, 1, 2])
    m = batch["text_ids"].shape[1]
    assert torch.equal(batch["option_ids"][:, 0, :m], batch["text_ids"])
    assert batch["label"].tolist() == [0, 0, 0] and batch["option_mask"].sum() > 12


def test_false_captions_are_not_those_of_the_clip(tmp_path):
    assert false_captions_of(tmp_path, [{"texts": WORDS[:2]}, WORDS[0], WORDS[2]]) == {WORDS[2]}


def test_captions_of_one_film_are_never_false(tmp_path):
    lines = [{"video": "a.mp4", "text": text} for text in WORDS[:2]]
    lines.append({"video": "other.mp4", "text": WORDS[2]})
    assert false_captions_of(tmp_path, lines) == {WORDS[2]}


def test_every_caption_of_a_false_line_is_drawn(tmp_path):
    assert false_captions_of(tmp_path, ["rice", {"texts": WORDS}]) == set(WORDS)


def test_false_captions_come_from_the_same_manifest(tmp_path):
    lines = [{"video": "a.mp4", "text": "rice"}, {"video": "b.mp4", "text": "a ball"}]
    clips = clips_of(tmp_path, lines, "retrieval", false_captions=9)
    (tmp_path / "other.jsonl").write_text(json_lines({"video": "a.mp4", "text": "dog"}))
    clips.manifest = Manifest([tmp_path / "other.jsonl", tmp_path / "m.jsonl"])
    items = [clips[1, visit] for visit in range(30)]             # "rice", line 1 of the second
    options = set(itertools.chain(*(map(tuple, item["options"]) for item in items)))
    assert options == {tuple(clips.encode("rice")), tuple(clips.encode("a ball"))}


def test_retrieval_can_be_trained_on_binary_matches(tmp_path):   # Sec. 3.3, VTM
    batch = batch_of(many_clips(tmp_path, task="retrieval"), range(8))
    assert batch["vtm_video"].shape == batch["vtm_labels"].shape == (8,)
    assert (batch["vtm_labels"] == 0).any()


@pytest.mark.parametrize("window, expected", [
    ([2, 9], (2, 9)),                  # long enough
    ([6, 8], (5, 9)),                  # widened to 4 s about its middle
    ([0, 2], (0, 3)),                  # but nothing begins before the clip
    ([0.5, 4.5], (0.5, 4.5))])
def test_a_short_window_is_widened_to_four_seconds(window, expected, tmp_path):
    clips = clips_of(tmp_path, [{"captions": [[*window, "a dog"]]}])
    assert clips.read_words(clips.manifest[0])["window"] == expected


WINDOWS = {"captions": [[0, 4, "a dog"], [6, 10, "a man"]]}


def test_captions_follow_from_seed_and_visit_alone(tmp_path):
    clips = clips_of(tmp_path, [{"texts": WORDS}])
    captions = []
    for process in range(2):
        random.seed(process)                                     # each process has its own
        torch.manual_seed(process)
        captions.append([clips[0, visit]["caption"] for visit in range(20)])
    assert captions[0] == captions[1]


def test_training_draws_a_window_with_its_caption(tmp_path):     # HowTo100M
    clips = clips_of(tmp_path, [WINDOWS])
    read = set()
    for visit in range(20):
        item = clips[0, visit]
        read.add((tokens_of(clips.tokenizer, item["caption"]), item["window"]))
    assert read == {("[CLS] a dog [SEP]", (0, 4)), ("[CLS] a man [SEP]", (6, 10))}


def test_only_the_captions_window_is_read(tmp_path):
    film(tmp_path / "a.mp4", "n=300 w=48 h=40 g=30")             # 10 s
    lines = [{"captions": [[2, 6, "a"]]}, {"start": 2, "end": 6, "text": "a"}, "a"]
    clips = clips_of(tmp_path, lines, train=False)
    of_caption, of_line, whole = (clips[i, 0]["video"] for i in range(3))
    assert torch.equal(of_caption, of_line) and not torch.equal(of_caption, whole)


@pytest.mark.parametrize("task, entry", [("pretrain", "caption"), ("retrieval", "all_captions")])
def test_evaluation_reads_the_first_window(task, entry, tmp_path):
    clips = clips_of(tmp_path, [WINDOWS], task, train=False)
    dog = clips.encode("a dog")
    for visit in range(9):
        item = clips[0, visit]
        assert item["window"] == (0, 4) and item[entry] in (dog, [dog])


def test_views_differ_in_time(tmp_path):                         # the 3 x 3 frames of Tab. 2
    clips = clips_of(tmp_path, WORDS, train=False, views=3)
    video = batch_of(clips, [0, 1])["video"]
    assert video.shape == (2, 3, 3, 3, 32, 32)
    assert not torch.equal(video[0, 0], video[0, 1]) and not torch.equal(video[0, 1], video[0, 2])


@pytest.mark.parametrize("line, change", [
    ({"text": "a"}, {"resize": "paper"}), ({"text": "a"}, {"resize": "proportions"}),
    ({"text": "a", "boxes": [[0, 5, 5, 30, 30]]}, {"boxes": False})])
def test_clips_are_read_as_their_fields_say(line, change, tmp_path):
    clips = clips_of(tmp_path, [line], train=False)
    assert not torch.equal(clips[0, 0]["video"], replace(clips, **change)[0, 0]["video"])


@pytest.mark.parametrize("train, least, most", [(True, 5, 20), (False, 1, 1)])
def test_crops_are_random_in_training_alone(train, least, most, tmp_path):
    picture(tmp_path / "i.png", (48, 40))
    clips = clips_of(tmp_path, [{"video": "i.png", "text": "a"}], train=train)
    crops = {clips[0, visit]["video"].numpy().tobytes() for visit in range(20)}
    assert least <= len(crops) <= most


@pytest.mark.parametrize("order, expected", [
    ("forward", [0, 1, 2]), ("reversed", [2, 1, 0]), ("first", [0, 0, 0])])
def test_frames_are_seen_in_the_stated_order(order, expected, tmp_path):
    clips = clips_of(tmp_path, WORDS, train=False)
    video = clips[0, 0]["video"]
    assert torch.equal(replace(clips, order=order)[0, 0]["video"], video[expected])


def test_shuffled_frames_are_the_same_frames(tmp_path):
    clips = clips_of(tmp_path, WORDS, train=False)
    expected = {frame.numpy().tobytes() for frame in clips[0, 0]["video"]}
    orders = set()
    for visit in range(30):
        video = replace(clips, order="shuffled")[0, visit]["video"]
        frames = tuple(frame.numpy().tobytes() for frame in video)
        orders.add(frames)
        assert set(frames) == expected
    assert len(orders) == 6


# ---- Reading in processes that may die -----------------------------------------------------------

class Deadly(Unseen):
    """Clips whose line 3 kills the process that reads it and whose line 6 never returns."""

    def read_video(self, sample):
        line = sample["source_line"].split(":")[-1]
        with open(Path(sample["video"]).parent / "tries", "a") as tries:
            print(line, file=tries)
        if line == "3":
            os._exit(11)
        if line == "6":
            time.sleep(1000)
        return super().read_video(sample)


def read_deadly(folder, begins, workers=1, train=True):
    """Batches of three lines from each of `begins` on; what was tried stands in folder/tries."""
    plain = clips_of(folder, [WORDS[0]] * 9)
    clips = Deadly(plain.manifest, plain.tokenizer, "pretrain", 3, 32, 40, train)
    keys = []
    for begin in begins:
        keys.append([(line, 100 * len(keys) + line) for line in range(begin, begin + 3)])
    return list(data.load(clips, keys, partial(collate, clips=clips), workers, timeout=1))


def test_the_next_line_stands_in_for_an_unreadable_clip(tmp_path):
    batches = read_deadly(tmp_path, [0, 3, 6], workers=3)
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 3], [3, 4, 6], [6, 7, 8]]
    assert [len(batch["unreadable"]) for batch in batches] == [1, 1, 0]


def read_by_one_process(clips, index, visit) -> dict:
    """The item that training gets for a sample."""
    readers = data.Readers(partial(data.read_item, clips), workers=0, timeout=9)
    return data.ItemReader(clips, readers)((index, visit))


def test_a_stand_in_is_read_on_the_same_visit(tmp_path):
    clips = clips_of(tmp_path, [{"video": "gone.mp4", "text": "a"}, WORDS[0]])
    item = read_by_one_process(clips, index=0, visit=7)
    assert torch.equal(item["video"], clips[1, 7]["video"])
    assert not torch.equal(item["video"], clips[1, 0]["video"])


def test_a_stand_in_is_of_the_same_manifest(tmp_path):
    film(tmp_path / "a.mp4", "n=12 w=48 h=40")
    for name, last in (("a", "gone.mp4"), ("b", "a.mp4")):
        lines = [{"video": video, "text": name} for video in ("a.mp4", last)]
        (tmp_path / f"{name}.jsonl").write_text(json_lines(*lines))
    manifest = Manifest([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    clips = Clips(manifest, Tokenizer.train(WORDS, 200), "pretrain", 3, 32, 40, train=True)
    item = read_by_one_process(clips, index=1, visit=0)
    assert item["source_line"] == f"{tmp_path}/a.jsonl:1"


@pytest.fixture(scope="module")
def deadly(tmp_path_factory):
    """Batches of lines 1 to 3 and 4 to 6, each read twice, and how often each line was tried."""
    folder = tmp_path_factory.mktemp("deadly")
    batches = read_deadly(folder, [0, 3, 0, 3])
    return batches, collections.Counter((folder / "tries").read_text().split())


def test_a_reader_that_dies_costs_its_clip(deadly):
    (batch, *_), _ = deadly
    assert batch["unreadable"][0].endswith("m.jsonl:3: took its reader down (exit code 11)")


def test_a_reader_that_hangs_costs_its_clip(deadly):
    (_, batch, *_), _ = deadly
    assert batch["unreadable"][0].endswith("m.jsonl:6: took longer than 1 s to read")


def test_a_deadly_clip_is_remembered(deadly):
    (first, second, *again), tries = deadly
    assert [batch["unreadable"] for batch in again] == [first["unreadable"], second["unreadable"]]
    assert tries["3"] == 2               # once more: a dead reader may have been an accident
    assert tries["6"] == 1


@on_linux
def test_dead_readers_leave_no_descriptors(tmp_path):
    readers = data.Readers(os._exit, 1, 9)
    counts = []
    for code in 3, 3, 3:
        with pytest.raises(Unreadable, match="exit code 3"):
            readers(code)
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[0] == counts[2]


def test_evaluation_replaces_no_clip(tmp_path):
    (batch,) = read_deadly(tmp_path, [0], train=False)
    assert batch["index"].tolist() == [0, 1] and "took its reader down" in batch["unreadable"][0]


class Hanging(Unseen):
    """Clips whose line 1 never comes."""

    def read_video(self, sample):
        if sample["source_line"].endswith(":1"):
            time.sleep(1000)
        return super().read_video(sample)


def test_training_gives_a_clip_up_after_the_timeout(trainer):
    one = trainer("--timeout", 1, "--workers", 1)
    read = one.clips
    one.clips = Hanging(read.manifest, read.tokenizer, "pretrain", 3, 32, 40, train=True)
    stream = one.stream()
    unreadable = []
    for _ in range(3):                                         # 24 clips
        unreadable += next(stream)["unreadable"]
    stream.close()
    assert len(unreadable) == 1 and "longer than 1 s" in unreadable[0]


def test_an_unforeseen_error_costs_its_clip(tmp_path):
    clips = clips_of(tmp_path, [{"text": "a", "boxes": [[0, 9, 9, 1, 1]]}])     # no such rectangle
    assert "cannot be read (ValueError(" in clips[0, 0]["unreadable"][0]


def test_a_manifest_of_unreadable_clips_stops_training(tmp_path):
    clips = clips_of(tmp_path, [{"video": "none.mp4", "text": "a"}] * 3)
    with pytest.raises(DataError, match="3 clips in a row cannot be read, the first: .*none.mp4"):
        list(data.load(clips, [[(0, 0)]], partial(collate, clips=clips), workers=0))


def test_a_deadline_is_that_of_one_task():
    readers = data.Readers(time.sleep, 1, timeout=1)
    readers(0.0)
    process, _ = readers.of_thread.reader
    time.sleep(1.2)
    readers(0.0)
    assert readers.of_thread.reader[0] is process
    process.kill()


def test_a_reader_ends_with_its_trainer():
    readers = data.Readers(time.sleep, 1, timeout=1)
    readers(0.0)
    process, pipe = readers.of_thread.reader
    pipe.close()                             # as the system does when the trainer has been killed
    process.join(20)
    assert process.exitcode == 0


def test_reading_that_ends_early_ends_its_processes():
    readers = data.Readers(time.sleep, 1, timeout=1000)
    stream = readers.ahead(readers, iter([0.0, 1000.0]), depth=1)
    next(stream)
    (process,) = readers.processes
    stream.close()                           # in the middle of the second task
    process.join(20)
    assert not process.is_alive()


def test_a_closed_reader_starts_no_process():
    readers = data.Readers(time.sleep, 1, timeout=1)
    readers.closed = True                    # as when the loop that reads ends early
    with pytest.raises(Unreadable, match="reading has ended"):
        readers(0.0)
    assert not readers.processes


@on_linux
def test_only_cores_of_the_job_are_used(faulty, monkeypatch):
    cores = os.sched_getaffinity(0)
    started = []

    class Recorded(data.Readers):
        def __init__(self, function, workers, timeout):
            started.append(workers)
            super().__init__(function, 0, timeout)

    monkeypatch.setattr(data, "Readers", Recorded)
    os.sched_setaffinity(0, {min(cores)})
    try:
        data.check(faulty)
    finally:
        os.sched_setaffinity(0, cores)
    assert started == [1]


def killed_at_its_start(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_reader_killed_at_its_start_is_unreadable(monkeypatch):            # out of memory
    readers = data.Readers(time.sleep, 1, timeout=1)
    monkeypatch.setattr(data, "serve", killed_at_its_start)
    with pytest.raises(Unreadable, match=r"took its reader down \(exit code -9\)"):
        readers(0.0)


class Sleepy(Clips):
    """Clips that take 6 ms to read on average: each from a quarter of that to seven quarters."""

    def __getitem__(self, key):
        index, visit = key
        time.sleep(0.006 * (0.25 + 1.5 * (visit * 0.618034 % 1)))
        (Path(self.manifest.names[0]).parent / f"{visit}.read").touch()
        return {"index": index, "visit": visit, "unreadable": [], "video": torch.zeros(1),
                "reader": os.getpid()}


def readers_of(items):
    return {item["reader"] for item in items}


def sleepy_stream(folder, micro_batch, accumulation_steps, workers):
    """Micro-batches of Sleepy clips, read two steps ahead."""
    plain = clips_of(folder, WORDS)
    clips = Sleepy(plain.manifest, plain.tokenizer, "pretrain", 3, 32, 40, True)
    step_clips = micro_batch * accumulation_steps
    sampler = BatchSampler([3], step_clips, 0, accumulation_steps=accumulation_steps, steps=10**6)
    return data.load(clips, sampler, readers_of, workers, clips_ahead=2 * step_clips)


def clips_read(folder) -> int:
    """How many clips have been read, once no further one is read."""
    count = -1
    while count != len(list(folder.glob("*.read"))):
        count = len(list(folder.glob("*.read")))
        time.sleep(0.2)
    return count


@pytest.mark.parametrize("micro_batch, accumulation_steps", [(64, 1), (16, 8)])
def test_two_steps_are_read_while_the_gpu_computes(micro_batch, accumulation_steps, tmp_path):
    stream = sleepy_stream(tmp_path, micro_batch, accumulation_steps, workers=3)
    for _ in range(accumulation_steps):
        next(stream)
    assert clips_read(tmp_path) == 3 * micro_batch * accumulation_steps
    stream.close()


@pytest.mark.skipif(not FULL, reason="FULL=1 runs it: it measures seconds, on an idle machine")
@pytest.mark.parametrize("micro_batch, accumulation_steps", [
    (16, 1), (64, 1), (128, 1), (16, 8)])
def test_a_gpu_seldom_waits_for_clips(micro_batch, accumulation_steps, tmp_path):
    """Readers are 1.5 times as fast as a sleeping "GPU", during which the loop cannot fetch."""
    step_clips = micro_batch * accumulation_steps
    stream = sleepy_stream(tmp_path, micro_batch, accumulation_steps, workers=3)
    started = set()
    while len(started) < 3:
        started |= next(stream)
    begin = time.monotonic()                    # how fast they are on this machine
    for _ in range(128 // micro_batch):
        next(stream)
    gpu_seconds = 1.5 * (time.monotonic() - begin) / 128 * step_clips
    idle = 0.0
    for _ in range(10):
        time.sleep(gpu_seconds)
        begin = time.monotonic()
        for _ in range(accumulation_steps):
            next(stream)
        idle += time.monotonic() - begin
    stream.close()
    assert idle / (idle + 10 * gpu_seconds) < 0.25


@pytest.mark.parametrize("image_size, views, expected", [
    (32, 1, 100),              # as many as asked for
    (4096, 1, 7),              # 151 MB a clip: as many as READ_AHEAD, 1 GiB, holds
    (1024, 16, 7)])
def test_reading_ahead_stays_within_its_bytes(image_size, views, expected, tmp_path):
    plain = clips_of(tmp_path, WORDS)
    clips = Sleepy(plain.manifest, plain.tokenizer, "pretrain", 3, image_size, 40, True,
                   views=views)
    keys, taken = [[(0, visit)] for visit in range(300)], []
    watched = (taken.append(key) or key for key in keys)
    stream = data.load(clips, watched, len, workers=1, clips_ahead=100)
    next(stream)
    stream.close()
    assert len(taken) == 1 + expected


FAULTS = [  # a line, and the faults that the data doctor finds in it
    ({"video": "a.mp4", "text": "a dog"}, []),
    ({"video": "gone.mp4", "text": "a cat"}, ["missing file"]),
    ({"video": "bad.mp4", "text": "a cow"}, ["unreadable"]),
    ({"video": "short.mp4", "text": "a hen"}, ["short clip"]),
    ({"video": "a.png", "text": "a fox"}, []),                            # an image has one frame
    ({"video": "a.mp4", "text": " "}, ["empty text"]),
    ({"video": "a.mp4", "text": "so many words " * 20}, ["text too long"]),
    ({"video": "b.mp4", "text": "a dog"}, ["duplicate caption"]),
    ({"video": "a.mp4", "text": "a pig"}, []),
    ({"video": "a.mp4"}, ["bad line"]),
    ({"video": "a.mp4", "text": "x", "start": math.nan}, ["bad line"]),
    ({"video": "a.mp4", "options": ["a", "b"], "answer": 2}, ["bad line"]),
    ({"video": "a.mp4", "options": ["a", "b"], "answer": 1}, []),
    ({"video": "a.mp4", "question": "a?"}, ["bad line"]),
    ({"video": "a.mp4", "question": "a?", "answer": "a"}, []),
    ({"video": "a.mp4", "captions": [[0, 1]]}, ["bad line"]),
    ({"video": "a.mp4", "text": "half \ud83d"}, []),
    ({"video": "a.mp4", "captions": [[0, 1, "a"], [9, 12, "b"]]}, ["caption outside the clip"]),
]


@pytest.fixture
def faulty(tmp_path) -> Path:
    """A manifest of the lines of FAULTS."""
    for name in ("a.mp4", "b.mp4"):
        film(tmp_path / name, "n=12")
    film(tmp_path / "short.mp4", "n=2")
    picture(tmp_path / "a.png")
    (tmp_path / "bad.mp4").write_bytes(b"no film")
    (tmp_path / "m.jsonl").write_text(json_lines(*(line for line, _ in FAULTS)) + "\nno JSON\n")
    return tmp_path / "m.jsonl"


def test_the_data_doctor_names_every_fault(faulty):
    expected = collections.defaultdict(list)
    for number, (_, faults) in enumerate(FAULTS, 1):
        for fault in faults:
            expected[fault].append(number)
    expected["bad line"].append(len(FAULTS) + 2)                          # a blank one comes before
    found = {}
    for fault, details in data.check(faulty, workers=1, timeout=30).items():
        found[fault] = [int(re.match(r".*?m\.jsonl:(\d+)", detail)[1]) for detail in details]
    assert found == expected


def test_the_data_doctor_names_paths_that_are_no_utf_8(tmp_path, capsys):
    (tmp_path / "m.jsonl").write_text('{"video": "a\\udcff.mp4", "text": "a dog"}\n')
    assert list(data.check(tmp_path / "m.jsonl", workers=0)) == ["missing file"]
    assert "a\\udcff.mp4: no such file" in capsys.readouterr().out


def test_captions_of_a_clip_of_unknown_length_are_not_outside_it(tmp_path):
    (tmp_path / "frames").mkdir()
    for number in range(3):
        picture(tmp_path / "frames" / f"{number}.png")
    (tmp_path / "m.jsonl").write_text(json_lines(
        {"video": "frames", "captions": [[1, 5, "a dog"]]}))
    assert "caption outside the clip" not in data.check(tmp_path / "m.jsonl", workers=0)


def test_the_data_doctor_goes_on_after_a_bad_row(tmp_path):
    film(tmp_path / "a.mp4", "n=12")
    (tmp_path / "a.csv").write_text("video,text,start,end\na.mp4,x,5,3\na.mp4,y,0,1\n")
    assert list(data.check(tmp_path / "a.csv", workers=0)) == ["bad line"]


def test_the_clean_manifest_holds_the_usable_lines(faulty, capsys):
    data.check(faulty, workers=0)
    clean = Manifest(faulty.with_name("m.clean.jsonl"))
    fatal = {"missing file", "unreadable", "empty text", "bad line"}
    usable = [line for line, faults in FAULTS if not fatal & set(faults)]
    assert [sample.get("text") for sample in clean] == [
        line.get("text", "").replace("\ud83d", "\ufffd") or None for line in usable]
    assert f"{len(usable)} of {len(FAULTS) + 1} samples are usable: " in capsys.readouterr().out
    assert not data.check(faulty.with_name("m.clean.jsonl"), workers=0).keys() & fatal


def test_no_clean_manifest_is_written_without_lines(faulty, capsys):
    faulty.write_text('{"video": "gone.mp4", "text": "x"}\n')
    faulty.with_name("m.clean.jsonl").write_text("that of an earlier check")
    data.check(faulty, workers=0)
    assert "0 of 1 samples are usable: no clean manifest is written" in capsys.readouterr().out
    assert faulty.with_name("m.clean.jsonl").read_text() == "that of an earlier check"


def test_a_script_without_a_main_guard_is_told_so(faulty):
    script = faulty.with_name("script.py")
    script.write_text(f"import sys; sys.path.insert(0, {str(HERE)!r}); import data\n"
                      f"data.check({str(faulty)!r}, workers=2)\n")
    printed = faulty.with_name("printed")
    process = FORKS.Process(target=command, args=([str(script)], {}, printed))
    process.start()
    process.join()
    assert process.exitcode == 1
    assert printed.read_text().count("Traceback") == 1
    assert re.search('RuntimeError: no reading process can start.*`if __name__ == "__main__":`',
                     printed.read_text())
    assert not faulty.with_name("m.clean.jsonl").exists()


def test_each_manifest_has_a_clean_one(tmp_path):
    film(tmp_path / "a.mp4", "n=12")
    (tmp_path / "a").mkdir()
    shutil.copy(tmp_path / "a.mp4", tmp_path / "a" / "a.mp4")
    write_files(tmp_path, {"a/a.txt": "folder", "a.csv": "video,text\na.mp4,csv\n",
                           "a.tsv": "video\ttext\na.mp4\ttsv\n",
                           "a.jsonl": '{"video": "a.mp4", "text": "jsonl"}'})
    write_shard(tmp_path / "a.tar", {"a.mp4": (tmp_path / "a.mp4").read_bytes(), "a.txt": "tar"})
    for name in ("a", "a.csv", "a.tsv", "a.jsonl", "a.tar"):
        assert data.check(tmp_path / name, workers=0) == {}
    for name, text in [("a.folder", "folder"), ("a.csv", "csv"), ("a.tsv", "tsv"), ("a", "jsonl"),
                       ("a.tar", "tar")]:
        (sample,) = Manifest(tmp_path / f"{name}.clean.jsonl")
        assert sample["text"] == text


def test_the_data_doctor_says_how_many_processes(tmp_path, capsys):
    film(tmp_path / "a.mp4", "n=12")
    (tmp_path / "a.csv").write_text("name,said\na.mp4,a dog\n")
    data.main(["check", str(tmp_path / "a.csv"), "--columns", "video=name", "text=said",
               "--workers", "0", "--gpu", "1000"])
    rate, processes, workers = re.search(
        r"your clips decode at (\d+) per CPU-second: a GPU that trains on 1000 clips/s needs "
        r"(\d+) reading processes \(--workers (\d+)\)", capsys.readouterr().out).groups()
    assert abs(int(processes) - 1000 / int(rate)) < 1.1
    assert workers == processes


# ---- The toy set ---------------------------------------------------------------------------------

def toy_clips(count):
    rng = random.Random(7)
    return [data.ToyClip.sample(rng) for _ in range(count)], rng


def test_a_toy_clip_and_its_twin_hold_the_same_frames(tmp_path):
    for clip in toy_clips(6)[0]:
        decoded = []
        for one in clip, clip.twin():
            data.write_clip(tmp_path / "a.mp4", one.frames(), 4, data.TOY_X264)
            decoded.append(decode(tmp_path / "a.mp4", range))
        assert torch.equal(decoded[0], decoded[1].flip(0))       # in reverse, bit for bit
        assert clip.caption() != clip.twin().caption()
        assert clip.twin().twin() == clip


@pytest.mark.parametrize("start_light, order, expected", [
    (0, 0, "red green blue"), (0, 1, "red blue green"), (1, 0, "green blue red"),
    (2, 1, "blue green red")])
def test_a_toy_caption_says_what_red_turns_into(start_light, order, expected):
    (clip,), _ = toy_clips(1)
    clip = replace(clip, start_light=start_light, order=order, brightness=1.0)
    corners = [tuple(frame[0, 0]) for frame in clip.frames()]
    lights = dict(zip(data.LIGHTS, ("red", "green", "blue")))
    assert [lights[corner] for corner in corners[::4]] == expected.split()
    assert corners[::4] == corners[3::4]                         # four frames in each light
    cycle = (expected + " " + expected).split()
    assert f"red turns {cycle[cycle.index('red') + 1]}" in clip.caption()


def test_toy_options_are_distinct_and_one_is_right():
    clips, rng = toy_clips(300)
    places = collections.defaultdict(collections.Counter)
    for clip in clips:
        for sample in clip.choices(rng):
            options = sample["options"]
            expected = {"appearance": 4, "order": 2}[sample["kind"]]
            assert len(set(options)) == len(options) == expected
            assert [option == clip.caption() for option in options].index(True) == sample["answer"]
            places[sample["kind"]][sample["answer"]] += 1
    for kind, chance in ("appearance", 1 / 4), ("order", 1 / 2):
        for count in places[kind].values():
            assert abs(count / 300 - chance) < 0.09              # the place tells nothing


def test_the_wrong_order_is_the_twins_caption():
    clips, rng = toy_clips(20)
    for clip in clips:
        appearance, order = clip.choices(rng)
        assert set(order["options"]) == {clip.caption(), clip.twin().caption()}
        assert clip.twin().caption() not in appearance["options"]


def test_toy_questions_have_the_clips_answers():
    (clip,), _ = toy_clips(1)
    clip = replace(clip, shape="ring", colour="white", order=1)
    assert [(sample["kind"], sample["answer"]) for sample in clip.questions()] == [
        ("shape", "ring"), ("colour", "white"), ("order", "blue")]


@pytest.mark.parametrize("shape, colour, centre, edge", [
    ("square", "white", 255, 255), ("square", "black", 0, 0), ("ring", "white", None, 255)])
def test_a_toy_object_is_drawn_at_its_centre(shape, colour, centre, edge):
    (clip,), _ = toy_clips(1)
    clip = replace(clip, shape=shape, colour=colour, x=40, y=38, radius=14)
    frame = clip.frames()[0]
    light = frame[0, 0].tolist()
    assert frame[38, 40].tolist() == (light if centre is None else [centre] * 3)
    assert frame[38, 52].tolist() == frame[26, 40].tolist() == [edge] * 3
    hole = light if centre is None else [centre] * 3
    assert frame[38, 47].tolist() == frame[31, 40].tolist() == hole      # 7 of 14 pixels out
    assert frame[38, 55].tolist() == frame[23, 40].tolist() == light


def test_a_split_of_the_toy_set_has_these_manifests(tmp_path):
    (tmp_path / "clips").mkdir()
    data.toy_split(tmp_path, "val", 40, random.Random(0))
    lines = {path.name: lines_of(path) for path in tmp_path.glob("*.jsonl")}
    assert {name: len(samples) for name, samples in lines.items()} == {
        "val.jsonl": 40, "choice_val.jsonl": 80, "qa_val.jsonl": 120, "probe_val.jsonl": 40,
        "image_val.jsonl": 40, "retrieval_val.jsonl": 8}         # 2 shapes, 2 colours, 2 orders
    for name, task in [("val", "pretrain"), ("choice_val", "choice"), ("qa_val", "qa"),
                       ("probe_val", "probe"), ("retrieval_val", "retrieval"),
                       ("image_val", "pretrain")]:
        manifest = Manifest(tmp_path / f"{name}.jsonl")
        clips = Clips(manifest, Tokenizer.train(WORDS, 99), task, 3, 32, 40, train=False)
        assert clips[0, 0]["video"].shape == ((1 if "image" in name else 3), 3, 32, 32)
    captions = [sample["text"] for sample in lines["val.jsonl"]]
    assert len(set(captions)) == 16 and len(set(captions[::2])) > 8      # both wordings


@pytest.fixture
def small_toy(monkeypatch, tmp_path) -> Path:
    """A toy set of four clips a split."""
    monkeypatch.setattr(data, "SPLITS", {"train": 4, "val": 4, "test": 4})
    return data.toy(tmp_path / "toy")


def test_no_toy_clip_stands_in_two_splits(small_toy):
    contents = [path.read_bytes() for path in small_toy.glob("clips/*.mp4")]
    assert len(contents) == len(set(contents)) == 12


def test_another_seed_is_another_toy_set(small_toy):
    assert data.toy(small_toy, seed=0) == small_toy
    with pytest.raises(DataError, match="is another toy set or none"):
        data.toy(small_toy, seed=1)


def test_the_toy_set_replaces_no_other_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="is another toy set or none; give another folder"):
        data.toy(tmp_path)


@pytest.mark.parametrize("flags, report", [
    ("", "1 of 1 samples are usable"),
    ("--frames 12", "1 of 1 samples are usable"),
    ("--frames 13", "short clip: 1, such as\n    .*:1: has 12 frames, fewer than 13"),
    ("--max_text_len 3", "1 of 1 samples are usable"),
    ("--max_text_len 2", "text too long: 1, such as\n    .*:1: a dog runs"),
    ("--max_text_len 3 --vocab {vocab}", "text too long"),                # [CLS] a dog runs [SEP]
    ("--workers 1 --timeout 0.0001", "unreadable: 1, such as\n    .*: took longer than 0.0001 s"),
])
def test_flags_of_the_data_doctor(flags, report, tmp_path, capsys):
    film(tmp_path / "a.mp4", "n=12")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\ndog\nruns\n")
    (tmp_path / "m.jsonl").write_text(json_lines({"video": "a.mp4", "text": "a dog runs"}))
    flags = flags.format(vocab=tmp_path / "vocab.txt").split()
    data.main(["check", str(tmp_path / "m.jsonl"), "--workers", "0", *flags])
    printed = capsys.readouterr().out
    assert re.match(report, printed.strip())


# ---- Every data set in its owners' form ----------------------------------------------------------
# Each test shows lines of the published files, the clips on disk, and the samples that they give.
# Clips that no sample may hold are on disk too.

@pytest.fixture
def converted(tmp_path):
    """converted(data set, {annotation file: content}, clips) -> {split or "answers": its content}.

    Content is text, bytes or what a .json holds. The clips are empty files. In the samples that
    come back "video" is relative to the folder of the clips.
    """
    def run(name, notes, clips, annotations=("",)):
        write_source_files(tmp_path / "notes", notes)
        write_source_files(tmp_path / "clips", dict.fromkeys(clips, ""))
        out = tmp_path / "out"
        convert(name, [tmp_path / "notes" / path for path in annotations], tmp_path / "clips", out)
        manifests = {}
        for path in out.glob("*.jsonl"):
            manifests[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
            for sample in manifests[path.stem]:
                sample["video"] = os.path.relpath(out / sample["video"], tmp_path / "clips")
        if (out / "answers.json").exists():
            manifests["answers"] = json.loads((out / "answers.json").read_text())
        return manifests
    return run


def write_source_files(folder, contents):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, (list, dict)):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def json_lines(*objects):
    return "".join(json.dumps(item) + "\n" for item in objects)


def test_webvid_has_one_caption_a_row(converted):
    notes = {"results_2M_train.csv": """videoid,contentUrl,duration,page_dir,name
7,https://x/7.mp4,PT10S,000001_000050,"A ""red"" car,
parked"
8,https://x/8.mp4,PT10S,000001_000050,in another folder
9,https://x/9.mp4,PT10S,000001_000050,
"""}
    clips = ["000001_000050/7.mp4", "000001_000050/9.mp4", "000051_000100/8.mp4", "7.txt"]
    assert converted("webvid", notes, clips) == {"train": [
        {"video": "000001_000050/7.mp4", "text": 'A "red" car, parked'}]}


def test_webvid_comes_in_partitions_too(converted):
    header = "videoid,contentUrl,duration,page_dir,name\n"
    notes = {"data/train/partitions/0000.csv": f"{header}7,u,PT10S,p,a car\n",
             "data/train/partitions/0001.csv": f"{header}8,u,PT10S,p,a dog\n",
             "data/val/partitions/0000.csv": f"{header}9,u,PT10S,p,a cat\n"}
    assert converted("webvid", notes, ["7.mp4", "8.mp4", "9.mp4"]) == {
        "train": [{"video": "7.mp4", "text": "a car"}, {"video": "8.mp4", "text": "a dog"}],
        "val": [{"video": "9.mp4", "text": "a cat"}]}


@pytest.mark.parametrize("notes", [
    {"caption.json": {"-tCQ4tCQdWE": {"start": [0.41, 3.9, 6.0], "end": [3.91, 5, 8.5],
                                      "text": ["pic", "", "bowl"]}}},
    {"-tCQ4tCQdWE.csv": "start,end,text\n0.41,3.91,pic\n3.9,5.0,\n6.0,8.5,bowl\n",
     "HowTo100M_v1.csv": "video_id,category_1,category_2,rank,task_id\n-tCQ4tCQdWE,a,b,1,2\n"}])
def test_howto100m_has_windows_of_each_video(notes, converted):
    clips = ["food/-tCQ4tCQdWE.webm", "food/-tCQ4tCQdWE.csv", "HowTo100M_v1.mp4"]
    assert converted("howto100m", notes, clips) == {"train": [
        {"video": "food/-tCQ4tCQdWE.webm", "captions": [[0.41, 3.91, "pic"], [6.0, 8.5, "bowl"]]}]}


def test_videos_of_the_same_words_all_count(converted):
    notes = dict.fromkeys(["-tCQ4tCQdWE.csv", "b/9bZkp7q19f0.csv", "c/9bZkp7q19f0.csv"],
                          "start,end,text\n0,1,pic\n")
    train = converted("howto100m", notes, ["-tCQ4tCQdWE.mp4", "9bZkp7q19f0.mp4"])["train"]
    assert [sample["video"] for sample in train] == ["-tCQ4tCQdWE.mp4", "9bZkp7q19f0.mp4"]


@pytest.mark.parametrize("file, pack", [
    ("WAaKRUoY6Io.grover.json", str.encode), ("000of100.jsonl", str.encode),
    ("000of100.jsonl.gz", lambda text: gzip.compress(text.encode()))])
def test_yttemporal_joins_words_of_12_seconds(file, pack, converted):
    words = [("b", 12.4), ("a", 0), ("c", 12.5), ("&gt", 3), ("gt;", 4), ("late", 90)]
    subtitles = [{"word": word, "time": time} for word, time in words]
    video = {"info": {"id": "WAaKRUoY6Io"}, "denoised": [], "subtitles": subtitles}
    notes = {file: pack(json_lines(video)), "WAaKRUoY6Io.info.json": {"id": "WAaKRUoY6Io"}}
    clips = ["data/WAaKRUoY6Io.mp4", "data/WAaKRUoY6Io.info.json", "data/late.mp4"]
    assert converted("yttemporal", notes, clips) == {"train": [
        {"video": "data/WAaKRUoY6Io.mp4",
         "captions": [[0, 12.5, "a b"], [12.5, 25, "c"], [90, 102.5, "late"]]}]}


@pytest.mark.parametrize("saved_as", ["{index}_{checksum}", "7{index}_{checksum}", "{checksum}",
                                      "training/{checksum}.jpg"])
def test_cc3m_images_are_named_by_checksum(saved_as, converted):
    names = [saved_as.format(index=index, checksum=zlib.crc32(url))
             for index, url in enumerate([b"http://x/a", b"http://x/b"])]
    notes = {"Train_GCC-training.tsv": 'a "big" dog\thttp://x/a\n"a cat\thttp://x/b\n',
             "Validation_GCC-1.1.0-Validation.tsv": "gone\thttp://x/c\n"}
    assert converted("cc3m", notes, [*names, "0_12", "12"]) == {"train": [
        {"video": names[0], "text": 'a "big" dog', "image": True},
        {"video": names[1], "text": '"a cat', "image": True}]}


def test_coco_has_several_captions_an_image(converted):
    notes = {"captions_train2014.json": {
        "images": [{"id": 9, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 9, "caption": "one"}, {"image_id": 9, "caption": " "},
                        {"image_id": 8, "caption": "x"}, {"image_id": 9, "caption": "two"}]}}
    assert converted("coco", notes, ["a.jpg", "c.jpg"]) == {"train": [
        {"video": "a.jpg", "texts": ["one", "two"]}]}


def test_coco_restval_of_karpathy_trains(converted):
    notes = {"dataset_coco.json": {"images": [
        {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "in test\n1"}]},
        {"filename": "b.jpg", "split": "restval", "sentences": [{"raw": "in restval"}]},
        {"filename": "c.jpg", "split": "val", "sentences": [{"raw": "gone"}]}]}}
    assert converted("coco", notes, ["a.jpg", "b.jpg"]) == {
        "train": [{"video": "b.jpg", "texts": ["in restval"]}],
        "test": [{"video": "a.jpg", "texts": ["in test 1"]}]}


# The numbers of MSR-VTT's videos on both sides of each border of its splits.
MSRVTT_VIDEOS = ["video0", "video6512", "video6513", "video7009", "video7010", "video9999"]
MSRVTT_CLIPS = [f"{video}.mp4" for video in [*MSRVTT_VIDEOS, "video10000"]]
ONE_K_A = "key,vid_key,video_id,sentence\nret0,msr7010,video7010,\"a man, talking\"\n"


def msrvtt_notes(*videos):
    sentences = [{"sen_id": 0, "video_id": video, "caption": f"{video} {i}"}
                 for i in "ab" for video in videos]
    return {"info": {}, "videos": [], "sentences": sentences}


def two_captions(*videos):
    return [{"video": f"{video}.mp4", "texts": [f"{video} a", f"{video} b"]} for video in videos]


MSRVTT = {"train_val_videodatainfo.json": msrvtt_notes(*MSRVTT_VIDEOS[:4]),
          "test_videodatainfo.json": msrvtt_notes("video7010", "video9999", "video10000")}


def test_msrvtt_full_splits_by_number(converted):                                       # Tab. 3a
    assert converted("msrvtt_full", MSRVTT, MSRVTT_CLIPS) == {
        "train": two_captions("video0", "video6512"),
        "val": two_captions("video6513", "video7009"),
        "test": two_captions("video7010", "video9999")}


@pytest.mark.parametrize("name, training", [
    ("msrvtt_9k", ["video9999", "video0", "video6512", "video6513", "video7009"]),
    ("msrvtt_7k", ["video0", "video6512", "video6513", "video7009"])])
def test_msrvtt_1k_a_trains_on_the_rest(name, training, converted):                     # Tab. 3a
    notes = {**MSRVTT, "MSRVTT_JSFUSION_test.csv": ONE_K_A}
    assert converted(name, notes, MSRVTT_CLIPS) == {
        "train": two_captions(*training),
        "test": [{"video": "video7010.mp4", "texts": ["a man, talking"]}]}


def test_msrvtt_training_needs_its_test_list(converted):
    with pytest.raises(DataError, match="MSRVTT_JSFUSION_test.csv is missing"):
        converted("msrvtt_9k", MSRVTT, MSRVTT_CLIPS)


def test_msr_vtt_json_has_the_form_of_coco(converted):
    notes = {"MSR_VTT.json": {"images": [{"id": "video0"}], "annotations": [
        {"image_id": "video0", "caption": "x"}, {"image_id": "video6513", "caption": "y"}]}}
    assert converted("msrvtt_full", notes, MSRVTT_CLIPS) == {
        "train": [{"video": "video0.mp4", "texts": ["x"]}],
        "val": [{"video": "video6513.mp4", "texts": ["y"]}]}


def test_msrvtt_mc_has_five_captions_a_row(converted):                                  # Tab. 4a
    notes = {"MSR_MC_test.csv": "\tkey\tvid_key\ta1\ta2\ta3\ta4\ta5\tanswer\n"
                                "0\tmc0\tmsr7010\ta\tb\tc\td\te\t3\n"}
    assert converted("msrvtt_mc", notes, ["video7010.mp4", "msr7010.mp4"]) == {"test": [
        {"video": "video7010.mp4", "options": ["a", "b", "c", "d", "e"], "answer": 3}]}


def test_msrvtt_mc_of_clipbert(converted):
    notes = {"msrvtt_mc_test.jsonl": json_lines(
        {"qid": 0, "clip_name": "video7010", "options": ["a", "b", "c", "d", "e"], "answer": 1})}
    assert converted("msrvtt_mc", notes, MSRVTT_CLIPS) == {"test": [
        {"video": "video7010.mp4", "options": ["a", "b", "c", "d", "e"], "answer": 1}]}


def test_msrvtt_mc_training_draws_only_wrong_options(converted):
    captions = {"video0": ["a dog", "A  dog", "it runs"], "video1": ["A DOG", "a cat", "x"],
                "video2": ["a cat", "y", "z", "u", "v", "w"]}
    notes = {"train_val_videodatainfo.json": {"sentences": [
        {"video_id": video, "caption": text} for video, texts in captions.items()
        for text in texts]}}
    train = converted("msrvtt_mc", notes, MSRVTT_CLIPS)["train"]
    assert [sample["options"][0] for sample in train] == ["a dog", "A dog", "it runs"]
    for sample in train:
        assert sample["video"] == "video0.mp4" and sample["answer"] == 0
        assert len(sample["options"]) == len(set(sample["options"])) == 5
        assert set(sample["options"][1:]) <= {"a cat", "x", "y", "z", "u", "v", "w"}


MSRVTT_QUESTION = {"answer": "man", "category_id": 14, "id": 1, "question": "Who is it?",
                   "video_id": 6513}
MSVD_QUESTION = {"answer": "man", "id": 1, "question": "Who is it?", "video_id": 1}


def test_msrvtt_qa_numbers_its_videos(converted):                                       # Tab. 2b
    notes = {"train_qa.json": [MSRVTT_QUESTION, {**MSRVTT_QUESTION, "video_id": 1}]}
    assert converted("msrvtt_qa", notes, ["video6513.mp4", "vid1.mp4"]) == {
        "train": [{"video": "video6513.mp4", "question": "Who is it?", "answer": "man",
                   "kind": "who"}],
        "answers": ["man"]}


def test_msrvtt_qa_of_clipbert(converted):
    notes = {"msrvtt_qa_test.jsonl": json_lines(
        {"answer": "man", "question": "who is it?", "video_id": "video0", "answer_type": "x"})}
    assert converted("msrvtt_qa", notes, MSRVTT_CLIPS) == {"test": [
        {"video": "video0.mp4", "question": "who is it?", "answer": "man", "kind": "who"}]}


@pytest.mark.parametrize("mapping", ["youtube_mapping.txt", "youtube_video_to_id_mapping.txt"])
@pytest.mark.parametrize("clip", ["-4wsuPCjDBc_5_15.avi", "vid1.avi"])
def test_msvd_qa_clips_have_two_names(clip, mapping, converted):                        # Tab. 2c
    notes = {"val_qa.json": [MSVD_QUESTION, {**MSVD_QUESTION, "video_id": 2}],
             mapping: "-4wsuPCjDBc_5_15 vid1\n-7KMZQEsJW4_205_208 vid2\n"}
    assert converted("msvd_qa", notes, [clip, "video1.avi", "1.avi"]) == {"val": [
        {"video": clip, "question": "Who is it?", "answer": "man", "kind": "who"}]}


@pytest.mark.parametrize("name, clip", [("msrvtt_qa", "video6513.mp4"), ("msvd_qa", "vid1.avi")])
def test_questions_of_two_data_sets_stay_apart(name, clip, converted, capsys):
    notes = {"MSVD-QA/test_qa.json": [MSVD_QUESTION], "MSRVTT-QA/test_qa.json": [MSRVTT_QUESTION]}
    both = converted(name, notes, ["video6513.mp4", "video1.mp4", "vid1.avi", "vid6513.avi"])
    assert [sample["video"] for sample in both["test"]] == [clip]
    assert re.search("left out 1 .*/test_qa.json: columns answer", capsys.readouterr().out)


@pytest.mark.parametrize("name, published, size, row", [
    ("msrvtt_qa", "train_qa.json", 1500, MSRVTT_QUESTION),
    ("msvd_qa", "train_qa.json", 1000, MSVD_QUESTION),
    ("tgif_frameqa", "frameqa_train.jsonl", 1540,
     {"gif_name": "video6513", "question": "q", "answer_type": "object"})])
def test_the_commonest_training_answers_are_classes(name, published, size, row, converted):
    answers = ["rare", "common", "common", *map(str, range(1600)), "common"]        # Sec. 4.2.1
    notes = {published: json_lines(*({**row, "answer": answer} for answer in answers))}
    if published.endswith(".json"):
        notes = {published: [{**row, "answer": answer} for answer in answers]}
    listed = converted(name, notes, ["video6513.mp4", "vid1.avi"])["answers"]
    assert listed == ["common", "rare", *map(str, range(size - 2))]          # ties: by appearance


def test_answers_count_for_clips_that_are_not_there_too(converted):
    rows = [{**MSVD_QUESTION, "video_id": 1, "answer": "man"}]
    rows += 2 * [{**MSVD_QUESTION, "video_id": 2, "answer": "dog"}]
    manifests = converted("msvd_qa", {"train_qa.json": rows, "youtube_mapping.txt": "a_1_2 vid1\n"},
                          ["vid1.avi"])
    assert [sample["answer"] for sample in manifests["train"]] == ["man"]
    assert manifests["answers"] == ["dog", "man"]


def test_msvd_splits_by_the_mappings_numbers(converted):
    notes = {"AllVideoDescriptions.txt": "# a remark\n\nab_1_2 a man, who sings\nab_1_2 a singer\n"
                                         "c_0_9 a dog\nd_0_1 a cow\ne_0_1 gone\nf_0_1 no number\n",
             "youtube_mapping.txt": "ab_1_2 vid1200\nd_0_1 vid1201\nc_0_9 vid1301\ne_0_1 vid5\n"}
    assert converted("msvd", notes, ["ab_1_2.avi", "vid1201.avi", "c_0_9.avi", "f_0_1.avi"]) == {
        "train": [{"video": "ab_1_2.avi", "texts": ["a man, who sings", "a singer"]}],
        "val": [{"video": "vid1201.avi", "texts": ["a cow"]}],
        "test": [{"video": "c_0_9.avi", "texts": ["a dog"]}]}


@pytest.mark.parametrize("name, notes", [
    ("msvd", {"AllVideoDescriptions.txt": "ab_1_2 a man\n"}),
    ("msvd_qa", {"test_qa.json": [MSVD_QUESTION]})])
def test_msvd_without_a_mapping_asks_for_it(name, notes, converted):
    with pytest.raises(DataError, match="youtube_mapping.txt"):
        converted(name, notes, ["ab_1_2.avi"])


@pytest.mark.parametrize("name, file", [("tgif_action", "{}_action_question.csv"),      # Tab. 2a
                                        ("tgif_transition", "{}_transition_question.csv")])
def test_tgif_choices_have_five_options(name, file, converted):
    header = "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey\n"
    notes = {file.format("Test"): f"{header}n_400\tWhat, 4 ?\ta\tb\tc\td\te\t2\tACTION4\t5\n",
             file.format("Total"): f"{header}n_400\tin all\ta\tb\tc\td\te\t2\tACTION4\t5\n",
             "Test_count_question.csv": "gif_name\tquestion\tanswer\nn_400\thow many ?\t2\n"}
    assert converted(name, notes, ["gifs/n_400.gif", "gifs/n_4.gif"]) == {"test": [
        {"video": "gifs/n_400.gif", "question": "What, 4 ?", "options": ["a", "b", "c", "d", "e"],
         "answer": 2}]}


def test_tgif_action_of_clipbert(converted):
    notes = {"action_test.jsonl": json_lines(
        {"gif_name": "n_400", "question": "What ?", "options": ["a", "b", "c", "d", "e"],
         "answer": 4})}
    assert converted("tgif_action", notes, ["gifs/n_400.gif"]) == {"test": [
        {"video": "gifs/n_400.gif", "question": "What ?", "options": ["a", "b", "c", "d", "e"],
         "answer": 4}]}


def test_tgif_frameqa_names_its_four_types(converted):                                  # Tab. 2a
    notes = {"Train_frameqa_question.csv":
             "gif_name\tquestion\tanswer\ttype\tvid_id\tkey\tdescription\n"
             "n_1\tq ?\tcat\t0\tFRAMEQA1\t1\ta cat\n"
             "n_1\tq ?\ttwo\t1\tFRAMEQA2\t2\ttwo dogs\n"
             "n_1\tq ?\tred\t2\tFRAMEQA3\t3\ta red car\n"
             "n_1\tq ?\troom\t3\tFRAMEQA4\t4\tin a room\n"}
    train = converted("tgif_frameqa", notes, ["gifs/n_1.gif"])["train"]
    assert train[0] == {"video": "gifs/n_1.gif", "question": "q ?", "answer": "cat",
                        "kind": "object"}
    assert [sample["kind"] for sample in train] == ["object", "number", "color", "location"]


def test_tgif_frameqa_of_clipbert(converted):
    notes = {"frameqa_test.jsonl": json_lines(
        {"gif_name": "n_1", "question": "q ?", "answer": "cat", "answer_type": "object"})}
    assert converted("tgif_frameqa", notes, ["gifs/n_1.gif"]) == {"test": [
        {"video": "gifs/n_1.gif", "question": "q ?", "answer": "cat", "kind": "object"}]}


def test_tvqa_reads_frames_of_a_window(converted):                                      # App. A
    row = {"q": "Why ?", "a0": "v", "a1": "w", "a2": "x", "a3": "y", "a4": "z", "answer_idx": 3,
           "vid_name": "met_s01_seg02_clip_00", "show_name": "HIMYM", "qid": 1}
    notes = {"tvqa_val.jsonl": json_lines({**row, "ts": "7.5-20"}, {**row, "ts": "nan-nan"}),
             "tvqa_test_public.jsonl": json_lines({**row, "ts": "1-2", "answer_idx": None})}
    frames = ["met_frames/met_s01_seg02_clip_00/00001.jpg", "met_s01/00001.jpg"]
    question = {"video": "met_frames/met_s01_seg02_clip_00", "fps": 3, "question": "Why ?",
                "options": ["v", "w", "x", "y", "z"], "answer": 3}
    assert converted("tvqa", notes, frames) == {"test": [
        {**question, "start": 7.5, "end": 20}, question]}


SCENE = "1010_TITANIC_00.03.06.170-00.03.09.675"
LATER = "1010_TITANIC_00.03.06.170-00.03.09.680"


def test_lsmdc_has_a_caption_a_line(converted):
    notes = {"LSMDC16_challenge_1000_publictect.csv":
             f'{SCENE}\t00.03.06.170\t00.03.09.675\t00.03.06\t00.03.09\t"Hi, SOMEONE\n'
             f"{LATER}\t00.03.06.170\t00.03.09.680\t00.03.06\t00.03.09\tgone\n"}
    clips = [f"1010_TITANIC/{SCENE}.avi", "1010_TITANIC/1010_TITANIC_00.03.06.170-00.03.09.avi"]
    assert converted("lsmdc", notes, clips) == {"test": [
        {"video": f"1010_TITANIC/{SCENE}.avi", "text": '"Hi, SOMEONE'}]}


@pytest.mark.parametrize("file, split, end, answer", [                                  # Tab. 4b
    ("LSMDC16_multiple_choice_train.csv", "train", "", 0),
    ("LSMDC16_multiple_choice_valid.csv", "val", "", 0),
    ("LSMDC16_multiple_choice_test_randomized.csv", "test", "\t5", 4)])
def test_lsmdc_choices_count_from_one(file, split, end, answer, converted):
    notes = {file: f"{SCENE}\t0\t1\t0\t1\t\"a\tb\tc\td\te{end}\n"}
    assert converted("lsmdc_mc", notes, [f"{SCENE}.avi", f"{LATER}.avi"]) == {split: [
        {"video": f"{SCENE}.avi", "options": ['"a', "b", "c", "d", "e"], "answer": answer}]}


def test_didemo_joins_the_descriptions_of_videos(converted):                            # Tab. 3c
    texts = [("1@N00_2_ab.mov", "a cat"), ("4@N00_5_cd.avi", "dog"), ("1@N00_2_ab.mov", "it\nr ")]
    notes = {"test_data.json": [
        {"annotation_id": 1, "description": text, "video": video, "times": [[0, 0], [1, 4]],
         "num_segments": 6, "dl_link": ""} for video, text in texts]}
    assert converted("didemo", notes, ["1@N00_2_ab.mov.mp4", "4@N00_5_cd.avi", "2_ab.mov"]) == {
        "test": [{"video": "1@N00_2_ab.mov.mp4", "text": "a cat it r"},
                 {"video": "4@N00_5_cd.avi", "text": "dog"}]}


@pytest.mark.parametrize("video, clip", [
    *[(f"1@N00_2_ab{ending}", f"1@N00_2_ab{ending}.mp4") for ending in
      (".wmv", ".mts", ".m2ts", ".3g2", ".3gp", ".MOV", ".mpeg", ".")],
    ("1@N00_2_ab.wmv", "1@N00_2_ab.mp4"), ("1@N00_2_ab.", "1@N00_2_ab"),
    ("1@N00_2_ab.mp4", "1@N00_2_ab.M2TS"),
    ("1@N00 2  ab.mp4", "1@N00 2  ab.mp4"), ("1@N00_2_ab.mov", "1@N00_2_ab..mp4")])
def test_endings_of_videos_do_not_matter(video, clip, converted):
    notes = {"test_data.json": [{"description": "a cat", "video": video}]}
    assert converted("didemo", notes, [clip, "1@N00_2_a.mp4"]) == {"test": [
        {"video": clip, "text": "a cat"}]}


def test_two_names_of_a_video_are_one_sample(converted):
    notes = {"test_data.json": [{"description": "a cat", "video": "1@N00_2_ab.mov"},
                                {"description": "a dog", "video": "1@N00_2_ab.mp4"},
                                {"description": "it runs", "video": "1@N00_2_ab."}]}
    assert converted("didemo", notes, ["1@N00_2_ab.mp4"]) == {"test": [
        {"video": "1@N00_2_ab.mp4", "text": "a cat a dog it runs"}]}


@pytest.mark.parametrize("clips", [["v_QOl.mp4"], ["QOl.mkv", "QOl.webp"], ["QOl/000.jpg"]])
def test_activitynet_joins_the_sentences_of_videos(clips, converted):                   # Tab. 3b
    notes = {"val_1.json": {"v_QOl": {
                 "duration": 82.73, "timestamps": [[0.8, 19.9], [17.4, 60.8]],
                 "sentences": ["A woman dances.", "  She turns."]}},
             "val_2.json": {"v_QOl": {"timestamps": [[0, 1]], "sentences": ["Of val 2."]}}}
    video = clips[0].removesuffix("/000.jpg")
    assert converted("activitynet", notes, [*clips, "v_Q.mp4"]) == {"test": [
        {"video": video, "text": "A woman dances. She turns."}]}


def test_activitynet_of_clipbert(converted):
    notes = {"train.jsonl": json_lines({"clip_name": "v_QOl", "caption": "One. Two."})}
    assert converted("activitynet", notes, ["QOl.mp4"]) == {"train": [
        {"video": "QOl.mp4", "text": "One. Two."}]}


VCR_ROW = {"img_fn": "lsmdc_a/x@0.jpg", "objects": ["person", "person", "bottle", "dog", "cup"],
           "question": ["Why", "near", [1], "?"], "answer_label": 1, "rationale_label": 0,
           "answer_choices": [["He", "is"], [[3], "ran"], [[2], "ran"], ["no"]],
           "rationale_choices": [[[1, 4], "run"], ["a"], ["b"], ["c"]]}
VCR = {"val.jsonl": json_lines({**VCR_ROW, "img_fn": "gone.jpg"}, VCR_ROW),
       "../clips/lsmdc_a/x@0.json":
           {"boxes": [[9 * i, 1, 9 * i + 5, 6, 0.99] for i in range(5)]}}


# Numbers by mention: person 1 is 0, dog 3 is 1, bottle 2 is 2, cup 4 is 3.
@pytest.mark.parametrize("name, expected", [                                     # Tab. 5, Fig. 5
    ("vcr_qa", {"question": "Why near person 0 ?", "answer": 1, "kind": "Q→A",
                "options": ["He is", "dog 1 ran", "bottle 2 ran", "no"],
                "boxes": [[0, 9, 1, 14, 6], [1, 27, 1, 32, 6], [2, 18, 1, 23, 6]]}),
    ("vcr_qar", {"question": "Why near person 0 ? dog 1 ran", "answer": 0, "kind": "QA→R",
                 "options": ["person 0 cup 3 run", "a", "b", "c"],
                 "boxes": [[0, 9, 1, 14, 6], [1, 27, 1, 32, 6], [3, 36, 1, 41, 6]]})])
def test_vcr_numbers_objects_by_mention(name, expected, converted):
    assert converted(name, VCR, ["lsmdc_a/x@0.jpg", "lsmdc_b/x@0.jpg"]) == {"test": [
        {"video": "lsmdc_a/x@0.jpg", **expected}]}


def test_vcr_without_boxes_says_where_they_are(converted):
    notes = {"val.jsonl": json_lines({**VCR_ROW, "img_fn": "y@0.jpg"})}
    with pytest.raises(DataError, match="y@0.json: is missing; vcr1images.zip"):
        converted("vcr_qa", notes, ["y@0.jpg"])


@pytest.mark.parametrize("clip", ["-3B_000059_000069.mp4", "arm wrestling/-3B.mp4",
                                  "arm_wrestling/-3B.mp4",
                                  "arm wrestling/-3B_000059_000069.mkv"])
def test_kinetics_has_a_label_a_clip(clip, converted):                                  # Tab. 12
    notes = {"train.csv": "label,youtube_id,time_start,time_end,split\n"
                          '"arm wrestling",-3B,59,69,train\n',
             "validate.csv": "label,youtube_id,time_start,time_end,split\nyoga,-4C,1,11,val\n",
             "other/val.csv": "video_id,sentence\n-3B,a caption of another data set\n"}
    assert converted("kinetics400", notes, [clip, "-3B_000060_000070.mp4"]) == {
        "train": [{"video": clip, "answer": "arm wrestling"}], "answers": ["arm wrestling"]}


def test_hmdb51_reads_split_one(converted):                                             # Tab. 12
    notes = {"walk_test_split1.txt": "a_walk_0.avi 1 \n#20_walk_1.avi 1 \n#20_walk_2.avi 2 \n"
                                     "c_walk_3.avi 0 \n",
             "brush_hair_test_split1.txt": "b.avi 2 \n",
             "brush_hair_test_split2.txt": "b.avi 1 \n"}
    clips = ["walk/a_walk_0.avi", "walk/#20_walk_1.avi", "walk/#20_walk_2.avi", "walk/b.avi",
             "walk/c_walk_3.avi", "brush_hair/b.avi"]
    assert converted("hmdb51", notes, clips) == {
        "train": [{"video": "walk/a_walk_0.avi", "answer": "walk"},
                  {"video": "walk/#20_walk_1.avi", "answer": "walk"}],
        "test": [{"video": "brush_hair/b.avi", "answer": "brush hair"},
                 {"video": "walk/#20_walk_2.avi", "answer": "walk"}],
        "answers": ["walk"]}


def test_ego4d_choices_are_four_seconds(converted):                                     # Tab. 13
    notes = {"mc_val.csv": '''question,answers
"['u-1', 300, ""#C C's pan""]","[['u-1', 1, 'cuts'], ['u-2', 2, ""#C C's pan""]]"
"['u-2', 30, 'cuts']","[['u-1', 1, 'cuts'], ['u-2', 2, 'pan']]"
'''}
    assert converted("ego4d_mc", notes, ["u-1.mp4", "u-2.mp4", "u.mp4"]) == {"test": [
        {"video": "u-1.mp4", "start": 8, "end": 12, "options": ["cuts", "#C C's pan"], "answer": 1},
        {"video": "u-2.mp4", "start": 0, "end": 3, "options": ["cuts", "pan"], "answer": 0}]}


ANET = {"val_1.json": {"v_QOl": {"timestamps": [[0, 1]], "sentences": ["A dog."]}}}


@pytest.mark.parametrize("clips, taken", [
    (["QOl.mp4", "QOl.webp"], "QOl.mp4"), (["QOl.jpg", "QOl.webm"], "QOl.webm"),
    (["QOl.mkv", "QOl.png"], "QOl.mkv"), (["a/QOl.jpg", "b/QOl.mp4"], "b/QOl.mp4"),
    (["QOl/1.jpg", "QOl.mp4"], "QOl.mp4"), (["QOl/1.jpg", "QOl.jpg"], "QOl"),
    (["QOl/notes.txt", "QOl.jpg"], "QOl.jpg"), (["QOl.gif", "QOl.mp4"], "QOl.mp4"),
    (["QOl.mp4.part", "QOl.f137.mp4", "QOl.info.json", "QOl.webm"], "QOl.webm")])
def test_films_go_before_folders_before_pictures(clips, taken, converted, capsys):
    assert converted("activitynet", ANET, clips)["test"][0]["video"] == taken
    assert "more than once" not in capsys.readouterr().out


def test_a_name_with_its_ending_is_preferred(converted):
    notes = {"dataset_coco.json": {"images": [
        {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "a dog"}]}]}}
    assert converted("coco", notes, ["a.mp4", "a.jpg"])["test"][0]["video"] == "a.jpg"


def test_a_lone_thumbnail_is_reported(converted, capsys):
    notes = {"val_1.json": {video: {"timestamps": [[0, 1]], "sentences": ["A dog."]}
                            for video in ("v_QOl", "v_abc")}}
    converted("activitynet", notes, ["QOl.mp4", "abc.webp"])
    assert re.search("some clips are there as a picture only.*abc.webp", capsys.readouterr().out)


@pytest.mark.parametrize("clips", [["QOl.mkv", "QOl.mp4"], ["a/QOl.mp4", "b/QOl.mp4"]])
def test_two_films_of_a_name_are_reported(clips, converted, capsys):
    assert converted("activitynet", ANET, clips)["test"][0]["video"] == clips[0]
    assert re.search(f"1 clips are there more than once.*{clips[0]} and .*{clips[1]}",
                     capsys.readouterr().out)


@pytest.mark.parametrize("link, target", [("all", "a"), ("QOl.mp4", "a/QOl.mp4")])
def test_links_to_a_film_are_no_duplicates(link, target, converted, tmp_path, capsys):
    write_source_files(tmp_path, {"clips/a/QOl.mp4": ""})
    (tmp_path / "clips" / link).symlink_to(target)
    assert converted("activitynet", ANET, [])["test"]
    assert "more than once" not in capsys.readouterr().out


@pytest.mark.parametrize("copies, annotations", [
    (["a/val_1.json", "b/val_1.json"], [""]), (["val_1.json", "b/val1.json"], [""]),
    (["a/val_1.json"], ["a", "b/../a", "a/val_1.json"])])
def test_copies_of_an_annotation_file_count_once(copies, annotations, converted, tmp_path):
    (tmp_path / "notes" / "b").mkdir(parents=True)
    notes = dict.fromkeys(copies, ANET["val_1.json"])
    assert len(converted("activitynet", notes, ["QOl.mp4"], annotations)["test"]) == 1


def test_shards_with_copies_count_once(converted):
    notes = {"a/train_val_videodatainfo.json": msrvtt_notes("video0"),
             "b/train_val_videodatainfo.json": msrvtt_notes("video0"),
             "b/test_videodatainfo.json": msrvtt_notes("video9999")}
    assert converted("msrvtt_full", notes, MSRVTT_CLIPS) == {
        "train": two_captions("video0"), "test": two_captions("video9999")}


@pytest.mark.parametrize("name, notes", [
    ("activitynet", {"a/val_1.json": ANET["val_1.json"],
                     "b/val_1.json": {"v_QOl": {"timestamps": [], "sentences": ["B."]}}}),
    ("msrvtt_full", {"a/test_videodatainfo.json": msrvtt_notes("video9998"),
                     "b/test_videodatainfo.json": msrvtt_notes("video9999")}),
    ("webvid", {"results_10M_val.csv": "videoid,page_dir,name\n7,p,a car\n",
                "results_2M_val.csv": "videoid,page_dir,name\n8,p,a dog\n"}),
    ("hmdb51", {"a/run_test_split1.txt": "a.avi 1\n", "b/run_test_split1.txt": "a.avi 2\n"})])
def test_different_files_of_a_split_are_refused(name, notes, converted):
    with pytest.raises(DataError, match=" and .*".join(notes)):
        converted(name, notes, ["QOl.mp4", "a.avi", "video9999.mp4"])


def test_missing_splits_and_clips_are_reported(converted, capsys):
    notes = {"results_2M_train.csv": "videoid,page_dir,name\n7,p,a car\n8,p,gone\n9,p,\n"}
    converted("webvid", notes, ["7.mp4", "9.mp4"])
    printed = capsys.readouterr().out
    assert "train: 1 samples of 1 clips written, such as p/7\n" in printed
    assert re.search("train: 1 samples of 1 clips not under .*, such as p/8\n", printed)
    assert "train: 1 samples of 1 clips without text, such as p/9\n" in printed
    assert "val: no annotation file is named results_*_val.csv or val/partitions" in printed


def test_manifests_of_an_earlier_conversion_step_aside(converted, tmp_path, capsys):
    earlier = {"train.jsonl": "old", "answers.json": "old", "mine.txt": "x"}
    write_source_files(tmp_path / "out", earlier)
    converted("activitynet", ANET, ["QOl.mp4"])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["answers.json.old", "mine.txt", "test.jsonl", "train.jsonl.old"]
    assert "train.jsonl was there before and is now train.jsonl.old" in capsys.readouterr().out


def test_no_earlier_conversion_is_lost(converted, tmp_path):
    write_source_files(tmp_path / "out", {"train.jsonl": "new", "train.jsonl.old": "old"})
    converted("activitynet", ANET, ["QOl.mp4"])
    assert (tmp_path / "out" / "train.jsonl.old").read_text() == "old"
    assert (tmp_path / "out" / "train.jsonl.old2").read_text() == "new"


def test_a_stray_quote_in_an_annotation_file_is_refused(converted):
    rows = [f"ret{i},msr{i},video{i},a cat" for i in range(10)]
    rows[3] = 'ret3,msr3,video3,"a cat'
    notes = {"MSRVTT_JSFUSION_test.csv": "\n".join(["key,vid_key,video_id,sentence", *rows])}
    with pytest.raises(DataError, match="_test.csv:5: a quote that opens here swallows the rows"):
        converted("msrvtt_9k", notes, MSRVTT_CLIPS)


KINETICS_ROWS = "label,youtube_id,time_start,time_end\nyoga,-3B,59,69\n"


@pytest.mark.parametrize("name, file, content", [
    ("msrvtt_9k", "ret.csv", ONE_K_A), ("msrvtt_9k", "ret.txt", ONE_K_A.replace(",", "\t")),
    ("kinetics400", "my_val_list.csv", KINETICS_ROWS),
    ("tgif_action", "Test_action.tsv", "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\n"
                                       "-3B\tq\ta\tb\tc\td\te\t2\n"),
    ("msrvtt_qa", "my_test.json", [{**MSRVTT_QUESTION, "video_id": 7010}])])
def test_a_renamed_file_is_known_by_content(name, file, content, converted):
    clips = ["video7010.mp4", "-3B.mp4"]
    assert len(converted(name, {file: content}, clips, [file])["test"]) == 1
    with pytest.raises(DataError, match="nothing to write"):
        converted(name, {file: content}, clips, [""])                     # a folder: by name


@pytest.mark.parametrize("name, file", [
    ("tgif_action", "Test_transition_question.csv"), ("tgif_action", "mine.csv"),
    ("tgif_action", "train_and_test.csv")])
def test_a_doubtful_file_is_not_taken(name, file, converted):
    notes = {file: "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\n-3B\tq\ta\tb\tc\td\te\t2\n"}
    with pytest.raises(DataError, match="nothing to write.*{train,val,test}_action_"):
        converted(name, notes, ["-3B.gif"], [file])


@pytest.mark.parametrize("content", [
    ONE_K_A.replace("a man, talking", "a café").encode(encoding)
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252")] + [
    "key;vid_key;video_id;sentence\r\nret0;msr7010;video7010;a café\r\n".encode("utf-8-sig"),
    "key\tvid_key\tvideo_id\tsentence\r\nret0\tmsr7010\tvideo7010\ta café\r\n".encode("utf-16")])
def test_tables_are_read_as_programs_save_them(content, converted):
    notes = {"MSRVTT_JSFUSION_test.csv": content}
    assert converted("msrvtt_9k", notes, MSRVTT_CLIPS) == {"test": [
        {"video": "video7010.mp4", "texts": ["a café"]}]}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name, file, content, clip", [
    ("howto100m", "caption.json", {"QOl": {"start": [0], "end": [1], "text": ["é"]}}, "QOl.mp4"),
    ("activitynet", "train.jsonl", {"clip_name": "v_QOl", "caption": "é"}, "QOl.mp4"),
    ("hmdb51", "run_test_split1.txt", "QOl.avi 1\n", "QOl.avi")])
def test_marked_encodings_are_read(name, file, content, clip, encoding, converted):
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    assert converted(name, {file: text.encode(encoding)}, [clip])["train"][0]["video"] == clip


def test_half_an_emoji_is_replaced(converted):
    notes = {"train.jsonl": '{"clip_name": "v_QOl", "caption": "a dog \\ud83d"}'}
    assert converted("activitynet", notes, ["QOl.mp4"])["train"][0]["text"] == "a dog \ufffd"


def test_huge_caption_files_are_read_in_pieces(tmp_path):
    captions = {f"id{i}": {"start": [i], "text": ['a {"b": 1}, \\ é']} for i in range(50)}
    path = tmp_path / "caption.json"
    path.write_text(json.dumps(captions, indent=1))
    for chunk in 1, 7, 1 << 20:
        assert dict(data.read_items(str(path), chunk)) == captions
    path.write_text("{}")
    assert dict(data.read_items(str(path))) == {}


@pytest.mark.parametrize("name, notes, annotations, message", [
    ("imagenet", {}, [""], "no data set 'imagenet'.*webvid, howto100m"),
    ("didemo", {"readme.txt": ""}, [""], "test: no annotation file is named test_data.json"),
    ("didemo", {}, ["gone.json"], "gone.json: no such file or folder"),
    ("didemo", {"annotations.zip": "PK"}, [""], "annotations.zip; unpack"),
    ("didemo", {"data.tar.gz": "x"}, ["data.tar.gz"], "data.tar.gz; unpack"),
    ("didemo", {"test_data.json": [{"video": "y", "description": "a"}], "../clips/v.zip": "PK"},
     [""], "v.zip; unpack"),
    ("didemo", {"my_test.csv": "a,b\n1,2\n"}, ["my_test.csv"], "not read: 1 files.*my_test.csv"),
    ("didemo", {"test_data.json": "[{"}, [""], "test_data.json: not as published.*Expecting"),
    ("didemo", {"test_data.json": [{"video": "x.mp4", "description": ""}]}, [""],
     "without text, such as x"),
    ("howto100m", {"caption.json": '{"a": {"start": [0], "end": [1], "text": ["b"]}'}, [""],
     "caption.json.*its end is missing: download it again"),
    ("vcr_qa", {"../out/train.jsonl": ""}, ["../out"], "lie in --out"),
    ("vcr_qa", {"../out/train.jsonl": ""}, ["../out/train.jsonl"], "lie in --out"),
    ("webvid", {"results_2M_train.csv": "id,name\n1,x\n"}, [""], "2M_train.csv: columns id, name"),
    ("msrvtt_qa", {"test_qa.json": [MSVD_QUESTION]}, [""], "test_qa.json: columns answer, id"),
    ("msrvtt_9k", {"x.txt": ""}, [""], "expected MSRVTT_JSFUSION_test.csv, and ")])
def test_what_is_wrong_is_said(name, notes, annotations, message, converted, tmp_path):
    with pytest.raises(DataError, match=message) as error:
        converted(name, notes, ["x.mp4", "video1.mp4"], annotations)
    assert "\n" not in str(error.value)
    assert not {path.name for path in tmp_path.glob("out/*")} - {"train.jsonl"}


def test_the_help_of_convert_names_each_data_set_and_its_files(capsys):
    with pytest.raises(SystemExit):
        data.main(["convert", "--help"])
    printed = capsys.readouterr().out
    for name, dataset in data.DATASETS.items():
        assert f"  {name}: {dataset.expected()}" in printed


def test_keys_behind_long_values_are_seen(tmp_path):           # of VCR and COCO
    (tmp_path / "a.json").write_text(json.dumps([{"objects": "person " * 5000, "question": 1}]))
    assert data.columns_of(str(tmp_path / "a.json")) == {"objects", "question"}


@pytest.mark.parametrize("videos, message", [
    ("gone", "--videos .*gone: no such folder"), ("a.zip", "a.zip: no such folder; unpack it")])
def test_the_folder_of_clips_must_exist(videos, message, tmp_path):
    write_source_files(tmp_path, {"notes/val_1.json": ANET["val_1.json"], "a.zip": "PK"})
    with pytest.raises(DataError, match=message):
        convert("activitynet", [tmp_path / "notes"], tmp_path / videos, tmp_path / "out")


# ---- Training (Sec. 4.1.2) ----------------------------------------------------------------------

@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder of 24 toy clips and 10 images, with a manifest for each task."""
    folder = tmp_path_factory.mktemp("clips")
    rng = random.Random(0)
    lines = collections.defaultdict(list)
    for i in range(24):
        toy = data.ToyClip.sample(rng)
        video = f"{i}.mp4"
        data.write_clip(folder / video, toy.frames(), 4, {"crf": "18"})
        caption = toy.caption()
        twin = toy.twin().caption()
        lines["train"].append({"video": video, "text": caption})
        lines["choice"].append(
            {"video": video, "options": [caption, twin], "answer": 0, "kind": "order"})
        if i < 10:
            image = picture(folder / f"{i}.png").name
            lines["images"].append({"video": image, "text": caption})
        if i < 7:
            lines["retrieval"].append({"video": video, "texts": [caption, f"{i} {caption}"]})
            lines["qa"].append({"video": video, "question": "what shape is it?",
                                "answer": caption.split()[i % 2]})
    lines["no_answer"].append({"video": "0.mp4", "options": ["a ring", "a square"]})
    lines["gone"].append({"video": "gone.mp4", "text": "a"})
    lines["gone_answer"].append({"video": "gone.mp4", "answer": "a"})
    lines["misspelt"].append({"video": "0.mp4", "question": "a", "anwser": "a"})
    for name, samples in lines.items():
        (folder / f"{name}.jsonl").write_text(json_lines(*samples))
    return folder


TINY_RUN = ("--width 32 --depth 2 --heads 2 --image_size 32 --vocab train --batch 8 --workers 0 "
            "--lr 1e-3 --steps 12 --save_every 2 --log_every 1").split()
TUNING = "--batch 4 --steps 3 --workers 0 --log_every 1".split()


def run(module, *arguments, code=0) -> str:
    """What a command line prints, or its error; in this process for speed."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main([str(argument) for argument in arguments])
            returned = 0
        except SystemExit as stop:
            returned = stop.code
        except (ValueError, OSError) as error:     # what the last lines of train.py, eval.py catch
            returned = 1
            print(error, file=err)
    assert returned == code, err.getvalue()
    return err.getvalue() if code in (1, 2) else out.getvalue()


def pretrain(clips, out, *flags, code=0) -> str:
    """What train.py prints about 12 steps of a tiny model."""
    return run(train, "--data", clips / "train.jsonl", "--out", out, *TINY_RUN, *flags, code=code)


def fine_tune(task, manifest, out, whole_run, *flags, code=0) -> str:
    """What train.py prints about 3 steps from the checkpoint of another run."""
    return run(train, "--task", task, "--data", manifest, "--init", whole_run / "checkpoint.pt",
               "--out", out, *TUNING, *flags, code=code)


def lines_of(path, first=0) -> list[dict]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()[first:]]


def absolute(manifest) -> list[str]:
    """The lines of a manifest, to be used in another folder."""
    text = manifest.read_text().replace('"video": "', f'"video": "{manifest.parent}/')
    return text.splitlines(True)


def records(out) -> list[dict]:
    """The lines of a run's log that tell of steps."""
    return [line for line in lines_of(out / "log.jsonl") if "lr" in line]


def finished(out) -> tuple[dict, list]:
    """(checkpoint, [step, learning rate, losses, norm] of each line of the log) of a run folder."""
    names = ("step", "lr", *OBJECTIVES, *SCORES, "grad_norm")
    losses = []
    for record in records(out):
        losses.append([record[name] for name in names if name in record])
    return torch.load(out / "checkpoint.pt", weights_only=True), losses


def same_bits(run_folder, other_folder):
    """Two run folders hold the same weights, optimiser state, best and numbers of every step."""
    saved, losses = finished(run_folder)
    expected, expected_losses = finished(other_folder)
    assert losses == expected_losses
    assert len(losses) == expected["state"]["step"]
    if (other_folder / "best.pt").exists():
        saved["best"] = torch.load(run_folder / "best.pt")["model"]
        expected["best"] = torch.load(other_folder / "best.pt")["model"]
    for key in ("model", "optimizer", "scaler", "state", "best"):
        torch.testing.assert_close(saved.get(key), expected.get(key), rtol=0, atol=0)


@pytest.fixture(scope="session")
def whole_run(clips, tmp_path_factory) -> Path:
    """A run of 12 steps that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    pretrain(clips, out)
    return out


@pytest.fixture
def trainer(clips, tmp_path):
    """A function of flags that sets up a run on 24 clips, in a world of one."""
    runs = []

    def set_up(*flags) -> train.Trainer:
        for earlier in runs:
            earlier.lock.close()
        flags = ["--data", clips / "train.jsonl", *TINY_RUN, "--out", tmp_path / "run", *flags]
        config, model_fields, overrides = train.configure([str(flag) for flag in flags])
        one = train.Trainer(config, model_fields, overrides, torch.device("cpu"))
        runs.append(one.run)
        return one
    with eval.joined_processes():
        yield set_up


# ---- Training: schedule, recipes, flags (Sec. 4.1.2)

@pytest.mark.parametrize("step, lr", [
    (0, 1e-5), (1, 2e-5), (8, 9e-5), (9, 1e-4),        # rises for a tenth of the steps
    (10, 1e-4), (55, 5e-5), (98, 1e-4 * 2 / 90), (99, 1e-4 / 90)])
def test_the_learning_rate_rises_then_falls(step, lr):
    assert train.lr_at(step, steps=100, peak=1e-4, warmup=0.1) == pytest.approx(lr)


def test_a_warmup_of_1_is_a_share():
    assert train.lr_at(49, steps=100, peak=1e-4, warmup=1.0) == pytest.approx(5e-5)


@pytest.mark.parametrize("step, lr", [(0, 1e-4 / 2500), (2499, 1e-4), (101_250, 5e-5)])
def test_a_warmup_above_1_counts_steps(step, lr):                             # the release's
    assert train.lr_at(step, steps=200_000, peak=1e-4, warmup=2500) == pytest.approx(lr)


def test_each_step_has_its_learning_rate(whole_run):
    expected = [train.lr_at(step, 12, 1e-3, 0.1) for step in range(12)]
    assert [record["lr"] for record in records(whole_run)] == expected


def recipe(*flags) -> dict:
    """What a recipe sets, for 100,000 samples on 32 processes."""
    config, fields, _ = train.configure(["--data", "x.jsonl", *flags])
    layout = train.split_batch(config, samples=100_000, world=32)
    return {"batch": layout.batch, "clips of a GPU": layout.micro_batch, "lr": config.lr,
            "length": config.epochs or config.steps, "warmup": config.warmup,
            "beta2": config.beta2, "weight decay": config.weight_decay,
            "objectives": " ".join(config.objectives),
            "roll": fields.get("roll", "paper"), "answer head": fields.get("answer_head", "paper"),
            "head lr": config.head_lr, "whole words": config.whole_words}


PAPER = {"batch": 256, "clips of a GPU": 8, "lr": 1e-4, "length": 20, "warmup": 0.1,
         "beta2": 0.999, "weight decay": 0.01, "roll": "paper", "answer head": "paper",
         "head lr": 1, "whole words": False}                                   # Sec. 4.1.2


DEFAULTS = {  # of TrainConfig
    "steps": 200_000, "batch_per_gpu": 16, "lr": 1e-4, "warmup": 0.1, "weight_decay": 0.01,
    "variant": "B", "objectives": ("vtm", "mlm"), "vocab": "bert-base-uncased",     # Sec. 4.1.2
    "beta2": 0.999, "head_lr": 1.0, "resize": "release", "boxes": True, "whole_words": False,
    "false_captions": 15, "precision": "auto",                   # the paper is silent
    "task": "pretrain", "recipe": "paper", "init": "scratch", "freeze": (), "epochs": 0, "batch": 0,
    "data": (), "val": (), "mix": (), "columns": (), "out": "", "seed": 0,
    "compile": False, "activation_checkpointing": False,
    "workers": 8, "timeout": 120, "val_every": 0, "log_every": 50, "save_every": 1000}


def test_the_defaults_of_training_are_these_numbers():
    assert asdict(train.TrainConfig()) == DEFAULTS


@pytest.mark.parametrize("task, differs", [
    ("pretrain", {"batch": 512, "clips of a GPU": 16, "length": 200_000, "objectives": "vtm mlm"}),
    ("retrieval", {"objectives": "vtc rank"}),
    ("choice", {"objectives": "choice"}),
    ("qa", {"objectives": "qa"}),
    ("probe", {"objectives": "probe", "answer head": "linear"})])
def test_the_default_recipe_is_the_papers(task, differs):
    assert recipe("--task", task) == {**PAPER, **differs}


@pytest.mark.parametrize("task, differs", [
    ("pretrain", {"batch": 4096, "clips of a GPU": 16, "length": 200_000, "warmup": 2500,
                  "objectives": "vtm mlm wpa", "whole words": True}),
    ("retrieval", {"batch": 1024, "length": 200, "lr": 3e-4, "objectives": "vtc rank"}),
    ("choice", {"objectives": "choice"}),
    ("qa", {"batch": 512, "clips of a GPU": 16, "objectives": "qa", "answer head": "release",
            "head lr": 10}),
    ("probe", {"objectives": "probe", "answer head": "linear", "length": 50, "lr": 3e-4})])
def test_the_releases_recipe_is_selected_whole(task, differs):
    expected = {**PAPER, "beta2": 0.98, "roll": "release", **differs}
    assert recipe("--task", task, "--recipe", "release") == expected


def test_the_releases_recipe_shuffles_patches():
    _, fields, overrides = train.configure(["--data", "x", "--recipe", "release"])
    assert (fields["patch_order"], fields["roll_unimodal"]) == ("random", False)
    assert overrides["patch_order"] == "random"            # over those of an --init, too


def test_a_flag_has_the_last_word():
    config, fields, _ = train.configure(
        "--data x --recipe release --beta2 0.9 --roll paper --batch 96".split())
    assert (config.beta2, fields["roll"], config.batch) == (0.9, "paper", 96)


@pytest.mark.parametrize("variant, width", [("nano", 64), ("Ti", 192), ("S", 384), ("L", 1024)])
def test_a_variant_has_its_width(variant, width):
    _, fields, _ = train.configure(["--data", "x", "--variant", variant])
    assert fields["width"] == width


def test_flags_of_steps_replace_epochs():
    config, _, _ = train.configure("--task qa --data x --steps 7".split())
    assert (config.steps, config.epochs) == (7, 0)


def test_without_data_toy_clips_are_trained():
    config, fields, _ = train.configure(["--task", "qa"])
    assert (config.data, config.variant) == (("data/toy/qa_train.jsonl",), "nano")
    assert fields["image_size"] == 48


@pytest.mark.parametrize("task, steps, batch", [
    ("pretrain", 2400, 16), ("retrieval", 300, 8), ("choice", 200, 16), ("qa", 200, 16),
    ("probe", 600, 16)])
def test_toy_tasks_have_recipes_of_their_own(task, steps, batch):
    config, _, _ = train.configure(["--task", task])
    assert (config.steps, config.batch, config.epochs) == (steps, batch, 0)


FIRST_FLAGS = "task data init out val batch steps epochs lr workers".split()


def test_help_begins_with_the_commonest_flags(capsys):
    with pytest.raises(SystemExit):
        train.configure(["--help"])
    flags = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M)
    assert flags[:10] == FIRST_FLAGS
    assert set(flags) == {*train.TrainConfig.__dataclass_fields__, *Config.__dataclass_fields__
                          } - {"vocab_size", "answers"}


@pytest.mark.parametrize("name", train.TrainConfig.__dataclass_fields__)
def test_each_flag_has_a_clause_of_help(name):
    assert len(eval.field_comments(train.TrainConfig)[name].split()) >= 3


@pytest.mark.parametrize("flags, message", [
    ("--task pretrane", "invalid choice: 'pretrane' (choose from"),
    ("--task pretrain --widht 3", "unrecognized arguments: --widht"),
    ("--temporal rolling", "invalid choice: 'rolling'"),
    ("--data absent.jsonl", "absent.jsonl"),
    ("--data a --objectives vtx", "--objectives vtx: those of --task pretrain are vtm, mlm"),
    ("--data a --task qa --objectives mlm", "--objectives mlm: those of --task qa are qa"),
    ("--data a --objectives wpa", "wpa needs vtm"),
    ("--data a --val b/x_test.clean.jsonl --val_every 5", "the validation"),
    ("--data a --val latest.jsonl --val_every 5", "a: no such manifest"),
    ("--data a --log_every 0", "--log_every 0: must be 1 or more"),
    ("--data a --batch -4", "--batch -4: must be 0 or more"),
    ("--data a --steps 6 --epochs 1", "--steps and --epochs both say how long to train"),
    ("--data a --val_every 5", "--val_every needs --val"),
    ("--data a --compile", "cannot compile without a C++ compiler"),
    ("--task probe --data {clips}/gone_answer.jsonl --vocab train --workers 0",
     "no clip of a manifest can be read: "),
    ("--task qa --data {clips}/misspelt.jsonl --vocab train", 'no line has an "answer"'),
    ("--data {clips}/train.jsonl --vocab train --freeze blocks.99",
     "--freeze blocks.99: no such part; there are cls_token"),
    ("--task choice --data {clips}/no_answer.jsonl --vocab train --workers 0",
     '"answer" is None; expected an index into the 2 options'),
    ("--data {clips}/train.jsonl --init absent.pth", "absent.pth: no such file"),
    ("--data {clips}/train.jsonl --init {whole}/checkpoint.pt --variant S",
     "--variant: the sizes are those of"),
    ("--data {clips}/train.jsonl --vocab absent.txt", "local vocab.txt"),
    ("--data {clips}/choice.jsonl --vocab train --workers 0", "choice.jsonl:"),
    ("--data {clips}/train.jsonl --vocab train --val absent.jsonl", "absent.jsonl: no such"),
    ("--data {clips}/train.jsonl --vocab train --mix 1 2", "--mix 1.0 2.0"),
    ("--data {clips}/gone.jsonl --vocab train --workers 0", "1 clips in a row cannot be read"),
    ("--data {clips}/choice.jsonl --vocab train --task choice --val {clips}/no_answer.jsonl",
     '"answer" is None; expected an index into the 2 options')])
def test_wrong_flags_and_files_get_one_line(
        flags, message, clips, whole_run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")                       # no compiler there
    code = 2 if "invalid" in message or "unrecognized" in message else 1
    flags = flags.format(clips=clips, whole=whole_run).split()
    if "--init" not in flags:
        flags += "--width 32 --depth 1 --heads 2".split()
    error = run(train, *flags, "--out", tmp_path / "run", code=code)
    assert message in error
    assert code == 2 or error.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


# ---- Training: batches and their length

@pytest.mark.parametrize("batch, most, world, layout", [
    (64, 16, 1, (64, 16, 4)), (24, 16, 1, (24, 8, 3)), (9, 4, 1, (9, 3, 3)),
    (64, 16, 4, (64, 16, 1)), (0, 16, 4, (64, 16, 1))])
def test_a_batch_is_cut_into_few_micro_batches(batch, most, world, layout):
    config = train.TrainConfig(batch=batch, batch_per_gpu=most)
    assert train.split_batch(config, 1000, world) == layout


@pytest.mark.parametrize("batch, world, message", [
    (34, 2, "34 on 2 processes makes micro-batches of 1 clip"),     # VTM would see no mismatch
    (10, 4, "10 does not divide among 4 processes")])
def test_a_batch_that_cannot_be_cut_is_refused(batch, world, message):
    config = train.TrainConfig(batch=batch, batch_per_gpu=16)
    with pytest.raises(DataError, match=message):
        train.split_batch(config, 1000, world)


@pytest.mark.parametrize("samples, world, batch", [
    (6, 1, 6), (1000, 1, 256), (30, 1, 24), (30, 2, 16), (1, 2, 2)])
def test_a_recipes_batch_fits_the_data(samples, world, batch):
    config = train.TrainConfig(task="choice", objectives=("choice",))
    assert train.split_batch(config, samples, world).batch == batch


def test_a_batch_cut_to_the_data_is_said(clips, whole_run, tmp_path):
    printed = run(train, "--task", "retrieval", "--data", clips / "retrieval.jsonl", "--init",
                  whole_run / "checkpoint.pt", "--workers", 0, "--epochs", 1, "--out", tmp_path)
    assert "7 samples are less than a batch of 256: a step has 7 clips" in printed


def test_samples_that_repeat_are_said(clips, tmp_path):
    printed = pretrain(clips, tmp_path, "--batch", 32, "--steps", 1)
    assert re.search(r"a step reads 32 clips of \S+train.jsonl, which has 24 lines", printed)


@pytest.mark.parametrize("epochs, batch, steps", [(1, 24, 1), (1, 16, 2), (3, 16, 6)])
def test_epochs_round_up(epochs, batch, steps, clips, tmp_path):
    flags = ("--width 32 --depth 1 --heads 2 --image_size 32 --vocab train "
             f"--epochs {epochs} --batch {batch} --data {clips}/train.jsonl --out {tmp_path}")
    config, fields, overrides = train.configure(flags.split())
    with eval.joined_processes():
        assert train.Trainer(config, fields, overrides, torch.device("cpu")).steps == steps


# ---- Training: what is trained, and by which gradients

HEADS = {"pooler", "vtm_head", "mlm_head", "text_proj", "video_proj", "answer_head"}


@pytest.mark.parametrize("task, objectives, heads", [
    ("pretrain", "vtm mlm", "pooler vtm_head mlm_head"),
    ("pretrain", "mlm", "mlm_head"),
    ("pretrain", "vtm wpa", "pooler vtm_head"),
    ("pretrain", "vtc", "text_proj video_proj"),
    ("retrieval", "vtc rank", "text_proj video_proj pooler vtm_head"),
    ("retrieval", "vtc", "text_proj video_proj"),
    ("retrieval", "vtc vtm", "text_proj video_proj pooler vtm_head"),        # Sec. 4.2.2, Tab. 7
    ("choice", "choice", "pooler vtm_head"),
    ("qa", "qa", "pooler answer_head")])
def test_a_step_moves_what_objectives_reach(task, objectives, heads, trainer, clips):
    manifest = {"pretrain": "train"}.get(task, task)
    one = trainer("--task", task, "--data", clips / f"{manifest}.jsonl", "--objectives",
                  *objectives.split(), "--steps", 1, "--batch", 4)
    before = {name: p.clone() for name, p in one.model.named_parameters()}
    one.train()
    for name, parameter in one.model.named_parameters():
        is_trained = name.split(".")[0] not in HEADS - set(heads.split())
        assert parameter.requires_grad == is_trained, name
        if name != "vtm_head.bias" or "vtm" in objectives:     # a softmax over candidates has none
            assert parameter.equal(before[name]) != is_trained, name


def test_freeze_names_whole_parts(trainer):
    one = trainer("--depth", 11, "--freeze", "blocks.1", "patch_embed")
    frozen = {".".join(name.split(".")[:2]) for name, p in one.model.named_parameters()
              if not p.requires_grad}
    assert {"blocks.1", "patch_embed.proj"} <= frozen
    assert "blocks.10" not in frozen


def test_decay_shrinks_matrices_apart_from_gradients(trainer):     # AdamW [27], not Adam
    one = trainer("--lr", 0.1, "--weight_decay", 0.5)
    before = {name: p.clone() for name, p in one.model.named_parameters()}
    for p in one.trained:
        p.grad = torch.zeros_like(p)
    one.optimizer.step()
    for name, parameter in one.model.named_parameters():
        if parameter.requires_grad:
            factor = 1 - 0.1 * 0.5 if parameter.ndim > 1 else 1    # no bias, no norm
            close(parameter, factor * before[name])


def test_the_answer_head_has_its_own_rate(trainer, clips):
    one = trainer("--task", "qa", "--data", clips / "qa.jsonl", "--head_lr", 10, "--beta2", 0.9)
    train.set_lr(one.optimizer, 1e-4)
    names = {p: name for name, p in one.model.named_parameters()}
    for group in one.optimizer.param_groups:
        assert group["betas"] == (0.9, 0.9)
        for p in group["params"]:
            lr = 1e-3 if names[p].startswith("answer_head") else 1e-4
            assert group["lr"] == pytest.approx(lr)


def gradients_of_a_step(one: train.Trainer) -> dict[str, torch.Tensor]:
    """What a step of gradient descent with a rate of 1 takes from each parameter."""
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    one.optimizer = torch.optim.SGD([{"params": one.trained, "factor": 1.0}], lr=1.0)
    one.run.parts["optimizer"] = one.optimizer
    one.train()
    return {name: before[name] - p.detach() for name, p in one.model.named_parameters()}


def plain_loss(model, batch, objectives) -> torch.Tensor:
    """The losses of Sec. 3.3 and 4.2 as their sentences say, each clip by itself."""
    total = 0.0
    B = len(batch["video"])

    def text_of(i):
        length = int(batch["text_mask"][i].sum())                       # without padding
        return batch["text_ids"][i:i + 1, :length]

    for i in range(B):
        if "vtm" in objectives:
            video = batch["video"][batch["vtm_video"][i]][None]
            logits = model.vtm_head(model(video, text_of(i)).pooled)
            total += F.cross_entropy(logits, batch["vtm_labels"][i:i + 1]) / B
        if "rank" in objectives or "choice" in objectives:
            scores = []
            for ids, mask in zip(batch["option_ids"][i], batch["option_text_mask"][i]):
                if mask.any():
                    features = model(batch["video"][i:i + 1], ids[mask][None])
                    scores.append(model.vtm_head(features.pooled)[:, 1])
            total += F.cross_entropy(torch.cat(scores)[None], batch["label"][i:i + 1]) / B
        if "qa" in objectives and batch["label"][i] >= 0:
            known = int((batch["label"] >= 0).sum())
            logits = model.answer_head(model(batch["video"][i:i + 1], text_of(i)).pooled)
            total += F.cross_entropy(logits, batch["label"][i:i + 1]) / known
    if "mlm" in objectives:
        logits = model.mlm_head(model(batch["video"], batch["mlm_ids"], batch["text_mask"]).text)
        total += F.cross_entropy(logits.flatten(0, 1)[batch["mlm_positions"]],
                                 batch["mlm_labels"], ignore_index=-100)
    if "vtc" in objectives:
        text = torch.cat([text_embedding(model, text_of(i)) for i in range(B)])
        cosines = text @ video_embedding(model, batch["video"]).T / 0.05
        total += F.cross_entropy(cosines, torch.arange(B))
        total += F.cross_entropy(cosines.T, torch.arange(B))
    if "wpa" in objectives:                                     # release: a tenth of it counts
        features = model(batch["video"][batch["vtm_video"]], batch["text_ids"], batch["text_mask"])
        distance, _ = word_patch_transport(features.text, features.video[:, 1:],
                                           batch["text_mask"])
        total += 0.1 * (distance * (2 * batch["vtm_labels"] - 1)).mean()
    return total


@pytest.mark.parametrize("task, objectives", [
    ("pretrain", "vtm mlm"), ("pretrain", "vtm wpa"), ("retrieval", "vtc rank"),
    ("retrieval", "vtc vtm"), ("choice", "choice"), ("qa", "qa")])
def test_a_step_follows_the_plain_losses(task, objectives, trainer, tmp_path, clips):
    lines = [json.loads(line) for line in absolute(clips / "train.jsonl")[:4]]
    texts = ["white ring", "black square while red turns green and blue", "black", "white square"]
    for line, text in zip(lines, texts):
        line.update(text=text, options=[text, "a", "b"][:2 + len(text) % 2], answer=0)
        if task == "qa":
            line.update(question=text, answer=text if "white" in text else "unheard of")
    (tmp_path / "answers.json").write_text(json.dumps(texts))
    (tmp_path / "m.jsonl").write_text(json_lines(*lines))
    one = trainer("--task", task, "--data", tmp_path / "m.jsonl", "--objectives",
                  *objectives.split(), "--dropout", 0, "--drop_path", 0, "--steps", 1, "--batch", 4,
                  "--lr", 1)
    (batch,) = one.stream()
    loss = plain_loss(one.model, batch, objectives.split())
    gradients = torch.autograd.grad(loss, one.trained, allow_unused=True)
    names = [name for name, p in one.model.named_parameters() if p.requires_grad]
    taken = gradients_of_a_step(one)
    for name, gradient in zip(names, gradients):
        close(taken[name], torch.zeros(()) if gradient is None else gradient, atol=2e-5)


@pytest.mark.parametrize("processes, size, objectives", [
    (1, 8, "vtm mlm"), (2, 8, "vtm mlm"), (2, 16, "vtm mlm vtc")] + FULL * [(4, 8, "vtm mlm vtc")])
def test_processes_and_micro_batches_change_nothing(
        processes, size, objectives, clips, tmp_path):
    """VTM's pairs and MLM's divisor belong to the whole batch, VTC's negatives to all processes."""
    flags = ["--data", clips / "train.jsonl", *TINY_RUN, "--lr", 1e-4, "--dropout", 0,
             "--drop_path", 0, "--steps", 50 if FULL else 4, "--batch", 32,
             "--objectives", *objectives.split()]
    runs = []
    for ranks, most, name in ((1, 32, "whole"), (processes, size, "parts")):
        runs.append(Started(tmp_path / f"{name}.txt", "train.py", *flags, "--batch_per_gpu", most,
                            "--out", tmp_path / name, processes=ranks))
    for started in runs:
        started.wait()
    whole, losses = finished(tmp_path / "whole")
    parts, losses_of_parts = finished(tmp_path / "parts")
    assert np.allclose(losses, losses_of_parts, rtol=2e-6, atol=0)
    for name, tensor in whole["model"].items():
        other = parts["model"][name]
        if name.endswith("qkv.bias"):    # softmax ignores the keys' bias: Adam scales its noise
            tensor = torch.cat([tensor[:32], tensor[64:]])
            other = torch.cat([other[:32], other[64:]])
        close(tensor, other, rtol=0, atol=5e-6)


def pixels(one) -> list:
    return one.clips[0, 0]["video"].tolist()


def lines_of_a_step(one) -> list[str]:
    return one.fetch(one.stream())[0].source_lines


def groups(one) -> list[tuple]:
    """(learning rate's factor, weight decay, betas) of each group of the optimiser."""
    return [(group["factor"], group["weight_decay"], group["betas"])
            for group in one.optimizer.param_groups]


def trained_line(one) -> dict:
    """The line of the log of a single step."""
    one.run.terminated = True                                  # stops after it
    one.train()
    return records(one.run.folder)[0]


def checkpoints(one) -> set[str]:
    """Names of the run's checkpoints, once it has ended."""
    one.train()
    return {path.name for path in one.run.folder.glob("*.pt")}


TWO = "--data {clips}/train.jsonl {clips}/images.jsonl "
QA = "--task qa --objectives qa --data {clips}/qa.jsonl "
RANK = "--task retrieval --objectives rank --data {clips}/retrieval.jsonl "
SCORED = "--steps 2 --val {clips}/choice.jsonl "

EFFECTS = {  # a flag of training: (the other flags, its own, what it changes)
    "task": ("", QA, lambda one: one.clips.task),
    "data": ("", TWO, lambda one: one.clips.manifest.names),
    "init": ("", "--init {whole_run}/checkpoint.pt", lambda one: one.model.cls_token.tolist()),
    "out": ("", "--out {tmp_path}/another", lambda one: one.run.folder),
    "val": ("", SCORED, lambda one: [scoring.data for scoring in one.eval_configs]),
    "batch": ("", "--batch 4", lambda one: len(lines_of_a_step(one))),
    "steps": ("", "--steps 5", lambda one: one.steps),
    "lr": ("", "--lr 1e-4", lambda one: trained_line(one)["lr"]),
    "objectives": ("", "--objectives mlm", lambda one: trained_line(one).keys()),
    "batch_per_gpu": ("", "--batch_per_gpu 4", lambda one: len(lines_of_a_step(one))),
    "mix": (TWO + "--batch 32 --batch_per_gpu 8", "--mix 1 3",
            lambda one: [batch.manifest for batch in one.fetch(one.stream())]),
    "columns": ("", "--columns text=video", lambda one: one.clips[0, 0]["caption"]),
    "vocab": ("", "--vocab {tmp_path}/vocab.txt", lambda one: one.tokenizer.vocab_size),
    "val_every": (SCORED + "--save_every 1", "--val_every 1", checkpoints),
    "activation_checkpointing": ("", "--activation_checkpointing",
                                 lambda one: one.model.activation_checkpointing),
    "freeze": ("", "--freeze blocks.1", lambda one: len(one.trained)),
    "head_lr": (QA, "--head_lr 10", groups),
    "warmup": ("", "--warmup 6", lambda one: trained_line(one)["lr"]),
    "weight_decay": ("", "--weight_decay 0.5", groups),
    "beta2": ("", "--beta2 0.9", groups),
    "false_captions": (RANK, "--false_captions 2", lambda one: len(one.clips[0, 0]["options"])),
    "whole_words": ("", "--whole_words", lambda one: one.clips.whole_words),
    "resize": ("", "--resize paper", pixels),
    "boxes": ("", "--no-boxes", lambda one: one.clips.boxes),
    "seed": ("", "--seed 1", pixels),
    "log_every": ("--steps 100", "--log_every 2", lambda one: one.progress.every),
    "save_every": ("--steps 2", "--save_every 1", checkpoints)}

ELSEWHERE = {  # flags whose effect other tests show
    "compile": "the_flag_compiles_the_whole_micro_batch",
    "precision": "matrix_products_have_the_precision_asked_for",
    "epochs": "flags_of_steps_replace_epochs", "recipe": "the_releases_recipe_is_selected_whole",
    "variant": "a_variant_has_its_width", "workers": "training_gives_a_clip_up_after_the_timeout",
    "timeout": "training_gives_a_clip_up_after_the_timeout"}


def test_the_effect_of_every_flag_of_training_is_tested():
    assert EFFECTS.keys() | ELSEWHERE.keys() == set(train.TrainConfig.__dataclass_fields__)
    for name in ELSEWHERE.values():
        assert f"test_{name}" in globals()


@pytest.mark.parametrize("name", EFFECTS)
def test_a_flag_changes_what_is_trained(name, trainer, clips, whole_run, tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    paths = {"clips": clips, "whole_run": whole_run, "tmp_path": tmp_path}
    *flags, effect = EFFECTS[name]
    without, with_flag = [text.format(**paths).split() for text in flags]
    default = effect(trainer(*without))
    shutil.rmtree(tmp_path / "run")
    assert effect(trainer(*without, *with_flag)) != default


def test_another_seed_reads_other_lines(trainer):
    assert lines_of_a_step(trainer()) != lines_of_a_step(trainer("--seed", 1))


def test_a_seed_has_its_own_weights(trainer):
    weights = [trainer("--seed", seed).model.cls_token.clone() for seed in (0, 1, 0)]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("task, head", [("qa", "paper"), ("probe", "linear")])
def test_the_answer_head_is_that_of_the_task(task, head, trainer, clips, tmp_path):
    other = {"paper": "linear", "linear": "paper"}[head]
    weights = save_checkpoint(tmp_path / "c.pt", "qa", answers=["ring"], answer_head=other)
    one = trainer("--task", task, "--data", clips / "qa.jsonl", "--init", weights,
                  "--objectives", task)
    assert one.model.config.answer_head == head


def test_a_step_without_items_has_no_loss(trainer):                          # all answers unknown
    one = trainer("--batch_per_gpu", 4)
    empty = train.MicroBatch({}, {"vtm": 0, "mlm": 0}, 0, [], [])
    assert one.items_of_step([empty, empty]) == {"vtm": 1, "mlm": 1}


def test_each_micro_batch_draws_its_own_dropout(trainer):
    seeds = []
    for rank in (0, 1, 0):
        one = trainer("--batch_per_gpu", 4, "--steps", 2)
        one.rank = rank
        one.run.is_main = False                                        # leaves no checkpoint
        one.ddp.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
        one.train()
    assert len(set(seeds[:8])) == 8                                    # 2 ranks, 2 steps, 2 each
    assert seeds[8:] == seeds[:4]


@pytest.mark.parametrize("is_used, name", [
    (lambda frames: frames > 1, "images.jsonl"),               # as a new mixing of frames
    (lambda frames: frames == 1, "train.jsonl")])
def test_a_parameter_without_gradient_is_named(is_used, name, trainer, clips):
    one = trainer("--data", clips / "train.jsonl", clips / "images.jsonl")
    one.model.gate = torch.nn.Parameter(torch.zeros(1))
    mix = one.model.mix_frames

    def gated(z, frames, *arguments):
        z = mix(z, frames, *arguments)
        return z * (1 + one.model.gate) if is_used(frames) else z

    one.model.mix_frames = gated
    with pytest.raises(DataError, match=f"gate: no part in the losses of .*{name}.* by 0"):
        one.train()


NEW_OBJECTIVE = '''
    if "direction" in objectives:
        reversed_too = torch.stack([video, video.flip(1)], 1).flatten(0, 1)   # clip after clip
        text = model.embed_text(batch["text_ids"]).repeat_interleave(2, 0)
        mask = batch["text_mask"].repeat_interleave(2, 0)
        pooled = model.fuse(reversed_too, text, mask).pooled
        labels = torch.arange(2 * B, device=video.device) % 2
        scores["direction"] = Scores(model.vtm_head(pooled), labels)
    return scores, vtm_features
'''


def test_a_new_objective_is_logged_and_scored(clips, tmp_path):
    """Written into a copy of allinone.py in the two places that its comments name."""
    for name in ("data.py", "eval.py", "train.py"):
        shutil.copy(HERE / name, tmp_path)
    source = (HERE / "allinone.py").read_text()
    source = source.replace('    "wpa": (),', '    "direction": ("pooler", "vtm_head"),\n'
                            '    "wpa": (),')
    source = source.replace("\n    return scores, vtm_features\n", NEW_OBJECTIVE)
    (tmp_path / "allinone.py").write_text(source)
    process = Started(
        tmp_path / "printed", tmp_path / "train.py", "--data", clips / "train.jsonl", *TINY_RUN,
        "--steps", 2, "--objectives", "vtm", "direction", "--val", clips / "train.jsonl",
        "--out", tmp_path / "run")
    process.wait()
    assert re.search(r"step +2 100%  vtm .*  direction \d\.\d\d\d +\d+%", process.printed())
    assert "direction_accuracy" in records(tmp_path / "run")[-1]
    assert re.search(r"DIRECTION +\d+\.\d +48", process.printed())


# ---- Training: what a GPU needs

class Device(TorchDispatchMode):
    """A GPU of fake tensors, which hold no numbers. Lists when the host waits for it."""

    def __init__(self):
        super().__init__()
        self.events = []
        self.pinned = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function)
        tensors = [x for x in tree_leaves((args, kwargs))
                   if isinstance(x, torch.Tensor)]
        on_device = any(tensor.device.type == "cuda" for tensor in tensors)
        target = str(kwargs.get("device", ""))
        if "pin_memory" in name:
            self.pinned.append(args[0])
            return args[0]
        if on_device and target == "cpu":
            self.events.append("wait")
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape)              # the host goes on with zeros
        if not on_device and not target.startswith("cuda"):    # of the host alone
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if "_local_scalar_dense" in name or "nonzero" in name:
            self.events.append("wait")
        if tensors and not on_device:                          # a copy to the device
            is_pinned = any(tensors[0] is tensor for tensor in self.pinned)
            self.events.append("copy" if is_pinned and kwargs.get("non_blocking") else "wait")
        return function(*args, **kwargs)


@pytest.mark.parametrize("flags", [[], ["--objectives", "vtm", "mlm", "wpa"]])
def test_a_step_waits_once_for_the_gpu(flags, trainer, monkeypatch):
    """And only after the next step's clips are on their way."""
    one = trainer("--batch_per_gpu", 4, "--steps", 2, "--depth", 1, *flags)
    device = Device()
    one.device = torch.device("cuda")
    one.run.is_main = False                                    # writes nothing
    fetch = one.fetch

    def fetch_and_note(stream):
        device.events.append("fetch")
        return fetch(stream)

    def backward(loss):                                        # a real one needs a real GPU
        device.events.append("backward")
        for p in one.trained:
            p.grad = torch.zeros_like(p)

    one.fetch = fetch_and_note
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in one.model.modules():
            for name, p in module.named_parameters(recurse=False):
                on_device = torch.empty(p.shape, device="cuda")
                setattr(module, name, torch.nn.Parameter(on_device, p.requires_grad))
        one.trained = [p for p in one.model.parameters() if p.requires_grad]
        one.optimizer = train.make_optimizer(one.model, one.config)
        one.ddp = one.losses
        with device:
            one.train()
    assert "copy" in device.events
    events = [event for event in device.events if event != "copy"]
    assert events == ["fetch"] + 2 * ["backward", "backward", "fetch", "wait"]


def test_compiling_breaks_no_graph(trainer):
    """All objectives in one graph, of any text length from the second length on."""
    one = trainer("--depth", 1, "--heads", 1)
    one.losses.objectives = ("vtm", "mlm", "vtc", "rank")
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    one.losses.compile(fullgraph=True, backend=count)
    counts = []
    for m, masked, options in ((16, 1, 3), (16, 40, 3), (24, 1, 2), (8, 3, 4)):
        torch.manual_seed(0)
        video = torch.randint(256, (4, 3, 3, 32, 32), dtype=torch.uint8)
        ids = torch.randint(5, one.tokenizer.vocab_size, (4, m))
        batch = pretraining_batch(video, ids, ids >= 0, one.tokenizer.vocabulary)
        positions = torch.arange(masked)
        labels = torch.full((4 * m,), -100)
        labels[positions] = ids.flatten()[positions]
        batch["mlm_positions"], batch["mlm_labels"] = masked_positions(labels.view(4, m))
        batch.update(
            option_ids=ids[:, None].repeat(1, options, 1), option_mask=torch.ones(4, options) > 0,
            option_text_mask=torch.ones(4, options, m) > 0, label=torch.zeros(4).long(),
            manifest_id=torch.zeros(4).long(), source_line=["x"] * 4, unreadable=[])
        micro_batch = train.to_device(batch, one.losses.objectives, one.device)
        train.mark_varying(micro_batch.tensors)
        sum(loss.mean for loss in one.losses(micro_batch.tensors).values()).backward()
        counts.append(len(graphs))
    assert counts == [1, 1, 2, 2]


def test_the_flag_compiles_the_whole_micro_batch(trainer):
    assert trainer().losses._compiled_call_impl is None
    assert trainer("--compile").losses._compiled_call_impl is not None


@pytest.mark.parametrize("has_bf16, precision", [(True, "bf16"), (False, "fp16")])
def test_emulated_bf16_is_not_chosen(has_bf16, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: has_bf16 or including_emulation)
    device = torch.device("cuda")
    assert train.choose_precision(train.TrainConfig(), device) == precision
    assert not eval.computes_bf16(torch.device("cpu"))


def test_the_norm_of_fp16_is_that_of_fp32(trainer):
    norms = []
    for precision in ("fp32", "fp16"):                         # whose losses are scaled by 65536
        one = trainer("--precision", precision, "--steps", 1)
        one.train()
        norms.append(records(one.run.folder)[0]["grad_norm"])
        shutil.rmtree(one.run.folder)
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def end_step(one, norm=1.0, clips=((8.0, 0.0),), unreadable=(), **losses) -> None:
    """Ends a step of a Trainer that has not computed it.

    clips: (read, unreadable) of each manifest. losses: (sum, number) of each manifest.
    """
    sums = {name: torch.tensor(table) for name, table in losses.items()}
    sums["clips"] = torch.tensor(clips)
    one.progress.end_step(sums, norm, lr=0.1, unreadable=list(unreadable))


def test_an_overflow_leaves_the_mean_norm_alone(trainer):
    one = trainer("--log_every", 2, "--steps", 20)
    for norm in (math.inf, 3.0):
        end_step(one, norm=norm)
    assert records(one.run.folder)[0]["grad_norm"] == 3.0


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_matrix_products_have_the_precision_asked_for(precision, dtype, trainer):
    one = trainer("--precision", precision)
    with one.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert one.scaler.is_enabled() == (precision == "fp16")


def test_a_step_that_overflows_fp16_is_skipped(trainer):
    one = trainer("--precision", "fp16")
    one.check_finite({}, math.inf, [])                         # the scaler skips the step
    one.scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(ValueError, match="grad_norm not finite"):
        one.check_finite({}, math.inf, [])


@pytest.mark.parametrize("name, tera", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250),
    ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA of tomorrow", 0)])
def test_known_gpus_have_their_peak(name, tera):
    assert train.peak_flops(name) == tera * 1e12


def test_flops_of_a_step_count_all_micro_batches(trainer):
    counts = []
    for size in (8, 4):
        one = trainer("--batch_per_gpu", size, "--steps", 1)
        one.progress.peak = 1e12                               # as if the device were known
        one.train()
        counts.append(one.progress.flops)
        assert records(one.run.folder)[-1]["mfu"] > 0
        shutil.rmtree(one.run.folder)
    assert counts[0] > 0
    assert counts[0] == pytest.approx(counts[1], rel=0.02)


def test_counting_flops_trains_nothing(trainer):
    lines = []
    for peak in (0.0, 1e12):
        one = trainer("--steps", 1)
        one.progress.peak = peak
        one.train()
        lines.append(records(one.run.folder)[0]["grad_norm"])
        shutil.rmtree(one.run.folder)
    assert lines[0] == lines[1]


# ---- Training: log, progress, validation

@pytest.fixture(scope="session")
def long_run(clips, tmp_path_factory) -> Path:
    """A run of 20 steps that logs each of them."""
    out = tmp_path_factory.mktemp("long") / "run"
    pretrain(clips, out, "--steps", 20, "--batch", 2)
    return out


@pytest.mark.parametrize("stops", [0, 3])                      # the third in the second window
def test_a_line_means_the_steps_since_the_last(stops, long_run, trainer):
    for _ in range(stops):
        one = trainer("--steps", 20, "--batch", 2, "--log_every", 2)
        one.run.terminated = True                              # stops after one more step
        assert not one.train()
    one = trainer("--steps", 20, "--batch", 2, "--log_every", 2)
    assert one.run.state["step"] == stops
    assert one.train()
    steps = records(long_run)
    lines = records(one.run.folder)
    assert [line["step"] for line in lines] == list(range(2, 21, 2))
    for k, line in enumerate(lines):
        for name in ("vtm", "vtm_accuracy", "grad_norm"):
            values = [step[name] for step in steps[2 * k:2 * k + 2]]
            assert line[name] == pytest.approx(sum(values) / 2), name


WORST = {"lr": 1e-4, "vtm": 123.4, "vtm_accuracy": 1.0, "mlm": 10.32, "mlm_accuracy": 0.0712,
         "vtc": 5.123, "vtc_accuracy": 0.5, "wpa": -0.123, "grad_norm": 1.0}
SPEED = {"clips_per_s": 12345.6, "data_wait": 0.0, "memory_gb": 70.0, "unreadable": 0,
         "eta_s": 360_000}


def test_a_progress_line_fits_100_columns():
    line = train.progress_line(199_950, 200_000, WORST, {**SPEED, "mfu": 0.41, "unreadable": 12})
    assert len(line) <= 100
    assert "wpa" in line and "100 h left" in line


@pytest.mark.parametrize("seconds, text", [
    (3, "3 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"),
    (360_000, "100 h")])
def test_times_left_have_one_width(seconds, text):
    assert train.duration(seconds) == text.rjust(7)


def test_progress_numbers_keep_their_columns():
    early = train.progress_line(50, 200_000, {**WORST, "mlm": 0.004, "vtm": 1.5}, SPEED)
    late = train.progress_line(199_950, 200_000, {**WORST, "vtm_accuracy": 0.01}, SPEED)
    for name in ("vtm", "mlm", "vtc", "wpa", "clips/s", "left"):
        assert early.index(name) == late.index(name), name


def test_zero_and_unknown_are_not_printed():
    line = train.progress_line(10, 10, {"lr": 0.1, "mlm": 1.0}, {**SPEED, "eta_s": 0})
    assert line == "step 10 100%  mlm 1.000  12346 clips/s"


def test_unreadable_clips_and_mfu_are_printed():
    line = train.progress_line(10, 10, {"lr": 0.1}, {**SPEED, "mfu": 0.41, "unreadable": 3})
    assert line.endswith("left  MFU 41%  3 unreadable")


@pytest.mark.parametrize("steps, lines", [(5, 5), (12, 12), (20, 10)])
def test_a_run_has_ten_lines_or_more(steps, lines, trainer):
    one = trainer("--log_every", 50, "--steps", steps)
    for _ in range(steps):
        end_step(one)
    assert len(records(one.run.folder)) == lines


def test_speed_is_in_clips(trainer):
    one = trainer("--steps", 100)
    one.run.state["step"] = 20
    one.progress.start_time -= 10.0                            # 20 steps of 8 clips in 10 s
    speed = one.progress.speed()
    assert speed["clips_per_s"] == pytest.approx(16, rel=0.01)
    assert speed["eta_s"] == pytest.approx(40, rel=0.01)


def test_speed_is_that_since_the_last_line(trainer):
    one = trainer("--steps", 100)
    one.progress.start_time -= 10.0
    one.progress.data_wait = 5.0
    end_step(one)
    one.progress.start_time -= 1.0
    end_step(one)
    early, late = records(one.run.folder)
    assert early["clips_per_s"] == pytest.approx(0.8, rel=0.05)
    assert early["data_wait"] == pytest.approx(0.5, rel=0.05)
    assert late["clips_per_s"] == pytest.approx(8, rel=0.2)
    assert late["data_wait"] == 0


def test_the_memory_of_a_process_is_in_gigabytes(trainer):
    one = trainer()
    end_step(one)
    assert 0.1 < records(one.run.folder)[0]["memory_gb"] < 100


def test_a_mean_over_manifests_is_one_over_clips(trainer, clips):
    one = trainer("--data", clips / "train.jsonl", clips / "images.jsonl")
    end_step(one, clips=[[6.0, 0.0], [2.0, 0.0]], vtm=[[3.0, 6.0], [3.0, 2.0]])
    assert records(one.run.folder)[0]["vtm"] == 6 / 8


def test_mfu_is_a_share_of_all_devices(trainer, monkeypatch):
    monkeypatch.setitem(train.PEAKS, "CPU", 1e12)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 2)
    assert trainer().progress.peak == 2e12


def test_waiting_for_clips_adds_up(trainer):
    one = trainer()
    one.progress.data_wait = 5.0
    one.fetch(one.stream())
    assert one.progress.data_wait > 5.0


def test_a_loss_is_logged_for_manifests_that_were_read(trainer, clips):
    one = trainer("--data", clips / "train.jsonl", clips / "images.jsonl")
    end_step(one, clips=[[8.0, 0.0], [0.0, 0.0]], vtm=[[4.0, 8.0], [0.0, 0.0]])
    record = records(one.run.folder)[0]
    assert record["vtm"] == 0.5                                # of all clips alike
    films, images = record["manifests"].values()
    assert films == {"clips": 8, "unreadable": 0, "vtm": 0.5}
    assert images == {"clips": 0, "unreadable": 0}


def test_unreadable_clips_of_all_manifests_are_counted(trainer, clips):
    one = trainer("--data", clips / "train.jsonl", clips / "images.jsonl")
    end_step(one, clips=[[8.0, 1.0], [8.0, 2.0]], unreadable=["a", "b", "c"])
    assert records(one.run.folder)[0]["unreadable"] == 3


def test_samples_show_which_clip_a_text_meets(trainer):
    one = trainer()
    micro_batch = one.fetch(one.stream())[0]
    pictures = []
    for clip in (0, 1):
        micro_batch.tensors["vtm_video"][:] = clip
        one.save_samples(micro_batch)
        pictures.append((one.run.folder / "samples.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_samples_show_no_option_that_a_clip_lacks(trainer, clips):
    one = trainer("--task", "choice", "--objectives", "choice", "--data", clips / "choice.jsonl")
    micro_batch = one.fetch(one.stream())[0]
    micro_batch.tensors["option_mask"][:, 1] = False
    pictures = []
    for word in (5, 6):
        micro_batch.tensors["option_ids"][:, 1] = word
        one.save_samples(micro_batch)
        pictures.append((one.run.folder / "samples.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_samples_show_what_the_model_is_fed(whole_run):
    image = np.asarray(Image.open(whole_run / "samples.png"))
    assert image.shape[0] > 8 * 32 and image.std() > 10


@pytest.mark.parametrize("opposite", [False, True])
def test_the_best_has_the_highest_mean_of_manifests(opposite, clips, tmp_path):
    """The opposite answers are right where these are wrong: then all means are 50."""
    lines = [json.loads(line) for line in absolute(clips / "choice.jsonl")[:9]]
    manifests = [tmp_path / "one.jsonl", tmp_path / "other.jsonl"]
    for manifest, answer in zip(manifests, (0, int(opposite))):
        manifest.write_text(json_lines(*({**line, "answer": answer} for line in lines)))
    pretrain(clips, tmp_path / "run", "--val", *manifests, "--val_every", 1,
             "--steps", 5, "--lr", 0.02)
    scores = [line["result"]["order"] for line in lines_of(tmp_path / "run" / "log.jsonl")
              if "result" in line]
    assert len(scores) == 10                                   # both, after each step
    assert len(set(scores[::2])) > 1
    means = 5 * [50.0] if opposite else scores[::2]
    state = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["state"]
    assert state["best"] == pytest.approx(max(means))
    if not opposite:
        assert state["step"] == 1 + means.index(max(means))    # the earliest of the best


@pytest.mark.parametrize("objectives, rerank", [("vtc rank", 0), ("vtc vtm", 0), ("vtm", 10 ** 9)])
def test_without_vtc_all_pairs_are_scored_by_vtm(objectives, rerank, trainer, clips):
    one = trainer("--task", "retrieval", "--data", clips / "retrieval.jsonl", "--objectives",
                  *objectives.split(), "--val", clips / "retrieval.jsonl")
    assert one.eval_configs[0].rerank == rerank


@pytest.mark.parametrize("field, value", [
    ("resize", "paper"), ("boxes", False), ("workers", 3), ("columns", ("text=text",)),
    ("objectives", ("mlm",))])
def test_validation_reads_clips_as_training_does(field, value, tmp_path):
    clips = clips_of(tmp_path, ["a dog runs"])
    config = train.TrainConfig(val=(str(tmp_path / "m.jsonl"),), **{field: value})
    validation, = train.eval_configs(config, build(), clips.tokenizer, None)
    assert getattr(validation, field) == value


def test_a_checkpoint_holds_the_best_of_its_step(trainer, clips):
    one = trainer("--val", clips / "choice.jsonl", "--val_every", 1, "--save_every", 1)
    one.run.terminated = True                                  # stops after one step
    one.train()
    saved = torch.load(one.run.folder / "checkpoint.pt", weights_only=True)
    best = torch.load(one.run.folder / "best.pt", weights_only=True)
    assert saved["state"]["step"] == best["state"]["step"] == 1
    assert saved["state"]["best"] == best["state"]["best"]
    assert saved["log"]["bytes"] == (one.run.folder / "log.jsonl").stat().st_size


def test_after_validation_training_goes_on(trainer, clips):
    one = trainer("--val", clips / "choice.jsonl")
    start = one.progress.start_time
    one.validate()
    assert all(module.training for module in one.model.modules())
    assert one.progress.start_time > start                     # it is no time of training


# ---- Training: runs that stop and go on

LONG = ["--steps", 60 if FULL else 8, "--save_every", 1]
RUNS = {  # what is killed: its flags
    "pretraining": ["--data", "{clips}/train.jsonl", *TINY_RUN, "--precision", "fp16"],
    "mixture": ["--data", "{clips}/train.jsonl", "{clips}/images.jsonl", *TINY_RUN],
    "retrieval": ["--task", "retrieval", "--data", "{clips}/retrieval.jsonl", "--val",
                  "{clips}/retrieval.jsonl", "--val_every", 3, "--init", "{whole}/checkpoint.pt",
                  *TUNING]}


@pytest.fixture
def start(clips, whole_run):
    """A function that starts one of RUNS in processes of its own."""
    def start_run(name, out, processes) -> Started:
        flags = [str(flag).format(clips=clips, whole=whole_run) for flag in RUNS[name] + LONG]
        return Started(f"{out}.txt", "train.py", *flags, "--out", out, processes=processes)
    return start_run


@pytest.mark.parametrize("name, processes, kill", [
    ("mixture", 2, signal.SIGKILL), ("retrieval", 1, signal.SIGKILL),
    ("pretraining", 2, signal.SIGTERM)] + FULL * [("pretraining", 1, signal.SIGKILL)])
def test_killed_runs_end_with_the_same_bits(name, processes, kill, start, tmp_path):
    """Every other kill falls into a checkpoint write; one rank is hit, the others then stop."""
    rng = random.Random(processes)
    unkilled = start(name, tmp_path / "unkilled", processes)
    out = tmp_path / "run"
    log = out / "log.jsonl"
    partial = out / "checkpoint.partial"
    kills = 0
    kills_in_write = 0
    step = 0
    while kills < (20 if FULL else 2):
        process = start(name, out, processes)             # until a checkpoint or more was written
        while process.running(0.005) and not (
                log.exists() and f'"step": {step + 2},' in log.read_text()):
            pass
        while kills % 2 and process.running() and not partial.exists():
            pass
        if process.running((1 - kills % 2) * rng.random() * 0.1):
            os.kill(rng.choice(process.ranks).pid, kill)
        code = process.wait(0, 143, kill)
        if code == 0:                                     # it was at its end: begin again
            shutil.rmtree(out)
            step = 0
            continue
        assert code == (143 if kill == signal.SIGTERM else kill)
        kills += 1
        kills_in_write += partial.exists()
        if (out / "checkpoint.pt").exists():              # never unreadable
            step = torch.load(out / "checkpoint.pt", weights_only=True)["state"]["step"]
    resumed = start(name, out, processes)
    resumed.wait()
    assert "resuming" in resumed.printed()
    unkilled.wait()
    same_bits(out, tmp_path / "unkilled")
    print(f"{kills} kills, {kills_in_write} of them during a checkpoint write")
    assert kills_in_write or not FULL or kill == signal.SIGTERM           # which lets it finish


def test_a_run_whose_torchrun_is_gone_stops(trainer, monkeypatch):
    run = trainer().run
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert not run.must_stop()
    run.parent += 1                                            # another process is our parent now
    assert run.must_stop()


def test_the_checkpoint_before_stays_beside_the_best(trainer):
    run = trainer().run
    for step, name in enumerate(["checkpoint.pt", "best.pt", "checkpoint.pt"], start=1):
        run.state["step"] = step
        run.save(name)
    steps = {}
    for path in run.folder.glob("*.pt"):
        steps[path.name] = torch.load(path, weights_only=True)["state"]["step"]
    assert steps == {"checkpoint.pt": 3, "checkpoint.previous.pt": 1, "best.pt": 2}


def test_a_run_on_shards_resumes(clips, trainer, tmp_path):
    files = {}
    for line in lines_of(clips / "train.jsonl"):
        files[line["video"]] = (clips / line["video"]).read_bytes()
        files[Path(line["video"]).stem + ".txt"] = line["text"]
    shard = write_shard(tmp_path / "0.tar", files)
    for folder, stops in (("stopped", 1), ("whole", 0)):
        for _ in range(stops):
            one = trainer("--data", shard, "--steps", 5, "--out", tmp_path / folder)
            one.run.terminated = True                          # stops after one more step
            assert not one.train()
        assert trainer("--data", shard, "--steps", 5, "--out", tmp_path / folder).train()
    same_bits(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.skipif(not FULL, reason="FULL=1 runs it: torchrun starts six processes")
def test_torchrun_restarts_a_killed_worker(clips, tmp_path):
    flags = ["--data", f"{clips}/train.jsonl", *TINY_RUN, "--steps", "60", "--save_every", "1"]
    output = tmp_path / "run.txt"
    process = subprocess.Popen([
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "--max-restarts=2", "train.py", *flags, "--out", tmp_path / "killed"], cwd=HERE,
        stdout=output.open("w"))
    for step in (4, 12):
        while not re.search(f"^step +{step} ", output.read_text(), re.M):
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait() == 0
    assert output.read_text().count("resuming") == 2
    Started(output, "train.py", *flags, "--out", tmp_path / "unkilled", processes=2).wait()
    same_bits(tmp_path / "killed", tmp_path / "unkilled")


def test_sigterm_saves_and_ends_with_143(clips, tmp_path):
    """A scheduler must not take a run that was stopped for a run that is complete."""
    process = Started(tmp_path / "printed", "train.py", "--data", clips / "train.jsonl", *TINY_RUN,
                      "--steps", 10_000, "--save_every", 10_000, "--out", tmp_path / "run")
    while not (tmp_path / "run" / "log.jsonl").exists() or len(records(tmp_path / "run")) < 2:
        time.sleep(0.01)
    os.kill(process.ranks[0].pid, signal.SIGTERM)
    assert process.wait(143) == 143
    content, losses = finished(tmp_path / "run")
    assert content["state"]["step"] == len(losses) >= 2
    assert "stopped by SIGTERM; the same command goes on from here" in process.printed()


def test_a_closed_pipe_ends_no_run(clips, tmp_path):                     # train.py | head -1
    os.mkfifo(tmp_path / "pipe")
    process = Started(tmp_path / "pipe", "train.py", "--data", clips / "train.jsonl", *TINY_RUN,
                      "--out", tmp_path / "run")
    with open(tmp_path / "pipe") as pipe:
        pipe.readline()
    while process.running(0.01):
        pass
    assert process.ranks[0].exitcode == 0
    assert finished(tmp_path / "run")[0]["state"]["step"] == 12


def test_one_sentence_says_why_a_run_cannot_be_written(clips, tmp_path):
    process = Started(tmp_path / "printed", "train.py", "--data", clips / "train.jsonl", *TINY_RUN,
                      "--out", clips / "0.mp4" / "run")        # in a file
    process.wait(1)
    assert process.printed().startswith("train.py: ")
    assert process.printed().count("\n") == 1


def test_unreadable_clips_of_all_processes_are_named(clips, tmp_path):
    lines = absolute(clips / "train.jsonl")
    for k in (3, 15):
        lines[k] = json_lines({"video": f"gone{k}.mp4", "text": "a ring"}) + "\n"
    (tmp_path / "m.jsonl").write_text("".join(lines))
    Started(tmp_path / "printed", "train.py", "--data", tmp_path / "m.jsonl", *TINY_RUN, "--steps",
            3, "--out", tmp_path / "run", processes=2).wait()  # each line once
    named = []
    for line in lines_of(tmp_path / "run" / "log.jsonl"):
        if isinstance(line.get("unreadable"), list):
            named += line["unreadable"]
    assert len(named) == 2 == records(tmp_path / "run")[-1]["unreadable"]


WRITE_TOY_CLIPS = """
import os, data, eval, train
os.chdir({folder!r})
data.SPLITS = {{"train": 20}}
with eval.joined_processes():
    train.write_toy_clips(train.TrainConfig(data=("data/toy/train.jsonl",)))
    print("toy clips:", os.path.exists("data/toy/train.jsonl"))
"""


def test_processes_wait_until_toy_clips_are_written(tmp_path):
    script = tmp_path / "script.py"
    for name in MAY_IMPORT:
        shutil.copy(HERE / f"{name}.py", tmp_path)
    script.write_text(WRITE_TOY_CLIPS.format(folder=str(tmp_path)))
    process = Started(tmp_path / "printed", script, processes=2)
    process.wait()
    assert process.printed().count("toy clips: True") == 2


def test_each_process_has_its_own_gpu(monkeypatch):
    assert eval.own_device() == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "9")                            # the second of eight on a machine
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert eval.own_device() == torch.device("cuda", 1)


def test_several_processes_tell_one_error(clips, tmp_path):
    process = Started(tmp_path / "printed", "train.py", "--data", clips / "gone.jsonl", "--vocab",
                      "train", "--width", 32, "--heads", 2, "--batch", 4, "--workers", 0, "--out",
                      tmp_path / "run", processes=2)
    assert process.wait(1) == 1
    assert process.printed().count("train.py: ") == 1
    assert "Traceback" not in process.printed()


def test_slurm_without_torchrun_is_refused(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert "torchrun" in pretrain(clips, tmp_path, code=1)


def test_a_full_disk_leaves_the_checkpoint_before(clips, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    old = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, hard))
    try:
        error = pretrain(clips, tmp_path / "run", "--steps", 14, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search("checkpoint.pt: cannot save .*; .*checkpoint.pt is whole", error)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == old
    assert not (tmp_path / "run" / "checkpoint.partial").exists()


def test_a_checkpoint_is_on_disk_before_its_name(clips, tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def note(file):
        synced.append(Path(f"/proc/self/fd/{file}").readlink().name)
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    pretrain(clips, tmp_path / "run", "--steps", 1)
    assert synced == ["checkpoint.partial"]


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


def cut_in_half(content: bytes) -> bytes:
    return content[:len(content) // 2]


@pytest.mark.parametrize("damage, message", [
    (flip_a_bit, r"checkpoint.pt: .*the checksum of its part \S+ is wrong"),
    (cut_in_half, "checkpoint.pt: .*damaged")])
def test_a_damaged_checkpoint_gives_way_to_the_previous(
        damage, message, clips, whole_run, tmp_path):
    out = shutil.copytree(whole_run, tmp_path / "run")
    path = out / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    printed = pretrain(clips, out)
    assert re.search(message + ".*; trying the checkpoint before it\n", printed), printed
    assert "at step 10" in printed
    same_bits(out, whole_run)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):   # the damaged one was not kept as it
        torch.load(out / name, weights_only=True)


def test_two_damaged_checkpoints_stop_a_run(clips, whole_run, tmp_path):
    out = shutil.copytree(whole_run, tmp_path / "run")
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (out / name).write_bytes(b"damaged")
    assert "no checkpoint of train.py in" in pretrain(clips, out, code=1)


def test_a_damaged_log_stops_no_run(clips, whole_run, tmp_path):
    out = shutil.copytree(whole_run, tmp_path / "run")
    (out / "log.jsonl").write_bytes(b"\xff[1]\n")
    pretrain(clips, out, "--steps", 13)
    assert lines_of(out / "log.jsonl", first=1)[-1]["step"] == 13


def test_a_folder_serves_one_run_at_a_time(clips, whole_run, tmp_path):
    out = shutil.copytree(whole_run, tmp_path / "run")
    with open(out / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is training into it" in pretrain(clips, out, code=1)


def test_a_run_locks_its_folder(trainer):
    one = trainer()
    with pytest.raises(DataError, match="another process is training into it"):
        train.Run(one.run.folder)


@pytest.mark.parametrize("change, lines", [
    (lambda lines: lines[::-1], 24), (lambda lines: lines[:20], 20)])
def test_other_data_are_another_run(change, lines, clips, tmp_path):
    folder = shutil.copytree(clips, tmp_path / "clips")
    vocabulary = tmp_path / "tokenizer.json"
    vocabulary.write_text(Tokenizer.train(["white black ring square"], 99).words.to_str())
    pretrain(folder, tmp_path / "run", "--vocab", vocabulary, "--steps", 1)
    manifest = folder / "train.jsonl"
    manifest.write_text("".join(change(manifest.read_text().splitlines(True))))
    error = pretrain(folder, tmp_path / "run", "--vocab", vocabulary, "--steps", 1, code=1)
    message = rf"another run \(\S+ had 24 lines of checksum \w+, now {lines} of \w+\)"
    assert re.search(message, error)


def test_a_vocabulary_is_the_checkpoints(clips, tmp_path):
    vocabulary = tmp_path / "tokenizer.json"
    vocabulary.write_text(Tokenizer.train(["white black ring square"], 99).words.to_str())
    pretrain(clips, tmp_path / "run", "--vocab", vocabulary, "--steps", 1)
    before = finished(tmp_path / "run")[0]["tokenizer"]
    vocabulary.write_text(Tokenizer.train(["other words"], 99).words.to_str())
    pretrain(clips, tmp_path / "run", "--vocab", vocabulary, "--steps", 2)
    assert finished(tmp_path / "run")[0]["tokenizer"] == before


def test_a_checkpoint_past_the_end_is_refused(clips, whole_run, tmp_path):
    out = shutil.copytree(whole_run, tmp_path / "run")
    assert "it is past step 1" in pretrain(clips, out, "--steps", 1, code=1)


def other_value(value, kind: str):
    """Another value of a flag."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, tuple):
        return (*value, "x")
    return "another " + kind


MAY_CHANGE = {"out", "val", "val_every", "workers", "log_every", "save_every", "timeout", "epochs",
              "lr", "steps"}


@pytest.fixture(scope="module")
def description(clips, tmp_path_factory):
    """A function of (config, overrides, layout) that describes a run."""
    out = tmp_path_factory.mktemp("described")
    flags = ["--data", str(clips / "train.jsonl"), *TINY_RUN, "--out", str(out)]
    config, fields, overrides = train.configure(flags)
    with eval.joined_processes():
        one = train.Trainer(config, fields, overrides, torch.device("cpu"))

        def describe(config=config, overrides=overrides, layout=one.layout) -> dict:
            content = train.describe(config, overrides, layout, config.steps, one.model,
                                     one.tokenizer, None, one.clips.manifest)
            return json.loads(json.dumps({**content, "state": {"step": 0}}))
    return one.run, config, overrides, describe


@pytest.mark.parametrize("name", [name for name in train.TrainConfig.__dataclass_fields__
                                  if name not in ("steps", "batch_per_gpu", "batch")])
def test_flags_of_another_run_are_refused(name, description):
    run_folder, config, _, describe = description
    changed = replace(config, **{name: other_value(getattr(config, name), name)})
    if name in MAY_CHANGE:
        run_folder.compare(describe(), describe(changed))
        return
    with pytest.raises(DataError, match=rf"another run \({name} was "):
        run_folder.compare(describe(), describe(changed))


@pytest.mark.parametrize("name", Config.__dataclass_fields__)
def test_another_model_is_another_run(name, description):
    run_folder, _, overrides, describe = description
    value = overrides.get(name, getattr(Config, name))
    changed = {**overrides, name: other_value(value, name)}
    with pytest.raises(DataError, match=rf"another run \({name} was "):
        run_folder.compare(describe(), describe(overrides=changed))


@pytest.mark.parametrize("name", sorted(set(Config.__dataclass_fields__) - {
    "vocab_size", "answers"}))
def test_flags_of_the_model_are_overrides(name):
    value = getattr(Config, name)
    flags = [f"--{name}", str(value)]
    if isinstance(value, bool):
        flags = [f"--{name}" if value else f"--no-{name}"]
    _, _, overrides = train.configure(["--data", "x", *flags])
    assert overrides == {name: value}


def test_another_batch_is_another_run(description):
    run_folder, _, _, describe = description
    with pytest.raises(DataError, match="batch was 8, now 16"):
        run_folder.compare(describe(), describe(layout=train.Layout(16, 8, 2)))
    run_folder.compare(describe(), describe(layout=train.Layout(8, 4, 2)))


def test_of_a_mixture_micro_batches_keep_their_size(description, clips):
    """Each of them reads one manifest, so that their size decides which clips are read."""
    run_folder, config, overrides, _ = description
    both = Manifest([clips / "train.jsonl", clips / "images.jsonl"])
    model = build()
    tokenizer = Tokenizer.train(["a"], 99)
    four, eight = (train.describe(config, overrides, train.Layout(8, size, 1), 12, model,
                                  tokenizer, None, both) for size in (4, 8))
    with pytest.raises(DataError, match="clips of a micro-batch was 4, now 8"):
        run_folder.compare({**four, "state": {"step": 0}}, eight)


def test_changes_are_said_when_a_run_goes_on(clips, whole_run, tmp_path):
    out = shutil.copytree(whole_run, tmp_path / "run")
    printed = pretrain(clips, out, "--lr", "5e-4", "--steps", 13)
    assert "from step 13 on: lr was 0.001, now 0.0005" in printed
    assert "from step 13 on: steps was 12, now 13" in printed


# ---- Training: data that are not as expected

def test_a_mixture_logs_each_manifests_numbers(start, tmp_path):
    start("mixture", tmp_path / "run", 2).wait()
    rows = [record["manifests"] for record in records(tmp_path / "run")]
    assert {Path(name).name for name in rows[-1]} == {"train.jsonl", "images.jsonl"}
    clips_read = [[numbers["clips"] for numbers in row.values()] for row in rows]
    assert [sum(line) for line in clips_read] == [8 * (step + 1) for step in range(LONG[1])]
    assert min(clips_read[-1]) > 0
    for row in rows:
        for numbers in row.values():
            assert ("mlm" in numbers) == ("vtm" in numbers) == ("vtm_accuracy" in numbers)


def test_a_loss_that_is_not_finite_stops(clips, tmp_path):
    error = pretrain(clips, tmp_path / "run", "--lr", "1e38", "--save_every", 1, code=1)
    assert re.search(r"step \d+: .*(mlm|vtm|grad_norm).* not finite", error)
    assert "train.jsonl:" in error                             # the samples
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["state"]["step"] == int(re.search(r"step (\d+):", error)[1])


@pytest.mark.parametrize("clips_read, unreadable, is_too_many", [
    (90, 10, False), (89, 11, True), (88, 11, False), (0, 99, False), (900, 101, True)])
def test_1_unreadable_clip_in_10_is_allowed(clips_read, unreadable, is_too_many, trainer):
    run = trainer().run
    counts = torch.tensor([[clips_read, unreadable]])
    with pytest.raises(ValueError, match="1 in 10") if is_too_many else contextlib.nullcontext():
        run.count_clips(counts, ["m.jsonl:1: gone"])


def test_too_many_unreadable_clips_stop(clips, whole_run, tmp_path):
    lines = absolute(clips / "choice.jsonl")[:8]
    lines[3] = lines[3].replace("3.mp4", "absent.mp4")                       # 1 in 9 visits fails
    (tmp_path / "choice.jsonl").write_text("".join(lines))
    error = fine_tune("choice", tmp_path / "choice.jsonl", tmp_path / "run", whole_run,
                      "--steps", 50, code=1)
    assert "11 of 103 clips cannot be read, above 1 in 10" in error
    assert re.search(r"choice.jsonl:4: \S+absent.mp4: no such file", error)
    assert "data.py check" in error and ".clean.jsonl" in error
    log = lines_of(tmp_path / "run" / "log.jsonl")
    named = [len(line["unreadable"]) for line in log if isinstance(line.get("unreadable"), list)]
    assert sum(named) == 11
    assert records(tmp_path / "run")[-1]["unreadable"] == 11


def test_words_that_a_checkpoint_lacks_are_said(clips, whole_run, tmp_path):
    lines = [json.loads(line) for line in absolute(clips / "train.jsonl")]
    lines[0]["text"] = "a dog runs"
    (tmp_path / "m.jsonl").write_text(json_lines(*lines))
    printed = fine_tune("pretrain", tmp_path / "m.jsonl", tmp_path / "run", whole_run)
    tokens = finished(whole_run)[0]["sizes"]["vocab_size"]
    assert (f"has {tokens} tokens; it spells or does not know 2 words of the data, such as: dog, "
            "runs") in printed


# ---- Training: the linear probe (Tab. 12, App. D.1)

@pytest.fixture
def mixed_probe(clips, whole_run, tmp_path, monkeypatch):
    """A function that trains a probe on 7 clips and 3 images, four clips encoded at a time."""
    monkeypatch.setattr(eval.Scorer, "CHUNK", 4)

    def train_probe(*videos, code=0) -> str:
        lines = [{"video": f"{clips}/{video}", "answer": "still"} for video in videos]
        (tmp_path / "images.jsonl").write_text(json_lines(*lines))
        return run(train, "--task", "probe", "--init", whole_run / "checkpoint.pt", "--data",
                   clips / "qa.jsonl", tmp_path / "images.jsonl", "--mix", 1, 3, "--batch", 2,
                   "--steps", 12, "--workers", 0, "--log_every", 1, "--out", tmp_path / "run",
                   code=code)
    return train_probe


def test_a_stopped_extraction_goes_on(mixed_probe):
    assert "images and clips in one" in mixed_probe("0.png", "1.png", "2.mp4", code=1)
    assert "features of 2 clips" in mixed_probe("0.png", "1.png", "2.png")


def test_a_stopped_probe_ends_with_the_same_bits(clips, whole_run, tmp_path, monkeypatch):
    flags = ["probe", clips / "qa.jsonl"]
    fine_tune(*flags, tmp_path / "whole", whole_run, "--steps", 6)
    with monkeypatch.context() as stopped:
        stopped.setattr(train.Run, "must_stop", lambda run: run.state["step"] == 2)
        fine_tune(*flags, tmp_path / "run", whole_run, "--steps", 6, code=143)
    assert "resuming" in fine_tune(*flags, tmp_path / "run", whole_run, "--steps", 6)
    same_bits(tmp_path / "run", tmp_path / "whole")


def test_a_resumed_probe_counts_its_clips_once(clips, whole_run, tmp_path):
    lines = absolute(clips / "qa.jsonl")
    lines[2] = lines[2].replace("2.mp4", "gone.mp4")
    (tmp_path / "m.jsonl").write_text("".join(lines))
    for steps in (1, 2):
        fine_tune("probe", tmp_path / "m.jsonl", tmp_path / "run", whole_run, "--steps", steps)
    content, _ = finished(tmp_path / "run")
    read, unreadable = content["state"]["clips"][0].tolist()
    assert unreadable == 1


def test_each_micro_batch_of_a_probe_reads_one_manifest(mixed_probe, tmp_path):
    mixed_probe("0.png", "1.png", "2.png")
    steps = collections.Counter()
    for record in records(tmp_path / "run"):
        (name,) = [Path(name).name for name, row in record["manifests"].items() if "probe" in row]
        steps[name] += 1
    assert steps == {"images.jsonl": 9, "qa.jsonl": 3}                       # --mix 1 3


@pytest.mark.parametrize("all_are_known", [True, False])
def test_a_probe_follows_the_plain_loss(all_are_known, clips, whole_run, tmp_path):
    (tmp_path / "qa.jsonl").write_text("".join(absolute(clips / "qa.jsonl")))
    classes = {line["answer"] for line in lines_of(clips / "qa.jsonl")}
    if not all_are_known:                                      # one answer is no class
        (tmp_path / "answers.json").write_text(json.dumps(sorted(classes)[1:]))
    fine_tune("probe", tmp_path / "qa.jsonl", tmp_path / "run", whole_run, "--steps", 1, "--lr", 0,
              "--batch", 7)
    content, _ = finished(tmp_path / "run")
    model, tokenizer, answers = eval.load_checkpoint(content, tmp_path)
    samples = Clips(Manifest(tmp_path / "qa.jsonl"), tokenizer, "probe", 3, 32, 40, train=False,
                    answers=answers)
    items = [samples[i, i] for i in range(7)]
    video = torch.stack([item["video"] for item in items])
    labels = torch.tensor([item["label"] for item in items])
    assert (labels >= 0).all() == all_are_known
    scores = model.answer_head(model.eval().encode_video(video)[:, 0])
    parameters = list(model.answer_head.parameters())
    loss = F.cross_entropy(scores, labels, ignore_index=-1)
    gradients = torch.autograd.grad(loss, parameters)
    for i, gradient in enumerate(gradients):
        close(content["optimizer"]["state"][i]["exp_avg"], 0.1 * gradient)   # AdamW: beta1 0.9


# ---- Downstream tasks (Sec. 4.2) ----------------------------------------------------------------

@pytest.fixture(scope="session")
def films(tmp_path_factory) -> Path:
    """A folder of 8 toy clips and an image, with a manifest for each task."""
    folder = tmp_path_factory.mktemp("films")
    rng = random.Random(0)
    lines = collections.defaultdict(list)
    for i in range(8):
        toy = data.ToyClip.sample(rng)
        video = f"{i}.mp4"
        frames = toy.frames()
        for t in range(12):                                    # no two frames are equal
            frames[t, :, 6 * t:6 * t + 6] = 255
        data.write_clip(folder / video, frames, 4, {"crf": "18"})
        caption = toy.caption()
        wrong = toy.twin().caption()
        options = [caption, wrong, "a ring"] if i == 1 else [caption, wrong]
        lines["train"].append({"video": video, "text": caption})
        lines["choice"].append({"video": video, "options": options, "answer": 0, "kind": "order"})
        lines["retrieval"].append({"video": video, "texts": [caption, f"{i} {caption}"]})
        lines["qa"].append({"video": video, "question": "what shape is it?",
                            "answer": ["square", "ring", "unheard of"][i % 3], "kind": "shape"})
    for name, samples in lines.items():
        (folder / f"{name}.jsonl").write_text(json_lines(*samples))
    picture(folder / "still.png", (32, 32))
    return folder


def save_checkpoint(path, task="pretrain", objectives=("vtm", "mlm", "vtc"), seed=0, config=(),
                    answers=None, **sizes) -> Path:
    """A checkpoint as train.py writes it, of random weights that make scores differ clearly."""
    texts = ["white black square ring while red turns green blue what shape is it around a 0 7"]
    tokenizer = Tokenizer.train(texts, 100)
    sizes = {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "vocab_size":
             tokenizer.vocab_size, "max_text_len": 40, "answers": len(answers or []), **sizes}
    model = build(seed, **sizes)
    content = {"model": model.state_dict(), "sizes": asdict(model.config), "answers": answers,
               "tokenizer": tokenizer.words.to_str(),
               "config": {"task": task, "objectives": list(objectives), **dict(config)}}
    torch.save(content, path)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt")


def run_eval(task, files, weights, *flags, code=0) -> str:
    """What eval.py prints about a manifest or about videos."""
    source = "--data" if task in eval.MANIFEST_TASKS else "--video"
    return run(eval, "--task", task, source, *files, "--checkpoint", weights, "--workers", 0,
               *flags, code=code)


def test_json_goes_to_a_new_folder(films, checkpoint, tmp_path):
    saved = tmp_path / "new" / "folder" / "r.jsonl"
    run_eval("match", [films / "0.mp4"], checkpoint, "--text", "a ring", "--json", saved)
    assert len(lines_of(saved)) == 1


def results_of(task, files, weights, saved, *flags) -> list[dict]:
    """What eval.py writes to --json."""
    run_eval(task, files, weights, "--json", saved, *flags)
    return lines_of(saved)


def open_model(path, manifest, task, **options) -> tuple[AllInOne, Clips]:
    """A checkpoint's model, and the samples of a manifest as it reads them."""
    model, tokenizer, answers = eval.load_checkpoint(torch.load(path), path)
    sizes = model.config
    return model.eval(), Clips(Manifest(manifest), tokenizer, task, sizes.frames, sizes.image_size,
                               sizes.max_text_len, train=False, answers=answers, **options)


def alone(batch: dict, b: int) -> torch.Tensor:
    """(1, m): text b of a batch without its padding."""
    return batch["text_ids"][b][batch["text_mask"][b]][None]


@pytest.mark.parametrize("above, wrong, right", [
    (0, 0, 1), (0, 1, 1), (3, 2, 1), (0, 4, 2), (7, 0, 3), (12, 1, 1)])
def test_ties_are_ranked_in_a_random_order(above, wrong, right):           # Tab. 3, Tab. 7
    ranks = []
    for order in itertools.permutations([False] * wrong + [True] * right):
        ranks.append(above + 1 + order.index(True))
    recall = {k: 100 * np.mean([rank <= k for rank in ranks]) for k in (1, 5, 10)}
    assert eval.expected_rank(above, wrong, right) == (pytest.approx(np.mean(ranks)),
                                                       pytest.approx(recall))


@pytest.mark.parametrize("scores, reranked, relevant, counts", [
    ([.9, .5, .1], [0, 0, 0], [1, 0, 0], [0, 0, 1]),
    ([.9, .5, .1], [0, 0, 0], [0, 0, 1], [2, 0, 1]),
    ([.5, .5, .5], [0, 0, 0], [1, 1, 0], [0, 1, 2]),           # all tied, two of them right
    ([.9, .8, .1], [0, 0, 0], [0, 1, 1], [1, 0, 1]),           # the better of two right ones
    ([.9, -7., .1], [0, 1, 0], [1, 0, 0], [1, 0, 1]),          # a low logit stands above a cosine
    ([.9, -7., -8.], [0, 1, 1], [0, 0, 1], [1, 0, 1]),         # and cosines do not count among them
    ([.9, -7., .9], [0, 1, 0], [1, 1, 0], [0, 0, 1]),
    ([.5, .5, .1], [1, 0, 0], [0, 1, 0], [1, 0, 1])])          # no tie of a logit and a cosine
def test_reranked_candidates_stand_before_all_others(scores, reranked, relevant, counts):
    found = eval.count_above(torch.tensor([scores]), torch.tensor([reranked]).bool(),
                             torch.tensor([relevant]).bool())
    assert found.tolist() == [counts]


@pytest.mark.parametrize("label, recall", [
    (2, {1: 100, 5: 100, 10: 100}), (3, {1: 0, 5: 100, 10: 100}),
    (0, {1: 0, 5: 50, 10: 100}),                               # tied with another on place 5
    (-1, {1: 0, 5: 0, 10: 0})])                                # no class of the checkpoint
def test_an_unknown_answer_is_never_right(label, recall):
    scores = torch.tensor([0., 0, 5, 2, 3, 4, -1])
    assert eval.recall_of_label(scores, label) == recall


def test_the_median_rank_is_a_median():
    predictions = []
    for rank in (1, 1, 2, 9):
        predictions.append({"kind": "t", "metrics": {"median rank": rank, "mean rank": rank}})
    assert eval.summarise(predictions) == {"t": {"median rank": [1.5], "mean rank": [3.25]}}


def test_a_missing_metric_is_no_zero():                        # the release leaves them out
    predictions = [{"kind": "k", "metrics": {"accuracy %": 100.0, "in vocabulary %": 100.0}},
                   {"kind": "k", "metrics": {"accuracy %": 0.0}}]
    assert eval.summarise(predictions) == {"k": {"accuracy %": [50.0], "in vocabulary %": [100.0]}}


def test_the_majority_is_that_of_each_kind():
    predictions = []
    for kind, label in (("who", 3), ("who", 1), ("who", 1), ("who", -1), ("who", -1), ("who", -1),
                        ("what", 3)):                          # -1: an answer that is no class
        predictions.append({"kind": kind, "label": label, "metrics": {}})
    eval.add_majority(predictions)
    assert [p["metrics"]["majority %"] for p in predictions] == [0, 100, 100, 0, 0, 0, 100]


def test_the_clip_without_a_score_is_named():
    eval.check_scores(torch.tensor([[0.0], [-torch.inf]]), ["a", "b"])       # no such candidate
    with pytest.raises(ValueError, match="^b: the model's score is not a number"):
        eval.check_scores(torch.tensor([[0.0], [torch.nan]]), ["a", "b"])


def test_the_interval_is_a_binomial_one():
    predictions = [{"kind": "k", "metrics": {"accuracy %": 100.0 * (i % 2)}} for i in range(100)]
    mean, low, high = eval.summarise(predictions, 1000)["k"]["accuracy %"]
    assert mean == 50
    assert [low, high] == pytest.approx([40.2, 59.8], abs=1.5)
    assert eval.summarise(predictions, 1000) == eval.summarise(predictions, 1000)


@pytest.mark.parametrize("views", [1, 3])                      # 3 x 3 of Tab. 2 to 4
def test_options_are_scored_by_their_mean_matched_logit(views, films, checkpoint, tmp_path):
    results = results_of("choice", [films / "choice.jsonl"], checkpoint, tmp_path / "r",
                         "--views", views)
    model, clips = open_model(checkpoint, films / "choice.jsonl", "choice", views=views)
    for i, result in enumerate(results):                       # each option alone, without padding
        item = clips[i, i]
        expected = []
        for ids in item["options"]:
            videos = item["video"].view(views, 3, 3, 32, 32)
            logits = match_logits(model, videos, torch.tensor([ids] * views))
            expected.append(logits[:, 1].mean().item())
        assert result["scores"] == pytest.approx(expected, abs=1e-4)
        assert result["metrics"]["accuracy %"] == 100 * (max(expected) == expected[0])
        assert result["metrics"]["chance %"] == pytest.approx(100 / len(expected))


def test_views_are_of_different_frames(checkpoint, tmp_path):
    video = film(tmp_path / "a.mp4", "n=40")
    line = {"video": str(video), "options": ["white ring", "black square"], "answer": 0}
    (tmp_path / "m.jsonl").write_text(json_lines(line))
    scores = []
    for views in (1, 3):
        result, = results_of("choice", [tmp_path / "m.jsonl"], checkpoint, tmp_path / "r",
                             "--views", views)
        scores.append(result["scores"])
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)


def answering_checkpoint(folder, task) -> Path:
    head = {"qa": "paper", "probe": "linear"}[task]
    return save_checkpoint(folder / f"{task}.pt", task, [task], answers=["ring", "white", "square"],
                           answer_head=head)


def test_questions_are_answered_by_the_best_class(films, tmp_path):                    # Tab. 2
    path = answering_checkpoint(tmp_path, "qa")
    results = results_of("qa", [films / "qa.jsonl"], path, tmp_path / "r")
    model, clips = open_model(path, films / "qa.jsonl", "qa")
    for i, result in enumerate(results):
        item = clips[i, i]
        features = model(item["video"][None], torch.tensor([item["question"]]))
        order = model.answer_head(features.pooled)[0].argsort(descending=True).tolist()
        assert result["answers"] == [["ring", "white", "square"][a] for a in order]
        assert result["label"] == [2, 0, -1][i % 3]
        right = 100 * (order[0] == result["label"])
        expected = {"accuracy %": right, "majority %": 100 * (i % 3 == 0)}
        if result["label"] >= 0:
            expected["in vocabulary %"] = right
        assert result["metrics"] == expected


def test_actions_are_classified_by_the_video_alone(films, tmp_path):                   # Tab. 12
    path = answering_checkpoint(tmp_path, "probe")
    results = results_of("probe", [films / "qa.jsonl"], path, tmp_path / "r")
    model, clips = open_model(path, films / "qa.jsonl", "probe")
    for i, result in enumerate(results):
        cls = model.encode_video(clips[i, i]["video"][None])[:, 0]
        order = model.answer_head(cls)[0].argsort(descending=True).tolist()
        assert result["answers"] == [["ring", "white", "square"][a] for a in order]
        known = 100 * (result["label"] >= 0)
        assert result["metrics"] == {"top-1 %": 100 * (order[0] == result["label"]),
                                     "top-5 %": known, "top-10 %": known}


@pytest.mark.parametrize("views", [1, 3])
def test_pretraining_scores_clips_and_masked_words(views, films, checkpoint, tmp_path):  # Tab. 6
    results = results_of("pretrain", [films / "train.jsonl"], checkpoint, tmp_path / "r",
                         "--views", views)
    model, clips = open_model(checkpoint, films / "train.jsonl", "pretrain", views=views)
    batch = collate([clips[i, i] for i in range(8)], clips, 8)
    videos = batch["video"].view(8, views, 3, 3, 32, 32).unbind(1)
    scores = [pretraining_scores(model, {**batch, "video": video}, ("vtm", "mlm"))[0]
              for video in videos]
    for name in ("vtm", "mlm"):
        logits = torch.stack([score[name].logits for score in scores]).mean(0)
        expected = []
        for row, label in zip(logits, scores[0][name].labels.tolist()):
            if label >= 0:                                     # else padding
                expected.append((label, 100 * (int(row.argmax()) == label), row.softmax(0)[label]))
        found = [r for r in results if r["kind"] == name.upper()]
        assert [r["label"] for r in found] == [label for label, _, _ in expected]
        assert [r["metrics"]["accuracy %"] for r in found] == [right for _, right, _ in expected]
        assert [r["probability"] for r in found] == pytest.approx(
            [p.item() for _, _, p in expected], abs=2e-4)


def test_a_masked_word_is_counted_for_its_clip(films, checkpoint, tmp_path):
    results = results_of("pretrain", [films / "train.jsonl"], checkpoint, tmp_path / "r")
    model, clips = open_model(checkpoint, films / "train.jsonl", "pretrain")
    for i in range(8):
        masked = [label for label in clips[i, i]["mlm_labels"] if label >= 0]
        assert masked == [r["label"] for r in results if r["kind"] == "MLM" and r["index"] == i]


def test_a_new_objective_is_scored(films, checkpoint, tmp_path, monkeypatch):
    def with_frame_count(model, batch, objectives):            # what a user adds to allinone.py
        scores, features = pretraining_scores(model, batch, objectives)
        B = len(batch["video"])
        scores["count"] = Scores(torch.tensor([[0.0, 1.0]] * B), torch.tensor([1, 0] * (B // 2)))
        return scores, features
    monkeypatch.setattr(eval, "pretraining_scores", with_frame_count)
    printed = run_eval("pretrain", [films / "train.jsonl"], checkpoint)
    assert re.search(r"^COUNT +50\.0 +8$", printed, re.M)


def side(names: str) -> eval.Side:
    """Clips or captions whose cosines are 1 with their own and 0 with all others."""
    count = len(names)
    return eval.Side(list(names), list(range(count)), torch.eye(count).double(),
                     torch.arange(count))


def test_pairs_of_both_directions_are_reranked(films, checkpoint, tmp_path, monkeypatch):
    pairs = {}
    rank = eval.rank_candidates

    def record(direction, queries, candidates, keys, logits):
        pairs[direction] = set(keys.values())
        assert pairs[direction] <= logits.keys()
        return rank(direction, queries, candidates, keys, logits)

    monkeypatch.setattr(eval, "rank_candidates", record)
    run_eval("retrieval", [films / "retrieval.jsonl"], checkpoint, "--rerank", 4)
    assert not pairs["video to text"] <= pairs["text to video"]


def test_equal_clips_tie_exactly():
    """Sums in float64 differ in the last bit with the place of a clip in a matrix."""
    torch.manual_seed(0)
    embedding = torch.randn(512).double()
    clips = eval.Side(["a"] * 7, list(range(7)), embedding.repeat(7, 1), torch.arange(7))
    captions = eval.Side(["a#0"], [0], torch.randn(1, 512).double(), torch.arange(1))
    with eval.joined_processes():
        (_, cosines), = eval.cosine_blocks(captions, clips)
    assert len(set(cosines[0].tolist())) == 1


@pytest.mark.parametrize("logits, best, ranks", [
    ({}, "AB", [1, 1]),                                        # by cosine
    ({(1, 0): [0, -5.0]}, "BB", [2, 1]),                       # clip 1 is re-ranked for caption 0
    ({(0, 0): [0, -7.0], (1, 0): [0, -5.0]}, "BB", [2, 1])])
def test_reranked_candidates_stand_before_all_others(logits, best, ranks):
    keys = {(0, 0): (0, 0), (0, 1): (1, 0)}                    # what has no logits is unreadable
    with eval.joined_processes():
        results = eval.rank_candidates("text to video", side("ab"), side("AB"), keys, logits)
    assert "".join(result["best"] for result in results) == best
    assert [result["metrics"]["mean rank"] for result in results] == ranks


def test_features_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "features.pt"
    eval.write_features(path, "key", {"clip": torch.zeros(2)})
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        eval.write_features(path, lambda: "no key", {"clip": torch.ones(2)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_clip_that_is_unreadable_twice_counts_once(checkpoint, films):
    model, clips = open_model(checkpoint, films / "retrieval.jsonl", "retrieval")
    with eval.joined_processes() as device:
        scorer = eval.Scorer(model, clips, eval.EvalConfig("retrieval", workers=0), device)
        scorer.unreadable = ["a", "b", "a"]
        assert scorer.all_unreadable() == ["a", "b"]


def test_equal_clips_are_found_in_their_order(checkpoint, films):
    model, clips = open_model(checkpoint, films / "retrieval.jsonl", "retrieval")
    features = {i: torch.ones(512, dtype=torch.float16) for i in range(300)}
    config = eval.EvalConfig("search", text=("a",), top=300, workers=0)
    with eval.joined_processes() as device, torch.no_grad():
        scorer = eval.Scorer(model, clips, config, device)
        (nearest,) = eval.nearest_clips(scorer, features, [(2, 3)])
    assert [sample for _, sample in nearest] == list(range(300))


def test_rows_of_a_clip_stand_together():
    batch = {"text_ids": torch.zeros(2, 8), "source_line": ["a", "b"], "kind": [None, None],
             "index": torch.tensor([0, 1])}
    predictions = eval.objective_predictions("direction", batch, torch.eye(4), [0, 1, 2, 3])
    assert [prediction["source_line"] for prediction in predictions] == ["a", "a", "b", "b"]


@pytest.mark.parametrize("best, views", [(0, 1), (1, 1), (2, 1), (99, 3), (0, 3)])
def test_retrieval_ranks_by_cosine_then_matching(best, views, films, checkpoint, tmp_path,
                                                 monkeypatch):
    """Each side alone, without padding; of both directions the best by their own cosines."""
    monkeypatch.setattr(eval, "COSINES_IN_MEMORY", 40)         # a few queries at once
    results = results_of("retrieval", [films / "retrieval.jsonl"], checkpoint, tmp_path / "r",
                         "--rerank", best, "--views", views, "--batch", 3)
    model, clips = open_model(checkpoint, films / "retrieval.jsonl", "retrieval", views=views)
    items = [clips[i, i] for i in range(8)]
    videos = [item["video"].view(views, 3, 3, 32, 32) for item in items]
    captions = [torch.tensor([ids]) for item in items for ids in item["all_captions"]]
    with torch.no_grad():
        video = torch.stack([video_embedding(model, video).mean(0) for video in videos])
        text = torch.cat([text_embedding(model, ids) for ids in captions])
        cosines = text @ video.T                                                     # (16, 8)
        matched = torch.zeros_like(cosines)
        for t, ids in enumerate(captions):
            for v in range(8):
                logits = match_logits(model, videos[v], ids.expand(views, -1))
                matched[t, v] = logits[:, 1].mean()
    assert len(results) == 16 + 8
    for q, result in enumerate(results):
        if q < 16:
            cosine, score, relevant = cosines[q], matched[q], [q // 2]
        else:
            v = q - 16
            cosine, score, relevant = cosines[:, v], matched[:, v], [2 * v, 2 * v + 1]
        if best:                                               # the rest follows these
            reranked = cosine >= cosine.topk(min(best, len(cosine))).values[-1] - 1e-6
            cosine = torch.where(reranked, score + 99, cosine)
        highest = cosine[relevant].max()
        fewest = 1 + int((cosine > highest + 2e-5).sum())      # but for what rounding may tie
        most = 1 + int((cosine > highest - 2e-5).sum())
        assert fewest <= result["metrics"]["mean rank"] <= most
        assert result["metrics"]["R@1 %"] == 0 or fewest == 1


def test_embeddings_of_views_are_averaged(films, checkpoint):
    model, clips = open_model(checkpoint, films / "retrieval.jsonl", "retrieval", views=3)
    with eval.joined_processes() as device, torch.no_grad():
        scorer = eval.Scorer(model, clips, eval.EvalConfig("retrieval", workers=0), device)
        sides, _, _ = eval.encode_sides(scorer)
        expected = torch.stack([video_embedding(model, clips[i, i]["video"]).mean(0)
                                for i in range(8)])
    torch.testing.assert_close(sides.embedding.float(), expected, rtol=0, atol=1e-6)


def test_binary_matching_reranks_retrieval(films, tmp_path):   # Sec. 3.3's VTM, not "rank"
    printed = []
    for objectives in (["vtc", "vtm"], ["vtc", "rank"], ["vtm"]):
        path = save_checkpoint(tmp_path / "c.pt", "retrieval", objectives)
        printed.append(run_eval("retrieval", [films / "retrieval.jsonl"], path, "--rerank", 99))
    tables = [text.partition("kind")[2] for text in printed]
    assert tables[0] == tables[1] == tables[2]                 # 99: all pairs, as without VTC
    assert "not trained with VTC: VTM ranks all pairs" in printed[2]
    assert "frames; VTM ranks all pairs\n" in printed[2]


def test_equal_captions_share_their_ranks(films, checkpoint, tmp_path):
    lines = [{"video": str(films / f"{i}.mp4"), "text": "a white ring"} for i in range(3)]
    (tmp_path / "m.jsonl").write_text(json_lines(*lines))
    for flags in ([], ["--rerank", 2]):
        results = results_of("retrieval", [tmp_path / "m.jsonl"], checkpoint, tmp_path / "r",
                             *flags)
        ranks = [r["metrics"]["mean rank"] for r in results if r["kind"] == "video to text"]
        assert ranks == [2, 2, 2]


def same_results(results, expected):
    """Equal but for the rounding of sums."""
    assert len(results) == len(expected)
    for result, other in zip(results, expected):
        assert result.keys() == other.keys()
        for name, value in result.items():
            if name in ("scores", "probability"):
                assert value == pytest.approx(other[name], abs=2e-4)
            else:
                assert value == other[name]


@pytest.mark.parametrize("task, flags", [
    ("choice", ["--views", 2]), ("qa", []), ("probe", []), ("pretrain", []),
    ("retrieval", []), ("retrieval", ["--rerank", 3])])
def test_results_do_not_depend_on_the_batch(task, flags, films, checkpoint, tmp_path):
    manifest = films / f"{task}.jsonl"
    if task in ("qa", "probe"):
        checkpoint = answering_checkpoint(tmp_path, task)
    if task in ("probe", "pretrain"):
        manifest = films / {"probe": "qa.jsonl", "pretrain": "train.jsonl"}[task]
    small, large = (results_of(task, [manifest], checkpoint, tmp_path / "r", "--batch", n, *flags)
                    for n in (3, 8))
    same_results(small, large)


@pytest.mark.parametrize("flag", ["--patch_order", "--roll_select"])
def test_random_draws_do_not_depend_on_the_batch(flag, films, checkpoint, tmp_path):
    small, large = (results_of("retrieval", [films / "retrieval.jsonl"], checkpoint,
                               tmp_path / "r", flag, "random", "--rerank", 2, "--batch", n)
                    for n in (3, 8))
    assert small == large


def test_random_draws_leave_mismatched_pairs(films, checkpoint, tmp_path):
    small, large = (results_of("pretrain", [films / "train.jsonl"], checkpoint, tmp_path / "r",
                               "--roll_select", "random", "--batch", n) for n in (3, 16))
    assert {result["label"] for result in small if result["kind"] == "VTM"} == {0, 1}
    assert small == large


def test_what_processes_exchange_is_rows(films, checkpoint, monkeypatch):
    """A view of a batch would be pickled with the whole batch."""
    sizes = []
    gather = eval.gather_objects
    def measured(objects):
        sizes.append(len(pickle.dumps(objects)))
        return gather(objects)
    monkeypatch.setattr(eval, "gather_objects", measured)
    model, clips = open_model(checkpoint, films / "retrieval.jsonl", "retrieval")
    E = model.config.vtc_dim
    with eval.joined_processes() as device, torch.no_grad():
        scorer = eval.Scorer(model, clips, eval.EvalConfig("retrieval", workers=0), device)
        scorer.encode_clips(range(8), eval.video_cls)
        eval.encode_sides(scorer)
    assert sizes[0] < 8 * (4 * 32 + 1000)                      # a cls token of each of 8 clips
    assert sizes[1] < 8 * 3 * (4 * E + 1000)                   # a clip and two captions


@pytest.mark.parametrize("task, flags, count, drawn", [
    ("retrieval", ["--rerank", 3, "--batch", 3], 21, 0), ("choice", ["--batch", 3], 7, 0),
    ("pretrain", [], 7, 0), ("explain", ["--text", "white [MASK] while red"], 7, 7),
    ("attention", [], 7, 1),
    ("search", ["--text", "white ring", "a square", "--rerank", 2, "--top", 4], 8, 2)])
def test_two_processes_find_what_one_finds(task, flags, count, drawn, films, checkpoint, tmp_path):
    is_scored = task in eval.MANIFEST_TASKS
    name = task if task in ("retrieval", "choice") else "train"
    lines = lines_of(films / f"{name}.jsonl")[:7]
    for line in lines:
        line["video"] = str(films / line["video"])
    (tmp_path / "m.jsonl").write_text(json_lines({**lines[0], "video": "absent.mp4"}, *lines))
    flags = ["--task", task, "--checkpoint", checkpoint, "--workers", 0, *flags,
             "--data" if is_scored else "--video", tmp_path / "m.jsonl"]
    flags_of = {}
    for n in "12":
        out = [] if is_scored else ["--out", tmp_path / n]
        flags_of[n] = [*flags, "--json", tmp_path / f"{n}.jsonl", *out]
    two = Started(tmp_path / "out.txt", "eval.py", *flags_of["2"],
                  processes=2)                                 # two does not divide the clips
    printed = run(eval, *flags_of["1"])
    two.wait()
    in_two = (tmp_path / "out.txt").read_text()
    numbers = [re.findall(r"^[^:]*\d\.\d[^:]*$", text, re.M) for text in (printed, in_two)]
    assert numbers[0] == numbers[1] and in_two.count("absent.mp4") == 1        # never replaced
    assert not is_scored or f"INCOMPLETE: 1 of {len(lines) + 1} samples" in printed
    results = lines_of(tmp_path / "1.jsonl")
    assert results == lines_of(tmp_path / "2.jsonl")
    assert sum(result.get("kind") != "MLM" for result in results) == count
    pictures = [{p.name: p.read_bytes() for p in (tmp_path / n).glob("*")} for n in "12"]
    assert pictures[0] == pictures[1] and len(pictures[0]) == drawn


EVAL_EFFECTS = [  # (task, a flag that changes its results, what the report then says)
    ("choice", "--no-boxes", ""), ("choice", "--order reversed", "--order reversed"),
    ("choice", "--order shuffled", "--order shuffled"),
    ("choice", "--order first", "--order first"),
    ("choice", "--resize paper", "--resize paper"),
    ("choice", "--resize proportions", "--resize proportions"),
    ("choice", "--views 2", "--views 2"), ("choice", "--frames 1", "; 1 frames"),
    ("choice", "--image_size 48", ""), ("choice", "--max_text_len 5", ""),
    ("choice", "--temporal time_average", ""), ("choice", "--roll_ratio 0.75", ""),
    ("choice", "--roll release", ""), ("choice", "--roll_start 2", ""),
    ("choice", "--roll_select varying", ""), ("choice", "--patch_order random", ""),
    ("retrieval", "--no-roll_unimodal", ""), ("retrieval", "--rerank 3", "--rerank 3"),
    ("choice", "--bootstrap 20", "["), ("pretrain", "--objectives mlm", ""),
    ("fill", "--blind", ""), ("explain", "--block 1", ""), ("search", "--window 1", ""),
    ("search", "--top 2", ""), ("search", "--rerank 3", ""),
    ("choice", "--columns options=others", "")]

EVAL_ELSEWHERE = {  # flags whose effect other tests show, or of which there must be none
    "task": "every_task_has_a_score", "data": "a_report_names_what_is_unreadable",
    "video": "a_table_of_clips_has_columns", "checkpoint": "a_missing_checkpoint_names_its_run",
    "text": "ask_gives_the_likeliest_answers", "json": "json_goes_to_a_new_folder",
    "out": "a_picture_names_its_file", "batch": "results_do_not_depend_on_the_batch",
    "workers": "results_do_not_depend_on_the_reading_processes",
    "vocab": "a_released_baseline_has_the_same_vocabulary",
    "baseline": "a_baseline_reads_the_same_clips", "index": "a_stored_index_answers_as_a_fresh_one"}


def test_the_effect_of_every_flag_of_evaluation_is_tested():
    names = set()
    for _, flags, _ in EVAL_EFFECTS:
        names.add(flags.split()[0].removeprefix("--").removeprefix("no-"))
    expected = {*eval.EvalConfig.__dataclass_fields__, *eval.MODEL_FLAGS}
    assert names | EVAL_ELSEWHERE.keys() == expected
    for name in EVAL_ELSEWHERE.values():
        assert f"test_{name}" in globals()


def test_results_do_not_depend_on_the_reading_processes(films, checkpoint, tmp_path):
    results = [results_of("choice", [films / "choice.jsonl"], checkpoint, tmp_path / "r",
                          "--workers", workers) for workers in (0, 1)]
    assert results[0] == results[1]


@pytest.mark.parametrize("task, flags, message", EVAL_EFFECTS)
def test_every_flag_changes_what_is_scored(task, flags, message, films, checkpoint, tmp_path):
    """The observable is --json, and for what is only printed, the report."""
    video = film(tmp_path / "wide.mp4", "n=40 w=96 h=64")
    sample = {"video": str(video), "text": "white ring", "options": ["white ring", "black square"],
              "others": ["a square", "white ring"], "texts": ["white ring while red turns green"],
              "answer": 0}
    lines = [{**sample, "boxes": [[0, 8, 8, 60, 50]]}, sample, {**sample, "start": 0.5}]
    if flags != "--no-boxes":
        del lines[0]["boxes"]
    (tmp_path / "m.jsonl").write_text(json_lines(*lines, {**sample, "texts": ["black square"]}))
    words = {"fill": ["--text", "white [MASK] while red"], "explain": ["--text", "white ring"],
             "search": ["--text", "white ring"]}.get(task, [])
    printed = []
    results = []
    manifest = tmp_path / "m.jsonl"
    if task in ("retrieval", "search"):
        manifest = films / "retrieval.jsonl"
    for extra in ([], flags.split()):
        printed.append(run_eval(task, [manifest], checkpoint, *words, *extra,
                                "--json", tmp_path / "r"))
        results.append(lines_of(tmp_path / "r"))
    assert message in printed[1] and (not message or message not in printed[0])
    assert results[0] != results[1] or "--bootstrap" in flags


@pytest.mark.parametrize("config, sizes, flag", [              # what a checkpoint passes on
    ({"resize": "paper"}, {}, "--resize paper"), ({"boxes": False}, {}, "--no-boxes"),
    ({}, {"frames": 2}, "--frames 2"), ({}, {"image_size": 48}, "--image_size 48"),
    ({}, {"roll_ratio": 0.5}, "--roll_ratio 0.5"),
    ({}, {"temporal": "time_average"}, "--temporal time_average")])
def test_clips_are_scored_as_the_checkpoint_was_trained(config, sizes, flag, films, tmp_path):
    video = film(tmp_path / "wide.mp4", "n=40 w=96 h=64")
    line = {"video": str(video), "options": ["white ring", "black square"], "answer": 0}
    lines = [line] if "boxes" not in config else [{**line, "boxes": [[0, 8, 8, 60, 50]]}]
    (tmp_path / "m.jsonl").write_text(json_lines(*lines))
    plain = save_checkpoint(tmp_path / "plain.pt")
    trained = save_checkpoint(tmp_path / "trained.pt", config=config, **sizes)
    if "image_size" in sizes:                                  # weights that differ in shape
        content = torch.load(trained)
        report = load_weights(AllInOne(Config(**content["sizes"])), torch.load(plain)["model"], "")
        assert report["resized"] == ["pos_embed"]
        return
    default, by_flag, passed_on = (
        results_of("choice", [tmp_path / "m.jsonl"], path, tmp_path / "r", *flags)
        for path, flags in ((plain, []), (plain, flag.split()), (trained, [])))
    assert default != by_flag
    assert by_flag == passed_on


def test_a_flag_stands_above_the_checkpoint(films, tmp_path):
    plain = save_checkpoint(tmp_path / "plain.pt")
    trained = save_checkpoint(tmp_path / "trained.pt", config={"resize": "paper"})
    default, undone = (results_of("choice", [films / "choice.jsonl"], path, tmp_path / "r", *flags)
                       for path, flags in ((plain, []), (trained, ["--resize", "release"])))
    assert default == undone


def test_the_objectives_of_training_are_scored(films, tmp_path):
    path = save_checkpoint(tmp_path / "c.pt", objectives=["mlm", "vtc"])
    results = results_of("pretrain", [films / "train.jsonl"], path, tmp_path / "r")
    assert {result["kind"] for result in results} == {"MLM"}


@pytest.mark.parametrize("flags, message, code", [
    ("chose --data x", "--task chose: expected one of choice, retrieval, qa", 1),
    ("choice", "--task choice needs --data", 1),
    ("match --text a", "needs --video", 1),
    ("fill --video x", "needs --text", 1),
    ("fill --video x --text a", "needs a [MASK]", 1),
    ("ask --video x --text a b", "several --text", 1),
    ("choice --data x --batch 0", "--batch, --views and --top must be 1 or more", 1),
    ("search --video x --text a --window -1", "and --workers must be 0 or more", 1),
    ("choice --data x --rerank 2", "--rerank is for --task retrieval", 1),
    ("match --video x --text a --views 3", "--views is for --task choice, retrieval, qa", 1),
    ("match --video x --text a --bootstrap 9", "--bootstrap is for --task choice", 1),
    ("match --video x --text a --data y", "--data is for --task choice", 1),
    ("choice --data x --video y", "--video is for --task fill, match", 1),
    ("choice --data x --text y", "--text is for --task fill, match", 1),
    ("choice --data x --out y", "--out is for --task fill, match", 1),
    ("choice --data x --window 3", "--window is for --task fill, match", 1),
    ("choice --data x --objectives mlm", "--objectives is for --task pretrain", 1),
    ("match --video x --text a --baseline b", "--baseline is for --task attention", 1),
    ("match --video x --text a --blind", "--blind is for --task fill", 1),
    ("match --video x --text a --block 3", "--block is for --task explain", 1),
    ("match --video x --text a --index y", "--index is for --task search", 1),
    ("match --video x --text a --top 3", "--top is for --task search", 1),
    ("profile", "--checkpoint is for --task choice, retrieval", 1),
    ("choice --data x --resize squash", "invalid choice: 'squash'", 2),
    ("probe --data {films}/qa.jsonl", "fine-tune it with train.py --task probe", 1),
    ("explain --video x --text a --block 3", "the model has blocks 1 to 2", 1),
    ("explain --video x --text a --block -1", "the model has blocks 1 to 2", 1),
    ("explain --video x --text a --roll_select random", "cannot be put back", 1),
    ("match --video {empty} --text a", "no clip there", 1),
    ("match --video {empty}/a.mp4 --text a", "no clip can be read", 1),
    ("choice --data absent.jsonl", "absent.jsonl: no such", 1)])
def test_flags_that_do_not_fit_say_why(flags, message, code, films, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = flags.format(films=films, empty=tmp_path / "empty").split()
    error = run(eval, "--checkpoint", checkpoint, "--workers", 0, "--task", *flags, code=code)
    assert message in error


@pytest.mark.parametrize("objectives, flags, message", [
    (["mlm"], "retrieval --data {films}/retrieval.jsonl", "was not trained to match"),
    (["vtm", "mlm"], "search --video {films} --text a", "was not trained with VTC"),
    (["mlm"], "choice --data {films}/choice.jsonl", "was not trained to match"),
    (["mlm"], "match --video {films} --text a", "was not trained to match"),
    (["vtc"], "retrieval --rerank 2 --data {films}/retrieval.jsonl", "was not trained to match"),
    (["qa"], "match --video {films} --text a", "was not trained to match"),
    (["vtm"], "ask --video {films} --text a", "fine-tune it with train.py --task qa")])
def test_untrained_heads_score_nothing(objectives, flags, message, films, tmp_path):
    path = save_checkpoint(tmp_path / "c.pt", objectives=objectives)
    error = run(eval, "--checkpoint", path, "--task", *flags.format(films=films).split(), code=1)
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("damage, message", [
    (lambda c: c["model"]["norm.weight"].fill_(torch.nan), "score is not a number"),
    (lambda c: c.pop("tokenizer"), "another version of train.py"),
    (lambda c: c["sizes"].update(colour="red"), "another version"),
    (lambda c: c.update(tokenizer=re.sub(r'("\[MASK\]": ?)4', r"\g<1>2147483647", c["tokenizer"])),
     "without large gaps"),
    (lambda c: c.update(tokenizer="{}"), "tokenizer cannot be read"),
    (lambda c: c.update(tokenizer=Tokenizer.train(["a b"], 90).words.to_str()), "use --vocab")])
def test_a_damaged_checkpoint_is_refused(damage, message, films, checkpoint, tmp_path):
    content = torch.load(checkpoint)
    damage(content)
    torch.save(content, tmp_path / "odd.pt")
    for task in ("choice", "retrieval"):
        error = run_eval(task, [films / f"{task}.jsonl"], tmp_path / "odd.pt", code=1)
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("task, name", [
    ("retrieval", "text_proj"), ("retrieval", "video_proj"), ("search", "text_proj"),
    ("search", "video_proj")])
def test_a_cosine_that_is_no_number_is_refused(task, name, films, checkpoint, tmp_path):
    content = torch.load(checkpoint)
    weight, = (key for key in content["model"] if key.startswith(f"{name}.weight"))
    content["model"][weight].fill_(torch.nan)
    torch.save(content, tmp_path / "odd.pt")
    files, flags = [films / "retrieval.jsonl"], ["--text", "a"] * (task == "search")
    error = run_eval(task, files, tmp_path / "odd.pt", *flags, code=1)
    assert "score is not a number" in error


@pytest.mark.parametrize("flags, run_needed", [
    ("ask --video x --text a", "qa"), ("search --video x --text a", "retrieval"),
    ("retrieval --data x", "retrieval"), ("probe --data x", "probe"),
    ("choice --data x", "pretrain"),
    ("choice --data x --checkpoint runs/qa/best.pt", "qa")])
def test_a_missing_checkpoint_names_its_run(flags, run_needed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = run(eval, "--task", *flags.split(), code=1)
    assert f"runs/{run_needed}/" in error and f"train.py --task {run_needed}" in error


@pytest.mark.parametrize("answers, head, takes_over", [
    (["a", "b"], "paper", True), (["b", "a"], "paper", False), (["a", "b", "c"], "paper", False),
    (["a", "b"], "linear", False)])
def test_an_answer_head_is_taken_over_for_its_own_answers(answers, head, takes_over, tmp_path):
    path = save_checkpoint(tmp_path / "c.pt", "qa", ["qa"], answers=["a", "b"])
    content = torch.load(path)
    model, _, listed = eval.load_checkpoint(content, path, answers=answers, answer_head=head)
    weights = model.state_dict()
    names = [name for name in content["model"] if re.fullmatch("answer_head.*weight", name)]
    same = [name in weights and weights[name].equal(content["model"][name]) for name in names]
    assert listed == answers and all(same) == takes_over == any(same)


def release_files(folder, **options) -> tuple[Path, Path]:
    """(.ckpt, vocab.txt) as the authors' code writes and reads them, of tiny sizes."""
    weights = release_weights(**options)
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, folder / "b.ckpt")
    tokens = [*data.SPECIALS, *"white black square ring while red turns green blue a".split()]
    tokens += [f"word{i}" for i in range(60 - len(tokens))]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    return folder / "b.ckpt", folder / "vocab.txt"


def test_a_released_file_is_used_from_the_command_line(films, tmp_path):
    weights, vocab = release_files(tmp_path, D=64)
    texts = ["white ring", "a black square while red"]
    result, = results_of("match", [films / "0.mp4"], weights, tmp_path / "r", "--vocab", vocab,
                         "--text", *texts)
    model, report = load_release(weights)
    assert model.config.heads == 1 and model.config.frames == 3 and not report["initialised"]
    (tmp_path / "m.jsonl").write_text(json_lines({"video": str(films / "0.mp4"), "texts": texts}))
    clips = Clips(Manifest(tmp_path / "m.jsonl"), Tokenizer.load(str(vocab)), "retrieval", 3, 64,
                  10, train=False)
    item = clips[0, 0]
    for row, ids in zip(result["captions"], item["all_captions"]):
        logits = match_logits(model.eval(), item["video"][None], torch.tensor([ids]))
        assert row["matched"] == pytest.approx(logits.softmax(1)[0, 1].item(), abs=1e-3)


def test_a_released_baseline_has_the_same_vocabulary(films, tmp_path):
    weights, vocab = release_files(tmp_path, D=64)
    printed = run_eval("attention", [films / "0.mp4"], weights, "--vocab", vocab, "--baseline",
                       weights)
    assert printed.count("shares of the text's attention") == 1


@pytest.mark.parametrize("task", ["retrieval", "search"])
def test_a_released_file_is_searched_by_its_projections(task, films, tmp_path):
    weights, vocab = release_files(tmp_path, D=64)
    flags = ["--vocab", vocab, "--text", "white ring"] if task == "search" else ["--vocab", vocab]
    files = [films / "retrieval.jsonl"] if task == "retrieval" else [films]
    results = results_of(task, files, weights, tmp_path / "r", *flags)
    assert len(results) == (5 if task == "search" else 24)
    content = torch.load(weights)["state_dict"]
    content = {name: content[name] for name in content if "_proj." not in name[:16]}
    torch.save({"state_dict": content}, tmp_path / "pretrained.ckpt")
    printed = run_eval(task, files, tmp_path / "pretrained.ckpt", *flags,
                       code=1 if task == "search" else 0)
    assert "not trained with VTC" in printed


def test_a_released_file_with_another_vocabulary_is_refused(films, tmp_path):
    weights, vocab = release_files(tmp_path, D=64)
    vocab.write_text("\n".join([*data.SPECIALS, "white"]))
    error = run_eval("match", [films / "0.mp4"], weights, "--vocab", vocab, "--text", "a", code=1)
    assert "the vocabulary has 6 words" in error and "60: use --vocab" in error


# ---- Fine-tuning, and weights of other people, through both command lines ------------------------

def test_the_choice_head_starts_as_vtms(clips, whole_run, tmp_path):               # Sec. 4.2.3
    questions = clips / "choice.jsonl"
    printed = fine_tune("choice", questions, tmp_path / "run", whole_run, "--val", questions,
                        "--lr", 0)
    tuned, _ = finished(tmp_path / "run")
    pretrained, _ = finished(whole_run)
    assert torch.equal(tuned["model"]["vtm_head.weight"], pretrained["model"]["vtm_head.weight"])
    zero_shot = run_eval("choice", [questions], whole_run / "checkpoint.pt")
    assert re.search(r"order +\d+\.\d +50\.0 +24", zero_shot)[0] in printed


@pytest.fixture
def probe(clips, whole_run, tmp_path):
    """A function that trains a probe and returns how many clips it encoded anew."""
    folder = shutil.copytree(clips, tmp_path / "clips")
    shutil.copytree(whole_run, tmp_path / "init")

    def train_probe(*flags) -> int:
        (tmp_path / "run" / "checkpoint.pt").unlink(missing_ok=True)
        printed = fine_tune("probe", folder / "qa.jsonl", tmp_path / "run", tmp_path / "init",
                            *flags)
        computed = re.findall(r"features of (\d+) clips computed", printed)
        return int((computed or [0])[0])
    return train_probe


def test_a_probe_moves_only_its_layer(probe, whole_run, tmp_path):                     # Tab. 12
    probe()
    probed, _ = finished(tmp_path / "run")
    pretrained, _ = finished(whole_run)
    for name, tensor in pretrained["model"].items():
        assert tensor.equal(probed["model"][name])
    assert probed["model"].keys() - pretrained["model"].keys() == {
        "answer_head.0.weight", "answer_head.0.bias"}


def test_a_probe_learns(probe, tmp_path):
    heads = []
    for lr in ("0", "1"):
        probe("--lr", lr)
        content, _ = finished(tmp_path / "run")
        heads.append(content["model"]["answer_head.0.weight"])
    assert not heads[0].equal(heads[1])


def test_a_probe_encodes_each_clip_once(probe, tmp_path):
    assert [probe(), probe("--lr", 1)] == [7, 0]
    shutil.copy(tmp_path / "clips" / "9.mp4", tmp_path / "clips" / "2.mp4")    # another clip
    assert probe() == 1
    (tmp_path / "run" / "features.pt").write_bytes(b"damaged")                 # only a cache
    assert probe() == 7
    path = tmp_path / "init" / "checkpoint.pt"
    content = torch.load(path)
    content["model"]["norm.bias"] += 1                                         # other weights
    torch.save(content, path)
    assert probe() == 7


def test_a_probe_is_scored_by_its_best_classes(probe, tmp_path):
    probe()
    printed = run_eval("probe", [tmp_path / "clips" / "qa.jsonl"],
                       tmp_path / "run" / "checkpoint.pt")
    assert re.search(r"top-1 % +top-5 % +top-10 %.*\n.*\d\.\d +\d+\.\d +\d+\.\d", printed)


def test_a_probe_names_what_it_cannot_read(probe, tmp_path):
    (tmp_path / "clips" / "3.mp4").unlink()
    assert probe() == 6
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "3.mp4" in log and '"unreadable": 1' in log


def test_questions_are_answered_by_an_mlp_of_768(clips, whole_run, tmp_path):        # Sec. 4.2.1
    fine_tune("qa", clips / "qa.jsonl", tmp_path / "run", whole_run)
    content, _ = finished(tmp_path / "run")
    weights = content["model"]
    assert weights["answer_head.0.weight"].shape == (768, 32)
    assert weights["answer_head.2.weight"].shape == (len(content["answers"]), 768)
    model, _ = open_model(tmp_path / "run" / "checkpoint.pt", clips / "qa.jsonl", "qa")
    x = torch.randn(3, 32)
    hidden = F.gelu(F.linear(x, weights["answer_head.0.weight"], weights["answer_head.0.bias"]))
    logits = F.linear(hidden, weights["answer_head.2.weight"], weights["answer_head.2.bias"])
    assert torch.allclose(model.answer_head(x), logits, atol=1e-5)


def test_labels_are_places_in_the_checkpoints_answers(clips, whole_run, tmp_path):
    fine_tune("qa", clips / "qa.jsonl", tmp_path / "run", whole_run)
    answers = finished(tmp_path / "run")[0]["answers"]
    results = results_of("qa", [clips / "qa.jsonl"], tmp_path / "run" / "checkpoint.pt",
                         tmp_path / "r", "--views", 3)
    labels = [answers.index(line["answer"]) for line in lines_of(clips / "qa.jsonl")]
    assert [result["label"] for result in results] == labels


def test_a_resumed_head_keeps_its_answers(clips, whole_run, tmp_path):
    folder = shutil.copytree(clips, tmp_path / "clips")
    fine_tune("qa", folder / "qa.jsonl", tmp_path / "run", whole_run)
    answers = finished(tmp_path / "run")[0]["answers"]
    (folder / "answers.json").write_text(json.dumps(answers[::-1]))
    printed = fine_tune("qa", folder / "qa.jsonl", tmp_path / "run", whole_run, "--steps", 4)
    assert "the answers of the data have changed; those of the checkpoint count" in printed
    assert finished(tmp_path / "run")[0]["answers"] == answers


@pytest.mark.parametrize("content, message", [
    ('["zebra"]', "holds no answer of"), ("{", "not a JSON list"),
    (None, 'no line has an "answer"')])
def test_answers_of_other_data_are_refused(content, message, clips, whole_run, tmp_path):
    folder = shutil.copytree(clips, tmp_path / "clips")
    name = "train.jsonl" if content is None else "qa.jsonl"
    if content:
        (folder / "answers.json").write_text(content)
    assert message in fine_tune("qa", folder / name, tmp_path / "run", whole_run, code=1)


@pytest.mark.parametrize("distilled", [False, True])           # DeiT's second classifier
def test_vit_and_deit_files_start_a_run(distilled, clips, tmp_path):                  # Tab. 6
    weights = vit_weights(distilled=distilled)                 # 64 pixels; the run has 32
    torch.save({"model": weights}, tmp_path / "deit.pth")
    flags = ["--distilled"] if distilled else []
    pretrain(clips, tmp_path / "run", "--init", tmp_path / "deit.pth", "--depth", 3, "--lr", 0,
             "--steps", 1, *flags)
    model = finished(tmp_path / "run")[0]["model"]
    special = 2 if distilled else 1
    assert model["pos_embed"].shape == (1, special + 4, 32)
    assert model["pos_embed"][:, :special].equal(weights["pos_embed"][:, :special])
    for name, tensor in weights.items():
        if name.startswith(("blocks.", "norm.", "cls_token", "dist_token", "patch_embed.")):
            assert model[name].equal(tensor)
    results = results_of("choice", [clips / "choice.jsonl"], tmp_path / "run" / "checkpoint.pt",
                         tmp_path / "r")
    assert len(results) == 24


def test_a_released_file_is_fine_tuned_and_scored(clips, whole_run, tmp_path):
    """With a learning rate of 0 the checkpoint answers as the authors' file does."""
    weights, vocab = release_files(tmp_path, D=64)
    flags = ["--vocab", vocab, "--resize", "release"]
    fine_tune("retrieval", clips / "retrieval.jsonl", tmp_path / "run", whole_run, "--init",
              weights, "--lr", 0, *flags)
    tuned, released = (results_of("retrieval", [clips / "retrieval.jsonl"], path, tmp_path / "r",
                                  "--rerank", 2, *flags)
                       for path in (tmp_path / "run" / "checkpoint.pt", weights))
    assert tuned == released
    sizes = finished(tmp_path / "run")[0]["sizes"]
    assert (sizes["heads"], sizes["frames"], sizes["max_text_len"], sizes["image_size"]) == (
        1, 3, 10, 64)


# ---- On any video (Sec. 4.6, Fig. 4, 6, 11; Tab. 14) ---------------------------------------------

def test_fill_gives_the_likeliest_words(films, checkpoint, tmp_path):
    text = "[MASK] square while red turns [MASK]"
    model, clips = open_model(checkpoint, films / "train.jsonl", "retrieval")
    video = clips[1, 1]["video"][None]
    ids = torch.tensor([clips.encode(text)])
    masks = ids[0] == clips.tokenizer.mask_id
    with torch.no_grad():
        seen = model.mlm_head(model(video, ids).text[0, masks]).softmax(-1)
        blind = model.mlm_head(model.encode_text(ids)[0, masks]).softmax(-1)
    for flags, expected in (([], seen), (["--blind"], blind)):
        files = [films / "0.mp4", films / "1.mp4"]
        rows = results_of("fill", files, checkpoint, tmp_path / "r", "--text", text, *flags)
        rows = rows[1]["words"]
        assert [row["mask"] for row in rows] == [1] * 5 + [2] * 5
        for row, p in zip(rows, torch.cat([*expected.topk(5).values]).tolist()):
            assert row["probability"] == pytest.approx(p, abs=1e-3)
            word = clips.tokenizer.words.token_to_id(row["word"])
            assert expected[row["mask"] - 1, word] == pytest.approx(p, abs=1e-3)


def test_match_compares_texts_of_different_lengths(films, checkpoint, tmp_path):
    texts = ["white ring", "black square while red turns green around it"]
    result, = results_of("match", [films / "0.mp4"], checkpoint, tmp_path / "r", "--text", *texts)
    model, clips = open_model(checkpoint, films / "train.jsonl", "retrieval")
    logits = torch.cat([match_logits(model, clips[0, 0]["video"][None],
                                     torch.tensor([clips.encode(text)])) for text in texts])
    assert [row["text"] for row in result["captions"]] == texts
    for row, among, matched in zip(result["captions"], logits[:, 1].softmax(0), logits.softmax(1)):
        assert row["among_texts"] == pytest.approx(float(among), abs=1e-3)
        assert row["matched"] == pytest.approx(float(matched[1]), abs=1e-3)


def test_a_clip_that_is_named_twice_is_read_once(films, checkpoint, tmp_path):
    results = results_of("match", [films / "0.mp4", films / "0.mp4"], checkpoint, tmp_path / "r",
                         "--text", "white ring", "black square")
    assert [len(result["captions"]) for result in results] == [2]


def test_ask_gives_the_likeliest_answers(films, tmp_path):
    path = answering_checkpoint(tmp_path, "qa")
    result, = results_of("ask", [films / "0.mp4"], path, tmp_path / "r", "--text",
                         "what shape is it?")
    scored = results_of("qa", [films / "qa.jsonl"], path, tmp_path / "q")[0]
    assert [row["answer"] for row in result["answers"]] == scored["answers"]
    assert sum(row["probability"] for row in result["answers"]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("fields, origins", [                  # of slots 0 and 1 of three frames
    ({}, [[2, 0], [0, 1], [1, 2]]),
    ({"temporal": "time_average"}, [[0, 0], [1, 1], [2, 2]]),
    ({"temporal": "flatten"}, [[0, 0], [1, 1], [2, 2]]),
    ({"temporal": "channel_shift"}, [[0, 0], [1, 1], [2, 2]]),
    ({"temporal": "timesformer"}, [[0, 0], [1, 1], [2, 2]]),
    ({"roll_start": 2}, [[0, 0], [1, 1], [2, 2]])])
def test_a_patch_is_followed_to_its_frame(fields, origins):
    model = build(roll_ratio=1 / 16, **fields)
    assert eval.patch_origins(model, 3, 5)[0].argmax(-1)[:, :2].tolist() == origins


def test_two_way_rolling_with_two_class_tokens_is_followed():  # All-in-one-S
    model = build(roll="release", distilled=True, roll_ratio=0.5)      # 17 slots, of which 4 + 4
    origin = eval.patch_origins(model, 3, 5)[0].argmax(-1)[0].tolist()   # of the slots of frame 0
    assert origin == [2] * 3 + [0] * 9 + [1] * 4


def test_three_rolls_of_three_frames_bring_patches_home():
    model = build(depth=3)
    last = eval.patch_origins(model, 3, 5)[-1].argmax(-1)
    assert last.equal(torch.arange(3)[:, None].expand(3, 16))


class SwappedFrames(AllInOne):
    """A new mixing, as a user adds it: the last patches change places, a gate adds a little."""

    def mix_frames(self, z, frames, text_length, layer, mask=None):
        mixed = z + 0.1 * z.mean(0)
        mixed[:, -1] = z[:, -1].flip(0)
        return mixed


def test_a_new_mixing_is_followed_without_a_rule():
    origins = eval.patch_origins(SwappedFrames(TINY), 3, 5)
    assert origins[0].argmax(-1)[:, -2:].tolist() == [[0, 2], [1, 1], [2, 0]]


class GatedRoll(AllInOne):
    """A new mixing that blends the rolled tokens with those that stay."""

    def mix_frames(self, z, frames, text_length, layer, mask=None):
        rolled = token_rolling(z, frames, num_fixed=text_length + 1)
        return z + 0.3 * (rolled - z)


def test_a_blend_of_frames_is_shared_out():
    origins = eval.patch_origins(GatedRoll(TINY), 3, 5)[0]             # (S, n, S)
    close(origins[1, 0], torch.tensor([0.3, 0.7, 0.0]), atol=0.1)      # a slot that rolls
    close(origins[1, -1], torch.tensor([0.0, 1.0, 0.0]))               # one that stays


def test_a_label_that_is_no_number_is_named(tmp_path, monkeypatch):
    clips = clips_of(tmp_path, [{"video": "a.mp4", "text": "a", "answer": "2"}])
    monkeypatch.setitem(data.TASKS, "pretrain", lambda clips, sample, index: {"label": "2"})
    with pytest.raises(DataError, match="jsonl:1: its label is '2'; expected the number"):
        clips.read_words(clips.manifest[0])


def test_every_task_has_a_score():
    assert eval.MANIFEST_TASKS.keys() == data.TASKS.keys()


@pytest.mark.parametrize("block", [0, 2])
def test_maps_of_words_sum_to_one(block, films, checkpoint, tmp_path):                 # Fig. 6
    result, = results_of("explain", [films / "0.mp4"], checkpoint, tmp_path / "r",
                         "--block", block, "--text", "white [MASK] while red")
    assert result["words"][::2] == ["white", "while"] and "[MASK]" not in result["words"]
    maps = torch.tensor(result["maps"])
    assert maps.shape == (4, 3, 2, 2)                          # words, frames, rows, columns
    assert torch.allclose(maps.sum((1, 2, 3)), torch.ones(4))


@pytest.mark.parametrize("block", [0, 2])
def test_the_map_of_a_filled_mask_is_that_of_its_word(block, films, checkpoint, tmp_path):
    maps = []
    text = "white [MASK] while red"
    for _ in range(2):
        result, = results_of("explain", [films / "0.mp4"], checkpoint, tmp_path / "r",
                             "--block", block, "--text", text)
        maps.append(torch.tensor(result["maps"]))
        text = " ".join(result["words"])
    assert "[MASK]" not in text
    assert torch.allclose(maps[0], maps[1], atol=1e-5)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("temporal", ["token_rolling", "flatten"])
def test_a_map_is_the_attention_in_the_patches_own_frames(
        temporal, block, films, checkpoint, tmp_path):
    flags = ["--block", block, "--text", "white ring while red", "--temporal", temporal]
    result, = results_of("explain", [films / "0.mp4"], checkpoint, tmp_path / "r", *flags,
                         "--patch_order", "random")            # the patches keep their places
    model, tokenizer, _ = eval.load_checkpoint(torch.load(checkpoint), checkpoint,
                                               temporal=temporal)
    _, clips = open_model(checkpoint, films / "train.jsonl", "pretrain")
    inputs = []
    norm = model.eval().blocks[block - 1].norm1
    norm.register_forward_hook(lambda module, args, output: inputs.append(output))
    model(clips[0, 0]["video"][None], torch.tensor([clips.encode("white ring while red")]))
    attention = model.blocks[block - 1].attn
    shares = attention.weights(inputs[0])[:, 1:5, 6:]                      # of four words, on video
    rows = 3 if temporal == "flatten" else 1
    shares = shares.reshape(-1, 4, rows, 5)[..., 1:].transpose(1, 2).flatten(0, 1).transpose(0, 1)
    if temporal == "token_rolling":                            # 1 of 4 patches, in each block
        shares = torch.cat([shares[:, :, :1].roll(-block, 1), shares[:, :, 1:]], 2)
    expected = shares / shares.sum((1, 2), keepdim=True)
    assert torch.allclose(torch.tensor(result["maps"]).flatten(2), expected.detach(), atol=1e-4)


@pytest.mark.parametrize("temporal", ["token_rolling", "time_average", "flatten"])
def test_attention_is_shared_out_whole(temporal, films, checkpoint, tmp_path):         # Fig. 4
    result, = results_of("attention", [films / "0.mp4"], checkpoint, tmp_path / "r",
                         "--text", "white ring", "--temporal", temporal)
    assert [block["block"] for block in result["blocks"]] == [1, 2]
    for block in result["blocks"]:
        assert sum(block[name] for name in ("text", "cls", "own", "rolled")) == pytest.approx(1)
        frames = torch.tensor(block["frames"])                 # own and rolled of each
        assert frames.sum(0).tolist() == pytest.approx([block["own"], block["rolled"]])
        assert (block["rolled"] > 0) == (temporal == "token_rolling")


def test_a_rolled_patch_is_compared_with_its_neighbours(films, checkpoint, tmp_path):   # Fig. 4
    result, = results_of("attention", [films / "0.mp4"], checkpoint, tmp_path / "r",
                         "--text", "white ring")
    block = result["blocks"][0]                                # one of four patches is rolled
    assert block["per_patch"] == pytest.approx(block["rolled"] / (block["own"] / 3))


def test_attention_sees_patches_in_their_places(films, checkpoint, tmp_path):
    raster, shuffled = (results_of("attention", [films / "0.mp4"], checkpoint, tmp_path / "r",
                                   "--text", "a", "--patch_order", order)
                        for order in ("raster", "random"))
    assert raster == shuffled


def test_the_mean_attention_is_over_clips():
    shares = {"block": 1, "text": 0.5, "cls": 0.1}
    results = [{"blocks": [{**shares, "own": 0.4, "rolled": 0.0, "frames": [[0.4, 0.0]]}]},
               {"blocks": [{**shares, "own": 0.2, "rolled": 0.2, "frames": [[0.2, 0.2]],
                            "per_patch": 3.0}]}]
    mean, = eval.mean_blocks(results)
    assert mean == pytest.approx({**shares, "own": 0.3, "rolled": 0.1, "per_patch": 3.0,
                                  "frame 1": 0.3, "frame 1 rolled": 0.1})


def test_the_sizes_asked_for_reach_each_model_that_is_profiled():            # Tab. 1, Tab. 9
    configs = eval.profiled_configs({"frames": 8, "image_size": 96})
    assert list(configs) == ["nano", "Ti", "S", "B", "L", "B time_average", "B channel_shift",
                             "B flatten", "B timesformer", "B decoupled"]
    for name, config in configs.items():
        assert (config.frames, config.image_size) == (8, 96)
        assert config.temporal == (name.partition(" ")[2] or "token_rolling")


def test_images_stay_out_of_the_mean_attention(films, checkpoint):             # nothing rolls there
    printed = []
    for files in ([films / "0.mp4"], [films / "0.mp4", films / "still.png"]):
        text = run_eval("attention", files, checkpoint, "--text", "white ring")
        printed.append(text.partition("shares of")[2])
    assert printed[0] == printed[1] and "frame 3 rolled" in printed[0]


def test_attention_is_drawn_beside_a_baseline(films, checkpoint, tmp_path):
    baseline = save_checkpoint(tmp_path / "baseline.pt", temporal="time_average")
    run_eval("attention", [films / "0.mp4"], checkpoint, "--text", "white ring",
             "--baseline", baseline, "--out", tmp_path)
    with Image.open(tmp_path / "attention.png") as image:
        assert image.size == (960, 720)                        # two diagrams for each checkpoint


@pytest.mark.parametrize("flags", [
    [], ["--order", "reversed"], ["--resize", "paper"], ["--window", 1]])
def test_a_baseline_reads_the_same_clips(flags, films, checkpoint, tmp_path):
    baseline = save_checkpoint(tmp_path / "baseline.pt", seed=1)
    question = ["attention", [films / "0.mp4"]]
    both = run_eval(*question, checkpoint, "--text", "white ring", "--baseline", baseline, *flags)
    alone = run_eval(*question, baseline, "--text", "white ring", *flags)
    unlike = run_eval(*question, baseline, "--text", "white ring")
    assert alone.partition("shares of")[2] in both
    assert (alone.partition("shares of")[2] == unlike.partition("shares of")[2]) == (not flags)


@pytest.mark.parametrize("sample, windows", [
    ({}, [(0, 1), (1, 2)]),
    ({"start": 0.5, "end": 1.75}, [(0.5, 1.5), (1.5, 1.75)]),
    ({"start": 0.25, "end": 0.75}, [(0.25, 0.75)]),
    ({"start": 1.25}, [(1.25, 2)]),
    ({"start": 1.25, "end": 9}, [(1.25, 2)])])                 # an end behind the clip's own
def test_windows_lie_between_start_and_end(sample, windows, tmp_path):
    video = film(tmp_path / "a.mp4", "n=60 rate=30")           # two seconds
    cut = eval.cut_windows({"video": str(video), **sample}, 1.0)
    assert [(window["start"], window["end"]) for window in cut] == windows


def test_clips_of_a_manifest_keep_their_fields(tmp_path):
    line = {"video": str(tmp_path), "start": 1.0, "end": 2.0, "fps": 4, "image": True,
            "boxes": [[0, 1, 1, 5, 5]]}
    (tmp_path / "m.jsonl").write_text(json_lines({**line, "text": "a ring", "answer": "ring"}))
    assert eval.video_samples(tmp_path / "m.jsonl", ()) == [line]


def test_a_table_of_clips_has_columns(films, checkpoint, tmp_path):
    (tmp_path / "t.csv").write_text(f"file,text\n{films / '0.mp4'},a\n")
    result, = results_of("match", [tmp_path / "t.csv"], checkpoint, tmp_path / "r", "--text", "a",
                         "b", "--columns", "video=file")
    assert result["video"] == str(films / "0.mp4")


@pytest.mark.parametrize("fields, name", [
    ({}, "a.mp4"), ({"start": 0.5, "end": 2.0}, "a.mp4 0.5-2 s"), ({"end": 2.0}, "a.mp4 0-2 s"),
    ({"member": {"name": "b.mp4"}, "start": 3.0}, "a.mp4 b.mp4 3-inf s")])
def test_results_name_the_part_of_a_clip(fields, name):
    assert eval.clip_name({"video": "a.mp4", **fields}) == name


def test_a_folder_of_frames_is_cut(tmp_path):
    (tmp_path / "frames").mkdir()
    for i in range(6):
        picture(tmp_path / "frames" / f"{i}.png", (32, 32))
    cut = eval.cut_windows({"video": str(tmp_path / "frames"), "fps": 4}, 1.0)
    assert [(window["start"], window["end"]) for window in cut] == [(0, 1), (1, 1.5)]


def test_a_film_in_a_shard_is_cut(films, tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        shard.add(films / "0.mp4", "0.mp4")
    sample, = eval.video_samples(tmp_path / "s.tar", ())
    assert [window["end"] for window in eval.cut_windows(sample, 1.0)] == [1, 2, 3]


def test_an_image_is_not_cut(films):
    image = {"video": str(films / "still.png")}
    assert eval.cut_windows(image, 1.0) == [image]


def test_a_window_behind_the_end_is_named(films, checkpoint, tmp_path):
    line = {"video": str(films / "0.mp4")}                     # three seconds
    (tmp_path / "m.jsonl").write_text(json_lines(line, {**line, "start": 30}))
    printed = run_eval("search", [tmp_path / "m.jsonl"], checkpoint, "--text", "a", "--window", 1)
    assert "--window: 1 of 2 clips stay whole" in printed and printed.count("unreadable: /") == 1


@pytest.mark.parametrize("before, after", [
    ({}, {"start": 1.0}), ({"start": 1.0}, {"start": 1.0, "end": 2.0}), ({"fps": 1}, {"fps": 2}),
    ({"member": {"name": "a.mp4", "offset": 512, "size": 9}},
     {"member": {"name": "b.mp4", "offset": 1536, "size": 9}}),
    ({"boxes": []}, {"boxes": [[0, 0, 0, 1, 1]]})])
def test_features_are_of_one_part_of_a_file(before, after):
    assert eval.clip_key({"video": "a", **before}) != eval.clip_key({"video": "a", **after})


def test_features_are_of_the_bytes_of_a_file(tmp_path):
    keys = []
    for content in (b"a", b"ab"):
        (tmp_path / "a").write_bytes(content)
        keys.append(eval.clip_key({"video": str(tmp_path / "a")}))
    os.utime(tmp_path / "a", (1, 1))                           # as many bytes, another time
    keys.append(eval.clip_key({"video": str(tmp_path / "a")}))
    assert len(set(keys)) == 3


def test_two_windows_of_a_film_have_features_of_their_own(films, checkpoint, tmp_path):
    lines = [{"video": str(films / "0.mp4"), "start": 0, "end": 1},
             {"video": str(films / "0.mp4"), "start": 2, "end": 3}]
    (tmp_path / "m.jsonl").write_text(json_lines(*lines))
    run_eval("search", [tmp_path / "m.jsonl"], checkpoint, "--text", "a", "--index", tmp_path / "i")
    early, late = torch.load(tmp_path / "i")["features"]
    assert (early - late).abs().max() > 1e-3


@pytest.fixture
def library(films, tmp_path) -> Path:
    """A folder of four clips and a broken one."""
    folder = tmp_path / "library"
    folder.mkdir()
    for i in range(4):
        shutil.copy(films / f"{i}.mp4", folder / f"{i}.mp4")
    (folder / "broken.mp4").write_bytes(b"not a film")
    return folder


def search(library, weights, *flags) -> tuple[list[dict], int]:
    """(results of two texts, how many clips were encoded)."""
    saved = library.parent / "results.jsonl"
    printed = run_eval("search", [library], weights, "--text", "white ring", "a square",
                       "--json", saved, *flags)
    assert "unreadable: " in printed and "broken.mp4" in printed
    computed = re.findall(r"features of (\d+) clips computed", printed)
    return lines_of(saved), int((computed or [0])[0])


def test_search_orders_by_cosine(library, checkpoint):
    results, _ = search(library, checkpoint)
    for text in ("white ring", "a square"):
        cosines = [result["cosine"] for result in results if result["text"] == text]
        assert len(cosines) == 4 and cosines == sorted(cosines, reverse=True)


def test_a_stored_index_answers_as_a_fresh_one(library, checkpoint, tmp_path):
    index = ["--index", tmp_path / "clips.idx"]
    fresh, _ = search(library, checkpoint)
    assert search(library, checkpoint, *index) == (fresh, 5 - 1)
    assert search(library, checkpoint, *index)[0] == fresh
    assert torch.load(tmp_path / "clips.idx")["features"].dtype == torch.float16


def test_an_index_reads_only_what_changed(films, library, checkpoint, tmp_path):
    index = ["--index", tmp_path / "clips.idx"]
    search(library, checkpoint, *index)
    shutil.copy(films / "7.mp4", library / "2.mp4")            # other bytes, the same name
    results, computed = search(library, checkpoint, *index)
    assert computed == 1 and results == search(library, checkpoint)[0]


def test_the_best_by_cosine_are_reranked(library, checkpoint, tmp_path):
    """Two of four, however low their probabilities are."""
    by_cosine, _ = search(library, checkpoint)
    content = torch.load(checkpoint)
    content["model"]["vtm_head.bias"] += torch.tensor([6.0, -6.0])
    torch.save(content, tmp_path / "unsure.pt")                # sure that no text fits
    reranked, _ = search(library, tmp_path / "unsure.pt", "--rerank", 2)
    best = reranked[:4]
    assert best[0]["matched"] >= best[1]["matched"] and "matched" not in best[2]
    assert {result["video"] for result in best[:2]} == {r["video"] for r in by_cosine[:2]}
    assert [r["video"] for r in best[2:]] == [r["video"] for r in by_cosine[2:4]]


def test_reranking_looks_beyond_the_results_printed(library, checkpoint):
    few, _ = search(library, checkpoint, "--rerank", 4, "--top", 1)
    every, _ = search(library, checkpoint, "--rerank", 4)
    assert few == [every[0], every[4]]


@pytest.mark.parametrize("content, flags, message", [
    (b"not an index", [], "or damaged"), (None, ["--order", "first"], "or flags"),
    (None, ["--resize", "paper"], "or flags"), (None, ["--frames", "2"], "or flags"),
    (None, ["--no-boxes"], "or flags")])
def test_a_foreign_index_is_never_overwritten(content, flags, message, library, checkpoint,
                                              tmp_path):
    path = tmp_path / "clips.idx"
    search(library, checkpoint, "--index", path)
    if content:
        path.write_bytes(content)
    before = path.read_bytes()
    error = run_eval("search", [library], checkpoint, "--text", "a", "--index", path, *flags,
                     code=1)
    assert message in error and path.read_bytes() == before


def test_features_are_of_one_kind_of_device(checkpoint, films):    # float32, or half precision
    model, clips = open_model(checkpoint, films / "train.jsonl", "probe")
    scorer = eval.Scorer(model, clips, eval.EvalConfig("search"), torch.device("cpu"))
    on_cpu = scorer.features_key("video embedding")
    scorer.device = torch.device("cuda")
    assert scorer.features_key("video embedding") != on_cpu


def test_features_have_names(checkpoint, films):
    model, clips = open_model(checkpoint, films / "train.jsonl", "probe")
    scorer = eval.Scorer(model, clips, eval.EvalConfig("search"), torch.device("cpu"))
    assert scorer.features_key("video embedding") != scorer.features_key("video cls")


def test_features_do_not_depend_on_the_answer_head(films, tmp_path):
    keys = []
    for answers in (["a", "b"], ["a", "b", "c"]):
        path = save_checkpoint(tmp_path / "c.pt", "qa", ["qa"], answers=answers)
        model, clips = open_model(path, films / "train.jsonl", "probe")
        model.load_state_dict(build(0, **{**asdict(model.config), "answers": 0}).state_dict(),
                              strict=False)
        scorer = eval.Scorer(model, clips, eval.EvalConfig("search"), torch.device("cpu"))
        keys.append(scorer.features_key("video cls"))
    assert keys[0] == keys[1]


def test_a_scorer_never_drops_out(checkpoint, films):
    model, clips = open_model(checkpoint, films / "train.jsonl", "probe")
    eval.Scorer(model.train(), clips, eval.EvalConfig("search"), torch.device("cpu"))
    assert not any(module.training for module in model.modules())


def test_the_gallery_is_stacked_once(library, checkpoint, monkeypatch):
    stacks = []
    stack = torch.stack
    def counted(tensors, *dim):
        stacks.append((len(tensors), tensors[0].dtype))
        return stack(tensors, *dim)
    monkeypatch.setattr(eval.torch, "stack", counted)
    search(library, checkpoint)                                # two texts, four clips
    assert stacks.count((4, torch.float16)) == 1


def test_an_index_of_other_weights_is_refused(library, checkpoint, tmp_path):
    search(library, checkpoint, "--index", tmp_path / "i")
    other = save_checkpoint(tmp_path / "other.pt", seed=1)
    error = run_eval("search", [library], other, "--text", "a", "--index", tmp_path / "i", code=1)
    assert "those of other weights" in error


# ---- What eval.py prints and draws ---------------------------------------------------------------

def test_words_that_a_checkpoint_cannot_know_are_said(films, checkpoint):
    flags = ["--text", "a dog runs", "a white ring"]
    printed = run_eval("match", [films / "0.mp4"], checkpoint, *flags)
    size = torch.load(checkpoint)["sizes"]["vocab_size"]
    assert f"vocabulary has {size} tokens; it spells or does not know: dog, runs\n" in printed


def test_unknown_words_of_a_manifest_are_said(films, checkpoint, tmp_path):
    line = {"video": str(films / "0.mp4"), "options": ["a dog", "a ring"], "answer": 0}
    (tmp_path / "m.jsonl").write_text(json_lines({**line, "options": ["a", "a ring"]}, line))
    assert "or does not know: dog\n" in run_eval("choice", [tmp_path / "m.jsonl"], checkpoint)


def test_many_unknown_words_are_counted(films, checkpoint):
    text = "dog cat cow hen pig ant bee fly elk emu fox owl yak koi"
    printed = run_eval("match", [films / "0.mp4"], checkpoint, "--text", text)
    assert re.search(r"does not know: (\w+, ){11}\w+ and 2 more\n", printed)


def test_results_in_json_are_readable(films, checkpoint, tmp_path):
    run_eval("match", [films / "0.mp4"], checkpoint, "--text", "für", "--json", tmp_path / "r")
    assert "für" in (tmp_path / "r").read_text(encoding="utf-8")


def test_a_map_is_summed_over_each_frame():
    result = {"words": ["a"], "maps": [[[[0.25, 0.0]], [[0.25, 0.5]]]]}    # of two frames
    assert eval.frame_shares(result) == [{"frame 1": 0.25, "frame 2": 0.75, "word": "a"}]


def test_the_highest_value_of_a_map_is_yellow():
    frames = torch.full((3, 3, 4, 4), 100)
    heated = eval.heated(frames, torch.tensor([[[0.0]], [[0.1]], [[0.2]]]))  # of three frames
    assert [frame[:, 0, 0].tolist() for frame in heated] == [
        [70, 70, 70], [162, 162, 35], [255, 255, 0]]


def test_a_mask_is_no_unknown_word(films, checkpoint):
    printed = run_eval("fill", [films / "0.mp4"], checkpoint, "--text", "a white [MASK]")
    assert "does not know" not in printed


def test_a_table_is_aligned_under_named_columns():
    rows = [{"cosine": 0.5, "video": "a.mp4"}, {"cosine": -0.25, "matched": 1.0, "video": "bb.mp4"}]
    assert eval.table_lines(rows, digits=2) == ["cosine  video   matched",
                                                "  0.50  a.mp4         -",
                                                " -0.25  bb.mp4     1.00"]


def test_a_report_names_what_is_unreadable(films, checkpoint, tmp_path):
    line = {"video": str(films / "0.mp4"), "options": ["white ring", "a square"], "answer": 0}
    (tmp_path / "m.jsonl").write_text(json_lines(line, {**line, "video": "gone.mp4"}))
    printed = run_eval("choice", [tmp_path / "m.jsonl"], checkpoint)
    assert "INCOMPLETE: 1 of 2 samples are unreadable" in printed and "m.jsonl:2: " in printed


@pytest.mark.parametrize("text", ["u", "ü", "é", "ß", "Å"])
def test_letters_with_accents_are_drawn(text):
    drawn = eval.FONT.getmask(eval.drawable(text))
    assert bytes(drawn) not in (bytes(eval.FONT.getmask(" ")), bytes(eval.FONT.getmask("?")))
    assert eval.drawable(text) == text


@pytest.mark.parametrize("task, lines", [
    ("explain", ["gone.mp4", "", "yellow: more"]), ("match", ["gone.mp4"]),
    ("search", ["a", "gone.mp4: cosine 0.5000"])])
def test_a_clip_that_became_unreadable_is_named(task, lines, checkpoint, tmp_path):
    (tmp_path / "m.jsonl").write_text(json_lines({"video": "gone.mp4", "texts": ["a"]}))
    _, clips = open_model(checkpoint, tmp_path / "m.jsonl", "retrieval")
    result = {"index": 0, "video": "gone.mp4", "text": "a", "cosine": 0.5, "words": ["a"],
              "maps": [[[[1.0]]]], "captions": []}
    eval.draw_results(tmp_path, eval.EvalConfig(task), clips, [result])
    with Image.open(tmp_path / f"{task}-1.png") as image:
        assert image.size[1] == 14 * len(lines) + 3 * (2 if task == "search" else 1)


def test_letters_that_the_font_lacks_are_replaced():
    assert eval.drawable("Čech 中 ü") == "Cech ? ü"


def test_a_long_title_is_wrapped_and_not_cut(tmp_path):
    frames = [torch.zeros(3, 32, 32, dtype=torch.uint8)]
    text = "clips/a_film_with_a_long_name.mp4: " + "a dog runs " * 20
    lines = eval.wrap(text, 444)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(eval.FONT.getlength(line) <= 444 for line in lines)
    eval.save_picture(tmp_path / "p.png", [(text, frames)])
    with Image.open(tmp_path / "p.png") as image:
        assert image.size == (448, 112 + 14 * len(lines) + 3)


def test_a_picture_names_its_file(films, checkpoint, tmp_path):
    """What is drawn is what the title says: another title is another picture."""
    rows = eval.wrap(f"{films / '0.mp4'}\nwhite [MASK]\nyellow: more", 444)
    run_eval("explain", [films / "0.mp4"], checkpoint, "--text", "white [MASK]", "--out", tmp_path)
    with Image.open(tmp_path / "explain-1.png") as image:
        drawn = np.array(image)[:14 * len(rows)]
        assert image.size[1] == 112 * 3 + 14 * (len(rows) + 2) + 9     # the clip and two words
    eval.save_picture(tmp_path / "title.png", [("\n".join(rows), [])])
    with Image.open(tmp_path / "title.png") as title:
        assert (drawn == np.array(title)[:len(drawn)]).all()


def test_a_loss_without_end_leaves_the_curve_alone(tmp_path):
    rows = [{"step": 10, "vtm": 0.7}, {"step": 15, "vtm": math.inf}, {"step": 20, "vtm": 0.2}]
    eval.save_curves(tmp_path / "with.png", rows)
    eval.save_curves(tmp_path / "without.png", rows[::2])
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "without.png").read_bytes()


@pytest.mark.parametrize("name", ["vtm", "choice", "qa"])
def test_curves_have_axes_from_zero_to_the_highest(name, tmp_path):
    rows = [{"step": 10, name: 0.7, f"{name}_accuracy": 0.5, "lr": 1e-4},
            {"step": 20, name: 0.2, f"{name}_accuracy": 0.9, "lr": 1e-4}]
    eval.save_curves(tmp_path / "curve.png", rows)
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size == (960, 360)                        # losses, accuracies
        red = (np.array(image.convert("RGB"))[60:, 50:470] == (255, 0, 0)).all(-1)
        down, across = np.nonzero(red)
    assert across[down.argmin()] < across[down.argmax()]       # the loss falls


def test_a_closed_pipe_ends_nothing(monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)                                         # as `| head` does
    with os.fdopen(write_end, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        for step in range(3):
            eval.print_main("step", step)


def test_several_processes_say_an_error_once(films, checkpoint, tmp_path):
    run = Started(tmp_path / "out.txt", "eval.py", "--task", "choice", "--checkpoint", checkpoint,
                  "--data", tmp_path / "absent.jsonl", processes=2)
    assert run.wait(1) == 1
    printed = "".join((tmp_path / f"out.txt{rank}").read_text() for rank in ("", 1))
    assert printed.count("absent.jsonl: no such") == 1 and "Traceback" not in printed


def test_several_processes_say_a_wrong_flag_once(tmp_path):
    run = Started(tmp_path / "out.txt", "eval.py", "--task", "chose", processes=2)
    assert run.wait(1) == 1
    printed = "".join((tmp_path / f"out.txt{rank}").read_text() for rank in ("", 1))
    assert printed.count("expected one of choice") == 1


def test_tasks_of_slurm_need_torchrun(films, checkpoint, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    error = run_eval("choice", [films / "choice.jsonl"], checkpoint, code=1)
    assert "SLURM_NTASKS is 8" in error and "torchrun" in error


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        eval.main(["--help"])
    assert stop.value.code == 0
    assert "95 % interval" in " ".join(capsys.readouterr().out.split())


def test_weights_that_a_file_lacks_are_said(films, checkpoint, tmp_path):
    content = torch.load(checkpoint)
    del content["model"]["vtm_head.bias"]
    torch.save(content, tmp_path / "c.pt")
    printed = run_eval("match", [films / "0.mp4"], tmp_path / "c.pt", "--text", "a")
    assert "1 initialised (vtm_head.bias)" in printed


def test_each_flag_names_its_tasks():
    assert vars(eval.EvalConfig()).keys() - eval.USED_BY.keys() == {"task", "batch"}


def test_each_flag_has_a_sentence():
    comments = eval.field_comments(eval.EvalConfig)
    assert list(comments) == list(vars(eval.EvalConfig()))
    assert all(comment[0].isupper() and comment[-1] == "." for comment in comments.values())


@dataclass(frozen=True)
class CommentedFields:
    # Stands above.
    above: int = 1
    beside: int = 2    # stands beside
    long: int = 3      # begins beside
    #                    and goes on
    # Has two
    # lines.
    two: int = 4


def test_the_comment_of_a_field_is_its_help():
    assert eval.field_comments(CommentedFields) == {
        "above": "Stands above.", "beside": "stands beside",
        "long": "begins beside and goes on", "two": "Has two lines."}


def test_seconds_are_those_of_a_call():                        # Tab. 1, Tab. 14
    def call():
        time.sleep(0.02)
        return torch.zeros(1)
    assert 0.02 <= eval.time_call(call, torch.device("cpu"), at_least=0.1) < 0.2
