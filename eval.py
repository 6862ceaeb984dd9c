"""Scores All-in-one (Tab. 2 to 5, 7 to 13) on any manifest, and tells what it costs (Tab. 1).

    python eval.py --task choice --data MANIFEST --checkpoint runs/pretrain/checkpoint.pt
    torchrun --nproc_per_node=8 eval.py --task retrieval --data MANIFEST --checkpoint FILE
    python eval.py --task profile

A checkpoint is ours (train.py's) or the authors' .ckpt. Every sample is scored once, whatever the
number of processes. Unreadable clips are never replaced: they are counted and named, and a score
that lacks samples says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from allinone import (CHOICES, VARIANTS, AllInOne, Config, load_release, load_weights, mlm_loss,
                      read_weights, vtm_loss)
from data import Clips, Manifest, Tokenizer, collate, load

# ---- Flags: the fields of a dataclass -----------------------------------------------------------

def add_flags(parser: argparse.ArgumentParser, cls: type, choices: dict) -> None:
    """One flag for each field of the dataclass `cls`; flags not given leave no trace.

    choices: the words that a field may say, where they are few.
    """
    group = parser.add_argument_group(cls.__name__, cls.__doc__.strip().splitlines()[0])
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, default = types[field.name], field.default
        shown = " ".join(default) if isinstance(default, tuple) else default
        options = dict(default=argparse.SUPPRESS, help=f"default: {shown}")
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind in (int, float, str):
            options |= dict(type=kind, metavar=kind.__name__.upper())
            if allowed := choices.get(field.name):
                options = {**options, "choices": tuple(allowed), "metavar": None}
        else:                                                   # tuple of words
            options |= dict(nargs="+", metavar="WORD")
        group.add_argument(f"--{field.name}", **options)


def given_flags(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> dict:
    """What the user gave, lists as tuples."""
    given = vars(parser.parse_args(argv))
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


# ---- Checkpoints --------------------------------------------------------------------------------

def load_model(path, vocab: str = "bert-base-uncased", say=print, answers: list[str] | None = None,
               **overrides) -> tuple[AllInOne, Tokenizer, dict]:
    """(model, its tokenizer, what else the file holds) of our checkpoint or the authors' .ckpt.

    vocab: for the authors' file, which carries no tokenizer. answers: what the model is to learn to
    answer; a head for others is not taken over. overrides: fields of Config, e.g.
    frames=8 for Tab. 12; tables of positions are fitted. Raises ValueError for other files.
    """
    content = read_weights(path)
    if answers is not None:
        overrides["answers"] = len(answers)
    if "sizes" in content:
        config = dataclasses.replace(Config(**content["sizes"]), **overrides)
        model = AllInOne(config)
        head = tuple(content["sizes"].get(key) for key in ("answers", "answer_head"))
        if head != (config.answers, config.answer_head) or (
                answers is not None and answers != content.get("answers")):
            content["model"] = {k: v for k, v in content["model"].items()
                                if not k.startswith("answer_head.")}
        report = load_weights(model, content.pop("model"), str(path))
        tokenizer = Tokenizer.from_json(content["tokenizer"])
    else:
        model, report = load_release(path, **overrides)
        tokenizer = Tokenizer.load(vocab)
        vtc = "text_proj.weight" in report["loaded"]               # fine-tuned for retrieval
        content = {"config": {"objectives": ("vtc",) if vtc else ()}}
        if len(tokenizer) != model.config.vocab_size:
            raise ValueError(f"{vocab} has {len(tokenizer)} words, not {model.config.vocab_size}: "
                             "give --vocab the vocabulary it was trained with (bert-base-uncased)")
    say(f"{path}: {len(report['loaded'])} tensors loaded" + "".join(
        f"; {len(report[key])} {key} ({', '.join(report[key][:4])})"
        for key in ("resized", "initialised", "ignored") if report[key]))
    return model, tokenizer, content


# ---- Scores of one batch: higher is likelier -----------------------------------------------------

def score_options(model: AllInOne, batch: dict) -> Tensor:
    """Matched logit of the VTM head for each candidate (Sec. 4.2.1, 4.2.3): (B, O), -inf if absent.

    batch: video (B, S, 3, H, W), text_ids and text_mask (B, O, m), option_mask (B, O).
    """
    B, O = batch["option_mask"].shape
    video = model.embed_video(batch["video"]).repeat_interleave(O, 0)     # (B*O, S, 1+n, D)
    text = model.embed_text(batch["text_ids"].flatten(0, 1))              # (B*O, m, D)
    mask = batch["text_mask"].flatten(0, 1).clone()
    mask[:, 0] = True                                    # an absent option still needs one key
    matched = model.vtm_head(model.fuse(video, text, mask).pooled)[:, 1]
    return matched.float().view(B, O).masked_fill(~batch["option_mask"], -torch.inf)


def score_answers(model: AllInOne, batch: dict) -> Tensor:
    """Logit of each answer (Sec. 4.2.1): (B, answers), from VTM's pooled cls token.

    batch: video (B, S, 3, H, W), text_ids and text_mask (B, m), the question.
    """
    pooled = model(batch["video"], batch["text_ids"], batch["text_mask"]).pooled      # (B, D)
    return model.answer_head(pooled).float()


def score_classes(model: AllInOne, batch: dict) -> Tensor:
    """Logit of each action (Tab. 12): (B, answers), linear on the cls token of the video alone.

    batch: feature (B, D), computed before, or video (B, S, 3, H, W).
    """
    feature = batch["feature"] if "feature" in batch else model.encode_video(batch["video"])[:, 0]
    return model.answer_head(feature).float()


SCORES = {"choice": score_options, "qa": score_answers, "probe": score_classes}


# ---- Scoring a manifest --------------------------------------------------------------------------

@dataclass(frozen=True)
class EvalConfig:
    """What to score, and how."""

    task: str = "choice"             # choice, retrieval, qa, probe; profile: what the model costs
    data: tuple[str, ...] = ()       # manifests
    checkpoint: str = ""             # train.py's checkpoint.pt or best.pt, or the authors' .ckpt
    vocab: str = "bert-base-uncased"  # for the authors' .ckpt, which carries no tokenizer
    clips: int = 1                   # views of S frames each, averaged; 3: the 3 x 3 of Tab. 2 to 4
    rerank: int = 0                  # retrieval: re-score the best K by the joint pass (VTM)
    together: bool = False           # choice: line n of all manifests right (VCR's Q->AR)
    shuffle_frames: bool = False     # each clip's frames in random order: what needs order?
    reverse: bool = False            # each clip's frames backwards
    repeat_first: bool = False       # each clip's first frame only, S times
    bootstrap: int = 0               # resamplings for a 95 % interval, say 1000
    predictions: str = ""            # per-sample file; "": beside the checkpoint
    batch: int = 8                   # clips in one pass
    workers: int = 2                 # decoding processes on each GPU
    seconds: float = 3.0             # profile: time for each measurement
    train: bool = False              # profile: the training step of one variant instead
    variant: str = "B"               # profile --train: sizes
    compile: bool = False            # profile --train: as train.py's


def join_processes(cuda: bool) -> tuple[int, int, torch.device]:
    """(rank, world, device) of torchrun's job, which is joined; without torchrun a world of one."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device(
        "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        # torchrun's store outlives a crash: without a prefix a restarted worker would be led to the
        # addresses that the killed one had left in it
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank,
                                world_size=world)
    return rank, world, device


