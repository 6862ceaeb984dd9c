"""Trains All-in-one: pre-training (Sec. 3.3) and every downstream task (Sec. 4.2), in one loop.

    python train.py --task pretrain                            # proof run: toy clips, two CPU cores
    torchrun --nproc_per_node=8 train.py --task pretrain --data webvid/train.jsonl   # the paper's

One process is a world of one: both lines run the same code. Every field of TrainConfig and of the
model's Config is a flag. Batches, dropout, masks and negatives are functions of (seed, step, rank):
a run that was killed and is started again by the same command ends with the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from allinone import (VARIANTS, AllInOne, Config, load_vit, mlm_loss, read_weights, vtc_loss,
                      vtm_loss, word_patch_alignment_loss, word_patch_transport)
from data import (Batches, Clips, DataError, Manifest, Tokenizer, answers_of, collate, load, mix,
                  texts_of, toy)
from eval import (SCORES, EvalConfig, add_flags, checkpoint_model, cls_features, count_right,
                  evaluate, given_flags, joined_processes, report, save_curves, save_picture,
                  score_options, score_pretraining)


@dataclass(frozen=True)
class TrainConfig:
    """How to train; defaults are pre-training's of Sec. 4.1.2, TASKS and PROOF say what differs."""

    task: Literal["pretrain", "retrieval", "choice", "qa", "probe"] = "pretrain"  # Sec. 3.3, 4.2
    data: tuple[str, ...] = ()            # manifests to train on; none: the proof run's toy clips;
    #                                       synthetic: made-up clips, to measure speed
    out: str = ""                         # run folder; none: runs/TASK
    init: str = "scratch"                 # or ViT, DeiT (Sec. 3.1), our or released weights
    batch: int = 0                        # clips a step on all GPUs; 0: batch_per_gpu on each
    batch_per_gpu: int = 16               # clips in one forward pass at most (Sec. 4.1.2; Ti: 32)
    steps: int = 200_000                  # optimiser steps (Sec. 4.1.2); Ti: 100000
    epochs: int = 0                       # passes over the data; 0: count by steps
    lr: float = 1e-4                      # peak (Sec. 4.1.2)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # paper: fp16 [28]; auto: bf16 on
    #                                       GPUs, which needs no loss scaling, else fp32
    workers: int = 8                      # reading processes for each GPU; 0: none, unprotected
    val: tuple[str, ...] = ()             # manifests scored after training
    val_every: int = 0                    # steps; also scored then, and the best kept as best.pt
    mix: tuple[float, ...] = ()           # share of each manifest; none: in proportion to lines
    columns: tuple[str, ...] = ()         # of a .csv or .tsv: video=NAME text=NAME
    vocab: str = "bert-base-uncased"      # or vocab.txt, tokenizer.json, train (from captions)
    objectives: tuple[str, ...] = ("vtm", "mlm")   # Sec. 3.3; those of a task: OBJECTIVES
    false_texts: int = 15                 # captions that "rank" sets beside the true one (release)
    hard_negatives: bool = False          # ... the likest ones of the pass, by VTC
    head_lr: float = 1.0                  # times lr, for the answer head (release: 10)
    warmup: float = 0.1                   # share of the steps (Sec. 4.1.2); above 1: steps
    weight_decay: float = 1e-2            # Sec. 4.1.2; on matrices and tables only (release)
    beta2: float = 0.999                  # torch's; the paper is silent (release: 0.98)
    whole_word_masking: bool = False      # mask all pieces of a word together (release)
    squash: bool = False                  # frames resized to the square (Sec. 4.1.1), not cropped
    boxes: bool = True                    # VCR: draw the entities' regions (Tab. 5, "Mask")
    rand_augment: bool = False            # torchvision's RandAugment, 2 operations (release's name)
    flip: bool = False                    # horizontal, never where words say left or right
    compile: bool = False                 # torch.compile of the blocks
    freeze: tuple[str, ...] = ()          # parts that stay as they are: blocks.0 text_embeddings
    activation_checkpointing: bool = False  # recompute blocks in backward: L at 16 clips in 80 GB
    seed: int = 0                         # of everything that is random
    log_every: int = 50                   # steps
    save_every: int = 1000                # steps
    timeout: float = 120                  # seconds that a clip may take to read
    resume: bool = True                   # go on with what the run folder holds; no: set it aside


PAPER = {  # what each task changes of the defaults: Sec. 4.1.2, 4.2
    task: dict(objectives=objectives, **({} if task == "pretrain" else dict(epochs=20, batch=256)))
    for task, objectives in {"pretrain": ("vtm", "mlm"), "retrieval": ("vtc", "rank"),
                             "choice": ("choice",), "qa": ("qa",), "probe": ("probe",)}.items()}
PAPER["retrieval"] |= dict(batch_per_gpu=8)            # 16 captions for each clip
PAPER["probe"] |= dict(answer_head="linear", batch_per_gpu=256)

RELEASE = {  # --recipe release: what the authors' code does and the paper does not say
    task: dict(beta2=0.98, roll="release", roll_unimodal=False, patch_order="random", **more)
    for task, more in {
        "pretrain": dict(objectives=("vtm", "mlm", "wpa"), whole_word_masking=True, warmup=2500,
                         batch=4096),
        "retrieval": dict(batch=1024, epochs=200, lr=3e-4),        # DiDeMo: lr 6e-4, 80 tokens
        "choice": dict(batch=256, epochs=20),                      # LSMDC: lr 1e-5; VCR: 200
        "qa": dict(batch=512, epochs=20, answer_head="release", head_lr=10.0),
        "probe": dict(batch=256, epochs=50, lr=3e-4)}.items()}     # HMDB51: lr 1e-4

