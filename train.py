"""Trains All-in-one: pre-training (Sec. 3.3) and every downstream task (Sec. 4.2), in one loop.

    python train.py --task pretrain                            # proof run: toy clips, two CPU cores
    torchrun --nproc_per_node=8 train.py --task pretrain --data webvid/train.jsonl

From top to bottom: what each task trains (TASKS), all flags (TrainConfig), the folder of a run
(Run), the set-up, what the loop calls, the loop (Trainer.train), the linear probe, which trains one
layer only, the command line.

Both commands above run the same code: without torchrun it is a process group of one process.
Batches, dropout, masks and negatives are functions of the seed, the step and the rank. A run that
was killed therefore ends with the same bits when the same command starts it again.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import itertools
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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from allinone import (OBJECTIVES, SCORES, VARIANTS, AllInOne, Config, Loss, compute_losses,
                      count_items, cross_entropy, load_vit, read_weights)
from data import (BatchSampler, Clips, DataError, Manifest, Tokenizer, answers_of, collate, hash64,
                  load, texts_of, toy)
from eval import (ALL_PAIRS, EvalConfig, add_flags, cls_features, computes_bf16, evaluate,
                  gather_objects, given_flags, joined_processes, load_checkpoint, print_main,
                  report, save_curves, save_picture)

# ---- Tasks: what is trained, and by which recipe -------------------------------------------------

class Task(NamedTuple):
    """A row of TASKS. A recipe is a dictionary of flags: fields of TrainConfig and Config."""

    objectives: tuple[str, ...]    # what --objectives may name
    heads: tuple[str, ...]         # heads that the task's own score (allinone.SCORES) trains
    paper: dict                    # Sec. 4.1.2 and 4.2, where they differ from the defaults below
    release: dict                  # what --recipe release changes of it
    toy: dict                      # without --data: the proof run, or its fine-tuning


def toy_files(task: str) -> dict:
    """Flags of a fine-tuning on toy clips, from the checkpoint of the proof run."""
    return {"data": (f"data/toy/{task}_train.jsonl",), "val": (f"data/toy/{task}_test.jsonl",),
            "init": "runs/pretrain/checkpoint.pt"}


FINE_TUNING = dict(epochs=20, batch=256)       # Sec. 4.1.2; VCR: --epochs 100 --batch 512

TASKS = {
    "pretrain": Task(                          # Sec. 3.3
        objectives=tuple(OBJECTIVES),
        heads=(),
        paper=dict(objectives=("vtm", "mlm")),
        release=dict(objectives=("vtm", "mlm", "wpa"), whole_words=True, warmup=2500, batch=4096),
        toy=dict(data=("data/toy/train.jsonl",), steps=2400,
                 val=("data/toy/test.jsonl", "data/toy/choice_test.jsonl"))),
    "retrieval": Task(                         # Sec. 4.2.2
        objectives=("vtc", "vtm", "rank"),
        heads=("pooler", "vtm_head"),
        # "rank" stands for the paper's VTM, which it does not describe further (release). It joins
        # each clip with 16 captions: 8 clips make a forward pass of usual size.
        paper=dict(FINE_TUNING, objectives=("vtc", "rank"), batch_per_gpu=8),
        release=dict(batch=1024, epochs=200, lr=3e-4),       # DiDeMo: lr 6e-4 and 80 tokens
        toy=dict(toy_files("retrieval"), steps=300, batch=8, batch_per_gpu=8,    # 8 meanings
                 false_captions=5)),
    "choice": Task(                            # Sec. 4.2.1, 4.2.3
        objectives=("choice",),
        heads=("pooler", "vtm_head"),
        paper=dict(FINE_TUNING, objectives=("choice",)),
        release=dict(),                                      # LSMDC: lr 1e-5; VCR: 200 epochs
        toy=dict(toy_files("choice"), steps=200)),
    "qa": Task(                                # Sec. 4.2.1
        objectives=("qa",),
        heads=("pooler", "answer_head"),
        paper=dict(FINE_TUNING, objectives=("qa",)),
        release=dict(batch=512, answer_head="release", head_lr=10.0),
        toy=dict(toy_files("qa"), steps=200)),
    "probe": Task(                             # Tab. 12
        objectives=("probe",),
        heads=("answer_head",),
        paper=dict(FINE_TUNING, objectives=("probe",), answer_head="linear", batch_per_gpu=256),
        release=dict(epochs=50, lr=3e-4),                    # HMDB51: lr 1e-4
        toy=dict(toy_files("probe"), steps=600))}

RELEASE = dict(  # --recipe release, for every task
    beta2=0.98, roll="release", roll_unimodal=False, patch_order="random")

TOY = dict(  # without --data, for every task: a small model for two CPU cores
    variant="nano", image_size=48, dropout=0.0, drop_path=0.0, vocab="train",
    temporal_position=False,                   # so that only rolling can tell the order of frames
    epochs=0,                                  # --steps counts, not the epochs of FINE_TUNING
    batch=16, batch_per_gpu=16, lr=1e-3, workers=1, save_every=200)

OBJECTIVE_WEIGHTS = {"wpa": 0.1}    # release; all other objectives count once


# ---- Flags ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are those of pre-training (Sec. 4.1.2); TASKS changes them."""

    # what to train for: pretrain (Sec. 3.3), or a task of Sec. 4.2
    task: Literal[tuple(TASKS)] = "pretrain"
    # manifests to train on; without it: toy clips that are written to data/toy (the proof run)
    data: tuple[str, ...] = ()
    # file of weights to start from: ViT or DeiT (timm's .pth or .bin, Sec. 3.1), a checkpoint of
    # train.py, or the authors' .ckpt; "scratch": random weights
    init: str = "scratch"
    # folder for checkpoints, log and pictures; without it: runs/TASK
    out: str = ""
    # manifests to score when training ends
    val: tuple[str, ...] = ()
    # clips of a step on all GPUs together, a multiple of their number; 0: fine-tuning has 256
    # (Sec. 4.1.2; VCR: 512), pre-training batch_per_gpu on each GPU
    batch: int = 0
    # optimiser steps of the whole run (Sec. 4.1.2; Ti: 100000)
    steps: int = 200_000
    # length of the run in readings of the whole data, instead of --steps; 0: by --steps
    epochs: int = 0
    # highest learning rate (Sec. 4.1.2)
    lr: float = 1e-4
    # processes that read clips for each GPU; 0: the training process reads, unprotected from
    # clips that crash or hang
    workers: int = 8

    # width, depth and heads of the model (Tab. 1)
    variant: Literal["nano", "Ti", "S", "B", "L"] = "B"
    # paper: Sec. 4.1.2, 4.2; release: for all tasks the authors' beta2, two-way rolling of joint
    # passes alone and shuffled patches; for pretrain their batch, warm-up, word-patch alignment
    # and whole words; for a task their batch, epochs, learning rate and QA head; nothing else
    recipe: Literal["paper", "release"] = "paper"
    # what the weights learn: vtm, mlm, vtc, wpa for pretrain; vtc, rank, vtm for retrieval
    objectives: tuple[str, ...] = ("vtm", "mlm")
    # most clips of one forward pass on a GPU; a step accumulates gradients over as many as it
    # needs (Sec. 4.1.2: 16; Ti: 32)
    batch_per_gpu: int = 16
    # share of each manifest of --data in the clips; without it: in proportion to their lines
    mix: tuple[float, ...] = ()
    # names of the columns of a table, or of the keys of a .jsonl: video=NAME text=NAME
    columns: tuple[str, ...] = ()
    # vocabulary: bert-base-uncased, a vocab.txt, a tokenizer.json, or "train": learnt from the
    # captions of --data
    vocab: str = "bert-base-uncased"
    # score --val each so many steps too, and keep the best checkpoint as best.pt; 0: at the end
    val_every: int = 0
    # number format of matrix products: bf16 and fp16 are mixed with float32 (paper: fp16); auto:
    # bf16 on GPUs that compute in it, fp16 on other GPUs, fp32 on CPUs
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    # compile forward and backward with torch.compile; the first steps take minutes
    compile: bool = False
    # compute activations of the blocks again in the backward pass, which saves memory: L at 16
    # clips fits 80 GB
    activation_checkpointing: bool = False
    # parts of the model that keep their weights, such as: blocks.0 text_embeddings
    freeze: tuple[str, ...] = ()
    # what --lr is multiplied by for the answer head (release: 10)
    head_lr: float = 1.0
    # steps in which the learning rate rises: a share of all, or above 1 their number (Sec. 4.1.2)
    warmup: float = 0.1
    # decay of matrices and embedding tables, not of biases and norms (Sec. 4.1.2; release)
    weight_decay: float = 1e-2
    # AdamW's second beta; the paper is silent, 0.999 is torch's (release: 0.98)
    beta2: float = 0.999
    # captions of other clips that the objective "rank" sets beside the true one (release)
    false_captions: int = 15
    # MLM masks all pieces of a word together (release)
    whole_words: bool = False
    # how a frame becomes a square: release: resized to 1.2 times the size, whatever its
    # proportions, then cropped; paper: resized to the size (Sec. 4.1.1); proportions: its shorter
    # side resized to 1.2 times the size, then cropped
    resize: Literal["release", "paper", "proportions"] = "release"
    # draw the regions of the persons and things that a VCR question names (Tab. 5, "Mask")
    boxes: bool = True
    # seed of all randomness
    seed: int = 0
    # steps between two lines of the log; short runs have fewer, so that they have ten lines
    log_every: int = 50
    # steps between two checkpoints
    save_every: int = 1000
    # seconds after which a clip that is being read is given up
    timeout: float = 120