def in_all_processes(part: list) -> list:
    """The parts of all processes, in the order of ranks, as one list."""
    if not dist.is_initialized():
        return part
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return [item for part in parts for item in part]


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
         unreadable: list):
    """Yields (collated items, their tensors by view) of this process's share, each sample once.

    Nothing is padded or dropped whatever the number of processes; `unreadable` gets what failed.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(rank, len(clips), world)
    keys = [list(mine[i:i + config.batch]) for i in range(0, len(mine), config.batch)]
    together = functools.partial(collate, tokenizer=clips.tokenizer,
                                 max_text_len=clips.max_text_len)
    for items in load(clips, keys, together, config.workers):
        unreadable += items["errors"]
        if not items["where"]:
            continue
        items["video"] = reorder(items["video"], config, items["index"])
        tensors = {k: v.to(device) for k, v in items.items() if isinstance(v, Tensor)}
        video = tensors["video"]
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
    manifest, c = Manifest(config.data), model.config
    clips = Clips(manifest, tokenizer, config.task, c.frames, c.image_size, c.max_text_len,
                  train=False, views=config.clips, answers=answers)
    model = model.to(device).eval()
    unreadable = []
    if config.task == "retrieval":
        predictions = score_retrieval(model, clips, config, device, unreadable)
    else:
        predictions = []
        for items, views in read(model, clips, config, device, unreadable):
            with half_precision(device):
                scores = sum(SCORES[config.task](model, view) for view in views) / len(views)
            check_scores(scores, items["where"])
            predictions += [predict(config.task, items, i, row, answers)
                            for i, row in enumerate(scores.cpu())]
        predictions = sorted(in_all_processes(predictions), key=lambda p: p["index"])
    if config.task == "qa":
        add_majority(predictions)
    if config.together:
        predictions += all_right_together(predictions, manifest)
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
        labels = [p["label"] for p in same if p["label"] >= 0]
        mode = max(labels, key=labels.count) if labels else None
        for p in same:
            p["metrics"]["majority %"] = 100.0 * (p["label"] == mode)


def all_right_together(predictions: list[dict], manifest: Manifest) -> list[dict]:
    """VCR's Q->AR: line n of every manifest right, as predictions of kind "together"."""
    lines = manifest.ends[0]
    if manifest.ends != [lines * (i + 1) for i in range(len(manifest.paths))]:
        raise ValueError("--together: the manifests differ in length; line n of each must be about "
                         "the same question, as `data.py convert vcr_qa` and vcr_qar write them")
    groups = {}
    for p in predictions:
        groups.setdefault(p["index"] % lines, []).append(p)
    whole = [group for group in groups.values() if len(group) == len(manifest.paths)]
    for group in whole:
        if len({manifest[p["index"]]["video"] for p in group}) > 1:
            raise ValueError(f"--together: {' and '.join(p['where'] for p in group)} are about "
                             "different videos; convert both manifests from the same files")
    return [{"index": group[0]["index"], "where": group[0]["where"], "kind": "together",
             "metrics": {name: 100 * math.prod(p["metrics"][name] / 100 for p in group)
                         for name in group[0]["metrics"]}} for group in whole]


