"""Scores All-in-one (Tab. 2 to 14) on any manifest, uses it on any video, tells what it costs.

    python eval.py --task choice --data MANIFEST --checkpoint runs/pretrain/checkpoint.pt
    torchrun --nproc_per_node=8 eval.py --task retrieval --data MANIFEST --checkpoint FILE
    python eval.py --task profile

A checkpoint is train.py's or the authors' .ckpt. On any number of processes each sample is scored
once; unreadable clips are never replaced but named, and a score that lacks samples says so.
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
import timeit
import typing
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from allinone import (VARIANTS, AllInOne, Config, Temporal, load_release, load_weights,
                      read_weights, token_rolling, word_patch_transport)
from data import (MEDIA, Clips, DataError, Manifest, Tokenizer, collate, duration, is_image, load,
                  replacing, temporary_manifest)

# ---- Flags: the fields of a dataclass -----------------------------------------------------------

def add_flags(group, cls: type) -> None:
    """One flag for each field of the dataclass `cls`, its help the field's own comment, but for
    what the data decide. Flags not given leave no trace."""
    source = re.sub(r"\n    #\s+", " ", inspect.getsource(cls))     # a comment's second line
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    for name, kind in typing.get_type_hints(cls).items():
        if name in ("vocab_size", "answers"):
            continue
        default = getattr(cls, name)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
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
        # torchrun's store outlives a crash, with the addresses that a killed worker left in it
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


def say(*words, **how) -> None:
    """Prints, on the first process alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*words, **how, flush=True)


# ---- Checkpoints --------------------------------------------------------------------------------

def checkpoint_model(content: dict, path, vocab: str = "bert-base-uncased",
                     answers: list[str] | None = None, **overrides):
    """(model, tokenizer, answers) of what read_weights(path) gave, else ValueError.
    vocab: for the authors' file, which carries no tokenizer. answers: what is to be learnt; a head
    for others is not taken over. overrides: fields of Config, e.g. frames=8 for Tab. 12."""
    answers = content.get("answers") if answers is None else answers
    overrides["answers"] = len(answers or [])
    if "sizes" in content:
        sizes, weights = content["sizes"], content.get("model")
        if weights is None or "tokenizer" not in content or sizes.keys() - vars(Config()).keys():
            raise ValueError(f"{path}: a checkpoint of another version of train.py, or damaged")
        model = AllInOne(replace(Config(**sizes), **overrides))
        tokenizer = Tokenizer.load(f"{path}: its tokenizer", content["tokenizer"])
        if (content.get("answers"), sizes["answer_head"]) != (answers, model.config.answer_head):
            weights = {k: v for k, v in weights.items() if not k.startswith("answer_head.")}
        report = load_weights(model, weights, path)
    else:
        model, report = load_release(path, content=content, **overrides)
        tokenizer = Tokenizer.load(vocab)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(f"the vocabulary has {tokenizer.vocab_size} words, {path} "
                         f"{model.config.vocab_size}: give --vocab the one it was trained with")
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
    """Logit of each action (Tab. 12): (B, answers), on video_cls or batch["feature"], its like."""
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
    """VTM and MLM (Sec. 3.3), two joint passes as one: (logits of the masked words (M, |V|), logits
    of matching (B, 2), text and video features of VTM's pass); what is no objective is None."""
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
    json: str = ""                   # file for each sample's result
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
                     squash=self.squash, boxes=self.boxes, order=self.order, answers=answers)


def half_precision(device: torch.device):
    """bf16 where the GPU has it, as in training."""
    return torch.autocast(device.type, torch.bfloat16,
                          enabled=device.type == "cuda" and torch.cuda.is_bf16_supported())