# Flags that may differ when a run goes on. Most of them change nothing that a step computes. The
# others, such as lr, change it from the next step on, and the run says from which.
CHANGEABLE = {
    "out", "val", "val_every", "workers", "log_every", "save_every", "timeout", "epochs", "lr",
    "steps", "batch_per_gpu"}


def recipe_of(task: str, recipe: str) -> dict:
    """The flags that --task and --recipe select."""
    flags = dict(TASKS[task].paper)
    if recipe == "release":
        flags.update(RELEASE)
        flags.update(TASKS[task].release)
    return flags


def configure(argv: list[str] | None = None) -> tuple[TrainConfig, dict, dict]:
    """Reads the command line. DataError for flags that do not go together.

    Returns how to train, the Config fields of a new model, and the fields that flags or the recipe
    name. The last are laid over the Config of a checkpoint that --init names; --variant is among
    them, so that build_model can refuse it beside such a checkpoint.
    """
    parser = argparse.ArgumentParser(
        description="Pre-train or fine-tune All-in-one. Without --data: the proof run, on toy "
        "clips, a few minutes on two CPU cores.",
        usage="python train.py --task TASK [--FLAG VALUE ...]", allow_abbrev=False)
    add_flags(parser.add_argument_group("training, the commonest first"), TrainConfig)
    add_flags(parser.add_argument_group("model"), Config)
    flags = given_flags(parser, argv)
    if flags.get("steps") and flags.get("epochs"):
        raise DataError("--steps and --epochs both say how long to train: give one of them")

    task = flags.get("task", TrainConfig.task)
    recipe = recipe_of(task, flags.get("recipe", TrainConfig.recipe))
    recipe.pop("batch", None)                  # split_batch asks for it, since data may be fewer
    if flags.get("steps"):
        recipe["epochs"] = 0
    values = {"out": f"runs/{task}"}
    values.update(recipe)
    if not flags.get("data"):
        values.update(TOY)
        values.update(TASKS[task].toy)
    values.update(flags)

    fields = set(Config.__dataclass_fields__)
    overrides = {}
    for name, value in {**recipe, **flags}.items():
        if name in fields or name == "variant":
            overrides[name] = value
    training = {name: value for name, value in values.items() if name not in fields}
    config = TrainConfig(**training)
    check_flags(config)
    model_fields = dict(VARIANTS[config.variant])
    model_fields.update((name, value) for name, value in values.items() if name in fields)
    return config, model_fields, overrides


def check_flags(config: TrainConfig) -> None:
    """DataError for flags that do not go together."""
    valid = TASKS[config.task].objectives
    unknown = [name for name in config.objectives if name not in valid]
    if unknown:
        raise DataError(f"--objectives {' '.join(unknown)}: those of --task {config.task} are "
                        f"{', '.join(valid)}")
    if "wpa" in config.objectives and "vtm" not in config.objectives:
        raise DataError("--objectives wpa needs vtm too: it takes VTM's matched and other pairs")
    if config.val_every and not config.val:
        raise DataError("--val_every needs --val, a manifest to score")
    tests = [path for path in config.val if re.search(r"(^|[_-])test\b", Path(path).name)]
    if config.val_every and tests:
        raise DataError(f"--val_every would choose the best checkpoint on {', '.join(tests)}: give "
                        "--val the validation split, and score the test split once, with eval.py")
    for name in ("batch_per_gpu", "steps", "log_every", "save_every"):
        if getattr(config, name) < 1:
            raise DataError(f"--{name} {getattr(config, name)}: must be 1 or more")
    for name in ("batch", "epochs", "workers", "val_every", "false_captions"):
        if getattr(config, name) < 0:
            raise DataError(f"--{name} {getattr(config, name)}: must be 0 or more")
    compilers = [name for name in ("g++", "c++", "clang++") if shutil.which(name)]
    if config.compile and not compilers:
        raise DataError("--compile: torch cannot compile without a C++ compiler; apt install g++")


# ---- A run's folder: lock, log, checkpoints ------------------------------------------------------