PROOF = dict(  # no --data: toy clips and a model for two CPU cores; order comes from rolling alone
    variant="nano", image_size=48, temporal_position=False, dropout=0.0, drop_path=0.0, epochs=0,
    vocab="train", steps=2400, batch=16, lr=1e-3, workers=1, save_every=200)
TUNED = dict(init="runs/pretrain/checkpoint.pt", batch_per_gpu=16)
TOY = {  # what fine-tuning on toy clips changes of PROOF
    "pretrain": dict(), "retrieval": dict(steps=300, false_texts=5, **TUNED),
    "choice": dict(steps=200, **TUNED), "qa": dict(steps=200, **TUNED),
    "probe": dict(steps=600, **TUNED)}

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

OBJECTIVES = {  # objective: tasks that it is of, and the heads that it trains
    "vtm": (("pretrain",), ("pooler", "vtm_head")), "mlm": (("pretrain",), ("mlm_head",)),
    "vtc": (("pretrain", "retrieval"), ("text_proj", "video_proj")), "wpa": (("pretrain",), ()),
    "rank": (("retrieval",), ("pooler", "vtm_head")),  # VTM as a ranking of captions (release)
    "choice": (("choice",), ("pooler", "vtm_head")), "qa": (("qa",), ("pooler", "answer_head")),
    "probe": (("probe",), ("answer_head",))}
WEIGHTS = {"wpa": 0.1}                    # release; every other term counts once


# ---- Objectives (Sec. 3.3, Sec. 4.2) on one pass -------------------------------------------------

