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
import functools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_grad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from allinone import (CHOICES, VARIANTS, AllInOne, Config, load_vit, mlm_loss, read_weights,
                      vtc_loss, vtm_loss, word_patch_alignment_loss, word_patch_distance)
from data import (Batches, Clips, DataError, Manifest, Tokenizer, answers_of, collate, load, mix,
                  texts_of, toy)
from eval import (SCORES, EvalConfig, add_flags, evaluate, given_flags, half_precision,
                  in_all_processes, join_processes, load_model, peak_flops, read, report,
                  score_options)


@dataclass(frozen=True)
class TrainConfig:
    """How to train; defaults are pre-training's of Sec. 4.1.2, TASKS and PROOF say what differs."""

    task: str = "pretrain"                # see TASKS
    data: tuple[str, ...] = ()            # manifests to train on; none: the proof run's toy clips
    val: tuple[str, ...] = ()             # manifest scored after training
    val_every: int = 0                    # steps; also scored then, and the best kept as best.pt
    out: str = ""                         # run folder; "": runs/<task>
    init: str = "scratch"                 # "scratch", ViT, DeiT, our or released weights
    vocab: str = "bert-base-uncased"      # or vocab.txt, tokenizer.json, "train" (from captions)
    objectives: tuple[str, ...] = ("vtm", "mlm")   # Sec. 3.3; see HEADS
    false_texts: int = 15                 # retrieval: captions that "rank" sets beside the true one
    hard_negatives: bool = False          # ... the likest ones of the pass, by VTC
    steps: int = 200_000                  # optimiser steps; 100_000 for Ti
    epochs: int = 0                       # passes over the data; 0: count by steps
    batch: int = 0                        # clips a step on all GPUs; 0: batch_per_gpu on each
    batch_per_gpu: int = 16               # clips in one forward pass at most; 32 for Ti
    lr: float = 1e-4                      # peak
    head_lr: float = 1.0                  # times lr, for the answer head (release: 10)
    warmup: float = 0.1                   # share of the steps (release: 2500 steps; above 1: steps)
    weight_decay: float = 1e-2            # on matrices and tables, not biases and norms (release)
    beta2: float = 0.999                  # torch's; the paper is silent (release: 0.98)
    whole_word_masking: bool = False      # release
    rand_augment: bool = False            # torchvision's RandAugment
    flip: bool = False                    # horizontal, never where words say left or right
    precision: str = "auto"               # fp16 (paper), bf16, fp32 (TF32 on GPUs); auto: bf16
    compile: bool = False                 # torch.compile of the blocks
    freeze: tuple[str, ...] = ()          # parts that stay as they are: blocks.0 text_embeddings
    activation_checkpointing: bool = False  # recompute blocks in backward: L at 16 clips in 80 GB
    workers: int = 8                      # decoding processes for each GPU
    seed: int = 0
    log_every: int = 50                   # steps
    save_every: int = 1000                # steps
    resume: bool = True                   # continue what the run folder holds; no: set it aside
    tensorboard: bool = False             # also write events, where tensorboard is installed


FINE_TUNING = dict(epochs=20, batch=256, warmup=0.1)                    # Sec. 4.1.2

TASKS = {  # what a task changes of the defaults
    "pretrain": dict(),
    "retrieval": dict(objectives=("vtc", "rank"), batch_per_gpu=8, **FINE_TUNING),  # Sec. 4.2.2
    "choice": dict(objectives=("choice",), **FINE_TUNING),              # Sec. 4.2.1, 4.2.3, 4.2.4
    "qa": dict(objectives=("qa",), **FINE_TUNING),                      # Sec. 4.2.1
    "probe": dict(objectives=("probe",), answer_head="linear", batch_per_gpu=256, **FINE_TUNING),
}

RECIPES = {  # --recipe release: what the authors' code does and the paper does not say
    "paper": dict(),
    "release": dict(objectives=("vtm", "mlm", "wpa"), whole_word_masking=True, beta2=0.98,
                    warmup=2500, roll="release", roll_unimodal=False, patch_order="random",
                    answer_head="release", head_lr=10.0),
}

PROOF = dict(  # no --data: toy clips and a model for two CPU cores; order comes from rolling alone
    variant="nano", image_size=48, temporal_position=False, dropout=0.0, drop_path=0.0,
    vocab="train", steps=2400, warmup=0.1, batch=16, lr=1e-3, workers=1, save_every=200)