class Run:
    """The folder of a run. All processes have a Run; the first process alone writes.

    It holds a lock, log.jsonl, checkpoint.pt, the checkpoint before it (checkpoint.previous.pt),
    best.pt, curve.png and samples.png.
    state: what a checkpoint holds beside weights. "step": steps done. "clips": (manifests, 2),
        clips read and unreadable ones. "window": sums since the last line of the log. "best":
        best score of --val.
    content: the checkpoint that the folder holds, until `resume` has taken it up. Its keys are
        those of `describe` and of `parts` (model, optimizer, scaler), "state" and "log".
    """

    def __init__(self, out: str):
        self.folder = Path(out)
        self.is_main = dist.get_rank() == 0
        self.state = {"step": 0, "window": {}}
        self.log = {"bytes": 0, "curve": []}     # length of log.jsonl, and its losses
        self.content = None
        self.whole_checkpoint = None             # path of the newest checkpoint that can be read
        self.recent_unreadable = []              # clips that could not be read, of the latest step
        self.terminated = False                  # SIGTERM has come
        self.parent = os.getppid()
        if self.is_main:
            self.lock_folder()
            self.read_checkpoint()
        contents = [self.content]                # the function takes a list
        dist.broadcast_object_list(contents)
        self.content = contents[0]

    def lock_folder(self) -> None:
        """DataError if another process trains into the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "a")    # freed when this process ends, however
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{self.folder}: another process is training into it; wait for it, "
                            "stop it, or choose another --out") from None

    def read_checkpoint(self) -> None:
        """Reads the newest checkpoint that is whole. DataError if there are some and none is."""
        paths = [self.folder / "checkpoint.pt", self.folder / "checkpoint.previous.pt"]
        paths = [path for path in paths if path.exists()]
        for path in paths:
            try:
                content = read_weights(path)
            except ValueError as error:
                print_main(f"{error}; trying the checkpoint before it")
                continue
            if "config" in content and "log" in content:
                self.content = content
                self.whole_checkpoint = path
                return
        if paths:
            raise DataError(f"no checkpoint of train.py in {self.folder} can be read: remove them, "
                            "or choose another --out")

    def resume(self, description: dict, parts: dict) -> None:
        """Continues from the folder's checkpoint, if there is one, and opens the log.

        description: what a checkpoint tells about its run. parts: model, optimizer and scaler.
        DataError naming what differs if the folder holds another run.
        """
        self.description = json.loads(json.dumps(description))      # as a file gives it back
        self.parts = parts
        self.state["clips"] = torch.zeros(len(description["data"]), 2, dtype=torch.float64)
        if self.content:
            self.compare(self.content, self.description)
            for name, part in parts.items():
                part.load_state_dict(self.content[name])
            self.state = self.content["state"]
            self.log = self.content["log"]
            self.content = None
            print_main(f"resuming {self.folder} at step {self.state['step']}")
        if self.is_main:
            self.open_log()

    def compare(self, before: dict, now: dict) -> None:
        """DataError if the checkpoint is of another run. Prints CHANGEABLE flags that differ."""
        old = {**before["config"], "steps": before["steps"]}
        new = {**now["config"], "steps": now["steps"]}
        changes, conflicts = [], []
        for name in {**old, **new}:
            was = old.get(name, "not given")
            is_now = new.get(name, "not given")
            if was != is_now:
                texts = changes if name in CHANGEABLE else conflicts
                texts.append(f"{name} was {was}, now {is_now}")
        for manifest, manifest_now in zip(before["data"], now["data"]):
            name, lines, checksum = manifest
            _, lines_now, checksum_now = manifest_now
            if (lines, checksum) != (lines_now, checksum_now):
                conflicts.append(f"{name} had {lines} lines of checksum {checksum:08x}, now "
                                 f"{lines_now} of {checksum_now:08x}")
        if now["steps"] < before["state"]["step"]:
            conflicts.append(f"it is past step {now['steps']}")
        if conflicts:
            raise DataError(f"{self.folder} holds another run ({'; '.join(conflicts[:5])}): "
                            "choose another --out, or remove it")
        for text in changes:
            print_main(f"from step {before['state']['step'] + 1} on: {text}")

    def open_log(self) -> None:
        """Opens log.jsonl, cut to where the checkpoint was: what came after it is done again."""
        path = self.folder / "log.jsonl"
        self.file = open(path, "a", buffering=1)
        os.truncate(path, min(path.stat().st_size, self.log["bytes"]))
        self.file.write(json.dumps(self.description) + "\n")

    def write(self, **entry) -> None:
        """Writes a line of log.jsonl."""
        if self.is_main:
            self.file.write(json.dumps({"step": self.state["step"], **entry}) + "\n")

    def save(self, name: str = "checkpoint.pt") -> None:
        """Writes a checkpoint under another name, then renames it.

        So the folder holds a whole checkpoint at every moment, the new one or the one before.
        OSError if the disk is full.
        """
        if not self.is_main:
            return
        path = self.folder / name
        partial = path.with_suffix(".partial")
        self.log["bytes"] = (self.folder / "log.jsonl").stat().st_size
        content = {key: part.state_dict() for key, part in self.parts.items()}
        content.update(self.description, state=self.state, log=self.log)
        try:
            with open(partial, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            # The checkpoint before stays, under another name, unless it could not be read.
            if path == self.whole_checkpoint and path.exists():
                previous = self.folder / "checkpoint.previous.pt"
                path.replace(previous)
                self.whole_checkpoint = previous
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"{path}: cannot save ({error}){self.last_checkpoint()}") from error
        if name == "checkpoint.pt":
            self.whole_checkpoint = path
        save_curves(self.folder / "curve.png", self.log["curve"])

    def last_checkpoint(self) -> str:
        """The end of an error's sentence: from which checkpoint the run can go on."""
        if self.whole_checkpoint and self.whole_checkpoint.exists():
            return f"; {self.whole_checkpoint} is whole"
        return ""

    def is_due(self, every: int) -> bool:
        """Whether something that happens each `every` steps happens now. 0: never."""
        return every > 0 and self.state["step"] % every == 0

    def must_stop(self) -> bool:
        """Whether SIGTERM came, or torchrun, which started this process, is gone."""
        is_orphan = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent
        return self.terminated or is_orphan

    def stop_on_sigterm(self) -> None:
        """From now on SIGTERM lets the step end and a checkpoint be written."""
        def remember(*_) -> None:
            self.terminated = True
        signal.signal(signal.SIGTERM, remember)

    def count_clips(self, read: Tensor, unreadable: list[str]) -> None:
        """Adds (manifests, 2) clips read and unreadable ones, which the log names.

        ValueError if more than 1 clip in 10 is unreadable, once 100 were tried.
        """
        self.state["clips"] += read
        if unreadable:
            self.recent_unreadable = unreadable
            self.write(unreadable=unreadable)
        good, bad = self.state["clips"].sum(0).tolist()
        if good + bad >= 100 and bad > (good + bad) / 10:
            raise ValueError(
                f"{bad:.0f} of {good + bad:.0f} clips cannot be read, above 1 in 10, such as "
                f"{'; '.join(self.recent_unreadable[-3:])}. To train on the others: python data.py "
                "check MANIFEST, which names all of these and writes MANIFEST.clean.jsonl")


# ---- Set-up: model, data, optimiser --------------------------------------------------------------

def build_model(config: TrainConfig, model_fields: dict, overrides: dict, manifest: Manifest,
                run: Run) -> tuple[AllInOne, Tokenizer, list[str] | None]:
    """(model, tokenizer, answers) of the run's own checkpoint, else by --init."""
    torch.manual_seed(config.seed)
    answers = answers_of(manifest) if "answer_head" in TASKS[config.task].heads else None
    if run.content:
        if answers != run.content.get("answers"):
            print_main("the answers of the data have changed; those of the checkpoint count")
        return load_checkpoint(run.content, run.folder)
    if config.init == "scratch":
        return (*new_model(config, model_fields, manifest, answers), answers)
    content = read_weights(config.init)
    if is_allinone(content):
        if "variant" in overrides:
            raise DataError(f"--variant: the sizes are those of {config.init}; leave it out")
        # the answer head is the task's, not the checkpoint's
        head = model_fields.get("answer_head", Config.answer_head)
        model, tokenizer, _ = load_checkpoint(content, config.init, config.vocab, answers or [],
                                              **{**overrides, "answer_head": head})
        warn_of_unknown_words(tokenizer, manifest, config.init)
        return model, tokenizer, answers
    model, tokenizer = new_model(config, model_fields, manifest, answers)
    names = load_vit(model, content)
    resized = ", ".join(names["resized"]) or "none"
    print_main(f"{config.init}: {len(names['loaded'])} tensors loaded, resized: {resized}; all "
               "other weights are random")
    return model, tokenizer, answers


