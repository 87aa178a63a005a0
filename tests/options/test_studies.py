"""Of every study: the signature, the docstring, the command, the settings, the call and the sweep say what its options say."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from typing import Any, get_args, get_type_hints

import pytest
import typer

import causal_probe
from causal_probe import CausalProbeError, experiments
from causal_probe.arguments import Help
from causal_probe.cli.commands import commands
from causal_probe.cli.main import app
from causal_probe.options import STUDIES, Options, takes
from causal_probe.options.base import GIVEN
from causal_probe.options.scan import ScanOptions
from causal_probe.options.studies import SweepOptions
from causal_probe.sweep.cells import PROBES
from causal_probe.sweep.plan import plan

#: What has no default, as text.
NEEDED: dict[str, dict[str, Any]] = {
    "discover_in_text": {"text": "a b"},
    "reproduce": {"name": "mesa"},
    "sweep": {"out": "x"},
}

#: Another value of every option, by name; by type where there is none.
ONE_PROMPT = ("text", "answer", "wrong", "baselines")
OTHER: dict[str, Any] = {
    "graph": "chain", "graphs": ["chain"], "heads": [2, 1], "training": "joint", "optimizer": "sgd", "bos": "yes", "words": ["a"],
    "templates": ["induction"], "corpus": "texts", "shard": "1/4", "head": "mean", "algorithm": "pc", "samples": 100, "source": "values",
    "explain": "-1", "models": ["trained"], "ratings": "u.data", "backend": "dask", "scheduler": "tcp://x:1", "separator": "--",
    "dtype": "float64", "text": "c d", "name": "sine", "out": "y", "concentration": 0.25, "level": 0.25, "root_probability": 0.25,
    "residual": 0.25, "device": "cpu", "learning_rate": 0.25, "field": "body", "prior": "diagonal", "beside": "folder", "task": "ioi",
    "metric": "log-probability", "contrast": "zero", "correction": "family-wise", "n_prompts": 48, "most": 50, "answer": " a", "wrong": " b", "baselines": __file__,
    "strategy": "nodes", "keep": 0.25, "conllu": "own.conllu", "n_sentences": 20,
}  # fmt: skip


def other(option: Any) -> Any:
    value = not option.default if option.hint is bool else OTHER.get(option.name, 7)
    return [value] if isinstance(option.default, tuple) and not isinstance(value, list) else value


@pytest.mark.parametrize("name", STUDIES)
def test_the_function_takes_the_options(name: str) -> None:
    study = STUDIES[name]
    function = getattr(getattr(causal_probe, study.place), name)
    described = study.options.described()
    assert function.options is study.options
    parameters = inspect.signature(function).parameters
    subject = [] if study.options.subject is None else [study.options.subject.name]
    assert list(parameters) == [*subject, *described]
    for option in described.values():
        shown = parameters[option.name]
        assert shown.default == (inspect.Parameter.empty if option.required else option.default)
        assert (shown.kind is shown.KEYWORD_ONLY) is not option.positional
    sections = (function.__doc__ or "").split("Parameters\n----------\n")
    assert len(sections) == 2, "the section on parameters is made, not written"
    for option in described.values():
        assert f"\n{option.name}\n    {option.help.text}" in "\n" + sections[1]
        assert option.help.text.endswith((".", "?"))
        assert option.default is not None or option.help.none or not option.help.in_command or not option.help.setting


@pytest.mark.parametrize("name", [name for name, study in STUDIES.items() if study.command])
def test_the_command_has_the_options(name: str) -> None:
    study = STUDIES[name]
    function = dict(commands())[study.command or ""]
    signature = inspect.signature(function)
    described = {key: option for key, option in study.options.described().items() if option.help.in_command}
    subject = set() if study.options.subject is None else {study.options.subject.name}
    alone = sum(each.command == study.command for each in STUDIES.values()) == 1
    if alone:
        assert set(signature.parameters) == {*described, *subject, "as_json"}
    else:
        assert {*described, *subject, "as_json", "method"} <= set(signature.parameters)
    for key, option in described.items():
        about = get_args(signature.parameters[key].annotation)[1]
        assert option.help.text in about.help.replace("\\[", "[")


def test_there_are_no_other_commands() -> None:
    assert [each.name for each in app.registered_commands] == [name for name, _ in commands()]
    assert {study.command for study in STUDIES.values() if study.command} == {name for name, _ in commands()}


@pytest.mark.parametrize("name", STUDIES)
def test_settings_and_call_say_the_options(name: str) -> None:
    """The call, run, gives options with the same settings; it says what differs from the defaults, and that alone."""
    cls = STUDIES[name].options
    needed = NEEDED.get(name, {})
    plain = cls(**needed)
    described = cls.described()
    its = {option.name for option in described.values() if option.help.setting}
    assert set(plain.settings()) == its
    assert keywords(cls.call(name, plain.settings())) == {key: needed[key] for key in needed if key in its}
    for option in described.values():
        if option.name not in its:
            continue
        changed = {**needed, option.name: other(option)}
        of_corpus = "corpus" in described and option.name in ("length", "separator", "field", "shard")
        changed |= {"corpus": "texts"} if of_corpus else {}
        changed |= {"backend": "dask"} if option.name == "scheduler" else {}
        changed |= {"verify": True} if option.name == "exhaustive" else {}
        changed |= {"strategy": "nodes"} if option.name == "keep" else {}
        changed |= {"n_components": 2} if name == "model_structure" and option.name == "n_sequences" else {}
        if name == "model_circuit" and option.name in ONE_PROMPT:
            changed = {"text": "c d", "answer": " a", **changed}
        settings = cls(**changed).settings()
        assert settings[option.name] == other(option)
        said = keywords(cls.call(name, settings))
        assert (option.name in said) is option.help.in_call
        again = cls(**said, **{key: needed[key] for key in needed if key not in said}).settings()
        assert all(again[key] == settings[key] for key in its if described[key].help.in_call)


def keywords(call: str) -> dict[str, Any]:
    """The arguments of a call, by name; those by place by the names that its study gives them."""
    expression = ast.parse(call.splitlines()[-1]).body[0]
    assert isinstance(expression, ast.Expr)
    assert isinstance(expression.value, ast.Call)
    assert isinstance(expression.value.func, ast.Attribute)
    cls = STUDIES[expression.value.func.attr].options
    places = [option.name for option in cls.described().values() if option.positional]
    found = {place: ast.literal_eval(each) for place, each in zip(places, expression.value.args, strict=False)}
    return found | {str(each.arg): ast.literal_eval(each.value) for each in expression.value.keywords}


def test_what_has_no_name_is_given() -> None:
    assert ScanOptions(templates=[object()]).settings()["templates"] == [GIVEN]
    assert "graphs.from_parents([])" in STUDIES["recover"].options.call(
        "recover", {"graph": GIVEN}, graph="graphs.from_parents([])"
    )


#: Of a probe in a sweep, the study whose options it has, and what it adds.
OF_A_CELL: dict[str, tuple[str, set[str]]] = {
    "recover": ("recover", {"graph_seed"}),
    "gradient": ("recover_by_gradient", {"graph_seed"}),
    "scan": ("scan", {"model", "revision", "step", "device_map"}),
}
NOT_IN_A_CELL = {"verify", "exhaustive", "delta", "attributions", "top"}


@pytest.mark.parametrize("probe", OF_A_CELL)
def test_a_sweep_takes_what_the_study_takes(probe: str) -> None:
    study, added = OF_A_CELL[probe]
    its = {key: option for key, option in STUDIES[study].options.described().items() if option.help.setting}
    cell = PROBES[probe].options.described()  # type: ignore[attr-defined]
    assert set(cell) == (set(its) - NOT_IN_A_CELL) | added
    for key in set(cell) & set(its):
        assert (cell[key].hint, cell[key].help) == (its[key].hint, its[key].help) or key in ("n_sequences", "device")
    needed = {"model": "m"} if probe == "scan" else {}
    for key in its.keys() - NOT_IN_A_CELL - {"seed"}:
        spec = {"probes": probe, "grid": {key: [["no"]] if its[key].hint is not Any else [0]}, "settings": needed}
        if key not in ("graph", "templates", "corpus", "shard"):  # of any type, or lists
            with pytest.raises(CausalProbeError, match=f"The probe {probe}: `{key}` is"):
                plan(spec, PROBES)


# ---------------------------------------------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ScanOptions(length=8), "`length` is about a corpus, and none was given"),
        (lambda: ScanOptions(field="x", shard="1/2"), "`field`, `shard` are about a corpus"),
        (lambda: ScanOptions(corpus="x", period=3), "`period` is about sequences that are made, and `corpus` was given"),
        (lambda: ScanOptions(exhaustive=True), "`exhaustive` says how heads are verified"),
        (lambda: SweepOptions(out="x", scheduler="tcp://y:1"), "say backend dask"),
        (lambda: STUDIES["leaderboard"].options(graphs=["chain", "chain"]), "The graph chain was named twice in `graphs`"),
        (lambda: STUDIES["compare_evidence"].options(models=[]), "`models` is empty"),
        (lambda: STUDIES["discover_in_text"].options(text=" "), "The text is empty"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(make: Any, words: str) -> None:
    with pytest.raises(CausalProbeError, match=words):
        make()


def test_a_misspelt_keyword_is_both_errors() -> None:
    for error in (CausalProbeError, TypeError):
        with pytest.raises(error, match="scan has no option `n_seqences`; did you mean `n_sequences`"):
            experiments.scan("model", n_seqences=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="misses its first argument, model"):
        experiments.scan()  # type: ignore[call-arg]


def test_an_option_without_a_help_is_a_mistake_of_ours() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Silent(Options):
        x: int = 0

    with pytest.raises(TypeError, match=r"Silent\.x has no Help"):
        Silent()
    assert get_type_hints(Help)["text"] is str


def test_a_function_without_a_docstring_stays_without_one() -> None:
    @takes(ScanOptions)
    def silent(o: ScanOptions) -> int:
        return o.top

    assert silent.__doc__ is None
    assert silent(top=3) == 3


def test_options_need_no_torch() -> None:
    code = "import sys, causal_probe.options; print({'torch', 'numpy', 'networkx', 'typer'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"
    assert typer.Typer


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("size", [10**15, 10**20])
def test_sizes_are_checked_before_memory_is_taken(study: str, size: int) -> None:
    options = STUDIES[study].options
    for name in {"n_sequences", "n_positions"} & set(options.described()):
        with pytest.raises(CausalProbeError, match=f"`{name}` is {size}"):
            options.allowed(name, size)
