"""Scores All-in-one (Tab. 2 to 14) on any manifest, and tells what it costs (Tab. 1).

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
import dataclasses
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
from data import (MEDIA, Clips, DataError, Manifest, Tokenizer, collate, duration, load, pad)

# ---- Flags: the fields of a dataclass -----------------------------------------------------------

def add_flags(group, cls: type, only: tuple = (), without: tuple = ()) -> None:
    """One flag for each field of the dataclass `cls`; its help is the field's own comment.

    Flags not given leave no trace. only, without: names of fields.
    """
    source = re.sub(r"\n    #\s+", " ", inspect.getsource(cls))     # a comment's second line
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in without or only and field.name not in only:
            continue
        kind, default = types[field.name], field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        comment = comments.get(field.name, "").replace("%", "%%")
        options = dict(default=argparse.SUPPRESS, help=f"{comment} (default: {shown or 'none'})")
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            options |= dict(nargs="+", metavar="WORD", type=typing.get_args(kind)[0])
        elif words := typing.get_args(kind):
            options |= dict(choices=words)
        else:
            options |= dict(type=kind, metavar=kind.__name__.upper())
        group.add_argument(f"--{field.name}", **options)


def given_flags(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> dict:
    """What the user gave, lists as tuples."""
    given = vars(parser.parse_args(argv))
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


# ---- Processes ----------------------------------------------------------------------------------

@contextlib.contextmanager
def joined_processes():
    """torchrun's job, joined and left; without torchrun a world of one. Yields the device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device(
        "cpu")
    if cuda:
        torch.cuda.set_device(device)
    store, rank, world = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
        # torchrun's store outlives a crash: without a prefix a restarted worker would be led to the
        # addresses that the killed one had left in it
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def in_all_processes(part: list) -> list:
    """The parts of all processes, in the order of ranks, as one list."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return [item for part in parts for item in part]


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


def video_cls(model: AllInOne, batch: dict) -> Tensor:
    """(B, D): the cls token of the video alone."""
    return model.encode_video(batch["video"])[:, 0]


def video_embedding(model: AllInOne, batch: dict) -> Tensor:
    """(B, vtc_dim): the video alone, projected and normalised (Sec. 3.3, VTC)."""
    return F.normalize(model.video_proj(video_cls(model, batch)), dim=-1)


def text_embedding(model: AllInOne, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, vtc_dim): the text alone, projected and normalised (Sec. 3.3, VTC)."""
    return F.normalize(model.text_proj(model.encode_text(ids, mask)[:, 0]), dim=-1)


SCORES = {"choice": score_options, "qa": score_answers, "probe": score_classes}


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
    json: str = ""                   # file for the results, an object a line
    batch: int = 8                   # clips in one pass
    workers: int = 2                 # reading processes on each GPU
    clips: int = 1                   # views of S frames each, averaged; 3: the 3 x 3 of Tab. 2 to 4
    rerank: int = 0                  # retrieval: re-score the best K by the joint pass (VTM)
    together: bool = False           # choice: line n of all manifests right (VCR's Q->AR)
    bootstrap: int = 0               # resamplings for a 95 % interval, say 1000
    shuffle_frames: bool = False     # each clip's frames in random order: what needs order?
    reverse: bool = False            # each clip's frames backwards
    repeat_first: bool = False       # each clip's first frame only, S times
    boxes: bool = True               # VCR: draw the entities' regions (Tab. 5, "Mask")
    squash: bool = False             # frames resized to the square, not cropped: as in training
    columns: tuple[str, ...] = ()    # of a .csv or .tsv: video=NAME text=NAME
    vocab: str = "bert-base-uncased"  # for the authors' .ckpt, which carries no tokenizer
    blind: bool = False              # fill: from the text alone, to see what the video adds
    block: int = 0                   # explain: by this block's attention; 0: word-patch transport
    index: str = ""                  # search: file that keeps the clips' features
    window: float = 0.0              # search: cut what is longer into windows of so many seconds
    top: int = 5                     # search: results for each text
    predictions: str = ""            # per-sample file; none: beside the checkpoint
    seconds: float = 3.0             # profile: time for each measurement

    def clips_of(self, model: AllInOne, tokenizer: Tokenizer, answers=None) -> Clips:
        """The samples of `data` as the model reads them."""
        c = model.config
        return Clips(Manifest(self.data, self.columns), tokenizer, self.task, c.frames,
                     c.image_size, c.max_text_len, train=False, views=self.clips,
                     squash=self.squash, boxes=self.boxes, answers=answers)


def reorder(video: Tensor, config: EvalConfig, index: Tensor) -> Tensor:
    """The frames as --reverse, --repeat_first or --shuffle_frames say: (B, [K,] S, 3, H, W).

    index: (B,), the samples' numbers; a sample is shuffled alike whatever batch it is in.
    """
    if config.reverse:
        return video.flip(-4)
    if config.repeat_first:
        return video.narrow(-4, 0, 1).expand_as(video)
    if config.shuffle_frames:
        S = video.shape[-4]
        orders = [torch.randperm(S, generator=torch.Generator().manual_seed(int(i))) for i in index]
        return torch.stack([clip.index_select(-4, order.to(clip.device))
                            for clip, order in zip(video, orders)])
    return video


