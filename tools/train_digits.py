"""Train the demo's denoiser and classifier on the UCI digits of scikit-learn.

The shipped weights were made by this command on 2 CPU cores, in one hour:

    python tools/train_digits.py --coarse-steps 5000 --steps 600

It was not one uninterrupted run: it was started with more steps and continued from its checkpoint
with fewer, which bends the learning rate's schedule. Every start, with its arguments, is listed
under "runs" in tools/results/train_digits.json.

It writes checkpoints/ as it goes and continues from there when started again. The first
--coarse-steps are taken at 16 x 16 (64 tokens): the position table of the diffusers class spans the
same grid there, so the weights carry over, at a fifth of the time per step.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn

from toca_fx.demo import digits

CHECKPOINT = Path("checkpoints/digits.pt")


def init_adaln_zero(model: nn.Module) -> None:
    """Initialise as adaLN-zero (DiT, section 3.2).

    Every block starts as the identity, and the model's output at zero.
    """
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up over 200 steps, then a cosine down to 2 % of the peak."""
    if step < 200:
        return peak * (step + 1) / 200
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - 200) / max(1, total - 200))))


def train_denoiser(
    images: Tensor, labels: Tensor, args: argparse.Namespace
) -> tuple[nn.Module, dict[str, object]]:
    """Train with v-prediction (Salimans & Ho 2022) and return the moving average of the weights."""
    torch.manual_seed(args.seed)
    scheduler = digits.build_scheduler()
    coarse = F.avg_pool2d(images, 2)
    model = digits.build_denoiser().train()
    init_adaln_zero(model)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99), foreach=True
    )
    total, start, loss_average, seconds = args.coarse_steps + args.steps, 0, 1.0, 0.0
    runs: list[dict[str, object]] = []
    if CHECKPOINT.exists():
        saved = torch.load(CHECKPOINT, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        start, loss_average, seconds = saved["step"], saved["loss"], saved["seconds"]
        runs = saved["runs"]
    runs.append({"from_step": start, **vars(args)})
    compiled = torch.compile(model, dynamic=False)
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("denoiser", total=total, completed=start, loss=loss_average)
        for step in range(start, total):
            began = time.perf_counter()
            # One generator per step: a resumed run draws what the uninterrupted one would have
            # drawn.
            torch.manual_seed(args.seed * 1_000_003 + step)
            source = coarse if step < args.coarse_steps else images
            rows = torch.randint(len(images), (args.batch,))
            clean, noise = source[rows], torch.randn(args.batch, *source.shape[1:])
            timesteps = torch.randint(1000, (args.batch,))
            noisy = scheduler.add_noise(clean, noise, timesteps)
            target = scheduler.get_velocity(clean, noise, timesteps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, args.lr)
            with torch.autocast("cpu", torch.bfloat16):
                predicted = compiled(
                    noisy, timestep=timesteps, class_labels=labels[rows], return_dict=False
                )[0]
            loss = F.mse_loss(predicted.float(), target)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            decay = min(0.999, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(average.parameters()), list(model.parameters()), 1 - decay
                )
            loss_average += 0.01 * (loss.item() - loss_average)
            seconds += time.perf_counter() - began
            progress.update(task, advance=1, loss=loss_average)
            if (step + 1) % 250 == 0 or step + 1 == total:
                save_checkpoint(
                    {
                        "model": model.state_dict(),
                        "average": average.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step + 1,
                        "loss": loss_average,
                        "seconds": seconds,
                        "runs": runs,
                    }
                )
                print(f"step {step + 1}: loss {loss_average:.4f}, {seconds:.0f} s", flush=True)
    return average, {"loss": loss_average, "seconds": seconds, "runs": runs}


def save_checkpoint(state: dict[str, object]) -> None:
    """Write a checkpoint.

    The file is written under another name first, so that an interrupted write never loses the
    previous checkpoint.
    """
    CHECKPOINT.parent.mkdir(exist_ok=True)
    torch.save(state, CHECKPOINT.with_suffix(".tmp"))
    CHECKPOINT.with_suffix(".tmp").rename(CHECKPOINT)


def train_classifier(images: Tensor, labels: Tensor, seed: int) -> tuple[nn.Module, float]:
    """Train a classifier; returns the accuracy on held-out digits too.

    It is trained on four fifths of the digits, shifted by up to 2 pixels and noised.
    """
    torch.manual_seed(seed)
    order = torch.randperm(len(images))
    held_out, training = order[: len(order) // 5], order[len(order) // 5 :]
    model = digits.build_classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(1500):
        rows = training[torch.randint(len(training), (128,))]
        dy, dx = torch.randint(-2, 3, (2,)).tolist()
        batch = torch.roll(images[rows], (dy, dx), dims=(2, 3))
        batch = batch + 0.2 * torch.rand(128, 1, 1, 1) * torch.randn_like(batch)
        loss = F.cross_entropy(model(batch), labels[rows], label_smoothing=0.02)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    return model, accuracy


def save_weights(model: nn.Module, name: str) -> None:
    """Write weights in half precision; the error is far below that of the model itself."""
    state = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    save_file(state, digits.WEIGHTS / name)


def main() -> None:
    """Train both networks, write the weights into the package and the figures to tools/results/."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coarse-steps", type=int, default=5000, help="steps at 16 x 16")
    parser.add_argument(
        "--steps", type=int, default=600, help="steps at 32 x 32, after the coarse ones"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    images, labels = digits.load_images()
    classifier, accuracy = train_classifier(images, labels, args.seed)
    save_weights(classifier, "digits-classifier.safetensors")
    print(f"classifier: {accuracy:.1%} on held-out digits", flush=True)
    denoiser, figures = train_denoiser(images, labels, args)
    save_weights(denoiser, "digits-dit.safetensors")

    classes = torch.arange(10).repeat(20)
    samples = digits.sample(denoiser, classes, steps=50)
    agreement = (classifier(samples).argmax(1) == classes).float().mean().item()
    print(f"denoiser: classifier agrees on {agreement:.1%} of 200 samples")
    result = {
        "torch": torch.__version__,
        "classifier_held_out_accuracy": accuracy,
        "classifier_agreement": agreement,
        **figures,
    }
    target = Path(__file__).parent / "results" / "train_digits.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
