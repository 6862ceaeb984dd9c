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
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
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
                  evaluate, given_flags, in_all_processes, joined_processes, report, save_curves,
                  save_picture, say, score_options, score_pretraining, text_embedding,
                  video_embedding)

# ---- Configuration ------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainConfig:
    """How to train; defaults are pre-training's of Sec. 4.1.2, TASKS and PROOF say what differs."""

    task: Literal["pretrain", "retrieval", "choice", "qa", "probe"] = "pretrain"  # Sec. 3.3, 4.2
    data: tuple[str, ...] = ()            # manifests to train on; none: the proof run's toy clips
    variant: Literal["nano", "Ti", "S", "B", "L"] = "B"   # width, depth, heads of Tab. 1
    recipe: Literal["paper", "release"] = "paper"   # release: the authors' unmentioned choices
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
    head_lr: float = 1.0                  # times lr, for the answer head (release: 10)
    warmup: float = 0.1                   # share of the steps (Sec. 4.1.2); above 1: steps
    weight_decay: float = 1e-2            # Sec. 4.1.2; on matrices and tables only (release)
    beta2: float = 0.999                  # torch's; the paper is silent (release: 0.98)
    whole_word_masking: bool = False      # mask all pieces of a word together (release)
    squash: bool = False                  # frames resized to the square (Sec. 4.1.1), not cropped
    boxes: bool = True                    # VCR: draw the entities' regions (Tab. 5, "Mask")
    compile: bool = False                 # torch.compile of the blocks
    freeze: tuple[str, ...] = ()          # parts that stay as they are: blocks.0 text_embeddings
    activation_checkpointing: bool = False  # recompute blocks in backward: L at 16 clips in 80 GB
    seed: int = 0                         # of everything that is random
    log_every: int = 50                   # steps
    save_every: int = 1000                # steps
    timeout: float = 120                  # seconds that a clip may take to read


TUNING = dict(epochs=20, batch=256)                        # Sec. 4.1.2: every downstream task
TASKS = {  # what a task changes of the defaults: Sec. 4.1.2, 4.2
    "pretrain": {},
    "retrieval": dict(TUNING, objectives=("vtc", "rank"), batch_per_gpu=8),  # 16 captions a clip
    "choice": dict(TUNING, objectives=("choice",)),
    "qa": dict(TUNING, objectives=("qa",)),
    "probe": dict(TUNING, objectives=("probe",), answer_head="linear", batch_per_gpu=256)}
RELEASE = {  # --recipe release: what the authors' code does and the paper does not say
    "all": dict(beta2=0.98, roll="release", roll_unimodal=False, patch_order="random"),
    "pretrain": dict(objectives=("vtm", "mlm", "wpa"), whole_word_masking=True, warmup=2500,
                     batch=4096),
    "retrieval": dict(batch=1024, epochs=200, lr=3e-4),    # DiDeMo: lr 6e-4, 80 tokens
    "choice": {},                                          # LSMDC: lr 1e-5; VCR: 200 epochs
    "qa": dict(batch=512, answer_head="release", head_lr=10.0),
    "probe": dict(epochs=50, lr=3e-4)}                     # HMDB51: lr 1e-4
PROOF = dict(  # no --data: toy clips and a model for two CPU cores; order comes from rolling alone
    variant="nano", image_size=48, temporal_position=False, dropout=0.0, drop_path=0.0, epochs=0,
    vocab="train", steps=2400, batch=16, batch_per_gpu=16, lr=1e-3, workers=1, save_every=200)
STEPS = {"retrieval": 300, "choice": 200, "qa": 200, "probe": 600}     # of PROOF's fine-tuning
TOY = {"pretrain": dict(data=("data/toy/train.jsonl",),
                        val=("data/toy/test.jsonl", "data/toy/choice_test.jsonl"))} | {
    task: dict(data=(f"data/toy/{task}_train.jsonl",), val=(f"data/toy/{task}_test.jsonl",),
               init="runs/pretrain/checkpoint.pt", steps=steps, false_texts=5)
    for task, steps in STEPS.items()}

OBJECTIVES = {  # objective: tasks that it is of, and the heads that it trains
    "vtm": (("pretrain",), ("pooler", "vtm_head")), "mlm": (("pretrain",), ("mlm_head",)),
    "vtc": (("pretrain", "retrieval"), ("text_proj", "video_proj")), "wpa": (("pretrain",), ()),
    "rank": (("retrieval",), ("pooler", "vtm_head")),  # VTM as a ranking of captions (release)
    "choice": (("choice",), ("pooler", "vtm_head")), "qa": (("qa",), ("pooler", "answer_head")),
    "probe": (("probe",), ("answer_head",))}
