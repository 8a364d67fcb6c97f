"""Truth for the Bernoulli likelihood from torch.distributions in fp64."""

from __future__ import annotations

from torch.distributions import Bernoulli

from genfast.cases import Case, Inputs, Outputs


def bernoulli_nll(case: Case, inputs: Inputs) -> Outputs:
    x = inputs["x"].double() / 255 if "uint8" in case.setting else inputs["x"]
    nll = -Bernoulli(logits=inputs["logits"], validate_args=False).log_prob(x).sum(-1)
    if case.setting.startswith("mean"):
        return (nll.mean(),)
    return (nll.sum() if case.setting.startswith("sum") else nll,)