# ---- Retrieval (Sec. 4.2.2, Tab. 3, Tab. 7) -----------------------------------------------------

def score_retrieval(model: AllInOne, clips: Clips, config: EvalConfig, device: torch.device,
                    unreadable: list) -> list[dict]:
    """Each clip and each caption encoded once, alone; cosines; --rerank by the joint pass.

    Returns one prediction for each caption (kind "text to video") and each clip ("video to text").
    """
    rows = []                                            # of (index, where, video, texts, ids)
    for items, views in read(model, clips, config, device, unreadable):
        with half_precision(device):
            video = [model.video_proj(model.encode_video(view["video"])[:, 0]) for view in views]
            text = model.encode_text(views[0]["text_ids"], views[0]["text_mask"])[:, 0]
        video = sum(F.normalize(view.float(), dim=-1) for view in video) / len(views)   # (B, E)
        text = F.normalize(model.text_proj(text).float(), dim=-1)                       # (T, E)
        ids = [tuple(row[mask].tolist()) for row, mask in zip(items["text_ids"],
                                                              items["text_mask"])]
        for i, index in enumerate(items["index"].tolist()):
            own = (items["text_clip"] == i).nonzero()[:, 0].tolist()
            rows.append((index, items["where"][i], video[i].cpu(), text[own].cpu(),
                         [ids[t] for t in own]))
    rows = sorted(in_all_processes(rows), key=lambda row: row[0])
    if not rows:
        return []
    owner = torch.tensor([v for v, row in enumerate(rows) for _ in row[4]])           # (T,)
    ids = [words for row in rows for words in row[4]]
    first = {}
    once = [first.setdefault(words, t) for t, words in enumerate(ids)]   # equal words tie exactly
    texts = torch.cat([row[3] for row in rows])[once]
    cosines = texts @ torch.stack([row[2] for row in rows]).T                         # (T, N)
    check_scores(cosines.T, [row[1] for row in rows])
    right = owner[:, None] == torch.arange(len(rows))
    directions = {"text to video": (cosines, right), "video to text": (cosines.T, right.T)}
    if config.rerank:
        directions = rerank(model, clips, config, device, unreadable, rows, ids, once, cosines,
                            right)
    clip_names = [row[1] for row in rows]
    text_names = [f"{row[1]}#{k}" for row in rows for k in range(len(row[4]))]     # k-th caption
    predictions = []
    for kind, (scores, own) in directions.items():
        asked, found = ((text_names, clip_names) if kind == "text to video"
                        else (clip_names, text_names))
        for q, (above, wrong, true) in enumerate(zip(*(n.tolist() for n in places(scores, own)))):
            recalls = {f"R@{k} %": 100 * recall(k, above, wrong, true) for k in (1, 5, 10)}
            predictions.append({
                "where": asked[q], "kind": kind, "best": found[int(scores[q].argmax())],
                "metrics": recalls | {"rank": above + (wrong + true + 1) / (true + 1)}})
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
           unreadable: list, rows: list, ids: list, once: list, cosines: Tensor,
           right: Tensor) -> dict:
    """The best config.rerank candidates of each query in the order of VTM's matched logit.

    once: for each caption the first one of the same words, which alone is scored.
    Returns {direction: (scores, right)} as score_retrieval has them; whoever is not among the best
    keeps its cosine and stays below them. Whoever ties with the last of the best is among them.
    """
    T, N = cosines.shape
    chosen = cosines >= cosines.topk(min(config.rerank, N), 1).values[:, -1:]         # (T, N)
    chosen_t = cosines.T >= cosines.T.topk(min(config.rerank, T), 1).values[:, -1:]   # (N, T)
    wanted = (chosen | chosen_t.T) & (torch.tensor(once) == torch.arange(T))[:, None]
    m = max(map(len, ids))
    words = torch.tensor([[*row, *[clips.tokenizer.pad_id] * (m - len(row))] for row in ids])
    masks = torch.arange(m) < torch.tensor([len(row) for row in ids])[:, None]        # (T, m)
    place = {row[0]: v for v, row in enumerate(rows)}
    found = []
    for items, views in read(model, clips, config, device, unreadable):
        columns = torch.tensor([place[index] for index in items["index"].tolist()])
        pairs = wanted[:, columns].nonzero()                                          # (P, 2)
        for view in views:
            with half_precision(device):
                video = model.embed_video(view["video"])
                for t, b in (part.unbind(1) for part in pairs.split(8 * config.batch)):
                    text = model.embed_text(words[t].to(device))
                    pooled = model.fuse(video[b.to(device)], text, masks[t].to(device)).pooled
                    matched = model.vtm_head(pooled)[:, 1].float().cpu()
                    check_scores(matched, [items["where"][i] for i in b])
                    found.append((t, columns[b], matched / len(views)))
    joint = torch.zeros(T, N, dtype=torch.float64)       # float32 would lose digits by the + 2
    scored = torch.zeros(T, N, dtype=torch.bool)         # but for clips that cannot be read again
    for t, v, matched in in_all_processes(found):
        joint.index_put_((t, v), matched.double(), accumulate=True)
        scored[t, v] = True
    joint = (joint - joint.min() + 2)[once]                               # above every cosine
    chosen, chosen_t = chosen & scored[once], chosen_t & scored[once].T
    return {"text to video": (torch.where(chosen, joint, cosines), right),
            "video to text": (torch.where(chosen_t, joint.T, cosines.T), right.T)}