TUNED = dict(init="runs/pretrain/checkpoint.pt", batch_per_gpu=16)
TOY = {  # the toy clips' manifests of a task, and what fine-tuning on them changes of PROOF
    "pretrain": ("train", "choice", dict()),
    "retrieval": ("train", "retrieval", dict(steps=300, false_texts=5, **TUNED)),
    "choice": ("choice_train", "choice", dict(steps=200, **TUNED)),
    "qa": ("qa_train", "qa", dict(steps=200, **TUNED)),
    "probe": ("probe_train", "probe", dict(steps=600, **TUNED)),
}

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "auto": None}

WEIGHTS = {"wpa": 0.1}                    # release; every other term counts once

HEADS = {  # what each objective trains; other heads are frozen, so DDP waits for no gradient
    "vtm": ("pooler", "vtm_head"), "mlm": ("mlm_head",), "vtc": ("text_proj", "video_proj"),
    "wpa": (), "rank": ("pooler", "vtm_head"), "choice": ("pooler", "vtm_head"),
    "qa": ("pooler", "answer_head"), "probe": ("answer_head",),
}

OBJECTIVES = {  # those that --objectives can choose among, by task; "rank" is VTM as a ranking
    "pretrain": ("vtm", "mlm", "vtc", "wpa"), "retrieval": ("vtc", "rank"), "choice": ("choice",),
    "qa": ("qa",), "probe": ("probe",),
}


# ---- Objectives (Sec. 3.3, Sec. 4.2) on one batch ------------------------------------------------