def is_allinone(content: dict) -> bool:
    """Whether a file of weights is a checkpoint of ours or of the authors, not ViT or DeiT."""
    names = content.get("state_dict", content)
    return "sizes" in content or any("text_embeddings" in name for name in names)


def new_model(config: TrainConfig, model_fields: dict, manifest: Manifest,
              answers: list[str] | None) -> tuple[AllInOne, Tokenizer]:
    """A model of random weights, and --vocab."""
    if config.vocab == "train":
        tokenizer = Tokenizer.train(all_texts(manifest), 30522)
    else:
        tokenizer = Tokenizer.load(config.vocab)
    sizes = {**model_fields, "vocab_size": tokenizer.vocab_size, "answers": len(answers or [])}
    return AllInOne(Config(**sizes)), tokenizer


def all_texts(manifest: Manifest) -> Iterator[str]:
    """Captions, questions and options of a manifest."""
    for i in range(len(manifest)):
        yield from texts_of(manifest[i])


def warn_of_unknown_words(tokenizer: Tokenizer, manifest: Manifest, init: str) -> None:
    """Says which words of the data (of 1000 texts) a checkpoint never learnt as words."""
    words = tokenizer.unknown_words(itertools.islice(all_texts(manifest), 1000))
    if words:
        print_main(f"the vocabulary of {init} has {tokenizer.vocab_size} tokens; it spells or does "
                   f"not know {len(words)} words of the data, such as: {', '.join(words[:10])}")


def set_trained(model: AllInOne, config: TrainConfig) -> None:
    """What gets gradients: all that the objectives reach, but for --freeze.

    DDP waits for a gradient of each trained parameter, so heads of other objectives are frozen.
    """
    heads = set()
    for names in OBJECTIVES.values():
        heads.update(names)
    for task in TASKS.values():
        heads.update(task.heads)
    for objective in config.objectives:
        trained = TASKS[config.task].heads
        if objective in OBJECTIVES:
            trained = OBJECTIVES[objective]
        heads.difference_update(trained)
    names = [f"{name}." for name, _ in model.named_parameters()]
    for part in config.freeze:
        if not any(name.startswith(f"{part}.") for name in names):
            parts = dict.fromkeys(name.split(".")[0] for name in names)
            raise DataError(f"--freeze {part}: no such part; there are {', '.join(parts)}, and "
                            f"blocks.0 to blocks.{model.config.depth - 1}")
    frozen = tuple(f"{part}." for part in (*heads, *config.freeze))
    for name, parameter in zip(names, model.parameters()):
        parameter.requires_grad_(not name.startswith(frozen))


def make_optimizer(model: AllInOne, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW [27] over what is trained. Its groups differ in weight decay and in lr's "factor"."""
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = config.head_lr if name.startswith("answer_head.") else 1.0
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((factor, decay), {
            "params": [], "weight_decay": decay, "factor": factor})
        group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=config.lr, betas=(0.9, config.beta2),
                             fused=True)


def choose_precision(config: TrainConfig, device: torch.device) -> str:
    """--precision, "auto" resolved for the device."""
    if config.precision != "auto":
        return config.precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if computes_bf16(device) else "fp16"


class Layout(NamedTuple):
    """How a step's clips are shared out: batch = world * micro_batch * accumulation_steps."""

    batch: int                   # clips of a step on all processes
    micro_batch: int             # clips of one forward pass on one process
    accumulation_steps: int      # micro-batches of a step on one process


