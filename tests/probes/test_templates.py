"""Templates: what they allow, how they are found, what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.graphs import chain, from_parents, random_dag
from causal_probe.models import DisentangledTransformer
from causal_probe.probes import TEMPLATES, Template, from_graph, induction, offset, successor_of_parent, template
from causal_probe.probes.templates import find_templates
from tests.probes.oracle import is_target

GRAPH = from_parents([None, 0, 0, [1, 2], None, 3, 5])
NAMED = [
    "previous-token",
    "duplicate-token",
    "current-token",
    "first-token",
    "induction",
    "induction-2gram",
    "offset-0",
    "offset-3",
    "induction-4gram",
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_every_template_is_the_loop_over_its_definition(tokens):
    templates = [*map(template, NAMED), from_graph(GRAPH), successor_of_parent(GRAPH)]
    n = len(tokens)
    for found in templates:
        expected = [
            [j <= i and is_target(found.name, tokens, i, j, edges=set(GRAPH.edges)) for j in range(n)] for i in range(n)
        ]
        assert found(torch.tensor([tokens]))[0].tolist() == expected, found.name


def test_rows_of_a_batch_have_their_own_targets():
    tokens = torch.tensor([[1, 2, 1, 2], [1, 1, 2, 2]])
    for found in TEMPLATES.values():
        assert torch.equal(found(tokens), torch.cat([found(row[None]) for row in tokens]))


def test_the_successor_on_a_chain_is_induction():
    tokens = torch.randint(4, (5, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(successor_of_parent(chain(12))(tokens), induction()(tokens))


def test_a_graph_may_start_after_bos_and_reach_beyond_the_sequence():
    graph = random_dag(8, parents=2, seed=0)
    tokens = torch.zeros(1, 6, dtype=torch.long)
    allowed = from_graph(graph, first=1)(tokens)[0]
    assert set(map(tuple, allowed.nonzero().tolist())) == {(c + 1, p + 1) for p, c in graph.edges if c + 1 < 6}
    assert not successor_of_parent(graph, first=1)(tokens)[0, 0].any()


def test_names_are_found():
    assert template("offset-12").name == "offset-12"
    assert template("induction-5gram").shown_by == "5-gram"
    assert [found.name for found in find_templates(["induction", offset(2)])] == ["induction", "offset-2"]
    assert find_templates("induction") == find_templates([induction().name])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            ["inductoin"],
            "There is no template 'inductoin'; did you mean 'induction'\\? The known ones: previous-token, duplicate-",
        ),
        (["offset--1"], "no template 'offset--1'"),
        ([], "There is no template to look for"),
        ([chain(3)], "Templates are given as Template or by name; there are DiGraph"),
        ([offset(1), "offset-1"], "Several templates have the name offset-1"),
    ],
)
def test_what_is_no_template_is_told(wrong, message):
    with pytest.raises(CausalProbeError, match=message):
        find_templates(wrong)


def test_a_name_is_kebab_case():
    with pytest.raises(CausalProbeError, match="kebab-case, such as 'previous-token'; this one is 'My Head'"):
        Template("My Head", lambda tokens: tokens)


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda tokens: tokens, r"torch.int64 \[2, 4\]"),
        (lambda tokens: torch.ones(2, 4, 4), r"torch.float32 \[2, 4, 4\]"),
        (lambda tokens: torch.ones(4, 2, 4, dtype=torch.bool), r"torch.bool \[4, 2, 4\]"),
        (lambda tokens: [[True]], "list"),
    ],
)
def test_what_a_function_must_return_is_told(function, got):
    with pytest.raises(CausalProbeError, match=rf"'mine' must turn tokens of shape \[2, 4\] into .*it returned {got}"):
        Template("mine", function)(torch.zeros(2, 4, dtype=torch.long))


def test_targets_after_the_query_are_ignored():
    everything = Template("everything", lambda tokens: torch.ones(3, 3, dtype=torch.bool))
    assert everything(torch.zeros(2, 3, dtype=torch.long)).sum().item() == 2 * 6


@pytest.mark.parametrize(
    ("build", "message"), [(lambda: offset(-1), "from 0; it is -1"), (lambda: induction(0), "n is 0")]
)
def test_arguments_out_of_range_are_told(build, message):
    with pytest.raises(CausalProbeError, match=message):
        build()


def test_a_graph_that_is_none_of_positions_is_told():
    with pytest.raises(CausalProbeError):
        from_graph(chain(3).reverse())


def test_a_template_that_writes_into_its_tokens_changes_neither_the_callers_nor_the_models():
    def targets(tokens):
        found = tokens[:, :, None] == tokens[:, None]
        tokens.zero_()
        return found

    tokens = torch.tensor([[3, 4, 3, 5, 4]])
    model = DisentangledTransformer(d_vocab=6, n_positions=5)
    honest, writing = (
        list(probes.scan(model, tokens, templates=[Template("same", each)]))
        for each in (lambda tokens: tokens[:, :, None] == tokens[:, None], targets)
    )
    assert tokens.tolist() == [[3, 4, 3, 5, 4]]
    assert writing == honest
