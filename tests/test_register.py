"""What registration promises beyond the ops themselves."""

from __future__ import annotations

import torch

from genfast.functional import _register, explain_path, kl_normal


def test_compiled_graphs_are_keyed_by_the_formulas():
    """torch's cache of compiled graphs sees a digest of the sources, so an upgrade never runs old formulas."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, _):
        graphs.append(graph)
        return graph.forward

    zeros = torch.zeros(2, 3)
    torch.compile(kl_normal, backend=keep, fullgraph=True)(zeros, zeros, zeros, zeros)
    constants = [arg for node in graphs[0].graph.nodes for arg in node.args if isinstance(arg, str)]
    assert _register._source() in constants


def test_the_digest_changes_with_any_formula(tmp_path, monkeypatch):
    package = tmp_path / "genfast"
    (package / "functional").mkdir(parents=True)
    (package / "reference").mkdir()
    (package / "random.py").write_text("a")
    (package / "reference" / "op.py").write_text("b")
    monkeypatch.setattr(_register, "__file__", str(package / "functional" / "_register.py"))
    before = _register._source()
    (package / "reference" / "op.py").write_text("c")
    assert _register._source() != before


def test_every_public_op_says_which_path_it_takes():
    paths = explain_path("cuda")
    assert {"reparameterize_kl", "reparameterize_kl_packed", "kl_normal", "bernoulli_nll"} <= paths.keys()
    assert not any(name.endswith("_backward") for name in paths)
