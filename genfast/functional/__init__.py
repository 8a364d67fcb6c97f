"""The fused ops: arguments checked, the path chosen by device, autograd and torch.compile supported."""

from genfast.functional._register import explain_path
from genfast.functional.bernoulli_nll import bernoulli_nll
from genfast.functional.kl_normal import kl_normal
from genfast.functional.reparameterize_kl import reparameterize_kl
from genfast.functional.reparameterize_kl_packed import reparameterize_kl_packed

__all__ = ["bernoulli_nll", "explain_path", "kl_normal", "reparameterize_kl", "reparameterize_kl_packed"]