# ---- The report, beside the paper ---------------------------------------------------------------

PAPER = {  # by the name that data.py convert gives a data set; R@1/5/10 where it is retrieval
    "tgif_action": ("Tab. 2a", {"Ti": "80.6", "S": "91.2", "B, 1 frame": "92.9", "B": "92.7",
                                "B, 384 px": "94.7", "B*": "95.5"}),
    "tgif_transition": ("Tab. 2a", {"Ti": "83.5", "S": "92.7", "B, 1 frame": "94.2", "B": "94.3",
                                    "B, 384 px": "95.1", "B*": "94.7"}),
    "tgif_frameqa": ("Tab. 2a", {"Ti": "53.9", "S": "64.0", "B, 1 frame": "62.5", "B": "64.2",
                                 "B, 384 px": "65.4", "B*": "66.3"}),
    "msrvtt_qa": ("Tab. 2b", {"S": "39.5", "B": "42.9", "B, 3 x 3": "44.3", "B*": "46.8"}),
    "msvd_qa": ("Tab. 2c", {"S": "41.7", "B": "46.5", "B, 3 x 3": "47.9", "B*": "48.3"}),
    "msrvtt_9k": ("Tab. 3a and 7, text to video | video to text", {
        "B": "37.1/66.7/75.9 | 37.5/66.1/77.4", "B, 3 x 3": "37.9/68.1/77.1",
        "B, VTC only": "36.7/62.6/72.2 | 36.4/62.9/71.9",
        "B, VTM only": "33.3/67.0/76.9 | 34.4/66.3/76.6"}),
    "msrvtt_7k": ("Tab. 3a, text to video", {"B": "33.8/64.2/74.3", "B, 3 x 3": "34.4/65.4/75.8"}),
    "activitynet": ("Tab. 3b, text to video", {"B": "21.5/50.3/65.5, median rank 6",
                                               "B, 3 x 3": "22.4/53.7/67.7, median rank 5"}),
    "didemo": ("Tab. 3c and 7, text to video | video to text", {
        "B": "31.2/60.5/72.1, median rank 3 (59.5 for 60.5 in Tab. 7) | 30.4/58.3/69.4",
        "B, 3 x 3": "32.7/61.4/73.5, median rank 3",
        "B, VTC only": "29.6/47.3/56.67 | 29.6/48.0/57.2",
        "B, VTM only": "30.2/57.5/68.7 | 27.7/59.6/69.5"}),
    "msrvtt_mc": ("Tab. 4a", {"B, zero-shot": "80.3", "B": "91.4", "B, 3 x 3": "92.0",
                              "B*": "92.3"}),
    "lsmdc_mc": ("Tab. 4b", {"B, zero-shot": "56.3", "B": "83.1", "B, 3 x 3": "83.5",
                             "B*": "84.4"}),
    "vcr_qa": ("Tab. 5", {"B, CC3M + COCO": "60.5", "B, HowTo100M": "68.4",
                          "B, HowTo100M, no regions drawn": "65.2"}),
    "kinetics400": ("Tab. 12, top-1/5/10", {
        "B": "50.8/79.8/90.7", "B, 8 frames": "53.4/83.2/92.6",
        "B, time average": "44.3/75.2/87.3"}),
    "hmdb51": ("Tab. 12, top-1/5/10", {
        "B": "52.9/84.1/93.4", "B, 8 frames": "55.7/88.2/95.2",
        "B, time average": "43.1/75.5/90.5"}),
    "ego4d_mc": ("Tab. 13", {"B, zero-shot": "36.52", "B": "65.89",
                             "B, time average": "59.44, zero-shot 27.34"}),
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
    table, numbers = PAPER.get(paths[0].parent.name, ("", {}))
    variant = next((name for name, sizes in VARIANTS.items() if sizes["width"] == model.width), "-")
    if rows := [f"{k} {v}" for k, v in numbers.items() if k.startswith(variant)]:
        say(f"paper, {table}: {'; '.join(rows)}")
    return first


def write_predictions(path: Path, predictions: list[dict]) -> None:
    """One JSON object a sample, for error analysis; written beside and renamed."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text("".join(json.dumps(p) + "\n" for p in predictions))
    beside.replace(path)


# ---- What it costs (Tab. 1, Fig. 1c, Fig. 3) -----------------------------------------------------

# bf16 without sparsity, from the data sheets
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def peak_flops(device: torch.device) -> tuple[float, str]:
    """(FLOP/s, where from): the data sheet's for known GPUs, else measured by a matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, peak in PEAKS.items():
            if key in name:
                return peak, f"data sheet, {name}, bf16 without sparsity"
    a = torch.rand(1024, 1024, device=device)
    best = 1e9
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024 ** 3 / best, "measured here, float32 product of 1024 x 1024"


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
    model = AllInOne(config).to(device).eval()
    size = config.image_size
    video = torch.randint(256, (batch, config.frames, 3, size, size), device=device).byte()
    ids = torch.randint(config.vocab_size, (batch, config.max_text_len), device=device)
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    clips, start = 0, None
    while start is None or time.perf_counter() - start < seconds:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            model(video, ids).pooled.sum().item()              # .item() waits for the device
        if start is None:                                      # the first pass warms up
            start = time.perf_counter()
        else:
            clips += batch
    return clips / (time.perf_counter() - start)


TABLE_1 = {"Ti": (12, 745), "S": (33, 285), "B": (110, 89)}    # M parameters, videos/s (Tab. 1)


def profile(config: dict, device: torch.device, batch: int, seconds: float) -> None:
    """`--task profile`: what each variant costs, beside Tab. 1; then B's rows of Tab. 8a and 9."""
    base = Config(**config)
    print(f"Multiply-adds of one clip ({base.frames} frames of {base.image_size} px, "
          f"{base.max_text_len} text tokens); what the paper calls FLOPs\nare multiply-adds (about "
          "58 G for B in Fig. 1c). Tab. 1 counts parameters without the MLM and VTC heads\n"
          "(the release with MLM's: Ti 17.4, S 45.5, B 133.9 M).\n"
          f"Throughput: joint pass, batch {batch}, on {device.type} "
          f"({torch.get_num_threads()} threads).\n")
    columns = ("params M", "all heads", "joint G", "attention G", "video G", "text G", "clips/s",
               "paper M", "paper clips/s")
    print(" " * 16 + "".join(f"{name:>{len(name) + 2}}" for name in columns))
    rows = [(name, dict(VARIANTS[name])) for name in VARIANTS]
    rows += [(f"B {name}", dict(VARIANTS["B"], temporal=name)) for name in CHOICES["temporal"][1:]]
    for name, sizes in rows:
        c = Config(**{**config, **sizes})
        with torch.device("meta"):
            model = AllInOne(c)
        macs = {k: v / 1e9 for k, v in count_macs(c).items()}
        paper = TABLE_1.get(name, {"B timesformer": (180.5, "-"), "B decoupled": (192, "-")}.get(
            name, ("-", "-")))
        speed = measure_throughput(c, device, batch, seconds) if seconds else float("nan")
        cells = [count_parameters(model, heads=False) / 1e6, count_parameters(model) / 1e6,
                 macs["joint"], macs["attention"], macs["video"], macs["text"], speed, *paper]
        print(f"{name:<16}" + "".join(
            f"{cell if isinstance(cell, (str, int)) else format(cell, '.1f'):>{len(column) + 2}}"
            for cell, column in zip(cells, columns)))
    rolling, flat = (count_macs(Config(**{**config, **VARIANTS["B"], "temporal": name}))
                     for name in ("token_rolling", "flatten"))
    print(f"\nFlatten (Sec. 3.2): {flat['attention'] / rolling['attention']:.1f} times rolling's "
          f"attention products, {flat['joint'] / rolling['joint']:.2f} times its total: rolling "
          "pays for\nthe text once a frame, flatten once a clip.")


def training_batch(config: Config, batch: int, device: torch.device) -> dict:
    """A batch as data.collate makes it: random pixels and full-length text, 6 words masked."""
    B, m, size = batch, config.max_text_len, config.image_size
    ids = torch.randint(config.vocab_size, (B, m), device=device)
    where = torch.rand(B, m, device=device).topk(min(6, m)).indices
    where = (where + m * torch.arange(B, device=device)[:, None]).flatten()
    return {"video": torch.randint(256, (B, config.frames, 3, size, size), device=device).byte(),
            "text_ids": ids, "text_mask": torch.ones_like(ids, dtype=torch.bool), "mlm_ids": ids,
            "mlm_where": where, "mlm_labels": ids.flatten()[where],
            "vtm_source": torch.arange(B, device=device).roll(1),
            "vtm_labels": torch.zeros(B, dtype=torch.int64, device=device)}


def plain_losses(model: AllInOne, batch: dict) -> dict:
    """VTM and MLM as written down at first: two joint passes over float clips, each of which embeds
    its video anew, and |V| logits at every position."""
    video = (batch["video"].float() / 255 - model.mean) / model.std
    logits = model.mlm_head(model(video, batch["mlm_ids"], batch["text_mask"]).text)
    labels = torch.full_like(batch["text_ids"], -100).flatten()
    labels[batch["mlm_where"]] = batch["mlm_labels"]
    pooled = model(video[batch["vtm_source"]], batch["text_ids"], batch["text_mask"]).pooled
    return {"mlm": mlm_loss(logits.flatten(0, 1), labels) / len(batch["mlm_labels"]),
            "vtm": vtm_loss(model.vtm_head(pooled), batch["vtm_labels"])}


def profile_training(config: Config, device: torch.device, size: int, seconds: float,
                     compile: bool) -> None:
    """`--task profile --train`: a step of pre-training (VTM and MLM, forward, backward, AdamW).

    Prints clips/s, MFU, peak memory (with the weights of both), and the ratio to the plain step:
    plain_losses and an unfused AdamW. Both take turns on one batch of `size` clips; medians of
    elapsed time on a GPU. On a CPU, of CPU time (others may use its cores), of which MFU would mean
    nothing.
    """
    from train import Objectives, compiled     # train.py imports this file
    cuda, (peak, basis) = device.type == "cuda", peak_flops(device)
    half = cuda and torch.cuda.is_bf16_supported()
    clock = time.perf_counter if cuda else time.process_time
    batch, words = training_batch(config, size, device), torch.tensor(6.0 * size, device=device)
    steps, flops = {}, 0
    for name in ("ours", "plain"):
        model = AllInOne(config).to(device).train()
        objectives = Objectives(model, ("vtm", "mlm"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                      fused=name == "ours", foreach=False)

        def step(model=model, objectives=objectives, optimizer=optimizer, name=name):
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                losses = (objectives(batch, words)[0] if name == "ours"
                          else plain_losses(model, batch))
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize()

        if name == "ours":
            with FlopCounterMode(display=False) as counter:
                step()
            flops = counter.get_total_flops()
            if compile:
                model.transform = compiled(model.transform, device)
        step()                                                 # warms up, compiles
        steps[name] = step
    times = {name: [] for name in steps}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times["plain"]) < 3:
        for name, step in steps.items():
            start = clock()
            step()
            times[name].append(clock() - start)
    ours, plain = (sorted(t)[len(t) // 2] for t in times.values())
    print(f"Training step, VTM and MLM: {size} clips of {config.frames} frames of "
          f"{config.image_size} px and {config.max_text_len} text tokens, "
          f"{'bf16' if half else 'float32'}{', compiled' if compile else ''}\n"
          f"{size / ours:.2f} clips/s; plain {size / plain:.2f} clips/s; ratio {plain / ours:.2f}")
    if cuda:
        print(f"MFU {flops / ours / peak:.1%} of {peak / 1e12:.3g} TFLOP/s ({basis}); "
              f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


# ---- Command line -------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Score or profile All-in-one.", allow_abbrev=False)
    add_flags(parser, EvalConfig, {"task": (*SCORES, "retrieval", "profile"), "variant": VARIANTS})
    add_flags(parser, Config, CHOICES)
    given = given_flags(parser, argv)
    fields = {field.name for field in dataclasses.fields(EvalConfig)}
    config = EvalConfig(**{k: v for k, v in given.items() if k in fields})
    sizes = {k: v for k, v in given.items() if k not in fields}
    if config.task == "profile":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if config.train:
            profile_training(Config(**{**VARIANTS[config.variant], **sizes}), device, config.batch,
                             config.seconds, config.compile)
        else:
            profile(sizes, device, config.batch, config.seconds)
        return
    if not config.data or not config.checkpoint:
        parser.error(f"--task {config.task} needs --data MANIFEST and --checkpoint FILE")
    if min(config.batch, config.clips) < 1:
        parser.error("--batch and --clips must be 1 or more")
    changes = [name for name in ("shuffle_frames", "reverse", "repeat_first")
               if getattr(config, name)]
    if len(changes) > 1:
        parser.error(f"--{' and --'.join(changes)}: one at a time")
    if config.rerank and config.task != "retrieval":
        parser.error("--rerank is for --task retrieval")
    rank, world, device = join_processes(torch.cuda.is_available())
    say = print if rank == 0 else lambda *_: None
    try:
        model, tokenizer, content = load_model(config.checkpoint, config.vocab, say, **sizes)
        check_head(config, model, content)
        if config.task == "retrieval" and "vtc" not in content.get("config", {}).get(
                "objectives", ()) and not config.rerank:
            raise ValueError(f"{config.checkpoint} was not trained with VTC, its cosines mean "
                             "nothing: fine-tune it (train.py --task retrieval), or give --rerank "
                             "the number of candidates to score by VTM")
        result = evaluate(model, tokenizer, config, device, content.get("answers"))
        report(result, config, model.config, say)
        if rank == 0:
            data = Path(config.data[0])
            how = [config.task, data.parent.name, data.stem, *changes]
            how += [f"{name}{value}" for name, value, plain in (
                ("clips", config.clips, 1), ("rerank", config.rerank, 0)) if value != plain]
            path = Path(config.predictions or
                        Path(config.checkpoint).parent / f"{'-'.join(how)}.predictions.jsonl")
            write_predictions(path, result["predictions"])
            say(f"per-sample predictions: {path}")
    finally:
        if world > 1:
            dist.destroy_process_group()


def check_head(config: EvalConfig, model: AllInOne, content: dict) -> None:
    """ValueError if an open-ended task is asked of a checkpoint that was not trained for it."""
    trained = {"paper": "qa", "release": "qa", "linear": "probe"}[model.config.answer_head]
    if config.task in ("qa", "probe") and (not content.get("answers") or trained != config.task):
        raise ValueError(f"{config.checkpoint} has no answers for --task {config.task}: fine-tune "
                         f"it with train.py --task {config.task} --init {config.checkpoint}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