class Objectives(nn.Module):
    """The losses of a task: batch -> {name: loss}, one forward call for DDP's sake.

    Also returns counts {name: [right, of]} for VTM, MLM and answer accuracy.
    """

    def __init__(self, model: AllInOne, objectives: tuple[str, ...], hard_negatives: int = 0):
        super().__init__()
        self.model = model
        self.objectives = objectives
        self.hard_negatives = hard_negatives
        if "probe" in objectives:                              # Tab. 12: nothing else moves
            model.requires_grad_(False)
            model.answer_head.requires_grad_(True)
        trained = {head for name in objectives for head in HEADS[name]}
        for head in {head for heads in HEADS.values() for head in heads} - trained:
            if hasattr(model, head):
                getattr(model, head).requires_grad_(False)

    def forward(self, batch: dict, words: Tensor) -> tuple[dict, dict]:
        """words: masked words per process and micro-batch, averaged over all: MLM's divisor."""
        losses, counts = {}, {}
        if "vtc" in self.objectives:           # first, so that contrast() can repeat its dropout
            text, video = self.unimodal(batch)
            losses["vtc"] = (feed_back(text, video, *batch["contrast"]) if "contrast" in batch
                             else vtc_loss(gather(text), gather(video)))
            if self.hard_negatives:
                batch = hard_options(batch, text, video, self.hard_negatives)
        if "mlm" in self.objectives or "vtm" in self.objectives:
            self._pretrain(batch, words, losses, counts)
        for name in self.objectives:
            if name not in ("rank", *SCORES):
                continue
            scores = SCORES.get(name, score_options)(self.model, batch)   # (B, options or answers)
            labels = batch["label"]                # -1: an answer that is no class teaches nothing
            losses[name] = F.cross_entropy(scores, labels, ignore_index=-1, reduction="sum") / len(
                labels)
            counts[name] = count_right(scores, labels)
        return losses, counts

    def _pretrain(self, batch: dict, words: Tensor, losses: dict, counts: dict) -> None:
        """VTM and MLM (Sec. 3.3): two joint passes as one of twice the rows."""
        model, mask = self.model, batch["text_mask"]
        video = model.embed_video(batch["video"])                         # (B, S, 1+n, D)
        videos, texts = [], []
        if "mlm" in self.objectives:
            videos.append(video)
            texts.append(batch["mlm_ids"])
        if "vtm" in self.objectives:
            videos.append(video[batch["vtm_source"]])
            texts.append(batch["text_ids"])
        features = model.fuse(torch.cat(videos), model.embed_text(torch.cat(texts)),
                              mask.repeat(len(texts), 1))
        B = len(mask)
        if "mlm" in self.objectives:
            masked = features.text[:B].flatten(0, 1)[batch["mlm_where"]]  # (M, D)
            logits = model.mlm_head(masked)                               # (M, |V|)
            losses["mlm"] = mlm_loss(logits, batch["mlm_labels"]) / words
            counts["mlm"] = count_right(logits, batch["mlm_labels"])
        if "vtm" in self.objectives:
            logits = model.vtm_head(features.pooled[-B:])                 # (B, 2)
            losses["vtm"] = vtm_loss(logits, batch["vtm_labels"])
            counts["vtm"] = count_right(logits, batch["vtm_labels"])
        if "wpa" in self.objectives:
            patches = features.video[-B:, model.specials:]
            distance = word_patch_distance(features.text[-B:], patches, mask)
            losses["wpa"] = word_patch_alignment_loss(distance, batch["vtm_labels"])

    def unimodal(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Text and video, each alone, encoded and projected: both (B, vtc_dim)."""
        ids, mask = batch["text_ids"], batch["text_mask"]
        if ids.dim() == 3:                         # retrieval: the first is the clip's own caption
            ids, mask = ids[:, 0], mask[:, 0]
        text = self.model.encode_text(ids, mask)[:, 0]
        video = self.model.encode_video(batch["video"])[:, 0]
        return self.model.text_proj(text), self.model.video_proj(video)


def count_right(logits: Tensor, labels: Tensor) -> Tensor:
    """(right, of) as a tensor of two; negative labels do not count."""
    known = labels >= 0
    return torch.stack([((logits.argmax(-1) == labels) & known).sum(), known.sum()])


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
    there = F.pad(best.values > -torch.inf, (1, 0), value=True)
    return batch | {"text_ids": ids[chosen], "text_mask": mask[chosen], "option_mask": there}


def gather(features: Tensor) -> Tensor:
    """Rows of all W processes, with gradients (VTC's negatives): (B, .) -> (W*B, .).

    The gradient is W times the loss's, for DDP divides by W.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    return torch.cat(dist_grad.all_gather(features))


@torch.no_grad()
def contrast(objectives: Objectives, batches: list[dict], seeds: list[int]) -> list[tuple]:
    """VTC among all passes of a step, as GradCache does (Gao et al. 2021, arXiv:2101.06983).

    A first pass without gradient encodes every micro-batch; only the features are kept. For each
    micro-batch returns (loss, gradient of its text features, of its video features), which
    feed_back takes in the second pass; `seeds` make both passes draw the same dropout.
    """
    pairs = []
    for batch, seed in zip(batches, seeds):
        torch.manual_seed(seed)
        pairs.append(objectives.unimodal(batch))
    with torch.enable_grad():
        text, video = (torch.cat(side).float().requires_grad_() for side in zip(*pairs))
        loss = vtc_loss(gather(text), gather(video))
        # times the passes: train() divides every loss by their number
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
    """Flags over the proof run's values (no --data) over --recipe over the task's over defaults.

    Returns the training configuration, the fields of the model's Config, and those that were given.
    """
    parser = argparse.ArgumentParser(
        description="Pre-train or fine-tune All-in-one. Without --data: the proof run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--variant", choices=VARIANTS, default=argparse.SUPPRESS,
                        help="sizes of Tab. 1: width, depth, heads (default: B)")
    parser.add_argument("--recipe", choices=RECIPES, default="paper",
                        help="release: the authors' unmentioned choices, together")
    add_flags(parser, TrainConfig, {"task": TASKS, "precision": PRECISIONS})
    add_flags(parser, Config, CHOICES)
    given = given_flags(parser, argv)
    recipe, task = RECIPES[given.pop("recipe")], given.get("task", "pretrain")
    named = set(given)
    proof = {}
    if not given.get("data"):
        proof = {**PROOF, "epochs": 0, **TOY[task][2]}
    values = {**recipe, **TASKS[task], **proof, **given}
    if "steps" in given and "epochs" not in given:
        values["epochs"] = 0
    values = {**VARIANTS[values.pop("variant", "B")], **values}
    fields = Config.__dataclass_fields__
    sizes = {k: v for k, v in values.items() if k in fields}
    given = {k: v for k, v in {**recipe, **TASKS[task], **given}.items() if k in fields}
    config = TrainConfig(**{k: v for k, v in values.items() if k not in fields})
    if unknown := [name for name in config.objectives if name not in OBJECTIVES[task]]:
        raise DataError(f"--objectives {unknown[0]}: those of --task {task} are "
                        f"{', '.join(OBJECTIVES[task])}")
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
    if "variant" in named and config.init != "scratch" and kind_of_weights(config.init) != "vit":
        raise DataError(f"--variant: the sizes are those of {config.init}; leave it out")
    return replace(config, out=config.out or f"runs/{config.task}"), sizes, given


def split_batch(config: TrainConfig, world: int) -> tuple[int, int, int]:
    """(clips a step, clips a forward pass, passes a step): batch = world * pass * accumulate."""
    batch = config.batch or config.batch_per_gpu * world
    if batch % world:
        raise DataError(f"--batch {batch} does not divide among {world} processes: use a multiple")
    share = batch // world
    size = next(n for n in range(min(share, config.batch_per_gpu), 0, -1) if share % n == 0)
    return batch, size, share // size


def lr_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Sec. 4.1.2: linear warm-up over `warmup` (a share, or steps if above 1), then linear to 0.

    step counts from 0; `steps` itself would get 0.
    """
    rise = max(1, round(warmup * steps if warmup <= 1 else warmup))
    return peak * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


# ---- Run folder: log and checkpoint --------------------------------------------------------------

def save(path: Path, content: dict) -> None:
    """Writes beside and renames, so that `path` is at every moment the old or the new, whole."""
    beside = path.with_suffix(".partial")
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot save ({error}); the one before it is whole") from error


def commit() -> str:
    """The git commit of this code, "" where there is none."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True,
                              capture_output=True).stdout.strip()
    except FileNotFoundError:
        return ""


def open_run(config: TrainConfig, description: dict) -> tuple[Path, dict | None]:
    """The run folder, and the checkpoint in it if it is of this same run.

    The log is cut back to the checkpoint's step: what came after it will be done again.
    Raises DataError, naming the differing fields, if the folder holds another run.
    """
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    log, path = folder / "log.jsonl", folder / "checkpoint.pt"
    if not config.resume:
        for file in (log, path, folder / "best.pt"):
            if file.exists():
                file.replace(file.with_suffix(file.suffix + ".previous"))
    content = None
    if path.exists():
        content = read_weights(path)
        if "config" not in content:
            raise DataError(f"{path} is no checkpoint of train.py: choose another --out")
        there, here = content["config"], description["config"]
        differ = [f"{key} was {there.get(key)}, now {here[key]}" for key in here
                  if there.get(key) != here[key] and key not in CHANGEABLE]
        if differ:
            raise DataError(f"{folder} holds another run ({'; '.join(differ[:5])}): "
                            "choose another --out, or --no-resume to set it aside")
    if content is None:
        log.write_text(json.dumps(description) + "\n")
    else:
        lines = log.read_text().splitlines() if log.exists() else []
        kept = [line for line in lines if is_log_line(line, content["step"])]
        beside = log.with_suffix(".partial")
        beside.write_text("".join(line + "\n" for line in kept))
        beside.replace(log)
    return folder, content


CHANGEABLE = {  # fields that may differ when a run goes on: they change no number
    "out", "val", "val_every", "workers", "log_every", "save_every", "resume", "tensorboard"}


def is_log_line(line: str, steps: int) -> bool:
    """Whether a line of the log is whole and from before `steps` were done."""
    try:
        return json.loads(line).get("step", 0) <= steps
    except json.JSONDecodeError:           # a kill in the middle of a line
        return False


# ---- Parts of the loop --------------------------------------------------------------------------

@functools.cache                           # a large file, asked about more than once
def kind_of_weights(path) -> str:
    """What --init names: "ours" (train.py's), "release" (the authors') or "vit" (timm, DeiT)."""
    content = read_weights(path)
    if "sizes" in content:
        return "ours"
    words = any("text_embeddings" in name for name in content.get("state_dict", content))
    return "release" if words else "vit"


def precision(name: str, device: torch.device) -> torch.dtype:
    """The autocast type: the paper trains in fp16 [28]; bf16 needs no loss scaling."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return PRECISIONS[name]


def check_finite(values: dict, step: int, micros: list[dict], scaled: bool, out: str) -> None:
    """Stops the run before a step that would ruin the weights, naming term, step and samples.

    With fp16 an overflown gradient is the loss scaler's business: it skips the step.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)
           and not (scaled and name == "grad_norm")]
    if bad:
        samples = [where for micro in micros for where in micro["where"]]
        raise ValueError(f"step {step}: {', '.join(bad)} not finite; stopped before the update, "
                         f"the last checkpoint in {out} is good. This process's samples: "
                         f"{', '.join(samples)}. Lower --lr, or look at these clips")


