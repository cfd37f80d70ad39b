"""Schedules of the learning rate."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler

LR_SCHEDULERS = ("cosine_warm_restarts", "constant", "constant_with_warmup", "cosine", "linear")


def multi_step(step: int, milestones: Sequence[int], decay: float, warmup_steps: int) -> float:
    """The factor of the learning rate in a step: `decay` to the power of the milestones behind it, and rising from
    near zero within the warm-up."""
    warmup = min((step + 1) / max(warmup_steps, 1), 1.0)
    return warmup * decay ** sum(step >= milestone for milestone in milestones)


def make_lr_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, batches_per_epoch: int = 0
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule over `args.max_train_steps` optimizer steps. To be stepped once per step, whatever the number of
    processes: it is not given to `Accelerator.prepare`. `batches_per_epoch` is for `multi_step`, whose milestones are
    epochs."""
    if args.lr_scheduler == "cosine_warm_restarts":
        return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            optimizer, T_0=args.lr_restart_steps, T_mult=args.lr_restart_factor
        )
    if args.lr_scheduler == "multi_step":
        milestones = [epoch * batches_per_epoch // args.gradient_accumulation_steps for epoch in args.lr_milestones]
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: multi_step(step, milestones, args.lr_decay, args.lr_warmup_steps)
        )
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )


def schedule_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that the learning rate's schedule reads: a resumed run has to share them, except for
    `max_train_steps`, which `check_unchanged` only warns of."""
    names = ["learning_rate", "lr_scheduler"]
    if args.lr_scheduler == "cosine_warm_restarts":
        names += ["lr_restart_steps", "lr_restart_factor"]
    elif args.lr_scheduler != "constant":
        names.append("lr_warmup_steps")
    if args.lr_scheduler in ("cosine", "linear"):
        names.append("max_train_steps")
    if args.lr_scheduler == "multi_step":
        names += ["lr_milestones", "lr_decay"]
    return {name: getattr(args, name) for name in names}