def read(model: AllInOne, clips: Clips, config: EvalConfig, device: torch.device,
         unreadable: list, indices=None):
    """Yields (collated items, their tensors by view) of this process's share, each sample once.

    Nothing is padded or dropped whatever the number of processes; `unreadable` gets what failed.
    Passes are of neighbouring samples of one manifest. A model that draws at random (patch_order,
    roll_select) does so by the sample: pass by pass of one, seeded.
    """
    c, manifest, keys = model.config, clips.manifest, []
    by_chance = "random" in (c.patch_order, c.roll_select)
    # VTM's pairs are drawn among 8 neighbours, on any number of processes the same
    size = 1 if by_chance else config.batch
    size = -(-size // 8) * 8 if config.task == "pretrain" else size
    indices = range(len(clips)) if indices is None else indices
    for end, lines in zip(manifest.ends, manifest.sizes):
        mine = [(i, i) for i in indices if end - lines <= i < end]
        keys += [mine[i:i + size] for i in range(0, len(mine), size)]
    keys = keys[dist.get_rank()::dist.get_world_size()]
    for items in load(clips, keys, functools.partial(collate, clips=clips, group=8),
                      config.workers):
        unreadable += items["errors"]
        if not items["where"]:
            continue
        items["video"] = reorder(items["video"], config, items["index"])
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
    unreadable = []
    if config.task == "retrieval":
        predictions = score_retrieval(model, clips, config, device, unreadable)
    else:
        predictions = []
        for items, views in read(model, clips, config, device, unreadable):
            with half_precision(device):
                if config.task == "pretrain":
                    predictions += predict_pretraining(model, items, views)
                    continue
                scores = sum(SCORES[config.task](model, view) for view in views) / len(views)
            check_scores(scores, items["where"])
            predictions += [predict(config.task, items, i, row, answers)
                            for i, row in enumerate(scores.cpu())]
        predictions = sorted(in_all_processes(predictions), key=lambda p: p["index"])
    if config.task == "qa":
        add_majority(predictions)
    if config.together:
        predictions += all_right_together(predictions, clips.manifest)
    unreadable = list(dict.fromkeys(in_all_processes(unreadable)))     # re-ranking reads twice
    return {"samples": len(clips), "unreadable": unreadable, "predictions": predictions}


def predict(task: str, items: dict, i: int, scores: Tensor, answers: list[str] | None) -> dict:
    """What one sample's scores, (O,) or (answers,), say, and the metrics of its task."""
    label = int(items["label"][i])
    about = {"index": int(items["index"][i]), "where": items["where"][i],
             "kind": items["kind"][i] or "all", "label": label}
    if task == "choice":
        scores = scores[:int(items["option_mask"][i].sum())]
        return about | {"scores": scores.tolist(), "metrics": {
            "accuracy %": 100 * top(scores, label, 1), "chance %": 100 / len(scores)}}
    best = scores.topk(min(5, len(scores))).indices.tolist()
    about["answers"] = [answers[a] for a in best]
    if task == "probe":
        return about | {"metrics": {f"top-{k} %": 100 * top(scores, label, k) for k in (1, 5, 10)}}
    right = 100 * top(scores, label, 1)          # an answer that is no class is wrong;
    known = {"in vocabulary %": right} if label >= 0 else {}       # the release leaves it out
    return about | {"metrics": {"accuracy %": right} | known}


def predict_pretraining(model: AllInOne, items: dict, views: list[dict]) -> list[dict]:
    """One prediction for each clip (kind "VTM") and for each masked word ("MLM"): Tab. 6, 9, 10."""
    words, matched, _ = (sum(scores) if torch.is_tensor(scores[0]) else scores
                         for scores in zip(*(score_pretraining(model, view) for view in views)))
    check_scores(matched, items["where"])
    m, found = items["text_ids"].shape[1], []
    for scores, label, i in zip(words.cpu(), items["mlm_labels"].tolist(),
                                (items["mlm_where"] // m).tolist()):
        found += [("MLM", i, scores.float(), label)] if label >= 0 else []
    found += [("VTM", i, scores, int(items["vtm_labels"][i]))
              for i, scores in enumerate(matched.cpu())]
    return [{"index": int(items["index"][i]), "where": items["where"][i], "kind": kind,
             "label": label, "metrics": {"accuracy %": 100 * top(scores, label, 1)}}
            for kind, i, scores, label in found]


def top(scores: Tensor, label: int, k: int) -> float:
    """The chance that `label` is among the best k of scores (O,), ties drawn at random; -1: 0."""
    if label < 0:
        return 0.0
    better, tied = (scores > scores[label]).sum(), (scores == scores[label]).sum()
    return float(((k - better) / tied).clamp(0, 1))


def add_majority(predictions: list[dict]) -> None:
    """Adds to open-ended QA what the commonest answer of each kind would score."""
    for kind in {p["kind"] for p in predictions}:
        same = [p for p in predictions if p["kind"] == kind]
        commonest = Counter(p["label"] for p in same if p["label"] >= 0).most_common(1)
        for p in same:
            p["metrics"]["majority %"] = 100.0 * (p["label"] in dict(commonest))


def all_right_together(predictions: list[dict], manifest: Manifest) -> list[dict]:
    """VCR's Q->AR: line n of every manifest right, as predictions of kind "together"."""
    lines, groups, together = manifest.sizes[0], defaultdict(list), []
    for p in predictions:
        groups[p["index"] % lines].append(p)
    for group in groups.values():
        videos = {manifest[p["index"]]["video"] for p in group}
        if {lines} != set(manifest.sizes) or len(videos) > 1:
            raise ValueError(
                "--together: the manifests differ in length, or "
                f"{' and '.join(p['where'] for p in group)} are about different videos; convert "
                "both (data.py convert vcr_qa, vcr_qar) from the same files")
        if len(group) == len(manifest.sizes):
            together.append({**group[0], "kind": "together", "metrics": {
                name: 100 * math.prod(p["metrics"][name] / 100 for p in group)
                for name in group[0]["metrics"]}})
    return together


# ---- Features that are kept: probes (Tab. 12), search ------------------------------------------

def clip_key(sample: dict) -> str:
    """What tells whether a clip's features still hold: file, size, time and window."""
    try:
        stat = os.stat(sample["video"])
    except OSError:
        return f"{sample['video']} is absent"
    return f"{sample['video']} {stat.st_size} {stat.st_mtime_ns} {sample.get('start')} " \
           f"{sample.get('end')}"


@torch.no_grad()
def kept_features(model: AllInOne, clips: Clips, encode, path: Path, config, device, say):
    """({sample: feature}, unreadable): encode(model, view) of each clip, computed once.

    They are kept in `path` as long as weights and model are the same, and read from there for
    clips that have not changed. Written beside and renamed, in between too: a killed run goes on.
    """
    weights = zlib.crc32(b"".join(p.detach().cpu().numpy().tobytes() for name, p in
                                  model.named_parameters() if not name.startswith("answer_head")))
    c = {k: v for k, v in asdict(model.config).items() if not k.startswith("answer")}
    key, kept = json.dumps([weights, encode.__name__, c, clips.squash]), {}
    try:
        content = read_weights(path) if path.exists() else {}
        if content.get("key") == key:
            kept = dict(zip(content["names"], content["features"]))
    except (ValueError, KeyError) as error:
        say(f"{path}: computed anew ({error})")                # no more than a cache
    names = [clip_key(clips.manifest[i]) for i in range(len(clips))]
    missing = [i for i in range(len(clips)) if names[i] not in kept]
    if not in_all_processes(missing):
        return {i: kept[name] for i, name in enumerate(names)}, []

    def save():
        if dist.get_rank() == 0 and kept:
            beside = path.with_suffix(".partial")
            torch.save({"key": key, "names": list(kept),
                        "features": torch.stack(list(kept.values()))}, beside)
            beside.replace(path)

    new, unreadable, since = [], [], time.monotonic()
    reading = EvalConfig(task=clips.task, batch=config.batch or 16, workers=config.workers)
    for items, (view, *_) in read(model.to(device).eval(), clips, reading, device, unreadable,
                                  missing):
        with half_precision(device):
            found = list(zip(items["index"].tolist(), encode(model, view).float().cpu()))
        new += found
        say(f"\rfeatures of {len(new)} clips on each process", end="")
        if dist.get_world_size() == 1:
            kept |= {names[i]: feature for i, feature in found}
            if time.monotonic() - since > 60:
                save()
                since = time.monotonic()
    kept |= {names[i]: feature for i, feature in in_all_processes(new)}
    unreadable = in_all_processes(unreadable)
    say(f"\rfeatures of {len(missing) - len(unreadable)} clips; unreadable: {len(unreadable)}")
    save()
    return {i: kept[name] for i, name in enumerate(names) if name in kept}, unreadable


def cls_features(model: AllInOne, clips: Clips, path: Path, config, device, say):
    """(what a probe trains on, what could not be read): a list of {feature, label, where, set}.

    DataError if more than 1 clip in 10 cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    config = replace(config, batch=config.batch_per_gpu)
    features, unreadable = kept_features(model, clips, video_cls, path, config, device, say)
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


@dataclass
class Side:
    """One side of retrieval: as queries or as the gallery."""
    names: list                   # file:line of each clip, file:line#k of its k-th caption
    clip: Tensor                  # (G,) which clip each is or belongs to
    features: Tensor              # (G, E), normalised
    joint: tuple | None = None    # what is re-ranked: (query, candidate, score), each (P,)

    def blocks(self, gallery: Side) -> list[slice]:
        """The queries in parts whose scores fit into memory."""
        size = max(1, BLOCK ** 2 // len(gallery.names))
        return [slice(begin, begin + size) for begin in range(0, len(self.names), size)]

    def scores(self, rows: slice, gallery: Side) -> Tensor:
        """(rows, gallery): cosines, products in float64 and rounded, so that ties stay ties in
        blocks of any size; of re-ranked pairs the joint score, above every cosine."""
        queries = self.features[rows].double()
        scores = torch.cat([(queries @ part.double().T).float()
                            for part in gallery.features.split(BLOCK)], 1)
        if self.joint:
            query, candidate, score = self.joint
            here = (query >= rows.start) & (query < rows.stop)
            scores = scores.double()                       # float32 would lose digits of the joint
            scores[query[here] - rows.start, candidate[here]] = score[here]
        return scores


def both_ways(texts: Side, videos: Side) -> list[tuple[str, Side, Side]]:
    """(direction, queries, gallery) of both."""
    return [("text to video", texts, videos), ("video to text", videos, texts)]


def score_retrieval(model: AllInOne, clips: Clips, config: EvalConfig, device: torch.device,
                    unreadable: list) -> list[dict]:
    """Each clip and each caption encoded once, alone; cosines; --rerank by the joint pass.

    Returns one prediction for each caption (kind "text to video") and each clip ("video to text").
    """
    rows = []                                            # of (index, where, video, texts, ids)
    for items, views in read(model, clips, config, device, unreadable):
        with half_precision(device):
            video = sum(video_embedding(model, view) for view in views) / len(views)    # (B, E)
            text = text_embedding(model, views[0]["text_ids"], views[0]["text_mask"])   # (T, E)
        check_scores(video, items["where"])
        ids = [tuple(row[mask].tolist()) for row, mask in zip(items["text_ids"],
                                                              items["text_mask"])]
        for i, index in enumerate(items["index"].tolist()):
            own = (items["text_clip"] == i).nonzero()[:, 0].tolist()
            rows.append((index, items["where"][i], video[i].cpu(), text[own].cpu(),
                         [ids[t] for t in own]))
    rows = sorted(in_all_processes(rows), key=lambda row: row[0])
    if not rows:
        return []
    ids = [words for row in rows for words in row[4]]
    first = {}
    once = [first.setdefault(words, t) for t, words in enumerate(ids)]   # equal words tie exactly
    videos = Side([row[1] for row in rows], torch.arange(len(rows)),
                  torch.stack([row[2] for row in rows]))
    texts = Side([f"{row[1]}#{k}" for row in rows for k in range(len(row[4]))],
                 torch.tensor([v for v, row in enumerate(rows) for _ in row[4]]),
                 torch.cat([row[3] for row in rows])[once])
    if config.rerank:
        rerank(model, clips, config, device, unreadable, rows, torch.tensor(once), texts, videos)
    predictions = []
    for kind, asked, gallery in both_ways(texts, videos):
        mine = []
        for part in asked.blocks(gallery)[dist.get_rank()::dist.get_world_size()]:
            scores = asked.scores(part, gallery)                         # (block, G)
            found = places(scores, asked.clip[part, None] == gallery.clip)
            for q, best, above, wrong, true in zip(
                    range(part.start, part.stop), scores.argmax(1).tolist(),
                    *(n.tolist() for n in found)):
                recalls = {f"R@{k} %": 100 * recall(k, above, wrong, true) for k in (1, 5, 10)}
                mine.append((q, {
                    "where": asked.names[q], "kind": kind, "best": gallery.names[best],
                    "metrics": recalls | {"rank": above + (wrong + true + 1) / (true + 1)}}))
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
           unreadable: list, rows: list, once: Tensor, texts: Side, videos: Side) -> None:
    """Sets `joint` of both sides: VTM's matched logit of the best config.rerank of each query.

    once: for each caption the first one of the same words, which alone is scored. Whoever is not
    among the best keeps its cosine; whoever ties with the last of the best is among them.
    """
    N, ids, pairs = len(rows), [words for row in rows for words in row[4]], []
    for _, asked, gallery in both_ways(texts, videos):
        chosen = []
        for part in asked.blocks(gallery):
            scores = asked.scores(part, gallery)
            last = scores.topk(min(config.rerank, scores.shape[1]), 1).values[:, -1:]
            chosen.append((scores >= last).nonzero() + torch.tensor([part.start, 0]))
        pairs.append(torch.cat(chosen))
    numbers = [once[pair[:, side]] * N + pair[:, 1 - side] for side, pair in enumerate(pairs)]
    wanted = torch.cat(numbers).unique()                       # caption * N + clip, in order
    place, found = {row[0]: v for v, row in enumerate(rows)}, []
    for items, views in read(model, clips, config, device, unreadable):
        for b, index in enumerate(items["index"].tolist()):
            captions = wanted[wanted % N == place[index]] // N
            for part in captions.split(8 * config.batch):
                lengths = torch.tensor([len(ids[t]) for t in part])
                words = pad([list(ids[t]) for t in part], int(lengths.max()), 0).to(device)
                mask = (torch.arange(words.shape[1]) < lengths[:, None]).to(device)
                logits = torch.zeros(len(part))
                for view in views:
                    with half_precision(device):
                        video = model.embed_video(view["video"][b:b + 1])
                        pooled = model.fuse(video.expand(len(part), -1, -1, -1),
                                            model.embed_text(words), mask).pooled
                    logits += model.vtm_head(pooled)[:, 1].cpu() / len(views)
                check_scores(logits, [items["where"][b]] * len(part))
                found.append((part * N + place[index], logits.double()))
    scored, logits = (torch.cat(side) for side in zip(*in_all_processes(found)))
    order = scored.argsort()
    scored, logits = scored[order], logits[order] - logits.min() + 2
    for side, pair, number in zip((texts, videos), pairs, numbers):
        at = torch.searchsorted(scored, number).clamp(max=len(scored) - 1)
        there = scored[at] == number                           # but for clips unreadable this time
        side.joint = (*pair[there].unbind(1), logits[at[there]])


# ---- On any video: fill, match, ask, explain, attention, search (Sec. 4.6, Fig. 4, 6, 11) --------

def fill(model: AllInOne, clips: Clips, clip: dict, config: EvalConfig) -> dict:
    """The five likeliest words of each [MASK], by the video and the text or --blind, the text."""
    ids, mask = clip["text_ids"], clip["text_mask"]
    text = (model.encode_text(ids, mask) if config.blind
            else model(clip["video"], ids, mask).text)
    chances = model.mlm_head(text[ids == clips.tokenizer.mask_id]).float().softmax(-1)
    return {"masks": [[[clips.tokenizer.words.id_to_token(i), round(p, 4)] for p, i in zip(
        *(x.tolist() for x in row.topk(5)))] for row in chances]}


def match(model: AllInOne, clips: Clips, clip: dict, config: EvalConfig) -> dict:
    """Each --text, its probability among them (Sec. 4.2.3) and that of matching, alone."""
    B = len(config.text)
    pooled = model(clip["video"].expand(B, -1, -1, -1, -1), clip["text_ids"],
                   clip["text_mask"]).pooled
    logits = model.vtm_head(pooled)                                                    # (B, 2)
    among, alone = logits[:, 1].softmax(0), logits.softmax(1)[:, 1]
    return {"captions": [[text, round(p, 4), round(q, 4)] for text, p, q in zip(
        config.text, among.tolist(), alone.tolist())]}


def ask(model: AllInOne, clips: Clips, clip: dict, config: EvalConfig) -> dict:
    """The five likeliest answers of an open-ended QA checkpoint (Sec. 4.2.1)."""
    best = score_answers(model, clip)[0].softmax(0).topk(min(5, len(clips.answers)))
    return {"answers": [[clips.answers[a], round(p, 4)] for p, a in zip(
        *(x.tolist() for x in best))]}


def origins(model: AllInOne, S: int, blocks: int) -> Tensor:
    """(S, n): the frame whose patch stands in each slot of each frame, after rolling so often."""
    c, first = model.config, 1 if model.config.roll == "release" else model.specials
    frames = torch.arange(S)[:, None, None].expand(-1, first + c.patches, 1)
    for d in range(c.roll_start, blocks + 1):
        if c.temporal == "token_rolling" and S > 1:
            frames = token_rolling(frames, S, c.roll_ratio, first=first, roll=c.roll,
                                   select=c.roll_select, layer=d)
    return frames[:, first:, 0]


def block_attention(model: AllInOne, clip: dict) -> list[Tensor]:
    """What each token spends on each, by block: L tensors (S, m+1+n, m+1+n)."""
    kept = []
    hooks = [block.attn.register_forward_hook(
        lambda attn, args, out: kept.append(attn.weights(*args))) for block in model.blocks]
    model(clip["video"], clip["text_ids"], clip["text_mask"])
    for hook in hooks:
        hook.remove()
    return kept


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
    m, first = ids.shape[1], model.specials
    if config.block:
        maps = block_attention(model, clip)[config.block - 1][:, :m, m + first:].transpose(0, 1)
    else:
        features = model(clip["video"], ids, clip["text_mask"])
        patches = features.frames[:, :, first:].flatten(1, 2)                          # (1, S*n, D)
        _, plan = word_patch_transport(features.text, patches, clip["text_mask"])
        maps = plan[0].unflatten(1, (S, -1))                                           # (m, S, n)
    source = origins(model, S, config.block or c.depth).to(maps.device)
    maps = torch.zeros_like(maps).scatter_add_(1, source.expand(m, -1, -1), maps)
    words = [clips.tokenizer.words.id_to_token(i) for i in ids[0].tolist()]
    inside = slice(1, int(clip["text_mask"].sum()) - 1)                       # no [CLS], no [SEP]
    maps = maps[inside] / maps[inside].sum((1, 2), keepdim=True)
    side = c.image_size // c.patch_size
    return {"words": words[inside], "maps": maps.unflatten(2, (side, side)).tolist()}


def attention(model: AllInOne, clips: Clips, clip: dict, config: EvalConfig) -> dict:
    """What a text token spends, by block (Fig. 4): shares on text, video cls, its own frame's
    patches and rolled ones, which sum to 1; and "per_patch", a rolled patch's share by another's.
    """
    S, m, blocks = clip["video"].shape[1], int(clip["text_mask"].sum()), []
    width = clip["text_ids"].shape[1]
    for d, weights in enumerate(block_attention(model, clip), start=1):
        spent = weights[:, :m].mean(1)                                                 # (S, T)
        rolled = origins(model, S, d).to(spent.device) != torch.arange(
            S, device=spent.device)[:, None]                                           # (S, n)
        patches = spent[:, width + model.specials:]
        shares = [spent[:, :width].sum(1), spent[:, width:width + model.specials].sum(1),
                  (patches * ~rolled).sum(1), (patches * rolled).sum(1)]
        text, cls, own, other = (float(share.mean()) for share in shares)
        ratio = other / own * float((~rolled).sum() / rolled.sum()) if rolled.any() else 0.0
        blocks.append({"block": d, "text": text, "cls": cls, "own": own, "rolled": other,
                       "per_patch": ratio})
    return {"blocks": blocks}


USES = {"fill": fill, "match": match, "ask": ask, "explain": explain, "attention": attention}


def video_manifest(config: EvalConfig, **fields) -> str:
    """A manifest of --video: files, folders (walked) and manifests, `fields` added to each line.

    What is longer than --window seconds is cut into such windows.
    """
    lines = []
    for path in map(Path, config.video):
        if path.suffix in (".jsonl", ".csv", ".tsv"):
            manifest = Manifest(path, config.columns)
            samples = [manifest[i] for i in range(len(manifest))]
        else:
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            samples = [{"video": str(file.absolute())} for file in files
                       if file == path or file.suffix.lower() in MEDIA]
        for sample in samples:
            length = duration(sample["video"]) if config.window else 0.0
            starts = [k * config.window for k in range(math.ceil(length / (config.window or 1)))]
            for start in starts if length > config.window else [None]:
                times = {} if start is None else {"start": start, "end": start + config.window}
                lines.append({key: sample[key] for key in ("video", "start", "end", "fps")
                              if key in sample} | times | fields)
    if not lines:
        raise DataError(f"--video {' '.join(config.video)}: no clip there; expected files, folders "
                        "or manifests")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path = Path(tempfile.gettempdir(), f"allinone-{zlib.crc32(text.encode()):08x}.jsonl")
    path.write_text(text)
    return str(path)


def place_of(sample: dict) -> str:
    """A clip as a person names it: its path, and its window."""
    return sample["video"] + ("" if sample.get("start") is None else
                              f" {sample['start']:g}-{sample['end']:g} s")


@torch.no_grad()
def use(model: AllInOne, tokenizer: Tokenizer, config: EvalConfig, answers, device,
        say) -> list[dict]:
    """--task fill, match, ask, explain or attention on every clip of --video, one by one.

    Prints and returns the results; --json FILE writes them as lines, --out DIR a picture of each.
    """
    model, results, unreadable = model.to(device).eval(), [], []
    fields = {"question": config.text[0]} if config.task == "ask" else {"texts": list(config.text)}
    reading = replace(config, task="qa" if config.task == "ask" else "retrieval", batch=1, clips=1,
                      data=(video_manifest(config, **fields),))
    clips = reading.clips_of(model, tokenizer, answers)
    for items, (clip,) in read(model, clips, reading, device, unreadable):
        found = USES[config.task](model, clips, clip, config)
        results.append({"video": place_of(clips.manifest[int(items["index"][0])]), **found})
        if config.task == "explain":
            rows = [(word, heated(items["video"][0], torch.tensor(heat)))
                    for word, heat in zip(found["words"], found["maps"])]
            shown = {"video": results[-1]["video"], "words": found["words"]}
        else:
            shown, rows = results[-1], [(json.dumps(found)[:80], list(items["video"][0]))]
        if config.task != "attention":
            say(json.dumps(shown, ensure_ascii=False))
        if config.out:
            beside = Path(config.out) / f"{config.task}-{len(results)}.json"
            save_picture(beside.with_suffix(".png"), rows)
            beside.write_text(json.dumps(results[-1]))           # the numbers of the picture
    if config.task == "attention" and results:
        names, lines = ("text", "cls", "own", "rolled", "per_patch"), []
        for d, rows in enumerate(zip(*(r["blocks"] for r in results)), start=1):
            lines.append({"step": d} | {name: sum(r[name] for r in rows) / len(rows)
                                        for name in names})
            say(f"block {d}: " + ", ".join(f"{name} {lines[-1][name]:.3f}" for name in names))
        if config.out:
            save_curves(Path(config.out) / "attention.png", lines, names[:4])
    for line in unreadable:
        say(f"left out: {line}")
    return results


@torch.no_grad()
def search(model: AllInOne, tokenizer: Tokenizer, config: EvalConfig, answers, device,
           say) -> list[dict]:
    """--task search: the clips of --video that are likest to each --text, by cosine (Sec. 3.3 VTC),
    the best --rerank of them by VTM. --index FILE keeps the clips' features."""
    model, results = model.to(device).eval(), []
    reading = replace(config, task="probe", clips=1, data=(video_manifest(config),))
    clips = reading.clips_of(model, tokenizer, [])
    path = Path(config.index or Path(tempfile.mkdtemp()) / "index.pt")
    features, unreadable = kept_features(model, clips, video_embedding, path, reading, device, say)
    if not features:
        raise DataError(f"no clip can be read: {'; '.join(unreadable[:3])}")
    gallery = torch.stack(list(features.values())).to(device)                          # (G, E)
    numbers = list(features)
    for text in config.text:
        ids = torch.tensor([tokenizer.encode(text, model.config.max_text_len)], device=device)
        (scores,), (best,) = nearest(text_embedding(model, ids), gallery,
                                     max(config.rerank, config.top))
        found = [{"text": text, "video": place_of(clips.manifest[numbers[g]]),
                  "cosine": round(s, 4), "number": numbers[g]}
                 for s, g in zip(scores.tolist(), best.tolist())]
        for one in found:
            keys = [[(one["number"], one["number"])]]
            (items,) = load(clips, keys, functools.partial(collate, clips=clips), 0) if (
                config.rerank or config.out) else ({},)
            if config.rerank:
                pooled = model(items["video"].to(device), ids).pooled
                one["matched"] = round(float(model.vtm_head(pooled).softmax(1)[0, 1]), 4)
            one["frames"] = list(items["video"][0]) if "video" in items else []
        found.sort(key=lambda one: -one.get("matched", one["cosine"]))
        if config.out:
            save_picture(Path(config.out) / f"search-{len(results) + 1}.png", [
                (f"{one['cosine']:.2f} {one['video']}", one["frames"]) for one in found])
        for one in found[:config.top]:
            del one["frames"], one["number"]
            say(json.dumps(one, ensure_ascii=False))
            results.append(one)
    for line in unreadable:
        say(f"left out: {line}")
    return results


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


def scale(config: EvalConfig, device: torch.device) -> None:
    """`--task scale`: Tab. 14 on made-up features of 512 numbers, in float16 on disk."""
    block = torch.empty(2 ** 27)
    begin = time.perf_counter()
    block.sum()
    bandwidth = block.nbytes / (time.perf_counter() - begin)
    speed = measure_throughput(Config(), device, 1, config.seconds)
    print("clips      index MB  ms a query  of it reading  queries/s in 64  joint passes instead")
    for size in (10_000, 100_000, 1_000_000):
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            shape = (size, Config.vtc_dim)
            gallery = np.lib.format.open_memmap(file.name, "w+", np.float16, shape)
            for part in np.array_split(gallery, 10):
                part[:] = np.random.default_rng(0).standard_normal(part.shape, np.float32)
            queries, spent = torch.randn(64, shape[1]), []
            for batch in (queries[:1], queries[:1], queries):              # the first warms up
                begin = time.perf_counter()
                nearest(batch, torch.from_numpy(gallery), 10)
                spent.append(time.perf_counter() - begin)
            print(f"{size:<9}  {gallery.nbytes / 1e6:8.0f}  {1000 * spent[1]:10.1f}  "
                  f"{gallery.nbytes / bandwidth / spent[1]:13.0%}  {64 / spent[2]:15.0f}  "
                  f"{size / speed / 3600:17.1f} h")


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
    draw = ImageDraw.Draw(sheet)
    for i, (text, frames) in enumerate(rows):
        draw.text((2, i * (side + 16) + 2), text, "black")
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

ABLATIONS = [  # zero-shot, All-in-one-B, Tab. 6 and 8 to 11: on LSMDC, on MSR-VTT
    "Tab. 6, 200K: scratch 51.4, ImageNet 52.2, 21K 52.5, 800K: scratch 55.5, 21K 55.7; Tab. 8a: "
    "single frame 32.78, time average 35.16, 3 frames 47.33, channel shift 48.24, flatten 51.40, "
    "rolling 52.75; Tab. 8b, ratio 0 47.21, 0.1 48.52, 0.25 52.90, 0.5 50.47, 0.75 44.55; Tab. 9: "
    "timesformer 53.2, decoupled 52.1, rolling 55.7; Tab. 10: none 53.2, SPE 54.5, both 55.7; Tab. "
    "11a, from 1 56.15, 3 55.34, 6 54.40; Tab. 11b: random 54.88, varying 50.83, block 55.81",
    "Tab. 8a: single frame 67.22, time average 68.25, 3 frames 72.82, channel shift 73.16, flatten "
    "73.28, rolling 75.42; Tab. 8b, ratio 0 72.80, 0.1 73.59, 0.25 76.44, 0.5 74.89, 0.75 69.45; "
    "Tab. 9: timesformer 75.4, decoupled 74.5, rolling 77.3; Tab. 10: none 74.4, SPE 76.1, both "
    "78.2; Tab. 11a, from 1 76.16, 3 75.16, 6 73.31; Tab. 11b: random 75.03, varying 72.23, block "
    "76.37"]
PAPER = {  # by the name that data.py convert gives a data set; R@1/5/10 where it is retrieval
    "tgif_action": "Tab. 2a: Ti 80.6, S 91.2, B 92.7 (1 frame 92.9, 384 px 94.7), B* 95.5",
    "tgif_transition": "Tab. 2a: Ti 83.5, S 92.7, B 94.3 (1 frame 94.2, 384 px 95.1), B* 94.7",
    "tgif_frameqa": "Tab. 2a: Ti 53.9, S 64.0, B 64.2 (1 frame 62.5, 384 px 65.4), B* 66.3",
    "msrvtt_qa": "Tab. 2b: S 39.5, B 42.9 (3 x 3 44.3), B* 46.8",
    "msvd_qa": "Tab. 2c: S 41.7, B 46.5 (3 x 3 47.9), B* 48.3",
    "msrvtt_9k": "Tab. 3a, 7, text to video: B 37.1/66.7/75.9 (3 x 3 37.9/68.1/77.1, VTC only "
                 "36.7/62.6/72.2, VTM only 33.3/67.0/76.9, HowTo100M only 29.5/63.3/71.9); video "
                 "to text: B 37.5/66.1/77.4 (VTC only 36.4/62.9/71.9, VTM only 34.4/66.3/76.6)",
    "msrvtt_7k": "Tab. 3a: B 33.8/64.2/74.3 (3 x 3 34.4/65.4/75.8, HowTo100M only 26.5/59.4/69.8)",
    "activitynet": "Tab. 3b: B 21.5/50.3/65.5, median rank 6 (3 x 3 22.4/53.7/67.7, 5)",
    "didemo": "Tab. 3c, 7, text to video: B 31.2/60.5/72.1, median rank 3 (59.5 for 60.5 in Tab. "
              "7; 3 x 3 32.7/61.4/73.5, VTC only 29.6/47.3/56.67, VTM only 30.2/57.5/68.7); video "
              "to text: B 30.4/58.3/69.4 (VTC only 29.6/48.0/57.2, VTM only 27.7/59.6/69.5)",
    "msrvtt_mc": "Tab. 4a: B 91.4 (3 x 3 92.0), B* 92.3; zero-shot: B 80.3; " + ABLATIONS[1],
    "lsmdc_mc": "Tab. 4b: B 83.1 (3 x 3 83.5), B* 84.4; zero-shot: B 56.3; " + ABLATIONS[0],
    "vcr_qa": "Tab. 5: B 60.5 (CC3M + COCO), 68.4 (HowTo100M), 65.2 (HowTo100M, no regions drawn)",
    "kinetics400": "Tab. 12, top-1/5/10: B 50.8/79.8/90.7 (8 frames 53.4/83.2/92.6, time average "
                   "44.3/75.2/87.3)",
    "hmdb51": "Tab. 12, top-1/5/10: B 52.9/84.1/93.4 (8 frames 55.7/88.2/95.2, time average "
              "43.1/75.5/90.5)",
    "ego4d_mc": "Tab. 13: B 65.89, zero-shot 36.52 (time average 59.44, zero-shot 27.34)",
    "webvid": "Tab. 6, VTM / MLM accuracy: B 90.4 / 60.5 after 200K steps from ImageNet-21K (from "
              "ImageNet 90.5 / 60.3, from scratch 89.8 / 58.7; 800K steps 92.1 / 62.2, from "
              "scratch 91.5 / 62.3)",
}


def summarise(predictions: list[dict]) -> dict[str, dict[str, Tensor]]:
    """{kind: {column: the value of each sample}}; a rank gives two columns, median and mean."""
    kinds = {}
    for p in predictions:
        columns = kinds.setdefault(p["kind"], {})
        for name, value in p["metrics"].items():
            for column in (("median rank", "mean rank") if name == "rank" else (name,)):
                columns.setdefault(column, []).append(value)
    return {kind: {name: torch.tensor(values, dtype=torch.float64)
                   for name, values in columns.items()} for kind, columns in kinds.items()}


def average(name: str, values: Tensor) -> Tensor:
    """The mean of a column over its last dimension; of a median rank, the median."""
    return values.quantile(0.5, -1) if name == "median rank" else values.mean(-1)


def interval(name: str, values: Tensor, resamplings: int) -> tuple[float, float]:
    """95 % of a column's average over resampled samples, always the same ones (bootstrap)."""
    draw = torch.Generator().manual_seed(0)
    averages = torch.stack([
        average(name, values[torch.randint(len(values), (len(values),), generator=draw)])
        for _ in range(resamplings)])
    low, high = averages.quantile(torch.tensor([0.025, 0.975], dtype=averages.dtype)).tolist()
    return low, high


def report(result: dict, config: EvalConfig, model: Config, say=print) -> dict[str, float]:
    """Prints the protocol, a table by kind and the paper's row; returns {kind: first column}.

    A score that lacks samples is called incomplete, and the unreadable ones are named.
    """
    paths = [Path(path) for path in config.data]
    orders = [name for name in ("shuffle_frames", "reverse", "repeat_first")
              if getattr(config, name)]
    frames = f"{model.frames} frames" + (f" x {config.clips} views" if config.clips > 1 else "")
    say(f"\n{config.task} on {', '.join(map(str, paths))}; split: "
        f"{', '.join(path.stem for path in paths)}; {frames}"
        + (f"; VTM ranks the best {config.rerank}" if config.rerank else "")
        + "".join(f"; FRAMES CHANGED: {name}" for name in orders))
    kinds, first = summarise(result["predictions"]), {}
    header = list(dict.fromkeys(name for columns in kinds.values() for name in columns))
    wide = 28 if config.bootstrap else 12
    say(f"{'kind':<16}" + "".join(f"{name:>{max(wide, len(name) + 2)}}" for name in header)
        + f"{'samples':>9}")
    for kind, columns in kinds.items():
        cells = []
        for name in header:
            cell = "-"
            if name in columns:
                cell = f"{float(average(name, columns[name])):.1f}"
                if config.bootstrap:
                    low, high = interval(name, columns[name], config.bootstrap)
                    cell += f" [{low:.1f}, {high:.1f}]"
            cells.append(f"{cell:>{max(wide, len(name) + 2)}}")
        say(f"{kind:<16}" + "".join(cells) + f"{len(columns[header[0]]):>9}")
        first[kind] = float(average(header[0], columns[header[0]]))
    if result["unreadable"]:
        say(f"INCOMPLETE: {len(result['unreadable'])} of {result['samples']} samples unreadable:")
        for line in result["unreadable"]:
            say(f"  {line}")
    if numbers := PAPER.get(paths[0].parent.name):
        say(f"paper, {numbers}")
    return first


def write_predictions(path: Path, predictions: list[dict]) -> None:
    """One JSON object a sample, for error analysis; written beside and renamed."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text("".join(json.dumps(p) + "\n" for p in predictions))
    beside.replace(path)


# ---- What it costs (Tab. 1, Fig. 1c, Fig. 3) -----------------------------------------------------

def count_parameters(model: AllInOne, heads: bool = True) -> int:
    """Parameters, with all objective heads or, as Tab. 1 counts, without MLM's and VTC's."""
    left_out = () if heads else ("mlm_head.", "text_proj.", "video_proj.")
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(left_out))


def count_macs(config: Config) -> dict[str, float]:
    """Multiply-adds of one clip, by torch's FlopCounterMode on shapes alone (no weights, no data).

    Returns {"joint", "video", "text", "attention"}: the three passes at full text length, and the
    part of the joint pass in products of queries, keys and values (what Sec. 3.2 compares).
    """
    with torch.device("meta"):
        model = AllInOne(config).eval()
        size = config.image_size
        video = torch.zeros(1, config.frames, 3, size, size, dtype=torch.uint8)
        ids = torch.zeros(1, config.max_text_len, dtype=torch.int64)
    passes = {"joint": lambda: model(video, ids), "video": lambda: model.encode_video(video),
              "text": lambda: model.encode_text(ids)}
    macs = {}
    for name, run in passes.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        macs[name] = counter.get_total_flops() / 2
        if name == "joint":
            by_kind = counter.get_flop_counts()["Global"]
            macs["attention"] = sum(flops for kind, flops in by_kind.items()
                                    if "bmm" in str(kind) or "attention" in str(kind)) / 2
    return macs


@torch.no_grad()
def measure_throughput(config: Config, device: torch.device, batch: int, seconds: float) -> float:
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


TABLE_1 = {"Ti": (12, 745), "S": (33, 285), "B": (110, 89),    # M parameters, videos/s (Tab. 1)
           "B timesformer": (180.5, "-"), "B decoupled": (192, "-")}                    # (Tab. 9)


def profile(config: dict, device: torch.device, batch: int, seconds: float) -> None:
    """`--task profile`: what each variant costs, beside Tab. 1; then B's rows of Tab. 8a and 9."""
    base = Config(**config)
    print(f"Multiply-adds (the paper's FLOPs) of one clip, {base.frames} frames of "
          f"{base.image_size} px, {base.max_text_len} tokens of text;\nparameters without the MLM "
          f"and VTC heads, as Tab. 1; joint pass in batches of {batch} on {device.type}, "
          f"{torch.get_num_threads()} threads.\n")
    columns = ("params M", "all heads", "joint G", "attention G", "video G", "text G", "clips/s",
               "paper M", "paper clips/s")
    print(" " * 16 + "".join(f"{name:>{len(name) + 2}}" for name in columns))
    rows = VARIANTS | {f"B {name}": VARIANTS["B"] | {"temporal": name}
                       for name in typing.get_args(Temporal)[1:]}
    for name, sizes in rows.items():
        c = Config(**{**config, **sizes})
        with torch.device("meta"):
            model = AllInOne(c)
        speed = measure_throughput(c, device, batch, seconds) if seconds else float("nan")
        macs = count_macs(c)
        cells = [count_parameters(model, heads=False) / 1e6, count_parameters(model) / 1e6,
                 *(macs[kind] / 1e9 for kind in ("joint", "attention", "video", "text")), speed,
                 *TABLE_1.get(name, ("-", "-"))]
        print(f"{name:<16}" + "".join(
            f"{cell if isinstance(cell, (str, int)) else format(cell, '.1f'):>{len(column) + 2}}"
            for cell, column in zip(cells, columns)))


# ---- Command line -------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Score All-in-one, use it on any video, or tell what it costs.",
        usage="python eval.py --task TASK [--FLAG VALUE ...]", allow_abbrev=False)
    add_flags(parser.add_argument_group("what to score"), EvalConfig)
    add_flags(parser.add_argument_group("model, over the checkpoint's"), Config)
    given = given_flags(parser, argv)
    fields = {field.name for field in dataclasses.fields(EvalConfig)}
    config = EvalConfig(**{k: v for k, v in given.items() if k in fields})
    sizes = {k: v for k, v in given.items() if k not in fields}
    if config.task == "profile":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return profile(sizes, device, config.batch, config.seconds)
    if config.task == "scale":
        return scale(config, torch.device("cpu"))
    changes = [name for name in ("shuffle_frames", "reverse", "repeat_first")
               if getattr(config, name)]
    using = config.task in (*USES, "search")
    for wrong, message in (
            (not config.data and not using, f"--task {config.task} needs --data MANIFEST"),
            (not config.video and using, f"--task {config.task} needs --video FILE or FOLDER"),
            (using and config.task != "attention" and not any(config.text),
             f"--task {config.task} needs --text WORDS"),
            (len(config.text) > 1 and config.task not in ("match", "search"),
             "several --text are for --task match and search"),
            (min(config.batch, config.clips) < 1, "--batch and --clips must be 1 or more"),
            (len(changes) > 1, f"--{' and --'.join(changes)}: one at a time"),
            (config.rerank and config.task not in ("retrieval", "search"),
             "--rerank is for --task retrieval and search")):
        if wrong:
            parser.error(message)
    with joined_processes() as device:
        say = print if dist.get_rank() == 0 else lambda *_, **__: None
        if not Path(config.checkpoint).exists():
            raise ValueError(f"{config.checkpoint}: no such file; give --checkpoint, or make the "
                             "proof run's in four minutes: python train.py --task pretrain")
        content = read_weights(config.checkpoint)
        model, tokenizer, answers = checkpoint_model(content, config.checkpoint, config.vocab, say,
                                                     **sizes)
        trained = content.get("config", {})
        config = replace(config, squash=config.squash or trained.get("squash", False))
        needed = {"qa": "qa", "ask": "qa", "probe": "probe"}.get(config.task, trained.get("task"))
        if trained.get("task") != needed:
            raise ValueError(
                f"{config.checkpoint} was trained for {trained.get('task', 'another task')}: "
                f"fine-tune it with train.py --task {needed} --init {config.checkpoint}")
        # of the authors' files those that were fine-tuned for retrieval have projections
        vtc = "vtc" in trained.get("objectives", ()) or any(
            "txt_proj" in name for name in content.get("state_dict", ()))
        by_vtm = config.task == "retrieval" and config.rerank
        if config.task in ("retrieval", "search") and not vtc and not by_vtm:
            raise ValueError(f"{config.checkpoint} was not trained with VTC, its cosines mean "
                             "nothing: fine-tune it (train.py --task retrieval), or score a "
                             "manifest with --task retrieval --rerank CANDIDATES by VTM")
        if not 0 <= config.block <= model.config.depth:
            raise ValueError(f"--block {config.block}: the model has blocks 1 to "
                             f"{model.config.depth}")
        for name in filter(None, (config.json, config.index)):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
        if using:
            found = (search if config.task == "search" else use)(model, tokenizer, config, answers,
                                                                 device, say)
            if config.json:
                Path(config.json).write_text("".join(json.dumps(one) + "\n" for one in found))
            return
        result = evaluate(model, tokenizer, config, device, answers)
        report(result, config, model.config, say)
        if dist.get_rank() == 0:
            data = Path(config.data[0])
            how = [config.task, data.parent.name, data.stem, *changes]
            how += [f"{name}{value}" for name, value, plain in (
                ("clips", config.clips, 1), ("rerank", config.rerank, 0)) if value != plain]
            path = Path(config.predictions or
                        Path(config.checkpoint).parent / f"{'-'.join(how)}.predictions.jsonl")
            write_predictions(path, result["predictions"])
            say(f"per-sample predictions: {path}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
