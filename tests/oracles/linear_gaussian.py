"""Diffusion written as its papers write it, one schedule and objective at a time, in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfast.cases import SEED, Case, Inputs, Outputs
from genfast.random import Stream, normal


def _noise(like: Tensor) -> Tensor:
    rows = normal(SEED, len(like), like[0].numel(), Stream.FORWARD_NOISE)
    return rows.double().reshape(like.shape)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.double().reshape(-1, *[1] * (like.dim() - 1))


def _in_unit_range(x: Tensor) -> Tensor:
    return (x.double() / 255 - 0.5) / 0.5 if x.dtype == torch.uint8 else x


def forward_noising(case: Case, inputs: Inputs) -> Outputs:
    x0 = _in_unit_range(inputs["x"] if "x" in inputs else inputs["x0"])
    eps = inputs["eps"] if "eps" in inputs else _noise(x0)
    return (x0.mul(_rows(inputs["a"], x0)).add(eps.mul(_rows(inputs["b"], x0))),)


def denoising_loss(case: Case, inputs: Inputs) -> Outputs:
    pred, x0 = inputs["pred"], _in_unit_range(inputs["x"])
    eps = inputs["eps"].double() if "noise" in case.setting else _noise(pred)
    setting = case.setting.split("-")[0]
    if setting == "flow":
        # Liu et al. 2022, eq. 1, with images at t = 0.
        return (_mean(pred - (eps - x0)),)
    t = inputs["t"]
    if setting == "edm":
        # Karras et al. 2022, eq. 8: the denoiser's error times lambda(sigma), for sigma_data = 1/2.
        sigma, data = _rows(t.float(), pred), 0.5
        total = sigma**2 + data**2
        denoised = data**2 / total * (x0 + sigma * eps) + sigma * data / total.sqrt() * pred
        return (_mean((denoised - x0) * (total / (sigma * data) ** 2).sqrt()),)
    bar = torch.tensor([alpha_bar_of(int(i)) for i in t]).double()
    snr = bar / (1 - bar)
    root, rest = _rows(bar.sqrt(), pred), _rows((1 - bar).sqrt(), pred)
    if setting == "x0":
        return (torch.clamp(snr, max=5.0) * _mean(pred - x0),)
    if setting == "v":
        loss = _mean(pred - (root * eps - rest * x0))
        if "uint8" in case.setting:
            loss = torch.clamp(snr, max=5.0) / (snr + 1) * loss
        return (loss.mean() if "mean" in case.setting else loss,)
    loss = _mean(pred - eps)
    return (loss.mean() if setting == "mean" else loss,)


def alpha_bar_of(t: int) -> float:
    """Ho et al. 2020, section 4: beta from 1e-4 to 0.02 in 1,000 steps."""
    return math.exp(math.fsum(math.log1p(-(1e-4 + (0.02 - 1e-4) * s / 999)) for s in range(t + 1)))


def _mean(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)