def split_batch(config: TrainConfig, samples: int, world: int) -> Layout:
    """The fewest equal micro-batches, of whole groups of 8 clips if that can be.

    VTM draws its pairs within 8 clips. A batch that --batch does not give is cut to the number of
    samples. One that it gives is not: samples then repeat (warn_of_repeats).
    DataError if clips cannot be shared out, or if VTM would have single clips.
    """
    recipe = recipe_of(config.task, config.recipe)
    batch = config.batch or recipe.get("batch") or config.batch_per_gpu * world
    if samples < batch and not config.batch:
        multiple_of = 2 * world if "vtm" in config.objectives else world
        if samples >= 8 * world:
            multiple_of = 8 * world
        fewer = max(samples // multiple_of, 1) * multiple_of
        print_main(f"{samples} samples are less than a batch of {batch}: a step has {fewer} clips")
        batch = fewer
    if batch % world:
        raise DataError(f"--batch {batch} does not divide among {world} processes: use a multiple")
    share = batch // world
    sizes = [n for n in range(1, min(share, config.batch_per_gpu) + 1) if share % n == 0]
    groups = [n for n in sizes if n % 8 == 0]
    micro_batch = max(groups or sizes)
    if micro_batch < 2 and "vtm" in config.objectives:
        raise DataError(f"--batch {batch} on {world} processes makes micro-batches of 1 clip, "
                        "which VTM has nothing to mismatch with: take multiples of 8")
    return Layout(batch, micro_batch, share // micro_batch)


def total_steps(config: TrainConfig, samples: int, batch: int) -> int:
    """How many steps the run has: those of --epochs, rounded up, or --steps."""
    if config.epochs:
        return config.epochs * math.ceil(samples / batch)
    return config.steps


def lr_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Learning rate of a step, counted from 0 (Sec. 4.1.2).

    It rises linearly over `warmup` (a share of the steps or, above 1, their number), then falls
    linearly, and reaches 0 one step after the last.
    """
    rise = max(1, round(warmup * steps if warmup <= 1 else warmup))
    return peak * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def warn_of_repeats(sampler: BatchSampler, manifest: Manifest) -> None:
    """Says where a step reads a sample more than once."""
    for name, lines, clips in zip(manifest.names, sampler.sizes, sampler.clips_per_step()):
        if clips > lines:
            print_main(f"a step reads {clips} clips of {name}, which has {lines} lines: some more "
                       "than once; a smaller --batch would not")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def describe(config: TrainConfig, overrides: dict, layout: Layout, steps: int, model: AllInOne,
             tokenizer: Tokenizer, answers: list[str] | None, manifest: Manifest) -> dict:
    """What a checkpoint and the log's first line tell about a run; "config" decides if it is the
    same run (Run.compare)."""
    flags = {**asdict(config), **overrides, "batch": layout.batch}
    if len(manifest.sizes) > 1:
        # Each micro-batch reads one manifest, so that another size would read other clips.
        flags["clips of a micro-batch"] = layout.micro_batch
    commit = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, text=True,
                            capture_output=True)           # "" where there is none
    return {"config": flags, "steps": steps, "sizes": asdict(model.config),
            "data": manifest.contents(), "answers": answers,
            "tokenizer": tokenizer.words.to_str(), "torch": torch.__version__,
            "commit": commit.stdout.strip()}


# ---- What the loop calls -------------------------------------------------------------------------

class Losses(nn.Module):
    """allinone.compute_losses as a module, since DDP wraps modules."""

    def __init__(self, model: AllInOne, objectives: tuple[str, ...]):
        super().__init__()
        self.model = model
        self.objectives = objectives

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Loss]:
        return compute_losses(self.model, batch, self.objectives)


class MicroBatch(NamedTuple):
    """Clips of one forward pass on this process, all of one manifest."""

    tensors: dict[str, Tensor]   # as allinone's Sec. 3.3 and 4.2 take them, on the device
    items: dict[str, int]        # how many items the loss of each objective counts
    manifest: int                # which manifest of --data
    source_lines: list[str]      # file:line of each clip
    unreadable: list[str]        # what could not be read, so that other clips stand in


def to_device(batch: dict, objectives: tuple[str, ...], device: torch.device) -> MicroBatch:
    """Sends a batch of data.collate to the device, without waiting until it is there.

    Items are counted on the CPU, before: to read the counts back from a GPU would mean to wait.
    """
    items = {name: int(count_items(batch, name)) for name in objectives}
    tensors = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            continue
        if device.type == "cuda":              # only a copy from pinned memory does not wait
            value = value.pin_memory()
        tensors[name] = value.to(device, non_blocking=True)
    return MicroBatch(tensors, items, int(batch["manifest_id"][0]), batch["source_line"],
                      batch["unreadable"])


def mark_varying(tensors: dict[str, Tensor]) -> None:
    """Tells torch.compile which sizes change even if all texts are equally long.

    They are the number of words to predict and that of a clip's candidates.
    """
    varying = {"mlm_positions": 0, "mlm_labels": 0,            # the dimension
               "option_ids": 1, "option_text_mask": 1, "option_mask": 1}
    for name, dimension in varying.items():
        if name in tensors:
            torch._dynamo.maybe_mark_dynamic(tensors[name], dimension)


def add_loss(sums: dict[str, Tensor], name: str, loss: Loss, manifest: int, manifests: int) -> None:
    """Adds a loss and its accuracy to tables (manifests, 2) of (sum, number), on the device."""
    pairs = {name: loss.total}
    if loss.correct is not None:
        pairs[f"{name}_accuracy"] = loss.correct
    for key, value in pairs.items():
        if key not in sums:
            sums[key] = torch.zeros(manifests, 2, device=value.device)
        sums[key][manifest] += torch.stack([value.detach().float(), loss.number.float()])


def unreached(loss: Tensor, model: nn.Module) -> list[str]:
    """Names of trained parameters that do not take part in a loss. DDP would wait for them."""
    reached, visited, nodes = set(), set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        reached.add(getattr(node, "variable", None))       # of the nodes that collect gradients
        nodes += [following for following, _ in node.next_functions]
    return [name for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter not in reached]


def reduce_over_processes(sums: dict[str, Tensor], stop: bool,
                          norm: Tensor) -> tuple[dict[str, Tensor], bool, float]:
    """Sums of all processes and whether one of them must stop, on the host.

    This is the step's one wait for the device. The norm of the gradients comes along; it is equal
    on all processes, for DDP has averaged them.
    """
    tables = torch.stack(list(sums.values()))                          # (names, manifests, 2)
    flag = torch.full((1,), float(stop), device=tables.device)
    numbers = torch.cat([tables.flatten(), flag])
    dist.all_reduce(numbers)
    *values, stops, norm = torch.cat([numbers, norm.detach().float().view(1)]).cpu().tolist()
    on_host = torch.tensor(values, dtype=torch.float64).view(tables.shape)
    return dict(zip(sums, on_host)), stops > 0, norm


PEAKS = {  # FLOP/s in bf16 without sparsity, from the data sheets: MFU is a share of it
    "B200": 2250e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def peak_flops(name: str) -> float:
    """FLOP/s of a GPU by its name, 0 if it is not in PEAKS."""
    return max([peak for key, peak in PEAKS.items() if key in name], default=0.0)


class Progress:
    """Writes lines of the log: means of losses since the last line, and how fast the run goes."""

    def __init__(self, run: Run, config: TrainConfig, steps: int, batch: int, peak: float = 0):
        self.run = run
        self.steps = steps
        self.batch = batch
        self.every = min(config.log_every, max(1, steps // 10))
        self.peak = peak                     # FLOP/s of all processes, 0: unknown
        self.flops = 0                       # of a step
        self.manifests = [name for name, *_ in run.description["data"]]
        self.start_clock()

    def start_clock(self) -> None:
        self.start_step = self.run.state["step"]
        self.start_time = time.monotonic()
        self.data_wait = 0.0                 # seconds in which the run waited for clips

    def leave_out(self, seconds: float) -> None:
        """Does not count so many seconds as training."""
        self.start_time += seconds

    def end_step(self, sums: dict[str, Tensor], norm: float, lr: float,
                 unreadable: list[str]) -> None:
        """Counts a step that is done. sums: of all processes, as reduce_over_processes gives them.

        Where a line of the log is due, writes it.
        """
        self.run.state["step"] += 1
        self.run.count_clips(sums.pop("clips"), unreadable)
        sums["grad_norm"] = torch.tensor([[norm, 1.0]], dtype=torch.float64)
        window = self.run.state["window"]
        for name, table in sums.items():
            if table.isfinite().all():       # grad_norm of a step that overflows fp16 is not
                window[name] = window.get(name, 0) + table
        if self.run.is_due(self.every) or self.run.state["step"] == self.steps:
            self.write(lr)

    def write(self, lr: float) -> None:
        """A line of the log, and one for people; then the window is empty."""
        step = self.run.state["step"]
        record = self.means(lr)
        self.run.log["curve"].append({"step": step, **record})
        self.run.state["window"].clear()
        speed = self.speed()
        self.run.write(**record, **speed)
        print_main(progress_line(step, self.steps, record, speed))
        self.start_clock()

    def means(self, lr: float) -> dict:
        """Mean of each loss and accuracy; of several manifests also of each one's."""
        window = self.run.state["window"]
        record = {"lr": lr}
        for name, table in window.items():
            record[name] = mean(table.sum(0))
        if len(self.manifests) > 1:
            record["manifests"] = {}
            for k, manifest in enumerate(self.manifests):
                read, unreadable = self.run.state["clips"][k].tolist()
                row = {"clips": int(read), "unreadable": int(unreadable)}
                for name, table in window.items():
                    if name != "grad_norm" and table[k, 1]:
                        row[name] = mean(table[k])
                record["manifests"][manifest] = row
        return record

    def speed(self) -> dict:
        """Clips a second, share of the time in which data was waited for, memory, seconds left."""
        steps = self.run.state["step"] - self.start_step
        seconds = time.monotonic() - self.start_time
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        speed = {"clips_per_s": steps * self.batch / seconds, "data_wait": self.data_wait / seconds,
                 "memory_gb": memory / 1e9, "unreadable": int(self.run.state["clips"][:, 1].sum()),
                 "eta_s": (self.steps - self.run.state["step"]) * seconds / steps}
        if self.peak and self.flops:
            speed["mfu"] = steps * self.flops / seconds / self.peak
        return speed


def mean(pair: Tensor) -> float:
    """Mean of a (sum, number)."""
    return float(pair[0] / pair[1].clamp(min=1))


def progress_line(step: int, steps: int, record: dict, speed: dict) -> str:
    """At most 100 columns for people: step, share, losses with accuracies, clips/s, time left.

    Numbers keep their columns from line to line. What is zero or unknown is left out.
    """
    parts = [f"step {step:>{len(str(steps))}} {step / steps:4.0%}"]
    for name, value in record.items():
        if f"{name}_accuracy" in record:
            parts.append(f"{name} {short(value)} {record[name + '_accuracy']:4.0%}")
        elif name in (*OBJECTIVES, *SCORES):
            parts.append(f"{name} {short(value)}")
    rate = speed["clips_per_s"]
    parts.append(f"{rate:5.0f} clips/s" if rate >= 10 else f"{rate:5.2f} clips/s")
    if speed["eta_s"] >= 1:
        parts.append(f"{duration(speed['eta_s'])} left")
    if speed.get("mfu"):
        parts.append(f"MFU {speed['mfu']:.0%}")
    if speed["unreadable"]:
        parts.append(f"{speed['unreadable']} unreadable")
    while len(" ".join(parts)) > 100:
        parts.pop()
    if len("  ".join(parts)) > 100:
        return " ".join(parts)
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """A time in seven characters: hours or minutes from two up, else the smaller unit."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}".rjust(7)
    return f"{seconds:.0f} s".rjust(7)


def short(value: float) -> str:
    """A number of 0 or more in five characters: 0.231, 12.35, 123.4."""
    return f"{value:.3f}"[:5].rstrip(".").rjust(5)


def open_clips(config: TrainConfig, manifest: Manifest, model: AllInOne, tokenizer: Tokenizer,
               answers: list[str] | None, train: bool = True) -> Clips:
    """The samples to train on. train: with random frames, crops, captions and masks."""
    c = model.config
    return Clips(manifest, tokenizer, config.task, c.frames, c.image_size, c.max_text_len, train,
                 seed=config.seed, resize=config.resize, boxes=config.boxes, answers=answers,
                 whole_words=config.whole_words,
                 false_captions=config.false_captions if "rank" in config.objectives else 0)


def introduce(run: Run, config: TrainConfig, model: AllInOne, samples: int, layout: Layout,
              steps: int, where: str) -> None:
    """Prints what is going to be trained, on what and where."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    line = (f"{config.task}: {trained / 1e6:.1f} M trained parameters, {samples} samples, {steps} "
            f"steps of {layout.batch} clips")
    if layout.accumulation_steps > 1:
        line += f" in {layout.accumulation_steps} micro-batches of {layout.micro_batch}"
    print_main(f"{line}, {where}; log and checkpoint in {run.folder}")


def eval_configs(config: TrainConfig, model: AllInOne, tokenizer: Tokenizer,
                 answers: list[str] | None) -> list[EvalConfig]:
    """How to score each manifest of --val. DataError, before training, if one does not fit."""
    configs = []
    for path in config.val:
        sample = Manifest(path, config.columns)[0]
        task = config.task
        if task == "pretrain" and "options" in sample:       # zero-shot (Sec. 4.2.3)
            task = "choice"
        rerank = 0
        if task == "retrieval" and "vtc" not in config.objectives:
            rerank = ALL_PAIRS                               # cosines mean nothing: VTM ranks all
        configs.append(EvalConfig(
            task=task, data=(path,), batch=32, workers=config.workers, resize=config.resize,
            boxes=config.boxes, columns=config.columns, rerank=rerank,
            objectives=config.objectives))
        # One sample is read now, so that a misfit shows before training.
        configs[-1].open_clips(model, tokenizer, answers).read_words(sample)
    return configs


def validate(progress: Progress, config: TrainConfig, configs: list[EvalConfig], model: AllInOne,
             tokenizer: Tokenizer, answers: list[str] | None, device: torch.device) -> None:
    """Scores each manifest of --val. With --val_every, the best checkpoint is kept as best.pt.

    The score is the mean of each sample's first metric over a manifest, then over the manifests.
    """
    run = progress.run
    start = time.monotonic()
    scores = []
    for scoring in configs:
        with torch.compiler.set_stance("force_eager"):       # compiled for shapes of training
            result = evaluate(model, tokenizer, scoring, device, answers)
        table = report(result, scoring, model.config)
        run.write(data=scoring.data, result=table)
        values = []
        for prediction in result["predictions"]:
            main_metric, *_ = prediction["metrics"].values()
            values.append(main_metric)
        if values:
            scores.append(sum(values) / len(values))
    model.train()
    progress.leave_out(time.monotonic() - start)
    if not config.val_every or not scores:
        return
    score = sum(scores) / len(scores)
    if score > run.state.get("best", -math.inf):
        run.state["best"] = score
        run.save("best.pt")


# ---- The loop ------------------------------------------------------------------------------------

class Trainer:
    """A run on clips: its set-up, then the loop."""

    def __init__(self, config: TrainConfig, model_fields: dict, overrides: dict,
                 device: torch.device):
        self.config = config
        self.device = device
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.run = Run(config.out)

        # ---- Model
        manifest = Manifest(config.data, config.columns)
        model, self.tokenizer, self.answers = build_model(
            config, model_fields, overrides, manifest, self.run)
        self.model = model.to(device)
        self.model.activation_checkpointing = config.activation_checkpointing
        set_trained(self.model, config)

        # ---- Data
        self.layout = split_batch(config, len(manifest), self.world)
        self.steps = total_steps(config, len(manifest), self.layout.batch)
        self.clips = open_clips(config, manifest, self.model, self.tokenizer, self.answers)
        self.eval_configs = eval_configs(config, self.model, self.tokenizer, self.answers)

        # ---- Optimiser
        self.optimizer = make_optimizer(self.model, config)
        precision = choose_precision(config, device)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
        self.autocast = functools.partial(torch.autocast, device.type, dtype, precision != "fp32")
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

        # ---- Resume
        self.run.resume(
            describe(config, overrides, self.layout, self.steps, self.model, self.tokenizer,
                     self.answers, manifest),
            {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler})
        self.model.train()
        self.losses = Losses(self.model, config.objectives)
        if config.compile:
            # Forward and backward of a whole micro-batch, without a graph break. The first text
            # length gets a graph of its own, the second one a graph for all lengths.
            self.losses.compile(fullgraph=True)
        self.ddp = DistributedDataParallel(self.losses, gradient_as_bucket_view=True)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.checked_manifests = set()
        name = "CPU"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        introduce(self.run, config, self.model, len(manifest), self.layout, self.steps,
                  f"{precision} on {self.world} x {name}")
        # images cost less than clips, so that a mixture of manifests has no MFU
        peak = peak_flops(name) if len(manifest.sizes) == 1 else 0.0
        self.progress = Progress(self.run, config, self.steps, self.layout.batch,
                                 peak * self.world)

    def stream(self) -> Iterator[dict]:
        """This process's batches from the run's step on (data.BatchSampler, data.load)."""
        config, layout = self.config, self.layout
        sampler = BatchSampler(
            self.clips.manifest.sizes, layout.batch, config.seed, self.rank, self.world,
            self.run.state["step"], layout.accumulation_steps, self.steps, config.mix)
        warn_of_repeats(sampler, self.clips.manifest)
        # VTM's pairs are drawn among 8 neighbours (4 or 2 where 8 does not divide a micro-batch).
        # Micro-batches of another size then give the same pairs. An odd micro-batch is one group.
        pair_group = layout.micro_batch
        if pair_group % 2 == 0:
            pair_group = math.gcd(pair_group, 8)
        make_batch = functools.partial(collate, clips=self.clips, group=pair_group)
        clips_ahead = 2 * layout.micro_batch * layout.accumulation_steps      # two steps
        return load(self.clips, sampler, make_batch, config.workers, config.timeout, clips_ahead)

    def fetch(self, stream: Iterator[dict]) -> list[MicroBatch]:
        """The next step's micro-batches, on their way to the device; an empty list at the end."""
        start = time.monotonic()
        micro_batches = []
        for batch in itertools.islice(stream, self.layout.accumulation_steps):
            micro_batches.append(to_device(batch, self.config.objectives, self.device))
            if self.config.compile:
                mark_varying(micro_batches[-1].tensors)
        self.progress.data_wait += time.monotonic() - start
        return micro_batches

    def train(self) -> bool:
        """The loop. Returns whether the run came to its end, rather than being stopped.

        A step is: the learning rate, then for each micro-batch a forward and a backward pass, which
        add up gradients; then the sums of losses over all processes, the update of the weights, a
        line of the log, and where they are due, validation and a checkpoint.
        """
        run, config = self.run, self.config
        run.stop_on_sigterm()
        stream = self.stream()
        next_micro_batches = self.fetch(stream)
        self.progress.start_clock()

        for step in range(run.state["step"], self.steps):
            micro_batches = next_micro_batches
            lr = lr_at(step, self.steps, config.lr, config.warmup)
            set_lr(self.optimizer, lr)
            if step == 0 and run.is_main:
                self.save_samples(micro_batches[0])
            self.count_flops(micro_batches)
            items = self.items_of_step(micro_batches)
            sums = {}

            for i, micro_batch in enumerate(micro_batches):
                torch.manual_seed(hash64(config.seed, step, self.rank, i))       # of dropout
                # gradients of all processes are averaged with the last micro-batch's, once a step
                self.ddp.require_backward_grad_sync = i == len(micro_batches) - 1
                with self.autocast():
                    losses = self.ddp(micro_batch.tensors)                        # forward
                loss = self.weighted_sum(losses, items)
                self.check_reached(loss, micro_batch.manifest)
                self.scaler.scale(loss).backward()                                # backward
                self.add_losses(sums, losses, micro_batch)

            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in self.trained])
            next_micro_batches = self.fetch(stream)            # while the device still computes
            sums, stop, norm = reduce_over_processes(sums, run.must_stop(), norm)
            self.check_finite(sums, norm, micro_batches)
            self.scaler.step(self.optimizer)                                      # step
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)

            self.progress.end_step(sums, norm, lr, self.unreadable(sums, micro_batches))
            if run.is_due(config.val_every) and step + 1 < self.steps:
                self.validate()
            if run.is_due(config.save_every) or step + 1 == self.steps or stop:
                run.save()
            if stop:
                break
        signal.signal(signal.SIGTERM, signal.SIG_DFL)          # all is saved: stop at once
        is_complete = run.state["step"] == self.steps
        if is_complete:
            self.validate()
        return is_complete

    def items_of_step(self, micro_batches: list[MicroBatch]) -> dict[str, Tensor]:
        """How many items, on all processes, each loss of a step is the mean of. On the device."""
        counts = []
        for name in self.config.objectives:
            number = sum(micro_batch.items[name] for micro_batch in micro_batches)
            counts.append(torch.full((), float(number), device=self.device))
        counts = torch.stack(counts)
        dist.all_reduce(counts)
        return dict(zip(self.config.objectives, counts.clamp(min=1)))

    def weighted_sum(self, losses: dict[str, Loss], items: dict[str, Tensor]) -> Tensor:
        """The loss of a micro-batch: its share of each objective's mean over the whole step.
        DDP takes the mean over processes where a sum is meant, hence the factor `world`."""
        loss = 0.0
        for name in self.config.objectives:
            weight = OBJECTIVE_WEIGHTS.get(name, 1.0) * self.world
            loss = loss + weight * losses[name].total / items[name]
        return loss

    def check_reached(self, loss: Tensor, manifest: int) -> None:
        """DataError if a trained parameter takes no part in the loss of a manifest's clips.
        Looked at once for each manifest: what its clips use does not change."""
        if manifest in self.checked_manifests:
            return
        self.checked_manifests.add(manifest)
        names = unreached(loss, self.model)
        if names:
            path = self.clips.manifest.names[manifest]
            raise DataError(
                f"{', '.join(names[:5])}: no part in the losses of {path}, but each micro-batch "
                "must give all trained parameters a gradient: processes wait for all of them. "
                "A head belongs to its objective in allinone.OBJECTIVES, or to its task in "
                "train.TASKS. Where something does not apply, such as a temporal mixing to images "
                "(S = 1), multiply it by 0 instead of leaving it out, as AllInOne.embed_video does "
                "with temporal_embed. Or name it after --freeze")

    def add_losses(self, sums: dict[str, Tensor], losses: dict[str, Loss],
                   micro_batch: MicroBatch) -> None:
        """Adds a micro-batch to the step's tables (manifests, 2) of (sum, number), on the device.
        "clips" has (clips read, unreadable ones)."""
        manifest = micro_batch.manifest
        manifests = len(self.clips.manifest.sizes)
        for name in self.config.objectives:
            add_loss(sums, name, losses[name], manifest, manifests)
        if "clips" not in sums:
            sums["clips"] = torch.zeros(manifests, 2, device=self.device)
        sums["clips"][manifest, 0] += len(micro_batch.source_lines)
        sums["clips"][manifest, 1] += len(micro_batch.unreadable)

    def count_flops(self, micro_batches: list[MicroBatch]) -> None:
        """FLOPs of a step, for MFU, counted by torch on a micro-batch that trains nothing."""
        if not self.progress.peak or self.progress.flops:
            return
        counter = FlopCounterMode(display=False)
        with torch.compiler.set_stance("force_eager"), self.autocast(), counter:
            losses = self.losses(micro_batches[0].tensors)
            sum(loss.total for loss in losses.values()).backward()
        self.model.zero_grad(set_to_none=True)
        self.progress.flops = self.world * len(micro_batches) * counter.get_total_flops()

    def check_finite(self, sums: dict[str, Tensor], norm: float,
                     micro_batches: list[MicroBatch]) -> None:
        """ValueError before a step that would ruin the weights, with losses, step and samples."""
        step = self.run.state["step"]
        bad = [name for name, table in sums.items() if not table.isfinite().all()]
        if not math.isfinite(norm) and not self.scaler.is_enabled():    # fp16: the scaler skips it
            bad.append("grad_norm")
        if bad:
            lines = []
            for micro_batch in micro_batches:
                lines += micro_batch.source_lines
            raise ValueError(
                f"step {step}: {', '.join(bad)} not finite; stopped before the update"
                f"{self.run.last_checkpoint()}. This process's samples: {', '.join(lines)}. Lower "
                "--lr, or look at these clips")
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise ValueError(f"step {step}: gradients overflow fp16 at any scale; use bf16 or fp32")

    def unreadable(self, sums: dict[str, Tensor], micro_batches: list[MicroBatch]) -> list[str]:
        """What this step could not read, on any process. The sums are of all processes, so that
        either all of them come to gather, or none."""
        if not sums["clips"][:, 1].any():
            return []
        lines = []
        for micro_batch in micro_batches:
            lines += micro_batch.unreadable
        return gather_objects(lines)

    def validate(self) -> None:
        validate(self.progress, self.config, self.eval_configs, self.model, self.tokenizer,
                 self.answers, self.device)

    def save_samples(self, micro_batch: MicroBatch) -> None:
        """samples.png, what the model is fed: up to 8 clips above their texts."""
        batch = {name: tensor.cpu() for name, tensor in micro_batch.tensors.items()}
        rows = []
        for i in range(min(8, len(batch["video"]))):
            texts = [batch["text_ids"][i]] if "text_ids" in batch else []
            clip, label = i, ""
            if "option_ids" in batch:
                texts = list(batch["option_ids"][i][batch["option_mask"][i]])
            if "mlm_ids" in batch:
                texts.append(batch["mlm_ids"][i])
            if "vtm" in self.config.objectives:
                clip = int(batch["vtm_video"][i])
                label = "matched: " if batch["vtm_labels"][i] else "not matched: "
            words = [self.spell(ids) for ids in texts]
            rows.append((label + " / ".join(words), list(batch["video"][clip])))
        save_picture(self.run.folder / "samples.png", rows)

    def spell(self, ids: Tensor) -> str:
        """Tokens of a text, without padding."""
        tokens = [self.tokenizer.words.id_to_token(i) for i in ids.tolist()
                  if i != self.tokenizer.pad_id]
        return " ".join(tokens)


