"""The paper, sentence by sentence, as tests. Run: python -m pytest (offline, two cores, 3 minutes).

Order: model and rolling (Sec. 3.1, 3.2), objectives (3.3), release, weights, data, training.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
from allinone import (CHOICES, VARIANTS, AllInOne, Config, channel_shift, load_release, load_vit,
                      load_weights, mlm_loss, read_weights, token_rolling, vtc_loss, vtm_loss,
                      word_patch_alignment_loss, word_patch_distance)
from eval import count_macs, count_parameters

HERE = Path(__file__).parent
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
@pytest.mark.parametrize("select", CHOICES["roll_select"])                   # Tab. 11b
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


@pytest.mark.parametrize("temporal", CHOICES["temporal"])
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
    (lambda m: Config(width=100), "not divisible by heads"),
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
    with torch.autocast("cpu", torch.bfloat16):
        assert vtc_loss(*torch.randn(2, 4, 6)).dtype is torch.float32
        assert vtm_loss(torch.randn(2, 2).bfloat16(), torch.tensor([0, 1])).dtype is torch.float32


def test_word_patch_alignment_pulls_matched_clips_and_pushes_others():
    distance = torch.tensor([0.25, 0.75], requires_grad=True)
    loss = word_patch_alignment_loss(distance, torch.tensor([1, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(-0.25) and distance.grad.tolist() == [0.5, -0.5]


# ---- The release's own forward pass (float32, evaluation mode) ----------------------------------

def rule(count: int, shift: float) -> np.ndarray:
    """Numbers in [0, 1) without a file: u(43758.5453 sin(12.9898 i + shift)), u(x) = x - floor(x)"""
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
            "word_patch_distance": word_patch_distance(features.text, features.video[:, 1:], mask),
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
    assert model.config.distilled and not model.config.temporal_position # S never used it
    assert report["ignored"] == ["temporal_embed"]
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
    model, report = load_release(path, heads=4)                              # inert: it loads
    assert len(report["loaded"]) == 62
    torch.save({"state_dict": weights, "hyper_parameters": Trace(trace)}, path)
    with pytest.raises(ValueError, match="cannot be read safely|can be read safely"):
        load_release(path, heads=4)                                          # refused
    assert not trace.exists()
    torch.load(path, weights_only=False)                                     # the trap does work
    assert trace.exists()


@pytest.mark.parametrize("content, message", [
    (b"", "not a file of weights"), (b"not a checkpoint at all", "not a file of weights"),
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
    (lambda w: w | {"blocks.0.gamma": torch.zeros(1)}, r"1 unknown tensors \(blocks.0.gamma\)"),
    (lambda w: {k: v for k, v in w.items() if k != "norm.bias"}, r"1 missing \(norm.bias\)"),
    (lambda w: w | {"cls_token": torch.zeros(1, 1, 64)}, "another variant"),
    (lambda w: w | {"dist_token": torch.zeros(1, 1, 32)}, "--distilled")])
def test_an_unknown_or_missing_backbone_tensor_is_an_error(change, message, tmp_path):
    torch.save(change(vit_weights(build())), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=message):
        load_vit(build(), tmp_path / "vit.pth")


# ---- Training (Sec. 4.1.2) ----------------------------------------------------------------------

@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder with 24 toy clips, train.jsonl (captions) and choice.jsonl (order questions)."""
    folder = tmp_path_factory.mktemp("clips")
    draw = random.Random(0)
    with open(folder / "train.jsonl", "w") as train, open(folder / "choice.jsonl", "w") as choice:
        for i in range(24):
            toy_clip = data._toy_clip(draw)
            data.write_clip(folder / f"{i}.mp4", data.toy_frames(toy_clip), 4, {"crf": "18"})
            texts = [toy_clip.caption(), toy_clip.caption(order=1 - toy_clip.order)]
            print(json.dumps({"video": f"{i}.mp4", "text": texts[0]}), file=train)
            print(json.dumps({"video": f"{i}.mp4", "options": texts, "answer": 0, "kind": "order"}),
                  file=choice)
    return folder


TINY_RUN = ("--width 32 --depth 2 --heads 2 --image_size 32 --vocab train --batch 8 --workers 0 "
            "--lr 1e-3 --steps 12 --save_every 2 --log_every 1").split()


