"""The ops of `genfast.functional` in plain PyTorch: the readable definition, and the path on devices without Triton.

Each module has `forward`, which autograd can differentiate, and `backward`, the explicit gradient that the op uses.
"""

from genfast.reference import (
    affine_coupling,
    bernoulli_nll,
    denoising_loss,
    dequantize_logit,
    forward_noising,
    kl_normal,
    mixture_logistic_coupling,
    reparameterize_kl,
    reparameterize_kl_packed,
    reverse_step,
)

__all__ = [
    "affine_coupling",
    "bernoulli_nll",
    "denoising_loss",
    "dequantize_logit",
    "forward_noising",
    "kl_normal",
    "mixture_logistic_coupling",
    "reparameterize_kl",
    "reparameterize_kl_packed",
    "reverse_step",
]