@dataclass
class Scorer:
    """A model in evaluation mode and the samples that it reads, shared out among all processes."""

    model: AllInOne
    clips: Clips
    config: EvalConfig
    device: torch.device
    errors: list = field(default_factory=list)         # what this process could not read
    CHUNK = 2048                                       # clips before the first saving of features

    def __post_init__(self):
        self.model.to(self.device).eval()

    def unreadable(self) -> list[str]:
        """What any process could not read, each clip once (re-ranking reads twice)."""
        return list(dict.fromkeys(in_all_processes(self.errors)))

    def read(self, indices=None, size: int = 0):
        """Yields (collated items, their tensors by view) of this process's share, each sample once.
        A pass is of neighbours in one manifest; of one, by which it is seeded, if a model draws."""
        c, manifest, keys = self.model.config, self.clips.manifest, []
        by_chance = "random" in (c.patch_order, c.roll_select)
        size = 1 if by_chance else size or self.config.batch
        if self.config.task == "pretrain":             # VTM's pairs are drawn among 8 neighbours
            size = -(-size // 8) * 8
        indices = range(len(self.clips)) if indices is None else indices
        for end, lines in zip(manifest.ends, manifest.sizes):
            mine = [(i, i) for i in indices if end - lines <= i < end]
            keys += [mine[i:i + size] for i in range(0, len(mine), size)]
        keys = keys[dist.get_rank()::dist.get_world_size()]
        merge = functools.partial(collate, clips=self.clips, group=8)
        for items in load(self.clips, keys, merge, self.config.workers):
            self.errors += items["errors"]
            if not items["where"]:
                continue
            batch = {k: v.to(self.device) for k, v in items.items() if isinstance(v, Tensor)}
            views = batch["video"].unbind(1) if batch["video"].dim() == 6 else [batch["video"]]
            if by_chance:
                torch.manual_seed(int(items["index"][0]))
            yield items, [batch | {"video": view} for view in views]

    @torch.no_grad()
    def features(self, encode: typing.Callable, path: Path | None, is_cache: bool = False):
        """{sample: encode(model, view)} of all clips that can be read. The file `path` keeps them
        while weights, model and clip are the same, so that a killed run goes on. ValueError if it
        holds something else; if it is a cache, it is written anew."""
        model, clips, content = self.model, self.clips, {}
        weights = zlib.crc32(b"".join(
            p.detach().cpu().numpy().tobytes() for name, p in model.named_parameters()
            if not name.startswith("answer_head")))
        sizes = replace(model.config, answers=0, answer_head="paper")
        key = str([weights, encode.__name__, sizes, clips.squash, clips.boxes, clips.order])
        if path and path.exists():
            try:
                content = read_weights(path)
            except ValueError:
                if not is_cache:
                    raise
            if content.get("key") != key and not is_cache:
                raise ValueError(f"{path}: holds no features, or those of other weights or flags; "
                                 "name another file, or remove it")
        kept = dict(zip(content["names"], content["features"])) if content.get("key") == key else {}
        names = [clip_key(clips.manifest[i]) for i in range(len(clips))]
        missing, end = [i for i, name in enumerate(names) if name not in kept], 0
        while end < len(missing):
            begin, end, new = end, max(self.CHUNK, 2 * end), []   # each saving writes them all
            for items, (view, *_) in self.read(missing[begin:end]):
                with half_precision(self.device):
                    new += zip(items["index"].tolist(), encode(model, view).cpu())
            kept |= {names[i]: feature for i, feature in in_all_processes(new)}
            say(f"\rfeatures: {min(end, len(missing))} of {len(missing)} clips", end="")
            if path and kept and dist.get_rank() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as file:
                    torch.save({"key": key, "names": list(kept),
                                "features": torch.stack(list(kept.values()))}, file)
        if missing:
            lost = len(self.unreadable())
            say(f"\rfeatures of {len(missing) - lost} clips; unreadable: {lost}")
        return {i: kept[name] for i, name in enumerate(names) if name in kept}


def clip_key(sample: dict) -> str:
    """What tells whether a clip's features still hold: its file, and what is read of it."""
    path = Path(sample["video"])
    stat = path.stat() if path.exists() else None
    return json.dumps([sample["video"], stat and (stat.st_size, stat.st_mtime_ns),
                       *map(sample.get, ("start", "end", "fps", "boxes", "image"))])


def cls_features(model: AllInOne, clips: Clips, path: Path, config, device):
    """(what a probe trains on, what could not be read): a list of {feature, label, where, set}.
    config: a TrainConfig."""
    reading = EvalConfig(task="probe", batch=config.batch_per_gpu, workers=config.workers)
    scorer, samples = Scorer(model, clips, reading, device), []
    for i, feature in scorer.features(video_cls, path, is_cache=True).items():
        sample = clips.manifest[i]
        samples.append({"feature": feature, "label": clips.class_of(sample),
                        "where": sample["where"], "set": clips.manifest.locate(i)[0]})
    return samples, scorer.unreadable()


@torch.no_grad()
def evaluate(model: AllInOne, tokenizer: Tokenizer, config: EvalConfig, device: torch.device,
             answers: list[str] | None = None) -> dict:
    """Scores every sample of config.data once, on any number of processes (all get the result).
    answers: the classes of "qa" and "probe". Returns {"samples": N, "unreadable": [...],
    "predictions": [{where, kind, metrics, ...}]}, where metrics are what report() averages."""
    scorer = Scorer(model, config.clips_of(model, tokenizer, answers), config, device)
    with half_precision(device):
        if config.task == "retrieval":
            predictions = score_retrieval(scorer)
        else:
            predictions = [prediction for items, views in scorer.read()
                           for prediction in score(scorer, items, views)]
            predictions = sorted(in_all_processes(predictions), key=lambda p: p["index"])
    if config.task == "qa":
        add_majority(predictions)
    return {"samples": len(scorer.clips), "unreadable": scorer.unreadable(),
            "predictions": predictions}


def check_scores(scores: Tensor, where: list[str]) -> None:
    """ValueError if a score is not a number: comparisons with it would count as right."""
    if bad := [name for name, row in zip(where, scores) if row.isnan().any()]:
        raise ValueError(f"{bad[0]}: the model's score is not a number; weights that are damaged, "
                         "or overflow")


def score(scorer: Scorer, items: dict, views: list[dict]) -> list[dict]:
    """A prediction for each sample, its views averaged; of pre-training (Tab. 6, 9, 10) for each
    masked word, kind "MLM", and for each clip, "VTM"."""
    model, task, every = scorer.model, scorer.config.task, range(len(items["where"]))
    if task == "pretrain":
        words, matched = (sum(scores) / len(views) for scores in zip(
            *(score_pretraining(model, view)[:2] for view in views)))
        clip_of = (items["mlm_where"] // items["text_ids"].shape[1]).tolist()
        parts = [("MLM", clip_of, words, items["mlm_labels"]),
                 ("VTM", every, matched, items["vtm_labels"])]
    else:
        scores = sum(SCORES[task](model, view) for view in views) / len(views)
        parts = [("", every, scores, items["label"])]
    check_scores(parts[-1][2], items["where"])
    return [{"index": int(items["index"][i]), "where": items["where"][i],
             "kind": kind or items["kind"][i] or "all", "label": label,
             **predict(task, one, label, scorer.clips.answers)}
            for kind, rows, scores, labels in parts
            for i, one, label in zip(rows, scores.cpu(), labels.tolist())
            if kind != "MLM" or label >= 0]                        # else padding


def predict(task: str, scores: Tensor, label: int, answers: list[str] | None) -> dict:
    """The metrics of one sample, whose scores are (O,) or (answers,), and what they rest on."""
    scores = scores[scores > -torch.inf]                           # without absent options
    (_, right), = ranked(scores[None], torch.arange(len(scores))[None] == label)
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


def ranked(scores: Tensor, own: Tensor) -> list[tuple[float, dict[int, float]]]:
    """For each query (rank of its first right candidate, {k: % that one is among the first k}), as
    expected if ties are broken at random. scores: (Q, G). own: bool (Q, G), which are right."""
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    tied, found = scores == best, []
    counts = (scores > best).sum(1), (tied & ~own).sum(1), (tied & own).sum(1)
    for above, wrong, right in zip(*(n.tolist() for n in counts)):
        drawn = {k: min(max(k - above, 0), wrong + right) for k in (1, 5, 10)}
        missed = {k: math.comb(wrong, n) / math.comb(wrong + right, n) for k, n in drawn.items()}
        found.append((above + (wrong + right + 1) / (right + 1),
                      {k: 100 * (1 - chance) for k, chance in missed.items()}))
    return found


def add_majority(predictions: list[dict]) -> None:
    """Adds to open-ended QA what the commonest answer of each kind would score."""
    for kind in {p["kind"] for p in predictions}:
        same = [p for p in predictions if p["kind"] == kind]
        commonest = Counter(p["label"] for p in same if p["label"] >= 0).most_common(1)
        for p in same:
            p["metrics"]["majority %"] = 100.0 * (p["label"] in dict(commonest))


# ---- Retrieval (Sec. 4.2.2, Tab. 3, Tab. 7) -----------------------------------------------------

BLOCK = 2 ** 24                   # cosines in memory at once; --rerank needs all of them


def score_retrieval(scorer: Scorer) -> list[dict]:
    """Each clip and each caption encoded once, alone; cosines; --rerank by the joint pass.
    Returns one prediction for each caption (kind "text to video") and each clip ("video to text").
    """
    model, rows, first = scorer.model, [], {}
    for items, views in scorer.read():
        video = sum(video_embedding(model, view) for view in views) / len(views)            # (B, E)
        text = text_embedding(model, views[0]["text_ids"], views[0]["text_mask"]).cpu()     # (T, E)
        check_scores(video, items["where"])
        for i, index in enumerate(items["index"].tolist()):
            own = items["text_clip"] == i
            ids = [tuple(row[mask].tolist()) for row, mask in zip(items["text_ids"][own],
                                                                  items["text_mask"][own])]
            rows.append((index, items["where"][i], video[i].cpu(), text[own], ids))
    rows = sorted(in_all_processes(rows), key=lambda row: row[0])
    if not rows:
        return []
    index, where, videos, texts, ids = zip(*rows)
    captions = [words for own in ids for words in own]
    once = torch.tensor([first.setdefault(words, t) for t, words in enumerate(captions)])
    # equal captions tie exactly and, since products in float64 are rounded, so do equal clips
    texts, videos = torch.cat(texts)[once].double(), torch.stack(videos).double()
    number = torch.arange(len(rows))                                                        # (N,)
    clip = number.repeat_interleave(torch.tensor([*map(len, ids)]))                         # (T,)
    names = [f"{name}#{k}" for name, words in zip(where, ids) for k in range(len(words))]
    joint = [None, None]
    if scorer.config.rerank:
        joint = rerank(scorer, (texts @ videos.T).float(), captions, index)
    predictions = []
    for kind, scores, asked, of, queries, gallery, own, candidates in (
            ("text to video", joint[0], names, clip, texts, where, number, videos),
            ("video to text", joint[1], where, number, videos, names, clip, texts)):
        mine, size = [], max(1, BLOCK // len(gallery))
        for part in torch.arange(len(asked)).split(size)[dist.get_rank()::dist.get_world_size()]:
            block = (queries[part] @ candidates.T).float() if scores is None else scores[part]
            found = ranked(block, of[part, None] == own)
            for query, best, (rank, hits) in zip(part.tolist(), block.argmax(1).tolist(), found):
                metrics = {f"R@{k} %": hit for k, hit in hits.items()}
                metrics |= {"median rank": rank, "mean rank": rank}
                mine.append((query, {"where": asked[query], "kind": kind, "best": gallery[best],
                                     "metrics": metrics}))
        predictions += [p for _, p in sorted(in_all_processes(mine), key=lambda one: one[0])]
    return predictions


def joint_logits(scorer: Scorer, wanted: dict[int, list[tuple]]) -> dict[tuple, Tensor]:
    """{(sample, token ids): VTM's two logits (Sec. 3.3)} of each sample's `wanted` texts."""
    model, found, size = scorer.model, [], 8 * scorer.config.batch
    for items, views in scorer.read(wanted):
        for b, index in enumerate(items["index"].tolist()):
            texts = list(dict.fromkeys(wanted[index]))
            for part in (texts[begin:begin + size] for begin in range(0, len(texts), size)):
                words = pad_sequence([torch.tensor(ids) for ids in part], True, -1)
                words, logits = words.to(scorer.device), 0
                for view in views:
                    video = model.embed_video(view["video"][b:b + 1]).expand(len(part), -1, -1, -1)
                    text = model.embed_text(words.clamp(min=0))
                    logits += model.vtm_head(model.fuse(video, text, words >= 0).pooled).cpu()
                check_scores(logits, [items["where"][b]] * len(part))
                found += [((index, ids), pair) for ids, pair in zip(part, logits / len(views))]
    return dict(in_all_processes(found))


def rerank(scorer: Scorer, cosine: Tensor, captions: list[tuple], index: tuple) -> list[Tensor]:
    """Scores (T, N) of texts and (N, T) of videos: of the best --rerank of each query, and ties
    with the last, VTM's matched logit, raised above every cosine; else the cosine. captions: T
    tuples of token ids; index: the N clips' numbers."""
    k = scorer.config.rerank
    chosen = [cosine >= cosine.topk(min(k, cosine.shape[dim]), dim).values.amin(dim, keepdim=True)
              for dim in (1, 0)]
    pairs = (chosen[0] | chosen[1]).nonzero().tolist()
    matched = torch.full_like(cosine, torch.nan, dtype=torch.float64)    # float32 loses digits here
    wanted = defaultdict(list)
    for t, v in pairs:
        wanted[index[v]].append(captions[t])
    logits = joint_logits(scorer, wanted)
    for t, v in pairs:
        if (index[v], captions[t]) in logits:                            # else lost since
            matched[t, v] = logits[index[v], captions[t]][1]
    matched += 2 - matched.nan_to_num(torch.inf).min()
    by_text, by_video = (torch.where(best & ~matched.isnan(), matched, cosine) for best in chosen)
    return [by_text, by_video.T]


# ---- On any video: fill, match, ask, explain, attention, search (Sec. 4.6, Fig. 4, 6, 11) --------

def likeliest(chances: Tensor, name) -> list:
    """[name, chance] of the five greatest of chances (K,)."""
    best = chances.topk(min(5, len(chances)))
    return [[name(i), round(p, 4)] for p, i in zip(*(x.tolist() for x in best))]


def fill(scorer: Scorer, clip: dict) -> dict:
    """The five likeliest words of each [MASK], by the video and the text or --blind, the text."""
    model, tokenizer = scorer.model, scorer.clips.tokenizer
    ids, mask, blind = clip["text_ids"], clip["text_mask"], scorer.config.blind
    text = model.encode_text(ids, mask) if blind else model(clip["video"], ids, mask).text
    chances = model.mlm_head(text[ids == tokenizer.mask_id]).float().softmax(-1)
    return {"masks": [likeliest(row, tokenizer.words.id_to_token) for row in chances]}


def match(scorer: Scorer, clip: dict) -> dict:
    """Each --text, its probability among them (Sec. 4.2.3) and that of matching, alone."""
    model, texts = scorer.model, scorer.config.text
    video = clip["video"].expand(len(texts), -1, -1, -1, -1)
    logits = model.vtm_head(model(video, clip["text_ids"], clip["text_mask"]).pooled)      # (B, 2)
    among, alone = logits[:, 1].softmax(0), logits.softmax(1)[:, 1]
    return {"captions": [[text, round(p, 4), round(q, 4)] for text, p, q in zip(
        texts, among.tolist(), alone.tolist())]}


def ask(scorer: Scorer, clip: dict) -> dict:
    """The five likeliest answers of an open-ended QA checkpoint (Sec. 4.2.1)."""
    chances = score_answers(scorer.model, clip)[0].softmax(0)
    return {"answers": likeliest(chances, scorer.clips.answers.__getitem__)}


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


def explain(scorer: Scorer, clip: dict) -> dict:
    """Where each word looks (Sec. 4.6, Fig. 6): maps (words, S, rows, columns) that sum to 1.
    By the word-patch transport on the last block's tokens or, with --block, by its attention.
    Patches are put back to the frame that they were rolled from; [MASK]s are filled."""
    model, tokenizer, block = scorer.model, scorer.clips.tokenizer, scorer.config.block
    video, ids, mask = clip["video"], clip["text_ids"], clip["text_mask"]
    words = model.mlm_head(model(video, ids, mask).text).argmax(-1)                    # (1, m)
    ids = torch.where(ids == tokenizer.mask_id, words, ids)
    S, side = video.shape[1], model.config.image_size // model.config.patch_size
    if block:
        maps = block_attention(model, clip | {"text_ids": ids})[block - 1][1][:, :, model.specials:]
    else:
        features = model(video, ids, mask)
        patches = features.frames[:, :, model.specials:].flatten(1, 2)                 # (1, S*n, D)
        maps = word_patch_transport(features.text, patches, mask)[1][0].unflatten(1, (S, -1))
    source = origins(model, S, block or model.config.depth).to(maps.device)            # (S, n)
    maps = torch.zeros_like(maps).scatter_add_(1, source.expand(len(maps), -1, -1), maps)
    inside = slice(1, int(mask.sum()) - 1)                                    # no [CLS], no [SEP]
    maps = maps[inside] / maps[inside].sum((1, 2), keepdim=True)                       # (m-2, S, n)
    return {"words": [tokenizer.words.id_to_token(i) for i in ids[0, inside].tolist()],
            "maps": maps.unflatten(2, (side, side)).tolist()}


def attention(scorer: Scorer, clip: dict) -> dict:
    """What a text token spends, by block (Fig. 4): shares on text, video cls, its own frame's
    patches and rolled ones, in all 1; "per_patch" is a rolled patch's share by another's."""
    model, blocks = scorer.model, []
    S, m = clip["video"].shape[1], int(clip["text_mask"].sum())
    for d, (text, video) in enumerate(block_attention(model, clip), start=1):
        cls, patches = video[:m].mean(0).tensor_split((model.specials,), 1)            # (S, n)
        rolled = (origins(model, S, d) != torch.arange(S)[:, None]).to(patches.device)
        own, other = float(patches[~rolled].sum()), float(patches[rolled].sum())
        ratio = other / own * float((~rolled).sum() / rolled.sum()) if own and other else 0.0
        blocks.append({"step": d, "text": float(text[:m].sum() / m), "cls": float(cls.sum()),
                       "own": own, "rolled": other, "per_patch": ratio})
    return {"blocks": blocks}


USES = {"fill": fill, "match": match, "ask": ask, "explain": explain, "attention": attention}


def video_manifest(config: EvalConfig) -> str:
    """A manifest of --video: files, folders (walked) and manifests, --text added to each line.
    Clips are cut into windows of --window seconds, between their own start and end."""
    lines, asked = [], {"question": config.text[0], "texts": config.text, "answer": "?"}
    for path in map(Path, config.video):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        samples = [{"video": str(file.absolute())} for file in files
                   if file == path or file.suffix.lower() in MEDIA]
        if path.suffix in (".jsonl", ".csv", ".tsv"):
            samples = Manifest(path, config.columns)
        for sample in samples:
            kept = {key: sample[key] for key in
                    ("video", "start", "end", "fps", "image", "boxes") if key in sample}
            spans, end = [{}], math.inf                        # an image has no end
            if config.window:
                end = min(sample.get("end", end), duration(sample["video"]) or end)
            if end < math.inf:
                begins = np.arange(sample.get("start", 0.0), end, config.window).tolist()
                spans = [{"start": t, "end": min(t + config.window, end)} for t in begins]
            lines += [kept | span | asked for span in spans]
    if not lines:
        raise DataError(f"--video {' '.join(config.video)}: no clip there")
    return str(temporary_manifest(lines))


@torch.no_grad()
def use(model: AllInOne, tokenizer: Tokenizer, config: EvalConfig, answers, device) -> list:
    """--task fill, match, ask, explain, attention or search on the clips of --video: prints and
    returns the results; --out DIR gets a picture of each clip (search: of each text)."""
    task = {"ask": "qa", "search": "probe"}.get(config.task, "retrieval")
    reading = replace(config, task=task, clips=1, data=(video_manifest(config),))
    if config.task in ("explain", "attention"):          # maps need patches in their own places
        model.config = replace(model.config, patch_order="raster")
    clips = reading.clips_of(model, tokenizer, answers)
    if len(set(map(is_image, clips.manifest))) > 1:      # images among clips: one by one
        reading = replace(reading, batch=1)
    scorer, found, pictures = Scorer(model, clips, reading, device), [], defaultdict(list)
    if config.task == "search":
        found = search(scorer)
    else:
        for items, (clip,) in scorer.read(size=1):
            i = int(items["index"][0])
            found.append((i, i, USES[config.task](scorer, clip)))
        found = sorted(in_all_processes(found), key=lambda one: one[0])
    for picture, i, result in found:
        sample = clips.manifest[i]
        window = f" {sample.get('start', 0):g}-{sample.get('end', math.inf):g} s"
        result["video"] = sample["video"] + window * ("start" in sample or "end" in sample)
        shown = {k: v for k, v in result.items() if k not in ("maps", "blocks")}
        say(json.dumps(shown, ensure_ascii=False))
        if config.out and dist.get_rank() == 0:
            frames = clips[i, i]["video"]
            rows = [(str(shown)[:80], list(frames))]
            if config.task == "explain":
                rows = [(word, heated(frames, torch.tensor(heat)))
                        for word, heat in zip(result["words"], result["maps"])]
            pictures[picture] += rows
    for line in scorer.unreadable():
        say("left out:", line.partition(": ")[2])               # without our own manifest
    if not found:
        raise DataError(f"--video {' '.join(config.video)}: no clip can be read")
    told = [result.get("blocks", ()) for _, _, result in found]
    moving = [blocks for blocks, (_, i, _) in zip(told, found) if not is_image(clips.manifest[i])]
    blocks = [{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
              for rows in zip(*moving or told)]
    for block in blocks:                                       # the mean of all clips
        say(f"block {block['step']:.0f}: " + ", ".join(
            f"{name} {value:.3f}" for name, value in block.items() if name != "step"))
    if config.out and dist.get_rank() == 0:
        save_curves(Path(config.out) / "attention.png", blocks, ("text", "cls", "own", "rolled"))
    for number, rows in enumerate(pictures.values(), start=1):
        save_picture(Path(config.out) / f"{config.task}-{number}.png", rows)
    return [result for _, _, result in found]


def index_entry(model: AllInOne, batch: dict) -> Tensor:
    """(B, vtc_dim): a clip's embedding as an index keeps it."""
    return video_embedding(model, batch).half()


def search(scorer: Scorer) -> list[tuple]:
    """(number of the text, sample, result): the clips that are likest to each --text, by cosine
    (Sec. 3.3 VTC), the best --rerank of them by VTM. --index FILE keeps the features."""
    model, clips, config, wanted = scorer.model, scorer.clips, scorer.config, defaultdict(list)
    features = scorer.features(index_entry, Path(config.index) if config.index else None)
    if not features:
        raise DataError(f"no clip can be read: {'; '.join(scorer.unreadable()[:3])}")
    share = slice(dist.get_rank(), None, dist.get_world_size())      # of the gallery, to look at
    samples, k = list(features)[share], max(config.rerank, config.top)
    gallery = torch.stack(list(features.values()))[share].to(scorer.device, torch.float32)  # (G, E)
    asked, likest = [tuple(clips.encode(text)) for text in config.text], []
    for ids in asked:
        cosines = text_embedding(model, torch.tensor([ids], device=scorer.device)) @ gallery.T
        best = cosines[0].topk(min(k, len(gallery)))
        pairs = in_all_processes([(cosine, samples[g])
                                  for cosine, g in zip(*(x.tolist() for x in best))])
        likest.append(sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:k])
        for _, i in likest[-1][:config.rerank]:
            wanted[i].append(ids)
    logits, found = joint_logits(scorer, wanted), []
    for t, (text, ids, pairs) in enumerate(zip(config.text, asked, likest)):
        results = [(t, i, {"text": text, "cosine": round(cosine, 4)}) for cosine, i in pairs]
        for _, i, result in results:
            if (i, ids) in logits:
                result["matched"] = round(float(logits[i, ids].softmax(0)[1]), 4)
        # whom VTM has looked at comes before all others, which stay in the order of cosines
        found += sorted(results, key=lambda one: -one[2].get("matched", -1))[:config.top]
    return found


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
    """A PNG of `names` (of a log: losses and accuracies) by "step", each by its greatest."""
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet, last = Image.new("RGB", size, "white"), lines[-1]
    draw, colours = ImageDraw.Draw(sheet), ("red", "blue", "green", "orange", "purple", "black")
    names = names or [name for name in last if f"{name.removesuffix('_accuracy')}_accuracy" in last]
    for k, name in enumerate(names):
        points = [(line["step"] / last["step"], line[name]) for line in lines if name in line]
        most = max(value for _, value in points) or 1.0
        draw.line([(size[0] * x, size[1] - (size[1] - 20) * value / most) for x, value in points],
                  fill=colours[k % 6])
        draw.text((8 + 105 * k, 4), f"{name} {points[-1][1]:.3g}", colours[k % 6])
    sheet.save(path)


# ---- The report, beside the paper ----------------------------------------------------------------

def summarise(predictions: list[dict], resamplings: int = 0) -> dict[str, dict[str, list[float]]]:
    """{kind: {metric: [average]}}, of resamplings > 0 followed by 95 % of the averages of resampled
    samples (bootstrap), always the same ones."""
    table = defaultdict(dict)
    for kind, name in dict.fromkeys((p["kind"], k) for p in predictions for k in p["metrics"]):
        values = np.array([p["metrics"][name] for p in predictions
                           if p["kind"] == kind and name in p["metrics"]])
        average = np.median if name.startswith("median") else np.mean
        table[kind][name], draw = [float(average(values))], torch.Generator().manual_seed(0)
        again = [average(values[torch.randint(len(values), values.shape, generator=draw).numpy()])
                 for _ in range(resamplings)]
        table[kind][name] += np.quantile(again, [0.025, 0.975]).tolist() if again else []
    return table


def report(result: dict, config: EvalConfig, model: Config) -> dict[str, float]:
    """Prints how samples were scored, a table by kind, what is lacking, and the paper's numbers.
    Returns {kind: average of its first metric}."""
    ways = {name: getattr(config, name) for name in ("order", "clips", "rerank")}
    say(f"\n{config.task} on {', '.join(map(str, config.data))}; {model.frames} frames" + "".join(
        f"; --{name} {way}" for name, way in ways.items() if way != getattr(EvalConfig, name)))
    table = summarise(result["predictions"], config.bootstrap)
    samples = Counter(p["kind"] for p in result["predictions"])
    header = list(dict.fromkeys(name for columns in table.values() for name in columns))
    shown, wide = ("{:.1f} [{:.1f}, {:.1f}]", 26) if config.bootstrap else ("{:.1f}", 17)
    say(f"{'kind':<16}" + "".join(name.rjust(wide) for name in header) + f"{'samples':>9}")
    for kind, columns in table.items():
        cells = [shown.format(*columns[name]) if name in columns else "-" for name in header]
        say(f"{kind:<16}" + "".join(cell.rjust(wide) for cell in cells) + f"{samples[kind]:>9}")
    if result["unreadable"]:
        say(f"INCOMPLETE: {len(result['unreadable'])} of {result['samples']} samples unreadable:",
            *result["unreadable"], sep="\n  ")
    name, readme = Path(config.data[0]).absolute().parent.name, Path(__file__).parent / "README.md"
    row = rf"^\| (?:[^|]*\W)?{re.escape(name)}\b[^|]*\| {config.task}\b.*"     # of its data sets
    if readme.exists() and (found := re.search(row, readme.read_text("utf-8"), re.M)):
        say(f"paper: {found[0]}")
    return {kind: next(iter(columns.values()))[0] for kind, columns in table.items()}


# ---- What it costs (Tab. 1, Tab. 14, Fig. 1c, Fig. 3) --------------------------------------------

def count_parameters(model: AllInOne, heads: bool = True) -> int:
    """Parameters, with all objective heads or, as Tab. 1 counts, without MLM's and VTC's."""
    left_out = () if heads else ("mlm_head.", "text_proj.", "video_proj.")
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(left_out))


def count_macs(config: Config) -> dict[str, float]:
    """Multiply-adds of one clip, by torch's FlopCounterMode on shapes alone (no weights, no data).
    Returns {"joint", "attention", "video", "text"}: the three passes at full text length, and the
    part of the joint pass in products of queries, keys and values (what Sec. 3.2 compares)."""
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
def measure_throughput(config: Config, device: torch.device, batch: int) -> float:
    """Clips a second through the joint pass with full-length text, in evaluation mode (Tab. 1)."""
    model, size = AllInOne(config).to(device).eval(), config.image_size
    video = torch.randint(256, (batch, config.frames, 3, size, size), device=device).byte()
    ids = torch.randint(config.vocab_size, (batch, config.max_text_len), device=device)

    def run():
        with half_precision(device):
            model(video, ids).pooled.sum().item()              # .item() waits for the device
    run()                                                      # warms up
    passes = 1 + int(3 / timeit.timeit(run, number=1))         # three seconds
    return passes * batch / timeit.timeit(run, number=passes)


def profile(sizes: dict, batch: int) -> None:
    """`--task profile`: what each variant costs (Tab. 1), and B with Tab. 8a's and 9's exchange."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("Parameters without MLM's and VTC's heads (Tab. 1) and all, 1e9 multiply-adds of a clip,"
          f"\njoint passes in batches of {batch} on {device.type}\n\n" + " " * 16
          + "params M  all heads  joint G  attention G  video G  text G  clips/s")
    exchanges = {f"B {name}": {"temporal": name} for name in typing.get_args(Temporal)[1:]}
    for name, fields in (VARIANTS | exchanges).items():
        config = Config(**sizes | fields)
        with torch.device("meta"):
            model = AllInOne(config)
        print("{:<16}{:8.1f}  {:9.1f}  {:7.1f}  {:11.1f}  {:7.1f}  {:6.1f}  {:7.1f}".format(
            name, count_parameters(model, heads=False) / 1e6, count_parameters(model) / 1e6,
            *(n / 1e9 for n in count_macs(config).values()),
            measure_throughput(config, device, batch)))


def scale() -> None:
    """`--task scale`: search by cosine against joint passes (Tab. 14), on made-up features."""
    queries = torch.randn(64, Config.vtc_dim)
    speed = measure_throughput(Config(), torch.device("cpu"), 1)
    print("clips      index MB  ms a query  of bandwidth  queries/s in 64  joint passes")
    for size in (10_000, 100_000, 1_000_000):
        gallery = torch.randn(size, Config.vtc_dim)
        reading, one, many = (min(timeit.repeat(run, number=1, repeat=3)) for run in (
            gallery.sum, lambda: (queries[:1] @ gallery.T).topk(10),
            lambda: (queries @ gallery.T).topk(10)))
        print(f"{size:<9}  {size * Config.vtc_dim * 2 / 1e6:8.0f}  {1000 * one:10.1f}  "
              f"{reading / one:12.0%}  {64 / many:15.0f}  {size / speed / 3600:10.1f} h")


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
    task, using, path = config.task, config.task in (*USES, "search"), Path(config.checkpoint)
    if task in ("profile", "scale"):
        return profile(sizes, config.batch) if task == "profile" else scale()
    for wrong, message in (
            (not (config.video if using else config.data),
             f"--task {task} needs " + ("--video FILE or FOLDER" if using else "--data MANIFEST")),
            (using and task != "attention" and not any(config.text), f"--task {task} needs --text"),
            (task == "fill" and "[MASK]" not in config.text[0],
             "--task fill needs a [MASK] in --text"),
            (len(config.text) > 1 and task not in ("match", "search"),
             "several --text are for --task match and search"),
            (min(config.batch, config.clips, config.top) < 1,
             "--batch, --clips and --top must be 1 or more"),
            (min(config.rerank, config.bootstrap, config.window, config.workers) < 0,
             "--rerank, --bootstrap, --window and --workers must be 0 or more"),
            (config.rerank and task not in ("retrieval", "search"),
             "--rerank is for --task retrieval and search")):
        if wrong:
            parser.error(message)
    with joined_processes() as device:
        if not path.exists():
            raise ValueError(f"{path}: no such file; give --checkpoint, or make the proof run's in "
                             "four minutes: python train.py --task pretrain")
        content = read_weights(path)
        model, tokenizer, answers = checkpoint_model(content, path, config.vocab, **sizes)
        trained = content.get("config", {})
        reading = {k: trained[k] for k in ("squash", "boxes") if k in trained and k not in given}
        config = replace(config, **reading)                    # as in training
        needed = {"qa": "qa", "ask": "qa", "probe": "probe"}.get(task, trained.get("task"))
        # of the authors' files those that were fine-tuned for retrieval have projections
        vtc = "vtc" in trained.get("objectives", ()) or any(
            "txt_proj" in name for name in content.get("state_dict", ()))
        for wrong, message in (
                (trained.get("task") != needed,
                 f"{path} was trained for {trained.get('task', 'another task')}: fine-tune it with "
                 f"train.py --task {needed} --init {path}"),
                (task in ("explain", "attention") and model.config.roll_select == "random",
                 f"--task {task}: patches that roll at random cannot be put back"),
                (not vtc and (task == "search" or task == "retrieval" and not config.rerank),
                 f"{path} was not trained with VTC, its cosines mean nothing: fine-tune it "
                 "(train.py --task retrieval), or score by VTM: --task retrieval --rerank K"),
                (not 0 <= config.block <= model.config.depth,
                 f"--block {config.block}: the model has blocks 1 to {model.config.depth}")):
            if wrong:
                raise ValueError(message)
        if not vtc and config.rerank:
            say("not trained with VTC: VTM ranks all pairs")
            config = replace(config, rerank=10 ** 9)
        if using:
            results = use(model, tokenizer, config, answers, device)
        else:
            result = evaluate(model, tokenizer, config, device, answers)
            report(result, config, model.config)
            results = result["predictions"]
        if config.json and dist.get_rank() == 0:
            Path(config.json).parent.mkdir(parents=True, exist_ok=True)
            with replacing(config.json) as file:
                file.write("".join(json.dumps(one) + "\n" for one in results).encode())


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