class Objectives(nn.Module):
    """The losses of a task on one pass, one forward call for DDP's sake.

    batch -> {objective: (sum of its losses, how many)} and {"NAME_accuracy": (right, of)}, of
    tensors; who sums over passes and processes divides.
    """

    def __init__(self, model: AllInOne, objectives: tuple[str, ...], hard_negatives: int = 0):
        super().__init__()
        self.model, self.objectives, self.hard_negatives = model, objectives, hard_negatives
        if "probe" in objectives:                              # Tab. 12: nothing else moves
            model.requires_grad_(False)
            model.answer_head.requires_grad_(True)
        trained = {head for name in objectives for head in OBJECTIVES[name][1]}
        for _, heads in OBJECTIVES.values():                   # DDP waits for no other gradient
            for head in set(heads) - trained:
                if hasattr(model, head):
                    getattr(model, head).requires_grad_(False)

    def forward(self, batch: dict) -> dict[str, tuple]:
        parts = {}
        if "vtc" in self.objectives:           # first, so that contrast() can repeat its dropout
            text, video = self.unimodal(batch)
            loss = (feed_back(text, video, *batch["contrast"]) if "contrast" in batch
                    else vtc_loss(gather(text), gather(video)))
            parts["vtc"] = loss * len(text), torch.tensor(len(text))
            if self.hard_negatives:
                batch = hard_options(batch, text, video, self.hard_negatives)
        if "mlm" in self.objectives or "vtm" in self.objectives:
            parts |= self.joint(batch)
        for name in self.objectives:
            if name in ("rank", *SCORES):
                scores = SCORES.get(name, score_options)(self.model, batch)   # (B, candidates)
                labels = batch["label"]            # -1: an answer that is no class teaches nothing
                loss = F.cross_entropy(scores, labels, ignore_index=-1, reduction="sum")
                parts[name] = loss, torch.tensor(len(labels))
                parts[f"{name}_accuracy"] = count_right(scores, labels)
        return parts

    def joint(self, batch: dict) -> dict[str, tuple]:
        """VTM and MLM (Sec. 3.3), and the release's word-patch alignment."""
        words, matched, (text, video) = score_pretraining(self.model, batch, self.objectives)
        parts, B = {}, torch.tensor(len(batch["text_ids"]))
        if "mlm" in self.objectives:
            parts["mlm_accuracy"] = count_right(words, batch["mlm_labels"])
            parts["mlm"] = mlm_loss(words, batch["mlm_labels"]), parts["mlm_accuracy"][1]
        if "vtm" in self.objectives:
            parts["vtm_accuracy"] = count_right(matched, batch["vtm_labels"])
            parts["vtm"] = vtm_loss(matched, batch["vtm_labels"]) * B, B
        if "wpa" in self.objectives:
            distance, _ = word_patch_transport(text, video[:, self.model.specials:],
                                               batch["text_mask"])
            parts["wpa"] = word_patch_alignment_loss(distance, batch["vtm_labels"]) * B, B
        return parts

    def unimodal(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Text and video, each alone, encoded and projected: both (B, vtc_dim)."""
        ids, mask = batch["text_ids"], batch["text_mask"]
        if ids.dim() == 3:                         # retrieval: the first is the clip's own caption
            ids, mask = ids[:, 0], mask[:, 0]
        text = self.model.encode_text(ids, mask)[:, 0]
        video = self.model.encode_video(batch["video"])[:, 0]
        return self.model.text_proj(text), self.model.video_proj(video)


def hard_options(batch: dict, text: Tensor, video: Tensor, k: int) -> dict:
    """The batch with, as options beside each clip's caption, the k likest others by VTC.

    text, video: (B, vtc_dim) projections. A caption of the same words is no option.
    """
    ids, mask = batch["text_ids"][:, 0], batch["text_mask"][:, 0]         # (B, m)
    alike = F.normalize(video.detach(), dim=-1) @ F.normalize(text.detach(), dim=-1).T
    same = (ids[:, None] == ids).all(-1)                                  # (B, B), the diagonal too
    best = alike.float().masked_fill(same, -torch.inf).topk(min(k, len(ids)), 1)
    own = torch.arange(len(ids), device=ids.device)[:, None]
    chosen = torch.cat([own, best.indices], 1)                            # (B, 1+k)
    present = F.pad(best.values > -torch.inf, (1, 0), value=True)
    return batch | {"text_ids": ids[chosen], "text_mask": mask[chosen], "option_mask": present}


def gather(features: Tensor) -> Tensor:
    """Rows of all W processes, with gradients (VTC's negatives): (B, .) -> (W*B, .).

    Each process computes the whole loss and hands its own rows' gradient back, times W, for DDP
    divides by W.
    """
    rows = [torch.empty_like(features) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, features.detach().contiguous())
    rows[dist.get_rank()] = own = features.view_as(features)
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * len(rows))
    return torch.cat(rows)


@torch.no_grad()
def contrast(objectives: Objectives, batches: list[dict], seeds: list[int]) -> list[tuple]:
    """VTC among all passes of a step, as GradCache does (Gao et al. 2021, arXiv:2101.06983).

    A first pass without gradient encodes every pass; only the features are kept. For each pass
    returns (loss, gradient of its text features, of its video features), which feed_back takes in
    the second pass; `seeds` make both draw the same dropout.
    """
    pairs = []
    for batch, seed in zip(batches, seeds):
        torch.manual_seed(seed)
        pairs.append(objectives.unimodal(batch))
    with torch.enable_grad():
        text, video = (torch.cat(side).float().requires_grad_() for side in zip(*pairs))
        loss = vtc_loss(gather(text), gather(video))
        # times the passes: every loss is divided by their number
        gradients = torch.autograd.grad(loss * len(batches), (text, video))
    sizes = [len(text) for text, _ in pairs]
    return [(loss.detach(), *parts) for parts in zip(*(g.split(sizes) for g in gradients))]


def feed_back(text: Tensor, video: Tensor, loss: Tensor, text_grad: Tensor,
              video_grad: Tensor) -> Tensor:
    """`loss`, through which the features (B, vtc_dim) get the gradients that contrast() found."""
    fed = (text.float() * text_grad).sum() + (video.float() * video_grad).sum()
    return loss + (fed - fed.detach())


# ---- Configuration ------------------------------------------------------------------------------

def configure(argv: list[str] | None = None) -> tuple[TrainConfig, dict, dict]:
    """(how to train, the fields of a new model's Config, those of them that were asked for)."""
    parser = argparse.ArgumentParser(
        description="Pre-train or fine-tune All-in-one. Without --data: the proof run.",
        allow_abbrev=False)
    first = parser.add_argument_group("what people use")
    first.add_argument("--variant", choices=VARIANTS, default=argparse.SUPPRESS,
                       help="width, depth, heads of Tab. 1 (default: B)")
    first.add_argument("--recipe", choices=("paper", "release"), default="paper",
                       help="release: the authors' unmentioned choices, together")
    people_use = list(TrainConfig.__dataclass_fields__)[:11]         # task to workers
    add_flags(first, TrainConfig, only=people_use)
    add_flags(first, Config, only=("frames",))
    add_flags(parser.add_argument_group("training"), TrainConfig, without=people_use)
    add_flags(parser.add_argument_group("model"), Config, without=("frames",))
    flags = given_flags(parser, argv)
    task, fields = flags.get("task", "pretrain"), Config.__dataclass_fields__
    asked = PAPER[task] | (RELEASE[task] if flags.pop("recipe") == "release" else {})
    proof = {} if flags.get("data") else PROOF | TOY[task]
    if "steps" in flags and "epochs" not in flags:
        flags["epochs"] = 0
    values = asked | proof | flags                                  # the last one wins
    values = VARIANTS[values.pop("variant", "B")] | values          # but for these sizes
    config = TrainConfig(**{k: v for k, v in values.items() if k not in fields})
    check_flags(config, "variant" in flags)
    return (replace(config, out=config.out or f"runs/{task}"),
            {k: v for k, v in values.items() if k in fields},
            {k: v for k, v in (asked | flags).items() if k in fields})


def check_flags(config: TrainConfig, variant: bool) -> None:
    """DataError for flags that do not go together."""
    of_task = [name for name, (tasks, _) in OBJECTIVES.items() if config.task in tasks]
    if unknown := [name for name in config.objectives if name not in of_task]:
        raise DataError(f"--objectives {unknown[0]}: those of --task {config.task} are "
                        f"{', '.join(of_task)}")
    if config.hard_negatives and not {"vtc", "rank"} <= set(config.objectives):
        raise DataError("--hard_negatives needs --objectives vtc rank: VTC finds them for ranking")
    if config.val_every and any(
            Path(path).name.split(".")[0].endswith("test") for path in config.val):
        raise DataError(f"--val_every would choose the best checkpoint on {', '.join(config.val)}: "
                        "give the validation split, and score the test split once, with eval.py")
    if "wpa" in config.objectives and "vtm" not in config.objectives:
        raise DataError("--objectives wpa needs vtm too: it takes VTM's matched and other pairs")
    if min(config.batch_per_gpu, config.log_every, config.save_every, config.steps) < 1:
        raise DataError("--batch_per_gpu, --steps, --log_every and --save_every must be 1 or more")
    if variant and kind_of_weights(config.init) not in ("scratch", "vit"):
        raise DataError(f"--variant: the sizes are those of {config.init}; leave it out")
    if config.compile and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise DataError("--compile: torch cannot compile without a C++ compiler (apt install g++); "
                        "install one, or leave --compile out")


def split_batch(config: TrainConfig, world: int) -> tuple[int, int, int]:
    """(clips a step, clips a pass, passes a step): batch = world * pass * accumulate.

    A pass is as large as fits, of whole groups of 8 clips if that can be (VTM draws its pairs
    within 8). DataError where VTM would be left with one clip, which has no mismatched partner.
    """
    batch = config.batch or config.batch_per_gpu * world
    if batch % world:
        raise DataError(f"--batch {batch} does not divide among {world} processes: use a multiple")
    share = batch // world
    sizes = [n for n in range(1, min(share, config.batch_per_gpu) + 1) if share % n == 0]
    size = max(sizes, key=lambda n: (n % 8 == 0, n))
    if size < 2 and "vtm" in config.objectives:
        raise DataError(f"--batch {batch} on {world} processes makes passes of {size} clip, and "
                        "VTM needs another clip in each to mismatch with; take a --batch and "
                        "--batch_per_gpu that are multiples of 8")
    return batch, size, share // size


def lr_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Sec. 4.1.2: linear warm-up over `warmup` (a share, or steps if above 1), then linear to 0.

    step counts from 0; `steps` itself would get 0.
    """
    rise = max(1, round(warmup * steps if warmup <= 1 else warmup))
    return peak * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def kind_of_weights(path: str, content: dict | None = None) -> str:
    """What --init names: "scratch", "ours" (train.py's), "release" or "vit" (timm, DeiT)."""
    if path == "scratch":
        return path
    content = content or read_weights(path)
    words = any("text_embeddings" in name for name in content.get("state_dict", content))
    return "ours" if "sizes" in content else "release" if words else "vit"


# ---- The run: its folder, log and checkpoint -----------------------------------------------------

FREE = {"out", "val", "val_every", "workers", "log_every", "save_every", "resume", "timeout"}
#        ... change no number of a run that goes on; these do, on purpose, from then on:
ON_PURPOSE = {"lr", "steps", "batch_per_gpu"}


class Run:
    """A run folder: lock, log.jsonl, checkpoint.pt and the one before it, checkpoint.previous.pt.

    state: what a checkpoint holds beside weights: {"step", "sets": [[clips read, unreadable], ...]
    by manifest, "window": sums since the last line of the log}. Only the first process writes.
    """

    def __init__(self, config: TrainConfig, say):
        self.config, self.say, self.folder = config, say, Path(config.out)
        self.state, self.content, self.lock = {"step": 0, "window": {}}, None, None
        self.since, self.waited, self.flops = time.monotonic(), 0.0, 0
        self.first, self.parent = dist.get_rank() == 0, os.getppid()
        self.stopping, self.peak = [], (1.0, "")
        if self.first:
            self.take_folder()
        box = [self.content]
        dist.broadcast_object_list(box)
        self.content = box[0]

    def take_folder(self) -> None:
        """Locks the folder, and reads the checkpoint in it. DataError if another run holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "a")             # the kernel frees it when we end
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{self.folder}: another process is training into it; wait for it, "
                            "stop it, or choose another --out") from None
        names = ("checkpoint.pt", "checkpoint.previous.pt")
        if not self.config.resume:
            for name in (*names, "log.jsonl", "best.pt"):
                if (self.folder / name).exists():
                    (self.folder / name).replace(self.folder / f"{name}.aside")
        present = [self.folder / name for name in names if (self.folder / name).exists()]
        for path in present:
            try:
                self.content = read_weights(path)
                break
            except ValueError as error:
                self.say(f"{error}; trying the checkpoint before it")
                path.replace(path.with_suffix(".damaged"))
        if present and self.content is None:
            raise DataError(f"no checkpoint in {self.folder} can be read, they are set aside as "
                            "*.damaged: choose another --out, or give the command again to begin "
                            "anew")
        if present and "config" not in self.content:
            raise DataError(f"{present[0]} is no checkpoint of train.py: choose another --out")

    def resume(self, description: dict, model: AllInOne, optimizer, scaler) -> None:
        """Takes up the checkpoint's weights and state if it is of this same run; opens the log.

        Raises DataError, naming the differing fields, if the folder holds another run.
        """
        self.description = json.loads(json.dumps(description))      # tuples as in a checkpoint
        self.state["sets"] = [[0, 0] for _ in description["data"]]
        self.parts = (model, optimizer, scaler)
        if self.content:
            self.compare()
            for part, name in zip(self.parts, ("model", "optimizer", "scaler")):
                part.load_state_dict(self.content[name])
            self.state, self.content = self.content["state"], None
            self.say(f"resuming {self.folder} at step {self.state['step']}")
        if self.first:
            self.open_log()

    def compare(self) -> None:
        """DataError if the checkpoint is of another run; says what is changed on purpose."""
        step, before = self.state["step"], self.content
        said = {**before["config"], "data": before["data"], "steps": before["steps"]}
        now = {**self.description["config"], "data": self.description["data"],
               "steps": self.description["steps"]}
        differ = [key for key in now if said.get(key) != now[key] and key not in FREE]
        changed = [key for key in differ if key in ON_PURPOSE]
        if len(now["data"]) > 1 and "batch_per_gpu" in changed:
            changed.remove("batch_per_gpu")                # which pass reads which manifest
        if other := [f"{key} was {said.get(key)}, now {now[key]}" for key in differ
                     if key not in changed]:
            raise DataError(f"{self.folder} holds another run ({'; '.join(other[:5])}): "
                            "choose another --out, or --no-resume to set it aside")
        step = before["state"]["step"]
        for key in changed:
            self.say(f"{key} was {said[key]}; from step {step + 1} on it is {now[key]}")

    def open_log(self) -> None:
        """log.jsonl, cut back to the checkpoint's step: what came after it will be done again."""
        path, kept = self.folder / "log.jsonl", [json.dumps(self.description)]
        for line in path.read_bytes().splitlines()[1:] if path.exists() else []:
            try:
                entry = json.loads(line)
                whole = isinstance(entry, dict) and entry["step"] <= self.state["step"]
            except (ValueError, KeyError, TypeError):      # a kill in the middle of a line, damage
                continue
            if whole and self.state["step"]:
                kept.append(json.dumps(entry))
        beside = path.with_suffix(".partial")
        beside.write_text("\n".join(kept) + "\n")
        beside.replace(path)
        self.log_file = open(path, "a", buffering=1)

    def save(self, name: str = "checkpoint.pt") -> None:
        """Writes beside and renames: at every moment a whole checkpoint, new or old, is there."""
        if not self.first:
            return
        path, before = self.folder / name, self.folder / "checkpoint.previous.pt"
        beside = path.with_suffix(".partial")
        model, optimizer, scaler = self.parts
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                   "scaler": scaler.state_dict(), "state": self.state, **self.description}
        try:
            with open(beside, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            if name == "checkpoint.pt" and path.exists():
                path.replace(before)
            beside.replace(path)
            lines = map(json.loads, (self.folder / "log.jsonl").read_text().splitlines())
            save_curves(self.folder / "curve.png", [line for line in lines if "lr" in line])
        except (OSError, RuntimeError) as error:
            beside.unlink(missing_ok=True)
            raise OSError(f"{path}: cannot save ({error}){self.last_good()}") from error

    def last_good(self) -> str:
        """Which checkpoint a stopped run can go on from, for its last words."""
        path = self.folder / "checkpoint.pt"
        return f"; {path} is whole" if path.exists() else "; no checkpoint was written yet"

    def note(self, **what) -> None:
        """Writes an object of its own into log.jsonl (unreadable clips, results)."""
        if self.first:
            self.log_file.write(json.dumps({"step": self.state["step"], **what}) + "\n")

    def due(self, every: int) -> bool:
        return every > 0 and self.state["step"] % every == 0

    def next_passes(self, stream, count: int) -> list[dict]:
        """The next passes of the stream; the time this takes is waiting for data."""
        start = time.monotonic()
        passes = [next(stream) for _ in range(count)]
        self.waited += time.monotonic() - start
        return passes

    def stop_asked(self) -> bool:
        """Whether SIGTERM came, or torchrun, which started us, is gone."""
        orphan = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent
        return bool(self.stopping) or orphan

    def log(self, parts: dict, norm: float, lr: float, batch: int, steps: int, device) -> None:
        """One step's sums into the window; every log_every steps and at the last, a line.

        parts: {name: [[sum, of] for each manifest]}. A line says step, lr, losses and accuracies
        (means since the last line; by manifest if there are several), gradient norm, clips/s, MFU,
        share of time spent waiting for data, memory, unreadable clips so far, seconds left.
        """
        state, window = self.state, self.state["window"]
        state["step"] += 1
        for counts, (read, failed) in zip(state["sets"], parts.pop("clips")):
            counts[0] += int(read)
            counts[1] += int(failed)
        for name, sums in {**parts, "grad_norm": [[norm, 1]]}.items():
            if math.isfinite(sum(s for s, _ in sums)):      # fp16: an overflow is no step
                kept = window.setdefault(name, [[0.0, 0.0] for _ in sums])
                window[name] = [[a + s, b + of] for (a, b), (s, of) in zip(kept, sums)]
        window["steps"] = window.get("steps", 0) + 1
        if not self.due(self.config.log_every) and state["step"] != steps:
            return
        n = window.pop("steps")
        record = {"step": state["step"], "lr": lr} | {
            name: sum(s for s, _ in sums) / (sum(of for _, of in sums) or 1)
            for name, sums in window.items()}
        if len(state["sets"]) > 1:
            record["sets"] = {str(data[0]): {"clips": counts[0], "unreadable": counts[1], **{
                name: sums[k][0] / sums[k][1] for name, sums in window.items()
                if len(sums) > 1 and sums[k][1]}} for k, (data, counts) in enumerate(
                    zip(self.description["data"], state["sets"]))}
        window.clear()
        seconds = time.monotonic() - self.since
        memory = (torch.cuda.max_memory_allocated() if device.type == "cuda"
                  else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        record |= {"clips_per_s": n * batch / seconds,
                   "mfu": n * self.flops / seconds / self.peak[0],
                   "data_wait": self.waited / seconds, "memory_gb": memory / 1e9,
                   "unreadable": sum(failed for _, failed in state["sets"]),
                   "eta_s": (steps - state["step"]) * seconds / n}
        self.since, self.waited = time.monotonic(), 0.0
        if self.first:
            self.log_file.write(json.dumps(record) + "\n")
            line = f"step {state['step']}/{steps}  " + "  ".join(
                f"{k} {v:.3g}" for k, v in record.items() if k not in ("step", "sets", "eta_s"))
            tty = sys.stdout.isatty()
            print(f"\r\033[K{line}  {record['eta_s'] / 60:.1f} min left" if tty else line,
                  end="" if tty and state["step"] != steps else "\n", flush=True)


def commit() -> str:
    """The git commit of this code, "" where there is none."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True,
                              capture_output=True).stdout.strip()
    except FileNotFoundError:
        return ""


# bf16 without sparsity, from the data sheets
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def peak_flops(device: torch.device) -> tuple[float, str]:
    """(FLOP/s, where from): the data sheet's for known GPUs, else measured by a matrix product."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for key, peak in PEAKS.items():
        if key in name:
            return peak, f"data sheet, {name}, bf16 without sparsity"
    a, best = torch.rand(1024, 1024, device=device), 1e9
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024 ** 3 / best, "measured here, float32 product of 1024 x 1024"


# ---- Set-up --------------------------------------------------------------------------------------

def with_toy_clips(config: TrainConfig, say) -> TrainConfig:
    """The configuration with the toy clips as its data, which the first process writes once."""
    say("Proof run: toy clips, a model for two CPU cores. Your own: --data MANIFEST (README).")
    if dist.get_rank() == 0:
        toy()
    dist.barrier()
    split = "val" if config.val_every else "test"              # never choose on the test split
    learn, *score = {"pretrain": ("", "", "choice_")}.get(config.task, 2 * (f"{config.task}_",))
    return replace(config, data=(f"data/toy/{learn}train.jsonl",),
                   val=config.val or tuple(f"data/toy/{name}{split}.jsonl" for name in score))


class Synthetic(Clips):
    """--data synthetic: made-up clips of the model's size and full-length captions."""

    def read_video(self, sample):
        size = self.image_size
        return torch.randint(256, (self.frames, 3, size, size), dtype=torch.uint8)


def open_data(config: TrainConfig) -> Manifest:
    if config.data != ("synthetic",):
        return Manifest(config.data, config.columns)
    path = Path(config.out) / "synthetic.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"video": f"{i}.mp4", "text": f"{i} " + "word " * 99}) + "\n"
                            for i in range(1000)))
    return Manifest(path)


def build(config: TrainConfig, sizes: dict, asked: dict, manifest: Manifest, run: Run):
    """(model, tokenizer, answers): of the run's own checkpoint, else by --init.

    sizes: Config's fields for a new model; asked: those asked for, laid over a checkpoint's.
    """
    torch.manual_seed(config.seed)
    answers = answers_of(config.data) if config.task in ("qa", "probe") else None
    if run.content:
        if answers and answers != run.content["answers"]:
            run.say("the answers of the data have changed; those of the checkpoint count")
        return checkpoint_model(run.content, run.folder)
    content = None if config.init == "scratch" else read_weights(config.init)
    kind = kind_of_weights(config.init, content)
    if kind in ("ours", "release"):
        head = {"answer_head": sizes.get("answer_head", Config.answer_head)}   # not a checkpoint's
        model, tokenizer, _ = checkpoint_model(content, config.init, config.vocab, run.say,
                                               answers or [], **{**asked, **head})
        return model, tokenizer, answers
    texts = (text for i in range(len(manifest)) for text in texts_of(manifest[i]))
    tokenizer = (Tokenizer.train(texts, 30522) if config.vocab == "train"
                 else Tokenizer.load(config.vocab))
    model = AllInOne(Config(**{**sizes, "vocab_size": tokenizer.vocab_size,
                               "answers": len(answers or [])}))
    if kind == "vit":
        loaded = load_vit(model, config.init, content)
        run.say(f"{config.init}: {len(loaded['loaded'])} tensors loaded, "
                f"{', '.join(loaded['resized']) or 'none'} resized; the rest starts at random")
    return model, tokenizer, answers


def freeze(model: AllInOne, parts: tuple[str, ...]) -> None:
    """Excludes the parameters of the named modules from training: "blocks.0", "patch_embed".

    Raises DataError for a name that the model does not have.
    """
    for part in parts:
        named = [p for name, p in model.named_parameters() if f"{name}.".startswith(f"{part}.")]
        if not named:
            names = dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters())
            raise DataError(f"--freeze {part}: no such part; there are {', '.join(names)}, and "
                            f"blocks.0 to blocks.{model.config.depth - 1}")
        for parameter in named:
            parameter.requires_grad_(False)


def adamw(model: AllInOne, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW [27] over what is trained; its groups differ in weight decay and in lr's "factor"."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            factor = config.head_lr if name.startswith("answer_head.") else 1.0
            groups.setdefault((factor, config.weight_decay if p.ndim > 1 else 0.0), []).append(p)
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay, "factor": factor}
         for (factor, decay), params in groups.items()],
        lr=config.lr, betas=(0.9, config.beta2), fused=True)


