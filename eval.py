"""Scores All-in-one (Tab. 2 to 14) on any manifest, uses it on any video, tells what it costs.

    python eval.py --task choice --data MANIFEST --checkpoint runs/pretrain/checkpoint.pt
    torchrun --nproc_per_node=8 eval.py --task retrieval --data MANIFEST --checkpoint FILE
    python eval.py --task profile

A checkpoint is ours (train.py's) or the authors' .ckpt. Every sample is scored once, whatever the
number of processes. Unreadable clips are never replaced: they are counted and named, and a score
that lacks samples says so.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import json
import math
import os
import re
import sys
import tempfile
import time
import typing
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from allinone import (VARIANTS, AllInOne, Config, Temporal, load_release, load_weights,
                      read_weights, token_rolling, word_patch_transport)
from data import (MEDIA, Clips, DataError, Manifest, Tokenizer, collate, duration, load, pad,
                  replacing, temporary)

# ---- Flags: the fields of a dataclass -----------------------------------------------------------

def add_flags(group, cls: type) -> None:
    """One flag for each field of the dataclass `cls`; its help is the field's own comment.

    Flags not given leave no trace.
    """
    source = re.sub(r"\n    #\s+", " ", inspect.getsource(cls))     # a comment's second line
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    for name, kind in typing.get_type_hints(cls).items():
        default = getattr(cls, name)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        about = f"{comments.get(name, '')} (default: {shown or 'none'})".replace("%", "%%")
        if kind is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is tuple:
            options = dict(nargs="+", metavar="WORD", type=typing.get_args(kind)[0])
        elif words := typing.get_args(kind):
            options = dict(choices=words)
        else:
            options = dict(type=kind, metavar=kind.__name__.upper())
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=about, **options)


def given_flags(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> dict:
    """What the user gave, lists as tuples."""
    given = vars(parser.parse_args(argv))
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


# ---- Processes ----------------------------------------------------------------------------------

@contextlib.contextmanager
def joined_processes():
    """torchrun's job, joined and left; without torchrun a world of one. Yields the device."""
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "nccl"
        torch.cuda.set_device(device)
    store, rank, world = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
        # torchrun's store outlives a crash: without a prefix a restarted worker would be led to the
        # addresses that the killed one had left in it
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def in_all_processes(part: list) -> list:
    """The parts of all processes, in the order of ranks, as one list."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return sum(parts, [])


# ---- Checkpoints --------------------------------------------------------------------------------

def checkpoint_model(content: dict, path, vocab: str = "bert-base-uncased", say=print,
                     answers: list[str] | None = None, **overrides):
    """(model, its tokenizer, its answers) of what read_weights(path) gave: ours or the authors'.

    vocab: for the authors' file, which carries no tokenizer. answers: what the model is to learn to
    answer; a head for others is not taken over. overrides: fields of Config, e.g. frames=8 for
    Tab. 12; tables of positions are fitted. Raises ValueError for other files.
    """
    answers = content.get("answers") if answers is None else answers
    overrides["answers"] = len(answers or [])
    if "sizes" in content:
        if not {"model", "sizes", "tokenizer"} <= content.keys() or not set(
                content["sizes"]) <= set(Config.__dataclass_fields__):
            raise ValueError(f"{path}: a checkpoint of another version of train.py, or damaged; "
                             "it needs model, sizes and tokenizer as this version writes them")
        config = replace(Config(**content["sizes"]), **overrides)
        tokenizer = Tokenizer.from_json(content["tokenizer"])
        model, weights = AllInOne(config), content["model"]
        if (content.get("answers") or []) != (answers or []) or (
                content["sizes"]["answer_head"] != config.answer_head):
            weights = {k: v for k, v in weights.items() if not k.startswith("answer_head.")}
        report = load_weights(model, weights, path)
    else:
        model, report = load_release(path, content=content, **overrides)
        tokenizer = Tokenizer.load(vocab)
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(f"the vocabulary has {len(tokenizer)} words, {path} "
                         f"{model.config.vocab_size}: give --vocab the one that it was trained "
                         "with (bert-base-uncased)")
    say(f"{path}: {len(report['loaded'])} tensors loaded" + "".join(
        f"; {len(report[key])} {key} ({', '.join(report[key][:4])})"
        for key in ("resized", "initialised", "ignored") if report[key]))
    return model, tokenizer, answers


# ---- Scores of one pass --------------------------------------------------------------------------
# batch: as data.collate makes it, on the model's device. Higher scores are likelier.

def score_options(model: AllInOne, batch: dict) -> Tensor:
    """Matched logit of the VTM head for each candidate (Sec. 4.2.1, 4.2.3): (B, O); -inf: none."""
    B, O = batch["option_mask"].shape
    video = model.embed_video(batch["video"]).repeat_interleave(O, 0)     # (B*O, S, 1+n, D)
    text = model.embed_text(batch["text_ids"].flatten(0, 1))              # (B*O, m, D)
    mask = batch["text_mask"].flatten(0, 1).clone()
    mask[:, 0] = True                                    # an absent option still needs one key
    matched = model.vtm_head(model.fuse(video, text, mask).pooled)[:, 1]
    return matched.view(B, O).masked_fill(~batch["option_mask"], -torch.inf)


def score_answers(model: AllInOne, batch: dict) -> Tensor:
    """Logit of each answer (Sec. 4.2.1): (B, answers), from VTM's pooled cls token."""
    return model.answer_head(model(batch["video"], batch["text_ids"], batch["text_mask"]).pooled)


def score_classes(model: AllInOne, batch: dict) -> Tensor:
    """Logit of each action (Tab. 12): (B, answers), linear on the cls token of the video alone, or
    on batch["feature"] (B, D), computed before."""
    return model.answer_head(batch["feature"] if "feature" in batch else video_cls(model, batch))


SCORES = {"choice": score_options, "qa": score_answers, "probe": score_classes}


def video_cls(model: AllInOne, batch: dict) -> Tensor:
    """(B, D): the cls token of the video alone."""
    return model.encode_video(batch["video"])[:, 0]


def video_embedding(model: AllInOne, batch: dict) -> Tensor:
    """(B, vtc_dim): the video alone, projected and normalised (Sec. 3.3, VTC)."""
    return F.normalize(model.video_proj(video_cls(model, batch)), dim=-1)


