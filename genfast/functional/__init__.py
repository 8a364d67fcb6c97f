"""The fused ops: arguments checked, the path chosen by device, autograd and torch.compile supported."""

from genfast.functional._register import explain_path
from genfast.functional.affine_coupling import affine_coupling
from genfast.functional.bernoulli_nll import bernoulli_nll
from genfast.functional.denoising_loss import denoising_loss
from genfast.functional.dequantize_logit import dequantize_logit
from genfast.functional.forward_noising import forward_noising
from genfast.functional.kl_normal import kl_normal
from genfast.functional.mixture_logistic_coupling import mixture_logistic_coupling
from genfast.functional.q_sample import Noised, q_sample
from genfast.functional.reparameterize_kl import reparameterize_kl
from genfast.functional.reparameterize_kl_packed import reparameterize_kl_packed
from genfast.functional.reverse_step import reverse_step

__all__ = [
    "Noised",
    "affine_coupling",
    "bernoulli_nll",
    "denoising_loss",
    "dequantize_logit",
    "explain_path",
    "forward_noising",
    "kl_normal",
    "mixture_logistic_coupling",
    "q_sample",
    "reparameterize_kl",
    "reparameterize_kl_packed",
    "reverse_step",
]