def validation(config: TrainConfig, model: AllInOne, tokenizer: Tokenizer, answers) -> list:
    """How to score each manifest of --val; DataError before the first step if one does not fit."""
    scorings = []
    for path in config.val:
        first = Manifest(path, config.columns)[0]
        task = config.task
        if task == "pretrain" and "options" in first:
            task = "choice"
        scoring = EvalConfig(task=task, data=(path,), batch=32, workers=config.workers,
                             squash=config.squash, boxes=config.boxes, columns=config.columns,
                             rerank=10 ** 9 if config.objectives == ("rank",) else 0)
        scoring.clips_of(model, tokenizer, answers).read_words(first)
        scorings.append(scoring)
    return scorings


def one_ahead(passes):
    """The same passes, each put together (and pinned) while the one before it is trained on."""
    def following():
        batch = next(passes, None)
        return batch and {k: v.pin_memory() if isinstance(v, Tensor) and torch.cuda.is_available()
                          else v for k, v in batch.items()}

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(following)
        while batch := coming.result():
            coming = thread.submit(following)
            yield batch


# ---- The loop -----------------------------------------------------------------------------------

class Trainer:
    """One run: what the loop's lines do, in the order in which they do it."""

    def __init__(self, config: TrainConfig, sizes: dict, asked: dict, device, say):
        if not config.data:
            config = with_toy_clips(config, say)
        self.run = run = Run(config, say)
        self.config, self.device, self.rank, self.world = (
            config, device, dist.get_rank(), dist.get_world_size())
        manifest = open_data(config)
        model, self.tokenizer, self.answers = build(config, sizes, asked, manifest, run)
        self.model, c = model.to(device), model.config
        model.recompute = config.activation_checkpointing
        self.scorings = validation(config, model, self.tokenizer, self.answers)
        self.batch, self.size, self.passes = split_batch(config, self.world)
        kind = Synthetic if config.data == ("synthetic",) else Clips
        self.clips = kind(
            manifest, self.tokenizer, config.task, c.frames, c.image_size, c.max_text_len,
            train=config.task != "probe", seed=config.seed, flip=config.flip,
            squash=config.squash, boxes=config.boxes, rand_augment=config.rand_augment,
            whole_word_masking=config.whole_word_masking, answers=self.answers,
            false_texts=0 if config.hard_negatives or "rank" not in config.objectives
            else config.false_texts)
        self.lost = []
        if config.task == "probe":
            self.clips, self.lost = cls_features(
                model, self.clips, Path(config.out) / "features.pt", config, device, say)
        self.steps = config.steps if not config.epochs else config.epochs * math.ceil(
            len(self.clips) / self.batch)
        self.objectives = Objectives(
            model, config.objectives, config.false_texts if config.hard_negatives else 0)
        freeze(model, config.freeze)
        self.optimizer = adamw(model, config)
        name = config.precision if config.precision != "auto" else (
            "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32")
        self.dtype = PRECISIONS[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        run.resume({"config": {**asdict(config), **asdict(c), "batch": self.batch},
                    "steps": self.steps, "data": manifest.contents(), "torch": torch.__version__,
                    "commit": commit(), "sizes": asdict(c), "tokenizer": self.tokenizer.to_json(),
                    "answers": self.answers}, model, self.optimizer, self.scaler)
        if config.compile:
            # the second text length met makes torch take it as a variable, then nothing is
            # compiled again
            model.transform = torch.compile(model.transform, fullgraph=True)
        self.ddp = DistributedDataParallel(self.objectives, gradient_as_bucket_view=True)
        self.announce()

    def announce(self) -> None:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.run.peak = peak, basis = peak_flops(self.device)
        small = "; VTM draws its pairs within so few" if (
            "vtm" in self.config.objectives and self.size % 8) else ""
        self.run.say(
            f"{self.config.task}: {trained / 1e6:.1f} M trained parameters, {len(self.clips)} "
            f"samples, {self.steps} steps of {self.batch} clips, {self.passes} passes of "
            f"{self.size} each{small}, {str(self.dtype)[6:]}, on {self.world} x "
            f"{self.device.type}; MFU is of {peak / 1e12:.3g} TFLOP/s on each ({basis}); log and "
            f"checkpoint in {self.run.folder}")
        if self.lost and not self.run.state["step"]:
            self.run.state["sets"][0][1] += len(self.lost)
            self.run.note(unreadable=self.lost)

    def stream(self):
        """This process's passes from the run's step on (see data.Batches, data.load)."""
        sizes = self.clips.manifest.sizes if isinstance(self.clips, Clips) else [len(self.clips)]
        keys = Batches(sizes, self.batch, self.config.seed, self.rank, self.world,
                       self.run.state["step"], self.passes, self.steps, self.config.mix)
        if not isinstance(self.clips, Clips):
            return (torch.utils.data.default_collate([self.clips[i] for i, _ in key])
                    for key in keys)
        # VTM pairs are drawn within 8 (4, 2) neighbours: as many as make up a pass of any layout
        group = math.gcd(self.size, 8) if self.size % 2 == 0 else self.size
        passes = load(self.clips, keys, functools.partial(collate, clips=self.clips, group=group),
                      self.config.workers, self.config.timeout)
        return one_ahead(passes) if self.config.workers else passes

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def train(self) -> None:
        run, config, steps = self.run, self.config, self.steps
        passes = self.stream()
        for step in range(run.state["step"], steps):                   # where are we
            lr = self.set_lr(step)                                     # the learning rate
            micros = run.next_passes(passes, self.passes)              # which batch
            if step == 0:
                self.show(micros[0])
            sums = self.gradients(micros, step)                        # which losses
            parts, norm, stop, failures = self.agree(sums, micros)     # over all processes
            self.check_finite(parts, norm, step, micros)
            self.update(step)
            run.log(parts, norm, lr, self.batch, steps, self.device)   # one line
            self.check_unreadable(failures)
            if run.due(config.val_every) and run.state["step"] < steps:
                self.validate()
            if run.due(config.save_every) or run.state["step"] == steps or stop:
                run.save()
            if stop:
                run.say(f"\nstopped after step {step + 1}; the same command goes on from here")
                return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)                  # all is saved: stop at once
        self.validate()

    def show(self, batch: dict) -> None:
        """samples.png, what the model is fed: frames, text and masked text, matched or not."""
        if "video" not in batch or not self.run.first:
            return
        texts, rows = batch["text_ids"].flatten(0, -2), []
        source = batch.get("vtm_source", torch.arange(len(batch["video"])))
        for i, s in enumerate(source[:8].tolist()):
            words = [texts[i * (len(texts) // len(source))],           # the first of its options
                     *batch.get("mlm_ids", texts[:0])[i:i + 1]]
            said = " / ".join(" ".join(self.tokenizer.words.id_to_token(w) for w in ids.tolist()
                                       if w != self.tokenizer.pad_id) for ids in words)
            matched = "matched" if s == i else "not matched"
            rows.append((f"{matched}: {said}", list(batch["video"][s])))
        save_picture(self.run.folder / "samples.png", rows)

    def set_lr(self, step: int) -> float:
        lr = lr_at(step, self.steps, self.config.lr, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        return lr

    def gradients(self, micros: list[dict], step: int) -> dict[str, list]:
        """Forward and backward of this process's passes: sums {name: [(sum, of), ...] by pass}."""
        words = sum(int((m["mlm_labels"] >= 0).sum()) for m in micros if "mlm_labels" in m)
        words = torch.tensor(float(words), device=self.device)
        dist.all_reduce(words)
        totals = {"mlm": words.clamp(min=1)}                   # of others: clips of the step
        inputs = [{k: v.to(self.device, non_blocking=True) for k, v in micro.items()
                   if isinstance(v, Tensor)} for micro in micros]
        seeds = [mix(self.config.seed, step, self.rank, i) for i in range(len(inputs))]  # dropout's
        if len(inputs) > 1 and "vtc" in self.config.objectives:
            with self.autocast():
                found = contrast(self.objectives, inputs, seeds)
            inputs = [{**batch, "contrast": one} for batch, one in zip(inputs, found)]
        if not self.run.flops:
            self.run.flops = len(inputs) * self.count_flops(inputs[0])
        sums = {}
        for i, batch in enumerate(inputs):
            torch.manual_seed(seeds[i])
            last = i == len(inputs) - 1                                # DDP averages then only
            with contextlib.nullcontext() if last else self.ddp.no_sync():
                with self.autocast():
                    parts = self.ddp(batch)
                loss = sum(WEIGHTS.get(name, 1) * parts[name][0] * self.world
                           / totals.get(name, self.batch) for name in self.config.objectives)
                self.scaler.scale(loss).backward()
            parts["clips"] = len(micros[i]["where"]), len(micros[i].get("errors", ()))
            for name, pair in parts.items():
                sums.setdefault(name, []).append(pair)
        return sums

    def count_flops(self, batch: dict) -> int:
        """FLOPs of a pass and its backward, counted by torch on one that trains nothing."""
        with torch.compiler.set_stance("force_eager"), self.autocast(), FlopCounterMode(
                display=False) as counter:
            parts = self.objectives(batch)
            sum(parts[name][0] for name in self.config.objectives).backward()
        self.model.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    def agree(self, sums: dict, micros: list[dict]) -> tuple[dict, float, bool, list]:
        """Sums over processes, {name: [[sum, of] by manifest]}, gradient norm, whether to stop and
        what could not be read: the step's one wait for the device."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters()
                                        if p.grad is not None])
        sets = len(self.run.state["sets"])
        table = torch.zeros(len(sums), sets, 2, device=self.device)
        for i, pairs in enumerate(sums.values()):
            for micro, pair in zip(micros, pairs):
                which = int(micro["set"][0]) if sets > 1 else 0
                table[i, which] += torch.stack([
                    torch.as_tensor(x, device=self.device).detach().float() for x in pair])
        last = torch.tensor([0.0, self.run.stop_asked()], device=self.device)
        last[0] = norm / self.world
        numbers = torch.cat([table.flatten(), last])
        dist.all_reduce(numbers)
        *flat, norm, stop = numbers.tolist()
        table = torch.tensor(flat).view(table.shape).tolist()
        parts = dict(zip(sums, table))
        failures = [error for micro in micros for error in micro.get("errors", ())]
        if any(failed for _, failed in parts["clips"]):                # the log names them all
            everyone = [None] * self.world
            dist.all_gather_object(everyone, failures)
            failures = sum(everyone, [])
        return parts, norm, stop > 0, failures

    def check_finite(self, parts: dict, norm: float, step: int, micros: list[dict]) -> None:
        """Stops before a step that would ruin the weights, naming term, step and samples.

        With fp16 an overflown gradient is the loss scaler's business: it skips the step.
        """
        bad = [name for name, sums in parts.items() if not math.isfinite(sum(s for s, _ in sums))]
        if not self.scaler.is_enabled() and not math.isfinite(norm):
            bad.append("grad_norm")
        if bad:
            samples = [where for micro in micros for where in micro["where"]]
            raise ValueError(
                f"step {step}: {', '.join(bad)} not finite; stopped before the update"
                f"{self.run.last_good()}. This process's samples: {', '.join(samples)}. Lower "
                "--lr, or look at these clips")

    def update(self, step: int) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise ValueError(f"step {step}: gradients overflow fp16 at any scale; use bf16 or fp32")
        self.optimizer.zero_grad(set_to_none=True)

    def check_unreadable(self, failures: list[str]) -> None:
        """Training stops where more than 1 clip in 10 cannot be read, once 100 were tried."""
        if failures:
            self.run.note(unreadable=failures)
            self.lost = failures
        read, failed = (sum(counts) for counts in zip(*self.run.state["sets"]))
        if read + failed >= 100 and failed > (read + failed) / 10:
            raise ValueError(f"{failed} of {read + failed} clips cannot be read, above 1 in 10; the "
                             f"log names them, the last: {'; '.join(self.lost[-3:])}")

    def validate(self) -> None:
        """Scores --val; the best so far is kept where --val_every asks for choosing."""
        start, firsts = time.monotonic(), []
        fast = self.model.__dict__.pop("transform", None)      # compiled for training's shapes
        for scoring in self.scorings:
            result = evaluate(self.model, self.tokenizer, scoring, self.device, self.answers)
            table = report(result, scoring, self.model.config, self.run.say)
            self.run.note(data=scoring.data, result=table)
            firsts += [next(iter(p["metrics"].values())) for p in result["predictions"]]
        if fast:
            self.model.transform = fast
        self.model.train()
        self.run.since += time.monotonic() - start             # no part of the training's speed
        score = sum(firsts) / max(1, len(firsts))
        best = self.run.state.get("best", -math.inf)
        if self.scorings and self.config.val_every and score > best:
            self.run.state["best"] = score
            self.run.save("best.pt")


def main(argv: list[str] | None = None) -> None:
    config, sizes, asked = configure(argv)
    with joined_processes() as device:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        else:                                  # leave the reading processes their cores
            torch.set_num_threads(max(1, torch.get_num_threads() - config.workers))
        say = functools.partial(print, flush=True) if dist.get_rank() == 0 else lambda *_, **__: 0
        trainer = Trainer(config, sizes, asked, device, say)
        signal.signal(signal.SIGTERM, lambda *_: trainer.run.stopping.append(True))
        trainer.train()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