def check_unreadable(state: dict, failed: list[str]) -> None:
    """Training stops where more than 1 clip in 10 cannot be read, once 100 were tried."""
    tried = state["read"] + state["unreadable"]
    if tried >= 100 and state["unreadable"] > tried / 10:
        raise ValueError(f"{state['unreadable']} of {tried} clips cannot be read, above 1 in 10; "
                         "see \"unreadable\" in the log, the last: " + "; ".join(failed[-3:]))


class Meter:
    """The log: one line on the terminal that updates, one object a line in log.jsonl.

    Each says step, lr, losses and accuracies (means since the last line), gradient norm, clips/s,
    MFU, share of time spent waiting for data, memory, unreadable clips so far, seconds left.
    """

    def __init__(self, config: TrainConfig, device: torch.device, rank: int, folder: Path | None,
                 batch: int, steps: int, world: int, say):
        self.config, self.device, self.batch, self.steps = config, device, batch, steps
        self.flops, (self.peak, basis) = 0, peak_flops(device)     # flops: of a step on one process
        say(f"MFU is of {self.peak / 1e12:.3g} TFLOP/s on each device ({basis})")
        self.file = open(folder / "log.jsonl", "a", buffering=1) if folder else None
        self.events = None
        if config.tensorboard and rank == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise DataError("--tensorboard needs it: pip install tensorboard") from error
            self.events = SummaryWriter(folder)
        self.since, self.waited = time.monotonic(), 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Times what happens inside as waiting for data."""
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def add(self, state: dict, values: dict, lr: float) -> None:
        """One step's values; writes a line every log_every steps and at the last."""
        window = state["window"]
        for name, value in values.items():
            if math.isfinite(value):       # fp16: a gradient that overflowed, and was not stepped
                window[name] = window.get(name, 0.0) + value
        window["steps"] = window.get("steps", 0) + 1
        if state["step"] % self.config.log_every and state["step"] != self.steps:
            return
        n = window.pop("steps")
        record = {"step": state["step"], "lr": lr}
        for name, value in window.items():
            if not name.startswith("of "):
                record[name] = value / (window[f"of {name}"] or 1 if f"of {name}" in window else n)
        window.clear()
        seconds = time.monotonic() - self.since
        memory = (torch.cuda.max_memory_allocated() if self.device.type == "cuda"
                  else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        speed = {"clips_per_s": n * self.batch / seconds,
                 "mfu": n * self.flops / seconds / self.peak,
                 "data_wait": self.waited / seconds, "memory_gb": memory / 1e9,
                 "unreadable": state["unreadable"],
                 "eta_s": (self.steps - state["step"]) * seconds / n}
        self.since, self.waited = time.monotonic(), 0.0
        if self.file:
            self.file.write(json.dumps(record | speed) + "\n")
            shown = {k: f"{v:.3g}" for k, v in record.items() if k not in ("step", "lr")}
            line = (f"step {state['step']}/{self.steps}  lr {lr:.1e}  "
                    + "  ".join(f"{k} {v}" for k, v in shown.items())
                    + f"  {speed['clips_per_s']:.0f} clips/s  MFU {speed['mfu']:.0%}"
                    f"  data {speed['data_wait']:.0%}  {speed['memory_gb']:.1f} GB"
                    f"  unreadable {state['unreadable']}  {speed['eta_s'] / 60:.1f} min left")
            tty = sys.stdout.isatty()
            print(f"\r\033[K{line}" if tty else line, end="" if tty else "\n", flush=True)
            if tty and state["step"] == self.steps:
                print()
        if self.events:
            for name, value in (record | speed).items():
                self.events.add_scalar(name, value, state["step"])

    def note(self, **what) -> None:
        """Writes an object of its own into log.jsonl (unreadable clips, results)."""
        if self.file:
            self.file.write(json.dumps(what) + "\n")


# ---- The loop -----------------------------------------------------------------------------------

def with_toy_clips(config: TrainConfig, rank: int, world: int, say) -> TrainConfig:
    """The configuration with the toy clips as its data, which the first process writes once."""
    say("Proof run: toy clips, a model for two CPU cores. Your own: --data MANIFEST (README).")
    if rank == 0:
        toy()
    if world > 1:
        dist.barrier()
    learn, score, _ = TOY[config.task]
    score += "_val" if config.val_every else "_test"           # never choose on the test split
    return replace(config, data=(f"data/toy/{learn}.jsonl",),
                   val=config.val or (f"data/toy/{score}.jsonl",))


def build(config: TrainConfig, sizes: dict, given: dict, manifest: Manifest,
          answers: list[str] | None, say) -> tuple[AllInOne, Tokenizer]:
    """The model by --init, with the tokenizer that goes with it.

    sizes: Config's fields for a new model; given: those the user named, laid over a checkpoint's.
    """
    torch.manual_seed(config.seed)
    if config.init != "scratch" and kind_of_weights(config.init) != "vit":
        head = {"answer_head": sizes.get("answer_head", Config.answer_head)}   # not a checkpoint's
        model, tokenizer, _ = load_model(config.init, vocab=config.vocab, say=say,
                                         answers=answers or [], **{**given, **head})
        return model, tokenizer
    texts = (text for i in range(len(manifest)) for text in texts_of(manifest[i]))
    tokenizer = (Tokenizer.train(texts, 30522) if config.vocab == "train"
                 else Tokenizer.load(config.vocab))
    model = AllInOne(Config(**{**sizes, "vocab_size": tokenizer.vocab_size,
                               "answers": len(answers or [])}))
    if config.init != "scratch":
        report = load_vit(model, config.init)
        say(f"{config.init}: {len(report['loaded'])} tensors loaded, "
            f"{', '.join(report['resized']) or 'none'} resized; the rest starts at random")
    return model, tokenizer


def samples(config: TrainConfig, manifest: Manifest, model: AllInOne, tokenizer: Tokenizer,
            answers: list[str] | None, device: torch.device, say) -> Clips | Features:
    """What to train on: clips or, for a probe, their features."""
    c = model.config
    drawn = config.false_texts if "rank" in config.objectives and not config.hard_negatives else 0
    clips = Clips(manifest, tokenizer, config.task, c.frames, c.image_size, c.max_text_len,
                  train=config.task != "probe", seed=config.seed, flip=config.flip,
                  rand_augment=config.rand_augment, whole_word_masking=config.whole_word_masking,
                  answers=answers, false_texts=drawn)
    if config.task != "probe":
        return clips
    Path(config.out).mkdir(parents=True, exist_ok=True)
    return Features(model, clips, config, device, Path(config.out) / "features.pt", say)


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


def count_flops(objectives: nn.Module, batch: dict, words: Tensor) -> int:
    """FLOPs of a pass and its backward, by torch's count of an extra one that trains nothing."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        losses, _ = objectives(batch, words)
        sum(losses.values()).backward()
    objectives.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def compiled(function, device: torch.device):
    """torch.compile of the whole of `function`; DataError where the machine has no compiler.

    Text lengths differ: the second one met makes torch take the length as a variable, and from
    then on nothing is compiled again.
    """
    probe = functools.partial(torch.add, alpha=time.time())  # new each time: not in torch's cache
    try:
        torch.compile(probe)(torch.ones(2, device=device), torch.ones(2, device=device))
    except Exception as error:             # whatever a missing compiler makes torch raise
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"--compile: torch cannot compile here ({reason}); it needs a C++ compiler "
                        "(apt install g++), on GPUs Triton too; or leave --compile out") from error
    return torch.compile(function, fullgraph=True)


def batches(clips: Clips, config: TrainConfig, rank: int, world: int, start: int, steps: int):
    """This process's micro-batches from optimiser step `start` on (see data.Batches, data.load)."""
    batch, size, accumulate = split_batch(config, world)
    keys = Batches(len(clips), batch, config.seed, rank, world, start, accumulate, steps)
    # VTM pairs are drawn within 8 (4, 2) neighbours: as many as make up a pass of any layout
    group = math.gcd(size, 8) if size % 2 == 0 else size
    together = torch.utils.data.default_collate if isinstance(clips, Features) else (
        functools.partial(collate, tokenizer=clips.tokenizer, group=group, seed=config.seed,
                          max_text_len=clips.max_text_len))
    yield from load(clips, keys, together, config.workers, pin_memory=torch.cuda.is_available())


class Features(torch.utils.data.Dataset):
    """What a probe trains on (Tab. 12): the cls features of a manifest's clips, computed once.

    They are kept in `path` and read from there as long as manifests, answers and weights are the
    same. Clips that cannot be read are left out, and `unreadable` names them; DataError if they are
    more than 1 in 10.
    """

    def __init__(self, model: AllInOne, clips: Clips, config: TrainConfig, device: torch.device,
                 path: Path, say):
        weights = zlib.crc32(b"".join(
            p.detach().cpu().numpy().tobytes() for name, p in model.named_parameters()
            if not name.startswith("answer_head")))
        files = [(str(p), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in clips.manifest.paths]
        key = json.dumps([files, weights, list(clips.labels), asdict(model.config)])
        cache = read_weights(path) if path.exists() else {}
        if not all(in_all_processes([cache.get("key") == key])):
            rows, unreadable = [], []
            reading = EvalConfig(task="probe", batch=config.batch_per_gpu, workers=config.workers)
            for items, (view,) in read(model.to(device).eval(), clips, reading, device, unreadable):
                with torch.no_grad(), half_precision(device):
                    features = model.encode_video(view["video"])[:, 0].float().cpu()   # (B, D)
                rows += zip(items["index"].tolist(), items["label"].tolist(), items["where"],
                            features)
                say(f"\rfeatures of {len(rows)} clips on each process", end="")
            rows = sorted(in_all_processes(rows), key=lambda row: row[0])
            unreadable = in_all_processes(unreadable)
            say(f"\rfeatures of {len(rows)} clips; unreadable: {len(unreadable)}")
            if len(unreadable) > (len(rows) + len(unreadable)) / 10:
                raise DataError(f"{len(unreadable)} of {len(rows) + len(unreadable)} clips cannot "
                                f"be read, above 1 in 10: {'; '.join(unreadable[-3:])}")
            cache = {"key": key, "unreadable": unreadable, "label": [row[1] for row in rows],
                     "where": [row[2] for row in rows], "feature": torch.stack(
                         [row[3] for row in rows])}
            if not dist.is_initialized() or dist.get_rank() == 0:
                save(path, cache)
        self.cache, self.unreadable = cache, cache["unreadable"]

    def __len__(self):
        return len(self.cache["label"])

    def __getitem__(self, key):
        return {"errors": [], **{name: self.cache[name][key[0]]
                                 for name in ("label", "where", "feature")}}


def train(config: TrainConfig, sizes: dict, given: dict, rank: int, world: int,
          device: torch.device, say) -> None:
    """One run: set-up, then the loop in the order in which a reader asks."""
    if not config.data:
        config = with_toy_clips(config, rank, world, say)
    manifest = Manifest(config.data)
    answers = answers_of(config.data) if config.task in ("qa", "probe") else None
    model, tokenizer = build(config, sizes, given, manifest, answers, say)
    model.recompute = config.activation_checkpointing
    c = model.config
    clips = samples(config, manifest, model, tokenizer, answers, device, say)
    batch, size, accumulate = split_batch(config, world)
    steps = config.epochs * math.ceil(len(clips) / batch) if config.epochs else config.steps

    objectives = Objectives(model, config.objectives,
                            config.false_texts if config.hard_negatives else 0).to(device)
    freeze(model, config.freeze)
    trained = [p for p in objectives.parameters() if p.requires_grad]
    optimizer = adamw(model, config)
    dtype = precision(config.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    about = {"config": {**asdict(config), **asdict(c), "batch": batch}, "steps": steps,
             "torch": torch.__version__, "commit": commit()}
    about = json.loads(json.dumps(about))                      # tuples as the checkpoint has them
    folder, content = None, None
    if rank == 0:
        folder, content = open_run(config, about)
    if world > 1:
        box = [content]
        dist.broadcast_object_list(box)
        content = box[0]
    lost = clips.unreadable if isinstance(clips, Features) else []
    state = {"step": 0, "read": 0, "unreadable": len(lost), "window": {}}
    if content:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        scaler.load_state_dict(content["scaler"])
        state = content["state"]
        say(f"resuming {config.out} at step {state['step']}")

    def checkpoint(name: str = "checkpoint.pt") -> None:
        if rank == 0:
            save(folder / name, {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "state": state, "step": state["step"],
                "config": about["config"], "sizes": asdict(c), "tokenizer": tokenizer.to_json(),
                "answers": answers})

    def validate() -> None:
        """Scores --val; the best so far is kept where --val_every asks for choosing."""
        scoring = EvalConfig(
            task="choice" if config.task == "pretrain" else config.task, data=config.val,
            batch=32, workers=config.workers,      # without VTC: rank all pairs by the joint pass
            rerank=10 ** 9 if config.objectives == ("rank",) else 0)
        start = time.monotonic()
        fast = model.__dict__.pop("transform", None)       # compiled, for training's shapes only
        result = evaluate(model, tokenizer, scoring, device, answers)
        if fast:
            model.transform = fast
        model.train()
        meter.since += time.monotonic() - start            # no part of the training's speed
        first = [next(iter(p["metrics"].values())) for p in result["predictions"]]
        score = sum(first) / max(1, len(first))
        if rank == 0:
            meter.note(step=state["step"], result=report(result, scoring, c, say))
        if config.val_every and score > state.get("best", -math.inf):
            state["best"] = score
            checkpoint("best.pt")

    wrapped = objectives
    if config.compile:
        model.transform = compiled(model.transform, device)
    if world > 1:
        wrapped = DistributedDataParallel(objectives, gradient_as_bucket_view=True)
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    parameters = sum(p.numel() for p in trained)
    say(f"{config.task}: {parameters / 1e6:.1f} M trained parameters, {len(clips)} samples, "
        f"{steps} steps of {batch} clips, {accumulate} passes of {size} each, "
        f"{str(dtype)[6:]}, on {world} x {device.type}; "
        f"log and checkpoint in {config.out}")
    meter = Meter(config, device, rank, folder, batch, steps, world, say)

    if lost:
        meter.note(step=state["step"], unreadable=lost)
    micro_batches = batches(clips, config, rank, world, state["step"], steps)
    for step in range(state["step"], steps):                   # where are we
        lr = lr_at(step, steps, config.lr, config.warmup)      # the learning rate
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        with meter.waiting():                                  # which batch
            micros = [next(micro_batches) for _ in range(accumulate)]
        words = sum(int((m["mlm_labels"] >= 0).sum()) for m in micros if "mlm_labels" in m)
        failed = sum(len(m["errors"]) for m in micros)
        tally = torch.tensor([words, failed, len(stopping)], dtype=torch.float32, device=device)
        if world > 1:
            dist.all_reduce(tally)
        words = tally[0].clamp(min=1) / (world * accumulate)
        inputs = [{k: v.to(device, non_blocking=True) for k, v in micro.items()
                   if isinstance(v, Tensor)} for micro in micros]
        seeds = [mix(config.seed, step, rank, i) for i in range(accumulate)]       # of dropout
        autocast = functools.partial(torch.autocast, device.type, dtype,
                                     enabled=dtype is not torch.float32)
        if accumulate > 1 and "vtc" in config.objectives:
            with autocast():
                found = contrast(objectives, inputs, seeds)
            inputs = [{**batch, "contrast": one} for batch, one in zip(inputs, found)]
        if not meter.flops:
            with wrapped.no_sync() if world > 1 else contextlib.nullcontext(), autocast():
                meter.flops = accumulate * count_flops(wrapped, inputs[0], words)
        values = {}
        for i in range(accumulate):                            # which losses
            torch.manual_seed(seeds[i])
            wait = world > 1 and i < accumulate - 1            # DDP averages at the last pass only
            with wrapped.no_sync() if wait else contextlib.nullcontext():
                with autocast():
                    losses, counts = wrapped(inputs[i], words)
                total = sum(WEIGHTS.get(name, 1) * loss for name, loss in losses.items())
                scaler.scale(total / accumulate).backward()
            for name, loss in losses.items():
                values[name] = values.get(name, 0) + loss.detach() / (accumulate * world)
            for name, (right, of) in counts.items():
                values[f"{name}_accuracy"] = values.get(f"{name}_accuracy", 0) + right
                values[f"of {name}_accuracy"] = values.get(f"of {name}_accuracy", 0) + of
        scaler.unscale_(optimizer)                             # update
        grads = [p.grad for p in trained if p.grad is not None]
        values["grad_norm"] = nn.utils.get_total_norm(grads) / world
        numbers = torch.stack([v.float() for v in values.values()])
        if world > 1:
            dist.all_reduce(numbers)
        # the step's one wait for the device
        *numbers, _, failed, stop = torch.cat([numbers, tally]).tolist()
        values = dict(zip(values, numbers))
        check_finite(values, step, micros, scaler.is_enabled(), config.out)
        scaler.step(optimizer)
        scaler.update()
        if scaler.is_enabled() and scaler.get_scale() < 1:
            raise ValueError(f"step {step}: gradients overflow fp16 at any scale; use bf16 or fp32")
        optimizer.zero_grad(set_to_none=True)
        state["step"], state["read"] = step + 1, state["read"] + batch
        state["unreadable"] += int(failed)
        failures = [error for micro in micros for error in micro["errors"]]
        if failed and world > 1:                               # the log names all processes'
            parts = [None] * world
            dist.all_gather_object(parts, failures)
            failures = sum(parts, [])
        if failures:
            meter.note(step=step + 1, unreadable=failures)
        meter.add(state, values, lr)                           # log one line
        check_unreadable(state, failures)
        if config.val_every and state["step"] % config.val_every == 0 and state["step"] < steps:
            validate()
        if state["step"] % config.save_every == 0 or state["step"] == steps or stop:   # save
            checkpoint()
        if stop:
            say(f"\nstopped by SIGTERM after step {step + 1}; the same command goes on from here")
            return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)              # all is saved: stop at once
    if config.val:
        validate()


def main(argv: list[str] | None = None) -> None:
    config, sizes, given = configure(argv)
    cuda = torch.cuda.is_available()
    rank, world, device = join_processes(cuda)
    if cuda:
        torch.set_float32_matmul_precision("high")
    else:                                  # leave the decoding processes their cores
        torch.set_num_threads(max(1, torch.get_num_threads() - config.workers))
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_, **__: None
    try:
        train(config, sizes, given, rank, world, device, say)
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
