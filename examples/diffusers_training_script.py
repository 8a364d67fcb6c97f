"""The loop of diffusers' unconditional training script, and the same with its noising and its loss swapped.

    python examples/diffusers_training_script.py --steps 2000           # diffusers
    python examples/diffusers_training_script.py --steps 2000 --ours    # genfast: two lines differ, marked below

Needs diffusers. Both train a UNet2DModel on the bundled digits and draw a few with diffusers' own pipeline.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from torchvision.utils import save_image

from genfast import schedules
from genfast.functional import denoising_loss, q_sample
from genfast.training import load_dataset


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ours", action="store_true", help="genfast's noising and loss")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--inference-steps", type=int, default=1000)
    parser.add_argument("--out", help="where to write a picture of 16 samples")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    images = load_dataset("digits", image_size=32).train.to(device)
    model = UNet2DModel(
        sample_size=32, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(args.channels, 2 * args.channels, 2 * args.channels),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).to(device)  # fmt: skip
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    schedule = schedules.from_alpha_bar(noise_scheduler.alphas_cumprod).to(device)

    for step in range(1, args.steps + 1):
        batch = images[torch.randint(len(images), (args.batch_size,), device=device)]
        if args.ours:
            # 1. The uint8 images go in as they are; the timesteps are drawn here, and the noise is never a tensor.
            noised = q_sample(batch, None, schedule)
            # 2. The loss makes the same noise again.
            loss = denoising_loss(model(noised.x_t, noised.t).sample, noised, schedule, reduction="mean")
        else:
            clean = batch.float() / 127.5 - 1
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(clean),), device=device)
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            loss = F.mse_loss(model(noisy, timesteps).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps:
            print(f"step {step}: {loss.item():.4f}")

    pipeline = DDPMPipeline(model.eval(), noise_scheduler)
    pipeline.set_progress_bar_config(disable=True)
    samples = pipeline(16, num_inference_steps=args.inference_steps, output_type="np").images
    print(f"{len(samples)} samples between {samples.min():.2f} and {samples.max():.2f}")
    if args.out:
        save_image(torch.from_numpy(samples).permute(0, 3, 1, 2), args.out, nrow=4)


if __name__ == "__main__":
    main()