WEIGHTS = {"wpa": 0.1}                    # release; every other term counts once


def configure(argv: list[str] | None = None) -> tuple[TrainConfig, dict, dict]:
    """(how to train, a new model's Config fields, those asked for: laid over an --init's own)."""
    parser = argparse.ArgumentParser(
        description="Pre-train or fine-tune All-in-one. Without --data: the proof run.",
        usage="python train.py --task TASK [--FLAG VALUE ...]", allow_abbrev=False)
    add_flags(parser.add_argument_group("training, the commonest first"), TrainConfig)
    add_flags(parser.add_argument_group("model"), Config)
    flags = given_flags(parser, argv)
    task = flags.get("task", "pretrain")
    recipe = TASKS[task]
    if flags.get("recipe") == "release":
        recipe = recipe | RELEASE["all"] | RELEASE[task]
    if flags.get("steps") and flags.setdefault("epochs", 0):
        raise DataError("--steps and --epochs: how long is said twice; give one of them")
    proof = {} if flags.get("data") else PROOF | TOY[task]
    values = {"out": f"runs/{task}"} | recipe | proof | flags       # the last one wins
    fields = Config.__dataclass_fields__.keys()
    asked = {k: v for k, v in (recipe | flags).items() if k in fields | {"variant"}}
    sizes = {k: values.pop(k) for k in fields & values.keys()}
    config = TrainConfig(**values)
    check_flags(config)
    return config, VARIANTS[config.variant] | sizes, asked


def check_flags(config: TrainConfig) -> None:
    """DataError for flags that do not go together."""
    known = [name for name, (tasks, _) in OBJECTIVES.items() if config.task in tasks]
    unknown = " ".join(name for name in config.objectives if name not in known)
    tests = [path for path in config.val if re.search(r"(^|[_-])test\b", Path(path).name)]
    for wrong, message in (
            (unknown, f"--objectives {unknown}: those of --task {config.task} are "
             f"{', '.join(known)}"),
            ("wpa" in config.objectives and "vtm" not in config.objectives,
             "--objectives wpa needs vtm too: it takes VTM's matched and other pairs"),
            (config.val_every and not config.val, "--val_every needs --val, a manifest to score"),
            (config.val_every and tests,
             f"--val_every would choose the best checkpoint on {', '.join(tests)}: give --val the "
             "validation split, and score the test split once, with eval.py"),
            (min(config.batch_per_gpu, config.log_every, config.save_every, config.steps) < 1,
             "--batch_per_gpu, --steps, --log_every and --save_every must be 1 or more"),
            (min(config.batch, config.epochs, config.workers, config.val_every,
                 config.false_texts) < 0,
             "--batch, --epochs, --workers, --val_every and --false_texts must be 0 or more"),
            (config.compile and not any(map(shutil.which, ("g++", "c++", "clang++"))),
             "--compile: torch cannot compile without a C++ compiler; apt install g++")):
        if wrong:
            raise DataError(message)


def split_batch(config: TrainConfig, world: int) -> tuple[int, int, int]:
    """(clips a step, clips a pass, passes a step): batch = world * pass * accumulate.
    A pass is as large as fits, of whole groups of 8 clips if that can be: VTM draws its pairs
    within 8. DataError where VTM would be left with one."""
    batch = config.batch or config.batch_per_gpu * world
    if batch % world:
        raise DataError(f"--batch {batch} does not divide among {world} processes: use a multiple")
    share = batch // world
    sizes = [n for n in range(1, min(share, config.batch_per_gpu) + 1) if share % n == 0]
    size = max(sizes, key=lambda n: (n % 8 == 0, n))
    if size < 2 and "vtm" in config.objectives:
        raise DataError(f"--batch {batch} on {world} processes makes passes of {size} clip, which "
                        "VTM has nothing to mismatch with: take multiples of 8")
    return batch, size, share // size