# ---- The linear probe ----------------------------------------------------------------------------

class ProbeSamples(NamedTuple):
    """The clips that could be read, N of them, as a linear probe sees them (Tab. 12)."""

    features: Tensor             # (N, D) cls tokens of the video, on the device
    labels: Tensor               # (N,) on the device; -1: none of the classes
    manifest_ids: Tensor         # (N,) which manifest of --data each one is of
    clips: Tensor                # (manifests, 2) clips read, and unreadable ones
    unreadable: list[str]        # what could not be read


def encode_for_probe(config: TrainConfig, manifest: Manifest, model: AllInOne, tokenizer: Tokenizer,
                     answers: list[str] | None, path: Path, device: torch.device) -> ProbeSamples:
    """Each clip's feature, computed once and kept in the file `path`.

    DataError if a manifest has no clip that can be read.
    """
    clips = open_clips(config, manifest, model, tokenizer, answers, train=False)
    samples, unreadable = cls_features(model, clips, path, config, device)
    manifest_ids = torch.tensor([sample["manifest_id"] for sample in samples])
    read = manifest_ids.long().bincount(minlength=len(manifest.sizes))
    if not read.all():
        raise DataError(f"no clip of a manifest can be read: {'; '.join(unreadable[:3])}")
    features = torch.stack([sample["feature"] for sample in samples]).to(device)
    labels = torch.tensor([sample["label"] for sample in samples]).to(device)
    counts = torch.stack([read, torch.tensor(manifest.sizes) - read], 1)
    return ProbeSamples(features, labels, manifest_ids, counts, unreadable)