def text_embedding(model: AllInOne, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, vtc_dim): the text alone, projected and normalised (Sec. 3.3, VTC)."""
    return F.normalize(model.text_proj(model.encode_text(ids, mask)[:, 0]), dim=-1)


def score_pretraining(model: AllInOne, batch: dict, objectives: tuple = ("mlm", "vtm")):
    """VTM and MLM (Sec. 3.3): two joint passes as one of twice the rows.

    Returns (logits of the masked words (M, |V|), logits of matching (B, 2), text and video features
    of VTM's pass); what is no objective is None.
    """
    B, video = len(batch["text_ids"]), model.embed_video(batch["video"])  # (B, S, 1+n, D)
    passes = [(video, batch["mlm_ids"])] if "mlm" in objectives else []
    passes += [(video[batch["vtm_source"]], batch["text_ids"])] if "vtm" in objectives else []
    videos, texts = (torch.cat(side) for side in zip(*passes))
    mask = batch["text_mask"].repeat(len(passes), 1)
    features = model.fuse(videos, model.embed_text(texts), mask)
    words = matched = None
    if "mlm" in objectives:
        words = model.mlm_head(features.text[:B].flatten(0, 1)[batch["mlm_where"]])
    if "vtm" in objectives:
        matched = model.vtm_head(features.pooled[-B:])
    return words, matched, (features.text[-B:], features.video[-B:])


def count_right(logits: Tensor, labels: Tensor) -> Tensor:
    """(right, of) as a tensor of two; negative labels do not count."""
    known = labels >= 0
    return torch.stack([((logits.argmax(-1) == labels) & known).sum(), known.sum()])


# ---- Scoring a manifest --------------------------------------------------------------------------

Task = Literal["choice", "retrieval", "qa", "probe", "pretrain", "profile", "scale",
               "fill", "match", "ask", "explain", "attention", "search"]


@dataclass(frozen=True)
class EvalConfig:
    """What to score, and how."""

    task: Task = "choice"            # Sec. 4.2; profile, scale: what it costs; others: on --video
    data: tuple[str, ...] = ()       # manifests
    checkpoint: str = "runs/pretrain/checkpoint.pt"  # train.py's, or the authors' .ckpt
    video: tuple[str, ...] = ()      # clips, folders of them or manifests to use the model on
    text: tuple[str, ...] = ("",)    # what is asked of them; [MASK] is a word to fill in
    out: str = ""                    # folder for pictures of the results
    json: str = ""                   # file for each sample's result; of --data, none: beside the
    #                                  checkpoint
    batch: int = 8                   # clips in one pass
    workers: int = 2                 # reading processes on each GPU
    clips: int = 1                   # views of S frames each, averaged; 3: the 3 x 3 of Tab. 2 to 4
    rerank: int = 0                  # retrieval, search: re-score the best K by the joint pass
    bootstrap: int = 0               # resamplings for a 95 % interval, say 1000
    order: Literal["kept", "shuffled", "reversed", "first"] = "kept"  # of frames: what needs it?
    boxes: bool = True               # VCR: draw the entities' regions (Tab. 5, "Mask")
    squash: bool = False             # frames resized to the square, not cropped: as in training
    columns: tuple[str, ...] = ()    # of a .csv or .tsv: video=NAME text=NAME
    vocab: str = "bert-base-uncased"  # for the authors' .ckpt, which carries no tokenizer
    blind: bool = False              # fill: from the text alone, to see what the video adds
    block: int = 0                   # explain: by this block's attention; 0: word-patch transport
    index: str = ""                  # search: file that keeps the clips' features
    window: float = 0.0              # cut clips of --video into windows of so many seconds
    top: int = 5                     # search: results for each text

    def clips_of(self, model: AllInOne, tokenizer: Tokenizer, answers=None) -> Clips:
        """The samples of `data` as the model reads them."""
        c = model.config
        return Clips(Manifest(self.data, self.columns), tokenizer, self.task, c.frames,
                     c.image_size, c.max_text_len, train=False, views=self.clips,
                     squash=self.squash, boxes=self.boxes, answers=answers)


def reorder(video: Tensor, order: str, index: Tensor) -> Tensor:
    """The frames of clips in another order, or the "first" one S times: (B, [K,] S, 3, H, W).

    index: (B,), the samples' numbers; a sample is shuffled alike whatever batch it is in.
    """
    S, clips = video.shape[-4], []
    for clip, i in zip(video, index.tolist()):
        drawn = torch.randperm(S, generator=torch.Generator().manual_seed(i))
        frames = {"kept": torch.arange(S), "shuffled": drawn, "reversed": torch.arange(S).flip(0),
                  "first": torch.zeros_like(drawn)}[order]
        clips.append(clip.index_select(-4, frames))
    return torch.stack(clips)


def read(model: AllInOne, clips: Clips, config: EvalConfig, device: torch.device,
         unreadable: list, indices=None):
    """Yields (collated items, their tensors by view) of this process's share, each sample once.

    Nothing is padded or dropped whatever the number of processes; `unreadable` gets what failed.
    Passes are of neighbouring samples of one manifest. A model that draws at random (patch_order,
    roll_select) does so by the sample: pass by pass of one, seeded.
    """
    manifest, keys = clips.manifest, []
    by_chance = "random" in (model.config.patch_order, model.config.roll_select)
    # VTM's pairs are drawn among 8 neighbours, on any number of processes the same
    size = 1 if by_chance else config.batch
    size = -(-size // 8) * 8 if config.task == "pretrain" else size
    indices = range(len(clips)) if indices is None else indices
    for end, lines in zip(manifest.ends, manifest.sizes):
        mine = [(i, i) for i in indices if end - lines <= i < end]
        keys += [mine[i:i + size] for i in range(0, len(mine), size)]
    keys = keys[dist.get_rank()::dist.get_world_size()]
    merge = functools.partial(collate, clips=clips, group=8)
    for items in load(clips, keys, merge, config.workers):
        unreadable += items["errors"]
        if not items["where"]:
            continue
        items["video"] = reorder(items["video"], config.order, items["index"])
        tensors = {k: v.to(device) for k, v in items.items() if isinstance(v, Tensor)}
        video = tensors["video"]
        if by_chance:
            torch.manual_seed(int(items["index"][0]))
        yield items, [tensors | {"video": view}
                      for view in (video.unbind(1) if video.dim() == 6 else [video])]


def half_precision(device: torch.device):
    """bf16 where the GPU has it, as in training."""
    return torch.autocast(device.type, torch.bfloat16,
                          enabled=device.type == "cuda" and torch.cuda.is_bf16_supported())


def check_scores(scores: Tensor, where: list[str]) -> None:
    """ValueError if a score is not a number: comparisons with it would count as right."""
    if bad := [name for name, row in zip(where, scores) if row.isnan().any()]:
        raise ValueError(f"{bad[0]}: the model's score is not a number (nor for {len(bad) - 1} "
                         "others read with it); the checkpoint's weights are damaged or overflow")


@torch.no_grad()
def evaluate(model: AllInOne, tokenizer: Tokenizer, config: EvalConfig, device: torch.device,
             answers: list[str] | None = None) -> dict:
    """Scores every sample of config.data once, on any number of processes (all get the result).

    answers: the classes of "qa" and "probe".
    Returns {"samples": N, "unreadable": [...], "predictions": [{where, kind, metrics, ...}]}, where
    metrics are what report() averages.
    """
    clips, model = config.clips_of(model, tokenizer, answers), model.to(device).eval()
    predictions, unreadable = [], []
    if config.task == "retrieval":
        predictions = score_retrieval(model, clips, config, device, unreadable)
    else:
        for items, views in read(model, clips, config, device, unreadable):
            with half_precision(device):
                scored = score(model, config.task, items, views)
            predictions += [
                {"index": int(items["index"][i]), "where": items["where"][i], "kind": kind,
                 "label": label, **predict(config.task, scores, label, answers)}
                for i, kind, scores, label in scored]
        predictions = sorted(in_all_processes(predictions), key=lambda p: p["index"])
    if config.task == "qa":
        add_majority(predictions)
    unreadable = list(dict.fromkeys(in_all_processes(unreadable)))     # re-ranking reads twice
    return {"samples": len(clips), "unreadable": unreadable, "predictions": predictions}


def score(model: AllInOne, task: str, items: dict, views: list[dict]) -> list[tuple]:
    """(row of the batch, kind, scores, label) of each sample, its views averaged. Pre-training
    (Tab. 6, 9, 10): of each clip, kind "VTM", and of each masked word, "MLM"."""
    labels = items["label"].tolist()
    if task != "pretrain":
        scores = sum(SCORES[task](model, view) for view in views) / len(views)
        check_scores(scores, items["where"])
        kinds = [kind or "all" for kind in items["kind"]]
        return list(zip(range(len(kinds)), kinds, scores.cpu(), labels))
    words, matched = (sum(scores).cpu() for scores in zip(
        *(score_pretraining(model, view)[:2] for view in views)))
    check_scores(matched, items["where"])
    rows = (items["mlm_where"] // items["text_ids"].shape[1]).tolist()
    found = [(i, "MLM", scores, label) for i, scores, label in zip(
        rows, words, items["mlm_labels"].tolist()) if label >= 0]
    return found + [(i, "VTM", scores, label) for i, (scores, label) in enumerate(
        zip(matched, items["vtm_labels"].tolist()))]


def predict(task: str, scores: Tensor, label: int, answers: list[str] | None) -> dict:
    """The metrics of one sample, whose scores are (O,) or (answers,), and what they rest on."""
    scores = scores[scores > -torch.inf]                           # without absent options
    tied = places(scores[None], torch.arange(len(scores))[None] == label)
    right = {k: 100 * recall(k, *map(int, tied)) for k in (1, 5, 10)}      # none for label -1
    if task == "pretrain":
        return {"metrics": {"accuracy %": right[1]}}
    if task == "choice":
        return {"scores": scores.tolist(),
                "metrics": {"accuracy %": right[1], "chance %": 100 / len(scores)}}
    best = [answers[a] for a in scores.topk(min(5, len(scores))).indices.tolist()]
    if task == "probe":
        return {"answers": best, "metrics": {f"top-{k} %": right[k] for k in right}}
    # an answer that is no class is wrong; the release leaves it out
    known = {"in vocabulary %": right[1]} if label >= 0 else {}
    return {"answers": best, "metrics": {"accuracy %": right[1]} | known}


def add_majority(predictions: list[dict]) -> None:
    """Adds to open-ended QA what the commonest answer of each kind would score."""
    for kind in {p["kind"] for p in predictions}:
        same = [p for p in predictions if p["kind"] == kind]
        commonest = Counter(p["label"] for p in same if p["label"] >= 0).most_common(1)
        for p in same:
            p["metrics"]["majority %"] = 100.0 * (p["label"] in dict(commonest))


# ---- Features that are kept: probes (Tab. 12), search ------------------------------------------

CHUNK = 2048                      # clips between two savings


def clip_key(sample: dict) -> str:
    """What tells whether a clip's features still hold: its file, and what is read of it."""
    try:
        stat = os.stat(sample["video"])
    except OSError:
        return f"{sample['video']} is absent"
    return json.dumps([sample["video"], stat.st_size, stat.st_mtime_ns,
                       *map(sample.get, ("start", "end", "fps", "boxes"))])


@torch.no_grad()
def kept_features(model: AllInOne, clips: Clips, encode, path: Path | None, config: EvalConfig,
                  device: torch.device, say):
    """({sample: feature}, unreadable): encode(model, view) of each clip, computed once.

    They are kept in `path` as long as weights and model are the same, and read from there for
    clips that have not changed. Written beside and renamed, in between too: a killed run goes on.
    """
    weights = zlib.crc32(b"".join(p.detach().cpu().numpy().tobytes() for name, p in
                                  model.named_parameters() if not name.startswith("answer_head")))
    c = {k: v for k, v in asdict(model.config).items() if not k.startswith("answer")}
    key, kept = json.dumps([weights, encode.__name__, c, clips.squash, clips.boxes, config.order
                            ]), {}
    try:
        content = read_weights(path) if path and path.exists() else {}
        if content.get("key") == key:
            kept = dict(zip(content["names"], content["features"]))
    except (ValueError, KeyError) as error:
        say(f"{path}: computed anew ({error})")                # no more than a cache
    names = [clip_key(clips.manifest[i]) for i in range(len(clips))]
    missing, unreadable = [i for i, name in enumerate(names) if name not in kept], []
    model.to(device).eval()
    for begin in range(0, len(missing), CHUNK):
        new = []
        for items, (view, *_) in read(model, clips, config, device, unreadable,
                                      missing[begin:begin + CHUNK]):
            with half_precision(device):
                new += zip(items["index"].tolist(), encode(model, view).cpu())
        kept |= {names[i]: feature for i, feature in in_all_processes(new)}
        say(f"\rfeatures: {begin} of {len(missing)} clips", end="")
        if path and kept and dist.get_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                torch.save({"key": key, "names": list(kept),
                            "features": torch.stack(list(kept.values()))}, file)
    unreadable = in_all_processes(unreadable)
    if missing:
        say(f"\rfeatures of {len(missing) - len(unreadable)} clips; unreadable: {len(unreadable)}")
    return {i: kept[name] for i, name in enumerate(names) if name in kept}, unreadable


def cls_features(model: AllInOne, clips: Clips, path: Path, config, device, say):
    """(what a probe trains on, what could not be read): a list of {feature, label, where, set}.

    config: a TrainConfig. DataError if more than 1 clip in 10 cannot be read.
    """
    reading = EvalConfig(task="probe", batch=config.batch_per_gpu, workers=config.workers)
    features, unreadable = kept_features(model, clips, video_cls, path, reading, device, say)
    if len(unreadable) > len(clips) / 10:
        raise DataError(f"{len(unreadable)} of {len(clips)} clips cannot be read, above 1 in 10: "
                        f"{'; '.join(unreadable[-3:])}")
    samples = []
    for i, feature in features.items():
        sample = clips.manifest[i]
        samples.append({"feature": feature, "label": clips.labels.get(sample.get("answer"), -1),
                        "where": sample["where"], "set": clips.manifest.locate(i)[0]})
    return samples, unreadable


# ---- Retrieval (Sec. 4.2.2, Tab. 3, Tab. 7) -----------------------------------------------------

BLOCK = 4096                      # BLOCK^2 scores are in memory at once


class Side(typing.NamedTuple):
    """One side of retrieval: as queries or as the gallery."""

    names: list                   # file:line of each clip, file:line#k of its k-th caption
    clip: Tensor                  # (G,) which clip each is or belongs to
    features: Tensor              # (G, E), normalised


def cosines(asked: Side, gallery: Side):
    """Yields (first query, cosines (rows, G)) by blocks of this process's share of the queries.

    Products in float64 and rounded, so that ties stay ties in blocks of any size.
    """
    size = max(1, BLOCK ** 2 // len(gallery.names))
    for begin in range(0, len(asked.names), size)[dist.get_rank()::dist.get_world_size()]:
        queries = asked.features[begin:begin + size].double()
        yield begin, torch.cat([(queries @ part.double().T).float()
                                for part in gallery.features.split(BLOCK)], 1)


def score_retrieval(model: AllInOne, clips: Clips, config: EvalConfig, device: torch.device,
                    unreadable: list) -> list[dict]:
    """Each clip and each caption encoded once, alone; cosines; --rerank by the joint pass.

    Returns one prediction for each caption (kind "text to video") and each clip ("video to text").
    """
    rows = []
    for items, views in read(model, clips, config, device, unreadable):
        with half_precision(device):
            video = sum(video_embedding(model, view) for view in views) / len(views)    # (B, E)
            text = text_embedding(model, views[0]["text_ids"], views[0]["text_mask"])   # (T, E)
        check_scores(video, items["where"])
        for i, index in enumerate(items["index"].tolist()):
            own = (items["text_clip"] == i).nonzero()[:, 0]
            ids = [tuple(items["text_ids"][t][items["text_mask"][t]].tolist()) for t in own]
            rows.append((index, items["where"][i], video[i].cpu(), text.cpu()[own], ids))
    rows = sorted(in_all_processes(rows), key=lambda row: row[0])
    if not rows:
        return []
    index, where, videos, texts, ids = zip(*rows)
    first, captions = {}, [words for own in ids for words in own]
    once = torch.tensor([first.setdefault(words, t) for t, words in enumerate(captions)])
    clip = torch.arange(len(rows))
    videos = Side(where, clip, torch.stack(videos))
    texts = Side([f"{name}#{k}" for name, own in zip(where, ids) for k in range(len(own))],
                 clip.repeat_interleave(torch.tensor([len(own) for own in ids])),
                 torch.cat(texts)[once])                                 # equal words tie exactly
    ways = [("text to video", texts, videos), ("video to text", videos, texts)]
    joint = [None, None]
    if config.rerank:
        joint = rerank(model, clips, config, device, unreadable, index, captions, once, ways)
    predictions = []
    for (kind, asked, gallery), reranked in zip(ways, joint):
        mine = []
        for begin, scores in cosines(asked, gallery):                    # (rows, G)
            end = begin + len(scores)
            if reranked:
                query, candidate, matched = reranked
                here = (query >= begin) & (query < end)
                scores = scores.double()                   # float32 would lose digits of matched
                scores[query[here] - begin, candidate[here]] = matched[here]
            found = places(scores, asked.clip[begin:end, None] == gallery.clip)
            for q, best, above, wrong, right in zip(range(begin, end), scores.argmax(1).tolist(),
                                                    *(n.tolist() for n in found)):
                recalls = {f"R@{k} %": 100 * recall(k, above, wrong, right) for k in (1, 5, 10)}
                rank = above + (wrong + right + 1) / (right + 1)
                mine.append((q, {"where": asked.names[q], "kind": kind, "best": gallery.names[best],
                                 "metrics": recalls | {"rank": rank}}))
        predictions += [p for _, p in sorted(in_all_processes(mine), key=lambda row: row[0])]
    return predictions


def places(scores: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each query: the wrong candidates above its best right one, and the wrong and right ones
    that score as it does.

    scores: (Q, G); own: bool (Q, G), True where candidate g is right (all captions of a clip are:
    the best counts). Were ties broken at random, the first right one had the expected rank
    above + (wrong + right + 1) / (right + 1).
    """
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    tied = scores == best
    return ((scores > best) & ~own).sum(1), (tied & ~own).sum(1), (tied & own).sum(1)


def recall(k: int, above: int, wrong: int, right: int) -> float:
    """The chance that a right candidate is among the first k, ties drawn at random (see places)."""
    drawn = min(max(k - above, 0), wrong + right)
    return 1 - math.comb(wrong, drawn) / math.comb(wrong + right, drawn)


def rerank(model: AllInOne, clips: Clips, config: EvalConfig, device: torch.device,
           unreadable: list, index: tuple, captions: list, once: Tensor, ways: list) -> list[tuple]:
    """VTM's matched logit of the best config.rerank of each query, by cosine: for each direction
    (query, candidate, logit), all (P,), shifted above every cosine.

    index: the clips' numbers. captions: their ids. once: for each caption the first one of the same
    words, which alone is scored. Whoever ties with the last of the best is among them.
    """
    N, chosen = len(index), []
    for _, asked, gallery in ways:
        mine = []
        for begin, scores in cosines(asked, gallery):
            last = scores.topk(min(config.rerank, scores.shape[1]), 1).values[:, -1:]
            mine.append((scores >= last).nonzero() + torch.tensor([begin, 0]))
        chosen.append(torch.cat(in_all_processes(mine)))
    (text, video), (video_, text_) = (pairs.unbind(1) for pairs in chosen)
    numbers = torch.cat([once[text] * N + video, once[text_] * N + video_])
    wanted, at = numbers.unique(return_inverse=True)
    place, found = {i: v for v, i in enumerate(index)}, []
    for items, views in read(model, clips, config, device, unreadable):
        for b, v in enumerate(place[i] for i in items["index"].tolist()):
            for part in (wanted % N == v).nonzero()[:, 0].split(8 * config.batch):
                own = [list(captions[t]) for t in wanted[part] // N]
                lengths = torch.tensor([len(ids) for ids in own])
                words = pad(own, int(lengths.max()), 0).to(device)
                mask = (torch.arange(words.shape[1]) < lengths[:, None]).to(device)
                logits = torch.zeros(len(part))
                for view in views:
                    with half_precision(device):
                        video = model.embed_video(view["video"][b:b + 1])
                        pooled = model.fuse(video.expand(len(part), -1, -1, -1),
                                            model.embed_text(words), mask).pooled
                    logits += model.vtm_head(pooled)[:, 1].cpu() / len(views)
                check_scores(logits, [items["where"][b]] * len(part))
                found.append((part, logits.double()))
    matched = torch.full(wanted.shape, torch.nan, dtype=torch.float64)   # clips unreadable now
    for part, logits in in_all_processes(found):
        matched[part] = logits
    matched = (matched - matched.nan_to_num(torch.inf).min() + 2)[at].split([*map(len, chosen)])
    return [(*pairs[~scores.isnan()].unbind(1), scores[~scores.isnan()])
            for pairs, scores in zip(chosen, matched)]


# ---- On any video: fill, match, ask, explain, attention, search (Sec. 4.6, Fig. 4, 6, 11) --------

def likeliest(chances: Tensor, name) -> list:
    """[name, chance] of the five greatest of chances (K,)."""
    best = chances.topk(min(5, len(chances)))
    return [[name(i), round(p, 4)] for p, i in zip(*(x.tolist() for x in best))]


def fill(model: AllInOne, clips: Clips, clip: dict, config: EvalConfig) -> dict:
    """The five likeliest words of each [MASK], by the video and the text or --blind, the text."""
    ids, mask = clip["text_ids"], clip["text_mask"]
    text = model.encode_text(ids, mask) if config.blind else model(clip["video"], ids, mask).text
    chances = model.mlm_head(text[ids == clips.tokenizer.mask_id]).float().softmax(-1)
    return {"masks": [likeliest(row, clips.tokenizer.words.id_to_token) for row in chances]}


def match(model: AllInOne, clips: Clips, clip: dict, config: EvalConfig) -> dict:
    """Each --text, its probability among them (Sec. 4.2.3) and that of matching, alone."""
    video = clip["video"].expand(len(config.text), -1, -1, -1, -1)
    logits = model.vtm_head(model(video, clip["text_ids"], clip["text_mask"]).pooled)      # (B, 2)
    among, alone = logits[:, 1].softmax(0), logits.softmax(1)[:, 1]
    return {"captions": [[text, round(p, 4), round(q, 4)] for text, p, q in zip(
        config.text, among.tolist(), alone.tolist())]}


def ask(model: AllInOne, clips: Clips, clip: dict, config: EvalConfig) -> dict:
    """The five likeliest answers of an open-ended QA checkpoint (Sec. 4.2.1)."""
    chances = score_answers(model, clip)[0].softmax(0)
    return {"answers": likeliest(chances, clips.answers.__getitem__)}


def origins(model: AllInOne, S: int, blocks: int) -> Tensor:
    """(S, n): the frame whose patch stands in each slot of each frame, after rolling so often."""
    c, first = model.config, 1 if model.config.roll == "release" else model.specials
    frames = torch.arange(S)[:, None, None].expand(-1, first + c.patches, 1)
    for d in range(c.roll_start, blocks + 1):
        if c.temporal == "token_rolling" and S > 1:
            frames = token_rolling(frames, S, c.roll_ratio, first=first, roll=c.roll,
                                   select=c.roll_select, layer=d)
    return frames[:, first:, 0]


def block_attention(model: AllInOne, clip: dict) -> list[tuple[Tensor, Tensor]]:
    """What each text token spends, by block: on text (m, m) and on the video tokens, which have
    come to the S frames: (m, S, 1+n). Together they sum to 1; frames and heads are averaged."""
    S, m, blocks = clip["video"].shape[1], clip["text_ids"].shape[1], []

    def keep(attn, args, out):
        spent = attn.weights(*args)[:, :m]      # (S, m, m+1+n) or, of "flatten", (1, m, m+S(1+n))
        video = spent[:, :, m:].transpose(0, 1).reshape(m, S, -1)
        blocks.append((spent[:, :, :m].mean(0), video / len(spent)))
    hooks = [block.attn.register_forward_hook(keep) for block in model.blocks]
    model(clip["video"], clip["text_ids"], clip["text_mask"])
    for hook in hooks:
        hook.remove()
    return blocks


def explain(model: AllInOne, clips: Clips, clip: dict, config: EvalConfig) -> dict:
    """Where each word looks (Sec. 4.6, Fig. 6): maps (words, S, rows, columns) that sum to 1.

    By the word-patch transport on the last block's tokens or, with --block, by that block's
    attention. Patches are put back to the frame that they were rolled from; [MASK]s are filled.
    """
    clip = dict(clip)
    while (masks := clip["text_ids"] == clips.tokenizer.mask_id).any():
        features = model(clip["video"], clip["text_ids"], clip["text_mask"])
        chances, words = model.mlm_head(features.text).float().softmax(-1).max(-1)     # (1, m)
        words = words.masked_fill(words == clips.tokenizer.mask_id, clips.tokenizer.unk_id)
        at = chances.masked_fill(~masks, -1).argmax(1)                        # the surest first
        clip["text_ids"] = clip["text_ids"].index_copy(1, at, words[:, at])
    ids, S, c = clip["text_ids"], clip["video"].shape[1], model.config
    if config.block:
        maps = block_attention(model, clip)[config.block - 1][1][:, :, model.specials:]
    else:
        features = model(clip["video"], ids, clip["text_mask"])
        patches = features.frames[:, :, model.specials:].flatten(1, 2)                 # (1, S*n, D)
        _, plan = word_patch_transport(features.text, patches, clip["text_mask"])
        maps = plan[0].unflatten(1, (S, -1))                                           # (m, S, n)
    source = origins(model, S, config.block or c.depth).to(maps.device)
    maps = torch.zeros_like(maps).scatter_add_(1, source.expand(len(maps), -1, -1), maps)
    inside = slice(1, int(clip["text_mask"].sum()) - 1)                       # no [CLS], no [SEP]
    maps = maps[inside] / maps[inside].sum((1, 2), keepdim=True)
    side = c.image_size // c.patch_size
    return {"words": [clips.tokenizer.words.id_to_token(i) for i in ids[0, inside].tolist()],
            "maps": maps.unflatten(2, (side, side)).tolist()}


def attention(model: AllInOne, clips: Clips, clip: dict, config: EvalConfig) -> dict:
    """What a text token spends, by block (Fig. 4): shares on text, video cls, its own frame's
    patches and rolled ones, which sum to 1; and "per_patch", a rolled patch's share by another's.
    """
    S, m, blocks = clip["video"].shape[1], int(clip["text_mask"].sum()), []
    for d, (text, video) in enumerate(block_attention(model, clip), start=1):
        cls, patches = video[:m].mean(0).tensor_split((model.specials,), 1)            # (S, n)
        rolled = (origins(model, S, d) != torch.arange(S)[:, None]).to(patches.device)
        own, other = float(patches[~rolled].sum()), float(patches[rolled].sum())
        ratio = other / own * float((~rolled).sum() / rolled.sum()) if rolled.any() else 0.0
        blocks.append({"step": d, "text": float(text[:m].sum() / m), "cls": float(cls.sum()),
                       "own": own, "rolled": other, "per_patch": ratio})
    return {"blocks": blocks}


USES = {"fill": fill, "match": match, "ask": ask, "explain": explain, "attention": attention}


def video_manifest(config: EvalConfig) -> str:
    """A manifest of --video: files, folders (walked) and manifests, --text added to each line.

    What is longer than --window seconds is cut into such windows, between its own start and end.
    """
    lines, window = [], config.window
    asked = {"question": config.text[0], "texts": config.text}
    for path in map(Path, config.video):
        if path.suffix in (".jsonl", ".csv", ".tsv"):
            samples = list(Manifest(path, config.columns))
        else:
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            samples = [{"video": str(file.absolute())} for file in files
                       if file == path or file.suffix.lower() in MEDIA]
        for sample in samples:
            kept = {key: sample[key] for key in ("video", "start", "end", "fps") if key in sample}
            begin, times = sample.get("start", 0.0), [{}]
            end = min(sample.get("end", math.inf), window and duration(sample["video"]) or math.inf)
            if window and window < end - begin < math.inf:
                times = [{"start": begin + k * window, "end": min(begin + (k + 1) * window, end)}
                         for k in range(math.ceil((end - begin) / window))]
            lines += [json.dumps(kept | span | asked) + "\n" for span in times]
    if not lines:
        raise DataError(f"--video {' '.join(config.video)}: no clip there; expected files, folders "
                        "or manifests")
    place = temporary("".join(lines), ".jsonl")
    with replacing(place) as file:
        file.write("".join(lines).encode())
    return str(place)


def place_of(sample: dict) -> str:
    """A clip as a person names it: its path, and its window."""
    window = f" {sample.get('start', 0):g}-{sample.get('end', math.inf):g} s"
    return sample["video"] + window * ("start" in sample or "end" in sample)


@torch.no_grad()
def use(model: AllInOne, tokenizer: Tokenizer, config: EvalConfig, answers, device,
        say) -> list[dict]:
    """--task fill, match, ask, explain, attention or search on the clips of --video.

    Prints and returns the results, in all processes the same; the first one writes --out DIR, a
    picture of each clip (search: of each text).
    """
    model, unreadable, found = model.to(device).eval(), [], []
    task = {"ask": "qa", "search": "probe"}.get(config.task, "retrieval")
    reading = replace(config, task=task, clips=1, data=(video_manifest(config),))
    clips = reading.clips_of(model, tokenizer, answers)
    if config.task == "search":
        found = search(model, clips, reading, device, unreadable, say)
    else:
        for items, (clip,) in read(model, clips, replace(reading, batch=1), device, unreadable):
            number, frames = int(items["index"][0]), items["video"][0]
            about = USES[config.task](model, clips, clip, config)
            rows = [(json.dumps(about)[:80], list(frames))]
            if config.task == "explain":
                rows = [(word, heated(frames, torch.tensor(heat)))
                        for word, heat in zip(about["words"], about["maps"])]
            result = {"video": place_of(clips.manifest[number]), **about}
            found.append((number, result, rows if config.out else []))
        found = sorted(in_all_processes(found), key=lambda one: one[0])
    pictures, results = defaultdict(list), [result for _, result, _ in found]
    for number, result, rows in found:
        say(json.dumps({k: v for k, v in result.items() if k not in ("maps", "blocks")},
                       ensure_ascii=False))
        pictures[number] += rows
    for line in dict.fromkeys(in_all_processes(unreadable)):
        say(f"left out: {line}")
    blocks = [{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
              for rows in zip(*(result.get("blocks", ()) for result in results))]
    for row in blocks:
        say("block " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    if dist.get_rank() == 0 and config.out:
        for number, rows in enumerate(pictures.values(), start=1):
            save_picture(Path(config.out) / f"{config.task}-{number}.png", rows)
        save_curves(Path(config.out) / "attention.png", blocks, ("text", "cls", "own", "rolled"))
    return results


def index_entry(model: AllInOne, batch: dict) -> Tensor:
    """(B, vtc_dim): a clip's embedding as an index keeps it."""
    return video_embedding(model, batch).half()


def search(model: AllInOne, clips: Clips, config: EvalConfig, device: torch.device,
           unreadable: list, say) -> list[tuple]:
    """The clips that are likest to each --text, by cosine (Sec. 3.3 VTC), the best --rerank of
    them by VTM: (number of the text, result, rows of its picture). --index FILE keeps the features.

    Each process looks through its share of the clips.
    """
    path, found = Path(config.index) if config.index else None, []
    features, lost = kept_features(model, clips, index_entry, path, config, device, say)
    unreadable += lost
    if not features:
        raise DataError(f"no clip can be read: {'; '.join(lost[:3])}")
    share = slice(dist.get_rank(), None, dist.get_world_size())
    numbers = list(features)[share]
    gallery = torch.stack(list(features.values()))[share].to(device, torch.float32)    # (G, E)
    for t, text in enumerate(config.text):
        ids = torch.tensor([clips.tokenizer.encode(text, clips.max_text_len)], device=device)
        best = nearest(text_embedding(model, ids), gallery, max(config.rerank, config.top))
        pairs = in_all_processes([(c, numbers[g]) for c, g in zip(*(x[0].tolist() for x in best))])
        pairs.sort(key=lambda pair: (-pair[0], pair[1]))
        pairs, looks = pairs[:max(config.rerank, config.top)], []
        looked_at = [i for _, i in (pairs if config.out else pairs[:config.rerank])]
        for items, (clip,) in read(model, clips, replace(config, batch=1), device, unreadable,
                                   looked_at):
            matched = float(model.vtm_head(model(clip["video"], ids).pooled).softmax(1)[0, 1])
            looks.append((int(items["index"][0]), (matched, list(items["video"][0]))))
        looks, results = dict(in_all_processes(looks)), []
        for place, (cosine, i) in enumerate(pairs):
            name, (matched, frames) = place_of(clips.manifest[i]), looks.get(i, (None, []))
            result = {"text": text, "video": name, "cosine": round(cosine, 4)}
            if place < config.rerank and i in looks:
                result["matched"] = round(matched, 4)
            results.append((t, result, [(f"{cosine:.2f} {name}", frames)]))
        # those looked at come first, the likest by VTM before others; the rest by cosine
        results.sort(key=lambda one: ("matched" not in one[1], -one[1].get("matched", 0)))
        found += results[:config.top]
    return found


def nearest(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(cosines, numbers), (Q, k), of the likest rows of gallery (G, E), read block by block."""
    best = queries[:, :0], queries[:, :0].long()
    for begin in range(0, len(gallery), 16 * BLOCK):
        part = gallery[begin:begin + 16 * BLOCK].to(queries.device, torch.float32)
        scores, numbers = (queries @ part.T).topk(min(k, len(part)))
        scores, numbers = torch.cat([best[0], scores], 1), torch.cat([best[1], numbers + begin], 1)
        kept = scores.topk(min(k, scores.shape[1]))
        best = kept.values, numbers.gather(1, kept.indices)
    return best


# ---- Pictures -----------------------------------------------------------------------------------

def heated(video: Tensor, heat: Tensor) -> list[Tensor]:
    """Frames (S, 3, H, W) under maps (S, rows, columns) in yellow, the peak opaque."""
    heat = F.interpolate(heat[:, None], size=video.shape[2:])                         # (S,1,H,W)
    heat = heat / heat.max().clamp(min=1e-9)
    yellow = torch.tensor([255.0, 255, 0]).view(3, 1, 1)
    return list((video * (1 - heat) * 0.7 + yellow * heat).byte())


def save_picture(path: Path, rows: list[tuple[str, list[Tensor]]], side: int = 112) -> None:
    """A PNG of rows, each a line of text above its frames (3, H, W), `side` pixels square."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wide = max([len(frames) for _, frames in rows] + [4])
    sheet = Image.new("RGB", (wide * side, len(rows) * (side + 16)), "white")
    for i, (text, frames) in enumerate(rows):
        ImageDraw.Draw(sheet).text((2, i * (side + 16) + 2), text, "black")
        for k, frame in enumerate(frames):
            image = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((side, side))
            sheet.paste(image, (k * side, i * (side + 16) + 16))
    sheet.save(path)


def save_curves(path: Path, lines: list[dict], names: tuple = (), size=(640, 360)) -> None:
    """A PNG of `names` (of a log: its losses and accuracies) against "step", each by its greatest.
    """
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = Image.new("RGB", size, "white")
    draw, colours = ImageDraw.Draw(sheet), ("red", "blue", "green", "orange", "purple", "black")
    names = names or [name for name in lines[-1]
                      if f"{name.removesuffix('_accuracy')}_accuracy" in lines[-1]]
    for k, name in enumerate(names):
        values = [(line["step"], line[name]) for line in lines if name in line]
        most, last = max(v for _, v in values) or 1.0, max(step for step, _ in values)
        draw.line([(size[0] * step / last, size[1] - (size[1] - 20) * v / most)
                   for step, v in values], fill=colours[k % 6])
        draw.text((8 + 105 * k, 4), f"{name} {values[-1][1]:.3g}", colours[k % 6])
    sheet.save(path)


# ---- The report, beside the paper ---------------------------------------------------------------

PAPER = {  # by the name that data.py convert gives a data set; R@1/5/10 where it is retrieval
    "tgif_action": "Tab. 2a: Ti 80.6, S 91.2, B 92.7, B* 95.5",
    "tgif_transition": "Tab. 2a: Ti 83.5, S 92.7, B 94.3, B* 94.7",
    "tgif_frameqa": "Tab. 2a: Ti 53.9, S 64.0, B 64.2, B* 66.3",
    "msrvtt_qa": "Tab. 2b: S 39.5, B 42.9 (3 x 3 44.3), B* 46.8",
    "msvd_qa": "Tab. 2c: S 41.7, B 46.5 (3 x 3 47.9), B* 48.3",
    "msrvtt_9k": "Tab. 3a, 7: B 37.1/66.7/75.9 (3 x 3 37.9/68.1/77.1); to text 37.5/66.1/77.4",
    "msrvtt_7k": "Tab. 3a: B 33.8/64.2/74.3 (3 x 3 34.4/65.4/75.8)",
    "activitynet": "Tab. 3b: B 21.5/50.3/65.5, median rank 6 (3 x 3 22.4/53.7/67.7, 5)",
    "didemo": "Tab. 3c, 7: B 31.2/60.5/72.1, median rank 3; to text 30.4/58.3/69.4",
    "msrvtt_mc": "Tab. 4a: B 91.4 (3 x 3 92.0), B* 92.3; zero-shot B 80.3",
    "lsmdc_mc": "Tab. 4b: B 83.1 (3 x 3 83.5), B* 84.4; zero-shot B 56.3",
    "vcr_qa": "Tab. 5: B 60.5 (CC3M + COCO), 68.4 (HowTo100M), 65.2 (no regions drawn)",
    "kinetics400": "Tab. 12, top-1/5/10: B 50.8/79.8/90.7 (8 frames 53.4/83.2/92.6)",
    "hmdb51": "Tab. 12, top-1/5/10: B 52.9/84.1/93.4 (8 frames 55.7/88.2/95.2)",
    "ego4d_mc": "Tab. 13: B 65.89, zero-shot 36.52",
    "webvid": "Tab. 6, VTM / MLM accuracy: B 90.4 / 60.5 after 200K steps, 92.1 / 62.2 after 800K",
}


def summarise(predictions: list[dict], resamplings: int = 0) -> dict[str, dict[str, list[float]]]:
    """{kind: {column: [average]}}, of resamplings > 0 followed by 95 % of the averages of resampled
    samples, always the same ones (bootstrap). A rank gives two columns, its median and mean."""
    table = defaultdict(dict)
    for kind, name in dict.fromkeys((p["kind"], k) for p in predictions for k in p["metrics"]):
        values = torch.tensor([p["metrics"][name] for p in predictions if p["kind"] == kind
                               and name in p["metrics"]], dtype=torch.float64)
        columns = {name: torch.mean}
        if name == "rank":
            columns = {"median rank": lambda v: v.quantile(0.5), "mean rank": torch.mean}
        for column, average in columns.items():
            draw = torch.Generator().manual_seed(0)
            sampled = [average(values[torch.randint(len(values), values.shape, generator=draw)])
                       for _ in range(resamplings)]
            ends = torch.tensor([0.025, 0.975], dtype=values.dtype)
            table[kind][column] = [float(average(values)), *(
                torch.stack(sampled).quantile(ends).tolist() if sampled else ())]
    return table


def report(result: dict, config: EvalConfig, model: Config, say=print) -> dict[str, float]:
    """Prints the protocol, a table by kind and the paper's row; returns {kind: first column}.

    A score that lacks samples is called incomplete, and the unreadable ones are named.
    """
    say(f"\n{config.task} on {', '.join(map(str, config.data))}; {model.frames} frames"
        + f" x {config.clips} views" * (config.clips > 1)
        + f"; VTM ranks the best {config.rerank}" * (config.rerank > 0)
        + f"; FRAMES CHANGED: {config.order}" * (config.order != "kept"))
    table = summarise(result["predictions"], config.bootstrap)
    samples = Counter(p["kind"] for p in result["predictions"])
    header = list(dict.fromkeys(name for columns in table.values() for name in columns))
    wide = [max(28 if config.bootstrap else 12, len(name) + 2) for name in header]
    say(f"{'kind':<16}" + "".join(map(str.rjust, header, wide)) + f"{'samples':>9}")
    for kind, columns in table.items():
        shown = "{:.1f} [{:.1f}, {:.1f}]" if config.bootstrap else "{:.1f}"
        cells = [shown.format(*columns[name]) if name in columns else "-" for name in header]
        say(f"{kind:<16}" + "".join(map(str.rjust, cells, wide)) + f"{samples[kind]:>9}")
    if result["unreadable"]:
        say(f"INCOMPLETE: {len(result['unreadable'])} of {result['samples']} samples unreadable:")
        for line in result["unreadable"]:
            say(f"  {line}")
    if numbers := PAPER.get(Path(config.data[0]).parent.name):
        say(f"paper, {numbers}")
    return {kind: next(iter(columns.values()))[0] for kind, columns in table.items()}


# ---- What it costs (Tab. 1, Tab. 14, Fig. 1c, Fig. 3) --------------------------------------------

def count_parameters(model: AllInOne, heads: bool = True) -> int:
    """Parameters, with all objective heads or, as Tab. 1 counts, without MLM's and VTC's."""
    left_out = () if heads else ("mlm_head.", "text_proj.", "video_proj.")
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(left_out))


def count_macs(config: Config) -> dict[str, float]:
    """Multiply-adds of one clip, by torch's FlopCounterMode on shapes alone (no weights, no data).

    Returns {"joint", "attention", "video", "text"}: the three passes at full text length, and the
    part of the joint pass in products of queries, keys and values (what Sec. 3.2 compares).
    """
    with torch.device("meta"):
        model, size = AllInOne(config).eval(), config.image_size
        video = torch.zeros(1, config.frames, 3, size, size, dtype=torch.uint8)
        ids = torch.zeros(1, config.max_text_len, dtype=torch.int64)
    macs = {}
    for name, run in (("joint", lambda: model(video, ids)),
                      ("video", lambda: model.encode_video(video)),
                      ("text", lambda: model.encode_text(ids))):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        flops = {str(kind): n for kind, n in counter.get_flop_counts()["Global"].items()}
        macs[name] = sum(flops.values()) / 2
        macs.setdefault("attention", sum(n for kind, n in flops.items() if "bmm" in kind
                                         or "attention" in kind) / 2)      # of the first, joint
    return macs


@torch.no_grad()
def measure_throughput(config: Config, device: torch.device, batch: int, seconds=3.0) -> float:
    """Clips a second through the joint pass with full-length text, in evaluation mode (Tab. 1)."""
    model, size = AllInOne(config).to(device).eval(), config.image_size
    video = torch.randint(256, (batch, config.frames, 3, size, size), device=device).byte()
    ids = torch.randint(config.vocab_size, (batch, config.max_text_len), device=device)
    clips, start = -batch, 0.0
    while clips < batch or time.perf_counter() - start < seconds:
        with half_precision(device):
            model(video, ids).pooled.sum().item()              # .item() waits for the device
        clips += batch
        start = start or time.perf_counter()                   # the first pass warms up
    return clips / (time.perf_counter() - start)


def profile(sizes: dict, device: torch.device, batch: int) -> None:
    """`--task profile`: what each variant costs (Tab. 1), and B with Tab. 8a's and 9's exchange."""
    print("Multiply-adds (the paper's FLOPs) of one clip; parameters without the MLM and VTC heads "
          "(Tab. 1:\nTi 12, S 33, B 110; Tab. 9: timesformer 180.5, decoupled 192) and with all; "
          f"joint passes\nin batches of {batch} on {device.type}, {torch.get_num_threads()} "
          "threads (Tab. 1: Ti 745, S 285, B 89 clips/s)\n\n" + " " * 16
          + "params M  all heads  joint G  attention G  video G  text G  clips/s")
    exchanges = {f"B {name}": {"temporal": name} for name in typing.get_args(Temporal)[1:]}
    for name, fields in (VARIANTS | exchanges).items():
        config = Config(**{**sizes, **fields})
        with torch.device("meta"):
            model = AllInOne(config)
        macs = count_macs(config)
        print("{:<16}{:8.1f}  {:9.1f}  {:7.1f}  {:11.1f}  {:7.1f}  {:6.1f}  {:7.1f}".format(
            name, count_parameters(model, heads=False) / 1e6, count_parameters(model) / 1e6,
            *(macs[kind] / 1e9 for kind in ("joint", "attention", "video", "text")),
            measure_throughput(config, device, batch)))


def scale() -> None:
    """`--task scale`: Tab. 14 on made-up features of 512 numbers, kept in float16 on disk.

    On CPUs products in float32 are as fast as in float16, and exact: so the index is read once.
    """
    block, begin = torch.ones(2 ** 27), time.perf_counter()
    block.sum()
    bandwidth = block.nbytes / (time.perf_counter() - begin)
    speed = measure_throughput(Config(), torch.device("cpu"), 1)
    print("clips      index MB  s to read  ms a query  of it memory  queries/s in 64  joint passes")
    for size in (10_000, 100_000, 1_000_000):
        with tempfile.NamedTemporaryFile() as file:
            index = np.memmap(file.name, np.float16, "w+", shape=(size, Config.vtc_dim))
            for part in np.array_split(index, 10):
                part[:] = np.random.default_rng(0).standard_normal(part.shape, np.float32)
            spent, queries = [time.perf_counter()], torch.randn(64, Config.vtc_dim)
            gallery = torch.from_numpy(index).float()
            spent.append(time.perf_counter())
            for batch in (queries[:1], queries[:1], queries):              # the first warms up
                nearest(batch, gallery, 10)
                spent.append(time.perf_counter())
            reading, _, query, many = np.diff(spent)
            print(f"{size:<9}  {index.nbytes / 1e6:8.0f}  {reading:9.1f}  {1000 * query:10.1f}  "
                  f"{gallery.nbytes / bandwidth / query:12.0%}  {64 / many:15.0f}  "
                  f"{size / speed / 3600:10.1f} h")


# ---- Command line -------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Score All-in-one, use it on any video, or tell what it costs.",
        usage="python eval.py --task TASK [--FLAG VALUE ...]", allow_abbrev=False)
    add_flags(parser.add_argument_group("what to score"), EvalConfig)
    add_flags(parser.add_argument_group("model, over the checkpoint's"), Config)
    given = given_flags(parser, argv)
    sizes = {k: given.pop(k) for k in Config.__dataclass_fields__ if k in given}
    config = EvalConfig(**given)
    task, using = config.task, config.task in (*USES, "search")
    if task == "profile":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return profile(sizes, device, config.batch)
    if task == "scale":
        return scale()
    for wrong, message in (
            (not config.data and not using, f"--task {task} needs --data MANIFEST"),
            (not config.video and using, f"--task {task} needs --video FILE or FOLDER"),
            (using and task != "attention" and not any(config.text),
             f"--task {task} needs --text WORDS"),
            (len(config.text) > 1 and task not in ("match", "search"),
             "several --text are for --task match and search"),
            (min(config.batch, config.clips) < 1, "--batch and --clips must be 1 or more"),
            (config.rerank and task not in ("retrieval", "search"),
             "--rerank is for --task retrieval and search")):
        if wrong:
            parser.error(message)
    with joined_processes() as device:
        say = print if dist.get_rank() == 0 else lambda *_, **__: None
        path = Path(config.checkpoint)
        if not path.exists():
            raise ValueError(f"{path}: no such file; give --checkpoint, or make the proof run's in "
                             "four minutes: python train.py --task pretrain")
        content = read_weights(path)
        model, tokenizer, answers = checkpoint_model(content, path, config.vocab, say, **sizes)
        trained = content.get("config", {})
        config = replace(config, squash=config.squash or trained.get("squash", False))
        needed = {"qa": "qa", "ask": "qa", "probe": "probe"}.get(task, trained.get("task"))
        if trained.get("task") != needed:
            raise ValueError(f"{path} was trained for {trained.get('task', 'another task')}: "
                             f"fine-tune it with train.py --task {needed} --init {path}")
        # of the authors' files those that were fine-tuned for retrieval have projections
        vtc = "vtc" in trained.get("objectives", ()) or any(
            "txt_proj" in name for name in content.get("state_dict", ()))
        if not vtc and (task == "search" or task == "retrieval" and not config.rerank):
            raise ValueError(f"{path} was not trained with VTC, its cosines mean nothing: "
                             "fine-tune it (train.py --task retrieval), or score a manifest with "
                             "--task retrieval --rerank CANDIDATES by VTM")
        if not 0 <= config.block <= model.config.depth:
            raise ValueError(f"--block {config.block}: the model has blocks 1 to "
                             f"{model.config.depth}")
        saved = config.json
        if using:
            results = use(model, tokenizer, config, answers, device, say)
        else:
            result = evaluate(model, tokenizer, config, device, answers)
            report(result, config, model.config, say)
            results, data = result["predictions"], Path(config.data[0])
            how = [config.order] * (config.order != "kept")
            how += [f"clips{config.clips}"] * (config.clips > 1)
            how += [f"rerank{config.rerank}"] * (config.rerank > 0)
            name = "-".join([task, data.parent.name, data.stem, *how]) + ".predictions.jsonl"
            saved = saved or path.parent / name
            say(f"per-sample predictions: {saved}")
        if saved and dist.get_rank() == 0:
            Path(saved).parent.mkdir(parents=True, exist_ok=True)
            with replacing(saved) as file:
                file.write("".join(json.dumps(one) + "\n" for one in results).encode())


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