def lr_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Sec. 4.1.2: linear warm-up over `warmup` (a share, or steps if above 1), then linear to 0.
    step counts from 0; `steps` itself would get 0."""
    rise = max(1, round(warmup * steps if warmup <= 1 else warmup))
    return peak * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


# ---- Objectives (Sec. 3.3, Sec. 4.2) on one pass -------------------------------------------------

class Objectives(nn.Module):
    """The losses of a task on one pass, one forward call for DDP's sake.
    batch -> {objective: (sum of its losses, how many)} and {"NAME_accuracy": (right, of)}, of
    tensors; who sums over passes and processes divides."""

    def __init__(self, model: AllInOne, objectives: tuple[str, ...]):
        super().__init__()
        self.model, self.objectives = model, objectives

    def forward(self, batch: dict) -> dict[str, tuple]:
        parts, labels = {}, batch["label"]
        B = torch.tensor(len(labels))
        if "vtc" in self.objectives:           # negatives: all of one pass, on all processes
            ids, mask = batch["text_ids"], batch["text_mask"]
            if ids.dim() == 3:                 # retrieval: the first is the clip's own caption
                ids, mask = ids[:, 0], mask[:, 0]
            text, video = text_embedding(self.model, ids, mask), video_embedding(self.model, batch)
            parts["vtc"] = vtc_loss(gather(text), gather(video)) * B, B
        if "mlm" in self.objectives or "vtm" in self.objectives:
            words, matched, (text, video) = score_pretraining(self.model, batch, self.objectives)
        if "mlm" in self.objectives:
            parts["mlm_accuracy"] = count_right(words, batch["mlm_labels"])
            parts["mlm"] = mlm_loss(words, batch["mlm_labels"]), parts["mlm_accuracy"][1]
        if "vtm" in self.objectives:
            parts["vtm_accuracy"] = count_right(matched, batch["vtm_labels"])
            parts["vtm"] = vtm_loss(matched, batch["vtm_labels"]) * B, B
        if "wpa" in self.objectives:           # the release's word-patch alignment
            patches = video[:, self.model.specials:]
            distance, _ = word_patch_transport(text, patches, batch["text_mask"])
            parts["wpa"] = word_patch_alignment_loss(distance, batch["vtm_labels"]) * B, B
        for name in {"rank", *SCORES}.intersection(self.objectives):          # Sec. 4.2
            scores = SCORES.get(name, score_options)(self.model, batch)       # (B, candidates)
            # -1: an answer that is no class teaches nothing
            parts[name] = F.cross_entropy(scores, labels, ignore_index=-1, reduction="sum"), B
            parts[f"{name}_accuracy"] = count_right(scores, labels)
        return parts


def gather(features: Tensor) -> Tensor:
    """Rows of all W processes, with gradients (VTC's negatives): (B, .) -> (W*B, .).
    Each computes the whole loss; its own rows' gradient counts W times, for DDP divides by W."""
    rows = [torch.empty_like(features) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, features.detach().contiguous())
    rows[dist.get_rank()] = own = features.view_as(features)
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * len(rows))
    return torch.cat(rows)


# ---- The run: its folder, log and checkpoint -----------------------------------------------------

CHANGEABLE = {"out", "val", "val_every", "workers", "log_every", "save_every", "timeout", "epochs",
              "lr", "steps", "batch_per_gpu"}   # from start to start of one run