def linear_probe(config: TrainConfig, model_fields: dict, overrides: dict,
                 device: torch.device) -> bool:
    """Linear probe (Tab. 12, App. D.1): one linear layer on the video's cls token.

    It has a loop of its own, because all else is frozen: each clip's feature is computed once,
    without augmentation (ours), and kept in features.pt. The layer is so small that each process
    trains the whole of it, on the same batches. Returns whether the run came to its end, rather
    than being stopped.
    """
    # ---- Model
    run = Run(config.out)
    manifest = Manifest(config.data, config.columns)
    model, tokenizer, answers = build_model(config, model_fields, overrides, manifest, run)
    model.to(device).requires_grad_(False)
    model.answer_head.requires_grad_(True)

    # ---- Data
    samples = encode_for_probe(config, manifest, model, tokenizer, answers,
                               run.folder / "features.pt", device)
    layout = split_batch(config, len(samples.labels), world=1)
    steps = total_steps(config, len(samples.labels), layout.batch)
    configs = eval_configs(config, model, tokenizer, answers)

    # ---- Optimiser
    optimizer = make_optimizer(model, config)

    # ---- Resume
    run.resume(describe(config, overrides, layout, steps, model, tokenizer, answers, manifest),
               {"model": model, "optimizer": optimizer})
    if run.state["step"] == 0:
        run.count_clips(samples.clips, samples.unreadable)
    sampler = BatchSampler(samples.clips[:, 0].tolist(), layout.batch, config.seed,
                           start=run.state["step"], accumulation_steps=layout.accumulation_steps,
                           steps=steps, shares=config.mix)
    introduce(run, config, model, len(samples.labels), layout, steps, f"fp32 on {device.type}")
    progress = Progress(run, config, steps, layout.batch)

    # ---- Loop
    run.stop_on_sigterm()
    model.train()
    stream = iter(sampler)
    for step in range(run.state["step"], steps):
        lr = lr_at(step, steps, config.lr, config.warmup)
        set_lr(optimizer, lr)
        torch.manual_seed(hash64(config.seed, step))           # of dropout in the layer, if any
        sums = {"clips": torch.zeros(len(manifest.sizes), 2, dtype=torch.float64)}
        micro_batches = list(itertools.islice(stream, layout.accumulation_steps))
        samples_of_step = [sample for sample, _visit in itertools.chain(*micro_batches)]
        known = (samples.labels[samples_of_step] >= 0).sum().clamp(min=1)
        for visits in micro_batches:
            rows = [sample for sample, _ in visits]
            loss = cross_entropy(model.answer_head(samples.features[rows]), samples.labels[rows])
            (loss.total / known).backward()
            manifest_id = int(samples.manifest_ids[rows[0]])           # that of all these rows
            add_loss(sums, "probe", loss, manifest_id, len(manifest.sizes))
        norm = nn.utils.get_total_norm([p.grad for p in model.answer_head.parameters()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        progress.end_step({name: table.cpu().double() for name, table in sums.items()}, float(norm),
                          lr, unreadable=[])
        if run.is_due(config.val_every) and step + 1 < steps:
            validate(progress, config, configs, model, tokenizer, answers, device)
        stop = any(gather_objects([run.must_stop()]))
        if run.is_due(config.save_every) or step + 1 == steps or stop:
            run.save()
        if stop:
            break
    signal.signal(signal.SIGTERM, signal.SIG_DFL)              # all is saved: stop at once
    is_complete = run.state["step"] == steps
    if is_complete:
        validate(progress, config, configs, model, tokenizer, answers, device)
    return is_complete


# ---- Command line --------------------------------------------------------------------------------

def write_toy_clips(config: TrainConfig) -> None:
    """The toy set, where it is what the run trains on; the first process writes it."""
    if not config.data[0].startswith("data/toy/"):
        return
    print_main("toy clips: a small model for two CPU cores, to see that all works; your own clips: "
               "--data MANIFEST")
    if dist.get_rank() == 0:
        toy()
    dist.barrier()


def main(argv: list[str] | None = None) -> None:
    """Exit codes: 0 when the run has come to its end, 143 when SIGTERM stopped it.

    A stopped run has saved a checkpoint. 143 (128 + 15) is what a shell reports of a program that
    SIGTERM ended, so that schedulers and `&&` do not take the run for complete. torchrun itself
    ends with 1 then.
    """
    with joined_processes() as device:         # of whose errors one process tells
        config, model_fields, overrides = configure(argv)
        if device.type == "cpu":               # leave the reading processes their cores
            torch.set_num_threads(max(1, torch.get_num_threads() - config.workers))
        write_toy_clips(config)
        if config.task == "probe":
            is_complete = linear_probe(config, model_fields, overrides, device)
        else:
            is_complete = Trainer(config, model_fields, overrides, device).train()
        if not is_complete:
            print_main("stopped by SIGTERM; the same command goes on from here")
    if not is_complete:
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
