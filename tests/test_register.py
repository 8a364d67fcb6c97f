"""What registration promises beyond the ops themselves."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from genfast.cases import CASES, run
from genfast.functional import _register, _stored, explain_path, kl_normal

# By module: its name is also that of the function.
bernoulli_nll = importlib.import_module("genfast.functional.bernoulli_nll")


def test_compiled_graphs_are_keyed_by_the_formulas():
    """torch's cache of compiled graphs sees a digest of the sources, so an upgrade never runs old formulas."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, _):
        graphs.append(graph)
        return graph.forward

    zeros = torch.zeros(2, 3)
    torch.compile(kl_normal, backend=keep, fullgraph=True)(zeros, zeros, zeros, zeros)
    constants = [arg for node in graphs[0].graph.nodes for arg in node.args if isinstance(arg, str)]
    assert _register.digest() in constants


def test_the_digest_changes_with_any_formula(tmp_path, monkeypatch):
    package = tmp_path / "genfast"
    (package / "functional").mkdir(parents=True)
    (package / "reference").mkdir()
    (package / "random.py").write_text("a")
    (package / "reference" / "op.py").write_text("b")
    monkeypatch.setattr(_register, "__file__", str(package / "functional" / "_register.py"))
    before = _register.digest()
    (package / "reference" / "op.py").write_text("c")
    assert _register.digest() != before


def test_every_public_op_says_which_path_it_takes():
    paths = explain_path("cuda")
    assert {"reparameterize_kl", "reparameterize_kl_packed", "kl_normal", "bernoulli_nll"} <= paths.keys()
    assert not any(name.endswith("_backward") for name in paths)


class _Watching(TorchDispatchMode):
    """Changes nothing, but its presence sends every call through the dispatcher."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_past_the_dispatcher_and_through_it_gives_the_same_bits(case, device):
    inputs = case.inputs((5, 20), torch.float32, device, torch.Generator().manual_seed(0))
    past = run(case, "fused", inputs)
    with _Watching():
        through = run(case, "fused", inputs)
    assert all(torch.equal(a, b) for a, b in zip(past[0], through[0], strict=True))
    assert all(torch.equal(past[1][name], through[1][name]) for name in past[1])


def test_plain_eager_calls_go_past_the_dispatcher(device):
    """torch.jit and dispatch modes still see the op."""
    mu = torch.nn.Parameter(torch.zeros(2, 3, device=device))
    assert type(kl_normal(mu, mu, mu, mu).grad_fn).__name__ == "kl_normalBackward"
    with _Watching():
        assert "GeneratedBackwardFor_genfast_kl_normal" in type(kl_normal(mu, mu, mu, mu).grad_fn).__name__
    graph = make_fx(lambda x: kl_normal(x, x, x, x))(torch.zeros(2, 3, device=device))
    assert "torch.ops.genfast.kl_normal" in graph.code


def test_what_is_no_plain_tensor_goes_through_the_dispatcher(device):
    """Whichever argument it is; and tracing before dispatch keeps the op whole."""

    class Wrapped(torch.Tensor):
        pass

    plain = torch.zeros(2, 3, device=device, requires_grad=True)
    wrapped = torch.zeros(2, 3, device=device).as_subclass(Wrapped)
    alias = kl_normal(plain, wrapped, plain, plain).grad_fn
    assert "GeneratedBackwardFor_genfast_kl_normal" in type(alias.next_functions[0][0]).__name__
    graph = make_fx(lambda x: kl_normal(x, x, x, x), pre_dispatch=True)(plain.detach())
    assert "genfast.kl_normal" in graph.code


def test_a_result_may_be_changed_in_place(device):
    """It is no view of anything."""
    x = torch.ones(2, 3, device=device, requires_grad=True)
    kl_normal(x, x, 2 * x, x).clamp_(min=0.1).sum().backward()
    assert x.grad is not None


def test_what_an_op_overwrites_has_a_new_version(device):
    """Else autograd would go on with values that are no longer there."""
    x, factor = torch.ones(4, device=device), torch.full((), 2.0, device=device)
    before = x._version
    _stored._op_rescale(x, factor)
    assert x.tolist() == [2.0] * 4
    assert x._version > before