class Run:
    """A run folder: lock, log.jsonl, checkpoint.pt and the one before it, checkpoint.previous.pt.
    state: what a checkpoint holds beside weights: {"step", "sets": (manifests, 2) clips read and
    unreadable, "window": {name: sums since the last line of the log}, "best"}. log: its length, and
    its losses. good: the checkpoint to go on from, None before there is one. Only the first process
    writes."""

    def __init__(self, config: TrainConfig):
        self.config, self.folder = config, Path(config.out)
        self.state, self.content, self.good = {"step": 0, "window": {}}, None, None
        self.log = {"bytes": 0, "curve": []}
        self.first, self.parent, self.terminated = dist.get_rank() == 0, os.getppid(), False
        if self.first:
            self.take_folder()
        box = [self.content]
        dist.broadcast_object_list(box)
        (self.content,) = box

    def take_folder(self) -> None:
        """Locks the folder, and reads the checkpoint in it. DataError if another run holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "a")    # freed when this process ends, however
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{self.folder}: another process is training into it; wait for it, "
                            "stop it, or choose another --out") from None
        names = "checkpoint.pt", "checkpoint.previous.pt"
        checkpoints = [self.folder / name for name in names if (self.folder / name).exists()]
        for path in checkpoints:
            try:
                self.content, self.good = read_weights(path), path
                break
            except ValueError as error:
                say(f"{error}; trying the checkpoint before it")
        if checkpoints and not {"config", "log"} <= (self.content or {}).keys():
            raise DataError(f"no checkpoint of train.py in {self.folder} can be read: remove them, "
                            "or choose another --out")

    def resume(self, description: dict, **parts) -> None:
        """Takes up the checkpoint's state and that of `parts`, and opens the log.
        description: what a checkpoint tells of its run; DataError, naming what differs, if the
        folder holds another run."""
        self.description, self.parts = json.loads(json.dumps(description)), parts  # no tuples
        self.state["sets"] = torch.zeros(len(description["data"]), 2, dtype=torch.float64)
        if self.content:
            self.compare(self.content, self.description)
            for name, part in parts.items():
                part.load_state_dict(self.content[name])
            self.state, self.log, self.content = self.content["state"], self.content["log"], None
            say(f"resuming {self.folder} at step {self.state['step']}")
        if self.first:
            self.open_log()

    def compare(self, before: dict, now: dict) -> None:
        """DataError if the checkpoint is of another run; says which CHANGEABLE flags differ."""
        old, new = ({**d["config"], "steps": d["steps"]} for d in (before, now))
        said = {key: f"{key} was {old.get(key, 'not given')}, now {new.get(key, 'not given')}"
                for key in old | new if old.get(key) != new.get(key)}
        other = [text for key, text in said.items() if key not in CHANGEABLE]
        for (name, *had), (_, *has) in zip(before["data"], now["data"]):
            if had != has:
                other.append("{} had {} lines of checksum {:08x}, now {} of {:08x}".format(
                    name, *had, *has))
        if now["steps"] < before["state"]["step"]:
            other.append(f"it is past step {now['steps']}")
        if other:
            raise DataError(f"{self.folder} holds another run ({'; '.join(other[:5])}): "
                            "choose another --out, or remove it")
        for text in said.values():
            say(f"from step {before['state']['step'] + 1} on: {text}")

    def open_log(self) -> None:
        """log.jsonl, cut back to where the checkpoint was: what came after it is done again."""
        path = self.folder / "log.jsonl"
        self.file = open(path, "a", buffering=1)
        os.truncate(path, min(path.stat().st_size, self.log["bytes"]))
        self.file.write(json.dumps(self.description) + "\n")

    def write(self, **entry) -> None:
        """A line of log.jsonl: losses, unreadable clips, scores."""
        if self.first:
            self.file.write(json.dumps({"step": self.state["step"], **entry}) + "\n")

    def save(self, name: str = "checkpoint.pt") -> None:
        """Writes beside and renames: at every moment a whole checkpoint, new or old, is there."""
        if not self.first:
            return
        path = self.folder / name
        beside = path.with_suffix(".partial")
        content = {key: part.state_dict() for key, part in self.parts.items()}
        self.log["bytes"] = (self.folder / "log.jsonl").stat().st_size
        try:
            with open(beside, "wb") as file:
                torch.save({**content, "state": self.state, "log": self.log, **self.description},
                           file)
                file.flush()
                os.fsync(file.fileno())
            if path == self.good and path.exists():            # never one that cannot be read
                self.good = path.replace(self.folder / "checkpoint.previous.pt")
            beside.replace(path)
            save_curves(self.folder / "curve.png", self.log["curve"])
        except (OSError, RuntimeError) as error:
            beside.unlink(missing_ok=True)
            raise OSError(f"{path}: cannot save ({error}){self.last_good()}") from error
        if name == "checkpoint.pt":
            self.good = path

    def last_good(self) -> str:
        """Which checkpoint a stopped run can go on from, for its last words."""
        return f"; {self.good} is whole" if self.good and self.good.exists() else ""

    def due(self, every: int) -> bool:
        return every > 0 and self.state["step"] % every == 0

    def must_stop(self) -> bool:
        """Whether SIGTERM came, or torchrun, which started us, is gone."""
        orphan = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent
        return self.terminated or orphan


# ---- Set-up --------------------------------------------------------------------------------------

def build(config: TrainConfig, sizes: dict, asked: dict, manifest: Manifest, run: Run):
    """(model, tokenizer, answers): of the run's own checkpoint, else by --init.
    sizes: Config's fields for a new model; asked: those asked for, laid over a checkpoint's."""
    torch.manual_seed(config.seed)
    answers = answers_of(manifest) if config.task in ("qa", "probe") else None
    if run.content:
        if answers != run.content.get("answers"):
            say("the answers of the data have changed; those of the checkpoint count")
        return checkpoint_model(run.content, run.folder)
    content = {} if config.init == "scratch" else read_weights(config.init)
    if "sizes" in content or any(                              # ours, or the authors'
            "text_embeddings" in name for name in content.get("state_dict", content)):
        if "variant" in asked:
            raise DataError(f"--variant: the sizes are those of {config.init}; leave it out")
        head = {"answer_head": sizes.get("answer_head", Config.answer_head)}   # not a checkpoint's
        model, tokenizer, _ = checkpoint_model(content, config.init, config.vocab, answers or [],
                                               **{**asked, **head})
        return model, tokenizer, answers
    texts = (text for i in range(len(manifest)) for text in texts_of(manifest[i]))
    tokenizer = (Tokenizer.train(texts, 30522) if config.vocab == "train"
                 else Tokenizer.load(config.vocab))
    model = AllInOne(Config(**{**sizes, "vocab_size": tokenizer.vocab_size,
                               "answers": len(answers or [])}))
    if content:                                                # timm's or DeiT's
        loaded = load_vit(model, config.init, content)
        say(f"{config.init}: {len(loaded['loaded'])} tensors loaded, "
                f"{', '.join(loaded['resized']) or 'none'} resized; the rest starts at random")
    return model, tokenizer, answers


def choose_trained(model: AllInOne, config: TrainConfig) -> None:
    """What gets gradients: what the objectives reach (DDP waits for all), but for --freeze."""
    heads = {head for _, heads in OBJECTIVES.values() for head in heads}
    heads -= {head for name in config.objectives for head in OBJECTIVES[name][1]}
    names = [f"{name}." for name, _ in model.named_parameters()]
    for part in config.freeze:
        if not any(name.startswith(f"{part}.") for name in names):
            parts = dict.fromkeys(name.split(".")[0] for name in names)
            raise DataError(f"--freeze {part}: no such part; there are {', '.join(parts)}, and "
                            f"blocks.0 to blocks.{model.config.depth - 1}")
    fixed = tuple(f"{part}." for part in (*heads, *config.freeze))
    for name, p in zip(names, model.parameters()):
        probed = config.task != "probe" or name.startswith("answer_head.")       # Tab. 12
        p.requires_grad_(probed and not name.startswith(fixed))


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
        choice = config.task == "pretrain" and "options" in first            # zero-shot
        scorings.append(EvalConfig(
            task="choice" if choice else config.task, data=(path,), batch=32,
            workers=config.workers, squash=config.squash, boxes=config.boxes,
            columns=config.columns, rerank=10 ** 9 if config.objectives == ("rank",) else 0))
        scorings[-1].clips_of(model, tokenizer, answers).read_words(first)
    return scorings


def commit() -> str:
    """The git commit of this code, "" where there is none."""
    return subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, text=True,
                          capture_output=True).stdout.strip()


# FLOP/s in bf16 without sparsity, from the data sheets: what MFU is of
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


# ---- The loop -----------------------------------------------------------------------------------

class Trainer:
    """One run: what the loop's lines do, in the order in which they do it."""

    def __init__(self, config: TrainConfig, sizes: dict, asked: dict, device):
        self.config, self.device, self.flops, self.waited = config, device, 0, 0.0
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if config.data[0].startswith("data/toy/"):
            if self.rank == 0:
                toy()
            dist.barrier()
        self.run, manifest = Run(config), Manifest(config.data, config.columns)
        self.batch, self.size, self.passes = split_batch(config, self.world)
        model, self.tokenizer, self.answers = build(config, sizes, asked, manifest, self.run)
        self.model = model.to(device)
        model.recompute = config.activation_checkpointing
        self.scorings = validation(config, model, self.tokenizer, self.answers)
        self.open_clips(manifest)
        model.train()                                          # features were read in evaluation
        self.steps = config.epochs * math.ceil(sum(self.sizes) / self.batch) or config.steps
        self.objectives = Objectives(model, config.objectives)
        choose_trained(model, config)
        self.optimizer = adamw(model, config)
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        name = config.precision.replace("auto", "bf16" if bf16 else "fp32")
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
        self.autocast = functools.partial(torch.autocast, device.type, dtype, name != "fp32")
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        # of several manifests each pass reads one, so that there the size of a pass matters
        size = self.size if len(self.sizes) > 1 else "any"
        self.run.resume(
            {"config": {**asdict(config), **asked, "batch": self.batch, "clips of a pass": size},
             "steps": self.steps, "sizes": asdict(model.config), "data": manifest.contents(),
             "answers": self.answers, "tokenizer": self.tokenizer.words.to_str(),
             "torch": torch.__version__, "commit": commit()},
            model=model, optimizer=self.optimizer, scaler=self.scaler)
        if config.compile:    # the second text length met is taken as a variable, then no more are
            model.transform = torch.compile(model.transform, fullgraph=True)
        self.ddp = DistributedDataParallel(self.objectives, gradient_as_bucket_view=True)
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        # images cost less than clips: of a mixture no MFU is told
        self.peak = sum(peak for key, peak in PEAKS.items() if key in gpu and len(self.sizes) == 1)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(f"{config.task}: {trained / 1e6:.1f} M trained parameters, {sum(self.sizes)} samples, "
            f"{self.steps} steps of {self.batch} clips, {self.passes} passes of {self.size} each, "
            f"{name}, on {self.world} x {gpu}, MFU of {self.peak / 1e12:g} TFLOP/s (0: not known); "
            f"log and checkpoint in {self.run.folder}")

    def open_clips(self, manifest: Manifest) -> None:
        """The samples to train on, `sizes` of each manifest; of a probe their features."""
        config, c, probe = self.config, self.model.config, self.config.task == "probe"
        self.clips = Clips(
            manifest, self.tokenizer, config.task, c.frames, c.image_size, c.max_text_len,
            train=not probe, seed=config.seed, squash=config.squash, boxes=config.boxes,
            whole_word_masking=config.whole_word_masking, answers=self.answers,
            false_texts=config.false_texts if "rank" in config.objectives else 0)
        self.sizes, self.lost = manifest.sizes, []
        if probe:                                              # computed once: all else is frozen
            path = self.run.folder / "features.pt"
            self.clips, self.lost = cls_features(self.model, self.clips, path, config, self.device)
            self.sizes = [sum(clip["set"] == k for clip in self.clips)
                          for k in range(len(manifest.sizes))]
            if not min(self.sizes):
                raise DataError(f"no clip of a manifest can be read: {'; '.join(self.lost[:3])}")
        self.unread = [lines - read for lines, read in zip(manifest.sizes, self.sizes)]

    def stream(self):
        """This process's passes from the run's step on (see data.Batches, data.load)."""
        config, clips = self.config, self.clips
        keys = Batches(self.sizes, self.batch, config.seed, self.rank, self.world,
                       self.run.state["step"], self.passes, self.steps, config.mix)
        if config.task == "probe":
            return (torch.utils.data.default_collate([clips[i] for i, _ in key]) for key in keys)
        # VTM pairs are drawn within 8 (4, 2) neighbours: as many as make up a pass of any layout
        group = math.gcd(self.size, 8) if self.size % 2 == 0 else self.size
        return load(clips, keys, functools.partial(collate, clips=clips, group=group),
                    config.workers, config.timeout)

    def train(self) -> None:
        run, config, stream = self.run, self.config, self.stream()
        self.since = run.state["step"], time.monotonic()
        if self.lost and not run.state["step"]:
            self.count_clips(torch.tensor([*zip(self.sizes, self.unread)]), self.lost)
        coming = self.next_passes(stream)
        for step in range(run.state["step"], self.steps):              # where are we
            lr = self.set_lr(step)                                     # the learning rate
            batches = coming                                           # which passes' batches
            if step == 0 and run.first:
                self.show(batches[0])
            sums = self.gradients(batches, step)                       # which losses
            coming = self.next_passes(stream)                          # while the GPU is busy
            parts, failures, stop = self.agree(sums, batches)          # over all processes
            self.check_finite(parts, batches, step)
            self.update(step)
            self.count_clips(parts.pop("clips"), failures)
            self.log(parts, lr)                                        # one line
            if run.due(config.val_every) and step + 1 < self.steps:
                self.validate()
            if run.due(config.save_every) or step + 1 == self.steps or stop:
                run.save()
            if stop:
                say(f"\nstopped after step {step + 1}; the same command goes on from here")
                return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)                  # all is saved: stop at once
        self.validate()

    def next_passes(self, stream) -> list[dict]:
        """The passes of a step, none after the last; the time this takes is waiting for data."""
        start = time.monotonic()
        batches = [batch for batch in (next(stream, None) for _ in range(self.passes)) if batch]
        if self.device.type == "cuda":                         # copied while the GPU computes
            batches = [{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}
                      for batch in batches]
        self.waited += time.monotonic() - start
        return batches

    def show(self, batch: dict) -> None:
        """samples.png, what the model is fed: frames, text and masked text, matched or not."""
        source, rows = batch.get("vtm_source", range(len(batch.get("video", ())))), []
        for i, s in enumerate(map(int, source[:8])):
            texts = batch["text_ids"][i].flatten(), *batch.get("mlm_ids", ())[i:i + 1]
            said = [" ".join(self.tokenizer.words.id_to_token(word) for word in ids.tolist()
                             if word != self.tokenizer.pad_id) for ids in texts]
            matched = "matched" if s == i else "not matched"
            rows.append((f"{matched}: {' / '.join(said)}", list(batch["video"][s])))
        if rows:
            save_picture(self.run.folder / "samples.png", rows)

    def set_lr(self, step: int) -> float:
        lr = lr_at(step, self.steps, self.config.lr, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        return lr

    def table(self) -> Tensor:
        """(manifests, 2): sums, and of how many, on the device."""
        return torch.zeros(len(self.sizes), 2, device=self.device)

    def gradients(self, batches: list[dict], step: int) -> dict[str, Tensor]:
        """Forward and backward of this process's passes. Returns {name: table of (sum, of)}."""
        words = sum(int((m["mlm_labels"] >= 0).sum()) for m in batches if "mlm_labels" in m)
        words = torch.tensor(float(words), device=self.device)
        dist.all_reduce(words)
        totals = {"mlm": words.clamp(min=1)}                   # of others: clips of the step
        moved = [{k: v.to(self.device, non_blocking=True) for k, v in batch.items()
                  if isinstance(v, Tensor)} for batch in batches]
        if self.peak and not self.flops:
            self.flops = len(moved) * self.count_flops(moved[0])
        sums = {}
        for i, (batch, tensors) in enumerate(zip(batches, moved)):
            torch.manual_seed(mix(self.config.seed, step, self.rank, i))       # dropout's
            last = i == len(moved) - 1                                 # DDP averages then only
            with contextlib.nullcontext() if last else self.ddp.no_sync():
                with self.autocast():
                    parts = self.ddp(tensors)
                loss = sum(WEIGHTS.get(name, 1) * parts[name][0] * self.world
                           / totals.get(name, self.batch) for name in self.config.objectives)
                self.scaler.scale(loss).backward()
            parts["clips"] = len(batch["where"]), len(batch.get("errors", ()))
            for name, pair in parts.items():
                sums.setdefault(name, self.table())[int(batch["set"][0])] += torch.stack([
                    torch.as_tensor(x, device=self.device).detach().float() for x in pair])
        return sums

    def count_flops(self, batch: dict) -> int:
        """FLOPs of a pass and its backward, counted by torch on one that trains nothing."""
        with torch.compiler.set_stance("force_eager"), self.autocast(), FlopCounterMode(
                display=False) as counter:
            parts = self.objectives(batch)
            sum(parts[name][0] for name in self.config.objectives).backward()
        self.model.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    def agree(self, sums: dict, batches: list[dict]) -> tuple[dict, list[str], bool]:
        """Sums over processes, with the gradient norm; what could not be read; whether to stop.
        The step's one wait for the device."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters()
                                        if p.grad is not None])
        last = self.table()
        last[0] = torch.stack([norm, torch.full_like(norm, self.run.must_stop())])
        tables = torch.stack([*sums.values(), last])
        dist.all_reduce(tables)
        *tables, last = tables.double().cpu()
        parts, (norm, stop) = dict(zip(sums, tables)), last[0]
        parts["grad_norm"] = torch.stack([norm, torch.full_like(norm, self.world)])[None]
        failures = [error for batch in batches for error in batch.get("errors", ())]
        if parts["clips"][:, 1].any():                                 # the log names them all
            failures = in_all_processes(failures)
        return parts, failures, bool(stop)

    def check_finite(self, parts: dict, batches: list[dict], step: int) -> None:
        """Stops before a step that would ruin the weights, naming term, step and samples."""
        bad = [name for name, table in parts.items() if not table.isfinite().all()
               and not (name == "grad_norm" and self.scaler.is_enabled())]    # fp16: it skips
        if bad:
            samples = ", ".join(where for batch in batches for where in batch["where"])
            raise ValueError(
                f"step {step}: {', '.join(bad)} not finite; stopped before the update"
                f"{self.run.last_good()}. This process's samples: {samples}. Lower --lr, or look "
                "at these clips")

    def update(self, step: int) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise ValueError(f"step {step}: gradients overflow fp16 at any scale; use bf16 or fp32")
        self.optimizer.zero_grad(set_to_none=True)
        self.run.state["step"] = step + 1

    def count_clips(self, counts: Tensor, failures: list[str]) -> None:
        """Training stops where more than 1 clip in 10 cannot be read, once 100 were tried."""
        self.run.state["sets"] += counts
        if failures:
            self.run.write(unreadable=failures)
            self.lost = failures
        read, failed = map(int, self.run.state["sets"].sum(0))
        if read + failed >= 100 and failed > (read + failed) / 10:
            raise ValueError(f"{failed} of {read + failed} clips cannot be read, above 1 in 10: "
                             + "; ".join(self.lost[-3:]))

    def log(self, parts: dict, lr: float) -> None:
        """One step's sums into the window; every log_every steps and at the last, a line: means
        since the last line, also by manifest if there are several, and how fast it goes."""
        step, sets, window = (self.run.state[key] for key in ("step", "sets", "window"))
        for name, table in parts.items():
            if table.isfinite().all():                         # fp16: an overflow is no step
                window[name] = window.get(name, 0) + table
        if not self.run.due(self.config.log_every) and step != self.steps:
            return
        record = {"lr": lr} | {name: mean(table.sum(0)) for name, table in window.items()}
        if len(sets) > 1:
            record["sets"] = {
                data[0]: {"clips": int(sets[k, 0]), "unreadable": int(sets[k, 1])}
                | {name: mean(table[k]) for name, table in window.items()
                   if len(table) > 1 and table[k, 1]}
                for k, data in enumerate(self.run.description["data"])}
        self.run.log["curve"].append({"step": step, **record})
        window.clear()
        n, seconds = step - self.since[0], time.monotonic() - self.since[1]
        memory = (torch.cuda.max_memory_allocated() if self.device.type == "cuda"
                  else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        meter = {"clips_per_s": n * self.batch / seconds, "data_wait": self.waited / seconds,
                 "memory_gb": memory / 1e9, "unreadable": int(sets[:, 1].sum()),
                 "eta_s": (self.steps - step) * seconds / n}
        if self.peak:
            meter["mfu"] = n * self.flops / seconds / self.peak
        self.since, self.waited = (step, time.monotonic()), 0.0
        self.run.write(**record, **meter)
        say(f"step {step}/{self.steps}  " + "  ".join(
            f"{k} {v:.3g}" for k, v in (record | meter).items() if k != "sets"))

    def validate(self) -> None:
        """Scores --val; the best so far is kept where --val_every asks for choosing."""
        start, firsts = time.monotonic(), []
        for scoring in self.scorings:
            with torch.compiler.set_stance("force_eager"):     # compiled for training's shapes
                result = evaluate(self.model, self.tokenizer, scoring, self.device, self.answers)
            table = report(result, scoring, self.model.config)
            self.run.write(data=scoring.data, result=table)
            firsts += [next(iter(p["metrics"].values())) for p in result["predictions"]]
        self.model.train()
        self.since = self.since[0], self.since[1] + time.monotonic() - start   # no training time
        score = sum(firsts) / max(1, len(firsts))
        if self.config.val_every and score > self.run.state.get("best", -math.inf) and firsts:
            self.run.state["best"] = score
            self.run.save("best.pt")


def mean(pair: Tensor) -> float:
    """(sum, of) as a mean."""
    return float(pair[0] / pair[1].clamp(min=1))


def main(argv: list[str] | None = None) -> None:
    config, sizes, asked = configure(argv)
    with joined_processes() as device:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        else:                                  # leave the reading processes their cores
            torch.set_num_threads(max(1, torch.get_num_threads() - config.workers))
        trainer = Trainer(config, sizes, asked, device)
        signal.signal(signal.SIGTERM, lambda *_: setattr(trainer.run, "terminated", True))
        trainer.train()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