def run(*arguments, processes=1, wait=True, **environment):
    """A command line of the project in its own process, or several under torchrun."""
    start = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen([*start, *map(str, arguments)], cwd=HERE, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if not wait:
        return process
    out, err = process.communicate(timeout=170)
    return process.returncode, out, err


def pretrain(clips, out, *flags, **options):
    return run("train.py", "--task", "pretrain", "--data", clips / "train.jsonl", "--out", out,
               *TINY_RUN, *flags, **options)


def finished(out) -> tuple[dict, list]:
    """(checkpoint, losses of each step) of a run folder."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["mlm"], line["vtm"], line["grad_norm"]) for line in lines
              if "mlm" in line]
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
    code, _, err = pretrain(clips, out)
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


def test_a_killed_run_ends_with_the_same_bits(clips, whole_run, tmp_path):
    kills = 0
    while kills < 3:
        process = pretrain(clips, tmp_path / "run", wait=False)
        log, steps = tmp_path / "run" / "log.jsonl", 3 * (kills + 1)
        while process.poll() is None and f'"step": {steps},' not in (
                log.read_text() if log.exists() else ""):
            time.sleep(0.01)
        process.kill()
        process.communicate()
        kills += 1
    code, out, err = pretrain(clips, tmp_path / "run")
    assert code == 0 and "resuming" in out, err
    (saved, losses), (expected, expected_losses) = finished(tmp_path / "run"), finished(whole_run)
    assert losses == expected_losses and len(losses) == 12
    for key in ("model", "optimizer", "state"):
        assert equal(saved[key], expected[key]), key


def test_sigterm_saves_and_exits_cleanly(clips, tmp_path):
    process = pretrain(clips, tmp_path / "run", "--steps", "100000", wait=False)
    while not (tmp_path / "run" / "log.jsonl").exists() or (
            '"step": 2,' not in (tmp_path / "run" / "log.jsonl").read_text()):
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by SIGTERM" in out, err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 2


@pytest.mark.parametrize("one, many, processes", [
    ("--batch 16 --batch_per_gpu 16 --objectives vtm mlm vtc", "--batch 16 --batch_per_gpu 8 "
     "--objectives vtm mlm vtc", 2),                                         # negatives of both
    ("--batch 32 --batch_per_gpu 32", "--batch 32 --batch_per_gpu 8", 2)])   # two passes on each
def test_two_processes_equal_one(one, many, processes, clips, tmp_path):
    same = ["--dropout", "0", "--drop_path", "0", "--steps", "6"]
    for name, flags, n in (("one", one, 1), ("many", many, processes)):
        code, _, err = pretrain(clips, tmp_path / name, *same, *flags.split(), processes=n)
        assert code == 0, err
    (first, losses), (second, others) = finished(tmp_path / "one"), finished(tmp_path / "many")
    assert np.allclose(losses, others, rtol=1e-5)
    for name, tensor in first["model"].items():
        other = second["model"][name]
        if name.endswith("qkv.bias"):    # softmax ignores the keys' bias: Adam scales noise
            tensor, other = (torch.cat([x[:32], x[64:]]) for x in (tensor, other))
        assert torch.allclose(tensor, other, atol=2e-6), name


def test_a_run_folder_of_another_run_is_refused_and_can_be_set_aside(clips, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    code, _, err = pretrain(clips, tmp_path / "run", "--lr", "5e-4")
    assert code == 1 and "lr was 0.001, now 0.0005" in err and "Traceback" not in err
    code, _, err = pretrain(clips, tmp_path / "run", "--lr", "5e-4", "--no-resume")
    assert code == 0 and (tmp_path / "run" / "checkpoint.pt.previous").exists(), err


def test_a_non_finite_loss_stops_before_the_step_and_names_the_samples(clips, tmp_path):
    code, _, err = pretrain(clips, tmp_path / "run", "--lr", "1e38", "--save_every", "1")
    assert code == 1 and re.search(r"step \d+: .*(mlm|vtm|grad_norm).* not finite", err), err
    assert "train.jsonl:" in err
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == int(re.search(r"step (\d+):", err)[1])


def test_vtm_labels_say_whose_video_a_text_meets(clips):
    manifest = data.Manifest([clips / "train.jsonl"])
    tokenizer = data.Tokenizer.train(train.captions(manifest), 1000)
    samples = data.Clips(manifest, tokenizer, "pretrain", 3, 32, 40, train=True)
    matched = 0
    for first in range(0, 480, 8):
        items = [samples[i % 24, i] for i in range(first, first + 8)] if first < 48 else [
            {**items[j], "draw": first + j} for j in range(8)]
        batch = data.collate(items, tokenizer, 40, group=8)
        for i, (j, label) in enumerate(zip(batch["vtm_source"], batch["vtm_labels"])):
            own = items[i]["caption"] == items[j]["caption"]
            assert own == bool(label)
        matched += int(batch["vtm_labels"].sum())
    assert 0.4 < matched / 480 < 0.6                                         # Sec. 3.3: p = 0.5


def test_a_checkpoint_is_plain_and_scores_without_any_other_file(clips, whole_run):
    content = torch.load(whole_run / "checkpoint.pt", weights_only=True)
    assert content["config"]["lr"] == 1e-3 and content["sizes"]["width"] == 32
    scores = [run("eval.py", "--task", "choice", "--data", clips / "choice.jsonl", "--checkpoint",
                  whole_run / "checkpoint.pt", "--workers", "0") for _ in range(2)]
    assert scores[0] == scores[1]                                            # twice the same number
    assert scores[0][0] == 0 and re.search(r"order +\d+\.\d +50\.0 +24", scores[0][1]), scores[0]


@pytest.mark.parametrize("flags, code, message", [
    (["--task", "pretrane"], 2, "invalid choice: 'pretrane'"),
    (["--task", "pretrain", "--widht", "3"], 2, "unrecognized arguments: --widht"),
    (["--temporal", "rolling"], 2, "invalid choice: 'rolling'"),
    (["--data", "absent.jsonl"], 1, "absent.jsonl"),
    (["--objectives", "vtx"], 1, "--objectives vtx: can be vtm, mlm"),
    (["--data", "{clips}/train.jsonl", "--init", "absent.pth"], 1, "absent.pth: no such file"),
    (["--data", "{clips}/train.jsonl", "--vocab", "absent.txt"], 1, "local vocab.txt"),
    (["--data", "{clips}/choice.jsonl", "--vocab", "train"], 1, 'choice.jsonl:'),
])
def test_wrong_flags_and_files_say_in_one_line_what_to_do(flags, code, message, clips, tmp_path):
    flags = [flag.format(clips=clips) for flag in flags]
    returned, out, err = run("train.py", *flags, "--out", tmp_path / "run")
    assert returned == code and message in err and "Traceback" not in err, err
